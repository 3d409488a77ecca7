//! Backward of batch norm and ReLU inside the convolutions around it: its sums where its cotangent is made, itself where its result is read.

use super::Graph;
use crate::ops::{BnReluBackward, BnReluBackwardApply, Conv, ConvForm, ConvKind, Epilogue, FusedConv, Op};
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
        node.op = BnReluBackwardApply { start }.into();
    }
}

/// The convolution if it can make the sums of the batch norm of `dy, x, g, b, mean, var`.
fn maker(node: &Node, operands: &[Tensor]) -> Option<FusedConv> {
    let Op::FusedConv(op) = node.op else { return None };
    let norm = op.norm_operands().filter(|_| !op.tangent && op.epilogue == Epilogue::None)?;
    let same = node.inputs[op.x_operand()] == operands[1] && norm.map(|i| node.inputs[i])[..] == operands[2..6];
    (op.dy_operand() == Some(2) && node.outputs[0] == operands[0] && same).then_some(op)
}

/// A [`BnReluBackwardApply`] whose result only convolutions read, as their cotangent, is computed by these as they load.
pub(super) fn prologue(graph: &mut Graph) {
    let (uses, escapes) = (graph.uses(), graph.escapes());
    for n in 0..graph.nodes.len() {
        let node = &graph.nodes[n];
        let (Op::BnReluBackwardApply(BnReluBackwardApply { start: false }), [dx]) = (&node.op, &node.outputs[..])
        else {
            continue;
        };
        let reads = |&(r, i): &(usize, usize)| cotangent(&graph.nodes[r]).filter(|(_, at)| *at == i).is_some();
        // A cotangent of which all branches have the same would be one per branch.
        let widened = graph.metas[dx.index()] != graph.metas[node.inputs[0].index()];
        if escapes[dx.index()] || widened || !uses[dx.index()].iter().all(reads) {
            continue;
        }
        let operands = node.inputs.clone();
        for &(r, i) in &uses[dx.index()] {
            let Some((op, _)) = cotangent(&graph.nodes[r]) else { continue };
            let op = FusedConv { delta: true, ..op };
            let reader = &mut graph.nodes[r];
            reader.op = op.into();
            reader.inputs[i] = operands[0];
            let first = op.delta_operands().map_or(reader.inputs.len(), |at| at[0]);
            reader.inputs.splice(first..first, operands[1..].iter().copied());
        }
    }
}

/// A convolution that could compute its cotangent, and the position of that.
fn cotangent(node: &Node) -> Option<(FusedConv, usize)> {
    match node.op {
        Op::FusedConv(op) if !op.delta => op.dy_operand().map(|i| (op, i)),
        Op::Conv(Conv { kind: ConvKind::Wgrad, geom }) if node.inputs.len() == 2 => {
            Some((FusedConv::plain(ConvForm::Wgrad, geom), 1))
        }
        _ => None,
    }
}
