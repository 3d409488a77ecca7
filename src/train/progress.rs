//! Where a run stands, and how it is kept in a checkpoint.

use super::checkpoint::{Checkpoint, NamedTensor, TensorData, TensorSpec, match_tensors};
use super::config::Config;
use super::engine::{Engine, Network};
use super::filter::Filter;
use super::loss_scale::LossScale;
use super::memory::Memory;
use super::method::parts;
use super::snapshot::{Best, Snapshot};
use crate::device::{HostSlice, HostVec};
use crate::error::{Error, Result};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Sums over the steps of an epoch so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EpochSums {
    /// Of the cross entropy of the steps.
    pub loss: f64,
    /// Of the meta loss of the steps.
    pub meta_loss: f64,
    /// Samples predicted as labelled.
    pub correct: f64,
    /// Batches of which nothing was kept.
    pub skipped: f64,
    /// Steps that were not taken because their gradients overflowed.
    pub overflows: f64,
}

/// The next step of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Position {
    /// Index into the run's parts.
    pub part: usize,
    /// Epoch within the part, from 0.
    pub epoch: usize,
    /// Step within the epoch, from 0.
    pub step: usize,
    /// What the epoch's steps so far add up to.
    pub sums: EpochSums,
}

/// Everything that a run carries from step to step outside the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The next step.
    pub position: Position,
    /// Which training samples count in the classification loss.
    pub filter: Filter,
    /// Loss of every training sample in this epoch; not a number where the epoch has not been yet.
    pub losses: Vec<f32>,
    /// The best network of this iteration so far.
    pub best: Option<Best>,
    /// Scales of this part's cotangents, which its first steps find.
    pub loss_scale: Option<LossScale>,
    /// What the method remembers of the training samples.
    pub memory: Memory,
}

impl Progress {
    /// The first step of a run on `n` training samples of `classes` classes.
    pub fn start(config: &Config, n: usize, classes: usize) -> Self {
        Progress {
            position: Position::default(),
            filter: Filter::all(n),
            losses: vec![f32::NAN; n],
            best: None,
            loss_scale: None,
            memory: Memory::new(config, n, classes),
        }
    }
}

/// The whole numbers of a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    /// Index into the run's parts.
    phase: usize,
    epoch: usize,
    step: usize,
    best: Option<BestMeta>,
    loss_scale: Option<LossScale>,
    lines: LineLengths,
    fingerprint: String,
}

/// Where the best network comes from.
#[derive(Debug, Serialize, Deserialize)]
struct BestMeta {
    network: Network,
    epoch: usize,
}

/// Name of the tensor that keeps [`EpochSums`] exactly.
const SUMS: &str = "progress.sums";
/// Name of the tensor that keeps the filter.
const KEEP: &str = "progress.keep";
/// Name of the tensor that keeps the losses of an epoch that has begun.
const LOSSES: &str = "progress.losses";
/// Name of the tensor that keeps the distributions of a method's memory, where there is one.
const MEMORY: &str = "progress.memory";
/// Name of the tensor that keeps how many have gone into it of each sample.
const VISITS: &str = "progress.visits";
/// Name of the tensor that keeps the best network's accuracy exactly.
const BEST_ACCURACY: &str = "progress.best_accuracy";
/// Before the names of the best network's tensors.
const BEST: &str = "best.";

/// Lengths of the files of a run that grow, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineLengths {
    /// Of `metrics.jsonl`.
    pub metrics: u64,
    /// Of `timing.jsonl`.
    pub timing: u64,
    /// Of `iterations.jsonl`.
    pub iterations: u64,
    /// Of `losses.f32`.
    pub losses: u64,
}

/// Writes all states and the progress to `path`.
///
/// # Errors
/// [`Error::Io`]; errors of the device.
pub fn save(path: &Path, engine: &Engine, config: &Config, progress: &Progress, lines: LineLengths) -> Result<()> {
    let Progress { position, filter, losses, best, loss_scale, memory } = progress;
    let mut tensors = Vec::new();
    for (name, meta) in engine.device().states() {
        let data = match engine.device().read_state(&name)? {
            HostVec::F32(v) => TensorData::F32(v),
            HostVec::F64(v) => TensorData::F64(v),
            HostVec::I32(v) => TensorData::I64(v.into_iter().map(i64::from).collect()),
        };
        tensors.push(NamedTensor { name, shape: meta.dims.to_vec(), data });
    }
    let mut vector = |name: &str, data: TensorData| {
        tensors.push(NamedTensor { name: name.into(), shape: vec![data.len()], data });
    };
    let EpochSums { loss, meta_loss, correct, skipped, overflows } = position.sums;
    vector(SUMS, TensorData::F64(vec![loss, meta_loss, correct, skipped, overflows]));
    vector(KEEP, TensorData::U8(filter.marks().iter().map(|keep| u8::from(*keep)).collect()));
    if position.step > 0 {
        vector(LOSSES, TensorData::F32(losses.clone()));
    }
    if let Some(best) = best {
        vector(BEST_ACCURACY, TensorData::F64(vec![best.val_accuracy]));
        tensors.extend(best.values.prefixed(BEST));
    }
    if let Some(shape) = memory.shape() {
        let (visits, values) = (memory.visits().to_vec(), memory.values().to_vec());
        let shapes = [vec![visits.len()], shape.to_vec()];
        let data = [TensorData::I64(visits), TensorData::F32(values)];
        let named = [VISITS, MEMORY].into_iter().zip(shapes).zip(data);
        tensors.extend(named.map(|((name, shape), data)| NamedTensor { name: name.into(), shape, data }));
    }
    let meta = Meta {
        phase: position.part,
        epoch: position.epoch,
        step: position.step,
        best: best.as_ref().map(|best| BestMeta { network: best.network, epoch: best.epoch }),
        loss_scale: *loss_scale,
        lines,
        fingerprint: config.fingerprint()?,
    };
    let meta = serde_json::to_value(meta).map_err(|e| Error::file(path, e))?;
    Checkpoint { tensors, meta }.save(path)
}

