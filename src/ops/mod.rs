//! The closed operation set: one file per operation with its shape rule, its pullback (in operations) and its cost.
//!
//! Closed means: the pullback of every operation that training differentiates twice is written in operations of
//! this set. What a third derivative would need is refused with [`Error::NotDifferentiable`], never approximated.

mod batch_norm;
mod channel;
mod conv;
mod finite;
mod fused;
mod lin_comb;
mod neighbours;
mod pool;
mod relu;
mod softmax;
mod update;

pub use batch_norm::{BN_EPS, BnBackward, BnDoubleBackward, BnEval, BnForward, BnResult};
pub use channel::{ChannelBroadcast, ChannelSum};
pub use conv::{Conv, ConvGeom, ConvKind};
pub use finite::AllFinite;
pub use fused::{
    BnReluBackward, BnReluBackwardApply, BnReluDoubleBackward, BnReluDoubleBackwardApply, BnStats, ConvForm, Delta,
    Epilogue, FusedConv,
};
pub use lin_comb::{Fill, LinComb};
pub use neighbours::{NearestNeighbours, TransferLabels};
pub use pool::{AvgPool, AvgPoolBackward, MaxPool, MaxPoolIndex, PoolGather, PoolScatter, Window};
pub use relu::{Mask, Relu};
pub use softmax::{CeGrad, CeLoss, KlGrad, KlLoss, Softmax, SoftmaxJvp};
pub use update::{Chain, Link, Part, Term, Update};

use crate::error::{Error, Result};
use crate::tape::{Fan, Meta, Tape, Tensor};

/// What a pullback is given.
pub struct PullbackArgs<'a> {
    /// The node's operands.
    pub inputs: &'a [Tensor],
    /// The node's results.
    pub outputs: &'a [Tensor],
    /// Cotangents of the results; `None` is zero.
    pub cots: &'a [Option<Tensor>],
    /// Which operands a cotangent is wanted for.
    pub needs: &'a [bool],
    /// Whether cotangents of shared operands are summed over the branches.
    pub fan: Fan,
}

impl PullbackArgs<'_> {
    /// Whether the cotangent of operand `i` is to be summed over the branches.
    pub fn sums(&self, tape: &Tape, i: usize) -> bool {
        self.fan == Fan::Sum && !tape.meta(self.inputs[i]).per_branch
    }

    /// `grad`, the cotangent of operand `i` computed from `used`, times M where it is to be a sum over branches in
    /// which it is the same: the operation works on per-branch operands, but none of them is among `used`.
    ///
    /// # Errors
    /// Never in practice: only as recording does.
    pub fn in_every_branch(&self, tape: &mut Tape, i: usize, used: &[Tensor], grad: Tensor) -> Result<Tensor> {
        let branched = |list: &[Tensor]| list.iter().any(|t| tape.meta(*t).per_branch);
        match self.sums(tape, i) && branched(self.inputs) && !branched(used) {
            true => tape.scale(crate::tape::Coef::constant(tape.branches() as f64), grad),
            false => Ok(grad),
        }
    }

    /// The cotangent of result `i`, zeros if there is none.
    ///
    /// # Errors
    /// Never in practice: only as recording does.
    pub fn cot_or_zeros(&self, tape: &mut Tape, i: usize) -> Result<Tensor> {
        match self.cots[i] {
            Some(t) => Ok(t),
            None => {
                let meta = tape.meta(self.outputs[i]).shared();
                tape.fill(meta, crate::tape::Coef::constant(0.0))
            }
        }
    }
}

/// What every operation provides.
pub trait Operation {
    /// Its name as it appears in plans, profiles and errors.
    fn name(&self) -> &'static str;

    /// Shape rule: metas of the results, per-branch wherever an operand they depend on is.
    ///
    /// # Errors
    /// When the operands do not fit together.
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>>;

    /// Cotangents of the operands, recorded on `tape`.
    ///
    /// # Errors
    /// When the operation set does not contain the derivative.
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>>;

    /// Floating-point operations of one execution, multiplications and additions counted apart, over `branches`.
    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64;
}

macro_rules! operations {
    ($($variant:ident),+ $(,)?) => {
        /// Any operation of the set.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op { $(
            #[doc = concat!("See [`", stringify!($variant), "`].")]
            $variant($variant)
        ),+ }

        $(impl From<$variant> for Op {
            fn from(op: $variant) -> Op { Op::$variant(op) }
        })+

        impl Op {
            fn inner(&self) -> &dyn Operation {
                match self { $(Op::$variant(op) => op),+ }
            }
        }
    };
}

