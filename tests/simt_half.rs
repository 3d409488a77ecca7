//! Kernels on 16-bit activations, and the batch norms that only kernels know, on the SIMT host machine: against the CPU device in
//! double precision, given the same rounded numbers, so that what is left is single precision and the rounding of the result.

mod common;
#[path = "common/rounded.rs"]
mod rounded;

use mlnt::cases::{Case, Data, Operand, all};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::Operands;
use mlnt::device::{Device, HostVec};
use mlnt::ops::{BnBackward, BnDoubleBackward, BnForward, LinComb, Op};
use mlnt::plan::Plan;
use mlnt::tape::{Coef, Meta, Tape};
use rounded::*;

/// Cases of the table that `of` takes, with everything inside.
fn table(of: impl Fn(&Op) -> bool) -> Vec<(Case, u32)> {
    let touches =
        |case: &Case| case.operands.iter().any(|o| large(&o.meta)) || case.results().unwrap().iter().any(large);
    let cases = all().into_iter().filter(|case| of(&case.op) && touches(case));
    cases.map(|case| (case, u32::MAX)).collect()
}

/// MLNT's second order.
const MIXED: [bool; 3] = [false, true, true];

/// The batch norms that only kernels know, in every mixture that a step has and some that it has not.
fn recomputed(size: [usize; 4], branches: usize) -> Vec<(Case, u32)> {
    mlnt::cases::recomputed(size, branches).into_iter().map(|case| (case, u32::MAX)).collect()
}

#[test]
fn recomputed_masks_in_f32() {
    let cases: Vec<_> = SIZES.iter().flat_map(|size| [recomputed(*size, 1), recomputed(*size, 3)].concat()).collect();
    check(&cases, &[Operands::F32], false);
}

#[test]
fn recomputed_masks_in_16_bits() {
    let cases: Vec<_> = SIZES.iter().flat_map(|size| [recomputed(*size, 1), recomputed(*size, 3)].concat()).collect();
    check(&cases, &HALVES, true);
}

/// More branches than a block keeps factors of, in f32, where what is added to is not rounded.
#[test]
fn recomputed_masks_of_many_branches() {
    check(&[recomputed([2, 4, 3, 2], 17), recomputed([1, 3, 2, 2], 300)].concat(), &[Operands::F32], false);
    check(&recomputed([2, 5, 3, 2], 17), &HALVES, true);
}

#[test]
fn batch_norms_of_the_table() {
    let of = |op: &Op| matches!(op, Op::BnForward(_) | Op::BnBackward(_) | Op::BnDoubleBackward(_) | Op::BnEval(_));
    check(&table(of), &HALVES, true);
}

#[test]
fn batch_norms_of_many_rows() {
    let mut cases = Vec::new();
    for size in [[5, 8, 31, 33], [3, 7, 40, 41]] {
        cases.push(batch_norm(BnForward { relu: true }, size, 3, &["x"], &[]));
        cases.push(batch_norm(BnBackward { relu: true }, size, 3, &["dy"], &MIXED));
        cases.push(batch_norm(BnDoubleBackward { relu: true }, size, 3, &["x_dot", "g_dot", "b_dot", "dy"], &MIXED));
    }
    check(&cases, &HALVES, true);
}

fn elementwise(op: &Op) -> bool {
    matches!(op, Op::Relu(_) | Op::Mask(_) | Op::LinComb(_) | Op::Fill(_) | Op::ChannelSum(_) | Op::ChannelBroadcast(_))
}

fn pools(op: &Op) -> bool {
    matches!(op, Op::AvgPool(_) | Op::AvgPoolBackward(_) | Op::MaxPoolIndex(_) | Op::PoolGather(_) | Op::PoolScatter(_))
}

#[test]
fn elementwise_operations_of_the_table() {
    check(&table(elementwise), &HALVES, true);
}

#[test]
fn pools_of_the_table() {
    check(&table(pools), &HALVES, true);
}

/// Operands of both widths in one launch, and operations that take one width, given inputs and outputs of 32 bits.
#[test]
fn operands_of_mixed_width() {
    let mut cases = Vec::new();
    for (case, _) in table(|op| elementwise(op) || pools(op) || matches!(op, Op::BnBackward(_))) {
        for inside in [0, 0x1_5555, 0xaaaa] {
            if Plan::build(&wrapped(&case, inside), &HALF).unwrap().arena_halves > 0 {
                cases.push((case.clone(), inside));
            }
        }
    }
    let mixed = |op: &Op| matches!(op, Op::LinComb(_));
    assert!(cases.iter().filter(|(case, _)| mixed(&case.op)).count() > 10);
    check(&cases, &[Operands::Bf16], true);

    // Several blocks, more terms than two, a length that is no multiple of four.
    let x = |m| Operand {
        name: "x",
        meta: Meta::activation(3, 5, 37, 29).with_branching(m),
        data: Data::Normal,
        differentiable: false,
    };
    let operands = vec![x(true), Operand { name: "z", ..x(false) }, Operand { name: "w", ..x(true) }];
    let coefs = vec![Coef::ONE, Coef::constant(-0.5), Coef::constant(2.0)];
    let case = |sum: bool| Case {
        name: format!("sum of three, summed {sum}"),
        op: LinComb::new(coefs.clone()).into(),
        branches: 3,
        operands: operands.clone(),
        sum: vec![sum],
        tolerance: 1e-5,
        fused: false,
    };
    let widths = [0x1_0005, 0x1_0002, 3, 7, u32::MAX];
    check(&widths.iter().flat_map(|w| [(case(false), *w), (case(true), *w)]).collect::<Vec<_>>(), &HALVES, true);
}

#[test]
fn what_leaves_the_range_of_f16_is_infinite() {
    let mut tape = Tape::new(1);
    let x = tape.input("x", Meta::activation(1, 1, 1, 4)).unwrap();
    let large = tape.scale(Coef::constant(64.0), x).unwrap();
    let back = tape.scale(Coef::constant(0.5), large).unwrap();
    tape.output("y", back);
    let mut device = simt(Operands::F16, 1);
    let id = device.load(Plan::build(&tape, &HALF).unwrap()).unwrap();
    device.write_input(id, "x", HostVec::F64(vec![1000.0, -1100.0, 2f64.powi(-31), 1.0]).as_slice()).unwrap();
    device.run(id, &[]).unwrap();
    let y = device.read_output(id, "y").unwrap().to_f64();
    assert_eq!(y, [32000.0, f64::NEG_INFINITY, 0.0, 32.0]);
}

#[test]
fn devices_without_halves_refuse_them() {
    let mut tape = Tape::new(1);
    let x = tape.input("x", Meta::activation(1, 2, 3, 4)).unwrap();
    let y = tape.scale(Coef::constant(2.0), x).unwrap();
    let y = tape.relu(y).unwrap();
    tape.output("y", y);
    let plan = Plan::build(&tape, &HALF).unwrap();
    assert!(plan.arena_halves > 0 && plan.arena_bytes(4) > 2 * plan.arena_halves);
    for operands in [Operands::F32, Operands::Tf32] {
        let error = simt(operands, 1).load(plan.clone()).unwrap_err().to_string();
        assert!(error.contains("16 bits") && error.contains(operands.name()), "{error}");
    }
    assert!(Cpu::<f32>::new(1).unwrap().load(plan).is_err());
}
