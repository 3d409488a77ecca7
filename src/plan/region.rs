//! A region of work on branches, which can be taken in several passes of some branches each.

use super::graph::{Graph, Part};
use crate::error::Result;
use crate::ops::{BnReluBackward, BnReluDoubleBackwardApply, Epilogue, FusedConv, LinComb, Op, Operation};
use crate::tape::{Coef, Meta, Node, Tensor};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// What a tensor that a branched node makes is to the groups.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    /// Per-branch.
    Branches,
    /// A sum over the branches, or a linear combination of such sums: a group makes its share of it.
    Sum,
    /// Shared and no sum: every group makes the same.
    Same,
}

/// For every tensor that work on branches makes what it is; shared linear combinations are `None` here.
pub(super) fn made(graph: &Graph) -> Result<Vec<Option<Made>>> {
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
        | Op::BnReluDoubleBackwardApply(BnReluDoubleBackwardApply { start }) => start.then(|| node.inputs.len() - 1),
        _ => None,
    }
}

/// True when operand `i` of `node` is added, once, to its first result, which is shared.
pub(super) fn is_added(graph: &Graph, node: &Node, i: usize) -> bool {
    let branched = |t: Tensor| graph.metas[t.index()].per_branch;
    let linear = matches!(&node.op, Op::LinComb(op) if !op.guarded);
    let added = linear || start_operand(node) == Some(i);
    added && !branched(node.inputs[i]) && !branched(node.outputs[0])
}

/// Work on branches between two sums over all of them.
pub(super) struct Region<'a> {
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
    pub fn new(graph: &'a mut Graph, nodes: &'a [Node], made: &[Option<Made>], outside: &'a [bool]) -> Self {
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

    pub fn emit(&mut self, groups: &[Range<usize>]) {
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
        let of = if local { None } else { Some(self.graph.root(t)) };
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
