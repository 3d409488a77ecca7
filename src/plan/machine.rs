//! How many branches a plan takes at a time where nobody says: by the memory, the second-level cache and the rates of a machine.

use super::stages::MOST_STAGES;
use super::{Plan, PlanOptions, StageGroups};
use crate::error::Result;
use crate::ops::Op;
use crate::tape::Tape;

/// Branches of a group that [`Machine::fit`] does not go below.
pub const LEAST_GROUP: usize = 4;

/// What the default for branch groups goes by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    /// Bytes of a real.
    pub real_bytes: usize,
    /// Bytes within which the arena of a step is kept.
    pub arena_bytes: usize,
    /// Bytes of the second-level cache.
    pub cache_bytes: usize,
    /// Bytes per second from and to memory.
    pub memory_rate: f64,
    /// Floating-point operations per second of convolutions.
    pub conv_rate: f64,
    /// Floating-point operations per second of all else.
    pub other_rate: f64,
    /// Seconds that a launch takes beyond its work: to begin, and until its last block ends.
    pub launch: f64,
}

/// The time of a launch by what limits it.
struct Times {
    work: f64,
    memory: f64,
    branches: usize,
    stage: Option<usize>,
}

impl Machine {
    /// The plan in groups of branches as this machine likes them; the groups of `options` do not count.
    ///
    /// As few groups as keep the arena within `arena_bytes`, none of fewer than about [`LEAST_GROUP`] where every arena takes more: launches
    /// grow with the groups, and the arena shrinks little below. Where that lets it do with fewer groups, the plan is one with
    /// [`PlanOptions::recompute`]. Then, within a group, fewer branches at a time in those stages where [`Machine::seconds`] are
    /// fewer for it.
    ///
    /// # Errors
    /// As [`Plan::build`].
    pub fn fit(&self, tape: &Tape, options: &PlanOptions) -> Result<Plan> {
        let whole = PlanOptions { recompute: false, group: None, stages: StageGroups::WHOLE, ..*options };
        let (options, plan) = self.fit_memory(tape, &whole)?;
        self.fit_cache(tape, options, plan)
    }

    /// Seconds of a run of `plan` if every launch takes the longer of its work and its traffic to memory behind the cache: what compares plans of
    /// one step, and no prediction of a time.
    pub fn seconds(&self, plan: &Plan) -> f64 {
        self.sum(&self.times(plan))
    }

    fn sum(&self, times: &[Times]) -> f64 {
        times.iter().map(|t| t.work.max(t.memory) + self.launch).sum()
    }

    fn times(&self, plan: &Plan) -> Vec<Times> {
        let stages = plan.stages();
        let traffic = plan.traffic(self.real_bytes, self.cache_bytes);
        let of = |((launch, traffic), stage): ((&super::Launch, &super::Traffic), Option<usize>)| {
            let rate = match launch.op {
                Op::Conv(_) | Op::FusedConv(_) => self.conv_rate,
                _ => self.other_rate,
            };
            let work = plan.launch_cost(launch, self.real_bytes).0 as f64 / rate;
            let memory = traffic.bytes() as f64 / self.memory_rate;
            Times { work, memory, branches: launch.branches.len(), stage }
        };
        plan.launches.iter().zip(&traffic).zip(stages).map(of).collect()
    }

    fn fit_memory(&self, tape: &Tape, options: &PlanOptions) -> Result<(PlanOptions, Plan)> {
        let branches = tape.branches().max(1);
        let most = branches.div_ceil(LEAST_GROUP);
        let fits = |plan: &Plan| plan.arena_bytes(self.real_bytes) <= self.arena_bytes;
        let build = |groups: usize| -> Result<(PlanOptions, Plan)> {
            let kept = PlanOptions { group: Some(branches.div_ceil(groups)), ..*options };
            let plan = Plan::build(tape, &kept)?;
            if !options.kernels || fits(&plan) {
                return Ok((kept, plan));
            }
            let again = PlanOptions { recompute: true, ..kept };
            Ok((again, Plan::build(tape, &again)?))
        };
        let whole = build(1)?;
        if fits(&whole.1) || most == 1 {
            return Ok(whole);
        }
        // The arena shrinks with the groups at best: fewer than this cannot do.
        let mut groups = whole.1.arena_bytes(self.real_bytes).div_ceil(self.arena_bytes.max(1)).clamp(2, most);
        loop {
            let found = build(groups)?;
            if groups == most || fits(&found.1) {
                return Ok(found);
            }
            // One more, or a tenth where there are many, since each costs a plan.
            groups = (groups + 1 + groups / 10).min(most);
        }
    }

    /// Stage by stage from the largest images on: the number of passes that takes least time, if it takes less than one.
    fn fit_cache(&self, tape: &Tape, mut options: PlanOptions, mut plan: Plan) -> Result<Plan> {
        let group = plan.largest_group();
        if group < 2 {
            return Ok(plan);
        }
        // Each look at a plan goes through all that it touches: one for each plan.
        let mut times = self.times(&plan);
        for stage in 0..MOST_STAGES {
            let of_stage = || times.iter().filter(|t| t.stage == Some(stage) && t.branches == group);
            // No more can be had than launches wait for memory longer than they work; each pass costs its launches.
            let gain: f64 = of_stage().map(|t| (t.memory - t.work).max(0.0)).sum();
            let price = of_stage().count() as f64 * self.launch;
            let (whole, mut best, mut better) = (options, self.sum(&times), None);
            for passes in 2..=group {
                let size = group.div_ceil(passes);
                if gain <= price * (passes - 1) as f64 {
                    break;
                }
                if group.div_ceil(size) != passes {
                    continue;
                }
                let other = PlanOptions { stages: whole.stages.with(stage, Some(size)), ..whole };
                let divided = Plan::build(tape, &other)?;
                let its = self.times(&divided);
                if self.sum(&its) < best && divided.arena_bytes(self.real_bytes) <= self.arena_bytes {
                    best = self.sum(&its);
                    (options, plan, better) = (other, divided, Some(its));
                }
            }
            times = better.unwrap_or(times);
        }
        Ok(plan)
    }
}
