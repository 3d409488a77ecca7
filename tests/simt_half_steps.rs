//! Whole training steps with activations of 16 bits on the SIMT host machine.

mod common;

use common::{LoadedStep, deviation, load_plan_on, on_two_threads, small_model, step_spec};
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::{Simt, Tally};
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::mlnt::golden::{Golden, Groups};
use mlnt::mlnt::{Recipe, Report, StepSpec, record_step};
use mlnt::model::{Arch, ModelSpec};
use mlnt::plan::{Fusions, Plan, PlanOptions, StageGroups};
use mlnt::train::choice::Precision;
use std::path::Path;

const FILES: [&str; 4] = ["step_sequential", "step_joint", "step_mentor", "step_bottleneck"];
const HALF: PlanOptions = PlanOptions {
    fuse: true,
    kernels: false,
    fusions: Fusions::ALL,
    half: true,
    recompute: false,
    group: None,
    stages: StageGroups::WHOLE,
};

fn golden(name: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.safetensors"));
    Golden::read(&path).unwrap()
}

fn simt(operands: Operands, seed: u64) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), operands, Mode::Graph)
}

/// A machine with the kernels of warpgroups.
fn hopper(operands: Operands, seed: u64) -> (Cuda, Tally) {
    let machine = Simt::open(seed).unwrap().like(Generation::Hopper);
    let tally = machine.tally();
    (Cuda::new(Box::new(machine), operands, Mode::Graph), tally)
}

/// The same steps through the kernels of warpgroups: all convolutions but those of the images, whose channels are no eights.
#[test]
fn golden_steps_of_warpgroups() {
    let precisions = [(Operands::F16, Precision::F16), (Operands::Bf16, Precision::Bf16)];
    let cases: Vec<_> = FILES.iter().flat_map(|name| precisions.map(|precision| (*name, precision))).collect();
    let failures = on_two_threads(&cases, |(name, (operands, precision))| {
        let (golden, options) = (golden(name), PlanOptions { kernels: true, ..HALF });
        let (mut device, tally) = hopper(*operands, 1);
        let result = golden.run(&mut device, &options).unwrap();
        let judgement = golden.judge(&result).unwrap();
        let worst = judgement.replayed.iter().max_by(|a, b| a.1.rel.total_cmp(&b.1.rel)).unwrap();
        let tally = tally.lock().unwrap();
        let launches = |part: &str| -> u64 {
            tally.iter().filter(|((kernel, _), _)| kernel.contains(part)).map(|(_, count)| count).sum()
        };
        let (groups, direct, gathered) = (launches("conv2d_wgmma"), launches("conv2d_direct"), launches("conv2d_"));
        let gathered = gathered - groups - direct;
        let text = format!("{name} {}: worst {} {:.1e}", operands.name(), worst.0, worst.1.rel);
        println!("{text}; {groups} launches of warpgroups, {direct} on patches, {gathered} that gather");
        let wrong = !judgement.pass(precision.tolerance()) || judgement.replayed.len() != 13;
        let elsewhere = direct > 0 || groups < 4 * gathered;
        (wrong || elsewhere).then(|| format!("{text}: {judgement:?} {tally:?}")).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// They keep to the tolerances of activations in f32. Cotangents are scaled, as in training.
#[test]
fn golden_steps_in_16_bits() {
    let precisions = [(Operands::F16, Precision::F16), (Operands::Bf16, Precision::Bf16)];
    let cases: Vec<_> = FILES.iter().flat_map(|name| precisions.map(|precision| (*name, precision))).collect();
    let failures = on_two_threads(&cases, |(name, (operands, precision))| {
        let (golden, tolerance) = (golden(name), precision.tolerance());
        let judge = |options: &PlanOptions| {
            let result = golden.run(&mut simt(*operands, 1), options).unwrap();
            let judgement = golden.judge(&result).unwrap();
            let worst = judgement.replayed.iter().max_by(|a, b| a.1.rel.total_cmp(&b.1.rel)).unwrap();
            (format!("{} {:.1e}", worst.0, worst.1.rel), judgement)
        };
        let (halves, judgement) = judge(&HALF);
        let (fused, of_fused) = judge(&PlanOptions { kernels: true, ..HALF });
        let (full, _) = judge(&PlanOptions::default());
        let text = format!("{name} {}: {halves}, fused further {fused}, activations in f32 {full}", operands.name());
        println!("{text}");
        let wrong = [&judgement, &of_fused].iter().any(|j| !j.pass(tolerance) || j.replayed.len() != 13);
        wrong.then(|| format!("{text}: {judgement:?} {of_fused:?}")).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn neither_another_run_nor_another_order_of_threads_changes_a_bit() {
    let run = |seed| -> Groups { golden("step_sequential").run(&mut simt(Operands::F16, seed), &HALF).unwrap().groups };
    let first = run(1);
    for seed in [1, 2] {
        assert!(run(seed) == first, "seed {seed}");
    }
    let run = |seed| golden("step_sequential").run(&mut hopper(Operands::F16, seed).0, &HALF).unwrap().groups;
    let first = run(1);
    for seed in [1, 2] {
        assert!(run(seed) == first, "warpgroups, seed {seed}");
    }
}

/// The gradients of a step as they enter the optimiser, with nothing reported that would keep a batch norm's result in memory.
fn gradients(operands: Operands, options: PlanOptions, spec: &StepSpec) -> Vec<f64> {
    let plan = Plan::build(&record_step(spec, Report::Losses).unwrap(), &options).unwrap();
    let mut step = load_plan_on(simt(operands, 1), spec, plan);
    let velocity = |step: &LoadedStep<Cuda>| -> Vec<f64> {
        let states = step.states().into_iter().filter(|(name, _)| name.contains("momentum"));
        states.flat_map(|(_, values)| values.to_f64()).collect()
    };
    let before = velocity(&step);
    step.run();
    velocity(&step).iter().zip(before).map(|(after, before)| after - 0.9 * before).collect()
}

/// Nothing is replayed here: rounded activations put some ReLUs on their other side, which the gradients of a small step show. (In a
/// small bottleneck network they change the maxima of windows too, and its gradients altogether: its golden step is above.)
#[test]
fn steps_that_report_nothing_stay_near_those_in_f32() {
    let recipes = [Recipe::Sequential, Recipe::Joint];
    let cases = recipes.map(|recipe| [(recipe, Operands::F16, 2e-2), (recipe, Operands::Bf16, 1e-1)]).concat();
    let failures = on_two_threads(&cases, |(recipe, operands, tolerance)| {
        let model = ModelSpec { size: [16, 14], ..small_model(Arch::PreactResnet) };
        let spec = step_spec(model, 6, 2, *recipe, false);
        let plain = PlanOptions { fuse: false, ..PlanOptions::default() };
        let want = gradients(Operands::F32, plain, &spec);
        let off = |options| deviation(&gradients(*operands, options, &spec), &want);
        let (alone, halves, fused) = (off(plain), off(HALF), off(PlanOptions { kernels: true, ..HALF }));
        let text = format!(
            "{recipe:?} {}: {halves:.1e}, fused further {fused:.1e}, activations in f32 {alone:.1e}",
            operands.name()
        );
        println!("{text}");
        let wrong = [halves, fused].iter().any(|off| off > tolerance);
        wrong.then_some(text).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
