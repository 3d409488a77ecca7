//! The settings of a run: one table, from which the resolved [`Config`], the flags and the TOML keys all follow.
//!
//! Precedence: preset, then the TOML file of `--config`, then flags. TOML keys are the flags' names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::choice::{Augment, DeviceKind, Method, Precision, PrecisionChoice, Recipe};
use super::group::Group;
use super::preset::Preset;
use super::toml_file;
use crate::data::{NoiseKind, ValidationLabels};
use crate::error::{Error, Result};

/// From the table below: [`Config`] (all values), [`Overrides`] (those that were given) and the list of keys.
/// A line is `[extra arguments of clap's #[arg]] field: type`.
macro_rules! settings {
    ($( $heading:literal { $( $(#[doc = $doc:tt])+ [$($arg:tt)*] $name:ident: $ty:ty, )+ } )+) => {
        /// Every setting of a run, resolved. This is what `config.toml` in a run directory holds.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields)]
        pub struct Config {
            $($( $(#[doc = $doc])+ pub $name: $ty, )+)+
            /// The run directory; `None` lets the run choose a name. Not written: a directory may be moved.
            #[serde(skip)]
            pub out: Option<PathBuf>,
        }

        /// The settings that a TOML file or the command line gives; the rest is `None`.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, clap::Args)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
        pub struct Overrides {
            /// Set of values to start from: a --config file and flags then change them.
            #[arg(long, value_name = "NAME", help_heading = "Run")]
            pub preset: Option<Preset>,
            /// Run directory to create; without it runs/DATA-NOISE-RATE-sSEED, with -2, -3 … when that exists.
            #[arg(long, value_name = "DIR", help_heading = "Run")]
            pub out: Option<PathBuf>,
            $($(
                $(#[doc = $doc])+
                #[arg(long, help_heading = $heading, allow_negative_numbers = true, $($arg)*)]
                pub $name: Option<$ty>,
            )+)+
        }

        impl Overrides {
            /// Replaces the values of `config` by those given here.
            pub fn apply(&self, config: &mut Config) {
                $($( if let Some(value) = &self.$name { config.$name = value.clone(); } )+)+
                if let Some(out) = &self.out { config.out = Some(out.clone()); }
            }
        }

        /// The settings' names as flags and TOML keys have them, in the order of the table.
        pub fn keys() -> Vec<String> {
            [$($( stringify!($name) ),+),+].iter().map(|name| name.replace('_', "-")).collect()
        }
    };
}

settings! {
    "Data and labels" {
        /// Images: "sample" (6,000 embedded Fashion-MNIST images), or a folder of CIFAR-10, CIFAR-100 or IDX files.
        [value_name = "sample|DIR"] data: String,
        /// Training images to use, the same number of each class; 0 = all.
        [value_name = "N"] train_size: usize,
        /// Part of the training images held out for validation, in (0, 0.5].
        [value_name = "F"] val_fraction: f64,
        /// Labels of the validation images.
        [value_name = "KIND"] val_labels: ValidationLabels,
        /// Augmentation of the training images.
        [value_name = "KIND"] augment: Augment,
        /// Pixels of zero padding on each side before the random crop of pad-crop-flip.
        [value_name = "PIXELS"] pad: usize,
        /// Label noise to inject into the training labels.
        [value_name = "KIND"] noise: NoiseKind,
        /// Part of the training labels that the noise touches, in [0, 1]; the realised rate is reported.
        [value_name = "F"] noise_rate: f64,
        /// File of noisy training labels, in place of injected noise: CIFAR-N .pt, .npy, JSON list or CSV.
        [value_name = "FILE"] labels: String,
        /// Which labels of a --labels file with several sets, e.g. worse_label of CIFAR-10N.
        [value_name = "NAME"] label_set: String,
    }
    "Method" {
        /// What to train: MLNT, or a method to compare it with.
        [value_name = "NAME"] method: Method,
        /// Trainings from scratch, each led by the best network of the one before: its mentor.
        [value_name = "N"] iterations: usize,
        /// From the second iteration on, a training label counts in the classification loss only if the mentor gives
        /// it a probability greater than this, the paper's τ, in [0, 1].
        [value_name = "TAU"] tau: f64,
        /// Share of the teacher in the consistency target at the end of its ramp, the rest being the mentor's, in [0, 1].
        [value_name = "LAMBDA"] lambda: f64,
        /// Epochs over which λ grows to its full value, as η does; 0 = at once.
        [value_name = "EPOCHS"] lambda_ramp: f64,
        /// Order of updates and scale of the consistency loss: the paper's text, or the authors' released code.
        [value_name = "NAME"] recipe: Recipe,
        /// Drop the second-order term of the meta gradient: faster, and no longer the exact gradient.
        [value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true] first_order: bool,
        /// Sets of synthetic labels per step, the paper's M.
        [value_name = "M"] branches: usize,
        /// Part of the batch that gets a synthetic label, the paper's ρ, in (0, 1].
        [value_name = "RHO"] rho: f64,
        /// Nearest neighbours within the batch of which one gives the synthetic label.
        [value_name = "N"] neighbours: usize,
        /// Step from the weights to the fast weights of a branch, the paper's α.
        [value_name = "ALPHA"] alpha: f64,
        /// Weight of the meta gradient at the end of its ramp, the paper's η; 0 switches it off.
        [value_name = "ETA"] eta: f64,
        /// Epochs over which η grows to its full value, as η·exp(−5(1−t)²) with t from 0 to 1; 0 = at once.
        [value_name = "EPOCHS"] eta_ramp: f64,
        /// Decay of the teacher's moving average per step, the paper's γ, in [0, 1).
        [value_name = "GAMMA"] gamma: f64,
        /// Decay of the teacher's moving average from --gamma-switch-epoch on, in [0, 1).
        [value_name = "GAMMA"] gamma_late: f64,
        /// Epochs after which --gamma-late takes the place of --gamma; 0 = never.
        [value_name = "EPOCH"] gamma_switch_epoch: usize,
        /// Weight of the mean prediction's divergence from uniform classes in --method joint-opt, the paper's α.
        [value_name = "ALPHA"] joint_alpha: f64,
        /// Weight of the predictions' entropy in --method joint-opt, the paper's β.
        [value_name = "BETA"] joint_beta: f64,
        /// Learning rate of --method joint-opt while it learns labels: constant, and high.
        [value_name = "LR"] joint_lr: f64,
        /// Part of the epochs before --method joint-opt replaces labels, in [0, 1].
        [value_name = "F"] joint_warmup: f64,
        /// Epochs whose predictions --method joint-opt averages to a label.
        [value_name = "EPOCHS"] joint_memory: usize,
        /// Share of the old target in the new one in --method elr, the paper's β, in [0, 1).
        [value_name = "BETA"] elr_beta: f64,
        /// Weight of the regulariser in --method elr, the paper's λ.
        [value_name = "LAMBDA"] elr_lambda: f64,
        /// Part of each batch that --method co-teaching forgets in the end, the paper's τ, in [0, 1]; unless given the
        /// noise rate, or 0.2 where no noise is injected.
        [value_name = "F"] forget_rate: f64,
        /// Epochs over which co-teaching comes to forget that much, the paper's T_k; 0 = at once.
        [value_name = "EPOCHS"] forget_ramp: f64,
    }
    "Optimisation" {
        /// Images per step, the paper's k.
        [value_name = "K"] batch: usize,
        /// Passes over the training images, of each iteration and of the cross-entropy comparison alike.
        [value_name = "N"] epochs: usize,
        /// Learning rate of SGD, the paper's β.
        [value_name = "LR"] lr: f64,
        /// Epochs after which the learning rate drops, e.g. 80,100; moved in proportion when only --epochs is given.
        [value_name = "EPOCH,…", value_delimiter = ','] lr_drop_epochs: Vec<usize>,
        /// What the learning rate is multiplied with at each drop, in (0, 1]; 1 = no drop.
        [value_name = "F"] lr_drop_factor: f64,
        /// Momentum of SGD, in [0, 1).
        [value_name = "F"] momentum: f64,
        /// Weight decay of SGD, added to the gradient of every parameter.
        [value_name = "F"] weight_decay: f64,
        /// Epochs of cross entropy for the network whose features define the nearest neighbours; 0 = untrained.
        [value_name = "N"] feature_epochs: usize,
        /// Learning rate of that network.
        [value_name = "LR"] feature_lr: f64,
        /// Train --method only, without the cross-entropy run to compare it with.
        [value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true] no_baseline: bool,
    }
    "Network" {
        /// Channels of each stage of the PreAct ResNet, e.g. 16,32,64; every stage but the first halves the image.
        [value_name = "N,…", value_delimiter = ','] widths: Vec<usize>,
        /// Residual blocks of each stage, e.g. 5,5,5.
        [value_name = "N,…", value_delimiter = ','] blocks: Vec<usize>,
    }
    "Run" {
        /// Seed of everything random: same seed, same bytes, whatever the number of threads.
        [value_name = "N"] seed: u64,
        /// Where to compute: auto, cpu, cuda, cuda:N or simt.
        [value_name = "NAME"] device: DeviceKind,
        /// Floating-point type of the computation; auto is f16 on a card, f32 on cpu and simt. A run keeps the one it began in.
        [value_name = "TYPE"] precision: PrecisionChoice,
        /// Branches that a step works on at a time, for less memory: auto (what the device likes), all, or a number; behind a colon
        /// the same within a group for each stage, largest images first, as in 5:2,3. It changes the order of sums over the
        /// branches, and no result beyond rounding.
        [value_name = "auto|all|N[:S,…]"] group: Group,
        /// Threads; 0 = one per core.
        [value_name = "N"] threads: usize,
    }
}

/// What co-teaching forgets of labels whose noise rate nobody has said.
const UNKNOWN_NOISE_RATE: f64 = 0.2;

/// Settings that may differ when a run is continued: they change no result.
const FREE_ON_RESUME: [&str; 1] = ["threads"];

impl Overrides {
    /// Reads a TOML file of settings, `preset` and `out` among them.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read; [`Error::File`] with line and key for bad syntax, an unknown key
    /// or a value of the wrong type.
    pub fn load(path: &Path) -> Result<Self> {
        let mut known = vec!["preset".to_string(), "out".to_string()];
        known.extend(keys());
        toml_file::read(path, &known)
    }
}

impl Config {
    /// The settings of a run: the preset, changed by `file`, changed by `flags`.
    ///
    /// Labels from a file take the place of the preset's noise.
    ///
    /// Where neither gives `forget-rate`, it is the rate of the injected noise, or 0.2.
    ///
    /// Where neither gives `lr-drop-epochs`, the preset's drops keep their place relative to the number of epochs.
    ///
    /// # Errors
    /// Those of [`Overrides::load`] and of [`Config::validate`].
    pub fn resolve(file: Option<&Path>, flags: &Overrides) -> Result<Self> {
        let config = Config::assemble(file, flags)?;
        config.validate()?;
        Ok(config)
    }

    /// [`Config::resolve`] without the check of the result, for settings that are not complete yet.
    ///
    /// # Errors
    /// Those of [`Overrides::load`].
    pub fn assemble(file: Option<&Path>, flags: &Overrides) -> Result<Self> {
        let file = file.map(Overrides::load).transpose()?.unwrap_or_default();
        let mut config = flags.preset.or(file.preset).unwrap_or_default().config();
        let preset_epochs = config.epochs;
        file.apply(&mut config);
        flags.apply(&mut config);
        if !config.labels.is_empty() {
            // The presets' noise is a default; noise that somebody asked for is refused by the check below.
            if file.noise.is_none() && flags.noise.is_none() {
                config.noise = NoiseKind::None;
            }
            if file.noise_rate.is_none() && flags.noise_rate.is_none() {
                config.noise_rate = 0.0;
            }
        }
        if file.forget_rate.is_none() && flags.forget_rate.is_none() {
            let injected = config.noise != NoiseKind::None;
            config.forget_rate = if injected { config.noise_rate } else { UNKNOWN_NOISE_RATE };
        }
        if file.lr_drop_epochs.is_none() && flags.lr_drop_epochs.is_none() {
            config.move_lr_drops(preset_epochs);
        }
        Ok(config)
    }

    /// Takes over from `run`, the settings of a run that has begun, what these leave to the machine: the device and its
    /// precision. Another machine might choose otherwise.
    pub fn settle(&mut self, run: &Config) {
        if self.device == DeviceKind::Auto {
            self.device = run.device;
        }
        if self.precision == PrecisionChoice::Auto {
            self.precision = run.precision;
        }
    }

    /// The floating-point type of the computation, on the device of these settings.
    pub fn computes_in(&self) -> Precision {
        self.precision.on(self.device)
    }

    /// Reads the complete `config.toml` of a run directory.
    ///
    /// # Errors
    /// As [`Overrides::load`]; also [`Error::File`] when a key is missing or a value is out of range.
    pub fn load(path: &Path) -> Result<Self> {
        let config: Config = toml_file::read(path, &keys())?;
        config.validate().map_err(|error| Error::file(path, error))?;
        Ok(config)
    }

    /// The settings as TOML, one line each; [`Config::load`] gives back the same values bit for bit (but `out`).
    ///
    /// # Errors
    /// [`Error::Usage`] when a value cannot be written as TOML, which [`Config::validate`] rules out.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::usage(format_args!("settings: {error}")))
    }

    /// The settings that decide the result of a run, as TOML: two configurations with the same fingerprint train
    /// the same networks. Everything but `out` and `threads`.
    ///
    /// # Errors
    /// As [`Config::to_toml`].
    pub fn fingerprint(&self) -> Result<String> {
        Ok(self.deciding()?.to_string())
    }

    /// The settings that decide the result and differ, one line each; `self` is the run's, `other` what was asked for.
    ///
    /// # Errors
    /// As [`Config::to_toml`].
    pub fn diff(&self, other: &Config) -> Result<Vec<String>> {
        let (run, asked) = (self.deciding()?, other.deciding()?);
        let show = |table: &toml::Table, key: &str| table.get(key).map_or_else(String::new, toml::Value::to_string);
        let differing = keys().into_iter().filter(|key| run.get(key) != asked.get(key));
        Ok(differing
            .map(|key| format!("{key}: {} in the run, {} asked for", show(&run, &key), show(&asked, &key)))
            .collect())
    }

    /// The table behind [`Config::fingerprint`].
    fn deciding(&self) -> Result<toml::Table> {
        let mut table = toml::Table::try_from(self).map_err(|error| Error::usage(format_args!("settings: {error}")))?;
        for key in FREE_ON_RESUME {
            table.remove(key);
        }
        Ok(table)
    }

    /// Moves the learning rate's drops from a run of `from` epochs to one of `self.epochs`, in proportion.
    fn move_lr_drops(&mut self, from: usize) {
        if self.epochs == from || from == 0 {
            return;
        }
        let scale = self.epochs as f64 / from as f64;
        let moved = self.lr_drop_epochs.iter().map(|&epoch| (epoch as f64 * scale).round() as usize);
        self.lr_drop_epochs = moved.filter(|&epoch| (1..self.epochs).contains(&epoch)).collect();
        self.lr_drop_epochs.dedup();
    }
}
