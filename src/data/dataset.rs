//! One split of a data set, and how to open a data set by name or folder.

use std::fmt;
use std::path::{Path, PathBuf};

use super::cifar_python::{CIFAR_10_PYTHON, CIFAR_100_PYTHON};
use super::map::Bytes;
use super::{cifar, idx, sample};
use crate::error::{Error, Result};

/// Which well-known data set this is: it decides the class map of asymmetric noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// CIFAR-10: 3×32×32, 10 classes.
    Cifar10,
    /// CIFAR-100: 3×32×32, 100 classes (fine labels).
    Cifar100,
    /// Fashion-MNIST or the embedded sample of it: 1×28×28, 10 classes.
    FashionMnist,
    /// Any other data set, for instance MNIST.
    Other,
}

/// The shape of the images, `[C, H, W]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageShape {
    /// Channels `C`.
    pub channels: usize,
    /// Rows `H`.
    pub height: usize,
    /// Columns `W`.
    pub width: usize,
}

impl ImageShape {
    /// `C·H·W`, the bytes of one image.
    pub fn numel(self) -> usize {
        self.channels * self.height * self.width
    }
}

impl fmt::Display for ImageShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}×{}×{}", self.channels, self.height, self.width)
    }
}

/// Where the images of one file lie: image `i` starts at byte `first + i·stride`.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub bytes: Bytes,
    pub first: usize,
    pub stride: usize,
    pub count: usize,
}

/// The training or the test images of a data set with their labels. A clone shares the pixels.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// For people and file headers, for instance `cifar-10`.
    pub name: String,
    /// Which well-known data set this is.
    pub family: Family,
    /// Channels `C` of every image.
    pub channels: usize,
    /// Rows `H` of every image.
    pub height: usize,
    /// Columns `W` of every image.
    pub width: usize,
    /// Number of classes; labels are `0..classes`.
    pub classes: usize,
    /// One name per class.
    pub class_names: Vec<String>,
    labels: Vec<u16>,
    segments: Vec<Segment>,
    view: Option<Vec<u32>>,
}

impl Dataset {
    /// A data set from checked parts: every label below the number of class names, the segments' counts add up to
    /// the number of labels, and every image lies inside its segment's bytes.
    pub(super) fn from_parts(
        name: &str,
        family: Family,
        shape: ImageShape,
        class_names: Vec<String>,
        labels: Vec<u16>,
        segments: Vec<Segment>,
    ) -> Self {
        debug_assert_eq!(labels.len(), segments.iter().map(|s| s.count).sum::<usize>());
        debug_assert!(labels.iter().all(|&l| usize::from(l) < class_names.len()));
        Dataset {
            name: name.to_string(),
            family,
            channels: shape.channels,
            height: shape.height,
            width: shape.width,
            classes: class_names.len(),
            class_names,
            labels,
            segments,
            view: None,
        }
    }

    /// Number of images; at least 1 in a data set that was opened, and below 2³².
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// True for a view of no images.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// `[C, H, W]` of every image.
    pub fn shape(&self) -> ImageShape {
        ImageShape { channels: self.channels, height: self.height, width: self.width }
    }

    /// The true labels in sample order, each below `classes`.
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// The true label of sample `i`.
    ///
    /// # Panics
    /// If `i >= len()`.
    pub fn label(&self, i: usize) -> usize {
        usize::from(self.labels[i])
    }

    /// The pixels of sample `i`, `[C, H, W]`, 0 black to 255 white. Nothing is copied.
    ///
    /// # Panics
    /// If `i >= len()`.
    pub fn image(&self, i: usize) -> &[u8] {
        let mut at = match &self.view {
            Some(view) => view[i] as usize,
            None => i,
        };
        for segment in &self.segments {
            if at < segment.count {
                let start = segment.first + at * segment.stride;
                return &segment.bytes[start..start + self.shape().numel()];
            }
            at -= segment.count;
        }
        panic!("image {i} of a data set of {}", self.len());
    }

    /// Position of sample `i` in the data set as it was read, of which this may be a view.
    ///
    /// # Panics
    /// If `i >= len()`.
    pub fn original(&self, i: usize) -> u32 {
        self.view.as_ref().map_or(i as u32, |view| view[i])
    }

