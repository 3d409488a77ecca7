//! Checkpoints and trained networks as safetensors files, checked against the network they are meant for.

use std::collections::BTreeMap;
use std::path::Path;

pub use safetensors::Dtype;
use serde_json::Value;

use super::tensor_file;
use crate::error::{Error, Result};

/// Format and version of a checkpoint, in the file's metadata.
pub const CHECKPOINT_FORMAT: &str = "mlnt-checkpoint-1";
/// Format and version of a trained network, in the file's metadata.
pub const MODEL_FORMAT: &str = "mlnt-model-1";

/// The values of a tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// 64-bit signed integers.
    I64(Vec<i64>),
    /// Bytes.
    U8(Vec<u8>),
}

impl TensorData {
    /// The element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            TensorData::F32(_) => Dtype::F32,
            TensorData::F64(_) => Dtype::F64,
            TensorData::I64(_) => Dtype::I64,
            TensorData::U8(_) => Dtype::U8,
        }
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        match self {
            TensorData::F32(values) => values.len(),
            TensorData::F64(values) => values.len(),
            TensorData::I64(values) => values.len(),
            TensorData::U8(values) => values.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tensor and its name; shape `[]` is a scalar with one value (PyTorch's `num_batches_tracked`).
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// The name, PyTorch's for a network's tensors: `layer1.0.bn1.running_mean`.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// As many values as the product of `shape`.
    pub data: TensorData,
}

/// What a network needs a tensor to be.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// The name.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The element type.
    pub dtype: Dtype,
}

/// Everything from which a run continues bit for bit.
///
/// JSON numbers that are not whole may lose their last bit on the way back: exact floats belong in a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Weights, momenta, statistics, random state.
    pub tensors: Vec<NamedTensor>,
    /// Progress, lengths of the run's line files, fingerprint of the settings, architecture.
    pub meta: Value,
}

impl Checkpoint {
    /// Writes the checkpoint; the same content gives the same bytes. The file before it stays until this one is whole.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for tensors that contradict themselves.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        tensor_file::write(path.as_ref(), CHECKPOINT_FORMAT, &self.tensors, &self.meta)
    }

    /// Reads a checkpoint, its tensors in order of their names.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a file that is cut short, no checkpoint or one of another version.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match tensor_file::read(path, CHECKPOINT_FORMAT)? {
            (tensors, Some(meta)) => Ok(Checkpoint { tensors, meta }),
            (_, None) => Err(Error::file(path, "a safetensors file, but no checkpoint of this program")),
        }
    }
}

/// Writes a network for use outside: `student.safetensors` or `teacher.safetensors`, with `metadata` for this program
/// (the architecture). PyTorch loads it by name; `load_state_dict(strict=True)` wants `num_batches_tracked` too.
///
/// # Errors
/// As [`Checkpoint::save`].
pub fn save_model(path: impl AsRef<Path>, tensors: &[NamedTensor], metadata: &Value) -> Result<()> {
    tensor_file::write(path.as_ref(), MODEL_FORMAT, tensors, metadata)
}

/// Reads any network, its tensors in order of their names, and what [`save_model`] was given as metadata
/// ([`Value::Null`] for a file of another program).
///
/// # Errors
/// As [`Checkpoint::load`].
pub fn read_model(path: impl AsRef<Path>) -> Result<(Vec<NamedTensor>, Value)> {
    let (tensors, meta) = tensor_file::read(path.as_ref(), MODEL_FORMAT)?;
    Ok((tensors, meta.unwrap_or(Value::Null)))
}

/// Reads a network of a known architecture, in the order of `expected`.
///
/// # Errors
/// As [`read_model`] and [`match_tensors`].
pub fn load_model(path: impl AsRef<Path>, expected: &[TensorSpec]) -> Result<(Vec<NamedTensor>, Value)> {
    let path = path.as_ref();
    let (tensors, metadata) = read_model(path)?;
    Ok((match_tensors(path, tensors, expected)?, metadata))
}

/// The tensors read from `path` in the order of `expected`, when they are those and no others.
///
/// # Errors
/// [`Error::File`] for the first tensor that is missing, of another shape or dtype, or not expected: a checkpoint of
/// another architecture.
pub fn match_tensors(path: &Path, tensors: Vec<NamedTensor>, expected: &[TensorSpec]) -> Result<Vec<NamedTensor>> {
    let foreign = |what: String| Error::file(path, format_args!("a checkpoint of another architecture: {what}"));
    let mut found: BTreeMap<String, NamedTensor> =
        tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    let mut matched = Vec::with_capacity(expected.len());
    for TensorSpec { name, shape, dtype } in expected {
        let Some(tensor) = found.remove(name) else {
            return Err(foreign(format!("it has no tensor {name} of shape {shape:?}")));
        };
        let has = tensor.data.dtype();
        if tensor.shape != *shape {
            return Err(foreign(format!("tensor {name} has shape {:?}, the network needs {shape:?}", tensor.shape)));
        }
        if has != *dtype {
            return Err(foreign(format!(
                "tensor {name} of shape {shape:?} has dtype {has}, the network needs {dtype}"
            )));
        }
        matched.push(tensor);
    }
    match found.into_values().next() {
        Some(NamedTensor { name, shape, .. }) => {
            Err(foreign(format!("it has a tensor {name} of shape {shape:?}, which the network does not")))
        }
        None => Ok(matched),
    }
}
