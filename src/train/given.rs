//! The labels that a run is given: noise injected into the true ones, or a file's.

use std::path::Path;

use super::config::Config;
use crate::data::noise::{disagreement, inject};
use crate::data::split::balanced_subset;
use crate::data::{Dataset, labels};
use crate::error::{Error, Result};

/// The training images of a run, validation included, and their given labels.
#[derive(Debug)]
pub struct Given {
    /// The images; their own labels are the true ones.
    pub images: Dataset,
    /// The given label of each image.
    pub labels: Vec<u16>,
    /// Where the labels come from, for people.
    pub source: String,
    /// The rate asked for; for labels of a file, what the file says, if it does.
    pub nominal: Option<f64>,
    /// Part of the labels that are wrong.
    pub realised: f64,
    /// The labels as a CSV file.
    pub csv: Vec<u8>,
}

impl Given {
    /// The labels of `config` for images of the training set `all`.
    ///
    /// With noise: a balanced subset of `train-size` images is taken, and its labels corrupted. With a file: only the
    /// images that the file has labels for are used, and a balanced subset of them.
    ///
    /// # Errors
    /// [`Error::Usage`] where settings and data do not fit; those of [`labels::open`].
    pub fn new(config: &Config, all: Dataset) -> Result<Self> {
        match config.labels.as_str() {
            "" => Given::injected(config, all),
            path => Given::of_file(config, Path::new(path), &all),
        }
    }

    fn injected(config: &Config, all: Dataset) -> Result<Self> {
        let images = match chosen(config, &all)? {
            Some(chosen) => all.subset(&chosen)?,
            None => all,
        };
        let flag = |e| Error::usage(format_args!("--noise {} --noise-rate {}: {e}", config.noise, config.noise_rate));
        let noisy = inject(&images, config.noise, config.noise_rate, config.seed).map_err(flag)?;
        Ok(Given {
            csv: labels::csv::write(&images, &noisy.labels, &noisy.comments())?,
            images,
            source: config.noise.to_string(),
            nominal: Some(noisy.nominal),
            realised: noisy.realised_rate,
            labels: noisy.labels,
        })
    }

    fn of_file(config: &Config, path: &Path, all: &Dataset) -> Result<Self> {
        let set = Some(config.label_set.as_str()).filter(|set| !set.is_empty());
        let file = labels::open(path, set, all)?;
        let (covered, total) = (file.covered.len(), all.len());
        let mut images = if covered == total { all.clone() } else { all.subset(&file.covered)? };
        let mut given = file.labels;
        let flag = |e| Error::usage(format_args!("--labels {} covers {covered} images: {e}", path.display()));
        if let Some(chosen) = chosen(config, &images).map_err(flag)? {
            images = images.subset(&chosen)?;
            given = chosen.iter().map(|&i| given[i as usize]).collect();
        }
        let name = path.file_name().map_or("".into(), |name| name.to_string_lossy());
        let set_name = set.map_or(String::new(), |set| format!(", {set}"));
        let truth = if file.had_truth { "its true labels are the data set's" } else { "it has no true labels" };
        Ok(Given {
            csv: labels::csv::write(&images, &given, &[("labels", format!("{name}{set_name}"))])?,
            source: format!("{} {name}{set_name}, for {covered} of {total} images, {truth}", file.format),
            nominal: file.provenance.map(|made| made.nominal),
            realised: disagreement(&given, images.labels()),
            labels: given,
            images,
        })
    }
}

/// The balanced subset that the settings ask for; `None` for all of `data`.
fn chosen(config: &Config, data: &Dataset) -> Result<Option<Vec<u32>>> {
    let n = config.train_size;
    let flag = |e| Error::usage(format_args!("--train-size {n}: {e}"));
    match n {
        0 => Ok(None),
        _ => balanced_subset(data.labels(), data.classes, n, config.seed).map(Some).map_err(flag),
    }
}
