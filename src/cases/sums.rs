//! Sums over samples and pixels: those that operations are given as operands, and those that convolutions find of their results.

use super::data::single;
use super::{Case, Planned};
use crate::device::HostVec;
use crate::error::Result;
use crate::ops::{BN_EPS, Epilogue, FusedConv, Op};
use crate::tape::Meta;

/// A sum per channel over samples and pixels of other operands, which are named by their positions. `norm`: `x, g, b, mean, var` of a
/// batch norm with a ReLU behind it, whose normalised x is x̂ and whose mask is m.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// `Σ m dy x̂`, the cotangent of the gain.
    Gain {
        /// The cotangent of the ReLU's result.
        dy: usize,
        /// The batch norm.
        norm: [usize; 5],
    },
    /// `Σ m dy`, the cotangent of the bias.
    Bias {
        /// The cotangent of the ReLU's result.
        dy: usize,
        /// The batch norm.
        norm: [usize; 5],
    },
    /// `⟨ẋ⟩`
    Mean {
        /// The tangent of x.
        x_dot: usize,
    },
    /// `ρ = ⟨x̂ẋ⟩`
    Correlation {
        /// The tangent of x.
        x_dot: usize,
        /// The batch norm.
        norm: [usize; 5],
    },
}

/// Operands of a case in one branch.
struct Branch<'a> {
    case: &'a Case,
    values: &'a [Vec<f64>],
    branch: usize,
}

impl Branch<'_> {
    fn of(&self, operand: usize) -> &[f64] {
        let meta = &self.case.operands[operand].meta;
        let from = if meta.per_branch { self.branch * meta.len() } else { 0 };
        &self.values[operand][from..from + meta.len()]
    }

    /// x̂ of `x, mean, var` at an element of a channel.
    fn hat(&self, [x, mean, var]: [usize; 3], channel: usize, at: usize) -> f64 {
        (self.of(x)[at] - self.of(mean)[channel]) / (self.of(var)[channel] + BN_EPS).sqrt()
    }

    /// x̂ of `x, g, b, mean, var`, and 1 where the ReLU lets it through, else 0.
    fn masked(&self, [x, g, b, mean, var]: [usize; 5], channel: usize, at: usize) -> (f64, f64) {
        let hat = self.hat([x, mean, var], channel, at);
        let passes = self.of(g)[channel] * hat + self.of(b)[channel] > 0.0;
        (hat, if passes { 1.0 } else { 0.0 })
    }
}

/// For every channel `Σ f(channel, i)` over the elements i of the channel in activations `[N, C, H, W]`.
fn per_channel(meta: &Meta, f: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let [n, c, h, w] = meta.dims;
    let sum = |channel: usize| {
        let pixels = (0..n).flat_map(|i| (i * c + channel) * h * w..(i * c + channel + 1) * h * w);
        pixels.map(|at| f(channel, at)).sum()
    };
    (0..c).map(sum).collect()
}

/// Samples and pixels of a channel.
fn count(meta: &Meta) -> f64 {
    (meta.len() / meta.dims[1].max(1)) as f64
}

impl Sum {
    /// The sums for `meta`, exact in single precision, of the operands of a case.
    pub(super) fn of(self, case: &Case, meta: &Meta, values: &[HostVec]) -> HostVec {
        let values: Vec<Vec<f64>> = values.iter().map(HostVec::to_f64).collect();
        let branches = if meta.per_branch { case.branches } else { 1 };
        let sums = (0..branches).flat_map(|branch| self.in_branch(&Branch { case, values: &values, branch }));
        HostVec::F64(sums.map(single).collect())
    }

    fn in_branch(self, branch: &Branch<'_>) -> Vec<f64> {
        let meta = |operand: usize| branch.case.operands[operand].meta;
        match self {
            Sum::Gain { dy, norm } => per_channel(&meta(dy), |c, at| {
                let (hat, passes) = branch.masked(norm, c, at);
                passes * branch.of(dy)[at] * hat
            }),
            Sum::Bias { dy, norm } => per_channel(&meta(dy), |c, at| branch.masked(norm, c, at).1 * branch.of(dy)[at]),
            Sum::Mean { x_dot } => {
                let count = count(&meta(x_dot));
                per_channel(&meta(x_dot), |_, at| branch.of(x_dot)[at] / count)
            }
            Sum::Correlation { x_dot, norm: [x, _, _, mean, var] } => {
                let count = count(&meta(x_dot));
                per_channel(&meta(x_dot), |c, at| branch.hat([x, mean, var], c, at) * branch.of(x_dot)[at] / count)
            }
        }
    }
}

