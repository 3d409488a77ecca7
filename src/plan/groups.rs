//! Branch groups: the work on the M branches in several passes, one group of branches after the other.
//!
//! By dependence a step falls into levels: 0 is what needs no branch, 1 works on branches, 2 needs sums over the branches and nothing
//! else of them, 3 works on branches again and needs such a sum, and so on. MLNT's step has levels 0 to 2, a single
//! region of work on branches. Each region is cloned once per group. Tensors that only its own group reads then live as long as
//! the group's pass; per-branch tensors that others read stay whole, and a group reads and writes its part of them. A sum over the
//! branches becomes a running one: the first group writes it, the others add.

use super::graph::Graph;
use super::region::{Made, Region, is_added, made};
use crate::error::Result;
use std::ops::Range;

/// The groups of at most `size` of `branches` branches: as few as there can be, sizes that differ by one at most, larger ones
/// first.
pub(super) fn ranges(branches: usize, size: Option<usize>) -> Vec<Range<usize>> {
    let count = branches.div_ceil(size.unwrap_or(branches).max(1)).max(1);
    let first = |g: usize| g * (branches / count) + g.min(branches % count);
    (0..count).map(|g| first(g)..first(g + 1)).collect()
}

/// Puts the nodes in the order of their levels, otherwise as they were, and returns the levels.
///
/// Fusions that let an operation start from a sum must know this order: what starts from a sum over the branches is to
/// come after it.
pub(super) fn order(graph: &mut Graph) -> Result<Vec<usize>> {
    let levels = levels(graph)?;
    let mut order: Vec<usize> = (0..levels.len()).collect();
    order.sort_by_key(|&n| levels[n]);
    graph.nodes = order.iter().map(|&n| graph.nodes[n].clone()).collect();
    Ok(order.into_iter().map(|n| levels[n]).collect())
}

fn levels(graph: &Graph) -> Result<Vec<usize>> {
    let (made, producers) = (made(graph)?, graph.producers());
    let mut levels: Vec<usize> = Vec::with_capacity(graph.nodes.len());
    // Shared linear combinations in a region: of what its nodes sum up over the branches.
    let mut combined = vec![false; graph.metas.len()];
    for node in &graph.nodes {
        let branched = graph.branched(node);
        let mut level = usize::from(branched);
        for (i, t) in node.inputs.iter().enumerate() {
            let Some(from) = producers[t.index()].map(|p| levels[p]) else { continue };
            let sum = made[t.index()] == Some(Made::Sum) || combined[t.index()];
            level = level.max(match (from % 2 == 1, branched) {
                (false, _) => from + usize::from(branched),
                (true, true) if !sum || is_added(graph, node, i) => from,
                (true, true) => from + 2,
                (true, false) if sum && is_added(graph, node, i) => from,
                (true, false) => from + 1,
            });
        }
        combined[node.outputs[0].index()] = !branched && level % 2 == 1;
        levels.push(level);
    }
    settle(graph, &mut levels);
    Ok(levels)
}

/// Moves shared nodes out of regions where no work on branches needs them, and those which stood behind the first such work and
/// are needed by none to the end, where they stood.
fn settle(graph: &Graph, levels: &mut [usize]) {
    let uses = graph.uses();
    let last = levels.iter().copied().max().unwrap_or(0).next_multiple_of(2);
    let Some(first_branched) = graph.nodes.iter().position(|node| graph.branched(node)) else { return };
    let mut needed: Vec<bool> = graph.nodes.iter().map(|node| graph.branched(node)).collect();
    for (n, node) in graph.nodes.iter().enumerate().rev() {
        if graph.branched(node) {
            continue;
        }
        let mut readers = node.outputs.iter().flat_map(|t| &uses[t.index()]).map(|u| u.0);
        let level = levels[n];
        if level % 2 == 1 && !readers.clone().any(|r| levels[r] == level) {
            levels[n] = level + 1;
        }
        needed[n] = readers.any(|r| needed[r]);
        if !needed[n] && n > first_branched {
            levels[n] = last;
        }
    }
}

/// Replaces the work on branches by as many passes as there are `groups`.
pub(super) fn divide(graph: &mut Graph, groups: &[Range<usize>]) -> Result<()> {
    let levels = order(graph)?;
    let made = made(graph)?;
    let outside = read_outside(graph, &levels);
    let nodes = std::mem::take(&mut graph.nodes);
    let mut from = 0;
    while from < nodes.len() {
        let level = levels[from];
        let to = from + levels[from..].iter().take_while(|l| **l == level).count();
        match level % 2 {
            0 => graph.nodes.extend_from_slice(&nodes[from..to]),
            _ => Region::new(graph, &nodes[from..to], &made, &outside).emit(groups),
        }
        from = to;
    }
    Ok(())
}

/// For every tensor whether it is read at another level than its own, or must survive the run.
fn read_outside(graph: &Graph, levels: &[usize]) -> Vec<bool> {
    let (producers, mut outside) = (graph.producers(), graph.escapes());
    for (node, level) in graph.nodes.iter().zip(levels) {
        for t in &node.inputs {
            outside[t.index()] |= producers[t.index()].is_none_or(|p| levels[p] != *level);
        }
    }
    outside
}
