//! `mlnt verify`.

use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde_json::json;

use super::console::say;
use crate::error::Result;
use crate::mlnt::golden::{Deviation, GROUPS, Golden};
use crate::plan::PlanOptions;
use crate::train::choice::{DeviceKind, Precision};
use crate::train::engine::open_device;

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Check the engine against golden training steps.

A golden step is a whole training step, inputs and outputs, computed in float64 by an independent \
implementation. For each group of outputs this prints the relative L2 error and the cosine over the group as one \
vector. Tolerance: 1e-10 in f64, 1e-4 in f32; in f32 a ReLU may fall on its other side, which is then reported \
with how many did.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt verify golden/step_joint.safetensors golden/step_sequential.safetensors
  mlnt verify golden/step_joint.safetensors --precision f32 --json

Exit status: 0 when every group of every file is within tolerance, 1 when one is not, 2 for a file that is no golden
step.";

/// The arguments of `mlnt verify`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Golden steps.
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Where to compute.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub device: DeviceKind,
    /// Floating-point type of the computation.
    #[arg(long, value_name = "TYPE", default_value = "f64")]
    pub precision: Precision,
    /// Print one JSON object per file instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Largest relative error of a group in double precision.
const TOLERANCE_F64: f64 = 1e-10;
/// Largest relative error of a group in single precision when every ReLU falls on the same side.
const TOLERANCE_F32: f64 = 1e-4;
/// Largest relative error of a group in single precision when a ReLU falls on its other side.
const TOLERANCE_MASKS: f64 = 0.1;

/// One file's verdict.
struct Verdict {
    deviations: Vec<(&'static str, Deviation)>,
    /// ReLU decisions that differ from the double-precision run, and how many there are.
    masks: Option<(usize, usize)>,
    pass: bool,
}

/// Runs `mlnt verify`; status 1 when a tolerance is exceeded.
///
/// # Errors
/// For a file that is no golden step.
pub(super) fn run(args: &VerifyArgs) -> Result<u8> {
    let mut all_pass = true;
    for path in &args.files {
        let (verdict, device) = check(args, path)?;
        all_pass &= verdict.pass;
        match args.json {
            true => print_json(args, path, &verdict)?,
            false => print_table(args, path, &verdict, &device)?,
        }
    }
    Ok(if all_pass { 0 } else { 1 })
}

fn check(args: &VerifyArgs, path: &Path) -> Result<(Verdict, String)> {
    let golden = Golden::read(path)?;
    let (mut device, why) = open_device(args.device, args.precision, 0)?;
    let result = golden.run(&mut *device, &PlanOptions::default())?;
    let groups = golden.compare(&result);
    let deviations: Vec<_> = GROUPS.iter().filter_map(|g| Some((*g, *groups.get(*g)?))).collect();
    // A NaN is not within tolerance.
    let within = |tolerance: f64| deviations.iter().all(|(_, d)| d.rel <= tolerance);
    let (masks, pass) = match args.precision {
        Precision::F64 => (None, within(TOLERANCE_F64)),
        Precision::F32 => {
            let (mut reference, _) = open_device(DeviceKind::Cpu, Precision::F64, 0)?;
            let reference = golden.run(&mut *reference, &PlanOptions::default())?;
            let masks = result.mask_differences(&reference);
            // Where ReLUs fell on the other side, the function itself is another one there. The file is right all the
            // same if double precision agrees with it.
            let file_right = || golden.compare(&reference).values().all(|d| d.rel <= TOLERANCE_F64);
            let other_side = masks.0 > 0 && within(TOLERANCE_MASKS) && file_right();
            (Some(masks), within(TOLERANCE_F32) || other_side)
        }
    };
    Ok((Verdict { deviations, masks, pass }, why))
}

fn print_json(args: &VerifyArgs, path: &Path, verdict: &Verdict) -> Result<()> {
    let groups: serde_json::Map<_, _> =
        verdict.deviations.iter().map(|(g, d)| (g.to_string(), json!({ "rel": d.rel, "cos": d.cos }))).collect();
    let mut object = json!({
        "file": path.display().to_string(),
        "device": "cpu",
        "precision": args.precision.to_string(),
        "groups": groups,
        "pass": verdict.pass,
    });
    if let Some((differ, of)) = verdict.masks {
        object["relu_masks"] = json!({ "differ": differ, "of": of });
    }
    say(object)
}

fn print_table(args: &VerifyArgs, path: &Path, verdict: &Verdict, device: &str) -> Result<()> {
    say(format_args!("{}: {}, {device}", path.display(), args.precision))?;
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(["group", "relative L2 error", "1 - cosine"]);
    for (group, d) in &verdict.deviations {
        table.add_row([group.to_string(), format!("{:.2e}", d.rel), format!("{:.1e}", 1.0 - d.cos)]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    say(table)?;
    if let Some((differ, of)) = verdict.masks {
        say(format_args!("ReLU decisions that differ from double precision: {differ} of {of}"))?;
    }
    say(format_args!("{}\n", if verdict.pass { "pass" } else { "FAIL" }))
}
