//! The batch norms whose sums over rows are operands, on the SIMT host machine.

mod common;
#[path = "common/rounded.rs"]
mod rounded;

use mlnt::cases::Case;
use mlnt::device::HostVec;
use mlnt::device::cuda::Operands;
use mlnt::ops::{BnReluBackwardApply, BnReluDoubleBackwardApply};
use mlnt::plan::Plan;
use rounded::*;

/// The batch norms whose sums are operands, in every mixture that a step has and some that it has not.
fn applied(size: [usize; 4], branches: usize) -> Vec<(Case, u32)> {
    let back = |start, branched: &[&str], sum: bool| {
        batch_norm(BnReluBackwardApply { start }, size, branches, branched, &[sum])
    };
    let double = |start, branched: &[&str], sum: [bool; 2]| {
        batch_norm(BnReluDoubleBackwardApply { start }, size, branches, branched, &sum)
    };
    let tangents = ["x_dot", "g_dot", "dy"];
    let mut list = vec![
        back(false, &[], false),
        back(true, &[], false),
        back(false, &["dy"], false),
        back(true, &["dy"], false),
        back(true, &["dy", "start"], false),
        back(true, &["dy", "x", "g", "b", "start"], false),
        back(true, &["start"], false),
        back(true, &["sums"], false),
        back(true, &["dy", "x"], true),
        back(false, &["dy", "g"], true),
        double(false, &[], [false; 2]),
        double(true, &[], [false; 2]),
        double(false, &tangents, [true; 2]),
        double(true, &tangents, [true; 2]),
        double(true, &tangents, [false; 2]),
        double(true, &tangents, [true, false]),
        double(false, &tangents, [false, true]),
        double(true, &["x_dot", "g_dot", "dy", "start"], [false, true]),
        double(true, &["x_dot", "g_dot", "dy", "x", "g", "b", "start"], [false; 2]),
        double(true, &["x_dot", "g_dot", "dy", "x", "g", "b"], [true; 2]),
        double(true, &["x_dot"], [true; 2]),
        double(true, &["sums", "start"], [false; 2]),
    ];
    if branches > 1 {
        list.extend([back(false, &["b"], false), double(false, &["b"], [false; 2])]);
    }
    list
}

#[test]
fn given_sums_in_f32() {
    let sizes = SIZES.into_iter().chain([[1, 5, 1, 1], [3, 257, 1, 1]]);
    let cases: Vec<_> = sizes.flat_map(|size| [applied(size, 1), applied(size, 3)].concat()).collect();
    check(&cases, &[Operands::F32], false);
    check(&[applied([2, 4, 3, 2], 17), applied([1, 3, 2, 2], 300)].concat(), &[Operands::F32], false);
}

#[test]
fn given_sums_in_16_bits() {
    let cases: Vec<_> = SIZES.iter().flat_map(|size| [applied(*size, 1), applied(*size, 3)].concat()).collect();
    check(&cases, &HALVES, true);
    check(&applied([2, 5, 3, 2], 17), &HALVES, true);
}

/// With one operand that a result can take the memory of: it does, and without any it does not.
#[test]
fn given_sums_in_place_of_an_operand() {
    let size = [3, 5, 7, 5];
    let back =
        |start, branched: &[&str], sum: bool| batch_norm(BnReluBackwardApply { start }, size, 3, branched, &[sum]).0;
    let double = |start, branched: &[&str], sum: bool| {
        batch_norm(BnReluDoubleBackwardApply { start }, size, 3, branched, &[sum; 2]).0
    };
    let (tangents, all) = (["x_dot", "g_dot", "dy"], ["x_dot", "g_dot", "dy", "start"]);
    let mut cases = Vec::new();
    for (case, place) in [
        (back(false, &["dy"], false), 0),
        (back(true, &["dy", "start"], false), 0),
        (back(true, &["dy", "start"], false), 8),
        (back(true, &["dy"], true), 8),
        (back(true, &[], false), 8),
        (double(false, &tangents, false), 0),
        (double(true, &all, false), 0),
        (double(true, &all, false), 2),
        (double(true, &all, false), 13),
        (double(true, &tangents, true), 13),
    ] {
        for (inside, shared) in [(1 << place | 3 << 16, true), (3 << 16, false)] {
            let plan = Plan::build(&wrapped(&case, inside), &UNFUSED).unwrap();
            let args = &plan.launches.iter().find(|l| l.op == case.op).unwrap().args[0];
            let [from, to] = [args.inputs[place], args.outputs[0]].map(|b| plan.buffers[b].place);
            assert_eq!(from == to, shared, "{}, operand {place}", case.name);
            cases.push((case.clone(), inside));
        }
    }
    check(&cases, &[Operands::F32], false);
}

/// Each mean or sum of the last branch, wrong by one or by as many as there are rows, makes a result wrong.
#[test]
fn wrong_sums_are_noticed() {
    let (size, tangents) = ([3, 5, 7, 5], ["x_dot", "g_dot", "dy"]);
    for (case, inside) in [
        batch_norm(BnReluBackwardApply { start: true }, size, 3, &["dy"], &[false]),
        batch_norm(BnReluBackwardApply { start: true }, size, 3, &["dy"], &[true]),
        batch_norm(BnReluDoubleBackwardApply { start: true }, size, 3, &tangents, &[false; 2]),
        batch_norm(BnReluDoubleBackwardApply { start: true }, size, 3, &tangents, &[true; 2]),
    ] {
        for operands in [Operands::F32, Operands::F16, Operands::Bf16] {
            let options = if operands == Operands::F32 { &UNFUSED } else { &HALF };
            let values = values(&case, operands);
            let want = reference(&case, &values);
            let found = |values: &[HostVec]| {
                let plan = Plan::build(&wrapped(&case, inside), options).unwrap();
                all_faults(operands, &results(&mut simt(operands, 1), plan, &case, values), &want)
            };
            assert_eq!(found(&values), [""; 0], "{}", case.name);
            for (i, operand) in case.operands.iter().enumerate().filter(|(_, o)| SUMS.contains(&o.name)) {
                let mut wrong = values.clone();
                let mut sums = wrong[i].to_f64();
                let rows = if matches!(operand.name, "dg" | "db") { 105.0 } else { 1.0 };
                sums.iter_mut().rev().take(operand.meta.len()).for_each(|sum| *sum += rows);
                wrong[i] = HostVec::F64(sums);
                assert!(!found(&wrong).is_empty(), "{}: {} may be wrong", case.name, operand.name);
            }
        }
    }
}
