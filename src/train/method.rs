//! What a method is: the parts of a run, in order, and what a step of each part does.
//!
//! A new method is a variant of [`Method`], its parts in [`parts`], and for a new kind of step a variant of [`Phase`]
//! with its arms here.

use super::choice::{Method, Recipe};
use super::config::Config;
use super::engine::{Network, step_spec};
use super::loss_scale::Passes;
use super::metrics::Phase;
use crate::error::Result;
use crate::mlnt::{
    CeSpec, Report, Scales, StepScalars, StepSpec, Synthetic, record_ce_step, record_descent, record_filtered_ce_step,
    record_logits, record_step,
};
use crate::model::ModelSpec;
use crate::tape::Tape;

/// A part of a run: epochs of one kind of step, from fresh weights to the end of the schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// What its steps do.
    pub phase: Phase,
    /// Its number of epochs.
    pub epochs: usize,
    /// Which iteration of the method it is, from 1; `None` for a part that prepares the method or is compared with it.
    pub iteration: Option<usize>,
    /// Iterations of the run.
    pub iterations: usize,
}

/// The parts of a run, in order.
pub fn parts(config: &Config) -> Vec<Part> {
    let part = |phase, epochs, iteration| Part { phase, epochs, iteration, iterations: config.iterations };
    let mut list = Vec::new();
    if !config.no_baseline && config.method != Method::Ce {
        list.push(part(Phase::CrossEntropy, config.epochs, None));
    }
    let phase = match config.method {
        Method::Mlnt | Method::MlntFirstOrder => {
            list.push(part(Phase::Features, config.feature_epochs, None));
            Phase::Mlnt
        }
        Method::Ce => Phase::CrossEntropy,
        Method::IterativeCe => Phase::IterativeCe,
        Method::JointOpt => {
            list.push(part(Phase::JointLabels, config.epochs, None));
            Phase::JointOpt
        }
        Method::Elr => Phase::Elr,
        Method::CoTeaching => Phase::CoTeaching,
    };
    list.extend((1..=config.iterations).map(|i| part(phase, config.epochs, Some(i))));
    list
}

impl Part {
    /// The iteration before, counted from 1, whose best network is the mentor of this part.
    pub fn before(&self) -> Option<usize> {
        self.iteration.and_then(|i| i.checked_sub(1)).filter(|i| *i > 0)
    }

    /// Number of this part's draws of starting weights: iterations start apart, all else starts alike.
    pub fn draw(&self) -> u64 {
        self.before().unwrap_or(0) as u64
    }

    /// The number of an epoch (from 0) in the streams of random numbers, which go on from iteration to iteration.
    pub fn stream_epoch(&self, epoch: usize) -> u64 {
        self.draw() * self.epochs as u64 + epoch as u64
    }

    /// Whether the mentor has a part in its steps.
    pub fn mixes_mentor(&self) -> bool {
        self.phase == Phase::Mlnt && self.before().is_some()
    }

    /// Its name in a sentence, with the iteration where there are several.
    pub fn title(&self) -> String {
        match self.iteration {
            Some(i) if self.iterations > 1 => format!("{} {i}/{}", self.phase.title(), self.iterations),
            _ => self.phase.title().to_string(),
        }
    }
}

/// Where a step stands, for its scalars.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Epoch within the part, from 0.
    pub epoch: usize,
    /// Epochs gone, with the fraction of this one.
    pub progress: f64,
    /// False when nothing of the batch is kept.
    pub kept: bool,
}

