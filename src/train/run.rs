//! The training loop, top to bottom.

use super::by_logits;
use super::config::Config;
use super::engine::{Engine, Network, StepInputs, StepOutcome};
use super::event_file::EventFile;
use super::feed::{self, Feed};
use super::filter::Filter;
use super::method::{Moment, Part, parts};
use super::metrics::{EpochRecord, IterationRecord, MentorRecord, Phase, TimingRecord};
use super::prepare::Prepared;
use super::progress::{self, EpochSums, LineLengths, Position, Progress};
use super::run_dir::{JsonLines, LossRows, RunDir};
use super::snapshot::{Best, Snapshot};
use super::summary;
use super::table::SummaryRow;
use crate::data::{Batcher, epoch_order};
use crate::device::ImagesId;
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::mlnt::{StepScalars, draw_ranks};
use crate::rng::{Purpose, stream};
use std::fs::File;
use std::time::{Duration, Instant};

/// Who watches a run.
pub trait Observer {
    /// An iteration begins with a mentor, and a filter of `kept` samples by it; the record holds what is known so far.
    fn filtered(&mut self, part: &Part, filter: &IterationRecord);
    /// A part begins, or goes on after `done` of its `total` steps.
    fn part(&mut self, part: &Part, done: usize, total: usize);
    /// A step is over.
    fn step(&mut self, outcome: &StepOutcome);
    /// An epoch is over and evaluated.
    fn epoch(&mut self, part: &Part, record: &EpochRecord);
    /// Asked after every step: whether to stop, with a checkpoint.
    fn wants_stop(&self) -> bool;
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// All parts are complete.
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
    lines: Lines,
    progress: Progress,
    /// Held as long as this process trains the run.
    _lock: File,
}

/// The files that grow.
struct Lines {
    metrics: JsonLines,
    timing: JsonLines,
    iterations: JsonLines,
    losses: LossRows,
    events: EventFile,
}

impl Lines {
    fn create(dir: &RunDir) -> Result<Self> {
        Ok(Lines {
            metrics: JsonLines::create(dir.metrics())?,
            timing: JsonLines::create(dir.timing())?,
            iterations: JsonLines::create(dir.iterations())?,
            losses: LossRows::create(dir.losses())?,
            events: EventFile::new(dir.tensorboard()),
        })
    }

    fn resume(dir: &RunDir, lengths: LineLengths) -> Result<Self> {
        Ok(Lines {
            metrics: JsonLines::resume(dir.metrics(), lengths.metrics)?,
            timing: JsonLines::resume(dir.timing(), lengths.timing)?,
            iterations: JsonLines::resume(dir.iterations(), lengths.iterations)?,
            losses: LossRows::resume(dir.losses(), lengths.losses)?,
            events: EventFile::new(dir.tensorboard()),
        })
    }

    fn sync(&mut self) -> Result<LineLengths> {
        Ok(LineLengths {
            metrics: self.metrics.sync()?,
            timing: self.timing.sync()?,
            iterations: self.iterations.sync()?,
            losses: self.losses.sync()?,
        })
    }
}

/// How often a lock is tried, and how long it is waited for in between.
const LOCK_TRIES: usize = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

