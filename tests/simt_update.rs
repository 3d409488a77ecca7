//! The update of a step's states on the SIMT host machine: its cases, tensors at any address, states in place, guards.

mod common;

use common::{deviation, load_plan_on, normals, on_two_threads, small_model, step_spec};
use mlnt::cases::{Planned, planned};
use mlnt::check::{Deviation, deviations, same_bits};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostSlice, HostVec};
use mlnt::mlnt::{Recipe, Report, StepSpec, record_step};
use mlnt::model::Arch;
use mlnt::ops::Op;
use mlnt::plan::{Fusion, Fusions, Place, Plan, PlanOptions};
use mlnt::tape::{Coef, DType, Meta, Tape, Tensor};

const KERNELS: PlanOptions = PlanOptions { fuse: true, kernels: true, ..PlanOptions::AS_RECORDED };

fn simt(seed: u64, mode: Mode) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), Operands::F32, mode)
}

/// Results of a case on a device.
fn results(device: &mut dyn Device, case: &Planned, plan: Plan, values: &[HostVec]) -> Vec<HostVec> {
    let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.iter().map(|name| device.read_output(id, name).unwrap()).collect()
}

/// The plan with its arena one element further on: no tensor in it lies where four can be loaded at a time.
fn unaligned(mut plan: Plan) -> Plan {
    for buffer in plan.buffers.iter_mut().filter(|b| b.meta.dtype == DType::Real) {
        if let Place::Arena(at) = &mut buffer.place {
            *at += 1;
        }
    }
    plan.arena_reals += 1;
    plan
}

fn faults(case: &Planned) -> Vec<String> {
    let (name, values) = (&case.case.name, case.values(1, |v| v));
    let want = results(&mut Cpu::<f64>::new(1).unwrap(), case, case.composition().unwrap(), &values);
    let plan = case.plan(false).unwrap();
    let on_simt = |seed: u64, plan: Plan| results(&mut simt(seed, Mode::Eager), case, plan, &values);
    let have = on_simt(1, plan.clone());
    let wrong = deviations(case, Operands::F32, &values, &want, &have).unwrap().into_iter().filter(Deviation::is_fault);
    let mut found: Vec<String> = wrong.map(|d| format!("{name}, {}: {:.1e} > {:.0e}", d.what, d.by, d.most)).collect();
    let mut same = |what: &str, other: &[HostVec]| {
        if !have.iter().zip(other).all(|(a, b)| same_bits(a, b)) {
            found.push(format!("{name}: depends on {what}"));
        }
    };
    same("the order of threads", &on_simt(2, plan.clone()));
    same("the alignment", &on_simt(3, unaligned(plan)));
    found
}

#[test]
fn cases_of_the_table_at_any_address() {
    let cases: Vec<Planned> = planned().into_iter().filter(|c| matches!(c.case.op, Op::Update(_))).collect();
    assert!(cases.len() > 40);
    let in_place = |case: &&Planned| {
        let plan = case.plan(false).unwrap();
        let launch = plan.launches.iter().find(|launch| launch.op == case.case.op).unwrap();
        let place = |b: &usize| plan.buffers[*b].place;
        let inputs: Vec<Place> = launch.args[0].inputs.iter().map(place).collect();
        launch.args[0].outputs.iter().all(|o| inputs.contains(&place(o)))
    };
    assert_eq!(cases.iter().filter(in_place).count(), cases.len() / 2, "half of the cases work in place");
    let failures = on_two_threads(&cases, faults);
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// In what the steps below differ.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kind {
    /// The parameters move twice, and the teacher follows at the end; else it is moved first, and read.
    sequential: bool,
    guarded: bool,
}

const KINDS: [Kind; 4] = [
    Kind { sequential: false, guarded: false },
    Kind { sequential: false, guarded: true },
    Kind { sequential: true, guarded: false },
    Kind { sequential: true, guarded: true },
];

