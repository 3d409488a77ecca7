//! Compositions that the planner makes for the CUDA kernels. They never stand on a tape, have no derivative, and the CPU device
//! does not know them: each is one launch in place of the named operations, and is tested against them.
//!
//! In all of them `norm` stands for the five operands of `h = relu(bn(x))` other than x: h is not in memory, it is computed again
//! wherever it is read, always in the same way, so that every reader sees the same ReLU mask.

use super::batch_norm::{BnBackward, BnDoubleBackward};
use super::conv::{Conv, ConvGeom, ConvKind};
use super::{Operation, PullbackArgs, any_branched, third_order, widest};
use crate::error::Result;
use crate::tape::{Meta, Tape, Tensor};

/// Which convolutions a [`FusedConv`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConvForm {
    /// `(x, w) → y = fprop(x, w)`
    Fprop,
    /// `(x, dy) → dw = wgrad(x, dy)`
    Wgrad,
    /// `(x, w, dy) → (dx, dw) = (dgrad(dy, w), wgrad(x, dy))`: in one launch, so that what both read of `dy` comes from
    /// memory once: blocks that need the same part of it for either run at about the same time, or, with few channels, make both of it.
    Backward,
    /// `(ẋ, ẇ, x, w) → ẏ = fprop(ẋ, w) + fprop(x, ẇ)`: one product whose inner dimension is that of both.
    Tangent,
}

/// What a [`FusedConv`] finds of its first result, per channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// Mean and biased variance of y, which a batch norm normalises next; only with [`ConvForm::Fprop`].
    Stats,
    /// With [`ConvForm::Backward`] and `norm`: dx is the cotangent of `relu(bn(x))`, and `(dg, db)` are those of the batch norm's
    /// backward, `Σ m dx x̂` and `Σ m dx` with the ReLU's mask m.
    BackwardSums,
    /// With [`ConvForm::Tangent`] and [`ConvForm::Fprop`]: the result ẏ is the tangent of what a batch norm normalises. Operands
    /// `next, mean, var` of that batch norm, next shared or per branch; results `⟨ẏ⟩` and `ρ = ⟨x̂ẏ⟩`.
    TangentSums,
}

/// What a [`FusedConv`] makes its cotangent dy of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Delta {
    /// It is an operand.
    None,
    /// The operand dy is the cotangent of `relu(bn(y))` for the convolution's result y, and the convolution's is that of y,
    /// `δ = g r (m dy − db/n − x̂ dg/n)`, n samples and pixels, x̂ that of y. Operands `y, g, b, mean, var, dg, db`, the sums per branch
    /// where dy is.
    Backward {
        /// δ has one more term: an operand of the shape of y behind the others.
        residual: bool,
        /// δ, as it is stored, is a result behind those of the form: others read it as well. It cannot lie where an operand does.
        kept: bool,
    },
}

/// One or two convolutions with what stands before and behind them.
///
/// Operands, in this order: those of the form; what `tangent`, `norm`, `delta` and `epilogue` want; with `start` what is added to the first
/// result. Results: those of the form, that of `delta`, those of `epilogue`. `relu(bn(·))` and its derivatives are made of other tensors as these are
/// loaded, with the same ReLU mask everywhere; padding stays zero. With x̂ = (x−μ)r, r = 1/√(σ²+ε) and m the mask:
///
/// * `norm`: `g, b, mean, var` `[C]`. The operand x is that of the batch norm, the convolution's is `relu(bn(x))`.
/// * `tangent`, with `norm` only: `ẋ` is the tangent of the batch norm's operand, the convolution's is the tangent of `relu(bn(x))`,
///   `m (g r (ẋ − ⟨ẋ⟩ − x̂ρ) + ġ x̂ + ḃ)`: the first operand of [`ConvForm::Tangent`], which has x as well, and in the place of x in the other
///   forms, which take x in front of the four of `norm`. Behind these `ġ, ḃ, ⟨ẋ⟩, ρ` `[C]`, per branch where ẋ is.
/// * `delta`: see [`Delta`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FusedConv {
    /// Which convolutions.
    pub form: ConvForm,
    /// Their sizes.
    pub geom: ConvGeom,
    /// Batch norm and ReLU are applied to x as it is loaded.
    pub norm: bool,
    /// ẋ goes through the derivative of batch norm and ReLU as it is loaded.
    pub tangent: bool,
    /// dy goes through the backward of ReLU and batch norm as it is loaded.
    pub delta: Delta,
    /// Something is added to the first result: y, ẏ or dx. For [`ConvForm::Wgrad`], dw.
    pub start: bool,
    /// What is found of the first result.
    pub epilogue: Epilogue,
}

