//! Images and their labels: reading data sets, corrupting labels, splitting, augmenting and filling batches.
//!
//! - [`dataset`] one split in memory, and [`open`] for the embedded sample or a folder; [`cifar`], [`cifar_python`],
//!   [`idx`] and [`sample`] read the formats, [`pickle`] the container of two of them, [`map`] holds the bytes.
//! - [`noise`] and [`instance`] corrupt labels, [`labels`] reads and writes files of them, [`split`] takes validation
//!   and subsets.
//! - [`augment`] and [`batch`] turn pixels into normalised floats.
//!
//! Every random stream is named in [`crate::rng`].

pub mod augment;
pub mod batch;
pub mod cifar;
pub mod cifar_python;
pub mod dataset;
pub mod idx;
pub mod instance;
pub mod labels;
pub mod map;
pub mod noise;
pub mod pickle;
pub mod sample;
pub mod split;

pub use augment::{Augment, Normalise};
pub use batch::{Batcher, epoch_order};
pub use dataset::{DataPair, Dataset, open};
pub use noise::{ClassMap, NoiseKind, NoisyLabels};
pub use split::ValidationLabels;
