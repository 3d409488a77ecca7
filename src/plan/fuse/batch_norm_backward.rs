//! Backward of batch norm and ReLU inside the convolutions around it: its sums where its cotangent is made, itself where its result is read.

use super::Graph;
use crate::ops::{BnReluBackward, BnReluBackwardApply, Conv, ConvForm, ConvKind, Delta, Epilogue, FusedConv, Op};
use crate::tape::{Node, Tensor};

/// The sums of [`BnReluBackward`] over a cotangent that a backward convolution makes, and whose x that convolution reads through the same
/// batch norm, become results of the convolution. What is left is [`BnReluBackwardApply`].
pub(super) fn sums(graph: &mut Graph) {
    let producers = graph.producers();
    for n in 0..graph.nodes.len() {
        let node = &graph.nodes[n];
        let Op::BnReluBackward(BnReluBackward { start }) = node.op else { continue };
        let Some(p) = producers[node.inputs[0].index()] else { continue };
        let Some(op) = maker(&graph.nodes[p], &node.inputs) else { continue };
        // Sums over the branches are complete only when all of them are.
        let branched = graph.takes_branches(&graph.nodes[p]);
        let alike = |t: &Tensor| graph.metas[t.index()].per_branch == branched;
        if !alike(&node.inputs[0]) || !node.outputs.iter().all(alike) {
            continue;
        }
        let sums = [node.outputs[1], node.outputs[2]];
        graph.nodes[p].op = FusedConv { epilogue: Epilogue::BackwardSums, ..op }.into();
        graph.nodes[p].outputs.extend(sums);
        let node = &mut graph.nodes[n];
        node.outputs.truncate(1);
        node.inputs.splice(6..6, sums);
        node.op = BnReluBackwardApply { second_order: false, starts: start.into() }.into();
    }
}

/// The convolution if it can make the sums of the batch norm of `dy, x, g, b, mean, var`.
fn maker(node: &Node, operands: &[Tensor]) -> Option<FusedConv> {
    let Op::FusedConv(op) = node.op else { return None };
    let norm = op.norm_operands().filter(|_| !op.tangent && op.epilogue == Epilogue::None)?;
    let same = node.inputs[op.x_operand()] == operands[1] && norm.map(|i| node.inputs[i])[..] == operands[2..6];
    (op.dy_operand() == Some(2) && node.outputs[0] == operands[0] && same).then_some(op)
}

/// A start of [`BnReluBackwardApply`] that is the sum of two tensors, and nothing else, becomes two starts.
pub(super) fn starts(graph: &mut Graph) {
    let (uses, escapes, producers) = (graph.uses(), graph.escapes(), graph.producers());
    for n in 0..graph.nodes.len() {
        let Op::BnReluBackwardApply(op) = graph.nodes[n].op else { continue };
        let Some(&start) = graph.nodes[n].inputs.get(op.first_start()) else { continue };
        let sole = uses[start.index()].len() == 1 && !escapes[start.index()];
        let terms = producers[start.index()].filter(|_| sole).and_then(|p| graph.plain_sum(p));
        let Some(terms) = terms.filter(|terms| op.starts + terms.len() - 1 <= BnReluBackwardApply::MOST_STARTS) else {
            continue;
        };
        graph.nodes[n].op = BnReluBackwardApply { starts: op.starts + terms.len() - 1, ..op }.into();
        graph.nodes[n].inputs.splice(op.first_start()..=op.first_start(), terms);
    }
}

/// A [`BnReluBackwardApply`] whose result δ convolutions read as their cotangent is computed by these as they load: by all of them, if
/// nothing else reads it and it has no residual term; else by the first, which keeps it for the others.
pub(super) fn prologue(graph: &mut Graph) {
    let (uses, escapes) = (graph.uses(), graph.escapes());
    for n in 0..graph.nodes.len() {
        let node = &graph.nodes[n];
        let residual = match node.op {
            Op::BnReluBackwardApply(BnReluBackwardApply { second_order: false, starts: starts @ 0..=1 }) => starts == 1,
            _ => continue,
        };
        let (dx, operands) = (node.outputs[0], node.inputs.clone());
        // A cotangent of which all branches have the same would be one per branch.
        if escapes[dx.index()] || graph.metas[dx.index()] != graph.metas[operands[0].index()] {
            continue;
        }
        let readers = &uses[dx.index()];
        let of =
            |&(r, i): &(usize, usize)| cotangent(&graph.nodes[r]).filter(|(_, at)| *at == i).map(|(op, _)| (r, op));
        let convs: Vec<(usize, FusedConv)> = readers.iter().filter_map(of).collect();
        let Some(&(first, op)) = convs.first().filter(|c| readers.iter().all(|(r, _)| *r >= c.0)) else { continue };
        let alone = convs.len() == readers.len() && (!residual || convs.len() == 1);
        let computing = if alone { convs } else { vec![(first, op)] };
        let delta = Delta::Backward { residual, kept: !alone };
        for (r, op) in computing {
            load_delta(&mut graph.nodes[r], FusedConv { delta, ..op }, &operands, dx);
        }
        // What is left of it makes a tensor that nobody reads.
        if !alone {
            let unread = graph.like(dx);
            graph.nodes[n].outputs[0] = unread;
        }
    }
}

/// Lets `node`, which becomes `op`, compute its cotangent `delta` from the operands of [`BnReluBackwardApply`].
pub(super) fn load_delta(node: &mut Node, op: FusedConv, operands: &[Tensor], delta: Tensor) {
    let (Some(dy), Some(at)) = (op.dy_operand(), op.delta_operands()) else { return };
    node.op = op.into();
    node.inputs[dy] = operands[0];
    node.inputs.splice(at[0]..at[0], operands[1..].iter().copied());
    if let Some(at) = op.delta_result() {
        node.outputs.insert(at, delta);
    }
}

/// A convolution that could compute its cotangent, and the position of that.
pub(super) fn cotangent(node: &Node) -> Option<(FusedConv, usize)> {
    match node.op {
        Op::FusedConv(op) if op.delta == Delta::None => op.dy_operand().map(|i| (op, i)),
        Op::Conv(Conv { kind: ConvKind::Wgrad, geom }) => {
            let start = node.inputs.len() == 3;
            Some((FusedConv { start, ..FusedConv::plain(ConvForm::Wgrad, geom) }, 1))
        }
        _ => None,
    }
}
