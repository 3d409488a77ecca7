//! Reverse-mode differentiation that appends to the tape it differentiates.

use super::{Coef, Source, Tape, Tensor};
use crate::error::{Error, Result};
use crate::ops::{Operation, PullbackArgs};

/// What becomes of the cotangents of a shared tensor that is used by every branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fan {
    /// They are summed over the branches before they travel further: the gradient of a sum of losses.
    Sum,
    /// They stay apart: M gradients of M losses, `g_m = ∇θ L_m(θ)` at one θ.
    Keep,
}

impl Tape {
    /// Vector-Jacobian product: for cotangents `seeds = [(y, ȳ)]` the cotangents of `wrt`, appended to this tape.
    ///
    /// Operations that none of `wrt` reaches are constants; nothing is recorded for them. `None` stands for a
    /// cotangent that is zero because no seed depends on that tensor. Intermediate tensors may stand in `wrt`.
    ///
    /// # Errors
    /// When a derivative is needed that the operation set does not contain.
    pub fn vjp(&mut self, seeds: &[(Tensor, Tensor)], wrt: &[Tensor], fan: Fan) -> Result<Vec<Option<Tensor>>> {
        let end = self.nodes.len();
        let mut depends = vec![false; self.metas.len()];
        for t in wrt {
            depends[t.index()] = true;
        }
        for node in &self.nodes {
            if node.inputs.iter().any(|t| depends[t.index()]) {
                node.outputs.iter().for_each(|t| depends[t.index()] = true);
            }
        }

        let mut contributions: Vec<Vec<Tensor>> = vec![Vec::new(); self.metas.len()];
        for (y, cot) in seeds {
            if !self.meta(*y).same_shape(self.meta(*cot)) {
                let what = format!("seed {} for {}", self.meta(*cot), self.meta(*y));
                return Err(Error::shape("vjp", what));
            }
            if depends[y.index()] {
                contributions[y.index()].push(*cot);
            }
        }

        let mut total: Vec<Option<Tensor>> = vec![None; contributions.len()];
        for n in (0..end).rev() {
            let outputs = self.nodes[n].outputs.clone();
            if outputs.iter().all(|t| contributions[t.index()].is_empty()) {
                continue;
            }
            let mut cots = Vec::with_capacity(outputs.len());
            for t in &outputs {
                let sum = self.sum_contributions(&contributions[t.index()])?;
                total[t.index()] = sum;
                cots.push(sum);
            }
            let (op, inputs) = (self.nodes[n].op.clone(), self.nodes[n].inputs.clone());
            let needs: Vec<bool> = inputs.iter().map(|t| depends[t.index()]).collect();
            if !needs.iter().any(|b| *b) {
                continue;
            }
            if fan == Fan::Keep {
                let branched = |t: &Tensor| self.meta(*t).per_branch;
                let summed = |(t, cot): (&Tensor, &Option<Tensor>)| !branched(t) && cot.as_ref().is_some_and(branched);
                if inputs.iter().any(branched) && outputs.iter().zip(&cots).any(summed) {
                    let what = "a sum over the branches has no gradients that stay apart".to_string();
                    return Err(Error::NotDifferentiable { op: op.name(), what });
                }
            }
            let args = PullbackArgs { inputs: &inputs, outputs: &outputs, cots: &cots, needs: &needs, fan };
            let grads = op.pullback(self, &args)?;
            for (t, grad) in inputs.iter().zip(grads) {
                if let Some(g) = grad.filter(|_| depends[t.index()]) {
                    contributions[t.index()].push(g);
                }
            }
        }
        wrt.iter()
            .map(|t| match self.sources[t.index()] {
                Source::Node(n) if (n as usize) < end && total[t.index()].is_some() => Ok(total[t.index()]),
                _ => self.sum_contributions(&contributions[t.index()]),
            })
            .collect()
    }

    fn sum_contributions(&mut self, parts: &[Tensor]) -> Result<Option<Tensor>> {
        match parts {
            [] => Ok(None),
            [one] => Ok(Some(*one)),
            many => {
                let terms: Vec<(Coef, Tensor)> = many.iter().map(|t| (Coef::ONE, *t)).collect();
                self.lin_comb(&terms).map(Some)
            }
        }
    }
}
