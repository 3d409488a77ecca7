//! `mlnt compare`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::console::{Console, say};
use super::train::{INTERRUPTED, create, find_from_anywhere, go_on, stop_on_ctrl_c};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::report::compare::{Comparison, Finished};
use crate::train::choice::Method;
use crate::train::compare::{Cell, State, cells, check_labels, survey};
use crate::train::config::{Config, Overrides};
use crate::train::run::Ending;
use crate::train::run_dir::{RunDir, setting_name};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Train several methods with several seeds on the same noisy labels: one table.

Every method is trained with every seed, one after the other, each in an ordinary run directory DIR/METHOD-sSEED. All \
methods of a seed learn from the same noisy labels; each seed has noise, subset and validation part of its own, but \
labels of a --labels file are the file's for every seed. The table shows test accuracy, mean and standard deviation \
over the seeds, at the epoch of best validation accuracy, at the last and at the best epoch. The same command again \
goes on where the last one stopped: finished runs are taken as they are, others continue from their checkpoint, and \
runs of other settings are refused.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt compare                                        MLNT and cross entropy on the embedded sample, seeds 1, 2, 3
  mlnt compare --methods mlnt,mlnt-first-order,iterative-ce,ce --seeds 1,2 --out runs/four
  mlnt compare --labels noisy.csv --out runs/noisy    the same labels for all seeds
  mlnt report runs/four/*                             the runs as one page

DIR receives compare.md (the table), compare.json (the same with the numbers of every seed) and compare.csv (one line \
per run and network). Settings come from preset, --config file and flags, as for `mlnt train`; method, seed, first-order \
and no-baseline of a file are not taken. --iterations counts for the methods that iterate.";

/// The arguments of `mlnt compare`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct CompareArgs {
    /// Methods to train.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_values = ["mlnt", "ce"], help_heading = "Run")]
    pub methods: Vec<Method>,
    /// Seeds to train each method with.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values = ["1", "2", "3"], help_heading = "Run")]
    pub seeds: Vec<u64>,
    /// TOML file of settings; flags override it.
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub config: Option<PathBuf>,
    /// The settings given as flags.
    #[command(flatten)]
    pub settings: Overrides,
}

/// The subcommand without the settings that it chooses itself, and with its own meaning of --out.
pub(super) fn without_its_own(command: clap::Command) -> clap::Command {
    let mut command = command.mut_arg("out", |arg| {
        arg.help("Folder of the runs, new or of an earlier comparison [default: runs/compare-DATA-NOISE-RATE]")
    });
    for setting in ["method", "seed", "first_order", "no_baseline"] {
        command = command.mut_arg(setting, |arg| arg.hide(true));
    }
    command
}

impl CompareArgs {
    /// The runs that are asked for, and the folder that holds them.
    fn cells(&self) -> Result<(Vec<Cell>, PathBuf)> {
        let Overrides { method, seed, first_order, no_baseline, .. } = &self.settings;
        let own = [
            (method.is_some(), "--method: compare takes --methods"),
            (seed.is_some(), "--seed: compare takes --seeds"),
            (first_order.is_some(), "--first-order: compare takes --methods mlnt-first-order"),
            (no_baseline.is_some(), "--no-baseline: compare takes --methods, with ce or without"),
        ];
        if let Some((_, what)) = own.iter().find(|(given, _)| *given) {
            return Err(Error::usage(what));
        }
        let mut base = Config::assemble(self.config.as_deref(), &self.settings)?;
        find_from_anywhere(&mut base);
        let named = || Path::new("runs").join(format!("compare-{}", setting_name(&base)));
        let out = base.out.clone().unwrap_or_else(named);
        if out.exists() && !out.is_dir() {
            return Err(Error::file(&out, "a file; --out takes a folder"));
        }
        Ok((cells(&base, &self.methods, &self.seeds, &out)?, out))
    }
}

/// Runs `mlnt compare`; returns the exit status.
///
/// # Errors
/// Everything that can be wrong with settings, data, files and device, and runs of other settings in the folder.
pub(super) fn run(args: &CompareArgs) -> Result<u8> {
    let (mut cells, out) = args.cells()?;
    let states = survey(&mut cells)?;
    let stop = stop_on_ctrl_c()?;
    let mut diverged = Vec::new();
    for (number, (cell, state)) in (1..).zip(cells.iter().zip(states)) {
        let what = match state {
            State::New => "begins",
            State::Begun => "continues",
            State::Complete => "is complete",
        };
        let Cell { method, seed, config, path } = cell;
        say(format_args!("\n{} {what}: run {number} of {}, {method}, seed {seed}", path.display(), cells.len()))?;
        let mut run = match state {
            State::New => create(config.clone())?,
            State::Begun => go_on(config.clone(), RunDir::open(path)?)?,
            State::Complete => continue,
        };
        let ending = match run.train(&mut Console::new(Arc::clone(&stop))) {
            Err(Error::Diverged(why)) => {
                say(format_args!("{}: {why}", path.display()))?;
                diverged.push(format!("{method} with seed {seed}"));
                continue;
            }
            ending => ending?,
        };
        if ending == Ending::Stopped || stop.load(Ordering::Relaxed) {
            say("\nstopped and saved; the same command goes on from here")?;
            return Ok(INTERRUPTED);
        }
    }
    if !diverged.is_empty() {
        let (which, rest) = (diverged.join(", "), "the other runs are complete; leave these methods out of --methods");
        return Err(Error::Diverged(format!("{which} diverged, {rest}, or take other settings and another --out")));
    }
    check_labels(&cells)?;
    let read = |cell: &Cell| Finished::read(cell.method.to_string(), cell.seed, &cell.path);
    let comparison = Comparison::new(cells.iter().map(read).collect::<Result<_>>()?);
    let json = serde_json::to_string_pretty(&comparison.json()).map_err(|e| Error::file(&out, e))?;
    let table = comparison.markdown();
    let csv = out.join("compare.csv");
    write_atomic(out.join("compare.md"), table.as_bytes())?;
    write_atomic(out.join("compare.json"), format!("{json}\n").as_bytes())?;
    write_atomic(&csv, &comparison.csv(&csv)?)?;
    say(format_args!("\n{table}\nwritten to {}", out.display()))?;
    Ok(0)
}