operations!(
    Conv,
    BnForward,
    BnBackward,
    BnDoubleBackward,
    BnEval,
    Relu,
    Mask,
    MaxPoolIndex,
    PoolGather,
    PoolScatter,
    AvgPool,
    AvgPoolBackward,
    ChannelSum,
    ChannelBroadcast,
    LinComb,
    Fill,
    Softmax,
    SoftmaxJvp,
    CeLoss,
    CeGrad,
    KlLoss,
    KlGrad,
    NearestNeighbours,
    TransferLabels,
    AllFinite,
    FusedConv,
    BnStats,
    BnReluBackward,
    BnReluBackwardApply,
    BnReluDoubleBackward,
    BnReluDoubleBackwardApply,
    Update,
);

impl Operation for Op {
    fn name(&self) -> &'static str {
        self.inner().name()
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.inner().infer(inputs)
    }
    fn pullback(&self, tape: &mut Tape, args: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        self.inner().pullback(tape, args)
    }
    fn flops(&self, inputs: &[Meta], outputs: &[Meta], branches: usize) -> u64 {
        self.inner().flops(inputs, outputs, branches)
    }
}

impl Op {
    /// Whether it is one that the planner makes for the CUDA kernels alone.
    pub fn is_for_kernels(&self) -> bool {
        matches!(
            self,
            Op::FusedConv(_)
                | Op::BnStats(_)
                | Op::BnReluBackward(_)
                | Op::BnReluBackwardApply(_)
                | Op::BnReluDoubleBackward(_)
                | Op::BnReluDoubleBackwardApply(_)
                | Op::Update(_)
        )
    }

    /// Operands that its kernels read twice: first for sums over samples and pixels, then element by element.
    pub fn read_twice(&self) -> &'static [usize] {
        match self {
            Op::BnForward(_) => &[0],
            Op::BnBackward(BnBackward { relu: false }) | Op::BnReluBackward(_) => &[0, 1],
            Op::BnBackward(BnBackward { relu: true }) => &[0, 1, 5],
            Op::BnDoubleBackward(BnDoubleBackward { relu: false }) | Op::BnReluDoubleBackward(_) => &[0, 3, 4],
            Op::BnDoubleBackward(BnDoubleBackward { relu: true }) => &[0, 3, 4, 8],
            _ => &[],
        }
    }

    /// Whether result `o`, of the shape, width and branching of operand `i`, may lie where that operand does; `summed`: the result is a
    /// sum over the branches.
    pub(crate) fn works_in_place(&self, i: usize, o: usize, summed: bool) -> bool {
        match self {
            Op::LinComb(op) => i < op.coefs.len(),
            Op::Conv(_) => i == 2,
            Op::FusedConv(op) => op.start_operand() == Some(i),
            Op::BnReluBackward(_) => i == 6 || (i == 0 && !summed),
            Op::BnReluBackwardApply(op) => i >= op.first_start() || (i == 0 && !summed),
            Op::BnReluDoubleBackward(_) => matches!(i, 0 | 3) && !summed,
            Op::BnReluDoubleBackwardApply(_) => i == 12 || (matches!(i, 0 | 2) && !summed),
            Op::Update(op) => op.is_of_one_chain(i, o),
            _ => false,
        }
    }
}

/// True when any of `metas` is per-branch.
pub(crate) fn any_branched(metas: &[Meta]) -> bool {
    metas.iter().any(|m| m.per_branch)
}

/// The largest number of elements among `metas`, branches included: what an elementwise operation works through.
pub(crate) fn widest(metas: &[Meta], branches: usize) -> u64 {
    metas.iter().map(|m| m.total(branches)).max().unwrap_or(0) as u64
}

/// Refuses a wrong number of operands or operands that differ from the expected shapes.
pub(crate) fn expect(op: &'static str, inputs: &[Meta], expected: &[Meta]) -> Result<()> {
    if inputs.len() != expected.len() {
        return Err(Error::shape(op, format!("{} operands, {} expected", inputs.len(), expected.len())));
    }
    for (i, (have, want)) in inputs.iter().zip(expected).enumerate() {
        if !have.same_shape(want) {
            return Err(Error::shape(op, format!("operand {i} is {have}, expected {want}")));
        }
    }
    Ok(())
}

/// The error of a derivative outside the set.
pub(crate) fn third_order(op: &'static str, operand: &str) -> Error {
    Error::NotDifferentiable { op, what: format!("no derivative with respect to {operand} in the operation set") }
}
