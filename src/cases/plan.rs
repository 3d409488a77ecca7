//! Cases in plans of their own, for devices that run the kernels: in one width or with activations of 16 bits, with the plain operations
//! that they stand for, and how far each result may be off.

use super::conv_table::convolutions;
use super::expand::expand;
use super::norm::{applied, recomputed};
use super::update::updates;
use super::{Case, all};
use crate::device::HostVec;
use crate::error::Result;
use crate::ops::Op;
use crate::plan::{Plan, PlanOptions};
use crate::tape::{Coef, DType, Kind, Meta, Tape};

/// Largest relative error of what is computed in single precision.
const SINGLE: f64 = 1e-5;

/// The position of a result's bit in [`Planned::inside`] is this, plus its number.
pub(super) const RESULT: usize = 32;

/// Largest relative deviation in the Euclidean norm, by the type that operands of products are rounded to. In f16 and bf16 activations may
/// lie in 16 bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Without rounding.
    pub f32: f64,
    /// Rounded to 10 bits behind the leading one.
    pub tf32: f64,
    /// Rounded to half precision.
    pub f16: f64,
    /// Rounded to bfloat16.
    pub bf16: f64,
}

impl Tolerance {
    /// Of convolutions on operands of the tape.
    const CONV: Tolerance = Tolerance { f32: 1e-5, tf32: 3e-3, f16: 3e-3, bf16: 3e-2 };
    /// Of fused convolutions: twice to three times what the cases come to.
    const FUSED: Tolerance = Tolerance { f32: 1e-6, tf32: 1.5e-3, f16: 1.5e-3, bf16: 1e-2 };

    /// The same in all types.
    fn same(most: f64) -> Self {
        Tolerance { f32: most, tf32: most, f16: most, bf16: most }
    }

    /// Of a single-precision number that is rounded to 16 bits where it is `narrow`: off by half a unit of the last place more. What is exact in
    /// single precision is an operand as it is, or one that needs no rounding.
    fn stored(most: f64, narrow: bool) -> Self {
        let unit = |bits: i32| if narrow && most > 0.0 { most + f64::exp2(-f64::from(bits)) } else { most };
        Tolerance { f16: unit(11), bf16: unit(8), ..Tolerance::same(most) }
    }

    /// Of a cotangent that a convolution keeps: as exact as its width, whatever the products' operands are rounded to.
    fn kept(narrow: bool) -> Self {
        let wide = Tolerance::same(1e-6);
        if narrow { Tolerance { f16: 4e-4, bf16: 3e-3, ..wide } } else { wide }
    }
}

/// A case in a plan of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// The operation and its operands.
    pub case: Case,
    /// Operands (bit i: operand i) and results (bit 32 + i: result i) that are the plan's own, so that activations among them may
    /// take 16 bits; the others are read and written by the host, in 32 bits.
    pub inside: u64,
}

impl Planned {
    /// A case of an operation of the tape. All its activations take 16 bits where they may, but for convolutions, whose widths the table of
    /// the fused ones mixes.
    pub fn plain(case: Case) -> Self {
        let inside = if matches!(case.op, Op::Conv(_)) { 0 } else { u64::MAX };
        Planned { case, inside }
    }

    /// The operation as a plan for a device that runs the kernels: an input per operand, an output `out0`, `out1`, … per result.
    /// `half`: activations take 16 bits where they may.
    ///
    /// # Errors
    /// When the operation refuses its operands.
    pub fn plan(&self, half: bool) -> Result<Plan> {
        let Planned { case, inside } = self;
        let mut tape = Tape::new(case.branches);
        tape.set_phase("case");
        // What only the planner makes also works in place, on tensors of the plan.
        let owns = half || case.op.is_for_kernels();
        let apart = |i: usize, meta: &Meta| owns && inside >> i & 1 == 1 && meta.dtype == DType::Real;
        let mut operands = Vec::new();
        for (i, operand) in case.operands.iter().enumerate() {
            let given = tape.input(operand.name, operand.meta)?;
            operands.push(if apart(i, &operand.meta) { tape.scale(Coef::ONE, given)? } else { given });
        }
        let results = tape.record(case.op.clone(), &operands, &case.sum)?;
        for (i, result) in results.into_iter().enumerate() {
            let meta = *tape.meta(result);
            let read = if apart(RESULT + i, &meta) { tape.scale(Coef::ONE, result)? } else { result };
            tape.output(format!("out{i}"), read);
        }
        Plan::build(&tape, &PlanOptions { half, ..PlanOptions::AS_RECORDED })
    }

    /// The plain operations that the operation stands for, as a plan with the same inputs and outputs, in one width.
    ///
    /// # Errors
    /// As [`Planned::plan`].
    pub fn composition(&self) -> Result<Plan> {
        Ok(expand(&Plan::build(&self.case.record()?.tape, &PlanOptions::AS_RECORDED)?))
    }

