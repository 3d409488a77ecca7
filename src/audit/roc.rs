//! How well a score finds wrong labels, where the true ones are known.
//!
//! A *positive* is a label that differs from the true one. Samples are taken from the highest score downwards; samples
//! of equal score are taken together, so that no order among them can change a number.

/// A threshold of the score, and what calling everything at or above it wrong comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RocPoint {
    /// The lowest score that is called wrong; infinite for the first point, where nothing is.
    pub threshold: f64,
    /// Labels called wrong.
    pub called: usize,
    /// Wrong labels among them.
    pub hits: usize,
    /// Part of the right labels that are called wrong.
    pub false_positive_rate: f64,
    /// Part of the wrong labels that are called wrong: recall.
    pub true_positive_rate: f64,
    /// Part of the labels called wrong that are wrong; 1 where nothing is called.
    pub precision: f64,
}

/// The receiver operating characteristic of a score.
#[derive(Clone, Debug, PartialEq)]
pub struct Roc {
    /// From nothing called wrong to everything; one point per distinct score.
    pub points: Vec<RocPoint>,
    /// Wrong labels.
    pub wrong: usize,
    /// Labels.
    pub total: usize,
}

impl Roc {
    /// The curve of `scores`, high for suspicious, against `wrong`; `None` unless there are both right and wrong
    /// labels.
    ///
    /// # Panics
    /// If the two differ in length.
    pub fn new(scores: &[f64], wrong: &[bool]) -> Option<Self> {
        assert_eq!(scores.len(), wrong.len());
        let (total, positives) = (wrong.len(), wrong.iter().filter(|w| **w).count());
        if positives == 0 || positives == total {
            return None;
        }
        let mut order: Vec<usize> = (0..total).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let point = |threshold, called: usize, hits: usize| RocPoint {
            threshold,
            called,
            hits,
            false_positive_rate: (called - hits) as f64 / (total - positives) as f64,
            true_positive_rate: hits as f64 / positives as f64,
            precision: if called == 0 { 1.0 } else { hits as f64 / called as f64 },
        };
        let mut points = vec![point(f64::INFINITY, 0, 0)];
        let mut hits = 0;
        for (at, &i) in order.iter().enumerate() {
            hits += usize::from(wrong[i]);
            let last_of_equals = order.get(at + 1).is_none_or(|&next| scores[next] != scores[i]);
            if last_of_equals {
                points.push(point(scores[i], at + 1, hits));
            }
        }
        Some(Roc { points, wrong: positives, total })
    }

    /// Area under the curve by trapezoids: the probability that a wrong label has a higher score than a right one,
    /// equal scores counted half (Hanley and McNeil 1982).
    pub fn auc(&self) -> f64 {
        let area = |w: &[RocPoint]| {
            (w[1].false_positive_rate - w[0].false_positive_rate) * (w[1].true_positive_rate + w[0].true_positive_rate)
        };
        self.points.windows(2).map(area).sum::<f64>() / 2.0
    }

    /// Precision when as many labels are called wrong as are wrong; recall is the same number then. Where a group of
    /// equal scores straddles that count, its expected value for a random order within the group.
    pub fn precision_at_errors(&self) -> f64 {
        let after = self.points.iter().position(|p| p.called >= self.wrong).unwrap_or(self.points.len() - 1);
        let (to, from) = (self.points[after], self.points[after.saturating_sub(1)]);
        let share = (self.wrong - from.called) as f64 / (to.called - from.called) as f64;
        (from.hits as f64 + share * (to.hits - from.hits) as f64) / self.wrong as f64
    }

    /// The point of the highest F1, the first on ties: the best threshold one could have chosen with the true labels at
    /// hand.
    pub fn best(&self) -> RocPoint {
        let f1 = |p: &RocPoint| 2.0 * p.hits as f64 / (p.called + self.wrong) as f64;
        self.points.iter().copied().fold(self.points[0], |best, p| if f1(&p) > f1(&best) { p } else { best })
    }
}
