//! From settings to the images and labels of a run: subset, noise, validation split, normalisation.

use super::choice;
use super::config::Config;
use crate::data::noise::{NoisyLabels, corrupt};
use crate::data::split::{balanced_subset, validation_split};
use crate::data::{Augment, Batcher, ClassMap, Dataset, Normalise, ValidationLabels, labels, open};
use crate::error::{Error, Result};
use crate::model::{Arch, ModelSpec};

/// Images and the labels that go with them in this run.
#[derive(Debug)]
pub struct LabelledSet {
    /// The images; their own labels are the true ones.
    pub images: Dataset,
    /// The labels to use, one per image.
    pub labels: Vec<i32>,
}

/// Everything a run reads.
#[derive(Debug)]
pub struct Prepared {
    /// Training images with their noisy labels.
    pub train: LabelledSet,
    /// Validation images with noisy or clean labels, as the settings say.
    pub validation: LabelledSet,
    /// Test images with their true labels.
    pub test: LabelledSet,
    /// Normalisation measured on the training images.
    pub normalise: Normalise,
    /// Augmentation of training images.
    pub augment: Augment,
    /// The content of `labels.csv`.
    pub label_file: Vec<u8>,
    /// Part of the labels that the noise was to touch.
    pub nominal_noise: f64,
    /// Part of the training and validation labels that are wrong.
    pub realised_noise: f64,
}

impl Prepared {
    /// Reads the data of `config` and gives them their labels.
    ///
    /// # Errors
    /// [`Error::File`] for data that cannot be read; [`Error::Usage`] where settings and data do not fit.
    pub fn new(config: &Config) -> Result<Self> {
        let pair = open(&config.data)?;
        let classes = pair.train.classes;
        let all = match config.train_size {
            0 => pair.train,
            n => {
                let flag = |e| Error::usage(format_args!("--train-size {n}: {e}"));
                let chosen = balanced_subset(pair.train.labels(), classes, n, config.seed).map_err(flag)?;
                pair.train.subset(&chosen)?
            }
        };
        let map = ClassMap::of(&all);
        let flag = |e| Error::usage(format_args!("--noise {} --noise-rate {}: {e}", config.noise, config.noise_rate));
        let noisy = corrupt(all.labels(), classes, config.noise, config.noise_rate, config.seed, &map).map_err(flag)?;
        let label_file = labels::to_csv(&all, &noisy)?;
        let flag = |e| Error::usage(format_args!("--val-fraction {}: {e}", config.val_fraction));
        let split = validation_split(&noisy.labels, classes, config.val_fraction, config.seed).map_err(flag)?;
        let train = LabelledSet::given(&all, &noisy, &split.train)?;
        let validation = match config.val_labels {
            ValidationLabels::Noisy => LabelledSet::given(&all, &noisy, &split.validation)?,
            ValidationLabels::Clean => LabelledSet::clean(all.subset(&split.validation)?),
        };
        config.check_against_data(train.len(), validation.len())?;
        let augment = match config.augment {
            choice::Augment::None => Augment::NONE,
            choice::Augment::PadCropFlip => Augment { pad: config.pad, flip: true },
        };
        let normalise = Normalise::measure(&train.images)?;
        let flag = |e| Error::usage(format_args!("--pad {}: {e}", config.pad));
        Batcher::new(&train.images, &normalise, augment, config.seed).map_err(flag)?;
        Ok(Prepared {
            normalise,
            train,
            validation,
            test: LabelledSet::clean(pair.test),
            augment,
            label_file,
            nominal_noise: noisy.nominal,
            realised_noise: noisy.realised_rate,
        })
    }

    /// The true labels of the training images.
    pub fn train_truth(&self) -> impl Iterator<Item = i32> {
        self.train.images.labels().iter().map(|label| i32::from(*label))
    }

    /// The network of `config` for these images.
    ///
    /// # Errors
    /// [`Error::Usage`] when a stage would leave nothing of the image.
    pub fn model(&self, config: &Config) -> Result<ModelSpec> {
        let images = &self.train.images;
        let spec = ModelSpec {
            arch: Arch::PreactResnet,
            in_channels: images.channels,
            size: [images.height, images.width],
            classes: images.classes,
            widths: config.widths.clone(),
            blocks: config.blocks.clone(),
        };
        spec.check()?;
        Ok(spec)
    }
}

impl LabelledSet {
    fn given(all: &Dataset, noisy: &NoisyLabels, indices: &[u32]) -> Result<Self> {
        let label = |i: &u32| {
            let label = noisy.labels.get(*i as usize).copied();
            label.map(i32::from).ok_or_else(|| Error::usage(format!("no label for image {i}")))
        };
        Ok(LabelledSet { images: all.subset(indices)?, labels: indices.iter().map(label).collect::<Result<_>>()? })
    }

    /// Images with their true labels.
    pub fn clean(images: Dataset) -> Self {
        let labels = images.labels().iter().map(|l| i32::from(*l)).collect();
        LabelledSet { images, labels }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// True without images.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }
}
