//! `mlnt verify`.

use std::path::PathBuf;

use crate::train::choice::{DeviceKind, Precision};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Check the engine against golden training steps.

A golden step is a whole training step, inputs and outputs, computed in float64 by an independent \
implementation. For each group of outputs this prints the relative L2 error and the cosine over the group as one \
vector. Tolerance: 1e-10 in f64, 1e-4 in f32; in f32 a ReLU may fall on its other side, which is then reported \
with how many did.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt verify step_joint.safetensors step_sequential.safetensors
  mlnt verify step_joint.safetensors --precision f32 --json

Exit status: 0 when every group of every file is within tolerance, 1 when one is not, 2 for a file that is no golden
step.";

/// The arguments of `mlnt verify`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Golden steps.
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Where to compute.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub device: DeviceKind,
    /// Floating-point type of the computation.
    #[arg(long, value_name = "TYPE", default_value = "f64")]
    pub precision: Precision,
    /// Print one JSON object per file instead of a table.
    #[arg(long)]
    pub json: bool,
}
