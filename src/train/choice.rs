//! The settings that take one of a few names. The name is the same on the command line and in TOML.

use crate::mlnt::golden::TOLERANCE_F64;
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

impl Precision {
    /// Largest relative error of a group of a golden step: in double precision against the file, in every other one
    /// against double precision with the same decisions of ReLUs and max-pools. A few times what rounding alone makes
    /// of the meta-gradient of a trained network.
    pub fn tolerance(self) -> f64 {
        match self {
            Precision::F32 => 1e-5,
            Precision::F64 => TOLERANCE_F64,
        }
    }
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
