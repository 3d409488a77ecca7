//! Fused convolutions on the SIMT host machine against the composition of plain operations on the CPU device in double precision.

mod common;

use common::{deviation, on_two_threads};
use half::{bf16, f16};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{BnEval, Conv, ConvForm, ConvGeom, ConvKind, FusedConv, Op, Operation};
use mlnt::plan::{Args, Buffer, Launch, Place, Plan, PlanOptions, Port};
use mlnt::rng::{Purpose, normal, stream, uniform};
use mlnt::tape::{Kind, Meta, Tape, Tensor};

/// One fused convolution and what its tensors are like.
#[derive(Clone, Debug)]
struct Case {
    op: FusedConv,
    branches: usize,
    /// Bit i: operand i of the form is per-branch.
    branched: u32,
    /// The operands of the batch norm are per-branch.
    norm_branched: bool,
    /// Whether result 0 and 1 of the form are summed over the branches.
    summed: [bool; 2],
    /// Activations among the operands (bit i: operand i; bit 4: the start) and the first result (bit 5) have 16 bits.
    half: u32,
}

/// Where an operand of a case comes from.
struct Operand {
    name: String,
    meta: Meta,
    half: bool,
    values: Vec<f64>,
}

fn geom([n, c, h, w, k, r, s, stride, pad]: [usize; 9]) -> ConvGeom {
    ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, r, s), stride, pad).unwrap()
}

fn rounded(operands: Operands, v: f64) -> f64 {
    match operands {
        Operands::F16 => f16::from_f64(v).to_f64(),
        Operands::Bf16 => bf16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    }
}

impl Case {
    /// Metas of the form's operands.
    fn form(&self) -> Vec<Meta> {
        let (x, w, y) = (self.op.geom.x(), self.op.geom.weight(), self.op.geom.y());
        let metas = match self.op.form {
            ConvForm::Fprop => vec![x, w],
            ConvForm::Wgrad => vec![x, y],
            ConvForm::Backward => vec![x, w, y],
            ConvForm::Tangent => vec![x, w, x, w],
        };
        let branched = |i: usize| self.branched >> i & 1 == 1;
        metas.into_iter().enumerate().map(|(i, m)| m.with_branching(branched(i))).collect()
    }

    /// Metas of the results.
    fn results(&self) -> Vec<Meta> {
        let (x, w, y) = (self.op.geom.x(), self.op.geom.weight(), self.op.geom.y());
        let on = |bits: u32| self.branched & bits != 0;
        let norm = self.op.norm && self.norm_branched;
        let mut metas = match self.op.form {
            ConvForm::Fprop => vec![y.with_branching((on(3) || norm) && !self.summed[0])],
            ConvForm::Wgrad => vec![w.with_branching((on(3) || norm) && !self.summed[0])],
            ConvForm::Tangent => vec![y.with_branching((on(15) || norm) && !self.summed[0])],
            ConvForm::Backward => {
                vec![x.with_branching(on(6) && !self.summed[0]), w.with_branching((on(5) || norm) && !self.summed[1])]
            }
        };
        if self.op.stats {
            metas.extend([Meta::vector(self.op.geom.k).with_branching(metas[0].per_branch); 2]);
        }
        metas
    }

    fn operands(&self, operands: Operands) -> Vec<Operand> {
        let mut list: Vec<(String, Meta, bool)> = Vec::new();
        for (i, meta) in self.form().into_iter().enumerate() {
            let half = meta.kind == Kind::Activation && self.half >> i & 1 == 1;
            list.push((format!("in{i}"), meta, half));
        }
        if self.op.norm {
            let channels = Meta::vector(self.op.geom.c).with_branching(self.norm_branched);
            list.extend(["g", "b", "mean", "var"].map(|name| (name.into(), channels, false)));
        }
        if self.op.start {
            let meta = self.results()[0];
            list.push(("start".into(), meta, meta.kind == Kind::Activation && self.half >> 4 & 1 == 1));
        }
        let make = |(key, (name, meta, half)): (usize, (String, Meta, bool))| {
            let rng = &mut stream(11, Purpose::Test, key as u64, meta.total(self.branches) as u64);
            let mut draw = || match name.as_str() {
                "g" | "var" => 0.5 + uniform(rng),
                "b" | "mean" => 0.3 * normal(rng),
                _ => normal(rng),
            };
            let round = |v: f64| if half { rounded(operands, v) } else { f64::from(v as f32) };
            let values = (0..meta.total(self.branches)).map(|_| round(draw())).collect();
            Operand { name, meta, half, values }
        };
        list.into_iter().enumerate().map(make).collect()
    }

