//! Fused convolutions of the table of cases on the SIMT host machine, against the composition of plain operations on the CPU device in
//! double precision: with the kernels that every card runs, and with those of warpgroups.

mod common;

use common::on_two_threads;
use mlnt::cases::{LOADED, Mixture, NORM, Planned, RESIDUAL, Y, convolutions};
use mlnt::check::{Deviation, deviations, same_bits, sum_deviation};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{ConvForm, ConvGeom, Delta, Epilogue, FusedConv, Op};
use mlnt::plan::{Place, Plan};
use mlnt::tape::Meta;
use std::cell::Cell;

fn run(device: &mut dyn Device, case: &Planned, plan: Plan, values: &[HostVec]) -> Vec<HostVec> {
    let outputs = plan.outputs.clone();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    // Twice: counters must be as they were.
    device.run(id, &[]).unwrap();
    outputs.iter().map(|port| device.read_output(id, &port.name).unwrap()).collect()
}

thread_local! {
    /// The machine that this thread's cases run on.
    static GENERATION: Cell<Generation> = const { Cell::new(Generation::Portable) };
}

fn convolution(case: &Planned) -> FusedConv {
    let Op::FusedConv(op) = case.case.op else { panic!("{} is no fused convolution", case.case.name) };
    op
}

fn on_simt(case: &Planned, values: &[HostVec], operands: Operands, seed: u64) -> Vec<HostVec> {
    let generation = GENERATION.get();
    let machine = Simt::open(seed).unwrap().like(generation);
    let tally = machine.tally();
    let mut device = Cuda::new(Box::new(machine), operands, Mode::Eager);
    let results = run(&mut device, case, case.plan(operands.is_half()).unwrap(), values);
    // The rule of the lowering: operands of 16 bits, and channels in eights.
    let geom = convolution(case).geom;
    let eights = geom.c.is_multiple_of(8) && geom.k.is_multiple_of(8);
    let groups = generation == Generation::Hopper && operands.is_half() && eights;
    let tally = tally.lock().unwrap();
    let (kernel, _) = tally.keys().find(|(_, label)| label.starts_with(case.case.op_name())).unwrap();
    assert!(kernel.contains("wgmma") == groups, "{} ran {kernel}", case.case.name);
    let joint = operands.is_half() && eights && one_tile(case);
    assert!(kernel.contains("joint") == joint, "{} ran {kernel}", case.case.name);
    results
}

/// Whether both gradients come from one tile of delta: few channels, the usual filter, and sums over the same branches. Channels are in eights.
fn one_tile(case: &Planned) -> bool {
    let FusedConv { form, geom: g, .. } = convolution(case);
    if form != ConvForm::Backward || g.c.max(g.k) > 32 || [g.r, g.s, g.stride, g.pad] != [3, 3, 1, 1] {
        return false;
    }
    let branched = |names: &[&str]| case.case.operands.iter().any(|o| o.meta.per_branch && names.contains(&o.name));
    let delta = branched(&["dy", "y", "y_g", "y_b", "y_mean", "y_var", "dg", "db", "residual"]);
    let x = branched(&["x", "x_dot", "g", "b", "mean", "var", "g_dot", "b_dot", "x_dot_mean", "rho"]);
    let results = case.plan(true).unwrap().outputs;
    let [of_x, of_w] = [0, 1].map(|i| results[i].meta.per_branch);
    of_x == of_w && (of_x || (delta || branched(&["w"])) == (delta || x))
}

fn values(case: &Planned, operands: Operands) -> Vec<HostVec> {
    case.values(11, |v| operands.stored(v))
}

/// What a case deviates by on a device that is `given` these values: the results of its form, its cotangent, then what is found of the
/// first result.
fn off(case: &Planned, values: &[HostVec], given: &[HostVec], operands: Operands) -> Vec<Deviation> {
    let want = run(&mut Cpu::<f64>::new(1).unwrap(), case, case.composition().unwrap(), values);
    let have = on_simt(case, given, operands, 1);
    let mut found = deviations(case, operands, values, &want, &have).unwrap();
    let again = on_simt(case, given, operands, 2);
    if !have.iter().zip(&again).all(|(a, b)| same_bits(a, b)) {
        found.push(Deviation { what: "dependence on the order of threads".into(), by: f64::INFINITY, most: 0.0 });
    }
    found
}

