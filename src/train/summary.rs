//! The result of a run, from its `metrics.jsonl`.

use super::method::Part;
use super::metrics::{EpochRecord, Phase};
use super::run_dir::RunDir;
use super::table::{CurvePoint, SummaryRow, summary_table};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use std::path::Path;

/// Reads all epochs of a run.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] with the line that is no record.
pub fn read_metrics(path: &Path) -> Result<Vec<EpochRecord>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| Error::file(path, format!("line {}: {e}", i + 1)))
    };
    text.lines().enumerate().map(parse).collect()
}

/// One row per network that was trained and evaluated.
pub fn rows(records: &[EpochRecord]) -> Vec<SummaryRow> {
    type Score = fn(&EpochRecord) -> Option<f64>;
    let curve = |part: (Phase, Option<usize>), val: Score, test: Score| -> Vec<CurvePoint> {
        let point = |r: &EpochRecord| Some(CurvePoint { epoch: r.epoch, val: val(r)?, test: test(r)? });
        records.iter().filter(|r| (r.phase, r.iteration) == part).filter_map(point).collect()
    };
    let mut parts: Vec<(Phase, Option<usize>)> = records.iter().map(|r| (r.phase, r.iteration)).collect();
    parts.dedup();
    let iterations = records.iter().filter_map(|r| r.iteration).max().unwrap_or(1);
    let mut rows = Vec::new();
    for (phase, iteration) in parts {
        let title = Part { phase, epochs: 0, iteration, iterations }.title();
        let scores: [[Score; 2]; 2] =
            [[|r| r.val_accuracy, |r| r.test_accuracy], [|r| r.teacher_val_accuracy, |r| r.teacher_test_accuracy]];
        for (role, [val, test]) in phase.roles().iter().zip(&scores) {
            let name = format!("{title} {role}").trim_end().to_string();
            rows.extend(SummaryRow::from_curve(&name, &curve((phase, iteration), *val, *test)));
        }
    }
    rows
}

/// Writes `summary.txt` and `summary.json`; `noise` is the source of the labels, `realised` the part that is wrong.
///
/// # Errors
/// As [`read_metrics`]; [`Error::Io`].
pub fn write(dir: &RunDir, noise: &str, realised: f64) -> Result<Vec<SummaryRow>> {
    let rows = rows(&read_metrics(&dir.metrics())?);
    let json = serde_json::json!({ "noise": noise, "realised_noise": realised, "networks": rows });
    let json = serde_json::to_string_pretty(&json).map_err(|e| Error::file(dir.summary_json(), e))?;
    write_atomic(dir.summary_text(), format!("{}\n", summary_table(&rows)).as_bytes())?;
    write_atomic(dir.summary_json(), format!("{json}\n").as_bytes())?;
    Ok(rows)
}
