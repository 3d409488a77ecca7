//! The batch norms whose sums over rows are operands, on the SIMT host machine.

mod common;
#[path = "common/rounded.rs"]
mod rounded;

use mlnt::cases::Case;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::Operands;
use mlnt::device::{Device, HostVec};
use mlnt::ops::{BnBackward, BnDoubleBackward, BnEval, BnReluBackwardApply, BnReluDoubleBackwardApply, Mask};
use mlnt::plan::Plan;
use mlnt::tape::{Coef, Tape, Tensor};
use rounded::*;

/// Operands of a tape by their names.
type Named<'a> = &'a dyn Fn(&str) -> Tensor;

/// Operands that the tangents of a batch norm's operands make per-branch.
const TANGENTS: [&str; 3] = ["x_dot", "g_dot", "dy"];

fn apply(second_order: bool, starts: usize) -> BnReluBackwardApply {
    BnReluBackwardApply { second_order, starts }
}

/// The batch norms whose sums are operands, with everything inside.
fn applied(size: [usize; 4], branches: usize) -> Vec<(Case, u32)> {
    mlnt::cases::applied(size, branches).into_iter().map(|case| (case, u32::MAX)).collect()
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
    let back = |second_order, starts, branched: &[&str], sum: bool| {
        batch_norm(apply(second_order, starts), size, 3, branched, &[sum]).0
    };
    let double = |start, branched: &[&str], sum: bool| {
        batch_norm(BnReluDoubleBackwardApply { start }, size, 3, branched, &[sum; 2]).0
    };
    let all = ["x_dot", "g_dot", "dy", "start"];
    let mut cases = Vec::new();
    for (case, place) in [
        (back(false, 0, &["dy"], false), 0),
        (back(false, 1, &["dy", "start"], false), 0),
        (back(false, 1, &["dy", "start"], false), 8),
        (back(true, 2, &["dy", "start", "start2"], false), 9),
        (back(true, 2, &["dy", "start", "start2"], false), 10),
        (back(false, 1, &["dy"], true), 8),
        (back(true, 2, &["dy"], true), 10),
        (back(true, 1, &[], false), 9),
        (double(false, &TANGENTS, false), 0),
        (double(true, &all, false), 0),
        (double(true, &all, false), 2),
        (double(true, &all, false), 12),
        (double(true, &TANGENTS, true), 12),
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
    let size = [3, 5, 7, 5];
    for (case, inside) in [
        batch_norm(apply(true, 2), size, 3, &["dy", "g_bar"], &[false]),
        batch_norm(apply(true, 2), size, 3, &["dy"], &[true]),
        batch_norm(BnReluDoubleBackwardApply { start: true }, size, 3, &TANGENTS, &[false; 2]),
        batch_norm(BnReluDoubleBackwardApply { start: true }, size, 3, &TANGENTS, &[true; 2]),
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
                let rows = if matches!(operand.name, "dg" | "db" | "g_bar") { 105.0 } else { 1.0 };
                sums.iter_mut().rev().take(operand.meta.len()).for_each(|sum| *sum += rows);
                wrong[i] = HostVec::F64(sums);
                assert!(!found(&wrong).is_empty(), "{}: {} may be wrong", case.name, operand.name);
            }
        }
    }
}

/// Blocks find the counters as they must be in every run, also in one with other numbers.
#[test]
fn a_later_run_makes_its_own_sums() {
    for (branches, sum) in [(1, [false; 2]), (3, [false; 2]), (3, [true; 2]), (3, [true, false])] {
        let op = BnReluDoubleBackwardApply { start: true };
        let (case, inside) = batch_norm(op, [5, 8, 31, 33], branches, &TANGENTS, &sum);
        let plan = || Plan::build(&wrapped(&case, inside), &UNFUSED).unwrap();
        let mut other = case.clone();
        other.name.push_str(", other numbers");
        let [first, second] = [&case, &other].map(|case| values(case, Operands::F32));
        let fresh = [&first, &second].map(|values| results(&mut simt(Operands::F32, 1), plan(), &case, values));
        let mut device = simt(Operands::F32, 1);
        let (outputs, id) = (plan().outputs, device.load(plan()).unwrap());
        for (values, want) in [(&first, &fresh[0]), (&second, &fresh[1]), (&first, &fresh[0])] {
            for (operand, values) in case.operands.iter().zip(values) {
                device.write_input(id, operand.name, values.as_slice()).unwrap();
            }
            device.run(id, &[]).unwrap();
            for (port, (_, want)) in outputs.iter().zip(want) {
                let have = device.read_output(id, &port.name).unwrap().to_f64();
                assert!(have == *want, "{}: {}", case.name, port.name);
            }
        }
    }
}

/// The double backward and then the backward that takes up its x̄ and ḡ make all of both, where the backward has a cotangent of its own.
#[test]
fn both_orders_in_turn_are_complete() {
    for (branches, sum) in [(1, false), (3, false), (3, true)] {
        let op = BnReluDoubleBackwardApply { start: false };
        let (case, _) = batch_norm(op, [3, 5, 7, 5], branches, &TANGENTS, &[sum; 2]);
        let values = values(&case, Operands::F32);
        let tape_of = |record: &dyn Fn(&mut Tape, Named) -> Tensor| {
            let mut tape = Tape::new(branches);
            let i: Vec<Tensor> = case.operands.iter().map(|o| tape.input(o.name, o.meta).unwrap()).collect();
            let of = |name: &str| i[case.operands.iter().position(|o| o.name == name).unwrap()];
            let dx = record(&mut tape, &of);
            tape.output("dx", dx);
            Plan::build(&tape, &UNFUSED).unwrap()
        };
        let fused = tape_of(&|tape, of| {
            let operands: Vec<Tensor> = case.operands.iter().map(|o| of(o.name)).collect();
            let second = tape.record(op, &operands, &case.sum).unwrap();
            let mut operands = ["dy", "x", "g", "b", "mean", "var", "dg", "db"].map(of).to_vec();
            operands.extend([second[1], second[0]]);
            tape.record1(apply(true, 1), &operands, sum).unwrap()
        });
        let plain = tape_of(&|tape, of| {
            let y = tape.record1(BnEval { relu: true }, &["x", "g", "b", "mean", "var"].map(of), false).unwrap();
            let dy = tape.record1(Mask, &[of("dy"), y], false).unwrap();
            let b_dot = tape.fill(*tape.meta(of("g")), Coef::constant(0.0)).unwrap();
            let [x_dot, g_dot, x, g, mean, var] = ["x_dot", "g_dot", "x", "g", "mean", "var"].map(of);
            let double = BnDoubleBackward { relu: false };
            let sums = [false, sum, sum];
            let second = tape.record(double, &[x_dot, g_dot, b_dot, dy, x, g, mean, var], &sums).unwrap()[1];
            let back = BnBackward { relu: false };
            let first = tape.record(back, &[dy, x, g, mean, var], &[sum; 3]).unwrap()[0];
            tape.add(first, second).unwrap()
        });
        let have = results(&mut simt(Operands::F32, 1), fused, &case, &values);
        let want = results(&mut Cpu::<f64>::new(1).unwrap(), plain, &case, &values);
        assert_eq!(all_faults(Operands::F32, &have, &want), [""; 0], "M={branches} summed {sum}");
    }
}
