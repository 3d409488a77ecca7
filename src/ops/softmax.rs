//! Softmax with cross entropy and with Kullback-Leibler divergence, in closed form at first and second order.
//!
//! Logits are activations `[N, classes, 1, 1]`; `p = softmax(z)` per sample. Both losses are weighted sums over the
//! samples, so that a mean, a mean over kept samples and a mean over samples and classes are one operation.

use super::{Operation, PullbackArgs, any_branched, third_order};
use crate::error::Result;
use crate::tape::{Meta, Tape, Tensor};

macro_rules! head_op {
    ($(#[$doc:meta])* $name:ident, $text:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            /// Shape of the logits.
            pub logits: Meta,
        }
        impl $name {
            const NAME: &'static str = $text;
        }
    };
}

head_op!(
    /// `z → softmax(z)`.
    Softmax, "softmax"
);
head_op!(
    /// `(E, z, weights, s) → s · w_i · (p ⊙ (E − ⟨p, E⟩))`: the Jacobian of softmax, which is symmetric.
    SoftmaxJvp, "softmax_jvp"
);
head_op!(
    /// `(z, labels, weights) → Σ_i w_i · (−log p_i[label_i])`.
    CeLoss, "ce_loss"
);
head_op!(
    /// `(z, labels, weights, s) → s · w_i · (p_i − onehot(label_i))`.
    CeGrad, "ce_grad"
);
head_op!(
    /// `(z, target, weights) → Σ_i w_i · KL(target_i ‖ p_i)`; rows of the target sum to one.
    KlLoss, "kl_loss"
);
head_op!(
    /// `(z, target, weights, s) → s · w_i · (p_i − target_i)`.
    KlGrad, "kl_grad"
);

fn work(inputs: &[Meta], outputs: &[Meta], branches: usize, per_element: u64) -> u64 {
    super::widest(&[inputs, outputs].concat(), branches) * per_element
}

fn labels(z: &Meta) -> Meta {
    Meta::labels(z.dims[0])
}

fn weights(z: &Meta) -> Meta {
    Meta::vector(z.dims[0])
}

impl Operation for Softmax {
    fn name(&self) -> &'static str {
        Self::NAME
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[self.logits])?;
        Ok(inputs.to_vec())
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None]) };
        let ones = tape.fill(weights(&self.logits), crate::tape::Coef::ONE)?;
        let s = tape.fill(Meta::vector(1), crate::tape::Coef::ONE)?;
        let sum = args.sums(tape, 0);
        let op = SoftmaxJvp { logits: self.logits };
        Ok(vec![Some(tape.record1(op, &[e, args.inputs[0], ones, s], sum)?)])
    }
    fn flops(&self, i: &[Meta], o: &[Meta], branches: usize) -> u64 {
        work(i, o, branches, 5)
    }
}

impl Operation for SoftmaxJvp {
    fn name(&self) -> &'static str {
        Self::NAME
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let z = self.logits;
        super::expect(self.name(), inputs, &[z, z, weights(&z), Meta::vector(1)])?;
        Ok(vec![z.with_branching(any_branched(inputs))])
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        if args.needs[1..].iter().any(|n| *n) {
            return Err(third_order(self.name(), "the logits, the weights or the scale"));
        }
        let Some(e) = args.cots[0] else { return Ok(vec![None; 4]) };
        let sum = args.sums(tape, 0);
        let i = args.inputs;
        Ok(vec![Some(tape.record1(*self, &[e, i[1], i[2], i[3]], sum)?), None, None, None])
    }
    fn flops(&self, i: &[Meta], o: &[Meta], branches: usize) -> u64 {
        work(i, o, branches, 10)
    }
}

/// Rules common to the two losses and to their two gradients.
macro_rules! loss_and_grad {
    ($loss:ident, $grad:ident, $target:expr) => {
        impl Operation for $loss {
            fn name(&self) -> &'static str {
                Self::NAME
            }
            fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
                let z = self.logits;
                super::expect(self.name(), inputs, &[z, $target(&z), weights(&z)])?;
                Ok(vec![Meta::vector(1).with_branching(any_branched(inputs))])
            }
            fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
                if args.needs[1..].iter().any(|n| *n) {
                    return Err(third_order(self.name(), "the target or the weights"));
                }
                let Some(s) = args.cots[0] else { return Ok(vec![None; 3]) };
                let sum = args.sums(tape, 0);
                let i = args.inputs;
                let grad = tape.record1($grad { logits: self.logits }, &[i[0], i[1], i[2], s], sum)?;
                Ok(vec![Some(grad), None, None])
            }
            fn flops(&self, i: &[Meta], o: &[Meta], branches: usize) -> u64 {
                work(i, o, branches, 6)
            }
        }

        impl Operation for $grad {
            fn name(&self) -> &'static str {
                Self::NAME
            }
            fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
                let z = self.logits;
                super::expect(self.name(), inputs, &[z, $target(&z), weights(&z), Meta::vector(1)])?;
                Ok(vec![z.with_branching(any_branched(inputs))])
            }
            fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
                if args.needs[1..].iter().any(|n| *n) {
                    return Err(third_order(self.name(), "the target, the weights or the scale"));
                }
                let Some(e) = args.cots[0] else { return Ok(vec![None; 4]) };
                let sum = args.sums(tape, 0);
                let i = args.inputs;
                let jvp = SoftmaxJvp { logits: self.logits };
                let used = [e, i[0], i[2], i[3]];
                let grad = tape.record1(jvp, &used, sum)?;
                Ok(vec![Some(args.in_every_branch(tape, 0, &used, grad)?), None, None, None])
            }
            fn flops(&self, i: &[Meta], o: &[Meta], branches: usize) -> u64 {
                work(i, o, branches, 7)
            }
        }
    };
}

loss_and_grad!(CeLoss, CeGrad, labels);
loss_and_grad!(KlLoss, KlGrad, |z: &Meta| *z);

impl Tape {
    /// Class probabilities of logits.
    ///
    /// # Errors
    /// Never for logits of this tape.
    pub fn softmax(&mut self, logits: Tensor) -> Result<Tensor> {
        let meta = self.meta(logits).shared();
        self.record1(Softmax { logits: meta }, &[logits], false)
    }

    /// Weighted cross entropy of `logits` against class `labels`; one value, per branch if an operand is.
    ///
    /// # Errors
    /// When there is not one label and one weight per sample.
    pub fn ce_loss(&mut self, logits: Tensor, labels: Tensor, weights: Tensor) -> Result<Tensor> {
        let meta = self.meta(logits).shared();
        self.record1(CeLoss { logits: meta }, &[logits, labels, weights], false)
    }

    /// Weighted divergence `KL(target ‖ softmax(logits))`; one value, per branch if an operand is.
    ///
    /// # Errors
    /// When the target does not have the logits' shape or there is not one weight per sample.
    pub fn kl_loss(&mut self, logits: Tensor, target: Tensor, weights: Tensor) -> Result<Tensor> {
        let meta = self.meta(logits).shared();
        self.record1(KlLoss { logits: meta }, &[logits, target, weights], false)
    }
}
