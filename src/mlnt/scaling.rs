//! Powers of two by which cotangents are multiplied where they are kept in f16, and what happens when they overflow.
//!
//! A backward pass is linear in its seed: scaled there, all its cotangents are, and its gradients are divided by the scale where
//! they are used. Three passes have a scale of their own: that of the cross entropy (the inner gradients, the classification
//! gradient), that of the divergence at the fast weights, and the second-order one through the inner gradients. A cotangent
//! beyond f16 becomes infinite and makes the gradients that a step applies infinite or not a number: then every state keeps its
//! value, within the same run of the plan.

use super::names::Tensors;
use crate::error::Result;
use crate::tape::{Coef, Tape, Tensor};

/// Scales of a step; 1 where nothing is scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// Of the cotangents of cross entropy.
    pub inner: f64,
    /// Of the cotangents of the divergence at the fast weights.
    pub outer: f64,
    /// Of the second-order cotangents.
    pub second: f64,
    /// Whether the step is taken where its gradients are finite; else it only tells whether they are.
    pub apply: bool,
}

impl Scales {
    /// Nothing is scaled.
    pub const NONE: Scales = Scales { inner: 1.0, outer: 1.0, second: 1.0, apply: true };

    /// The value of a runtime scalar of a scaled step, by its name.
    pub(super) fn value(&self, name: &str) -> Option<f64> {
        Some(match name {
            "inner_scale" => self.inner,
            "inner_unscale" => 1.0 / self.inner,
            "outer_scale" => self.outer,
            "outer_unscale" => 1.0 / self.outer,
            "second_scale" => self.second,
            "second_unscale" => 1.0 / self.second,
            "tangent_scale" => self.second / (self.outer * self.inner),
            "apply" => f64::from(u8::from(self.apply)),
            _ => return None,
        })
    }
}

/// A scale on the tape: what seeds are multiplied with, and what undoes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    pub up: Coef,
    pub down: Coef,
}

impl Scale {
    const NONE: Scale = Scale { up: Coef::ONE, down: Coef::ONE };
}

/// The scales on the tape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scaling {
    pub inner: Scale,
    pub outer: Scale,
    pub second: Scale,
    /// What gradients at the fast weights, scaled as they are, are multiplied with as cotangents of the inner gradients, scaled as they are.
    pub tangent: Coef,
    scaled: bool,
}

impl Scaling {
    /// Runtime scalars, or ones where nothing is `scaled`.
    pub fn new(tape: &mut Tape, scaled: bool) -> Self {
        let mut scale = |up: &str, down: &str| match scaled {
            true => Scale { up: tape.scalar(up), down: tape.scalar(down) },
            false => Scale::NONE,
        };
        let inner = scale("inner_scale", "inner_unscale");
        let outer = scale("outer_scale", "outer_unscale");
        let second = scale("second_scale", "second_unscale");
        let tangent = if scaled { tape.scalar("tangent_scale") } else { Coef::ONE };
        Scaling { inner, outer, second, tangent, scaled }
    }

    /// Ends the record of a step whose states follow from `gradients`: where one is not finite, or the scalar `apply` is 0, all
    /// states keep their values. Output `finite` `[1]`: 1, or 0 where one is not.
    pub fn guard(&self, tape: &mut Tape, gradients: &[&Tensors]) -> Result<()> {
        if !self.scaled {
            return Ok(());
        }
        tape.set_phase("update");
        let all: Vec<Tensor> = gradients.iter().flat_map(|g| g.list()).collect();
        let finite = tape.all_finite(&all)?;
        tape.output("finite", finite);
        let apply = tape.scalar("apply");
        let guard = tape.lin_comb(&[(apply, finite)])?;
        tape.guard_assigns(guard)
    }
}

/// `c · x` tensor by tensor; x itself for c = 1.
pub(super) fn scaled(tape: &mut Tape, c: Coef, x: &Tensors) -> Result<Tensors> {
    if c == Coef::ONE { Ok(x.clone()) } else { Tensors::lin_comb(tape, &[(c, x)]) }
}
