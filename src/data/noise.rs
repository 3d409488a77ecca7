//! Label noise: which samples get a wrong label, and which one.
//!
//! Exactly `round(rate·n)` samples are chosen, without replacement, and relabelled by the rule of [`NoiseKind`] (but for
//! noise that depends on the image, see [`super::instance`]).
//! Each chosen sample draws its new label from its own stream, and the samples are chosen in one random order, so
//! that with one seed the samples chosen at a lower rate are chosen at every higher one too, with the same new labels.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::dataset::{Dataset, Family};
use super::instance;
use crate::error::{Error, Result};
use crate::rng::{Purpose, below, permutation, stream};

/// The rule by which a chosen sample gets its new label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum NoiseKind {
    /// Uniform over all classes, the true one included, so that about `rate·(classes−1)/classes` of the labels are
    /// wrong. The paper's family.
    #[serde(rename = "symmetric")]
    #[value(name = "symmetric")]
    SymmetricInclusive,
    /// Uniform over the other classes: exactly the chosen samples are wrong.
    #[serde(rename = "symmetric-exclusive")]
    #[value(name = "symmetric-exclusive")]
    SymmetricExclusive,
    /// By a map of look-alike classes. `rate` of the samples of the classes that have a target are chosen; the other
    /// classes stay clean, so that the realised rate over all samples is lower.
    #[serde(rename = "asymmetric")]
    #[value(name = "asymmetric")]
    Asymmetric,
    /// Class `i` becomes `i + 1`, the last one 0.
    #[serde(rename = "pair")]
    #[value(name = "pair")]
    Pair,
    /// By the image: look-alikes in the eyes of random linear classifiers (Xia et al. 2020). About `rate` of the labels
    /// are wrong.
    #[serde(rename = "instance")]
    #[value(name = "instance")]
    Instance,
    /// Labels as they are; the rate is taken as 0.
    #[serde(rename = "none")]
    #[value(name = "none")]
    None,
}

impl NoiseKind {
    /// Every kind.
    pub const ALL: [NoiseKind; 6] = [
        NoiseKind::SymmetricInclusive,
        NoiseKind::SymmetricExclusive,
        NoiseKind::Asymmetric,
        NoiseKind::Pair,
        NoiseKind::Instance,
        NoiseKind::None,
    ];

    /// The name used on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            NoiseKind::SymmetricInclusive => "symmetric",
            NoiseKind::SymmetricExclusive => "symmetric-exclusive",
            NoiseKind::Asymmetric => "asymmetric",
            NoiseKind::Pair => "pair",
            NoiseKind::Instance => "instance",
            NoiseKind::None => "none",
        }
    }
}

impl fmt::Display for NoiseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for NoiseKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        NoiseKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known = NoiseKind::ALL.map(NoiseKind::name).join(", ");
            Error::usage(format!("noise `{name}` is not one of {known}"))
        })
    }
}

/// For each class the one that asymmetric noise turns it into, if any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassMap(Vec<Option<u16>>);

impl ClassMap {
    /// The map for a data set.
    ///
    /// - CIFAR-10: truck→automobile, bird→airplane, deer→horse, cat↔dog (Patrini et al. 2017).
    /// - Fashion-MNIST, look-alikes: T-shirt/top↔Shirt, Pullover↔Coat, Sneaker↔Ankle boot, Sandal→Sneaker.
    ///   Trouser, Dress and Bag stay clean.
    /// - Others: the pair flip.
    pub fn of(data: &Dataset) -> Self {
        match data.family {
            Family::Cifar10 => ClassMap::new(10, &[(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)]),
            Family::FashionMnist => ClassMap::new(10, &[(0, 6), (6, 0), (2, 4), (4, 2), (7, 9), (9, 7), (5, 7)]),
            Family::Cifar100 | Family::Other => ClassMap::pair(data.classes),
        }
    }

    /// Class `i` to `i + 1`, the last one to 0. A single class has no target.
    pub fn pair(classes: usize) -> Self {
        ClassMap(
            (0..classes).map(|class| ((class + 1) % classes) as u16).map(|to| (classes > 1).then_some(to)).collect(),
        )
    }

    /// The map of `classes` classes with the given (from, to) pairs.
    fn new(classes: usize, pairs: &[(usize, u16)]) -> Self {
        let mut map = vec![None; classes];
        for &(from, to) in pairs {
            map[from] = Some(to);
        }
        ClassMap(map)
    }

    /// What `class` turns into; `None` if it stays clean.
    pub fn target(&self, class: usize) -> Option<usize> {
        self.0.get(class).copied().flatten().map(usize::from)
    }
}

