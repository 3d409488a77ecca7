//! The fusions by name, and sets of them.

/// A pass that replaces a composition of operations by one with the same result.
///
/// They are applied in this order, and it matters: pairs are found among plain convolutions, sums are pushed into what they became, and
/// statistics and the sums of batch norms are those of a finished sum. Every set of them gives a plan of the same step. One that works on
/// what others make finds nothing without these, and finds the less the more of them are left out.
///
/// The first and the sixth are for every device; the others make operations that only the CUDA kernels know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fusion {
    /// `relu(bn(x))` is one operation, and the masks of ReLU are part of the batch norm's backward and double backward.
    BatchNormRelu,
    /// Small tensors filled with the same number are one.
    SharedConstants,
    /// `fprop(ẋ, w) + fprop(x, ẇ)` is one product.
    TangentPairs,
    /// dgrad and wgrad of the same cotangent are one operation.
    BackwardPairs,
    /// `relu(bn(x))` is computed again by those that read it. Finds nothing without [`BatchNormRelu`](Self::BatchNormRelu).
    Recomputation,
    /// Large sums are computed by the operations that make their last terms, each of which adds to what the one before made.
    StartedSums,
    /// Sums of sums of parameters and other small tensors are one sum.
    FlatSums,
    /// Convolutions find mean and variance of their results.
    Statistics,
    /// Convolutions find the sums of a batch norm's backward, of the cotangent that they make. Finds nothing without
    /// [`BackwardPairs`](Self::BackwardPairs) and [`Recomputation`](Self::Recomputation).
    BackwardSums,
    /// What a batch norm's backward adds to its result is two tensors and not their sum. Finds nothing without
    /// [`BackwardSums`](Self::BackwardSums) and [`StartedSums`](Self::StartedSums).
    BackwardStarts,
    /// Convolutions find the sums of a batch norm's second order, and make the tangent of its result as they load. Finds nothing without
    /// [`TangentPairs`](Self::TangentPairs), [`BackwardSums`](Self::BackwardSums) and [`StartedSums`](Self::StartedSums).
    SecondOrder,
    /// Convolutions make their cotangents, by a batch norm's backward, as they load. Finds nothing without
    /// [`BackwardSums`](Self::BackwardSums).
    LoadedCotangents,
    /// Cotangents of residual sums are made again for the second order: [`PlanOptions::recompute`](crate::plan::PlanOptions::recompute).
    /// Finds nothing without [`LoadedCotangents`](Self::LoadedCotangents) and [`StartedSums`](Self::StartedSums).
    ResidualChain,
    /// What the states become at the end of a step is one operation, and so is what the parameters become that move within it.
    Update,
}

impl Fusion {
    /// All of them, in the order in which they are applied.
    pub const ALL: [Fusion; 14] = [
        Fusion::BatchNormRelu,
        Fusion::SharedConstants,
        Fusion::TangentPairs,
        Fusion::BackwardPairs,
        Fusion::Recomputation,
        Fusion::StartedSums,
        Fusion::FlatSums,
        Fusion::Statistics,
        Fusion::BackwardSums,
        Fusion::BackwardStarts,
        Fusion::SecondOrder,
        Fusion::LoadedCotangents,
        Fusion::ResidualChain,
        Fusion::Update,
    ];

    const fn bit(self) -> u16 {
        1 << self as u16
    }
}

/// A set of fusions.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fusions {
    bits: u16,
}

impl Fusions {
    /// Every fusion.
    pub const ALL: Self = Fusions { bits: (1 << Fusion::ALL.len()) - 1 };
    /// None of them.
    pub const NONE: Self = Fusions { bits: 0 };

    /// The set and `fusion`.
    #[must_use]
    pub const fn with(self, fusion: Fusion) -> Self {
        Fusions { bits: self.bits | fusion.bit() }
    }

    /// The set without `fusion`.
    #[must_use]
    pub const fn without(self, fusion: Fusion) -> Self {
        Fusions { bits: self.bits & !fusion.bit() }
    }

    /// Whether `fusion` is in the set.
    pub const fn has(self, fusion: Fusion) -> bool {
        self.bits & fusion.bit() != 0
    }
}

impl std::fmt::Debug for Fusions {
    /// The names in the set.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(Fusion::ALL.into_iter().filter(|fusion| self.has(*fusion))).finish()
    }
}