    /// The composition of plain operations.
    fn composed(&self) -> Tape {
        let mut tape = Tape::new(self.branches);
        tape.set_phase("case");
        let inputs: Vec<Tensor> =
            self.operands(Operands::F32).iter().map(|o| tape.input(&o.name, o.meta).unwrap()).collect();
        let geom = self.op.geom;
        let mut form = inputs[..self.op.operands()].to_vec();
        if let Some(norm) = self.op.norm_operands() {
            let x = self.op.x_operand();
            let mut operands = vec![form[x]];
            operands.extend(norm.map(|i| inputs[i]));
            form[x] = tape.record1(BnEval { relu: true }, &operands, false).unwrap();
        }
        let conv = |tape: &mut Tape, kind, a: usize, b: usize, sum: bool| {
            let branched = tape.meta(form[a]).per_branch || tape.meta(form[b]).per_branch;
            tape.record1(Conv { kind, geom }, &[form[a], form[b]], sum && branched).unwrap()
        };
        let mut results = match self.op.form {
            ConvForm::Fprop => vec![conv(&mut tape, ConvKind::Fprop, 0, 1, self.summed[0])],
            ConvForm::Wgrad => vec![conv(&mut tape, ConvKind::Wgrad, 0, 1, self.summed[0])],
            ConvForm::Backward => vec![
                conv(&mut tape, ConvKind::Dgrad, 2, 1, self.summed[0]),
                conv(&mut tape, ConvKind::Wgrad, 0, 2, self.summed[1]),
            ],
            ConvForm::Tangent => {
                let a = conv(&mut tape, ConvKind::Fprop, 0, 3, self.summed[0]);
                let b = conv(&mut tape, ConvKind::Fprop, 2, 1, self.summed[0]);
                vec![tape.add(a, b).unwrap()]
            }
        };
        if let Some(start) = self.op.start_operand() {
            results[0] = tape.add(results[0], inputs[start]).unwrap();
        }
        for (i, t) in results.into_iter().enumerate() {
            tape.output(format!("out{i}"), t);
        }
        tape
    }

    /// A plan of the fused operation, with copies between tensors of 32 and 16 bits.
    fn fused(&self, operands: &[Operand]) -> Plan {
        let mut plan = Plan {
            branches: self.branches,
            buffers: Vec::new(),
            launches: Vec::new(),
            states: Vec::new(),
            inputs: Vec::new(),
            scalars: Vec::new(),
            outputs: Vec::new(),
            arena_reals: 0,
            arena_halves: 0,
            arena_indices: 0,
        };
        let mut inputs = Vec::new();
        for operand in operands {
            let given = input(&mut plan, &operand.name, operand.meta);
            inputs.push(if operand.half { copied(&mut plan, given, true) } else { given });
        }
        let mut outputs = Vec::new();
        for (i, meta) in self.results().into_iter().enumerate() {
            let half = i == 0 && meta.kind == Kind::Activation && self.half >> 5 & 1 == 1;
            outputs.push(tensor(&mut plan, meta, half));
        }
        launch(&mut plan, Op::FusedConv(self.op), inputs, outputs.clone());
        for (i, buffer) in outputs.into_iter().enumerate() {
            let buffer = if plan.buffers[buffer].half { copied(&mut plan, buffer, false) } else { buffer };
            let meta = plan.buffers[buffer].meta;
            plan.outputs.push(Port { name: format!("out{i}"), meta, buffer: Some(buffer) });
        }
        plan
    }
}

fn tensor(plan: &mut Plan, meta: Meta, half: bool) -> usize {
    let arena = if half { &mut plan.arena_halves } else { &mut plan.arena_reals };
    let count = if meta.per_branch { plan.branches } else { 1 };
    plan.buffers.push(Buffer { meta, half, first: 0, count, place: Place::Arena(*arena) });
    *arena += meta.total(plan.branches).next_multiple_of(64);
    plan.buffers.len() - 1
}

fn input(plan: &mut Plan, name: &str, meta: Meta) -> usize {
    let count = if meta.per_branch { plan.branches } else { 1 };
    plan.buffers.push(Buffer { meta, half: false, first: 0, count, place: Place::Input(plan.inputs.len()) });
    let buffer = Some(plan.buffers.len() - 1);
    plan.inputs.push(Port { name: name.into(), meta, buffer });
    plan.buffers.len() - 1
}

fn launch(plan: &mut Plan, op: Op, inputs: Vec<usize>, outputs: Vec<usize>) {
    let per_branch = |b: &usize| plan.buffers[*b].meta.per_branch;
    let live = if inputs.iter().chain(&outputs).any(per_branch) { plan.branches } else { 1 };
    plan.launches.push(Launch { op, args: vec![Args { inputs, outputs }], phase: "case", branches: 0..live });
}