/// Takes hold of a run's directory, so that no second process continues it at the same time.
fn lock(dir: &RunDir) -> Result<File> {
    let path = dir.config();
    let file = File::open(&path).map_err(Error::io(&path))?;
    // A process that is just being started by the last owner of the lock holds it for an instant.
    for _ in 0..LOCK_TRIES {
        match file.try_lock() {
            Err(std::fs::TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            // A file system without locks serves as well.
            _ => return Ok(file),
        }
    }
    Err(Error::file(dir.path(), "another process is training this run"))
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
            let lines = Lines::create(&dir)?;
            let lock = lock(&dir)?;
            let progress = Progress::start(&config, data.train.len(), engine.model().classes);
            let kept = keep_images(&config, &data, &mut engine)?;
            let mut run = Run { config, data, engine, kept, dir, lines, progress, _lock: lock };
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
        let (progress, lengths) = progress::load(&dir.checkpoint(), &mut engine, &config, data.train.len())?;
        let lines = Lines::resume(&dir, lengths)?;
        let kept = keep_images(&config, &data, &mut engine)?;
        Ok(Run { config, data, engine, kept, dir, lines, progress, _lock: lock })
    }

    /// The run's directory.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// True when no step is left.
    pub fn is_complete(&self) -> bool {
        self.progress.position.part >= parts(&self.config).len()
    }

    /// Trains from where the run stands to its end.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss is not finite: the last checkpoint stays as it was. Errors of files and device.
    pub fn train(&mut self, observer: &mut dyn Observer) -> Result<Ending> {
        let steps = self.data.train.len() / self.config.batch;
        let parts = parts(&self.config);
        while let Some(part) = parts.get(self.progress.position.part) {
            let at = self.progress.position;
            if at.epoch == 0 && at.step == 0 {
                self.begin(part, observer)?;
            }
            observer.part(part, at.epoch * steps + at.step, part.epochs * steps);
            while self.progress.position.epoch < part.epochs {
                if !self.epoch(part, steps, observer)? {
                    self.save()?;
                    return Ok(Ending::Stopped);
                }
            }
            self.finish(part)?;
            self.progress.position = Position { part: at.part + 1, ..Position::default() };
            self.progress.loss_scale = None;
        }
        self.save()?;
        self.export(&parts, steps)?;
        let rows = summary::write(&self.dir, &self.data.label_source, self.data.realised_noise)?;
        Ok(Ending::Complete(rows))
    }

    /// Before the first step of a part. An iteration after the first makes the best network so far its mentor, filters
    /// the training labels by it, and starts from scratch. No checkpoint holds this state before a step was made from
    /// it, so that it is made exactly once from what the iteration before left.
    fn begin(&mut self, part: &Part, observer: &mut dyn Observer) -> Result<()> {
        if part.before().is_none() {
            return Ok(());
        }
        let Prepared { train, normalise, .. } = &self.data;
        let Some(mentor) = self.progress.best.take() else {
            return Err(Error::usage("an iteration needs validation images to choose its mentor by"));
        };
        mentor.values.put(&mut self.engine, Network::Mentor)?;
        let probabilities = self.engine.label_probabilities(Network::Mentor, train, normalise)?;
        let filter = Filter::by_probability(&probabilities, self.config.tau);
        let index = (0..train.len()).map(|i| train.images.original(i));
        filter.write(&self.dir, index, &train.labels, &probabilities)?;
        self.engine.start(part.phase.networks(), self.config.seed, part.draw())?;
        self.progress.filter = filter;
        let record = self.iteration_record(part, Some(mentor));
        observer.filtered(part, &record);
        Ok(())
    }

    /// After the last step of a part.
    fn finish(&mut self, part: &Part) -> Result<()> {
        match part.iteration {
            Some(_) => self.lines.iterations.append(&self.iteration_record(part, self.progress.best.clone())),
            None => Ok(()),
        }
    }

    fn iteration_record(&self, part: &Part, mentor: Option<Best>) -> IterationRecord {
        let filter = part.before().map(|_| &self.progress.filter);
        let quality = filter.map(|f| f.quality(&self.data.train.labels, self.data.train_truth()));
        IterationRecord {
            iteration: part.iteration.unwrap_or(1),
            mentor: mentor.map(|Best { network, epoch, val_accuracy, .. }| MentorRecord {
                network,
                epoch,
                val_accuracy,
            }),
            kept: filter.map(Filter::kept),
            dropped: filter.map(Filter::dropped),
            precision: quality.and_then(|q| q.precision),
            recall: quality.and_then(|q| q.recall),
        }
    }

    /// The rest of an epoch, its evaluation and its checkpoint; false when asked to stop before its end.
    fn epoch(&mut self, part: &Part, steps: usize, observer: &mut dyn Observer) -> Result<bool> {
        let (config, k) = (self.config.clone(), self.config.batch);
        let epoch = self.progress.position.epoch;
        // Every iteration has its own order of samples, augmentation and synthetic labels.
        let drawn = part.stream_epoch(epoch);
        let order = epoch_order(self.data.train.len(), config.seed, drawn);
        let ids = |step: usize| &order[step * k..(step + 1) * k];
        let start = Instant::now();
        let batcher = Batcher::new(&self.data.train.images, &self.data.normalise, self.data.augment, config.seed)?;
        let mut feed = Feed::new(batcher, self.kept);
        if self.progress.position.step < steps {
            feed.prepare(&mut self.engine, part, drawn, ids(self.progress.position.step))?;
        }
        let (mut y, mut class_weight) = (vec![0; k], vec![0.0; k]);
        let replaced = (config.rho * k as f64).round() as usize;
        while self.progress.position.step < steps {
            let step = self.progress.position.step;
            y.iter_mut().zip(ids(step)).for_each(|(y, i)| *y = self.data.train.labels[*i as usize]);
            let kept = self.progress.filter.class_weights(ids(step), &mut class_weight);
            let mut rng = stream(config.seed, Purpose::Synthetic, drawn, step as u64);
            let ranks = draw_ranks(k, config.neighbours, replaced, config.branches, &mut rng);
            let moment = Moment { epoch, progress: epoch as f64 + step as f64 / steps as f64, kept };
            let inputs = StepInputs { x: feed.images(), y: &y, class_weight: &class_weight, ranks: &ranks };
            if part.phase.by_logits() {
                let memory = &mut self.progress.memory;
                by_logits::write(&mut self.engine, memory, &config, part, epoch, ids(step), inputs)?;
            } else {
                self.engine.write(part, inputs)?;
            }
            let mut scalars = part.phase.scalars(&config, moment);
            // A batch of which nothing is kept says nothing of the others' cotangents, but for those of the meta loss.
            if config.scaled() && (kept || part.phase == Phase::Mlnt) {
                // Where the seed carries η, it must leave room for the largest.
                let widest = StepScalars { eta: config.eta, ..scalars };
                let found = match self.progress.loss_scale {
                    Some(found) if !found.is_open() => found,
                    before => self.engine.find_scale(part, widest, before)?,
                };
                self.progress.loss_scale = Some(found);
                scalars.scales = found.scales();
            }
            self.engine.begin(part, scalars)?;
            if step + 1 < steps {
                // While the device works.
                feed.prepare(&mut self.engine, part, drawn, ids(step + 1))?;
            }
            let outcome = self.engine.outcome(part, &y)?;
            if !outcome.taken {
                let inner = outcome.meta_loss.is_none_or(|loss| !loss.is_finite());
                self.progress.position.sums.overflows += 1.0;
                self.progress.loss_scale = self.progress.loss_scale.and_then(|scale| scale.lowered(inner));
                if self.progress.loss_scale.is_none() {
                    let what = "gradients are not finite any more, whatever their scale";
                    return Err(self.diverged(part, step + 1, what));
                }
            } else {
                self.check_finite(part, step, &outcome)?;
                let Progress { position: Position { sums, .. }, losses, .. } = &mut self.progress;
                sums.loss += outcome.loss;
                sums.meta_loss += outcome.meta_loss.unwrap_or(0.0);
                sums.correct += outcome.correct as f64;
                sums.skipped += f64::from(u8::from(!kept));
                for (id, loss) in ids(step).iter().zip(self.engine.sample_losses()) {
                    losses[*id as usize] = *loss;
                }
            }
            self.progress.position.step += 1;
            observer.step(&outcome);
            if observer.wants_stop() && self.progress.position.step < steps {
                self.check_networks(part)?;
                return Ok(false);
            }
        }
        self.check_networks(part)?;
        let trained = start.elapsed().as_secs_f64();
        let record = self.evaluate(part, steps)?;
        let times = TimingRecord {
            phase: part.phase,
            iteration: part.iteration,
            epoch: epoch + 1,
            train_seconds: trained,
            eval_seconds: start.elapsed().as_secs_f64() - trained,
        };
        if part.iteration.is_some() {
            self.keep_best(part, &record)?;
            self.lines.losses.append(&self.progress.losses)?;
        }
        self.progress.losses.fill(f32::NAN);
        self.lines.metrics.append(&record)?;
        self.lines.timing.append(&times)?;
        self.lines.events.append(&record)?;
        let part_index = self.progress.position.part;
        self.progress.position = Position { part: part_index, epoch: epoch + 1, ..Position::default() };
        self.save()?;
        observer.epoch(part, &record);
        Ok(!observer.wants_stop())
    }

    /// Keeps a copy of the student or the teacher, or of what stands in their places, where it is better than the best so far.
    fn keep_best(&mut self, part: &Part, record: &EpochRecord) -> Result<()> {
        let roles = [(Network::Student, record.val_accuracy), (Network::Teacher, record.teacher_val_accuracy)];
        for (trained, (network, accuracy)) in part.phase.networks().iter().zip(roles) {
            let better = |val_accuracy: &f64| Best::is_beaten(self.progress.best.as_ref(), *val_accuracy);
            if let Some(val_accuracy) = accuracy.filter(better) {
                let values = Snapshot::take(&self.engine, *trained)?;
                self.progress.best = Some(Best { network, epoch: record.epoch, val_accuracy, values });
            }
        }
        Ok(())
    }

    fn check_finite(&self, part: &Part, step: usize, outcome: &StepOutcome) -> Result<()> {
        let (meta, objective) = (outcome.meta_loss.unwrap_or(0.0), outcome.objective.unwrap_or(0.0));
        if outcome.loss.is_finite() && meta.is_finite() && objective.is_finite() {
            return Ok(());
        }
        let named = |name: &str, value: Option<f64>| value.map_or_else(String::new, |v| format!(", {name} {v}"));
        let rest = named("meta loss", outcome.meta_loss) + &named("objective", outcome.objective);
        let what = format!("the loss is not a number any more (loss {}{rest})", outcome.loss);
        Err(self.diverged(part, step + 1, &what))
    }

    /// A step whose loss is still finite may leave weights that are not; they must reach neither the checkpoint nor
    /// the results.
    fn check_networks(&self, part: &Part) -> Result<()> {
        match self.engine.not_finite()? {
            None => Ok(()),
            Some(name) => {
                Err(self.diverged(part, self.progress.position.step, &format!("{name} is not finite any more")))
            }
        }
    }

    fn diverged(&self, part: &Part, step: usize, what: &str) -> Error {
        let (epoch, checkpoint) = (self.progress.position.epoch + 1, self.dir.checkpoint());
        Error::Diverged(format!(
            "{what} in {}, epoch {epoch}, step {step}; the last good checkpoint is {}; start again with a smaller {}",
            part.title(),
            checkpoint.display(),
            part.phase.step_sizes(),
        ))
    }

    fn evaluate(&mut self, part: &Part, steps: usize) -> Result<EpochRecord> {
        let Position { epoch, sums, .. } = self.progress.position;
        let EpochSums { loss, meta_loss, correct, skipped, overflows } = sums;
        let taken = steps as f64 - overflows;
        let Prepared { validation, test, normalise, .. } = &self.data;
        let mut accuracies = [[None; 2]; 2];
        for (network, accuracy) in part.phase.networks().iter().zip(&mut accuracies) {
            let val = self.engine.accuracy(*network, validation, normalise)?;
            *accuracy = [val, self.engine.accuracy(*network, test, normalise)?];
        }
        let [[val, test], [teacher_val, teacher_test]] = accuracies;
        let mlnt = part.phase == Phase::Mlnt;
        Ok(EpochRecord {
            phase: part.phase,
            iteration: part.iteration,
            epoch: epoch + 1,
            lr: part.phase.lr_at(&self.config, epoch),
            eta: if mlnt { self.config.eta_at(epoch as f64 + 1.0) } else { 0.0 },
            train_loss: loss / (taken - skipped).max(1.0),
            meta_loss: mlnt.then_some(meta_loss / taken.max(1.0)),
            train_accuracy: correct / (taken.max(1.0) * self.config.batch as f64),
            val_accuracy: val,
            test_accuracy: test,
            teacher_val_accuracy: teacher_val,
            teacher_test_accuracy: teacher_test,
            kept: part.before().map(|_| self.progress.filter.kept()),
            skipped: part.iteration.map(|_| skipped as usize),
            overflows: self.config.scaled().then_some(overflows as usize),
        })
    }

    fn save(&mut self) -> Result<()> {
        let lengths = self.lines.sync()?;
        progress::save(&self.dir.checkpoint(), &self.engine, &self.config, &self.progress, lengths)
    }

    /// Writes the networks of the last part, and the best of its iteration, under PyTorch's names.
    fn export(&self, parts: &[Part], steps: usize) -> Result<()> {
        let Some(part) = parts.last() else { return Ok(()) };
        let model = self.engine.model();
        let meta = serde_json::json!({
            "model": model,
            "data": self.config.data,
            "mean": self.data.normalise.mean(),
            "std": self.data.normalise.std(),
            "class_names": self.data.train.images.class_names,
        });
        if let Some(Best { network, epoch, values, .. }) = &self.progress.best {
            let mut meta = meta.clone();
            meta["network"] = serde_json::json!(network);
            meta["epoch"] = serde_json::json!(epoch);
            values.save(&self.dir.best(), model, steps * epoch, &meta)?;
        }
        // The student comes last: where it is, the others are.
        let paths = [self.dir.student(), self.dir.teacher()];
        for (network, path) in part.phase.networks().iter().zip(paths).rev() {
            Snapshot::take(&self.engine, *network)?.save(&path, model, steps * part.epochs, &meta)?;
        }
        Ok(())
    }
}
