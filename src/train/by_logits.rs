//! Steps whose loss the host computes: the device gives the logits of a training-mode forward, gets the gradient at
//! them, and goes down along it (`docs/method.md`, "Other methods").

use super::config::Config;
use super::engine::{Engine, StepInputs};
use super::memory::Memory;
use super::method::{Moment, Part};
use super::metrics::Phase;
use crate::error::{Error, Result};
use crate::mlnt::losses::{
    Elr, JointOpt, LogitLoss, co_teaching, cross_entropies, elr, joint_opt, remember_rate, softmax,
};

/// Where a step goes down.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Descent {
    /// Gradients at the logits of each network `[k, classes]`.
    pub gradients: Vec<Vec<f64>>,
    /// The loss they belong to, of the first network.
    pub objective: f64,
    /// Cross entropy of the given labels of the samples that the first network learns from, mean, nats.
    pub loss: f64,
}

/// Begins a step of `part` on the samples `ids`, whose predictions go into `memory` if the method keeps them;
/// [`Engine::outcome`] ends it.
///
/// # Errors
/// When the device fails.
pub fn begin(
    engine: &mut Engine,
    memory: &mut Memory,
    config: &Config,
    part: &Part,
    at: Moment,
    ids: &[u32],
    inputs: StepInputs<'_>,
) -> Result<()> {
    let logits = engine.look(part, inputs.x)?;
    let samples = Samples { ids, labels: inputs.y };
    let descent = match part.phase {
        Phase::Elr => samples.elr(&logits[0], memory, config),
        Phase::JointLabels => samples.learn_labels(&logits[0], memory, config, at.epoch),
        Phase::JointOpt => samples.use_labels(&logits[0], memory),
        Phase::CoTeaching => samples.co_teach([&logits[0], &logits[1]], config, at.epoch),
        _ => return Err(Error::shape("step", format_args!("{} has no loss on the host", part.title()))),
    };
    engine.descend(part, descent, part.phase.scalars(config, at))
}

/// The first epoch (from 0) in which joint optimisation learns from its own labels: the paper's 70 of 200 epochs, in
/// proportion.
pub fn first_label_update(config: &Config) -> usize {
    (config.joint_warmup * config.epochs as f64).round() as usize
}

/// The samples of a batch and their given labels.
#[derive(Clone, Copy)]
struct Samples<'a> {
    ids: &'a [u32],
    labels: &'a [i32],
}

