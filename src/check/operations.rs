//! The cases of one operation on a device: two runs launch by launch, one as a graph, and double precision beside.

use super::judge::{deviation, same_bits};
use super::{Fault, Machine, Row, Selection, dead};
use crate::cases::{Case, Planned, all, planned};
use crate::device::cpu::Cpu;
use crate::device::cuda::{Mode, Operands};
use crate::device::{Device, HostVec};
use crate::error::Result;
use crate::ops::Op;
use crate::plan::{Plan, PlanOptions};

/// Largest relative error of what is computed in single precision.
const SINGLE: f64 = 1e-5;

/// Largest relative error of statistics of a result, against those of the result as it is in memory.
const STATISTICS: f64 = 2e-6;

/// Seed of the cases' numbers.
const SEED: u64 = 1;

/// A case to run.
#[derive(Clone, Debug)]
pub(super) enum Job {
    /// Of an operation that every device knows: the CPU runs the same.
    Plain(Case),
    /// Of one that only the planner makes: the CPU runs what it stands for.
    Planned(Planned),
}

impl Job {
    fn case(&self) -> &Case {
        match self {
            Job::Plain(case) | Job::Planned(Planned { case, .. }) => case,
        }
    }

    /// Whether the operation rounds its operands to the precision of the device.
    fn rounds(&self) -> bool {
        matches!(self.case().op, Op::Conv(_) | Op::FusedConv(_))
    }

    /// Whether it does other work on a device with these operands than on one in f32.
    fn depends_on(&self, operands: Operands) -> bool {
        self.rounds() || (matches!(self, Job::Planned(_)) && operands.is_half())
    }

    /// Largest relative error of a result.
    fn tolerance(&self, machine: &Machine<'_>) -> f64 {
        match self {
            _ if self.rounds() => machine.tolerance,
            Job::Plain(case) => case.tolerance.min(SINGLE),
            // What is rounded to 16 bits is off by half a unit of the last place at most.
            Job::Planned(planned) => planned.case.tolerance + machine.operands.half_unit(),
        }
    }

    /// Numbers for its operands, which a device with these operands holds exactly.
    fn values(&self, operands: Operands) -> Vec<HostVec> {
        match self {
            Job::Plain(case) => case.values(SEED),
            Job::Planned(planned) if operands.is_half() => planned.values(SEED, |x| operands.stored(x)),
            Job::Planned(planned) => planned.values(SEED, |x| x),
        }
    }

    /// What the device runs.
    fn plan(&self, operands: Operands) -> Result<Plan> {
        match self {
            Job::Plain(case) => as_recorded(case),
            Job::Planned(planned) => planned.plan(operands.is_half()),
        }
    }

    /// What the CPU runs.
    fn reference(&self) -> Result<Plan> {
        match self {
            Job::Plain(case) => as_recorded(case),
            Job::Planned(planned) => planned.composition(),
        }
    }

    /// Results that are statistics of the first one, and what they must be given that.
    fn statistics(&self, first: &HostVec) -> Result<Vec<(usize, HostVec)>> {
        match self {
            Job::Plain(_) => Ok(Vec::new()),
            Job::Planned(planned) => planned.statistics(first),
        }
    }
}

fn as_recorded(case: &Case) -> Result<Plan> {
    Plan::build(&case.record()?.tape, &PlanOptions { fuse: false, ..PlanOptions::default() })
}

/// The selected cases by operation, in the order of the tables, for a device with these operands; `every` also those that do not
/// depend on them.
pub(super) fn selected(selection: &Selection, operands: Operands, every: bool) -> Vec<(&'static str, Vec<Job>)> {
    let mut groups: Vec<(&'static str, Vec<Job>)> = Vec::new();
    let jobs = all().into_iter().map(Job::Plain).chain(planned().into_iter().map(Job::Planned));
    for job in jobs.filter(|job| selection.takes(&job.case().name) && (every || job.depends_on(operands))) {
        let name = job.case().op_name();
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, jobs)) => jobs.push(job),
            None => groups.push((name, vec![job])),
        }
    }
    groups.into_iter().map(|(name, jobs)| (name, selection.thin(jobs))).collect()
}

/// The devices that a case runs on.
struct Devices {
    eager: Box<dyn Device>,
    graph: Box<dyn Device>,
    reference: Cpu<f64>,
}

impl Devices {
    fn open(machine: &Machine<'_>) -> Result<Self> {
        let (eager, graph) = ((machine.open)(Mode::Eager)?, (machine.open)(Mode::Graph)?);
        Ok(Devices { eager, graph, reference: Cpu::new(1)? })
    }
}

