//! The table at the end of a run.

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde::{Deserialize, Serialize};

/// How one network did over a run. Accuracies are fractions from 0 to 1, epochs count from 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryRow {
    /// The network: "cross entropy", "MLNT student", "MLNT teacher".
    pub name: String,
    /// Best test accuracy.
    pub best_test: f64,
    /// The first epoch with it.
    pub best_epoch: usize,
    /// Test accuracy after the last epoch.
    pub last_test: f64,
    /// Test accuracy in the first epoch of best validation accuracy: what one gets without looking at the test data.
    pub test_at_best_val: f64,
    /// That epoch.
    pub best_val_epoch: usize,
}

/// One epoch of a network's curve, accuracies as fractions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// Epoch, from 1.
    pub epoch: usize,
    /// Accuracy on the validation images.
    pub val: f64,
    /// Accuracy on the test images.
    pub test: f64,
}

impl SummaryRow {
    /// Sums up a curve; `None` when it has no point.
    pub fn from_curve(name: &str, curve: &[CurvePoint]) -> Option<Self> {
        let first_best = |score: fn(&CurvePoint) -> f64| {
            curve.iter().copied().reduce(|best, point| if score(&point) > score(&best) { point } else { best })
        };
        let (best, chosen, last) = (first_best(|point| point.test)?, first_best(|point| point.val)?, curve.last()?);
        Some(SummaryRow {
            name: name.to_string(),
            best_test: best.test,
            best_epoch: best.epoch,
            last_test: last.test,
            test_at_best_val: chosen.test,
            best_val_epoch: chosen.epoch,
        })
    }
}

/// The rows as a table in Markdown, accuracies in per cent.
pub fn summary_table(rows: &[SummaryRow]) -> String {
    let percent = |fraction: f64| format!("{:.2}", 100.0 * fraction);
    let at = |fraction: f64, epoch: usize| format!("{:.2} ({epoch})", 100.0 * fraction);
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(["test accuracy, %", "best (epoch)", "last", "at best validation (epoch)"]);
    for row in rows {
        table.add_row([
            row.name.clone(),
            at(row.best_test, row.best_epoch),
            percent(row.last_test),
            at(row.test_at_best_val, row.best_val_epoch),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::{CurvePoint, SummaryRow, summary_table};

    #[test]
    fn a_row_takes_the_first_of_equals_and_the_table_shows_per_cent() {
        let curve = [(1, 0.5, 0.6), (2, 0.7, 0.715), (3, 0.7, 0.75), (4, 0.6, 0.75)];
        let curve = curve.map(|(epoch, val, test)| CurvePoint { epoch, val, test });
        let row = SummaryRow::from_curve("MLNT teacher", &curve).unwrap();
        assert_eq!((row.best_test, row.best_epoch, row.last_test), (0.75, 3, 0.75));
        assert_eq!((row.test_at_best_val, row.best_val_epoch), (0.715, 2));
        assert!(SummaryRow::from_curve("nothing", &[]).is_none());

        let text = summary_table(&[row]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[0], "| test accuracy, % | best (epoch) |  last | at best validation (epoch) |");
        assert_eq!(lines[2], "| MLNT teacher     |    75.00 (3) | 75.00 |                  71.50 (2) |");
    }
}
