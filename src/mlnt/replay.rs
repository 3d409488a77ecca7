//! Mask replay: an engine of any precision judged against double precision with the engine's own decisions forced.
//!
//! Where an operand of a ReLU is nearly 0, rounding decides on which side it falls, and so does the order of two nearly
//! equal operands of a max-pool. From there on the two runs compute different functions, and a tolerance wide enough
//! for that lets wrong code through. So the reference runs once more with the engine's decisions, and what is left is
//! rounding. A decision itself is right if the reference could have made it too: close to a tie.

use super::golden::{Deviation, Golden, Groups, StepResult, TOLERANCE_F64, deviations};
use crate::device::cpu::Cpu;
use crate::device::{Device, HostSlice, HostVec, PlanId};
use crate::error::{Error, Result};
use crate::ops::{Op, Window};
use crate::plan::{Plan, PlanOptions, Port};
use std::collections::BTreeMap;

/// Largest relative error of a group against the file, decisions being free, in tolerances of a group; and the least
/// and the greatest that this may come to. A few other decisions near a tie cost far more than all rounding: with
/// parameters and images rounded to 11 bits the velocities of the bottleneck step are off by 0.15, replayed by 7e-4.
const FREE: f64 = 100.0;
const FREE_BOUNDS: [f64; 2] = [0.1, 0.5];
/// Largest [`Replay::tie_distance`], in tolerances of a group: one element strays farther than many do on average.
const TIES: f64 = 10.0;

/// What every ReLU and max-pool of a step decided, by the names of [`crate::model::Scope::decisions`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decisions {
    /// `relu.*`: where the ReLU lets through.
    pub relus: BTreeMap<String, Vec<bool>>,
    /// `pool.*`: the position of the maximum in its image, `h·W + w`.
    pub pools: BTreeMap<String, Vec<i32>>,
}

/// How many decisions differ, and how many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Differences {
    /// Decisions that differ.
    pub differ: usize,
    /// All decisions.
    pub of: usize,
}

/// What came out of a step with forced decisions.
#[derive(Clone, Debug)]
pub struct Replay {
    /// The values.
    pub groups: Groups,
    /// How far the worst forced decision is from one that this run would have made itself: the largest difference
    /// between what it gives and what the other gives, from the same operand, over the root mean square of the latter.
    pub tie_distance: f64,
}

/// An engine's result beside the file's and those of double precision.
#[derive(Clone, Debug)]
pub struct Judgement {
    /// The engine against the file, by group.
    pub free: BTreeMap<String, Deviation>,
    /// The engine against double precision with the engine's decisions forced, by group.
    pub replayed: BTreeMap<String, Deviation>,
    /// ReLU decisions in which the engine and free double precision differ.
    pub relus: Differences,
    /// The same of max-pools.
    pub pools: Differences,
    /// [`Replay::tie_distance`] of the engine's decisions.
    pub tie_distance: f64,
    /// Whether free double precision gives what the file says.
    pub file_right: bool,
}

impl Golden {
    /// Judges what an engine made of this step.
    ///
    /// # Errors
    /// When the reference cannot run, or the engine's decisions are none of this step: a maximum outside its window.
    pub fn judge(&self, result: &StepResult) -> Result<Judgement> {
        let options = PlanOptions::default();
        let reference = self.run(&mut Cpu::<f64>::new(0)?, &options)?;
        let replay = self.replay(&mut Cpu::<f64>::new(0)?, &options, &result.decisions)?;
        Ok(Judgement {
            free: self.compare(result),
            replayed: deviations(&result.groups, &replay.groups),
            relus: differences(&result.decisions.relus, &reference.decisions.relus),
            pools: differences(&result.decisions.pools, &reference.decisions.pools),
            tie_distance: replay.tie_distance,
            file_right: within(&self.compare(&reference), TOLERANCE_F64),
        })
    }
}

impl Judgement {
    /// Whether the engine is right to within `tolerance`, the largest relative error of a group with forced decisions.
    pub fn pass(&self, tolerance: f64) -> bool {
        within(&self.replayed, tolerance)
            && self.tie_distance <= TIES * tolerance
            && within(&self.free, (FREE * tolerance).clamp(FREE_BOUNDS[0], FREE_BOUNDS[1]))
            && self.file_right
    }
}

