//! Kernels on 16-bit activations, and the batch norms that only kernels know, on the SIMT host machine: against the CPU device in
//! double precision, given the same rounded numbers, so that what is left is single precision and the rounding of the result.

mod common;

use common::{deviation, on_two_threads};
use half::{bf16, f16};
use mlnt::cases::{Case, Data, Operand, all};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{BnBackward, BnDoubleBackward, BnEval, BnForward, BnReluBackward, LinComb, Mask, Op, Operation};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::tape::{Coef, DType, Kind, Meta, Tape, Tensor};

const HALVES: [Operands; 2] = [Operands::F16, Operands::Bf16];
const UNFUSED: PlanOptions = PlanOptions { fuse: false, kernels: false, half: false, group: None };
const HALF: PlanOptions = PlanOptions { half: true, ..UNFUSED };

fn rounded(operands: Operands, v: f64) -> f64 {
    match operands {
        Operands::F16 => f16::from_f64(v).to_f64(),
        Operands::Bf16 => bf16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    }
}

/// What takes 16 bits where a step makes it.
fn large(meta: &Meta) -> bool {
    meta.kind == Kind::Activation && meta.dtype == DType::Real && meta.dims[2] * meta.dims[3] > 1
}

/// Numbers for a case; large activations are rounded, and statistics are theirs.
fn values(case: &Case, operands: Operands) -> Vec<HostVec> {
    let mut list = case.values(1);
    for (operand, values) in case.operands.iter().zip(&mut list) {
        if large(&operand.meta) {
            *values = HostVec::F64(values.to_f64().into_iter().map(|v| rounded(operands, v)).collect());
        }
    }
    case.derive(&mut list);
    let single = |values: &HostVec| match values {
        HostVec::I32(v) => HostVec::I32(v.clone()),
        v => HostVec::F64(v.to_f64().into_iter().map(|v| f64::from(v as f32)).collect()),
    };
    list.iter().map(single).collect()
}

/// The case on operands and results that are nodes of their own where `inside` has a bit: these may take 16 bits.
fn wrapped(case: &Case, inside: u32) -> Tape {
    let mut tape = Tape::new(case.branches);
    let apart = |i: usize, meta: &Meta| inside >> i & 1 == 1 && meta.dtype == DType::Real;
    let mut operands = Vec::new();
    for (i, operand) in case.operands.iter().enumerate() {
        let t = tape.input(operand.name, operand.meta).unwrap();
        operands.push(if apart(i, &operand.meta) { tape.scale(Coef::ONE, t).unwrap() } else { t });
    }
    let results = tape.record(case.op.clone(), &operands, &case.sum).unwrap();
    for (i, t) in results.into_iter().enumerate() {
        let meta = *tape.meta(t);
        let t = if apart(16 + i, &meta) { tape.scale(Coef::ONE, t).unwrap() } else { t };
        tape.output(format!("out{i}"), t);
    }
    tape
}

/// What the case computes, in operations that every device knows.
fn composition(case: &Case) -> Tape {
    let mut tape = Tape::new(case.branches);
    let i: Vec<Tensor> = case.operands.iter().map(|o| tape.input(o.name, o.meta).unwrap()).collect();
    let sum = |k: usize| case.sum.get(k).copied().unwrap_or_default();
    let results = match &case.op {
        Op::BnStats(_) => {
            let c = Meta::vector(case.operands[0].meta.dims[1]);
            let one = tape.fill(c, Coef::ONE).unwrap();
            let bn = tape.batch_norm(i[0], one, one).unwrap();
            vec![bn.mean, bn.var]
        }
        Op::BnReluBackward(op) => {
            let (dy, x, g, b, mean, var) = (i[0], i[1], i[2], i[3], i[4], i[5]);
            let h = tape.record1(BnEval { relu: true }, &[x, g, b, mean, var], false).unwrap();
            let masked = tape.record1(Mask, &[dy, h], false).unwrap();
            let back = BnBackward { relu: false };
            let mut results = tape.record(back, &[masked, x, g, mean, var], &case.sum).unwrap();
            if op.start {
                results[0] = tape.add(results[0], i[6]).unwrap();
            }
            results
        }
        Op::BnReluDoubleBackward(_) => {
            let (x, g, b, mean, var) = (i[4], i[5], i[6], i[7], i[8]);
            let h = tape.record1(BnEval { relu: true }, &[x, g, b, mean, var], false).unwrap();
            let masked = tape.record1(Mask, &[i[3], h], false).unwrap();
            let operands = [i[0], i[1], i[2], masked, x, g, mean, var];
            let double = BnDoubleBackward { relu: false };
            let mut results = tape.record(double, &operands, &[false, sum(1), sum(2)]).unwrap();
            results[0] = tape.record1(Mask, &[results[0], h], sum(0)).unwrap();
            results
        }
        op => tape.record(op.clone(), &i, &case.sum).unwrap(),
    };
    results.iter().enumerate().for_each(|(i, t)| tape.output(format!("out{i}"), *t));
    tape
}

fn results(device: &mut dyn Device, plan: Plan, case: &Case, values: &[HostVec]) -> Vec<(Meta, Vec<f64>)> {
    let outputs: Vec<(String, Meta)> = plan.outputs.iter().map(|p| (p.name.clone(), p.meta)).collect();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.into_iter().map(|(name, meta)| (meta, device.read_output(id, &name).unwrap().to_f64())).collect()
}

fn simt(operands: Operands, seed: u64) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), operands, Mode::Eager)
}

