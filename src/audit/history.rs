//! What training has left about each sample: its loss in every epoch, and whether the mentor's filter kept it.

use std::path::Path;

use crate::error::{Error, Result};

/// The losses of one training sample over the epochs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trajectory {
    /// Mean over the epochs that visited the sample.
    pub mean: f64,
    /// In the last of them.
    pub last: f64,
    /// Mean of `√p`, where `p = exp(−loss)` is the probability of the given label.
    pub belief: f64,
}

/// Reads `losses.f32`, little-endian `[epochs, samples]`: the cross entropy of every training sample's given label in
/// each epoch, NaN where the epoch did not visit it. One trajectory per sample, `None` for a sample that no epoch
/// visited.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] for a file that is not a whole number of epochs.
pub fn losses(path: &Path, samples: usize) -> Result<Vec<Option<Trajectory>>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    if bytes.is_empty() || bytes.len() % (4 * samples) != 0 {
        let what = format!("{} bytes are not the losses of whole epochs of {samples} samples", bytes.len());
        return Err(Error::file(path, what));
    }
    let at = |row: &[u8], i: usize| f32::from_le_bytes(std::array::from_fn(|b| row[4 * i + b]));
    let one = |i: usize| {
        let visited = bytes.chunks_exact(4 * samples).map(|row| f64::from(at(row, i))).filter(|loss| !loss.is_nan());
        let (mut n, mut sum, mut last, mut belief) = (0.0, 0.0, 0.0, 0.0);
        for loss in visited {
            (n, sum, last, belief) = (n + 1.0, sum + loss, loss, belief + (-loss / 2.0).exp());
        }
        (n > 0.0).then(|| Trajectory { mean: sum / n, last, belief: belief / n })
    };
    Ok((0..samples).map(one).collect())
}

/// One line of `kept.csv`: what the mentor's filter decided about a training sample.
#[derive(Clone, Copy, Debug, PartialEq, serde::Deserialize)]
struct KeptLine {
    index: u32,
    kept: u8,
}

/// Reads `kept.csv`: whether the filter of the last iteration kept the sample of each of `indices`, `None` for one that
/// the file lacks.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] naming the line for a file without columns `index` and `kept` (0 or 1), or that names
/// a sample twice.
pub fn kept(path: &Path, indices: impl Iterator<Item = u32>) -> Result<Vec<Option<bool>>> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let mut decided = std::collections::HashMap::new();
    for line in csv::Reader::from_reader(text.as_slice()).deserialize() {
        let line: KeptLine = line.map_err(|e| Error::file(path, e))?;
        if decided.insert(line.index, line.kept != 0).is_some() {
            return Err(Error::file(path, format!("sample {} is there twice", line.index)));
        }
    }
    Ok(indices.map(|i| decided.get(&i).copied()).collect())
}
