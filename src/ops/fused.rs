//! Compositions that the planner makes for the CUDA kernels. They never stand on a tape, have no derivative, and the CPU device
//! does not know them: each is one launch in place of the named operations, and is tested against them.
//!
//! In all of them `norm` stands for the five operands of `h = relu(bn(x))` other than x: h is not in memory, it is computed again
//! wherever it is read, always in the same way, so that every reader sees the same ReLU mask.

use super::batch_norm::{BnBackward, BnDoubleBackward};
use super::conv::{Conv, ConvGeom, ConvKind};
use super::{Operation, PullbackArgs, any_branched, third_order, widest};
use crate::error::Result;
use crate::tape::{Meta, Tape, Tensor};

/// Which convolutions a [`FusedConv`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConvForm {
    /// `(x, w) → y = fprop(x, w)`
    Fprop,
    /// `(x, dy) → dw = wgrad(x, dy)`
    Wgrad,
    /// `(x, w, dy) → (dx, dw) = (dgrad(dy, w), wgrad(x, dy))`: both from one reading of `dy`.
    Backward,
    /// `(ẋ, ẇ, x, w) → ẏ = fprop(ẋ, w) + fprop(x, ẇ)`: one product whose inner dimension is that of both.
    Tangent,
}

/// One or two convolutions with what stands before and behind them.
///
/// Operands: those of the form; with `norm` then `g, b, mean, var` `[C]`, and x is the operand of the batch norm, the convolution's is
/// `relu(bn(x))`; with `start` last what is added to the first result. Results: those of the form; with `stats` then mean and
/// biased variance of the first result per channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FusedConv {
    /// Which convolutions.
    pub form: ConvForm,
    /// Their sizes.
    pub geom: ConvGeom,
    /// Batch norm and ReLU are applied to x as it is loaded; padding stays zero.
    pub norm: bool,
    /// Something is added to the first result: y, ẏ or dx. For [`ConvForm::Wgrad`], dw.
    pub start: bool,
    /// Mean and variance of y; only with [`ConvForm::Fprop`].
    pub stats: bool,
}

impl FusedConv {
    /// Number of the form's own operands.
    pub fn operands(&self) -> usize {
        match self.form {
            ConvForm::Fprop | ConvForm::Wgrad => 2,
            ConvForm::Backward => 3,
            ConvForm::Tangent => 4,
        }
    }

    /// Positions of `g, b, mean, var`, if there are any.
    pub fn norm_operands(&self) -> Option<[usize; 4]> {
        let first = self.operands();
        self.norm.then_some([first, first + 1, first + 2, first + 3])
    }

    /// Position of what is added to the first result, if there is anything.
    pub fn start_operand(&self) -> Option<usize> {
        self.start.then_some(self.operands() + if self.norm { 4 } else { 0 })
    }

    /// The operand to which the batch norm belongs.
    pub fn x_operand(&self) -> usize {
        if self.form == ConvForm::Tangent { 2 } else { 0 }
    }

    /// The form's operands and results.
    fn metas(&self) -> (Vec<Meta>, Vec<Meta>) {
        let (x, w, y) = (self.geom.x(), self.geom.weight(), self.geom.y());
        match self.form {
            ConvForm::Fprop => (vec![x, w], vec![y]),
            ConvForm::Wgrad => (vec![x, y], vec![w]),
            ConvForm::Backward => (vec![x, w, y], vec![x, w]),
            ConvForm::Tangent => (vec![x, w, x, w], vec![y]),
        }
    }
}