fn metas() -> Vec<Meta> {
    let mut metas: Vec<Meta> = [1, 2, 3, 5, 31, 127, 2047, 2048, 2049, 5000].map(Meta::vector).into();
    metas.extend([Meta::weight(5, 3, 3, 3), Meta::weight(16, 8, 3, 3)]);
    metas
}

/// A step without a network: gradients and batch statistics are inputs, and of new values it is asked whether they are finite.
fn step(kind: Kind) -> Tape {
    let mut tape = Tape::new(1);
    tape.set_phase("update");
    let [lr, mu, decay, eta, gamma, rest, unscale, apply] =
        ["lr", "mu", "decay", "eta", "gamma", "rest", "unscale", "apply"].map(|name| tape.scalar(name));
    let tensors = |tape: &mut Tape, name: &str, state: bool| -> Vec<Tensor> {
        let named = metas().into_iter().enumerate().map(|(i, meta)| (format!("{name}{i}"), meta));
        named
            .map(|(name, meta)| if state { tape.state(&name, meta) } else { tape.input(&name, meta) }.unwrap())
            .collect()
    };
    let [v, p, t, r] = ["v", "p", "t", "r"].map(|name| tensors(&mut tape, name, true));
    let [g, h, b] = ["g", "h", "b"].map(|name| tensors(&mut tape, name, false));
    let all = 0..metas().len();
    let teacher = |tape: &mut Tape, i: usize, p: Tensor| {
        let new = tape.lin_comb(&[(gamma, t[i]), (rest, p)]).unwrap();
        tape.assign(t[i], new).unwrap();
        new
    };
    let mut gradients = Vec::new();
    let mut push = |tape: &mut Tape, i: usize| {
        // A gradient that is a sum, and one that is none.
        let push = if i.is_multiple_of(2) { g[i] } else { tape.add(g[i], b[i]).unwrap() };
        gradients.push(push);
        tape.lin_comb(&[(Coef::ONE, p[i]), (eta.times(-1.0), push)]).unwrap()
    };
    let mut early = |i: usize| if kind.sequential { push(&mut tape, i) } else { teacher(&mut tape, i, p[i]) };
    let moved: Vec<Tensor> = all.clone().map(&mut early).collect();
    // In the place of a forward.
    let read = tape.all_finite(&moved).unwrap();
    tape.output("read", read);
    for i in all {
        let from = if kind.sequential { moved[i] } else { p[i] };
        let gradient = tape.add(g[i], h[i]).unwrap();
        let velocity = tape.lin_comb(&[(mu, v[i]), (unscale, gradient), (decay, from)]).unwrap();
        let moved = tape.lin_comb(&[(Coef::ONE, from), (lr.times(-1.0), velocity)]).unwrap();
        // Variances of batches of different sizes: other coefficients.
        let batch = Coef::constant(0.1 + 0.01 * (i % 3) as f64);
        let running = tape.lin_comb(&[(Coef::constant(0.9), r[i]), (batch, b[i])]).unwrap();
        [(v[i], velocity), (p[i], moved), (r[i], running)]
            .into_iter()
            .for_each(|(s, new)| tape.assign(s, new).unwrap());
        if kind.sequential {
            teacher(&mut tape, i, moved);
        }
        gradients.push(gradient);
    }
    if kind.guarded {
        let finite = tape.all_finite(&gradients).unwrap();
        tape.output("finite", finite);
        let guard = tape.lin_comb(&[(apply, finite)]).unwrap();
        tape.guard_assigns(guard).unwrap();
    }
    tape
}

fn plan(kind: Kind, options: PlanOptions) -> Plan {
    Plan::build(&step(kind), &options).unwrap()
}

/// A loaded step with its states and inputs filled.
struct Loaded<'a> {
    device: &'a mut dyn Device,
    id: mlnt::device::PlanId,
    names: Vec<String>,
    outputs: Vec<String>,
}

