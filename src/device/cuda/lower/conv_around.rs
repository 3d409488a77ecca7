//! What stands around the product of a fused convolution: operands that are made of others, and what is found of the result.

use super::Operand;
use super::conv_params::{ConvNorm, ConvPair, ConvSums};
use bytemuck::Zeroable;

/// An operand that is made of a given tensor and of what a batch norm with a ReLU behind it normalises.
pub(super) struct Pair {
    /// What the batch norm normalises.
    pub with: Operand,
    /// `g, b, mean, var`
    pub norm: [Operand; 4],
    /// Of delta `dg, db`, of a tangent `ġ, ḃ, ⟨ẋ⟩, ρ`.
    pub vectors: Vec<Operand>,
    /// A further term of delta.
    pub residual: Option<Operand>,
    /// Where delta is stored.
    pub kept: Option<Operand>,
}

impl Pair {
    /// What it is made of beside the given tensor.
    pub fn operands(&self) -> impl Iterator<Item = &Operand> {
        [&self.with].into_iter().chain(&self.norm).chain(&self.vectors).chain(&self.residual)
    }

    /// The activations that it reads beside the given one, and that it makes.
    pub fn activations(&self) -> impl Iterator<Item = &Operand> {
        [&self.with].into_iter().chain(&self.residual).chain(&self.kept)
    }

    /// As the kernels see it, with sums over `count` samples and pixels.
    pub fn lower(&self, count: usize) -> ConvPair {
        let mut pair = ConvPair {
            at: self.with.at,
            branch: self.with.branch,
            norm: ConvNorm::of_four(&self.norm),
            half: self.with.half.into(),
            count: count as f32,
            ..ConvPair::zeroed()
        };
        for (i, vector) in self.vectors.iter().enumerate() {
            (pair.vectors[i], pair.vector_branches[i]) = (vector.at, vector.branch);
        }
        if let Some(o) = &self.residual {
            (pair.residual, pair.residual_branch, pair.residual_half) = (o.at, o.branch, o.half.into());
        }
        if let Some(o) = &self.kept {
            (pair.kept, pair.kept_branch, pair.kept_half) = (o.at, o.branch, o.half.into());
        }
        pair
    }
}

/// Sums with what a batch norm normalises.
pub(super) struct Sums {
    /// What it normalises.
    pub next: Operand,
    /// Gain and bias, if the mask of a ReLU behind it counts.
    pub gain: Option<[Operand; 2]>,
    /// Mean and variance.
    pub moments: [Operand; 2],
    /// Of a cotangent `dg, db`, of a tangent its mean and ρ.
    pub results: [Operand; 2],
}

impl Sums {
    /// As the kernels see them.
    pub fn lower(&self) -> ConvSums {
        ConvSums {
            next: self.next.at,
            next_branch: self.next.branch,
            norm: ConvNorm::new(self.gain.as_ref(), &self.moments),
            results: self.results.map(|result| result.at),
            next_half: self.next.half.into(),
            unused: 0,
        }
    }
}

/// What is found of the first result.
pub(super) enum Found {
    /// Nothing.
    Nothing,
    /// Mean and variance.
    Statistics([Operand; 2]),
    /// Sums.
    Sums(Box<Sums>),
}

impl Found {
    /// All its tensors.
    pub fn operands(&self) -> impl Iterator<Item = &Operand> {
        let vectors = match self {
            Found::Sums(sums) => Some(sums.gain.iter().flatten().chain(&sums.moments)),
            _ => None,
        };
        self.next().into_iter().chain(vectors.into_iter().flatten()).chain(self.results())
    }

    /// The activation that it reads.
    pub fn next(&self) -> Option<&Operand> {
        match self {
            Found::Sums(sums) => Some(&sums.next),
            _ => None,
        }
    }

    /// What it makes.
    pub fn results(&self) -> &[Operand] {
        match self {
            Found::Nothing => &[],
            Found::Statistics(results) => results,
            Found::Sums(sums) => &sums.results,
        }
    }
}
