//! Blocks of warpgroups that work on several patches, on the SIMT host machine: each patch's first halo is loaded while the products of the
//! patch before run, and what follows a product lies in what the last one read.
//!
//! Unit tests of the lowering (`src/device/cuda/lower/conv_cells.rs`) hold these sizes to what is claimed of them here.

mod common;

use common::on_two_threads;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{Conv, ConvGeom, ConvKind};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::rng::{Purpose, below, stream};
use mlnt::tape::{Meta, Tape};

/// `[n, c, h, w, k, r, s, stride, pad]`
fn geom([n, c, h, w, k, r, s, stride, pad]: [usize; 9]) -> ConvGeom {
    ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, r, s), stride, pad).unwrap()
}

/// The outputs of a plan whose inputs have these names.
fn run(device: &mut dyn Device, plan: Plan, values: &[(String, Vec<f64>)]) -> Vec<Vec<f64>> {
    let (inputs, outputs) = (plan.inputs.clone(), plan.outputs.clone());
    let id = device.load(plan).unwrap();
    for port in inputs {
        let (_, given) = values.iter().find(|(name, _)| *name == port.name).unwrap();
        device.write_input(id, &port.name, HostVec::F64(given.clone()).as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.iter().map(|port| device.read_output(id, &port.name).unwrap().to_f64()).collect()
}

/// The same through the kernels of warpgroups; fails unless they ran.
fn by_groups(seed: u64, plan: Plan, values: &[(String, Vec<f64>)]) -> Vec<Vec<f64>> {
    let machine = Simt::open(seed).unwrap().like(Generation::Hopper);
    let tally = machine.tally();
    let outputs = run(&mut Cuda::new(Box::new(machine), Operands::F16, Mode::Eager), plan, values);
    assert!(tally.lock().unwrap().keys().any(|(kernel, _)| kernel.starts_with("conv2d_wgmma_")));
    outputs
}

fn on_cpu(plan: Plan, values: &[(String, Vec<f64>)]) -> Vec<Vec<f64>> {
    run(&mut Cpu::<f64>::new(1).unwrap(), plan, values)
}

fn unfused(tape: &Tape) -> Plan {
    Plan::build(tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap()
}

/// Small integers: exact in f16, and so are their sums.
fn integers(meta: &Meta, branches: usize, seed: u64) -> Vec<f64> {
    let rng = &mut stream(seed, Purpose::Test, 19, meta.total(branches) as u64);
    (0..meta.total(branches)).map(|_| below(7, rng) as f64 - 3.0).collect()
}

/// Products whose blocks work on several patches, and the last on fewer, are right to the last bit, in any order of the threads.
#[test]
fn runs_of_patches_are_exact() {
    // [n, c, h, w, k, r, s, stride, pad], branches, and whether they are summed.
    let cases = [
        // One slice; two; three in two splits.
        (ConvKind::Fprop, [71, 8, 16, 16, 24, 3, 3, 1, 1], 4, false),
        (ConvKind::Fprop, [71, 40, 14, 16, 24, 1, 3, 1, 1], 4, false),
        (ConvKind::Fprop, [133, 72, 16, 16, 8, 1, 1, 1, 0], 2, false),
        // Three tiles of 64 columns, of which a patch is finished by halves.
        (ConvKind::Fprop, [299, 72, 7, 8, 136, 1, 1, 1, 0], 2, false),
        // The sum over the branches.
        (ConvKind::Fprop, [271, 8, 16, 16, 8, 1, 1, 1, 0], 2, true),
        // A stride's phases within a run: with weights for each iteration, with those of one slice, and in splits of one slice each.
        (ConvKind::Dgrad, [71, 16, 32, 32, 40, 3, 3, 2, 1], 2, false),
        (ConvKind::Dgrad, [71, 8, 32, 32, 8, 3, 3, 2, 1], 2, false),
        (ConvKind::Dgrad, [35, 8, 32, 32, 40, 3, 3, 2, 1], 2, false),
        (ConvKind::Dgrad, [36, 72, 32, 32, 40, 2, 2, 2, 0], 2, false),
        // Phases without taps, in the middle of a run and in all of it.
        (ConvKind::Dgrad, [71, 8, 32, 32, 72, 1, 1, 2, 0], 2, false),
        (ConvKind::Dgrad, [35, 8, 32, 32, 8, 1, 1, 3, 1], 2, false),
        (ConvKind::Dgrad, [71, 8, 32, 32, 40, 1, 3, 2, 1], 2, false),
        // The same of tiles of 64 columns.
        (ConvKind::Dgrad, [36, 72, 32, 32, 40, 1, 1, 2, 0], 2, false),
    ];
    let failures = on_two_threads(&cases, |(kind, size, branches, sum)| {
        let geom = geom(*size);
        let [a, b] = match kind {
            ConvKind::Dgrad => [geom.y(), geom.weight()],
            _ => [geom.x(), geom.weight()],
        };
        let mut tape = Tape::new(*branches);
        tape.set_phase("case");
        let metas = [("a", a.with_branching(true)), ("b", b)];
        let inputs = metas.map(|(name, meta)| tape.input(name, meta).unwrap());
        let out = tape.record1(Conv { kind: *kind, geom }, &inputs, *sum).unwrap();
        tape.output("out", out);
        let values: Vec<_> =
            metas.iter().zip(1..).map(|((name, m), seed)| (name.to_string(), integers(m, *branches, seed))).collect();
        let want = on_cpu(unfused(&tape), &values);
        let wrong = |seed: u64| by_groups(seed, unfused(&tape), &values) != want;
        (wrong(1) || wrong(2)).then(|| format!("{kind:?} {size:?}")).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
