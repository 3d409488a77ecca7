//! Whole training steps of a small network: the same bits whichever way the launches and the images get there.

use super::judge::same_bits;
use super::{Fault, Machine, Row, Selection, dead};
use crate::device::cuda::Mode;
use crate::device::{Crop, Device, HostSlice, HostVec, ImageSet, PlanId};
use crate::error::{Error, Result};
use crate::mlnt::{
    KlScale, Recipe, Report, Scales, StateKind, StepScalars, StepSpec, Synthetic, draw_ranks, record_step, state_name,
};
use crate::model::{Arch, ModelSpec, he_init};
use crate::plan::Plan;
use crate::rng::{Purpose, below, stream};

/// Both recipes.
pub(super) const RECIPES: [Recipe; 2] = [Recipe::Sequential, Recipe::Joint];

/// Steps that a comparison takes.
const STEPS: u64 = 4;

const BATCH: usize = 6;
const BRANCHES: usize = 4;
const NEIGHBOURS: usize = 3;
const CLASSES: usize = 4;
const CHANNELS: usize = 2;
const SIZE: [usize; 2] = [7, 6];
const PIXELS: usize = SIZE[0] * SIZE[1];
const IMAGES: usize = 16;

/// The comparisons of one recipe.
#[derive(Clone, Copy)]
enum Comparison {
    /// Launches one by one against the replayed graph.
    Replay,
    /// Two devices, step by step in turn.
    TwoDevices,
    /// Images made on the device against the host's; every step is waited for, as training does.
    Staged,
    /// The same with all steps queued at once: each batch is made while steps before it run.
    Overlapping,
}

impl Comparison {
    const ALL: [Comparison; 4] =
        [Comparison::Replay, Comparison::TwoDevices, Comparison::Staged, Comparison::Overlapping];

    fn name(self) -> &'static str {
        match self {
            Comparison::Replay => "replay equals eager",
            Comparison::TwoDevices => "two devices agree",
            Comparison::Staged => "staged batches equal host batches",
            Comparison::Overlapping => "batches staged while steps run equal host batches",
        }
    }

    fn fault(self) -> Fault {
        match self {
            Comparison::Replay => Fault::Replay,
            Comparison::TwoDevices => Fault::Repeat,
            Comparison::Staged | Comparison::Overlapping => Fault::Staging,
        }
    }
}

/// Runs the selected comparisons of `recipe`; also why the check cannot go on, if it cannot.
pub(super) fn run(machine: &Machine<'_>, recipe: Recipe, selection: &Selection) -> (Row, Option<String>) {
    let what = match recipe {
        Recipe::Sequential => "step sequential",
        Recipe::Joint => "step joint",
    };
    let mut row = Row::new(what, Some(machine.operands.name()));
    for comparison in Comparison::ALL {
        let case = format!("{what}: {}", comparison.name());
        if !selection.takes(&case) {
            continue;
        }
        row.cases += 1;
        match compare(machine, recipe, comparison) {
            Ok(found) => found.into_iter().for_each(|what| row.fail(&case, comparison.fault(), what)),
            Err(error) => {
                row.fail(&case, Fault::Device, error.to_string());
                let stopped = dead(machine, &error);
                if stopped.is_some() {
                    return (row, stopped);
                }
            }
        }
    }
    (row, None)
}

