//! The settings that take one of a few names. The name is the same on the command line and in TOML.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

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
    /// The fastest device of this build: so far the processor.
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
display_by_name!(Recipe, Augment, DeviceKind, Precision);
