//! Branch groups: the same results as with all branches at a time, in less memory.

mod common;

use common::{LoadedStep, Runner, deviation, load_planned, normals, on_two_threads, small_model, step_spec};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, KernelCost, Mode, Operands, machine};
use mlnt::device::{Device, HostVec};
use mlnt::mlnt::golden::Golden;
use mlnt::mlnt::{Recipe, Report, record_step};
use mlnt::model::{Arch, ModelSpec};
use mlnt::plan::{LEAST_GROUP, Machine, Plan, PlanOptions, StageGroups};
use mlnt::tape::{Coef, Meta, Tape, Tensor};
use mlnt::train::choice::Precision;
use std::path::Path;

const ARCHS: [Arch; 2] = [Arch::PreactResnet, Arch::ResnetBottleneck];
const RECIPES: [Recipe; 2] = [Recipe::Sequential, Recipe::Joint];

fn in_groups(group: usize) -> PlanOptions {
    PlanOptions { group: Some(group), ..PlanOptions::default() }
}

/// So many branches at a time in each stage.
fn by_stage(sizes: &[usize]) -> StageGroups {
    let sized = |groups: StageGroups, (stage, size): (usize, &usize)| groups.with(stage, Some(*size));
    sizes.iter().enumerate().fold(StageGroups::WHOLE, sized)
}

/// Losses and states after some steps.
fn run_steps<D: Device>(step: &mut LoadedStep<D>, steps: usize) -> Vec<(String, Vec<f64>)> {
    (0..steps).for_each(|_| step.run());
    let outputs = ["class_loss", "class_logits", "consistency", "inner_loss"];
    let read = |name: &str| (name.to_string(), step.device.read_output(step.id, name).unwrap().to_f64());
    let states = step.states().into_iter().map(|(name, values)| (name, values.to_f64()));
    outputs.into_iter().map(read).chain(states).collect()
}

fn assert_close(have: &[(String, Vec<f64>)], want: &[(String, Vec<f64>)], tolerance: f64, what: &str) {
    assert_eq!(have.len(), want.len());
    for ((name, have), (same, want)) in have.iter().zip(want) {
        assert_eq!(name, same);
        let off = deviation(have, want);
        assert!(off <= tolerance, "{what}: {name} is off by {off:.1e}");
    }
}

/// Every recipe of both networks, exact and first order.
fn every_step(mut each: impl FnMut(Arch, Recipe, bool)) {
    for arch in ARCHS {
        for recipe in RECIPES {
            [false, true].into_iter().for_each(|first_order| each(arch, recipe, first_order));
        }
    }
}

#[test]
fn groups_change_no_result() {
    every_step(|arch, recipe, first_order| {
        for branches in [1, 3, 5] {
            let spec = step_spec(small_model(arch), 8, branches, recipe, first_order);
            // One step: the next would magnify the rounding of this one.
            let run =
                |options| run_steps(&mut load_planned(Cpu::<f64>::new(2).unwrap(), &spec, Report::Losses, &options), 1);
            let want = run(PlanOptions::default());
            for group in [1, 2, 3, branches] {
                let what = format!("{arch:?} {recipe:?} first order {first_order}, {branches} by {group}");
                assert_close(&run(in_groups(group)), &want, 1e-12, &what);
                if group == branches {
                    assert!(run(in_groups(group)) == want, "{what}: one group is no group");
                }
            }
            for (group, stages) in [(branches, &[1][..]), (branches, &[2, 1]), (3, &[2, 9, 1]), (2, &[9, 1])] {
                let options = PlanOptions { stages: by_stage(stages), ..in_groups(group) };
                let what = format!("{arch:?} {recipe:?} first order {first_order}, {branches} by {group}, {stages:?}");
                assert_close(&run(options), &want, 1e-12, &what);
            }
            let unfused = PlanOptions { fuse: false, stages: by_stage(&[1]), ..in_groups(2) };
            assert_close(&run(unfused), &want, 1e-12, &format!("{arch:?} {recipe:?} {branches}, not fused"));
        }
    });
}

