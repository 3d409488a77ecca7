//! Steps of a batch of which nothing is kept, and of cross entropy with a teacher, in double precision.

mod common;

use common::{SCALARS, load_step, small_model, start_values, step_spec};
use mlnt::device::cpu::Cpu;
use mlnt::device::{Device, HostSlice, HostVec};
use mlnt::mlnt::{
    CeSpec, Recipe, Report, StateKind, StepScalars, record_ce_step, record_filtered_ce_step, record_step, state_name,
};
use mlnt::model::Arch;
use mlnt::plan::{Plan, PlanOptions};
use std::collections::BTreeMap;

type States = BTreeMap<String, Vec<f64>>;

const K: usize = 4;

fn states(device: &Cpu<f64>) -> States {
    let names = device.states().into_iter().map(|(name, _)| name);
    names.map(|name| (name.clone(), device.read_state(&name).unwrap().to_f64())).collect()
}

/// Whether `have` is `want` but for rounding.
fn assert_near(name: &str, have: &[f64], want: impl Iterator<Item = f64>) {
    for (have, want) in have.iter().zip(want) {
        assert!((have - want).abs() <= 1e-14 * (1.0 + want.abs()), "{name}: {have}, expected {want}");
    }
}

#[test]
fn a_step_of_which_nothing_is_kept_is_the_meta_update_alone() {
    for (recipe, first_order) in
        [(Recipe::Sequential, false), (Recipe::Sequential, true), (Recipe::Joint, false), (Recipe::Joint, true)]
    {
        let model = small_model(Arch::PreactResnet);
        let spec = step_spec(model.clone(), K, 3, recipe, first_order);
        let mut step = load_step::<f64>(&spec, Report::Everything, true, 1);
        let names = Plan::build(&record_step(&spec, Report::Everything).unwrap(), &PlanOptions::default()).unwrap();
        // The joint recipe has one SGD step for both gradients: the meta-gradient alone goes through it.
        let scalars = if recipe == Recipe::Sequential { SCALARS.without_sgd() } else { SCALARS };
        step.scalars = scalars.in_order(&names.scalars).collect();
        step.device.write_input(step.id, "class_weight", HostSlice::F64(&[0.0; K])).unwrap();
        let before = states(&step.device);
        step.run();
        let after = states(&step.device);
        let mut moved = 0.0f64;
        for param in model.params() {
            let name = |owner, kind| state_name(owner, kind, &param.name);
            let (param_name, velocity_name) = (name("", StateKind::Param), name("", StateKind::Momentum));
            let group = if first_order { "meta_grad_first_order" } else { "meta_grad" };
            let meta = step.device.read_output(step.id, &format!("{group}.{}", param.name)).unwrap().to_f64();
            let (theta, velocity) = (&before[&param_name], &before[&velocity_name]);
            moved = meta.iter().fold(moved, |m, g| m.max(g.abs()));
            if recipe == Recipe::Sequential {
                let want = theta.iter().zip(&meta).map(|(t, g)| t - SCALARS.eta * g);
                assert_near(&param_name, &after[&param_name], want);
                assert_eq!(after[&velocity_name], *velocity, "{velocity_name}");
            } else {
                let new: Vec<f64> = (velocity.iter().zip(&meta).zip(theta))
                    .map(|((v, g), t)| SCALARS.momentum * v + SCALARS.eta * g + SCALARS.weight_decay * t)
                    .collect();
                assert_near(&velocity_name, &after[&velocity_name], new.iter().copied());
                let want = theta.iter().zip(&new).map(|(t, v)| t - SCALARS.lr * v);
                assert_near(&param_name, &after[&param_name], want);
            }
        }
        assert!(moved > 1e-4, "{recipe:?}: the meta-gradient is not zero");
    }
}

/// A cross-entropy plan on a device of its own with the states and the batch of this test, run once.
fn run_ce(plan: Plan, weights: &[f64], scalars: StepScalars, owner: &str) -> (States, States) {
    let model = small_model(Arch::PreactResnet);
    let values: Vec<f64> = scalars.in_order(&plan.scalars).collect();
    let weighted = plan.inputs.iter().any(|port| port.name == "class_weight");
    let mut device = Cpu::<f64>::new(1).unwrap();
    let id = device.load(plan).unwrap();
    for (name, meta) in device.states() {
        let name_within = name.strip_prefix(owner).unwrap_or(&name);
        let position = name_within.bytes().map(u64::from).sum();
        let values = start_values(name_within, meta.total(1), position);
        device.write_state(&name, HostVec::F64(values).as_slice()).unwrap();
    }
    let x = common::normals(K * model.in_channels * model.size[0] * model.size[1], 3);
    device.write_input(id, "x", HostSlice::F64(&x)).unwrap();
    device.write_input(id, "y", HostSlice::I32(&[0, 2, 1, 2])).unwrap();
    if weighted {
        device.write_input(id, "class_weight", HostSlice::F64(weights)).unwrap();
    }
    let before = states(&device);
    device.run(id, &values).unwrap();
    (before, states(&device))
}

#[test]
fn cross_entropy_with_a_teacher_is_plain_cross_entropy_and_an_average() {
    let model = small_model(Arch::PreactResnet);
    let plan = || Plan::build(&record_filtered_ce_step(&model, K, false).unwrap(), &PlanOptions::default()).unwrap();
    let spec = CeSpec {
        model: model.clone(),
        batch: K,
        momentum: SCALARS.momentum,
        weight_decay: SCALARS.weight_decay,
        scaled: false,
    };
    let plain = Plan::build(&record_ce_step(&spec, "other.").unwrap(), &PlanOptions::default()).unwrap();
    let (_, plain) = run_ce(plain, &[], SCALARS, "other.");
    let (before, after) = run_ce(plan(), &[0.25; K], SCALARS, "");
    for (name, want) in &plain {
        let name = name.strip_prefix("other.").unwrap();
        assert_near(name, &after[name], want.iter().copied());
        assert_ne!(before[name], after[name], "{name}");
    }
    for param in model.params() {
        let (student, teacher) = (format!("param.{}", param.name), format!("teacher.param.{}", param.name));
        let pairs = before[&teacher].iter().zip(&after[&student]);
        assert_near(&teacher, &after[&teacher], pairs.map(|(t, s)| 0.99 * t + (1.0 - 0.99) * s));
    }
    assert!(model.buffers().iter().all(|(name, _)| {
        let name = format!("teacher.buffer.{name}");
        before[&name] != after[&name]
    }));

    // Nothing kept: parameters and velocity stay as they are, to the bit.
    let (before, after) = run_ce(plan(), &[0.0; K], SCALARS.without_sgd(), "");
    for (name, values) in before.iter().filter(|(name, _)| name.starts_with("param.") || name.starts_with("momentum."))
    {
        assert_eq!(after[name], *values, "{name}");
    }
}
