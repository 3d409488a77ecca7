//! A run directory: its files, its name, and line files that a resumed run continues byte for byte.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::config::Config;
use crate::data::NoiseKind;
use crate::error::{Error, Result};
use crate::fs::{create_run_dir, write_atomic};

/// The directory of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Creates the directory for a run: `config.out`, or else a free name below `runs/`; and `config.toml` in it.
    ///
    /// # Errors
    /// [`Error::File`] when `config.out` exists, [`Error::Io`] when the directory cannot be made.
    pub fn create(config: &Config) -> Result<Self> {
        let path = config.out.clone().unwrap_or_else(|| free_name(Path::new("runs"), config));
        create_run_dir(&path)?;
        let run = RunDir { path };
        let written = config.to_toml().and_then(|text| write_atomic(run.config(), text.as_bytes()));
        written.inspect_err(|_| std::fs::remove_dir_all(&run.path).unwrap_or_default())?;
        Ok(run)
    }

    /// Opens the directory of an earlier run.
    ///
    /// # Errors
    /// [`Error::File`] when `path` is no folder or has no `config.toml`.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let run = RunDir { path: path.into() };
        if !run.path.is_dir() {
            return Err(Error::file(&run.path, "no such run directory"));
        }
        if !run.config().is_file() {
            return Err(Error::file(&run.path, "not a run directory: it has no config.toml"));
        }
        Ok(run)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The complete settings.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// One [`EpochRecord`](super::metrics::EpochRecord) per line; the same for the same seed.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// One [`TimingRecord`](super::metrics::TimingRecord) per line.
    pub fn timing(&self) -> PathBuf {
        self.path.join("timing.jsonl")
    }

    /// The folder of event files for TensorBoard; they hold clock times.
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    /// One [`IterationRecord`](super::metrics::IterationRecord) per line.
    pub fn iterations(&self) -> PathBuf {
        self.path.join("iterations.jsonl")
    }

    /// What the last iteration with a filter keeps, see [`Filter::write`](super::filter::Filter::write).
    pub fn kept(&self) -> PathBuf {
        self.path.join("kept.csv")
    }

    /// Losses per sample, see [`LossRows`].
    pub fn losses(&self) -> PathBuf {
        self.path.join("losses.f32")
    }

    /// The best network of the last iteration by validation accuracy.
    pub fn best(&self) -> PathBuf {
        self.path.join("best.safetensors")
    }

    /// Given and true label of every training image.
    pub fn labels(&self) -> PathBuf {
        self.path.join("labels.csv")
    }

    /// The student network, the one that SGD trains.
    pub fn student(&self) -> PathBuf {
        self.path.join("student.safetensors")
    }

    /// The teacher network.
    pub fn teacher(&self) -> PathBuf {
        self.path.join("teacher.safetensors")
    }

    /// The state from which `--resume` continues.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint.safetensors")
    }

    /// The final table, for people.
    pub fn summary_text(&self) -> PathBuf {
        self.path.join("summary.txt")
    }

    /// The final table, for programs.
    pub fn summary_json(&self) -> PathBuf {
        self.path.join("summary.json")
    }
}

/// A name below `base` that no file has: [`setting_name`] and `-sSEED`, with `-2`, `-3` … when it is taken.
pub fn free_name(base: &Path, config: &Config) -> PathBuf {
    let name = format!("{}-s{}", setting_name(config), config.seed);
    let numbered = (2u64..).map(|number| base.join(format!("{name}-{number}")));
    std::iter::once(base.join(&name)).chain(numbered).find(|path| !path.exists()).unwrap_or_else(|| base.join(&name))
}

