//! Sums that begin where the operation behind their last term begins.

use super::Graph;
use crate::ops::{BnReluBackward, FusedConv, LinComb, Op};
use crate::tape::{Coef, Node, Tensor};

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
        Op::FusedConv(op) if !op.start && !op.stats => Some(FusedConv { start: true, ..op }.into()),
        Op::BnReluBackward(BnReluBackward { start: false }) => Some(BnReluBackward { start: true }.into()),
        _ => None,
    }
}
