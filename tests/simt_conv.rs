//! Convolutions on the SIMT host machine where the answer is known to the last bit, and what they refuse.

mod common;

use common::on_two_threads;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{Conv, ConvGeom, ConvKind, Op};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::rng::{Purpose, below, stream};
use mlnt::tape::{Meta, Tape};

const FORMS: [ConvKind; 3] = [ConvKind::Fprop, ConvKind::Dgrad, ConvKind::Wgrad];
const ALL_OPERANDS: [Operands; 4] = [Operands::F32, Operands::Tf32, Operands::F16, Operands::Bf16];

fn simt(operands: Operands, seed: u64) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), operands, Mode::Eager)
}

const HALVES: [Operands; 2] = [Operands::F16, Operands::Bf16];

/// The outputs through the kernels of warpgroups; fails unless they ran, and nothing else did.
fn run_groups(operands: Operands, plan: Plan, inputs: &[Vec<f64>]) -> Vec<Vec<f64>> {
    run_kernels("conv2d_wgmma_", Simt::open(3).unwrap().like(Generation::Hopper), operands, plan, inputs)
}

/// The outputs of a machine on which kernels with names that begin so ran, and nothing else did.
fn run_kernels(name: &str, machine: Simt, operands: Operands, plan: Plan, inputs: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let tally = machine.tally();
    let outputs = run(&mut Cuda::new(Box::new(machine), operands, Mode::Eager), plan, inputs);
    let kernels: Vec<_> = tally.lock().unwrap().keys().map(|(kernel, _)| *kernel).collect();
    let all = kernels.iter().all(|kernel| kernel.starts_with(name));
    assert!(all && !kernels.is_empty(), "{:?}", tally.lock().unwrap().keys());
    outputs
}

/// The outputs of `plan` for inputs in the order of the tape.
fn run(device: &mut dyn Device, plan: Plan, inputs: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let names = |ports: &[mlnt::plan::Port]| ports.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
    let (ins, outs) = (names(&plan.inputs), names(&plan.outputs));
    let id = device.load(plan).unwrap();
    for (name, values) in ins.iter().zip(inputs) {
        device.write_input(id, name, HostVec::F64(values.clone()).as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outs.iter().map(|name| device.read_output(id, name).unwrap().to_f64()).collect()
}

fn geom([n, c, h, w, k, r, s, stride, pad]: [usize; 9]) -> ConvGeom {
    ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, r, s), stride, pad).unwrap()
}

/// Shapes of a form's operands and result.
fn metas(kind: ConvKind, g: &ConvGeom) -> [Meta; 3] {
    match kind {
        ConvKind::Fprop => [g.x(), g.weight(), g.y()],
        ConvKind::Dgrad => [g.y(), g.weight(), g.x()],
        ConvKind::Wgrad => [g.x(), g.y(), g.weight()],
    }
}

/// A tape of one convolution; `start`: the meta of what it adds to.
fn one(branches: usize, conv: Conv, operands: &[Meta], sum: bool) -> Tape {
    let mut tape = Tape::new(branches);
    tape.set_phase("case");
    let inputs: Vec<_> = operands.iter().enumerate().map(|(i, m)| tape.input(&format!("in{i}"), *m).unwrap()).collect();
    let out = tape.record1(conv, &inputs, sum).unwrap();
    tape.output("out", out);
    tape
}

