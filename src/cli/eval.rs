//! `mlnt eval`.

use super::{ModelKind, NetworkArgs};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Accuracy of a trained network on a data set.

Prints accuracy and mean cross entropy over the images with the labels of the data set, to which no noise is \
added.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt eval runs/sample-symmetric-0.5-s1
  mlnt eval runs/sample-symmetric-0.5-s1 --model teacher --json
  mlnt eval teacher.safetensors --data /usr/share/datasets/fashion-mnist";

/// The arguments of `mlnt eval`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct EvalArgs {
    /// What to run.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Network of a run directory [default: both]
    #[arg(long, value_name = "NAME")]
    pub model: Option<ModelKind>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}
