//! The planner's working copy of a tape: nodes that passes rewrite, and who uses what.

use crate::error::Result;
use crate::ops::{LinComb, Op, Operation};
use crate::tape::{Coef, Meta, Named, Node, Source, Tape, Tensor};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Branches `first..first + count` of a per-branch tensor.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub first: usize,
    pub count: usize,
    /// The tensor with more branches in whose memory they lie; `None` has memory of its own.
    pub of: Option<Tensor>,
}

/// Nodes in execution order with the tensors they pass along.
pub(super) struct Graph {
    pub branches: usize,
    pub metas: Vec<Meta>,
    /// Which tensors take 16 bits.
    pub half: Vec<bool>,
    pub sources: Vec<Source>,
    pub nodes: Vec<Node>,
    pub states: Vec<Named>,
    pub inputs: Vec<Named>,
    pub outputs: Vec<Named>,
    pub scalars: Vec<String>,
    /// `(state, value)`: tensors whose content becomes a state's at the end of the run.
    pub assigns: Vec<(u32, Tensor)>,
    /// Of the tensors that hold some of the branches.
    pub parts: HashMap<Tensor, Part>,
}

impl Graph {
    pub fn new(tape: &Tape) -> Self {
        let mut graph = Graph {
            branches: tape.branches(),
            metas: tape.metas.clone(),
            half: vec![false; tape.metas.len()],
            sources: tape.sources.clone(),
            nodes: tape.nodes.clone(),
            states: tape.states.clone(),
            inputs: tape.inputs.clone(),
            outputs: tape.outputs.clone(),
            scalars: tape.scalars.clone(),
            assigns: tape.assigns.clone(),
            parts: HashMap::new(),
        };
        graph.remove_dead();
        graph
    }

    /// Keeps the nodes that an output or an assignment needs.
    pub fn remove_dead(&mut self) {
        let mut live = vec![false; self.metas.len()];
        for t in self.outputs.iter().map(|n| n.tensor).chain(self.assigns.iter().map(|a| a.1)) {
            live[self.root(t).index()] = true;
        }
        let mut keep = vec![false; self.nodes.len()];
        for (n, node) in self.nodes.iter().enumerate().rev() {
            if node.outputs.iter().any(|t| live[self.root(*t).index()]) {
                keep[n] = true;
                node.inputs.iter().for_each(|t| live[self.root(*t).index()] = true);
            }
        }
        let mut kept = keep.into_iter();
        self.nodes.retain(|_| kept.next() == Some(true));
    }

    /// For every tensor the positions `(node, operand)` where it, or a part of it, is read.
    pub fn uses(&self) -> Vec<Vec<(usize, usize)>> {
        let mut uses = vec![Vec::new(); self.metas.len()];
        for (n, node) in self.nodes.iter().enumerate() {
            for (i, t) in node.inputs.iter().enumerate() {
                uses[self.root(*t).index()].push((n, i));
            }
        }
        uses
    }

    /// For every tensor the node that makes it.
    pub fn producers(&self) -> Vec<Option<usize>> {
        let mut producer = vec![None; self.metas.len()];
        for (n, node) in self.nodes.iter().enumerate() {
            node.outputs.iter().for_each(|t| producer[t.index()] = Some(n));
        }
        producer
    }

    /// For every tensor whether it must survive the run.
    pub fn escapes(&self) -> Vec<bool> {
        let mut escapes = vec![false; self.metas.len()];
        for t in self.outputs.iter().map(|n| n.tensor).chain(self.assigns.iter().map(|a| a.1)) {
            escapes[t.index()] = true;
        }
        escapes
    }

    /// The tensor in whose memory `t` lies: most often itself.
    pub fn root(&self, t: Tensor) -> Tensor {
        self.parts.get(&t).and_then(|part| part.of).unwrap_or(t)
    }

    /// The first branch that `t` holds, and how many it holds; 0 and 1 for a shared tensor.
    pub fn span(&self, t: Tensor) -> (usize, usize) {
        match (self.metas[t.index()].per_branch, self.parts.get(&t)) {
            (false, _) => (0, 1),
            (true, Some(part)) => (part.first, part.count),
            (true, None) => (0, self.branches),
        }
    }

    /// Elements of `t` over the branches that it holds.
    pub fn elements(&self, t: Tensor) -> usize {
        self.metas[t.index()].len() * self.span(t).1
    }

