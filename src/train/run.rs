//! The training loop, top to bottom.

use super::checkpoint::{NamedTensor, TensorData, save_model};
use super::config::Config;
use super::engine::{Engine, Network, StepOutcome};
use super::event_file::EventFile;
use super::feed::{self, Feed};
use super::metrics::{EpochRecord, Phase, TimingRecord};
use super::prepare::Prepared;
use super::progress::{self, EpochSums, LineLengths, Position, phases};
use super::run_dir::{JsonLines, RunDir};
use super::summary;
use super::table::SummaryRow;
use crate::data::{Batcher, epoch_order};
use crate::device::{HostVec, ImagesId};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::mlnt::{StateKind, StepScalars, draw_ranks, state_name};
use crate::rng::{Purpose, stream};
use std::fs::File;
use std::time::Instant;

/// Who watches a run.
pub trait Observer {
    /// A phase begins, or goes on after `done` of its `total` steps.
    fn phase(&mut self, phase: Phase, done: usize, total: usize);
    /// A step is over.
    fn step(&mut self, outcome: &StepOutcome);
    /// An epoch is over and evaluated.
    fn epoch(&mut self, record: &EpochRecord, epochs: usize);
    /// Asked after every step: whether to stop, with a checkpoint.
    fn wants_stop(&self) -> bool;
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// All phases are complete.
    Complete(Vec<SummaryRow>),
    /// It was asked to stop; the checkpoint continues from the next step.
    Stopped,
}

/// A run: its settings, its data, its networks, its files.
pub struct Run {
    config: Config,
    data: Prepared,
    engine: Engine,
    /// The training images on the device, if it makes batches.
    kept: Option<ImagesId>,
    dir: RunDir,
    metrics: JsonLines,
    timing: JsonLines,
    events: EventFile,
    position: Position,
    /// Held as long as this process trains the run.
    _lock: File,
}

/// Takes hold of a run's directory, so that no second process continues it at the same time.
fn lock(dir: &RunDir) -> Result<File> {
    let path = dir.config();
    let file = File::open(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::file(dir.path(), "another process is training this run")),
        // A file system without locks serves as well.
        _ => Ok(file),
    }
}

/// Gives the training images to a device that makes batches itself.
fn keep_images(config: &Config, data: &Prepared, engine: &mut Engine) -> Result<Option<ImagesId>> {
    feed::keep_images(engine, &Batcher::new(&data.train.images, &data.normalise, data.augment, config.seed)?)
}

impl Run {
    /// A new run in a new directory, with a checkpoint of its very beginning.
    ///
    /// # Errors
    /// As [`RunDir::create`].
    pub fn create(config: Config, data: Prepared, mut engine: Engine) -> Result<Self> {
        let dir = RunDir::create(&config)?;
        let path = dir.path().to_path_buf();
        let begin = move || -> Result<Self> {
            write_atomic(dir.labels(), &data.label_file)?;
            let (metrics, timing) = (JsonLines::create(dir.metrics())?, JsonLines::create(dir.timing())?);
            let events = EventFile::new(dir.tensorboard());
            let lock = lock(&dir)?;
            let position = Position::START;
            let kept = keep_images(&config, &data, &mut engine)?;
            let mut run = Run { config, data, engine, kept, dir, metrics, timing, events, position, _lock: lock };
            run.save()?;
            Ok(run)
        };
        // A directory without a checkpoint is no run: it goes again. The error to tell is the first one.
        begin().inspect_err(|_| std::fs::remove_dir_all(&path).unwrap_or_default())
    }

    /// The run of an existing directory, as its checkpoint left it.
    ///
    /// # Errors
    /// [`Error::File`] when the checkpoint or the labels do not belong to this run, or another process is training it.
    pub fn resume(config: Config, data: Prepared, mut engine: Engine, dir: RunDir) -> Result<Self> {
        let labels = std::fs::read(dir.labels()).map_err(Error::io(dir.labels()))?;
        if labels != data.label_file {
            return Err(Error::file(dir.labels(), "not the labels that this data, noise and seed give"));
        }
        let lock = lock(&dir)?;
        let (position, lines) = progress::load(&dir.checkpoint(), engine.device_mut(), &config)?;
        let metrics = JsonLines::resume(dir.metrics(), lines.metrics)?;
        let timing = JsonLines::resume(dir.timing(), lines.timing)?;
        let events = EventFile::new(dir.tensorboard());
        let kept = keep_images(&config, &data, &mut engine)?;
        Ok(Run { config, data, engine, kept, dir, metrics, timing, events, position, _lock: lock })
    }

