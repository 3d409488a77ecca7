//! Starting values of parameters.

use super::{Init, ModelSpec};
use crate::rng::{Purpose, normal, stream, uniform};

/// Starting values of all parameters of `spec`, in the order of [`ModelSpec::params`]; the same for the same seed and
/// the same number of the `draw`, from 0.
pub fn he_init(spec: &ModelSpec, seed: u64, draw: u64) -> Vec<Vec<f32>> {
    let tensor = |(i, p): (usize, &super::ParamSpec)| -> Vec<f32> {
        let mut rng = stream(seed, Purpose::Init, i as u64, draw);
        let n = p.meta.len();
        match p.init {
            Init::One => vec![1.0; n],
            Init::Zero => vec![0.0; n],
            Init::Linear { fan_in } => {
                let bound = 1.0 / (fan_in as f64).sqrt();
                (0..n).map(|_| ((uniform(&mut rng) * 2.0 - 1.0) * bound) as f32).collect()
            }
            Init::He => {
                let [k, _, r, s] = p.meta.dims;
                let deviation = (2.0 / (k * r * s) as f64).sqrt();
                (0..n).map(|_| (normal(&mut rng) * deviation) as f32).collect()
            }
        }
    };
    spec.params().iter().enumerate().map(tensor).collect()
}
