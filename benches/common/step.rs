//! A training step on a device, with fresh random data for every run.

use mlnt::device::{Device, HostSlice, PlanId};
use mlnt::error::Result;
use mlnt::mlnt::{
    KlScale, Recipe, Report, Scales, StateKind, StepScalars, StepSpec, Synthetic, record_step, state_name,
};
use mlnt::model::{Arch, ModelSpec, he_init};
use mlnt::plan::Plan;
use mlnt::rng::{Purpose, below, normal, stream};
use mlnt::train::choice;
use mlnt::train::group::Group;
use mlnt::train::timed_step::TimedStep;

/// Which network a step is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// Widths 8, 16, 32, one block per stage, images 1×28×28.
    Small,
    /// PreAct ResNet-32: widths 32, 64, 128, five blocks per stage, images 3×32×32.
    Resnet32,
    /// Widths 32, 64, 128, one block per stage, images 3×32×32: the launches of ResNet-32, fewer times.
    Resnet8,
}

impl Network {
    pub fn model(self) -> ModelSpec {
        let (in_channels, side, widths, blocks) = match self {
            Network::Small => (1, 28, [8, 16, 32], 1),
            Network::Resnet32 => (3, 32, [32, 64, 128], 5),
            Network::Resnet8 => (3, 32, [32, 64, 128], 1),
        };
        let (widths, blocks) = (widths.to_vec(), vec![blocks; 3]);
        ModelSpec { arch: Arch::PreactResnet, in_channels, size: [side, side], classes: 10, widths, blocks }
    }
}

/// The step of a recipe in a precision.
pub fn spec(
    model: ModelSpec,
    [batch, branches]: [usize; 2],
    recipe: choice::Recipe,
    first_order: bool,
    precision: choice::Precision,
) -> StepSpec {
    let (recipe, kl) = match recipe {
        choice::Recipe::Paper => (Recipe::Sequential, KlScale::BatchMean),
        choice::Recipe::Released => (Recipe::Joint, KlScale::Mean),
    };
    let synthetic = Synthetic::Given;
    let scaled = precision == choice::Precision::F16;
    StepSpec { model, batch, synthetic, branches, recipe, kl, alpha: 0.2, mentor: false, first_order, scaled }
}

/// The plan of the step as `device` has it.
pub fn plan(spec: &StepSpec, device: &dyn Device) -> Plan {
    let tape = record_step(spec, Report::Losses).unwrap();
    Group::Auto.plan(&tape, &device.plan_options(), device.machine()).unwrap()
}

/// A step, loaded.
pub struct Loaded {
    spec: StepSpec,
    step: TimedStep,
    scales_found: bool,
    batches: u64,
}

impl Loaded {
    /// Loads `plan`, the plan of `spec`, and fills its states: random parameters, a teacher like the student.
    pub fn new(device: &mut dyn Device, spec: StepSpec, plan: Plan) -> Self {
        let (lr, momentum, weight_decay, scales) = (0.02, 0.9, 1e-4, Scales::NONE);
        let scalars = StepScalars { lr, momentum, weight_decay, eta: 0.4, gamma: 0.999, lambda: 1.0, scales };
        let step = TimedStep::load(device, plan, spec.first_order, scalars).unwrap();
        let id = step.plan();
        for owner in ["", "teacher."] {
            for (p, values) in spec.model.params().iter().zip(he_init(&spec.model, 1, 0)) {
                let name = state_name(owner, StateKind::Param, &p.name);
                device.write_state(&name, HostSlice::F32(&values)).unwrap();
            }
        }
        let weights = vec![1.0 / spec.batch as f32; spec.batch];
        device.write_input(id, "class_weight", HostSlice::F32(&weights)).unwrap();
        Loaded { spec, step, scales_found: false, batches: 0 }
    }

    /// Writes the next batch.
    pub fn next_batch(&mut self, device: &mut dyn Device) {
        let StepSpec { model, batch, branches, .. } = &self.spec;
        let mut rng = stream(1, Purpose::Test, self.batches, 0);
        self.batches += 1;
        let pixels = batch * model.in_channels * model.size[0] * model.size[1];
        let x: Vec<f32> = (0..pixels).map(|_| normal(&mut rng) as f32).collect();
        device.write_input(self.step.plan(), "x", HostSlice::F32(&x)).unwrap();
        for (name, count) in [("y", *batch), ("y_syn", batch * branches)] {
            let labels: Vec<i32> = (0..count).map(|_| below(model.classes as u64, &mut rng) as i32).collect();
            device.write_input(self.step.plan(), name, HostSlice::I32(&labels)).unwrap();
        }
    }

    /// One step that is taken, by `run`, on a fresh batch. What overflowed is tried again and has no time; where no scales help, the
    /// program ends.
    fn taken<T>(&mut self, device: &mut dyn Device, run: impl Fn(&mut dyn Device, PlanId, &[f64]) -> Result<T>) -> T {
        self.next_batch(device);
        if !self.scales_found {
            self.step.find_scales(device).unwrap();
            self.scales_found = true;
        }
        loop {
            match self.step.attempt(device, &run) {
                Ok(Some(found)) => return found,
                Ok(None) => {}
                Err(error) => {
                    eprintln!("error: {error}");
                    std::process::exit(1);
                }
            }
        }
    }

    /// One step on a fresh batch; its seconds, without the copy of the batch.
    pub fn run(&mut self, device: &mut dyn Device) -> f64 {
        self.taken(device, |device, id, scalars| device.run_timed(id, scalars))
    }

    /// One step, launch by launch.
    pub fn time_launches(&mut self, device: &mut dyn Device) -> Vec<(usize, f64)> {
        self.taken(device, |device, id, scalars| device.time_launches(id, scalars))
    }

    /// The launches of one run, for a profiler: no run before it, so that nothing is scaled and the step may not be taken.
    pub fn profiled(&mut self, device: &mut dyn Device) -> Vec<(usize, f64)> {
        self.next_batch(device);
        device.time_launches(self.step.plan(), &self.step.scalars()).unwrap()
    }
}