/// The same numbers in the other width: a convolution with the identity.
fn copied(plan: &mut Plan, from: usize, half: bool) -> usize {
    let meta = plan.buffers[from].meta;
    let [n, c, h, w] = meta.dims;
    let name = format!("identity{c}");
    let identity = match plan.inputs.iter().find(|p| p.name == name) {
        Some(port) => port.buffer.unwrap(),
        None => input(plan, &name, Meta::weight(c, c, 1, 1)),
    };
    let to = tensor(plan, meta, half);
    let conv = Conv { kind: ConvKind::Fprop, geom: geom([n, c, h, w, c, 1, 1, 1, 0]) };
    launch(plan, Op::Conv(conv), vec![from, identity], vec![to]);
    to
}

fn run(device: &mut dyn Device, plan: Plan, values: &[Operand]) -> Vec<Vec<f64>> {
    let (inputs, outputs) = (plan.inputs.clone(), plan.outputs.clone());
    let id = device.load(plan).unwrap();
    for port in inputs {
        let given = match values.iter().find(|v| v.name == port.name) {
            Some(operand) => operand.values.clone(),
            None => {
                let c = port.meta.dims[0];
                (0..c * c).map(|i| if i / c == i % c { 1.0 } else { 0.0 }).collect()
            }
        };
        device.write_input(id, &port.name, HostVec::F64(given).as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    // Twice: counters must be as they were.
    device.run(id, &[]).unwrap();
    outputs.iter().map(|port| device.read_output(id, &port.name).unwrap().to_f64()).collect()
}

/// The results of a case, and the kernel of its convolution.
fn on_simt(
    case: &Case,
    values: &[Operand],
    operands: Operands,
    generation: Generation,
    seed: u64,
) -> (Vec<Vec<f64>>, &'static str) {
    let machine = Simt::open(seed).unwrap().like(generation);
    let tally = machine.tally();
    let mut device = Cuda::new(Box::new(machine), operands, Mode::Eager);
    let results = run(&mut device, case.fused(values), values);
    let of_case = |label: &str| label.starts_with(case.op.name());
    let kernel = tally.lock().unwrap().keys().find(|(_, label)| of_case(label)).unwrap().0;
    (results, kernel)
}

/// Mean and biased variance per channel and branch of activations `[M, N, C, H, W]` as the host sees them.
fn statistics(meta: &Meta, values: &[f64]) -> [Vec<f64>; 2] {
    let [n, c, h, w] = meta.dims;
    let (mut means, mut variances) = (Vec::new(), Vec::new());
    for branch in values.chunks(meta.len()) {
        for channel in 0..c {
            let pick = |i: usize| {
                let from = (i * c + channel) * h * w;
                &branch[from..from + h * w]
            };
            let all: Vec<f64> = (0..n).flat_map(pick).copied().collect();
            let mean = all.iter().sum::<f64>() / all.len() as f64;
            means.push(mean);
            variances.push(all.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / all.len() as f64);
        }
    }
    [means, variances]
}

fn tolerance(operands: Operands) -> f64 {
    match operands {
        Operands::F32 => 1e-5,
        Operands::Tf32 | Operands::F16 => 3e-3,
        Operands::Bf16 => 3e-2,
    }
}

/// What is wrong with a case.
fn faults(case: &Case, operands: Operands, generation: Generation) -> Vec<String> {
    let wide = matches!(operands, Operands::F32 | Operands::Tf32);
    let case = Case { half: if wide { 0 } else { case.half }, ..case.clone() };
    let values = case.operands(operands);
    let plan = Plan::build(&case.composed(), &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    let want = run(&mut Cpu::<f64>::new(1).unwrap(), plan, &values);
    let (have, kernel) = on_simt(&case, &values, operands, generation, 1);
    let mut found = Vec::new();
    let mut compare = |what: String, have: &[f64], want: &[f64], tolerance: f64| {
        let rel = deviation(have, want);
        if rel > tolerance {
            found.push(format!("{} {case:?}: {what}: {rel:.1e} > {tolerance:.0e}", operands.name()));
        }
    };
    for (i, want) in want.iter().enumerate() {
        compare(format!("result {i}"), &have[i], want, tolerance(operands));
    }
    if case.op.stats {
        // Of the numbers that later operations read.
        let [mean, var] = statistics(&case.results()[0], &have[0]);
        compare("mean".into(), &have[1], &mean, 1e-6);
        compare("variance".into(), &have[2], &var, 2e-6);
    }
    let geom = &case.op.geom;
    let group = generation == Generation::Hopper && !wide && geom.c % 8 == 0 && geom.k % 8 == 0;
    if kernel.contains("wgmma") != group {
        found.push(format!("{} {case:?}: ran {kernel}", operands.name()));
    }
    if have != on_simt(&case, &values, operands, generation, 2).0 {
        found.push(format!("{} {case:?}: depends on the order of threads", operands.name()));
    }
    found
}

/// `[n, c, h, w, k, r, s, stride, pad]`
const SIZES: [[usize; 9]; 10] = [
    [2, 5, 15, 11, 8, 3, 3, 1, 1],
    [1, 3, 15, 11, 5, 7, 7, 2, 3],
    [2, 32, 8, 8, 32, 3, 3, 1, 1],
    [2, 8, 9, 7, 64, 3, 3, 2, 1],
    [3, 64, 5, 5, 8, 1, 1, 1, 0],
    [2, 64, 6, 6, 72, 3, 3, 1, 1],
    [5, 16, 7, 7, 32, 1, 1, 2, 0],
    [4, 8, 16, 16, 8, 3, 3, 1, 1],
    [1, 1, 4, 5, 1, 2, 3, 1, 1],
    [7, 24, 3, 3, 40, 3, 3, 1, 1],
];

/// Forms with the operands that can be per-branch: every mixture that differs in what is summed or strided.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (number, size) in SIZES.into_iter().enumerate() {
        let geom = geom(size);
        let mut add = |form, norm, start, stats, branches, branched, norm_branched, summed| {
            let op = FusedConv { form, geom, norm, start, stats };
            // A different mixture of widths in every case.
            let half = (cases.len() * 11 + number) as u32 % 64;
            cases.push(Case { op, branches, branched, norm_branched, summed, half });
        };
        use ConvForm::{Backward, Fprop, Tangent, Wgrad};
        let (no, yes) = ([false, false], [true, true]);
        add(Fprop, true, true, true, 1, 0, false, no);
        add(Fprop, true, false, true, 3, 3, true, no);
        add(Fprop, false, true, true, 3, 2, false, no);
        add(Fprop, true, true, false, 3, 1, true, yes);
        add(Wgrad, true, false, false, 3, 2, false, no);
        add(Wgrad, true, true, false, 3, 3, true, yes);
        add(Backward, true, true, false, 1, 0, false, no);
        add(Backward, true, true, false, 3, 7, true, no);
        add(Backward, false, false, false, 3, 7, false, yes);
        add(Backward, true, false, false, 3, 4, false, [false, true]);
        add(Backward, true, true, false, 3, 5, true, [true, false]);
        add(Tangent, true, true, false, 1, 0, false, no);
        add(Tangent, true, false, false, 3, 9, false, no);
        add(Tangent, true, true, false, 3, 15, true, yes);
        add(Tangent, false, true, false, 3, 8, false, yes);
    }
    cases
}

fn check(cases: &[Case], operands: Operands, generation: Generation) {
    let failures = on_two_threads(cases, |case| faults(case, operands, generation));
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn fused_convolutions_f32() {
    check(&cases(), Operands::F32, Generation::Portable);
}

#[test]
fn fused_convolutions_tf32() {
    check(&cases(), Operands::Tf32, Generation::Portable);
}

#[test]
fn fused_convolutions_f16() {
    check(&cases(), Operands::F16, Generation::Portable);
}

#[test]
fn fused_convolutions_bf16() {
    check(&cases(), Operands::Bf16, Generation::Portable);
}

#[test]
fn fused_convolutions_of_warpgroups_f16() {
    check(&cases(), Operands::F16, Generation::Hopper);
}

#[test]
fn fused_convolutions_of_warpgroups_bf16() {
    check(&cases(), Operands::Bf16, Generation::Hopper);
}

/// Deviations of 1 around a mean of 10,000: single precision has the digits for the variance, if they are not thrown away.
#[test]
fn statistics_keep_their_digits() {
    // More tiles than are combined at a time, of the kernels that gather and of the direct ones.
    let many = [40, 8, 18, 18, 16, 1, 1, 1, 0];
    let tries = [
        (Operands::F32, [16, 3, 18, 18, 5, 1, 1, 1, 0], Generation::Portable),
        (Operands::F16, many, Generation::Portable),
        (Operands::F16, many, Generation::Hopper),
    ];
    for (operands, size, generation) in tries {
        let op = FusedConv { form: ConvForm::Fprop, geom: geom(size), norm: false, start: true, stats: true };
        let case = Case { op, branches: 2, branched: 1, norm_branched: false, summed: [false; 2], half: 0 };
        let mut values = case.operands(operands);
        values.iter_mut().filter(|o| o.name == "start").for_each(|o| o.values.iter_mut().for_each(|v| *v = 1e4));
        let (have, _) = on_simt(&case, &values, operands, generation, 1);
        let [mean, var] = statistics(&case.results()[0], &have[0]);
        assert!(deviation(&have[1], &mean) < 1e-7);
        assert!(deviation(&have[2], &var) < 1e-6, "{:.1e}", deviation(&have[2], &var));
    }
}
