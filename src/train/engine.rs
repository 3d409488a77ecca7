//! The networks of a run on a device: their plans and states.

use super::config::Config;
use super::feed::Images;
use super::prepare::LabelledSet;
use crate::data::{Augment, Batcher, Normalise};
use crate::device::{Crop, Device, HostSlice, HostVec, ImagesId, PlanId};
use crate::error::Result;
use crate::mlnt::{
    CeSpec, KlScale, Recipe, Report, StateKind, StepScalars, StepSpec, Synthetic, record_ce_step, record_eval,
    record_step, state_name,
};
use crate::model::{ModelSpec, he_init};
use crate::plan::{Plan, PlanOptions};

/// Images per forward pass of an evaluation.
pub const EVAL_BATCH: usize = 250;

/// One of the networks of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// The cross-entropy comparison.
    Baseline,
    /// The network whose features define the neighbours.
    Features,
    /// MLNT's student.
    Student,
    /// MLNT's teacher.
    Teacher,
}

impl Network {
    /// Prefix of its states.
    pub fn owner(self) -> &'static str {
        match self {
            Network::Baseline => "cross_entropy.",
            Network::Features => "features.",
            Network::Student => "",
            Network::Teacher => "teacher.",
        }
    }
}

/// What a training step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Cross entropy on the given labels, mean over the batch.
    pub loss: f64,
    /// `L_meta = (1/M) Σ J_m`.
    pub meta_loss: Option<f64>,
    /// Samples whose given label the training-mode forward predicted.
    pub correct: usize,
}

/// What the steps of a run need to know of its settings, as the plan takes it, with synthetic labels given from outside:
/// the cost of finding them is no part of the method's.
pub fn step_spec(config: &Config, model: ModelSpec) -> StepSpec {
    let (recipe, kl) = match config.recipe {
        super::choice::Recipe::Paper => (Recipe::Sequential, KlScale::BatchMean),
        super::choice::Recipe::Released => (Recipe::Joint, KlScale::Mean),
    };
    StepSpec {
        model,
        batch: config.batch,
        synthetic: Synthetic::Given,
        branches: config.branches,
        recipe,
        kl,
        alpha: config.alpha,
        momentum: config.momentum,
        weight_decay: config.weight_decay,
        mentor: false,
        first_order: config.first_order,
    }
}

/// Plans and states of all networks of a run.
pub struct Engine {
    device: Box<dyn Device>,
    model: ModelSpec,
    baseline: Loaded,
    features: Loaded,
    mlnt: Loaded,
    evals: [(Network, PlanId); 3],
    /// `[k]` of 1/k: every sample of a batch counts alike.
    weights: Vec<f64>,
    kept: Kept,
}

/// What a step hands over to the device and gets back, kept so that the next step need not allocate it.
#[derive(Default)]
struct Kept {
    scalars: Vec<f64>,
    output: Vec<f64>,
}

/// A plan and the order of its scalars.
struct Loaded {
    id: PlanId,
    scalars: Vec<String>,
}

impl Engine {
    /// Builds all plans and gives every network its starting values.
    ///
    /// # Errors
    /// When the device refuses a plan.
    pub fn new(mut device: Box<dyn Device>, config: &Config, model: ModelSpec) -> Result<Self> {
        let mut load = |tape: crate::tape::Tape| -> Result<Loaded> {
            let plan = Plan::build(&tape, &PlanOptions::default())?;
            let scalars = plan.scalars.clone();
            Ok(Loaded { id: device.load(plan)?, scalars })
        };
        let ce = CeSpec {
            model: model.clone(),
            batch: config.batch,
            momentum: config.momentum,
            weight_decay: config.weight_decay,
        };
        let baseline = load(record_ce_step(&ce, Network::Baseline.owner())?)?;
        let features = load(record_ce_step(&ce, Network::Features.owner())?)?;
        let synthetic = Synthetic::Transfer { neighbours: config.neighbours };
        let step = StepSpec { synthetic, ..step_spec(config, model.clone()) };
        let mlnt = load(record_step(&step, Report::Losses)?)?;
        let mut eval = |network: Network| -> Result<(Network, PlanId)> {
            Ok((network, load(record_eval(&model, EVAL_BATCH, network.owner())?)?.id))
        };
        let evals = [eval(Network::Baseline)?, eval(Network::Student)?, eval(Network::Teacher)?];
        let weights = vec![1.0 / config.batch as f64; config.batch];
        let kept = Kept::default();
        let mut engine = Engine { device, model, baseline, features, mlnt, evals, weights, kept };
        engine.initialise(config.seed)?;
        Ok(engine)
    }

