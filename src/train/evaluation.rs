//! Networks in evaluation mode: their plans, and what they say of a whole set of images.

use super::engine::Network;
use super::prepare::LabelledSet;
use crate::data::{Augment, Batcher, Normalise};
use crate::device::{Device, HostSlice, PlanId};
use crate::error::{Error, Result};
use crate::mlnt::record_eval;
use crate::model::ModelSpec;
use crate::plan::{Plan, PlanOptions};
use std::iter::once;

/// Images per forward pass of an evaluation.
const EVAL_BATCH: usize = 250;

/// The evaluation plans of a run's networks.
pub(super) struct Evaluations {
    plans: Vec<(Network, PlanId)>,
    classes: usize,
}

impl Evaluations {
    /// Loads a plan for each of `networks`, which may be named more than once.
    ///
    /// # Errors
    /// When the device refuses a plan.
    pub fn load(
        device: &mut dyn Device,
        model: &ModelSpec,
        networks: impl Iterator<Item = Network>,
        options: &PlanOptions,
    ) -> Result<Self> {
        let mut plans: Vec<(Network, PlanId)> = Vec::new();
        for network in networks {
            if plans.iter().all(|(n, _)| *n != network) {
                let plan = Plan::build(&record_eval(model, EVAL_BATCH, network.owner())?, options)?;
                plans.push((network, device.load(plan)?));
            }
        }
        Ok(Evaluations { plans, classes: model.classes })
    }

    fn of(&self, network: Network) -> Option<PlanId> {
        self.plans.iter().find(|(n, _)| *n == network).map(|(_, id)| *id)
    }

    /// Probability that a network, with its running statistics, gives to the label of each sample of a set.
    ///
    /// # Errors
    /// When the network has no plan, or the device fails.
    pub fn label_probabilities(
        &self,
        device: &mut dyn Device,
        network: Network,
        set: &LabelledSet,
        normalise: &Normalise,
    ) -> Result<Vec<f64>> {
        let Some(id) = self.of(network) else {
            return Err(Error::shape("evaluation", format_args!("no plan for the network {:?}", network.owner())));
        };
        let mut given = Vec::with_capacity(set.len());
        for_each_batch(device, id, EVAL_BATCH, set, normalise, |range, probabilities| {
            let rows = probabilities.chunks_exact(self.classes);
            given.extend(rows.zip(&set.labels[range]).map(|(p, y)| p[*y as usize]));
            Ok(())
        })?;
        Ok(given)
    }

    /// Accuracy of a network on a set, with its running statistics; `None` for an empty set, or a network without a plan.
    ///
    /// # Errors
    /// When the device fails.
    pub fn accuracy(
        &self,
        device: &mut dyn Device,
        network: Network,
        set: &LabelledSet,
        normalise: &Normalise,
    ) -> Result<Option<f64>> {
        let Some(id) = self.of(network).filter(|_| !set.is_empty()) else { return Ok(None) };
        let mut correct = 0;
        for_each_batch(device, id, EVAL_BATCH, set, normalise, |range, probabilities| {
            let predicted = probabilities.chunks_exact(self.classes).map(argmax);
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
        device.read_outputs_into(plan, &mut once(("probabilities", &mut probabilities)))?;
        let classes = probabilities.len() / batch;
        use_batch(from..to, &probabilities[..(to - from) * classes])?;
    }
    Ok(())
}

/// Position of the largest value, the first on ties.
pub fn argmax(values: &[f64]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best })
}
