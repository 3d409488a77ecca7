//! `fprop(ẋ, w) + fprop(x, ẇ)` becomes one product whose inner dimension is that of both.

use super::Graph;
use crate::ops::{BnEval, BnForward, Conv, ConvForm, ConvGeom, ConvKind, FusedConv, Op};
use crate::tape::Tensor;

/// Joins two terms of a sum that are forward convolutions of one geometry and that nobody else reads.
pub(super) fn join(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    let fprop = |graph: &Graph, t: Tensor| -> Option<(usize, ConvGeom)> {
        let n = producers[t.index()].filter(|_| uses[t.index()].len() == 1 && !escapes[t.index()])?;
        match graph.nodes[n].op {
            Op::Conv(Conv { kind: ConvKind::Fprop, geom }) if graph.nodes[n].inputs.len() == 2 => Some((n, geom)),
            _ => None,
        }
    };
    for n in 0..graph.nodes.len() {
        let Some(mut terms) = graph.plain_sum(n) else { continue };
        terms.sort_by_key(|t| producers[t.index()]);
        let (all, mut i) = (terms.len(), 1);
        while i < terms.len() {
            // The two convolutions of a layer are recorded one after the other: the nearest earlier one is the partner.
            let later = fprop(graph, terms[i]);
            let partner = later.and_then(|(_, geom)| {
                // Both run over the branches, or neither: a shared product would count once per branch in the joint one.
                let branched = |t: Tensor| producers[t.index()].map(|p| graph.takes_branches(&graph.nodes[p]));
                let fits = |j: usize| branched(terms[j]) == branched(terms[i]);
                let early = |j: usize| fprop(graph, terms[j]).filter(|e| e.1 == geom && fits(j)).map(|e| (j, e.0));
                (0..i).rev().find_map(early)
            });
            let (Some((late, geom)), Some((j, early))) = (later, partner) else {
                i += 1;
                continue;
            };
            let pairs = [early, late].map(|c| (graph.nodes[c].inputs[0], graph.nodes[c].inputs[1]));
            // x is the operand that a batch norm may be computed into, and that all branches share where one does.
            let rank = |x: Tensor| {
                let made = producers[x.index()].map(|p| &graph.nodes[p].op);
                let normed =
                    matches!(made, Some(Op::BnForward(BnForward { relu: true }) | Op::BnEval(BnEval { relu: true })));
                (normed, !graph.metas[x.index()].per_branch)
            };
            let swap = rank(pairs[1].0) > rank(pairs[0].0);
            let [(x, dw), (dx, w)] = if swap { [pairs[1], pairs[0]] } else { pairs };
            let form = ConvForm::Tangent;
            graph.nodes[late].op = FusedConv::plain(form, geom).into();
            graph.nodes[late].inputs = vec![dx, dw, x, w];
            terms.remove(j);
        }
        if terms.len() < all {
            graph.shorten_sum(n, terms, &producers);
        }
    }
}