impl FusedConv {
    /// The form with nothing around it.
    pub fn plain(form: ConvForm, geom: ConvGeom) -> Self {
        FusedConv {
            form,
            geom,
            norm: false,
            tangent: false,
            delta: Delta::None,
            start: false,
            epilogue: Epilogue::None,
        }
    }

    /// Number of the form's own operands.
    pub fn operands(&self) -> usize {
        match self.form {
            ConvForm::Fprop | ConvForm::Wgrad => 2,
            ConvForm::Backward => 3,
            ConvForm::Tangent => 4,
        }
    }

    /// Whether x is an operand beside the form's own.
    fn takes_x(&self) -> bool {
        self.tangent && self.form != ConvForm::Tangent
    }

    /// The operand to which the batch norm belongs.
    pub fn x_operand(&self) -> usize {
        match self.form {
            ConvForm::Tangent => 2,
            _ if self.takes_x() => self.operands(),
            _ => 0,
        }
    }

    /// Position of `dy`, in the forms that have one.
    pub fn dy_operand(&self) -> Option<usize> {
        match self.form {
            ConvForm::Wgrad => Some(1),
            ConvForm::Backward => Some(2),
            ConvForm::Fprop | ConvForm::Tangent => None,
        }
    }

    /// Positions of `g, b, mean, var`, if there are any.
    pub fn norm_operands(&self) -> Option<[usize; 4]> {
        let first = self.operands() + usize::from(self.takes_x());
        self.norm.then_some([0, 1, 2, 3].map(|i| first + i))
    }

    /// Positions of `ġ, ḃ, ⟨ẋ⟩, ρ`, if there are any.
    pub fn tangent_operands(&self) -> Option<[usize; 4]> {
        let first = self.operands() + usize::from(self.takes_x()) + 4;
        self.tangent.then_some([0, 1, 2, 3].map(|i| first + i))
    }

    fn before_delta(&self) -> usize {
        self.operands() + usize::from(self.takes_x()) + 4 * (usize::from(self.norm) + usize::from(self.tangent))
    }

    /// Positions of `y, g, b, mean, var, dg, db`, if there are any.
    pub fn delta_operands(&self) -> Option<[usize; 7]> {
        let first = self.before_delta();
        (self.delta != Delta::None).then_some([0, 1, 2, 3, 4, 5, 6].map(|i| first + i))
    }

    /// Position of the residual term of δ.
    pub fn residual_operand(&self) -> Option<usize> {
        matches!(self.delta, Delta::Backward { residual: true, .. }).then_some(self.before_delta() + 7)
    }

    fn before_epilogue(&self) -> usize {
        let delta = match self.delta {
            Delta::None => 0,
            Delta::Backward { residual, .. } => 7 + usize::from(residual),
        };
        self.before_delta() + delta
    }

    /// Positions of `next, mean, var` of [`Epilogue::TangentSums`].
    pub fn epilogue_operands(&self) -> Option<[usize; 3]> {
        let first = self.before_epilogue();
        (self.epilogue == Epilogue::TangentSums).then_some([0, 1, 2].map(|i| first + i))
    }

    /// Number of the form's own results.
    fn results(&self) -> usize {
        if self.form == ConvForm::Backward { 2 } else { 1 }
    }

    /// Position of δ among the results, if it is one.
    pub fn delta_result(&self) -> Option<usize> {
        matches!(self.delta, Delta::Backward { kept: true, .. }).then(|| self.results())
    }

    /// Positions of the two results of the epilogue.
    pub fn epilogue_results(&self) -> Option<[usize; 2]> {
        let first = self.results() + usize::from(self.delta_result().is_some());
        (self.epilogue != Epilogue::None).then_some([first, first + 1])
    }

    /// Position of what is added to the first result, if there is anything.
    pub fn start_operand(&self) -> Option<usize> {
        let first = self.before_epilogue() + if self.epilogue == Epilogue::TangentSums { 3 } else { 0 };
        self.start.then_some(first)
    }

    /// Whether the parts fit the form.
    fn is_sound(&self) -> bool {
        let form = self.form;
        let epilogue = match self.epilogue {
            Epilogue::None => true,
            Epilogue::Stats => form == ConvForm::Fprop,
            Epilogue::BackwardSums => form == ConvForm::Backward && self.norm && !self.tangent,
            Epilogue::TangentSums => matches!(form, ConvForm::Tangent | ConvForm::Fprop),
        };
        let tangent = !self.tangent || (self.norm && form != ConvForm::Fprop);
        epilogue && tangent && (self.delta == Delta::None || self.dy_operand().is_some())
    }

