//! Batch norms and cases of the table on the SIMT host machine, with numbers rounded as they are stored: against the CPU device in
//! double precision, given the same rounded numbers, so that what is left is single precision and the rounding of the result.
#![allow(dead_code)]

use crate::common::{deviation, on_two_threads};
use half::{bf16, f16};
use mlnt::cases::Case;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{BnBackward, BnDoubleBackward, BnEval, ChannelBroadcast, Mask, Op};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::tape::{Coef, DType, Kind, Meta, Tape, Tensor};

pub const HALVES: [Operands; 2] = [Operands::F16, Operands::Bf16];
pub const UNFUSED: PlanOptions = PlanOptions::AS_RECORDED;
pub const HALF: PlanOptions = PlanOptions { half: true, ..UNFUSED };

pub fn rounded(operands: Operands, v: f64) -> f64 {
    match operands {
        Operands::F16 => f16::from_f64(v).to_f64(),
        Operands::Bf16 => bf16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    }
}

/// What takes 16 bits where a step makes it.
pub fn large(meta: &Meta) -> bool {
    meta.kind == Kind::Activation && meta.dtype == DType::Real && meta.dims[2] * meta.dims[3] > 1
}

/// Numbers for a case; large activations are rounded, and statistics are theirs.
pub fn values(case: &Case, operands: Operands) -> Vec<HostVec> {
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
pub fn wrapped(case: &Case, inside: u32) -> Tape {
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

/// `relu(bn(x))` of a case's operands, and dy where that lets it through.
fn relu_of(tape: &mut Tape, of: impl Fn(&str) -> Tensor) -> (Tensor, Tensor) {
    let h = tape.record1(BnEval { relu: true }, &["x", "g", "b", "mean", "var"].map(&of), false).unwrap();
    (h, tape.record1(Mask, &[of("dy"), h], false).unwrap())
}

/// `g r x̂ ḡ/n`: the term that second order leaves to the backward; with `sum` its sum over the branches.
pub fn last_term(tape: &mut Tape, of: impl Fn(&str) -> Tensor, g_bar: Tensor, sum: bool) -> Tensor {
    let [x, g, mean, var] = ["x", "g", "mean", "var"].map(of);
    let [n, c, h, w] = tape.meta(x).dims;
    let zero = tape.fill(Meta::vector(c), Coef::constant(0.0)).unwrap();
    // `g r ḡ`: the batch norm of ḡ, seen as an activation of one pixel.
    let pixel = ChannelBroadcast { to: Meta::activation(1, c, 1, 1) };
    let g_bar = tape.record1(pixel, &[g_bar], false).unwrap();
    let factor = tape.record1(BnEval { relu: false }, &[g_bar, g, zero, zero, var], false).unwrap();
    let factor = tape.channel_sum(factor, false).unwrap();
    let factor = tape.scale(Coef::constant(1.0 / (n * h * w) as f64), factor).unwrap();
    let term = tape.record1(BnEval { relu: false }, &[x, factor, zero, mean, var], false).unwrap();
    if sum { tape.sum_branches(term).unwrap() } else { term }
}

/// What the case computes, recorded in operations that every device knows: a second writing of what `mlnt::cases::expand` makes of a plan.
pub fn composition(case: &Case) -> Tape {
    let mut tape = Tape::new(case.branches);
    let i: Vec<Tensor> = case.operands.iter().map(|o| tape.input(o.name, o.meta).unwrap()).collect();
    let of = |name: &str| i[case.operands.iter().position(|o| o.name == name).unwrap()];
    let has = |name: &str| case.operands.iter().any(|o| o.name == name);
    let sum = |k: usize| case.sum.get(k).copied().unwrap_or_default();
    let results = match &case.op {
        Op::BnStats(_) => {
            let c = Meta::vector(case.operands[0].meta.dims[1]);
            let one = tape.fill(c, Coef::ONE).unwrap();
            let bn = tape.batch_norm(i[0], one, one).unwrap();
            vec![bn.mean, bn.var]
        }
        Op::BnReluBackward(_) | Op::BnReluBackwardApply(_) => {
            let [x, g, mean, var] = ["x", "g", "mean", "var"].map(of);
            let (_, masked) = relu_of(&mut tape, of);
            let back = BnBackward { relu: false };
            let mut results = tape.record(back, &[masked, x, g, mean, var], &case.sum).unwrap();
            results.truncate(case.results().unwrap().len());
            if has("g_bar") {
                let term = last_term(&mut tape, of, of("g_bar"), sum(0));
                results[0] = tape.lin_comb(&[(Coef::ONE, results[0]), (Coef::constant(-1.0), term)]).unwrap();
            }
            for start in ["start", "start2"].into_iter().filter(|name| has(name)) {
                results[0] = tape.add(results[0], of(start)).unwrap();
            }
            results
        }
        Op::BnReluDoubleBackward(_) => {
            let (h, masked) = relu_of(&mut tape, of);
            let [x_dot, g_dot, b_dot, x, g, mean, var] = ["x_dot", "g_dot", "b_dot", "x", "g", "mean", "var"].map(of);
            let operands = [x_dot, g_dot, b_dot, masked, x, g, mean, var];
            let double = BnDoubleBackward { relu: false };
            let mut results = tape.record(double, &operands, &[false, sum(1), sum(2)]).unwrap();
            results[0] = tape.record1(Mask, &[results[0], h], sum(0)).unwrap();
            results
        }
        Op::BnReluDoubleBackwardApply(op) => {
            let (_, masked) = relu_of(&mut tape, of);
            let [x_dot, g_dot, x, g, mean, var] = ["x_dot", "g_dot", "x", "g", "mean", "var"].map(of);
            let b_dot = tape.fill(*tape.meta(g), Coef::constant(0.0)).unwrap();
            let operands = [x_dot, g_dot, b_dot, masked, x, g, mean, var];
            let double = BnDoubleBackward { relu: false };
            let mut results = tape.record(double, &operands, &[false, sum(0), false]).unwrap().split_off(1);
            let term = last_term(&mut tape, of, results[1], sum(0));
            results[0] = tape.add(results[0], term).unwrap();
            if op.start {
                results[0] = tape.add(results[0], of("start")).unwrap();
            }
            if sum(1) {
                results[1] = tape.sum_branches(results[1]).unwrap();
            }
            results
        }
        op => tape.record(op.clone(), &i, &case.sum).unwrap(),
    };
    results.iter().enumerate().for_each(|(i, t)| tape.output(format!("out{i}"), *t));
    tape
}

pub fn results(device: &mut dyn Device, plan: Plan, case: &Case, values: &[HostVec]) -> Vec<(Meta, Vec<f64>)> {
    let outputs: Vec<(String, Meta)> = plan.outputs.iter().map(|p| (p.name.clone(), p.meta)).collect();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.into_iter().map(|(name, meta)| (meta, device.read_output(id, &name).unwrap().to_f64())).collect()
}

pub fn simt(operands: Operands, seed: u64) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), operands, Mode::Eager)
}

