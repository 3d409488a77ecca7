//! Which linear combinations share a launch.

use super::Graph;
use crate::ops::Op;
use crate::tape::{Kind, Node, Tensor};
use std::collections::{HashMap, HashSet};

/// Moves linear combinations of parameters and other small tensors behind one another where they have the same coefficients: none is
/// computed before it is needed, and then all that can be are.
///
/// What is written straight into a state stays behind all that reads the state.
pub(in crate::plan) fn gather(graph: &mut Graph) {
    let uses = graph.uses();
    // By memory: of what several nodes make in parts, a reader waits for all that came before it.
    let mut makers: Vec<Vec<usize>> = vec![Vec::new(); graph.metas.len()];
    for (n, node) in graph.nodes.iter().enumerate() {
        node.outputs.iter().for_each(|t| makers[graph.root(*t).index()].push(n));
    }
    let before = |n: usize, t: &Tensor| makers[graph.root(*t).index()].iter().copied().filter(move |maker| *maker < n);
    let mut needs: Vec<Vec<usize>> = graph
        .nodes
        .iter()
        .enumerate()
        .map(|(n, node)| node.inputs.iter().flat_map(|t| before(n, t)).collect())
        .collect();
    for (state, value) in &graph.assigns {
        let old = graph.states[*state as usize].tensor;
        for &n in &makers[graph.root(*value).index()] {
            needs[n].extend(uses[old.index()].iter().map(|u| u.0).filter(|&reader| reader != n));
        }
    }
    // A sum over the branches does not wait: its operands take the memory of many results.
    let waits = |node: &Node| {
        let waits = |t: &Tensor| {
            let meta = &graph.metas[t.index()];
            meta.kind != Kind::Activation && (meta.per_branch || !graph.takes_branches(node))
        };
        matches!(node.op, Op::LinComb(_)) && node.outputs.iter().all(waits)
    };
    let waiting: Vec<usize> = (0..graph.nodes.len()).filter(|&n| waits(&graph.nodes[n])).collect();
    let (mut order, mut done) = (Vec::with_capacity(graph.nodes.len()), vec![false; graph.nodes.len()]);
    let at_once = (0..graph.nodes.len()).filter(|n| waiting.binary_search(n).is_err());
    for wanted in at_once.chain(waiting.iter().copied()) {
        // Whatever is in front of the one that is wanted comes first.
        let mut stack = vec![wanted];
        while let Some(&n) = stack.last() {
            if done[n] {
                stack.pop();
                continue;
            }
            if let Some(&need) = needs[n].iter().find(|&&need| !done[need]) {
                stack.push(need);
                continue;
            }
            let ready = |m: &usize| !done[*m] && needs[*m].iter().all(|&need| done[need]);
            let fellows: Vec<usize> = match waiting.binary_search(&n) {
                Ok(_) => {
                    waiting.iter().copied().filter(|m| graph.nodes[*m].op == graph.nodes[n].op && ready(m)).collect()
                }
                Err(_) => vec![n],
            };
            fellows.iter().for_each(|&m| done[m] = true);
            order.extend(fellows.into_iter().map(|m| (m, graph.nodes[n].phase)));
        }
    }
    let mut nodes: Vec<Option<Node>> = std::mem::take(&mut graph.nodes).into_iter().map(Some).collect();
    let moved = order.into_iter().filter_map(|(n, phase)| nodes[n].take().map(|node| Node { phase, ..node }));
    graph.nodes = moved.collect();
}

/// Neighbouring linear combinations with the same coefficients and no dependence on one another form one launch.
pub(in crate::plan) fn group_lin_combs(graph: &Graph) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    // The branches that the last group works on.
    let mut branches = None;
    // The state that a node's result is written into: nobody else in the same launch may read it.
    let written_into: HashMap<Tensor, Tensor> =
        graph.assigns.iter().map(|(state, value)| (*value, graph.states[*state as usize].tensor)).collect();
    // What the last group reads, and what it writes.
    let (mut reads, mut writes): (HashSet<Tensor>, HashSet<Tensor>) = (HashSet::new(), HashSet::new());
    for (n, node) in graph.nodes.iter().enumerate() {
        let written = written_into.get(&node.outputs[0]);
        let range = graph.branches_of(node);
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
                && (range.is_none() || branches.is_none() || range == branches)
                && !node.inputs.iter().any(|t| writes.contains(t))
                && !written.is_some_and(|t| reads.contains(t))
        });
        match groups.last_mut() {
            Some(group) if joins => group.push(n),
            _ => {
                groups.push(vec![n]);
                branches = None;
                (reads, writes) = (HashSet::new(), HashSet::new());
            }
        }
        branches = branches.or(range);
        reads.extend(&node.inputs);
        writes.extend(written.into_iter().chain([&node.outputs[0]]));
    }
    groups
}
