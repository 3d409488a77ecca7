//! What the SIMT host machine counts of the banks of shared memory, and that the convolutions on patches meet none twice where they
//! are made not to. Their results are compared as well: with small integers they are exact.
#![allow(unsafe_code)]

mod common;

use bytemuck::{Pod, Zeroable};
use common::on_two_threads;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::driver::{Address, Driver, Launch, Stream};
use mlnt::device::cuda::embedded::{BankUse, SimtBanks, SimtKernel, SimtLaunch};
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{Conv, ConvForm, ConvGeom, ConvKind, Delta, FusedConv, LinComb, Op};
use mlnt::plan::{Args, Buffer, Place, Plan, PlanOptions, Port, StageGroups};
use mlnt::rng::{Purpose, below, stream};
use mlnt::tape::{Coef, Kind, Meta, Tape};
use std::path::Path;
use std::process::Command;

const BRANCHES: usize = 2;

/// `[n, c, h, w, k, r, s, stride, pad]`
type Size = [usize; 9];

fn geom([n, c, h, w, k, r, s, stride, pad]: Size) -> ConvGeom {
    ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, r, s), stride, pad).unwrap()
}

/// A plan of one operation. Every operand is given in 32 bits; with `half`, it works on copies of 16.
fn plan(op: Op, operands: &[Meta], results: &[Meta], half: bool) -> Plan {
    let mut plan = Plan {
        branches: BRANCHES,
        buffers: Vec::new(),
        launches: Vec::new(),
        states: Vec::new(),
        inputs: Vec::new(),
        scalars: Vec::new(),
        outputs: Vec::new(),
        stages: StageGroups::WHOLE,
        arena_reals: 0,
        arena_halves: 0,
        arena_indices: 0,
    };
    let count = |meta: &Meta| if meta.per_branch { BRANCHES } else { 1 };
    let launch = |op: Op, inputs: Vec<usize>, outputs: Vec<usize>| {
        let args = vec![Args { inputs, outputs }];
        mlnt::plan::Launch { op, args, phase: "case", branches: 0..BRANCHES }
    };
    let mut inputs = Vec::new();
    for (i, meta) in operands.iter().enumerate() {
        let given = plan.buffers.len();
        let place = Place::Input(plan.inputs.len());
        plan.buffers.push(Buffer { meta: *meta, half: false, first: 0, count: count(meta), place });
        plan.inputs.push(Port { name: format!("in{i}"), meta: *meta, buffer: Some(given) });
        // Vectors always have 32 bits.
        inputs.push(if half && meta.kind != Kind::Vector {
            let place = Place::Arena(plan.arena_halves);
            plan.arena_halves += meta.total(BRANCHES).next_multiple_of(64);
            plan.buffers.push(Buffer { meta: *meta, half: true, first: 0, count: count(meta), place });
            plan.launches.push(launch(LinComb::new(vec![Coef::ONE]).into(), vec![given], vec![given + 1]));
            given + 1
        } else {
            given
        });
    }
    let mut outputs = Vec::new();
    for (i, meta) in results.iter().enumerate() {
        outputs.push(plan.buffers.len());
        plan.outputs.push(Port { name: format!("out{i}"), meta: *meta, buffer: Some(plan.buffers.len()) });
        let place = Place::Arena(plan.arena_reals);
        plan.arena_reals += meta.total(BRANCHES).next_multiple_of(64);
        plan.buffers.push(Buffer { meta: *meta, half: false, first: 0, count: count(meta), place });
    }
    plan.launches.push(launch(op, inputs, outputs));
    plan
}

/// Small integers; vectors, among which are variances, are positive.
fn integers(meta: &Meta, seed: usize) -> Vec<f64> {
    let rng = &mut stream(seed as u64, Purpose::Test, 19, meta.total(BRANCHES) as u64);
    let least = if meta.kind == Kind::Vector { 1.0 } else { -3.0 };
    (0..meta.total(BRANCHES)).map(|_| below(7, rng) as f64 + least).collect()
}

