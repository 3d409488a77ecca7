//! What stands around the product of a fused convolution: operands that are made of two tensors, and what is found of the result.

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
}

impl Pair {
    /// All its tensors.
    pub fn operands(&self) -> impl Iterator<Item = &Operand> {
        [&self.with].into_iter().chain(&self.norm).chain(&self.vectors)
    }

    /// As the kernels see it, with sums over `count` samples and pixels.
    pub fn lower(&self, count: usize) -> ConvPair {
        let mut pair = ConvPair {
            at: self.with.at,
            branch: self.with.branch,
            norm: ConvNorm::new(&self.norm),
            half: self.with.half.into(),
            count: count as f32,
            ..ConvPair::zeroed()
        };
        for (i, vector) in self.vectors.iter().enumerate() {
            (pair.vectors[i], pair.vector_branches[i]) = (vector.at, vector.branch);
        }
        pair
    }
}

/// Sums with what a batch norm with a ReLU behind it normalises.
pub(super) struct Sums {
    /// What it normalises.
    pub next: Operand,
    /// `g, b, mean, var`
    pub norm: [Operand; 4],
    /// Of a tangent: the cotangent behind the ReLU, and its sum.
    pub dy: Option<[Operand; 2]>,
    /// Of a cotangent `dg, db`, of a tangent its mean, ρ and the covariance.
    pub results: Vec<Operand>,
}

impl Sums {
    /// As the kernels see them.
    pub fn lower(&self) -> ConvSums {
        let mut sums = ConvSums {
            next: self.next.at,
            next_branch: self.next.branch,
            next_half: self.next.half.into(),
            norm: ConvNorm::new(&self.norm),
            ..ConvSums::zeroed()
        };
        if let Some([dy, db]) = &self.dy {
            (sums.dy, sums.dy_branch, sums.dy_half) = (dy.at, dy.branch, dy.half.into());
            (sums.db, sums.db_branch) = (db.at, db.branch);
        }
        self.results.iter().enumerate().for_each(|(i, result)| sums.results[i] = result.at);
        sums
    }
}

/// What is found of the first result.
pub(super) enum Found {
    /// Nothing.
    Nothing,
    /// Mean and variance.
    Statistics(Vec<Operand>),
    /// Sums.
    Sums(Box<Sums>),
}

impl Found {
    /// All its tensors.
    pub fn operands(&self) -> Vec<&Operand> {
        let vectors = match self {
            Found::Sums(sums) => sums.norm.iter().chain(sums.dy.iter().map(|[_, db]| db)).collect(),
            _ => Vec::new(),
        };
        self.activations().into_iter().chain(vectors).chain(self.results()).collect()
    }

    /// The activations that it reads.
    pub fn activations(&self) -> Vec<&Operand> {
        match self {
            Found::Sums(sums) => [&sums.next].into_iter().chain(sums.dy.iter().map(|[dy, _]| dy)).collect(),
            _ => Vec::new(),
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
