//! One table of cases for every operation of the set: it drives reference tests, gradient tests, device checks and
//! benchmarks, so that no two of them can disagree on what an operation must do.
//!
//! A [`Case`] is data: an operation, its operands with shapes, branching and the kind of numbers they hold, which
//! results are summed over the branches, and how far single precision may be off. [`all`] is the table of what stands on a tape.
//! A [`Planned`] case is one in a plan of its own for a device that runs the kernels, beside the plain operations that it stands for:
//! [`planned`] is the table of what only the planner makes, and [`every`] that of all operations.

mod conv;
mod conv_table;
mod data;
mod expand;
mod norm;
mod plan;
mod sums;
mod table;
mod update;

pub use conv::{Mixture, NEXT, NORM, RESIDUAL, X, Y};
pub use conv_table::{LOADED, convolutions};
pub use data::{Bad, Data};
pub use expand::expand;
pub use norm::{applied, batch_norm, recomputed};
pub use plan::{Planned, Tolerance, every, planned};
pub use sums::{Found, Sum};
pub use table::all;
pub use update::updates;

use crate::device::HostVec;
use crate::error::Result;
use crate::ops::{Op, Operation};
use crate::tape::{Meta, Tape, Tensor};

/// An operand of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    /// Its name in the operation's formula; also the name of the input that [`Case::record`] makes for it.
    pub name: &'static str,
    /// Shape and branching.
    pub meta: Meta,
    /// The numbers it holds.
    pub data: Data,
    /// Whether the operation set holds the derivative with respect to it.
    pub differentiable: bool,
}

/// One operation on operands of given shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Unique in the table: operation, sizes, branching.
    pub name: String,
    /// The operation.
    pub op: Op,
    /// M.
    pub branches: usize,
    /// Its operands, in order.
    pub operands: Vec<Operand>,
    /// For every result whether it is summed over the branches.
    pub sum: Vec<bool>,
    /// Largest relative deviation of a result in single precision, in the Euclidean norm.
    pub tolerance: f64,
    /// An operation that only the planner makes; it has no derivative of its own.
    pub fused: bool,
}

/// A case on a tape of its own.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The tape: one input per operand, one node, and one output `out0`, `out1`, … per result.
    pub tape: Tape,
    /// The operands.
    pub operands: Vec<Tensor>,
    /// The results.
    pub results: Vec<Tensor>,
}

impl Case {
    /// A case under the name that its parts give it; `sizes`: what `op` and the operands' branching leave open. Its tolerance is
    /// 1e-5, and it is of the planner if `op` is for kernels alone.
    pub(crate) fn new(op: Op, sizes: &str, branches: usize, operands: Vec<Operand>, sum: &[bool]) -> Self {
        let branched: Vec<&str> = operands.iter().filter(|o| o.meta.per_branch).map(|o| o.name).collect();
        let branching = match branched.is_empty() {
            true => "shared".to_string(),
            false => format!("M={branches} of {}", branched.join(" ")),
        };
        let summed: Vec<String> = (0..sum.len()).filter(|&i| sum[i]).map(|i| i.to_string()).collect();
        let summed = match (summed.is_empty(), sum.len()) {
            (true, _) => String::new(),
            (false, 1) => " summed".to_string(),
            (false, _) => format!(" summed {}", summed.join(" ")),
        };
        let name = format!("{} {sizes} {branching}{summed}", op.name());
        let fused = op.is_for_kernels();
        Case { name, op, branches, operands, sum: sum.to_vec(), tolerance: 1e-5, fused }
    }

    /// Records the case.
    ///
    /// # Errors
    /// When the table holds operands that the operation refuses.
    pub fn record(&self) -> Result<Recorded> {
        let mut tape = Tape::new(self.branches);
        tape.set_phase("case");
        let operands = self.operands.iter().map(|o| tape.input(o.name, o.meta)).collect::<Result<Vec<_>>>()?;
        let results = tape.record(self.op.clone(), &operands, &self.sum)?;
        results.iter().enumerate().for_each(|(i, t)| tape.output(format!("out{i}"), *t));
        Ok(Recorded { tape, operands, results })
    }

    /// Shapes and branching of the results.
    ///
    /// # Errors
    /// As [`Case::record`].
    pub fn results(&self) -> Result<Vec<Meta>> {
        let recorded = self.record()?;
        Ok(recorded.results.iter().map(|t| *recorded.tape.meta(*t)).collect())
    }

    /// Numbers for the operands, branch by branch, activations in `[N, C, H, W]` order. They are exact in single
    /// precision, but for statistics of a batch, and depend on `seed`, the case's name and the operand's position alone.
    pub fn values(&self, seed: u64) -> Vec<HostVec> {
        let key = self.name.bytes().fold(0u64, |h, b| h.wrapping_mul(0x0100_0000_01b3) ^ u64::from(b));
        let draw = |(i, o): (usize, &Operand)| o.data.draw(&o.meta, self.branches, seed, key, i as u64);
        let mut values: Vec<HostVec> = self.operands.iter().enumerate().map(draw).collect();
        self.derive(&mut values);
        values
    }

    /// Computes those operands that are functions of others again: statistics of a batch, and sums.
    pub fn derive(&self, values: &mut [HostVec]) {
        for (i, operand) in self.operands.iter().enumerate() {
            let derived = match (operand.data, operand.data.derived_from()) {
                (Data::Sum(sum), _) => sum.of(self, &operand.meta, values),
                (data, Some(of)) => data.derive(&self.operands[of].meta, self.branches, &values[of]),
                (_, None) => continue,
            };
            values[i] = derived;
        }
    }

    /// Name of the operation.
    pub fn op_name(&self) -> &'static str {
        self.op.name()
    }
}
