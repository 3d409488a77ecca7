//! Sum over samples and pixels per channel, and its transpose: biases and their gradients at every order.

use super::{Operation, PullbackArgs, widest};
use crate::error::Result;
use crate::tape::{Meta, Tape, Tensor};

/// `[N, C, H, W] → [C]`: sum over all but the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelSum {
    /// Shape of the operand.
    pub of: Meta,
}

/// `[C] → [N, C, H, W]`: the same value for every sample and pixel of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelBroadcast {
    /// Shape of the result.
    pub to: Meta,
}

impl Operation for ChannelSum {
    fn name(&self) -> &'static str {
        "channel_sum"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[self.of])?;
        Ok(vec![Meta::vector(self.of.dims[1]).with_branching(inputs[0].per_branch)])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None]) };
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.record1(ChannelBroadcast { to: self.of.shared() }, &[e], sum)?)])
    }
    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        widest(inputs, branches)
    }
}

impl Operation for ChannelBroadcast {
    fn name(&self) -> &'static str {
        "channel_broadcast"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[Meta::vector(self.to.dims[1])])?;
        Ok(vec![self.to.with_branching(inputs[0].per_branch)])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None]) };
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.channel_sum(e, sum)?)])
    }
    fn flops(&self, _: &[Meta], _: &[Meta], _: usize) -> u64 {
        0
    }
}

impl Tape {
    /// Sum of `x` over samples and pixels, per channel; with `sum` also over the branches.
    ///
    /// # Errors
    /// When `x` is no activation.
    pub fn channel_sum(&mut self, x: Tensor, sum: bool) -> Result<Tensor> {
        let of = self.meta(x).shared();
        self.record1(ChannelSum { of }, &[x], sum)
    }

    /// `x + b` with one bias per channel.
    ///
    /// # Errors
    /// When `b` does not have one value per channel of `x`.
    pub fn add_bias(&mut self, x: Tensor, b: Tensor) -> Result<Tensor> {
        let to = self.meta(x).shared();
        let b = self.record1(ChannelBroadcast { to }, &[b], false)?;
        self.add(x, b)
    }
}
