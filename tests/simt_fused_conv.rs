//! Fused convolutions on the SIMT host machine against the composition of plain operations on the CPU device in double precision.

mod common;

use common::{deviation, on_two_threads};
use mlnt::cases::{Planned, planned};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{ConvForm, ConvGeom, FusedConv, Op};
use mlnt::plan::Plan;
use mlnt::tape::Meta;

fn run(device: &mut dyn Device, plan: Plan, planned: &Planned, values: &[HostVec]) -> Vec<HostVec> {
    let outputs = plan.outputs.clone();
    let id = device.load(plan).unwrap();
    for (operand, values) in planned.case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    // Twice: counters must be as they were.
    device.run(id, &[]).unwrap();
    outputs.iter().map(|port| device.read_output(id, &port.name).unwrap()).collect()
}

fn on_simt(planned: &Planned, values: &[HostVec], operands: Operands, seed: u64) -> Vec<HostVec> {
    let mut device = Cuda::new(Box::new(Simt::open(seed).unwrap()), operands, Mode::Eager);
    run(&mut device, planned.plan(operands.is_half()).unwrap(), planned, values)
}

fn numbers(planned: &Planned, operands: Operands) -> Vec<HostVec> {
    planned.values(11, |x| if operands.is_half() { operands.stored(x) } else { x })
}

fn tolerance(operands: Operands) -> f64 {
    match operands {
        Operands::F32 => 1e-5,
        Operands::Tf32 | Operands::F16 => 3e-3,
        Operands::Bf16 => 3e-2,
    }
}

/// What is wrong with a case.
fn faults(planned: &Planned, operands: Operands) -> Vec<String> {
    let values = numbers(planned, operands);
    let want = run(&mut Cpu::<f64>::new(1).unwrap(), planned.composition().unwrap(), planned, &values);
    let have = on_simt(planned, &values, operands, 1);
    let mut found = Vec::new();
    let mut compare = |what: String, have: &HostVec, want: &HostVec, tolerance: f64| {
        let rel = deviation(&have.to_f64(), &want.to_f64());
        if rel > tolerance {
            found.push(format!("{} {}: {what}: {rel:.1e} > {tolerance:.0e}", operands.name(), planned.case.name));
        }
    };
    // Statistics are those of the numbers that later operations read.
    let statistics = planned.statistics(&have[0]).unwrap();
    for (i, want) in want.iter().enumerate() {
        match statistics.iter().find(|(at, _)| *at == i) {
            Some((_, own)) => compare(format!("statistics {i}"), &have[i], own, if i == 1 { 1e-6 } else { 2e-6 }),
            None => compare(format!("result {i}"), &have[i], want, tolerance(operands)),
        }
    }
    if have != on_simt(planned, &values, operands, 2) {
        found.push(format!("{} {}: depends on the order of threads", operands.name(), planned.case.name));
    }
    found
}

fn check(operands: Operands) {
    let cases: Vec<Planned> = planned().into_iter().filter(|p| matches!(p.case.op, Op::FusedConv(_))).collect();
    assert!(cases.len() >= 150);
    let failures = on_two_threads(&cases, |planned| faults(planned, operands));
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn fused_convolutions_f32() {
    check(Operands::F32);
}

#[test]
fn fused_convolutions_tf32() {
    check(Operands::Tf32);
}

#[test]
fn fused_convolutions_f16() {
    check(Operands::F16);
}

#[test]
fn fused_convolutions_bf16() {
    check(Operands::Bf16);
}

/// Deviations of 1 around a mean of 10,000: single precision has the digits for the variance, if they are not thrown away.
#[test]
fn statistics_keep_their_digits() {
    // More tiles than are combined at a time, of the kernels that gather and of the direct ones.
    let tries = [(Operands::F32, [16, 3, 18, 18, 5]), (Operands::F16, [40, 8, 18, 18, 16])];
    for (operands, [n, c, h, w, k]) in tries {
        let geom = ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, 1, 1), 1, 0).unwrap();
        let op = FusedConv { form: ConvForm::Fprop, geom, norm: false, start: true, stats: true };
        let planned = Planned::convolution(op, 2, 1, false, [false; 2], 0);
        let mut values = numbers(&planned, operands);
        let start = op.start_operand().unwrap();
        values[start] = HostVec::F64(vec![1e4; values[start].to_f64().len()]);
        let have = on_simt(&planned, &values, operands, 1);
        for ((at, own), within) in planned.statistics(&have[0]).unwrap().iter().zip([1e-7, 1e-6]) {
            let off = deviation(&have[*at].to_f64(), &own.to_f64());
            assert!(off < within, "statistics {at}: {off:.1e}");
        }
    }
}
