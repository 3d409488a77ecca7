//! Second order of batch norm and ReLU inside the convolutions around it: its sums where its tangent is made, the tangent of its result
//! where that is read.

use super::Graph;
use crate::ops::{BnReluBackwardApply, BnReluDoubleBackwardApply, Conv, ConvForm, ConvKind, Epilogue, FusedConv, Op};
use crate::tape::{Meta, Node, Tensor};
use std::collections::HashMap;

/// The operands of [`BnReluDoubleBackward`](crate::ops::BnReluDoubleBackward).
struct Second {
    x_dot: Tensor,
    g_dot: Tensor,
    b_dot: Tensor,
    dy: Tensor,
    x: Tensor,
    /// `g, b, mean, var`
    channels: [Tensor; 4],
}

impl Second {
    fn of(node: &Node) -> Option<Self> {
        match (&node.op, &node.inputs[..]) {
            (Op::BnReluDoubleBackward(_), &[x_dot, g_dot, b_dot, dy, x, g, b, mean, var]) => {
                Some(Second { x_dot, g_dot, b_dot, dy, x, channels: [g, b, mean, var] })
            }
            _ => None,
        }
    }
}

/// A batch norm's second order whose ẋ a tangent convolution makes, and whose ẏ only convolutions read, as the tangent of the image that they,
/// or their partners at first order, make of the same x: the convolution before finds its sums, those behind compute ẏ as they load, and
/// what is left is [`BnReluDoubleBackwardApply`]. It leaves a term of x̄ to the batch norm's backward that adds x̄ to its result.
pub(super) fn fuse(graph: &mut Graph) {
    let (uses, escapes, producers) = (graph.uses(), graph.escapes(), graph.producers());
    let backward = backward_sums(graph);
    for n in 0..graph.nodes.len() {
        let Some(second) = Second::of(&graph.nodes[n]) else { continue };
        let Second { x_dot, g_dot, b_dot, dy, x, channels } = second;
        let [y_dot, x_bar, g_bar] = graph.nodes[n].outputs[..] else { continue };
        let Some(rest) = own_backward(graph, &uses, x_bar, &second).filter(|_| !escapes[x_bar.index()]) else {
            continue;
        };
        let Some(&[dg, db]) = backward.get(&(dy, x)) else { continue };
        let maker = producers[x_dot.index()].and_then(|p| Some((p, tangent(&graph.nodes[p], x_dot)?)));
        let Some((p, op)) = maker else { continue };
        // All per branch: sums over the branches are complete only when all of them are.
        let branched = |t: Tensor| graph.metas[t.index()].per_branch;
        let complete = [x_dot, y_dot, dy, dg, db].into_iter().all(branched) || graph.branches == 1;
        let readers: Option<Vec<(usize, FusedConv)>> =
            uses[y_dot.index()].iter().map(|&(r, i)| Some((r, reader(&graph.nodes[r], i, &second)?))).collect();
        let Some(readers) = readers.filter(|_| complete && !escapes[y_dot.index()]) else { continue };

        let vector = Meta::vector(graph.metas[x.index()].dims[1]).with_branching(branched(x_dot));
        let sums = [0; 2].map(|_| graph.tensor(vector));
        let op = FusedConv { epilogue: Epilogue::TangentSums, ..op };
        let [g, b, mean, var] = channels;
        let wanted = [x, mean, var];
        let first = op.epilogue_operands().map_or(0, |at| at[0]);
        graph.nodes[p].op = op.into();
        graph.nodes[p].inputs.splice(first..first, wanted);
        graph.nodes[p].outputs.extend(sums);

        for (r, op) in readers {
            let node = &mut graph.nodes[r];
            node.inputs[0] = x_dot;
            if op.form != ConvForm::Tangent {
                let at = op.x_operand();
                node.inputs.splice(at..at, [x, g, b, mean, var]);
            }
            let at = op.tangent_operands().map_or(0, |at| at[0]);
            node.inputs.splice(at..at, [g_dot, b_dot, sums[0], sums[1]]);
            node.op = op.into();
        }

        let node = &mut graph.nodes[n];
        node.op = BnReluDoubleBackwardApply { start: false }.into();
        node.inputs = vec![x_dot, g_dot, dy, x, g, b, mean, var, dg, db];
        node.inputs.extend(sums);
        node.outputs = vec![x_bar, g_bar];

        // The term that x̄ lacks.
        if let Op::BnReluBackwardApply(op) = graph.nodes[rest].op {
            let op = BnReluBackwardApply { second_order: true, ..op };
            graph.nodes[rest].op = op.into();
            graph.nodes[rest].inputs.insert(op.first_start() - 1, g_bar);
        }
    }
}

/// The backward of the same batch norm that adds `x_bar`, which nothing else reads, to its result.
fn own_backward(graph: &Graph, uses: &[Vec<(usize, usize)>], x_bar: Tensor, second: &Second) -> Option<usize> {
    let [(r, i)] = uses[x_bar.index()][..] else { return None };
    let Op::BnReluBackwardApply(op) = graph.nodes[r].op else { return None };
    let operands = &graph.nodes[r].inputs;
    let same = operands[1] == second.x && operands[2..6] == second.channels;
    (same && !op.second_order && i >= op.first_start()).then_some(r)
}

/// The sums `dg, db` of a batch norm's backward by its `dy` and x.
fn backward_sums(graph: &Graph) -> HashMap<(Tensor, Tensor), [Tensor; 2]> {
    let of = |node: &Node| match node.op {
        Op::BnReluBackward(_) => Some(((node.inputs[0], node.inputs[1]), [node.outputs[1], node.outputs[2]])),
        Op::FusedConv(op) if op.epilogue == Epilogue::BackwardSums => {
            let sums = op.epilogue_results()?.map(|i| node.outputs[i]);
            Some(((node.outputs[0], node.inputs[op.x_operand()]), sums))
        }
        _ => None,
    };
    graph.nodes.iter().filter_map(of).collect()
}

/// The convolution that makes the tangent `x_dot`, if it finds no sums yet.
fn tangent(node: &Node, x_dot: Tensor) -> Option<FusedConv> {
    match node.op {
        Op::FusedConv(op)
            if matches!(op.form, ConvForm::Tangent | ConvForm::Fprop)
                && op.epilogue == Epilogue::None
                && node.outputs[0] == x_dot =>
        {
            Some(op)
        }
        Op::Conv(Conv { kind: ConvKind::Fprop, geom }) if node.outputs[0] == x_dot => {
            Some(FusedConv { start: node.inputs.len() == 3, ..FusedConv::plain(ConvForm::Fprop, geom) })
        }
        _ => None,
    }
}

/// The convolution `node`, whose operand `i` is ẏ, as one that computes ẏ.
fn reader(node: &Node, i: usize, second: &Second) -> Option<FusedConv> {
    let op = match node.op {
        Op::FusedConv(op) => op,
        Op::Conv(Conv { kind: ConvKind::Wgrad, geom }) => {
            FusedConv { start: node.inputs.len() == 3, ..FusedConv::plain(ConvForm::Wgrad, geom) }
        }
        _ => return None,
    };
    if i != 0 || op.tangent {
        return None;
    }
    match op.form {
        ConvForm::Tangent => {
            let norm = op.norm_operands()?.map(|i| node.inputs[i]);
            (node.inputs[op.x_operand()] == second.x && norm == second.channels)
                .then_some(FusedConv { tangent: true, ..op })
        }
        ConvForm::Wgrad | ConvForm::Backward => (!op.norm).then_some(FusedConv { norm: true, tangent: true, ..op }),
        ConvForm::Fprop => None,
    }
}
