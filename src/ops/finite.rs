//! Whether numbers are finite: what decides if a step is taken.

use super::{Operation, PullbackArgs, any_branched, third_order};
use crate::error::{Error, Result};
use crate::tape::{Kind, Meta, Tape, Tensor};

/// `(x_1, …, x_n) → [1]`: 1 if no element of any operand is infinite or not a number, in no branch, else 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllFinite;

impl Operation for AllFinite {
    fn name(&self) -> &'static str {
        "all_finite"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        match inputs.iter().find(|m| m.kind == Kind::Activation) {
            _ if inputs.is_empty() => Err(Error::shape(self.name(), "no operands")),
            Some(activation) => Err(Error::shape(self.name(), format!("{activation} is no parameter"))),
            None => Ok(vec![Meta::vector(1).with_branching(any_branched(inputs))]),
        }
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "any operand"))
    }

    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        inputs.iter().map(|m| m.total(branches) as u64).sum()
    }
}

impl Tape {
    /// `[1]`: 1 if all elements of weights and vectors `x` are finite, in all branches, else 0.
    ///
    /// # Errors
    /// When there are none, or one is an activation.
    pub fn all_finite(&mut self, x: &[Tensor]) -> Result<Tensor> {
        self.record1(AllFinite, x, true)
    }
}
