//! What the tape knows of a tensor: shape, kind, element type, branching.

use std::fmt;

/// Element type as the tape sees it; a device chooses the width of `Real`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// Floating point in the precision of the device.
    Real,
    /// 32-bit integer: labels and pooling positions.
    Index,
}

/// What the dimensions mean. The order of elements of an activation is the device's own business;
/// weights and vectors are row-major everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `[N, C, H, W]`: samples, channels, height, width.
    Activation,
    /// `[K, C, R, S]`: output channels, input channels, kernel height and width.
    Weight,
    /// `[n, 1, 1, 1]`: one value per channel, per sample, or a single one.
    Vector,
}

/// Shape, kind, element type and branching of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Meta {
    /// Dimensions in the order of [`Kind`], without the branch axis.
    pub dims: [usize; 4],
    /// Meaning of the dimensions.
    pub kind: Kind,
    /// Element type.
    pub dtype: DType,
    /// True for a tensor that stands for M tensors.
    pub per_branch: bool,
}

impl Meta {
    /// Real activations `[n, c, h, w]`, shared.
    pub fn activation(n: usize, c: usize, h: usize, w: usize) -> Self {
        Meta { dims: [n, c, h, w], kind: Kind::Activation, dtype: DType::Real, per_branch: false }
    }

    /// Weights `[k, c, r, s]`, shared.
    pub fn weight(k: usize, c: usize, r: usize, s: usize) -> Self {
        Meta { dims: [k, c, r, s], kind: Kind::Weight, dtype: DType::Real, per_branch: false }
    }

    /// A vector of `n` values, shared.
    pub fn vector(n: usize) -> Self {
        Meta { dims: [n, 1, 1, 1], kind: Kind::Vector, dtype: DType::Real, per_branch: false }
    }

    /// Class labels of `n` samples, shared.
    pub fn labels(n: usize) -> Self {
        Meta { dtype: DType::Index, ..Meta::vector(n) }
    }

    /// The same, per branch.
    pub fn branched(self) -> Self {
        Meta { per_branch: true, ..self }
    }

    /// The same, shared.
    pub fn shared(self) -> Self {
        Meta { per_branch: false, ..self }
    }

    /// The same with branching `per_branch`.
    pub fn with_branching(self, per_branch: bool) -> Self {
        Meta { per_branch, ..self }
    }

    /// Elements of one branch.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// True when a branch holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements over all branches.
    pub fn total(&self, branches: usize) -> usize {
        self.len() * if self.per_branch { branches } else { 1 }
    }

    /// True when shape, kind and element type agree, whatever the branching.
    pub fn same_shape(&self, other: &Meta) -> bool {
        self.shared() == other.shared()
    }
}

impl fmt::Display for Meta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = if self.per_branch { "M×" } else { "" };
        match self.kind {
            Kind::Vector => write!(f, "{m}vector[{}]", self.dims[0])?,
            Kind::Activation => write!(f, "{m}activation{:?}", self.dims)?,
            Kind::Weight => write!(f, "{m}weight{:?}", self.dims)?,
        }
        if self.dtype == DType::Index { write!(f, " of indices") } else { Ok(()) }
    }
}
