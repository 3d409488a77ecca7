//! The networks of a run on a device: their plans and states.

use super::by_logits::Descent;
use super::choice;
use super::config::Config;
use super::evaluation::{Evaluations, argmax};
use super::feed::Images;
use super::group::Group;
use super::loss_scale::{LossScale, Passes};
use super::method::{Part, parts};
use super::metrics::Phase;
use super::prepare::LabelledSet;
use crate::data::Normalise;
use crate::device::{Crop, Device, HostSlice, HostVec, ImagesId, PlanId};
use crate::error::{Error, Result};
use crate::mlnt::losses::cross_entropy;
use crate::mlnt::{
    KlScale, Recipe, StateKind, StepScalars, StepSpec, Synthetic, gradient_name, logits_name, state_name,
};
use crate::model::{ModelSpec, he_init};
use crate::plan::PlanOptions;
use crate::tape::Tape;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::iter::once;

/// One of the networks of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// The cross-entropy comparison.
    Baseline,
    /// The network whose features define the neighbours.
    Features,
    /// The network that the method trains.
    Student,
    /// Its moving average.
    Teacher,
    /// The best network of the iteration before.
    Mentor,
    /// The network of joint optimisation whose predictions become the labels.
    Labeller,
    /// The second network of co-teaching, in the teacher's place in all files; it starts from other weights.
    Peer,
}

impl Network {
    /// Prefix of its states.
    pub fn owner(self) -> &'static str {
        match self {
            Network::Baseline => "cross_entropy.",
            Network::Features => "features.",
            Network::Student => "",
            Network::Teacher => "teacher.",
            Network::Mentor => "mentor.",
            Network::Labeller => "labeller.",
            Network::Peer => "peer.",
        }
    }
}

/// What a training step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Cross entropy on the given labels, mean over those samples of the batch that are kept.
    pub loss: f64,
    /// What the step goes down on, where the host computes it from the logits.
    pub objective: Option<f64>,
    /// `L_meta = (1/M) Σ J_m`.
    pub meta_loss: Option<f64>,
    /// Samples whose given label the training-mode forward predicted.
    pub correct: usize,
    /// False when a gradient overflowed, so that all states kept their values.
    pub taken: bool,
}

/// What the steps of a run need to know of its settings, as the plan takes it, with synthetic labels given from outside:
/// the cost of finding them is no part of the method's.
pub fn step_spec(config: &Config, model: ModelSpec) -> StepSpec {
    let (recipe, kl) = match config.recipe {
        choice::Recipe::Paper => (Recipe::Sequential, KlScale::BatchMean),
        choice::Recipe::Released => (Recipe::Joint, KlScale::Mean),
    };
    StepSpec {
        model,
        batch: config.batch,
        synthetic: Synthetic::Given,
        branches: config.branches,
        recipe,
        kl,
        alpha: config.alpha,
        mentor: false,
        first_order: config.is_first_order(),
        scaled: config.scaled(),
    }
}

/// Plans and states of all networks of a run.
pub struct Engine {
    device: Box<dyn Device>,
    model: ModelSpec,
    steps: Vec<Step>,
    evaluations: Evaluations,
    kept: Kept,
}

/// What a step hands over to the device and gets back, kept so that the next step need not allocate it.
#[derive(Default)]
struct Kept {
    scalars: Vec<f64>,
    finite: Vec<f64>,
    class_loss: Vec<f64>,
    consistency: Vec<f64>,
    class_logits: Vec<f64>,
    losses: Vec<f32>,
    logits: Vec<Vec<f64>>,
    descent: Descent,
}

/// The plans of a kind of step.
struct Step {
    phase: Phase,
    mentor: bool,
    /// The forward whose logits the host computes the loss from, if it does, and the names of these logits.
    look: Option<(Loaded, Vec<String>)>,
    learn: Loaded,
}

/// A plan on the device, and what it wants to be given.
struct Loaded {
    id: PlanId,
    inputs: Vec<String>,
    scalars: Vec<String>,
    scaled: bool,
    passes: Passes,
}

