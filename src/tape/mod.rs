//! The tape: a record of operations on tensors that knows shapes and no memory.
//!
//! Differentiation ([`Tape::vjp`]) appends operations to the same tape, so a derivative can be
//! differentiated again. A tensor is *shared* or *per-branch*: a per-branch tensor stands for M
//! tensors of one shape, and every operation accepts any mixture of the two.

mod grad;
mod meta;

pub use grad::Fan;
pub use meta::{DType, Kind, Meta};

use crate::error::{Error, Result};
use crate::ops::{Op, Operation};

/// A tensor on a [`Tape`]: an index, meaningful on the tape that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tensor(pub(crate) u32);

impl Tensor {
    /// Position in the tape's list of tensors.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A number that is multiplied in at run time: `factor`, times up to two runtime scalars.
///
/// Runtime scalars (learning rate, η, γ, …) change from step to step while the plan stays the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coef {
    /// Constant factor.
    pub factor: f64,
    /// Indices into [`Tape::scalars`], multiplied with `factor`.
    pub scalars: [Option<u32>; 2],
}

impl Coef {
    /// The constant `factor`.
    pub fn constant(factor: f64) -> Self {
        Coef { factor, scalars: [None; 2] }
    }

    /// The constant one.
    pub const ONE: Coef = Coef { factor: 1.0, scalars: [None; 2] };

    /// `self · factor`.
    pub fn times(self, factor: f64) -> Self {
        Coef { factor: self.factor * factor, ..self }
    }

    /// `self · other`.
    ///
    /// # Panics
    /// When the product has more than two runtime scalars.
    pub fn by(self, other: Coef) -> Self {
        let scalars = match (self.scalars, other.scalars) {
            (some, [None, None]) | ([None, None], some) => some,
            ([one, None], [other, None]) => [one, other],
            _ => panic!("a coefficient has at most two runtime scalars"),
        };
        Coef { factor: self.factor * other.factor, scalars }
    }

    /// The value, given the values of the runtime scalars.
    pub fn value(self, scalars: &[f64]) -> f64 {
        self.scalars.into_iter().flatten().fold(self.factor, |value, s| value * scalars[s as usize])
    }
}

/// Where a tensor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Output of a node.
    Node(u32),
    /// Device memory that outlives a run: index into [`Tape::states`].
    State(u32),
    /// Written by the host before a run: index into [`Tape::inputs`].
    Input(u32),
}

/// A named tensor that outlives a run or comes from the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// Its name, e.g. `param.layer1.0.conv1.weight`.
    pub name: String,
    /// The tensor.
    pub tensor: Tensor,
}

/// One recorded operation.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Operands, in the operation's order.
    pub inputs: Vec<Tensor>,
    /// Results, in the operation's order.
    pub outputs: Vec<Tensor>,
    /// The phase of the step it belongs to, for accounting and profiling.
    pub phase: &'static str,
}

/// Elements of the largest tensor, over branches: it keeps all sizes, bytes and operations within 64 bits.
const MAX_ELEMENTS: u128 = 1 << 40;

/// The record. See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct Tape {
    branches: usize,
    pub(crate) metas: Vec<Meta>,
    pub(crate) sources: Vec<Source>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) states: Vec<Named>,
    pub(crate) inputs: Vec<Named>,
    pub(crate) scalars: Vec<String>,
    pub(crate) outputs: Vec<Named>,
    pub(crate) assigns: Vec<(u32, Tensor)>,
    phase: &'static str,
}

impl Tape {
    /// An empty tape on which per-branch tensors stand for `branches` tensors.
    pub fn new(branches: usize) -> Self {
        Tape {
            branches,
            metas: Vec::new(),
            sources: Vec::new(),
            nodes: Vec::new(),
            states: Vec::new(),
            inputs: Vec::new(),
            scalars: Vec::new(),
            outputs: Vec::new(),
            assigns: Vec::new(),
            phase: "",
        }
    }

    /// M, the number of tensors a per-branch tensor stands for.
    pub fn branches(&self) -> usize {
        self.branches
    }

    /// Shape, kind and branching of `t`.
    pub fn meta(&self, t: Tensor) -> &Meta {
        &self.metas[t.index()]
    }

    /// All recorded operations, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Tensors that outlive a run.
    pub fn states(&self) -> &[Named] {
        &self.states
    }

    /// Tensors the host writes before a run.
    pub fn inputs(&self) -> &[Named] {
        &self.inputs
    }

    /// Names of the runtime scalars.
    pub fn scalars(&self) -> &[String] {
        &self.scalars
    }

    /// Tensors the host may read after a run.
    pub fn outputs(&self) -> &[Named] {
        &self.outputs
    }

    /// Names the phase of what is recorded from here on.
    pub fn set_phase(&mut self, phase: &'static str) {
        self.phase = phase;
    }

    /// Gives the operations recorded from position `from` on that touch no per-branch tensor another phase name.
    pub fn rename_shared_phase(&mut self, from: usize, phase: &'static str) {
        for node in &mut self.nodes[from..] {
            let mut tensors = node.inputs.iter().chain(&node.outputs);
            if !tensors.any(|t| self.metas[t.index()].per_branch) {
                node.phase = phase;
            }
        }
    }

