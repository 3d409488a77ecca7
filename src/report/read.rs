//! The files of a run directory, as far as they are there.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::labels::{self, GivenLabels, Matrix};
use crate::error::{Error, Result};
use crate::train::run_dir::RunDir;

/// An epoch, a line of `metrics.jsonl`; what a run did not write is `None`. Accuracies are fractions from 0 to 1.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Epoch {
    /// Part of the run, as it stands in the file.
    pub phase: String,
    /// Epoch within the phase and iteration, from 1.
    pub epoch: usize,
    /// Iteration of the phase, from 1.
    pub iteration: Option<usize>,
    /// Loss on the given labels, nats.
    pub train_loss: Option<f64>,
    /// Consistency loss.
    pub meta_loss: Option<f64>,
    /// Accuracy on the given training labels.
    pub train_accuracy: Option<f64>,
    /// Accuracy of the network that SGD trains, validation images.
    pub val_accuracy: Option<f64>,
    /// The same on the test images.
    pub test_accuracy: Option<f64>,
    /// Accuracy of its moving average, validation images.
    pub teacher_val_accuracy: Option<f64>,
    /// The same on the test images.
    pub teacher_test_accuracy: Option<f64>,
}

/// The clock time of an epoch, a line of `timing.jsonl`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Timing {
    /// Part of the run.
    pub phase: String,
    /// Iteration of the phase, from 1.
    pub iteration: Option<usize>,
    /// Epoch within the phase and iteration, from 1.
    pub epoch: usize,
    /// Seconds of training.
    pub train_seconds: f64,
    /// Seconds of evaluation.
    pub eval_seconds: f64,
}

/// The network that is the mentor of the next iteration.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Mentor {
    /// "student" or "teacher".
    pub network: String,
    /// Its epoch.
    pub epoch: usize,
    /// Its accuracy on the validation images.
    pub val_accuracy: Option<f64>,
}

/// A finished iteration, a line of `iterations.jsonl`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Iteration {
    /// From 1.
    pub iteration: usize,
    /// The best network of the iteration.
    pub mentor: Option<Mentor>,
    /// Training samples whose given label the iteration's filter kept; `None` without a filter.
    pub kept: Option<usize>,
    /// Those that it dropped.
    pub dropped: Option<usize>,
    /// Part of the dropped labels that are wrong.
    pub precision: Option<f64>,
    /// Part of the wrong labels that were dropped.
    pub recall: Option<f64>,
}

/// Everything that a page tells of one run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The directory.
    pub path: PathBuf,
    /// A short name, not that of another run on the page.
    pub name: String,
    /// The settings, as they stand in `config.toml`.
    pub config: Table,
    /// The epochs so far, each with its iteration.
    pub epochs: Vec<Epoch>,
    /// Their clock times.
    pub timing: Vec<Timing>,
    /// The finished iterations.
    pub iterations: Vec<Iteration>,
    /// `labels.csv`.
    pub labels: Option<GivenLabels>,
    /// Given against suggested labels, of `audit/audit.csv`.
    pub audit: Option<Matrix>,
    /// Whether the run came to its end.
    pub complete: bool,
}

impl Run {
    /// Reads what there is of the run in `path`.
    ///
    /// # Errors
    /// [`Error::File`] when it is no run directory or a file in it cannot be understood, [`Error::Io`] when one cannot
    /// be read.
    pub fn open(path: &Path) -> Result<Self> {
        let dir = RunDir::open(path)?;
        let bytes = std::fs::read(dir.config()).map_err(Error::io(dir.config()))?;
        let text = String::from_utf8(bytes).map_err(|_| Error::file(dir.config(), "not UTF-8 text"))?;
        let config: Table = text.parse().map_err(|e: toml::de::Error| {
            Error::file(dir.config(), e.message().split_whitespace().collect::<Vec<_>>().join(" "))
        })?;
        let names = labels::class_names(&dir.student());
        let mut epochs: Vec<Epoch> = lines(&dir.metrics())?;
        number(&mut epochs, |e| (&e.phase, e.epoch, &mut e.iteration));
        let mut timing: Vec<Timing> = lines(&dir.timing())?;
        number(&mut timing, |t| (&t.phase, t.epoch, &mut t.iteration));
        Ok(Run {
            name: path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned()),
            config,
            epochs,
            timing,
            iterations: lines(&path.join("iterations.jsonl"))?,
            labels: GivenLabels::read(&dir.labels(), &names)?,
            audit: labels::read_audit(&path.join("audit").join("audit.csv"), &names)?,
            complete: dir.summary_json().is_file(),
            path: path.to_path_buf(),
        })
    }

    /// A setting as it would be typed, or nothing.
    pub fn setting(&self, key: &str) -> String {
        self.config.get(key).map_or_else(String::new, plain)
    }

    /// A setting that is a number.
    pub fn number(&self, key: &str) -> Option<f64> {
        let value = self.config.get(key)?;
        value.as_float().or_else(|| value.as_integer().map(|n| n as f64))
    }
}

/// A value of TOML without quotes.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Reads the runs, each once, and gives them names that differ.
///
/// # Errors
/// As [`Run::open`].
pub fn open_all(paths: &[PathBuf]) -> Result<Vec<Run>> {
    let (mut seen, mut runs) = (Vec::new(), Vec::new());
    for path in paths {
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        let mut run = Run::open(path)?;
        if !seen.contains(&real) {
            if let Some(name) = real.file_name() {
                run.name = name.to_string_lossy().into_owned();
            }
            seen.push(real);
            runs.push(run);
        }
    }
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for run in &mut runs {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name = run.path.display().to_string();
        }
    }
    Ok(runs)
}

/// The records of a file of JSON lines; none of a file that is not there. A last line without its end is passed over:
/// it is being written.
fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| Error::file(path, format_args!("line {}: {e}", i + 1)))
    };
    whole.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(parse).collect()
}

/// Gives records without an iteration its number: a phase that starts again is in its next one.
fn number<T>(records: &mut [T], parts: impl Fn(&mut T) -> (&String, usize, &mut Option<usize>)) {
    let mut last: Vec<(String, usize, usize)> = Vec::new();
    for record in records {
        let (phase, epoch, iteration) = parts(record);
        let before = last.iter_mut().find(|(name, ..)| name == phase);
        let restarts = |(_, number, at): &(String, usize, usize)| if epoch <= *at { number + 1 } else { *number };
        let this = iteration.unwrap_or_else(|| before.as_deref().map_or(1, restarts));
        *iteration = Some(this);
        match before {
            Some(entry) => (entry.1, entry.2) = (this, epoch),
            None => last.push((phase.clone(), this, epoch)),
        }
    }
}