/// How the plans of a kind of step are built.
struct Options {
    plan: PlanOptions,
    group: Group,
    passes: Passes,
}

impl Loaded {
    fn new(device: &mut dyn Device, tape: &Tape, options: &Options) -> Result<Self> {
        let plan = options.group.plan(tape, &options.plan, device.machine())?;
        let inputs = plan.inputs.iter().map(|port| port.name.clone()).collect();
        let scalars = plan.scalars.clone();
        let scaled = plan.output("finite").is_some();
        Ok(Loaded { id: device.load(plan)?, inputs, scalars, scaled, passes: options.passes })
    }
}

/// What a step may read; each kind of step takes what it needs.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs<'a> {
    /// Images `[k, C, H, W]`.
    pub x: Images<'a>,
    /// Given labels `[k]`.
    pub y: &'a [i32],
    /// Weights of the samples in the classification loss `[k]`.
    pub class_weight: &'a [f64],
    /// Ranks of neighbours `[M, k]`, see [`draw_ranks`](crate::mlnt::draw_ranks).
    pub ranks: &'a [i32],
}

/// The step of a part.
fn find<'a>(steps: &'a [Step], part: &Part) -> Result<&'a Step> {
    let found = steps.iter().find(|s| (s.phase, s.mentor) == (part.phase, part.mixes_mentor()));
    found.ok_or_else(|| Error::shape("step", format_args!("no plan for {}", part.title())))
}

impl Engine {
    /// Builds the plans of all parts of a run and gives every network its starting values.
    ///
    /// # Errors
    /// When the device refuses a plan.
    pub fn new(mut device: Box<dyn Device>, config: &Config, model: ModelSpec) -> Result<Self> {
        let (parts, plan_options) = (parts(config), device.plan_options());
        let mut steps: Vec<Step> = Vec::new();
        for part in &parts {
            let (phase, mentor) = (part.phase, part.mixes_mentor());
            if steps.iter().any(|s| (s.phase, s.mentor) == (phase, mentor)) {
                continue;
            }
            let options = Options { plan: plan_options, group: config.group, passes: phase.passes(config) };
            let look = phase.record_look(config, &model)?;
            let look = look.map(|tape| Loaded::new(&mut *device, &tape, &options)).transpose()?;
            let look = look.map(|plan| (plan, (0..phase.networks().len()).map(logits_name).collect()));
            let learn = Loaded::new(&mut *device, &phase.record(config, &model, mentor)?, &options)?;
            steps.push(Step { phase, mentor, look, learn });
        }
        let trained = parts.iter().flat_map(|part| part.phase.networks()).copied();
        let mentor = parts.iter().any(|part| part.before().is_some()).then_some(Network::Mentor);
        let evaluated = trained.filter(|n| *n != Network::Features).chain(mentor);
        let evaluations = Evaluations::load(&mut *device, &model, evaluated, &plan_options)?;
        let mut engine = Engine { device, model, steps, evaluations, kept: Kept::default() };
        for part in &parts {
            engine.start(part.phase.networks(), config.seed, 0)?;
        }
        Ok(engine)
    }

    /// Starting values for `networks`, the same for each but co-teaching's second: He initialisation of this number of
    /// the `draw`, running statistics of a unit normal, no velocity.
    ///
    /// # Errors
    /// When the device fails.
    pub fn start(&mut self, networks: &[Network], seed: u64, draw: u64) -> Result<()> {
        let states: HashSet<String> = self.device.states().into_iter().map(|(name, _)| name).collect();
        for network in networks {
            let values = he_init(&self.model, seed, draw + u64::from(*network == Network::Peer));
            for (param, value) in self.model.params().iter().zip(&values) {
                let name = |kind| state_name(network.owner(), kind, &param.name);
                self.device.write_state(&name(StateKind::Param), HostSlice::F32(value))?;
                let velocity = name(StateKind::Momentum);
                if states.contains(&velocity) {
                    self.device.write_state(&velocity, HostSlice::F32(&vec![0.0; value.len()]))?;
                }
            }
            for (name, len) in self.model.buffers() {
                let start = if name.ends_with("var") { 1.0 } else { 0.0 };
                let name = state_name(network.owner(), StateKind::Buffer, &name);
                self.device.write_state(&name, HostSlice::F32(&vec![start; len]))?;
            }
        }
        Ok(())
    }

