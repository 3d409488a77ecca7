//! Starting values of parameters.

use super::{Init, ModelSpec};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// Starting values of all parameters of `spec`, in the order of [`ModelSpec::params`]; the same for the same seed.
pub fn he_init(spec: &ModelSpec, seed: u64) -> Vec<Vec<f32>> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let params = spec.params();
    params
        .iter()
        .map(|p| {
            let n = p.meta.len();
            match p.init {
                Init::One => vec![1.0; n],
                Init::Zero => vec![0.0; n],
                Init::Linear { fan_in } => {
                    let bound = 1.0 / (fan_in as f64).sqrt();
                    (0..n).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect()
                }
                Init::He => {
                    let [k, _, r, s] = p.meta.dims;
                    let deviation = (2.0 / (k * r * s) as f64).sqrt();
                    (0..n).map(|_| (normal(&mut rng) * deviation) as f32).collect()
                }
            }
        })
        .collect()
}

/// A standard normal number (Box and Muller's transform).
fn normal(rng: &mut Pcg64Mcg) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}