fn plan(tape: &Tape) -> Plan {
    Plan::build(tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap()
}

fn integers(meta: &Meta, branches: usize, seed: u64) -> Vec<f64> {
    let rng = &mut stream(seed, Purpose::Test, 17, meta.total(branches) as u64);
    (0..meta.total(branches)).map(|_| below(7, rng) as f64 - 3.0).collect()
}

/// Small integers are exact in every operand type, and so are their sums: no rounding can hide a wrong element.
#[test]
fn integers_are_convolved_exactly() {
    // [n, c, h, w, k, r, s, stride, pad]
    let sizes = [
        [2, 70, 9, 7, 67, 3, 3, 1, 1],  // several tiles of channels, the last in part
        [1, 1, 15, 11, 1, 7, 7, 2, 3],  // single channels
        [2, 9, 7, 7, 4, 3, 3, 1, 5],    // results that no pixel reaches
        [2, 4, 7, 5, 3, 1, 1, 3, 0],    // pixels that no tap reaches
        [3, 2, 4, 5, 3, 2, 3, 2, 1],    // an oblong kernel
        [2, 3, 8, 8, 4, 3, 3, 2, 0],    // a last column that no tap reaches
        [16, 3, 20, 20, 5, 3, 3, 1, 1], // a weight gradient in many splits
        [65, 33, 1, 1, 10, 1, 1, 1, 0], // a linear layer
        // Channels in eights, for kernels that work on patches.
        [2, 72, 9, 7, 64, 3, 3, 1, 1], // several tiles of channels, the last in part; cells in part
        [1, 8, 15, 11, 16, 5, 5, 2, 2], // many taps
        [3, 16, 7, 5, 40, 1, 1, 3, 0], // pixels that no tap reaches
        [2, 8, 7, 9, 8, 3, 3, 1, 5],   // results that no pixel reaches
        [3, 16, 9, 10, 8, 2, 3, 2, 1], // an oblong kernel
        [9, 32, 8, 8, 64, 3, 3, 2, 1], // several images in a patch, the last in part
        [2, 8, 40, 17, 8, 3, 3, 1, 1], // several patches in an image
        [1, 8, 3, 33, 96, 5, 4, 1, 2],
        [65, 40, 1, 1, 16, 1, 1, 1, 0],
    ];
    // Which operands are per-branch (bits), whether the result is summed, and whether there is a start: 0 none, 1
    // shared, 2 per branch.
    let mixtures =
        [(0, false, 1), (1, false, 0), (2, false, 1), (3, false, 2), (0, false, 2), (3, true, 1), (1, true, 0)];
    let mut cases = Vec::new();
    for size in sizes {
        for kind in FORMS {
            cases.extend(mixtures.map(|mixture| (geom(size), kind, mixture)));
        }
    }
    let failures = on_two_threads(&cases, |(geom, kind, (bits, sum, start))| {
        let [a, b, out] = metas(*kind, geom);
        let mut operands = vec![a.with_branching(bits & 1 == 1), b.with_branching(bits & 2 == 2)];
        operands.extend((*start > 0).then(|| out.with_branching(*start == 2)));
        let tape = one(2, Conv { kind: *kind, geom: *geom }, &operands, *sum);
        let values: Vec<_> = operands.iter().zip(1..).map(|(m, seed)| integers(m, 2, seed)).collect();
        let want = run(&mut Cpu::<f64>::new(1).unwrap(), plan(&tape), &values);
        let differs = |operands: &Operands| run(&mut simt(*operands, 3), plan(&tape), &values) != want;
        let mut wrong: Vec<_> = ALL_OPERANDS.iter().filter(|o| differs(o)).map(|o| o.name()).collect();
        if geom.c % 8 == 0 && geom.k % 8 == 0 {
            let differs = |operands: &Operands| run_groups(*operands, plan(&tape), &values) != want;
            wrong.extend(HALVES.iter().filter(|o| differs(o)).map(|_| "warpgroups"));
        }
        let name = format!("{kind:?} {geom:?} per-branch {bits:02b} summed {sum} start {start}: {wrong:?}");
        if wrong.is_empty() { Vec::new() } else { vec![name] }
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Images of one to four channels, on every generation of cards, in tiles of few taps and of many, with blocks that work on several patches,
/// on several images in a patch, and on sums over branches.
#[test]
fn images_of_few_channels_are_exact() {
    let sizes = [
        [3, 3, 15, 11, 32, 3, 3, 1, 1],  // patches in part
        [70, 3, 16, 32, 32, 3, 3, 1, 1], // several patches of a block, in several splits
        [2, 3, 30, 26, 64, 7, 7, 2, 3],
        [3, 4, 20, 20, 40, 5, 5, 1, 2],  // more columns than a tile has, or rows
        [2, 2, 9, 7, 104, 11, 11, 1, 5], // taps of two tiles
        [65, 1, 4, 4, 16, 2, 3, 3, 1],   // several images in a patch, the last in part
        [5, 1, 28, 28, 8, 5, 5, 1, 2],
        [9, 2, 7, 7, 24, 1, 1, 2, 0],  // one tap: what lies between the pixels is left out
        [1, 3, 300, 5, 8, 3, 3, 2, 4], // results that no pixel reaches
    ];
    let mixtures = [(0, false, 1), (1, false, 0), (2, false, 2), (3, false, 2), (3, true, 1), (1, true, 0)];
    let mut cases = Vec::new();
    for size in sizes {
        for kind in [ConvKind::Fprop, ConvKind::Wgrad] {
            // Of the many images not every mixture.
            let some = if size[0] == 70 { &mixtures[2..5] } else { &mixtures[..] };
            cases.extend(some.iter().map(|mixture| (geom(size), kind, *mixture)));
        }
    }
    let failures = on_two_threads(&cases, |(geom, kind, (bits, sum, start))| {
        let [a, b, out] = metas(*kind, geom);
        let mut operands = vec![a.with_branching(bits & 1 == 1), b.with_branching(bits & 2 == 2)];
        operands.extend((*start > 0).then(|| out.with_branching(*start == 2)));
        let tape = one(2, Conv { kind: *kind, geom: *geom }, &operands, *sum);
        let values: Vec<_> = operands.iter().zip(1..).map(|(m, seed)| integers(m, 2, seed)).collect();
        let want = run(&mut Cpu::<f64>::new(1).unwrap(), plan(&tape), &values);
        let machines = [(1, Generation::Portable, Operands::F16), (2, Generation::Hopper, Operands::Bf16)];
        let right = machines.into_iter().all(|(seed, generation, operands)| {
            let machine = Simt::open(seed).unwrap().like(generation);
            run_kernels("conv2d_stem_", machine, operands, plan(&tape), &values) == want
        });
        let name = format!("{kind:?} {geom:?} per-branch {bits:02b} summed {sum} start {start}");
        if right { Vec::new() } else { vec![name] }
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Blocks of warpgroups that work on several patches, with weights that stay, that change with the phase of a stride, and that do not
/// fit shared memory beside the rest.
#[test]
fn blocks_of_several_patches_are_exact() {
    let cases = [
        ([40, 8, 18, 18, 16, 3, 3, 1, 1], ConvKind::Fprop),
        ([90, 40, 18, 10, 72, 3, 3, 1, 1], ConvKind::Dgrad),
        ([140, 8, 16, 16, 8, 3, 3, 2, 1], ConvKind::Dgrad),
        ([141, 8, 16, 16, 8, 1, 1, 2, 0], ConvKind::Dgrad),
        ([180, 160, 8, 8, 192, 3, 3, 1, 1], ConvKind::Fprop),
        ([180, 160, 8, 8, 192, 3, 3, 1, 1], ConvKind::Wgrad),
    ];
    let failures = on_two_threads(&cases, |(size, kind)| {
        let geom = geom(*size);
        let [a, b, _] = metas(*kind, &geom);
        let tape = one(2, Conv { kind: *kind, geom }, &[a.with_branching(true), b], false);
        let values = [integers(&a.with_branching(true), 2, 1), integers(&b, 2, 2)];
        let want = run(&mut Cpu::<f64>::new(1).unwrap(), plan(&tape), &values);
        let differs = run_groups(Operands::F16, plan(&tape), &values) != want;
        differs.then(|| format!("{kind:?} {size:?}")).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A sum of convolutions works in place, with one split and with many.
#[test]
fn sums_of_convolutions_accumulate_in_place() {
    let geom = geom([16, 3, 20, 20, 5, 3, 3, 1, 1]);
    for kind in FORMS {
        let [a, b, out] = metas(kind, &geom);
        for branched in [false, true] {
            let mut tape = Tape::new(2);
            tape.set_phase("case");
            let mut terms = Vec::new();
            let mut values = Vec::new();
            for i in 0..2 {
                let (a, b) = (a.with_branching(branched), b);
                let ins = [("a", a), ("b", b)].map(|(name, m)| tape.input(&format!("{name}{i}"), m).unwrap());
                values.extend([integers(&a, 2, 5 + i), integers(&b, 2, 7 + i)]);
                terms.push(tape.record1(Conv { kind, geom }, &ins, false).unwrap());
            }
            let sum = tape.add(terms[0], terms[1]).unwrap();
            tape.output("out", sum);
            let want = run(&mut Cpu::<f64>::new(1).unwrap(), plan(&tape), &values);
            let fused = Plan::build(&tape, &PlanOptions::default()).unwrap();
            let place = |b: usize| fused.buffers[b].place;
            let in_place = |l: &mlnt::plan::Launch| {
                let args = &l.args[0];
                matches!(l.op, Op::Conv(_)) && args.inputs.len() == 3 && place(args.inputs[2]) == place(args.outputs[0])
            };
            assert!(fused.launches.iter().any(in_place), "{kind:?}: nothing works in place");
            for operands in ALL_OPERANDS {
                let have = run(&mut simt(operands, 1), fused.clone(), &values);
                assert!(have == want, "{kind:?} {out} per-branch {branched} {}", operands.name());
            }
        }
    }
}

/// Operands in half precision are taken as they are: what is beyond its range becomes infinite or zero, and nothing else changes.
#[test]
fn half_precision_takes_operands_as_they_are() {
    let geom = geom([3, 5, 15, 11, 7, 3, 3, 1, 1]);
    for kind in FORMS {
        let [a, b, _] = metas(kind, &geom);
        let tape = one(1, Conv { kind, geom }, &[a, b], false);
        let (va, vb) = (integers(&a, 1, 1), integers(&b, 1, 2));
        let with = |ea: i32, eb: i32| {
            let scaled = |v: &[f64], e: i32| v.iter().map(|x| x * 2f64.powi(e)).collect::<Vec<_>>();
            let out = run(&mut simt(Operands::F16, 1), plan(&tape), &[scaled(&va, ea), scaled(&vb, eb)]);
            scaled(&out[0], -ea - eb)
        };
        let plain = with(0, 0);
        // Multiples of 2^-24 up to 2^15 are numbers of half precision.
        for (ea, eb) in [(-24, 0), (0, -24), (13, 0), (0, 13), (-24, 13), (13, 13)] {
            assert!(with(ea, eb) == plain, "{kind:?}: operands times 2^{ea} and 2^{eb}");
        }
        assert!(with(-27, 0).iter().chain(&with(0, -27)).all(|v| *v == 0.0), "{kind:?}");
        assert!(with(17, 0).iter().chain(&with(0, 17)).all(|v| !v.is_finite()), "{kind:?}");
    }
}

/// Zeros stay zeros, and what is not finite stays visible just where it belongs.
#[test]
fn half_precision_of_zeros_and_infinities() {
    let geom = geom([2, 5, 9, 7, 6, 3, 3, 1, 1]);
    let conv = Conv { kind: ConvKind::Fprop, geom };
    let [x, w, y] = metas(conv.kind, &geom);
    let tape = one(1, conv, &[x, w], false);
    let weights = integers(&w, 1, 1).iter().map(|v| v + 0.5).collect::<Vec<_>>();
    let have = run(&mut simt(Operands::F16, 1), plan(&tape), &[vec![0.0; x.len()], weights.clone()]);
    assert!(have == [vec![0.0; y.len()]]);
    for odd in [f64::INFINITY, f64::NAN] {
        let mut image = integers(&x, 1, 2);
        image[100] = odd;
        let have = run(&mut simt(Operands::F16, 1), plan(&tape), &[image.clone(), weights.clone()]);
        let want = run(&mut Cpu::<f64>::new(1).unwrap(), plan(&tape), &[image, weights.clone()]);
        let same = |(a, b): (&f64, &f64)| a == b || (a.is_nan() && b.is_nan());
        assert!(have[0].iter().zip(&want[0]).all(same), "{odd}");
        assert!(want[0].iter().any(|v| !v.is_finite()) && want[0].iter().any(|v| v.is_finite()));
    }
}

/// Sizes beyond the kernels' 32-bit numbers are refused when a plan is loaded, with the operation and its shapes.
#[test]
fn sizes_beyond_32_bits_are_refused() {
    let too_large = [
        ([1, 1, 65_536, 32_768, 1, 1, 1, 1, 0], "conv2d_fprop", "32768"),
        ([1, 1, 40_000, 1, 1, 1, 1, 40_000, 0], "conv2d_fprop", "stride 40000"),
        ([1, 1, 5, 5, 1, 1, 1, 1 << 14, 1 << 29], "conv2d_fprop", "padding 536870912"),
    ];
    for (size, operation, what) in too_large {
        let geom = geom(size);
        let tape = one(1, Conv { kind: ConvKind::Fprop, geom }, &[geom.x(), geom.weight()], false);
        let error = simt(Operands::F32, 1).load(plan(&tape)).unwrap_err().to_string();
        assert!(error.contains(operation) && error.contains(what), "{error}");
    }
}