impl Operation for FusedConv {
    fn name(&self) -> &'static str {
        match self.form {
            ConvForm::Fprop => "conv2d_fused_fprop",
            ConvForm::Wgrad => "conv2d_fused_wgrad",
            ConvForm::Backward => "conv2d_backward",
            ConvForm::Tangent => "conv2d_tangent",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let (mut want, mut results) = self.metas();
        let channels = Meta::vector(self.geom.c);
        if self.norm {
            want.extend([channels; 4]);
        }
        want.extend(self.start.then_some(results[0]));
        super::expect(self.name(), inputs, &want)?;
        if self.stats {
            results.extend([Meta::vector(self.geom.k); 2]);
        }
        let branched = any_branched(inputs);
        Ok(results.into_iter().map(|meta| meta.with_branching(branched)).collect())
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        let conv = |kind, a: usize, b: usize, out: &Meta| {
            Conv { kind, geom: self.geom }.flops(&[inputs[a], inputs[b]], &[*out], branches)
        };
        let products = match self.form {
            ConvForm::Fprop => conv(ConvKind::Fprop, 0, 1, &outputs[0]),
            ConvForm::Wgrad => conv(ConvKind::Wgrad, 0, 1, &outputs[0]),
            ConvForm::Backward => conv(ConvKind::Dgrad, 2, 1, &outputs[0]) + conv(ConvKind::Wgrad, 0, 2, &outputs[1]),
            ConvForm::Tangent => {
                let y = self.geom.y();
                conv(ConvKind::Fprop, 0, 3, &y) + conv(ConvKind::Fprop, 2, 1, &y) + widest(outputs, branches)
            }
        };
        let norm = if self.norm { 2 * inputs[self.x_operand()].total(branches) as u64 } else { 0 };
        let start = if self.start { outputs[0].total(branches) as u64 } else { 0 };
        let stats = if self.stats { 4 * outputs[0].total(branches) as u64 } else { 0 };
        products + norm + start + stats
    }
}

/// `(x) → (mean, var)` per channel, biased variance: what [`BnForward`](super::BnForward) finds before it normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnStats;

impl Operation for BnStats {
    fn name(&self) -> &'static str {
        "bn_stats"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = inputs else { return Err(crate::Error::shape(self.name(), "takes one operand")) };
        super::expect(self.name(), inputs, &[Meta::activation(x.dims[0], x.dims[1], x.dims[2], x.dims[3])])?;
        Ok(vec![Meta::vector(x.dims[1]).with_branching(x.per_branch); 2])
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "the operand of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        4 * widest(inputs, branches)
    }
}

/// `(dy, x, g, b, mean, var[, start]) → (dx, dg, db)`: [`BnBackward`] with ReLU, its mask computed again from x, plus `start` in dx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnReluBackward {
    /// Something is added to dx.
    pub start: bool,
}

impl Operation for BnReluBackward {
    fn name(&self) -> &'static str {
        "bn_relu_backward_recomputed"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let Some((x, c)) = inputs.get(1).map(|x| (*x, Meta::vector(x.dims[1]))) else {
            return Err(crate::Error::shape(self.name(), "takes six operands"));
        };
        let mut want = vec![x, x, c, c, c, c];
        want.extend(self.start.then_some(x));
        super::expect(self.name(), inputs, &want)?;
        let branched = any_branched(inputs);
        Ok([x, c, c].map(|meta| meta.with_branching(branched)).to_vec())
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        let start = if self.start { outputs[0].total(branches) as u64 } else { 0 };
        BnBackward { relu: true }.flops(inputs, outputs, branches) + start
    }
}

/// `(ẋ, ġ, ḃ, dy, x, g, b, mean, var) → (ẏ, x̄, ḡ)`: [`BnDoubleBackward`] with ReLU, its mask computed again from x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnReluDoubleBackward;

impl Operation for BnReluDoubleBackward {
    fn name(&self) -> &'static str {
        "bn_relu_double_backward_recomputed"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let Some((x, c)) = inputs.get(4).map(|x| (*x, Meta::vector(x.dims[1]))) else {
            return Err(crate::Error::shape(self.name(), "takes nine operands"));
        };
        super::expect(self.name(), inputs, &[x, c, c, x, x, c, c, c, c])?;
        let branched = any_branched(inputs);
        Ok([x, x, c].map(|meta| meta.with_branching(branched)).to_vec())
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        BnDoubleBackward { relu: true }.flops(inputs, outputs, branches)
    }
}
