//! Fusions. Each replaces a named composition of operations by one operation with the same result.

use super::graph::Graph;
use crate::ops::{BnBackward, BnDoubleBackward, BnEval, BnForward, LinComb, Op};
use crate::tape::{Coef, Meta, Node, Tensor};
use std::collections::{HashMap, HashSet};

/// Batch norm followed by ReLU becomes one operation, and so do the masks in its backward and double backward.
pub(super) fn batch_norm_relu(graph: &mut Graph) {
    forward(graph);
    backward(graph);
    graph.remove_dead();
}

/// `relu(bn(x))` where nothing else reads `bn(x)`.
fn forward(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    for n in 0..graph.nodes.len() {
        if !matches!(graph.nodes[n].op, Op::Relu(_)) {
            continue;
        }
        let (x, y) = (graph.nodes[n].inputs[0], graph.nodes[n].outputs[0]);
        let Some(bn) = producers[x.index()].filter(|_| uses[x.index()].len() == 1 && !escapes[x.index()]) else {
            continue;
        };
        let fused = match graph.nodes[bn].op {
            Op::BnForward(BnForward { relu: false }) => BnForward { relu: true }.into(),
            Op::BnEval(BnEval { relu: false }) => BnEval { relu: true }.into(),
            _ => continue,
        };
        graph.nodes[bn].op = fused;
        graph.nodes[bn].outputs[0] = y;
        // What is left of the ReLU computes a tensor that nobody reads.
        graph.nodes[n].outputs[0] = x;
    }
    graph.remove_dead();
}

/// `dy` of a batch norm's backward and double backward that is `mask(e, y)` for the `y` of the fused forward.
fn backward(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    let sole_use = |t: Tensor| match uses[t.index()][..] {
        [(n, i)] if !escapes[t.index()] => Some((n, i)),
        _ => None,
    };
    for n in 0..graph.nodes.len() {
        if !matches!(graph.nodes[n].op, Op::Mask(_)) {
            continue;
        }
        let (e, y, masked) = (graph.nodes[n].inputs[0], graph.nodes[n].inputs[1], graph.nodes[n].outputs[0]);
        let Some(bn) = producers[y.index()] else { continue };
        let is_fused_forward = matches!(graph.nodes[bn].op, Op::BnForward(BnForward { relu: true }));
        let same_branching = graph.metas[e.index()] == graph.metas[masked.index()];
        if !is_fused_forward || !same_branching || escapes[masked.index()] {
            continue;
        }
        let x = graph.nodes[bn].inputs[0];
        // Every reader must be this batch norm's backward, or its double backward with ẏ read by the same mask only.
        let mut tangent_masks = Vec::new();
        let readers = &uses[masked.index()];
        let fits = readers.iter().all(|&(r, i)| {
            let reader = &graph.nodes[r];
            match reader.op {
                Op::BnBackward(BnBackward { relu: false }) => i == 0 && reader.inputs[1] == x,
                Op::BnDoubleBackward(BnDoubleBackward { relu: false }) if i == 3 && reader.inputs[4] == x => {
                    let tangent = reader.outputs[0];
                    match sole_use(tangent) {
                        Some((m, 0)) => {
                            let mask = &graph.nodes[m];
                            let same = matches!(mask.op, Op::Mask(_)) && mask.inputs[1] == y;
                            let plain = graph.metas[tangent.index()] == graph.metas[mask.outputs[0].index()];
                            tangent_masks.push((r, m));
                            same && plain
                        }
                        _ => uses[tangent.index()].is_empty() && !escapes[tangent.index()],
                    }
                }
                _ => false,
            }
        });
        if !fits {
            continue;
        }
        for &(r, i) in readers {
            let reader = &mut graph.nodes[r];
            reader.op = match reader.op {
                Op::BnBackward(_) => BnBackward { relu: true }.into(),
                _ => BnDoubleBackward { relu: true }.into(),
            };
            reader.inputs[i] = e;
            reader.inputs.push(y);
        }
        for (r, m) in tangent_masks {
            let unmasked = graph.nodes[r].outputs[0];
            graph.nodes[r].outputs[0] = graph.nodes[m].outputs[0];
            graph.nodes[m].outputs[0] = unmasked;
        }
    }
}

