//! Cases of the operations that only the planner makes. The CPU device does not know them: what they must give is what the plain
//! operations give that they stand for, which [`expand`] writes out.

use super::expand::expand;
use super::table::{Table, Template, fixed};
use super::{Case, Data, Operand};
use crate::device::HostVec;
use crate::error::Result;
use crate::ops::{BnReluBackward, BnReluDoubleBackward, BnStats, ConvForm, ConvGeom, Epilogue, FusedConv, Op};
use crate::plan::{Plan, PlanOptions, StageGroups};
use crate::tape::{Coef, DType, Kind, Meta, Tape};

/// A plan of the operations as they are recorded.
const AS_RECORDED: PlanOptions =
    PlanOptions { fuse: false, kernels: false, half: false, recompute: false, group: None, stages: StageGroups::WHOLE };

/// A case of an operation that only the planner makes.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// The operation and its operands.
    pub case: Case,
    /// Operands (bit i: operand i) and results (bit 16 + i: result i) that are the plan's own, so that activations among them may
    /// take 16 bits; the others are read and written by the host, in 32 bits.
    pub inside: u32,
}

impl Planned {
    /// A convolution. Bit i of `branched`: operand i of the form is per-branch; `norm_branched`: those of the batch norm are, as x is;
    /// `summed`: which results of the form are summed over the branches. Bit i of `half`: operand i of the form is the plan's own, bit 4: what
    /// is added, bit 5: the first result.
    pub fn convolution(
        op: FusedConv,
        branches: usize,
        branched: u32,
        norm_branched: bool,
        summed: [bool; 2],
        half: u32,
    ) -> Planned {
        let ConvGeom { n, c, h, w, k, r, s, stride, .. } = op.geom;
        let parts = [(op.norm, " norm"), (op.start, " added"), (op.epilogue == Epilogue::Stats, " statistics")];
        let parts: String = parts.into_iter().filter(|(there, _)| *there).map(|(_, name)| name).collect();
        let sizes = format!("n{n} c{c} {h}x{w} k{k} {r}x{s} stride {stride}{parts}");
        let template = Template::new(op, sizes, operands(&op)).fused();
        let mut mixture = branched;
        for at in op.norm_operands().iter().flatten().filter(|_| norm_branched) {
            mixture |= 1 << at;
        }
        let (mut inside, first_is_branched) = (half & 0xf | (half >> 5 & 1) << 16, mixture != 0 && !summed[0]);
        if let Some(at) = op.start_operand() {
            mixture |= u32::from(first_is_branched) << at;
            inside = inside & !(1 << at) | (half >> 4 & 1) << at;
        }
        let results = if op.form == ConvForm::Backward { 2 } else { 1 };
        let mut table = Table::default();
        table.add(&template, branches, mixture, &summed[..results]);
        Planned { case: table.cases.remove(0), inside }
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
        let apart = |i: usize, meta: &Meta| inside >> i & 1 == 1 && meta.dtype == DType::Real;
        let mut operands = Vec::new();
        for (i, operand) in case.operands.iter().enumerate() {
            let given = tape.input(operand.name, operand.meta)?;
            operands.push(if apart(i, &operand.meta) { tape.scale(Coef::ONE, given)? } else { given });
        }
        let results = tape.record(case.op.clone(), &operands, &case.sum)?;
        for (i, result) in results.into_iter().enumerate() {
            let meta = *tape.meta(result);
            let read = if apart(16 + i, &meta) { tape.scale(Coef::ONE, result)? } else { result };
            tape.output(format!("out{i}"), read);
        }
        Plan::build(&tape, &PlanOptions { half, ..AS_RECORDED })
    }

    /// The plain operations that the operation stands for, as a plan with the same inputs and outputs, in one width.
    ///
    /// # Errors
    /// As [`Planned::plan`].
    pub fn composition(&self) -> Result<Plan> {
        Ok(expand(&Plan::build(&self.case.record()?.tape, &AS_RECORDED)?))
    }

    /// Numbers for the operands as [`Case::values`] draws them; those that [`Planned::plan`] keeps in 16 bits are rounded by `round`,
    /// so that both plans begin with the same numbers.
    pub fn values(&self, seed: u64, round: impl Fn(f64) -> f64) -> Vec<HostVec> {
        let mut list = self.case.values(seed);
        for (i, (operand, values)) in self.case.operands.iter().zip(&mut list).enumerate() {
            let Meta { kind, dims: [.., h, w], .. } = operand.meta;
            if self.inside >> i & 1 == 1 && kind == Kind::Activation && h * w > 1 {
                *values = HostVec::F64(values.to_f64().into_iter().map(&round).collect());
            }
        }
        self.case.derive(&mut list);
        list
    }