/// What is wrong with a result that was rounded to `operands` if it is large: as a whole, and element by element.
fn faults(operands: Operands, tolerance: f64, meta: &Meta, have: &[f64], want: &[f64]) -> Vec<String> {
    // The largest relative error of rounding, and the distance of the smallest numbers.
    let (eps, tiny) = match operands {
        Operands::F16 if large(meta) => (2f64.powi(-11), 2f64.powi(-25)),
        Operands::Bf16 if large(meta) => (2f64.powi(-8), 0.0),
        _ => (0.0, 0.0),
    };
    let mut found = Vec::new();
    let off = deviation(have, want);
    let within = tolerance
        + if eps > 1e-3 {
            4e-3
        } else if eps > 0.0 {
            5e-4
        } else {
            0.0
        };
    if off > within {
        found.push(format!("off by {off:.1e}, {within:.0e} allowed"));
    }
    let size = (want.iter().map(|v| v * v).sum::<f64>() / want.len().max(1) as f64).sqrt();
    let wrong = |(have, want): (&f64, &f64)| (have - want).abs() > eps * want.abs() + tiny + 10.0 * tolerance * size;
    if eps > 0.0
        && let Some(i) = have.iter().zip(want).position(wrong)
    {
        found.push(format!("element {i} is {}, not {}", have[i], want[i]));
    }
    found
}

/// Checks a case with 16-bit operands of each type, inside as in `inside`, or in f32 throughout.
fn check(cases: &[(Case, u32)], kinds: &[Operands], halves: bool) {
    let failures = on_two_threads(cases, |(case, inside)| {
        let mut found = Vec::new();
        for &operands in kinds {
            let values = values(case, operands);
            let plan = || Plan::build(&wrapped(case, *inside), if halves { &HALF } else { &UNFUSED }).unwrap();
            assert!(!halves || plan().arena_halves > 0, "{}: nothing takes 16 bits", case.name);
            let want = Plan::build(&composition(case), &UNFUSED).unwrap();
            let want = results(&mut Cpu::<f64>::new(1).unwrap(), want, case, &values);
            let have = results(&mut simt(operands, 1), plan(), case, &values);
            for (i, ((meta, have), (_, want))) in have.iter().zip(&want).enumerate() {
                // In a composition of several operations a result may be shared that is the same in every branch of the one.
                let want = want.repeat(have.len() / want.len());
                let faults = faults(operands, 2e-5, meta, have, &want);
                found.extend(faults.iter().map(|f| format!("{} {inside:x} {}, {i}: {f}", case.name, operands.name())));
            }
            if have != results(&mut simt(operands, 2), plan(), case, &values) {
                found.push(format!("{} {}: depends on the order of threads", case.name, operands.name()));
            }
        }
        found
    });
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Cases of the table that `of` takes, with everything inside.
fn table(of: impl Fn(&Op) -> bool) -> Vec<(Case, u32)> {
    let touches =
        |case: &Case| case.operands.iter().any(|o| large(&o.meta)) || case.results().unwrap().iter().any(large);
    let cases = all().into_iter().filter(|case| of(&case.op) && touches(case));
    cases.map(|case| (case, u32::MAX)).collect()
}

/// A batch norm; `branched` operands are per-branch, statistics with x.
fn batch_norm(op: impl Into<Op>, size: [usize; 4], branches: usize, branched: &[&str], sum: &[bool]) -> (Case, u32) {
    let op = op.into();
    let [n, c, h, w] = size;
    let (vector, activation) = (Meta::vector(c), Meta::activation(n, c, h, w));
    let names: &[&'static str] = match &op {
        Op::BnForward(_) => &["x", "g", "b"],
        Op::BnStats(_) => &["x"],
        Op::BnBackward(_) => &["dy", "x", "g", "mean", "var", "y"],
        Op::BnDoubleBackward(_) => &["x_dot", "g_dot", "b_dot", "dy", "x", "g", "mean", "var", "y"],
        Op::BnReluBackward(BnReluBackward { start: true }) => &["dy", "x", "g", "b", "mean", "var", "start"],
        Op::BnReluBackward(_) => &["dy", "x", "g", "b", "mean", "var"],
        Op::BnReluDoubleBackward(_) => &["x_dot", "g_dot", "b_dot", "dy", "x", "g", "b", "mean", "var"],
        _ => unreachable!("no batch norm"),
    };
    let x = names.iter().position(|name| *name == "x").unwrap_or_default();
    let operand = |name: &&'static str| {
        let (meta, data) = match *name {
            "mean" => (vector, Data::MeanOf(x)),
            "var" => (vector, Data::VarianceOf(x)),
            "y" => (activation, Data::Clear),
            "x" | "dy" | "x_dot" | "start" => (activation, Data::Normal),
            _ => (vector, Data::Normal),
        };
        let source = if matches!(*name, "mean" | "var") { "x" } else { name };
        Operand { name, meta: meta.with_branching(branched.contains(&source)), data, differentiable: false }
    };
    let operands: Vec<Operand> = names.iter().map(operand).collect();
    let name = format!("{} {size:?} M={branches} of {branched:?} summed {sum:?}", op.name());
    (Case { name, op, branches, operands, sum: sum.to_vec(), tolerance: 1e-5, fused: true }, u32::MAX)
}

/// MLNT's second order.
const MIXED: [bool; 3] = [false, true, true];

/// The batch norms that only kernels know, in every mixture that a step has and some that it has not.
fn recomputed(size: [usize; 4], branches: usize) -> Vec<(Case, u32)> {
    mlnt::cases::recomputed(size, branches).into_iter().map(|case| (case, u32::MAX)).collect()
}

const SIZES: [[usize; 4]; 8] = [
    [2, 1, 5, 3],
    [3, 3, 7, 5],
    [2, 5, 15, 11],
    [1, 7, 2, 3],
    [2, 40, 4, 3],
    [1, 64, 9, 8],
    [2, 130, 3, 3],
    [5, 8, 31, 33],
];

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
