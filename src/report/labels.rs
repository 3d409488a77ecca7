//! Labels counted against labels.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// How often a label of one kind goes with a label of another.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Names of the classes.
    pub names: Vec<String>,
    /// `[classes, classes]`: rows are given labels, columns the other ones.
    pub counts: Vec<Vec<u64>>,
}

impl Matrix {
    /// Nothing counted yet.
    fn new(names: Vec<String>) -> Self {
        let counts = vec![vec![0; names.len()]; names.len()];
        Matrix { names, counts }
    }

    /// The samples counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().flatten().sum()
    }

    /// Those of them whose two labels are the same.
    pub fn agreeing(&self) -> u64 {
        self.counts.iter().enumerate().map(|(i, row)| row[i]).sum()
    }

    /// Share of column `j` in row `i`, from 0 to 1; 0 in an empty row.
    pub fn share(&self, i: usize, j: usize) -> f64 {
        let all: u64 = self.counts[i].iter().sum();
        if all == 0 { 0.0 } else { self.counts[i][j] as f64 / all as f64 }
    }

    /// The most frequent pairs of different labels: (row, column, count).
    pub fn top(&self, most: usize) -> Vec<(usize, usize, u64)> {
        let pairs =
            self.counts.iter().enumerate().flat_map(|(i, row)| row.iter().enumerate().map(move |(j, n)| (i, j, *n)));
        let mut pairs: Vec<(usize, usize, u64)> = pairs.filter(|(i, j, n)| i != j && *n > 0).collect();
        pairs.sort_by_key(|(i, j, n)| (std::cmp::Reverse(*n), *i, *j));
        pairs.truncate(most);
        pairs
    }

    /// The sum of matrices; `None` without any, or when their classes differ.
    pub fn sum<'a>(matrices: impl IntoIterator<Item = &'a Matrix>) -> Option<Matrix> {
        let mut matrices = matrices.into_iter();
        let mut sum = matrices.next()?.clone();
        for other in matrices {
            if other.names != sum.names {
                return None;
            }
            for (a, b) in sum.counts.iter_mut().flatten().zip(other.counts.iter().flatten()) {
                *a += b;
            }
        }
        Some(sum)
    }
}

/// `labels.csv` of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenLabels {
    /// The given labels, in order.
    pub given: Vec<u16>,
    /// The number of classes, as far as labels show it.
    pub classes: usize,
    /// Given against true labels.
    pub truth: Matrix,
}

impl GivenLabels {
    /// Reads the file; `None` if there is none. Classes without a name in `names` get their number.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] when a column is missing or a field is no label.
    pub fn read(path: &Path, names: &[String]) -> Result<Option<Self>> {
        let Some(rows) = columns(path, ["label", "true_label"])? else { return Ok(None) };
        let label = |text: &String| -> Result<u16> {
            let number = text.parse().ok().filter(|label| *label < 10_000);
            number.ok_or_else(|| Error::file(path, format_args!("`{text}` is no label")))
        };
        let pairs: Vec<[u16; 2]> = rows.iter().map(|[a, b]| Ok([label(a)?, label(b)?])).collect::<Result<_>>()?;
        let classes = pairs.iter().flatten().map(|label| usize::from(*label) + 1).max().unwrap_or(0).max(names.len());
        let name = |i: usize| names.get(i).cloned().unwrap_or_else(|| i.to_string());
        let mut truth = Matrix::new((0..classes).map(name).collect());
        for [given, other] in &pairs {
            truth.counts[usize::from(*given)][usize::from(*other)] += 1;
        }
        Ok(Some(GivenLabels { given: pairs.iter().map(|[given, _]| *given).collect(), classes, truth }))
    }

    /// Share of given labels that are wrong, from 0 to 1; `None` without labels.
    pub fn realised(&self) -> Option<f64> {
        let total = self.truth.total();
        (total > 0).then(|| 1.0 - self.truth.agreeing() as f64 / total as f64)
    }
}

/// Given against suggested labels of `audit.csv`; `None` if there is no such file. The audit names the most probable
/// other class for every sample, and suggests it for those that it flags: of the others the given label stays. The
/// classes are those of `names` where these have all names of the file, else those of the file in alphabetical order.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] when a column is missing.
pub fn read_audit(path: &Path, names: &[String]) -> Result<Option<Matrix>> {
    let Some(rows) = columns(path, ["given_name", "suggested_name", "flagged"])? else { return Ok(None) };
    let found: BTreeSet<&String> = rows.iter().flat_map(|[given, suggested, _]| [given, suggested]).collect();
    let known = found.iter().all(|name| names.contains(name));
    let order: Vec<String> = if known { names.to_vec() } else { found.into_iter().cloned().collect() };
    let mut matrix = Matrix::new(order);
    for [given, suggested, flagged] in &rows {
        let at = |name: &String| matrix.names.iter().position(|n| n == name);
        let stays = flagged == "0";
        if let (Some(i), Some(j)) = (at(given), at(if stays { given } else { suggested })) {
            matrix.counts[i][j] += 1;
        }
    }
    Ok(Some(matrix))
}

/// Columns of a CSV file with a header line, after comment lines that begin with `#`.
fn columns<const N: usize>(path: &Path, wanted: [&str; N]) -> Result<Option<Vec<[String; N]>>> {
    if !path.exists() {
        return Ok(None);
    }
    let fail = |e: csv::Error| Error::file(path, e);
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).trim(csv::Trim::All).from_reader(&bytes[..]);
    let header = reader.headers().map_err(fail)?.clone();
    let place = |name: &str| {
        let found = header.iter().position(|column| column == name);
        found.ok_or_else(|| Error::file(path, format_args!("has no column `{name}`")))
    };
    let places: Vec<usize> = wanted.into_iter().map(place).collect::<Result<_>>()?;
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(fail)?;
        rows.push(std::array::from_fn(|i| record.get(places[i]).unwrap_or_default().to_string()));
    }
    Ok(Some(rows))
}

/// The class names that `mlnt train` writes into a network's file; none if it is not there or does not tell. Only the
/// head of the file is read.
pub fn class_names(path: &Path) -> Vec<String> {
    let read = || -> Option<Vec<String>> {
        let mut file = File::open(path).ok()?;
        let mut length = [0; 8];
        file.read_exact(&mut length).ok()?;
        let mut head = Vec::new();
        file.take(u64::from_le_bytes(length)).read_to_end(&mut head).ok()?;
        let head: serde_json::Value = serde_json::from_slice(&head).ok()?;
        let meta: serde_json::Value = serde_json::from_str(head["__metadata__"]["mlnt"].as_str()?).ok()?;
        serde_json::from_value(meta["meta"]["class_names"].clone()).ok()
    };
    read().unwrap_or_default()
}
