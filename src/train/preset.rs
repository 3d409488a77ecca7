//! The presets: complete sets of values that a file and flags then change.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::choice::{Augment, DeviceKind, Method, PrecisionChoice, Recipe};
use super::config::Config;
use super::group::Group;
use crate::data::{NoiseKind, ValidationLabels};

/// A named set of values for every setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// The embedded sample and a small network, minutes on two cores (the default).
    #[default]
    Small,
    /// PreAct ResNet-32 on CIFAR-10 with the values of the paper (Li et al., CVPR 2019).
    Cifar10,
}

/// Channels, height, width and classes of the data a preset is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputShape {
    /// Image channels.
    pub channels: usize,
    /// Image height, pixels.
    pub height: usize,
    /// Image width, pixels.
    pub width: usize,
    /// Number of classes.
    pub classes: usize,
}

impl Preset {
    /// The shape of the data the preset is made for: Fashion-MNIST for `small`, CIFAR-10 for `cifar10`.
    pub fn input(self) -> InputShape {
        match self {
            Preset::Small => InputShape { channels: 1, height: 28, width: 28, classes: 10 },
            Preset::Cifar10 => InputShape { channels: 3, height: 32, width: 32, classes: 10 },
        }
    }

    /// The preset's value of every setting.
    pub fn config(self) -> Config {
        match self {
            Preset::Small => small(),
            Preset::Cifar10 => cifar10(),
        }
    }
}

/// Few images, enough capacity, no augmentation: cross entropy memorises the noise within the run. η is ten times that
/// of the `paper` recipe because `released` divides the divergence by the ten classes as well.
fn small() -> Config {
    Config {
        data: "sample".into(),
        train_size: 1500,
        val_fraction: 0.1,
        val_labels: ValidationLabels::Noisy,
        augment: Augment::None,
        pad: 4,
        noise: NoiseKind::SymmetricInclusive,
        noise_rate: 0.5,
        labels: String::new(),
        label_set: String::new(),
        method: Method::Mlnt,
        iterations: 1,
        tau: 0.01,
        lambda: 0.5,
        lambda_ramp: 4.0,
        recipe: Recipe::Released,
        first_order: false,
        branches: 2,
        rho: 0.5,
        neighbours: 10,
        alpha: 0.2,
        eta: 20.0,
        eta_ramp: 4.0,
        gamma: 0.99,
        gamma_late: 0.99,
        gamma_switch_epoch: 0,
        joint_alpha: 1.2,
        joint_beta: 0.8,
        joint_lr: 0.05,
        joint_warmup: 0.35,
        joint_memory: 10,
        elr_beta: 0.7,
        elr_lambda: 3.0,
        forget_rate: 0.5,
        forget_ramp: 10.0,
        batch: 32,
        epochs: 30,
        lr: 0.05,
        lr_drop_epochs: vec![20],
        lr_drop_factor: 0.1,
        momentum: 0.9,
        weight_decay: 1e-4,
        feature_epochs: 5,
        feature_lr: 0.05,
        no_baseline: false,
        widths: vec![16, 32, 64],
        blocks: vec![1, 1, 1],
        seed: 1,
        device: DeviceKind::Auto,
        precision: PrecisionChoice::Auto,
        group: Group::Auto,
        threads: 0,
        out: None,
    }
}

/// The paper's values for CIFAR-10; of the other methods, their papers' for 50 % symmetric noise.
fn cifar10() -> Config {
    Config {
        data: "cifar-10-batches-bin".into(),
        train_size: 0,
        val_fraction: 0.1,
        val_labels: ValidationLabels::Noisy,
        augment: Augment::PadCropFlip,
        pad: 4,
        noise: NoiseKind::SymmetricInclusive,
        noise_rate: 0.5,
        labels: String::new(),
        label_set: String::new(),
        method: Method::Mlnt,
        iterations: 1,
        tau: 0.01,
        lambda: 0.5,
        lambda_ramp: 20.0,
        recipe: Recipe::Paper,
        first_order: false,
        branches: 10,
        rho: 0.5,
        neighbours: 10,
        alpha: 0.2,
        eta: 0.4,
        eta_ramp: 20.0,
        gamma: 0.99,
        gamma_late: 0.999,
        gamma_switch_epoch: 20,
        joint_alpha: 1.2,
        joint_beta: 0.8,
        joint_lr: 0.08,
        joint_warmup: 0.35,
        joint_memory: 10,
        elr_beta: 0.7,
        elr_lambda: 3.0,
        forget_rate: 0.5,
        forget_ramp: 10.0,
        batch: 128,
        epochs: 120,
        lr: 0.2,
        lr_drop_epochs: vec![80],
        lr_drop_factor: 0.1,
        momentum: 0.9,
        weight_decay: 1e-4,
        feature_epochs: 10,
        feature_lr: 0.04,
        no_baseline: false,
        widths: vec![32, 64, 128],
        blocks: vec![5, 5, 5],
        seed: 1,
        device: DeviceKind::Auto,
        precision: PrecisionChoice::Auto,
        group: Group::Auto,
        threads: 0,
        out: None,
    }
}
