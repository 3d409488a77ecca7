//! The networks of a run on a device: their plans and states.

use super::config::Config;
use super::prepare::LabelledSet;
use crate::data::{Augment, Batcher, Normalise};
use crate::device::{Device, HostSlice, HostVec, PlanId};
use crate::error::Result;
use crate::mlnt::{
    CeSpec, KlScale, Neighbours, Recipe, Report, StateKind, StepScalars, StepSpec, record_ce_step, record_eval,
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

/// What the steps of a run need to know of its settings, as the plan takes it.
pub fn step_spec(config: &Config, model: ModelSpec) -> StepSpec {
    let (recipe, kl) = match config.recipe {
        super::choice::Recipe::Paper => (Recipe::Sequential, KlScale::BatchMean),
        super::choice::Recipe::Released => (Recipe::Joint, KlScale::Mean),
    };
    StepSpec {
        model,
        batch: config.batch,
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
    batch: usize,
    baseline: Loaded,
    features: Loaded,
    mlnt: Loaded,
    feature_eval: PlanId,
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
    features: Vec<f32>,
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
        let mlnt = load(record_step(&step_spec(config, model.clone()), Report::Losses)?)?;
        let feature_eval = load(record_eval(&model, config.batch, Network::Features.owner())?)?.id;
        let mut eval = |network: Network| -> Result<(Network, PlanId)> {
            Ok((network, load(record_eval(&model, EVAL_BATCH, network.owner())?)?.id))
        };
        let evals = [eval(Network::Baseline)?, eval(Network::Student)?, eval(Network::Teacher)?];
        let batch = config.batch;
        let weights = vec![1.0 / batch as f64; batch];
        let kept = Kept::default();
        let mut engine = Engine { device, model, batch, baseline, features, mlnt, feature_eval, evals, weights, kept };
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

    /// One SGD step on cross entropy; images `[k, C, H, W]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn ce_step(&mut self, network: Network, x: &[f32], y: &[i32], lr: f64) -> Result<StepOutcome> {
        let plan = if network == Network::Features { &self.features } else { &self.baseline };
        let id = plan.id;
        self.device.write_input(id, "x", HostSlice::F32(x))?;
        self.device.write_input(id, "y", HostSlice::I32(y))?;
        self.device.run(id, &[lr])?;
        self.outcome(id, y, false)
    }

    /// One MLNT step with synthetic labels `y_syn` `[M, k]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn mlnt_step(&mut self, x: &[f32], y: &[i32], y_syn: &[i32], scalars: StepScalars) -> Result<StepOutcome> {
        let id = self.mlnt.id;
        self.device.write_input(id, "x", HostSlice::F32(x))?;
        self.device.write_input(id, "y", HostSlice::I32(y))?;
        self.device.write_input(id, "y_syn", HostSlice::I32(y_syn))?;
        self.device.write_input(id, "class_weight", HostSlice::F64(&self.weights))?;
        self.kept.scalars.clear();
        self.kept.scalars.extend(scalars.in_order(&self.mlnt.scalars));
        self.device.run(id, &self.kept.scalars)?;
        self.outcome(id, y, true)
    }

    fn outcome(&mut self, id: PlanId, y: &[i32], meta: bool) -> Result<StepOutcome> {
        let Engine { device, kept: Kept { output, .. }, .. } = self;
        device.read_output_into(id, "class_loss", output)?;
        let loss = output[0];
        let mut meta_loss = None;
        if meta {
            device.read_output_into(id, "consistency", output)?;
            meta_loss = Some(output.iter().sum::<f64>() / output.len() as f64);
        }
        device.read_output_into(id, "class_logits", output)?;
        let predicted = output.chunks_exact(self.model.classes).map(argmax);
        let correct = predicted.zip(y).filter(|(p, y)| *p == **y as usize).count();
        Ok(StepOutcome { loss, meta_loss, correct })
    }

    /// Nearest neighbours within a batch by the features of the feature network.
    ///
    /// # Errors
    /// When the device fails.
    pub fn neighbours(&mut self, x: &[f32], count: usize) -> Result<Neighbours> {
        let id = self.feature_eval;
        self.device.write_input(id, "x", HostSlice::F32(x))?;
        self.device.run(id, &[])?;
        let Kept { output, features, .. } = &mut self.kept;
        self.device.read_output_into(id, "features", output)?;
        features.clear();
        features.extend(output.iter().map(|v| *v as f32));
        Ok(Neighbours::new(features, self.batch, self.model.features(), count))
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