    /// What the results are that are statistics of the first one, as this is in memory: later operations read both. Position and
    /// values of each.
    ///
    /// # Errors
    /// As [`Planned::plan`].
    pub fn statistics(&self, first: &HostVec) -> Result<Vec<(usize, HostVec)>> {
        let Op::FusedConv(FusedConv { epilogue: Epilogue::Stats, .. }) = self.case.op else { return Ok(Vec::new()) };
        let meta = self.case.results()?[0];
        let of = |data: Data| data.derive(&meta, self.case.branches, first);
        Ok(vec![(1, of(Data::MeanOf(0))), (2, of(Data::VarianceOf(0)))])
    }
}

/// Every case of an operation that only the planner makes. Names are unique.
pub fn planned() -> Vec<Planned> {
    let mut cases = convolutions();
    for size in [[2, 1, 5, 3], [3, 3, 7, 5], [2, 5, 15, 11], [1, 7, 2, 3], [2, 40, 4, 3], [1, 64, 9, 8], [5, 8, 31, 33]]
    {
        for branches in [1, 3] {
            cases.extend(recomputed(size, branches).into_iter().map(|case| Planned { case, inside: u32::MAX }));
        }
    }
    cases
}

/// Sizes of convolutions, `[n, c, h, w, k, r, s, stride, pad]`: for kernels that gather and for those that load patches.
const SIZES: [[usize; 9]; 10] = [
    [2, 5, 15, 11, 8, 3, 3, 1, 1],
    [1, 3, 15, 11, 5, 7, 7, 2, 3],
    [2, 32, 8, 8, 32, 3, 3, 1, 1],
    [2, 8, 9, 7, 64, 3, 3, 2, 1],
    [3, 64, 5, 5, 8, 1, 1, 1, 0],
    [2, 64, 6, 6, 72, 3, 3, 1, 1],
    [5, 16, 7, 7, 32, 1, 1, 2, 0],
    [4, 8, 16, 16, 8, 3, 3, 1, 1],
    [1, 1, 4, 5, 1, 2, 3, 1, 1],
    [7, 24, 3, 3, 40, 3, 3, 1, 1],
];

/// Forms with the operands that can be per-branch: every mixture that differs in what is summed or strided.
fn convolutions() -> Vec<Planned> {
    let mut cases: Vec<Planned> = Vec::new();
    for (number, [n, c, h, w, k, r, s, stride, pad]) in SIZES.into_iter().enumerate() {
        let (p, q) = ((h + 2 * pad - r) / stride + 1, (w + 2 * pad - s) / stride + 1);
        let geom = ConvGeom { n, c, h, w, k, r, s, p, q, stride, pad };
        let mut add = |form, norm, start, stats, branches, branched, norm_branched, summed| {
            let epilogue = if stats { Epilogue::Stats } else { Epilogue::None };
            let op = FusedConv { norm, start, epilogue, ..FusedConv::plain(form, geom) };
            // A different mixture of widths in every case: operands of the form, the start, the first result.
            let half = (cases.len() * 11 + number) as u32 % 64;
            cases.push(Planned::convolution(op, branches, branched, norm_branched, summed, half));
        };
        use ConvForm::{Backward, Fprop, Tangent, Wgrad};
        let (no, yes) = ([false, false], [true, true]);
        add(Fprop, true, true, true, 1, 0, false, no);
        add(Fprop, true, false, true, 3, 3, true, no);
        add(Fprop, false, true, true, 3, 2, false, no);
        add(Fprop, true, true, false, 3, 1, true, yes);
        add(Wgrad, true, false, false, 3, 2, false, no);
        add(Wgrad, true, true, false, 3, 3, true, yes);
        add(Backward, true, true, false, 1, 0, false, no);
        add(Backward, true, true, false, 3, 7, true, no);
        add(Backward, false, false, false, 3, 7, false, yes);
        add(Backward, true, false, false, 3, 4, false, [false, true]);
        add(Backward, true, true, false, 3, 5, true, [true, false]);
        add(Tangent, true, true, false, 1, 0, false, no);
        add(Tangent, true, false, false, 3, 9, false, no);
        add(Tangent, true, true, false, 3, 15, true, yes);
        add(Tangent, false, true, false, 3, 8, false, yes);
    }
    cases
}