    /// True when an operand or a result of `node` is per-branch.
    pub fn branched(&self, node: &Node) -> bool {
        node.inputs.iter().chain(&node.outputs).any(|t| self.metas[t.index()].per_branch)
    }

    /// True when an operand of `node` is per-branch.
    pub fn takes_branches(&self, node: &Node) -> bool {
        node.inputs.iter().any(|t| self.metas[t.index()].per_branch)
    }

    /// The branches that `node` works on; `None` if all it touches is shared.
    pub fn branches_of(&self, node: &Node) -> Option<Range<usize>> {
        let mut tensors = node.inputs.iter().chain(&node.outputs);
        let (first, count) = self.span(*tensors.find(|t| self.metas[t.index()].per_branch)?);
        Some(first..first + count)
    }

    /// A new tensor.
    pub fn tensor(&mut self, meta: Meta) -> Tensor {
        self.metas.push(meta);
        self.half.push(false);
        self.sources.push(Source::Node(u32::MAX));
        Tensor(self.metas.len() as u32 - 1)
    }

    /// A new tensor of the shape and width of `t`.
    pub fn like(&mut self, t: Tensor) -> Tensor {
        let like = self.tensor(self.metas[t.index()]);
        self.half[like.index()] = self.half[t.index()];
        like
    }

    /// The terms of node `n` if it is their sum, all of the result's shape and branching.
    pub fn plain_sum(&self, n: usize) -> Option<Vec<Tensor>> {
        let node = &self.nodes[n];
        let Op::LinComb(op) = &node.op else { return None };
        let meta = self.metas[node.outputs[0].index()];
        let plain = op.coefs.len() > 1 && !op.guarded && op.coefs.iter().all(|c| *c == Coef::ONE);
        let alike = node.inputs.iter().all(|t| self.metas[t.index()] == meta);
        (plain && alike).then(|| node.inputs.clone())
    }

    /// Makes the sum that node `n` is one of `terms`, fewer than it had. A single term becomes the result itself, and the node makes
    /// a tensor that nobody reads.
    pub fn shorten_sum(&mut self, n: usize, terms: Vec<Tensor>, producers: &[Option<usize>]) {
        if let ([term], Some(p)) = (&terms[..], terms.first().and_then(|t| producers[t.index()])) {
            let result = std::mem::replace(&mut self.nodes[n].outputs[0], *term);
            self.nodes[p].outputs.iter_mut().filter(|t| *t == term).for_each(|t| *t = result);
        } else {
            self.nodes[n].op = LinComb::new(vec![Coef::ONE; terms.len()]).into();
            self.nodes[n].inputs = terms;
        }
    }

    /// For every node between `first` and `second` whether `second` needs it; `None` if `second` needs `first`.
    pub fn needed_between(&self, first: usize, second: usize) -> Option<Vec<bool>> {
        let mut wanted: HashSet<Tensor> = self.nodes[second].inputs.iter().copied().collect();
        let mut needed = vec![false; second - first];
        for n in (first..second).rev() {
            if self.nodes[n].outputs.iter().any(|t| wanted.contains(t)) {
                needed[n - first] = true;
                wanted.extend(&self.nodes[n].inputs);
            }
        }
        (!needed.remove(0)).then_some(needed)
    }

    /// Reads `new` wherever `old` was read, assigned or given out.
    pub fn replace(&mut self, old: Tensor, new: Tensor) {
        let read = self.nodes.iter_mut().flat_map(|node| &mut node.inputs);
        let given = self.outputs.iter_mut().map(|named| &mut named.tensor);
        let assigned = self.assigns.iter_mut().map(|assign| &mut assign.1);
        read.chain(given).chain(assigned).filter(|t| **t == old).for_each(|t| *t = new);
    }

    /// True when tensor `value` may be written straight into `state`: it is made by a linear combination or an update (which
    /// work in place) or by something that does not read the state, after every other reader, and nothing else
    /// claims it.
    fn writes_through(
        &self,
        state: Tensor,
        value: Tensor,
        uses: &[Vec<(usize, usize)>],
        producers: &[Option<usize>],
    ) -> bool {
        let Some(n) = producers[value.index()] else { return false };
        let claims = self.assigns.iter().filter(|a| a.1 == value).count();
        let node = &self.nodes[n];
        let result = node.outputs.iter().position(|t| *t == value).unwrap_or(0);
        let elementwise = matches!(node.op, Op::LinComb(_) | Op::Update(_));
        let in_place = |i: usize| elementwise && node.op.works_in_place(i, result, false);
        let readers_done = uses[state.index()].iter().all(|&(u, i)| u < n || (u == n && in_place(i)));
        claims == 1 && readers_done
    }