    /// The form's operands and results.
    fn metas(&self) -> (Vec<Meta>, Vec<Meta>) {
        let (x, w, y) = (self.geom.x(), self.geom.weight(), self.geom.y());
        match self.form {
            ConvForm::Fprop => (vec![x, w], vec![y]),
            ConvForm::Wgrad => (vec![x, y], vec![w]),
            ConvForm::Backward => (vec![x, w, y], vec![x, w]),
            ConvForm::Tangent => (vec![x, w, x, w], vec![y]),
        }
    }
}

impl Operation for FusedConv {
    fn name(&self) -> &'static str {
        match self.form {
            ConvForm::Fprop => "conv2d_fused_fprop",
            ConvForm::Wgrad => "conv2d_fused_wgrad",
            ConvForm::Backward => "conv2d_backward",
            ConvForm::Tangent => "conv2d_tangent",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        if !self.is_sound() {
            return Err(crate::Error::shape(self.name(), "a prologue or an epilogue that its form does not have"));
        }
        let (mut want, mut results) = self.metas();
        let (c, k) = (Meta::vector(self.geom.c), Meta::vector(self.geom.k));
        want.extend(self.takes_x().then(|| self.geom.x()));
        want.extend([c; 4].into_iter().filter(|_| self.norm));
        want.extend([c; 4].into_iter().filter(|_| self.tangent));
        let y = self.geom.y();
        if self.delta != Delta::None {
            want.extend([y, k, k, k, k, k, k]);
        }
        want.extend(self.residual_operand().map(|_| y));
        results.extend(self.delta_result().map(|_| y));
        match self.epilogue {
            Epilogue::None => {}
            Epilogue::Stats => results.extend([k; 2]),
            Epilogue::BackwardSums => results.extend([c; 2]),
            Epilogue::TangentSums => {
                want.extend([y, k, k]);
                results.extend([k; 2]);
            }
        }
        want.extend(self.start.then_some(results[0]));
        super::expect(self.name(), inputs, &want)?;
        let branched = any_branched(inputs);
        Ok(results.into_iter().map(|meta| meta.with_branching(branched)).collect())
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        let conv = |kind, a: usize, b: usize, out: &Meta| {
            Conv { kind, geom: self.geom }.flops(&[inputs[a], inputs[b]], &[*out], branches)
        };
        let products = match self.form {
            ConvForm::Fprop => conv(ConvKind::Fprop, 0, 1, &outputs[0]),
            ConvForm::Wgrad => conv(ConvKind::Wgrad, 0, 1, &outputs[0]),
            ConvForm::Backward => conv(ConvKind::Dgrad, 2, 1, &outputs[0]) + conv(ConvKind::Wgrad, 0, 2, &outputs[1]),
            ConvForm::Tangent => {
                let y = self.geom.y();
                conv(ConvKind::Fprop, 0, 3, &y) + conv(ConvKind::Fprop, 2, 1, &y) + widest(outputs, branches)
            }
        };
        let per_element = |cost: u64, of: &Meta| cost * of.total(branches) as u64;
        let norm = if self.norm { per_element(2, &inputs[self.x_operand()]) } else { 0 };
        let tangent = if self.tangent { per_element(5, &inputs[0]) } else { 0 };
        let delta = match (self.dy_operand(), self.delta) {
            (Some(dy), Delta::Backward { residual, .. }) => per_element(5 + u64::from(residual), &inputs[dy]),
            _ => 0,
        };
        let start = if self.start { outputs[0].total(branches) as u64 } else { 0 };
        let epilogue = match self.epilogue {
            Epilogue::None => 0,
            Epilogue::Stats => per_element(4, &outputs[0]),
            Epilogue::BackwardSums => per_element(6, &outputs[0]),
            Epilogue::TangentSums => per_element(4, &outputs[0]),
        };
        products + norm + tangent + delta + start + epilogue
    }
}

/// `(x) → (mean, var)` per channel, biased variance: what [`BnForward`](super::BnForward) finds before it normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnStats;

impl Operation for BnStats {
    fn name(&self) -> &'static str {
        "bn_stats"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = inputs else { return Err(crate::Error::shape(self.name(), "takes one operand")) };
        super::expect(self.name(), inputs, &[Meta::activation(x.dims[0], x.dims[1], x.dims[2], x.dims[3])])?;
        Ok(vec![Meta::vector(x.dims[1]).with_branching(x.per_branch); 2])
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "the operand of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        4 * widest(inputs, branches)
    }
}

/// `(dy, x, g, b, mean, var[, start]) → (dx, dg, db)`: [`BnBackward`] with ReLU, its mask computed again from x, plus `start` in dx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnReluBackward {
    /// Something is added to dx.
    pub start: bool,
}

