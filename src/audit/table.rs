//! The audit as CSV.

use super::history::Trajectory;
use super::roc::Roc;
use super::samples::Samples;
use super::score::Finding;
use super::sheet::Entry;
use crate::error::{Error, Result};

/// One line of `audit.csv`. Fields that nothing is known about are empty.
#[derive(Debug, serde::Serialize)]
struct Line<'a> {
    rank: usize,
    index: u32,
    split: &'a str,
    given: usize,
    given_name: &'a str,
    p_given: String,
    suggested: usize,
    suggested_name: &'a str,
    p_suggested: String,
    score: String,
    flagged: u8,
    kept: Option<u8>,
    mean_loss: Option<String>,
    last_loss: Option<String>,
}

/// The columns that follow where true labels are known.
#[derive(Debug, serde::Serialize)]
struct Truth<'a> {
    #[serde(rename = "true")]
    label: usize,
    true_name: &'a str,
    wrong: u8,
}

/// What stands in `audit.csv` about the samples, one of each per sample.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// The samples.
    pub samples: &'a Samples,
    /// What the audit says.
    pub findings: &'a [Finding],
    /// Their losses in training.
    pub history: &'a [Option<Trajectory>],
    /// What the mentor's filter decided.
    pub kept: &'a [Option<bool>],
    /// Which labels are wrong, where that is known.
    pub wrong: Option<&'a [bool]>,
    /// Names of the classes.
    pub names: &'a [String],
}

impl Table<'_> {
    /// What the contact sheet shows of sample `i`.
    ///
    /// # Panics
    /// If there is no sample `i`.
    pub fn entry(&self, i: usize) -> Entry {
        let f = &self.findings[i];
        Entry {
            position: i,
            index: self.samples.set.images.original(i),
            given: self.names[f.given].clone(),
            p_given: f.p_given,
            suggested: self.names[f.suggested].clone(),
            p_suggested: f.p_suggested,
            wrong: self.wrong.map(|wrong| wrong[i]),
        }
    }

    /// The file, one line per sample of `order`.
    ///
    /// # Errors
    /// [`Error::Usage`] when the CSV writer fails, which it does not in memory.
    pub fn csv(&self, order: &[usize]) -> Result<Vec<u8>> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        let digits = |v: f64| format!("{v:.6}");
        for (at, &i) in order.iter().enumerate() {
            let (f, images) = (&self.findings[i], &self.samples.set.images);
            let line = Line {
                rank: at + 1,
                index: images.original(i),
                split: if self.samples.trained[i] { "train" } else { "validation" },
                given: f.given,
                given_name: &self.names[f.given],
                p_given: digits(f.p_given),
                suggested: f.suggested,
                suggested_name: &self.names[f.suggested],
                p_suggested: digits(f.p_suggested),
                score: digits(f.score),
                flagged: u8::from(f.flagged),
                kept: self.kept[i].map(u8::from),
                mean_loss: self.history[i].map(|t| digits(t.mean)),
                last_loss: self.history[i].map(|t| digits(t.last)),
            };
            let truth = self.wrong.map(|wrong| {
                let label = images.label(i);
                Truth { label, true_name: &self.names[label], wrong: u8::from(wrong[i]) }
            });
            let written = match truth {
                Some(truth) => csv.serialize((line, truth)),
                None => csv.serialize(line),
            };
            written.map_err(|e| Error::usage(format_args!("audit.csv: {e}")))?;
        }
        csv.into_inner().map_err(|e| Error::usage(format_args!("audit.csv: {}", e.error())))
    }
}

/// `roc.csv`: one line per point of the curve.
pub fn roc_csv(roc: &Roc) -> Vec<u8> {
    let mut text = "threshold,called,hits,false_positive_rate,true_positive_rate,precision\n".to_string();
    for p in &roc.points {
        let rates = format!("{:.6},{:.6},{:.6}", p.false_positive_rate, p.true_positive_rate, p.precision);
        text += &format!("{:.6},{},{},{rates}\n", p.threshold, p.called, p.hits);
    }
    text.into_bytes()
}
