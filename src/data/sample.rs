//! The embedded sample: 6,000 training and 2,000 test images of Fashion-MNIST, 600 and 200 of each class.
//!
//! Source, licence (MIT, Zalando SE) and making: `assets/fashion-mnist-sample/README.md`.

use std::path::Path;

use super::dataset::{DataPair, Family, Source};
use super::idx::{self, Files};
use super::map::Bytes;
use crate::error::Result;

/// An embedded file as a [`Source`].
macro_rules! embedded {
    ($name:literal) => {
        Source {
            path: Path::new("sample").join($name),
            bytes: Bytes::embedded(include_bytes!(concat!("../../assets/fashion-mnist-sample/", $name))),
        }
    };
}

/// Decompresses the embedded sample.
///
/// # Errors
/// None unless the program was built from damaged files.
pub fn load() -> Result<DataPair> {
    let files = Files {
        train_images: embedded!("train-images-idx3-ubyte.gz"),
        train_labels: embedded!("train-labels-idx1-ubyte.gz"),
        test_images: embedded!("t10k-images-idx3-ubyte.gz"),
        test_labels: embedded!("t10k-labels-idx1-ubyte.gz"),
    };
    idx::load(&files, "fashion-mnist-sample", Family::FashionMnist)
}
