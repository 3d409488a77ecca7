//! Seeded random streams that are the same on every platform and for every number of threads.
//!
//! Every random decision of the project draws from a stream named by (seed, [`Purpose`], a, b), for instance
//! (seed, augmentation, epoch, sample): what is drawn never depends on who drew before. The generator is PCG64
//! (O'Neill 2014); its 256 bits of state and increment come from SplitMix64 (Steele, Lea, Flood 2014).

use rand::Rng;
use rand_pcg::Pcg64;

/// The generator of one stream.
pub type Stream = Pcg64;

/// What a stream is for. The numbers are part of every recorded result: add new ones, never change one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Which labels are corrupted, and into what.
    Noise = 1,
    /// The validation split.
    Split = 2,
    /// The balanced subset of the training set.
    Subset = 3,
    /// The order of the samples in an epoch.
    Shuffle = 4,
    /// Crop and flip of one sample in one epoch.
    Augment = 5,
    /// Initial parameters.
    Init = 6,
    /// MLNT's synthetic labels.
    Synthetic = 7,
    /// Test inputs, benchmarks and gradient-check directions.
    Test = 8,
}

/// One output of SplitMix64 for state `z` (the state is advanced by the golden-ratio increment first).
fn splitmix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The stream named (`seed`, `purpose`, `a`, `b`), for instance with `a` the epoch and `b` the sample.
///
/// Equal names give equal streams; names that differ anywhere give unrelated ones.
pub fn stream(seed: u64, purpose: Purpose, a: u64, b: u64) -> Stream {
    let key = [purpose as u64, a, b].into_iter().fold(splitmix(seed), |h, word| splitmix(h ^ splitmix(word)));
    let word = |i: u64| u128::from(splitmix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
    Pcg64::new(word(0) << 64 | word(1), word(2) << 64 | word(3))
}

/// A uniform integer in `0..n`, without modulo bias (Lemire 2019). `n` of 0 gives 0.
pub fn below(n: u64, rng: &mut Stream) -> u64 {
    let mut product = u128::from(rng.next_u64()) * u128::from(n);
    if (product as u64) < n {
        let threshold = n.wrapping_neg() % n;
        while (product as u64) < threshold {
            product = u128::from(rng.next_u64()) * u128::from(n);
        }
    }
    (product >> 64) as u64
}

/// A uniform number in `[0, 1)`, a multiple of 2⁻⁵³.
pub fn uniform(rng: &mut Stream) -> f64 {
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// A number from the normal distribution with mean 0 and variance 1 (Marsaglia's polar method, one of the pair).
pub fn normal(rng: &mut Stream) -> f64 {
    loop {
        let (u, v) = (2.0 * uniform(rng) - 1.0, 2.0 * uniform(rng) - 1.0);
        let s = u * u + v * v;
        if s > 0.0 && s < 1.0 {
            return u * (-2.0 * ln(s) / s).sqrt();
        }
    }
}

/// Natural logarithm of a positive normal number, by IEEE basic operations only: the system's `log` may round
/// differently on another platform. `ln(2^e·m) = e·ln 2 + 2·artanh((m−1)/(m+1))` with `m` in `[√½, √2)`.
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if m >= std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    let t = (m - 1.0) / (m + 1.0);
    let series = (0..12).rev().fold(0.0, |sum, k| sum * (t * t) + 1.0 / f64::from(2 * k + 1));
    f64::from(exponent) * std::f64::consts::LN_2 + 2.0 * t * series
}

/// A uniformly random order of `0..n` (Fisher and Yates). `n` must fit in 32 bits, as every sample count does.
pub fn permutation(n: usize, rng: &mut Stream) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, below(i as u64 + 1, rng) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm_is_accurate() {
        let mut rng = stream(1, Purpose::Test, 0, 0);
        for _ in 0..10_000 {
            let x = uniform(&mut rng).max(1e-300);
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1e-3), "{x}");
        }
    }

    #[test]
    fn normal_has_its_moments() {
        let mut rng = stream(2, Purpose::Test, 0, 0);
        let n = 200_000;
        let draws: Vec<f64> = (0..n).map(|_| normal(&mut rng)).collect();
        let moment = |p: i32| draws.iter().map(|x| x.powi(p)).sum::<f64>() / f64::from(n);
        assert!(moment(1).abs() < 0.012, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "{}", moment(2));
        assert!(moment(3).abs() < 0.05, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.15, "{}", moment(4));
    }

    #[test]
    fn below_is_uniform() {
        let mut rng = stream(3, Purpose::Test, 0, 0);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[below(7, &mut rng) as usize] += 1;
        }
        // Chi-squared with 6 degrees of freedom: 27.9 is exceeded once in 10,000 times.
        let chi: f64 = counts.iter().map(|&c| (f64::from(c) - 1e4).powi(2) / 1e4).sum();
        assert!(chi < 27.9, "{counts:?}");
        assert_eq!(below(1, &mut rng), 0);
        assert_eq!(below(0, &mut rng), 0);
    }

    #[test]
    fn streams_differ_in_every_word() {
        let first = |seed, purpose, a, b| stream(seed, purpose, a, b).next_u64();
        let mut seen = std::collections::HashSet::new();
        for i in 0..50 {
            for purpose in [Purpose::Noise, Purpose::Augment] {
                for j in 0..50 {
                    assert!(seen.insert(first(i, purpose, j, i + j)));
                }
            }
        }
        assert_ne!(first(1, Purpose::Augment, 2, 3), first(1, Purpose::Augment, 3, 2));
        assert_eq!(first(1, Purpose::Augment, 2, 3), first(1, Purpose::Augment, 2, 3));
    }
}
