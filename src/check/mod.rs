//! The check of a device that runs the kernels: every operation case against double precision, those of the planner too, and whole
//! steps.
//!
//! What is asked of a device, on a card or simulated: results within tolerance of the CPU in f64, the same bits in
//! every run, the same bits whether launches are queued one by one or replayed as a graph, and the same bits whether
//! a batch is made on the device or on the host. The check knows devices by the [`Device`] trait alone.

mod judge;
mod operations;
mod steps;

pub use judge::{Deviation, deviation, deviations, same_bits, sum_deviation};

use crate::device::Device;
use crate::device::cuda::{Mode, Operands};
use crate::error::{Error, Result};
use crate::ops::{Fill, Op};
use crate::plan::Plan;
use crate::tape::{Coef, Meta, Tape};
use std::time::Instant;

/// The devices to check in one precision.
pub struct Machine<'a> {
    /// What they compute in.
    pub operands: Operands,
    /// Opens a fresh device.
    pub open: &'a dyn Fn(Mode) -> Result<Box<dyn Device>>,
}

/// Which cases to run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// Those whose name contains this.
    pub only: Option<String>,
    /// At most so many of each operation, spread evenly over its cases.
    pub per_operation: Option<usize>,
}

impl Selection {
    fn takes(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|part| name.contains(part.as_str()))
    }

    /// At most `per_operation` of `cases`, evenly spread.
    fn thin<T>(&self, cases: Vec<T>) -> Vec<T> {
        let (have, want) = (cases.len(), self.per_operation.unwrap_or(usize::MAX));
        if have <= want {
            return cases;
        }
        let taken: Vec<usize> = (0..want).map(|i| i * have / want).collect();
        cases.into_iter().enumerate().filter(|(i, _)| taken.contains(i)).map(|(_, case)| case).collect()
    }
}

/// What is wrong with a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A result is farther from double precision than the tolerance.
    Accuracy,
    /// A second run, or a second device, gives other bits.
    Repeat,
    /// The replayed graph gives other bits than launches one by one.
    Replay,
    /// A batch made on the device gives other bits than the host's.
    Staging,
    /// The device refuses or fails.
    Device,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Fault::Accuracy => "accuracy",
            Fault::Repeat => "repeat",
            Fault::Replay => "replay",
            Fault::Staging => "staging",
            Fault::Device => "device",
        })
    }
}

/// A case that failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The case.
    pub case: String,
    /// What kind of fault it is.
    pub fault: Fault,
    /// What was found, in words.
    pub what: String,
}

/// What the cases of one operation, or the checks of one recipe's step, have come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The operation, or the step.
    pub what: String,
    /// The precision; `None` for an operation that does the same in all of them.
    pub precision: Option<String>,
    /// Cases that were run.
    pub cases: usize,
    /// What failed; a case may stand here more than once.
    pub failures: Vec<Failure>,
    /// Largest relative error; `None` where only bits are compared.
    pub worst: Option<f64>,
    /// What that may be, at the least strict case.
    pub tolerance: Option<f64>,
    /// Time taken, the reference's included.
    pub seconds: f64,
}

impl Row {
    fn new(what: &str, precision: Option<&str>) -> Self {
        let precision = precision.map(str::to_string);
        let what = what.to_string();
        Row { what, precision, cases: 0, failures: Vec::new(), worst: None, tolerance: None, seconds: 0.0 }
    }

    /// Cases that failed, each counted once.
    pub fn failed(&self) -> usize {
        let mut names: Vec<&str> = self.failures.iter().map(|f| f.case.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }

    fn fail(&mut self, case: &str, fault: Fault, what: impl Into<String>) {
        self.failures.push(Failure { case: case.to_string(), fault, what: what.into() });
    }
}

/// The end of a check.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Cases that were run.
    pub cases: usize,
    /// Cases that failed.
    pub failed: usize,
    /// Why the rest was not run: the device failed and does not answer any more.
    pub stopped: Option<String>,
}

impl Verdict {
    /// Whether everything was run and nothing failed.
    pub fn pass(&self) -> bool {
        self.failed == 0 && self.stopped.is_none() && self.cases > 0
    }
}

