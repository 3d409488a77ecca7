//! `mlnt report`.

use std::path::PathBuf;

use super::console::say;
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::report;

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
One HTML page about one or more training runs.

The page shows accuracy and loss curves, given against suggested (mlnt audit) or true labels, the filter's quality, \
throughput and settings. It needs no network and no scripts. Runs of the same settings but the seed become one curve, \
mean and standard deviation; runs on other data or noise get a part of the page of their own. Unfinished runs are \
shown as far as they are.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt report runs/sample-symmetric-0.5-s1
  mlnt report runs/sample-symmetric-0.5-s* --out three-seeds.html";

/// The arguments of `mlnt report`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct ReportArgs {
    /// Run directories.
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// File to write [default: RUN/report.html for one run, report.html for several]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}

/// Runs `mlnt report`.
///
/// # Errors
/// For a folder that is no run, a file of one that cannot be understood, or a page that cannot be written.
pub(super) fn run(args: &ReportArgs) -> Result<u8> {
    let out = match (&args.out, &args.runs[..]) {
        (Some(out), _) => out.clone(),
        (None, [run]) => run.join("report.html"),
        (None, _) => PathBuf::from("report.html"),
    };
    if out.is_dir() {
        return Err(Error::file(&out, "a folder; --out takes the name of a file"));
    }
    let page = report::html(&args.runs)?;
    write_atomic(&out, page.as_bytes())?;
    say(format_args!("report: {}", out.display()))?;
    Ok(0)
}
