//! Scaled steps: powers of two change nothing, and an overflow is no step at all.

mod common;

use common::{SCALARS, small_model, start_values, step_spec};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostSlice, HostVec, PlanId};
use mlnt::mlnt::{
    CeSpec, Recipe, Report, Scales, StepScalars, StepSpec, record_ce_step, record_filtered_ce_step, record_step,
};
use mlnt::model::Arch;
use mlnt::plan::Plan;
use mlnt::rng::{Purpose, below, stream};
use mlnt::tape::{Kind, Tape};

const K: usize = 4;
const M: usize = 2;
const SCALES: Scales = Scales { inner: 4096.0, outer: 512.0, second: 65536.0, apply: true };

fn scalars(scales: Scales) -> StepScalars {
    StepScalars { scales, ..SCALARS }
}

/// A step on a device, its states and inputs filled.
struct Step<'a> {
    device: &'a mut dyn Device,
    id: PlanId,
    names: Vec<String>,
}

impl<'a> Step<'a> {
    fn new(device: &'a mut dyn Device, tape: &Tape) -> Self {
        let plan = Plan::build(tape, &device.plan_options()).unwrap();
        let names = plan.scalars.clone();
        let id = device.load(plan).unwrap();
        for (i, (name, meta)) in device.states().into_iter().enumerate() {
            let values = start_values(&name, meta.len(), i as u64);
            device.write_state(&name, HostSlice::F64(&values)).unwrap();
        }
        let mut rng = stream(1, Purpose::Test, 5, 0);
        for (i, input) in tape.inputs().iter().enumerate() {
            let meta = tape.meta(input.tensor);
            let n = meta.total(M);
            let labels: Vec<i32> = (0..n).map(|_| below(3, &mut rng) as i32).collect();
            let values = match (input.name.as_str(), meta.kind) {
                ("y" | "y_syn", _) => HostVec::I32(labels),
                ("class_weight", _) => HostVec::F64(vec![1.0 / K as f64; n]),
                (_, Kind::Activation) => HostVec::F64(common::normals(n, 50 + i as u64)),
                other => panic!("{other:?}"),
            };
            device.write_input(id, &input.name, values.as_slice()).unwrap();
        }
        Step { device, id, names }
    }

    fn run(&mut self, scales: Scales) {
        let values: Vec<f64> = scalars(scales).in_order(&self.names).collect();
        self.device.run(self.id, &values).unwrap();
    }

    fn read(&self, name: &str) -> Vec<f64> {
        self.device.read_output(self.id, name).unwrap().to_f64()
    }

    fn states(&self) -> Vec<(String, HostVec)> {
        let read = |(name, _): (String, _)| (name.clone(), self.device.read_state(&name).unwrap());
        self.device.states().into_iter().map(read).collect()
    }
}

fn specs() -> impl Iterator<Item = StepSpec> {
    let kinds = [Arch::PreactResnet, Arch::ResnetBottleneck];
    kinds.into_iter().flat_map(|arch| {
        [Recipe::Joint, Recipe::Sequential].into_iter().flat_map(move |recipe| {
            [false, true].map(|first_order| step_spec(small_model(arch), K, M, recipe, first_order))
        })
    })
}

/// Steps with `scaled` of every kind that trains.
fn tapes(scaled: bool) -> Vec<(String, Tape)> {
    let mut list: Vec<(String, Tape)> = specs()
        .map(|spec| {
            let spec = StepSpec { scaled, ..spec };
            let name = format!("{:?} {:?} first order: {}", spec.model.arch, spec.recipe, spec.first_order);
            (name, record_step(&spec, Report::Everything).unwrap())
        })
        .collect();
    let model = small_model(Arch::PreactResnet);
    let ce = CeSpec { model: model.clone(), batch: K, momentum: 0.9, weight_decay: 1e-3, scaled };
    list.push(("cross entropy".into(), record_ce_step(&ce, "").unwrap()));
    list.push(("filtered cross entropy".into(), record_filtered_ce_step(&model, K, scaled).unwrap()));
    list
}

#[test]
fn powers_of_two_change_nothing() {
    for ((name, plain), (_, scaled)) in tapes(false).iter().zip(&tapes(true)) {
        let (mut a, mut b) = (Cpu::<f64>::new(1).unwrap(), Cpu::<f64>::new(1).unwrap());
        let (mut plain_step, mut scaled_step) = (Step::new(&mut a, plain), Step::new(&mut b, scaled));
        let before = plain_step.states();
        plain_step.run(Scales::NONE);
        scaled_step.run(SCALES);
        assert_eq!(scaled_step.read("finite"), [1.0], "{name}");
        // Where a coefficient is split differently, the last bit of a rounding may differ.
        for output in plain.outputs().iter().filter(|o| !o.name.starts_with("relu.")) {
            let (want, have) = (plain_step.read(&output.name), scaled_step.read(&output.name));
            assert!(common::deviation(&have, &want) < 1e-14, "{name}: {}", output.name);
        }
        let (want, have) = (plain_step.states(), scaled_step.states());
        assert!(want != before, "{name}: the step moved nothing");
        for ((state, want), (_, have)) in want.iter().zip(&have) {
            assert!(common::deviation(&have.to_f64(), &want.to_f64()) < 1e-14, "{name}: {state}");
        }
    }
}

/// An overflow, and a step that is only tried, on any device.
fn an_overflow_is_no_step(mut device: impl FnMut() -> Box<dyn Device>) {
    for (name, tape) in tapes(true) {
        let mut device = device();
        let mut step = Step::new(&mut *device, &tape);
        let before = step.states();
        // Beyond f32 already as a seed.
        let huge = 2f64.powi(140);
        let mut overflows = vec![Scales { inner: huge, ..SCALES }];
        if tape.outputs().iter().any(|o| o.name == "consistency") {
            overflows.push(Scales { outer: huge, ..SCALES });
        }
        for scales in overflows {
            step.run(scales);
            assert_eq!(step.read("finite"), [0.0], "{name}: {scales:?}");
            assert!(step.states() == before, "{name}: an overflow changed a state");
        }
        step.run(Scales { apply: false, ..SCALES });
        assert_eq!(step.read("finite"), [1.0], "{name}");
        assert!(step.states() == before, "{name}: a step that was only tried changed a state");
        step.run(SCALES);
        assert!(step.states() != before, "{name}: a sound step after an overflow must be taken");
        assert!(step.states().iter().all(|(_, v)| v.to_f64().iter().all(|x| x.is_finite())), "{name}");
    }
}

#[test]
fn an_overflow_is_no_step_on_the_cpu() {
    an_overflow_is_no_step(|| Box::new(Cpu::<f32>::new(1).unwrap()));
}

#[test]
fn an_overflow_is_no_step_in_the_kernels() {
    an_overflow_is_no_step(|| {
        Box::new(Cuda::new(Box::new(Simt::open(3).unwrap()), Operands::F32, Mode::Graph)) as Box<dyn Device>
    });
}
