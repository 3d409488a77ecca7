//! Branch groups: the work on the M branches in several passes, one group of branches after the other.
//!
//! By dependence a step falls into levels: 0 is what needs no branch, 1 works on branches, 2 needs sums over the branches and nothing
//! else of them, 3 works on branches again and needs such a sum, and so on. MLNT's step has levels 0 to 2, a single
//! region of work on branches. Each region is cloned once per group. Tensors that only its own group reads then live as long as
//! the group's pass; per-branch tensors that others read stay whole, and a group reads and writes its part of them. A sum over the
//! branches becomes a running one: the first group writes it, the others add.

use super::graph::{Graph, Part};
use crate::error::Result;
use crate::ops::{
    BnReluBackward, BnReluBackwardApply, BnReluDoubleBackwardApply, Epilogue, FusedConv, LinComb, Op, Operation,
};
use crate::tape::{Coef, Meta, Node, Tensor};
use std::collections::{HashMap, HashSet};
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

/// What a tensor that a branched node makes is to the groups.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    /// Per-branch.
    Branches,
    /// A sum over the branches, or a linear combination of such sums: a group makes its share of it.
    Sum,
    /// Shared and no sum: every group makes the same.
    Same,
}

/// For every tensor that work on branches makes what it is; shared linear combinations are `None` here.
fn made(graph: &Graph) -> Result<Vec<Option<Made>>> {
    let mut made = vec![None; graph.metas.len()];
    for node in graph.nodes.iter().filter(|node| graph.branched(node)) {
        let metas: Vec<Meta> = node.inputs.iter().map(|t| graph.metas[t.index()]).collect();
        for (t, inferred) in node.outputs.iter().zip(node.op.infer(&metas)?) {
            made[t.index()] = Some(match (graph.metas[t.index()].per_branch, inferred.per_branch) {
                (true, _) => Made::Branches,
                (false, true) => Made::Sum,
                (false, false) => Made::Same,
            });
        }
    }
    Ok(made)
}

/// Position of the operand that is added, once, to the first result.
fn start_operand(node: &Node) -> Option<usize> {
    match node.op {
        Op::Conv(_) => (node.inputs.len() == 3).then_some(2),
        Op::FusedConv(op) => op.start_operand(),
        Op::BnReluBackward(BnReluBackward { start })
        | Op::BnReluBackwardApply(BnReluBackwardApply { start })
        | Op::BnReluDoubleBackwardApply(BnReluDoubleBackwardApply { start }) => start.then(|| node.inputs.len() - 1),
        _ => None,
    }
}

/// True when operand `i` of `node` is added, once, to its first result, which is shared.
fn is_added(graph: &Graph, node: &Node, i: usize) -> bool {
    let branched = |t: Tensor| graph.metas[t.index()].per_branch;
    let linear = matches!(&node.op, Op::LinComb(op) if !op.guarded);
    let added = linear || start_operand(node) == Some(i);
    added && !branched(node.inputs[i]) && !branched(node.outputs[0])
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

/// Work on branches between two sums over all of them.
struct Region<'a> {
    graph: &'a mut Graph,
    nodes: &'a [Node],
    /// For every tensor that a node of the region makes what it is.
    made: HashMap<Tensor, Made>,
    outside: &'a [bool],
    /// The sum to which a node adds, beside its own operands, what the groups before have made of it.
    continued: HashMap<usize, Tensor>,
    /// What the groups up to now have made of the sums that are read outside.
    running: HashMap<Tensor, Tensor>,
}

impl<'a> Region<'a> {
    fn new(graph: &'a mut Graph, nodes: &'a [Node], made: &[Option<Made>], outside: &'a [bool]) -> Self {
        let results = nodes.iter().flat_map(|node| &node.outputs);
        let made = results.map(|t| (*t, made[t.index()].unwrap_or(Made::Sum))).collect();
        let (continued, running) = Default::default();
        let mut region = Region { graph, nodes, made, outside, continued, running };
        region.continued = region.continuations();
        region
    }

    /// Where sums that are read outside can go on without an addition of their own: in the operation that makes the sum, or in
    /// one from which it starts.
    fn continuations(&self) -> HashMap<usize, Tensor> {
        let mut producer = HashMap::new();
        let mut uses: HashMap<Tensor, usize> = HashMap::new();
        for (n, node) in self.nodes.iter().enumerate() {
            producer.extend(node.outputs.iter().enumerate().map(|(i, t)| (*t, (n, i))));
            node.inputs.iter().for_each(|t| *uses.entry(*t).or_default() += 1);
        }
        let mut found = HashMap::new();
        for (sum, _) in self.made.iter().filter(|(t, made)| **made == Made::Sum && self.outside[t.index()]) {
            let mut at = *sum;
            if uses.contains_key(sum) {
                continue;
            }
            while let Some((n, 0)) = producer.get(&at) {
                let node = &self.nodes[*n];
                let start = start_operand(node).map(|i| node.inputs[i]);
                match start.filter(|t| self.made.get(t) == Some(&Made::Sum)) {
                    Some(t) if uses[&t] == 1 && !self.outside[t.index()] => at = t,
                    Some(_) => break,
                    None => {
                        if matches!(node.op, Op::LinComb(_)) || with_start(node, at).is_some() {
                            found.insert(*n, *sum);
                        }
                        break;
                    }
                }
            }
        }
        found
    }