/// What an epilogue must find of a result.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Position among the operation's results.
    pub result: usize,
    /// What it is.
    pub what: &'static str,
    /// Its values, branch by branch.
    pub values: Vec<f64>,
    /// The sizes of what is added up to these: the same sums of absolute values. Sums whose terms cancel are no more exact than that.
    pub sizes: Vec<f64>,
    /// What the numbers are statistics of, so that they can also be held against themselves.
    pub statistics: bool,
}

impl Planned {
    /// What the epilogue of a convolution must find of the first result, given this as it is in memory, branch by branch: later operations
    /// read both. Empty for operations that find nothing.
    ///
    /// # Errors
    /// As [`Planned::plan`].
    pub fn found(&self, values: &[HostVec], first: &HostVec) -> Result<Vec<Found>> {
        let Op::FusedConv(op) = self.case.op else { return Ok(Vec::new()) };
        let Some(results) = op.epilogue_results() else { return Ok(Vec::new()) };
        let values: Vec<Vec<f64>> = values.iter().map(HostVec::to_f64).collect();
        let (meta, first) = (self.case.results()?[0], first.to_f64());
        let of = Epilogues { case: &self.case, op, values: &values, meta, first: &first };
        let statistics = op.epilogue == Epilogue::Stats;
        let named = |(result, (what, [values, sizes])): (usize, (&'static str, Sums))| Found {
            result,
            what,
            values,
            sizes,
            statistics,
        };
        Ok(results.into_iter().zip(of.sums()).map(named).collect())
    }
}

/// What the sums of an epilogue are of.
struct Epilogues<'a> {
    case: &'a Case,
    op: FusedConv,
    values: &'a [Vec<f64>],
    /// The first result.
    meta: Meta,
    first: &'a [f64],
}

/// Sums, and the sums of the absolute values of their terms.
type Sums = [Vec<f64>; 2];

impl Epilogues<'_> {
    /// Sums of `f(branch, channel, element, its value)`.
    fn each(&self, f: impl Fn(usize, usize, usize, f64) -> f64) -> Sums {
        let branches = if self.meta.per_branch { self.case.branches } else { 1 };
        let all = |of: &dyn Fn(f64) -> f64| -> Vec<f64> {
            let branch = |m: usize| {
                let v = &self.first[m * self.meta.len()..][..self.meta.len()];
                per_channel(&self.meta, |c, at| of(f(m, c, at, v[at])))
            };
            (0..branches).flat_map(branch).collect()
        };
        [all(&|v| v), all(&f64::abs)]
    }

    fn branch(&self, branch: usize) -> Branch<'_> {
        Branch { case: self.case, values: self.values, branch }
    }

    fn sums(&self) -> Vec<(&'static str, Sums)> {
        let count = count(&self.meta);
        let mean = || self.each(|_, _, _, v| v / count);
        match (self.op.epilogue, self.op.epilogue_operands(), self.op.norm_operands()) {
            (Epilogue::Stats, ..) => {
                let [means, sizes] = mean();
                let off = |m: usize, c: usize, v: f64| v - means[m * self.meta.dims[1] + c];
                let variance = self.each(|m, c, _, v| off(m, c, v) * off(m, c, v) / count);
                vec![("mean", [means.clone(), sizes]), ("variance", variance)]
            }
            (Epilogue::BackwardSums, _, Some([g, b, mean, var])) => {
                let norm = [self.op.x_operand(), g, b, mean, var];
                let masked = |m: usize, c: usize, at: usize| self.branch(m).masked(norm, c, at);
                let gain = self.each(|m, c, at, v| {
                    let (hat, passes) = masked(m, c, at);
                    passes * v * hat
                });
                vec![("dg", gain), ("db", self.each(|m, c, at, v| masked(m, c, at).1 * v))]
            }
            (Epilogue::TangentSums, Some(next), _) => {
                let rho = self.each(|m, c, at, v| v * self.branch(m).hat(next, c, at) / count);
                vec![("mean", mean()), ("rho", rho)]
            }
            _ => Vec::new(),
        }
    }
}
