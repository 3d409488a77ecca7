//! The fusions for the CUDA kernels: which operations remain of a step, what they cost, and that they stand for the plain ones.

mod common;
#[path = "common/fused.rs"]
mod fused;

use common::{deviation, load_plan_on, step_spec};
use fused::{FUSED, KERNELS, PLAIN, check_sums, count, model, plan, specs, states, worst};
use mlnt::cases::expand;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::mlnt::{Recipe, StepSpec};
use mlnt::model::{Arch, ModelSpec};
use mlnt::ops::{BnReluBackwardApply, ConvForm, ConvGeom, ConvKind, Delta, Epilogue, FusedConv, Op, Operation};
use mlnt::plan::{Launch, Plan, PlanOptions};
use mlnt::tape::{Coef, Fan, Kind, Meta, Tape};

/// Convolutions of the network, and those among them that read the image.
fn convolutions(arch: Arch) -> usize {
    match arch {
        // Stem, two per block, one projection, the head.
        Arch::PreactResnet => 1 + 2 * 4 + 1 + 1,
        // Stem, three per block, two projections, the head.
        Arch::ResnetBottleneck => 1 + 3 * 4 + 2 + 1,
    }
}

fn is_form(form: ConvForm) -> impl Fn(&Op) -> bool {
    move |op| matches!(op, Op::FusedConv(op) if op.form == form)
}

fn is_conv(kind: ConvKind) -> impl Fn(&Op) -> bool {
    move |op| matches!(op, Op::Conv(op) if op.kind == kind)
}

#[test]
fn what_remains_of_a_preact_step() {
    for (name, spec) in specs(3).into_iter().filter(|(_, spec)| spec.model.arch == Arch::PreactResnet) {
        let plan = plan(&spec, KERNELS);
        let convs = convolutions(Arch::PreactResnet);
        // Teacher, student, fast; the sequential recipe classifies at the new parameters.
        let forwards = 3 + usize::from(spec.recipe == Recipe::Sequential);
        // Inner gradients, fast gradients, and the reverse of the student's forward or of the classification's.
        let reverse =
            usize::from(spec.recipe == Recipe::Sequential || !spec.first_order || spec.recipe == Recipe::Joint);
        let shared_chain = usize::from(!spec.first_order && spec.recipe == Recipe::Sequential);
        let backwards = 2 + reverse + shared_chain;
        let second = usize::from(!spec.first_order);
        let norms = 2 * 4 + 1;

        assert_eq!(count(&plan, |op| matches!(op, Op::BnForward(_) | Op::BnStats(_))), 0, "{name}");
        assert_eq!(count(&plan, |op| matches!(op, Op::BnEval(_))), forwards, "{name}: the pooled y of each forward");
        assert_eq!(count(&plan, |op| matches!(op, Op::BnBackward(_) | Op::BnDoubleBackward(_))), 0, "{name}");
        assert_eq!(count(&plan, |op| matches!(op, Op::Relu(_) | Op::Mask(_))), 0, "{name}");
        // Only the last batch norm's cotangent comes from no convolution.
        assert_eq!(count(&plan, |op| matches!(op, Op::BnReluBackward(_))), backwards, "{name}");
        assert_eq!(count(&plan, |op| matches!(op, Op::BnReluDoubleBackward(_))), second, "{name}");
        // Where first and second order meet, in one pass, there is an operation for each of the others.
        assert_eq!(count(&plan, |op| matches!(op, Op::BnReluBackwardApply(_))), second * (norms - 1), "{name}");
        assert_eq!(count(&plan, |op| matches!(op, Op::BnReluDoubleBackwardApply(_))), second * (norms - 1), "{name}");
        let sums = |epilogue| move |op: &Op| matches!(op, Op::FusedConv(op) if op.epilogue == epilogue);
        assert_eq!(count(&plan, sums(Epilogue::BackwardSums)), backwards * (norms - 1), "{name}");
        assert_eq!(count(&plan, sums(Epilogue::TangentSums)), second * (norms - 1), "{name}");

        // Each pass reads the image in one convolution that has no dgrad.
        assert_eq!(count(&plan, is_conv(ConvKind::Dgrad)), 0, "{name}");
        let stems = count(&plan, is_conv(ConvKind::Wgrad)) + count(&plan, is_form(ConvForm::Wgrad));
        assert_eq!(stems, backwards, "{name}");
        assert_eq!(count(&plan, is_form(ConvForm::Backward)), (backwards + second) * (convs - 1), "{name}");
        assert_eq!(count(&plan, is_form(ConvForm::Tangent)), second * (convs - 1), "{name}");
        // The head, whose result no batch norm reads.
        assert_eq!(count(&plan, is_conv(ConvKind::Fprop)), forwards, "{name}");
        let with_stats =
            |op: &Op| matches!(op, Op::FusedConv(op) if op.form == ConvForm::Fprop && op.epilogue == Epilogue::Stats);
        // One convolution of a projected block begins the sum that the other finishes.
        assert_eq!(count(&plan, with_stats), forwards * norms, "{name}");
        let no_stats =
            |op: &Op| matches!(op, Op::FusedConv(op) if op.form == ConvForm::Fprop && op.epilogue == Epilogue::None);
        assert_eq!(count(&plan, no_stats), forwards, "{name}");

        // No sum over large tensors of all branches is left but what the bias adds to logits.
        let large = |launch: &&Launch| {
            let meta = plan.buffers[launch.args[0].outputs[0]].meta;
            matches!(launch.op, Op::LinComb(_)) && meta.kind == Kind::Activation && meta.per_branch
        };
        let sums: Vec<&Launch> = plan.launches.iter().filter(large).collect();
        assert!(sums.iter().all(|l| plan.buffers[l.args[0].outputs[0]].meta.dims[2..] == [1, 1]), "{name}");
    }
}

