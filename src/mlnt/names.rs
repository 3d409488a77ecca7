//! Names of the device's states, and the tensors of a network by parameter name.

use super::ce::CeSpec;
use crate::error::Result;
use crate::model::{BnUpdate, ModelSpec};
use crate::tape::{Coef, Meta, Tape, Tensor};
use std::collections::HashMap;

/// PyTorch's weight of the newest batch in the running statistics.
const BN_MOMENTUM: f64 = 0.1;

/// What a state of a network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// A parameter.
    Param,
    /// SGD velocity of a parameter.
    Momentum,
    /// A running statistic.
    Buffer,
}

/// Name of a state: `owner` is empty for the student, or a prefix like `teacher.`.
pub fn state_name(owner: &str, kind: StateKind, name: &str) -> String {
    let kind = match kind {
        StateKind::Param => "param",
        StateKind::Momentum => "momentum",
        StateKind::Buffer => "buffer",
    };
    format!("{owner}{kind}.{name}")
}

/// One network's tensors of one kind, by parameter name and in the order of the parameters.
#[derive(Clone, Debug, Default)]
pub(super) struct Tensors {
    pub names: Vec<String>,
    pub by_name: HashMap<String, Tensor>,
}

impl Tensors {
    pub fn push(&mut self, name: &str, t: Tensor) {
        self.names.push(name.to_string());
        self.by_name.insert(name.to_string(), t);
    }

    /// The states of `owner` of that kind.
    pub fn states(tape: &mut Tape, spec: &ModelSpec, owner: &str, kind: StateKind) -> Result<Self> {
        let metas: Vec<(String, Meta)> = match kind {
            StateKind::Buffer => spec.buffers().into_iter().map(|(n, c)| (n, Meta::vector(c))).collect(),
            _ => spec.params().into_iter().map(|p| (p.name, p.meta)).collect(),
        };
        let mut tensors = Tensors::default();
        for (name, meta) in metas {
            let t = tape.state(&state_name(owner, kind, &name), meta)?;
            tensors.push(&name, t);
        }
        Ok(tensors)
    }

    pub fn get(&self, name: &str) -> Tensor {
        self.by_name[name]
    }

    /// In the order of the names.
    pub fn list(&self) -> Vec<Tensor> {
        self.names.iter().map(|n| self.by_name[n]).collect()
    }

    /// The same names with other tensors.
    pub fn with(&self, tensors: impl IntoIterator<Item = Tensor>) -> Self {
        let mut other = Tensors::default();
        self.names.iter().zip(tensors).for_each(|(n, t)| other.push(n, t));
        other
    }

    /// `Σ c_i x_i` tensor by tensor.
    pub fn lin_comb(tape: &mut Tape, terms: &[(Coef, &Tensors)]) -> Result<Self> {
        let first = terms[0].1;
        let mut result = Tensors::default();
        for name in &first.names {
            let parts: Vec<(Coef, Tensor)> = terms.iter().map(|(c, t)| (*c, t.get(name))).collect();
            let t = tape.lin_comb(&parts)?;
            result.push(name, t);
        }
        Ok(result)
    }

    /// Makes `values` the content of these states.
    pub fn assign(&self, tape: &mut Tape, values: &Tensors) -> Result<()> {
        self.names.iter().try_for_each(|n| tape.assign(self.get(n), values.get(n)))
    }

    /// Lets the host read them as `{group}.{name}`.
    pub fn output(&self, tape: &mut Tape, group: &str) {
        self.names.iter().for_each(|n| tape.output(format!("{group}.{n}"), self.get(n)));
    }
}

/// Running statistics after a training-mode forward: mean, and unbiased variance, with momentum 0.1.
pub(super) fn update_buffers(tape: &mut Tape, buffers: &Tensors, updates: &[BnUpdate]) -> Result<()> {
    let old = Coef::constant(1.0 - BN_MOMENTUM);
    for field in ["running_mean", "running_var"] {
        for u in updates {
            let (batch, scale) = match field {
                "running_mean" => (u.mean, 1.0),
                _ => (u.var, u.count as f64 / (u.count as f64 - 1.0).max(1.0)),
            };
            let state = buffers.get(&format!("{}.{field}", u.name));
            let new = tape.lin_comb(&[(old, state), (Coef::constant(BN_MOMENTUM * scale), batch)])?;
            tape.assign(state, new)?;
        }
    }
    Ok(())
}

/// Momentum and weight decay of [`sgd`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Inertia {
    pub momentum: Coef,
    pub weight_decay: Coef,
}

impl Inertia {
    /// Those of `spec`, part of the plan.
    pub fn constant(spec: &CeSpec) -> Self {
        Inertia { momentum: Coef::constant(spec.momentum), weight_decay: Coef::constant(spec.weight_decay) }
    }

    /// The runtime scalars `momentum` and `weight_decay`, so that a step may leave both out.
    pub fn scalars(tape: &mut Tape) -> Self {
        Inertia { momentum: tape.scalar("momentum"), weight_decay: tape.scalar("weight_decay") }
    }
}

/// SGD with momentum and weight decay, PyTorch's form: `v ← μ v + g + λ θ [+ more]`, `θ ← θ − lr v`.
/// Returns the new parameters.
pub(super) fn sgd(
    tape: &mut Tape,
    params: &Tensors,
    velocity: &Tensors,
    grads: &Tensors,
    inertia: Inertia,
) -> Result<Tensors> {
    let lr = tape.scalar("lr");
    let terms = [(inertia.momentum, velocity), (Coef::ONE, grads), (inertia.weight_decay, params)];
    let new_velocity = Tensors::lin_comb(tape, &terms)?;
    let new_params = Tensors::lin_comb(tape, &[(Coef::ONE, params), (lr.times(-1.0), &new_velocity)])?;
    velocity.assign(tape, &new_velocity)?;
    Ok(new_params)
}

/// Cotangents that exist for every tensor asked for.
pub(super) fn complete(grads: Vec<Option<Tensor>>) -> Result<Vec<Tensor>> {
    let missing = || crate::Error::shape("vjp", "a parameter takes no part in the loss");
    grads.into_iter().map(|g| g.ok_or_else(missing)).collect()
}
