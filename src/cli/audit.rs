//! `mlnt audit`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::console::say;
use super::network::{self, Trained};
use super::{ModelKind, NetworkArgs, Split, positive, threads};
use crate::audit::history::{self, Trajectory};
use crate::audit::roc::Roc;
use crate::audit::samples::Samples;
use crate::audit::score::{Evidence, Finding, findings, ranking};
use crate::audit::sheet::{self, Entry};
use crate::audit::table::{Table, roc_csv};
use crate::audit::{npy, plot};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::train::choice::DeviceKind;
use crate::train::config::Config;
use crate::train::run_dir::RunDir;

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Which labels of a run are probably wrong, and what they should be.

Ranks every label that the run was given, training and validation part, by how little the networks believed in it while \
they trained, compared with other samples of the same label. Writes audit.csv (most suspicious first), a contact sheet \
(sheet.png), and pred_probs.npy and given_labels.npy as cleanlab takes them. Where true labels are known, as with \
injected noise: roc.csv and roc.svg.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt audit runs/sample-symmetric-0.5-s1
  mlnt audit runs/sample-symmetric-0.5-s1 --model student --out /tmp/audit --top 100
  mlnt audit runs/sample-symmetric-0.5-s1 --json";

/// The arguments of `mlnt audit`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct AuditArgs {
    /// Directory of a complete run.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Network that gives the probabilities [default: best, or teacher or student where there is none]
    #[arg(long, value_name = "NAME")]
    pub model: Option<ModelKind>,
    /// Folder for the results [default: RUN/audit]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Images on the contact sheet.
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = positive)]
    pub top: usize,
    /// Where the images are now, if they were moved: "sample" or a folder [default: as in the run]
    #[arg(long, value_name = "sample|DIR")]
    pub data: Option<String>,
    /// Where to compute: auto, cpu, cuda, cuda:N or simt.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub device: DeviceKind,
    /// Threads; 0 = one per core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = threads)]
    pub threads: usize,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

impl AuditArgs {
    /// What reading the network needs to know.
    fn network(&self) -> NetworkArgs {
        NetworkArgs {
            network: self.run.clone(),
            data: self.data.clone(),
            split: Split::Train,
            batch: 250,
            device: self.device,
            precision: None,
            threads: self.threads,
        }
    }
}

/// Runs `mlnt audit`.
///
/// # Errors
/// For a run that is none, not complete, or whose labels do not fit its images, and for a folder that cannot be
/// written.
pub(super) fn run(args: &AuditArgs) -> Result<u8> {
    let dir = RunDir::open(&args.run)?;
    let config = Config::load(&dir.config())?;
    let kinds = [ModelKind::Best, ModelKind::Teacher, ModelKind::Student];
    let paths = network::files(&args.run, args.model, &kinds)?;
    let path = paths.first().ok_or_else(|| Error::file(&args.run, "the run has no network"))?;
    let mut trained = Trained::open(path, &args.network())?;
    let Samples { set, trained: part } = Samples::read(&dir, &config, &trained.set.images)?;
    trained.set = set;
    let mut probabilities = Vec::new();
    trained.probabilities(|_, rows| {
        probabilities.extend_from_slice(rows);
        Ok(())
    })?;
    trained.note_device();
    let names = trained.class_names;
    let samples = Samples { set: trained.set, trained: part };

    let (past, mut missing) = (Past::read(&dir, &samples)?, Vec::new());
    let given: Vec<usize> = (0..samples.len()).map(|i| samples.given(i)).collect();
    let classes = names.len();
    let evidence = Evidence {
        probabilities: &probabilities,
        classes,
        given: &given,
        history: &past.losses,
        trained: &samples.trained,
    };
    let findings = findings(&evidence)?;
    if !dir.losses().is_file() {
        missing.push("losses.f32: scores are from the last network alone, which finds fewer wrong labels");
    }
    if !dir.kept().is_file() {
        missing.push("kept.csv: no filter has kept or dropped samples");
    }
    let order = ranking(&findings);
    let wrong = samples.wrong();
    let table = Table {
        samples: &samples,
        findings: &findings,
        history: &past.losses,
        kept: &past.kept,
        wrong: wrong.as_deref(),
        names: &names,
    };

    let out = args.out.clone().unwrap_or_else(|| args.run.join("audit"));
    std::fs::create_dir_all(&out).map_err(Error::io(&out))?;
    let write = |name: &str, bytes: &[u8]| write_atomic(out.join(name), bytes);
    write("audit.csv", &table.csv(&order)?)?;
    write("pred_probs.npy", &npy::matrix_f64(&normalised(&probabilities, classes), classes))?;
    write("given_labels.npy", &npy::vector_i64(given.iter().map(|y| *y as i64)))?;
    let top = args.top.min(samples.len());
    let entries: Vec<Entry> = order[..top].iter().map(|i| table.entry(*i)).collect();
    let title = format!("The {top} most suspicious of {} labels of {}", samples.len(), samples.set.images.name);
    write("sheet.png", &sheet::draw(&samples.set.images, &entries, &title)?)?;
    let scores: Vec<f64> = findings.iter().map(|f| f.score).collect();
    let roc = wrong.as_deref().and_then(|wrong| Roc::new(&scores, wrong));
    let quality = roc.as_ref().zip(wrong.as_deref()).map(|(roc, wrong)| Quality::of(roc, wrong, &findings));
    match (&roc, &quality) {
        (Some(roc), Some(quality)) => {
            let point = (quality.false_positive_rate, quality.recall);
            write("roc.csv", &roc_csv(roc))?;
            write("roc.svg", plot::roc_svg(roc, point)?.as_bytes())?;
        }
        // A curve of an earlier audit must not stand beside these results.
        _ => ["roc.csv", "roc.svg"].iter().try_for_each(|name| remove(&out.join(name)))?,
    }

    let flagged = findings.iter().filter(|f| f.flagged).count();
    if args.json {
        let quality = quality.map(|q| {
            json!({ "wrong": q.wrong, "auc": q.auc, "precision_at_errors": q.at_errors, "precision": q.precision,
                    "recall": q.recall, "best_precision": q.best.0, "best_recall": q.best.1 })
        });
        say(
            json!({ "run": args.run.display().to_string(), "network": path.display().to_string(), "out": out.display().to_string(),
                    "data": samples.set.images.name, "labels": samples.len(), "flagged": flagged, "missing": missing,
                    "known_errors": quality }),
        )?;
    } else {
        summary(path, &out, &samples, flagged, quality.as_ref(), &missing)?;
    }
    Ok(0)
}

