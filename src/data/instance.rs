//! Noise that depends on the image: Xia et al., *Part-dependent Label Noise: Towards Instance-dependent Label Noise*,
//! NeurIPS 2020, algorithm 2, as the authors released it.
//!
//! Sample `i` with image `x` and true label `y` gets a flip rate `q` from the normal distribution around the nominal
//! rate with deviation 0.1, truncated to `[0, 1]`. A random matrix `W_y`, one for each class, with entries from the standard
//! normal distribution scores every class by `x·W_y`. The label stays `y` with probability `1 − q`; else it is drawn
//! from the softmax of the scores of the other classes. The expected rate of wrong labels is the mean of `q`: the
//! nominal rate, but for rates near 0 or 1, where the truncation moves it (0.08 for a nominal rate of 0).
//!
//! `x` is the whole image, normalised by the mean and deviation of each channel over the images given.

use rayon::prelude::*;

use super::augment::Normalise;
use super::dataset::Dataset;
use super::noise::{NoiseKind, NoisyLabels, check, disagreement};
use crate::error::Result;
use crate::rng::{Purpose, normal, stream, uniform};

/// Standard deviation of the flip rates before truncation.
const RATE_DEVIATION: f64 = 0.1;

/// Corrupts the labels of `data` at `rate`. The result depends on the images, labels, rate and seed only; sums and
/// exponentials are made of IEEE's basic operations in a fixed order, so it is the same on every platform too.
///
/// # Errors
/// [`crate::Error::Usage`] if `rate` is not in `0..=1`, there are fewer than two classes, or no images.
pub fn corrupt(data: &Dataset, rate: f64, seed: u64) -> Result<NoisyLabels> {
    check(data.classes, NoiseKind::Instance, rate)?;
    let normalise = Normalise::measure(data)?;
    let mut members = vec![Vec::new(); data.classes];
    (0..data.len()).for_each(|i| members[data.label(i)].push(i));
    let drawn: Vec<(usize, u16)> = members
        .par_iter()
        .enumerate()
        .flat_map(|(class, members)| {
            // Only one class's matrix at a time: those of all classes of CIFAR-100 would take 245 MB.
            let matrix = if members.is_empty() { Vec::new() } else { matrix(data, class, seed) };
            let label = |&i: &usize| (i, draw(data, &normalise, &matrix, i, rate, seed));
            members.par_iter().map(label).collect::<Vec<_>>()
        })
        .collect();
    let mut labels = data.labels().to_vec();
    drawn.into_iter().for_each(|(i, label)| labels[i] = label);
    let realised_rate = disagreement(&labels, data.labels());
    Ok(NoisyLabels { labels, realised_rate, nominal: rate, kind: NoiseKind::Instance, seed })
}

/// The random matrix of a class, `[pixels, classes]`.
fn matrix(data: &Dataset, class: usize, seed: u64) -> Vec<f64> {
    let mut rng = stream(seed, Purpose::Noise, 2, class as u64);
    (0..data.shape().numel() * data.classes).map(|_| normal(&mut rng)).collect()
}

/// The label of sample `i`.
fn draw(data: &Dataset, normalise: &Normalise, matrix: &[f64], i: usize, rate: f64, seed: u64) -> u16 {
    let mut rng = stream(seed, Purpose::Noise, 3, i as u64);
    let flip = std::iter::repeat_with(|| rate + RATE_DEVIATION * normal(&mut rng));
    let flip = flip.take(1_000_000).find(|q| (0.0..=1.0).contains(q)).unwrap_or(rate);
    let probabilities = transition(&scores(data, normalise, matrix, i), data.label(i), flip);
    let mut left = uniform(&mut rng);
    let chosen = probabilities.iter().position(|p| {
        left -= p;
        left < 0.0
    });
    // Rounding may leave a little: the true label, which never has probability 0 unless the flip rate is 1.
    chosen.unwrap_or(data.label(i)) as u16
}

/// The score of every class for sample `i`: its normalised pixels times `matrix`.
fn scores(data: &Dataset, normalise: &Normalise, matrix: &[f64], i: usize) -> Vec<f64> {
    let plane = data.height * data.width;
    let mut scores = vec![0.0; data.classes];
    for ((at, &pixel), row) in data.image(i).iter().enumerate().zip(matrix.chunks_exact(data.classes)) {
        let value = f64::from(normalise.table(at / plane)[usize::from(pixel)]);
        scores.iter_mut().zip(row).for_each(|(score, weight)| *score += value * weight);
    }
    scores
}

/// The distribution of the given label of a sample of class `truth`: `1 − flip` for `truth`, and the softmax of the
/// other classes' scores times `flip`.
fn transition(scores: &[f64], truth: usize, flip: f64) -> Vec<f64> {
    let others = || scores.iter().enumerate().filter(|&(class, _)| class != truth);
    let top = others().map(|(_, &score)| score).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = others().map(|(_, &score)| exp(score - top)).sum();
    let weight = |(class, &score): (usize, &f64)| {
        if class == truth { 1.0 - flip } else { flip * exp(score - top) / sum }
    };
    scores.iter().enumerate().map(weight).collect()
}

