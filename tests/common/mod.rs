//! What the tests and benchmarks of the engine share: running a tape, comparing vectors, small steps.
#![allow(dead_code)]

use mlnt::device::cpu::{Cpu, Real};
use mlnt::device::{Device, HostVec, PlanId};
use mlnt::mlnt::{KlScale, Recipe, Report, Scales, StepScalars, StepSpec, Synthetic, record_step};
use mlnt::model::{Arch, ModelSpec};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::rng::{Purpose, below, normal, stream};
use mlnt::tape::Tape;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A tape's plan on a CPU device of its own.
pub struct Runner<T> {
    pub device: Cpu<T>,
    id: PlanId,
    outputs: Vec<String>,
}

impl<T: Real + Default> Runner<T> {
    pub fn new(tape: &Tape, options: PlanOptions) -> Self {
        Runner::of(Plan::build(tape, &options).unwrap())
    }

    pub fn of(plan: Plan) -> Self {
        let outputs = plan.outputs.iter().map(|p| p.name.clone()).collect();
        let mut device = Cpu::new(2).unwrap();
        let id = device.load(plan).unwrap();
        Runner { device, id, outputs }
    }

    pub fn unfused(tape: &Tape) -> Self {
        Runner::new(tape, PlanOptions { fuse: false, ..PlanOptions::default() })
    }

    /// Writes the inputs in the order of the tape, runs, and returns the outputs in the order of the tape.
    pub fn run(&mut self, tape: &Tape, values: &[HostVec]) -> Vec<Vec<f64>> {
        assert_eq!(tape.inputs().len(), values.len());
        for (input, values) in tape.inputs().iter().zip(values) {
            self.device.write_input(self.id, &input.name, values.as_slice()).unwrap();
        }
        self.device.run(self.id, &[]).unwrap();
        let read = |name: &String| self.device.read_output(self.id, name).unwrap().to_f64();
        self.outputs.iter().map(read).collect()
    }
}

