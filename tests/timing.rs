//! A timed run computes what a run computes, and every launch of a plan has its time.

mod common;
#[path = "../benches/common/roof.rs"]
mod roof;

use common::{load_step_on, small_model, step_spec};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::embedded::has_simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostSlice};
use mlnt::mlnt::{Recipe, Report, Scales, StateKind, StepScalars, StepSpec, record_step, state_name};
use mlnt::model::{Arch, he_init};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::train::choice::{DeviceKind, Precision};
use mlnt::train::open_device::kernel_cost;
use mlnt::train::timed_step::TimedStep;
use roof::Roof;

fn spec() -> StepSpec {
    step_spec(small_model(Arch::PreactResnet), 4, 2, Recipe::Joint, false)
}

/// Runs a step three ways on fresh devices; returns the kernels of its launches.
fn kernels<D: Device>(open: impl Fn() -> D) -> Vec<usize> {
    let load = || load_step_on(open(), &spec(), Report::Losses, true);
    let (mut plain, mut timed, mut single) = (load(), load(), load());
    plain.run();
    let seconds = timed.device.run_timed(timed.id, &timed.scalars).unwrap();
    assert!(seconds > 0.0 && seconds < 600.0, "{seconds}");
    let times = single.device.time_launches(single.id, &single.scalars).unwrap();
    assert_eq!(times.len(), single.launches);
    assert!(times.iter().all(|(_, seconds)| (0.0..600.0).contains(seconds)), "{times:?}");
    assert!(times.iter().map(|(_, seconds)| seconds).sum::<f64>() > 0.0);
    assert!(plain.states() == timed.states(), "a timed run gives other states");
    assert!(plain.states() == single.states(), "timed launches give other states");
    times.into_iter().map(|(kernels, _)| kernels).collect()
}

#[test]
fn on_the_cpu() {
    assert!(kernels(|| Cpu::<f32>::new(2).unwrap()).into_iter().all(|kernels| kernels == 1));
}

#[test]
fn by_the_clock_of_a_machine_that_runs_kernels() {
    if !has_simt() {
        println!("skipped: built without the SIMT host machine");
        return;
    }
    let plan = Plan::build(&record_step(&spec(), Report::Losses).unwrap(), &PlanOptions::default()).unwrap();
    let planned = kernel_cost(&plan, Precision::F32, Generation::Portable).unwrap().launches;
    let open = || Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F32, Mode::Graph);
    assert_eq!(kernels(open).into_iter().sum::<usize>(), planned);
}

/// An f16 step on the SIMT machine, its scales found with inputs as they come, and the names of what a test may change.
fn half_step() -> (Cuda, TimedStep, usize) {
    let spec = StepSpec { scaled: true, ..spec() };
    let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F16, Mode::Graph);
    let plan = Plan::build(&record_step(&spec, Report::Losses).unwrap(), &device.plan_options()).unwrap();
    let scalars = StepScalars {
        lr: 0.02,
        momentum: 0.9,
        weight_decay: 1e-4,
        eta: 0.4,
        gamma: 0.9,
        lambda: 1.0,
        scales: Scales::NONE,
    };
    let inputs = plan.inputs.clone();
    let mut step = TimedStep::load(&mut device, plan, false, scalars).unwrap();
    for owner in ["", "teacher."] {
        for (param, values) in spec.model.params().iter().zip(he_init(&spec.model, 1, 0)) {
            let name = state_name(owner, StateKind::Param, &param.name);
            device.write_state(&name, HostSlice::F32(&values)).unwrap();
        }
    }
    for port in &inputs {
        let len = port.meta.total(spec.branches);
        let images: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let labels: Vec<i32> = (0..len).map(|i| (i % 2) as i32).collect();
        let weights = vec![1.0 / spec.batch as f32; len];
        let values = match port.name.as_str() {
            "x" => HostSlice::F32(&images),
            "class_weight" => HostSlice::F32(&weights),
            _ => HostSlice::I32(&labels),
        };
        device.write_input(step.plan(), &port.name, values).unwrap();
    }
    step.find_scales(&mut device).unwrap();
    (device, step, spec.batch)
}

#[test]
fn only_steps_that_are_taken_are_timed() {
    if !has_simt() {
        println!("skipped: built without the SIMT host machine");
        return;
    }
    let (mut device, mut step, batch) = half_step();
    let time = |device: &mut dyn Device, id, scalars: &[f64]| device.run_timed(id, scalars);
    let found = step.scales();
    assert!(found.apply && found.inner > 1.0 && found.outer > 1.0 && found.second > 1.0, "{found:?}");
    assert!(step.attempt(&mut device, time).unwrap().is_some());
    assert_eq!(step.overflows(), 0);
    // Cotangents a thousand times as large as those that the scales were found from: the first attempts are not taken and have no time.
    let heavy = vec![1000.0 / batch as f32; batch];
    device.write_input(step.plan(), "class_weight", HostSlice::F32(&heavy)).unwrap();
    let mut attempts = 1;
    while step.attempt(&mut device, time).unwrap().is_none() {
        attempts += 1;
        assert!(attempts < 40);
    }
    assert!(attempts > 1 && step.overflows() == attempts - 1, "{attempts}");
    assert!(step.scales().inner < found.inner);
    // What no scale helps is an error.
    device.write_input(step.plan(), "class_weight", HostSlice::F32(&vec![f32::INFINITY; batch])).unwrap();
    let error = loop {
        match step.attempt(&mut device, time) {
            Ok(found) => assert!(found.is_none(), "a time of a step that cannot be taken"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("its time means nothing"), "{error}");
}

#[test]
fn a_roof_is_a_ceiling_and_says_what_it_is() {
    if has_simt() {
        let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F16, Mode::Graph);
        let nowhere = std::path::Path::new("no such folder");
        let mut roof = Roof::find(nowhere, DeviceKind::Simt, "f16", &mut device);
        assert!(!roof.library && roof.flops > 0.0 && roof.bytes > 0.0 && roof.best.contains("filters 3x3"), "{roof:?}");
        assert!(roof.text().starts_with("the best that our own convolutions reach: "), "{}", roof.text());
        // A row of the run that is faster is the roof from there on; a slower one is not.
        let before = roof.flops;
        roof.raise(before / 2.0, || "slower".into());
        assert_eq!(roof.flops, before);
        roof.raise(before * 2.0, || "faster".into());
        assert_eq!((roof.flops, roof.best.as_str()), (before * 2.0, "faster"));
    }
    let folder = tempfile::tempdir().unwrap();
    let file = r#"{"card": "NVIDIA H200", "flop_per_second": {"f16": 6e14}, "bytes_per_second": 4e12}"#;
    std::fs::write(folder.path().join("nvidia-h200-roof.json"), file).unwrap();
    std::fs::write(folder.path().join("old-roof.json"), r#"{"flop_per_second": {"f16": 1.0}}"#).unwrap();
    let of = |described, precision| Roof::of_library(folder.path(), described, precision);
    let mut roof = of("cuda:0 (f16, NVIDIA H200, sm_90, 151 GB)", "f16").unwrap();
    roof.raise(7e14, || "faster".into());
    assert_eq!((roof.flops, roof.bytes, roof.library), (6e14, 4e12, true));
    assert!(roof.text().starts_with("roof of a library: ") && roof.text().contains("nvidia-h200-roof.json"));
    assert!(of("cuda:0 (f16, NVIDIA H200 NVL, sm_90, 151 GB)", "f16").is_none(), "another card");
    assert!(of("cuda:0 (tf32, NVIDIA H200, sm_90, 151 GB)", "tf32").is_none(), "not measured");
}