/// The exponential of a number of at most 0, by IEEE's basic operations only: `2^k·e^r` with `|r| ≤ ½·ln 2`.
fn exp(x: f64) -> f64 {
    // Below, the result is no normal number; as a probability it is nothing.
    if x < -700.0 {
        return 0.0;
    }
    let k = (x * std::f64::consts::LOG2_E).round();
    let r = x - k * std::f64::consts::LN_2;
    let series = (1..=14).rev().fold(1.0, |sum, n| 1.0 + sum * r / f64::from(n));
    series * f64::from_bits(((1023 + k as i64) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::super::dataset::{Family, ImageShape, Segment};
    use super::super::sample;
    use super::*;

    #[test]
    fn exponential_is_accurate() {
        for i in 0..70_000 {
            let x = -f64::from(i) / 100.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 2e-13, "{x}");
        }
        assert_eq!((exp(0.0), exp(-1e9), exp(f64::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn transition_is_its_formula() {
        let scores = [0.3, -1.0, 2.0, 0.0];
        let found = transition(&scores, 2, 0.3);
        let sum: f64 = [0.3f64, -1.0, 0.0].iter().map(|s| s.exp()).sum();
        let expected = [0.3 * 0.3f64.exp() / sum, 0.3 * (-1.0f64).exp() / sum, 0.7, 0.3 / sum];
        found.iter().zip(expected).for_each(|(f, e)| assert!((f - e).abs() < 1e-14, "{f} {e}"));
        assert_eq!(transition(&[5.0, 5.0], 0, 1.0), [0.0, 1.0]);
    }

    #[test]
    fn scores_are_a_product_with_the_normalised_image() {
        let data = sample::load().unwrap().train.subset(&[3, 17]).unwrap();
        let normalise = Normalise::measure(&data).unwrap();
        let matrix = matrix(&data, 4, 9);
        let found = scores(&data, &normalise, &matrix, 1);
        for (class, score) in found.iter().enumerate() {
            let pixels =
                data.image(1).iter().map(|&v| (f64::from(v) / 255.0 - normalise.mean()[0]) / normalise.std()[0]);
            let expected: f64 = pixels.enumerate().map(|(at, v)| v * matrix[at * 10 + class]).sum();
            assert!((score - expected).abs() < 1e-4, "{score} {expected}");
        }
    }

    #[test]
    fn rates_are_near_the_nominal_and_everything_is_decided_by_the_seed() {
        let data = sample::load().unwrap().train;
        for rate in [0.2, 0.4, 0.6] {
            let noisy = corrupt(&data, rate, 1).unwrap();
            // 6,000 draws at the mean of q: standard deviation at most 0.0065, bound at 4 of them.
            assert!((noisy.realised_rate - rate).abs() < 0.026, "{rate}: {}", noisy.realised_rate);
            assert_eq!(noisy.realised_rate, disagreement(&noisy.labels, data.labels()));
        }
        let run = |threads, seed| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| corrupt(&data, 0.4, seed).unwrap())
        };
        assert_eq!(run(1, 5), run(3, 5));
        assert_ne!(run(1, 5).labels, run(1, 6).labels);
        assert!(corrupt(&data, 1.5, 1).is_err());
        assert!(corrupt(&data.subset(&[]).unwrap(), 0.5, 1).is_err());
    }

    /// Two images, each many times, all of one class: every copy has the same distribution over the wrong labels, and
    /// the two images have different ones.
    #[test]
    fn the_image_decides_where_a_label_goes() {
        let shape = ImageShape { channels: 1, height: 2, width: 2 };
        let images = [[200u8, 10, 40, 90], [10, 180, 120, 60]];
        let bytes: Vec<u8> = (0..4000).flat_map(|i| images[i % 2]).collect();
        let segment = Segment { bytes: bytes.into(), first: 0, stride: 4, count: 4000 };
        let names = (0..5).map(|c| c.to_string()).collect();
        let data = Dataset::from_parts("two", Family::Other, shape, names, vec![2; 4000], vec![segment]);
        let noisy = corrupt(&data, 0.5, 3).unwrap();
        let normalise = Normalise::measure(&data).unwrap();
        let matrix = matrix(&data, 2, 3);
        let mut expected = [[0.0; 5]; 2];
        for (image, expected) in expected.iter_mut().enumerate() {
            expected.copy_from_slice(&transition(&scores(&data, &normalise, &matrix, image), 2, 0.5));
            for (class, p) in expected.iter().copied().enumerate() {
                let given = (0..2000).filter(|i| usize::from(noisy.labels[2 * i + image]) == class).count();
                // The mean of q is the rate 0.5; 4.5 deviations of a binomial share.
                let bound = 4.5 * (p * (1.0 - p) / 2000.0).sqrt() + 1e-3;
                assert!(
                    (given as f64 / 2000.0 - p).abs() < bound,
                    "image {image}, class {class}: {given} of 2000, {p}"
                );
            }
        }
        let apart: f64 = (0..5).map(|class| (expected[0][class] - expected[1][class]).abs()).sum();
        assert!(apart > 0.2, "{expected:?}");
    }
}
