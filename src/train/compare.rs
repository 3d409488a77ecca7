//! A comparison of methods: one run directory per method and seed below one folder, all other settings alike.
//!
//! Injected noise, the subset of the images and the validation part are drawn from the seed alone, so that all methods
//! of a seed learn from the same labels, and seeds differ in their labels too. Labels of a file are the file's for every
//! seed.

use std::path::{Path, PathBuf};

use super::choice::Method;
use super::config::Config;
use super::run_dir::RunDir;
use crate::error::{Error, Result};

/// One run of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Its method.
    pub method: Method,
    /// Its seed.
    pub seed: u64,
    /// All its settings, method and seed among them.
    pub config: Config,
    /// Its run directory.
    pub path: PathBuf,
}

/// How far a run of a comparison is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its directory is not there.
    New,
    /// Begun and not finished.
    Begun,
    /// Finished.
    Complete,
}

/// The runs of a comparison below `out`: for each seed every method, with the other settings of `base`.
///
/// Each run trains its method alone, without a comparison of its own, and a method without a mentor has one iteration.
///
/// # Errors
/// [`Error::Usage`] for no method or seed, one that stands there twice, and settings that a method cannot work with.
pub fn cells(base: &Config, methods: &[Method], seeds: &[u64], out: &Path) -> Result<Vec<Cell>> {
    distinct("methods", methods)?;
    distinct("seeds", seeds)?;
    let mut cells = Vec::new();
    for seed in seeds {
        for method in methods {
            let path = out.join(format!("{method}-s{seed}"));
            let iterations = if method.has_mentor() { base.iterations } else { 1 };
            let config = Config {
                method: *method,
                seed: *seed,
                iterations,
                first_order: false,
                no_baseline: true,
                out: Some(path.clone()),
                ..base.clone()
            };
            config.validate().map_err(|e| Error::usage(format_args!("{method}, seed {seed}: {e}")))?;
            cells.push(Cell { method: *method, seed: *seed, config, path });
        }
    }
    Ok(cells)
}

/// An error where `values` are none, or one of them stands there twice.
fn distinct<T: PartialEq + std::fmt::Display>(flag: &str, values: &[T]) -> Result<()> {
    if values.is_empty() {
        return Err(Error::usage(format_args!("--{flag}: takes at least one")));
    }
    match values.iter().enumerate().find(|(i, value)| values[..*i].contains(value)) {
        Some((_, value)) => Err(Error::usage(format_args!("--{flag}: {value} stands there twice"))),
        None => Ok(()),
    }
}

/// How far each of `cells` is. Nothing is written.
///
/// Runs that are there decide where the others compute and in what precision, if that was left open: a comparison has one
/// device.
///
/// # Errors
/// [`Error::File`] for a folder that is no run, or one of other settings.
pub fn survey(cells: &mut [Cell]) -> Result<Vec<State>> {
    let mut found = Vec::new();
    for cell in &*cells {
        let there = cell.path.exists();
        found.push(there.then(|| RunDir::open(&cell.path).and_then(|dir| Ok((Config::load(&dir.config())?, dir)))));
    }
    let found: Vec<Option<(Config, RunDir)>> = found.into_iter().map(Option::transpose).collect::<Result<_>>()?;
    if let Some((run, _)) = found.iter().flatten().next() {
        cells.iter_mut().for_each(|cell| cell.config.settle(run));
    }
    cells.iter().zip(&found).map(|(cell, found)| state(cell, found.as_ref())).collect()
}

/// How far a run is, given what stands in its directory.
fn state(cell: &Cell, found: Option<&(Config, RunDir)>) -> Result<State> {
    let Some((run, dir)) = found else { return Ok(State::New) };
    let differing = run.diff(&cell.config)?;
    if !differing.is_empty() {
        let what = format!("a run of other settings ({}); choose another --out", differing.join("; "));
        return Err(Error::file(&cell.path, what));
    }
    if dir.summary_json().is_file() {
        return Ok(State::Complete);
    }
    if !dir.checkpoint().is_file() {
        return Err(Error::file(&cell.path, "begun, but without a checkpoint to continue from: remove it"));
    }
    Ok(State::Begun)
}

/// Checks that the runs of each seed, all finished, had the same labels.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] with the two runs that differ.
pub fn check_labels(cells: &[Cell]) -> Result<()> {
    let mut seen: Vec<(&Cell, Vec<u8>)> = Vec::new();
    for cell in cells {
        let path = RunDir::open(&cell.path)?.labels();
        let labels = std::fs::read(&path).map_err(Error::io(&path))?;
        match seen.iter().find(|(other, _)| other.seed == cell.seed) {
            Some((other, others)) if *others != labels => {
                let what = format!("not the labels of {}; choose another --out", other.path.display());
                return Err(Error::file(path, what));
            }
            Some(_) => {}
            None => seen.push((cell, labels)),
        }
    }
    Ok(())
}
