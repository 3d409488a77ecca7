//! 2-D convolution in its three bilinear forms, closed under differentiation.
//!
//! With T(x, w, dy) = ⟨fprop(x, w), dy⟩ each form is the derivative of T in one argument; so the pullback of
//! each form is written in the other two. A linear layer is a 1×1 convolution of a 1×1 image.

use super::{Operation, PullbackArgs, any_branched};
use crate::error::{Error, Result};
use crate::tape::{Kind, Meta, Tape, Tensor};

/// Which of the three forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConvKind {
    /// `(x, w) → y`
    Fprop,
    /// `(dy, w) → dx`
    Dgrad,
    /// `(x, dy) → dw`
    Wgrad,
}

/// Sizes of a convolution; the same for its three forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvGeom {
    /// Samples.
    pub n: usize,
    /// Input channels.
    pub c: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Output channels.
    pub k: usize,
    /// Kernel height.
    pub r: usize,
    /// Kernel width.
    pub s: usize,
    /// Output height.
    pub p: usize,
    /// Output width.
    pub q: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Zero padding on every side.
    pub pad: usize,
}

impl ConvGeom {
    /// Sizes for input `x` and weights `w`.
    ///
    /// # Errors
    /// When channels disagree, the stride is 0 or the kernel is larger than the padded image.
    pub fn new(x: &Meta, w: &Meta, stride: usize, pad: usize) -> Result<Self> {
        let ([n, c, h, wd], [k, cw, r, s]) = (x.dims, w.dims);
        let fits = x.kind == Kind::Activation && w.kind == Kind::Weight && c == cw && stride > 0;
        if !fits || h + 2 * pad < r || wd + 2 * pad < s {
            return Err(Error::shape("conv2d", format!("{x} with {w}, stride {stride}, padding {pad}")));
        }
        let (p, q) = ((h + 2 * pad - r) / stride + 1, (wd + 2 * pad - s) / stride + 1);
        Ok(ConvGeom { n, c, h, w: wd, k, r, s, p, q, stride, pad })
    }

    /// Meta of the input.
    pub fn x(&self) -> Meta {
        Meta::activation(self.n, self.c, self.h, self.w)
    }

    /// Meta of the weights.
    pub fn weight(&self) -> Meta {
        Meta::weight(self.k, self.c, self.r, self.s)
    }

    /// Meta of the output.
    pub fn y(&self) -> Meta {
        Meta::activation(self.n, self.k, self.p, self.q)
    }

    /// Floating-point operations of one form for one branch: 2·N·P·Q·K·C·R·S.
    pub fn flops(&self) -> u64 {
        2 * (self.n * self.p * self.q * self.k) as u64 * (self.c * self.r * self.s) as u64
    }
}

/// A convolution in one of its forms.
///
/// A third operand, present only where the planner fused an addition, is added to the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv {
    /// Which form.
    pub kind: ConvKind,
    /// Its sizes.
    pub geom: ConvGeom,
}

impl Conv {
    fn metas(&self) -> ([Meta; 2], Meta) {
        let (x, w, y) = (self.geom.x(), self.geom.weight(), self.geom.y());
        match self.kind {
            ConvKind::Fprop => ([x, w], y),
            ConvKind::Dgrad => ([y, w], x),
            ConvKind::Wgrad => ([x, y], w),
        }
    }
}

impl Operation for Conv {
    fn name(&self) -> &'static str {
        match self.kind {
            ConvKind::Fprop => "conv2d_fprop",
            ConvKind::Dgrad => "conv2d_dgrad",
            ConvKind::Wgrad => "conv2d_wgrad",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let ([a, b], out) = self.metas();
        super::expect(self.name(), inputs, &[a, b, out][..if inputs.len() == 3 { 3 } else { 2 }])?;
        Ok(vec![out.with_branching(any_branched(inputs))])
    }

    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        let Some(e) = args.cots[0] else { return Ok(vec![None, None]) };
        let (a, b, geom) = (args.inputs[0], args.inputs[1], self.geom);
        use ConvKind::{Dgrad, Fprop, Wgrad};
        // (form, operands) of the two pullbacks, from T(x, w, dy).
        let (da, db) = match self.kind {
            Fprop => ((Dgrad, e, b), (Wgrad, a, e)),
            Dgrad => ((Fprop, e, b), (Wgrad, e, a)),
            Wgrad => ((Dgrad, b, e), (Fprop, a, e)),
        };
        let mut grads = Vec::with_capacity(2);
        for (i, (kind, u, v)) in [da, db].into_iter().enumerate() {
            let sum = args.sums(tape, i);
            grads.push(if args.needs[i] { Some(tape.conv(kind, geom, u, v, sum)?) } else { None });
        }
        Ok(grads)
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        let m = if any_branched(inputs) || any_branched(outputs) { branches as u64 } else { 1 };
        let added = if inputs.len() == 3 { outputs[0].total(branches) as u64 } else { 0 };
        m * self.geom.flops() + added
    }
}

impl Tape {
    /// `y = conv2d(x, w)` without bias.
    ///
    /// # Errors
    /// See [`ConvGeom::new`].
    pub fn conv2d(&mut self, x: Tensor, w: Tensor, stride: usize, pad: usize) -> Result<Tensor> {
        let geom = ConvGeom::new(self.meta(x), self.meta(w), stride, pad)?;
        self.conv(ConvKind::Fprop, geom, x, w, false)
    }

    /// Any form of a convolution. With `sum` the result is summed over the branches inside the operation; where
    /// only one operand is per-branch that operand is summed first (the form is linear in it), which costs 1/M.
    ///
    /// # Errors
    /// When operands do not have the form's shapes.
    pub fn conv(&mut self, kind: ConvKind, geom: ConvGeom, a: Tensor, b: Tensor, sum: bool) -> Result<Tensor> {
        let (mut a, mut b) = (a, b);
        if sum && self.meta(a).per_branch != self.meta(b).per_branch {
            (a, b) = (self.sum_branches(a)?, self.sum_branches(b)?);
        }
        self.record1(Conv { kind, geom }, &[a, b], sum)
    }
}
