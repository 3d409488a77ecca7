//! Every operation case on the SIMT host machine against the CPU device in double precision.

mod common;

use common::{deviation, on_two_threads};
use mlnt::cases::{Case, all};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::Op;
use mlnt::plan::{Plan, PlanOptions};

/// Results of a case on a device.
fn results(device: &mut dyn Device, case: &Case, values: &[HostVec]) -> Vec<Vec<f64>> {
    let recorded = case.record().unwrap();
    let plan = Plan::build(&recorded.tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.iter().map(|name| device.read_output(id, name).unwrap().to_f64()).collect()
}

fn on_simt(case: &Case, values: &[HostVec], operands: Operands, seed: u64) -> Vec<Vec<f64>> {
    let driver = Simt::open(seed).unwrap();
    results(&mut Cuda::new(Box::new(driver), operands, Mode::Eager), case, values)
}

/// Checks every case of the operations that `of` takes.
fn check(of: impl Fn(&Op) -> bool, operands: Operands, tolerance: f64) {
    let cases: Vec<Case> = all().into_iter().filter(|c| of(&c.op)).collect();
    assert!(!cases.is_empty());
    let failures = on_two_threads(&cases, |case| {
        let values = case.values(1);
        let want = results(&mut Cpu::<f64>::new(1).unwrap(), case, &values);
        let have = on_simt(case, &values, operands, 1);
        let mut found = Vec::new();
        for (i, (have, want)) in have.iter().zip(&want).enumerate() {
            let rel = deviation(have, want);
            if rel > tolerance {
                found.push(format!("{}, result {i}: {rel:.1e} > {tolerance:.0e}", case.name));
            }
        }
        // Another order of warps and lanes must not change a bit.
        if have != on_simt(case, &values, operands, 2) {
            found.push(format!("{}: depends on the order of threads", case.name));
        }
        found
    });
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn convolutions_f32() {
    check(|op| matches!(op, Op::Conv(_)), Operands::F32, 1e-5);
}

#[test]
fn convolutions_tf32() {
    check(|op| matches!(op, Op::Conv(_)), Operands::Tf32, 3e-3);
}

#[test]
fn convolutions_f16() {
    check(|op| matches!(op, Op::Conv(_)), Operands::F16, 3e-3);
}

#[test]
fn convolutions_bf16() {
    check(|op| matches!(op, Op::Conv(_)), Operands::Bf16, 3e-2);
}

#[test]
fn batch_norms() {
    let of = |op: &Op| matches!(op, Op::BnForward(_) | Op::BnBackward(_) | Op::BnDoubleBackward(_) | Op::BnEval(_));
    check(of, Operands::F32, 1e-5);
}

#[test]
fn elementwise() {
    let of = |op: &Op| {
        matches!(
            op,
            Op::Relu(_) | Op::Mask(_) | Op::LinComb(_) | Op::Fill(_) | Op::ChannelSum(_) | Op::ChannelBroadcast(_)
        )
    };
    check(of, Operands::F32, 1e-5);
}

#[test]
fn finiteness() {
    check(|op| matches!(op, Op::AllFinite(_)), Operands::F32, 0.0);
}

#[test]
fn pooling() {
    let of = |op: &Op| {
        matches!(
            op,
            Op::AvgPool(_) | Op::AvgPoolBackward(_) | Op::MaxPoolIndex(_) | Op::PoolGather(_) | Op::PoolScatter(_)
        )
    };
    check(of, Operands::F32, 1e-5);
}

#[test]
fn heads() {
    let of = |op: &Op| {
        matches!(op, Op::Softmax(_) | Op::SoftmaxJvp(_) | Op::CeLoss(_) | Op::CeGrad(_) | Op::KlLoss(_) | Op::KlGrad(_))
    };
    check(of, Operands::F32, 1e-5);
}

#[test]
fn neighbours() {
    check(|op| matches!(op, Op::NearestNeighbours(_) | Op::TransferLabels(_)), Operands::F32, 0.0);
}
