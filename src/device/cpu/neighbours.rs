//! Nearest neighbours within a batch, and labels taken from them.
#![allow(unsafe_code)]

use super::memory::{Out, View};
use super::real::Real;
use super::scratch::with_scratch;
use rayon::prelude::*;

/// Bytes of a thread's scratch that `samples` distances take.
pub(super) fn scratch(samples: usize) -> usize {
    samples * size_of::<f64>()
}

/// For every sample the indices of the nearest others, nearest first, the smaller index first on ties; distances in
/// double precision. Features lie feature by feature, results rank by rank.
pub(super) fn nearest<T: Real>(x: View<'_, T>, samples: usize, out: Out<'_, i32>) {
    let (dim, count) = (x.len / samples, out.len / samples);
    (0..out.branches() * samples).into_par_iter().for_each(|task| {
        let (m, i) = (task / samples, task % samples);
        let features = x.branch(m);
        with_scratch(samples, |distance: &mut [f64]| {
            distance.fill(0.0);
            for row in features.chunks_exact(samples).take(dim) {
                let own = row[i].f64();
                distance.iter_mut().zip(row).for_each(|(d, v)| *d += (own - v.f64()).powi(2));
            }
            let mut last: Option<usize> = None;
            for rank in 0..count {
                // The smallest (distance, index) behind the one found last; a NaN is larger than any number.
                let behind =
                    |j: usize| last.is_none_or(|l| distance[l].total_cmp(&distance[j]).then(l.cmp(&j)).is_lt());
                let rest = (0..samples).filter(|&j| j != i && behind(j));
                let next = rest.min_by(|&a, &b| distance[a].total_cmp(&distance[b]));
                last = next;
                // SAFETY: the ranks of sample i belong to this task.
                unsafe { out.part(m * out.len + rank * samples + i, 1)[0] = next.unwrap_or(i) as i32 };
            }
        });
    });
}

/// Labels of which some are taken from neighbours; a negative rank keeps the sample's own.
pub(super) fn transfer(labels: View<'_, i32>, neighbours: View<'_, i32>, ranks: View<'_, i32>, out: Out<'_, i32>) {
    let samples = labels.len;
    for m in 0..out.branches() {
        let (labels, neighbours, ranks) = (labels.branch(m), neighbours.branch(m), ranks.branch(m));
        // SAFETY: the launch has the result to itself.
        let dst = unsafe { out.part(m * out.len, out.len) };
        for (i, to) in dst.iter_mut().enumerate() {
            let from = usize::try_from(ranks[i]).map_or(i, |rank| neighbours[rank * samples + i] as usize);
            *to = labels[from];
        }
    }
}
