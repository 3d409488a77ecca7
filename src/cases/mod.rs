//! One table of cases for every operation of the set: it drives reference tests, gradient tests, device checks and
//! benchmarks, so that no two of them can disagree on what an operation must do.
//!
//! A [`Case`] is data: an operation, its operands with shapes, branching and the kind of numbers they hold, which
//! results are summed over the branches, and how far single precision may be off. [`all`] is the table of what stands on a tape,
//! [`planned`] that of what only the planner makes.

mod data;
mod expand;
mod fused;
mod table;

pub use data::{Bad, Data};
pub use expand::expand;
pub use fused::{Planned, planned, recomputed};
pub use table::all;

use crate::device::HostVec;
use crate::error::Result;
use crate::ops::{Op, Operation};
use crate::plan::{Cost, Plan, PlanOptions};
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
    /// precision, but for statistics, and depend on `seed`, the case's name and the operand's position alone.
    pub fn values(&self, seed: u64) -> Vec<HostVec> {
        let key = self.name.bytes().fold(0u64, |h, b| h.wrapping_mul(0x0100_0000_01b3) ^ u64::from(b));
        let draw = |(i, o): (usize, &Operand)| o.data.draw(&o.meta, self.branches, seed, key, i as u64);
        let mut values: Vec<HostVec> = self.operands.iter().enumerate().map(draw).collect();
        self.derive(&mut values);
        values
    }

    /// Computes those operands that are functions of others again: statistics of a batch.
    pub fn derive(&self, values: &mut [HostVec]) {
        for (i, operand) in self.operands.iter().enumerate() {
            if let Some(of) = operand.data.derived_from() {
                values[i] = operand.data.derive(&self.operands[of].meta, self.branches, &values[of]);
            }
        }
    }

    /// Floating-point operations and bytes by the plan's own accounting; `real_bytes` is the size of a real.
    ///
    /// # Errors
    /// As [`Case::record`].
    pub fn cost(&self, real_bytes: usize) -> Result<Cost> {
        Ok(Plan::build(&self.record()?.tape, &PlanOptions { fuse: false, ..PlanOptions::default() })?.cost(real_bytes))
    }

    /// Name of the operation.
    pub fn op_name(&self) -> &'static str {
        self.op.name()
    }
}
