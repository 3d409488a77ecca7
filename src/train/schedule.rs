//! What changes during an iteration: learning rate, η, λ and γ as pure functions of the settings and the progress.

use super::choice::{Method, Precision};
use super::config::Config;

impl Config {
    /// Learning rate β in epoch `epoch` (from 0): `lr · lr_drop_factor^d` after `d` drops.
    pub fn lr_at(&self, epoch: usize) -> f64 {
        let drops = self.lr_drop_epochs.iter().filter(|&&drop| epoch >= drop);
        drops.fold(self.lr, |lr, _| lr * self.lr_drop_factor)
    }

    /// Weight η of the meta gradient after `progress` epochs (a fraction within an epoch):
    /// `η·exp(−5(1−u)²)` with `u = progress / eta_ramp`, at most 1 (the paper's ramp).
    pub fn eta_at(&self, progress: f64) -> f64 {
        self.eta * ramp(progress, self.eta_ramp)
    }

    /// Whether the meta-gradient leaves out its second-order term.
    pub fn is_first_order(&self) -> bool {
        self.first_order || self.method == Method::MlntFirstOrder
    }

    /// Whether cotangents are scaled: where they are kept in f16.
    pub fn scaled(&self) -> bool {
        self.computes_in() == Precision::F16
    }

    /// Share λ of the teacher in the target after `progress` epochs: grows as η does, over `lambda_ramp` epochs.
    pub fn lambda_at(&self, progress: f64) -> f64 {
        self.lambda * ramp(progress, self.lambda_ramp)
    }

    /// Decay γ of the teacher in epoch `epoch` (from 0).
    pub fn gamma_at(&self, epoch: usize) -> f64 {
        let late = self.gamma_switch_epoch > 0 && epoch >= self.gamma_switch_epoch;
        if late { self.gamma_late } else { self.gamma }
    }
}

/// `exp(−5(1−u)²)` with `u = progress / length`, at most 1; 1 without a ramp.
fn ramp(progress: f64, length: f64) -> f64 {
    let u = if length > 0.0 { (progress / length).clamp(0.0, 1.0) } else { 1.0 };
    (-5.0 * (1.0 - u).powi(2)).exp()
}

#[cfg(test)]
mod tests {
    use crate::train::preset::Preset;

    /// |a − b| within rounding of a few operations.
    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-15 * b.abs().max(1e-300) * 8.0
    }

    #[test]
    fn lr_of_the_paper_drops_tenfold_after_epoch_80() {
        let config = Preset::Cifar10.config();
        for (epoch, lr) in [(0, 0.2), (79, 0.2), (80, 0.02), (119, 0.02)] {
            assert!(near(config.lr_at(epoch), lr), "epoch {epoch}: {}", config.lr_at(epoch));
        }
    }

    #[test]
    fn every_drop_multiplies_the_learning_rate() {
        let mut config = Preset::Small.config();
        (config.lr, config.lr_drop_factor, config.lr_drop_epochs) = (0.8, 0.5, vec![2, 3]);
        assert_eq!([0, 1, 2, 3, 4].map(|epoch| config.lr_at(epoch)), [0.8, 0.8, 0.4, 0.2, 0.2]);
        config.lr_drop_epochs.clear();
        assert_eq!(config.lr_at(1000), 0.8);
    }

    #[test]
    fn eta_of_the_paper_grows_over_20_epochs() {
        let config = Preset::Cifar10.config();
        // 0.4·e^-5, 0.4·e^-1.25, 0.4·e^-0.3125, then 0.4.
        let expected = [
            (0.0, 0.002_695_178_799_634_187),
            (10.0, 0.114_601_918_744_076_07),
            (15.0, 0.292_646_251_578_656_7),
            (20.0, 0.4),
            (500.0, 0.4),
        ];
        for (progress, eta) in expected {
            assert!(near(config.eta_at(progress), eta), "{progress}: {}", config.eta_at(progress));
        }
    }

    #[test]
    fn lambda_grows_from_almost_nothing_to_a_half_as_eta_does() {
        let config = Preset::Cifar10.config();
        for progress in [0.0, 0.3, 7.5, 20.0, 100.0] {
            assert!(near(config.lambda_at(progress), config.eta_at(progress) * 0.5 / 0.4), "{progress}");
        }
        assert!(config.lambda_at(0.0) < 0.004 && config.lambda_at(20.0) == 0.5);
    }

    #[test]
    fn eta_without_ramp_is_whole_from_the_start() {
        let mut config = Preset::Small.config();
        (config.eta, config.eta_ramp) = (2.0, 0.0);
        assert_eq!(config.eta_at(0.0), 2.0);
    }

    #[test]
    fn gamma_switches_after_20_epochs_or_never() {
        let mut config = Preset::Cifar10.config();
        assert_eq!([0, 19, 20, 119].map(|epoch| config.gamma_at(epoch)), [0.99, 0.99, 0.999, 0.999]);
        config.gamma_switch_epoch = 0;
        assert_eq!([0, 119].map(|epoch| config.gamma_at(epoch)), [0.99, 0.99]);
    }
}
