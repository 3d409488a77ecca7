//! Which linear combinations share a launch.

use super::Graph;
use crate::ops::Op;
use crate::tape::{Node, Tensor};
use std::collections::{HashMap, HashSet};

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