    /// The data set made of samples `indices` of this one, in that order, sharing its pixels.
    ///
    /// # Errors
    /// [`Error::Usage`] if an index is not below `len()`.
    pub fn subset(&self, indices: &[u32]) -> Result<Dataset> {
        if let Some(bad) = indices.iter().find(|&&i| i as usize >= self.len()) {
            return Err(Error::usage(format!("{}: sample {bad} of {}", self.name, self.len())));
        }
        let view = indices.iter().map(|&i| self.view.as_ref().map_or(i, |v| v[i as usize])).collect();
        let labels = indices.iter().map(|&i| self.labels[i as usize]).collect();
        Ok(Dataset { labels, view: Some(view), ..self.clone() })
    }
}

/// The two splits of a data set: same image shape, same classes.
#[derive(Debug, Clone)]
pub struct DataPair {
    /// For training (and validation, see [`super::split`]).
    pub train: Dataset,
    /// For the final test.
    pub test: Dataset,
}

/// One of the files of a data set: its bytes, and the path to name in errors.
#[derive(Debug, Clone)]
pub struct Source {
    /// For error messages.
    pub path: PathBuf,
    /// The content.
    pub bytes: Bytes,
}

impl Source {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// As [`Bytes::map`].
    pub fn map(path: PathBuf) -> Result<Self> {
        let bytes = Bytes::map(&path)?;
        Ok(Source { path, bytes })
    }

    /// An [`Error::File`] for this file.
    pub(super) fn error(&self, what: impl fmt::Display) -> Error {
        Error::file(&self.path, what)
    }
}

/// What [`open`] understands, for error messages.
const EXPECTED: &str = "the word `sample`, or a folder with CIFAR-10 (data_batch_1.bin … or data_batch_1 …), \
     CIFAR-100 (train.bin, test.bin or train, test) or IDX files (train-images-idx3-ubyte …)";

/// Folders into which the CIFAR archives unpack; looked for inside the given folder.
const SUBFOLDERS: [&str; 4] = ["cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python"];

/// Opens the embedded sample (`sample`) or the data set in a folder, recognised by the names of the files in it:
/// CIFAR-10 and CIFAR-100 in their binary and Python versions (also one folder down, as their archives unpack) and MNIST-like
/// sets in IDX format, plain or gzip.
///
/// # Errors
/// [`Error::File`] naming the file or folder and what is wrong: missing, not recognised, more than one data set,
/// wrong size or magic number, labels out of range, counts or image sizes that disagree, no images.
/// [`Error::Io`] if the system refuses to read.
pub fn open(spec: &str) -> Result<DataPair> {
    if spec == "sample" {
        return sample::load();
    }
    let folder = Path::new(spec);
    let meta = match folder.metadata() {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::file(folder, format!("does not exist; data is {EXPECTED}")));
        }
        Err(e) => return Err(Error::io(folder)(e)),
    };
    if !meta.is_dir() {
        return Err(Error::file(folder, format!("is a file; data is {EXPECTED}")));
    }
    let places = std::iter::once(folder.to_path_buf()).chain(SUBFOLDERS.iter().map(|s| folder.join(s)));
    let mut found: Vec<(&str, PathBuf)> = Vec::new();
    for place in places {
        for (what, recognised) in [
            ("CIFAR-10", cifar::CIFAR_10.recognises(&place)),
            ("CIFAR-100", cifar::CIFAR_100.recognises(&place)),
            ("CIFAR-10 for Python", CIFAR_10_PYTHON.recognises(&place)),
            ("CIFAR-100 for Python", CIFAR_100_PYTHON.recognises(&place)),
            ("IDX", idx::recognises(&place)),
        ] {
            if recognised {
                found.push((what, place.clone()));
            }
        }
    }
    match found.as_slice() {
        [] => Err(Error::file(folder, format!("holds no data set known here; data is {EXPECTED}"))),
        [("CIFAR-10", place)] => cifar::CIFAR_10.open(place),
        [("CIFAR-100", place)] => cifar::CIFAR_100.open(place),
        [("CIFAR-10 for Python", place)] => CIFAR_10_PYTHON.open(place),
        [("CIFAR-100 for Python", place)] => CIFAR_100_PYTHON.open(place),
        [(_, place)] => idx::open(place),
        many => {
            let list: Vec<String> = many.iter().map(|(what, place)| format!("{what} in {}", place.display())).collect();
            Err(Error::file(folder, format!("holds more than one data set: {}", list.join(", "))))
        }
    }
}
