//! From epochs to curves, and from runs to the settings that they share.

use super::read::{Epoch, Run};
use crate::train::table::{CurvePoint, SummaryRow};

/// One epoch of one network.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Epochs since the phase began, through all iterations, from 1.
    pub x: usize,
    /// Iteration, from 1.
    pub iteration: usize,
    /// Epoch within the iteration, from 1.
    pub epoch: usize,
    /// Test accuracy.
    pub test: Option<f64>,
    /// Validation accuracy.
    pub val: Option<f64>,
    /// Accuracy on the given training labels; only of a network that SGD trains.
    pub fit: Option<f64>,
    /// Loss on the given labels.
    pub loss: Option<f64>,
    /// Consistency loss.
    pub meta: Option<f64>,
}

/// One network of one run, epoch by epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Place of the run in its group.
    pub run: usize,
    /// Its epochs, in order.
    pub points: Vec<Point>,
}

impl Curve {
    /// Best, last, and chosen by validation, for each iteration.
    pub fn summary(&self) -> Vec<(usize, SummaryRow)> {
        let mut iterations: Vec<usize> = self.points.iter().map(|p| p.iteration).collect();
        iterations.dedup();
        let row = |iteration: usize| {
            let points = self.points.iter().filter(|p| p.iteration == iteration);
            let points: Vec<CurvePoint> =
                points.filter_map(|p| Some(CurvePoint { epoch: p.epoch, val: p.val?, test: p.test? })).collect();
            Some((iteration, SummaryRow::from_curve("", &points)?))
        };
        iterations.into_iter().filter_map(row).collect()
    }

    /// The `x` at which later iterations begin, and their numbers.
    pub fn starts(&self) -> Vec<(usize, usize)> {
        let pairs = self.points.windows(2).filter(|w| w[0].iteration != w[1].iteration);
        pairs.map(|w| (w[1].x, w[1].iteration)).collect()
    }
}

/// A network trained in the same way in some runs, which differ in seed alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Method {
    /// Its name, with the settings that tell it from others of the group.
    pub label: String,
    /// Which network: decides the colour.
    pub network: Network,
    /// One curve per run.
    pub curves: Vec<Curve>,
}

/// Mean and standard deviation of some numbers, with their count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Sample standard deviation (divisor n − 1); `None` of a single number.
    pub std: Option<f64>,
    /// How many.
    pub count: usize,
}

/// Mean and sample standard deviation; `None` of no numbers.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let count = values.len();
    if count == 0 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / count as f64;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Some(Spread { mean, std: (count > 1).then(|| (squares / (count - 1) as f64).sqrt()), count })
}

impl Method {
    /// Mean over the runs at every epoch where a run has the score.
    pub fn mean(&self, score: impl Fn(&Point) -> Option<f64>) -> Vec<(usize, Spread)> {
        let last = self.curves.iter().flat_map(|c| &c.points).map(|p| p.x).max().unwrap_or(0);
        let at = |x: usize| -> Vec<f64> {
            let point = |c: &Curve| c.points.iter().find(|p| p.x == x).and_then(&score);
            self.curves.iter().filter_map(point).collect()
        };
        (1..=last).filter_map(|x| Some((x, spread(&at(x))?))).collect()
    }
}

/// The networks that a run may train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Plain cross entropy.
    CrossEntropy,
    /// The network of MLNT that SGD trains.
    Student,
    /// Its moving average.
    Teacher,
    /// The network of iterative cross entropy that SGD trains.
    IterativeStudent,
    /// Its moving average.
    IterativeTeacher,
    /// The network whose features define neighbours.
    Features,
    /// The network with early-learning regularisation.
    Elr,
    /// The network of joint optimisation whose predictions become the labels.
    JointLabels,
    /// The network that joint optimisation trains on those labels.
    JointOpt,
    /// The first network of co-teaching.
    CoTeachingFirst,
    /// The second network of co-teaching.
    CoTeachingSecond,
}

impl Network {
    /// All, in the order of tables and legends.
    pub const ALL: [Network; 11] = [
        Network::CrossEntropy,
        Network::Student,
        Network::Teacher,
        Network::IterativeStudent,
        Network::IterativeTeacher,
        Network::Features,
        Network::Elr,
        Network::JointLabels,
        Network::JointOpt,
        Network::CoTeachingFirst,
        Network::CoTeachingSecond,
    ];

