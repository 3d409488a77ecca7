//! `mlnt predict`.

use std::path::PathBuf;

use super::{ModelKind, NetworkArgs};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Class probabilities of every image, as CSV.

One line per image, in the order of the data set: its index, the predicted label, and one probability per class.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt predict runs/sample-symmetric-0.5-s1 --out test.csv
  mlnt predict runs/sample-symmetric-0.5-s1 --split train --model student | head";

/// The arguments of `mlnt predict`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct PredictArgs {
    /// What to run.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Network of a run directory [default: teacher]
    #[arg(long, value_name = "NAME")]
    pub model: Option<ModelKind>,
    /// File to write [default: standard output]
    #[arg(long, value_name = "FILE.csv")]
    pub out: Option<PathBuf>,
}
