//! `mlnt plan`.

use std::str::FromStr;

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde_json::{Value, json};

use super::console::say;
use crate::device::cuda::KernelCost;
use crate::error::Result;
use crate::mlnt::{CeSpec, Report, StepSpec, Synthetic, record_ce_step, record_step};
use crate::model::{Arch, ModelSpec};
use crate::ops::Operation;
use crate::plan::{Cost, Launch, Plan, PlanOptions, Traffic};
use crate::train::choice::{DeviceKind, KernelChoice, Precision, PrecisionChoice, Recipe};
use crate::train::config::{Config, Overrides};
use crate::train::engine::step_spec;
use crate::train::group::Group;
use crate::train::open_device::{kernel_cost, machine, plan_options, without_a_card};
use crate::train::preset::{InputShape, Preset};

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
What one training step costs, without running it.

Prints the floating-point operations, launches and bytes moved by phase and by operation, in units of one forward \
pass of the batch too, and the memory of the arena. Nothing is allocated, so a step may be larger than this machine.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt plan                                         a step of the default run
  mlnt plan --preset cifar10 --recipe released      the joint update: (9M+4) forward passes
  mlnt plan --preset cifar10 --branches 4 --batch 256 --json";

/// The arguments of `mlnt plan`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct PlanCommand {
    /// The step.
    #[command(flatten)]
    pub step: PlanArgs,
    /// Count the search for synthetic labels too, as training does it: another forward pass, and neighbours of its features.
    #[arg(long)]
    pub as_trained: bool,
    /// List every launch in the object too: phase, operation and shapes, kernels, FLOPs and bytes.
    #[arg(long, requires = "json")]
    pub launches: bool,
}

/// A step, as `mlnt plan` and `mlnt bench-step` take it.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct PlanArgs {
    /// Set of values to start from; the flags then change them.
    #[arg(long, value_name = "NAME", default_value = "small")]
    pub preset: Preset,
    /// Images per step, the paper's k.
    #[arg(long, value_name = "K")]
    pub batch: Option<usize>,
    /// Sets of synthetic labels per step, the paper's M.
    #[arg(long, value_name = "M")]
    pub branches: Option<usize>,
    /// Two updates in turn (paper) or one with both gradients (released).
    #[arg(long, value_name = "NAME")]
    pub recipe: Option<Recipe>,
    /// Drop the second-order term of the meta gradient.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub first_order: Option<bool>,
    /// Floating-point type of the computation; it decides the bytes. Auto is f16 for cuda, else f32.
    #[arg(long, value_name = "TYPE")]
    pub precision: Option<PrecisionChoice>,
    /// Branches that the step works on at a time: auto (what the device likes), all, or a number; behind a colon the same within a
    /// group for each stage, largest images first, as in 5:2,3.
    #[arg(long, value_name = "auto|all|N[:S,…]")]
    pub group: Option<Group>,
    /// The device the plan is for: cuda and simt fuse more and add the launches of the kernels and their scratch memory;
    /// auto is the processor, or cuda in a precision that only the kernels have.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub device: DeviceKind,
    /// The kernels, where there are several for one purpose: portable runs on every card, hopper on compute capability 9.0 alone;
    /// auto is what the card runs best, portable without one.
    #[arg(long, value_name = "auto|portable|hopper", hide_possible_values = true, default_value = "auto")]
    pub kernels: KernelChoice,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// The network.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Image channels [default: the preset's data]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Network")]
    pub in_channels: Option<usize>,
    /// Image height and width in pixels, e.g. 32x32; any size, odd ones too [default: the preset's data]
    #[arg(long, value_name = "HxW", help_heading = "Network")]
    pub image_size: Option<ImageSize>,
    /// Number of classes, at least 2 [default: the preset's data]
    #[arg(long, value_name = "N", value_parser = classes, help_heading = "Network")]
    pub classes: Option<usize>,
}