#[test]
fn groups_change_no_result_of_the_kernels() {
    let plain = PlanOptions::default();
    let kernels = PlanOptions { kernels: true, ..plain };
    let half = PlanOptions { half: true, ..kernels };
    for (arch, operands, options, tolerance) in [
        (Arch::ResnetBottleneck, Operands::F32, plain, 1e-4),
        (Arch::PreactResnet, Operands::F32, kernels, 1e-4),
        (Arch::PreactResnet, Operands::F16, half, 5e-2),
    ] {
        let spec = step_spec(small_model(arch), 4, 5, Recipe::Joint, false);
        let run = |group, stages: &[usize], mode| {
            let device = Cuda::new(Box::new(Simt::open(1).unwrap()), operands, mode);
            let options = PlanOptions { group, stages: by_stage(stages), ..options };
            run_steps(&mut load_planned(device, &spec, Report::Losses, &options), 2)
        };
        let want = run(None, &[], Mode::Graph);
        for (group, stages) in [(1, &[][..]), (2, &[]), (3, &[]), (5, &[1]), (3, &[2, 1])] {
            let what = format!("{arch:?} {} by {group}, {stages:?}", operands.name());
            let graph = run(Some(group), stages, Mode::Graph);
            assert_close(&graph, &want, tolerance, &what);
            assert!(graph == run(Some(group), stages, Mode::Eager), "{what}: launched one by one");
            assert!(graph == run(Some(group), stages, Mode::Graph), "{what}: another run");
        }
    }
}