/// What is wrong, in words.
fn compare(machine: &Machine<'_>, recipe: Recipe, comparison: Comparison) -> Result<Vec<String>> {
    let pictures = Pictures::new();
    let first = match comparison {
        Comparison::Replay => Mode::Eager,
        _ => Mode::Graph,
    };
    let (mut a, mut b) = (Step::open(machine, first, recipe)?, Step::open(machine, Mode::Graph, recipe)?);
    let mut differ = Vec::new();
    match comparison {
        Comparison::Replay | Comparison::TwoDevices => {
            for step in 0..STEPS {
                a.write_images(&pictures, step)?;
                b.write_images(&pictures, step)?;
                a.begin(step)?;
                b.begin(step)?;
                differ.extend(a.different_outputs(&b, step)?);
            }
        }
        Comparison::Staged | Comparison::Overlapping => {
            let wait = matches!(comparison, Comparison::Staged);
            let set = ImageSet {
                count: IMAGES,
                shape: [CHANNELS, SIZE[0], SIZE[1]],
                image: &|i| pictures.image(i),
                table: &pictures.table,
            };
            let Some(kept) = b.device.keep_images(&set)? else {
                return Ok(vec!["the device does not keep images".into()]);
            };
            b.device.stage(kept, b.id, "x", &crops(0))?;
            for step in 0..STEPS {
                b.begin(step)?;
                if step + 1 < STEPS {
                    b.device.stage(kept, b.id, "x", &crops(step + 1))?;
                }
                if wait {
                    a.write_images(&pictures, step)?;
                    a.begin(step)?;
                    differ.extend(a.different_outputs(&b, step)?);
                }
            }
            for step in (0..STEPS).filter(|_| !wait) {
                a.write_images(&pictures, step)?;
                a.begin(step)?;
            }
            differ.extend(a.different_outputs(&b, STEPS - 1)?);
        }
    }
    differ.extend(a.different_states(&b)?);
    Ok(differ)
}

/// A step loaded on a device, with all states at their start.
struct Step {
    device: Box<dyn Device>,
    id: PlanId,
    scalars: Vec<String>,
    outputs: Vec<String>,
}

impl Step {
    fn open(machine: &Machine<'_>, mode: Mode, recipe: Recipe) -> Result<Self> {
        let mut device = (machine.open)(mode)?;
        let spec = spec(recipe);
        let plan = Plan::build(&record_step(&spec, Report::Losses)?, &device.plan_options())?;
        let outputs = plan.outputs.iter().map(|p| p.name.clone()).collect();
        let scalars = plan.scalars.clone();
        let id = device.load(plan)?;
        // Student and teacher start apart, or there would be nothing to agree on. Velocities start at zero, and the
        // features' network has no classifier.
        let known: Vec<String> = device.states().into_iter().map(|(name, _)| name).collect();
        for (seed, owner) in ["", "teacher.", "features."].into_iter().enumerate() {
            let params = spec.model.params().into_iter().map(|p| state_name(owner, StateKind::Param, &p.name));
            let start = |name: &str, len| vec![if name.ends_with("var") { 1.0 } else { 0.0 }; len];
            let buffers = spec.model.buffers().into_iter();
            let buffers = buffers.map(|(name, len)| (state_name(owner, StateKind::Buffer, &name), start(&name, len)));
            let all = params.zip(he_init(&spec.model, seed as u64, 0)).chain(buffers);
            for (name, values) in all.filter(|(name, _)| known.contains(name)) {
                device.write_state(&name, HostSlice::F32(&values))?;
            }
        }
        Ok(Step { device, id, scalars, outputs })
    }

    fn write_images(&mut self, pictures: &Pictures, step: u64) -> Result<()> {
        self.device.write_input(self.id, "x", HostSlice::F32(&pictures.batch(&crops(step))))?;
        Ok(())
    }

    /// Writes all inputs of a step but the images, and queues it.
    fn begin(&mut self, step: u64) -> Result<()> {
        let mut rng = stream(11, Purpose::Test, step, 1);
        let y: Vec<i32> = (0..BATCH).map(|_| below(CLASSES as u64, &mut rng) as i32).collect();
        let ranks = draw_ranks(BATCH, NEIGHBOURS, BATCH / 2, BRANCHES, &mut rng);
        self.device.write_input(self.id, "y", HostSlice::I32(&y))?;
        self.device.write_input(self.id, "ranks", HostSlice::I32(&ranks))?;
        self.device.write_input(self.id, "class_weight", HostSlice::F32(&[1.0 / BATCH as f32; BATCH]))?;
        // Other numbers in every step: a graph must not keep those of the first.
        let moved = step as f64 / 100.0;
        let (lr, eta, gamma) = (0.05 + moved, 0.3 + moved, 0.9 + moved);
        let scalars =
            StepScalars { lr, momentum: 0.9, weight_decay: 1e-3, eta, gamma, lambda: 1.0, scales: Scales::NONE };
        let scalars: Vec<f64> = scalars.in_order(&self.scalars).collect();
        self.device.run(self.id, &scalars)
    }

