//! Batch normalisation with its first- and second-order rules, each one fused operation.
//!
//! With x̂ = (x−μ)r, r = 1/√(σ²+ε), ⟨·⟩ the mean over samples and pixels of a channel:
//! * forward `y = g·x̂ + b`
//! * backward `dx = g r (dy − ⟨dy⟩ − x̂⟨dy·x̂⟩)`, `dg = Σ dy·x̂`, `db = Σ dy`
//! * its pullback for cotangents (ẋ, ġ, ḃ) of (dx, dg, db), with `ρ = ⟨x̂ẋ⟩`, `x̂' = r(ẋ − ⟨ẋ⟩ − x̂ρ)`, `r' = −r²ρ`:
//!   `ẏ = g x̂' + ġ x̂ + ḃ` for dy,
//!   `x̄ = (ġ r + g r')(dy − ⟨dy⟩ − x̂⟨dy x̂⟩) − g r (x̂'⟨dy x̂⟩ + x̂⟨dy x̂'⟩)` for x, and `ḡ = Σ dy x̂'` for g.
//!
//! The statistics are results of the forward operation, so that they are computed once and feed the running
//! averages; every rule differentiates through them, so they count as constants on the tape.
//! With `relu` (set by the planner only) the forward ends in max(·, 0), and backward and double backward mask `dy`,
//! and the double backward its `ẏ`, where the forward's result, an additional last operand, is not positive.

use super::{Operation, PullbackArgs, any_branched, third_order, widest};
use crate::error::{Error, Result};
use crate::tape::{Kind, Meta, Tape, Tensor};

/// ε of the variance, PyTorch's default.
pub const BN_EPS: f64 = 1e-5;

/// `(x, g, b) → (y, mean, var)`; biased variance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnForward {
    /// Ends in a ReLU.
    pub relu: bool,
}

/// `(dy, x, g, mean, var[, y]) → (dx, dg, db)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnBackward {
    /// `dy` is masked by `y > 0` first.
    pub relu: bool,
}

/// `(ẋ, ġ, ḃ, dy, x, g, mean, var[, y]) → (ẏ, x̄, ḡ)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnDoubleBackward {
    /// `dy` and the result `ẏ` are masked by `y > 0`.
    pub relu: bool,
}

/// `(x, g, b, mean, var) → y` with given statistics: evaluation. It is not differentiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnEval {
    /// Ends in a ReLU.
    pub relu: bool,
}

fn channels(op: &'static str, x: &Meta) -> Result<Meta> {
    match x.kind {
        Kind::Activation => Ok(Meta::vector(x.dims[1])),
        _ => Err(Error::shape(op, format!("{x} is no activation"))),
    }
}

fn operand(op: &'static str, inputs: &[Meta], i: usize) -> Result<Meta> {
    let count = inputs.len();
    inputs.get(i).copied().ok_or_else(|| Error::shape(op, format!("only {count} operands")))
}

impl Operation for BnForward {
    fn name(&self) -> &'static str {
        if self.relu { "bn_relu_forward" } else { "bn_forward" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = operand(self.name(), inputs, 0)?;
        let c = channels(self.name(), &x)?;
        super::expect(self.name(), inputs, &[x, c, c])?;
        let stats = c.with_branching(x.per_branch);
        Ok(vec![x.with_branching(any_branched(inputs)), stats, stats])
    }

    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        if args.cots[1].or(args.cots[2]).is_some() || self.relu {
            return Err(third_order(self.name(), "the operands through the statistics alone"));
        }
        let Some(dy) = args.cots[0] else { return Ok(vec![None; 3]) };
        let (i, o) = (args.inputs, args.outputs);
        let sums = [args.sums(tape, 0), args.sums(tape, 1), args.sums(tape, 2)];
        let used = [dy, i[0], i[1], o[1], o[2]];
        let grads = tape.record(BnBackward { relu: false }, &used, &sums)?;
        grads.into_iter().enumerate().map(|(i, g)| args.in_every_branch(tape, i, &used, g).map(Some)).collect()
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        // Σ, Σ², scale and shift.
        widest(inputs, branches) * 4 + widest(outputs, branches) * 2
    }
}

impl Operation for BnBackward {
    fn name(&self) -> &'static str {
        if self.relu { "bn_relu_backward" } else { "bn_backward" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = operand(self.name(), inputs, 1)?;
        let c = channels(self.name(), &x)?;
        let mut want = vec![x, x, c, c, c];
        want.extend(self.relu.then_some(x));
        super::expect(self.name(), inputs, &want)?;
        let branched = any_branched(inputs);
        Ok(vec![x.with_branching(branched), c.with_branching(branched), c.with_branching(branched)])
    }

    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        if self.relu {
            return Err(third_order(self.name(), "operands of a fused operation"));
        }
        if args.cots.iter().all(Option::is_none) {
            return Ok(vec![None; 5]);
        }
        let mut operands = Vec::with_capacity(8);
        for i in 0..3 {
            operands.push(args.cot_or_zeros(tape, i)?);
        }
        operands.extend_from_slice(args.inputs);
        let sums = [args.sums(tape, 0), args.sums(tape, 1), args.sums(tape, 2)];
        let out = tape.record(BnDoubleBackward { relu: false }, &operands, &sums)?;
        Ok(vec![Some(out[0]), Some(out[1]), Some(out[2]), None, None])
    }

    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        widest(inputs, branches) * 10
    }
}

impl Operation for BnDoubleBackward {
    fn name(&self) -> &'static str {
        if self.relu { "bn_relu_double_backward" } else { "bn_double_backward" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = operand(self.name(), inputs, 4)?;
        let c = channels(self.name(), &x)?;
        let mut want = vec![x, c, c, x, x, c, c, c];
        want.extend(self.relu.then_some(x));
        super::expect(self.name(), inputs, &want)?;
        let branched = any_branched(inputs);
        Ok(vec![x.with_branching(branched), x.with_branching(branched), c.with_branching(branched)])
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "any operand"))
    }

    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        widest(inputs, branches) * 28
    }
}

impl Operation for BnEval {
    fn name(&self) -> &'static str {
        if self.relu { "bn_relu_eval" } else { "bn_eval" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = operand(self.name(), inputs, 0)?;
        let c = channels(self.name(), &x)?;
        super::expect(self.name(), inputs, &[x, c, c, c, c])?;
        Ok(vec![x.with_branching(any_branched(inputs))])
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "an operand: it is for evaluation only"))
    }

    fn flops(&self, _: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        widest(outputs, branches) * 2
    }
}

/// Result and statistics of a training-mode batch norm.
#[derive(Clone, Copy, Debug)]
pub struct BnResult {
    /// The normalised activations.
    pub y: Tensor,
    /// Batch mean per channel.
    pub mean: Tensor,
    /// Biased batch variance per channel.
    pub var: Tensor,
}

impl Tape {
    /// Batch norm with batch statistics, gain `g` and bias `b` per channel.
    ///
    /// # Errors
    /// When `x` is no activation or `g`, `b` do not have one value per channel.
    pub fn batch_norm(&mut self, x: Tensor, g: Tensor, b: Tensor) -> Result<BnResult> {
        let out = self.record(BnForward { relu: false }, &[x, g, b], &[])?;
        Ok(BnResult { y: out[0], mean: out[1], var: out[2] })
    }

    /// Batch norm with the given statistics.
    ///
    /// # Errors
    /// When a vector does not have one value per channel of `x`.
    pub fn batch_norm_eval(&mut self, x: Tensor, g: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Result<Tensor> {
        self.record1(BnEval { relu: false }, &[x, g, b, mean, var], false)
    }
}
