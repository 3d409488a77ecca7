//! Linear combinations: residual sums, cotangent sums, fast weights, SGD, moving averages, sums over branches.

use super::{Operation, PullbackArgs, any_branched, third_order, widest};
use crate::error::{Error, Result};
use crate::tape::{Coef, Meta, Tape, Tensor};

/// `Σ_i c_i x_i` over operands of one shape; shared operands are broadcast to per-branch ones. In a shared
/// result a per-branch operand counts with the sum over its branches, a shared one once.
#[derive(Clone, Debug, PartialEq)]
pub struct LinComb {
    /// One coefficient per operand.
    pub coefs: Vec<Coef>,
    /// There is one more operand, a shared vector of one value: where it is 0 the result is the first operand as it is. All
    /// operands are shared then.
    pub guarded: bool,
}

impl LinComb {
    /// The combination with these coefficients.
    pub fn new(coefs: Vec<Coef>) -> Self {
        LinComb { coefs, guarded: false }
    }

    /// Those of its operands that are added up.
    pub fn terms<'a, T>(&self, inputs: &'a [T]) -> &'a [T] {
        &inputs[..self.coefs.len()]
    }
}

impl Operation for LinComb {
    fn name(&self) -> &'static str {
        if self.guarded { "guarded_lin_comb" } else { "lin_comb" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let Some(first) = inputs.first() else { return Err(Error::shape(self.name(), "no operands")) };
        let mut want = vec![*first; self.coefs.len()];
        want.extend(self.guarded.then_some(Meta::vector(1)));
        super::expect(self.name(), inputs, &want)?;
        if self.guarded && any_branched(inputs) {
            return Err(Error::shape(self.name(), "an operand per branch"));
        }
        Ok(vec![first.with_branching(any_branched(inputs))])
    }

    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None; args.inputs.len()]) };
        if self.guarded {
            return Err(third_order(self.name(), "an operand"));
        }
        let mut grads = Vec::with_capacity(args.inputs.len());
        let per_branch = tape.meta(e).per_branch;
        // A cotangent that is the same in every branch of the result.
        let repeated = !per_branch && tape.meta(args.outputs[0]).per_branch;
        for (i, coef) in self.coefs.iter().enumerate() {
            let sum = args.sums(tape, i) && per_branch;
            let coef = if args.sums(tape, i) && repeated { coef.times(tape.branches() as f64) } else { *coef };
            grads.push(match (args.needs[i], coef == Coef::ONE && !sum) {
                (false, _) => None,
                (true, true) => Some(e),
                (true, false) => Some(tape.record1(LinComb::new(vec![coef]), &[e], sum)?),
            });
        }
        Ok(grads)
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        let work = widest(&[inputs, outputs].concat(), branches);
        work * (2 * self.coefs.len() as u64 - 1)
    }
}

/// A tensor filled with one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fill {
    /// Shape of the tensor.
    pub meta: Meta,
    /// The number.
    pub value: Coef,
}

impl Operation for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::expect(self.name(), inputs, &[])?;
        Ok(vec![self.meta])
    }
    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(Vec::new())
    }
    fn flops(&self, _: &[Meta], _: &[Meta], _: usize) -> u64 {
        0
    }
}

impl Tape {
    /// `Σ_i c_i x_i`.
    ///
    /// # Errors
    /// When shapes differ or there are no terms.
    pub fn lin_comb(&mut self, terms: &[(Coef, Tensor)]) -> Result<Tensor> {
        let inputs: Vec<Tensor> = terms.iter().map(|t| t.1).collect();
        self.record1(LinComb::new(terms.iter().map(|t| t.0).collect()), &inputs, false)
    }

    /// `Σ_i c_i x_i` of shared tensors where the vector `guard` `[1]` is not 0, else the first of them as it is.
    ///
    /// # Errors
    /// When shapes differ or there are no terms.
    pub fn guarded_lin_comb(&mut self, terms: &[(Coef, Tensor)], guard: Tensor) -> Result<Tensor> {
        let inputs: Vec<Tensor> = terms.iter().map(|t| t.1).chain([guard]).collect();
        self.record1(LinComb { coefs: terms.iter().map(|t| t.0).collect(), guarded: true }, &inputs, false)
    }

    /// `a + b`.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn add(&mut self, a: Tensor, b: Tensor) -> Result<Tensor> {
        self.lin_comb(&[(Coef::ONE, a), (Coef::ONE, b)])
    }

    /// `c · x`.
    ///
    /// # Errors
    /// Never for a tensor of this tape.
    pub fn scale(&mut self, c: Coef, x: Tensor) -> Result<Tensor> {
        self.lin_comb(&[(c, x)])
    }

    /// `c · Σ_m x_m`; `c · x` for a shared tensor.
    ///
    /// # Errors
    /// Never for a tensor of this tape.
    pub fn scaled_sum_branches(&mut self, c: Coef, x: Tensor) -> Result<Tensor> {
        self.record1(LinComb::new(vec![c]), &[x], true)
    }

    /// `Σ_m x_m`; a shared tensor is returned as it is.
    ///
    /// # Errors
    /// Never for a tensor of this tape.
    pub fn sum_branches(&mut self, x: Tensor) -> Result<Tensor> {
        if self.meta(x).per_branch { self.scaled_sum_branches(Coef::ONE, x) } else { Ok(x) }
    }

    /// A tensor of shape `meta` filled with `value`.
    ///
    /// # Errors
    /// Never.
    pub fn fill(&mut self, meta: Meta, value: Coef) -> Result<Tensor> {
        self.record1(Fill { meta, value }, &[], false)
    }
}
