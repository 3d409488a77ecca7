//! Cases of fused convolutions: their operands, and which of these are per-branch, summed and of 16 bits.

use super::plan::RESULT;
use super::{Case, Data, Operand, Planned, Sum};
use crate::ops::{ConvForm, ConvGeom, Delta, Epilogue, FusedConv};
use crate::tape::Meta;

/// Bit of [`Mixture::others`]: the x that stands beside a tangent.
pub const X: u32 = 1;
/// Bit of [`Mixture::others`]: `g, b, mean, var` of x.
pub const NORM: u32 = 2;
/// Bit of [`Mixture::others`]: the y of a cotangent, and its `g, b, mean, var`.
pub const Y: u32 = 4;
/// Bit of [`Mixture::others`]: what sums of a tangent are with, and its mean and variance.
pub const NEXT: u32 = 8;
/// Bit of [`Mixture::others`]: the residual term of a cotangent.
pub const RESIDUAL: u32 = 16;

/// Which tensors of a fused convolution are per-branch, which results are summed over the branches, and which have 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mixture {
    /// M.
    pub branches: usize,
    /// Bit i: operand i of the form is per-branch.
    pub branched: u32,
    /// Which of the other operands are per-branch: [`X`], [`NORM`], [`Y`], [`NEXT`], [`RESIDUAL`]. Sums are so where anything is that they are of.
    pub others: u32,
    /// Whether result 0 and 1 of the form are summed over the branches.
    pub summed: [bool; 2],
    /// What may take 16 bits: operands of the form (bit i: operand i), what is added (bit 4), the first result (bit 5), x, y, next and the
    /// residual term (bits 6 to 9), and the cotangent that is kept (bit 10).
    pub half: u32,
}

/// A convolution and its mixture.
struct Build {
    op: FusedConv,
    mixture: Mixture,
}

impl Build {
    fn on(&self, bits: u32) -> bool {
        self.mixture.branched & bits != 0
    }

    fn other(&self, bits: u32) -> bool {
        self.mixture.others & bits != 0
    }

    /// Whether x is an operand beside those of the form.
    fn takes_x(&self) -> bool {
        self.op.x_operand() >= self.op.operands()
    }

    /// Whether x of the batch norm, and what is made of it, are per-branch.
    fn norm_branched(&self) -> bool {
        let x = if self.takes_x() { self.other(X) } else { self.on(1 << self.op.x_operand()) };
        x || (self.op.norm && self.other(NORM))
    }

    /// Whether ẋ, after its prologue, is per-branch.
    fn tangent_branched(&self) -> bool {
        self.on(1) || (self.op.tangent && self.norm_branched())
    }

    /// Whether dy or y is per-branch.
    fn pair_branched(&self) -> bool {
        let dy = self.op.dy_operand().is_some_and(|i| self.on(1 << i));
        dy || (self.op.delta != Delta::None && self.other(Y))
    }

    /// Whether dy, after its prologue, is per-branch.
    fn delta_branched(&self) -> bool {
        self.pair_branched() || (self.op.residual_operand().is_some() && self.other(RESIDUAL))
    }

    /// Metas of the results: per-branch where anything is that they depend on, unless they are summed.
    fn results(&self) -> Vec<Meta> {
        let (x, w, y) = (self.op.geom.x(), self.op.geom.weight(), self.op.geom.y());
        let image = if self.op.tangent { self.tangent_branched() } else { self.norm_branched() };
        let result = |meta: Meta, branched: bool, i: usize| meta.with_branching(branched && !self.mixture.summed[i]);
        let delta = self.delta_branched();
        let mut metas = match self.op.form {
            ConvForm::Fprop => vec![result(y, image || self.on(2), 0)],
            ConvForm::Wgrad => vec![result(w, image || delta, 0)],
            ConvForm::Backward => vec![result(x, delta || self.on(2), 0), result(w, image || delta, 1)],
            ConvForm::Tangent => {
                vec![result(y, self.tangent_branched() || self.norm_branched() || self.on(10), 0)]
            }
        };
        let first = metas[0];
        let vector = Meta::vector(first.dims[1]).with_branching(first.per_branch);
        metas.extend(self.op.delta_result().map(|_| y.with_branching(delta)));
        metas.extend(self.op.epilogue_results().into_iter().flatten().map(|_| vector));
        metas
    }