    /// The network's description.
    pub fn model(&self) -> &ModelSpec {
        &self.model
    }

    /// The device.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// The device, to write states.
    pub fn device_mut(&mut self) -> &mut dyn Device {
        &mut *self.device
    }

    /// The name of a state that holds a value which is not finite, if there is one.
    ///
    /// # Errors
    /// When the device fails.
    pub fn not_finite(&self) -> Result<Option<String>> {
        for (name, _) in self.device.states() {
            let finite = match self.device.read_state(&name)? {
                HostVec::F32(v) => v.iter().all(|x| x.is_finite()),
                HostVec::F64(v) => v.iter().all(|x| x.is_finite()),
                HostVec::I32(_) => true,
            };
            if !finite {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Begins to make the images of the next step of `part` on the device.
    ///
    /// # Errors
    /// As [`Device::stage`].
    pub fn stage(&mut self, part: &Part, images: ImagesId, crops: &[Crop]) -> Result<()> {
        let Step { look, learn, .. } = find(&self.steps, part)?;
        let mut plans = look.iter().map(|(plan, _)| plan).chain([learn]);
        plans.try_for_each(|plan| self.device.stage(images, plan.id, "x", crops))
    }

    /// Writes the inputs of the next step of `part`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn write(&mut self, part: &Part, inputs: StepInputs<'_>) -> Result<()> {
        let Engine { device, steps, .. } = self;
        let step = &find(steps, part)?.learn;
        for name in &step.inputs {
            let values = match (name.as_str(), inputs.x) {
                ("x", Images::Staged) => continue,
                ("x", Images::Host(x)) => HostSlice::F32(x),
                ("y", _) => HostSlice::I32(inputs.y),
                ("class_weight", _) => HostSlice::F64(inputs.class_weight),
                ("ranks", _) => HostSlice::I32(inputs.ranks),
                (other, _) => return Err(Error::shape("step", format_args!("nothing is known of an input {other}"))),
            };
            device.write_input(step.id, name, values)?;
        }
        Ok(())
    }

    /// Begins a step of `part` on the inputs that were written last; [`Engine::outcome`] waits for it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin(&mut self, part: &Part, scalars: StepScalars) -> Result<()> {
        let Engine { device, kept, steps, .. } = self;
        let step = &find(steps, part)?.learn;
        kept.scalars.clear();
        kept.scalars.extend(scalars.in_order(&step.scalars));
        device.run(step.id, &kept.scalars)
    }

    /// The scales of cotangents that the next step of `part`, whose inputs are written, calls for, after those that steps before it called
    /// for. It is not taken.
    ///
    /// # Errors
    /// When the device fails.
    pub(super) fn find_scale(
        &mut self,
        part: &Part,
        scalars: StepScalars,
        before: Option<LossScale>,
    ) -> Result<LossScale> {
        let passes = find(&self.steps, part)?.learn.passes;
        let finite = |scales| {
            self.begin(part, StepScalars { scales, ..scalars })?;
            self.was_finite(part)
        };
        match before {
            None => LossScale::find(passes, finite),
            Some(before) => before.with_step(finite),
        }
    }

    /// Whether the gradients of the step of `part` that was begun last are finite; true where they are not scaled.
    ///
    /// # Errors
    /// When the device fails.
    pub fn was_finite(&mut self, part: &Part) -> Result<bool> {
        let step = &find(&self.steps, part)?.learn;
        if !step.scaled {
            return Ok(true);
        }
        let Kept { finite, .. } = &mut self.kept;
        self.device.read_outputs_into(step.id, &mut once(("finite", finite)))?;
        Ok(self.kept.finite[0] != 0.0)
    }

    /// Begins a step of `part` whose loss the host computes: the logits `[k, classes]` of each of its networks, in
    /// training mode, for the gradients that [`Engine::write_descent`] takes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn look(&mut self, part: &Part, x: Images<'_>) -> Result<&[Vec<f64>]> {
        let Engine { device, kept, steps, .. } = self;
        let Step { look: Some((look, names)), learn, .. } = find(steps, part)? else {
            return Err(Error::shape("step", format_args!("{} is one plan", part.title())));
        };
        if let Images::Host(x) = x {
            device.write_input(look.id, "x", HostSlice::F32(x))?;
            device.write_input(learn.id, "x", HostSlice::F32(x))?;
        }
        device.run(look.id, &[])?;
        kept.logits.resize_with(names.len(), Vec::new);
        device.read_outputs_into(look.id, &mut names.iter().map(String::as_str).zip(&mut kept.logits))?;
        Ok(&kept.logits)
    }

