//! Both gradients of a convolution from one tile of δ, for the warpgroups of Hopper (`kernels/include/conv_cells_joint.cuh`).

use super::conv::{Beside, Job};
use super::conv_cells::{GRANULE, PARTS, PIXELS, PLACE, THREADS, patches};
use super::conv_params::ConvBackwardParams;
use super::conv_tiles::{Patches, SLICE, Tiling};
use super::joint::{SIDE, one_tile};
use super::{Lowering, Operands};
use crate::device::cuda::driver::{Address, Generation, Limits};
use crate::error::Result;
use crate::ops::{ConvGeom, ConvKind};
use bytemuck::{Pod, Zeroable};

/// Bytes of `JointTables`.
const TABLES: usize = 3152;
/// Columns of `JointSums`: all taps of a slice.
const SUMS_COLUMNS: usize = SIDE * SIDE * SLICE;
/// Bytes of the weights of a segment: all taps of four times as many granules as `CellWeights` has from one to the next.
const WEIGHTS: usize = SIDE * SIDE * PARTS * (SLICE + 2) * GRANULE;
/// Bytes of `ConvFinish` of dx.
const FINISH: usize = 4 * PIXELS * (SLICE + 8) + 16 * THREADS + 4 * PIXELS;
const _: () = assert!(FINISH >= 4 * SLICE * (SUMS_COLUMNS + 8) + 16 * THREADS + 4 * SLICE);
/// Multiprocessors of the largest card of this kind. A block has all of one.
const MULTIPROCESSORS: usize = 132;

/// Twin of `JointTiling`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct JointTiling {
    delta_places: i32,
    x_places: i32,
    slots: i32,
    x: i32,
    step: i32,
    delta_pitch: i32,
    x_pitch: i32,
    weights: i32,
    weight_bytes: i32,
    weight_slots: i32,
    keeps: i32,
    finish: i32,
    run: i32,
    group: i32,
}
const _: () = assert!(size_of::<JointTiling>() == 56);

/// Twin of `JointParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct JointParams {
    pub both: ConvBackwardParams,
    pub arrivals: Address,
    pub tiling: JointTiling,
}
const _: () = assert!(size_of::<JointParams>() == size_of::<ConvBackwardParams>() + 64);

/// Granules from one part of a line of so many pixels to the next: stores of eight threads, four parts of two pixels, then meet no bank twice.
fn pitch(pixels: usize) -> usize {
    pixels + [2, 1, 0, 3][pixels % 4]
}

/// What else decides how the products are divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    /// Branches that are summed in each result.
    pub segments: usize,
    /// Branches of the results.
    pub branches: usize,
    /// Each of the branches that are summed has weights of its own.
    pub weights: bool,
}

/// The tiles of dx and of dw, and how a block uses its shared memory, for sizes that [`one_tile`](super::joint::one_tile) takes. All blocks
/// have both roles: there are as many runs of patches as splits of dw.
pub(super) fn joint(g: &ConvGeom, scale: Scale) -> Option<([Tiling; 2], JointTiling)> {
    let all = patches(ConvKind::Dgrad, g)?.into_iter().filter_map(|delta| {
        let x = Patches { halo: [delta.size[0] + 1, delta.size[1]], ..delta };
        let (tilings, joint) = divided(g, scale, delta, x)?;
        // Of a line in pieces each counts as a pixel more: whole lines of an image are one run of memory.
        let pieces = if delta.count[1] > 1 { 1 } else { 0 };
        let [of_delta, of_x] = [delta, x].map(|p| p.images * p.halo[0] * (p.halo[1] + pieces));
        Some((delta.number(ConvKind::Dgrad, g) * (4 * PIXELS + of_delta + of_x), tilings, joint))
    });
    all.min_by_key(|(cost, ..)| *cost).map(|(_, tilings, joint)| (tilings, joint))
}

