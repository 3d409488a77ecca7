//! Which gradients of input and weights a block makes both of, from one tile of delta.

use super::Lowering;
use super::conv::Job;
use super::conv_tiles::SLICE;

/// Taps of a filter, down and across.
pub(super) const SIDE: usize = 3;

/// Whether the registers of a block hold the gradient of the whole filter beside a tile of that of the input, and both are sums over
/// the same branches.
pub(super) fn one_tile(dgrad: &Job<'_>, wgrad: &Job<'_>, lowering: &Lowering<'_>) -> bool {
    let g = dgrad.geom;
    let channels = [g.c, g.k].into_iter().all(|n| n.is_multiple_of(8) && n <= SLICE);
    let filter = [g.r, g.s] == [SIDE; 2] && [g.stride, g.pad] == [1; 2];
    let sums = [dgrad, wgrad].map(|job| (job.out.meta.per_branch, job.all_segments(lowering.branches())));
    channels && filter && sums[0] == sums[1] && dgrad.by_patches(lowering) && wgrad.by_patches(lowering)
}