/// The shape of the network.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Network")]
pub struct ModelArgs {
    /// Channels of each stage of the PreAct ResNet, e.g. 16,32,64; every stage but the first halves the image.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub widths: Option<Vec<usize>>,
    /// Residual blocks of each stage, e.g. 5,5,5.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub blocks: Option<Vec<usize>>,
}

impl PlanArgs {
    /// The settings of the step: the preset, changed by the flags. Where the preset has more neighbours than the batch
    /// has images, as many as it has: they cost nothing that is counted.
    ///
    /// # Errors
    /// Those of [`Config::validate`].
    pub fn config(&self) -> Result<Config> {
        let neighbours = self.preset.config().neighbours;
        let fitting = self.batch.map(|batch| neighbours.min(batch.saturating_sub(1)));
        let flags = Overrides {
            preset: Some(self.preset),
            batch: self.batch,
            neighbours: fitting,
            branches: self.branches,
            recipe: self.recipe,
            first_order: self.first_order,
            precision: self.precision,
            group: self.group,
            device: Some(self.device),
            widths: self.model.widths.clone(),
            blocks: self.model.blocks.clone(),
            ..Overrides::default()
        };
        Config::resolve(None, &flags)
    }

    /// The network of the step.
    pub fn model_spec(&self, config: &Config) -> ModelSpec {
        let input = self.input();
        ModelSpec {
            arch: Arch::PreactResnet,
            in_channels: input.channels,
            size: [input.height, input.width],
            classes: input.classes,
            widths: config.widths.clone(),
            blocks: config.blocks.clone(),
        }
    }

    /// The shape of the data: the preset's, changed by the flags.
    pub fn input(&self) -> InputShape {
        let preset = self.preset.input();
        InputShape {
            channels: self.in_channels.unwrap_or(preset.channels),
            height: self.image_size.map_or(preset.height, |size| size.height),
            width: self.image_size.map_or(preset.width, |size| size.width),
            classes: self.classes.unwrap_or(preset.classes),
        }
    }
}

impl PlanArgs {
    /// The device that the plan is for: where none is named, one that computes in `precision`.
    fn planned_device(&self, precision: PrecisionChoice) -> DeviceKind {
        use Precision::{Bf16, F16, Tf32};
        match (self.device, precision) {
            (DeviceKind::Auto, PrecisionChoice::Of(Tf32 | F16 | Bf16)) => DeviceKind::Cuda(0),
            (DeviceKind::Auto, _) => DeviceKind::Cpu,
            (device, _) => device,
        }
    }
}