/// A sum whose last terms are convolutions that nobody else reads becomes convolutions that add to what is there.
pub(super) fn accumulate(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    // Partial sums to be computed right after a node.
    let mut partial: Vec<(usize, Node)> = Vec::new();
    for n in 0..graph.nodes.len() {
        let plain_sum = match &graph.nodes[n].op {
            Op::LinComb(op) => op.coefs.len() > 1 && !op.guarded && op.coefs.iter().all(|c| *c == Coef::ONE),
            _ => false,
        };
        let (mut terms, result) = (graph.nodes[n].inputs.clone(), graph.nodes[n].outputs[0]);
        let meta: Meta = graph.metas[result.index()];
        if !plain_sum || terms.iter().any(|t| graph.metas[t.index()] != meta) {
            continue;
        }
        terms.sort_by_key(|t| producers[t.index()]);
        let fusable = |t: &Tensor| {
            let conv = producers[t.index()]
                .is_some_and(|p| matches!(graph.nodes[p].op, Op::Conv(_)) && graph.nodes[p].inputs.len() == 2);
            conv && uses[t.index()].len() == 1 && !escapes[t.index()]
        };
        let tail = terms.iter().skip(1).rev().take_while(|t| fusable(t)).count();
        if tail == 0 {
            continue;
        }
        let (prefix, convs) = terms.split_at(terms.len() - tail);
        let mut base = prefix[0];
        if prefix.len() > 1 {
            let Some(after) = prefix.iter().filter_map(|t| producers[t.index()]).max() else { continue };
            base = graph.tensor(meta);
            let op = LinComb::new(vec![Coef::ONE; prefix.len()]).into();
            let phase = graph.nodes[n].phase;
            partial.push((after, Node { op, inputs: prefix.to_vec(), outputs: vec![base], phase }));
        }
        for (i, t) in convs.iter().enumerate() {
            let Some(p) = producers[t.index()] else { continue };
            graph.nodes[p].inputs.push(base);
            if i + 1 == convs.len() {
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
    graph.remove_dead();
}

/// Neighbouring linear combinations with the same coefficients and no dependence on one another form one launch.
pub(super) fn group_lin_combs(graph: &Graph) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    // The state that a node's result is written into: nobody else in the same launch may read it.
    let written_into: HashMap<Tensor, Tensor> =
        graph.assigns.iter().map(|(state, value)| (*value, graph.states[*state as usize].tensor)).collect();
    // What the last group reads, and what it writes.
    let (mut reads, mut writes): (HashSet<Tensor>, HashSet<Tensor>) = (HashSet::new(), HashSet::new());
    for (n, node) in graph.nodes.iter().enumerate() {
        let written = written_into.get(&node.outputs[0]);
        let joins = groups.last().is_some_and(|group| {
            let head = &graph.nodes[group[0]];
            let guard = |node: &Node| match &node.op {
                Op::LinComb(op) if op.guarded => node.inputs.last().copied(),
                _ => None,
            };
            matches!(node.op, Op::LinComb(_))
                && node.op == head.op
                && guard(node) == guard(head)
                && node.phase == head.phase
                && !node.inputs.iter().any(|t| writes.contains(t))
                && !written.is_some_and(|t| reads.contains(t))
        });
        match groups.last_mut() {
            Some(group) if joins => group.push(n),
            _ => {
                groups.push(vec![n]);
                (reads, writes) = (HashSet::new(), HashSet::new());
            }
        }
        reads.extend(&node.inputs);
        writes.extend(written.into_iter().chain([&node.outputs[0]]));
    }
    groups
}
