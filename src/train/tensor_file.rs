//! Named tensors in a safetensors file: one dtype each, and one JSON value beside them.
//!
//! The JSON stands under the single metadata key `mlnt`, with sorted keys, and tensors are sorted by dtype and name:
//! the same content gives the same bytes. PyTorch reads the tensors with `safetensors.torch.load_file`.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use safetensors::tensor::{SafeTensorError, TensorView, View};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::checkpoint::{NamedTensor, TensorData};
use crate::error::{Error, Result};
use crate::fs::write_atomic;

/// The one key of the file's metadata.
const METADATA_KEY: &str = "mlnt";

impl View for &NamedTensor {
    fn dtype(&self) -> Dtype {
        self.data.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.data {
            TensorData::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            TensorData::F64(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            TensorData::I64(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            TensorData::U8(values) => Cow::Borrowed(values),
        }
    }

    fn data_len(&self) -> usize {
        self.data.len() * self.data.dtype().bitsize() / 8
    }
}

/// Writes `tensors` and `meta` as a file of `format`.
///
/// # Errors
/// [`Error::File`] for a name that comes twice or data that do not fill their shape; [`Error::Io`].
pub fn write(path: &Path, format: &str, tensors: &[NamedTensor], meta: &Value) -> Result<()> {
    let mut names = BTreeSet::new();
    for tensor in tensors {
        if !names.insert(&tensor.name) {
            return Err(Error::file(path, format_args!("tensor {} comes twice", tensor.name)));
        }
        if tensor.shape.iter().product::<usize>() != tensor.data.len() {
            let what = format!("tensor {}: {} values for shape {:?}", tensor.name, tensor.data.len(), tensor.shape);
            return Err(Error::file(path, what));
        }
    }
    let mut header = json!({ "format": format, "meta": meta });
    header.sort_all_objects();
    let metadata = HashMap::from([(METADATA_KEY.to_string(), header.to_string())]);
    let views = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| Error::file(path, error))?;
    write_atomic(path, &bytes)
}

/// Reads the tensors of a file, in order of their names, and its JSON value: `None` when the file has no metadata of
/// this program.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] for a file that is cut short, no safetensors file, of another format or version
/// than `format`, or with a dtype that this program has no use for.
pub fn read(path: &Path, format: &str) -> Result<(Vec<NamedTensor>, Option<Value>)> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| explain(path, bytes.len(), &error))?;
    let metadata = header.metadata().as_ref().and_then(|map| map.get(METADATA_KEY));
    let meta = metadata.map(|text| parse_metadata(path, format, text)).transpose()?;

    let file = SafeTensors::deserialize(&bytes).map_err(|error| explain(path, bytes.len(), &error))?;
    let mut tensors = file.iter().map(|(name, view)| decode(path, name, &view)).collect::<Result<Vec<_>>>()?;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((tensors, meta))
}

/// The JSON value in the metadata `text` of a file of `format`.
fn parse_metadata(path: &Path, format: &str, text: &str) -> Result<Value> {
    let mut header: Value =
        serde_json::from_str(text).map_err(|error| Error::file(path, format_args!("metadata: {error}")))?;
    let found = header.get("format").and_then(Value::as_str).unwrap_or("unknown");
    if found != format {
        return Err(Error::file(path, format_args!("format {found}; this program reads {format} here")));
    }
    Ok(header.get_mut("meta").map_or(Value::Null, Value::take))
}

/// One tensor out of the file.
fn decode(path: &Path, name: &str, view: &TensorView<'_>) -> Result<NamedTensor> {
    let bytes = view.data();
    let data = match view.dtype() {
        Dtype::F32 => TensorData::F32(bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()),
        Dtype::F64 => TensorData::F64(bytes.as_chunks().0.iter().map(|&value| f64::from_le_bytes(value)).collect()),
        Dtype::I64 => TensorData::I64(bytes.as_chunks().0.iter().map(|&value| i64::from_le_bytes(value)).collect()),
        Dtype::U8 => TensorData::U8(bytes.to_vec()),
        other => {
            let what = format!("tensor {name} has dtype {other}; this program reads F32, F64, I64 and U8");
            return Err(Error::file(path, what));
        }
    };
    Ok(NamedTensor { name: name.to_string(), shape: view.shape().to_vec(), data })
}

/// What is wrong with a file of `len` bytes that is no whole safetensors file.
fn explain(path: &Path, len: usize, error: &SafeTensorError) -> Error {
    let what = match error {
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            format!("cut short: its {len} bytes do not hold a whole safetensors header")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("cut short or overlong: its {len} bytes are not what its header describes")
        }
        other => format!("not a safetensors file: {other}"),
    };
    Error::file(path, what)
}
