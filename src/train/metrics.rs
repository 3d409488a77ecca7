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
    /// MLNT.
    Mlnt,
}

impl Phase {
    /// The network that its steps train.
    pub fn network(self) -> Network {
        match self {
            Phase::CrossEntropy => Network::Baseline,
            Phase::Features => Network::Features,
            Phase::Mlnt => Network::Student,
        }
    }
}

/// One epoch, a line of `metrics.jsonl`. It holds no clock time: the same seed gives the same bytes.
///
/// Accuracies are fractions from 0 to 1, in eval mode but for the training accuracy; losses are means over the epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Part of the run.
    pub phase: Phase,
    /// Epoch within the phase, from 1.
    pub epoch: usize,
    /// Learning rate.
    pub lr: f64,
    /// Weight of the meta gradient at the end of the epoch; 0 outside [`Phase::Mlnt`].
    pub eta: f64,
    /// Cross entropy on the noisy training labels, nats.
    pub train_loss: f64,
    /// Consistency loss `L_meta`; only in [`Phase::Mlnt`].
    pub meta_loss: Option<f64>,
    /// Accuracy on the noisy training labels, of the training-mode forward pass.
    pub train_accuracy: f64,
    /// Accuracy of the (student) network on the validation images.
    pub val_accuracy: Option<f64>,
    /// Accuracy of the (student) network on the test images.
    pub test_accuracy: Option<f64>,
    /// Accuracy of the teacher on the validation images; only in [`Phase::Mlnt`].
    pub teacher_val_accuracy: Option<f64>,
    /// Accuracy of the teacher on the test images; only in [`Phase::Mlnt`].
    pub teacher_test_accuracy: Option<f64>,
}

/// The clock time of one epoch, a line of `timing.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimingRecord {
    /// Part of the run.
    pub phase: Phase,
    /// Epoch within the phase, from 1.
    pub epoch: usize,
    /// Duration of training in the epoch, or in the part of it since the run was last resumed, seconds.
    pub train_seconds: f64,
    /// Duration of evaluation after it, seconds.
    pub eval_seconds: f64,
}