/// The products with patches that are loaded so, if they fit shared memory.
fn divided(g: &ConvGeom, scale: Scale, delta: Patches, x: Patches) -> Option<([Tiling; 2], JointTiling)> {
    let Scale { segments, branches, weights } = scale;
    let limit = Limits::HOPPER.shared as usize;
    let number = delta.number(ConvKind::Dgrad, g);
    // As many runs as a card can work on at a time, all of them but for the last equally long.
    let run = number.div_ceil((MULTIPROCESSORS / branches).clamp(1, number));
    let runs = number.div_ceil(run);

    let places = |p: &Patches| (p.halo[0] * p.halo[1] * PLACE).next_multiple_of(GRANULE);
    let [delta_pitch, x_pitch] = [delta, x].map(|p| pitch(p.halo[1]));
    let bytes = |p: &Patches, pitch: usize| p.images * p.halo[0] * PARTS * pitch * GRANULE;
    let x_places = TABLES + places(&delta);
    let slots = x_places + places(&x);
    let x_at = bytes(&delta, delta_pitch);
    let step = x_at + bytes(&x, x_pitch);
    // dw, in a block's last moments, takes less than dx and may begin where the slots do.
    let finish_at = slots + 2 * step;
    let weights_at = finish_at + FINISH;
    let all = if weights { segments } else { 1 };
    let keeps = weights_at + all * WEIGHTS <= limit;
    let weight_slots = if keeps { all } else { 2 };
    let shared = weights_at + weight_slots * WEIGHTS;
    // Descriptors have 14 bits for steps, in granules.
    if shared > limit || PARTS * delta_pitch.max(x_pitch) >= 1 << 14 {
        return None;
    }
    let of_x = Tiling {
        patches: delta,
        tiles: [number, 1, 1],
        size: [PIXELS, SLICE],
        run,
        // The runs are the splits of dw; dx has none.
        least: usize::MAX,
        joint: usize::MAX,
        shared,
        abreast: MULTIPROCESSORS,
    };
    let of_w = Tiling { patches: x, tiles: [1, 1, number], size: [SLICE, SUMS_COLUMNS], run: 1, ..of_x };
    let joint = JointTiling {
        delta_places: TABLES as i32,
        x_places: x_places as i32,
        slots: slots as i32,
        x: x_at as i32,
        step: step as i32,
        delta_pitch: delta_pitch as i32,
        x_pitch: x_pitch as i32,
        weights: weights_at as i32,
        weight_bytes: WEIGHTS as i32,
        weight_slots: i32::try_from(weight_slots).ok()?,
        keeps: keeps.into(),
        finish: finish_at as i32,
        run: i32::try_from(run).ok()?,
        // As many in a group as there are groups: the fewest that are added up one after the other.
        group: runs.isqrt() as i32,
    };
    Some(([of_x, of_w], joint))
}

