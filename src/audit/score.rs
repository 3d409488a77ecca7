//! How suspicious a given label is.
//!
//! A network believes in the label that it will be trained on sooner for a right label than for a wrong one, and in the
//! end it may believe in all of them: what separates is how much it believed on the way. The *belief* in sample i is
//! `b_i = mean_t √p_t(given)`, over the epochs t of training where the run has kept their losses, else over the one
//! network at hand. The square root weighs a probability that is small in every epoch against one that is so in a few.
//! As classes differ in difficulty, the *score* compares with the samples of the same given label, as confident
//! learning does (Northcutt et al. 2021): `s_i = mean_{j: y_j = y_i} b_j − b_i`, in −1..1, high for suspicious.
//!
//! A label is *flagged* when its score is above the threshold that parts the scores into two groups of least variance
//! within (Otsu 1979). No true label is used for any of that. Samples that were trained on and those held out are
//! scored apart: only the first can have been memorised. `docs/audit.md` has the scores that were compared.

use super::history::Trajectory;
use crate::error::{Error, Result};

/// What the audit says about one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finding {
    /// The given label.
    pub given: usize,
    /// Its probability.
    pub p_given: f64,
    /// The most probable other label, the first on ties.
    pub suggested: usize,
    /// Its probability.
    pub p_suggested: f64,
    /// Suspicion, see the module.
    pub score: f64,
    /// Whether the score is above the threshold of the sample's part.
    pub flagged: bool,
}

/// Samples that are compared with one another.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// Class probabilities `[n, classes]` of a network in evaluation mode.
    pub probabilities: &'a [f64],
    /// Number of classes, at least 2.
    pub classes: usize,
    /// Given labels `[n]`, each below `classes`.
    pub given: &'a [usize],
    /// What each went through in training `[n]`.
    pub history: &'a [Option<Trajectory>],
    /// Whether each was trained on `[n]`.
    pub trained: &'a [bool],
}

/// A finding for every sample.
///
/// # Errors
/// [`Error::Usage`] for parts of different lengths, fewer than two classes, a label out of range, or a probability that
/// is no number.
pub fn findings(evidence: &Evidence<'_>) -> Result<Vec<Finding>> {
    let Evidence { probabilities, classes, given, history, trained } = *evidence;
    let n = given.len();
    if classes < 2 || probabilities.len() != n * classes || history.len() != n || trained.len() != n {
        return Err(Error::usage(format_args!("{n} labels in {classes} classes: the audit's inputs do not fit")));
    }
    if given.iter().any(|label| *label >= classes) || probabilities.iter().any(|p| !p.is_finite()) {
        return Err(Error::usage("a label is out of range or a probability is not a number"));
    }
    let rows = || probabilities.chunks_exact(classes).zip(given);
    let belief: Vec<f64> =
        rows().zip(history).map(|((p, y), seen)| seen.map_or(p[*y].sqrt(), |seen| seen.belief)).collect();
    let mut scored = vec![(0.0, false); n];
    for part in [true, false] {
        let members: Vec<usize> = (0..n).filter(|i| trained[*i] == part).collect();
        let pick = |i: &usize| (belief[*i], given[*i]);
        let (belief, given): (Vec<f64>, Vec<usize>) = members.iter().map(pick).unzip();
        let scores = scores(&belief, &given, classes);
        let threshold = otsu(&scores);
        members.iter().zip(scores).for_each(|(i, s)| scored[*i] = (s, threshold.is_some_and(|t| s > t)));
    }
    let finding = |((p, given), (score, flagged)): ((&[f64], &usize), &(f64, bool))| {
        let suggested = best_other(p, *given);
        Finding {
            given: *given,
            p_given: p[*given],
            suggested,
            p_suggested: p[suggested],
            score: *score,
            flagged: *flagged,
        }
    };
    Ok(rows().zip(&scored).map(finding).collect())
}

/// Position of the largest of `p` but `given`, the first on ties.
fn best_other(p: &[f64], given: usize) -> usize {
    let first = usize::from(given == 0);
    (0..p.len()).filter(|c| *c != given).fold(first, |best, c| if p[c] > p[best] { c } else { best })
}

/// `s_i = mean_{j: y_j = y_i} b_j − b_i` for beliefs `b` and labels `y`, each below `classes`.
pub fn scores(belief: &[f64], given: &[usize], classes: usize) -> Vec<f64> {
    let (mut sum, mut count) = (vec![0.0; classes], vec![0usize; classes]);
    for (b, y) in belief.iter().zip(given) {
        sum[*y] += b;
        count[*y] += 1;
    }
    belief.iter().zip(given).map(|(b, y)| sum[*y] / count[*y] as f64 - b).collect()
}

/// The threshold between two values of `v` that parts them with the largest variance between the groups, `n₀n₁(m₀ −
/// m₁)²` (Otsu 1979); half way between its neighbours. `None` when all values are equal.
pub fn otsu(v: &[f64]) -> Option<f64> {
    let mut v = v.to_vec();
    v.sort_by(f64::total_cmp);
    let total: f64 = v.iter().sum();
    let (mut below, mut best) = (0.0, None);
    for i in 1..v.len() {
        below += v[i - 1];
        if v[i - 1] == v[i] {
            continue;
        }
        let (low, high) = (i as f64, (v.len() - i) as f64);
        let between = low * high * (below / low - (total - below) / high).powi(2);
        if best.is_none_or(|(most, _)| between > most) {
            best = Some((between, (v[i - 1] + v[i]) / 2.0));
        }
    }
    best.map(|(_, threshold)| threshold)
}

/// Samples from the most suspicious downwards; equal scores in their order.
pub fn ranking(findings: &[Finding]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..findings.len()).collect();
    order.sort_by(|&a, &b| findings[b].score.total_cmp(&findings[a].score));
    order
}