/// Runs `jobs`, all of the operation `name`; also why the check cannot go on, if it cannot.
pub(super) fn run(machine: &Machine<'_>, name: &str, jobs: &[Job]) -> (Row, Option<String>) {
    let depends = jobs.iter().any(|job| job.depends_on(machine.operands));
    let mut row = Row::new(name, depends.then_some(machine.operands.name()));
    let mut devices = None;
    for job in jobs {
        row.cases += 1;
        let opened = match devices.take() {
            Some(open) => Ok(open),
            None => Devices::open(machine),
        };
        let done = opened.and_then(|mut open| {
            run_job(machine, &mut open, job, &mut row)?;
            Ok(open)
        });
        match done {
            Ok(open) => devices = Some(open),
            Err(error) => {
                // The devices are gone; the next case gets fresh ones, if there still are any.
                row.fail(&job.case().name, Fault::Device, error.to_string());
                let stopped = dead(machine, &error);
                if stopped.is_some() {
                    return (row, stopped);
                }
            }
        }
    }
    (row, None)
}

fn run_job(machine: &Machine<'_>, devices: &mut Devices, job: &Job, row: &mut Row) -> Result<()> {
    let (name, tolerance) = (&job.case().name, job.tolerance(machine));
    row.tolerance = Some(row.tolerance.unwrap_or(0.0).max(tolerance));
    let values = job.values(machine.operands);
    let plan = job.plan(machine.operands)?;
    let mut want = results(&mut devices.reference, job, job.reference()?, &values, 1)?.remove(0);
    let eager = results(&mut *devices.eager, job, plan.clone(), &values, 2)?;
    let replayed = results(&mut *devices.graph, job, plan, &values, 1)?.remove(0);
    let mut tolerances = vec![tolerance; want.len()];
    for (i, of_first) in job.statistics(&eager[0][0])? {
        (want[i], tolerances[i]) = (of_first, STATISTICS);
    }
    for (i, ((have, want), tolerance)) in eager[0].iter().zip(&want).zip(tolerances).enumerate() {
        let error = deviation(&have.to_f64(), &want.to_f64());
        row.worst = Some(row.worst.unwrap_or(0.0).max(error));
        if error > tolerance {
            let what = format!("result {i}: relative error {error:.1e}, the tolerance is {tolerance:.0e}");
            row.fail(name, Fault::Accuracy, what);
        }
        if !same_bits(have, &eager[1][i]) {
            row.fail(name, Fault::Repeat, format!("result {i}: a second run gives other bits"));
        }
        if !same_bits(have, &replayed[i]) {
            row.fail(name, Fault::Replay, format!("result {i}: the replayed graph gives other bits"));
        }
    }
    Ok(())
}

/// All results of a plan of `job` in each of `runs` runs.
fn results(
    device: &mut dyn Device,
    job: &Job,
    plan: Plan,
    values: &[HostVec],
    runs: usize,
) -> Result<Vec<Vec<HostVec>>> {
    let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
    let id = device.load(plan)?;
    for (operand, values) in job.case().operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice())?;
    }
    let mut all = Vec::with_capacity(runs);
    for _ in 0..runs {
        device.run(id, &[])?;
        all.push(outputs.iter().map(|name| device.read_output(id, name)).collect::<Result<_>>()?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::{Job, Operands, Selection, all, planned, selected};

    #[test]
    fn every_case_is_selected_once_and_later_precisions_run_what_depends_on_them() {
        let count = |groups: &[(&str, Vec<Job>)]| groups.iter().map(|(_, jobs)| jobs.len()).sum::<usize>();
        let whole = Selection::default();
        let first = selected(&whole, Operands::F32, true);
        assert_eq!(count(&first), all().len() + planned().len());
        let names = |operands, every| selected(&whole, operands, every).len();
        assert_eq!(
            (first.len(), names(Operands::F16, true)),
            (39, 39),
            "32 operations of the tape, seven of the planner"
        );
        assert_eq!(names(Operands::Tf32, false), 7, "three convolutions, four fused ones");
        assert_eq!((names(Operands::F16, false), names(Operands::Bf16, false)), (10, 10), "and three batch norms");
        let few = Selection { only: Some("summed".into()), per_operation: Some(2) };
        let groups = selected(&few, Operands::F32, true);
        assert!(groups.len() > 10 && groups.iter().all(|(_, jobs)| (1..=2).contains(&jobs.len())));
        assert!(groups.iter().flat_map(|(_, jobs)| jobs).all(|job| job.case().name.contains("summed")));
    }
}
