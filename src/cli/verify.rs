//! `mlnt verify`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde_json::json;

use super::console::say;
use crate::error::Result;
use crate::mlnt::golden::{Deviation, GROUPS, Golden};
use crate::mlnt::replay::Judgement;
use crate::train::choice::{DeviceKind, Precision};
use crate::train::open_device::open_device;

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Check the engine against golden training steps.

A golden step is a whole training step, inputs and outputs, computed in float64 by an independent \
implementation. For each group of outputs this prints the relative L2 error and the cosine over the group as one \
vector. Tolerance: 1e-10 in f64.

In every other precision rounding may push a ReLU's operand over zero, or make a max-pool take another of two nearly \
equal values, and from there on another function is computed. So double precision runs once more with the engine's \
decisions forced on it, and it is the error against that run, `replayed`, that must be within tolerance: 1e-5 in \
f32, 3e-3 in tf32 and f16, 3e-2 in bf16. Every decision must lie within ten tolerances of a tie, the errors against \
the file must stay below 0.1 (tf32 and f16 0.3, bf16 0.5), and double precision left free must give what the file says to 1e-10.";

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
    /// Where to compute: auto, cpu, cuda, cuda:N or simt.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub device: DeviceKind,
    /// Floating-point type of the computation [default: the strictest of the device: f64 on the CPU, f32 on others]
    #[arg(long, value_name = "TYPE")]
    pub precision: Option<Precision>,
    /// Print one JSON object per file instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl VerifyArgs {
    fn precision(&self) -> Precision {
        let own = match self.device {
            DeviceKind::Auto | DeviceKind::Cpu => Precision::F64,
            DeviceKind::Cuda(_) | DeviceKind::Simt => Precision::F32,
        };
        self.precision.unwrap_or(own)
    }
}

/// One file's verdict.
struct Verdict {
    /// Which device it was, and why.
    device: String,
    kind: DeviceKind,
    /// The engine against the file.
    free: BTreeMap<String, Deviation>,
    /// What decides in every precision but double.
    judgement: Option<Judgement>,
    pass: bool,
}

/// Runs `mlnt verify`; status 1 when a tolerance is exceeded.
///
/// # Errors
/// For a file that is no golden step.
pub(super) fn run(args: &VerifyArgs) -> Result<u8> {
    let mut all_pass = true;
    for path in &args.files {
        let verdict = check(args, path)?;
        all_pass &= verdict.pass;
        match args.json {
            true => print_json(args, path, &verdict)?,
            false => print_table(args, path, &verdict)?,
        }
    }
    Ok(if all_pass { 0 } else { 1 })
}

fn check(args: &VerifyArgs, path: &Path) -> Result<Verdict> {
    let golden = Golden::read(path)?;
    let mut opened = open_device(args.device, args.precision(), 0)?;
    let options = opened.device.plan_options();
    let result = golden.run(&mut *opened.device, &options)?;
    let (free, tolerance) = (golden.compare(&result), args.precision().tolerance());
    let judgement = match args.precision() {
        Precision::F64 => None,
        _ => Some(golden.judge(&result)?),
    };
    let pass = match &judgement {
        // A NaN is not within tolerance.
        None => free.values().all(|d| d.rel <= tolerance),
        Some(judgement) => judgement.pass(tolerance),
    };
    Ok(Verdict { device: opened.text, kind: opened.kind, free, judgement, pass })
}

fn print_json(args: &VerifyArgs, path: &Path, verdict: &Verdict) -> Result<()> {
    let mut groups = serde_json::Map::new();
    for (group, d) in &verdict.free {
        let mut numbers = json!({ "rel": d.rel, "cos": d.cos });
        if let Some(judgement) = &verdict.judgement {
            numbers["rel_replayed"] = json!(judgement.replayed[group].rel);
        }
        groups.insert(group.clone(), numbers);
    }
    let mut object = json!({
        "file": path.display().to_string(),
        "device": verdict.kind.to_string(),
        "precision": args.precision().to_string(),
        "groups": groups,
        "pass": verdict.pass,
    });
    if let Some(judgement) = &verdict.judgement {
        object["relu_masks"] = json!(judgement.relus);
        object["pool_choices"] = json!(judgement.pools);
        object["tie_distance"] = json!(judgement.tie_distance);
        object["file_right"] = json!(judgement.file_right);
    }
    say(object)
}

fn print_table(args: &VerifyArgs, path: &Path, verdict: &Verdict) -> Result<()> {
    say(format_args!("{}: {}, {}", path.display(), args.precision(), verdict.device))?;
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    let mut header = vec!["group", "relative L2 error", "1 - cosine"];
    header.extend(verdict.judgement.as_ref().map(|_| "relative L2 error, replayed"));
    table.set_header(header);
    for (group, d) in GROUPS.iter().filter_map(|group| Some((*group, verdict.free.get(*group)?))) {
        let mut row = vec![group.to_string(), format!("{:.2e}", d.rel), format!("{:.1e}", 1.0 - d.cos)];
        row.extend(verdict.judgement.as_ref().map(|judgement| format!("{:.2e}", judgement.replayed[group].rel)));
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    say(table)?;
    if let Some(judgement) = &verdict.judgement {
        let (relus, pools) = (judgement.relus, judgement.pools);
        say(format_args!("ReLU decisions that differ from double precision: {} of {}", relus.differ, relus.of))?;
        say(format_args!("max-pool choices that differ from double precision: {} of {}", pools.differ, pools.of))?;
        say(format_args!("farthest decision from a tie: {:.1e}", judgement.tie_distance))?;
        if !judgement.file_right {
            say("double precision does not give what the file says")?;
        }
    }
    say(format_args!("{}\n", if verdict.pass { "pass" } else { "FAIL" }))
}