    fn tensor(&mut self, meta: Meta, source: Source) -> Result<Tensor> {
        let extents = meta.dims.into_iter().chain(meta.per_branch.then_some(self.branches));
        let elements = extents.fold(1u128, |product, n| product.saturating_mul(n as u128));
        if elements > MAX_ELEMENTS {
            let branches = if meta.per_branch { format!(" with M = {}", self.branches) } else { String::new() };
            return Err(Error::usage(format!("{meta}{branches} has more than 2^40 elements: too large to plan")));
        }
        self.metas.push(meta);
        self.sources.push(source);
        Ok(Tensor(self.metas.len() as u32 - 1))
    }

    /// A tensor that outlives a run. Asking again for the same name gives the same tensor.
    ///
    /// # Errors
    /// When the name is taken by a tensor of another shape, or the tensor is too large to plan.
    pub fn state(&mut self, name: &str, meta: Meta) -> Result<Tensor> {
        if let Some(s) = self.states.iter().find(|s| s.name == name) {
            let have = self.meta(s.tensor);
            return if *have == meta {
                Ok(s.tensor)
            } else {
                Err(Error::shape("state", format!("{name} is {have} and was asked for as {meta}")))
            };
        }
        let t = self.tensor(meta, Source::State(self.states.len() as u32))?;
        self.states.push(Named { name: name.to_string(), tensor: t });
        Ok(t)
    }

    /// A tensor the host writes before each run.
    ///
    /// # Errors
    /// When the name is taken, or the tensor is too large to plan.
    pub fn input(&mut self, name: &str, meta: Meta) -> Result<Tensor> {
        if self.inputs.iter().any(|i| i.name == name) {
            return Err(Error::shape("input", format!("{name} is recorded twice")));
        }
        let t = self.tensor(meta, Source::Input(self.inputs.len() as u32))?;
        self.inputs.push(Named { name: name.to_string(), tensor: t });
        Ok(t)
    }

    /// A number given anew at every run.
    pub fn scalar(&mut self, name: &str) -> Coef {
        let index = self.scalars.iter().position(|s| s == name).unwrap_or_else(|| {
            self.scalars.push(name.to_string());
            self.scalars.len() - 1
        });
        Coef { factor: 1.0, scalars: [Some(index as u32), None] }
    }

    /// Lets the host read `t` by `name` after a run.
    pub fn output(&mut self, name: impl Into<String>, t: Tensor) {
        self.outputs.push(Named { name: name.into(), tensor: t });
    }

    /// Makes `value` the content of `state` from the end of the run on.
    ///
    /// # Errors
    /// When `state` is no state, is assigned twice, or has another shape.
    pub fn assign(&mut self, state: Tensor, value: Tensor) -> Result<()> {
        let Source::State(id) = self.sources[state.index()] else {
            return Err(Error::shape("assign", "the target is not a state"));
        };
        if self.meta(state) != self.meta(value) {
            return Err(Error::shape("assign", format!("{} := {}", self.meta(state), self.meta(value))));
        }
        if self.assigns.iter().any(|(s, _)| *s == id) {
            return Err(Error::shape("assign", format!("{} is assigned twice", self.states[id as usize].name)));
        }
        self.assigns.push((id, value));
        Ok(())
    }

    /// Lets every state keep its value where `guard` `[1]` is 0 at the end of the run.
    ///
    /// # Errors
    /// When `guard` is not a single shared value, or an assigned state is per-branch.
    pub fn guard_assigns(&mut self, guard: Tensor) -> Result<()> {
        for i in 0..self.assigns.len() {
            let (id, value) = self.assigns[i];
            let state = self.states[id as usize].tensor;
            let none = Coef::constant(0.0);
            self.assigns[i].1 = self.guarded_lin_comb(&[(none, state), (Coef::ONE, value)], guard)?;
        }
        Ok(())
    }

    /// Records `op` on `inputs`; `sum[i]` asks for output `i` summed over the branches (missing: not summed).
    ///
    /// # Errors
    /// When the operation's shape rule refuses the operands, or a result is too large to plan.
    pub fn record(&mut self, op: impl Into<Op>, inputs: &[Tensor], sum: &[bool]) -> Result<Vec<Tensor>> {
        let op = op.into();
        let metas: Vec<Meta> = inputs.iter().map(|t| *self.meta(*t)).collect();
        let mut outs = op.infer(&metas)?;
        for (meta, _) in outs.iter_mut().zip(sum).filter(|(_, s)| **s) {
            meta.per_branch = false;
        }
        let node = self.nodes.len() as u32;
        let tensors: Result<Vec<Tensor>> = outs.into_iter().map(|m| self.tensor(m, Source::Node(node))).collect();
        let outputs = tensors?;
        self.nodes.push(Node { op, inputs: inputs.to_vec(), outputs: outputs.clone(), phase: self.phase });
        Ok(outputs)
    }

    /// [`Tape::record`] for an operation with one output.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn record1(&mut self, op: impl Into<Op>, inputs: &[Tensor], sum: bool) -> Result<Tensor> {
        Ok(self.record(op, inputs, &[sum])?[0])
    }
}
