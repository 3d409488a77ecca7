//! The numbers that operands of a case hold.

use super::sums::Sum;
use crate::device::HostVec;
use crate::ops::Window;
use crate::rng::{Purpose, Stream, below, normal, permutation, stream, uniform};
use crate::tape::Meta;

/// What numbers an operand holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Data {
    /// Normal with mean 0 and variance 1.
    Normal,
    /// Normal, pushed 0.25 away from zero on its own side: no small step crosses the kink of a ReLU.
    Clear,
    /// A random order of multiples of 0.5 within ±8 times that, at least 0.5 apart wherever two can meet in a
    /// pooling window: no small step changes a maximum.
    Spaced,
    /// Positive, between 0.1 and 1: weights of samples, gains.
    Positive,
    /// Normal with mean 0 and this standard deviation.
    Scaled(f64),
    /// Evenly spread between these.
    Between(f64, f64),
    /// Normal, but for the number at this position, counted from the end where it is negative, which is infinite or none at all.
    Planted(Bad, isize),
    /// All the same.
    Constant(f64),
    /// Class labels, below this number.
    Labels(usize),
    /// Below this number, and -1 for about half of them: ranks of neighbours.
    Ranks(usize),
    /// Probabilities `[N, classes, 1, 1]` whose rows sum to one.
    Distribution,
    /// For each pooling window a random position inside it.
    Position(Window),
    /// Batch mean per channel of the operand at this position.
    MeanOf(usize),
    /// Biased batch variance per channel of the operand at this position.
    VarianceOf(usize),
    /// A sum over samples and pixels of other operands.
    Sum(Sum),
}

/// What is no finite number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// Infinity.
    Infinite,
    /// Negative infinity.
    NegativeInfinite,
    /// Not a number.
    None,
}

/// The nearest single-precision number.
pub(super) fn single(x: f64) -> f64 {
    f64::from(x as f32)
}

impl Data {
    /// The operand whose statistics the numbers are, if they are.
    pub(super) fn derived_from(self) -> Option<usize> {
        match self {
            Data::MeanOf(i) | Data::VarianceOf(i) => Some(i),
            _ => None,
        }
    }

    /// Draws numbers for `meta`, all branches.
    pub(super) fn draw(self, meta: &Meta, branches: usize, seed: u64, key: u64, operand: u64) -> HostVec {
        let rng = &mut stream(seed, Purpose::Test, key, operand);
        let n = meta.total(branches);
        let mut reals = |f: &mut dyn FnMut(&mut Stream) -> f64| HostVec::F64((0..n).map(|_| single(f(rng))).collect());
        match self {
            Data::Normal => reals(&mut normal),
            Data::Scaled(by) => reals(&mut |rng| by * normal(rng)),
            Data::Between(from, to) => reals(&mut |rng| from + (to - from) * uniform(rng)),
            Data::Constant(x) => reals(&mut |_| x),
            Data::Planted(bad, at) => {
                let mut values: Vec<f64> = (0..n).map(|_| single(normal(rng))).collect();
                let at = if at < 0 { n - at.unsigned_abs() } else { at.unsigned_abs() };
                values[at] = match bad {
                    Bad::Infinite => f64::INFINITY,
                    Bad::NegativeInfinite => f64::NEG_INFINITY,
                    Bad::None => f64::NAN,
                };
                HostVec::F64(values)
            }
            Data::Positive => reals(&mut |rng| 0.1 + 0.9 * uniform(rng)),
            Data::Clear => reals(&mut |rng| {
                let x = normal(rng);
                x + 0.25f64.copysign(x)
            }),
            Data::Spaced => {
                let order = permutation(n, rng);
                // One image's pixels get distinct multiples; different images may share them.
                let image = meta.dims[2] * meta.dims[3];
                let mut ranked: Vec<f64> = Vec::with_capacity(n);
                for pixels in order.chunks(image) {
                    let mut by_value: Vec<usize> = (0..pixels.len()).collect();
                    by_value.sort_by_key(|&i| pixels[i]);
                    let mut values = vec![0.0; pixels.len()];
                    let middle = pixels.len() as f64 / 2.0;
                    by_value.iter().enumerate().for_each(|(rank, &i)| values[i] = 0.5 * (rank as f64 - middle));
                    ranked.extend(values);
                }
                HostVec::F64(ranked)
            }
            Data::Labels(classes) => HostVec::I32((0..n).map(|_| below(classes as u64, rng) as i32).collect()),
            Data::Ranks(count) => {
                let draw = |_| below(2 * count as u64, rng) as i32;
                HostVec::I32((0..n).map(draw).map(|r| if r < count as i32 { r } else { -1 }).collect())
            }
            Data::Distribution => {
                let [samples, classes, ..] = meta.dims;
                let mut values = Vec::with_capacity(n);
                for _ in 0..n / (samples * classes).max(1) * samples {
                    let row: Vec<f64> = (0..classes).map(|_| 0.05 + uniform(rng)).collect();
                    let total: f64 = row.iter().sum();
                    values.extend(row.iter().map(|p| single(p / total)));
                }
                HostVec::F64(values)
            }
            Data::Position(window) => {
                let ([.., h, w], [.., p, q]) = (window.image.dims, window.pooled.dims);
                let mut pick = |o: usize, size: usize| {
                    let from = (o * window.stride).saturating_sub(window.pad);
                    let to = (o * window.stride + window.size - window.pad).min(size);
                    from + below((to - from) as u64, rng) as usize
                };
                HostVec::I32((0..n).map(|i| (pick(i / q % p, h) * w + pick(i % q, w)) as i32).collect())
            }
            Data::MeanOf(_) | Data::VarianceOf(_) | Data::Sum(_) => HostVec::F64(vec![0.0; n]),
        }
    }

    /// Statistics of `values`, which have the shape `of`.
    pub(super) fn derive(self, of: &Meta, branches: usize, values: &HostVec) -> HostVec {
        let [n, c, h, w] = of.dims;
        let (image, values) = (h * w, values.to_f64());
        let mut result = Vec::new();
        for m in 0..of.total(branches) / of.len().max(1) {
            for channel in 0..c {
                let pixels = || (0..n).flat_map(|i| &values[((m * n + i) * c + channel) * image..][..image]);
                let count = (n * image) as f64;
                let mean = pixels().sum::<f64>() / count;
                result.push(match self {
                    Data::VarianceOf(_) => pixels().map(|x| (x - mean).powi(2)).sum::<f64>() / count,
                    _ => mean,
                });
            }
        }
        HostVec::F64(result)
    }
}
