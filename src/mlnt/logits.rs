//! A step in two plans, for losses that the host computes: the first gives the logits of a training-mode forward, the
//! second takes the loss's gradient at them. The forward is done twice, 4F in place of 3F a network; in exchange a loss
//! may be anything that a few lines of host code can differentiate, and may compare networks with each other.

use super::ce::{CeSpec, Descent, images};
use super::names::{Inertia, StateKind, Tensors};
use crate::error::Result;
use crate::model::{ModelSpec, Scope};
use crate::tape::{Meta, Tape};

/// Name of the first plan's output for network number `i`: its logits `[k, classes]`.
pub fn logits_name(i: usize) -> String {
    format!("logits.{i}")
}

/// Name of the second plan's input for network number `i`: a gradient at its logits `[k, classes]`.
pub fn gradient_name(i: usize) -> String {
    format!("logits_gradient.{i}")
}

/// Records the training-mode forward of the networks of `owners` on one batch; it changes no state, running statistics
/// included.
///
/// Input `x`; outputs as [`logits_name`] has it.
///
/// # Errors
/// When the description is no network.
pub fn record_logits(model: &ModelSpec, batch: usize, owners: &[&str]) -> Result<Tape> {
    model.check()?;
    let mut tape = Tape::new(1);
    let x = images(&mut tape, model, batch)?;
    tape.set_phase("forward");
    for (i, owner) in owners.iter().enumerate() {
        let params = Tensors::states(&mut tape, model, owner, StateKind::Param)?;
        let mut scope = Scope::train(&params.by_name);
        let out = model.forward(&mut tape, &mut scope, x)?;
        tape.output(logits_name(i), out.logits);
    }
    Ok(tape)
}

/// Records one SGD step of each of the networks of `owners` on the batch that [`record_logits`] has seen, along
/// given gradients at the logits. Running statistics are updated here, once.
///
/// Inputs `x`, and as [`gradient_name`] has it; scalar `lr`; states as the student's, prefixed with the owner.
///
/// # Errors
/// When the description is no network.
pub fn record_descent(spec: &CeSpec, owners: &[&str]) -> Result<Tape> {
    spec.model.check()?;
    let mut tape = Tape::new(1);
    let x = images(&mut tape, &spec.model, spec.batch)?;
    for (i, owner) in owners.iter().enumerate() {
        let descent = Descent::forward(&mut tape, &spec.model, owner, x)?;
        let gradient = tape.input(&gradient_name(i), Meta::activation(spec.batch, spec.model.classes, 1, 1))?;
        let logits = descent.logits;
        descent.update(&mut tape, (logits, gradient), Inertia::constant(spec))?;
    }
    Ok(tape)
}
