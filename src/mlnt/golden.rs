//! Golden steps: one training step with its inputs and what must come out, computed elsewhere in float64.
//! The format is described in `golden/FORMAT.md`.

use super::replay::{Decisions, Replay, tie_distance};
use super::{KlScale, Recipe, Report, Scales, StepScalars, StepSpec, Synthetic, record_step};
use crate::device::{Device, HostSlice, PlanId};
use crate::error::{Error, Result};
use crate::model::{Arch, ModelSpec};
use crate::plan::{Plan, PlanOptions};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Scales of cotangents in 16 bits, far from overflow in a step as small as a golden one.
const HALF_SCALES: Scales = Scales { inner: 256.0, outer: 64.0, second: 128.0, apply: true };

/// Output groups in the order in which they are reported.
pub const GROUPS: [&str; 13] = [
    "logits",
    "target",
    "inner_loss",
    "inner_grad",
    "consistency",
    "meta_grad",
    "meta_grad_first_order",
    "class_loss",
    "param",
    "momentum",
    "buffer",
    "teacher.param",
    "teacher.buffer",
];

#[derive(Debug, Deserialize)]
struct Config {
    format: String,
    arch: Arch,
    in_channels: usize,
    size: [usize; 2],
    classes: usize,
    widths: Vec<usize>,
    blocks: Vec<usize>,
    batch: usize,
    branches: usize,
    update: String,
    kl: String,
    alpha: f64,
    eta: f64,
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    gamma: f64,
    mentor: bool,
    #[serde(default)]
    lambda: f64,
}

/// Largest relative error of a group in double precision.
pub const TOLERANCE_F64: f64 = 1e-10;

/// `group → tensor → values`; a group of one tensor has the empty name.
pub type Groups = BTreeMap<String, BTreeMap<String, Vec<f64>>>;

/// A golden step read from a file.
#[derive(Clone, Debug)]
pub struct Golden {
    /// What the step's plan depends on.
    pub spec: StepSpec,
    /// Its runtime scalars.
    pub scalars: StepScalars,
    reals: BTreeMap<String, Vec<f64>>,
    integers: BTreeMap<String, Vec<i64>>,
}

/// What came out of a step, and the decisions behind it.
#[derive(Clone, Debug)]
pub struct StepResult {
    /// The values.
    pub groups: Groups,
    /// What every ReLU and max-pool decided.
    pub decisions: Decisions,
}

/// How far a group is from what it must be.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Deviation {
    /// ‖have − want‖ / ‖want‖ over the group as one vector.
    pub rel: f64,
    /// Cosine of the angle between them.
    pub cos: f64,
}