impl<'a> Loaded<'a> {
    fn new(device: &'a mut dyn Device, plan: Plan) -> Self {
        let (names, outputs) = (plan.scalars.clone(), plan.outputs.iter().map(|o| o.name.clone()).collect());
        let inputs = plan.inputs.clone();
        let id = device.load(plan).unwrap();
        let values = |meta: &Meta, seed: usize| -> Vec<f64> {
            normals(meta.total(1), seed as u64).iter().map(|x| f64::from(*x as f32)).collect()
        };
        for (i, (name, meta)) in device.states().into_iter().enumerate() {
            device.write_state(&name, HostSlice::F64(&values(&meta, i))).unwrap();
        }
        for (i, input) in inputs.iter().enumerate() {
            device.write_input(id, &input.name, HostSlice::F64(&values(&input.meta, 1000 + i))).unwrap();
        }
        Loaded { device, id, names, outputs }
    }

    fn run(&mut self, apply: f64) {
        let value = |name: &String| match name.as_str() {
            "lr" => 0.25,
            "mu" => 0.9,
            "decay" => 1e-3,
            "eta" => 0.3,
            "gamma" => 0.99,
            "rest" => 0.01,
            "unscale" => 0.125,
            "apply" => apply,
            other => panic!("{other}"),
        };
        let scalars: Vec<f64> = self.names.iter().map(value).collect();
        self.device.run(self.id, &scalars).unwrap();
    }

    fn states(&self) -> Vec<(String, HostVec)> {
        let names = self.device.states().into_iter().map(|s| s.0);
        names.map(|name| (name.clone(), self.device.read_state(&name).unwrap())).collect()
    }

    fn read(&self, name: &str) -> HostVec {
        self.device.read_output(self.id, name).unwrap()
    }

    /// States and outputs after three steps.
    fn after(mut self) -> Vec<(String, HostVec)> {
        (0..3).for_each(|_| self.run(1.0));
        let outputs = self.outputs.iter().map(|name| (name.clone(), self.read(name)));
        self.states().into_iter().chain(outputs).collect()
    }
}

fn bits_differ(a: &[(String, HostVec)], b: &[(String, HostVec)]) -> Option<String> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).find(|(a, b)| a.0 != b.0 || !same_bits(&a.1, &b.1)).map(|(a, _)| a.0.clone())
}

#[test]
fn all_states_are_written_by_one_launch() {
    for kind in KINDS {
        let plan = plan(kind, KERNELS);
        let writes = |launch: &mlnt::plan::Launch| {
            let outputs = launch.args.iter().flat_map(|args| &args.outputs);
            outputs.filter(|b| matches!(plan.buffers[**b].place, Place::State(_))).count()
        };
        let counts: Vec<usize> = plan.launches.iter().map(writes).collect();
        let names: Vec<&str> = plan.launches.iter().map(|l| mlnt::ops::Operation::name(&l.op)).collect();
        // A teacher that is read before the end is in its place already where nothing keeps it from there.
        let early = usize::from(kind == KINDS[0]) * metas().len();
        assert_eq!(counts.iter().sum::<usize>(), 4 * metas().len(), "{kind:?}: {names:?}");
        assert_eq!(counts.last(), Some(&(4 * metas().len() - early)), "{kind:?}: {names:?}");
        assert_eq!(
            counts.iter().filter(|count| **count > 0).count(),
            1 + usize::from(early > 0),
            "{kind:?}: {names:?}"
        );
        assert_eq!(names.last(), Some(&"update"), "{kind:?}");
        if kind.guarded {
            assert_eq!(names[names.len() - 2], "all_finite", "{kind:?}: {names:?}");
        }
        // Parameters that move within the step do so in one launch, with the sums by which they move.
        let updates = names.iter().filter(|name| **name == "update").count();
        assert_eq!(updates, 1 + usize::from(kind.sequential), "{kind:?}: {names:?}");
    }
}