/// What is wrong with a result that was rounded to `operands` if it is large: as a whole, and element by element.
pub fn faults(operands: Operands, tolerance: f64, meta: &Meta, have: &[f64], want: &[f64]) -> Vec<String> {
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

/// What the CPU device makes of the composition.
pub fn reference(case: &Case, values: &[HostVec]) -> Vec<(Meta, Vec<f64>)> {
    let plan = Plan::build(&composition(case), &UNFUSED).unwrap();
    results(&mut Cpu::<f64>::new(1).unwrap(), plan, case, values)
}

/// What is wrong with the results of a case.
pub fn all_faults(operands: Operands, have: &[(Meta, Vec<f64>)], want: &[(Meta, Vec<f64>)]) -> Vec<String> {
    let each = have.iter().zip(want).enumerate().flat_map(|(i, ((meta, have), (_, want)))| {
        // In a composition of several operations a result may be shared that is the same in every branch of the one.
        let want = want.repeat(have.len() / want.len());
        let faults = faults(operands, 2e-5, meta, have, &want);
        faults.into_iter().map(move |f| format!("{}, {i}: {f}", operands.name()))
    });
    each.collect()
}

/// Checks a case with 16-bit operands of each type, inside as in `inside`, or in f32 throughout.
pub fn check(cases: &[(Case, u32)], kinds: &[Operands], halves: bool) {
    let failures = on_two_threads(cases, |(case, inside)| {
        let mut found = Vec::new();
        for &operands in kinds {
            let values = values(case, operands);
            let plan = || Plan::build(&wrapped(case, *inside), if halves { &HALF } else { &UNFUSED }).unwrap();
            assert!(!halves || plan().arena_halves > 0, "{}: nothing takes 16 bits", case.name);
            let have = results(&mut simt(operands, 1), plan(), case, &values);
            let faults = all_faults(operands, &have, &reference(case, &values));
            found.extend(faults.iter().map(|f| format!("{} {inside:x} {f}", case.name)));
            if have != results(&mut simt(operands, 2), plan(), case, &values) {
                found.push(format!("{} {}: depends on the order of threads", case.name, operands.name()));
            }
        }
        found
    });
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Operands that are sums over rows.
pub const SUMS: [&str; 5] = ["dg", "db", "x_dot_mean", "rho", "g_bar"];

/// A batch norm of the table of cases, with everything inside.
pub fn batch_norm(
    op: impl Into<Op>,
    size: [usize; 4],
    branches: usize,
    branched: &[&str],
    sum: &[bool],
) -> (Case, u32) {
    (mlnt::cases::batch_norm(op, size, branches, branched, sum), u32::MAX)
}

pub const SIZES: [[usize; 4]; 8] = [
    [2, 1, 5, 3],
    [3, 3, 7, 5],
    [2, 5, 15, 11],
    [1, 7, 2, 3],
    [2, 40, 4, 3],
    [1, 64, 9, 8],
    [2, 130, 3, 3],
    [5, 8, 31, 33],
];
