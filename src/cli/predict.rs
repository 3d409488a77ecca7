//! `mlnt predict`.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::network::{self, Trained};
use super::{ModelKind, NetworkArgs};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::train::evaluation::argmax;

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
    /// Network of a run directory [default: teacher, or student where there is none]
    #[arg(long, value_name = "NAME")]
    pub model: Option<ModelKind>,
    /// File to write [default: standard output]
    #[arg(long, value_name = "FILE.csv")]
    pub out: Option<PathBuf>,
}

/// Runs `mlnt predict`.
///
/// # Errors
/// For a network or data that cannot be read or do not fit one another, or a file that cannot be written.
pub(super) fn run(args: &PredictArgs) -> Result<u8> {
    let paths = network::files(&args.network.network, args.model, &[ModelKind::Teacher, ModelKind::Student])?;
    let mut trained = Trained::open(&paths[0], &args.network)?;
    let target = args.out.as_deref().unwrap_or(Path::new("standard output"));
    let mut csv = csv::Writer::from_writer(Vec::new());
    let fail = |e: csv::Error| Error::file(target, e);
    let names = trained.class_names.clone();
    let header = ["index".to_string(), "predicted".into(), "predicted_name".into()];
    csv.write_record(header.into_iter().chain(names.iter().map(|n| format!("p_{n}")))).map_err(fail)?;
    trained.probabilities(|range, rows| {
        for (i, p) in range.clone().zip(rows.chunks_exact(rows.len() / range.len())) {
            let best = argmax(p);
            let fields = [i.to_string(), best.to_string(), names[best].clone()];
            csv.write_record(fields.into_iter().chain(p.iter().map(|v| format!("{v:.6}")))).map_err(fail)?;
        }
        Ok(())
    })?;
    let bytes = csv.into_inner().map_err(|e| Error::file(target, e.error()))?;
    match &args.out {
        Some(path) => write_atomic(path, &bytes)?,
        None => match std::io::stdout().write_all(&bytes) {
            // A reader such as `head` may have seen enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
            other => other.map_err(Error::io(target))?,
        },
    }
    trained.note_device();
    Ok(0)
}