    /// Its name in text.
    pub fn name(self) -> &'static str {
        match self {
            Network::CrossEntropy => "cross entropy",
            Network::Student => "MLNT student",
            Network::Teacher => "MLNT teacher",
            Network::IterativeStudent => "iterative CE student",
            Network::IterativeTeacher => "iterative CE teacher",
            Network::Features => "feature network",
            Network::Elr => "ELR",
            Network::JointLabels => "joint-opt labels",
            Network::JointOpt => "joint-opt",
            Network::CoTeachingFirst => "co-teaching network 1",
            Network::CoTeachingSecond => "co-teaching network 2",
        }
    }

    /// The phase in `metrics.jsonl` that trains it.
    fn phase(self) -> &'static str {
        match self {
            Network::CrossEntropy => "cross-entropy",
            Network::Student | Network::Teacher => "mlnt",
            Network::IterativeStudent | Network::IterativeTeacher => "iterative-ce",
            Network::Features => "features",
            Network::Elr => "elr",
            Network::JointLabels => "joint-labels",
            Network::JointOpt => "joint-opt",
            Network::CoTeachingFirst | Network::CoTeachingSecond => "co-teaching",
        }
    }

    fn curve(self, run: usize, epochs: &[Epoch]) -> Option<Curve> {
        let own = epochs.iter().filter(|e| e.phase == self.phase());
        let point = |(i, e): (usize, &Epoch)| {
            let (x, iteration, epoch) = (i + 1, e.iteration.unwrap_or(1), e.epoch);
            match self {
                Network::Teacher | Network::IterativeTeacher | Network::CoTeachingSecond => {
                    let (test, val) = (e.teacher_test_accuracy, e.teacher_val_accuracy);
                    Point { x, iteration, epoch, test, val, fit: None, loss: None, meta: None }
                }
                _ => {
                    let (test, val, fit) = (e.test_accuracy, e.val_accuracy, e.train_accuracy);
                    Point { x, iteration, epoch, test, val, fit, loss: e.train_loss, meta: e.meta_loss }
                }
            }
        };
        let points: Vec<Point> = own.enumerate().map(point).collect();
        let says_something = points.iter().any(|p| p.test.or(p.val).or(p.loss).is_some());
        says_something.then_some(Curve { run, points })
    }
}

/// The words for a phase of the files, for tables.
pub fn phase_name(phase: &str) -> &str {
    match phase {
        "cross-entropy" => "cross entropy",
        "features" => "feature network",
        "mlnt" => "MLNT",
        "iterative-ce" => "iterative CE",
        "elr" => "ELR",
        "joint-labels" => "joint-opt labels",
        other => other,
    }
}

/// Runs on the same data with the same kind and nominal level of noise.
#[derive(Clone, Debug)]
pub struct Group {
    /// The runs, as they were named.
    pub runs: Vec<Run>,
    /// Their networks.
    pub methods: Vec<Method>,
}

/// Settings that change no method: what the runs of a group share, where they ran, and the seed, which a mean is over.
const NO_METHOD: [&str; 7] = ["seed", "threads", "device", "data", "noise", "noise-rate", "no-baseline"];

/// Puts runs of the same data and noise together, in order of appearance.
pub fn groups(runs: Vec<Run>) -> Vec<Group> {
    let setting = |run: &Run| ["data", "noise", "noise-rate"].map(|key| run.setting(key));
    let mut groups: Vec<Group> = Vec::new();
    for run in runs {
        match groups.iter_mut().find(|group| setting(&group.runs[0]) == setting(&run)) {
            Some(group) => group.runs.push(run),
            None => groups.push(Group { runs: vec![run], methods: Vec::new() }),
        }
    }
    for group in &mut groups {
        group.methods = Network::ALL.iter().flat_map(|network| methods(&group.runs, *network)).collect();
    }
    groups
}

/// The ways in which `network` was trained, told apart by the settings that differ among the runs that trained it.
fn methods(runs: &[Run], network: Network) -> Vec<Method> {
    let curves: Vec<Curve> = runs.iter().enumerate().filter_map(|(i, run)| network.curve(i, &run.epochs)).collect();
    let Some(first) = curves.first().map(|c| &runs[c.run]) else { return Vec::new() };
    let differs = |key: &str| curves.iter().any(|c| runs[c.run].setting(key) != first.setting(key));
    let mut keys: Vec<&String> = curves.iter().flat_map(|c| runs[c.run].config.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.retain(|key| !NO_METHOD.contains(&key.as_str()) && differs(key));
    let mut methods: Vec<Method> = Vec::new();
    for curve in curves {
        let setting = |key: &&String| match runs[curve.run].setting(key) {
            value if value.is_empty() => format!("{key} unset"),
            value => format!("{key} {value}"),
        };
        let words: Vec<String> = keys.iter().map(setting).collect();
        let label = match words[..] {
            [] => network.name().to_string(),
            _ => format!("{} ({})", network.name(), words.join("; ")),
        };
        match methods.iter_mut().find(|m| m.label == label) {
            Some(method) => method.curves.push(curve),
            None => methods.push(Method { label, network, curves: vec![curve] }),
        }
    }
    methods
}

/// Where later iterations begin in all of `methods`; none when they do not agree.
pub fn iteration_starts(methods: &[&Method]) -> Vec<(usize, usize)> {
    let all: Vec<Vec<(usize, usize)>> =
        methods.iter().flat_map(|m| &m.curves).map(Curve::starts).filter(|s| !s.is_empty()).collect();
    let longest = all.iter().max_by_key(|s| s.len()).cloned().unwrap_or_default();
    if all.iter().all(|starts| longest.starts_with(starts)) { longest } else { Vec::new() }
}