/// What is wrong with a case.
fn faults(case: &Planned, operands: Operands) -> Vec<String> {
    let values = values(case, operands);
    let (kind, name) = (operands.name(), &case.case.name);
    let wrong = off(case, &values, &values, operands).into_iter().filter(Deviation::is_fault);
    wrong.map(|d| format!("{kind} {name}: {}: {:.1e} > {:.0e}", d.what, d.by, d.most)).collect()
}

/// The cases of the table whose operation `of` takes.
fn cases(of: impl Fn(&FusedConv) -> bool) -> Vec<Planned> {
    let cases: Vec<Planned> = convolutions().into_iter().filter(|case| of(&convolution(case))).collect();
    assert!(cases.len() > 100);
    cases
}

/// `[n, c, h, w, k, r, s, stride, pad]`
fn geom([n, c, h, w, k, r, s, stride, pad]: [usize; 9]) -> ConvGeom {
    ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, r, s), stride, pad).unwrap()
}

/// Whether a part works on two tensors at a time.
fn pairs(op: &FusedConv) -> bool {
    op.tangent || op.delta != Delta::None
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

/// Blocks of warpgroups that work on several patches (see `simt_patches.rs`): products of two terms, and what is made of operands as they
/// are loaded, with what is found of the result.
#[test]
fn runs_of_patches_of_fused_convolutions_are_right() {
    let plain = |form, size| FusedConv::plain(form, geom(size));
    let norm = |form, size| FusedConv { norm: true, ..plain(form, size) };
    let (one, two) = ([71, 8, 16, 16, 24, 1, 3, 1, 1], [71, 40, 14, 16, 24, 1, 3, 1, 1]);
    let wide = [299, 40, 7, 8, 136, 1, 1, 1, 0];
    let tangent = |size| FusedConv { tangent: true, epilogue: Epilogue::TangentSums, ..norm(ConvForm::Tangent, size) };
    let delta = Delta::Backward { residual: true, kept: true };
    let back =
        |size| FusedConv { delta, start: true, epilogue: Epilogue::BackwardSums, ..norm(ConvForm::Backward, size) };
    // Form, branches, which operands are per-branch, and widths.
    let cases = [
        (FusedConv { epilogue: Epilogue::Stats, ..norm(ConvForm::Fprop, one) }, 4, 1, 0x2f),
        (FusedConv { epilogue: Epilogue::Stats, start: true, ..norm(ConvForm::Fprop, wide) }, 2, 3, 0x2f),
        (tangent(one), 4, 9, 0x2ff),
        (tangent(two), 4, 9, 0x2ff),
        (tangent(wide), 2, 9, 0x2ff),
        (FusedConv { start: true, ..norm(ConvForm::Tangent, two) }, 4, 9, 0x2cf),
        // Tensors of 32 bits, which are not loaded in flights.
        (tangent(one), 4, 9, 0),
        (back([71, 24, 16, 16, 8, 3, 1, 1, 1]), 4, 7, 0x7ff),
        (back([36, 8, 32, 32, 40, 3, 3, 2, 1]), 2, 7, 0x7ff),
        (back([71, 8, 32, 32, 72, 1, 1, 2, 0]), 2, 7, 0x7ff),
    ];
    let cases: Vec<Planned> = cases
        .into_iter()
        .map(|(op, branches, branched, half)| {
            Planned::convolution(op, Mixture { branches, branched, others: 0, summed: [false; 2], half })
        })
        .collect();
    let failures = on_two_threads(&cases, |case| like(Generation::Hopper, || faults(case, Operands::F16)));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Both gradients from one tile of delta: images that patches do not fill, one image, one branch, several patches for a block, several blocks
/// for a branch, and other numbers of channels on either side.
#[test]
fn gradients_from_one_tile_are_right() {
    let norm = |size| FusedConv { norm: true, ..FusedConv::plain(ConvForm::Backward, geom(size)) };
    let delta = Delta::Backward { residual: true, kept: true };
    let found = |size| FusedConv { delta, start: true, epilogue: Epilogue::BackwardSums, ..norm(size) };
    let tangent = |size| FusedConv { delta, start: true, tangent: true, ..norm(size) };
    let sizes = [
        [1, 8, 15, 11, 16, 3, 3, 1, 1],
        [1, 32, 7, 5, 8, 3, 3, 1, 1],
        [13, 24, 7, 5, 32, 3, 3, 1, 1],
        [3, 16, 15, 11, 24, 3, 3, 1, 1],
        [9, 8, 16, 24, 32, 3, 3, 1, 1],
        [5, 32, 1, 3, 16, 3, 3, 1, 1],
        [2, 32, 32, 32, 32, 3, 3, 1, 1],
    ];
    let mut cases = Vec::new();
    for (i, size) in sizes.into_iter().enumerate() {
        // What is per branch, what is summed, and widths: as they are in the phases of a step, then others.
        let half = [0x7ff, LOADED, 0x4ff & !2, 0x3d5][i % 4];
        let mut add = |op, branches, branched, others, sum: bool, half| {
            let mixture = Mixture { branches, branched, others, summed: [sum; 2], half };
            cases.push(Planned::convolution(op, mixture));
        };
        add(found(size), 1, 0, 0, false, half);
        add(found(size), 3, 4, 0, false, half | 0x400);
        add(found(size), 2, 7, NORM | Y | RESIDUAL, false, 0x7ff);
        add(tangent(size), 3, 7, RESIDUAL, true, half);
        add(tangent(size), 2, 6, 0, true, 0x7ff);
        add(FusedConv { start: true, ..norm(size) }, 2, 7, NORM, i % 2 == 0, half);
    }
    assert!(cases.iter().all(one_tile));
    let failures = on_two_threads(&cases, |case| {
        let mut found = faults(case, Operands::F16);
        let values = values(case, Operands::F16);
        let [once, again] = [2, 3].map(|seed| on_simt(case, &values, Operands::F16, seed));
        if !once.iter().zip(&again).all(|(a, b)| same_bits(a, b)) {
            found.push(format!("{}: a third order of threads", case.case.name));
        }
        found
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
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
        let case = Planned::convolution(op, Mixture { branches: 2, branched: 1, ..Mixture::default() });
        let mut values = values(&case, operands);
        let start = op.start_operand().unwrap();
        values[start] = HostVec::F64(vec![1e4; values[start].to_f64().len()]);
        let have = like(generation, || on_simt(&case, &values, operands, 1));
        let found = case.found(&values, &have[0]).unwrap();
        let off = |i: usize| sum_deviation(&have[found[i].result].to_f64(), &found[i].values, &found[i].sizes);
        assert!(off(0) < 1e-7);
        let by = off(1);
        assert!(by < 1e-6, "{by:.1e}");
    }
}

/// A case with several tiles of rows, of kernels that gather for f32 and of direct ones for f16.
fn single(op: FusedConv, branched: u32) -> [(Operands, Planned); 2] {
    let case = |size, half| {
        let op = FusedConv { geom: geom(size), ..op };
        Planned::convolution(op, Mixture { branches: 2, branched, half, ..Mixture::default() })
    };
    [
        (Operands::F32, case([2, 5, 9, 11, 6, 3, 3, 1, 1], 0)),
        (Operands::F16, case([2, 16, 9, 11, 24, 3, 3, 1, 1], 0x100 | LOADED)),
    ]
}

/// Every given sum and factor counts: a wrong one shows in the results that it has a part in, and in no other.
#[test]
fn wrong_factors_are_noticed() {
    let plain = |form| FusedConv::plain(form, geom([2, 32, 8, 8, 32, 3, 3, 1, 1]));
    let delta = Delta::Backward { residual: true, kept: true };
    let backward = FusedConv { norm: true, tangent: true, delta, ..plain(ConvForm::Backward) };
    let sums = FusedConv { norm: true, delta, epilogue: Epilogue::BackwardSums, ..plain(ConvForm::Backward) };
    let tangent = FusedConv { norm: true, tangent: true, epilogue: Epilogue::TangentSums, ..plain(ConvForm::Tangent) };
    let both: &[&str] = &["result 0", "result 1", "delta"];
    let tries: [(FusedConv, u32, &[&str], &[&str]); 8] = [
        (backward, 7, &["residual", "dg", "db", "y_mean", "y_var", "y_g", "y_b"], both),
        (backward, 7, &["g_dot", "b_dot", "x_dot_mean", "rho", "mean", "var", "g", "b"], &["result 1"]),
        (sums, 7, &["residual", "dg", "db"], both),
        (sums, 7, &["mean"], &["result 1", "dg"]),
        (sums, 7, &["b", "g", "var"], &["result 1", "dg"]),
        (tangent, 9, &["g_dot", "b_dot", "x_dot_mean", "rho"], &["result 0"]),
        (tangent, 9, &["next_mean", "next_var"], &["rho"]),
        (tangent, 9, &["next"], &["rho"]),
    ];
    for (op, branched, names, noticed) in tries {
        for (operands, case) in single(op, branched) {
            let values = values(&case, operands);
            for name in names {
                let mut given = values.clone();
                let at = case.case.operands.iter().position(|o| o.name == *name).unwrap();
                given[at] = HostVec::F64(values[at].to_f64().into_iter().map(|v| 1.125 * v + 0.0625).collect());
                for Deviation { what, by, most } in off(&case, &values, &given, operands) {
                    let touched = noticed.contains(&what.as_str());
                    // The ReLU's mask is of g and b, mean and variance: what they touch besides is left open.
                    if touched || name.contains("dot") || ["residual", "dg", "db", "rho", "next"].contains(name) {
                        assert_eq!(
                            by > most,
                            touched,
                            "{} {}: {name}, {what}: {by:.1e}",
                            operands.name(),
                            case.case.name
                        );
                    }
                }
            }
        }
    }
}

/// More tiles than are combined at a time.
#[test]
fn sums_of_many_tiles() {
    let backward = FusedConv {
        norm: true,
        delta: Delta::Backward { residual: true, kept: true },
        start: true,
        ..FusedConv::plain(ConvForm::Backward, geom([2, 32, 8, 8, 32, 3, 3, 1, 1]))
    };
    let tangent = FusedConv {
        norm: true,
        tangent: true,
        ..FusedConv::plain(ConvForm::Tangent, geom([2, 32, 8, 8, 32, 3, 3, 1, 1]))
    };
    for (op, branched) in [
        (FusedConv { epilogue: Epilogue::BackwardSums, ..backward }, 4),
        (FusedConv { epilogue: Epilogue::TangentSums, ..tangent }, 9),
    ] {
        let tries = [(Operands::F32, [16, 3, 18, 18, 5, 1, 1, 1, 0]), (Operands::F16, [40, 8, 18, 18, 16, 1, 1, 1, 0])];
        for (operands, size) in tries {
            let op = FusedConv { geom: geom(size), ..op };
            let case = Planned::convolution(op, Mixture { branches: 2, branched, half: LOADED, ..Mixture::default() });
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
        ..FusedConv::plain(ConvForm::Backward, geom([2, 32, 8, 8, 32, 3, 3, 1, 1]))
    };
    // dx per branch or the sum over them; x per branch or not.
    for (branched, summed, refused) in [(4, [false; 2], false), (5, [true, false], true), (4, [true; 2], false)] {
        let case = Planned::convolution(op, Mixture { branches: 2, branched, summed, ..Mixture::default() });
        let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F16, Mode::Eager);
        assert_eq!(device.load(case.plan(true).unwrap()).is_err(), refused, "{}", case.case.name);
    }
    // Sums of all branches of a result per branch.
    let case = Planned::convolution(op, Mixture { branches: 2, branched: 4, ..Mixture::default() });
    let mut plan = case.plan(true).unwrap();
    for port in &mut plan.outputs[2..] {
        let buffer = &mut plan.buffers[port.buffer.unwrap()];
        (buffer.meta, buffer.count) = (buffer.meta.shared(), 1);
        port.meta = buffer.meta;
    }
    let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F16, Mode::Eager);
    let error = device.load(plan).unwrap_err().to_string();
    assert!(error.contains("per branch"), "{error}");
}

/// A cotangent that is kept is per branch as it is.
#[test]
fn cotangents_kept_for_other_branches_are_refused() {
    let delta = Delta::Backward { residual: true, kept: true };
    let op = FusedConv { delta, ..FusedConv::plain(ConvForm::Wgrad, geom([2, 32, 8, 8, 32, 3, 3, 1, 1])) };
    // x alone per branch: delta is the same in all, and is stored once.
    for (branched, per_branch) in [(2, true), (1, false)] {
        for as_it_is in [true, false] {
            let case = Planned::convolution(op, Mixture { branches: 2, branched, ..Mixture::default() });
            let mut plan = case.plan(true).unwrap();
            let port = &mut plan.outputs[1];
            assert_eq!(port.meta.per_branch, per_branch);
            if !as_it_is {
                port.meta = port.meta.with_branching(!per_branch);
                let buffer = &mut plan.buffers[port.buffer.unwrap()];
                (buffer.meta, buffer.count) = (port.meta, if per_branch { 1 } else { 2 });
                // Behind all others, with room for another branch.
                buffer.place = Place::Arena(plan.arena_reals);
                plan.arena_reals += buffer.meta.total(2);
            }
            let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F16, Mode::Eager);
            assert_eq!(device.load(plan).is_ok(), as_it_is, "{branched} {as_it_is}");
        }
    }
}
