//! `mlnt eval`.

use serde_json::json;

use super::console::say;
use super::network::{self, Trained};
use super::{ModelKind, NetworkArgs};
use crate::error::Result;
use crate::train::evaluation::argmax;

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

/// Runs `mlnt eval`.
///
/// # Errors
/// For a network or data that cannot be read or do not fit one another.
pub(super) fn run(args: &EvalArgs) -> Result<u8> {
    for path in network::files(&args.network.network, args.model, &[ModelKind::Student, ModelKind::Teacher])? {
        let mut trained = Trained::open(&path, &args.network)?;
        let (mut correct, mut loss) = (0usize, 0.0);
        let labels = trained.set.labels.clone();
        trained.probabilities(|range, rows| {
            for (p, label) in rows.chunks_exact(rows.len() / range.len()).zip(&labels[range]) {
                correct += usize::from(argmax(p) == *label as usize);
                loss -= p[*label as usize].max(f64::MIN_POSITIVE).ln();
            }
            Ok(())
        })?;
        let n = labels.len() as f64;
        let (accuracy, loss) = (correct as f64 / n, loss / n);
        let data = &trained.set.images.name;
        match args.json {
            true => say(json!({ "network": path.display().to_string(), "data": data, "images": labels.len(),
                        "accuracy": accuracy, "cross_entropy": loss }))?,
            false => say(format_args!(
                "{}: accuracy {:.2} %, cross entropy {loss:.4} on {} images of {data}",
                path.display(),
                100.0 * accuracy,
                labels.len()
            ))?,
        }
        trained.note_device();
    }
    Ok(0)
}