/// Labels after corruption, with what was asked for and what came out.
#[derive(Debug, Clone, PartialEq)]
pub struct NoisyLabels {
    /// The given labels, in sample order.
    pub labels: Vec<u16>,
    /// Share of the labels that differ from the true ones, over all samples.
    pub realised_rate: f64,
    /// The rate asked for (0 for [`NoiseKind::None`]).
    pub nominal: f64,
    /// The rule.
    pub kind: NoiseKind,
    /// The seed.
    pub seed: u64,
}

impl NoisyLabels {
    /// How the labels were made, for the comment lines of a label file.
    pub fn comments(&self) -> Vec<(&'static str, String)> {
        let nominal = self.nominal.to_string();
        vec![("noise", self.kind.to_string()), ("nominal rate", nominal), ("seed", self.seed.to_string())]
    }
}

/// Share of positions at which `labels` and `true_labels` differ; 0 for no labels.
pub fn disagreement(labels: &[u16], true_labels: &[u16]) -> f64 {
    let wrong = labels.iter().zip(true_labels).filter(|(given, truth)| given != truth).count();
    wrong as f64 / true_labels.len().max(1) as f64
}

/// Corrupts the labels of `data` by `kind` at `rate`, with the class map of the data set for asymmetric noise.
///
/// # Errors
/// As [`corrupt`].
pub fn inject(data: &Dataset, kind: NoiseKind, rate: f64, seed: u64) -> Result<NoisyLabels> {
    match kind {
        NoiseKind::Instance => instance::corrupt(data, rate, seed),
        _ => corrupt(data.labels(), data.classes, kind, rate, seed, &ClassMap::of(data)),
    }
}

/// An error unless `rate` is from 0 to 1 and there are classes enough for noise `kind`.
pub(super) fn check(classes: usize, kind: NoiseKind, rate: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&rate) {
        return Err(Error::usage(format!("noise rate {rate} is not between 0 and 1")));
    }
    if kind != NoiseKind::None && classes < 2 {
        return Err(Error::usage(format!("noise `{kind}` needs at least 2 classes, the data has {classes}")));
    }
    Ok(())
}

