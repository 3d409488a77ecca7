//! Whole training steps on the SIMT host machine: golden steps in every precision, and what must not change a bit.

mod common;

use common::{LoadedStep, load_step_on, on_two_threads, small_model, start_values, step_spec};
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::mlnt::golden::{Golden, Groups};
use mlnt::mlnt::{Recipe, Report, Scales, StepScalars};
use mlnt::model::Arch;
use mlnt::plan::{Plan, PlanOptions};
use mlnt::train::choice::Precision;
use std::path::Path;

const FILES: [&str; 4] = ["step_sequential", "step_joint", "step_mentor", "step_bottleneck"];
const PRECISIONS: [(Operands, Precision); 4] = [
    (Operands::F32, Precision::F32),
    (Operands::Tf32, Precision::Tf32),
    (Operands::F16, Precision::F16),
    (Operands::Bf16, Precision::Bf16),
];

fn golden(name: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.safetensors"));
    Golden::read(&path).unwrap()
}

fn simt(operands: Operands, seed: u64, mode: Mode) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), operands, mode)
}

#[test]
fn golden_steps_pass_in_every_precision() {
    let cases: Vec<_> = FILES.iter().flat_map(|name| PRECISIONS.map(|precision| (*name, precision))).collect();
    let failures = on_two_threads(&cases, |(name, (operands, precision))| {
        let (golden, tolerance) = (golden(name), precision.tolerance());
        let result = golden.run(&mut simt(*operands, 1, Mode::Graph), &PlanOptions::default()).unwrap();
        let judgement = golden.judge(&result).unwrap();
        let worst = judgement.replayed.iter().max_by(|a, b| a.1.rel.total_cmp(&b.1.rel)).unwrap();
        let text = format!("{name} {precision}: worst {} {:.1e} of {tolerance:.0e}", worst.0, worst.1.rel);
        println!("{text}");
        let wrong = !judgement.pass(tolerance) || judgement.replayed.len() != 13;
        wrong.then(|| format!("{text}: {judgement:?}")).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The right tolerance in the wrong precision: a simulator that never rounded would pass everything above.
#[test]
fn low_precision_is_low() {
    let golden = golden("step_joint");
    for (operands, above) in [(Operands::Tf32, 1e-5), (Operands::F16, 1e-5), (Operands::Bf16, 3e-3)] {
        let result = golden.run(&mut simt(operands, 1, Mode::Graph), &PlanOptions::default()).unwrap();
        assert!(!golden.judge(&result).unwrap().pass(above), "{} is within {above:e}", operands.name());
    }
}

#[test]
fn neither_another_run_nor_another_order_of_threads_changes_a_bit() {
    let run = |operands, seed| -> Groups {
        let mut device = simt(operands, seed, Mode::Graph);
        golden("step_sequential").run(&mut device, &PlanOptions::default()).unwrap().groups
    };
    for operands in [Operands::F32, Operands::F16] {
        let first = run(operands, 1);
        for seed in [1, 2, 3] {
            assert!(run(operands, seed) == first, "{}, seed {seed}", operands.name());
        }
    }
}

/// The step of the tests below, with max-pools: they have indices.
fn step(device: Cuda, recipe: Recipe) -> LoadedStep<Cuda> {
    let spec = step_spec(small_model(Arch::ResnetBottleneck), 5, 2, recipe, false);
    load_step_on(device, &spec, Report::Losses, true)
}

/// Runs a few steps with numbers that change from step to step; every loss, and the states at the end.
fn several(step: &mut LoadedStep<Cuda>, scalars: &[String]) -> Vec<(String, HostVec)> {
    let mut seen = Vec::new();
    for i in 1..=3 {
        let at = f64::from(i);
        let numbers = StepScalars {
            lr: 0.1 / at,
            momentum: 0.9,
            weight_decay: 1e-3,
            eta: 0.1 * at,
            gamma: 1.0 - 0.1 / at,
            lambda: 0.5,
            scales: Scales::NONE,
        };
        step.scalars = numbers.in_order(scalars).collect();
        step.run();
        for name in ["class_loss", "consistency", "inner_loss"] {
            seen.push((format!("{name} of step {i}"), step.device.read_output(step.id, name).unwrap()));
        }
    }
    seen.extend(step.states());
    seen
}

fn assert_same(have: &[(String, HostVec)], want: &[(String, HostVec)], what: &str) {
    assert_eq!(have.len(), want.len());
    for ((name, have), (_, want)) in have.iter().zip(want) {
        assert!(want.to_f64().iter().all(|v| v.is_finite()), "{what}: {name}");
        assert!(have == want, "{what}: {name}");
    }
}

/// Names of a step's runtime scalars, in the order of its plan.
fn scalar_names(recipe: Recipe) -> Vec<String> {
    let spec = step_spec(small_model(Arch::ResnetBottleneck), 5, 2, recipe, false);
    let tape = mlnt::mlnt::record_step(&spec, Report::Losses).unwrap();
    Plan::build(&tape, &PlanOptions::default()).unwrap().scalars
}

#[test]
fn a_replayed_graph_equals_launches_one_by_one() {
    for recipe in [Recipe::Sequential, Recipe::Joint] {
        let names = scalar_names(recipe);
        for operands in [Operands::F32, Operands::F16] {
            let run = |mode| several(&mut step(simt(operands, 1, mode), recipe), &names);
            let (graph, eager) = (run(Mode::Graph), run(Mode::Eager));
            assert_same(&graph, &eager, &format!("{recipe:?} {}", operands.name()));
            let losses = |i: usize| graph[3 * i].1.to_f64();
            assert!(losses(0) != losses(1) && losses(1) != losses(2), "the steps move");
        }
    }
}

/// Plans share memory that moves when a larger one is loaded: recorded launches are recorded anew.
#[test]
fn a_larger_plan_leaves_the_first_as_it_was() {
    let recipe = Recipe::Joint;
    let names = scalar_names(recipe);
    let mut first = step(simt(Operands::F16, 1, Mode::Graph), recipe);
    let before = several(&mut first, &names);

    let larger = step_spec(small_model(Arch::ResnetBottleneck), 11, 2, recipe, false);
    let LoadedStep { device, id, .. } = first;
    let mut second = load_step_on(device, &larger, Report::Losses, true);
    let of_second = several(&mut second, &names);
    let alone = load_step_on(simt(Operands::F16, 1, Mode::Graph), &larger, Report::Losses, true);
    assert_same(&of_second, &several(&mut { alone }, &names), "the larger plan, beside the first and alone");

    // The first again, from the same states; its inputs are still there.
    let (second_id, LoadedStep { mut device, scalars, launches, .. }) = (second.id, second);
    for (i, (name, meta)) in device.states().into_iter().enumerate() {
        let values = start_values(&name, meta.total(2), i as u64);
        device.write_state(&name, HostVec::F64(values).as_slice()).unwrap();
    }
    let error = device.read_output(id, "class_loss").unwrap_err().to_string();
    assert!(error.contains("did not run last"), "{error}");
    let mut again = LoadedStep { device, id, scalars, launches };
    assert_same(&several(&mut again, &names), &before, "the first plan, before and after");
    let error = again.device.read_output(second_id, "class_loss").unwrap_err().to_string();
    assert!(error.contains("did not run last"), "{error}");
}
