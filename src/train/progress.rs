//! Where a run stands, and how it is kept in a checkpoint.

use super::checkpoint::{Checkpoint, NamedTensor, TensorData, TensorSpec, match_tensors};
use super::config::Config;
use super::metrics::Phase;
use crate::device::{Device, HostSlice, HostVec};
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
}

/// The next step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Position {
    /// Index into the run's phases.
    pub phase: usize,
    /// Epoch within the phase, from 0.
    pub epoch: usize,
    /// Step within the epoch, from 0.
    pub step: usize,
    /// What the epoch's steps so far add up to.
    pub sums: EpochSums,
}

impl Position {
    /// The first step of all.
    pub const START: Position =
        Position { phase: 0, epoch: 0, step: 0, sums: EpochSums { loss: 0.0, meta_loss: 0.0, correct: 0.0 } };
}

/// The phases of a run: name and epochs.
pub fn phases(config: &Config) -> Vec<(Phase, usize)> {
    let mut list = Vec::new();
    if !config.no_baseline {
        list.push((Phase::CrossEntropy, config.epochs));
    }
    list.push((Phase::Features, config.feature_epochs));
    list.push((Phase::Mlnt, config.epochs));
    list
}

/// The whole numbers of a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    phase: usize,
    epoch: usize,
    step: usize,
    metrics_bytes: u64,
    timing_bytes: u64,
    fingerprint: String,
}

/// Name of the tensor that keeps [`EpochSums`] exactly.
const SUMS: &str = "progress.sums";

/// Lengths of a run's line files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineLengths {
    /// Of `metrics.jsonl`, bytes.
    pub metrics: u64,
    /// Of `timing.jsonl`, bytes.
    pub timing: u64,
}

/// Writes all states and the position to `path`.
///
/// # Errors
/// [`Error::Io`]; errors of the device.
pub fn save(path: &Path, device: &dyn Device, config: &Config, position: &Position, lines: LineLengths) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, meta) in device.states() {
        let data = match device.read_state(&name)? {
            HostVec::F32(v) => TensorData::F32(v),
            HostVec::F64(v) => TensorData::F64(v),
            HostVec::I32(v) => TensorData::I64(v.into_iter().map(i64::from).collect()),
        };
        tensors.push(NamedTensor { name, shape: meta.dims.to_vec(), data });
    }
    let EpochSums { loss, meta_loss, correct } = position.sums;
    let sums = TensorData::F64(vec![loss, meta_loss, correct]);
    tensors.push(NamedTensor { name: SUMS.into(), shape: vec![3], data: sums });
    let meta = Meta {
        phase: position.phase,
        epoch: position.epoch,
        step: position.step,
        metrics_bytes: lines.metrics,
        timing_bytes: lines.timing,
        fingerprint: config.fingerprint()?,
    };
    let meta = serde_json::to_value(meta).map_err(|e| Error::file(path, e))?;
    Checkpoint { tensors, meta }.save(path)
}

/// Reads a checkpoint into the device's states.
///
/// # Errors
/// [`Error::File`] when the file is damaged, of another architecture, or of a run with other settings.
pub fn load(path: &Path, device: &mut dyn Device, config: &Config) -> Result<(Position, LineLengths)> {
    let Checkpoint { tensors, meta } = Checkpoint::load(path)?;
    let meta: Meta = serde_json::from_value(meta).map_err(|e| Error::file(path, format!("metadata: {e}")))?;
    let dtype = if device.real_bytes() == 4 { Dtype::F32 } else { Dtype::F64 };
    let mut expected: Vec<TensorSpec> =
        device.states().into_iter().map(|(name, meta)| TensorSpec { name, shape: meta.dims.to_vec(), dtype }).collect();
    expected.push(TensorSpec { name: SUMS.into(), shape: vec![3], dtype: Dtype::F64 });
    let tensors = match_tensors(path, tensors, &expected)?;
    if meta.fingerprint != config.fingerprint()? {
        return Err(Error::file(path, "written by a run with other settings than config.toml beside it"));
    }
    let phases = phases(config);
    let epochs = phases.get(meta.phase).map(|p| p.1);
    if epochs.is_none_or(|epochs| meta.epoch > epochs) && meta.phase != phases.len() {
        return Err(Error::file(path, format!("stands at epoch {} of part {}", meta.epoch, meta.phase)));
    }
    let mut sums = EpochSums::default();
    for tensor in &tensors {
        match &tensor.data {
            TensorData::F64(v) if tensor.name == SUMS => {
                sums = EpochSums { loss: v[0], meta_loss: v[1], correct: v[2] };
            }
            TensorData::F32(v) => device.write_state(&tensor.name, HostSlice::F32(v))?,
            TensorData::F64(v) => device.write_state(&tensor.name, HostSlice::F64(v))?,
            _ => return Err(Error::file(path, format!("tensor {} has an unexpected type", tensor.name))),
        }
    }
    let position = Position { phase: meta.phase, epoch: meta.epoch, step: meta.step, sums };
    Ok((position, LineLengths { metrics: meta.metrics_bytes, timing: meta.timing_bytes }))
}
