//! Fused convolutions on the SIMT host machine against the composition of plain operations on the CPU device in double precision.

mod common;
mod fused_conv;

use common::{deviation, on_two_threads};
use fused_conv::case::{Case, DY, NEXT, NORM, Operand, X, Y, geom};
use fused_conv::plan::fused;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{ConvForm, Epilogue, FusedConv, Operation};
use mlnt::plan::{Plan, PlanOptions};
use std::cell::Cell;

fn run(device: &mut dyn Device, plan: Plan, values: &[Operand]) -> Vec<Vec<f64>> {
    let (inputs, outputs) = (plan.inputs.clone(), plan.outputs.clone());
    let id = device.load(plan).unwrap();
    for port in inputs {
        let given = match values.iter().find(|v| v.name == port.name) {
            Some(operand) => operand.values.clone(),
            None => {
                let c = port.meta.dims[0];
                (0..c * c).map(|i| if i / c == i % c { 1.0 } else { 0.0 }).collect()
            }
        };
        device.write_input(id, &port.name, HostVec::F64(given).as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    // Twice: counters must be as they were.
    device.run(id, &[]).unwrap();
    outputs.iter().map(|port| device.read_output(id, &port.name).unwrap().to_f64()).collect()
}

thread_local! {
    /// The machine that this thread's cases run on.
    static GENERATION: Cell<Generation> = const { Cell::new(Generation::Portable) };
}

fn on_simt(case: &Case, values: &[Operand], operands: Operands, seed: u64) -> Vec<Vec<f64>> {
    let generation = GENERATION.get();
    let machine = Simt::open(seed).unwrap().like(generation);
    let tally = machine.tally();
    let mut device = Cuda::new(Box::new(machine), operands, Mode::Eager);
    let results = run(&mut device, fused(case, values), values);
    // The rule of the lowering: 16 bits and channels in eights.
    let geom = &case.op.geom;
    let group = generation == Generation::Hopper && geom.c % 8 == 0 && geom.k % 8 == 0;
    let tally = tally.lock().unwrap();
    let (kernel, _) = tally.keys().find(|(_, label)| label.starts_with(case.op.name())).unwrap();
    assert_eq!(
        kernel.contains("wgmma"),
        group && !matches!(operands, Operands::F32 | Operands::Tf32),
        "{case:?} ran {kernel}"
    );
    results
}

/// Twice to three times what the cases come to.
fn tolerance(operands: Operands) -> f64 {
    match operands {
        Operands::F32 => 1e-6,
        Operands::Tf32 | Operands::F16 => 1.5e-3,
        Operands::Bf16 => 1e-2,
    }
}

/// The same of what is found of a result, from the result itself.
const FOUND_TOLERANCE: f64 = 1e-6;

/// What a case deviates by: the results of its form, then what is found of the first.
fn deviations(case: &Case, values: &[Operand], given: &[Operand], operands: Operands) -> Vec<(String, f64, f64)> {
    let plan = Plan::build(&case.composed(), &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    let want = run(&mut Cpu::<f64>::new(1).unwrap(), plan, values);
    let have = on_simt(case, given, operands, 1);
    let mut found = Vec::new();
    for (i, want) in want.iter().enumerate() {
        found.push((format!("result {i}"), deviation(&have[i], want), tolerance(operands)));
    }
    // Of the numbers that later operations read.
    for (i, (what, sums)) in case.found(values, &have[0]).into_iter().enumerate() {
        found.push((what.into(), deviation(&have[want.len() + i], &sums), FOUND_TOLERANCE));
    }
    if have != on_simt(case, given, operands, 2) {
        found.push(("dependence on the order of threads".into(), f64::INFINITY, 0.0));
    }
    found
}

/// What is wrong with a case.
fn faults(case: &Case, operands: Operands) -> Vec<String> {
    let wide = matches!(operands, Operands::F32 | Operands::Tf32);
    let case = Case { half: if wide { 0 } else { case.half }, ..case.clone() };
    let values = case.operands(operands);
    let found = deviations(&case, &values, &values, operands).into_iter();
    let wrong = found.filter(|(_, deviation, tolerance)| deviation > tolerance);
    wrong.map(|(what, by, most)| format!("{} {case:?}: {what}: {by:.1e} > {most:.0e}", operands.name())).collect()
}

/// `[n, c, h, w, k, r, s, stride, pad]`
const SIZES: [[usize; 9]; 10] = [
    [2, 5, 15, 11, 8, 3, 3, 1, 1],
    [1, 3, 15, 11, 5, 7, 7, 2, 3],
    [2, 32, 8, 8, 32, 3, 3, 1, 1],
    [2, 8, 9, 7, 64, 3, 3, 2, 1],
    [3, 64, 5, 5, 8, 1, 1, 1, 0],
    [2, 64, 6, 6, 72, 3, 3, 1, 1],
    [5, 16, 7, 7, 32, 1, 1, 2, 0],
    [4, 8, 16, 16, 8, 3, 3, 1, 1],
    [1, 1, 4, 5, 1, 2, 3, 1, 1],
    [7, 24, 3, 3, 40, 3, 3, 1, 1],
];

/// One line of the table: what stands around a form, which tensors are per-branch and which results are summed.
struct Line {
    op: FusedConv,
    branches: usize,
    branched: u32,
    others: u32,
    summed: [bool; 2],
}

/// What stands before and behind a form.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Norm,
    /// With `Norm`.
    Tangent,
    Delta,
    Start,
    /// The epilogue of the form.
    Found,
}

/// Forms with the operands that can be per-branch: every mixture that differs in what is summed or strided.
fn lines() -> Vec<Line> {
    use ConvForm::{Backward, Fprop, Tangent as Jvp, Wgrad};
    use Part::{Delta, Found, Norm, Start, Tangent};
    let mut lines = Vec::new();
    let mut add = |form, parts: &[Part], branches, branched, others, summed| {
        let has = |part| parts.contains(&part);
        let epilogue = match form {
            _ if !has(Found) => Epilogue::None,
            Fprop => Epilogue::Stats,
            Jvp => Epilogue::TangentSums,
            _ => Epilogue::BackwardSums,
        };
        let (norm, tangent, delta, start) = (has(Norm) || has(Tangent), has(Tangent), has(Delta), has(Start));
        let op = FusedConv { norm, tangent, delta, start, epilogue, ..FusedConv::plain(form, geom(SIZES[0])) };
        lines.push(Line { op, branches, branched, others, summed });
    };
    let (no, yes) = ([false, false], [true, true]);
    add(Fprop, &[Norm, Start, Found], 1, 0, 0, no);
    add(Fprop, &[Norm, Found], 3, 3, NORM, no);
    add(Fprop, &[Start, Found], 3, 2, 0, no);
    add(Fprop, &[Norm, Start], 3, 1, NORM, yes);
    add(Wgrad, &[Norm], 3, 2, 0, no);
    add(Wgrad, &[Norm, Start], 3, 3, NORM, yes);
    add(Wgrad, &[Delta, Start], 1, 0, 0, no);
    add(Wgrad, &[Delta, Norm], 3, 2, 0, yes);
    add(Wgrad, &[Delta, Norm], 3, 0, Y, no);
    add(Wgrad, &[Tangent], 3, 1, 0, no);
    add(Wgrad, &[Delta, Tangent, Start], 3, 3, 0, yes);
    add(Wgrad, &[Delta, Tangent], 2, 3, X | NORM | Y, no);
    add(Backward, &[Norm, Start], 1, 0, 0, no);
    add(Backward, &[Norm, Start, Found], 3, 7, NORM, no);
    add(Backward, &[], 3, 7, 0, yes);
    add(Backward, &[Norm], 3, 4, 0, [false, true]);
    add(Backward, &[Norm, Start], 3, 5, NORM, [true, false]);
    add(Backward, &[Norm, Found], 2, 4, 0, no);
    add(Backward, &[Delta, Norm, Start, Found], 1, 0, 0, no);
    add(Backward, &[Delta, Norm, Found], 3, 7, NORM | Y, no);
    add(Backward, &[Delta, Norm, Found], 3, 4, 0, no);
    add(Backward, &[Delta, Norm, Start, Found], 3, 6, Y, yes);
    add(Backward, &[Delta, Start], 3, 7, Y, yes);
    add(Backward, &[Delta, Start], 2, 1, Y, no);
    add(Backward, &[Delta, Tangent], 1, 0, 0, no);
    add(Backward, &[Delta, Tangent, Start], 3, 7, 0, yes);
    add(Backward, &[Delta, Tangent], 3, 5, X | NORM | Y, [true, false]);
    add(Backward, &[Tangent, Start], 3, 5, X | NORM, [false, true]);
    add(Jvp, &[Norm, Start], 1, 0, 0, no);
    add(Jvp, &[Norm], 3, 9, 0, no);
    add(Jvp, &[Norm, Start], 3, 15, NORM, yes);
    add(Jvp, &[Start], 3, 8, 0, yes);
    add(Jvp, &[Tangent, Start, Found], 1, 0, 0, no);
    add(Jvp, &[Tangent, Found], 3, 9, DY, no);
    add(Jvp, &[Tangent, Start, Found], 3, 15, NORM | NEXT | DY, no);
    add(Jvp, &[Tangent, Start, Found], 3, 9, 0, yes);
    add(Jvp, &[Norm, Found], 3, 8, DY, no);
    add(Jvp, &[Start, Found], 2, 8, NEXT, no);
    add(Jvp, &[Tangent, Start], 3, 9, 0, no);
    lines
}

/// The lines of a form with all sizes, with a different mixture of widths in every case.
fn cases(of: impl Fn(&FusedConv) -> bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for (number, line) in lines().into_iter().enumerate().filter(|(_, line)| of(&line.op)) {
        for (size, geometry) in SIZES.into_iter().enumerate() {
            let op = FusedConv { geom: geom(geometry), ..line.op };
            let half = (number * 419 + size * 173) as u32 % 1024;
            let Line { branches, branched, others, summed, .. } = line;
            cases.push(Case { op, branches, branched, others, summed, half });
        }
    }
    cases
}

/// Whether a part works on two tensors at a time.
fn pairs(op: &FusedConv) -> bool {
    op.tangent || op.delta
}

fn check(operands: Operands, of: impl Fn(&FusedConv) -> bool) {
    let failures = on_two_threads(&cases(of), |case| faults(case, operands));
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn fused_convolutions_f32() {
    check(Operands::F32, |op| !pairs(op));
}

#[test]
fn fused_convolutions_of_pairs_f32() {
    check(Operands::F32, pairs);
}

#[test]
fn fused_convolutions_tf32() {
    check(Operands::Tf32, |op| !pairs(op));
}

#[test]
fn fused_convolutions_of_pairs_tf32() {
    check(Operands::Tf32, pairs);
}

#[test]
fn fused_convolutions_f16() {
    check(Operands::F16, |op| !pairs(op));
}

#[test]
fn fused_convolutions_of_pairs_f16() {
    check(Operands::F16, pairs);
}

#[test]
fn fused_convolutions_bf16() {
    check(Operands::Bf16, |op| !pairs(op));
}

#[test]
fn fused_convolutions_of_pairs_bf16() {
    check(Operands::Bf16, pairs);
}

/// Runs what follows on a machine of this kind, on this thread.
fn like<T>(generation: Generation, body: impl FnOnce() -> T) -> T {
    GENERATION.set(generation);
    let result = body();
    GENERATION.set(Generation::Portable);
    result
}

/// The same table through the kernels of warpgroups, those that sizes allow.
fn check_groups(operands: Operands, of: impl Fn(&FusedConv) -> bool) {
    let failures = on_two_threads(&cases(of), |case| like(Generation::Hopper, || faults(case, operands)));
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn fused_convolutions_of_warpgroups_f16() {
    check_groups(Operands::F16, |op| !pairs(op));
}

#[test]
fn fused_convolutions_of_warpgroups_and_pairs_f16() {
    check_groups(Operands::F16, pairs);
}

#[test]
fn fused_convolutions_of_warpgroups_bf16() {
    check_groups(Operands::Bf16, |op| !pairs(op));
}

#[test]
fn fused_convolutions_of_warpgroups_and_pairs_bf16() {
    check_groups(Operands::Bf16, pairs);
}

/// Deviations of 1 around a mean of 10,000: single precision has the digits for the variance, if they are not thrown away.
#[test]
fn statistics_keep_their_digits() {
    // More tiles than are combined at a time, of the kernels that gather, of the direct ones and of those of warpgroups.
    let many = [40, 8, 18, 18, 16, 1, 1, 1, 0];
    let tries = [
        (Operands::F32, [16, 3, 18, 18, 5, 1, 1, 1, 0], Generation::Portable),
        (Operands::F16, many, Generation::Portable),
        (Operands::F16, many, Generation::Hopper),
    ];
    for (operands, size, generation) in tries {
        let op = FusedConv { start: true, epilogue: Epilogue::Stats, ..FusedConv::plain(ConvForm::Fprop, geom(size)) };
        let case = Case { op, branches: 2, branched: 1, others: 0, summed: [false; 2], half: 0 };
        let mut values = case.operands(operands);
        values.iter_mut().filter(|o| o.name == "start").for_each(|o| o.values.iter_mut().for_each(|v| *v = 1e4));
        let have = like(generation, || on_simt(&case, &values, operands, 1));
        let found = case.found(&values, &have[0]);
        assert!(deviation(&have[1], &found[0].1) < 1e-7);
        assert!(deviation(&have[2], &found[1].1) < 1e-6, "{:.1e}", deviation(&have[2], &found[1].1));
    }
}

/// A case with several tiles of rows, of kernels that gather for f32 and of direct ones for f16.
fn single(op: FusedConv, branched: u32, summed: [bool; 2]) -> [(Operands, Case); 2] {
    let case = |size, half| {
        let op = FusedConv { geom: geom(size), ..op };
        Case { op, branches: 2, branched, others: 0, summed, half }
    };
    [
        (Operands::F32, case([2, 5, 9, 11, 6, 3, 3, 1, 1], 0)),
        (Operands::F16, case([2, 16, 9, 11, 24, 3, 3, 1, 1], 0x155)),
    ]
}

/// Every given sum and factor counts: a wrong one shows in the results that it has a part in, and in no other.
#[test]
fn wrong_factors_are_noticed() {
    let plain = |form| FusedConv::plain(form, geom(SIZES[0]));
    let backward = FusedConv { norm: true, tangent: true, delta: true, ..plain(ConvForm::Backward) };
    let sums = FusedConv { norm: true, delta: true, epilogue: Epilogue::BackwardSums, ..plain(ConvForm::Backward) };
    let tangent = FusedConv { norm: true, tangent: true, epilogue: Epilogue::TangentSums, ..plain(ConvForm::Tangent) };
    let both: &[&str] = &["result 0", "result 1"];
    let tries: [(FusedConv, u32, &[&str], &[&str]); 10] = [
        (backward, 7, &["dg", "db", "y_mean", "y_var", "y_g", "y_b"], both),
        (backward, 7, &["g_dot", "b_dot", "x_dot_mean", "rho", "mean", "var", "g", "b"], &["result 1"]),
        (sums, 7, &["dg", "db"], both),
        (sums, 7, &["mean"], &["result 1", "dg"]),
        (sums, 7, &["b", "g", "var"], &["result 1", "dg"]),
        (tangent, 9, &["g_dot", "b_dot", "x_dot_mean", "rho"], &["result 0"]),
        (tangent, 9, &["next_mean", "next_var"], &["rho"]),
        (tangent, 9, &["next_b", "next_g"], &["covariance"]),
        (tangent, 9, &["next_db", "next_dy"], &["covariance"]),
        (tangent, 9, &["next"], &["rho", "covariance"]),
    ];
    for (op, branched, names, noticed) in tries {
        for (operands, case) in single(op, branched, [false; 2]) {
            let values = case.operands(operands);
            for name in names {
                let mut given = values.clone();
                let wrong = given.iter_mut().find(|o| o.name == **name).unwrap();
                wrong.values.iter_mut().for_each(|v| *v = 1.125 * *v + 0.0625);
                for (what, by, most) in deviations(&case, &values, &given, operands) {
                    let touched = noticed.contains(&what.as_str());
                    // The ReLU's mask is of g and b, mean and variance: what they touch besides is left open.
                    if touched || name.contains("dot") || ["dg", "db", "rho", "next_db", "next_dy"].contains(name) {
                        assert_eq!(by > most, touched, "{} {case:?}: {name}, {what}: {by:.1e}", operands.name());
                    }
                }
            }
        }
    }
}

/// More tiles than are combined at a time.
#[test]
fn sums_of_many_tiles() {
    let backward =
        FusedConv { norm: true, delta: true, start: true, ..FusedConv::plain(ConvForm::Backward, geom(SIZES[0])) };
    let tangent = FusedConv { norm: true, tangent: true, ..FusedConv::plain(ConvForm::Tangent, geom(SIZES[0])) };
    for (op, branched) in [
        (FusedConv { epilogue: Epilogue::BackwardSums, ..backward }, 4),
        (FusedConv { epilogue: Epilogue::TangentSums, ..tangent }, 9),
    ] {
        let tries = [(Operands::F32, [16, 3, 18, 18, 5, 1, 1, 1, 0]), (Operands::F16, [40, 8, 18, 18, 16, 1, 1, 1, 0])];
        for (operands, size) in tries {
            let op = FusedConv { geom: geom(size), ..op };
            let case = Case { op, branches: 2, branched, others: 0, summed: [false; 2], half: 0 };
            for generation in [Generation::Portable, Generation::Hopper] {
                let found = like(generation, || faults(&case, operands));
                assert!(found.is_empty(), "{}", found.join("\n"));
            }
        }
    }
}

/// What is found of a result is per branch as the result is, and of operands that are no more so.
#[test]
fn sums_across_branches_are_refused() {
    let op = FusedConv {
        norm: true,
        epilogue: Epilogue::BackwardSums,
        ..FusedConv::plain(ConvForm::Backward, geom(SIZES[2]))
    };
    // dx per branch or the sum over them; x per branch or not.
    for (branched, summed, refused) in [(4, [false; 2], false), (5, [true, false], true), (4, [true; 2], false)] {
        let case = Case { op, branches: 2, branched, others: 0, summed, half: 0 };
        let values = case.operands(Operands::F16);
        let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F16, Mode::Eager);
        assert_eq!(device.load(fused(&case, &values)).is_err(), refused, "{case:?}");
    }
    // Sums of all branches of a result per branch.
    let case = Case { op, branches: 2, branched: 4, others: 0, summed: [false; 2], half: 0 };
    let mut plan = fused(&case, &case.operands(Operands::F16));
    for port in &mut plan.outputs[2..] {
        let buffer = &mut plan.buffers[port.buffer.unwrap()];
        (buffer.meta, buffer.count) = (buffer.meta.shared(), 1);
        port.meta = buffer.meta;
    }
    let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F16, Mode::Eager);
    let error = device.load(plan).unwrap_err().to_string();
    assert!(error.contains("per branch"), "{error}");
}
