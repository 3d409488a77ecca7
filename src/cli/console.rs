//! Progress of a run on the terminal.

use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::train::engine::StepOutcome;
use crate::train::metrics::{EpochRecord, Phase};
use crate::train::run::Observer;

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
        self.bar.suspend(|| println!("{text}"));
    }
}

fn title(phase: Phase) -> &'static str {
    match phase {
        Phase::CrossEntropy => "cross entropy",
        Phase::Features => "feature network",
        Phase::Mlnt => "MLNT",
    }
}

/// A fraction in per cent, right-aligned; blank when there is none.
fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| format!("{:>7}", "-"), |v| format!("{:>7.2}", 100.0 * v))
}

impl Observer for Console {
    fn phase(&mut self, phase: Phase, done: usize, total: usize) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::new(total as u64).with_position(done as u64);
        let style = ProgressStyle::with_template(
            "{msg:15} {wide_bar} {pos}/{len} steps  {per_sec}  {elapsed} gone, {eta} left",
        );
        self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        self.bar.set_message(title(phase));
        self.bar.reset_eta();
        self.header_due = true;
    }

    fn step(&mut self, _: &StepOutcome) {
        self.bar.inc(1);
    }

    fn epoch(&mut self, r: &EpochRecord, epochs: usize) {
        if self.header_due {
            self.header_due = false;
            self.line(&format!(
                "\n{:<15} epoch  loss    meta loss  train% |   val%   test% | teacher val%   test%",
                title(r.phase)
            ));
        }
        let meta = r.meta_loss.map_or_else(|| format!("{:>9}", "-"), |m| format!("{m:>9.5}"));
        self.line(&format!(
            "{:>19}/{epochs:<3} {:>6.4} {meta}  {} | {} {} |      {} {}",
            r.epoch,
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
