//! A timed run computes what a run computes, and every launch of a plan has its time.

mod common;

use common::{load_step_on, small_model, step_spec};
use mlnt::device::Device;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::embedded::has_simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::mlnt::{Recipe, Report, StepSpec, record_step};
use mlnt::model::Arch;
use mlnt::plan::{Plan, PlanOptions};
use mlnt::train::choice::Precision;
use mlnt::train::open_device::kernel_cost;

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
