//! From pixels to network input: normalisation, random crop, horizontal flip.

use rayon::prelude::*;

use super::dataset::{Dataset, ImageShape};
use crate::error::{Error, Result};
use crate::rng::{Purpose, below, stream};

/// Per-channel normalisation `(v/255 − mean) / std` of a pixel `v`.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalise {
    mean: Vec<f64>,
    std: Vec<f64>,
    /// The result for each channel and pixel value.
    table: Vec<[f32; 256]>,
}

impl Normalise {
    /// From the mean and standard deviation of each channel, in units of the full pixel range 255.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are not as many means as deviations, or one is not finite or not positive.
    pub fn new(mean: Vec<f64>, std: Vec<f64>) -> Result<Self> {
        let positive = std.iter().all(|s| s.is_finite() && *s > 0.0);
        if mean.len() != std.len() || !positive || !mean.iter().all(|m| m.is_finite()) {
            return Err(Error::usage(format!("normalisation with means {mean:?} and deviations {std:?}")));
        }
        let entry = |m: f64, s: f64, v: usize| ((v as f64 / 255.0 - m) / s) as f32;
        let table = mean.iter().zip(&std).map(|(&m, &s)| std::array::from_fn(|v| entry(m, s, v))).collect();
        Ok(Normalise { mean, std, table })
    }

    /// Mean and standard deviation (of the population) of every channel over all pixels of `data`.
    ///
    /// The sums are exact whole numbers, so the result does not depend on the number of threads. A channel without
    /// variation gets the deviation 1.
    ///
    /// # Errors
    /// [`Error::Usage`] if `data` holds no images.
    pub fn measure(data: &Dataset) -> Result<Self> {
        if data.is_empty() {
            return Err(Error::usage(format!("{}: no images to measure", data.name)));
        }
        let plane = data.height * data.width;
        let sums = (0..data.len())
            .into_par_iter()
            .fold(
                || vec![[0u64; 2]; data.channels],
                |mut sums, i| {
                    for (sum, pixels) in sums.iter_mut().zip(data.image(i).chunks_exact(plane)) {
                        sum[0] += pixels.iter().map(|&v| u64::from(v)).sum::<u64>();
                        sum[1] += pixels.iter().map(|&v| u64::from(v) * u64::from(v)).sum::<u64>();
                    }
                    sums
                },
            )
            .reduce(
                || vec![[0u64; 2]; data.channels],
                |a, b| a.iter().zip(&b).map(|(a, b)| [a[0] + b[0], a[1] + b[1]]).collect(),
            );
        let count = (data.len() * plane) as u64;
        let mean = sums.iter().map(|s| s[0] as f64 / count as f64 / 255.0).collect();
        let std = sums.iter().map(|s| {
            // n²·variance = n·Σv² − (Σv)²
            let spread = u128::from(count) * u128::from(s[1]) - u128::from(s[0]) * u128::from(s[0]);
            if spread == 0 { 1.0 } else { (spread as f64).sqrt() / count as f64 / 255.0 }
        });
        Normalise::new(mean, std.collect())
    }

    /// Mean of each channel, in units of the full pixel range 255.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Standard deviation of each channel, in units of the full pixel range 255.
    pub fn std(&self) -> &[f64] {
        &self.std
    }

    /// The normalised value of each of the 256 pixel values in channel `c`.
    ///
    /// # Panics
    /// If `c` is not below the number of channels.
    pub fn table(&self, c: usize) -> &[f32; 256] {
        &self.table[c]
    }
}

/// Random crop and flip.
///
/// As torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip` before `ToTensor` and `Normalize`: the
/// image is padded with black (pixel value 0, which normalisation then maps to `−mean/std`), a window of the
/// image's own size is cut out at random, then mirrored with probability ½.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Augment {
    /// Padding on every side, pixels; 0 for no crop.
    pub pad: usize,
    /// Whether to mirror half of the images left to right.
    pub flip: bool,
}

/// One draw of [`Augment`]: the window starts at (`dy`, `dx`) of the padded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Rows from the top of the padded image, `0..=2·pad`.
    pub dy: usize,
    /// Columns from the left of the padded image, `0..=2·pad`.
    pub dx: usize,
    /// Whether the window is mirrored.
    pub flip: bool,
}

impl Augment {
    /// Images as they are, for evaluation.
    pub const NONE: Augment = Augment { pad: 0, flip: false };

    /// The draw for one sample in one epoch, from a stream of its own.
    pub fn place(&self, seed: u64, epoch: u64, sample: u64) -> Placement {
        if *self == Augment::NONE {
            return Placement { dy: 0, dx: 0, flip: false };
        }
        let mut rng = stream(seed, Purpose::Augment, epoch, sample);
        let places = 2 * self.pad as u64 + 1;
        let (dy, dx) = (below(places, &mut rng) as usize, below(places, &mut rng) as usize);
        Placement { dy, dx, flip: below(2, &mut rng) == 1 && self.flip }
    }

    /// Writes `image` (`[C, H, W]` bytes) as placed and normalised to `out` (`[C, H, W]`).
    ///
    /// # Panics
    /// If a slice is not `shape.numel()` long, `normalise` has fewer channels, or `place` lies outside `0..=2·pad`.
    pub fn write(&self, image: &[u8], shape: ImageShape, place: Placement, normalise: &Normalise, out: &mut [f32]) {
        let (height, width, pad) = (shape.height, shape.width, self.pad);
        assert!(image.len() == shape.numel() && out.len() == shape.numel(), "image and output of {shape}");
        // Columns x of the window that show the image: 0 ≤ x + dx − pad < width.
        let left = pad.saturating_sub(place.dx).min(width);
        let right = (width + pad).saturating_sub(place.dx).min(width).max(left);
        for c in 0..shape.channels {
            let table = normalise.table(c);
            for y in 0..height {
                let row = &mut out[(c * height + y) * width..][..width];
                let source = (y + place.dy).checked_sub(pad).filter(|&source| source < height);
                match source {
                    Some(source) if left < right => {
                        let first = (c * height + source) * width + left + place.dx - pad;
                        row[..left].fill(table[0]);
                        for (value, &pixel) in row[left..right].iter_mut().zip(&image[first..]) {
                            *value = table[usize::from(pixel)];
                        }
                        row[right..].fill(table[0]);
                    }
                    _ => row.fill(table[0]),
                }
                if place.flip {
                    row.reverse();
                }
            }
        }
    }
}
