//! A trained network read back from its file, with the data to run it on.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::console::note;
use super::{ModelKind, NetworkArgs, Split};
use crate::data::{Augment, Batcher, Normalise, open};
use crate::device::{Device, HostSlice, PlanId};
use crate::error::{Error, Result};
use crate::mlnt::{StateKind, record_eval, state_name};
use crate::model::ModelSpec;
use crate::plan::Plan;
use crate::train::checkpoint::{Dtype, TensorData, TensorSpec, match_tensors, read_model};
use crate::train::choice::{Precision, PrecisionChoice};
use crate::train::evaluation::for_each_batch;
use crate::train::open_device::open_device;
use crate::train::prepare::LabelledSet;
use crate::train::run_dir::RunDir;

/// The files meant by `path`: itself, or those of a run directory that `asked` names, `default` without it.
///
/// # Errors
/// [`Error::File`] when there is no such file or run, or the run is not complete.
pub(super) fn files(path: &Path, asked: Option<ModelKind>, default: &[ModelKind]) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return match asked {
            None => Ok(vec![path.to_path_buf()]),
            Some(_) => Err(Error::usage("--model goes with a run directory; a file is one network already")),
        };
    }
    let dir = RunDir::open(path)?;
    let file = |kind: &ModelKind| match kind {
        ModelKind::Student => dir.student(),
        ModelKind::Teacher => dir.teacher(),
        ModelKind::Best => dir.best(),
    };
    // A complete run has a student; cross entropy alone has no teacher.
    if !dir.student().is_file() {
        return Err(Error::file(path, "the run is not complete; continue it with mlnt train --resume"));
    }
    let files: Vec<PathBuf> = asked.as_ref().map_or(default, std::slice::from_ref).iter().map(file).collect();
    match files.iter().find(|file| !file.is_file()).filter(|_| asked.is_some()) {
        Some(missing) => Err(Error::file(missing, "the run has no such network")),
        None => Ok(files.into_iter().filter(|file| file.is_file()).collect()),
    }
}

/// What `mlnt train` writes beside a network's tensors.
#[derive(Debug, Deserialize)]
struct Metadata {
    model: ModelSpec,
    data: String,
    mean: Vec<f64>,
    std: Vec<f64>,
    class_names: Vec<String>,
}

/// A network on a device, and images with their true labels.
pub(super) struct Trained {
    device: Box<dyn Device>,
    why: String,
    plan: PlanId,
    batch: usize,
    normalise: Normalise,
    /// The images to run.
    pub set: LabelledSet,
    /// Names of the classes.
    pub class_names: Vec<String>,
}

impl Trained {
    /// Reads a network and the data that `args` asks for.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is no network of `mlnt train`; [`Error::Usage`] when the data do not fit it.
    pub fn open(path: &Path, args: &NetworkArgs) -> Result<Self> {
        let (tensors, meta) = read_model(path)?;
        let meta: Metadata = serde_json::from_value(meta)
            .map_err(|e| Error::file(path, format!("not a network of mlnt train: its metadata lack the model: {e}")))?;
        meta.model.check().map_err(|e| Error::file(path, e))?;
        let Some(dtype) = tensors.iter().map(|t| t.data.dtype()).find(|d| *d != Dtype::I64) else {
            return Err(Error::file(path, "holds no parameters"));
        };
        let (params, buffers) = (meta.model.params(), meta.model.buffers());
        let spec = |name: &str, shape: Vec<usize>, dtype| TensorSpec { name: name.to_string(), shape, dtype };
        let mut expected: Vec<TensorSpec> = params.iter().map(|p| spec(&p.name, p.shape.clone(), dtype)).collect();
        expected.extend(buffers.iter().map(|(name, len)| spec(name, vec![*len], dtype)));
        let counters = meta.model.batch_norms();
        expected.extend(counters.iter().map(|(n, _)| spec(&format!("{n}.num_batches_tracked"), vec![], Dtype::I64)));
        let tensors = match_tensors(path, tensors, &expected)?;

        let own = if dtype == Dtype::F64 { Precision::F64.into() } else { PrecisionChoice::Auto };
        let opened = open_device(args.device, args.precision.unwrap_or(own), args.threads)?;
        let (mut device, why) = (opened.device, opened.text);
        let pair = open(args.data.as_deref().unwrap_or(&meta.data))?;
        let images = if args.split == Split::Train { pair.train } else { pair.test };
        let shape = [images.channels, images.height, images.width, images.classes];
        let [h, w] = meta.model.size;
        let takes = [meta.model.in_channels, h, w, meta.model.classes];
        if shape != takes {
            let text = |[c, h, w, k]: [usize; 4]| format!("{c}×{h}×{w} in {k} classes");
            let (have, want) = (text(shape), text(takes));
            return Err(Error::usage(format_args!("{} holds images {have}, the network takes {want}", images.name)));
        }
        if meta.class_names.len() != takes[3] {
            let (names, classes) = (meta.class_names.len(), takes[3]);
            return Err(Error::file(path, format!("{names} class names for {classes} classes")));
        }
        let normalise = Normalise::new(meta.mean, meta.std).map_err(|e| Error::file(path, e))?;
        Batcher::new(&images, &normalise, Augment::NONE, 0).map_err(|e| Error::file(path, e))?;

        let batch = args.batch.min(images.len());
        let plan = Plan::build(&record_eval(&meta.model, batch, "")?, &device.plan_options())?;
        let plan = device.load(plan)?;
        let kinds = params.iter().map(|_| StateKind::Param).chain(buffers.iter().map(|_| StateKind::Buffer));
        for (tensor, kind) in tensors.iter().zip(kinds) {
            let name = state_name("", kind, &tensor.name);
            match &tensor.data {
                TensorData::F32(v) => device.write_state(&name, HostSlice::F32(v))?,
                TensorData::F64(v) => device.write_state(&name, HostSlice::F64(v))?,
                _ => return Err(Error::file(path, format!("tensor {} holds no reals", tensor.name))),
            }
        }
        let (set, class_names) = (LabelledSet::clean(images), meta.class_names);
        Ok(Trained { device, why, plan, batch, normalise, set, class_names })
    }

    /// Says on standard error where the work was done, once it is done: an error is one line without others.
    pub fn note_device(&self) {
        note(&self.why);
    }

    /// Class probabilities of all images, batch by batch.
    ///
    /// # Errors
    /// When the device fails, and whatever `use_batch` returns.
    pub fn probabilities(&mut self, f: impl FnMut(std::ops::Range<usize>, &[f64]) -> Result<()>) -> Result<()> {
        for_each_batch(&mut *self.device, self.plan, self.batch, &self.set, &self.normalise, f)
    }
}
