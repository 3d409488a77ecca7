//! The settings that take one of a few names. The name is the same on the command line and in TOML.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The family of label noise injected into the training labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum NoiseKind {
    /// New label uniform over all classes, the old one included (the paper's).
    Symmetric,
    /// New label uniform over the other classes.
    SymmetricExclusive,
    /// New label by the data set's map of look-alike classes.
    Asymmetric,
    /// New label is the next class, i to i+1.
    Pair,
    /// Labels are left as they are.
    None,
}

/// Which labels the validation split carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ValLabels {
    /// The noisy ones: no clean label is needed anywhere.
    Noisy,
    /// The true ones.
    Clean,
}

/// How the meta gradient and the classification gradient share a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// Two updates in turn, the meta one first; KL divided by k (the paper's text).
    Paper,
    /// One update with both gradients; KL divided by k times the classes (the authors' code).
    Released,
}

/// Augmentation of training images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Augment {
    /// Images as they are.
    None,
    /// Pad with zeros, crop at random back to the image size, flip half of the images.
    PadCropFlip,
}

/// Where the computation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// The fastest device of this machine.
    Auto,
    /// The processor.
    Cpu,
}

/// Floating-point type of activations, weights and gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 64-bit floats.
    F64,
}

/// The name of a choice, as it stands on the command line and in TOML.
macro_rules! display_by_name {
    ($($choice:ty),*) => {$(
        impl std::fmt::Display for $choice {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.to_possible_value() {
                    Some(value) => f.write_str(value.get_name()),
                    None => write!(f, "{self:?}"),
                }
            }
        }
    )*};
}
display_by_name!(NoiseKind, ValLabels, Recipe, Augment, DeviceKind, Precision);