    fn operands(&self) -> Vec<Operand> {
        let op = &self.op;
        let (x, w, y) = (op.geom.x(), op.geom.weight(), op.geom.y());
        let (of_x, of_y) = (Meta::vector(op.geom.c), Meta::vector(op.geom.k));
        let image = if op.tangent { "x_dot" } else { "x" };
        let form: &[(&'static str, Meta)] = match op.form {
            ConvForm::Fprop => &[(image, x), ("w", w)],
            ConvForm::Wgrad => &[(image, x), ("dy", y)],
            ConvForm::Backward => &[(image, x), ("w", w), ("dy", y)],
            ConvForm::Tangent => &[("x_dot", x), ("w_dot", w), ("x", x), ("w", w)],
        };
        let mut list = List::default();
        for (i, (name, meta)) in form.iter().enumerate() {
            list.add(name, *meta, Data::Normal, self.on(1 << i));
        }
        if self.takes_x() {
            list.add("x", x, Data::Normal, self.other(X));
        }
        if op.norm {
            list.norm(["g", "b", "mean", "var"], of_x, self.other(NORM));
        }
        if let (Some([g, b, mean, var]), true) = (op.norm_operands(), op.tangent) {
            let (x_dot, branched) = (0, self.tangent_branched());
            list.add("g_dot", of_x, Data::Normal, branched);
            list.add("b_dot", of_x, Data::Normal, branched);
            list.add("x_dot_mean", of_x, Data::Sum(Sum::Mean { x_dot }), branched);
            let rho = Sum::Correlation { x_dot, norm: [op.x_operand(), g, b, mean, var] };
            list.add("rho", of_x, Data::Sum(rho), branched);
        }
        if let (Some([at, g, b, mean, var, ..]), Some(dy)) = (op.delta_operands(), op.dy_operand()) {
            let norm = [at, g, b, mean, var];
            list.add("y", y, Data::Normal, self.other(Y));
            list.norm(["y_g", "y_b", "y_mean", "y_var"], of_y, self.other(Y));
            list.add("dg", of_y, Data::Sum(Sum::Gain { dy, norm }), self.pair_branched());
            list.add("db", of_y, Data::Sum(Sum::Bias { dy, norm }), self.pair_branched());
        }
        if op.residual_operand().is_some() {
            list.add("residual", y, Data::Normal, self.other(RESIDUAL));
        }
        if op.epilogue == Epilogue::TangentSums {
            list.add("next", y, Data::Normal, self.other(NEXT));
            list.add("next_mean", of_y, Data::Scaled(0.3), self.other(NEXT));
            list.add("next_var", of_y, Data::Between(0.5, 1.5), self.other(NEXT));
        }
        if op.start {
            let first = self.results()[0];
            list.add("start", first, Data::Normal, first.per_branch);
        }
        list.0
    }

    /// See [`Planned::inside`].
    fn inside(&self) -> u64 {
        let Mixture { half, .. } = self.mixture;
        let op = &self.op;
        let extras = [
            (4, op.start_operand()),
            (5, Some(RESULT)),
            (6, self.takes_x().then(|| op.x_operand())),
            (7, op.delta_operands().map(|at| at[0])),
            (8, op.epilogue_operands().map(|at| at[0])),
            (9, op.residual_operand()),
            (10, op.delta_result().map(|i| RESULT + i)),
        ];
        let form = (0..op.operands()).map(|i| (i, Some(i)));
        let inside = form.chain(extras).filter(|(bit, _)| half >> bit & 1 == 1).filter_map(|(_, at)| at);
        inside.fold(0, |bits, at| bits | 1 << at)
    }

    /// Sizes and parts.
    fn text(&self) -> String {
        let op = &self.op;
        let ConvGeom { n, c, h, w, k, r, s, stride, .. } = op.geom;
        let (residual, kept) = (op.residual_operand().is_some(), op.delta_result().is_some());
        let parts = [
            (op.norm && !op.tangent, " norm"),
            (op.tangent, " tangent"),
            (op.delta != Delta::None, " delta"),
            (residual, " residual"),
            (kept, " kept"),
            (op.start, " added"),
            (op.epilogue == Epilogue::Stats, " statistics"),
            (op.epilogue == Epilogue::BackwardSums, " backward sums"),
            (op.epilogue == Epilogue::TangentSums, " tangent sums"),
        ];
        let parts: String = parts.into_iter().filter(|(there, _)| *there).map(|(_, name)| name).collect();
        format!("n{n} c{c} {h}x{w} k{k} {r}x{s} stride {stride}{parts}")
    }
}

/// Operands in the making.
#[derive(Default)]
struct List(Vec<Operand>);

impl List {
    fn add(&mut self, name: &'static str, meta: Meta, data: Data, branched: bool) {
        self.0.push(Operand { name, meta: meta.with_branching(branched), data, differentiable: false });
    }

    /// `g, b, mean, var` of a batch norm: statistics need not be those of the batch.
    fn norm(&mut self, [g, b, mean, var]: [&'static str; 4], meta: Meta, branched: bool) {
        self.add(g, meta, Data::Between(0.5, 1.5), branched);
        self.add(b, meta, Data::Scaled(0.3), branched);
        self.add(mean, meta, Data::Scaled(0.3), branched);
        self.add(var, meta, Data::Between(0.5, 1.5), branched);
    }
}

impl Planned {
    /// A fused convolution on operands of this mixture.
    pub fn convolution(op: FusedConv, mixture: Mixture) -> Planned {
        let build = Build { op, mixture };
        let operands = build.operands();
        let branched = operands.iter().any(|o| o.meta.per_branch);
        let sum: Vec<bool> = build.results().iter().map(|meta| branched && !meta.per_branch).collect();
        let case = Case::new(op.into(), &build.text(), mixture.branches, operands, &sum);
        Planned { case, inside: build.inside() }
    }
}
