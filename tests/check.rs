//! `mlnt check`: what it prints, and that it finds and names faults planted in a device.

use assert_cmd::Command;
use mlnt::check::{Fault, Machine, Row, Selection, Verdict, check};
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::embedded::has_simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Crop, Destinations, Device, HostSlice, HostVec, ImageSet, ImagesId, PlanId};
use mlnt::error::{Error, Result};
use mlnt::plan::Plan;
use mlnt::tape::Meta;
use serde_json::Value;
use std::cell::Cell;
use std::rc::Rc;

/// What is wrong with a device.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plant {
    Nothing,
    /// The first value of every output is off by this factor.
    Value(f32),
    /// From the second run of a device on, the last bit of an output is wrong.
    LaterRuns,
    /// The last bit of an output is wrong where launches are replayed.
    Replay,
    /// Batches made on the device show the first image mirrored.
    Mirrored,
    /// This run of all devices fails, the next ones work.
    OneRun(usize),
    /// All runs of all devices fail from this one on.
    DeadFrom(usize),
}

/// A device with a fault.
struct Faulty {
    inner: Box<dyn Device>,
    plant: Plant,
    mode: Mode,
    runs: usize,
    /// Runs of all devices.
    all_runs: Rc<Cell<usize>>,
}

impl Device for Faulty {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn real_bytes(&self) -> usize {
        self.inner.real_bytes()
    }
    fn load(&mut self, plan: Plan) -> Result<PlanId> {
        self.inner.load(plan)
    }
    fn write_input(&mut self, plan: PlanId, name: &str, values: HostSlice<'_>) -> Result<bool> {
        self.inner.write_input(plan, name, values)
    }
    fn keep_images(&mut self, images: &ImageSet<'_>) -> Result<Option<ImagesId>> {
        self.inner.keep_images(images)
    }
    fn stage(&mut self, images: ImagesId, plan: PlanId, input: &str, crops: &[Crop]) -> Result<()> {
        let mut crops = crops.to_vec();
        if self.plant == Plant::Mirrored {
            crops[0].flip = 1 - crops[0].flip;
        }
        self.inner.stage(images, plan, input, &crops)
    }
    fn run(&mut self, plan: PlanId, scalars: &[f64]) -> Result<()> {
        self.runs += 1;
        self.all_runs.set(self.all_runs.get() + 1);
        let fails = match self.plant {
            Plant::OneRun(n) => self.all_runs.get() == n,
            Plant::DeadFrom(n) => self.all_runs.get() >= n,
            _ => false,
        };
        match fails {
            true => Err(Error::Device { device: "faulty".into(), what: "an illegal address".into() }),
            false => self.inner.run(plan, scalars),
        }
    }
    fn time_launches(&mut self, plan: PlanId, scalars: &[f64]) -> Result<Vec<(usize, f64)>> {
        self.inner.time_launches(plan, scalars)
    }
    fn read_output(&self, plan: PlanId, name: &str) -> Result<HostVec> {
        let mut values = self.inner.read_output(plan, name)?;
        let flip = match self.plant {
            Plant::LaterRuns => self.runs > 1,
            Plant::Replay => self.mode == Mode::Graph,
            _ => false,
        };
        // The probe of a device reads `filled`, which stays right.
        if let (HostVec::F32(v), false) = (&mut values, name == "filled") {
            if let Plant::Value(factor) = self.plant {
                v[0] *= factor;
            }
            if flip {
                v[0] = f32::from_bits(v[0].to_bits() ^ 1);
            }
        }
        Ok(values)
    }
    fn read_outputs_into<'a>(&self, plan: PlanId, outputs: Destinations<'_, 'a>) -> Result<()> {
        self.inner.read_outputs_into(plan, outputs)
    }
    fn states(&self) -> Vec<(String, Meta)> {
        self.inner.states()
    }
    fn write_state(&mut self, name: &str, values: HostSlice<'_>) -> Result<()> {
        self.inner.write_state(name, values)
    }
    fn read_state(&self, name: &str) -> Result<HostVec> {
        self.inner.read_state(name)
    }
}