#[test]
fn what_remains_of_a_bottleneck_step() {
    for (name, spec) in specs(3).into_iter().filter(|(_, spec)| spec.model.arch == Arch::ResnetBottleneck) {
        let plan = plan(&spec, KERNELS);
        assert_eq!(count(&plan, |op| matches!(op, Op::BnForward(_) | Op::BnStats(_))), 0, "{name}");
        // In memory is what is pooled or added up: the stem's, and of each block the last and the projection's.
        let forwards = 3 + usize::from(spec.recipe == Recipe::Sequential);
        assert_eq!(count(&plan, |op| matches!(op, Op::BnEval(_))), forwards * (1 + 4 + 2), "{name}");
        assert_eq!(count(&plan, is_conv(ConvKind::Dgrad)), 0, "{name}");
        let tangents = if spec.first_order { 0 } else { convolutions(Arch::ResnetBottleneck) - 1 };
        assert_eq!(count(&plan, is_form(ConvForm::Tangent)), tangents, "{name}");
        let recomputing = |op: &Op| matches!(op, Op::FusedConv(op) if op.norm);
        assert!(count(&plan, recomputing) > 0, "{name}");
    }
}

/// Multiplications and additions of all convolutions.
fn products(plan: &Plan) -> u64 {
    let branched = |b: &usize| plan.buffers[*b].meta.per_branch;
    let of = |launch: &Launch| -> u64 {
        let times = |ids: &[usize]| if ids.iter().any(branched) { launch.branches.len() as u64 } else { 1 };
        let sets = launch.args.iter().map(|args| {
            let (i, o) = (&args.inputs, &args.outputs);
            match launch.op {
                Op::Conv(op) => op.geom.flops() * times(&[i[0], i[1], o[0]]),
                Op::FusedConv(FusedConv { form: ConvForm::Fprop | ConvForm::Wgrad, geom, .. }) => {
                    geom.flops() * times(&[i[0], i[1], o[0]])
                }
                Op::FusedConv(FusedConv { form: ConvForm::Backward, geom, .. }) => {
                    geom.flops() * (times(&[i[2], i[1], o[0]]) + times(&[i[0], i[2], o[1]]))
                }
                Op::FusedConv(FusedConv { form: ConvForm::Tangent, geom, .. }) => {
                    geom.flops() * (times(&[i[0], i[3]]) + times(&[i[2], i[1]]))
                }
                _ => 0,
            }
        });
        sets.sum()
    };
    plan.launches.iter().map(of).sum()
}

