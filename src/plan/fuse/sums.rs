//! Sums that are computed inside other operations: in the one that makes the last term, or in the sum of which they are a term.

use super::Graph;
use crate::ops::{BnReluBackward, Epilogue, FusedConv, LinComb, Op};
use crate::tape::{Coef, Kind, Node, Tensor};

/// `t_1 + … + t_n`, where nobody else reads the last terms and each is a convolution, a backward of both kinds or `dx` of
/// [`BnReluBackward`], becomes these operations, each of which adds to what the one before made.
pub(super) fn accumulate(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    // Partial sums to be computed right after a node.
    let mut partial: Vec<(usize, Node)> = Vec::new();
    for n in 0..graph.nodes.len() {
        let Some(mut terms) = graph.plain_sum(n) else { continue };
        let result = graph.nodes[n].outputs[0];
        terms.sort_by_key(|t| producers[t.index()]);
        let begins = |t: &Tensor| {
            let node = producers[t.index()].map(|p| &graph.nodes[p]);
            let begins = node.is_some_and(|node| node.outputs[0] == *t && with_start(node).is_some());
            begins && uses[t.index()].len() == 1 && !escapes[t.index()]
        };
        let tail = terms.iter().skip(1).rev().take_while(|t| begins(t)).count();
        if tail == 0 {
            continue;
        }
        let (prefix, last) = terms.split_at(terms.len() - tail);
        let mut base = prefix[0];
        if prefix.len() > 1 {
            let Some(after) = prefix.iter().filter_map(|t| producers[t.index()]).max() else { continue };
            base = graph.tensor(graph.metas[result.index()]);
            let op = LinComb::new(vec![Coef::ONE; prefix.len()]).into();
            let phase = graph.nodes[n].phase;
            partial.push((after, Node { op, inputs: prefix.to_vec(), outputs: vec![base], phase }));
        }
        for (i, t) in last.iter().enumerate() {
            let Some(p) = producers[t.index()] else { continue };
            let Some(op) = with_start(&graph.nodes[p]) else { continue };
            graph.nodes[p].op = op;
            graph.nodes[p].inputs.push(base);
            if i + 1 == last.len() {
                graph.nodes[p].outputs[0] = result;
                graph.nodes[n].outputs[0] = *t;
            } else {
                base = *t;
            }
        }
    }
    partial.sort_by_key(|p| p.0);
    let mut rest = partial.into_iter().peekable();
    let nodes = std::mem::take(&mut graph.nodes);
    for (n, node) in nodes.into_iter().enumerate() {
        graph.nodes.push(node);
        while let Some((_, sum)) = rest.next_if(|(after, _)| *after == n) {
            graph.nodes.push(sum);
        }
    }
}

/// The operation that adds one more operand, the last, to the first result of `node`.
fn with_start(node: &Node) -> Option<Op> {
    match node.op {
        Op::Conv(_) if node.inputs.len() == 2 => Some(node.op.clone()),
        Op::FusedConv(op) if !op.start && op.epilogue == Epilogue::None => Some(FusedConv { start: true, ..op }.into()),
        Op::BnReluBackward(BnReluBackward { start: false }) => Some(BnReluBackward { start: true }.into()),
        _ => None,
    }
}

/// `d·(Σ c_i x_i) + …` of parameters or other small tensors, where nobody else reads the inner sum and it adds up no branches,
/// becomes one linear combination.
pub(super) fn flatten(graph: &mut Graph) {
    let (uses, escapes) = (graph.uses(), graph.escapes());
    for n in 0..graph.nodes.len() {
        let inner = &graph.nodes[n];
        let (Op::LinComb(op), t) = (&inner.op, inner.outputs[0]) else { continue };
        let meta = graph.metas[t.index()];
        let ([(outer, _)], false) = (&uses[t.index()][..], escapes[t.index()]) else { continue };
        let (Op::LinComb(into), coefs) = (&graph.nodes[*outer].op, op.coefs.clone()) else { continue };
        let alike = |t: &Tensor| graph.metas[t.index()] == meta;
        let alike = inner.inputs.iter().chain(&graph.nodes[*outer].outputs).all(alike);
        // Not where it was if another sum has been merged into the outer one.
        let Some(at) = graph.nodes[*outer].inputs.iter().position(|i| *i == t) else { continue };
        let factor = into.coefs[at];
        let scalars = |c: &Coef| c.scalars.iter().flatten().count();
        let fit = coefs.iter().all(|c| scalars(c) + scalars(&factor) <= 2);
        if meta.kind == Kind::Activation || !alike || !fit || op.guarded || into.guarded {
            continue;
        }
        let mut all = into.coefs.clone();
        all.splice(at..=at, coefs.iter().map(|c| c.by(factor)));
        let terms = inner.inputs.clone();
        let outer = &mut graph.nodes[*outer];
        outer.op = LinComb::new(all).into();
        outer.inputs.splice(at..=at, terms);
    }
}
