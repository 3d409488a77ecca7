//! Both gradients of a convolution from one tile of δ: which launches are taken so.

use super::Lowering;
use super::conv::Job;
use super::conv_tiles::SLICE;

/// Whether blocks can make both gradients, each of a patch, from one tile of the cotangent: 3 × 3 filters whose sums fit a block's
/// registers, and results for the same branches, so that a block of one has what the other wants.
pub(super) fn one_tile(dgrad: &Job<'_>, wgrad: &Job<'_>, lowering: &Lowering<'_>) -> bool {
    let g = dgrad.geom;
    let sizes = [g.r, g.s, g.stride, g.pad] == [3, 3, 1, 1]
        && [g.c, g.k].iter().all(|channels| channels.is_multiple_of(8) && *channels <= SLICE);
    let jobs = [dgrad, wgrad];
    let [of_x, of_w] = jobs.map(|job| (job.out.meta.per_branch, job.all_segments(lowering.branches())));
    sizes && jobs.iter().all(|job| job.by_patches(lowering)) && of_x == of_w
}