/// The check of SIMT devices with a fault, on the cases whose names contain `only`.
fn checked(plant: Plant, only: &str) -> Option<(Vec<Row>, Verdict)> {
    if !has_simt() {
        println!("skipped: built without the SIMT host machine");
        return None;
    }
    let all_runs = Rc::new(Cell::new(0));
    let open = |mode| -> Result<Box<dyn Device>> {
        let inner = Box::new(Cuda::new(Box::new(Simt::open(1)?), Operands::F32, mode));
        Ok(Box::new(Faulty { inner, plant, mode, runs: 0, all_runs: all_runs.clone() }))
    };
    let machine = Machine { operands: Operands::F32, open: &open };
    let selection = Selection { only: Some(only.into()), per_operation: None };
    let mut rows = Vec::new();
    let verdict = check(&[machine], &selection, &mut |row| {
        rows.push(row.clone());
        Ok(())
    });
    Some((rows, verdict.unwrap()))
}

/// The kinds of fault found, and how many cases failed.
fn faults(plant: Plant, only: &str) -> Option<(Vec<Fault>, usize)> {
    let (rows, verdict) = checked(plant, only)?;
    assert_eq!(verdict.failed, rows.iter().map(Row::failed).sum::<usize>());
    assert_eq!(verdict.pass(), rows.iter().all(|r| r.failures.is_empty()));
    let mut kinds: Vec<Fault> = Vec::new();
    for failure in rows.iter().flat_map(|r| &r.failures) {
        assert!(failure.case.contains(only), "{failure:?}");
        if !kinds.contains(&failure.fault) {
            kinds.push(failure.fault);
        }
    }
    Some((kinds, verdict.failed))
}

const CASES: &str = "kl_grad n7 5 classes";

#[test]
fn a_right_device_passes() {
    let Some((rows, verdict)) = checked(Plant::Nothing, CASES) else { return };
    assert!(verdict.pass() && verdict.cases > 5, "{verdict:?}");
    assert_eq!((rows.len(), rows[0].what.as_str(), rows[0].precision.as_deref()), (1, "kl_grad", None));
    assert!(rows[0].worst.unwrap() > 0.0 && rows[0].worst.unwrap() < 1e-6, "{rows:?}");
}

#[test]
fn a_wrong_value_is_found() {
    let Some((kinds, failed)) = faults(Plant::Value(1.01), CASES) else { return };
    let all = checked(Plant::Nothing, CASES).unwrap().1.cases;
    assert_eq!((kinds, failed), (vec![Fault::Accuracy], all));
    // What is no number is not within tolerance either.
    let (rows, _) = checked(Plant::Value(f32::NAN), CASES).unwrap();
    assert_eq!((rows[0].failed(), rows[0].worst), (all, Some(f64::INFINITY)));
    assert!(rows[0].failures[0].what.contains("result 0: relative error inf"), "{:?}", rows[0].failures[0]);
}

#[test]
fn what_only_the_planner_makes_is_checked_against_what_it_stands_for() {
    for only in [
        "conv2d_fused_fprop n2 c8",
        "conv2d_fused_wgrad n1 c1",
        "conv2d_backward n1 c1",
        "conv2d_tangent n2 c5",
        "recomputed n3 c3",
        "bn_relu_backward_apply n3 c3",
        "bn_relu_double_backward_apply n3 c3",
        "bn_stats n1 c7",
        "update ",
    ] {
        let Some((rows, verdict)) = checked(Plant::Nothing, only) else { return };
        assert!(verdict.pass() && verdict.cases >= 3, "{only}: {rows:?}");
        let (kinds, failed) = faults(Plant::Value(1.5), only).unwrap();
        // Of a batch norm the first channel may be one whose ReLU lets nothing through: its results are zero, also by a factor.
        assert!(kinds == [Fault::Accuracy] && 5 * failed >= 4 * verdict.cases, "{only}: {failed} of {}", verdict.cases);
    }
    let Some((rows, verdict)) = checked(Plant::Nothing, "finite") else { return };
    let names: Vec<&str> = rows.iter().map(|row| row.what.as_str()).collect();
    assert!(verdict.pass() && names.contains(&"all_finite"), "{rows:?}");
    let (kinds, _) = faults(Plant::Value(0.5), "guarded_lin_comb").unwrap();
    assert_eq!(kinds, [Fault::Accuracy]);
}

#[test]
fn another_bit_in_the_second_run_or_in_the_replay_is_found() {
    let Some((kinds, _)) = faults(Plant::LaterRuns, "softmax n7 5 classes shared") else { return };
    assert_eq!(kinds, [Fault::Repeat]);
    let (kinds, failed) = faults(Plant::Replay, CASES).unwrap();
    assert_eq!((kinds, failed), (vec![Fault::Replay], checked(Plant::Nothing, CASES).unwrap().1.cases));
}

