//! Both gradients from one tile of delta by `mma.sync`: how patches are divided among blocks, and shared memory
//! (`kernels/include/conv_direct_joint.cuh`).

use super::conv::{Beside, Job, THREADS, splits};
use super::conv_params::ConvBackwardParams;
use super::conv_tiles::{ABREAST, MOST_TAPS, PATCH, PIXEL, Patches, SLICE, Tiling, finish};
use super::joint::{SIDE, one_tile};
use super::{Lowering, Operands};
use crate::device::cuda::driver::Generation;
use crate::error::Result;
use crate::ops::{ConvGeom, ConvKind};
use bytemuck::{Pod, Zeroable};

/// Bytes of `JointTables`.
const TABLES: usize = 3104;
/// Bytes of a `JointPixel`.
const PLACE: usize = 8;
/// Pixels of a flight (`DELTA_FLIGHT`), of which the halo has whole ones.
const STEP: usize = 64;
/// Bytes of which the areas are multiples: eight lines.
const LINES: usize = 8 * PIXEL;
/// `JOINT_WEIGHTS`: bytes of the weights of all taps.
const WEIGHTS: usize = SIDE * SIDE * SLICE * PIXEL;
/// Twin of `JointAreas`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct JointAreas {
    weights: i32,
    x: i32,
    delta: i32,
    halo_pixels: i32,
}

impl JointAreas {
    /// Those of a block with a halo of so many pixels, and all bytes of its shared memory: what follows the dgrad's product lies where x and
    /// delta were, and what follows the other from the beginning on.
    fn of(halo: usize) -> (Self, usize) {
        let halo = halo.next_multiple_of(STEP);
        let weights = (TABLES + PLACE * halo).next_multiple_of(LINES);
        let x = weights + WEIGHTS;
        let delta = x + PIXEL * PATCH;
        let [weights_at, x_at, delta_at, halo_pixels] = [weights, x, delta, halo].map(|v| v as i32);
        let areas = JointAreas { weights: weights_at, x: x_at, delta: delta_at, halo_pixels };
        (areas, (delta + PIXEL * halo).max(x + finish(PATCH, SLICE)).max(finish(SLICE, MOST_TAPS * SLICE)))
    }
}

/// Twin of `ConvJointParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvJointParams {
    both: ConvBackwardParams,
    areas: JointAreas,
}
const _: () = assert!(size_of::<ConvJointParams>() == 1784);

/// The tiles of both gradients, that of the input first: the same patches. None where there are no pixels, or no patches that fit shared memory.
pub(super) fn tiles(g: &ConvGeom) -> Option<([Tiling; 2], JointAreas)> {
    let (patches, shared) = Patches::choose(ConvKind::Dgrad, g, |patches| JointAreas::of(patches.halo_pixels()).1)?;
    let (areas, _) = JointAreas::of(patches.halo_pixels());
    let number = patches.number(ConvKind::Dgrad, g);
    let dgrad = Tiling {
        patches,
        tiles: [number, 1, 1],
        size: [PATCH, SLICE],
        run: 1,
        least: 1,
        joint: usize::MAX,
        shared,
        abreast: ABREAST,
    };
    let size = [SLICE, MOST_TAPS * SLICE];
    let wgrad = Tiling { patches, tiles: [1, 1, number], size, run: 1, least: 4, joint: 32, shared, abreast: ABREAST };
    Some(([dgrad, wgrad], areas))
}

/// Runs into which the patches of a result are divided, all of about the same length: each leaves a partial sum of the weights' gradient.
/// `most`: more would be too small, or too many.
pub(super) fn runs(patches: usize, most: usize) -> usize {
    patches.div_ceil(patches.div_ceil(most.min(patches)))
}