#[test]
fn golden_steps_in_groups_pass_on_the_kernels() {
    let cases: Vec<_> = ["step_sequential", "step_joint", "step_mentor", "step_bottleneck"]
        .into_iter()
        .flat_map(|name| [(1, &[][..]), (2, &[]), (9, &[1, 2])].map(|(group, stages)| (name, group, stages)))
        .collect();
    let failures = on_two_threads(&cases, |(name, group, stages)| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.safetensors"));
        let golden = Golden::read(&path).unwrap();
        let options = PlanOptions { stages: by_stage(stages), ..in_groups(*group) };
        let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F32, Mode::Graph);
        let judgement = golden.judge(&golden.run(&mut device, &options).unwrap()).unwrap();
        let passes = judgement.pass(Precision::F32.tolerance());
        (!passes).then(|| format!("{name} by {group}, {stages:?}: {judgement:?}")).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The ranges of branches of a plan's launches, one after the other, without repetitions.
fn passes(plan: &Plan) -> Vec<std::ops::Range<usize>> {
    let branched = |b: &usize| plan.buffers[*b].meta.per_branch;
    let launches = plan.launches.iter().filter(|l| l.args.iter().flat_map(|a| a.buffers()).any(branched));
    let mut passes: Vec<_> = launches.map(|l| l.branches.clone()).collect();
    passes.dedup();
    passes
}

#[test]
fn a_step_is_one_region_of_balanced_groups() {
    every_step(|arch, recipe, first_order| {
        for report in [Report::Losses, Report::Everything, Report::Replay] {
            let tape = record_step(&step_spec(small_model(arch), 4, 7, recipe, first_order), report).unwrap();
            for fuse in [false, true] {
                let groups = |size| passes(&Plan::build(&tape, &PlanOptions { fuse, ..in_groups(size) }).unwrap());
                let what = format!("{arch:?} {recipe:?} first order {first_order} {report:?} fused {fuse}");
                assert_eq!(groups(4), [0..4, 4..7], "{what}");
                assert_eq!(groups(3), [0..3, 3..5, 5..7], "{what}");
                assert_eq!((groups(1).len(), groups(7).len(), groups(100).len()), (7, 1, 1), "{what}");
            }
        }
    });
}

/// The paper's network for CIFAR-10: PreAct ResNet-32.
fn paper_tape(branches: usize, recipe: Recipe, first_order: bool) -> Tape {
    let model = ModelSpec {
        arch: Arch::PreactResnet,
        in_channels: 3,
        size: [32, 32],
        classes: 10,
        widths: vec![32, 64, 128],
        blocks: vec![5, 5, 5],
    };
    record_step(&step_spec(model, 128, branches, recipe, first_order), Report::Losses).unwrap()
}

#[test]
fn the_arena_follows_the_size_of_a_group() {
    let half = PlanOptions { kernels: true, half: true, ..PlanOptions::default() };
    for (recipe, first_order, options, operands) in [
        (Recipe::Joint, false, PlanOptions::default(), Operands::F32),
        (Recipe::Sequential, false, PlanOptions::default(), Operands::F32),
        (Recipe::Joint, true, PlanOptions::default(), Operands::F32),
        (Recipe::Joint, false, half, Operands::F16),
    ] {
        let tape = paper_tape(10, recipe, first_order);
        let mut arenas = Vec::new();
        for group in [10, 5, 4, 2, 1] {
            let plan = Plan::build(&tape, &PlanOptions { group: Some(group), ..options }).unwrap();
            let (arena, cost) = (plan.arena_bytes(4), plan.cost(4));
            let kernels = KernelCost::of(&plan, operands, Generation::Portable).unwrap().launches;
            println!(
                "{recipe:?} first order {first_order} {}, groups of {group}: arena {:.3} GB, {} launches, {kernels} of \
                 kernels, {:.1} GB moved, {:.3} TFLOP",
                operands.name(),
                arena as f64 / 1e9,
                cost.launches(),
                cost.bytes_moved() as f64 / 1e9,
                cost.flops() as f64 / 1e12,
            );
            arenas.push((group, arena as f64, cost.flops()));
        }
        // What every group takes, and what a branch takes beside it, from the two ends.
        let (all, one) = (arenas[0], arenas[4]);
        let branch = (all.1 - one.1) / 9.0;
        let shared = one.1 - branch;
        assert!(shared < 0.4 * all.1, "{recipe:?}: {:.3} GB are there whatever the group", shared / 1e9);
        for (group, arena, flops) in &arenas[1..] {
            let groups = 10usize.div_ceil(*group);
            let largest = 10usize.div_ceil(groups);
            let expected = shared + branch * largest as f64;
            assert!((arena - expected).abs() < 0.1 * all.1, "{recipe:?}, {group}: {arena}, expected {expected}");
            assert!(*flops as f64 <= 1.005 * all.2 as f64, "{recipe:?}, {group}: groups compute something twice");
        }
    }
}

#[test]
fn a_hundred_branches_can_be_planned() {
    let tape = paper_tape(100, Recipe::Joint, false);
    let arena = |group| Plan::build(&tape, &in_groups(group)).unwrap().arena_bytes(4);
    assert!(10 * arena(5) < arena(100) && arena(1) < arena(5));
}

/// A tape's outputs in groups and not, on random inputs.
fn assert_same_outputs(tape: &Tape, what: &str) {
    let value = |(i, n): (usize, &mlnt::tape::Named)| normals(tape.meta(n.tensor).total(tape.branches()), i as u64);
    let inputs: Vec<HostVec> = tape.inputs().iter().enumerate().map(|i| HostVec::F64(value(i))).collect();
    for fuse in [false, true] {
        let run =
            |group| Runner::<f64>::new(tape, PlanOptions { fuse, group, ..PlanOptions::default() }).run(tape, &inputs);
        let want = run(None);
        for group in [1, 2, 3] {
            for ((have, want), output) in run(Some(group)).iter().zip(&want).zip(tape.outputs()) {
                let off = deviation(have, want);
                assert!(off <= 1e-12, "{what}: {} in groups of {group} is off by {off:.1e}", output.name);
            }
        }
    }
}

fn output(tape: &mut Tape, name: &str, t: Tensor) -> Tensor {
    tape.output(name, t);
    t
}

#[test]
fn sums_that_branches_need_again_take_another_pass() {
    let mut tape = Tape::new(5);
    let x = tape.input("x", Meta::activation(2, 3, 5, 4).branched()).unwrap();
    let w = tape.input("w", Meta::weight(3, 3, 3, 3).branched()).unwrap();
    let y = tape.conv2d(x, w, 1, 1).unwrap();
    let sum = tape.sum_branches(y).unwrap();
    // The sum in every branch, and branches of before.
    let again = tape.lin_comb(&[(Coef::ONE, x), (Coef::constant(0.5), sum), (Coef::constant(2.0), y)]).unwrap();
    let second = tape.conv2d(again, w, 1, 1).unwrap();
    let third = tape.scaled_sum_branches(Coef::constant(0.1), second).unwrap();
    output(&mut tape, "second", second);
    output(&mut tape, "third", third);
    let last = tape.mask(third, y, true).unwrap();
    output(&mut tape, "last", last);
    assert_same_outputs(&tape, "three passes");
    let plan = Plan::build(&tape, &in_groups(3)).unwrap();
    assert_eq!(passes(&plan), [0..3, 3..5, 0..3, 3..5, 0..3, 3..5]);
}

#[test]
fn sums_go_on_from_group_to_group() {
    let mut tape = Tape::new(5);
    let meta = Meta::activation(2, 3, 5, 4);
    let x = tape.input("x", meta).unwrap();
    let xm = tape.input("xm", meta.branched()).unwrap();
    let w = tape.input("w", Meta::weight(3, 3, 3, 3)).unwrap();
    let v = tape.input("v", Meta::weight(3, 3, 3, 3).branched()).unwrap();
    let shared = tape.conv2d(x, w, 1, 1).unwrap();
    let mut summed = |a, b| tape.conv(mlnt::ops::ConvKind::Fprop, geom(), a, b, true).unwrap();
    let (one, two, three) = (summed(xm, w), summed(x, v), summed(xm, v));
    let mask = tape.mask(x, xm, true).unwrap();
    let add = |tape: &mut Tape, name: &str, parts: &[Tensor]| {
        let terms: Vec<_> = parts.iter().map(|t| (Coef::ONE, *t)).collect();
        let t = tape.lin_comb(&terms).unwrap();
        output(tape, name, t)
    };
    // Convolutions that start from shared tensors, from sums of any kind, and from one another; a sum read twice.
    let first = add(&mut tape, "first", &[shared, one, two]);
    add(&mut tape, "second", &[mask, three, x]);
    add(&mut tape, "third", &[first, two, mask]);
    // A combination that counts a shared tensor once beside the branches.
    let mixed = tape.record(mlnt::ops::LinComb::new(vec![Coef::constant(3.0); 3]), &[x, xm, mask], &[true]).unwrap();
    output(&mut tape, "mixed", mixed[0]);
    // Statistics of shared activations in an operation on branches are no sum over them.
    let g = tape.input("g", Meta::vector(3).branched()).unwrap();
    let b = tape.input("b", Meta::vector(3)).unwrap();
    let norm = tape.batch_norm(x, g, b).unwrap();
    output(&mut tape, "y", norm.y);
    output(&mut tape, "mean", norm.mean);
    let used = tape.batch_norm_eval(xm, g, b, norm.mean, norm.var).unwrap();
    let total = tape.channel_sum(used, true).unwrap();
    output(&mut tape, "total", total);
    assert_same_outputs(&tape, "sums");
}

fn geom() -> mlnt::ops::ConvGeom {
    mlnt::ops::ConvGeom::new(&Meta::activation(2, 3, 5, 4), &Meta::weight(3, 3, 3, 3), 1, 1).unwrap()
}
#[test]
fn a_device_takes_as_many_branches_as_its_budget_lets() {
    let tape = paper_tape(10, Recipe::Joint, false);
    let group = |kernels: bool, operands| {
        let options = PlanOptions { kernels, half: kernels, ..PlanOptions::default() };
        let machine = machine(operands);
        let budget = machine.arena_bytes;
        let plan = machine.fit(&tape, &options).unwrap();
        assert!(plan.arena_bytes(4) <= budget || plan.largest_group() <= LEAST_GROUP);
        let fewer = 10usize.div_ceil(plan.largest_group()) - 1;
        if fewer > 0 {
            let larger = PlanOptions { group: Some(10usize.div_ceil(fewer)), ..options };
            assert!(Plan::build(&tape, &larger).unwrap().arena_bytes(4) > budget, "a larger group would have done");
        }
        plan.largest_group()
    };
    println!("groups of {} in f16, of {} in f32", group(true, Operands::F16), group(false, Operands::F32));
    // Nothing is small enough: as small as it gets.
    let fit = |tape: &Tape, arena_bytes| {
        Machine { arena_bytes, ..machine(Operands::F32) }.fit(tape, &PlanOptions::default()).unwrap().largest_group()
    };
    assert_eq!(fit(&tape, 1000), LEAST_GROUP);
    // Cross entropy has no branches.
    let small = record_step(&step_spec(small_model(Arch::PreactResnet), 4, 3, Recipe::Joint, false), Report::Losses);
    assert_eq!(fit(&small.unwrap(), 1 << 30), 3);
}

#[test]
fn the_default_keeps_to_what_is_asked_of_the_papers_step() {
    let options = PlanOptions { kernels: true, half: true, ..PlanOptions::default() };
    let card = machine(Operands::F16);
    let mut before = [0.0; 3];
    for branches in [1, 2, 4, 10, 20, 50, 100] {
        let tape = paper_tape(branches, Recipe::Joint, false);
        let plan = card.fit(&tape, &options).unwrap();
        let cost = plan.cost(4);
        // One forward pass: 70.6 GFLOP of convolutions, and batch norms.
        let forward = cost.phases.iter().find(|p| p.phase == "A forward").unwrap().flops as f64;
        let ratio = cost.flops() as f64 / forward;
        assert!(ratio <= 9.0 * branches as f64 + 4.9, "M = {branches}: {ratio}");
        for generation in [Generation::Portable, Generation::Hopper] {
            let kernels = KernelCost::of(&plan, Operands::F16, generation).unwrap();
            assert!(branches > 10 || kernels.launches <= 700, "M = {branches}: {} launches", kernels.launches);
            // They are not among the bytes moved, and stay a part of them.
            let partial = kernels.partial_bytes as f64 / cost.bytes_moved() as f64;
            assert!(
                branches < 10 || partial <= 0.45,
                "M = {branches}, {generation:?}: {partial} of the bytes moved in partial sums"
            );
        }
        assert!(branches > 10 || cost.bytes_moved() <= 35_000_000_000, "M = {branches}: {} bytes", cost.bytes_moved());
        assert!(plan.arena_bytes(4) <= 2_200_000_000, "M = {branches}: {} bytes", plan.arena_bytes(4));
        let now = [cost.flops(), cost.bytes_moved(), cost.launches() as u64].map(|n| n as f64);
        assert!(now.iter().zip(&before).all(|(now, before)| now >= before), "M = {branches}: {now:?} {before:?}");
        before = now;
    }
}

/// Pixels of the largest image of each launch on branches, and the branches, one after the other without repetitions.
fn stages_and_branches(plan: &Plan) -> Vec<(usize, std::ops::Range<usize>)> {
    let of = |launch: &mlnt::plan::Launch| {
        // Of linear combinations several may share a launch, of shared tensors too.
        let [args] = &launch.args[..] else { return None };
        let metas = || args.buffers().map(|b| &plan.buffers[*b].meta);
        let images = metas().filter(|meta| meta.kind == mlnt::tape::Kind::Activation);
        let pixels = images.map(|meta| meta.dims[2] * meta.dims[3]).max().filter(|pixels| *pixels > 1)?;
        metas().any(|meta| meta.per_branch).then(|| (pixels, launch.branches.clone()))
    };
    let mut found: Vec<_> = plan.launches.iter().filter_map(of).collect();
    found.dedup();
    found
}

#[test]
fn stages_are_taken_in_passes_of_their_own() {
    let tape = paper_tape(10, Recipe::Joint, false);
    for kernels in [false, true] {
        let options = PlanOptions { kernels, half: kernels, ..in_groups(5) };
        let plan = |stages: &[usize]| Plan::build(&tape, &PlanOptions { stages: by_stage(stages), ..options }).unwrap();
        let (whole, divided) = (plan(&[]), plan(&[2, 9, 3]));
        assert!(stages_and_branches(&whole).iter().all(|(_, branches)| branches.len() == 5));
        let passes = stages_and_branches(&divided);
        let sizes = |of: usize| {
            let mut sizes: Vec<usize> = passes.iter().filter(|p| p.0 == of).map(|p| p.1.len()).collect();
            sizes.sort_unstable();
            sizes.dedup();
            sizes
        };
        assert_eq!((sizes(1024), sizes(256), sizes(64)), (vec![1, 2], vec![5], vec![2, 3]), "kernels {kernels}");
        // One stretch after the other: a pass does all of a stretch, and no branch comes twice in one.
        let first: Vec<_> = passes.iter().filter(|p| p.0 == 1024).take(3).map(|p| p.1.clone()).collect();
        assert_eq!(first, [0..2, 2..4, 4..5], "kernels {kernels}");
        assert!(passes.len() < 200, "{} stretches", passes.len());
        // The same work, but for sums that go on from pass to pass.
        let flops = |plan: &Plan| plan.cost(4).flops() as f64;
        let off = flops(&divided) / flops(&whole) - 1.0;
        assert!((0.0..1e-3).contains(&off), "{off}");
    }
}

#[test]
fn a_machine_takes_stages_in_passes_where_that_takes_less_time() {
    let tape = paper_tape(10, Recipe::Joint, false);
    let options = PlanOptions { kernels: true, half: true, ..PlanOptions::default() };
    let card = machine(Operands::F16);
    // Where memory is slow, launches are dear and the cache is large, it decides by what outweighs.
    let slow = Machine { memory_rate: 0.6e12, cache_bytes: 72_000_000, ..card };
    let divided = slow.fit(&tape, &options).unwrap();
    assert!(!divided.stages.is_whole());
    let whole = PlanOptions { group: Some(divided.largest_group()), ..options };
    let whole = Plan::build(&tape, &whole).unwrap();
    let traffic = |plan: &Plan| plan.traffic(4, slow.cache_bytes).iter().map(|t| t.bytes()).sum::<u64>();
    assert!(slow.seconds(&divided) < slow.seconds(&whole));
    assert!(traffic(&divided) < traffic(&whole));
    assert!(divided.arena_bytes(4) <= slow.arena_bytes);
    for other in [Machine { launch: 1e-3, ..slow }, Machine { cache_bytes: 1 << 20, ..slow }] {
        assert!(other.fit(&tape, &options).unwrap().stages.is_whole(), "{other:?}");
    }
    assert_eq!((divided.stages.to_string(), divided.largest_group()), ("1,3".into(), 5), "docs/performance.md says so");
}