/// Runs the selected cases on every machine and gives `tell` each row as soon as it is complete. Operations that do
/// not depend on the precision run on the first machine only.
///
/// # Errors
/// When nothing is selected, a device cannot be opened at the start, or `tell` fails. A device that fails later is a
/// [`Failure`], and ends the check ([`Verdict::stopped`]) if a fresh one fails as well.
pub fn check(
    machines: &[Machine<'_>],
    selection: &Selection,
    tell: &mut dyn FnMut(&Row) -> Result<()>,
) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let mut take = |row: Row, verdict: &mut Verdict| {
        verdict.cases += row.cases;
        verdict.failed += row.failed();
        tell(&row)
    };
    for (i, machine) in machines.iter().enumerate() {
        answers(machine)?;
        for jobs in operations::selected(selection, machine.operands, i == 0)? {
            let (row, stopped) = timed(|| operations::run(machine, &jobs));
            take(row, &mut verdict)?;
            if stopped.is_some() {
                return Ok(Verdict { stopped, ..verdict });
            }
        }
        for recipe in steps::RECIPES {
            let (row, stopped) = timed(|| steps::run(machine, recipe, selection));
            if row.cases > 0 {
                take(row, &mut verdict)?;
            }
            if stopped.is_some() {
                return Ok(Verdict { stopped, ..verdict });
            }
        }
    }
    match (verdict.cases, &selection.only) {
        (0, Some(part)) => Err(Error::usage(format_args!("no case has {part:?} in its name"))),
        _ => Ok(verdict),
    }
}

fn timed(run: impl FnOnce() -> (Row, Option<String>)) -> (Row, Option<String>) {
    let start = Instant::now();
    let (mut row, stopped) = run();
    row.seconds = start.elapsed().as_secs_f64();
    (row, stopped)
}

/// Opens a device and runs the least plan on it: after an error of CUDA all further calls of the process may fail.
fn answers(machine: &Machine<'_>) -> Result<()> {
    let mut device = (machine.open)(Mode::Eager)?;
    let mut tape = Tape::new(1);
    tape.set_phase("probe");
    let fill = Op::from(Fill { meta: Meta::vector(32), value: Coef::constant(1.5) });
    let filled = tape.record(fill, &[], &[])?;
    tape.output("filled", filled[0]);
    let plan = Plan::build(&tape, &device.plan_options())?;
    let id = device.load(plan)?;
    device.run(id, &[])?;
    match device.read_output(id, "filled")?.to_f64().iter().all(|x| *x == 1.5) {
        true => Ok(()),
        false => Err(Error::Device { device: device.describe(), what: "does not even fill a vector".into() }),
    }
}

/// After `error`: why no further case can run, if none can.
fn dead(machine: &Machine<'_>, error: &Error) -> Option<String> {
    answers(machine).err().map(|now| format!("after \"{error}\" a fresh device fails too: {now}"))
}

#[cfg(test)]
mod tests {
    use super::{Fault, Row, Selection, Verdict};

    #[test]
    fn a_thinned_selection_is_spread_and_keeps_its_order() {
        let thin = |n, of: usize| {
            let selection = Selection { per_operation: n, ..Selection::default() };
            selection.thin((0..of).collect::<Vec<usize>>())
        };
        assert_eq!(thin(Some(3), 9), [0, 3, 6]);
        assert_eq!(thin(Some(4), 5), [0, 1, 2, 3]);
        assert_eq!(thin(Some(5), 5), [0, 1, 2, 3, 4]);
        assert_eq!(thin(None, 3), [0, 1, 2]);
    }

    #[test]
    fn a_case_with_two_faults_fails_once_and_nothing_run_is_no_pass() {
        let mut row = Row::new("relu", None);
        row.fail("a", Fault::Accuracy, "far");
        row.fail("a", Fault::Replay, "other");
        row.fail("b", Fault::Accuracy, "far");
        assert_eq!(row.failed(), 2);
        assert!(!Verdict::default().pass());
        assert!(Verdict { cases: 1, ..Verdict::default() }.pass());
        assert!(!Verdict { cases: 2, failed: 1, stopped: None }.pass());
        assert!(!Verdict { cases: 2, failed: 0, stopped: Some("gone".into()) }.pass());
    }
}