    /// The run's directory.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// True when no step is left.
    pub fn is_complete(&self) -> bool {
        self.position.phase >= phases(&self.config).len()
    }

    /// Trains from where the run stands to its end.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss is not finite: the last checkpoint stays as it was. Errors of files and device.
    pub fn train(&mut self, observer: &mut dyn Observer) -> Result<Ending> {
        let steps = self.data.train.len() / self.config.batch;
        let phases = phases(&self.config);
        while let Some(&(phase, epochs)) = phases.get(self.position.phase) {
            observer.phase(phase, self.position.epoch * steps + self.position.step, epochs * steps);
            while self.position.epoch < epochs {
                if !self.epoch(phase, epochs, steps, observer)? {
                    self.save()?;
                    return Ok(Ending::Stopped);
                }
            }
            self.position = Position { phase: self.position.phase + 1, ..Position::START };
        }
        self.save()?;
        self.export()?;
        let rows = summary::write(&self.dir, &self.data.label_source, self.data.realised_noise)?;
        Ok(Ending::Complete(rows))
    }

    /// The rest of an epoch, its evaluation and its checkpoint; false when asked to stop before its end.
    fn epoch(&mut self, phase: Phase, epochs: usize, steps: usize, observer: &mut dyn Observer) -> Result<bool> {
        let (config, k) = (self.config.clone(), self.config.batch);
        let epoch = self.position.epoch;
        let order = epoch_order(self.data.train.len(), config.seed, epoch as u64);
        let ids = |step: usize| &order[step * k..(step + 1) * k];
        let start = Instant::now();
        let batcher = Batcher::new(&self.data.train.images, &self.data.normalise, self.data.augment, config.seed)?;
        let mut feed = Feed::new(batcher, self.kept);
        let network = phase.network();
        if self.position.step < steps {
            feed.prepare(&mut self.engine, network, epoch as u64, ids(self.position.step))?;
        }
        let mut y = vec![0; k];
        while self.position.step < steps {
            let step = self.position.step;
            y.iter_mut().zip(ids(step)).for_each(|(y, i)| *y = self.data.train.labels[*i as usize]);
            match phase {
                Phase::CrossEntropy => self.engine.begin_ce(network, feed.images(), &y, config.lr_at(epoch))?,
                Phase::Features => self.engine.begin_ce(network, feed.images(), &y, config.feature_lr)?,
                Phase::Mlnt => {
                    let mut rng = stream(config.seed, Purpose::Synthetic, epoch as u64, step as u64);
                    let replaced = (config.rho * k as f64).round() as usize;
                    let ranks = draw_ranks(k, config.neighbours, replaced, config.branches, &mut rng);
                    let scalars = StepScalars {
                        lr: config.lr_at(epoch),
                        eta: config.eta_at(epoch as f64 + step as f64 / steps as f64),
                        gamma: config.gamma_at(epoch),
                        lambda: 1.0,
                    };
                    self.engine.begin_mlnt(feed.images(), &y, &ranks, scalars)?;
                }
            }
            if step + 1 < steps {
                // While the device works.
                feed.prepare(&mut self.engine, network, epoch as u64, ids(step + 1))?;
            }
            let outcome = self.engine.outcome(network, &y)?;
            self.check_finite(phase, step, &outcome)?;
            self.position.sums.loss += outcome.loss;
            self.position.sums.meta_loss += outcome.meta_loss.unwrap_or(0.0);
            self.position.sums.correct += outcome.correct as f64;
            self.position.step += 1;
            observer.step(&outcome);
            if observer.wants_stop() && self.position.step < steps {
                self.check_networks(phase)?;
                return Ok(false);
            }
        }
        self.check_networks(phase)?;
        let trained = start.elapsed().as_secs_f64();
        let record = self.evaluate(phase, steps)?;
        let times = TimingRecord {
            phase,
            epoch: epoch + 1,
            train_seconds: trained,
            eval_seconds: start.elapsed().as_secs_f64() - trained,
        };
        self.metrics.append(&record)?;
        self.timing.append(&times)?;
        self.events.append(&record)?;
        self.position = Position { epoch: epoch + 1, step: 0, sums: EpochSums::default(), ..self.position };
        self.save()?;
        observer.epoch(&record, epochs);
        Ok(!observer.wants_stop())
    }

    fn check_finite(&self, phase: Phase, step: usize, outcome: &StepOutcome) -> Result<()> {
        let meta = outcome.meta_loss.unwrap_or(0.0);
        if outcome.loss.is_finite() && meta.is_finite() {
            return Ok(());
        }
        let what = format!("the loss is not a number any more (loss {}, meta loss {meta})", outcome.loss);
        Err(self.diverged(phase, step + 1, &what))
    }

