//! From a launch of a plan to the kernel that runs it.
#![allow(unsafe_code)]

use super::conv::{self, Start};
use super::elementwise::{self, Term};
use super::memory::{Memory, View};
use super::real::Real;
use super::softmax::{Head, Target};
use super::{batch_norm, neighbours, pool};
use crate::ops::{Conv, Op};
use crate::plan::{Args, Launch, Plan};
use crate::tape::Meta;
use std::collections::HashMap;

/// What the launches of a run have in common, visible to the threads of the pool.
pub(super) struct Context<'a, T> {
    pub plan: &'a Plan,
    pub memory: Memory<'a, T>,
    /// Values of the runtime scalars.
    pub scalars: &'a [f64],
    /// Of every convolution of the plan.
    pub layouts: &'a HashMap<Conv, conv::Layout>,
}

/// Elements of workspace the plan's launches need.
pub(super) fn workspace<T>(plan: &Plan) -> usize {
    let need = |launch: &Launch| match &launch.op {
        Op::Conv(conv) => {
            let [_, weights, out] = conv_metas(plan, &launch.args[0]);
            conv::workspace::<T>(conv, &weights, &out, launch.branches.len())
        }
        _ => 0,
    };
    plan.launches.iter().map(need).max().unwrap_or(0)
}

/// Bytes of scratch of every thread that the plan's launches need.
pub(super) fn scratch<T>(plan: &Plan, layouts: &HashMap<Conv, conv::Layout>) -> usize {
    let need = |launch: &Launch| match &launch.op {
        Op::Conv(conv) => {
            let [src, _, out] = conv_metas(plan, &launch.args[0]);
            conv::scratch::<T>(conv, &layouts[conv], &src, &out, launch.branches.len())
        }
        Op::Softmax(_) | Op::SoftmaxJvp(_) | Op::CeLoss(_) | Op::CeGrad(_) | Op::KlLoss(_) | Op::KlGrad(_) => {
            head(&plan.buffers[launch.args[0].inputs[0]].meta).scratch()
        }
        Op::NearestNeighbours(_) => neighbours::scratch(plan.buffers[launch.args[0].inputs[0]].meta.dims[0]),
        _ => 0,
    };
    plan.launches.iter().map(need).max().unwrap_or(0)
}

/// Of a convolution's operands and its result.
fn conv_metas(plan: &Plan, args: &Args) -> [Meta; 3] {
    [args.inputs[0], args.inputs[1], args.outputs[0]].map(|i| plan.buffers[i].meta)
}

/// The layouts of a plan's convolutions.
pub(super) fn layouts(plan: &Plan) -> HashMap<Conv, conv::Layout> {
    let convs = plan.launches.iter().filter_map(|l| if let Op::Conv(conv) = l.op { Some(conv) } else { None });
    convs.map(|conv| (conv, conv::Layout::new(&conv))).collect()
}

/// The head whose logits have this shape.
fn head(logits: &Meta) -> Head {
    Head { samples: logits.dims[0], classes: logits.dims[1] }
}

/// Runs one launch on the thread pool of the caller.
pub(super) fn run<T: Real>(context: &Context<'_, T>, launch: &Launch, work: &mut [T]) {
    for args in &launch.args {
        run_args(context, launch, args, work);
    }
}

