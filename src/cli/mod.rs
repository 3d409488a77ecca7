//! The command line: what can be asked for, and help that teaches it.
//!
//! One file per subcommand holds its arguments. The value that each preset gives to a setting is written into the help
//! from the presets themselves.

pub mod audit;
pub mod bench_step;
pub mod check;
pub mod compare;
mod console;
pub mod eval;
pub mod info;
mod network;
pub mod noise;
pub mod plan;
pub mod predict;
pub mod report;
pub mod train;
pub mod verify;

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::error::Error;
use crate::train::choice::{DeviceKind, PrecisionChoice};
use crate::train::preset::Preset;

/// Train image classifiers on noisy labels.
#[derive(Clone, Debug, PartialEq, Parser)]
#[command(name = "mlnt", version, max_term_width = 120, about, long_about = LONG_ABOUT)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The help of the program itself.
const LONG_ABOUT: &str = "\
Train image classifiers on noisy labels with MLNT (Li et al., Learning to Learn from Noisy Labeled Data, CVPR 2019).

Each step gives the batch M sets of synthetic labels, takes one gradient step towards each of them, and asks the \
network to end up where its own moving average, the teacher, predicts the same as before. The gradient through that \
step is exact, second order included.

Start here, no data needed:
  mlnt train                     train on the embedded sample, compare with cross entropy
  mlnt eval runs/sample-symmetric-0.5-s1
  mlnt report runs/sample-symmetric-0.5-s1";

/// The subcommands.
#[derive(Clone, Debug, PartialEq, Subcommand)]
pub enum Command {
    /// Train cross entropy, then MLNT on the same noisy labels, and compare them.
    #[command(long_about = train::LONG_ABOUT)]
    Train(Box<train::TrainArgs>),
    /// Train several methods with several seeds on the same noisy labels: one table.
    #[command(long_about = compare::LONG_ABOUT)]
    Compare(Box<compare::CompareArgs>),
    /// Accuracy of a trained network on a data set.
    #[command(long_about = eval::LONG_ABOUT)]
    Eval(eval::EvalArgs),
    /// Class probabilities of every image, as CSV.
    #[command(long_about = predict::LONG_ABOUT)]
    Predict(predict::PredictArgs),
    /// One HTML page about one or more runs.
    #[command(long_about = report::LONG_ABOUT)]
    Report(report::ReportArgs),
    /// Which labels of a run are probably wrong, and what they should be.
    #[command(long_about = audit::LONG_ABOUT)]
    Audit(audit::AuditArgs),
    /// Check the engine against golden training steps.
    #[command(long_about = verify::LONG_ABOUT)]
    Verify(verify::VerifyArgs),
    /// Check the CUDA kernels on a GPU, or on the SIMT host machine.
    #[command(long_about = check::LONG_ABOUT)]
    Check(check::CheckArgs),
    /// Write a label file: the noisy labels that `train` would use.
    #[command(long_about = noise::LONG_ABOUT)]
    Noise(noise::NoiseArgs),
    /// What one training step costs, without running it.
    #[command(long_about = plan::LONG_ABOUT)]
    Plan(plan::PlanCommand),
    /// The devices of this machine, and what is missing for the others.
    #[command(long_about = info::LONG_ABOUT)]
    Info(info::InfoArgs),
    /// Time one training step on random data (used by the benchmarks).
    #[command(hide = true)]
    BenchStep(bench_step::BenchStepArgs),
}

/// Does what the command line asks for; returns the exit status.
///
/// # Errors
/// Whatever the subcommand meets; [`Error::exit_code`](crate::Error::exit_code) gives the status then.
pub fn run(cli: &Cli) -> crate::Result<u8> {
    match &cli.command {
        Command::Train(args) => train::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Predict(args) => predict::run(args),
        Command::Report(args) => report::run(args),
        Command::Audit(args) => audit::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Check(args) => check::run(args),
        Command::Noise(args) => noise::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Info(args) => info::run(args),
        Command::BenchStep(args) => bench_step::run(args),
    }
}

