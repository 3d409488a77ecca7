//! The labels of a run with their images, as `labels.csv` has them.

use crate::data::split::validation_split;
use crate::data::{Dataset, labels};
use crate::error::{Error, Result};
use crate::train::config::Config;
use crate::train::prepare::LabelledSet;
use crate::train::run_dir::RunDir;

/// The images whose labels are audited, in the order of `labels.csv`.
#[derive(Debug)]
pub struct Samples {
    /// Images (their own labels are the true ones, as far as anybody knows) with their given labels.
    pub set: LabelledSet,
    /// Whether the run trained on a sample; the others are its validation part.
    pub trained: Vec<bool>,
}

impl Samples {
    /// Reads the labels of the run in `dir`, whose settings are `config` and whose images are among `all`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a label file that does not belong to this run or these images, or names none.
    pub fn read(dir: &RunDir, config: &Config, all: &Dataset) -> Result<Self> {
        let path = dir.labels();
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        let indices = indices(&text).map_err(|what| Error::file(&path, what))?;
        let expected = if config.train_size == 0 { all.len() } else { config.train_size };
        if indices.len() != expected {
            let what = format!("{} labels, but the run has {expected} images", indices.len());
            return Err(Error::file(&path, what));
        }
        if let Some(index) = indices.iter().find(|&&i| i as usize >= all.len()) {
            let what = format!("index {index}, but {} has {} images now", all.name, all.len());
            return Err(Error::file(&path, what));
        }
        let images = all.subset(&indices)?;
        let given = labels::read(&path, &text, None, all)?.labels;
        let split = validation_split(&given, images.classes, config.val_fraction, config.seed)
            .map_err(|e| Error::file(&path, e))?;
        let mut trained = vec![false; given.len()];
        split.train.iter().for_each(|i| trained[*i as usize] = true);
        Ok(Samples { set: LabelledSet { images, labels: given.into_iter().map(i32::from).collect() }, trained })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.trained.len()
    }

    /// True without samples, which [`Samples::read`] refuses.
    pub fn is_empty(&self) -> bool {
        self.trained.is_empty()
    }

    /// The given label of sample `i`.
    pub fn given(&self, i: usize) -> usize {
        self.set.labels[i] as usize
    }

    /// Which given labels differ from the true ones; `None` where none does, so that none is known to be wrong.
    pub fn wrong(&self) -> Option<Vec<bool>> {
        let wrong: Vec<bool> = (0..self.len()).map(|i| self.given(i) != self.set.images.label(i)).collect();
        wrong.contains(&true).then_some(wrong)
    }
}

/// The first column of a label file, which must rise.
fn indices(text: &[u8]) -> std::result::Result<Vec<u32>, String> {
    let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).flexible(true).from_reader(text);
    let mut indices: Vec<u32> = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| e.to_string())?;
        let field = record.get(0).unwrap_or_default();
        let index = field.trim().parse().map_err(|_| format!("index `{field}` is not a whole number in range"))?;
        if let Some(last) = indices.last().filter(|last| **last >= index) {
            return Err(format!("index {index} after {last}: the lines are not in order"));
        }
        indices.push(index);
    }
    if indices.is_empty() { Err("holds no labels: there is nothing to audit".into()) } else { Ok(indices) }
}
