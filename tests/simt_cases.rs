//! Every operation case on the SIMT host machine against the CPU device in double precision.

mod common;

use common::on_two_threads;
use mlnt::cases::{Planned, all};
use mlnt::check::{Deviation, deviations, same_bits};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::Op;
use mlnt::plan::Plan;

/// Results of a case on a device.
fn results(device: &mut dyn Device, case: &Planned, plan: Plan, values: &[HostVec]) -> Vec<HostVec> {
    let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.iter().map(|name| device.read_output(id, name).unwrap()).collect()
}

/// What is wrong with a case on a machine in the place of a card of this generation.
fn faults(case: &Planned, operands: Operands, generation: Generation) -> Vec<String> {
    let (name, values) = (&case.case.name, case.values(1, |v| operands.stored(v)));
    let want = results(&mut Cpu::<f64>::new(1).unwrap(), case, case.composition().unwrap(), &values);
    let on_simt = |seed: u64| {
        let driver = Simt::open(seed).unwrap().like(generation);
        let plan = case.plan(operands.is_half()).unwrap();
        results(&mut Cuda::new(Box::new(driver), operands, Mode::Eager), case, plan, &values)
    };
    let have = on_simt(1);
    let wrong = deviations(case, operands, &values, &want, &have).unwrap().into_iter().filter(Deviation::is_fault);
    let mut found: Vec<String> = wrong.map(|d| format!("{name}, {}: {:.1e} > {:.0e}", d.what, d.by, d.most)).collect();
    // Another order of warps and lanes must not change a bit.
    if !have.iter().zip(&on_simt(2)).all(|(a, b)| same_bits(a, b)) {
        found.push(format!("{name}: depends on the order of threads"));
    }
    found
}

/// Checks every case of the operations that `of` takes.
fn check(of: impl Fn(&Op) -> bool, operands: Operands) {
    let cases: Vec<Planned> = all().into_iter().filter(|c| of(&c.op)).map(Planned::plain).collect();
    assert!(!cases.is_empty());
    let failures = on_two_threads(&cases, |case| faults(case, operands, Generation::Portable));
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn convolutions_f32() {
    check(|op| matches!(op, Op::Conv(_)), Operands::F32);
}

#[test]
fn convolutions_tf32() {
    check(|op| matches!(op, Op::Conv(_)), Operands::Tf32);
}

#[test]
fn convolutions_f16() {
    check(|op| matches!(op, Op::Conv(_)), Operands::F16);
}

#[test]
fn convolutions_bf16() {
    check(|op| matches!(op, Op::Conv(_)), Operands::Bf16);
}

/// Those that the kernels of warpgroups take.
#[test]
fn convolutions_of_warpgroups() {
    let eights = |op: &Op| matches!(op, Op::Conv(c) if c.geom.c % 8 == 0 && c.geom.k % 8 == 0);
    let cases: Vec<Planned> = all().into_iter().filter(|c| eights(&c.op)).map(Planned::plain).collect();
    assert!(cases.len() > 10);
    let halves = [Operands::F16, Operands::Bf16];
    let failures =
        on_two_threads(&cases, |case| halves.map(|operands| faults(case, operands, Generation::Hopper)).concat());
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn batch_norms() {
    let of = |op: &Op| matches!(op, Op::BnForward(_) | Op::BnBackward(_) | Op::BnDoubleBackward(_) | Op::BnEval(_));
    check(of, Operands::F32);
}

#[test]
fn elementwise() {
    let of = |op: &Op| {
        matches!(
            op,
            Op::Relu(_) | Op::Mask(_) | Op::LinComb(_) | Op::Fill(_) | Op::ChannelSum(_) | Op::ChannelBroadcast(_)
        )
    };
    check(of, Operands::F32);
}

#[test]
fn finiteness() {
    check(|op| matches!(op, Op::AllFinite(_)), Operands::F32);
}

#[test]
fn pooling() {
    let of = |op: &Op| {
        matches!(
            op,
            Op::AvgPool(_) | Op::AvgPoolBackward(_) | Op::MaxPoolIndex(_) | Op::PoolGather(_) | Op::PoolScatter(_)
        )
    };
    check(of, Operands::F32);
}

#[test]
fn heads() {
    let of = |op: &Op| {
        matches!(op, Op::Softmax(_) | Op::SoftmaxJvp(_) | Op::CeLoss(_) | Op::CeGrad(_) | Op::KlLoss(_) | Op::KlGrad(_))
    };
    check(of, Operands::F32);
}

#[test]
fn neighbours() {
    check(|op| matches!(op, Op::NearestNeighbours(_) | Op::TransferLabels(_)), Operands::F32);
}
