//! `mlnt train`.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::train::config::{Config, Overrides};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Train cross entropy, then MLNT on the same noisy labels, and compare them.

Both start from the same weights and see the same noisy labels. Each epoch reports losses and the accuracy of \
student and teacher on validation and test images; a table at the end sets best and last test accuracy side by \
side. Without arguments this runs within minutes on two cores, on images that come with the program.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt train                                          the embedded sample, half its labels noisy
  mlnt train --noise asymmetric --noise-rate 0.4 --seed 2
  mlnt train --preset cifar10 --data DIR              the paper's setting
  mlnt train --config mine.toml --epochs 10           flags before file before preset
  mlnt train --resume runs/sample-symmetric-0.5-s1    go on where Ctrl-C stopped, bit for bit

A TOML file has the flags' names as keys, e.g.
  preset = \"cifar10\"
  noise-rate = 0.2
  widths = [16, 32, 64]

The run directory receives config.toml (every setting), labels.csv (the noisy labels), metrics.jsonl \
(one line per epoch), student.safetensors and teacher.safetensors (PyTorch's names), \
checkpoint.safetensors, summary.txt.";

/// The arguments of `mlnt train`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct TrainArgs {
    /// TOML file of settings; flags go before it.
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub config: Option<PathBuf>,
    /// Continue the run in this directory from its checkpoint; other settings must agree with the run's.
    #[arg(long, value_name = "RUN", help_heading = "Run", conflicts_with_all = ["config", "preset", "out"])]
    pub resume: Option<PathBuf>,
    /// The settings given as flags.
    #[command(flatten)]
    pub settings: Overrides,
}

impl TrainArgs {
    /// The settings of a new run: preset, then `--config`, then flags.
    ///
    /// # Errors
    /// Those of [`Config::resolve`].
    pub fn config(&self) -> Result<Config> {
        Config::resolve(self.config.as_deref(), &self.settings)
    }

    /// The settings with which a run of settings `run` is continued: its own, but for those that change no result.
    ///
    /// # Errors
    /// [`Error::Usage`] when flags ask for another run than `run`, with the settings that differ; and those of
    /// [`Config::validate`].
    pub fn resumed(&self, run: &Config) -> Result<Config> {
        let mut config = run.clone();
        self.settings.apply(&mut config);
        config.validate()?;
        let differing = run.diff(&config)?;
        if differing.is_empty() {
            return Ok(config);
        }
        Err(Error::usage(format_args!("--resume continues a run as it began; {}", differing.join("; "))))
    }
}
