//! Label files: the given labels of a training set, from others or from `mlnt noise`.
//!
//! | format | known by its start | label sets | images covered |
//! |---|---|---|---|
//! | [`csv`] | none of the below | a column each | those of the column `index`, else the first ones |
//! | [`json`], a list of numbers (DivideMix) | `[` | one | the first ones |
//! | [`npy`], one axis of whole numbers (PMD) | `\x93NUMPY` | one | the first ones |
//! | [`cifar_n`], CIFAR-10N and CIFAR-100N by `torch.save` | `PK` | an array each | the first ones |
//!
//! Whatever the format, every label is checked against the data set it is for, and so are the true labels that come
//! along in CSV and CIFAR-N files.

pub mod cifar_n;
pub mod csv;
pub mod json;
pub mod npy;

use std::fmt;
use std::path::Path;

use super::dataset::Dataset;
use super::map::Bytes;
use super::noise::{NoiseKind, disagreement};
use crate::error::{Error, Result};

/// How a label file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Index, label and true label, one line per image.
    Csv,
    /// A list of labels.
    Json,
    /// A NumPy file of int64 labels.
    Npy,
    /// A dictionary of NumPy arrays by `torch.save`; only read.
    #[value(skip)]
    CifarN,
}

impl Format {
    /// The format of a file with these bytes.
    pub fn of(bytes: &[u8]) -> Format {
        let text = bytes.trim_ascii_start();
        match bytes {
            _ if bytes.starts_with(npy::MAGIC) => Format::Npy,
            _ if bytes.starts_with(cifar_n::MAGIC) => Format::CifarN,
            _ if text.starts_with(b"[") => Format::Json,
            _ => Format::Csv,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Csv => "CSV",
            Format::Json => "JSON list",
            Format::Npy => "NumPy array",
            Format::CifarN => "CIFAR-N file",
        })
    }
}

/// How the labels of a file were made, as far as the file says.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// Name of the data set.
    pub dataset: String,
    /// The rule.
    pub kind: NoiseKind,
    /// The rate asked for.
    pub nominal: f64,
    /// The seed.
    pub seed: u64,
}

/// The content of a label file, checked against its data set.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelFile {
    /// Samples that the file has labels for, ascending.
    pub covered: Vec<u32>,
    /// The given label of each of them.
    pub labels: Vec<u16>,
    /// Share of them that differ from the data set's, counted.
    pub realised_rate: f64,
    /// Whether the file had true labels to compare with the data set's.
    pub had_truth: bool,
    /// How the file is written.
    pub format: Format,
    /// How the labels were made, if the file says so.
    pub provenance: Option<Provenance>,
}

/// What a format's reader finds, not yet checked against any data set.
#[derive(Debug)]
struct Found {
    format: Format,
    labels: Vec<i64>,
    truth: Option<Vec<i64>>,
    /// The sample of each label; 0, 1, … without.
    index: Option<Vec<i64>>,
    places: Places,
    provenance: Option<Provenance>,
}

/// Where in the file a label stands, for errors.
#[derive(Debug)]
enum Places {
    /// On these lines.
    Lines(Vec<u32>),
    /// In the array of this name; in the only list without.
    Items(Option<String>),
}

impl Places {
    fn of(&self, i: usize) -> String {
        match self {
            Places::Lines(lines) => format!("line {}", lines.get(i).copied().unwrap_or(0)),
            Places::Items(Some(name)) => format!("{name}[{i}]"),
            Places::Items(None) => format!("item {i}"),
        }
    }
}

/// Reads the labels in the file at `path` for `data`, a training set as it was opened; `set` chooses among several
/// sets of labels in the file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; else as [`read`].
pub fn open(path: &Path, set: Option<&str>, data: &Dataset) -> Result<LabelFile> {
    read(path, &Bytes::map(path)?, set, data)
}

/// As [`open`], from the file's bytes; `path` is for errors only.
///
/// # Errors
/// [`Error::File`] with the place in the file: a format that is not known or is damaged, a set of labels that is not
/// there or has to be chosen, more labels than images, a label or an index out of range, indices that do not grow, a
/// true label that is not the data set's.
pub fn read(path: &Path, bytes: &[u8], set: Option<&str>, data: &Dataset) -> Result<LabelFile> {
    let fail = |what: String| Error::file(path, what);
    let format = Format::of(bytes);
    if let (Format::Json | Format::Npy, Some(name)) = (format, set) {
        return Err(fail(format!("a {format} has one set of labels: leave out --label-set {name}")));
    }
    let found = match format {
        Format::Csv => csv::read(bytes, set),
        Format::Json => json::read(bytes),
        Format::Npy => npy::read(bytes),
        Format::CifarN => cifar_n::read(bytes, set),
    };
    check(found.map_err(fail)?, data).map_err(fail)
}

/// Checks what was found against the data set.
fn check(found: Found, data: &Dataset) -> std::result::Result<LabelFile, String> {
    let Found { format, labels, truth, index, places, provenance } = found;
    if labels.is_empty() {
        return Err("no labels".into());
    }
    if let Some(truth) = truth.as_ref().filter(|truth| truth.len() != labels.len()) {
        return Err(format!("{} labels, but {} true ones", labels.len(), truth.len()));
    }
    let mut covered: Vec<u32> = Vec::with_capacity(labels.len().min(data.len()));
    let mut checked: Vec<u16> = Vec::with_capacity(covered.capacity());
    for (i, &label) in labels.iter().enumerate() {
        let at = |what: String| format!("{}: {what}", places.of(i));
        let sample = index.as_ref().map_or(i as i64, |index| index[i]);
        let sample = usize::try_from(sample).ok().filter(|&sample| sample < data.len()).ok_or_else(|| match index {
            Some(_) => at(format!("index {sample}, but {} has {} samples", data.name, data.len())),
            None => format!("{} labels, but {} has {} samples", labels.len(), data.name, data.len()),
        })?;
        if let Some(last) = covered.last().filter(|&&last| last as usize >= sample) {
            return Err(at(format!("index {sample} after {last}: indices have to grow")));
        }
        if let Some(t) = truth.as_ref().map(|truth| truth[i]).filter(|&t| t != data.label(sample) as i64) {
            let has = data.label(sample);
            return Err(at(format!("true label {t}, but sample {sample} of {} has {has}", data.name)));
        }
        let label = u16::try_from(label).ok().filter(|&label| usize::from(label) < data.classes);
        let label = label.ok_or_else(|| at(format!("label {} is outside 0..={}", labels[i], data.classes - 1)))?;
        covered.push(sample as u32);
        checked.push(label);
    }
    let truths: Vec<u16> = covered.iter().map(|&sample| data.label(sample as usize) as u16).collect();
    Ok(LabelFile {
        realised_rate: disagreement(&checked, &truths),
        covered,
        labels: checked,
        had_truth: truth.is_some(),
        format,
        provenance,
    })
}