#[test]
fn faults_of_whole_steps_are_found() {
    let steps = "step joint: staged";
    let Some((kinds, _)) = faults(Plant::Nothing, steps) else { return };
    assert_eq!(kinds, []);
    assert_eq!(faults(Plant::Mirrored, steps), Some((vec![Fault::Staging], 1)));
    let overlapping = "step joint: batches staged while steps run";
    assert_eq!(faults(Plant::Mirrored, overlapping), Some((vec![Fault::Staging], 1)));
    let replay = "step sequential: replay";
    assert_eq!(faults(Plant::Replay, replay), Some((vec![Fault::Replay], 1)));
    assert_eq!(faults(Plant::Value(f32::NAN), replay), Some((vec![Fault::Replay], 1)), "NaN on both sides is no pass");
}

#[test]
fn a_failing_run_is_told_and_the_rest_goes_on_while_a_device_answers() {
    // Run 1 is the probe at the start; every case takes three.
    let Some((rows, verdict)) = checked(Plant::OneRun(6), CASES) else { return };
    let all = checked(Plant::Nothing, CASES).unwrap().1.cases;
    assert_eq!((verdict.cases, verdict.failed, verdict.stopped), (all, 1, None));
    assert_eq!(rows[0].failures[0].fault, Fault::Device);
    assert!(rows[0].failures[0].what.contains("an illegal address"), "{:?}", rows[0].failures);

    let (_, verdict) = checked(Plant::DeadFrom(6), CASES).unwrap();
    assert_eq!((verdict.cases, verdict.failed), (2, 1));
    assert!(!verdict.pass() && verdict.stopped.unwrap().contains("a fresh device fails too"));
}

fn mlnt(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("mlnt").unwrap().args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_prints_a_row_per_operation_and_a_verdict() {
    if !has_simt() {
        println!("skipped: built without the SIMT host machine");
        return;
    }
    let selection = ["check", "--device", "simt", "--only", "n2 c3", "--per-operation", "1"];
    let (status, out, err) = mlnt(&selection);
    assert_eq!((status, err.as_str()), (0, ""), "{out}");
    assert!(out.starts_with("device: simt (f32"), "{out}");
    let rows = |of: &str| out.lines().filter(|line| line.starts_with(of)).count();
    // Activations of 16 bits are other work.
    assert_eq!((rows("conv2d_fprop"), rows("relu"), rows("step")), (4, 3, 0), "{out}");
    assert!(out.lines().last().unwrap().starts_with("pass: 0 of "), "{out}");

    let (status, out, _) = mlnt(&[&selection[..], &["--precision", "bf16", "--json"]].concat());
    let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (verdict, rows) = lines.split_last().unwrap();
    assert_eq!((status, &verdict["pass"], &verdict["failed"]), (0, &Value::Bool(true), &0.into()));
    assert_eq!(verdict["cases"].as_u64(), Some(rows.len() as u64), "one case of each");
    let conv = rows.iter().find(|row| row["what"] == "conv2d_wgrad").unwrap();
    assert_eq!((&conv["precision"], &conv["tolerance"]), (&"bf16".into(), &3e-2.into()));
    assert!(conv["worst"].as_f64().unwrap() > 1e-4, "operands are rounded: {conv}");
}

#[test]
fn the_help_names_as_many_cases_as_there_are() {
    let hundreds = (mlnt::cases::every().len() + 50) / 100;
    let (_, out, _) = mlnt(&["check", "--help"]);
    let text = out.split_whitespace().collect::<Vec<_>>().join(" ");
    let named = format!("about {},{}00 cases", hundreds / 10, hundreds % 10);
    assert!(text.contains(&named), "{named:?} in {text}");
}

#[test]
fn what_cannot_be_checked_is_said() {
    let (status, _, err) = mlnt(&["check", "--device", "cpu"]);
    assert_eq!(status, 2);
    assert!(err.contains("device cpu is not one that runs the CUDA kernels"), "{err}");
    let (status, _, err) = mlnt(&["check", "--device", "simt", "--precision", "f64"]);
    assert_eq!(status, 2, "{err}");
    if has_simt() {
        let (status, _, err) = mlnt(&["check", "--device", "simt", "--only", "no such case"]);
        assert_eq!((status, err.trim()), (2, "mlnt: no case has \"no such case\" in its name"));
    }
}
