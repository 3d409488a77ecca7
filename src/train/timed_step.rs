//! An MLNT step outside a run, to be timed: its scales are found from the data as in training, and only steps that were taken count.

use super::loss_scale::{LossScale, Passes};
use crate::device::{Device, PlanId};
use crate::error::{Error, Result};
use crate::mlnt::{Scales, StepScalars};
use crate::plan::Plan;

/// A step of a plan on a device.
pub struct TimedStep {
    plan: PlanId,
    names: Vec<String>,
    scalars: StepScalars,
    scaled: bool,
    passes: Passes,
    /// None before it is found, and where nothing is scaled.
    scale: Option<LossScale>,
    overflows: usize,
    loss: Vec<f64>,
    finite: Vec<f64>,
}

impl TimedStep {
    /// The step of `plan`, to be loaded on `device` as this. Nothing is scaled until [`TimedStep::find_scales`]; the scales of `scalars` do
    /// not count.
    ///
    /// # Errors
    /// When the device refuses the plan.
    pub fn load(device: &mut dyn Device, plan: Plan, first_order: bool, scalars: StepScalars) -> Result<Self> {
        let (names, scaled) = (plan.scalars.clone(), plan.output("finite").is_some());
        let passes = Passes::of_mlnt(first_order);
        let scalars = StepScalars { scales: Scales::NONE, ..scalars };
        let (scale, overflows, loss, finite) = (None, 0, Vec::new(), Vec::new());
        Ok(TimedStep { plan: device.load(plan)?, names, scalars, scaled, passes, scale, overflows, loss, finite })
    }

    /// The plan.
    pub fn plan(&self) -> PlanId {
        self.plan
    }

    /// Finds the scales from the inputs that are written, as training does from its first batch; no step is taken. Nothing where the
    /// step has no scales.
    ///
    /// # Errors
    /// When the device fails.
    pub fn find_scales(&mut self, device: &mut dyn Device) -> Result<()> {
        if self.scaled {
            self.scale = Some(LossScale::find(self.passes, |scales| {
                device.run(self.plan, &self.values(scales))?;
                Ok(device.read_output(self.plan, "finite")?.to_f64()[0] != 0.0)
            })?);
        }
        Ok(())
    }

    /// The scales of the next step.
    pub fn scales(&self) -> Scales {
        self.scale.map_or(Scales::NONE, |scale| scale.scales())
    }

    /// The runtime scalars of the next step, in the plan's order.
    pub fn scalars(&self) -> Vec<f64> {
        self.values(self.scales())
    }

    fn values(&self, scales: Scales) -> Vec<f64> {
        StepScalars { scales, ..self.scalars }.in_order(&self.names).collect()
    }

    /// Attempts that overflowed and were not taken.
    pub fn overflows(&self) -> usize {
        self.overflows
    }

    /// One attempt at a step: what `run`, which is given the runtime scalars, returns. `None` when the step overflowed and was not taken:
    /// the scales are lower now, and the same inputs must be written and tried again.
    ///
    /// # Errors
    /// When the device fails, and [`Error::Diverged`] when no lower scales would help or the loss is not finite: then times mean nothing.
    pub fn attempt<T>(
        &mut self,
        device: &mut dyn Device,
        run: impl FnOnce(&mut dyn Device, PlanId, &[f64]) -> Result<T>,
    ) -> Result<Option<T>> {
        let found = run(device, self.plan, &self.scalars())?;
        let of_scales = self.scaled.then_some(("finite", &mut self.finite));
        device.read_outputs_into(self.plan, &mut std::iter::once(("class_loss", &mut self.loss)).chain(of_scales))?;
        if self.scaled && self.finite[0] == 0.0 {
            self.overflows += 1;
            self.scale = self.scale.and_then(|scale| scale.lowered(false));
            return match self.scale {
                Some(_) => Ok(None),
                None => {
                    Err(Error::Diverged("a timed step overflows whatever its scales: its time means nothing".into()))
                }
            };
        }
        match self.loss[0].is_finite() {
            true => Ok(Some(found)),
            false => {
                Err(Error::Diverged(format!("the loss of a timed step is {}: its time means nothing", self.loss[0])))
            }
        }
    }
}