/// Runs `mlnt plan`.
///
/// # Errors
/// For settings that are no step.
pub(super) fn run(command: &PlanCommand) -> Result<u8> {
    let args = &command.step;
    let mut config = args.config()?;
    let (input, model) = (args.input(), args.model_spec(&config));
    config.device = args.planned_device(config.precision);
    let (device, precision) = (config.device, config.computes_in());
    let real_bytes = if precision == Precision::F64 { 8 } else { 4 };
    let options = plan_options(device, precision)?;
    let ce = CeSpec {
        model: model.clone(),
        batch: config.batch,
        momentum: config.momentum,
        weight_decay: config.weight_decay,
        scaled: config.scaled(),
    };
    // The unit of the ratio is the same for every device.
    let ce_cost = Plan::build(&record_ce_step(&ce, "")?, &PlanOptions::default())?.cost(real_bytes);
    let forward = ce_cost.phases.iter().find(|p| p.phase == "forward").map_or(0, |p| p.flops);
    let synthetic =
        if command.as_trained { Synthetic::Transfer { neighbours: config.neighbours } } else { Synthetic::Given };
    let spec = StepSpec { synthetic, ..step_spec(&config, model.clone()) };
    let tape = record_step(&spec, Report::Losses)?;
    let machine = machine(device, precision)?;
    let plan = config.group.plan(&tape, &options, machine)?;
    let cost = plan.cost(real_bytes);
    let traffic = machine.map_or(Vec::new(), |machine| plan.traffic(real_bytes, machine.cache_bytes));
    let ratio = cost.flops() as f64 / forward as f64;
    let (arena, states) = (plan.arena_bytes(real_bytes), plan.state_bytes(real_bytes));
    // The kernels of a plan are known without a card.
    let kernels = match device {
        DeviceKind::Cuda(_) | DeviceKind::Simt => Some(kernel_cost(&plan, precision, without_a_card(args.kernels))?),
        DeviceKind::Auto | DeviceKind::Cpu => None,
    };
    if args.json {
        let mut object = json!({
            "batch": config.batch,
            "branches": config.branches,
            "recipe": config.recipe.to_string(),
            "first_order": config.first_order,
            "device": device.to_string(),
            "precision": precision.to_string(),
            "parameters": model.param_count(),
            "flops": cost.flops(),
            "forward_flops": forward,
            "ratio": ratio,
            "launches": cost.launches(),
            "group": plan.largest_group(),
            "stage_groups": plan.stages.to_string(),
            "bytes_moved": cost.bytes_moved(),
            "arena_bytes": arena,
            "state_bytes": states,
            "phases": cost.phases,
            "operations": cost.operations,
        });
        if let Some(machine) = machine {
            object["memory_bytes"] = json!(traffic.iter().map(|t| t.bytes()).sum::<u64>());
            object["cache_bytes"] = json!(machine.cache_bytes);
            object["seconds_compared"] = json!(machine.seconds(&plan));
        }
        if command.launches {
            object["listing"] = listing(&plan, real_bytes, &traffic, kernels.as_ref());
        }
        if let Some(kernels) = kernels {
            object["kernel_launches"] = json!(kernels.launches);
            object["scratch_bytes"] = json!(kernels.scratch_bytes);
            object["partial_bytes"] = json!(kernels.partial_bytes);
            object["kernels"] = json!(kernels.uses);
        }
        say(object)?;
        return Ok(0);
    }
    let order = if config.first_order { "first order" } else { "exact" };
    let (k, m, group) = (config.batch, config.branches, plan.largest_group());
    let taken = if group < m { format!(" in groups of at most {group}") } else { String::new() };
    let by_stage = if plan.stages.is_whole() { String::new() } else { format!(" (by stage {})", plan.stages) };
    say(format_args!(
        "One MLNT step: {} recipe, {order}, batch {k}, {m} branches{taken}{by_stage}, {}; PreAct ResNet, widths {:?}, blocks {:?}, \
         {} parameters, images {}x{}x{}, {} classes\n",
        config.recipe,
        precision,
        config.widths,
        config.blocks,
        model.param_count(),
        input.channels,
        input.height,
        input.width,
        input.classes,
    ))?;
    say(format_args!("{}\n", phase_table(&cost, forward)))?;
    say(format_args!("{}\n", operation_table(&cost, forward)))?;
    say(format_args!("one forward pass    {:.3} GFLOP", forward as f64 / 1e9))?;
    say(format_args!("whole step          {:.3} GFLOP = {ratio:.2} forward passes", cost.flops() as f64 / 1e9))?;
    say(format_args!("launches            {}", cost.launches()))?;
    say(format_args!("bytes moved         {:.3} GB", cost.bytes_moved() as f64 / 1e9))?;
    if let Some(machine) = machine {
        let (bytes, cache) =
            (traffic.iter().map(|t| t.bytes()).sum::<u64>() as f64 / 1e9, machine.cache_bytes as f64 / 1e6);
        say(format_args!("to and from memory  {bytes:.3} GB behind a cache of {cache:.0} MB"))?;
    }
    say(format_args!("arena               {:.3} GB", arena as f64 / 1e9))?;
    say(format_args!("states              {:.3} GB", states as f64 / 1e9))?;
    if let Some(kernels) = kernels {
        say(format_args!("kernel launches     {}", kernels.launches))?;
        let (scratch, partial) = (kernels.scratch_bytes as f64 / 1e9, kernels.partial_bytes as f64 / 1e9);
        say(format_args!("scratch             {scratch:.3} GB"))?;
        say(format_args!(
            "partial sums        {partial:.3} GB, written to scratch and read again, beside the bytes moved"
        ))?;
    }
    Ok(0)
}