    /// Numbers for the operands as [`Case::values`] draws them; those that [`Planned::plan`] may keep in 16 bits are rounded by `round`,
    /// so that both plans begin with the same numbers.
    pub fn values(&self, seed: u64, round: impl Fn(f64) -> f64) -> Vec<HostVec> {
        let mut list = self.case.values(seed);
        for (i, (operand, values)) in self.case.operands.iter().zip(&mut list).enumerate() {
            if self.is_narrow(i, &operand.meta) {
                *values = HostVec::F64(values.to_f64().into_iter().map(&round).collect());
            }
        }
        self.case.derive(&mut list);
        list
    }

    /// Whether the tensor of this bit may take 16 bits.
    fn is_narrow(&self, bit: usize, meta: &Meta) -> bool {
        let [.., h, w] = meta.dims;
        self.inside >> bit & 1 == 1 && meta.kind == Kind::Activation && meta.dtype == DType::Real && h * w > 1
    }

    /// Whether the operation rounds operands to the precision of the device.
    pub fn rounds(&self) -> bool {
        matches!(self.case.op, Op::Conv(_) | Op::FusedConv(_))
    }

    /// The result that is a convolution's cotangent, if it keeps that.
    pub fn kept(&self) -> Option<usize> {
        if let Op::FusedConv(op) = self.case.op { op.delta_result() } else { None }
    }

    /// Whether anything takes 16 bits where it may.
    ///
    /// # Errors
    /// As [`Planned::plan`].
    pub fn narrows(&self) -> Result<bool> {
        Ok(self.plan(true)?.arena_halves > 0)
    }

    /// How far each result may be from that of the composition. What an epilogue finds is held against the first result instead
    /// ([`Planned::found`]).
    ///
    /// # Errors
    /// As [`Planned::plan`].
    pub fn tolerances(&self) -> Result<Vec<Tolerance>> {
        let of = |(i, meta): (usize, &Meta)| {
            let narrow = self.is_narrow(RESULT + i, meta);
            match self.case.op {
                Op::Conv(_) => Tolerance::CONV,
                Op::FusedConv(_) if self.kept() == Some(i) => Tolerance::kept(narrow),
                Op::FusedConv(_) => Tolerance::FUSED,
                _ => Tolerance::stored(self.case.tolerance.min(SINGLE), narrow),
            }
        };
        Ok(self.case.results()?.iter().enumerate().map(of).collect())
    }
}

/// Every case of an operation that only the planner makes. Names are unique.
pub fn planned() -> Vec<Planned> {
    let mut cases = convolutions();
    for size in [[2, 1, 5, 3], [3, 3, 7, 5], [2, 5, 15, 11], [1, 7, 2, 3], [2, 40, 4, 3], [1, 64, 9, 8], [5, 8, 31, 33]]
    {
        for branches in [1, 3] {
            let norms = recomputed(size, branches).into_iter().chain(applied(size, branches));
            cases.extend(norms.map(|case| Planned { case, inside: u64::MAX }));
        }
    }
    for case in updates() {
        // Results where operands lie, as in states, and results that lie elsewhere.
        let apart = Case { name: format!("{}, apart", case.name), ..case.clone() };
        cases.extend([(case, u64::MAX), (apart, 0)].map(|(case, inside)| Planned { case, inside }));
    }
    cases
}

/// Every case of every operation, on the tape or of the planner. Names are unique.
pub fn every() -> Vec<Planned> {
    all().into_iter().map(Planned::plain).chain(planned()).collect()
}

#[cfg(test)]
mod tests {
    use super::{every, planned};
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_every_case_has_both_plans() {
        let cases = planned();
        let names: HashSet<String> = every().into_iter().map(|c| c.case.name).collect();
        assert_eq!(names.len(), every().len());
        for planned in &cases {
            let name = &planned.case.name;
            for half in [false, true] {
                let plan = planned.plan(half).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(plan.launches.iter().any(|l| l.op == planned.case.op), "{name}");
                assert!(half || plan.arena_halves == 0, "{name}");
            }
            let plain = planned.composition().unwrap();
            assert!(plain.launches.iter().all(|l| l.op != planned.case.op), "{name}");
            for (operand, values) in planned.case.operands.iter().zip(planned.values(1, |v| v)) {
                assert_eq!(values.to_f64().len(), operand.meta.total(planned.case.branches), "{name} {}", operand.name);
            }
            assert_eq!(planned.tolerances().unwrap().len(), planned.case.results().unwrap().len(), "{name}");
        }
        let narrow = cases.iter().filter(|c| c.narrows().unwrap()).count();
        println!("{} cases, {narrow} with activations of 16 bits", cases.len());
        assert!(narrow > cases.len() / 2);
    }

    #[test]
    fn every_operation_of_the_planner_has_cases() {
        let ops: HashSet<&str> = planned().iter().map(|c| c.case.op_name()).collect();
        assert_eq!(ops.len(), 10, "{ops:?}");
    }
}
