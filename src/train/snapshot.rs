//! A network's parameters and running statistics on the host: the best of an iteration, and files of networks.

use super::checkpoint::{Dtype, NamedTensor, TensorData, TensorSpec, save_model};
use super::engine::{Engine, Network};
use crate::device::{HostSlice, HostVec};
use crate::error::{Error, Result};
use crate::mlnt::{StateKind, state_name};
use crate::model::ModelSpec;
use serde_json::Value;
use std::path::Path;

/// A copy of a network.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Parameters, then running statistics, under PyTorch's names.
    tensors: Vec<NamedTensor>,
}

/// The best network of an iteration so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// Which of the iteration's networks: the one that SGD trains is the student.
    pub network: Network,
    /// After which epoch, from 1.
    pub epoch: usize,
    /// Its accuracy on the validation images.
    pub val_accuracy: f64,
    /// Its values.
    pub values: Snapshot,
}

/// Kinds, names and shapes of a snapshot's tensors, in their order.
fn layout(model: &ModelSpec) -> Vec<(StateKind, String, Vec<usize>)> {
    let params = model.params().into_iter().map(|p| (StateKind::Param, p.name, p.shape));
    let buffers = model.buffers().into_iter().map(|(name, len)| (StateKind::Buffer, name, vec![len]));
    params.chain(buffers).collect()
}

impl Snapshot {
    /// The values of `network` now.
    ///
    /// # Errors
    /// When the device fails.
    pub fn take(engine: &Engine, network: Network) -> Result<Self> {
        let read = |(kind, name, shape): (StateKind, String, Vec<usize>)| {
            let data = match engine.device().read_state(&state_name(network.owner(), kind, &name))? {
                HostVec::F64(v) => TensorData::F64(v),
                HostVec::F32(v) => TensorData::F32(v),
                HostVec::I32(v) => TensorData::I64(v.into_iter().map(i64::from).collect()),
            };
            Ok(NamedTensor { name, shape, data })
        };
        Ok(Snapshot { tensors: layout(engine.model()).into_iter().map(read).collect::<Result<_>>()? })
    }

    /// Gives these values to `network`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn put(&self, engine: &mut Engine, network: Network) -> Result<()> {
        let layout = layout(engine.model());
        for (tensor, (kind, name, _)) in self.tensors.iter().zip(layout) {
            let name = state_name(network.owner(), kind, &name);
            match &tensor.data {
                TensorData::F32(v) => engine.device_mut().write_state(&name, HostSlice::F32(v))?,
                TensorData::F64(v) => engine.device_mut().write_state(&name, HostSlice::F64(v))?,
                _ => return Err(Error::shape("snapshot", format!("{name} holds no reals"))),
            }
        }
        Ok(())
    }

    /// Writes it as a network file, after `steps` training steps.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path, model: &ModelSpec, steps: usize, metadata: &Value) -> Result<()> {
        let mut tensors = self.tensors.clone();
        for (name, _) in model.batch_norms() {
            // PyTorch's batch norms count the batches they have seen.
            let data = TensorData::I64(vec![steps as i64]);
            tensors.push(NamedTensor { name: format!("{name}.num_batches_tracked"), shape: vec![], data });
        }
        save_model(path, &tensors, metadata)
    }

    /// Its tensors, with `prefix` before their names.
    pub fn prefixed(&self, prefix: &str) -> impl Iterator<Item = NamedTensor> {
        self.tensors.iter().map(move |t| NamedTensor { name: format!("{prefix}{}", t.name), ..t.clone() })
    }

    /// What [`Snapshot::prefixed`] gives for a network of `model`.
    pub fn specs(model: &ModelSpec, prefix: &str, dtype: Dtype) -> Vec<TensorSpec> {
        let spec = |(_, name, shape): (StateKind, String, Vec<usize>)| TensorSpec {
            name: format!("{prefix}{name}"),
            shape,
            dtype,
        };
        layout(model).into_iter().map(spec).collect()
    }

    /// The snapshot whose [`Snapshot::prefixed`] tensors these are.
    pub fn unprefixed(tensors: impl Iterator<Item = NamedTensor>, prefix: &str) -> Self {
        let strip =
            |t: NamedTensor| NamedTensor { name: t.name.strip_prefix(prefix).unwrap_or(&t.name).to_string(), ..t };
        Snapshot { tensors: tensors.map(strip).collect() }
    }
}

impl Best {
    /// Whether a network with `val_accuracy` is better than `best`: of equals the earlier one stays.
    pub fn is_beaten(best: Option<&Best>, val_accuracy: f64) -> bool {
        best.is_none_or(|best| val_accuracy > best.val_accuracy)
    }
}