/// Appends the launch of both gradients from one tile, if its kernels can take them; false: another way is wanted.
pub(super) fn launch(lowering: &mut Lowering<'_>, dgrad: &Job<'_>, wgrad: &Job<'_>) -> Result<bool> {
    let kernels = match lowering.operands {
        Operands::F16 => ["conv2d_direct_joint_f16", "conv2d_direct_joint_pair_f16"],
        Operands::Bf16 => ["conv2d_direct_joint_bf16", "conv2d_direct_joint_pair_bf16"],
        Operands::F32 | Operands::Tf32 => return Ok(false),
    };
    let tiles =
        tiles(dgrad.geom).filter(|_| lowering.generation == Generation::Portable && one_tile(dgrad, wgrad, lowering));
    let Some(([of_x, of_w], areas)) = tiles else { return Ok(false) };
    let (segments, branches) = (wgrad.all_segments(lowering.branches()), wgrad.out.branches(lowering.branches()));
    let most = splits(&of_w, [branches; 2], of_w.tiles[2] * segments, Beside::Dgrad);
    let runs = runs(of_w.tiles[2], most);
    let mut both = ConvBackwardParams::zeroed();
    (both.dgrad, _) = dgrad.lower(lowering, &of_x, Beside::OneTile(1))?;
    let blocks;
    (both.wgrad, blocks) = wgrad.lower(lowering, &of_w, Beside::OneTile(runs))?;
    let pairs = [dgrad, wgrad].into_iter().any(|job| job.pairs().next().is_some());
    lowering.push(kernels[usize::from(pairs)], &ConvJointParams { both, areas }, [blocks, 1, 1], THREADS, of_w.shared);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::conv_tiles::MOST_SHARED;
    use super::*;

    fn geom([n, c, h, w, k]: [usize; 5]) -> ConvGeom {
        ConvGeom { n, c, h, w, k, r: SIDE, s: SIDE, p: h, q: w, stride: 1, pad: 1 }
    }

    /// Three blocks fit a multiprocessor of 164 KiB, and two one of 100, each with 1 KiB for the system.
    #[test]
    fn blocks_of_a_step_fit_a_multiprocessor() {
        let ([dgrad, wgrad], _) = tiles(&geom([128, 32, 32, 32, 32])).unwrap();
        assert_eq!(dgrad.patches.size, [8, 16]);
        assert_eq!([dgrad.tiles, wgrad.tiles], [[1024, 1, 1], [1, 1, 1024]]);
        assert_eq!(dgrad.shared, wgrad.shared);
        assert!(3 * (dgrad.shared + 1024) <= 164 << 10 && 2 * (dgrad.shared + 1024) <= 100 << 10, "{}", dgrad.shared);
    }

    /// Every size has patches, but images of one pixel by the hundred.
    #[test]
    fn all_sizes_have_patches() {
        for (h, w, n) in (1..=20).flat_map(|h| (1..=20).flat_map(move |w| [1, 3, 300].map(|n| (h, w, n)))) {
            let found = tiles(&geom([n, 8, h, w, 32]));
            assert_eq!(found.is_some(), [h, w] != [1, 1] || n < 100, "{n} {h} {w}");
            let Some(([dgrad, wgrad], areas)) = found else { continue };
            assert!([areas.weights, areas.x, areas.delta].iter().all(|at| at % LINES as i32 == 0));
            let Patches { images, size, count, halo } = dgrad.patches;
            assert!(images * size[0] * size[1] <= PATCH && dgrad.shared <= MOST_SHARED);
            assert_eq!(halo, size.map(|v| v + SIDE - 1));
            assert!(count[0] * size[0] >= h && count[1] * size[1] >= w);
            assert_eq!(wgrad.tiles[2], n.div_ceil(images) * count[0] * count[1]);
        }
        assert!(tiles(&geom([0, 8, 4, 4, 8])).is_none());
    }

    /// Runs cover all patches, none is empty, and there are no more than wanted.
    #[test]
    fn runs_are_even() {
        for (patches, most, expected) in
            [(1024, 320, 256), (1024, 32, 32), (8, 264, 8), (8, 3, 3), (7, 1, 1), (1, 9, 1)]
        {
            assert_eq!(runs(patches, most), expected);
            let first = |run: usize| patches * run / expected;
            assert!((0..expected).all(|run| first(run) < first(run + 1)));
        }
    }
}