/// Every launch of a plan, in order.
fn listing(plan: &Plan, real_bytes: usize, traffic: &[Traffic], kernels: Option<&KernelCost>) -> Value {
    let row = |(i, launch): (usize, &Launch)| {
        let (flops, bytes) = plan.launch_cost(launch, real_bytes);
        let mut row = json!({

            "phase": launch.phase,
            "operation": launch.op.name(),
            "what": plan.launch_label(launch),
            "branches": launch.branches.len(),
            "flops": flops,
            "bytes_moved": bytes,
        });
        if let Some(traffic) = traffic.get(i) {
            row["memory_bytes"] = json!(traffic.bytes());
        }
        if let Some(kernels) = kernels {
            row["kernels"] = json!(kernels.kernels[i]);
        }
        row
    };
    plan.launches.iter().enumerate().map(row).collect()
}

fn phase_table(cost: &Cost, forward: u64) -> Table {
    work_table("phase", forward, cost.phases.iter().map(|p| (p.phase.as_str(), p.flops, p.launches, p.bytes_moved)))
}

fn operation_table(cost: &Cost, forward: u64) -> Table {
    let rows = cost.operations.iter().map(|o| (o.operation, o.flops, o.launches, o.bytes_moved));
    work_table("operation", forward, rows)
}

/// A table of work: name, FLOPs, launches and bytes of each row.
fn work_table<'a>(of: &str, forward: u64, rows: impl Iterator<Item = (&'a str, u64, usize, u64)>) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header([of, "GFLOP", "forward passes", "launches", "GB moved"]);
    for (name, flops, launches, bytes) in rows {
        table.add_row([
            name.to_string(),
            format!("{:.3}", flops as f64 / 1e9),
            format!("{:.2}", flops as f64 / forward as f64),
            launches.to_string(),
            format!("{:.3}", bytes as f64 / 1e9),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Height and width of an image in pixels, written `HxW`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Height.
    pub height: usize,
    /// Width.
    pub width: usize,
}

impl FromStr for ImageSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let takes = "takes height x width in pixels from 1 to 65536, e.g. 32x32";
        let (height, width) = text.split_once(['x', 'X']).ok_or(takes)?;
        let extent = |text: &str| super::whole(text, 1, 65_536).map_err(|_| takes.to_string());
        Ok(ImageSize { height: extent(height)?, width: extent(width)? })
    }
}

/// A number of channels from 1 to 65,536.
fn positive(text: &str) -> std::result::Result<usize, String> {
    super::whole(text, 1, 65_536)
}

/// A number of classes from 2 to 65,536.
fn classes(text: &str) -> std::result::Result<usize, String> {
    super::whole(text, 2, 65_536)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{InputShape, PlanArgs};
    use crate::cli::{Cli, Command};

    fn plan(line: &str) -> PlanArgs {
        match Cli::parse_from(line.split_whitespace()).command {
            Command::Plan(args) => args.step,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn plan_takes_the_preset_and_its_changes() {
        let args =
            plan("mlnt plan --preset cifar10 --batch 8 --branches 4 --image-size 15x11 --widths 4,8 --blocks 1,2");
        let config = args.config().unwrap();
        assert_eq!((config.batch, config.branches, config.neighbours), (8, 4, 7));
        assert_eq!((config.widths, config.blocks), (vec![4, 8], vec![1, 2]));
        assert_eq!(args.input(), InputShape { channels: 3, height: 15, width: 11, classes: 10 });
    }

    #[test]
    fn plan_refuses_what_training_refuses() {
        for line in
            ["mlnt plan --branches 0", "mlnt plan --batch 1", "mlnt plan --widths 0,1,2", "mlnt plan --blocks 1"]
        {
            assert!(plan(line).config().is_err(), "{line}");
        }
    }
}
