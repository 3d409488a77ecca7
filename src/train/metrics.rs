//! What a run reports per epoch, one JSON line each.

use super::engine::Network;
use serde::{Deserialize, Serialize};

/// The part of a run that an epoch belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The comparison: plain cross entropy on the noisy labels.
    CrossEntropy,
    /// The network whose features define the nearest neighbours.
    Features,
    /// MLNT, an iteration of it.
    Mlnt,
    /// An iteration of cross entropy with a teacher, without the meta loss.
    IterativeCe,
    /// Joint optimisation: the network whose predictions become the labels.
    JointLabels,
    /// Joint optimisation: a fresh network, trained on those labels.
    JointOpt,
    /// Cross entropy with early-learning regularisation.
    Elr,
    /// Two networks that choose samples for each other.
    CoTeaching,
}

/// One epoch, a line of `metrics.jsonl`. It holds no clock time: the same seed gives the same bytes.
///
/// Accuracies are fractions from 0 to 1, in eval mode but for the training accuracy; losses are means over the epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Part of the run.
    pub phase: Phase,
    /// Iteration of the method, from 1; `None` in what prepares the method or is compared with it.
    pub iteration: Option<usize>,
    /// Epoch within the iteration or phase, from 1.
    pub epoch: usize,
    /// Learning rate.
    pub lr: f64,
    /// Weight of the meta gradient at the end of the epoch; 0 outside [`Phase::Mlnt`].
    pub eta: f64,
    /// Cross entropy on the noisy training labels that are kept, nats, mean over the batches in which any is; 0 if there
    /// is none, or no step was taken. In co-teaching on those that the first network learns from.
    pub train_loss: f64,
    /// Consistency loss `L_meta`; only in [`Phase::Mlnt`].
    pub meta_loss: Option<f64>,
    /// Accuracy on the noisy training labels, of the training-mode forward pass.
    pub train_accuracy: f64,
    /// Accuracy of the (student) network on the validation images.
    pub val_accuracy: Option<f64>,
    /// Accuracy of the (student) network on the test images.
    pub test_accuracy: Option<f64>,
    /// Accuracy of the teacher, in co-teaching of the second network, on the validation images; `None` without one.
    pub teacher_val_accuracy: Option<f64>,
    /// The same on the test images.
    pub teacher_test_accuracy: Option<f64>,
    /// Training samples whose given label the filter keeps in this iteration; `None` without a filter.
    pub kept: Option<usize>,
    /// Batches of this epoch of which nothing was kept; `None` outside the iterations.
    pub skipped: Option<usize>,
    /// Steps of this epoch that were not taken because a gradient overflowed f16, after which the scales of the cotangents
    /// were lowered; `None` in other precisions.
    #[serde(default)]
    pub overflows: Option<usize>,
}

/// A finished iteration, a line of `iterations.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IterationRecord {
    /// Iteration, from 1.
    pub iteration: usize,
    /// Its best network by validation accuracy, the student and the earlier epoch before their equals: the mentor of the
    /// next iteration. `None` without validation images.
    pub mentor: Option<MentorRecord>,
    /// Training samples whose given label the filter kept; `None` in an iteration without a filter, as all below.
    pub kept: Option<usize>,
    /// Training samples whose given label it dropped.
    pub dropped: Option<usize>,
    /// Part of the dropped labels that are wrong; `None` also when none is dropped.
    pub precision: Option<f64>,
    /// Part of the wrong labels that were dropped; `None` also when none is wrong.
    pub recall: Option<f64>,
}

/// Where a mentor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MentorRecord {
    /// Student or teacher.
    pub network: Network,
    /// Epoch of the iteration, from 1.
    pub epoch: usize,
    /// Its accuracy on the validation images.
    pub val_accuracy: f64,
}

/// The clock time of one epoch, a line of `timing.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimingRecord {
    /// Part of the run.
    pub phase: Phase,
    /// Iteration of the method, from 1; `None` outside.
    pub iteration: Option<usize>,
    /// Epoch within the iteration or phase, from 1.
    pub epoch: usize,
    /// Duration of training in the epoch, or in the part of it since the run was last resumed, seconds.
    pub train_seconds: f64,
    /// Duration of evaluation after it, seconds.
    pub eval_seconds: f64,
}
