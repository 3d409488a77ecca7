//! Which tensors take 16 bits: activations that a step makes for itself, and not single pixels, which are the features and logits of
//! the head; and weights per branch that convolutions alone read. What the host reads or writes stays in 32 bits, and so does everything else.

use super::graph::Graph;
use crate::ops::{Conv, ConvForm, ConvKind, LinComb, Op};
use crate::tape::{Coef, DType, Kind, Node, Tensor};
use std::collections::{HashMap, HashSet};

/// How an operation's kernels take activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Widths {
    /// Each in its own width.
    Any,
    /// All in one width.
    One,
    /// In 32 bits.
    Full,
}

fn widths(op: &Op) -> Widths {
    match op {
        Op::BnForward(_)
        | Op::BnEval(_)
        | Op::BnBackward(_)
        | Op::BnDoubleBackward(_)
        | Op::BnReluBackward(_)
        | Op::BnReluBackwardApply(_)
        | Op::BnReluDoubleBackward(_)
        | Op::BnReluDoubleBackwardApply(_)
        | Op::Relu(_)
        | Op::Mask(_) => Widths::One,
        Op::Conv(_)
        | Op::FusedConv(_)
        | Op::BnStats(_)
        | Op::MaxPoolIndex(_)
        | Op::PoolGather(_)
        | Op::PoolScatter(_)
        | Op::AvgPool(_)
        | Op::AvgPoolBackward(_)
        | Op::ChannelSum(_)
        | Op::ChannelBroadcast(_)
        | Op::LinComb(_)
        | Op::Fill(_) => Widths::Any,
        Op::Softmax(_)
        | Op::SoftmaxJvp(_)
        | Op::CeLoss(_)
        | Op::CeGrad(_)
        | Op::KlLoss(_)
        | Op::KlGrad(_)
        | Op::NearestNeighbours(_)
        | Op::TransferLabels(_)
        | Op::AllFinite(_)
        | Op::Update(_) => Widths::Full,
    }
}

/// Whether a tensor is one that could take 16 bits, were it the step's own.
fn large(graph: &Graph, t: Tensor) -> bool {
    let meta = &graph.metas[t.index()];
    let [_, _, h, w] = meta.dims;
    meta.kind == Kind::Activation && meta.dtype == DType::Real && h * w > 1
}

/// Whether `t` holds weights per branch that convolutions alone read, and round to 16 bits anyway: fast weights, and their cotangents as
/// the second order has them.
fn rounded_weights(graph: &Graph, t: Tensor, uses: &[Vec<(usize, usize)>]) -> bool {
    let meta = &graph.metas[t.index()];
    let weight = |&(n, i): &(usize, usize)| match graph.nodes[n].op {
        Op::Conv(Conv { kind: ConvKind::Fprop | ConvKind::Dgrad, .. }) => i == 1,
        Op::FusedConv(op) => match op.form {
            ConvForm::Fprop | ConvForm::Backward => i == 1,
            ConvForm::Tangent => i == 1 || i == 3,
            ConvForm::Wgrad => false,
        },
        _ => false,
    };
    meta.kind == Kind::Weight && meta.per_branch && uses[t.index()].iter().all(weight)
}

/// Marks the tensors that take 16 bits. Where an operation takes all its activations in one width and some of them must stay in 32
/// bits, it works on 16-bit copies of these; a result that the host reads is copied at the end of the run.
pub(super) fn narrow(graph: &mut Graph) {
    mark(graph);
    let mut ends = part_from_outputs(graph);
    let nodes = std::mem::take(&mut graph.nodes);
    let mut copies = HashMap::new();
    for mut node in nodes {
        let mut after = Vec::new();
        let touched = || node.inputs.iter().chain(&node.outputs).copied();
        if widths(&node.op) == Widths::One && touched().any(|t| graph.half[t.index()]) {
            let phase = node.phase;
            for t in &mut node.inputs {
                if large(graph, *t) && !graph.half[t.index()] {
                    let wide = *t;
                    *t = *copies.entry(wide).or_insert_with(|| {
                        let narrow = half_tensor(graph, wide);
                        graph.nodes.push(copy(wide, narrow, phase));
                        narrow
                    });
                }
            }
            for t in &mut node.outputs {
                if large(graph, *t) && !graph.half[t.index()] {
                    let narrow = half_tensor(graph, *t);
                    after.push(copy(narrow, *t, phase));
                    *t = narrow;
                }
            }
        }
        graph.nodes.push(node);
        graph.nodes.append(&mut after);
    }
    graph.nodes.append(&mut ends);
}

/// Marks all large activations that nodes make, but for those that become states or meet an operation that takes 32 bits.
fn mark(graph: &mut Graph) {
    let mut full: HashSet<Tensor> = graph.assigns.iter().map(|a| a.1).collect();
    for node in graph.nodes.iter().filter(|node| widths(&node.op) == Widths::Full) {
        full.extend(node.inputs.iter().chain(&node.outputs));
    }
    for node in &graph.nodes {
        for t in node.outputs.iter().filter(|t| large(graph, **t) && !full.contains(t)).copied().collect::<Vec<_>>() {
            graph.half[t.index()] = true;
        }
    }
    let (uses, escapes) = (graph.uses(), graph.escapes());
    let sums = graph.nodes.iter().filter(|node| matches!(node.op, Op::LinComb(_))).map(|node| node.outputs[0]);
    for t in sums.filter(|t| !escapes[t.index()] && rounded_weights(graph, *t, &uses)).collect::<Vec<_>>() {
        graph.half[t.index()] = true;
    }
}

/// Lets an output stay in 32 bits where all that touch it can take it so; elsewhere the host reads a copy. Returns the copies.
fn part_from_outputs(graph: &mut Graph) -> Vec<Node> {
    let mut bound = HashSet::new();
    for node in graph.nodes.iter().filter(|node| widths(&node.op) == Widths::One) {
        bound.extend(node.inputs.iter().chain(&node.outputs).copied());
    }
    let mut wide = HashMap::new();
    let mut copies = Vec::new();
    for i in 0..graph.outputs.len() {
        let t = graph.outputs[i].tensor;
        if let Some(copied) = wide.get(&t) {
            graph.outputs[i].tensor = *copied;
        } else if graph.half[t.index()] && !bound.contains(&t) {
            graph.half[t.index()] = false;
        } else if graph.half[t.index()] {
            let read = graph.tensor(graph.metas[t.index()]);
            copies.push(copy(t, read, "output"));
            graph.outputs[i].tensor = read;
            wide.insert(t, read);
        }
    }
    copies
}

fn half_tensor(graph: &mut Graph, like: Tensor) -> Tensor {
    let t = graph.tensor(graph.metas[like.index()]);
    graph.half[t.index()] = true;
    t
}

fn copy(from: Tensor, to: Tensor, phase: &'static str) -> Node {
    Node { op: LinComb::new(vec![Coef::ONE]).into(), inputs: vec![from], outputs: vec![to], phase }
}