impl Golden {
    /// Reads a golden step and checks that it is complete and consistent.
    ///
    /// # Errors
    /// [`Error::File`] naming the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<Golden> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let fail = |what: String| Error::file(path, what);
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|e| fail(format!("not a safetensors file: {e}")))?;
        let config = header.metadata().as_ref().and_then(|m| m.get("config"));
        let config = config.ok_or_else(|| fail("no `config` in its metadata: not a golden step".into()))?;
        let config: Config = serde_json::from_str(config).map_err(|e| fail(format!("config: {e}")))?;
        let (spec, scalars) = config.read().map_err(&fail)?;
        spec.model.check().map_err(|e| fail(format!("config: {e}")))?;

        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| fail(format!("not a safetensors file: {e}")))?;
        let (mut reals, mut integers) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in tensors.tensors() {
            let data = view.data();
            match view.dtype() {
                Dtype::F32 => reals.insert(name, floats(data, |b: [u8; 4]| f64::from(f32::from_le_bytes(b)))),
                Dtype::F64 => reals.insert(name, floats(data, f64::from_le_bytes)),
                Dtype::I64 => {
                    integers.insert(name, floats(data, i64::from_le_bytes));
                    None
                }
                Dtype::U8 => {
                    integers.insert(name, data.iter().map(|b| i64::from(*b)).collect());
                    None
                }
                other => return Err(fail(format!("tensor {name} has type {other:?}"))),
            };
        }
        let shapes = tensors.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec())).collect();
        let golden = Golden { spec, scalars, reals, integers };
        golden.check(&shapes).map_err(fail)?;
        Ok(golden)
    }

    /// Every tensor is there, has its shape, and labels lie within the classes.
    fn check(&self, shapes: &BTreeMap<String, Vec<usize>>) -> std::result::Result<(), String> {
        let (k, m, classes) = (self.spec.batch, self.spec.branches, self.spec.model.classes);
        // Extents of 1 say nothing: a single number may be `[1]` or `[]`.
        let squeezed = |shape: &[usize]| -> Vec<usize> { shape.iter().copied().filter(|n| *n != 1).collect() };
        let shape = |name: &str, want: &[usize]| match shapes.get(name) {
            Some(have) if squeezed(have) == squeezed(want) => Ok(()),
            Some(have) => Err(format!("tensor {name} has shape {have:?}, expected {want:?}")),
            None => Err(format!("tensor {name} is missing")),
        };
        let real = |name: String, want: &[usize]| {
            shape(&name, want)?;
            if self.reals.contains_key(&name) { Ok(()) } else { Err(format!("tensor {name} does not hold reals")) }
        };
        for (name, want, limit) in [("y", vec![k], classes), ("y_syn", vec![m, k], classes), ("keep", vec![k], 2)] {
            shape(&format!("in.{name}"), &want)?;
            let values = self.integers.get(&format!("in.{name}"));
            let values = values.ok_or(format!("tensor in.{name} does not hold whole numbers"))?;
            if let Some(v) = values.iter().find(|v| !(0..limit as i64).contains(*v)) {
                return Err(format!("tensor in.{name} holds {v}, expected 0..{limit}"));
            }
        }
        if self.integers["in.keep"].iter().all(|v| *v == 0) {
            return Err("tensor in.keep keeps no sample".into());
        }
        let [h, w] = self.spec.model.size;
        real("in.x".into(), &[k, self.spec.model.in_channels, h, w])?;
        for (name, shape) in self.state_list() {
            real(format!("in.{name}"), &shape)?;
        }
        for (group, name, shape) in self.expected() {
            real(wanted_name(&group, &name), &shape)?;
        }
        Ok(())
    }

    /// Names and shapes of the states before the step.
    fn state_list(&self) -> Vec<(String, Vec<usize>)> {
        let model = &self.spec.model;
        let owners: &[&str] = if self.spec.mentor { &["", "teacher.", "mentor."] } else { &["", "teacher."] };
        let mut list = Vec::new();
        for owner in owners {
            for p in model.params() {
                list.push((format!("{owner}param.{}", p.name), p.shape.clone()));
                if owner.is_empty() {
                    list.push((format!("momentum.{}", p.name), p.shape));
                }
            }
            list.extend(model.buffers().into_iter().map(|(name, len)| (format!("{owner}buffer.{name}"), vec![len])));
        }
        list
    }

    /// `(group, tensor, shape)` of everything that must come out.
    fn expected(&self) -> Vec<(String, String, Vec<usize>)> {
        let (k, m, model) = (self.spec.batch, self.spec.branches, &self.spec.model);
        let mut list = Vec::new();
        for group in GROUPS {
            let mut push = |name: String, shape: Vec<usize>| list.push((group.to_string(), name, shape));
            match group {
                "logits" | "target" => push(String::new(), vec![k, model.classes]),
                "inner_loss" | "consistency" => push(String::new(), vec![m]),
                "class_loss" => push(String::new(), vec![1]),
                "buffer" | "teacher.buffer" => model.buffers().into_iter().for_each(|(n, len)| push(n, vec![len])),
                "inner_grad" => model.params().into_iter().for_each(|p| push(p.name, [vec![m], p.shape].concat())),
                _ => model.params().into_iter().for_each(|p| push(p.name, p.shape)),
            }
        }
        list
    }

    /// Runs the step on `device`, which must be fresh.
    ///
    /// # Errors
    /// When the device refuses the plan.
    pub fn run(&self, device: &mut dyn Device, options: &PlanOptions) -> Result<StepResult> {
        let (id, groups, reported) = self.execute(device, options, None)?;
        Ok(StepResult { groups, decisions: Decisions::read(device, id, &reported)? })
    }

    /// Runs the step on `device`, which must be fresh, with `decisions` forced on its ReLUs and max-pools.
    ///
    /// # Errors
    /// When the device refuses the plan, or when these are not decisions of this step: missing ones, or a maximum
    /// outside its window.
    pub fn replay(&self, device: &mut dyn Device, options: &PlanOptions, decisions: &Decisions) -> Result<Replay> {
        let (id, groups, reported) = self.execute(device, options, Some(decisions))?;
        Ok(Replay { groups, tie_distance: tie_distance(device, id, &reported)? })
    }

    /// The plan on the device, the values of all groups, and the names of all outputs.
    fn execute(
        &self,
        device: &mut dyn Device,
        options: &PlanOptions,
        forced: Option<&Decisions>,
    ) -> Result<(PlanId, Groups, Vec<String>)> {
        let report = if forced.is_some() { Report::Replay } else { Report::Everything };
        // What a run of training has where cotangents lie in 16 bits.
        let spec = StepSpec { scaled: options.half, ..self.spec.clone() };
        let plan = Plan::build(&record_step(&spec, report)?, options)?;
        forced.map_or(Ok(()), |decisions| decisions.check(&plan))?;
        let scales = if options.half { HALF_SCALES } else { Scales::NONE };
        let scalars = StepScalars { scales, ..self.scalars };
        let scalars: Vec<f64> = scalars.in_order(&plan.scalars).collect();
        let outputs: Vec<String> = plan.outputs.iter().map(|o| o.name.clone()).collect();
        let id = device.load(plan)?;
        for (name, _) in self.state_list() {
            device.write_state(&name, HostSlice::F64(&self.reals[&format!("in.{name}")]))?;
        }
        let labels = |name: &str| -> Vec<i32> { self.integers[name].iter().map(|v| *v as i32).collect() };
        let keep = &self.integers["in.keep"];
        let kept: i64 = keep.iter().sum();
        let weights: Vec<f64> = keep.iter().map(|v| *v as f64 / kept as f64).collect();
        device.write_input(id, "x", HostSlice::F64(&self.reals["in.x"]))?;
        device.write_input(id, "y", HostSlice::I32(&labels("in.y")))?;
        device.write_input(id, "y_syn", HostSlice::I32(&labels("in.y_syn")))?;
        device.write_input(id, "class_weight", HostSlice::F64(&weights))?;
        forced.map_or(Ok(()), |decisions| decisions.write(device, id))?;
        device.run(id, &scalars)?;
        if options.half && device.read_output(id, "finite")?.to_f64() != [1.0] {
            return Err(Error::shape("golden step", "a gradient is not finite"));
        }

        let mut groups = Groups::new();
        for (group, name, _) in self.expected() {
            let full = if name.is_empty() { group.clone() } else { format!("{group}.{name}") };
            let values = match group.as_str() {
                "param" | "momentum" | "buffer" | "teacher.param" | "teacher.buffer" => device.read_state(&full)?,
                _ => device.read_output(id, &full)?,
            };
            groups.entry(group).or_default().insert(name, values.to_f64());
        }
        Ok((id, groups, outputs))
    }

    /// Compares a result with what the file says must come out, group by group.
    pub fn compare(&self, result: &StepResult) -> BTreeMap<String, Deviation> {
        let mut want = Groups::new();
        for (group, name, _) in self.expected() {
            let values = self.reals[&wanted_name(&group, &name)].clone();
            want.entry(group).or_default().insert(name, values);
        }
        deviations(&result.groups, &want)
    }
}