#[test]
fn fusion_keeps_the_convolutions_and_costs_less() {
    for (name, spec) in [specs(1), specs(3)].concat() {
        let [plain, fused, kernels] = [PLAIN, FUSED, KERNELS].map(|options| plan(&spec, options));
        assert_eq!(products(&plain), products(&kernels), "{name}");
        let (before, after) = (fused.cost(4), kernels.cost(4));
        println!("{name}: {} launches instead of {}", after.launches(), before.launches());
        println!("{name}: {} bytes instead of {}", after.bytes_moved(), before.bytes_moved());
        println!("{name}: {} bytes of arena instead of {}", kernels.arena_bytes(4), fused.arena_bytes(4));
        assert!(after.launches() * 10 < before.launches() * 8, "{name}: {} launches", after.launches());
        assert!(after.bytes_moved() * 100 < before.bytes_moved() * 95, "{name}: {} bytes", after.bytes_moved());
        assert!(kernels.arena_bytes(4) <= fused.arena_bytes(4), "{name}: {} bytes of arena", kernels.arena_bytes(4));
    }
}

/// The network of the paper's experiments with CIFAR-10, at its size.
#[test]
fn a_joint_step_of_the_paper_costs_few_launches_and_bytes() {
    let model = ModelSpec {
        arch: Arch::PreactResnet,
        in_channels: 3,
        size: [32, 32],
        classes: 10,
        widths: vec![32, 64, 128],
        blocks: vec![5, 5, 5],
    };
    let spec = StepSpec { scaled: true, ..step_spec(model, 128, 10, Recipe::Joint, false) };
    let plan = plan(&spec, PlanOptions { half: true, recompute: true, group: Some(5), ..KERNELS });
    let cost = plan.cost(4);
    let forward = self::plan(&spec, FUSED).cost(4).phases.iter().find(|p| p.phase == "A forward").unwrap().flops;
    let ratio = cost.flops() as f64 / forward as f64;
    println!("{ratio:.2} passes, {} launches, {:.2} GB", cost.launches(), cost.bytes_moved() as f64 / 1e9);
    assert!(ratio <= 94.9, "{ratio}");
    assert!(cost.launches() <= 620, "{}", cost.launches());
    assert!(cost.bytes_moved() <= 35_000_000_000, "{}", cost.bytes_moved());
    assert!(plan.arena_bytes(4) <= 2_200_000_000, "{}", plan.arena_bytes(4));
}

#[test]
fn fused_operations_stand_for_the_plain_ones() {
    for (name, spec) in [specs(1), specs(3)].concat() {
        let want = states(&spec, plan(&spec, PLAIN));
        for (group, recompute) in [(None, false), (Some(2), false), (None, true), (Some(2), true)] {
            let kernels = plan(&spec, PlanOptions { group, recompute, ..KERNELS });
            check_sums(&kernels);
            let (off, state) = worst(&states(&spec, expand(&kernels)), &want);
            let how = format!("groups of {group:?}, recomputing: {recompute}");
            println!("{name}, {how}: {off:.1e}");
            assert!(off <= 1e-12, "{name}, {how}: {state} is off by {off:.1e}");
        }
    }
}

/// The kernels' own plan on the SIMT host machine, in f32. How far rounding carries a step from the exact one depends on the network, so
/// the measure is the same step without these fusions on the same machine.
#[test]
fn the_kernels_run_the_fused_step() {
    for (arch, recipe) in [(Arch::PreactResnet, Recipe::Joint), (Arch::ResnetBottleneck, Recipe::Sequential)] {
        let spec = step_spec(model(arch), 4, 2, recipe, false);
        let want = states(&spec, plan(&spec, PLAIN));
        let [unfused, fused] = [FUSED, KERNELS].map(|options| {
            let device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F32, Mode::Eager);
            let mut step = load_plan_on(device, &spec, plan(&spec, options));
            step.run();
            let have: Vec<_> = step.states().into_iter().map(|(name, values)| (name, values.to_f64())).collect();
            worst(&have, &want)
        });
        println!("{arch:?} {recipe:?} on the kernels: {:.1e}, without fusions for them {:.1e}", fused.0, unfused.0);
        let bound = (3.0 * unfused.0).max(1e-5);
        assert!(fused.0 <= bound && bound < 1e-2, "{arch:?} {recipe:?}: {} is off by {:.1e}", fused.1, fused.0);
    }
}

/// Exchanges two operands; `None` where the operation is another or they are the same.
fn swapped(launch: &Launch, a: usize, b: usize) -> Option<Launch> {
    let mut launch = launch.clone();
    let inputs = &mut launch.args[0].inputs;
    (inputs[a] != inputs[b]).then(|| inputs.swap(a, b))?;
    Some(launch)
}

