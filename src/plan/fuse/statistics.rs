//! Mean and variance of what a convolution makes come out of that convolution.

use super::Graph;
use crate::ops::{BnEval, BnForward, Conv, ConvForm, ConvKind, Epilogue, FusedConv, Op};
use crate::tape::{Node, Tensor};

/// `bn_stats(x)`, and the statistics of `bn_forward(x)`, of an x that a forward convolution makes: further results of that convolution.
/// What is left of `bn_forward` is `bn_eval` with them.
pub(super) fn fuse(graph: &mut Graph) {
    let producers = graph.producers();
    // Statistics that are the same as others.
    let mut same: Vec<(Tensor, Tensor)> = Vec::new();
    for n in 0..graph.nodes.len() {
        let node = &graph.nodes[n];
        let (x, stats) = match (&node.op, &node.outputs[..]) {
            (Op::BnStats(_), &[mean, var]) => (node.inputs[0], [mean, var]),
            (Op::BnForward(_), &[_, mean, var]) => (node.inputs[0], [mean, var]),
            _ => continue,
        };
        let Some(p) = producers[x.index()] else { continue };
        let Some(op) = forward_convolution(&graph.nodes[p]) else { continue };
        // Not of a sum over the branches, which is complete only when all of them are.
        let branched = graph.nodes[p].inputs.iter().any(|t| graph.metas[t.index()].per_branch);
        if branched != graph.metas[x.index()].per_branch {
            continue;
        }
        if op.epilogue == Epilogue::Stats {
            same.extend(stats.into_iter().zip(graph.nodes[p].outputs[1..].iter().copied()));
        } else {
            graph.nodes[p].op = FusedConv { epilogue: Epilogue::Stats, ..op }.into();
            graph.nodes[p].outputs.extend(stats);
        }
        let node = &mut graph.nodes[n];
        match node.op {
            Op::BnForward(BnForward { relu }) => {
                node.inputs.extend(stats);
                node.outputs.truncate(1);
                node.op = BnEval { relu }.into();
            }
            // Without results it is dead.
            _ => node.outputs.clear(),
        }
    }
    graph.nodes.retain(|node| !node.outputs.is_empty());
    same.into_iter().for_each(|(copy, original)| graph.replace(copy, original));
}

/// The node as a fused forward convolution, if it is a forward convolution.
fn forward_convolution(node: &Node) -> Option<FusedConv> {
    let form = ConvForm::Fprop;
    match node.op {
        Op::Conv(Conv { kind: ConvKind::Fprop, geom }) => {
            Some(FusedConv { start: node.inputs.len() == 3, ..FusedConv::plain(form, geom) })
        }
        Op::FusedConv(op) if op.form == form => Some(op),
        _ => None,
    }
}
