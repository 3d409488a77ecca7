//! CIFAR-10 and CIFAR-100 in their Python versions (Krizhevsky 2009: <https://www.cs.toronto.edu/~kriz/cifar.html>).
//!
//! A file is a pickle, written by Python 2, of a dictionary with `data`, a uint8 array `[n, 3072]` of images
//! `[3, 32, 32]`, and `labels` or `fine_labels`, a list. Images and order are those of the binary version. The files
//! are memory-mapped and the pixels used where they lie.

use std::path::Path;

use super::cifar::{CIFAR_10, CIFAR_100, Layout, PIXELS, SHAPE};
use super::dataset::{DataPair, Dataset, Segment, Source};
use super::map::Bytes;
use super::pickle::{Id, Pickle};
use crate::error::{Error, Result};

/// What distinguishes the two data sets on disk.
#[derive(Debug)]
pub struct PythonLayout {
    /// Name, family and sizes, which are those of the binary version.
    binary: &'static Layout,
    train: &'static [&'static str],
    test: &'static str,
    /// File of class names.
    meta: &'static str,
    /// Key of the labels.
    labels: &'static str,
    /// Key of the class names in the file `meta`.
    names: &'static str,
}

/// CIFAR-10: five training files.
pub const CIFAR_10_PYTHON: PythonLayout = PythonLayout {
    binary: &CIFAR_10,
    train: &["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"],
    test: "test_batch",
    meta: "batches.meta",
    labels: "labels",
    names: "label_names",
};

/// CIFAR-100: one training file; the fine labels are used.
pub const CIFAR_100_PYTHON: PythonLayout = PythonLayout {
    binary: &CIFAR_100,
    train: &["train"],
    test: "test",
    meta: "meta",
    labels: "fine_labels",
    names: "fine_label_names",
};

impl PythonLayout {
    /// True if `folder` holds at least one of this layout's data files; a folder named `train` is none.
    pub fn recognises(&self, folder: &Path) -> bool {
        self.train.iter().chain([&self.test]).any(|name| folder.join(name).is_file())
    }

    /// Opens the data set in `folder`. As in the binary version, files may have fewer images than published, and the
    /// file of class names may be missing.
    ///
    /// # Errors
    /// As [`super::dataset::open`].
    pub fn open(&self, folder: &Path) -> Result<DataPair> {
        let find = |name: &&str| {
            let path = folder.join(name);
            if path.exists() { Source::map(path) } else { Err(Error::file(folder, format!("{name} not found"))) }
        };
        let train = self.train.iter().map(find).collect::<Result<Vec<_>>>()?;
        let test = find(&self.test)?;
        let meta = folder.join(self.meta);
        let meta = if meta.exists() { Some(Source::map(meta)?) } else { None };
        self.load(&train, &test, meta.as_ref())
    }

    /// Reads the data set from the content of its files; `meta` is the optional file of class names.
    ///
    /// # Errors
    /// As [`super::dataset::open`].
    pub fn load(&self, train: &[Source], test: &Source, meta: Option<&Source>) -> Result<DataPair> {
        let names = match meta {
            Some(file) => self.class_names(file).map_err(|what| file.error(what))?,
            None => self.binary.class_names(None)?,
        };
        let train = self.split(train, self.binary.train_records, names.clone())?;
        let test = self.split(std::slice::from_ref(test), self.binary.test_records, names)?;
        Ok(DataPair { train, test })
    }

    /// One split from its files, each of at most `most` images.
    fn split(&self, files: &[Source], most: usize, names: Vec<String>) -> Result<Dataset> {
        let mut labels = Vec::new();
        let mut segments = Vec::new();
        for file in files {
            let (segment, given) = self.batch(file, most, names.len()).map_err(|what| file.error(what))?;
            labels.extend(given);
            segments.push(segment);
        }
        Ok(Dataset::from_parts(self.binary.name, self.binary.family, SHAPE, names, labels, segments))
    }

    /// Images and labels of one file.
    fn batch(&self, file: &Source, most: usize, classes: usize) -> std::result::Result<(Segment, Vec<u16>), String> {
        let pickle = Pickle::read(&file.bytes)?;
        let entries = pickle.dict(pickle.root())?;
        let data = pickle.array(entry(&entries, "data")?).map_err(|what| format!("`data`: {what}"))?;
        let count = match (data.shape.as_slice(), data.dtype.as_str()) {
            (&[count, PIXELS], "|u1") if count <= most => count,
            (shape, dtype) => {
                return Err(format!(
                    "`data` is an array {shape:?} of type `{dtype}`; expected [n, {PIXELS}] of `|u1`, n ≤ {most}"
                ));
            }
        };
        let items = pickle.list(entry(&entries, self.labels)?).map_err(|what| format!("`{}`: {what}", self.labels))?;
        if items.len() != count {
            return Err(format!("{} labels in `{}` for {count} images", items.len(), self.labels));
        }
        let label = |(i, &id): (usize, &Id)| {
            let value = pickle.int(id).ok_or_else(|| format!("`{}[{i}]` is no number", self.labels))?;
            let known = u16::try_from(value).ok().filter(|&label| usize::from(label) < classes);
            known.ok_or_else(|| format!("label {value} in `{}[{i}]` is outside 0..={}", self.labels, classes - 1))
        };
        let labels = items.iter().enumerate().map(label).collect::<std::result::Result<_, _>>()?;
        let (bytes, first) = match data.start {
            Some(start) if !data.fortran => (file.bytes.clone(), start),
            _ if !data.fortran => (Bytes::from(data.bytes.into_owned()), 0),
            _ => (Bytes::from(transposed(&data.bytes, count)), 0),
        };
        Ok((Segment { bytes, first, stride: PIXELS, count }, labels))
    }

    /// The class names in the file `meta`.
    fn class_names(&self, file: &Source) -> std::result::Result<Vec<String>, String> {
        let classes = self.binary.class_names(None).map_err(|e| e.to_string())?.len();
        let pickle = Pickle::read(&file.bytes)?;
        let entries = pickle.dict(pickle.root())?;
        let items = pickle.list(entry(&entries, self.names)?).map_err(|what| format!("`{}`: {what}", self.names))?;
        if items.len() != classes {
            return Err(format!("{} class names, expected {classes}", items.len()));
        }
        let name = |(i, &id): (usize, &Id)| {
            pickle.text(id).map(String::from).ok_or_else(|| format!("`{}[{i}]` is no text", self.names))
        };
        items.iter().enumerate().map(name).collect()
    }
}

/// The entry `key` of a dictionary.
fn entry(entries: &[(&str, Id)], key: &str) -> std::result::Result<Id, String> {
    entries.iter().rev().find(|(name, _)| *name == key).map(|&(_, id)| id).ok_or_else(|| format!("no entry `{key}`"))
}

/// Images `[count, PIXELS]` from an array in which the images run fastest.
fn transposed(bytes: &[u8], count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| bytes.iter().copied().skip(i).step_by(count)).collect()
}
