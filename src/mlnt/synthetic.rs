//! Synthetic noisy labels: which samples of a batch take whose label. Neighbours are found within the step, by
//! [`NearestNeighbours`](crate::ops::NearestNeighbours); what is drawn at random is drawn here.

use crate::rng::{Stream, below, permutation};

/// M sets of ranks `[M, k]` for [`TransferLabels`](crate::ops::TransferLabels): in each, `replaced` samples chosen at
/// random get a rank drawn from `0..neighbours`; the others get -1 and keep their label.
pub fn draw_ranks(k: usize, neighbours: usize, replaced: usize, branches: usize, rng: &mut Stream) -> Vec<i32> {
    let mut all = vec![-1; branches * k];
    for ranks in all.chunks_exact_mut(k) {
        for i in permutation(k, rng).into_iter().take(replaced) {
            ranks[i as usize] = below(neighbours as u64, rng) as i32;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, stream};

    #[test]
    fn exactly_rho_k_samples_are_drawn_in_every_branch() {
        let draw = || draw_ranks(40, 10, 20, 80, &mut stream(3, Purpose::Synthetic, 0, 0));
        let all = draw();
        let mut seen = [0; 10];
        for ranks in all.chunks(40) {
            assert_eq!(ranks.iter().filter(|r| **r >= 0).count(), 20);
            ranks.iter().filter(|r| **r >= 0).for_each(|r| seen[*r as usize] += 1);
        }
        // 1,600 draws, 160 expected of each rank with a deviation of 12.
        assert!(seen.iter().all(|n| (100..220).contains(n)), "{seen:?}");
        assert_ne!(all[..40], all[40..80], "branches draw independently");
        assert_eq!(all, draw());
    }
}