/// Operands of a convolution, all shared.
fn operands(op: &FusedConv) -> Vec<Operand> {
    let (x, w, y) = (op.geom.x(), op.geom.weight(), op.geom.y());
    let (form, first): (&[(&'static str, Meta)], Meta) = match op.form {
        ConvForm::Fprop => (&[("x", x), ("w", w)], y),
        ConvForm::Wgrad => (&[("x", x), ("dy", y)], w),
        ConvForm::Backward => (&[("x", x), ("w", w), ("dy", y)], x),
        ConvForm::Tangent => (&[("x_dot", x), ("w_dot", w), ("x", x), ("w", w)], y),
    };
    let mut list: Vec<Operand> = form.iter().map(|(name, meta)| fixed(name, *meta, Data::Normal)).collect();
    if op.norm {
        let (channels, at) = (Meta::vector(op.geom.c), op.x_operand());
        list.push(fixed("g", channels, Data::Positive));
        list.push(fixed("b", channels, Data::Normal));
        list.push(fixed("mean", channels, Data::MeanOf(at)));
        list.push(fixed("var", channels, Data::VarianceOf(at)));
    }
    list.extend(op.start.then(|| fixed("start", first, Data::Normal)));
    list
}

/// The batch norms that compute `relu(bn(x))` again, in every mixture that a step has and some that it has not, for `[n, c, h, w]`.
pub fn recomputed(size: [usize; 4], branches: usize) -> Vec<Case> {
    const KEPT: [bool; 3] = [false; 3];
    // MLNT's second order.
    const MIXED: [bool; 3] = [false, true, true];
    let backward = |start| Op::from(BnReluBackward { start });
    let double = || Op::from(BnReluDoubleBackward);
    let tangents = ["x_dot", "g_dot", "b_dot", "dy"];
    let mut list: Vec<(Op, &[&str], &[bool])> = vec![
        (BnStats.into(), &[], &[]),
        (BnStats.into(), &["x"], &[]),
        (backward(false), &[], &KEPT),
        (backward(false), &["dy"], &KEPT),
        (backward(true), &["dy", "start"], &MIXED),
        (backward(true), &["dy", "x", "g", "b", "start"], &KEPT),
        (backward(true), &["dy", "x", "g", "b"], &KEPT),
        (backward(true), &["dy", "x"], &[true; 3]),
        (backward(true), &["start"], &KEPT),
        (backward(false), &["b"], &KEPT),
        (double(), &[], &KEPT),
        (double(), &tangents, &MIXED),
        (double(), &["x_dot", "g_dot", "b_dot", "dy", "x", "g", "b"], &KEPT),
        (double(), &["x_dot", "dy"], &[true, false, true]),
    ];
    if branches > 1 {
        list.push((double(), &["b"], &KEPT));
    }
    list.into_iter().map(|(op, branched, sum)| batch_norm(op, size, branches, branched, sum)).collect()
}

/// A batch norm that computes `relu(bn(x))` again; `branched` operands are per-branch, statistics with x.
fn batch_norm(op: Op, [n, c, h, w]: [usize; 4], branches: usize, branched: &[&str], sum: &[bool]) -> Case {
    let (vector, activation) = (Meta::vector(c), Meta::activation(n, c, h, w));
    let names: &[&'static str] = match &op {
        Op::BnStats(_) => &["x"],
        Op::BnReluBackward(BnReluBackward { start: true }) => &["dy", "x", "g", "b", "mean", "var", "start"],
        Op::BnReluBackward(_) => &["dy", "x", "g", "b", "mean", "var"],
        _ => &["x_dot", "g_dot", "b_dot", "dy", "x", "g", "b", "mean", "var"],
    };
    let x = names.iter().position(|name| *name == "x").unwrap_or_default();
    let operand = |name: &&'static str| match *name {
        "mean" => fixed(name, vector, Data::MeanOf(x)),
        "var" => fixed(name, vector, Data::VarianceOf(x)),
        "x" | "dy" | "x_dot" | "start" => fixed(name, activation, Data::Normal),
        _ => fixed(name, vector, Data::Normal),
    };
    let added = if names.contains(&"start") { " added" } else { "" };
    let sizes = format!("n{n} c{c} {h}x{w}{added} in a plan of {branches}");
    let template = Template::new(op, sizes, names.iter().map(operand).collect()).fused();
    let bits = names.iter().enumerate().filter(|(_, name)| branched.contains(name));
    let mut table = Table::default();
    table.add(&template, branches, bits.map(|(i, _)| 1 << i).sum(), sum);
    table.cases.remove(0)
}

#[cfg(test)]
mod tests {
    use super::planned;
    use crate::cases::all;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_every_case_has_both_plans() {
        let cases = planned();
        let names: HashSet<String> =
            cases.iter().map(|c| c.case.name.clone()).chain(all().into_iter().map(|c| c.name)).collect();
        assert_eq!(names.len(), cases.len() + all().len());
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
        }
        let narrow = cases.iter().filter(|c| c.plan(true).unwrap().arena_halves > 0).count();
        println!("{} cases, {narrow} with activations of 16 bits", cases.len());
        assert!(narrow > cases.len() / 2);
    }

    #[test]
    fn every_operation_of_the_planner_has_cases() {
        let ops: HashSet<&str> = planned().iter().map(|c| c.case.op_name()).collect();
        assert_eq!(ops.len(), 7, "{ops:?}");
    }
}
