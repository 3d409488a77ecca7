//! What the program says: lines on standard output, and the progress of a run on the terminal.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::train::engine::{Network, StepOutcome};
use crate::train::method::Part;
use crate::train::metrics::{EpochRecord, IterationRecord};
use crate::train::run::Observer;

/// Prints a line on standard output. A reader such as `head` that has seen enough and closed it is no error.
///
/// # Errors
/// [`Error::Io`] for anything else, a full disk for instance.
pub(super) fn say(line: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Error::io("standard output")(e)),
        _ => Ok(()),
    }
}

/// Prints a line on standard error, if anybody reads it.
pub(super) fn note(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A progress bar with rate and time left, and one line per epoch.
pub(super) struct Console {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
    header_due: bool,
}

impl Console {
    /// A console that asks for a stop once `stop` is set.
    pub fn new(stop: Arc<AtomicBool>) -> Self {
        Console { bar: ProgressBar::hidden(), stop, header_due: false }
    }

    fn line(&self, text: &str) {
        // Training does not stop because nobody reads its lines: metrics.jsonl has them.
        self.bar.suspend(|| say(text).ok());
    }
}

/// A fraction in per cent, right-aligned; blank when there is none.
fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| format!("{:>7}", "-"), |v| format!("{:>7.2}", 100.0 * v))
}

impl Observer for Console {
    fn filtered(&mut self, part: &Part, filter: &IterationRecord) {
        let share = |name: &str, part: Option<f64>| part.map(|v| format!(", {name} {:.1} %", 100.0 * v));
        let mentor = filter.mentor.map_or_else(String::new, |m| {
            let network = if m.network == Network::Teacher { "teacher" } else { "student" };
            format!("the {network} of epoch {}, {:.2} % on validation", m.epoch, 100.0 * m.val_accuracy)
        });
        self.line(&format!(
            "\n{}: mentor: {mentor}; of the training labels {} are kept, {} dropped{}{}",
            part.title(),
            filter.kept.unwrap_or_default(),
            filter.dropped.unwrap_or_default(),
            share("precision", filter.precision).unwrap_or_default(),
            share("recall", filter.recall).unwrap_or_default(),
        ));
    }

    fn part(&mut self, part: &Part, done: usize, total: usize) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::new(total as u64).with_position(done as u64);
        let style = ProgressStyle::with_template(
            "{msg:15} {wide_bar} {pos}/{len} steps  {per_sec}  {elapsed} gone, {eta} left",
        );
        self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        self.bar.set_message(part.title());
        self.bar.reset_eta();
        self.header_due = true;
    }

    fn step(&mut self, _: &StepOutcome) {
        self.bar.inc(1);
    }

    fn epoch(&mut self, part: &Part, r: &EpochRecord) {
        if self.header_due {
            self.header_due = false;
            self.line(&format!(
                "\n{:<15} epoch  loss    meta loss  train% |   val%   test% | teacher val%   test%",
                part.title()
            ));
        }
        let meta = r.meta_loss.map_or_else(|| format!("{:>9}", "-"), |m| format!("{m:>9.5}"));
        let several = part.iteration.filter(|_| part.iterations > 1);
        let iteration = several.map_or_else(String::new, |i| format!("iteration {i}"));
        let skipped = r.skipped.filter(|n| *n > 0).map_or_else(String::new, |n| format!("  {n} batches skipped"));
        let overflows = r.overflows.filter(|n| *n > 0).map_or_else(String::new, |n| format!("  {n} steps overflowed"));
        self.line(&format!(
            "{iteration:<15} {:>3}/{:<3} {:>6.4} {meta}  {} | {} {} |      {} {}{skipped}{overflows}",
            r.epoch,
            part.epochs,
            r.train_loss,
            percent(Some(r.train_accuracy)),
            percent(r.val_accuracy),
            percent(r.test_accuracy),
            percent(r.teacher_val_accuracy),
            percent(r.teacher_test_accuracy),
        ));
        if self.bar.length() == Some(self.bar.position()) {
            self.bar.finish_and_clear();
        }
    }

    fn wants_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