/// Appends the launch of both gradients from one tile, if its kernels can take them; false: another way is wanted.
pub(super) fn launch(lowering: &mut Lowering<'_>, dgrad: &Job<'_>, wgrad: &Job<'_>) -> Result<bool> {
    let kernels = match lowering.operands {
        Operands::F16 => ["conv2d_wgmma_joint_f16", "conv2d_wgmma_joint_pair_f16"],
        Operands::Bf16 => ["conv2d_wgmma_joint_bf16", "conv2d_wgmma_joint_pair_bf16"],
        Operands::F32 | Operands::Tf32 => return Ok(false),
    };
    if lowering.generation != Generation::Hopper || !one_tile(dgrad, wgrad, lowering) {
        return Ok(false);
    }
    let branches = lowering.branches();
    let (segments, weights) = (dgrad.all_segments(branches), dgrad.terms[0][1].meta.per_branch);
    let scale = Scale { segments, branches: dgrad.out.branches(branches), weights };
    let Some(([of_x, of_w], tiling)) = joint(dgrad.geom, scale) else { return Ok(false) };
    let runs = of_x.tiles[0].div_ceil(of_x.run);
    let mut params = JointParams { tiling, ..JointParams::zeroed() };
    let blocks;
    (params.both.dgrad, blocks) = dgrad.lower(lowering, &of_x, Beside::OneTile(1))?;
    (params.both.wgrad, _) = wgrad.lower(lowering, &of_w, Beside::OneTile(runs))?;
    if runs > 1 {
        let groups = runs.div_ceil(tiling.group as usize);
        params.arrivals = lowering.counters(scale.branches * (groups + 1));
        if groups > 1 {
            lowering.partial_sums_again(4 * SLICE * SUMS_COLUMNS * groups * scale.branches);
        }
    }
    let pairs = [dgrad, wgrad].iter().any(|job| job.pairs().next().is_some());
    lowering.push(kernels[usize::from(pairs)], &params, [blocks, 1, 1], THREADS, of_x.shared);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Meta;

    /// Images, channels, height, width, output channels.
    type Size = [usize; 5];

    fn tiled([n, c, h, w, k]: Size, scale: Scale) -> ([Tiling; 2], JointTiling) {
        let geom = ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, SIDE, SIDE), 1, 1).unwrap();
        joint(&geom, scale).unwrap()
    }

    fn per_branch(branches: usize) -> Scale {
        Scale { segments: 1, branches, weights: true }
    }

    fn summed(segments: usize, weights: bool) -> Scale {
        Scale { segments, branches: 1, weights }
    }

    /// The first stage of a PreAct ResNet-32: one wave of blocks, the last at most a run shorter, weights that stay but for those of ten branches.
    #[test]
    fn blocks_of_the_network_fill_a_card_once() {
        let scales =
            [(per_branch(10), true), (per_branch(1), true), (summed(10, false), true), (summed(10, true), false)];
        for (scale, keeps) in scales {
            let ([of_x, of_w], joint) = tiled([128, 32, 32, 32, 32], scale);
            let what = format!("{scale:?}: {of_x:?} {joint:?}");
            let blocks = of_x.tiles[0].div_ceil(of_x.run) * scale.branches;
            assert!(blocks <= MULTIPROCESSORS && blocks * 100 > MULTIPROCESSORS * 96, "{what}");
            assert_eq!(of_x.patches.size, [8, 32], "{what}");
            assert_eq!((of_x.patches.halo, of_w.patches.halo), ([10, 34], [9, 32]), "{what}");
            assert_eq!(joint.keeps == 1, keeps, "{what}");
        }
    }

    /// No part of shared memory reaches into another, and all products read what was loaded.
    #[test]
    fn parts_of_shared_memory_lie_apart() {
        let sizes = [
            [128, 32, 32, 32, 32],
            [1, 8, 1, 1, 8],
            [7, 24, 3, 3, 8],
            [2, 24, 15, 11, 8],
            [1, 8, 7, 5, 32],
            [3, 16, 7, 300, 16],
            [3, 16, 300, 9, 16],
            [9, 32, 8, 16, 32],
        ];
        for size in sizes {
            for scale in
                [per_branch(1), per_branch(4), per_branch(300), summed(3, true), summed(5, true), summed(5, false)]
            {
                let ([of_x, of_w], joint) = tiled(size, scale);
                let what = format!("{size:?} {scale:?}: {of_x:?} {of_w:?} {joint:?}");
                let slot = |tiling: &Tiling, pitch: i32| {
                    let Patches { images, halo, .. } = tiling.patches;
                    assert!(halo[1] <= pitch as usize, "{what}");
                    images * halo[0] * PARTS * pitch as usize * GRANULE
                };
                let [delta, x] = [slot(&of_x, joint.delta_pitch), slot(&of_w, joint.x_pitch)];
                let at = [joint.delta_places, joint.x_places, joint.slots, joint.step, joint.x].map(|v| v as usize);
                let [delta_places, x_places, slots, step, x_at] = at;
                let [finish, weights] = [joint.finish, joint.weights].map(|v| v as usize);
                let places = |tiling: &Tiling| tiling.patches.halo[0] * tiling.patches.halo[1] * PLACE;
                assert!(TABLES <= delta_places && delta_places + places(&of_x) <= x_places, "{what}");
                assert!(x_places + places(&of_w) <= slots && delta <= x_at && x_at + x <= step, "{what}");
                assert!(slots + 2 * step <= finish && finish + FINISH <= weights, "{what}");
                assert!(weights + joint.weight_slots as usize * WEIGHTS <= of_x.shared, "{what}");
                assert!(of_x.shared <= Limits::HOPPER.shared as usize && of_x.shared == of_w.shared, "{what}");
                assert!([slots, step, x_at, finish, weights].iter().all(|v| v % GRANULE == 0), "{what}");
                // Both have a pixel for each that threads load at a time, of which the next is in the same image or the one behind it.
                for tiling in [&of_x, &of_w] {
                    assert!(tiling.patches.halo[0] * tiling.patches.halo[1] >= THREADS / PARTS, "{what}");
                }
                // A cell's last lines, of δ two more than of the patch, of x one.
                let [down, across] = of_x.patches.size;
                assert!(
                    of_x.patches.halo == [down + 2, across + 2] && of_w.patches.halo == [down + 1, across],
                    "{what}"
                );
                assert!(of_x.patches.images * down * across <= PIXELS, "{what}");
            }
        }
    }

    /// What `tests/simt_joint.rs` says of its sizes.
    #[test]
    fn tested_runs_are_what_they_are_said_to_be() {
        // Patches of a run, of the last, runs, runs of a group; whether weights stay.
        let cases = [
            ([140, 8, 16, 16, 24], summed(1, false), [2, 2, 70, 8], true),
            ([71, 24, 16, 16, 8], per_branch(4), [3, 2, 24, 4], true),
            ([139, 8, 9, 9, 8], summed(3, true), [2, 1, 70, 8], true),
            ([133, 8, 9, 9, 8], summed(5, true), [2, 1, 67, 8], false),
            ([3, 32, 40, 24, 16], per_branch(3), [1, 1, 15, 3], true),
        ];
        for (size, scale, [run, last, runs, group], keeps) in cases {
            let ([of_x, _], joint) = tiled(size, scale);
            let (patches, run_of) = (of_x.tiles[0], joint.run as usize);
            let have =
                [run_of, patches - (patches - 1) / run_of * run_of, patches.div_ceil(run_of), joint.group as usize];
            assert_eq!(have, [run, last, runs, group], "{size:?} {scale:?} {of_x:?}");
            assert_eq!(joint.keeps == 1, keeps, "{size:?} {scale:?}");
        }
    }
}
