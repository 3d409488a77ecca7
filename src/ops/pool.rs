//! Global average pooling, and max-pooling as a choice of positions followed by a gather.
//!
//! The chosen positions are a constant of every derivative; gather and scatter are each other's transpose.

use super::{Operation, PullbackArgs, any_branched, widest};
use crate::error::{Error, Result};
use crate::tape::{DType, Kind, Meta, Tape, Tensor};

/// Global average pooling `[N, C, H, W] → [N, C, 1, 1]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvgPool {
    /// Shape of the operand.
    pub of: Meta,
}

/// Transpose of [`AvgPool`]: spreads `1/(H·W)` of each value over the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvgPoolBackward {
    /// Shape of the result.
    pub to: Meta,
}

fn pooled(of: &Meta) -> Meta {
    Meta::activation(of.dims[0], of.dims[1], 1, 1)
}

impl Operation for AvgPool {
    fn name(&self) -> &'static str {
        "avg_pool"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[self.of])?;
        Ok(vec![pooled(&self.of).with_branching(inputs[0].per_branch)])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None]) };
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.record1(AvgPoolBackward { to: self.of.shared() }, &[e], sum)?)])
    }
    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        widest(inputs, branches)
    }
}

impl Operation for AvgPoolBackward {
    fn name(&self) -> &'static str {
        "avg_pool_backward"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[pooled(&self.to)])?;
        Ok(vec![self.to.with_branching(inputs[0].per_branch)])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None]) };
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.record1(AvgPool { of: self.to.shared() }, &[e], sum)?)])
    }
    fn flops(&self, _: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        widest(outputs, branches)
    }
}

/// A pooling window over an image; padding never wins the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Height and width of the window.
    pub size: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Padding on every side; at most half the window.
    pub pad: usize,
    /// Shape of the image `[N, C, H, W]`.
    pub image: Meta,
    /// Shape of the pooled image `[N, C, P, Q]`.
    pub pooled: Meta,
}

impl Window {
    fn index(&self) -> Meta {
        Meta { dtype: DType::Index, ..self.pooled }
    }

    /// Whether position `at` of an image, `h·W + w`, lies in the window of position `p·Q + q` of the pooled image.
    pub fn holds(&self, pooled: usize, at: i32) -> bool {
        let ([_, _, h, w], [_, _, _, q]) = (self.image.dims, self.pooled.dims);
        let Some(at) = usize::try_from(at).ok().filter(|at| *at < h * w) else { return false };
        let inside = |place: usize, at: usize| {
            let from = place * self.stride;
            (from..from + self.size).contains(&(at + self.pad))
        };
        inside(pooled / q, at / w) && inside(pooled % q, at % w)
    }
}

/// A max-pooling.
#[derive(Clone, Copy, Debug)]
pub struct MaxPool {
    /// Its windows.
    pub window: Window,
    /// Positions of the maxima `[N, C, P, Q]`.
    pub index: Tensor,
    /// The maxima `[N, C, P, Q]`.
    pub y: Tensor,
}

/// `x → index`: for each window the position of its maximum in the image, `h·W + w`; the first one on ties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxPoolIndex(pub Window);

/// `(x, index) → y`: picks the positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolGather(pub Window);

/// `(dy, index) → dx`: adds each value at its position. Transpose of [`PoolGather`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolScatter(pub Window);

impl Operation for MaxPoolIndex {
    fn name(&self) -> &'static str {
        "max_pool_index"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[self.0.image])?;
        Ok(vec![self.0.index().with_branching(inputs[0].per_branch)])
    }
    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![None])
    }
    fn flops(&self, _: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        widest(outputs, branches) * (self.0.size * self.0.size) as u64
    }
}

impl Operation for PoolGather {
    fn name(&self) -> &'static str {
        "pool_gather"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[self.0.image, self.0.index()])?;
        Ok(vec![self.0.pooled.with_branching(any_branched(inputs))])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0].filter(|_| args.needs[0]) else { return Ok(vec![None, None]) };
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.record1(PoolScatter(self.0), &[e, args.inputs[1]], sum)?), None])
    }
    fn flops(&self, _: &[Meta], _: &[Meta], _: usize) -> u64 {
        0
    }
}

impl Operation for PoolScatter {
    fn name(&self) -> &'static str {
        "pool_scatter"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[self.0.pooled, self.0.index()])?;
        Ok(vec![self.0.image.with_branching(any_branched(inputs))])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0].filter(|_| args.needs[0]) else { return Ok(vec![None, None]) };
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.record1(PoolGather(self.0), &[e, args.inputs[1]], sum)?), None])
    }
    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        widest(inputs, branches)
    }
}

impl Tape {
    /// Mean over the image, per sample and channel.
    ///
    /// # Errors
    /// When `x` is no activation.
    pub fn avg_pool(&mut self, x: Tensor) -> Result<Tensor> {
        let of = self.meta(x).shared();
        self.record1(AvgPool { of }, &[x], false)
    }

    /// Maximum over windows of `size`×`size`.
    ///
    /// # Errors
    /// When `x` is no activation, the window does not fit, the stride is 0 or the padding exceeds half the window.
    pub fn max_pool(&mut self, x: Tensor, size: usize, stride: usize, pad: usize) -> Result<MaxPool> {
        let image = self.meta(x).shared();
        let [n, c, h, w] = image.dims;
        let fits = image.kind == Kind::Activation && stride > 0 && 2 * pad <= size;
        if !fits || h + 2 * pad < size || w + 2 * pad < size {
            return Err(Error::shape("max_pool", format!("{image}, window {size}, stride {stride}, padding {pad}")));
        }
        let pooled = Meta::activation(n, c, (h + 2 * pad - size) / stride + 1, (w + 2 * pad - size) / stride + 1);
        let window = Window { size, stride, pad, image, pooled };
        let index = self.record1(MaxPoolIndex(window), &[x], false)?;
        Ok(MaxPool { window, index, y: self.record1(PoolGather(window), &[x, index], false)? })
    }
}