fn run(device: &mut dyn Device, plan: Plan) -> Vec<Vec<f64>> {
    let (inputs, outputs) = (plan.inputs.clone(), plan.outputs.clone());
    let id = device.load(plan).unwrap();
    for (i, port) in inputs.iter().enumerate() {
        let values = HostVec::F64(integers(&port.meta, i));
        device.write_input(id, &port.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    outputs.iter().map(|port| device.read_output(id, &port.name).unwrap().to_f64()).collect()
}

/// What the kernel of the operation gives, and how it met in the banks: rows of matrices, stores and copies.
fn on_simt(plan: Plan, seed: u64) -> (Vec<Vec<f64>>, [BankUse; 3]) {
    let machine = Simt::open(seed).unwrap();
    let banks = machine.banks();
    let results = run(&mut Cuda::new(Box::new(machine), Operands::F16, Mode::Eager), plan);
    let banks = banks.lock().unwrap();
    let convolution = |(kernel, _): &&(&str, Box<str>)| kernel.starts_with("conv2d_");
    let key = banks.keys().find(convolution).unwrap_or_else(|| panic!("ran {:?}", banks.keys()));
    (results, banks[key])
}

/// Which convolution, of operands of 16 bits or of 32. Activations are per branch, and so are weights if they have 16 bits.
type Case = (Size, Form, bool);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    One(ConvKind),
    /// The gradients of input and weights in one launch.
    Both,
    /// The same, of operands that are made as they are loaded: x by a batch norm, dy by its backward and a residual term.
    Pairs,
}

const FPROP: Form = Form::One(ConvKind::Fprop);
const DGRAD: Form = Form::One(ConvKind::Dgrad);

/// What a case's kernel does in the banks, if it is right: the same for all orders of threads, and without pairs what the CPU finds.
fn measure(&(size, form, half): &Case) -> Result<[BankUse; 3], String> {
    let g = geom(size);
    let (x, w, y) = (g.x().with_branching(true), g.weight().with_branching(half), g.y().with_branching(true));
    let sum = g.weight().with_branching(true);
    let [c, k] = [g.c, g.k].map(Meta::vector);
    let (op, operands, results) = match form {
        Form::One(kind) => {
            let (operands, result) = match kind {
                ConvKind::Fprop => ([x, w], y),
                ConvKind::Dgrad => ([y, w], x),
                ConvKind::Wgrad => ([x, y], sum),
            };
            (Op::from(Conv { kind, geom: g }), operands.to_vec(), vec![result])
        }
        Form::Both => (Op::FusedConv(FusedConv::plain(ConvForm::Backward, g)), vec![x, w, y], vec![x, sum]),
        Form::Pairs => {
            let delta = Delta::Backward { residual: true, kept: false };
            let op = FusedConv { norm: true, delta, ..FusedConv::plain(ConvForm::Backward, g) };
            let vectors = [vec![c; 4], vec![y], vec![k; 4], vec![k.with_branching(true); 2], vec![y]].concat();
            (Op::FusedConv(op), [vec![x, w, y], vectors].concat(), vec![x, sum])
        }
    };
    let (have, banks) = on_simt(plan(op.clone(), &operands, &results, half), 1);
    let wrong = |what: &str| Err(format!("{size:?} {form:?} half {half}: {what}"));
    if on_simt(plan(op, &operands, &results, half), 2) != (have.clone(), banks) {
        return wrong("results or banks depend on the order of threads");
    }
    // The plan's operands of each form.
    let kinds = match form {
        Form::One(kind) => vec![(kind, [0, 1])],
        Form::Both => vec![(ConvKind::Dgrad, [2, 1]), (ConvKind::Wgrad, [0, 2])],
        Form::Pairs => return Ok(banks),
    };
    for ((kind, of), have) in kinds.into_iter().zip(&have) {
        let mut tape = Tape::new(BRANCHES);
        tape.set_phase("case");
        let inputs = of.map(|i| tape.input(&format!("in{i}"), operands[i]).unwrap());
        let out = tape.record1(Conv { kind, geom: g }, &inputs, false).unwrap();
        tape.output("out", out);
        let mut cpu = Cpu::<f64>::new(1).unwrap();
        let id = cpu.load(Plan::build(&tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap()).unwrap();
        for i in of {
            let values = HostVec::F64(integers(&operands[i], i));
            cpu.write_input(id, &format!("in{i}"), values.as_slice()).unwrap();
        }
        cpu.run(id, &[]).unwrap();
        if cpu.read_output(id, "out").unwrap().to_f64() != *have {
            return wrong("a wrong result");
        }
    }
    Ok(banks)
}

/// Measures all cases; `fault` says what is wrong with a case's rows of matrices, stores and copies.
fn check(cases: &[Case], fault: impl Fn(&Case, &[BankUse; 3]) -> bool + Sync) {
    let failures = on_two_threads(cases, |case| match measure(case) {
        Ok(banks) => {
            let line = format!("{case:?}: {banks:?}");
            println!("{line}");
            if fault(case, &banks) { vec![line] } else { Vec::new() }
        }
        Err(what) => vec![what],
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The convolutions of a step: every form, of 16 bits and of 32, in the shapes of the stages. Stores and copies are there as well, since
/// operands of 16 bits to which nothing is to be done are copied.
#[test]
fn a_steps_convolutions_meet_no_bank_twice() {
    let stages = [[2, 32, 32, 32, 32, 3, 3, 1, 1], [2, 64, 16, 16, 64, 3, 3, 1, 1], [3, 128, 8, 8, 128, 3, 3, 1, 1]];
    let cases: Vec<Case> = stages
        .iter()
        .flat_map(|size| [(*size, FPROP, true), (*size, FPROP, false), (*size, Form::Both, true)])
        .chain([(stages[0], Form::Both, false), (stages[0], Form::Pairs, true), (stages[1], Form::Pairs, true)])
        .collect();
    check(&cases, |(_, form, half), [matrices, stores, copies]| {
        let copied = copies.phases > 0 || !half;
        let stored = stores.phases > 0 || (*half && *form != Form::Pairs);
        let met = [matrices, stores, copies].iter().any(|part| part.conflicts > 0 || part.most > 1);
        met || matrices.phases == 0 || !copied || !stored
    });
}

/// The gradient of the first weights: dy as in other stages. What is read of the image is not counted here: unit tests of the lowering hold
/// that to its lines' distances (`src/device/cuda/lower/conv_stem.rs`).
#[test]
fn the_gradient_of_few_channels_meets_no_bank_twice() {
    let sizes = [[2, 3, 32, 32, 32, 3, 3, 1, 1], [1, 3, 64, 64, 64, 7, 7, 2, 3]];
    let cases: Vec<Case> =
        sizes.iter().flat_map(|size| [true, false].map(|half| (*size, Form::One(ConvKind::Wgrad), half))).collect();
    check(&cases, |_, [matrices, stores, copies]| {
        let met = [matrices, stores, copies].iter().any(|part| part.conflicts > 0 || part.most > 1);
        met || matrices.phases == 0 || (stores.phases == 0) == (copies.phases == 0)
    });
}

/// Pixels of a stride of 2 are every second line, which has half of the banks: each is met twice, and no more. The gradient of the
/// input has phases instead, and a single tap leaves the pixels between out.
#[test]
fn strided_convolutions_meet_a_bank_at_most_twice() {
    let wide = [[2, 32, 32, 32, 64, 3, 3, 2, 1], [2, 64, 16, 16, 128, 3, 3, 2, 1]];
    let single = [2, 32, 32, 32, 64, 1, 1, 2, 0];
    let cases: Vec<Case> = wide
        .iter()
        .flat_map(|size| [FPROP, DGRAD, Form::One(ConvKind::Wgrad)].map(|form| (*size, form, true)))
        .chain([FPROP, DGRAD, Form::One(ConvKind::Wgrad)].map(|form| (single, form, true)))
        .collect();
    check(&cases, |(size, form, _), [matrices, stores, copies]| {
        let most = if *form == DGRAD || *size == single { 1 } else { 2 };
        matrices.most != most || stores.conflicts + copies.conflicts > 0
    });
}

/// Eight neighbouring pixels of a patch that is no multiple of eight pixels wide lie in two lines of the halo or more.
#[test]
fn narrow_patches_meet_a_bank_at_most_twice() {
    let sizes = [
        [8, 32, 4, 4, 32, 3, 3, 1, 1],
        [2, 32, 7, 7, 32, 3, 3, 1, 1],
        [2, 32, 14, 14, 32, 3, 3, 1, 1],
        [1, 32, 28, 28, 32, 3, 3, 1, 1],
        [3, 16, 15, 11, 24, 3, 3, 1, 1],
    ];
    let cases: Vec<Case> = sizes.iter().flat_map(|size| [(*size, FPROP, true), (*size, Form::Both, true)]).collect();
    check(&cases, |_, [matrices, stores, copies]| {
        matrices.phases == 0 || matrices.most > 2 || stores.conflicts + copies.conflicts > 0
    });
}

/// Weights of 16 bits, and halos that are copied, with one tap, two, and more than there are places for.
#[test]
fn copies_ahead_are_exact_in_every_shape() {
    let sizes = [
        [5, 72, 6, 6, 40, 1, 1, 1, 0],
        [2, 40, 9, 7, 72, 1, 2, 1, 0],
        [3, 72, 9, 10, 64, 3, 3, 2, 1],
        [9, 64, 8, 8, 72, 2, 2, 1, 1],
        [2, 104, 15, 11, 16, 5, 5, 1, 2],
    ];
    let cases: Vec<Case> = sizes
        .iter()
        .flat_map(|size| [FPROP, Form::Both].map(|form| [true, false].map(|half| (*size, form, half))))
        .flatten()
        .collect();
    check(&cases, |_, [matrices, ..]| matrices.phases == 0);
    // So many blocks that each has all slices of channels, one behind the other.
    let many = [
        ([264, 72, 8, 8, 40, 1, 1, 1, 0], FPROP),
        ([264, 40, 8, 8, 72, 1, 2, 1, 0], DGRAD),
        ([264, 72, 6, 8, 8, 2, 1, 1, 1], FPROP),
        ([66, 16, 16, 16, 72, 3, 3, 2, 1], DGRAD),
        ([132, 72, 9, 9, 8, 2, 2, 1, 0], FPROP),
        ([264, 72, 8, 8, 8, 3, 3, 1, 1], FPROP),
        ([264, 8, 8, 8, 104, 3, 3, 1, 1], DGRAD),
    ];
    let cases: Vec<Case> =
        many.iter().flat_map(|(size, form)| [true, false].map(|half| (*size, *form, half))).collect();
    check(&cases, |_, [matrices, ..]| matrices.phases == 0);
    // More taps than a patch may have: gathered, without matrices.
    let large = [1, 8, 13, 12, 8, 12, 11, 1, 5];
    check(&[(large, FPROP, true), (large, Form::Both, true)], |_, [matrices, ..]| matrices.phases > 0);
}

/// `struct Buffers` of `tests/simt/buffers.h`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Buffers {
    x: Address,
    w: Address,
    y: Address,
    n: i64,
}

/// A machine with kernels of `tests/simt/banks.cu`, or `None` without a compiler.
fn load(kernels: &[&str], seed: u64) -> Option<Simt> {
    static LIBRARY: std::sync::OnceLock<Option<libloading::Library>> = std::sync::OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("simt_banks.so");
        let mut command = Command::new(&compiler);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["-std=c++20", "-O2", "-g", "-DMLNT_SIMT"]);
        command.args(["-fno-strict-aliasing", "-pthread", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
        command.args(["-Ikernels/include", "-Ikernels/simt", "-Itests/simt", "-x", "c++", "tests/simt/banks.cu"]);
        command.args(["machine.cpp", "fiber.cpp", "mma.cpp", "wgmma.cpp"].map(|f| format!("kernels/simt/{f}")));
        match command.arg("-o").arg(&out).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => {
                println!("skipped: no C++ compiler ({compiler}: {error})");
                return None;
            }
        }
        // SAFETY: a library of ours, whose start runs no code.
        Some(unsafe { libloading::Library::new(out) }.unwrap())
    });
    let library = library.as_ref()?;
    // SAFETY: the symbols have these types, and the library is never unloaded.
    unsafe {
        let symbol = |name: &&str| *library.get(format!("mlnt_simt_{name}").as_bytes()).unwrap();
        let kernels: Vec<&'static SimtKernel> = kernels.iter().map(symbol).collect();
        let launch: SimtLaunch = *library.get(b"mlnt_simt_launch").unwrap();
        let count: SimtBanks = *library.get(b"mlnt_simt_banks").unwrap();
        Some(Simt::new(launch, &kernels, seed).counting(count))
    }
}

/// What a block of `threads` threads makes of 1, 2, …, 1024, and how it met in the banks; `None` without a compiler.
fn block(kernel: &'static str, threads: u32, seed: u64) -> Option<(Vec<f32>, [BankUse; 3])> {
    let simt = load(&[kernel], seed)?;
    let x: Vec<f32> = (1..=1024).map(|i| i as f32).collect();
    let at = [0, 1].map(|_| simt.allocate(4 * x.len(), "numbers").unwrap());
    simt.upload(Stream::Compute, at[0], bytemuck::cast_slice(&x)).unwrap();
    simt.zero(Stream::Compute, at[1], 4 * x.len()).unwrap();
    let buffers = Buffers { x: at[0], w: Address::NULL, y: at[1], n: x.len() as i64 };
    let params = bytemuck::bytes_of(&buffers).into();
    let launch = Launch { kernel, params, grid: [1, 1, 1], threads, shared: 4096, label: "test".into() };
    simt.launch(Stream::Compute, &launch).unwrap();
    let mut y = vec![0f32; x.len()];
    simt.download(Stream::Compute, &[(at[1], 4 * y.len())], bytemuck::cast_slice_mut(&mut y)).unwrap();
    let banks = simt.banks().lock().unwrap()[&(kernel, "test".into())];
    Some((y, banks))
}

#[test]
fn the_machine_counts_what_meets_in_a_bank() {
    let used = |phases, conflicts, most| BankUse { phases, conflicts, most };
    for seed in 0..4 {
        let Some((swizzled, banks)) = block("lines_swizzled_f32", 32, seed) else { return };
        assert_eq!(banks, [used(4, 0, 1), used(16, 0, 1), BankUse::default()]);
        // The same pieces of lines of 64 bytes that lie one behind the other: eight rows have two places.
        let (straight, banks) = block("lines_straight_f32", 32, seed).unwrap();
        assert_eq!(banks, [used(4, 12, 4), used(16, 0, 1), BankUse::default()]);
        // Row g of matrix i is piece i of line 8i + g.
        let want = (0..256).map(|at| (32 * (at / 64 * 8 + at % 64 / 8) + at / 64 * 8 + at % 8 + 1) as f32);
        assert_eq!(swizzled[..256], want.collect::<Vec<_>>());
        assert_eq!(swizzled, straight);
        // The last phase has half of its lanes.
        let (_, banks) = block("copies_of_every_second_line_f32", 32, seed).unwrap();
        assert_eq!(banks, [BankUse::default(), BankUse::default(), used(4, 3, 2)]);
    }
}

#[test]
fn a_group_of_copies_is_poison_until_it_is_waited_for() {
    let want: Vec<f32> = (0..1024).map(|i| (i / 256 * 256 + (i % 256 + 37) % 256 + 1) as f32).collect();
    for seed in 0..8 {
        let Some((right, _)) = block("ring_right_f32", 64, seed) else { return };
        assert_eq!(right, want);
        let (early, _) = block("ring_waits_for_too_little_f32", 64, seed).unwrap();
        // Threads that are a round ahead have waited for some of it.
        assert!(early.iter().any(|v| v.is_nan()));
    }
}