/// Ways to get one launch wrong; `None` for a launch that cannot be got wrong in this way.
type Fault = (&'static str, fn(&Launch) -> Option<Launch>);

const FAULTS: [Fault; 12] = [
    ("the tangent's weights in the wrong order", |launch| match launch.op {
        Op::FusedConv(op) if op.form == ConvForm::Tangent => swapped(launch, 1, 3),
        _ => None,
    }),
    ("the recomputed batch norm's gain for its bias", |launch| match launch.op {
        Op::FusedConv(op) => op.norm_operands().and_then(|at| swapped(launch, at[0], at[1])),
        _ => None,
    }),
    ("the recomputed batch norm's mean for its variance", |launch| match launch.op {
        Op::FusedConv(op) => op.norm_operands().and_then(|at| swapped(launch, at[2], at[3])),
        _ => None,
    }),
    ("no start of a convolution", |launch| match launch.op {
        Op::FusedConv(op) if op.start => {
            let mut launch = launch.clone();
            launch.op = FusedConv { start: false, ..op }.into();
            launch.args[0].inputs.pop();
            Some(launch)
        }
        _ => None,
    }),
    ("one start too few of a batch norm's backward", |launch| match launch.op {
        Op::BnReluBackwardApply(op) if op.starts > 0 => {
            let mut launch = launch.clone();
            launch.op = BnReluBackwardApply { starts: op.starts - 1, ..op }.into();
            launch.args[0].inputs.pop();
            Some(launch)
        }
        _ => None,
    }),
    ("the second order's gain left out of a batch norm's backward", |launch| match launch.op {
        Op::BnReluBackwardApply(op) if op.second_order => {
            let mut launch = launch.clone();
            launch.op = BnReluBackwardApply { second_order: false, ..op }.into();
            launch.args[0].inputs.remove(op.first_start() - 1);
            Some(launch)
        }
        _ => None,
    }),
    ("no residual term of a cotangent", |launch| match launch.op {
        Op::FusedConv(op @ FusedConv { delta: Delta::Backward { residual: true, kept }, .. }) => {
            let mut launch = launch.clone();
            launch.op = FusedConv { delta: Delta::Backward { residual: false, kept }, ..op }.into();
            launch.args[0].inputs.remove(op.residual_operand()?);
            Some(launch)
        }
        _ => None,
    }),
    ("the gain of a cotangent's batch norm for its bias", |launch| match launch.op {
        Op::FusedConv(op) => op.delta_operands().and_then(|at| swapped(launch, at[1], at[2])),
        _ => None,
    }),
    ("the tangents of gain and bias in the wrong order", |launch| match launch.op {
        Op::FusedConv(op) => op.tangent_operands().and_then(|at| swapped(launch, at[0], at[1])),
        _ => None,
    }),
    ("mean for variance in the mask of a backward", |launch| match launch.op {
        Op::BnReluBackward(_) => swapped(launch, 4, 5),
        _ => None,
    }),
    ("gain for bias in the mask of a double backward", |launch| match launch.op {
        Op::BnReluDoubleBackwardApply(_) => swapped(launch, 4, 5),
        _ => None,
    }),
    ("velocity and gradient in the wrong order", |launch| match launch.op {
        Op::Update(_) => swapped(launch, 0, 1),
        _ => None,
    }),
];

#[test]
fn planted_faults_are_noticed() {
    let spec = step_spec(model(Arch::PreactResnet), 4, 3, Recipe::Joint, false);
    let good = plan(&spec, KERNELS);
    let want = states(&spec, plan(&spec, PLAIN));
    for (fault, plant) in FAULTS {
        let places: Vec<usize> = (0..good.launches.len()).filter(|l| plant(&good.launches[*l]).is_some()).collect();
        assert!(!places.is_empty(), "{fault}: nowhere to plant it");
        for at in [places[0], places[places.len() / 2], places[places.len() - 1]] {
            let mut plan = good.clone();
            plan.launches[at] = plant(&good.launches[at]).unwrap();
            let (off, _) = worst(&states(&spec, expand(&plan)), &want);
            assert!(off > 1e-6, "{fault} in launch {at}, {}, goes unnoticed", plan.launches[at].op.name());
        }
    }
}

/// `relu(bn(x))` read by convolutions and by something else is made for that, and they compute it again.
#[test]
fn what_something_else_reads_stays() {
    for pooled in [false, true] {
        let mut tape = Tape::new(2);
        let x = tape.input("x", Meta::activation(3, 4, 5, 5)).unwrap();
        let [g, b] = ["g", "b"].map(|name| tape.input(name, Meta::vector(4)).unwrap());
        let w = tape.input("w", Meta::weight(4, 4, 3, 3).branched()).unwrap();
        let norm = tape.batch_norm(x, g, b).unwrap();
        let y = tape.relu(norm.y).unwrap();
        let conv = tape.conv2d(y, w, 1, 1).unwrap();
        tape.output("conv", conv);
        if pooled {
            let pool = tape.avg_pool(y).unwrap();
            tape.output("pool", pool);
        }
        let names = |options| -> Vec<&str> {
            Plan::build(&tape, &options).unwrap().launches.iter().map(|l| l.op.name()).collect()
        };
        let want: &[&str] = match pooled {
            true => &["bn_relu_forward", "conv2d_fused_fprop", "avg_pool"],
            false => &["bn_stats", "conv2d_fused_fprop"],
        };
        assert_eq!(names(KERNELS), want);
    }
}

/// Of a convolution whose dgrad and wgrad read the same cotangent, they are joined unless one needs the other.
#[test]
fn a_pair_is_not_joined_across_a_dependence() {
    let geom = ConvGeom::new(&Meta::activation(2, 3, 5, 5), &Meta::weight(3, 3, 3, 3), 1, 1).unwrap();
    for dependent in [false, true] {
        let mut tape = Tape::new(1);
        let x = tape.input("x", geom.x()).unwrap();
        let dy = tape.input("dy", geom.y()).unwrap();
        let w = tape.input("w", geom.weight()).unwrap();
        let dx = tape.conv(ConvKind::Dgrad, geom, dy, w, false).unwrap();
        // Between the two stands what the second needs and what needs the first.
        let image = tape.scale(Coef::constant(2.0), if dependent { dx } else { x }).unwrap();
        let late = tape.scale(Coef::constant(3.0), dx).unwrap();
        let dw = tape.conv(ConvKind::Wgrad, geom, image, dy, false).unwrap();
        tape.output("late", late);
        tape.output("dw", dw);
        let plan = Plan::build(&tape, &KERNELS).unwrap();
        assert_eq!(count(&plan, is_form(ConvForm::Backward)), usize::from(!dependent));
        assert_eq!(count(&plan, |op| matches!(op, Op::LinComb(_))), 2);
    }
}

/// Two losses of one forward: sums of convolutions of unequal geometry and of shared and per-branch terms stay right.
#[test]
fn mixtures_of_shared_and_per_branch_sums() {
    let mut tape = Tape::new(3);
    let meta = Meta::activation(2, 3, 5, 4);
    let x = tape.input("x", meta).unwrap();
    let xm = tape.input("xm", meta.branched()).unwrap();
    let w = tape.input("w", Meta::weight(3, 3, 3, 3)).unwrap();
    let v = tape.input("v", Meta::weight(3, 3, 3, 3).branched()).unwrap();
    let u = tape.input("u", Meta::weight(3, 3, 1, 1)).unwrap();
    let terms = [
        tape.conv2d(xm, w, 1, 1).unwrap(),
        tape.conv2d(x, v, 1, 1).unwrap(),
        tape.conv2d(xm, v, 1, 1).unwrap(),
        tape.conv2d(xm, u, 1, 0).unwrap(),
        xm,
    ];
    let sum = tape.lin_comb(&terms.map(|t| (Coef::ONE, t))).unwrap();
    let seed = tape.input("seed", meta.branched()).unwrap();
    let grads = tape.vjp(&[(sum, seed)], &[x, xm, w, v, u], Fan::Sum).unwrap();
    for (i, grad) in grads.into_iter().enumerate() {
        tape.output(format!("grad{i}"), grad.unwrap());
    }
    tape.output("sum", sum);
    let run = |plan: Plan| -> Vec<Vec<f64>> {
        let mut runner = common::Runner::<f64>::of(plan);
        let inputs = tape.inputs().iter().enumerate();
        let inputs: Vec<_> = inputs
            .map(|(i, n)| mlnt::device::HostVec::F64(common::normals(tape.meta(n.tensor).total(3), i as u64)))
            .collect();
        runner.run(&tape, &inputs)
    };
    let kernels = Plan::build(&tape, &KERNELS).unwrap();
    assert_eq!(count(&kernels, is_form(ConvForm::Tangent)), 1);
    let want = run(Plan::build(&tape, &PLAIN).unwrap());
    for (have, want) in run(expand(&kernels)).iter().zip(&want) {
        assert!(deviation(have, want) <= 1e-13);
    }
}