/// How far each group of `have` is from the same group of `want`, which has the same tensors.
pub fn deviations(have: &Groups, want: &Groups) -> BTreeMap<String, Deviation> {
    let deviation = |(group, want): (&String, &BTreeMap<String, Vec<f64>>)| {
        let [mut diff, mut want_norm, mut have_norm, mut dot] = [0.0; 4];
        for (name, want) in want {
            for (h, w) in have[group][name].iter().zip(want) {
                diff += (h - w).powi(2);
                want_norm += w * w;
                have_norm += h * h;
                dot += h * w;
            }
        }
        let deviation = Deviation {
            rel: if diff == 0.0 { 0.0 } else { (diff / want_norm).sqrt() },
            cos: if diff == 0.0 { 1.0 } else { dot / (want_norm * have_norm).sqrt() },
        };
        (group.clone(), deviation)
    };
    want.iter().map(deviation).collect()
}

impl Config {
    fn read(self) -> std::result::Result<(StepSpec, StepScalars), String> {
        if self.format != "mlnt-step-1" {
            return Err(format!("format is {:?}, expected \"mlnt-step-1\"", self.format));
        }
        let recipe = match self.update.as_str() {
            "sequential" => Recipe::Sequential,
            "joint" => Recipe::Joint,
            other => return Err(format!("update is {other:?}, expected \"sequential\" or \"joint\"")),
        };
        let kl = match self.kl.as_str() {
            "batchmean" => KlScale::BatchMean,
            "mean" => KlScale::Mean,
            other => return Err(format!("kl is {other:?}, expected \"batchmean\" or \"mean\"")),
        };
        if self.batch == 0 || self.branches == 0 {
            return Err(format!("batch {} and branches {} must be at least 1", self.batch, self.branches));
        }
        let model = ModelSpec {
            arch: self.arch,
            in_channels: self.in_channels,
            size: self.size,
            classes: self.classes,
            widths: self.widths,
            blocks: self.blocks,
        };
        let spec = StepSpec {
            model,
            batch: self.batch,
            branches: self.branches,
            recipe,
            kl,
            alpha: self.alpha,
            mentor: self.mentor,
            first_order: false,
            scaled: false,
            synthetic: Synthetic::Given,
        };
        let Config { lr, momentum, weight_decay, eta, gamma, lambda, .. } = self;
        Ok((spec, StepScalars { lr, momentum, weight_decay, eta, gamma, lambda, scales: Scales::NONE }))
    }
}

fn wanted_name(group: &str, name: &str) -> String {
    if name.is_empty() { format!("out.{group}") } else { format!("out.{group}.{name}") }
}

/// Little-endian values of `N` bytes each.
fn floats<const N: usize, V>(data: &[u8], read: impl Fn([u8; N]) -> V) -> Vec<V> {
    data.as_chunks::<N>().0.iter().map(|b| read(*b)).collect()
}