/// Which of the networks of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum ModelKind {
    /// The network that SGD trains.
    Student,
    /// Its moving average; of co-teaching the second network.
    Teacher,
    /// The best of both by validation accuracy, over the epochs of the last iteration.
    Best,
}

/// Which images of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Split {
    /// The training images.
    Train,
    /// The test images.
    Test,
}

/// The network to load, for `eval` and `predict`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct NetworkArgs {
    /// Run directory, or a network file of one: student.safetensors, teacher.safetensors, best.safetensors.
    #[arg(value_name = "RUN|FILE.safetensors")]
    pub network: PathBuf,
    /// Images: "sample" or a folder of CIFAR-10, CIFAR-100 or IDX files [default: what the network was trained on]
    #[arg(long, value_name = "sample|DIR")]
    pub data: Option<String>,
    /// Images to run.
    #[arg(long, value_name = "SPLIT", default_value = "test")]
    pub split: Split,
    /// Images per forward pass: memory only; results are the same up to rounding.
    #[arg(long, value_name = "K", default_value_t = 250, value_parser = positive)]
    pub batch: usize,
    /// Where to compute: auto, cpu, cuda, cuda:N or simt.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub device: DeviceKind,
    /// Floating-point type of the computation [default: f64 for a network in f64, else auto]
    #[arg(long, value_name = "TYPE")]
    pub precision: Option<PrecisionChoice>,
    /// Threads; 0 = one per core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = threads)]
    pub threads: usize,
}

/// A batch size from 1 to 1,000,000.
fn positive(text: &str) -> Result<usize, String> {
    whole(text, 1, 1_000_000)
}

/// A number of threads from 0 to 1024.
fn threads(text: &str) -> Result<usize, String> {
    whole(text, 0, 1024)
}

/// A whole number from `low` to `high`.
fn whole(text: &str, low: usize, high: usize) -> Result<usize, String> {
    let takes = || format!("takes a whole number from {low} to {high}");
    text.parse().ok().filter(|number| (low..=high).contains(number)).ok_or_else(takes)
}

/// The command line of this process. Help and version are printed and end it.
///
/// # Errors
/// [`Error::Usage`] for wrong usage, in one line.
pub fn parse() -> crate::Result<Cli> {
    let matches = command().try_get_matches();
    matches.and_then(|matches| Cli::from_arg_matches(&matches)).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            error.exit()
        }
        _ => Error::usage(one_line(&error.to_string())),
    })
}

/// What clap says is wrong, and its tips, without the usage below them.
fn one_line(message: &str) -> String {
    let said = message.lines().map(str::trim).take_while(|line| {
        let below = ["Usage:", "For more information"];
        !below.iter().any(|start| line.starts_with(start))
    });
    let parts: Vec<&str> = said.filter(|line| !line.is_empty()).collect();
    let line = parts.join(" ").replace(" tip: ", "; ");
    line.strip_prefix("error: ").unwrap_or(&line).to_string()
}

/// The definition of the command line, with the presets' values in the help of `train` and `plan`.
pub fn command() -> clap::Command {
    let values: Vec<(Preset, toml::Table)> = Preset::value_variants()
        .iter()
        .map(|&preset| (preset, toml::Table::try_from(preset.config()).unwrap_or_default()))
        .collect();
    let mut command = Cli::command();
    for name in ["train", "compare", "plan"] {
        command = command.mut_subcommand(name, |sub| sub.mut_args(|arg| with_preset_values(arg, &values)));
    }
    command.mut_subcommand("compare", compare::without_its_own)
}