    /// The same starting values for every network: He initialisation, and running statistics of a unit normal.
    fn initialise(&mut self, seed: u64) -> Result<()> {
        let values = he_init(&self.model, seed);
        for network in [Network::Baseline, Network::Features, Network::Student, Network::Teacher] {
            for (param, value) in self.model.params().iter().zip(&values) {
                let name = state_name(network.owner(), StateKind::Param, &param.name);
                self.device.write_state(&name, HostSlice::F32(value))?;
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

    /// Begins to make the images of the next step of `network` on the device.
    ///
    /// # Errors
    /// As [`Device::stage`].
    pub fn stage(&mut self, network: Network, images: ImagesId, crops: &[Crop]) -> Result<()> {
        let id = self.training(network).id;
        self.device.stage(images, id, "x", crops)
    }

    fn training(&self, network: Network) -> &Loaded {
        match network {
            Network::Baseline => &self.baseline,
            Network::Features => &self.features,
            Network::Student | Network::Teacher => &self.mlnt,
        }
    }

    /// Begins one SGD step of `network` on cross entropy with labels `y` `[k]`; [`Engine::outcome`] waits for it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin_ce(&mut self, network: Network, x: Images<'_>, y: &[i32], lr: f64) -> Result<()> {
        let id = self.training(network).id;
        self.write_batch(id, x, y)?;
        self.device.run(id, &[lr])
    }

    /// Begins one MLNT step with ranks of neighbours `[M, k]`, see [`draw_ranks`](crate::mlnt::draw_ranks);
    /// [`Engine::outcome`] waits for it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin_mlnt(&mut self, x: Images<'_>, y: &[i32], ranks: &[i32], scalars: StepScalars) -> Result<()> {
        let id = self.mlnt.id;
        self.write_batch(id, x, y)?;
        self.device.write_input(id, "ranks", HostSlice::I32(ranks))?;
        self.device.write_input(id, "class_weight", HostSlice::F64(&self.weights))?;
        self.kept.scalars.clear();
        self.kept.scalars.extend(scalars.in_order(&self.mlnt.scalars));
        self.device.run(id, &self.kept.scalars)
    }

    fn write_batch(&mut self, id: PlanId, x: Images<'_>, y: &[i32]) -> Result<()> {
        if let Images::Host(x) = x {
            self.device.write_input(id, "x", HostSlice::F32(x))?;
        }
        self.device.write_input(id, "y", HostSlice::I32(y))?;
        Ok(())
    }

    /// What the step of `network` with labels `y` that was begun last has come to.
    ///
    /// # Errors
    /// When the device fails.
    pub fn outcome(&mut self, network: Network, y: &[i32]) -> Result<StepOutcome> {
        let id = self.training(network).id;
        let Engine { device, kept: Kept { output, .. }, .. } = self;
        device.read_output_into(id, "class_loss", output)?;
        let loss = output[0];
        let mut meta_loss = None;
        if network == Network::Student {
            device.read_output_into(id, "consistency", output)?;
            meta_loss = Some(output.iter().sum::<f64>() / output.len() as f64);
        }
        device.read_output_into(id, "class_logits", output)?;
        let predicted = output.chunks_exact(self.model.classes).map(argmax);
        let correct = predicted.zip(y).filter(|(p, y)| *p == **y as usize).count();
        Ok(StepOutcome { loss, meta_loss, correct })
    }

    /// Accuracy of a network on a set, with its running statistics; `None` for an empty set.
    ///
    /// # Errors
    /// When the device fails.
    pub fn accuracy(&mut self, network: Network, set: &LabelledSet, normalise: &Normalise) -> Result<Option<f64>> {
        let Some((_, id)) = self.evals.iter().find(|(n, _)| *n == network).copied() else { return Ok(None) };
        if set.is_empty() {
            return Ok(None);
        }
        let mut correct = 0;
        let classes = self.model.classes;
        for_each_batch(&mut *self.device, id, EVAL_BATCH, set, normalise, |range, probabilities| {
            let predicted = probabilities.chunks_exact(classes).map(argmax);
            correct += predicted.zip(&set.labels[range]).filter(|(p, y)| *p == **y as usize).count();
            Ok(())
        })?;
        Ok(Some(correct as f64 / set.len() as f64))
    }
}

/// Runs an evaluation plan of `batch` images over a whole set; `use_batch` gets the range of samples and their
/// probabilities `[n, classes]`. The last batch is filled up with the set's last image.
///
/// # Errors
/// When the device fails, and whatever `use_batch` returns.
pub fn for_each_batch(
    device: &mut dyn Device,
    plan: PlanId,
    batch: usize,
    set: &LabelledSet,
    normalise: &Normalise,
    mut use_batch: impl FnMut(std::ops::Range<usize>, &[f64]) -> Result<()>,
) -> Result<()> {
    let batcher = Batcher::new(&set.images, normalise, Augment::NONE, 0)?;
    let mut x = vec![0.0f32; batch * set.images.shape().numel()];
    let (mut indices, mut probabilities) = (Vec::with_capacity(batch), Vec::new());
    for from in (0..set.len()).step_by(batch) {
        let to = (from + batch).min(set.len());
        indices.clear();
        indices.extend((from..from + batch).map(|i| i.min(set.len() - 1) as u32));
        batcher.fill(0, &indices, &mut x)?;
        device.write_input(plan, "x", HostSlice::F32(&x))?;
        device.run(plan, &[])?;
        device.read_output_into(plan, "probabilities", &mut probabilities)?;
        let classes = probabilities.len() / batch;
        use_batch(from..to, &probabilities[..(to - from) * classes])?;
    }
    Ok(())
}

/// Position of the largest value, the first on ties.
pub fn argmax(values: &[f64]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best })
}