fn run_args<T: Real>(context: &Context<'_, T>, launch: &Launch, args: &Args, work: &mut [T]) {
    let Context { plan, memory, scalars, layouts } = context;
    let branches = launch.branches.len();
    let input = |i: usize| &plan.buffers[args.inputs[i]];
    let output = |i: usize| &plan.buffers[args.outputs[i]];
    // SAFETY (all four): the run has the device to itself and launches one after the other, and `check::check` has found no
    // overlap of a launch's results with one another or with its operands, except operands worked on in place, which
    // are not turned into slices below.
    let real = |i: usize| -> View<'_, T> { unsafe { memory.read(input(i)) } };
    let index = |i: usize| unsafe { memory.read_indices(input(i)) };
    let out = |i: usize| unsafe { memory.write(output(i)) };
    let index_out = |i: usize| unsafe { memory.write_indices(output(i)) };

    let channels = |meta: &Meta| meta.dims[1];
    let branched = args.inputs.iter().any(|&b| plan.buffers[b].meta.per_branch);
    let live = if branched { branches } else { 1 };
    // Branches that a shared first result sums over.
    let sum_over = if output(0).meta.per_branch { 1 } else { live };

    match &launch.op {
        Op::Conv(op) => {
            let start = match args.inputs.len() {
                2 => Start::Zero,
                _ if input(2).place == output(0).place => Start::InPlace,
                _ => Start::From(real(2)),
            };
            conv::run(op, &layouts[op], branches, real(0), real(1), start, out(0), work);
        }
        Op::BnForward(op) => {
            let ins = [real(0), real(1), real(2)];
            batch_norm::forward(op.relu, ins, [out(0), out(1), out(2)], channels(&input(0).meta));
        }
        Op::BnEval(op) => {
            let ins = [real(0), real(1), real(2), real(3), real(4)];
            batch_norm::eval(op.relu, ins, out(0), channels(&input(0).meta));
        }
        Op::BnBackward(op) => {
            let ins = [real(0), real(1), real(2), real(3), real(4)];
            let y = op.relu.then(|| real(5));
            batch_norm::backward(branches, ins, y, [out(0), out(1), out(2)], channels(&input(0).meta));
        }
        Op::BnDoubleBackward(op) => {
            let ins = [real(0), real(1), real(2), real(3), real(4), real(5), real(6), real(7)];
            let y = op.relu.then(|| real(8));
            batch_norm::double_backward(branches, ins, y, [out(0), out(1), out(2)], channels(&input(0).meta));
        }
        Op::FusedConv(_)
        | Op::BnStats(_)
        | Op::BnReluBackward(_)
        | Op::BnReluBackwardApply(_)
        | Op::BnReluDoubleBackward(_)
        | Op::BnReluDoubleBackwardApply(_)
        | Op::Update(_) => {
            unreachable!("refused when the plan was loaded")
        }
        Op::Relu(_) => elementwise::relu(real(0), out(0)),
        Op::Mask(_) => elementwise::mask(real(0), real(1), sum_over, out(0)),
        Op::LinComb(op) => {
            if op.guarded && real(op.coefs.len()).branch(0)[0] == T::zero() {
                if input(0).place != output(0).place {
                    elementwise::lin_comb(1, |_| (T::one(), Term::Of(real(0))), 1, out(0));
                }
                return;
            }
            let term = |i: usize| match input(i).place == output(0).place {
                true => Term::InPlace,
                false => Term::Of(real(i)),
            };
            let terms = |i: usize| (T::of(op.coefs[i].value(scalars)), term(i));
            elementwise::lin_comb(op.coefs.len(), terms, sum_over, out(0));
        }
        Op::AllFinite(_) => {
            let all = (0..args.inputs.len()).all(|i| elementwise::all_finite(real(i), live));
            // SAFETY: the launch has the result to itself.
            unsafe { out(0).all() }.fill(if all { T::one() } else { T::zero() });
        }
        Op::Fill(op) => {
            // SAFETY: the launch has the result to itself.
            unsafe { out(0).all() }.fill(T::of(op.value.value(scalars)));
        }
        Op::ChannelSum(_) => elementwise::channel_sum(real(0), sum_over, out(0)),
        Op::ChannelBroadcast(_) => elementwise::channel_broadcast(real(0), sum_over, T::one(), out(0)),
        Op::AvgPool(_) => pool::average(real(0), sum_over, out(0)),
        Op::AvgPoolBackward(_) => pool::average_backward(real(0), sum_over, out(0)),
        Op::MaxPoolIndex(op) => pool::max_index(&op.0, real(0), index_out(0)),
        Op::PoolGather(op) => pool::gather(&op.0, real(0), index(1), sum_over, out(0)),
        Op::PoolScatter(op) => pool::scatter(&op.0, real(0), index(1), sum_over, out(0)),
        Op::NearestNeighbours(_) => neighbours::nearest(real(0), input(0).meta.dims[0], index_out(0)),
        Op::TransferLabels(_) => neighbours::transfer(index(0), index(1), index(2), index_out(0)),
        Op::Softmax(op) => head(&op.logits).softmax(real(0), out(0)),
        Op::SoftmaxJvp(op) => head(&op.logits).jvp(real(0), real(1), [real(2), real(3)], live, out(0)),
        Op::CeLoss(op) => head(&op.logits).loss(real(0), Target::Labels(index(1)), real(2), live, out(0)),
        Op::CeGrad(op) => {
            head(&op.logits).grad(real(0), Target::Labels(index(1)), [real(2), real(3)], live, out(0));
        }
        Op::KlLoss(op) => head(&op.logits).loss(real(0), Target::Probabilities(real(1)), real(2), live, out(0)),
        Op::KlGrad(op) => {
            head(&op.logits).grad(real(0), Target::Probabilities(real(1)), [real(2), real(3)], live, out(0));
        }
    }
}