#[test]
fn states_are_those_of_the_linear_combinations_to_the_bit() {
    for kind in KINDS {
        let without = PlanOptions { fusions: Fusions::ALL.without(Fusion::Update), ..KERNELS };
        let on_simt = |seed, mode, options| Loaded::new(&mut simt(seed, mode), plan(kind, options)).after();
        let have = on_simt(1, Mode::Eager, KERNELS);
        assert_eq!(bits_differ(&have, &on_simt(2, Mode::Graph, KERNELS)), None, "{kind:?}: replayed, other threads");
        assert_eq!(bits_differ(&have, &on_simt(1, Mode::Eager, without)), None, "{kind:?}: one by one");
        let want = Loaded::new(&mut Cpu::<f64>::new(1).unwrap(), plan(kind, PlanOptions::AS_RECORDED)).after();
        for ((name, have), (_, want)) in have.iter().zip(&want) {
            let off = deviation(&have.to_f64(), &want.to_f64());
            // Single elements are among them, some of them small differences of larger terms.
            assert!(off <= 1e-5, "{kind:?}, {name}: off by {off:.1e}");
        }
    }
}

/// Whole steps of a network: the update changes no bit of a run.
#[test]
fn steps_of_a_network_are_the_same_to_the_bit() {
    for recipe in [Recipe::Joint, Recipe::Sequential] {
        for (scaled, first_order, group) in [(false, false, None), (true, false, None), (true, true, Some(2))] {
            let spec = StepSpec { scaled, ..step_spec(small_model(Arch::PreactResnet), 4, 3, recipe, first_order) };
            let run = |fusions: Fusions| {
                let options = PlanOptions { fusions, group, ..KERNELS };
                let plan = Plan::build(&record_step(&spec, Report::Losses).unwrap(), &options).unwrap();
                let launches = plan.launches.len();
                let mut step = load_plan_on(simt(1, Mode::Eager), &spec, plan);
                (0..2).for_each(|_| step.run());
                (step.states(), launches)
            };
            let ((have, few), (want, many)) = (run(Fusions::ALL), run(Fusions::ALL.without(Fusion::Update)));
            assert!(few < many, "{recipe:?}, scaled {scaled}: {few} launches, {many} without");
            assert_eq!(bits_differ(&have, &want), None, "{recipe:?}, scaled {scaled}, groups of {group:?}");
        }
    }
}

#[test]
fn a_step_that_is_not_taken_leaves_every_bit() {
    for kind in KINDS.into_iter().filter(|kind| kind.guarded) {
        for mode in [Mode::Eager, Mode::Graph] {
            let mut device = simt(5, mode);
            let mut step = Loaded::new(&mut device, plan(kind, KERNELS));
            let (first, last) = (metas()[0], metas()[metas().len() - 1]);
            let good = step.states();
            for (input, meta, at) in [("g0", first, 0), ("h11", last, last.len() - 1), ("g11", last, 5)] {
                let sound = vec![0.5; meta.len()];
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let mut values = sound.clone();
                    values[at] = bad;
                    step.device.write_input(step.id, input, HostSlice::F64(&values)).unwrap();
                    step.run(1.0);
                    assert_eq!(step.read("finite").to_f64(), [0.0], "{kind:?}: {bad} in {input}");
                    assert_eq!(bits_differ(&good, &step.states()), None, "{kind:?}: {bad} in {input}");
                }
                step.device.write_input(step.id, input, HostSlice::F64(&sound)).unwrap();
            }
            step.run(0.0);
            assert_eq!(step.read("finite").to_f64(), [1.0], "{kind:?}");
            assert_eq!(bits_differ(&good, &step.states()), None, "{kind:?}: only tried");
            step.run(1.0);
            let taken = step.states();
            let moved = taken.iter().zip(&good).filter(|(a, b)| !same_bits(&a.1, &b.1)).count();
            assert_eq!(moved, good.len(), "{kind:?}: a sound step after one that is not taken");
        }
    }
}
