//! CIFAR-10 and CIFAR-100 in their binary versions (Krizhevsky 2009: <https://www.cs.toronto.edu/~kriz/cifar.html>).
//!
//! A file is a row of records without header: the label bytes, then 3072 pixels as `[3, 32, 32]`. The files are
//! memory-mapped and the pixels used where they lie.

use std::path::Path;

use super::dataset::{DataPair, Dataset, Family, ImageShape, Segment, Source};
use crate::error::{Error, Result};

/// Shape of every image.
pub(super) const SHAPE: ImageShape = ImageShape { channels: 3, height: 32, width: 32 };
/// Bytes of an image.
pub(super) const PIXELS: usize = 3 * 32 * 32;

/// What distinguishes the two data sets on disk.
#[derive(Debug)]
pub struct Layout {
    pub(super) name: &'static str,
    pub(super) family: Family,
    /// Training files and the records in each as published.
    train: &'static [&'static str],
    pub(super) train_records: usize,
    test: &'static str,
    pub(super) test_records: usize,
    /// Names and number of values of the label bytes that start a record; the last one is used.
    label_bytes: &'static [(&'static str, usize)],
    /// Optional file with one class name per line.
    names_file: &'static str,
    /// Class names in its absence; numbers if empty.
    names: &'static [&'static str],
}

/// CIFAR-10: five training files, one label byte.
pub const CIFAR_10: Layout = Layout {
    name: "cifar-10",
    family: Family::Cifar10,
    train: &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"],
    train_records: 10_000,
    test: "test_batch.bin",
    test_records: 10_000,
    label_bytes: &[("label", 10)],
    names_file: "batches.meta.txt",
    names: &["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
};

/// CIFAR-100: one training file, a coarse and a fine label byte, of which the fine one is used.
pub const CIFAR_100: Layout = Layout {
    name: "cifar-100",
    family: Family::Cifar100,
    train: &["train.bin"],
    train_records: 50_000,
    test: "test.bin",
    test_records: 10_000,
    label_bytes: &[("coarse label", 20), ("fine label", 100)],
    names_file: "fine_label_names.txt",
    names: &[],
};

impl Layout {
    /// True if `folder` holds at least one of this layout's data files.
    pub fn recognises(&self, folder: &Path) -> bool {
        self.train.iter().chain([&self.test]).any(|name| folder.join(name).exists())
    }

    /// Opens the data set in `folder`.
    ///
    /// Files with fewer records than published are accepted, so that a part of the set can be used; a size that is
    /// not a whole number of records, or more than published, is an error.
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
        let path = folder.join(self.names_file);
        let names = if path.exists() { Some(Source::map(path)?) } else { None };
        self.load(&train, &test, names.as_ref())
    }

    /// Reads the data set from the content of its files; `names` is the optional file of class names.
    ///
    /// # Errors
    /// As [`super::dataset::open`].
    pub fn load(&self, train: &[Source], test: &Source, names: Option<&Source>) -> Result<DataPair> {
        let names = self.class_names(names)?;
        let train = self.split(train, self.train_records, names.clone())?;
        let test = self.split(std::slice::from_ref(test), self.test_records, names)?;
        Ok(DataPair { train, test })
    }

    /// One split from its files, each of at most `most` records.
    fn split(&self, files: &[Source], most: usize, class_names: Vec<String>) -> Result<Dataset> {
        let head = self.label_bytes.len();
        let stride = head + PIXELS;
        let mut labels = Vec::new();
        let mut segments = Vec::new();
        for file in files {
            let size = file.bytes.len();
            let expected = format!("expected {most} records of {stride} bytes = {}", most * stride);
            if size == 0 {
                return Err(file.error(format!("empty, no images; {expected}")));
            }
            if size > most * stride {
                return Err(file.error(format!("oversized: {size} bytes; {expected}")));
            }
            if size % stride != 0 {
                return Err(file.error(format!("truncated: {size} bytes, not a whole number of records; {expected}")));
            }
            for (i, record) in file.bytes.chunks_exact(stride).enumerate() {
                for (&(what, values), &label) in self.label_bytes.iter().zip(record) {
                    if usize::from(label) >= values {
                        return Err(file.error(format!("{what} {label} of record {i} is outside 0..={}", values - 1)));
                    }
                }
                labels.push(u16::from(record[head - 1]));
            }
            segments.push(Segment { bytes: file.bytes.clone(), first: head, stride, count: size / stride });
        }
        Ok(Dataset::from_parts(self.name, self.family, SHAPE, class_names, labels, segments))
    }

    /// The class names of the optional file, else the built-in ones, else numbers.
    pub(super) fn class_names(&self, file: Option<&Source>) -> Result<Vec<String>> {
        let classes = self.label_bytes.last().map_or(0, |&(_, values)| values);
        let Some(file) = file else {
            return Ok(match self.names {
                [] => (0..classes).map(|class| class.to_string()).collect(),
                names => names.iter().map(|&name| name.into()).collect(),
            });
        };
        let text = std::str::from_utf8(&file.bytes).map_err(|_| file.error("class names are not UTF-8 text"))?;
        let names: Vec<String> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect();
        if names.len() != classes {
            return Err(file.error(format!("{} class names, expected {classes}", names.len())));
        }
        Ok(names)
    }
}
