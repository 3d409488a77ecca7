//! `mlnt check`.

use serde_json::{Value, json};

use super::console::say;
use crate::check::{Failure, Machine, Row, Selection, Verdict, check};
use crate::device::cuda::Mode;
use crate::error::Result;
use crate::train::choice::{DeviceKind, KernelChoice, Precision};
use crate::train::open_device::{open_kernels, operands};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Check the CUDA kernels on a GPU, or on the SIMT host machine.

Runs every operation of the engine, those that only the planner makes too, on about 2,800 cases of odd sizes, shared and \
per-branch operands, against double precision on the CPU; fused convolutions and batch norms against the plain operations \
that they stand for. Each case runs twice launch by launch and once as a replayed graph, and all three must give the same \
bits. In f16 and bf16 activations take 16 bits, convolutions in a mixture of widths. Operations that do not depend on \
the precision run once.

Then whole training steps of a small network, M = 4, with both recipes: the replayed graph against launches one by \
one, two devices against each other, and batches made on the device against batches made on the host, also while \
steps run. All of these must agree in every bit.

Largest relative error (Euclidean norm of a result): 1e-5 in f32, fused convolutions 1e-6; convolutions 3e-3 in tf32 and \
f16, 3e-2 in bf16, fused ones 1.5e-3 and 1e-2; half a unit of the last place more where other operations have results of \
16 bits; indices and copies are exact. What a convolution finds of its result, which may cancel: 3e-7 of the size of its terms.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt check                                     everything, on the first GPU
  mlnt check --device simt --per-operation 2     a sample of it without a GPU
  mlnt check --precision f16 --only \"conv2d_fprop n2\"

scripts/gpu_check.py runs this and more.

Exit status: 0 when everything passed, 1 when something failed, which is named.";

/// The arguments of `mlnt check`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct CheckArgs {
    /// What to check: cuda, cuda:N or simt.
    #[arg(long, value_name = "NAME", default_value = "cuda")]
    pub device: DeviceKind,
    /// Floating-point types of the computation.
    #[arg(long, value_name = "TYPE,..", value_delimiter = ',', default_value = "f32,tf32,f16,bf16")]
    pub precision: Vec<Precision>,
    /// The kernels, where there are several for one purpose: portable runs on every card, hopper on compute capability 9.0 alone;
    /// auto is what the card runs best, portable on the SIMT host machine.
    #[arg(long, value_name = "auto|portable|hopper", hide_possible_values = true, default_value = "auto")]
    pub kernels: KernelChoice,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// At most so many cases of each operation, spread evenly over them [default: all]
    #[arg(long, value_name = "N", value_parser = cases)]
    pub per_operation: Option<usize>,
    /// Print one JSON object per row of the table, then one with the verdict.
    #[arg(long)]
    pub json: bool,
}

/// A number of cases from 1 to 1,000,000.
fn cases(text: &str) -> std::result::Result<usize, String> {
    super::whole(text, 1, 1_000_000)
}

/// Runs `mlnt check`; status 1 when something failed.
///
/// # Errors
/// When the device cannot be opened, or no case is selected.
pub(super) fn run(args: &CheckArgs) -> Result<u8> {
    let described = match args.precision.first() {
        Some(first) => open_kernels(args.device, *first, Mode::Eager, args.kernels)?.describe(),
        None => String::new(),
    };
    let open = |precision| move |mode: Mode| open_kernels(args.device, precision, mode, args.kernels);
    let open: Vec<_> = args.precision.iter().map(|&precision| open(precision)).collect();
    let mut machines: Vec<Machine<'_>> = Vec::new();
    for (precision, open) in args.precision.iter().zip(&open) {
        machines.push(Machine { operands: operands(*precision)?, open });
    }
    let selection = Selection { only: args.only.clone(), per_operation: args.per_operation };
    if !args.json {
        say(format_args!("device: {described}\n"))?;
        let [what, precision, cases, failed] = ["", "precision", "cases", "failed"];
        say(format_args!("{what:34} {precision:9} {cases:>6} {failed:>6}  worst error  tolerance  seconds"))?;
    }
    let verdict = check(&machines, &selection, &mut |row| match args.json {
        true => say(object(row)),
        false => line(row),
    })?;
    match args.json {
        true => say(json!({
            "device": described,
            "cases": verdict.cases,
            "failed": verdict.failed,
            "stopped": verdict.stopped,
            "pass": verdict.pass(),
        }))?,
        false => conclude(&verdict)?,
    }
    Ok(if verdict.pass() { 0 } else { 1 })
}

fn line(row: &Row) -> Result<()> {
    let Row { what, cases, seconds, .. } = row;
    let precision = row.precision.as_deref().unwrap_or("any");
    let number = |x: Option<f64>| x.map_or("-".into(), |x| if x == 0.0 { "0".into() } else { format!("{x:.1e}") });
    let (failed, worst, tolerance) = (row.failed(), number(row.worst), number(row.tolerance));
    say(format_args!("{what:34} {precision:9} {cases:>6} {failed:>6}  {worst:>11}  {tolerance:>9}  {seconds:>7.2}"))?;
    row.failures
        .iter()
        .try_for_each(|Failure { case, fault, what }| say(format_args!("  FAIL {case}: {fault}: {what}")))
}

fn conclude(verdict: &Verdict) -> Result<()> {
    if let Some(why) = &verdict.stopped {
        say(format_args!("\nSTOPPED: {why}"))?;
    }
    let word = if verdict.pass() { "pass" } else { "FAIL" };
    say(format_args!("\n{word}: {} of {} cases failed", verdict.failed, verdict.cases))
}

fn object(row: &Row) -> Value {
    let failure = |f: &Failure| json!({ "case": f.case, "fault": f.fault.to_string(), "what": f.what });
    json!({
        "what": row.what,
        "precision": row.precision,
        "cases": row.cases,
        "failed": row.failed(),
        "worst": row.worst,
        "tolerance": row.tolerance,
        "seconds": row.seconds,
        "failures": row.failures.iter().map(failure).collect::<Vec<Value>>(),
    })
}
