//! Synthetic noisy labels: in-batch label transfer from nearest neighbours in feature space.

use crate::rng::{Stream, below, permutation};

/// For every sample of a batch its nearest others, nearest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbours {
    /// `[k][count]`
    lists: Vec<Vec<u32>>,
}

impl Neighbours {
    /// The `count` nearest neighbours of each of the `k` samples with features `[k, dim]`: Euclidean distance, the
    /// sample itself excluded, the smaller index first on ties. One distance matrix serves all branches.
    pub fn new(features: &[f32], k: usize, dim: usize, count: usize) -> Self {
        let row = |i: usize| &features[i * dim..(i + 1) * dim];
        let distance = |i: usize, j: usize| -> f64 {
            row(i).iter().zip(row(j)).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
        };
        let mut matrix = vec![0.0f64; k * k];
        for i in 0..k {
            for j in i + 1..k {
                let d = distance(i, j);
                (matrix[i * k + j], matrix[j * k + i]) = (d, d);
            }
        }
        let nearest = |i: usize| {
            let mut others: Vec<u32> = (0..k as u32).filter(|j| *j as usize != i).collect();
            others.sort_by(|a, b| {
                let d = |j: u32| matrix[i * k + j as usize];
                d(*a).total_cmp(&d(*b)).then(a.cmp(b))
            });
            others.truncate(count);
            others
        };
        Neighbours { lists: (0..k).map(nearest).collect() }
    }

    /// Neighbours of sample `i`, nearest first.
    pub fn of(&self, i: usize) -> &[u32] {
        &self.lists[i]
    }

    /// M sets of labels `[M, k]`: in each, `replaced` samples chosen at random take the label of one of their
    /// neighbours, drawn at random; the others keep theirs.
    pub fn labels(&self, given: &[i32], replaced: usize, branches: usize, rng: &mut Stream) -> Vec<i32> {
        let k = given.len();
        let mut all = Vec::with_capacity(branches * k);
        for _ in 0..branches {
            let mut labels = given.to_vec();
            for i in permutation(k, rng).into_iter().take(replaced) {
                let list = &self.lists[i as usize];
                if !list.is_empty() {
                    labels[i as usize] = given[list[below(list.len() as u64, rng) as usize] as usize];
                }
            }
            all.extend(labels);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, stream};

    #[test]
    fn neighbours_are_the_nearest_others_in_order() {
        // On a line: 0, 1, 3, 7, 15.
        let features = [0.0f32, 1.0, 3.0, 7.0, 15.0];
        let n = Neighbours::new(&features, 5, 1, 2);
        let lists: Vec<&[u32]> = (0..5).map(|i| n.of(i)).collect();
        assert_eq!(lists, [&[1, 2][..], &[0, 2], &[1, 0], &[2, 1], &[3, 2]]);
    }

    #[test]
    fn exactly_rho_k_samples_are_drawn_and_only_neighbours_are_used() {
        let k = 40;
        let features: Vec<f32> = (0..k).map(|i| i as f32 * i as f32).collect();
        let n = Neighbours::new(&features, k, 1, 10);
        let given: Vec<i32> = (0..k as i32).collect();
        let mut rng = stream(3, Purpose::Synthetic, 0, 0);
        let all = n.labels(&given, 20, 8, &mut rng);
        for labels in all.chunks(k) {
            let changed: Vec<usize> = (0..k).filter(|&i| labels[i] != given[i]).collect();
            // Labels are all different here, so every drawn sample changes.
            assert_eq!(changed.len(), 20);
            assert!(changed.iter().all(|&i| n.of(i).contains(&(labels[i] as u32))));
        }
        assert_ne!(all[..k], all[k..2 * k], "branches draw independently");
        let again = n.labels(&given, 20, 8, &mut stream(3, Purpose::Synthetic, 0, 0));
        assert_eq!(all, again);
    }
}
