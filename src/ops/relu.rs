//! ReLU and the mask it leaves behind. The mask passes through every order of differentiation unchanged.

use super::{Operation, PullbackArgs, any_branched, widest};
use crate::error::{Error, Result};
use crate::tape::{Meta, Tape, Tensor};

/// `y = max(x, 0)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relu;

/// `(x, reference) → x` where the reference is positive, else 0. Linear in `x`, constant in the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask;

impl Operation for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = inputs else { return Err(Error::shape(self.name(), "takes one operand")) };
        Ok(vec![*x])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None]) };
        // y > 0 exactly where x > 0, and y is kept anyway as the next convolution's input.
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.mask(e, args.outputs[0], sum)?)])
    }
    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        widest(inputs, branches)
    }
}

impl Operation for Mask {
    fn name(&self) -> &'static str {
        "mask"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, _] = inputs else { return Err(Error::shape(self.name(), "takes two operands")) };
        super::expect(self.name(), inputs, &[*x, *x])?;
        Ok(vec![x.with_branching(any_branched(inputs))])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0].filter(|_| args.needs[0]) else { return Ok(vec![None, None]) };
        let sum = args.sums(tape, 0);
        Ok(vec![Some(tape.mask(e, args.inputs[1], sum)?), None])
    }
    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        widest(inputs, branches)
    }
}

impl Tape {
    /// `max(x, 0)`.
    ///
    /// # Errors
    /// Never for a tensor of this tape.
    pub fn relu(&mut self, x: Tensor) -> Result<Tensor> {
        self.record1(Relu, &[x], false)
    }

    /// `x` where `reference > 0`, else 0; with `sum` summed over the branches.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn mask(&mut self, x: Tensor, reference: Tensor, sum: bool) -> Result<Tensor> {
        self.record1(Mask, &[x, reference], sum)
    }
}
