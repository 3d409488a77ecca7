//! `dgrad(dy, w)` and `wgrad(x, dy)` of one geometry become one operation, whose launch takes `dy` from memory
//! once where the second-level cache holds what its blocks read at a time.

use super::Graph;
use crate::ops::{Conv, ConvForm, ConvGeom, ConvKind, FusedConv, Op};
use crate::tape::{Node, Tensor};

/// Joins every dgrad with the nearest wgrad of the same `dy` that does not depend on it nor it on that. The pair need not belong to
/// one layer's backward: `Σ_m wgrad(ȧ, δ)` and `Σ_m dgrad(δ, V)` of the meta-gradient come from two pullbacks.
pub(super) fn join(graph: &mut Graph) {
    let mut n = 0;
    while n < graph.nodes.len() {
        let partner = plain(&graph.nodes[n]).and_then(|of| {
            // Both run over the branches, or neither: a shared product would count once per branch in the joint one.
            let branched = |m: usize| graph.takes_branches(&graph.nodes[m]);
            let pairs = |m: &usize| {
                plain(&graph.nodes[*m]).is_some_and(|other| complement(of, other)) && branched(n) == branched(*m)
            };
            let after = (n + 1..graph.nodes.len()).filter(pairs);
            after.map(|m| (m, graph.needed_between(n, m))).find_map(|(m, needed)| needed.map(|needed| (m, needed)))
        });
        match partner {
            // What moved in front of the pair comes next.
            Some((m, needed)) => merge(graph, n, m, needed),
            None => n += 1,
        }
    }
}

/// Form, geometry and `dy` of a plain dgrad or wgrad.
fn plain(node: &Node) -> Option<(ConvKind, ConvGeom, Tensor)> {
    match (&node.op, &node.inputs[..]) {
        (Op::Conv(Conv { kind: ConvKind::Dgrad, geom }), [dy, _]) => Some((ConvKind::Dgrad, *geom, *dy)),
        (Op::Conv(Conv { kind: ConvKind::Wgrad, geom }), [_, dy]) => Some((ConvKind::Wgrad, *geom, *dy)),
        _ => None,
    }
}

fn complement(a: (ConvKind, ConvGeom, Tensor), b: (ConvKind, ConvGeom, Tensor)) -> bool {
    a.0 != b.0 && (a.1, a.2) == (b.1, b.2)
}

/// Puts one node in the place of `first` and `second`, behind what lies between them and is needed by `second`.
fn merge(graph: &mut Graph, first: usize, second: usize, needed: Vec<bool>) {
    let (a, b) = (graph.nodes[first].clone(), graph.nodes.remove(second));
    let dgrad_first = matches!(a.op, Op::Conv(Conv { kind: ConvKind::Dgrad, .. }));
    let (dgrad, wgrad) = if dgrad_first { (a, b) } else { (b, a) };
    let Op::Conv(Conv { geom, .. }) = dgrad.op else { unreachable!("a dgrad is a convolution") };
    let form = ConvForm::Backward;
    let joint = Node {
        op: FusedConv::plain(form, geom).into(),
        inputs: vec![wgrad.inputs[0], dgrad.inputs[1], dgrad.inputs[0]],
        outputs: vec![dgrad.outputs[0], wgrad.outputs[0]],
        phase: dgrad.phase,
    };
    let between: Vec<Node> = graph.nodes.drain(first..second).skip(1).collect();
    let (mut before, mut behind) = (Vec::new(), Vec::new());
    for (node, needed) in between.into_iter().zip(needed) {
        if needed { before.push(node) } else { behind.push(node) }
    }
    graph.nodes.splice(first..first, before.into_iter().chain([joint]).chain(behind));
}
