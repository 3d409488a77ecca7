//! In-batch label transfer: the nearest neighbours of every sample, and labels taken from them. Neither has a
//! derivative: labels are constants.

use super::{Operation, PullbackArgs, any_branched, widest};
use crate::error::{Error, Result};
use crate::tape::{DType, Kind, Meta, Tape, Tensor};

/// `features → indices`: for every sample of a batch its nearest others, nearest first.
///
/// Features `[k, F, 1, 1]`, result `[k, count, 1, 1]`. Euclidean distance, the sample itself excluded, the smaller
/// index first on ties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NearestNeighbours {
    /// Neighbours per sample, below k.
    pub count: usize,
}

/// `(labels, neighbours, ranks) → labels`: sample i takes the label of its neighbour number `ranks[i]`, and keeps its
/// own where that is negative. Labels and ranks `[k]`, neighbours `[k, count, 1, 1]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferLabels;

impl Operation for NearestNeighbours {
    fn name(&self) -> &'static str {
        "nearest_neighbours"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = inputs else { return Err(Error::shape(self.name(), "takes one operand")) };
        let [k, _, h, w] = x.dims;
        if x.kind != Kind::Activation || (h, w) != (1, 1) || self.count >= k || self.count == 0 {
            return Err(Error::shape(self.name(), format!("{} neighbours each among {x}", self.count)));
        }
        let index = Meta { dtype: DType::Index, ..Meta::activation(k, self.count, 1, 1) };
        Ok(vec![index.with_branching(x.per_branch)])
    }
    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![None])
    }
    fn flops(&self, inputs: &[Meta], _: &[Meta], branches: usize) -> u64 {
        // A difference, a square and a sum per pair of samples and feature.
        widest(inputs, branches) * 3 * inputs[0].dims[0] as u64
    }
}

impl Operation for TransferLabels {
    fn name(&self) -> &'static str {
        "transfer_labels"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [labels, neighbours, _] = inputs else { return Err(Error::shape(self.name(), "takes three operands")) };
        let k = labels.dims[0];
        let index = Meta { dtype: DType::Index, ..Meta::activation(k, neighbours.dims[1], 1, 1) };
        super::expect(self.name(), inputs, &[Meta::labels(k), index, Meta::labels(k)])?;
        Ok(vec![Meta::labels(k).with_branching(any_branched(inputs))])
    }
    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![None; 3])
    }
    fn flops(&self, _: &[Meta], _: &[Meta], _: usize) -> u64 {
        0
    }
}

impl Tape {
    /// The `count` nearest others of every sample by its features `[k, F, 1, 1]`.
    ///
    /// # Errors
    /// When `features` has no such shape, or there are not `count` others.
    pub fn nearest_neighbours(&mut self, features: Tensor, count: usize) -> Result<Tensor> {
        self.record1(NearestNeighbours { count }, &[features], false)
    }

    /// Labels of which some are taken from neighbours: see [`TransferLabels`].
    ///
    /// # Errors
    /// When there is not one label, one list of neighbours and one rank per sample.
    pub fn transfer_labels(&mut self, labels: Tensor, neighbours: Tensor, ranks: Tensor) -> Result<Tensor> {
        self.record1(TransferLabels, &[labels, neighbours, ranks], false)
    }
}