/// What the labels of a run are, as part of a file's name: `DATA-NOISE-RATE` or `DATA-LABELS-SET`.
pub fn setting_name(config: &Config) -> String {
    let data = Path::new(&config.data).file_name().map_or("data".into(), |name| name.to_string_lossy());
    let noise = match config.noise {
        NoiseKind::None if !config.labels.is_empty() => {
            let stem = Path::new(&config.labels).file_stem().map_or("labels".into(), |name| name.to_string_lossy());
            let set = config.label_set.replace(|c: char| !c.is_alphanumeric(), "_");
            if set.is_empty() { stem.into_owned() } else { format!("{stem}-{set}") }
        }
        NoiseKind::None => "none".to_string(),
        kind => format!("{kind}-{}", config.noise_rate),
    };
    format!("{data}-{noise}")
}

/// A file that only grows, and that a checkpoint can be tied to by its length.
#[derive(Debug)]
struct Growing {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Growing {
    fn create(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(Error::io(&path))?;
        Ok(Growing { path, file, len: 0 })
    }

    /// Drops what was written after the first `len` bytes, of which `fault` says what is wrong with them.
    fn resume(path: PathBuf, len: u64, fault: impl FnOnce(&[u8]) -> Option<String>) -> Result<Self> {
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let kept = usize::try_from(len).ok().and_then(|len| bytes.get(..len)).ok_or_else(|| {
            Error::file(&path, format_args!("cut short: {} bytes, the checkpoint counts {len}", bytes.len()))
        })?;
        if let Some(fault) = fault(kept) {
            return Err(Error::file(&path, fault));
        }
        let mut file = OpenOptions::new().write(true).open(&path).map_err(Error::io(&path))?;
        file.set_len(len).map_err(Error::io(&path))?;
        file.seek(SeekFrom::Start(len)).map_err(Error::io(&path))?;
        Ok(Growing { path, file, len })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn sync(&mut self) -> Result<u64> {
        self.file.sync_data().map_err(Error::io(&self.path))?;
        Ok(self.len)
    }
}

/// A file of JSON lines that only grows, and that a checkpoint can be tied to by its length.
#[derive(Debug)]
pub struct JsonLines(Growing);

impl JsonLines {
    /// A new, empty file.
    ///
    /// # Errors
    /// [`Error::Io`], also when the file exists.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        Growing::create(path.into()).map(JsonLines)
    }

    /// Opens a file and drops what was written after its first `len` bytes, so that a resumed run's file equals that
    /// of an uninterrupted one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] when the file is shorter than `len` or `len` is within a line.
    pub fn resume(path: impl Into<PathBuf>, len: u64) -> Result<Self> {
        let within = |kept: &[u8]| {
            let whole = kept.last().is_none_or(|&byte| byte == b'\n');
            (!whole).then(|| format!("changed: no line ends at byte {len}, the checkpoint's count"))
        };
        Growing::resume(path.into(), len, within).map(JsonLines)
    }

    /// Appends one record as one line, in one write.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a record that has no form in JSON.
    pub fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(|error| Error::file(&self.0.path, error))?;
        line.push(b'\n');
        self.0.append(&line)
    }

    /// Makes every line so far last and gives the file's length in bytes, for the checkpoint that follows.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<u64> {
        self.0.sync()
    }
}

/// `losses.f32`: a row per epoch of the method, one little-endian f32 per training sample in the order of the training
/// set: the cross entropy of its given label in that epoch's training-mode forward, nats; not a number for a sample that
/// the epoch did not visit.
#[derive(Debug)]
pub struct LossRows(Growing);

impl LossRows {
    /// A new, empty file.
    ///
    /// # Errors
    /// [`Error::Io`], also when the file exists.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        Growing::create(path.into()).map(LossRows)
    }

    /// As [`JsonLines::resume`].
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] when the file is shorter than `len`.
    pub fn resume(path: impl Into<PathBuf>, len: u64) -> Result<Self> {
        Growing::resume(path.into(), len, |_| None).map(LossRows)
    }

    /// Appends a row, in one write.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append(&mut self, losses: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = losses.iter().flat_map(|loss| loss.to_le_bytes()).collect();
        self.0.append(&bytes)
    }

    /// As [`JsonLines::sync`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<u64> {
        self.0.sync()
    }
}
