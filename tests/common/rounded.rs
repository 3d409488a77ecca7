//! Batch norms and cases of the table on the SIMT host machine, with numbers rounded as they are stored: against the CPU device in
//! double precision, given the same rounded numbers, so that what is left is single precision and the rounding of the result.
#![allow(dead_code)]

use crate::common::{deviation, on_two_threads};
use half::{bf16, f16};
use mlnt::cases::{Case, Data, Operand};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{BN_EPS, BnBackward, BnDoubleBackward, BnEval, BnReluBackward, ChannelBroadcast, Mask, Op, Operation};
use mlnt::plan::{Plan, PlanOptions, StageGroups};
use mlnt::tape::{Coef, DType, Kind, Meta, Tape, Tensor};

pub const HALVES: [Operands; 2] = [Operands::F16, Operands::Bf16];
pub const UNFUSED: PlanOptions =
    PlanOptions { fuse: false, kernels: false, half: false, recompute: false, group: None, stages: StageGroups::WHOLE };
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
    derive_sums(case, &mut list);
    let single = |values: &HostVec| match values {
        HostVec::I32(v) => HostVec::I32(v.clone()),
        v => HostVec::F64(v.to_f64().into_iter().map(|v| f64::from(v as f32)).collect()),
    };
    list.iter().map(single).collect()
}

/// Fills in the operands that are sums over rows.
pub fn derive_sums(case: &Case, list: &mut [HostVec]) {
    let values: Vec<Vec<f64>> = list.iter().map(HostVec::to_f64).collect();
    let branch = |name: &str, m: usize| {
        let i = case.operands.iter().position(|o| o.name == name).unwrap();
        let meta = &case.operands[i].meta;
        &values[i][if meta.per_branch { m * meta.len() } else { 0 }..][..meta.len()]
    };
    for (operand, values) in case.operands.iter().zip(list).filter(|(o, _)| SUMS.contains(&o.name)) {
        let [n, c, h, w] = case.operands.iter().find(|o| o.name == "x").unwrap().meta.dims;
        if operand.name == "g_bar" {
            // It may be any number; of the size of a sum over rows it matters.
            *values = HostVec::F64(values.to_f64().into_iter().map(|v| v * (n * h * w) as f64).collect());
            continue;
        }
        let of_channel = |m: usize, k: usize| {
            let mean = |f: &dyn Fn(usize) -> f64| {
                let rows = (0..n).flat_map(|i| (0..h * w).map(move |j| (i * c + k) * h * w + j));
                rows.map(f).sum::<f64>() / (n * h * w) as f64
            };
            let [g, b, mu, var] = ["g", "b", "mean", "var"].map(|name| branch(name, m)[k]);
            let hat = |i: usize| (branch("x", m)[i] - mu) / (var + BN_EPS).sqrt();
            let dy = |i: usize| if g * hat(i) + b > 0.0 { branch("dy", m)[i] } else { 0.0 };
            match operand.name {
                "dg" => mean(&|i| dy(i) * hat(i)) * (n * h * w) as f64,
                "db" => mean(&dy) * (n * h * w) as f64,
                "x_dot_mean" => mean(&|i| branch("x_dot", m)[i]),
                _ => mean(&|i| branch("x_dot", m)[i] * hat(i)),
            }
        };
        let channels = operand.meta.len();
        let of_all = (0..operand.meta.total(case.branches)).map(|i| of_channel(i / channels, i % channels));
        *values = HostVec::F64(of_all.collect());
    }
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

/// What the case computes, in operations that every device knows.
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

/// A batch norm; `branched` operands are per-branch, statistics with x, sums with what they are of.
pub fn batch_norm(
    op: impl Into<Op>,
    size: [usize; 4],
    branches: usize,
    branched: &[&str],
    sum: &[bool],
) -> (Case, u32) {
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
        Op::BnReluBackwardApply(_) => &["dy", "x", "g", "b", "mean", "var", "dg", "db"],
        Op::BnReluDoubleBackwardApply(op) => &DOUBLE_APPLIED[..if op.start { 13 } else { 12 }],
        _ => unreachable!("no batch norm"),
    };
    let mut names = names.to_vec();
    if let Op::BnReluBackwardApply(op) = &op {
        names.extend(op.second_order.then_some("g_bar"));
        names.extend(&["start", "start2"][..op.starts]);
    }
    let x = names.iter().position(|name| *name == "x").unwrap_or_default();
    let operand = |name: &&'static str| {
        let (meta, data) = match *name {
            "mean" => (vector, Data::MeanOf(x)),
            "var" => (vector, Data::VarianceOf(x)),
            "y" => (activation, Data::Clear),
            "x" | "dy" | "x_dot" | "start" | "start2" => (activation, Data::Normal),
            _ => (vector, Data::Normal),
        };
        let sources: &[&str] = match *name {
            "mean" | "var" => &["x"],
            "dg" | "db" => &["dy", "x", "g", "b", "sums"],
            "x_dot_mean" => &["x_dot", "sums"],
            "rho" => &["x_dot", "x", "sums"],
            _ => &[*name],
        };
        let meta = meta.with_branching(sources.iter().any(|source| branched.contains(source)));
        Operand { name, meta, data, differentiable: false }
    };
    let operands: Vec<Operand> = names.iter().map(operand).collect();
    let name = format!("{} {size:?} M={branches} of {branched:?} summed {sum:?}", op.name());
    (Case { name, op, branches, operands, sum: sum.to_vec(), tolerance: 1e-5, fused: true }, u32::MAX)
}

const DOUBLE_APPLIED: [&str; 13] =
    ["x_dot", "g_dot", "dy", "x", "g", "b", "mean", "var", "dg", "db", "x_dot_mean", "rho", "start"];

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
