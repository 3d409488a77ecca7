//! The cases of one operation on a device: two runs launch by launch, one as a graph, and double precision beside.

use super::judge::{deviation, same_bits};
use super::{Fault, Machine, Row, Selection, dead};
use crate::cases::{Case, all};
use crate::device::cpu::Cpu;
use crate::device::cuda::Mode;
use crate::device::{Device, HostVec};
use crate::error::Result;
use crate::ops::Op;
use crate::plan::{Plan, PlanOptions};

/// Largest relative error of what is computed in single precision.
const SINGLE: f64 = 1e-5;

/// Seed of the cases' numbers.
const SEED: u64 = 1;

/// The selected cases by operation, in the order of the table; `every` also those that do not depend on the precision.
pub(super) fn selected(selection: &Selection, every: bool) -> Vec<(&'static str, Vec<Case>)> {
    let mut groups: Vec<(&'static str, Vec<Case>)> = Vec::new();
    for case in all().into_iter().filter(|c| selection.takes(&c.name) && (every || rounds(&c.op))) {
        match groups.iter_mut().find(|(name, _)| *name == case.op_name()) {
            Some((_, cases)) => cases.push(case),
            None => groups.push((case.op_name(), vec![case])),
        }
    }
    groups.into_iter().map(|(name, cases)| (name, selection.thin(cases))).collect()
}

/// Whether the operation rounds its operands to the precision of the device.
fn rounds(op: &Op) -> bool {
    matches!(op, Op::Conv(_))
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

/// Runs `cases`, all of the operation `name`; also why the check cannot go on, if it cannot.
pub(super) fn run(machine: &Machine<'_>, name: &str, cases: &[Case]) -> (Row, Option<String>) {
    let rounds = cases.iter().any(|case| rounds(&case.op));
    let mut row = Row::new(name, rounds.then_some(&machine.precision));
    let mut devices = None;
    for case in cases {
        row.cases += 1;
        let opened = match devices.take() {
            Some(open) => Ok(open),
            None => Devices::open(machine),
        };
        let done = opened.and_then(|mut open| {
            run_case(machine, &mut open, case, &mut row)?;
            Ok(open)
        });
        match done {
            Ok(open) => devices = Some(open),
            Err(error) => {
                // The devices are gone; the next case gets fresh ones, if there still are any.
                row.fail(&case.name, Fault::Device, error.to_string());
                let stopped = dead(machine, &error);
                if stopped.is_some() {
                    return (row, stopped);
                }
            }
        }
    }
    (row, None)
}

fn run_case(machine: &Machine<'_>, devices: &mut Devices, case: &Case, row: &mut Row) -> Result<()> {
    let tolerance = if rounds(&case.op) { machine.tolerance } else { case.tolerance.min(SINGLE) };
    row.tolerance = Some(row.tolerance.unwrap_or(0.0).max(tolerance));
    let values = case.values(SEED);
    let want = results(&mut devices.reference, case, &values, 1)?.remove(0);
    let eager = results(&mut *devices.eager, case, &values, 2)?;
    let replayed = results(&mut *devices.graph, case, &values, 1)?.remove(0);
    for (i, (have, want)) in eager[0].iter().zip(&want).enumerate() {
        let error = deviation(&have.to_f64(), &want.to_f64());
        row.worst = Some(row.worst.unwrap_or(0.0).max(error));
        if error > tolerance {
            let what = format!("result {i}: relative error {error:.1e}, the tolerance is {tolerance:.0e}");
            row.fail(&case.name, Fault::Accuracy, what);
        }
        if !same_bits(have, &eager[1][i]) {
            row.fail(&case.name, Fault::Repeat, format!("result {i}: a second run gives other bits"));
        }
        if !same_bits(have, &replayed[i]) {
            row.fail(&case.name, Fault::Replay, format!("result {i}: the replayed graph gives other bits"));
        }
    }
    Ok(())
}

/// All results of a case in each of `runs` runs.
fn results(device: &mut dyn Device, case: &Case, values: &[HostVec], runs: usize) -> Result<Vec<Vec<HostVec>>> {
    let plan = Plan::build(&case.record()?.tape, &PlanOptions { fuse: false, ..PlanOptions::default() })?;
    let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
    let id = device.load(plan)?;
    for (operand, values) in case.operands.iter().zip(values) {
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
    use super::{Selection, all, selected};

    #[test]
    fn every_case_is_selected_once_and_later_precisions_run_convolutions_only() {
        let count = |groups: &[(&str, Vec<super::Case>)]| groups.iter().map(|(_, c)| c.len()).sum::<usize>();
        let (first, later) = (selected(&Selection::default(), true), selected(&Selection::default(), false));
        assert_eq!(count(&first), all().len());
        assert_eq!((first.len(), later.len()), (30, 3), "as many names; convolutions are three");
        let few = Selection { only: Some("summed".into()), per_operation: Some(2) };
        let groups = selected(&few, true);
        assert!(groups.len() > 10 && groups.iter().all(|(_, cases)| (1..=2).contains(&cases.len())));
        assert!(groups.iter().flat_map(|(_, cases)| cases).all(|c| c.name.contains("summed")));
    }
}