/// Reads a checkpoint of a run on `n` training samples into the states of `engine`.
///
/// # Errors
/// [`Error::File`] when the file is damaged, of another architecture, or of a run with other settings.
pub fn load(path: &Path, engine: &mut Engine, config: &Config, n: usize) -> Result<(Progress, LineLengths)> {
    let Checkpoint { tensors, meta } = Checkpoint::load(path)?;
    let meta: Meta = serde_json::from_value(meta).map_err(|e| Error::file(path, format!("metadata: {e}")))?;
    let dtype = if engine.device().real_bytes() == 4 { Dtype::F32 } else { Dtype::F64 };
    let state = |(name, meta): (String, crate::tape::Meta)| TensorSpec { name, shape: meta.dims.to_vec(), dtype };
    let mut expected: Vec<TensorSpec> = engine.device().states().into_iter().map(state).collect();
    let states = expected.len();
    let vector = |name: &str, len, dtype| TensorSpec { name: name.into(), shape: vec![len], dtype };
    expected.extend([vector(SUMS, 5, Dtype::F64), vector(KEEP, n, Dtype::U8)]);
    if meta.step > 0 {
        expected.push(vector(LOSSES, n, Dtype::F32));
    }
    let mut progress = Progress::start(config, n, engine.model().classes);
    if let Some(shape) = progress.memory.shape() {
        expected.push(vector(VISITS, n, Dtype::I64));
        expected.push(TensorSpec { name: MEMORY.into(), shape: shape.to_vec(), dtype: Dtype::F32 });
    }
    if meta.best.is_some() {
        expected.push(vector(BEST_ACCURACY, 1, Dtype::F64));
        expected.extend(Snapshot::specs(engine.model(), BEST, dtype));
    }
    let tensors = match_tensors(path, tensors, &expected)?;
    if meta.fingerprint != config.fingerprint()? {
        return Err(Error::file(path, "written by a run with other settings than config.toml beside it"));
    }
    let parts = parts(config);
    let epochs = parts.get(meta.phase).map(|p| p.epochs);
    if epochs.is_none_or(|epochs| meta.epoch > epochs) && meta.phase != parts.len() {
        return Err(Error::file(path, format!("stands at epoch {} of part {}", meta.epoch, meta.phase)));
    }
    let mut tensors = tensors.into_iter();
    for tensor in tensors.by_ref().take(states) {
        match &tensor.data {
            TensorData::F32(v) => engine.device_mut().write_state(&tensor.name, HostSlice::F32(v))?,
            TensorData::F64(v) => engine.device_mut().write_state(&tensor.name, HostSlice::F64(v))?,
            _ => return Err(Error::file(path, format!("tensor {} has an unexpected type", tensor.name))),
        }
    }
    progress.position = Position { part: meta.phase, epoch: meta.epoch, step: meta.step, sums: EpochSums::default() };
    progress.loss_scale = meta.loss_scale;
    let (mut accuracy, mut visits) = (0.0, Vec::new());
    let rest: Vec<NamedTensor> = tensors.collect();
    let (own, best): (Vec<NamedTensor>, Vec<NamedTensor>) = rest.into_iter().partition(|t| !t.name.starts_with(BEST));
    for tensor in own {
        match (tensor.name.as_str(), tensor.data) {
            (SUMS, TensorData::F64(v)) => {
                let [loss, meta_loss, correct, skipped, overflows] = [v[0], v[1], v[2], v[3], v[4]];
                progress.position.sums = EpochSums { loss, meta_loss, correct, skipped, overflows };
            }
            (KEEP, TensorData::U8(v)) => progress.filter = Filter::of(v.into_iter().map(|keep| keep != 0).collect()),
            (LOSSES, TensorData::F32(v)) => progress.losses = v,
            (VISITS, TensorData::I64(v)) => visits = v,
            (MEMORY, TensorData::F32(v)) => progress.memory.set(v, std::mem::take(&mut visits)),
            (BEST_ACCURACY, TensorData::F64(v)) => accuracy = v[0],
            (name, _) => return Err(Error::file(path, format!("tensor {name} has an unexpected type"))),
        }
    }
    progress.best = meta.best.map(|BestMeta { network, epoch }| {
        let values = Snapshot::unprefixed(best.into_iter(), BEST);
        Best { network, epoch, val_accuracy: accuracy, values }
    });
    Ok((progress, meta.lines))
}