    fn emit(&mut self, groups: &[Range<usize>]) {
        let going_on: HashSet<Tensor> = self.continued.values().copied().collect();
        for (g, range) in groups.iter().enumerate() {
            let (first, last) = (g == 0, g + 1 == groups.len());
            let mut names: HashMap<Tensor, Tensor> = HashMap::new();
            let mut late = Vec::new();
            for n in 0..self.nodes.len() {
                let mut node = self.operation(n, first, range, &mut names);
                let mut sums = Vec::new();
                for t in self.nodes[n].outputs.clone() {
                    let made = self.made[&t];
                    let total = made == Made::Sum && self.outside[t.index()];
                    let continues = first || going_on.contains(&t);
                    let own = match made {
                        Made::Branches => self.part(t, range),
                        Made::Sum if last && total && continues => t,
                        Made::Same if last => t,
                        _ => self.graph.like(t),
                    };
                    names.insert(t, own);
                    node.outputs.push(own);
                    if total && continues {
                        self.running.insert(t, own);
                    } else if total {
                        sums.push((t, own));
                    }
                }
                let phase = node.phase;
                self.graph.nodes.push(node);
                for (t, own) in sums {
                    let sum = if last { t } else { self.graph.like(t) };
                    let inputs = [self.running.insert(t, sum).into_iter().collect(), vec![own]].concat();
                    let op = LinComb::new(vec![Coef::ONE; inputs.len()]).into();
                    let add = Node { op, inputs, outputs: vec![sum], phase };
                    late.push(add);
                }
            }
            late.sort_by_key(|node| node.phase);
            self.graph.nodes.append(&mut late);
        }
    }

    /// The part of a per-branch tensor that a group makes or reads: memory of its own for what nobody outside reads.
    fn part(&mut self, t: Tensor, range: &Range<usize>) -> Tensor {
        let local = self.made.contains_key(&t) && !self.outside[t.index()];
        let part = self.graph.like(t);
        let of = if local { None } else { Some(t) };
        self.graph.parts.insert(part, Part { first: range.start, count: range.len(), of });
        part
    }

    /// Node `n` for one group, without its results.
    fn operation(&mut self, n: usize, first: bool, range: &Range<usize>, names: &mut HashMap<Tensor, Tensor>) -> Node {
        let node = &self.nodes[n];
        let mut op = node.op.clone();
        let mut inputs = Vec::with_capacity(node.inputs.len() + 1);
        for (i, t) in node.inputs.iter().enumerate() {
            let branched = self.graph.metas[t.index()].per_branch;
            if branched && !names.contains_key(t) {
                let part = self.part(*t, range);
                names.insert(*t, part);
            }
            // What is added once is added by the first group.
            let once = self.made.get(t) != Some(&Made::Sum) && is_added(self.graph, node, i);
            inputs.push(if once && !first { None } else { Some(names.get(t).copied().unwrap_or(*t)) });
        }
        if let Op::LinComb(op) = &mut op {
            let mut kept = inputs.iter().map(Option::is_some);
            op.coefs.retain(|_| kept.next() == Some(true));
        } else if inputs.iter().any(Option::is_none) {
            set_start(&mut op, false);
        }
        let inputs = inputs.into_iter().flatten().collect();
        let mut node = Node { op, inputs, outputs: Vec::new(), phase: node.phase };
        if let (false, Some(sum)) = (first, self.continued.get(&n)) {
            let before = self.running[sum];
            match &mut node.op {
                Op::LinComb(op) => {
                    op.coefs.push(Coef::ONE);
                    node.inputs.push(before);
                }
                _ => node = with_start(&node, before).unwrap_or(node),
            }
        }
        node
    }
}

/// Marks that `op` has a start operand, or that it has none.
fn set_start(op: &mut Op, start: bool) {
    match op {
        Op::FusedConv(op) => op.start = start,
        Op::BnReluBackward(op) => op.start = start,
        Op::BnReluBackwardApply(op) => op.start = start,
        Op::BnReluDoubleBackwardApply(op) => op.start = start,
        _ => {}
    }
}

/// `node` with `start` added to its first result in place of what was added, if it can add anything.
fn with_start(node: &Node, start: Tensor) -> Option<Node> {
    let mut node = node.clone();
    match node.op {
        Op::Conv(_)
        | Op::FusedConv(FusedConv { epilogue: Epilogue::None, .. })
        | Op::BnReluBackward(_)
        | Op::BnReluBackwardApply(_)
        | Op::BnReluDoubleBackwardApply(_) => {}
        _ => return None,
    }
    match start_operand(&node) {
        Some(i) => node.inputs[i] = start,
        None => {
            set_start(&mut node.op, true);
            node.inputs.push(start);
        }
    }
    Some(node)
}