/// `‖a − b‖ / ‖b‖`, or `‖a‖` where b is zero; infinite where a number is none.
pub fn deviation(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let (difference, size) = (norm(&mut a.iter().zip(b).map(|(a, b)| a - b)), norm(&mut b.iter().copied()));
    let relative = if size == 0.0 { difference } else { difference / size };
    if relative.is_nan() { f64::INFINITY } else { relative }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn normals(n: usize, seed: u64) -> Vec<f64> {
    let mut rng = stream(seed, Purpose::Test, 99, n as u64);
    (0..n).map(|_| normal(&mut rng)).collect()
}

/// `x + t·v`.
pub fn moved(x: &[f64], t: f64, v: &[f64]) -> Vec<f64> {
    x.iter().zip(v).map(|(x, v)| x + t * v).collect()
}

/// Derivative at 0 of `f` by two central differences, extrapolated (error of fourth order in `step`).
pub fn derivative(step: f64, mut f: impl FnMut(f64) -> f64) -> f64 {
    let mut central = |h: f64| (f(h) - f(-h)) / (2.0 * h);
    (4.0 * central(step) - central(2.0 * step)) / 3.0
}

/// A network small enough for finite differences.
pub fn small_model(arch: Arch) -> ModelSpec {
    ModelSpec { arch, in_channels: 2, size: [5, 7], classes: 3, widths: vec![4, 6], blocks: vec![1, 1] }
}

pub fn step_spec(model: ModelSpec, batch: usize, branches: usize, recipe: Recipe, first_order: bool) -> StepSpec {
    StepSpec {
        model,
        batch,
        synthetic: Synthetic::Given,
        branches,
        recipe,
        kl: KlScale::BatchMean,
        alpha: 0.1,
        mentor: false,
        first_order,
        scaled: false,
    }
}

/// The numbers of a step, where a test has no reason for others.
pub const SCALARS: StepScalars = StepScalars {
    lr: 0.1,
    momentum: 0.9,
    weight_decay: 1e-3,
    eta: 0.3,
    gamma: 0.99,
    lambda: 0.5,
    scales: Scales::NONE,
};

/// Starting values of a state by its name.
pub fn start_values(name: &str, len: usize, position: u64) -> Vec<f64> {
    let small = normals(len, 1000 + position);
    match name {
        _ if name.ends_with("running_var") => small.iter().map(|x| 1.0 + 0.1 * x.abs()).collect(),
        _ if name.contains("bn") && name.ends_with("weight") => small.iter().map(|x| 1.0 + 0.1 * x).collect(),
        _ if name.contains("momentum") => small.iter().map(|x| 0.01 * x).collect(),
        _ => small.iter().map(|x| 0.2 * x).collect(),
    }
}

/// A step loaded on a device with its states and inputs filled.
pub struct LoadedStep<D> {
    pub device: D,
    pub id: PlanId,
    pub scalars: Vec<f64>,
    pub launches: usize,
}

/// A step on a CPU device of its own.
pub fn load_step<T: Real + Default>(spec: &StepSpec, report: Report, fuse: bool, threads: usize) -> LoadedStep<Cpu<T>> {
    load_step_on(Cpu::new(threads).unwrap(), spec, report, fuse)
}

pub fn load_step_on<D: Device>(device: D, spec: &StepSpec, report: Report, fuse: bool) -> LoadedStep<D> {
    load_planned(device, spec, report, &PlanOptions { fuse, ..PlanOptions::default() })
}

pub fn load_planned<D: Device>(device: D, spec: &StepSpec, report: Report, options: &PlanOptions) -> LoadedStep<D> {
    load_plan_on(device, spec, Plan::build(&record_step(spec, report).unwrap(), options).unwrap())
}

/// Loads a plan of the step.
pub fn load_plan_on<D: Device>(mut device: D, spec: &StepSpec, plan: Plan) -> LoadedStep<D> {
    let scalars = SCALARS.in_order(&plan.scalars).collect();
    let (inputs, launches) = (plan.inputs.clone(), plan.launches.len());
    let id = device.load(plan).unwrap();
    for (i, (name, meta)) in device.states().into_iter().enumerate() {
        // Student and teacher start apart, or there would be nothing to agree on.
        let values = start_values(&name, meta.total(spec.branches), i as u64);
        device.write_state(&name, HostVec::F64(values).as_slice()).unwrap();
    }
    let mut rng = stream(7, Purpose::Test, 5, 5);
    for port in inputs {
        let n = port.meta.total(spec.branches);
        let values = match port.name.as_str() {
            "x" => HostVec::F64(normals(n, 3)),
            "class_weight" => HostVec::F64(vec![1.0 / n as f64; n]),
            _ => HostVec::I32((0..n).map(|_| below(spec.model.classes as u64, &mut rng) as i32).collect()),
        };
        device.write_input(id, &port.name, values.as_slice()).unwrap();
    }
    LoadedStep { device, id, scalars, launches }
}

impl<D: Device> LoadedStep<D> {
    pub fn run(&mut self) {
        self.device.run(self.id, &self.scalars).unwrap();
    }

    pub fn states(&self) -> Vec<(String, HostVec)> {
        let names = self.device.states().into_iter().map(|(name, _)| name);
        names.map(|name| (name.clone(), self.device.read_state(&name).unwrap())).collect()
    }
}

/// What `check` finds wrong with each of `items`, on two threads. (Threads of another pool that wait for a device
/// would start further items on top of the one at hand.)
pub fn on_two_threads<I: Sync>(items: &[I], check: impl Fn(&I) -> Vec<String> + Sync) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let work = || {
        let rest = std::iter::from_fn(|| items.get(next.fetch_add(1, Ordering::Relaxed)));
        rest.flat_map(&check).collect::<Vec<String>>()
    };
    std::thread::scope(|s| {
        let other = s.spawn(work);
        let mut found = work();
        found.extend(other.join().unwrap());
        found
    })
}