impl Operation for BnReluBackward {
    fn name(&self) -> &'static str {
        "bn_relu_backward_recomputed"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let Some((x, c)) = inputs.get(1).map(|x| (*x, Meta::vector(x.dims[1]))) else {
            return Err(crate::Error::shape(self.name(), "takes six operands"));
        };
        let mut want = vec![x, x, c, c, c, c];
        want.extend(self.start.then_some(x));
        super::expect(self.name(), inputs, &want)?;
        let branched = any_branched(inputs);
        Ok([x, c, c].map(|meta| meta.with_branching(branched)).to_vec())
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        let start = if self.start { outputs[0].total(branches) as u64 } else { 0 };
        BnBackward { relu: true }.flops(inputs, outputs, branches) + start
    }
}

/// `(ẋ, ġ, ḃ, dy, x, g, b, mean, var) → (ẏ, x̄, ḡ)`: [`BnDoubleBackward`] with ReLU, its mask computed again from x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnReluDoubleBackward;

impl Operation for BnReluDoubleBackward {
    fn name(&self) -> &'static str {
        "bn_relu_double_backward_recomputed"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let Some((x, c)) = inputs.get(4).map(|x| (*x, Meta::vector(x.dims[1]))) else {
            return Err(crate::Error::shape(self.name(), "takes nine operands"));
        };
        super::expect(self.name(), inputs, &[x, c, c, x, x, c, c, c, c])?;
        let branched = any_branched(inputs);
        Ok([x, x, c].map(|meta| meta.with_branching(branched)).to_vec())
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        BnDoubleBackward { relu: true }.flops(inputs, outputs, branches)
    }
}

/// `(dy, x, g, b, mean, var, dg, db[, ḡ][, start, …]) → dx`: [`BnReluBackward`] whose sums are there already,
/// `g r (m dy − db/n − x̂ dg/n)` plus the starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnReluBackwardApply {
    /// ḡ is added to dg: of a [`BnReluDoubleBackwardApply`] of the same batch norm, whose x̄ is among the starts.
    pub second_order: bool,
    /// How many tensors are added to dx: at most [`MOST_STARTS`](Self::MOST_STARTS).
    pub starts: usize,
}

impl BnReluBackwardApply {
    /// Tensors that can be added to dx.
    pub const MOST_STARTS: usize = 2;

    /// Position of the first start.
    pub fn first_start(&self) -> usize {
        8 + usize::from(self.second_order)
    }
}

impl Operation for BnReluBackwardApply {
    fn name(&self) -> &'static str {
        "bn_relu_backward_apply"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let Some((x, c)) = inputs.get(1).map(|x| (*x, Meta::vector(x.dims[1]))) else {
            return Err(crate::Error::shape(self.name(), "takes eight operands"));
        };
        if self.starts > Self::MOST_STARTS {
            return Err(crate::Error::shape(self.name(), format!("{} starts", self.starts)));
        }
        let mut want = vec![x, x, c, c, c, c, c, c];
        want.extend(self.second_order.then_some(c));
        want.extend(std::iter::repeat_n(x, self.starts));
        super::expect(self.name(), inputs, &want)?;
        Ok(vec![x.with_branching(any_branched(inputs))])
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        5 * widest(inputs, branches) + (self.starts * outputs[0].total(branches)) as u64
    }
}

/// `(ẋ, ġ, dy, x, g, b, mean, var, dg, db, ⟨ẋ⟩, ρ[, start]) → (x̄, ḡ)`: what [`BnReluDoubleBackward`] makes beside ẏ, from the sums of the batch
/// norm's backward (`dg`, `db`) and those of [`Epilogue::TangentSums`], plus `start` in x̄.
///
/// x̄ is without its last term, `−g r x̂⟨m dy x̂'⟩ = −g r x̂ ḡ/n` (summed over the branches where ḡ is): it needs the sum that is made in this very
/// pass. [`BnReluBackwardApply`] with `second_order` adds it, for the price of one addition per channel: it has `−g r x̂ dg/n` anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BnReluDoubleBackwardApply {
    /// Something is added to x̄.
    pub start: bool,
}

impl Operation for BnReluDoubleBackwardApply {
    fn name(&self) -> &'static str {
        "bn_relu_double_backward_apply"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let Some((x, c)) = inputs.get(3).map(|x| (*x, Meta::vector(x.dims[1]))) else {
            return Err(crate::Error::shape(self.name(), "takes twelve operands"));
        };
        let mut want = vec![x, c, x, x, c, c, c, c, c, c, c, c];
        want.extend(self.start.then_some(x));
        super::expect(self.name(), inputs, &want)?;
        let branched = any_branched(inputs);
        Ok([x, c].map(|meta| meta.with_branching(branched)).to_vec())
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        let start = if self.start { outputs[0].total(branches) as u64 } else { 0 };
        14 * widest(inputs, branches) + start
    }
}