/// Corrupts `true_labels` (each below `classes`) by `kind` at `rate`; `map` is read by [`NoiseKind::Asymmetric`] only.
///
/// The same arguments give the same labels on every platform.
///
/// # Errors
/// [`Error::Usage`] if `rate` is not in `0..=1`, a label is not below `classes`, there is just one class to go to, or
/// `kind` needs the images ([`NoiseKind::Instance`], see [`inject`]).
pub fn corrupt(
    true_labels: &[u16],
    classes: usize,
    kind: NoiseKind,
    rate: f64,
    seed: u64,
    map: &ClassMap,
) -> Result<NoisyLabels> {
    check(classes, kind, rate)?;
    if let Some(label) = true_labels.iter().find(|&&label| usize::from(label) >= classes) {
        return Err(Error::usage(format!("label {label} is not below the number of classes, {classes}")));
    }
    if kind == NoiseKind::Instance {
        return Err(Error::usage(format!("noise `{kind}` needs the images, not the labels alone")));
    }
    let nominal = if kind == NoiseKind::None { 0.0 } else { rate };
    let pair = ClassMap::pair(classes);
    let relabel = |i: u32| -> Option<u16> {
        let truth = true_labels[i as usize];
        let draw = |n: usize| below(n as u64, &mut stream(seed, Purpose::Noise, 1, u64::from(i))) as u16;
        match kind {
            NoiseKind::SymmetricInclusive => Some(draw(classes)),
            NoiseKind::SymmetricExclusive => {
                let other = draw(classes - 1);
                Some(if other >= truth { other + 1 } else { other })
            }
            NoiseKind::Asymmetric => map.target(truth.into()).map(|class| class as u16),
            NoiseKind::Pair => pair.target(truth.into()).map(|class| class as u16),
            NoiseKind::Instance | NoiseKind::None => None,
        }
    };
    let order = permutation(true_labels.len(), &mut stream(seed, Purpose::Noise, 0, 0));
    let moves: Vec<(u32, u16)> = order.into_iter().filter_map(|i| Some((i, relabel(i)?))).collect();
    let chosen = (nominal * moves.len() as f64).round() as usize;
    let mut labels = true_labels.to_vec();
    for &(i, label) in &moves[..chosen] {
        labels[i as usize] = label;
    }
    let realised_rate = disagreement(&labels, true_labels);
    Ok(NoisyLabels { labels, realised_rate, nominal, kind, seed })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10,000 labels of 10 classes in equal parts.
    fn truth() -> Vec<u16> {
        (0..10_000).map(|i| i % 10).collect()
    }

    fn run(kind: NoiseKind, rate: f64, seed: u64) -> NoisyLabels {
        corrupt(&truth(), 10, kind, rate, seed, &ClassMap::new(10, &[(9, 1), (3, 5), (5, 3)])).unwrap()
    }

    fn wrong(labels: &[u16]) -> usize {
        labels.iter().zip(truth()).filter(|&(&given, truth)| given != truth).count()
    }

    #[test]
    fn inclusive_is_uniform_over_all_classes() {
        let noisy = run(NoiseKind::SymmetricInclusive, 0.5, 1);
        // 5,000 chosen, of which a binomial share of 0.9 changes: standard deviation 21.2, bound at 5 of them.
        let changed = wrong(&noisy.labels);
        assert!(changed.abs_diff(4500) < 107, "{changed}");
        assert_eq!(noisy.realised_rate, changed as f64 / 10_000.0);
        let mut counts = [[0u32; 10]; 10];
        truth().iter().zip(&noisy.labels).for_each(|(&t, &l)| counts[usize::from(t)][usize::from(l)] += 1);
        for (t, row) in counts.iter().enumerate() {
            for (l, &count) in row.iter().enumerate().filter(|&(l, _)| l != t) {
                assert!((15..100).contains(&count), "{t}→{l}: {count}");
            }
        }
    }

    #[test]
    fn exclusive_and_pair_are_exact() {
        for rate in [0.0, 0.2, 0.333, 1.0] {
            let exact = (rate * 10_000.0f64).round() as usize;
            assert_eq!(wrong(&run(NoiseKind::SymmetricExclusive, rate, 3).labels), exact);
            let pair = run(NoiseKind::Pair, rate, 3);
            assert_eq!(wrong(&pair.labels), exact);
            assert!(pair.labels.iter().zip(truth()).all(|(&given, t)| given == t || given == (t + 1) % 10));
            assert_eq!(pair.realised_rate, exact as f64 / 10_000.0);
        }
        let none = run(NoiseKind::None, 0.7, 3);
        assert_eq!((none.labels, none.realised_rate, none.nominal), (truth(), 0.0, 0.0));
    }

    #[test]
    fn asymmetric_takes_the_rate_of_the_source_classes() {
        let noisy = run(NoiseKind::Asymmetric, 0.4, 7);
        assert_eq!(wrong(&noisy.labels), 1200);
        assert_eq!(noisy.realised_rate, 0.12);
        for (&given, t) in noisy.labels.iter().zip(truth()) {
            assert!(given == t || matches!((t, given), (9, 1) | (3, 5) | (5, 3)), "{t}→{given}");
        }
    }

    #[test]
    fn seeds_decide_and_rates_nest() {
        let kind = NoiseKind::SymmetricExclusive;
        assert_eq!(run(kind, 0.4, 5), run(kind, 0.4, 5));
        assert_ne!(run(kind, 0.4, 5).labels, run(kind, 0.4, 6).labels);
        let (low, high) = (run(kind, 0.2, 5), run(kind, 0.6, 5));
        for (i, t) in truth().into_iter().enumerate() {
            assert!(low.labels[i] == t || low.labels[i] == high.labels[i]);
        }
    }

    #[test]
    fn bad_input_is_refused() {
        let map = ClassMap::pair(10);
        for rate in [-0.1, 1.01, f64::NAN, f64::INFINITY] {
            let error = corrupt(&truth(), 10, NoiseKind::Pair, rate, 0, &map).unwrap_err().to_string();
            assert_eq!(error, format!("noise rate {rate} is not between 0 and 1"));
        }
        let error = corrupt(&truth(), 9, NoiseKind::Pair, 0.1, 0, &map).unwrap_err().to_string();
        assert_eq!(error, "label 9 is not below the number of classes, 9");
        let error = corrupt(&[0, 0], 1, NoiseKind::SymmetricExclusive, 0.1, 0, &map).unwrap_err().to_string();
        assert_eq!(error, "noise `symmetric-exclusive` needs at least 2 classes, the data has 1");
        let error = corrupt(&truth(), 10, NoiseKind::Instance, 0.1, 0, &map).unwrap_err().to_string();
        assert_eq!(error, "noise `instance` needs the images, not the labels alone");
        assert!(corrupt(&[], 10, NoiseKind::Pair, 0.5, 0, &map).unwrap().labels.is_empty());
    }

    #[test]
    fn names_agree_everywhere() {
        for kind in NoiseKind::ALL {
            assert_eq!(kind.to_string().parse::<NoiseKind>().unwrap(), kind);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
            assert_eq!(<NoiseKind as clap::ValueEnum>::from_str(kind.name(), false), Ok(kind));
        }
        let error = "uniform".parse::<NoiseKind>().unwrap_err().to_string();
        assert_eq!(
            error,
            "noise `uniform` is not one of symmetric, symmetric-exclusive, asymmetric, pair, instance, none"
        );
    }
}
