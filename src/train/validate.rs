//! The range of every setting. A value outside is a usage error that names the flag and what it takes.

use std::fmt::Display;

use super::config::Config;
use super::group::Group;
use crate::data::NoiseKind;
use crate::error::{Error, Result};
use crate::plan::MOST_STAGES;

/// Largest number of epochs, a bound that keeps products of settings within 64 bits.
const MAX_EPOCHS: usize = 1_000_000;
/// Largest number of iterations.
const MAX_ITERATIONS: usize = 1000;
/// Largest batch.
const MAX_BATCH: usize = 1_000_000;
/// Largest number of branches.
const MAX_BRANCHES: usize = 10_000;
/// Most predictions of a sample that are kept.
const MAX_MEMORY: usize = 100;
/// Largest number of threads.
const MAX_THREADS: usize = 1024;
/// Largest padding, pixels.
const MAX_PAD: usize = 256;
/// Largest number of stages: each but the first halves the image.
const MAX_STAGES: usize = 16;
/// Largest number of blocks in a stage.
const MAX_BLOCKS: usize = 1000;
/// Largest number of channels.
const MAX_WIDTH: usize = 65_536;

/// An error unless `ok`: the flag, its value and what it takes.
fn check(ok: bool, flag: &str, value: impl Display, takes: impl Display) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::usage(format_args!("--{flag} {value}: takes {takes}"))) }
}

/// A whole number from `low` to `high`.
fn count(flag: &str, value: usize, low: usize, high: usize) -> Result<()> {
    check((low..=high).contains(&value), flag, value, format_args!("a whole number from {low} to {high}"))
}

/// A number greater than 0.
fn positive(flag: &str, value: f64) -> Result<()> {
    check(value.is_finite() && value > 0.0, flag, value, "a number greater than 0")
}

/// A number of at least 0.
fn not_negative(flag: &str, value: f64) -> Result<()> {
    check(value.is_finite() && value >= 0.0, flag, value, "a number of at least 0")
}

/// A number of at least 0 and less than 1.
fn decay(flag: &str, value: f64) -> Result<()> {
    check((0.0..1.0).contains(&value), flag, value, "a number of at least 0 and less than 1")
}

/// A number from 0 to 1.
fn share(flag: &str, value: f64) -> Result<()> {
    check((0.0..=1.0).contains(&value), flag, value, "a number from 0 to 1")
}

/// A number greater than 0 and at most `high`.
fn part(flag: &str, value: f64, high: f64) -> Result<()> {
    check(value > 0.0 && value <= high, flag, value, format_args!("a number greater than 0 and at most {high}"))
}

