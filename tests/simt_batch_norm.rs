//! Batch norm on the SIMT host machine where the table of cases does not go: large means, one row, many branches,
//! channels that do not fill a tile, many chunks of rows.

mod common;

use common::{deviation, on_two_threads};
use mlnt::cases::{Case, Data, Operand};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{BnBackward, BnDoubleBackward, BnEval, BnForward, Op, Operation};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::tape::Meta;

/// Samples, channels, height, width.
type Size = [usize; 4];

/// The operation of a case with its operands: `branched` are per-branch, the results with `sum` are summed.
fn case(op: impl Into<Op>, size: Size, branches: usize, branched: &[&'static str], sum: &[bool]) -> Case {
    let op = op.into();
    let [n, c, h, w] = size;
    let (vector, activation) = (Meta::vector(c), Meta::activation(n, c, h, w));
    let (masked, names): (bool, &[&'static str]) = match &op {
        Op::BnForward(_) => (false, &["x", "g", "b"]),
        Op::BnEval(_) => (false, &["x", "g", "b", "mean", "var"]),
        Op::BnBackward(op) => (op.relu, &["dy", "x", "g", "mean", "var"]),
        Op::BnDoubleBackward(op) => (op.relu, &["x_dot", "g_dot", "b_dot", "dy", "x", "g", "mean", "var"]),
        _ => unreachable!("no batch norm"),
    };
    let names = names.iter().copied().chain(masked.then_some("y"));
    let x = names.clone().position(|name| name == "x").unwrap_or_default();
    let operand = |name| {
        let (meta, data) = match name {
            "mean" => (vector, Data::MeanOf(x)),
            "var" => (vector, Data::VarianceOf(x)),
            "y" => (activation, Data::Clear),
            "x" | "dy" | "x_dot" => (activation, Data::Normal),
            _ => (vector, Data::Normal),
        };
        let source = if matches!(name, "mean" | "var") { "x" } else { name };
        let meta = meta.with_branching(branched.contains(&source));
        Operand { name, meta, data, differentiable: false }
    };
    let operands: Vec<Operand> = names.map(operand).collect();
    let name = format!("{} {size:?} M={branches} of {branched:?} summed {sum:?}", op.name());
    Case { name, op, branches, operands, sum: sum.to_vec(), tolerance: 1e-5, fused: true }
}

/// Every operation, with and without ReLU.
fn every_operation(size: Size, branches: usize, branched: &[&'static str], sum: &[bool; 3]) -> Vec<Case> {
    let both = |relu| {
        [
            case(BnForward { relu }, size, branches, branched, &[]),
            case(BnEval { relu }, size, branches, branched, &[]),
            case(BnBackward { relu }, size, branches, branched, sum),
            case(BnDoubleBackward { relu }, size, branches, branched, sum),
        ]
    };
    [both(false), both(true)].concat()
}

/// Numbers for a case, exact in single precision, with `offset` added to x and 2, if that is less, to its cotangents.
fn values(case: &Case, offset: f64) -> Vec<HostVec> {
    let moved = |values: &HostVec, by: f64| {
        HostVec::F64(values.to_f64().into_iter().map(|v| f64::from((v + by) as f32)).collect())
    };
    let mut list = case.values(1);
    for (operand, values) in case.operands.iter().zip(&mut list) {
        match operand.name {
            "x" => *values = moved(values, offset),
            "dy" | "x_dot" => *values = moved(values, offset.min(2.0)),
            _ => {}
        }
    }
    case.derive(&mut list);
    list.iter().map(|values| moved(values, 0.0)).collect()
}

fn results(device: &mut dyn Device, case: &Case, values: &[HostVec]) -> Vec<Vec<f64>> {
    let plan =
        Plan::build(&case.record().unwrap().tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.iter().map(|name| device.read_output(id, name).unwrap().to_f64()).collect()
}

/// Compares with the CPU device in double precision, and two orders of threads with each other.
fn check(cases: &[Case], offset: f64) {
    let failures = on_two_threads(cases, |case| {
        let values = values(case, offset);
        let want = results(&mut Cpu::<f64>::new(1).unwrap(), case, &values);
        let [have, again] = [1, 2].map(|seed| {
            let driver = Simt::open(seed).unwrap();
            results(&mut Cuda::new(Box::new(driver), Operands::F32, Mode::Eager), case, &values)
        });
        let mut found = Vec::new();
        for (i, (have, want)) in have.iter().zip(&want).enumerate() {
            let rel = deviation(have, want);
            if rel > case.tolerance {
                found.push(format!("{}, result {i}: {rel:.1e} > {:.0e}", case.name, case.tolerance));
            }
        }
        if have != again {
            found.push(format!("{}: depends on the order of threads", case.name));
        }
        found
    });
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

const KEPT: [bool; 3] = [false; 3];
const SUMMED: [bool; 3] = [true; 3];
/// MLNT's second order.
const MIXED: [bool; 3] = [false, true, true];
const TANGENTS: [&str; 4] = ["x_dot", "g_dot", "b_dot", "dy"];

#[test]
fn large_means() {
    for offset in [30.0, 1000.0] {
        let mut cases = every_operation([4, 5, 15, 11], 2, &["x"], &KEPT);
        cases.extend(every_operation([4, 5, 15, 11], 2, &TANGENTS, &MIXED));
        check(&cases, offset);
    }
}

#[test]
fn one_row() {
    let mut cases = every_operation([1, 5, 1, 1], 2, &["x"], &KEPT);
    cases.extend(every_operation([1, 40, 1, 1], 3, &["x", "dy"], &SUMMED));
    cases.extend(every_operation([1, 40, 1, 1], 3, &TANGENTS, &MIXED));
    check(&cases, 0.0);
}

#[test]
fn any_number_of_channels() {
    let mut cases = Vec::new();
    for c in [1, 31, 32, 33, 64, 100, 257] {
        // A sum over branches of a single channel's gain may be as near to zero as chance has it.
        cases.extend(every_operation([2, c, 5, 3], 8, &TANGENTS, &[false, true, c > 1]));
        cases.extend(every_operation([2, c, 5, 3], 1, &["x", "dy"], &SUMMED));
    }
    check(&cases, 0.0);
}

#[test]
fn many_branches() {
    let mut cases = Vec::new();
    for branches in [16, 17, 100] {
        cases.extend(every_operation([2, 3, 3, 2], branches, &TANGENTS, &MIXED));
        cases.extend(every_operation([2, 3, 3, 2], branches, &["x", "dy", "y"], &SUMMED));
        cases.extend(every_operation([2, 3, 3, 2], branches, &["g"], &KEPT));
    }
    check(&cases, 0.0);
}

#[test]
fn many_rows() {
    let mut cases = every_operation([8, 32, 32, 32], 2, &TANGENTS, &MIXED);
    cases.extend(every_operation([5, 7, 61, 53], 1, &["x"], &KEPT));
    check(&cases, 0.0);
}