impl Phase {
    /// The networks that it trains and evaluates. SGD moves the first, in co-teaching both; elsewhere a second one follows it.
    pub fn networks(self) -> &'static [Network] {
        match self {
            Phase::CrossEntropy => &[Network::Baseline],
            Phase::Features => &[Network::Features],
            Phase::Mlnt | Phase::IterativeCe => &[Network::Student, Network::Teacher],
            Phase::JointLabels => &[Network::Labeller],
            Phase::JointOpt | Phase::Elr => &[Network::Student],
            Phase::CoTeaching => &[Network::Student, Network::Peer],
        }
    }

    /// What its networks are to each other, in their order; nothing to say of a single one.
    pub fn roles(self) -> &'static [&'static str] {
        match self {
            Phase::Mlnt | Phase::IterativeCe => &["student", "teacher"],
            Phase::CoTeaching => &["network 1", "network 2"],
            _ => &[""],
        }
    }

    /// Whether the host computes the loss of its steps from the logits, see [`by_logits`](super::by_logits).
    pub fn by_logits(self) -> bool {
        matches!(self, Phase::JointLabels | Phase::JointOpt | Phase::Elr | Phase::CoTeaching)
    }

    /// Its name in a sentence.
    pub fn title(self) -> &'static str {
        match self {
            Phase::CrossEntropy => "cross entropy",
            Phase::Features => "feature network",
            Phase::Mlnt => "MLNT",
            Phase::IterativeCe => "iterative CE",
            Phase::JointLabels => "joint-opt labels",
            Phase::JointOpt => "joint-opt",
            Phase::Elr => "ELR",
            Phase::CoTeaching => "co-teaching",
        }
    }

    /// The flags whose values make its steps smaller.
    pub fn step_sizes(self) -> &'static str {
        match self {
            Phase::CrossEntropy | Phase::IterativeCe | Phase::JointOpt | Phase::CoTeaching => "--lr",
            Phase::JointLabels => "--joint-lr",
            Phase::Elr => "--lr or --elr-lambda",
            Phase::Features => "--feature-lr",
            Phase::Mlnt => "--lr, --alpha or --eta",
        }
    }

    /// The backward passes of its steps that have a scale of their own.
    pub(super) fn passes(self, config: &Config) -> Passes {
        match self {
            Phase::Mlnt => Passes::of_mlnt(config.is_first_order()),
            _ => Passes::Inner,
        }
    }

    /// Learning rate β in epoch `epoch` (from 0).
    pub fn lr_at(self, config: &Config, epoch: usize) -> f64 {
        match self {
            Phase::Features => config.feature_lr,
            Phase::JointLabels => config.joint_lr,
            _ => config.lr_at(epoch),
        }
    }

    /// Records a step; with `mentor`, one that mixes the mentor into its target. Inputs are some of `x`, `y`,
    /// `class_weight`, `ranks`, scalars those of [`StepScalars`], outputs at least `class_loss` and `class_logits`.
    ///
    /// Of a step [`by_logits`](Phase::by_logits) this is the second plan, of [`record_descent`], without outputs;
    /// [`Phase::record_look`] is the first.
    ///
    /// # Errors
    /// When the description is no network.
    pub fn record(self, config: &Config, model: &ModelSpec, mentor: bool) -> Result<Tape> {
        let Config { batch, momentum, weight_decay, .. } = *config;
        let spec = CeSpec { model: model.clone(), batch, momentum, weight_decay, scaled: config.scaled() };
        let ce = |network: Network| record_ce_step(&spec, network.owner());
        match self {
            Phase::CrossEntropy => ce(Network::Baseline),
            Phase::Features => ce(Network::Features),
            Phase::IterativeCe => record_filtered_ce_step(model, config.batch, config.scaled()),
            Phase::JointLabels | Phase::JointOpt | Phase::Elr | Phase::CoTeaching => {
                record_descent(&spec, &self.owners())
            }
            Phase::Mlnt => {
                let synthetic = Synthetic::Transfer { neighbours: config.neighbours };
                let step = StepSpec { synthetic, mentor, ..step_spec(config, model.clone()) };
                record_step(&step, Report::Losses)
            }
        }
    }

    /// Records the forward that a step [`by_logits`](Phase::by_logits) begins with; `None` for other steps.
    ///
    /// # Errors
    /// As [`Phase::record`].
    pub fn record_look(self, config: &Config, model: &ModelSpec) -> Result<Option<Tape>> {
        self.by_logits().then(|| record_logits(model, config.batch, &self.owners())).transpose()
    }

    fn owners(self) -> Vec<&'static str> {
        self.networks().iter().map(|network| network.owner()).collect()
    }

    /// The scalars of a step. Where nothing of the batch is kept, SGD has only the meta-gradient to go by: in the joint
    /// recipe it goes by that, elsewhere it does nothing.
    pub fn scalars(self, config: &Config, at: Moment) -> StepScalars {
        let scalars = StepScalars {
            lr: self.lr_at(config, at.epoch),
            momentum: config.momentum,
            weight_decay: config.weight_decay,
            eta: config.eta_at(at.progress),
            gamma: config.gamma_at(at.epoch),
            lambda: config.lambda_at(at.progress),
            scales: Scales::NONE,
        };
        let joint = self == Phase::Mlnt && config.recipe == Recipe::Released;
        if at.kept || joint { scalars } else { scalars.without_sgd() }
    }
}
