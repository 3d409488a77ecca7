//! `mlnt train`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::console::{Console, say};
use crate::error::{Error, Result};
use crate::train::config::{Config, Overrides};
use crate::train::engine::Engine;
use crate::train::open_device::open_device;
use crate::train::prepare::Prepared;
use crate::train::run::{Ending, Run};
use crate::train::run_dir::RunDir;
use crate::train::table::summary_table;

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
  mlnt train --labels noisy.csv                       labels of `mlnt noise`, .npy, JSON or CSV
  mlnt train --data DIR --labels CIFAR-10_human.pt --label-set worse_label
  mlnt train --preset cifar10 --data DIR              the paper's setting (weeks on two cores)
  mlnt train --config mine.toml --epochs 10           flags before file before preset
  mlnt train --iterations 3                           then twice more, led by the best network so far
  mlnt train --method co-teaching                     another method on the same labels; or elr, joint-opt
  mlnt train --resume runs/sample-symmetric-0.5-s1    go on where Ctrl-C stopped, bit for bit

A TOML file has the flags' names as keys, e.g.
  preset = \"cifar10\"
  noise-rate = 0.2
  widths = [16, 32, 64]

The run directory receives config.toml (every setting), labels.csv (the noisy labels), metrics.jsonl \
(one line per epoch), iterations.jsonl (the best network of each iteration and its filter), kept.csv (the \
last filter), losses.f32 (loss per sample and epoch), student.safetensors, teacher.safetensors and \
best.safetensors (PyTorch's names), checkpoint.safetensors, summary.txt.";

/// The arguments of `mlnt train`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct TrainArgs {
    /// TOML file of settings; flags override it.
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

    /// The settings with which a run of settings `run` is continued: its own, but for those that change no result. A device or
    /// precision of `auto` asks for nothing.
    ///
    /// # Errors
    /// [`Error::Usage`] when flags ask for another run than `run`, with the settings that differ; and those of
    /// [`Config::validate`].
    pub fn resumed(&self, run: &Config) -> Result<Config> {
        let mut config = run.clone();
        self.settings.apply(&mut config);
        config.settle(run);
        config.validate()?;
        let differing = run.diff(&config)?;
        if differing.is_empty() {
            return Ok(config);
        }
        Err(Error::usage(format_args!("--resume continues a run as it began; {}", differing.join("; "))))
    }
}

/// Exit status of a run that was interrupted: 128 + SIGINT, as shells have it.
pub(super) const INTERRUPTED: u8 = 130;

/// Runs `mlnt train`; returns the exit status.
///
/// # Errors
/// Everything that can be wrong with settings, data, files and device.
pub(super) fn run(args: &TrainArgs) -> Result<u8> {
    let stop = stop_on_ctrl_c()?;
    let mut run = match &args.resume {
        Some(path) => resume(args, path)?,
        None => create(args.config()?)?,
    };
    let ending = run.train(&mut Console::new(stop))?;
    let dir = run.dir().path().display();
    match ending {
        Ending::Complete(rows) => {
            say(format_args!("\n{}\n\nrun directory: {dir}", summary_table(&rows)))?;
            Ok(0)
        }
        Ending::Stopped => {
            say(format_args!("\nstopped and saved; continue with: mlnt train --resume {dir}"))?;
            Ok(INTERRUPTED)
        }
    }
}

/// What Ctrl-C sets from now on; once per process. The second one ends it at once.
///
/// # Errors
/// [`Error::Usage`] when the system refuses.
pub(super) fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&stop);
    let pressed = move || {
        if handler.swap(true, Ordering::Relaxed) {
            // A second Ctrl-C does not wait; the last checkpoint is whole, for files are renamed into place.
            std::process::exit(i32::from(INTERRUPTED));
        }
    };
    ctrlc::set_handler(pressed).map_err(|e| Error::usage(format_args!("cannot catch Ctrl-C: {e}")))?;
    Ok(stop)
}

/// A new run of `config`.
///
/// # Errors
/// Where its directory exists, and those of settings, data, files and device.
pub(super) fn create(mut config: Config) -> Result<Run> {
    if let Some(out) = config.out.as_ref().filter(|out| out.exists()) {
        return Err(Error::file(out, "the run directory exists; choose another --out, or continue it with --resume"));
    }
    find_from_anywhere(&mut config);
    let (data, engine) = start(&mut config)?;
    let run = Run::create(config, data, engine)?;
    say(format_args!("run directory: {}", run.dir().path().display()))?;
    Ok(run)
}

/// Makes the paths among the settings absolute: a run must find its data again from any folder. What cannot be found now
/// is told when it is read.
pub(super) fn find_from_anywhere(config: &mut Config) {
    if let Some(path) = Path::new(&config.data).canonicalize().ok().filter(|_| config.data != "sample") {
        config.data = path.to_string_lossy().into_owned();
    }
    if let Some(path) = Path::new(&config.labels).canonicalize().ok().filter(|_| !config.labels.is_empty()) {
        config.labels = path.to_string_lossy().into_owned();
    }
}

fn resume(args: &TrainArgs, path: &Path) -> Result<Run> {
    let dir = RunDir::open(path)?;
    let config = args.resumed(&Config::load(&dir.config())?)?;
    go_on(config, dir)
}

/// The run of `config` in `dir`, from its checkpoint.
///
/// # Errors
/// Where the run is not one of these settings, and those of data, files and device.
pub(super) fn go_on(mut config: Config, dir: RunDir) -> Result<Run> {
    let (data, engine) = start(&mut config)?;
    let run = Run::resume(config, data, engine, dir)?;
    if run.is_complete() {
        say("the run is complete")?;
    }
    Ok(run)
}

/// Opens the device and reads the data; nothing is written yet. Device and precision are settled then: another machine may
/// have others, and a run keeps to those it began with, for the sake of its bytes.
fn start(config: &mut Config) -> Result<(Prepared, Engine)> {
    let opened = open_device(config.device, config.precision, config.threads)?;
    (config.device, config.precision) = (opened.kind, opened.precision.into());
    say(&opened.text)?;
    let data = Prepared::new(config)?;
    let (train, val, test) = (data.train.len(), data.validation.len(), data.test.len());
    let images = data.train.images.shape();
    say(format_args!(
        "data: {}: {train} training, {val} validation, {test} test images of {images}",
        data.train.images.name
    ))?;
    let (what, realised) = (if config.labels.is_empty() { "noise" } else { "labels" }, 100.0 * data.realised_noise);
    let nominal = data.nominal_noise.map_or(String::new(), |rate| format!("nominal rate {:.1} %, ", 100.0 * rate));
    say(format_args!("{what}: {}, {nominal}realised {realised:.1} % of the labels are wrong", data.label_source))?;
    let model = data.model(config)?;
    let (widths, blocks) = (&config.widths, &config.blocks);
    say(format_args!(
        "network: PreAct ResNet, widths {widths:?}, blocks {blocks:?}, {} parameters",
        model.param_count()
    ))?;
    let engine = Engine::new(opened.device, config, model)?;
    Ok((data, engine))
}