    /// A step whose loss is still finite may leave weights that are not; they must reach neither the checkpoint nor
    /// the results.
    fn check_networks(&self, phase: Phase) -> Result<()> {
        match self.engine.not_finite()? {
            None => Ok(()),
            Some(name) => Err(self.diverged(phase, self.position.step, &format!("{name} is not finite any more"))),
        }
    }

    fn diverged(&self, phase: Phase, step: usize, what: &str) -> Error {
        let (part, rate) = match phase {
            Phase::CrossEntropy => ("cross entropy", "--lr"),
            Phase::Features => ("the feature network", "--feature-lr"),
            Phase::Mlnt => ("MLNT", "--lr, --alpha or --eta"),
        };
        let (epoch, checkpoint) = (self.position.epoch + 1, self.dir.checkpoint());
        Error::Diverged(format!(
            "{what} in epoch {epoch}, step {step} of {part}; the last good checkpoint is {}; start again with a smaller \
             {rate}",
            checkpoint.display(),
        ))
    }

    fn evaluate(&mut self, phase: Phase, steps: usize) -> Result<EpochRecord> {
        let (epoch, sums) = (self.position.epoch, self.position.sums);
        let Prepared { validation, test, normalise, .. } = &self.data;
        let mut accuracies = |network| -> Result<[Option<f64>; 2]> {
            let val = self.engine.accuracy(network, validation, normalise)?;
            Ok([val, self.engine.accuracy(network, test, normalise)?])
        };
        let ([val, test], [teacher_val, teacher_test]) = match phase {
            Phase::CrossEntropy => (accuracies(Network::Baseline)?, [None; 2]),
            Phase::Features => ([None; 2], [None; 2]),
            Phase::Mlnt => (accuracies(Network::Student)?, accuracies(Network::Teacher)?),
        };
        let mlnt = phase == Phase::Mlnt;
        Ok(EpochRecord {
            phase,
            epoch: epoch + 1,
            lr: if phase == Phase::Features { self.config.feature_lr } else { self.config.lr_at(epoch) },
            eta: if mlnt { self.config.eta_at(epoch as f64 + 1.0) } else { 0.0 },
            train_loss: sums.loss / steps as f64,
            meta_loss: mlnt.then_some(sums.meta_loss / steps as f64),
            train_accuracy: sums.correct / (steps * self.config.batch) as f64,
            val_accuracy: val,
            test_accuracy: test,
            teacher_val_accuracy: teacher_val,
            teacher_test_accuracy: teacher_test,
        })
    }

    fn save(&mut self) -> Result<()> {
        let lines = LineLengths { metrics: self.metrics.sync()?, timing: self.timing.sync()? };
        progress::save(&self.dir.checkpoint(), self.engine.device(), &self.config, &self.position, lines)
    }

    /// Writes student and teacher under PyTorch's names.
    fn export(&self) -> Result<()> {
        let steps = self.data.train.len() / self.config.batch * self.config.epochs;
        for (network, path) in [(Network::Student, self.dir.student()), (Network::Teacher, self.dir.teacher())] {
            let mut tensors = Vec::new();
            let mut push = |name: String, shape: Vec<usize>, kind: StateKind| -> Result<()> {
                let values = self.engine.device().read_state(&state_name(network.owner(), kind, &name))?;
                let data = match values {
                    HostVec::F64(v) => TensorData::F64(v),
                    HostVec::F32(v) => TensorData::F32(v),
                    HostVec::I32(v) => TensorData::I64(v.into_iter().map(i64::from).collect()),
                };
                tensors.push(NamedTensor { name, shape, data });
                Ok(())
            };
            for p in self.engine.model().params() {
                push(p.name, p.shape, StateKind::Param)?;
            }
            for (name, len) in self.engine.model().buffers() {
                push(name, vec![len], StateKind::Buffer)?;
            }
            for (name, _) in self.engine.model().batch_norms() {
                // PyTorch's batch norms count the batches they have seen.
                let data = TensorData::I64(vec![steps as i64]);
                tensors.push(NamedTensor { name: format!("{name}.num_batches_tracked"), shape: vec![], data });
            }
            let meta = serde_json::json!({
                "model": self.engine.model(),
                "data": self.config.data,
                "mean": self.data.normalise.mean(),
                "std": self.data.normalise.std(),
                "class_names": self.data.train.images.class_names,
            });
            save_model(path, &tensors, &meta)?;
        }
        Ok(())
    }
}