/// Adds what each preset gives to the help of a setting; an argument that is no setting stays as it is.
fn with_preset_values(arg: Arg, presets: &[(Preset, toml::Table)]) -> Arg {
    let key = arg.get_id().as_str().replace('_', "-");
    let found: Option<Vec<(Preset, String)>> =
        presets.iter().map(|(preset, table)| Some((*preset, plain(table.get(&key)?)))).collect();
    let (Some(values), Some(help)) = (found, arg.get_help()) else { return arg };
    let default = values.iter().find(|(preset, _)| *preset == Preset::default());
    // A setting that presets leave empty is an option without default.
    let Some((_, default)) = default.filter(|_| values.iter().any(|(_, value)| !value.is_empty())) else { return arg };
    let mut note = format!("default: {default}");
    for (preset, value) in values.iter().filter(|(_, value)| value != default) {
        let name = preset.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string());
        note += &format!("; {name}: {value}");
    }
    let help = format!("{help} [{note}]");
    arg.help(help)
}

/// A value as it is typed after a flag.
fn plain(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Cli, Command, ModelKind, Split, command};
    use clap::{CommandFactory, FromArgMatches, Parser};

    #[test]
    fn definitions_hold_together() {
        Cli::command().debug_assert();
        command().debug_assert();
    }

    #[test]
    fn help_shows_the_presets_values() {
        let mut command = command();
        let train = command.find_subcommand_mut("train").unwrap().render_long_help().to_string();
        assert!(train.contains("[default: 32; cifar10: 128]"), "{train}");
        assert!(train.contains("[default: 16,32,64; cifar10: 32,64,128]"), "{train}");
        for sub in command.get_subcommands_mut().filter(|sub| !sub.is_hide_set()) {
            let help = sub.render_long_help().to_string();
            assert!(help.contains("Examples:") && help.lines().nth(2).is_some_and(|line| line.len() > 40), "{help}");
        }
    }

    #[test]
    fn every_setting_is_a_flag_of_train() {
        let command = command();
        let train = command.find_subcommand("train").unwrap();
        for key in crate::train::config::keys() {
            assert!(train.get_arguments().any(|arg| arg.get_long() == Some(&key)), "--{key}");
        }
    }

    #[test]
    fn flags_reach_their_fields() {
        let line = "mlnt train --rho 0.25 --widths 8,16 --blocks 1,2 --first-order --noise pair --recipe=paper \
                    --no-baseline=false --config c.toml --preset cifar10 --out o --eta -1";
        let Command::Train(train) = Cli::parse_from(line.split_whitespace()).command else { panic!("train") };
        let settings = &train.settings;
        assert_eq!((settings.rho, settings.eta), (Some(0.25), Some(-1.0)));
        assert_eq!((settings.widths.as_deref(), settings.blocks.as_deref()), (Some(&[8, 16][..]), Some(&[1, 2][..])));
        assert_eq!((settings.first_order, settings.no_baseline), (Some(true), Some(false)));
        assert_eq!(settings.epochs, None);
        assert_eq!(train.config.as_deref(), Some(std::path::Path::new("c.toml")));

        let matches = command().get_matches_from("mlnt eval runs/a --model teacher".split_whitespace());
        let Command::Eval(eval) = Cli::from_arg_matches(&matches).unwrap().command else { panic!("eval") };
        assert_eq!((eval.model, eval.network.split), (Some(ModelKind::Teacher), Split::Test));
    }

    #[test]
    fn wrong_usage_ends_with_status_2() {
        let lines = [
            "mlnt",
            "mlnt train --rho much",
            "mlnt train --noise loud",
            "mlnt train --branches -1",
            "mlnt train --resume a --out b",
            "mlnt verify",
            "mlnt predict",
            "mlnt report",
            "mlnt compare --methods mlnt,magic",
            "mlnt compare --seeds 1,x",
            "mlnt eval a --batch 0",
            "mlnt plan --image-size 28",
            "mlnt plan --image-size 0x28",
            "mlnt plan --alpha 1",
        ];
        for line in lines {
            let error = Cli::try_parse_from(line.split_whitespace()).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