    /// The outputs of the step that ran last which are not the same on `other`, or no numbers.
    fn different_outputs(&self, other: &Step, step: u64) -> Result<Vec<String>> {
        let read = |of: &Step, name: &str| of.device.read_output(of.id, name);
        different(&self.outputs, &format!("output of step {step}"), |name| Ok((read(self, name)?, read(other, name)?)))
    }

    /// The states that are not the same on `other`, or no numbers.
    fn different_states(&self, other: &Step) -> Result<Vec<String>> {
        let names: Vec<String> = self.device.states().into_iter().map(|(name, _)| name).collect();
        let what = format!("state after {STEPS} steps");
        different(&names, &what, |name| Ok((self.device.read_state(name)?, other.device.read_state(name)?)))
    }
}

fn different(names: &[String], what: &str, read: impl Fn(&str) -> Result<(HostVec, HostVec)>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for name in names {
        let (a, b) = read(name)?;
        if !same_bits(&a, &b) {
            found.push(format!("{what}: {name} has other bits"));
        }
        // Two devices that compute nothing but NaN agree, too.
        if !a.to_f64().iter().all(|x| x.is_finite()) {
            found.push(format!("{what}: {name} is not finite"));
        }
    }
    if names.is_empty() {
        return Err(Error::usage(format_args!("{what}: there is none to compare")));
    }
    Ok(found)
}

fn spec(recipe: Recipe) -> StepSpec {
    let model = ModelSpec {
        arch: Arch::PreactResnet,
        in_channels: CHANNELS,
        size: SIZE,
        classes: CLASSES,
        widths: vec![6, 8],
        blocks: vec![1, 1],
    };
    StepSpec {
        model,
        batch: BATCH,
        synthetic: Synthetic::Transfer { neighbours: NEIGHBOURS },
        branches: BRANCHES,
        recipe,
        kl: KlScale::BatchMean,
        alpha: 0.1,
        mentor: false,
        first_order: false,
        scaled: false,
    }
}

/// A small set of images.
struct Pictures {
    bytes: Vec<u8>,
    /// `[C, 256]`.
    table: Vec<f32>,
}

impl Pictures {
    fn new() -> Self {
        let mut rng = stream(11, Purpose::Test, 0, 2);
        let bytes = (0..IMAGES * CHANNELS * PIXELS).map(|_| below(256, &mut rng) as u8).collect();
        let value = |i: usize| ((i % 256) as f32 / 255.0 - 0.4) / (0.2 + 0.1 * (i / 256) as f32);
        Pictures { bytes, table: (0..CHANNELS * 256).map(value).collect() }
    }

    fn image(&self, i: usize) -> &[u8] {
        &self.bytes[i * CHANNELS * PIXELS..][..CHANNELS * PIXELS]
    }

    /// The batch `[k, C, H, W]` that `crops` show, see [`Crop`].
    fn batch(&self, crops: &[Crop]) -> Vec<f32> {
        let [height, width] = SIZE.map(|size| size as i32);
        let mut batch = Vec::with_capacity(crops.len() * CHANNELS * PIXELS);
        for crop in crops {
            let image = self.image(crop.image as usize);
            for c in 0..CHANNELS {
                for i in 0..PIXELS as i32 {
                    let (h, w) = (i / width, i % width);
                    let from_left = if crop.flip == 1 { width - 1 - w } else { w };
                    let (row, column) = (crop.row + h, crop.column + from_left);
                    let inside = (0..height).contains(&row) && (0..width).contains(&column);
                    let at = c * PIXELS + (row * width + column).max(0) as usize;
                    // The filling is a pixel of 0, which normalisation moves like any other.
                    let byte = if inside { usize::from(image[at]) } else { 0 };
                    batch.push(self.table[c * 256 + byte]);
                }
            }
        }
        batch
    }
}

/// What the samples of a step show.
fn crops(step: u64) -> Vec<Crop> {
    let mut rng = stream(11, Purpose::Test, step, 3);
    let mut draw = |n: u64| below(n, &mut rng) as i32;
    let crop = |_| Crop { image: draw(IMAGES as u64), row: draw(5) - 2, column: draw(5) - 2, flip: draw(2) };
    (0..BATCH).map(crop).collect()
}
