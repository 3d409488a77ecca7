//! The cases of one operation on a device: two runs launch by launch, one as a graph, and double precision beside.

use super::judge::{deviations, same_bits};
use super::{Fault, Machine, Row, Selection, dead};
use crate::cases::{Planned, every};
use crate::device::cpu::Cpu;
use crate::device::cuda::{Mode, Operands};
use crate::device::{Device, HostVec};
use crate::error::Result;
use crate::plan::Plan;

/// Seed of the cases' numbers.
const SEED: u64 = 1;

/// Whether the case does other work on a device with these operands than on one in f32.
fn depends_on(case: &Planned, operands: Operands) -> Result<bool> {
    Ok(case.rounds() || (operands.is_half() && case.narrows()?))
}

/// The selected cases of an operation.
#[derive(Debug)]
pub(super) struct Jobs {
    /// The operation.
    pub name: &'static str,
    /// Whether some of them do other work on a device with other operands.
    pub depend: bool,
    cases: Vec<Planned>,
}

/// The selected cases by operation, in the order of the tables, for a device with these operands; `every_case` also those that do not
/// depend on them.
///
/// # Errors
/// When the table holds a case that its operation refuses.
pub(super) fn selected(selection: &Selection, operands: Operands, every_case: bool) -> Result<Vec<Jobs>> {
    let mut groups: Vec<Jobs> = Vec::new();
    for case in every().into_iter().filter(|case| selection.takes(&case.case.name)) {
        let (name, depend) = (case.case.op_name(), depends_on(&case, operands)?);
        if !(every_case || depend) {
            continue;
        }
        match groups.iter_mut().find(|jobs| jobs.name == name) {
            Some(jobs) => {
                jobs.depend |= depend;
                jobs.cases.push(case);
            }
            None => groups.push(Jobs { name, depend, cases: vec![case] }),
        }
    }
    let thin = |jobs: Jobs| Jobs { cases: selection.thin(jobs.cases), ..jobs };
    Ok(groups.into_iter().map(thin).collect())
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

/// Runs `jobs`; also why the check cannot go on, if it cannot.
pub(super) fn run(machine: &Machine<'_>, jobs: &Jobs) -> (Row, Option<String>) {
    let mut row = Row::new(jobs.name, jobs.depend.then_some(machine.operands.name()));
    let mut devices = None;
    for job in &jobs.cases {
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
                row.fail(&job.case.name, Fault::Device, error.to_string());
                let stopped = dead(machine, &error);
                if stopped.is_some() {
                    return (row, stopped);
                }
            }
        }
    }
    (row, None)
}

fn run_job(machine: &Machine<'_>, devices: &mut Devices, job: &Planned, row: &mut Row) -> Result<()> {
    let (name, operands) = (&job.case.name, machine.operands);
    let values = job.values(SEED, |x| operands.stored(x));
    let plan = job.plan(operands.is_half())?;
    let want = results(&mut devices.reference, job, job.composition()?, &values, 1)?.remove(0);
    let eager = results(&mut *devices.eager, job, plan.clone(), &values, 2)?;
    let replayed = results(&mut *devices.graph, job, plan, &values, 1)?.remove(0);
    for off in deviations(job, operands, &values, &want, &eager[0])? {
        row.worst = Some(row.worst.unwrap_or(0.0).max(off.by));
        row.tolerance = Some(row.tolerance.unwrap_or(0.0).max(off.most));
        if off.is_fault() {
            let what = format!("{}: relative error {:.1e}, the tolerance is {:.0e}", off.what, off.by, off.most);
            row.fail(name, Fault::Accuracy, what);
        }
    }
    for (i, have) in eager[0].iter().enumerate() {
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
    job: &Planned,
    plan: Plan,
    values: &[HostVec],
    runs: usize,
) -> Result<Vec<Vec<HostVec>>> {
    let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
    let id = device.load(plan)?;
    for (operand, values) in job.case.operands.iter().zip(values) {
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
    use super::{Jobs, Operands, Selection, every, selected};

    #[test]
    fn every_case_is_selected_once_and_later_precisions_run_what_depends_on_them() {
        let count = |groups: &[Jobs]| groups.iter().map(|jobs| jobs.cases.len()).sum::<usize>();
        let whole = Selection::default();
        let first = selected(&whole, Operands::F32, true).unwrap();
        assert_eq!(count(&first), every().len());
        let names = |operands, every_case| selected(&whole, operands, every_case).unwrap().len();
        assert_eq!(
            (first.len(), names(Operands::F16, true)),
            (42, 42),
            "32 operations of the tape, ten of the planner"
        );
        assert_eq!(names(Operands::Tf32, false), 7, "three convolutions, four fused ones");
        let halves = [Operands::F16, Operands::Bf16].map(|operands| selected(&whole, operands, false).unwrap());
        let named = |jobs: &[Jobs]| jobs.iter().map(|jobs| jobs.name).collect::<Vec<_>>();
        assert_eq!(named(&halves[0]), named(&halves[1]));
        for name in ["relu", "bn_forward", "max_pool_index", "bn_stats", "bn_relu_backward_apply", "conv2d_tangent"] {
            assert!(named(&halves[0]).contains(&name), "{name} has activations, which may take 16 bits");
        }
        assert!(halves[0].iter().all(|jobs| jobs.depend && !["softmax", "transfer_labels"].contains(&jobs.name)));
        let few = Selection { only: Some("summed".into()), per_operation: Some(2) };
        let groups = selected(&few, Operands::F32, true).unwrap();
        assert!(groups.len() > 10 && groups.iter().all(|jobs| (1..=2).contains(&jobs.cases.len())));
        assert!(groups.iter().flat_map(|jobs| &jobs.cases).all(|case| case.case.name.contains("summed")));
    }
}
