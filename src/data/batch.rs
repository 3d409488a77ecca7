//! Filling batches: images of chosen samples as network input, in parallel and without allocation.

use rayon::prelude::*;

use super::augment::{Augment, Normalise};
use super::dataset::Dataset;
use super::rng::{Purpose, permutation, stream};
use crate::error::{Error, Result};

/// The order in which epoch `epoch` visits `n` samples: a permutation of `0..n`.
pub fn epoch_order(n: usize, seed: u64, epoch: u64) -> Vec<u32> {
    permutation(n, &mut stream(seed, Purpose::Shuffle, epoch, 0))
}

/// Turns sample indices into network input.
#[derive(Debug, Clone)]
pub struct Batcher<'a> {
    data: &'a Dataset,
    normalise: &'a Normalise,
    augment: Augment,
    seed: u64,
}

impl<'a> Batcher<'a> {
    /// A batcher over `data`; `seed` names the augmentation streams.
    ///
    /// # Errors
    /// [`Error::Usage`] if `normalise` is for another number of channels or the padding is not smaller than the
    /// image's sides.
    pub fn new(data: &'a Dataset, normalise: &'a Normalise, augment: Augment, seed: u64) -> Result<Self> {
        if normalise.mean().len() != data.channels {
            return Err(Error::usage(format!(
                "normalisation for {} channels, but the images of {} are {}",
                normalise.mean().len(),
                data.name,
                data.shape()
            )));
        }
        if augment.pad >= data.height.min(data.width) {
            return Err(Error::usage(format!(
                "padding {} is not smaller than the images of {}, {}",
                augment.pad,
                data.name,
                data.shape()
            )));
        }
        Ok(Batcher { data, normalise, augment, seed })
    }

    /// Writes samples `indices` as augmented in `epoch` to `out`, `[k, C, H, W]` with `k = indices.len()`.
    ///
    /// What a sample looks like depends on (seed, epoch, sample) only: neither on its place in the batch nor on the
    /// number of threads.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` has another length or an index is not below `len()` of the data.
    pub fn fill(&self, epoch: u64, indices: &[u32], out: &mut [f32]) -> Result<()> {
        let shape = self.data.shape();
        if out.len() != indices.len() * shape.numel() {
            return Err(Error::shape("batch", format!("{} values for {} images of {shape}", out.len(), indices.len())));
        }
        if let Some(bad) = indices.iter().find(|&&i| i as usize >= self.data.len()) {
            return Err(Error::shape("batch", format!("sample {bad} of {}", self.data.len())));
        }
        out.par_chunks_mut(shape.numel()).zip(indices).for_each(|(out, &i)| {
            let place = self.augment.place(self.seed, epoch, i.into());
            self.augment.write(self.data.image(i as usize), shape, place, self.normalise, out);
        });
        Ok(())
    }
}