/// Numbers separated by commas.
fn list(values: &[usize]) -> String {
    if values.is_empty() {
        return "(empty)".into();
    }
    values.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

impl Config {
    /// Checks every setting against its range and against the others.
    ///
    /// # Errors
    /// [`Error::Usage`] for the first setting that cannot work: its flag, its value and the values it takes.
    pub fn validate(&self) -> Result<()> {
        self.validate_data()?;
        self.validate_method()?;
        self.validate_optimisation()?;
        self.validate_network()?;
        check(i64::try_from(self.seed).is_ok(), "seed", self.seed, format_args!("a whole number up to {}", i64::MAX))?;
        if let Group::Of { size, stages } = self.group {
            let takes =
                format_args!("auto, all or a whole number from 1 to {MAX_BRANCHES}, and such numbers for stages");
            let sizes = (0..MOST_STAGES).map(|stage| stages.size(stage)).chain([size]);
            check(sizes.flatten().all(|size| size <= MAX_BRANCHES), "group", self.group, takes)?;
        }
        count("threads", self.threads, 0, MAX_THREADS)
    }

    /// Checks the settings that depend on the data: the numbers of training images without validation, and of
    /// validation images.
    ///
    /// # Errors
    /// [`Error::Usage`] when a batch is larger than the data, or there is nothing to choose a mentor by.
    pub fn check_against_data(&self, train_len: usize, validation_len: usize) -> Result<()> {
        let takes = format_args!("at most the number of training images, {train_len} without the validation images");
        check(self.batch <= train_len, "batch", self.batch, takes)?;
        let takes =
            "1 without validation images: the mentor of an iteration is the best network by validation accuracy";
        check(self.iterations == 1 || validation_len > 0, "iterations", self.iterations, takes)
    }

    fn validate_data(&self) -> Result<()> {
        check(!self.data.is_empty(), "data", "\"\"", "\"sample\" or a folder")?;
        check(i64::try_from(self.train_size).is_ok(), "train-size", self.train_size, "a number of images")?;
        part("val-fraction", self.val_fraction, 0.5)?;
        count("pad", self.pad, 0, MAX_PAD)?;
        share("noise-rate", self.noise_rate)?;
        self.validate_labels()
    }

    fn validate_labels(&self) -> Result<()> {
        if self.labels.is_empty() {
            let none = self.label_set.is_empty();
            return check(
                none,
                "label-set",
                &self.label_set,
                "a set of labels in the file of --labels, which is missing",
            );
        }
        let what = format_args!("nothing but none with --labels {}: its labels are noisy as they are", self.labels);
        check(self.noise == NoiseKind::None, "noise", self.noise, what)?;
        let what = format_args!("nothing but 0 with --labels {}: no noise is injected", self.labels);
        check(self.noise_rate == 0.0, "noise-rate", self.noise_rate, what)
    }

    fn validate_method(&self) -> Result<()> {
        count("iterations", self.iterations, 1, MAX_ITERATIONS)?;
        let takes = format_args!("1 with --method {}, which has no mentor", self.method);
        check(self.method.has_mentor() || self.iterations == 1, "iterations", self.iterations, takes)?;
        share("tau", self.tau)?;
        share("lambda", self.lambda)?;
        not_negative("lambda-ramp", self.lambda_ramp)?;
        count("branches", self.branches, 1, MAX_BRANCHES)?;
        part("rho", self.rho, 1.0)?;
        not_negative("alpha", self.alpha)?;
        not_negative("eta", self.eta)?;
        not_negative("eta-ramp", self.eta_ramp)?;
        decay("gamma", self.gamma)?;
        decay("gamma-late", self.gamma_late)?;
        count("gamma-switch-epoch", self.gamma_switch_epoch, 0, MAX_EPOCHS)?;
        self.validate_other_methods()
    }

    fn validate_other_methods(&self) -> Result<()> {
        not_negative("joint-alpha", self.joint_alpha)?;
        not_negative("joint-beta", self.joint_beta)?;
        positive("joint-lr", self.joint_lr)?;
        share("joint-warmup", self.joint_warmup)?;
        count("joint-memory", self.joint_memory, 1, MAX_MEMORY)?;
        decay("elr-beta", self.elr_beta)?;
        not_negative("elr-lambda", self.elr_lambda)?;
        share("forget-rate", self.forget_rate)?;
        not_negative("forget-ramp", self.forget_ramp)
    }

    fn validate_optimisation(&self) -> Result<()> {
        count("batch", self.batch, 2, MAX_BATCH)?;
        let takes = format_args!("a whole number from 1 to {} (less than --batch)", self.batch - 1);
        check((1..self.batch).contains(&self.neighbours), "neighbours", self.neighbours, takes)?;
        count("epochs", self.epochs, 1, MAX_EPOCHS)?;
        positive("lr", self.lr)?;
        let drops = &self.lr_drop_epochs;
        let inside = drops.iter().all(|epoch| (1..self.epochs).contains(epoch));
        let takes = format_args!("growing numbers from 1, less than --epochs ({})", self.epochs);
        check(inside && drops.is_sorted_by(|a, b| a < b), "lr-drop-epochs", list(drops), takes)?;
        part("lr-drop-factor", self.lr_drop_factor, 1.0)?;
        decay("momentum", self.momentum)?;
        not_negative("weight-decay", self.weight_decay)?;
        count("feature-epochs", self.feature_epochs, 0, MAX_EPOCHS)?;
        positive("feature-lr", self.feature_lr)
    }

    fn validate_network(&self) -> Result<()> {
        let (widths, blocks) = (&self.widths, &self.blocks);
        let ok = (1..=MAX_STAGES).contains(&widths.len()) && widths.iter().all(|width| (1..=MAX_WIDTH).contains(width));
        let takes = format_args!("1 to {MAX_STAGES} numbers of channels from 1 to {MAX_WIDTH}");
        check(ok, "widths", list(widths), takes)?;
        let ok = blocks.len() == widths.len() && blocks.iter().all(|count| (1..=MAX_BLOCKS).contains(count));
        let takes = format_args!("{} numbers from 1 to {MAX_BLOCKS}, one for each of --widths", widths.len());
        check(ok, "blocks", list(blocks), takes)
    }
}