impl Decisions {
    /// Reads them from a run with [`super::Report::Everything`], whose outputs are `reported`.
    pub(super) fn read(device: &dyn Device, id: PlanId, reported: &[String]) -> Result<Self> {
        let mut decisions = Decisions::default();
        for name in reported.iter().filter(|name| is_decision(name)) {
            match device.read_output(id, name)? {
                HostVec::I32(positions) => drop(decisions.pools.insert(name.clone(), positions)),
                result => {
                    let mask = result.to_f64().into_iter().map(|y| y > 0.0).collect();
                    decisions.relus.insert(name.clone(), mask);
                }
            }
        }
        Ok(decisions)
    }

    /// Refuses what cannot be decisions of `plan`, recorded with [`super::Report::Replay`].
    pub(super) fn check(&self, plan: &Plan) -> Result<()> {
        for port in plan.inputs.iter().filter(|port| is_decision(&port.name)) {
            let missing = || Error::shape("replay", format!("no decisions {}", port.name));
            let Some(window) = window_of(plan, port) else {
                self.relus.get(&port.name).ok_or_else(missing)?;
                continue;
            };
            let positions = self.pools.get(&port.name).ok_or_else(missing)?;
            let pooled = window.pooled.dims[2] * window.pooled.dims[3];
            if let Some(i) = (0..positions.len()).find(|i| !window.holds(i % pooled, positions[*i])) {
                let what = format!("{}: the maximum at {} lies outside its window", port.name, positions[i]);
                return Err(Error::shape("max_pool", what));
            }
        }
        Ok(())
    }

    /// Writes them to a plan recorded with [`super::Report::Replay`].
    pub(super) fn write(&self, device: &mut dyn Device, id: PlanId) -> Result<()> {
        for (name, mask) in &self.relus {
            let mask: Vec<f64> = mask.iter().map(|m| f64::from(*m)).collect();
            device.write_input(id, name, HostSlice::F64(&mask))?;
        }
        for (name, positions) in &self.pools {
            device.write_input(id, name, HostSlice::I32(positions))?;
        }
        Ok(())
    }
}

/// Whether a decision is reported, or taken, by this name.
fn is_decision(name: &str) -> bool {
    name.starts_with("relu.") || name.starts_with("pool.")
}

/// The windows of the max-pool that takes its positions from `input`.
fn window_of<'a>(plan: &'a Plan, input: &Port) -> Option<&'a Window> {
    plan.launches.iter().find_map(|launch| match &launch.op {
        Op::PoolGather(pool) if input.buffer == Some(launch.args[0].inputs[1]) => Some(&pool.0),
        _ => None,
    })
}

/// [`Replay::tie_distance`] of a run with [`super::Report::Replay`], whose outputs are `reported`.
pub(super) fn tie_distance(device: &dyn Device, id: PlanId, reported: &[String]) -> Result<f64> {
    let mut worst = 0.0f64;
    for name in reported.iter().filter_map(|name| name.strip_prefix("own.")) {
        let own = device.read_output(id, &format!("own.{name}"))?.to_f64();
        let forced = device.read_output(id, &format!("forced.{name}"))?.to_f64();
        let farthest = own.iter().zip(&forced).map(|(o, f)| (o - f).abs()).fold(0.0, f64::max);
        if farthest > 0.0 {
            let mean_square = own.iter().map(|o| o * o).sum::<f64>() / own.len() as f64;
            worst = worst.max(farthest / mean_square.sqrt());
        }
    }
    Ok(worst)
}

fn differences<D: PartialEq>(ours: &BTreeMap<String, Vec<D>>, theirs: &BTreeMap<String, Vec<D>>) -> Differences {
    let mut count = Differences::default();
    for (name, ours) in ours {
        let Some(theirs) = theirs.get(name) else { continue };
        count.differ += ours.iter().zip(theirs).filter(|(a, b)| a != b).count();
        count.of += ours.len();
    }
    count
}

/// Whether every group is; a NaN is not.
fn within(groups: &BTreeMap<String, Deviation>, tolerance: f64) -> bool {
    groups.values().all(|d| d.rel <= tolerance)
}
