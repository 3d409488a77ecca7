//! Plain cross-entropy training and evaluation, on the same engine.

use super::names::{Inertia, StateKind, Tensors, complete, sgd, update_buffers};
use crate::error::Result;
use crate::model::{BnUpdate, ModelSpec, Scope};
use crate::tape::{Coef, Fan, Meta, Tape, Tensor};

/// A cross-entropy step: what decides its plan.
#[derive(Clone, Debug)]
pub struct CeSpec {
    /// The network.
    pub model: ModelSpec,
    /// k, samples of a batch.
    pub batch: usize,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Weight decay, added to the gradient of every parameter.
    pub weight_decay: f64,
}

/// Images of a batch as an input of the plan.
pub(super) fn images(tape: &mut Tape, model: &ModelSpec, batch: usize) -> Result<Tensor> {
    let [h, w] = model.size;
    tape.input("x", Meta::activation(batch, model.in_channels, h, w))
}

/// Records one SGD step on cross entropy for the network of `owner`.
///
/// Inputs `x`, `y`; scalar `lr`; outputs `class_loss`, `class_logits`; states as the student's, prefixed with `owner`.
///
/// # Errors
/// When the description is no network.
pub fn record_ce_step(spec: &CeSpec, owner: &str) -> Result<Tape> {
    spec.model.check()?;
    let mut tape = Tape::new(1);
    let x = images(&mut tape, &spec.model, spec.batch)?;
    let y = tape.input("y", Meta::labels(spec.batch))?;
    tape.set_phase("forward");
    let weights = tape.fill(Meta::vector(spec.batch), Coef::constant(1.0 / spec.batch as f64))?;
    descend(&mut tape, &spec.model, owner, [x, y, weights], Inertia::constant(spec))?;
    Ok(tape)
}

/// Records one SGD step of the student on the cross entropy of the samples that a filter keeps, with a teacher that
/// follows it: `θ̃ ← γ θ̃ + (1−γ) θ`, with running statistics of its own forward on the batch.
///
/// Inputs `x`, `y`, `class_weight` `[k]`; scalars `lr`, `momentum`, `weight_decay`, `gamma`; outputs `class_loss`,
/// `class_logits`; states as in [`record_step`](super::record_step).
///
/// # Errors
/// When the description is no network.
pub fn record_filtered_ce_step(model: &ModelSpec, batch: usize) -> Result<Tape> {
    model.check()?;
    let mut tape = Tape::new(1);
    let x = images(&mut tape, model, batch)?;
    let y = tape.input("y", Meta::labels(batch))?;
    let weights = tape.input("class_weight", Meta::vector(batch))?;
    tape.set_phase("T teacher");
    let teacher = Tensors::states(&mut tape, model, "teacher.", StateKind::Param)?;
    let buffers = Tensors::states(&mut tape, model, "teacher.", StateKind::Buffer)?;
    let mut scope = Scope::train(&teacher.by_name);
    model.forward(&mut tape, &mut scope, x)?;
    let updates = scope.bn_updates;
    update_buffers(&mut tape, &buffers, &updates)?;
    let inertia = Inertia::scalars(&mut tape);
    let student = descend(&mut tape, model, "", [x, y, weights], inertia)?;
    let (gamma, rest) = (tape.scalar("gamma"), tape.scalar("one_minus_gamma"));
    let moved = Tensors::lin_comb(&mut tape, &[(gamma, &teacher), (rest, &student)])?;
    teacher.assign(&mut tape, &moved)?;
    Ok(tape)
}

/// One SGD step of the network of `owner` on `Σ weights·CE` of images x with labels y; returns its new parameters.
fn descend(
    tape: &mut Tape,
    model: &ModelSpec,
    owner: &str,
    [x, y, weights]: [Tensor; 3],
    inertia: Inertia,
) -> Result<Tensors> {
    let descent = Descent::forward(tape, model, owner, x)?;
    let loss = tape.ce_loss(descent.logits, y, weights)?;
    tape.output("class_loss", loss);
    tape.output("class_logits", descent.logits);
    tape.set_phase("backward");
    let one = tape.fill(Meta::vector(1), Coef::ONE)?;
    descent.update(tape, (loss, one), inertia)
}

/// A network between the forward and the backward pass of an SGD step.
pub(super) struct Descent {
    params: Tensors,
    velocity: Tensors,
    buffers: Tensors,
    updates: Vec<BnUpdate>,
    pub logits: Tensor,
}

impl Descent {
    /// The training-mode forward of the network of `owner` on images x.
    pub fn forward(tape: &mut Tape, model: &ModelSpec, owner: &str, x: Tensor) -> Result<Self> {
        let params = Tensors::states(tape, model, owner, StateKind::Param)?;
        let velocity = Tensors::states(tape, model, owner, StateKind::Momentum)?;
        let buffers = Tensors::states(tape, model, owner, StateKind::Buffer)?;
        tape.set_phase("forward");
        let mut scope = Scope::train(&params.by_name);
        let out = model.forward(tape, &mut scope, x)?;
        let updates = scope.bn_updates;
        Ok(Descent { params, velocity, buffers, updates, logits: out.logits })
    }

    /// The step for a cotangent of a tensor that depends on the logits; returns the new parameters.
    pub fn update(self, tape: &mut Tape, seed: (Tensor, Tensor), inertia: Inertia) -> Result<Tensors> {
        tape.set_phase("backward");
        let grads = complete(tape.vjp(&[seed], &self.params.list(), Fan::Sum)?)?;
        tape.set_phase("update");
        update_buffers(tape, &self.buffers, &self.updates)?;
        let grads = self.params.with(grads);
        let new = sgd(tape, &self.params, &self.velocity, &grads, inertia)?;
        self.params.assign(tape, &new)?;
        Ok(new)
    }
}

/// Records an evaluation of the network of `owner` with its running statistics.
///
/// Input `x`; outputs `probabilities` `[N, classes, 1, 1]` and `features` `[N, features, 1, 1]`.
///
/// # Errors
/// When the description is no network.
pub fn record_eval(model: &ModelSpec, batch: usize, owner: &str) -> Result<Tape> {
    model.check()?;
    let mut tape = Tape::new(1);
    tape.set_phase("evaluation");
    let x = images(&mut tape, model, batch)?;
    let params = Tensors::states(&mut tape, model, owner, StateKind::Param)?;
    let buffers = Tensors::states(&mut tape, model, owner, StateKind::Buffer)?;
    let mut scope = Scope::eval(&params.by_name, &buffers.by_name);
    let out = model.forward(&mut tape, &mut scope, x)?;
    let p = tape.softmax(out.logits)?;
    tape.output("probabilities", p);
    tape.output("features", out.features);
    Ok(tape)
}