impl Samples<'_> {
    /// The descent of one network that learns from all samples.
    fn descent(self, logits: &[f64], loss: LogitLoss) -> Descent {
        let given = cross_entropies(logits, self.labels).iter().sum::<f64>() / self.labels.len() as f64;
        Descent { gradients: vec![loss.gradient], objective: loss.value, loss: given }
    }

    fn elr(self, logits: &[f64], memory: &mut Memory, config: &Config) -> Descent {
        let classes = logits.len() / self.ids.len();
        let kept = |id: &u32| memory.mean(*id as usize).unwrap_or_else(|| vec![0.0; classes]);
        let mut targets: Vec<f64> = self.ids.iter().flat_map(kept).collect();
        let weights = Elr { beta: config.elr_beta, lambda: config.elr_lambda };
        let loss = elr(logits, self.labels, &mut targets, weights);
        for (id, target) in self.ids.iter().zip(targets.chunks_exact(classes)) {
            memory.push(*id as usize, target);
        }
        self.descent(logits, loss)
    }

    /// A label as a distribution: what the network has predicted of the sample, or its given label where nothing is
    /// known or `given` is set.
    fn soft_labels(self, memory: &Memory, classes: usize, given: bool) -> Vec<f64> {
        let label = |(id, label): (&u32, &i32)| {
            let learned = if given { None } else { memory.mean(*id as usize) };
            learned.unwrap_or_else(|| (0..classes).map(|j| f64::from(u8::from(j == *label as usize))).collect())
        };
        self.ids.iter().zip(self.labels).flat_map(label).collect()
    }

    /// A sample is seen once an epoch, so that what is kept of it before its step are predictions of earlier epochs.
    fn learn_labels(self, logits: &[f64], memory: &mut Memory, config: &Config, epoch: usize) -> Descent {
        let classes = logits.len() / self.ids.len();
        let targets = self.soft_labels(memory, classes, epoch < first_label_update(config));
        for (id, row) in self.ids.iter().zip(logits.chunks_exact(classes)) {
            memory.push(*id as usize, &softmax(row));
        }
        let weights = JointOpt { alpha: config.joint_alpha, beta: config.joint_beta };
        self.descent(logits, joint_opt(logits, &targets, classes, weights))
    }

    fn use_labels(self, logits: &[f64], memory: &Memory) -> Descent {
        let classes = logits.len() / self.ids.len();
        let targets = self.soft_labels(memory, classes, false);
        self.descent(logits, joint_opt(logits, &targets, classes, JointOpt { alpha: 0.0, beta: 0.0 }))
    }

    fn co_teach(self, logits: [&[f64]; 2], config: &Config, epoch: usize) -> Descent {
        let rate = remember_rate(config.forget_rate, config.forget_ramp, epoch);
        let [first, second] = co_teaching(logits, self.labels, rate);
        Descent { objective: first.value, loss: first.value, gradients: vec![first.gradient, second.gradient] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::choice::Method;
    use crate::train::preset::Preset;

    /// Two samples in two classes with logits of probabilities (3/4, 1/4) and (1/2, 1/2).
    const LOGITS: [f64; 4] = [1.098_612_288_668_109_8, 0.0, 0.0, 0.0];
    const SAMPLES: Samples<'_> = Samples { ids: &[4, 2], labels: &[1, 0] };

    #[test]
    fn labels_are_the_given_ones_and_then_the_mean_of_predictions() {
        let config = Config {
            method: Method::JointOpt,
            epochs: 4,
            joint_warmup: 0.5,
            joint_memory: 2,
            joint_alpha: 0.0,
            joint_beta: 0.0,
            ..Preset::Small.config()
        };
        assert_eq!(first_label_update(&config), 2);
        let mut memory = Memory::new(&config, 5, 2);
        let near = |have: &[f64], want: [f64; 4]| {
            assert!(have.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{have:?} instead of {want:?}");
        };
        // (p − s)/2 with s the given labels, in epochs 0 and 1.
        for epoch in 0..2 {
            let descent = SAMPLES.learn_labels(&LOGITS, &mut memory, &config, epoch);
            near(&descent.gradients[0], [0.375, -0.375, -0.25, 0.25]);
            assert!((descent.loss - 0.5 * (4f64.ln() + 2f64.ln())).abs() < 1e-12);
        }
        // Then s is what was predicted: other logits for sample 2 have something to learn.
        let descent = SAMPLES.learn_labels(&[LOGITS[0], 0.0, LOGITS[0], 0.0], &mut memory, &config, 2);
        near(&descent.gradients[0], [0.0, 0.0, 0.125, -0.125]);
        // After the last epoch labels stay: the mean of the last two predictions of sample 2 is (5/8, 3/8).
        for _ in 0..2 {
            near(&SAMPLES.use_labels(&LOGITS, &memory).gradients[0], [0.0, 0.0, -0.0625, 0.0625]);
        }
    }

    #[test]
    fn targets_of_elr_go_from_epoch_to_epoch_with_the_sample() {
        let config = Config { method: Method::Elr, elr_beta: 0.5, ..Preset::Small.config() };
        let mut memory = Memory::new(&config, 5, 2);
        SAMPLES.elr(&LOGITS, &mut memory, &config);
        assert_eq!(memory.mean(4), Some(vec![0.375, 0.125]));
        assert_eq!(memory.mean(2), Some(vec![0.25, 0.25]));
        Samples { ids: &[2, 4], labels: &[0, 1] }.elr(&LOGITS, &mut memory, &config);
        assert_eq!(memory.mean(2), Some(vec![0.5, 0.25]));
        assert_eq!(memory.mean(4), Some(vec![0.4375, 0.3125]));
        assert_eq!(memory.mean(0), None);
    }

    #[test]
    fn co_teaching_reports_what_the_first_network_learns_from() {
        let config = Config { forget_rate: 0.5, forget_ramp: 1.0, ..Preset::Small.config() };
        // The second network has the smaller loss on the second sample.
        let other = [0.0, 0.0, LOGITS[0], 0.0];
        let descent = SAMPLES.co_teach([&LOGITS, &other], &config, 1);
        assert!((descent.loss - 2f64.ln()).abs() < 1e-12, "{}", descent.loss);
        assert_eq!(descent.gradients[0], [0.0, 0.0, -0.5, 0.5]);
        assert_eq!(
            SAMPLES.co_teach([&LOGITS, &other], &config, 0).gradients[0].iter().filter(|g| **g == 0.0).count(),
            0
        );
    }
}
