//! Which training samples count in the classification loss, and how well that tells wrong labels from right ones.

use super::run_dir::RunDir;
use crate::error::Result;
use crate::fs::write_atomic;
use std::fmt::Write;

/// The samples of the training set whose given label is kept, in the order of the training set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    keep: Vec<bool>,
}

/// How dropping labels agrees with their being wrong. Fractions from 0 to 1; `None` where nothing is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// Wrong labels among the dropped ones.
    pub precision: Option<f64>,
    /// Dropped labels among the wrong ones.
    pub recall: Option<f64>,
}

impl Filter {
    /// Keeps all of `n` samples.
    pub fn all(n: usize) -> Self {
        Filter { keep: vec![true; n] }
    }

    /// Keeps the samples marked in `keep`.
    pub fn of(keep: Vec<bool>) -> Self {
        Filter { keep }
    }

    /// Keeps the samples to whose given label the mentor gives a probability greater than `tau`.
    pub fn by_probability(probabilities: &[f64], tau: f64) -> Self {
        Filter { keep: probabilities.iter().map(|p| *p > tau).collect() }
    }

    /// One mark per sample.
    pub fn marks(&self) -> &[bool] {
        &self.keep
    }

    /// Number of samples kept.
    pub fn kept(&self) -> usize {
        self.keep.iter().filter(|keep| **keep).count()
    }

    /// Number of samples dropped.
    pub fn dropped(&self) -> usize {
        self.keep.len() - self.kept()
    }

    /// Weights of the samples `ids` in the classification loss, `keep/Σkeep`, into `weights`, one for each; all zero
    /// where nothing is kept. Returns whether anything is.
    pub fn class_weights(&self, ids: &[u32], weights: &mut [f64]) -> bool {
        let keep = |id: &u32| self.keep[*id as usize];
        let kept = ids.iter().filter(|id| keep(id)).count();
        for (weight, id) in weights.iter_mut().zip(ids) {
            *weight = if keep(id) { 1.0 / kept as f64 } else { 0.0 };
        }
        kept > 0
    }

    /// Precision and recall of dropping, the positives being samples whose given label is wrong.
    pub fn quality(&self, given: &[i32], truth: impl Iterator<Item = i32>) -> Quality {
        let (mut wrong, mut found) = (0, 0);
        for ((keep, given), truth) in self.keep.iter().zip(given).zip(truth) {
            wrong += usize::from(*given != truth);
            found += usize::from(!keep && *given != truth);
        }
        let share = |of: usize| (of > 0).then(|| found as f64 / of as f64);
        Quality { precision: share(self.dropped()), recall: share(wrong) }
    }

    /// Writes `kept.csv`, a line per sample: its `index` in the data set, its given label, the mentor's probability of
    /// that label, and 1 if it is kept, else 0.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn write(
        &self,
        dir: &RunDir,
        index: impl Iterator<Item = u32>,
        given: &[i32],
        probabilities: &[f64],
    ) -> Result<()> {
        let mut text = String::from("index,given,probability,kept\n");
        for (((index, given), probability), keep) in index.zip(given).zip(probabilities).zip(&self.keep) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{index},{given},{probability},{}", u8::from(*keep));
        }
        write_atomic(dir.kept(), text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::{Filter, Quality};

    #[test]
    fn weights_are_equal_shares_of_what_is_kept() {
        let filter = Filter::by_probability(&[0.5, 0.01, 0.0, 0.011, 1.0], 0.01);
        assert_eq!(filter.marks(), [true, false, false, true, true]);
        assert_eq!((filter.kept(), filter.dropped()), (3, 2));
        let mut weights = [7.0; 4];
        assert!(filter.class_weights(&[4, 1, 2, 0], &mut weights));
        assert_eq!(weights, [0.5, 0.0, 0.0, 0.5]);
        let mut weights = [7.0; 2];
        assert!(!filter.class_weights(&[2, 1], &mut weights));
        assert_eq!(weights, [0.0; 2]);
        // As the weight that every sample has without a filter, to the bit.
        let mut weights = [0.0; 49];
        assert!(Filter::all(49).class_weights(&(0..49).collect::<Vec<u32>>(), &mut weights));
        assert!(weights.iter().all(|w| w.to_bits() == (1.0f64 / 49.0).to_bits()));
    }

    #[test]
    fn quality_counts_wrong_labels_among_the_dropped() {
        let filter = Filter::of(vec![true, false, false, false, true]);
        let quality = filter.quality(&[0, 1, 2, 3, 4], [0, 9, 9, 3, 9].into_iter());
        assert_eq!(quality, Quality { precision: Some(2.0 / 3.0), recall: Some(2.0 / 3.0) });
        let none = Filter::all(2).quality(&[0, 1], [0, 1].into_iter());
        assert_eq!(none, Quality { precision: None, recall: None });
    }
}