    /// Writes where a step that [`Engine::look`] has begun goes down, for [`Engine::begin`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn write_descent(&mut self, part: &Part, descent: Descent) -> Result<()> {
        let Engine { device, kept, steps, .. } = self;
        let learn = &find(steps, part)?.learn;
        for (i, gradient) in descent.gradients.iter().enumerate() {
            device.write_input(learn.id, &gradient_name(i), HostSlice::F64(gradient))?;
        }
        kept.descent = descent;
        Ok(())
    }

    /// What the step of `part` with labels `y` that was begun last has come to.
    ///
    /// # Errors
    /// When the device fails.
    pub fn outcome(&mut self, part: &Part, y: &[i32]) -> Result<StepOutcome> {
        let learn = &find(&self.steps, part)?.learn;
        let Kept { finite, class_loss, consistency, class_logits, losses, logits, descent, .. } = &mut self.kept;
        let (by_logits, has_meta) = (part.phase.by_logits(), part.phase == Phase::Mlnt);
        let outputs = [
            (learn.scaled, ("finite", &mut *finite)),
            (!by_logits, ("class_loss", &mut *class_loss)),
            (has_meta, ("consistency", &mut *consistency)),
            (!by_logits, ("class_logits", &mut *class_logits)),
        ];
        // In one go: the host waits for the device once in a step.
        let outputs = outputs.into_iter().filter_map(|(there, output)| there.then_some(output));
        self.device.read_outputs_into(learn.id, &mut { outputs })?;
        let taken = !learn.scaled || finite[0] != 0.0;
        let meta_loss = has_meta.then(|| consistency.iter().sum::<f64>() / consistency.len() as f64);
        let (loss, objective, logits) = match by_logits {
            true => (descent.loss, Some(descent.objective), &logits[0]),
            false => (class_loss[0], None, &*class_logits),
        };
        let rows = || logits.chunks_exact(self.model.classes).zip(y);
        let correct = rows().filter(|(logits, y)| argmax(logits) == **y as usize).count();
        losses.clear();
        losses.extend(rows().map(|(logits, y)| cross_entropy(logits, *y as usize) as f32));
        Ok(StepOutcome { loss, objective, meta_loss, correct, taken })
    }

    /// Cross entropy of the given label of each sample of the step whose outcome was read last, nats.
    pub fn sample_losses(&self) -> &[f32] {
        &self.kept.losses
    }

    /// Probability that a network, with its running statistics, gives to the label of each sample of a set.
    ///
    /// # Errors
    /// When the device fails.
    pub fn label_probabilities(
        &mut self,
        network: Network,
        set: &LabelledSet,
        normalise: &Normalise,
    ) -> Result<Vec<f64>> {
        self.evaluations.label_probabilities(&mut *self.device, network, set, normalise)
    }

    /// Accuracy of a network on a set, with its running statistics; `None` for an empty set.
    ///
    /// # Errors
    /// When the device fails.
    pub fn accuracy(&mut self, network: Network, set: &LabelledSet, normalise: &Normalise) -> Result<Option<f64>> {
        self.evaluations.accuracy(&mut *self.device, network, set, normalise)
    }
}
