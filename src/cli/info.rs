//! `mlnt info`.

use super::console::say;
use crate::device::cuda::driver::gpu::{Card, Gpu};
use crate::device::cuda::embedded::{self, EmbeddedModule};
use crate::error::Result;
use crate::train::choice::{DeviceKind, Precision, PrecisionChoice};
use serde_json::{Value, json};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
The devices of this machine, and what is missing for the others.

Prints the processor, the NVIDIA driver and cards with compute capability and memory, which of the kernels in this \
binary fit each card, and whether the SIMT host machine, which runs those kernels without a card, was built.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt info
  mlnt info --json";

/// The arguments of `mlnt info`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct InfoArgs {
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Runs `mlnt info`.
///
/// # Errors
/// When nothing can be printed.
pub(super) fn run(args: &InfoArgs) -> Result<u8> {
    if args.json {
        say(object())?;
        return Ok(0);
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    say(format_args!("mlnt {}", env!("CARGO_PKG_VERSION")))?;
    say(format_args!("cpu      {threads} threads; {} unless asked for f64", auto(DeviceKind::Cpu)))?;
    match Gpu::probe() {
        Ok(probe) => {
            let (major, minor) = probe.cuda;
            say(format_args!("driver   NVIDIA, CUDA up to {major}.{minor}"))?;
            for card in &probe.cards {
                say(format_args!("cuda:{}   {card}, {} multiprocessors", card.ordinal, card.multiprocessors))?;
                match card.free_bytes() {
                    Ok(free) => say(format_args!("         {:.1} GB of memory free", free as f64 / 1e9))?,
                    Err(why) => say(format_args!("         not usable: {why}"))?,
                }
                say(format_args!("         {}", fitting(card)))?;
            }
        }
        Err(missing) => say(format_args!("cuda     none: {missing}"))?,
    }
    say(format_args!("kernels  {}", built()))?;
    say(match embedded::has_simt() {
        true => format!(
            "simt     built: --device simt runs the kernels thread by thread on the processor; {} unless asked for another",
            auto(DeviceKind::Simt)
        ),
        false => "simt     not built: it needs a C++20 compiler (for instance g++) when mlnt is built".to_string(),
    })?;
    Ok(0)
}

/// Which kernels the binary holds, in words.
fn built() -> String {
    let (modules, kernels) = (embedded::modules(), embedded::kernels().len());
    match embedded::nvcc_version() {
        Some(version) => {
            format!("{kernels} kernels for {}, compiled by nvcc {version}", architectures(modules.iter()).join(", "))
        }
        None => {
            "none in this binary: it was built without nvcc; scripts/install_nvcc.sh installs nvcc, then build mlnt \
                 again"
                .to_string()
        }
    }
}

/// Which of them run on a card, in words.
fn fitting(card: &Card) -> String {
    let fit = embedded::modules_for(card.capability);
    match architectures(fit.iter().copied())[..] {
        [] if embedded::modules().is_empty() => "no kernels in this binary".to_string(),
        [] => format!("no kernels: sm_{}{} is older than all of them", card.capability.0, card.capability.1),
        ref names => format!(
            "kernels for {} fit it; {} unless asked for another",
            names.join(", "),
            auto(DeviceKind::Cuda(card.ordinal))
        ),
    }
}

/// What a device computes in unless told otherwise.
fn auto(device: DeviceKind) -> Precision {
    PrecisionChoice::Auto.on(device)
}

/// Names of the architectures of some modules, each once.
fn architectures<'a>(modules: impl Iterator<Item = &'a EmbeddedModule>) -> Vec<String> {
    let mut names: Vec<String> = modules.map(|m| m.arch.to_string()).collect();
    names.sort();
    names.dedup();
    names
}

fn object() -> Value {
    let card = |card: &Card| {
        json!({
            "device": format!("cuda:{}", card.ordinal),
            "name": card.name,
            "compute_capability": format!("{}.{}", card.capability.0, card.capability.1),
            "memory_bytes": card.memory,
            "free_bytes": card.free_bytes().ok(),
            "multiprocessors": card.multiprocessors,
            "kernels": architectures(embedded::modules_for(card.capability).into_iter()),
            "precision": auto(DeviceKind::Cuda(card.ordinal)).to_string(),
        })
    };
    let (driver, cards, missing) = match Gpu::probe() {
        Ok(probe) => {
            let version = format!("{}.{}", probe.cuda.0, probe.cuda.1);
            (Some(version), probe.cards.iter().map(card).collect(), None)
        }
        Err(missing) => (None, Vec::new(), Some(missing.to_string())),
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("MLNT_COMMIT"),
        "cpu_threads": std::thread::available_parallelism().map_or(1, usize::from),
        "driver_cuda": driver,
        "cards": cards,
        "missing": missing,
        "nvcc": embedded::nvcc_version(),
        "kernels": embedded::kernels().len(),
        "architectures": architectures(embedded::modules().iter()),
        "simt": embedded::has_simt(),
    })
}