    /// Begins the run with copies of those assigned states whose old content an assignment or the host wants.
    pub fn copy_old_states(&mut self) {
        let mut copies: Vec<(Tensor, Node)> = Vec::new();
        for i in 0..self.assigns.len() {
            let old = self.states[self.assigns[i].0 as usize].tensor;
            let mut wanted = self.outputs.iter().map(|o| o.tensor).chain(self.assigns.iter().map(|a| a.1));
            if wanted.any(|t| t == old) {
                let copy = self.tensor(self.metas[old.index()]);
                let op = LinComb::new(vec![Coef::ONE]).into();
                copies.push((old, Node { op, inputs: vec![old], outputs: vec![copy], phase: "state" }));
            }
        }
        for (old, node) in &copies {
            let wanted =
                self.outputs.iter_mut().map(|o| &mut o.tensor).chain(self.assigns.iter_mut().map(|a| &mut a.1));
            wanted.filter(|t| **t == *old).for_each(|t| *t = node.outputs[0]);
        }
        self.nodes.splice(0..0, copies.into_iter().map(|c| c.1));
    }

    /// Ends the run with copies of those new state values that cannot be written straight into the state.
    pub fn copy_pending_assigns(&mut self) {
        let (uses, producers) = (self.uses(), self.producers());
        for i in 0..self.assigns.len() {
            let (id, value) = self.assigns[i];
            let state = self.states[id as usize].tensor;
            if self.writes_through(state, value, &uses, &producers) {
                continue;
            }
            let copy = self.tensor(self.metas[value.index()]);
            self.nodes.push(Node {
                op: LinComb::new(vec![Coef::ONE]).into(),
                inputs: vec![value],
                outputs: vec![copy],
                phase: "state",
            });
            self.assigns[i].1 = copy;
        }
    }

    /// Runs every operation's shape rule again and looks whether operands are there in time, so that a broken pass cannot go
    /// unnoticed.
    pub fn check(&self) -> Result<()> {
        let mut there: Vec<bool> = self.sources.iter().map(|s| !matches!(s, Source::Node(_))).collect();
        for node in &self.nodes {
            if node.inputs.iter().any(|t| !there[t.index()] && !there[self.root(*t).index()]) {
                return Err(crate::Error::shape(
                    node.op.name(),
                    "a planner pass left an operand that is not there yet",
                ));
            }
            for t in &node.outputs {
                (there[t.index()], there[self.root(*t).index()]) = (true, true);
            }
            let metas: Vec<Meta> = node.inputs.iter().map(|t| self.metas[t.index()]).collect();
            let outs = node.op.infer(&metas)?;
            let fits = |(o, t): (&Meta, &Tensor)| o.same_shape(&self.metas[t.index()]);
            if outs.len() != node.outputs.len() || !outs.iter().zip(&node.outputs).all(fits) {
                return Err(crate::Error::shape(node.op.name(), "a planner pass changed the shape of a result"));
            }
        }
        Ok(())
    }

    /// Refuses work that cannot be counted in 64 bits.
    pub fn check_size(&self) -> Result<()> {
        let (mut flops, mut bytes) = (0u128, 0u128);
        for node in &self.nodes {
            let metas = |tensors: &[Tensor]| -> Vec<Meta> { tensors.iter().map(|t| self.metas[t.index()]).collect() };
            let (inputs, outputs) = (metas(&node.inputs), metas(&node.outputs));
            let branches = self.branches_of(node).map_or(1, |range| range.len());
            flops += u128::from(node.op.flops(&inputs, &outputs, branches));
            bytes += inputs.iter().chain(&outputs).map(|m| 8 * m.total(branches) as u128).sum::<u128>();
        }
        if flops.max(bytes) > u128::from(u64::MAX) {
            let what = format!("a step of {flops} operations on {bytes} bytes is too large to plan");
            return Err(crate::Error::usage(what));
        }
        Ok(())
    }

    /// Every node a launch of its own.
    pub fn one_by_one(&self) -> Vec<Vec<usize>> {
        (0..self.nodes.len()).map(|n| vec![n]).collect()
    }
}