/// Removes a file that may not be there.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// What training left about the samples; all `None` where it left nothing.
struct Past {
    losses: Vec<Option<Trajectory>>,
    kept: Vec<Option<bool>>,
}

impl Past {
    fn read(dir: &RunDir, samples: &Samples) -> Result<Self> {
        let n = samples.len();
        let mut losses = vec![None; n];
        if dir.losses().is_file() {
            let members: Vec<usize> = (0..n).filter(|i| samples.trained[*i]).collect();
            let read = history::losses(&dir.losses(), members.len())?;
            members.iter().zip(read).for_each(|(i, trajectory)| losses[*i] = trajectory);
        }
        let kept = match dir.kept().is_file() {
            true => history::kept(&dir.kept(), (0..n).map(|i| samples.set.images.original(i)))?,
            false => vec![None; n],
        };
        Ok(Past { losses, kept })
    }
}

/// How well wrong labels were found.
struct Quality {
    wrong: usize,
    auc: f64,
    at_errors: f64,
    precision: f64,
    recall: f64,
    false_positive_rate: f64,
    best: (f64, f64),
}

impl Quality {
    fn of(roc: &Roc, wrong: &[bool], findings: &[Finding]) -> Self {
        let flagged = findings.iter().filter(|f| f.flagged).count();
        let hits = findings.iter().zip(wrong).filter(|(f, wrong)| f.flagged && **wrong).count();
        let best = roc.best();
        Quality {
            wrong: roc.wrong,
            auc: roc.auc(),
            at_errors: roc.precision_at_errors(),
            precision: hits as f64 / flagged.max(1) as f64,
            recall: hits as f64 / roc.wrong as f64,
            false_positive_rate: (flagged - hits) as f64 / (roc.total - roc.wrong) as f64,
            best: (best.precision, best.true_positive_rate),
        }
    }
}

/// `probabilities` `[n, classes]` with every row divided by its sum, so that single precision leaves no trace.
fn normalised(probabilities: &[f64], classes: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let sum: f64 = row.iter().sum();
        row.iter().map(|p| p / sum).collect::<Vec<f64>>()
    };
    probabilities.chunks_exact(classes).flat_map(row).collect()
}

/// The result in a few lines.
fn summary(
    network: &Path,
    out: &Path,
    samples: &Samples,
    flagged: usize,
    quality: Option<&Quality>,
    missing: &[&str],
) -> Result<()> {
    let n = samples.len();
    let trained = samples.trained.iter().filter(|t| **t).count();
    say(format_args!("{}: {n} labels, {trained} trained on, {} held out", network.display(), n - trained))?;
    say(format_args!("flagged as wrong: {flagged} ({:.1} %)", 100.0 * flagged as f64 / n as f64))?;
    match quality {
        Some(q) => {
            say(format_args!("known to be wrong: {} ({:.1} %)", q.wrong, 100.0 * q.wrong as f64 / n as f64))?;
            say(format_args!("  precision {:.3} at recall {:.3} of the flagged", q.precision, q.recall))?;
            say(format_args!("  precision {:.3} at recall {:.3} at the best threshold", q.best.0, q.best.1))?;
            say(format_args!("  precision {:.3} among the {} most suspicious", q.at_errors, q.wrong))?;
            say(format_args!("  area under the ROC curve {:.4}", q.auc))?;
        }
        None => say("no label is known to be wrong: no ROC curve")?,
    }
    for what in missing {
        say(format_args!("the run has no {what}"))?;
    }
    say(format_args!("written to {}", out.display()))
}
