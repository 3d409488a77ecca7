//! Both gradients of a convolution from one tile of δ, for the warpgroups of Hopper (`kernels/include/conv_cells_joint.cuh`).

use super::conv::{Beside, Job};
use super::conv_cells::{GRANULE, PARTS, PIXELS, PLACE, THREADS, patches};
use super::conv_params::ConvBackwardParams;
use super::conv_tiles::{Patches, SLICE, Tiling};
use super::{Lowering, Operands};
use crate::device::cuda::driver::{Generation, Limits};
use crate::error::Result;
use crate::ops::{ConvGeom, ConvKind};
use bytemuck::{Pod, Zeroable};

/// Bytes of `JointTables`.
const TABLES: usize = 3152;
/// Columns of `JointSums`: all taps of a slice.
const SUMS_COLUMNS: usize = 9 * SLICE;
/// Bytes of the weights of a segment: nine taps of four times as many granules as `CellWeights` has from one to the next.
const WEIGHTS: usize = 9 * PARTS * (SLICE + 2) * GRANULE;
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
    unused: i32,
}
const _: () = assert!(size_of::<JointTiling>() == 56);

/// Twin of `JointParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct JointParams {
    pub both: ConvBackwardParams,
    pub tiling: JointTiling,
}
const _: () = assert!(size_of::<JointParams>() == size_of::<ConvBackwardParams>() + 56);

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
        let loaded = [delta, x].map(|p| p.images * p.halo[0] * p.halo[1]);
        Some((delta.number(ConvKind::Dgrad, g) * (4 * PIXELS + loaded[0] + loaded[1]), tilings, joint))
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
        // It has no splits.
        least: usize::MAX,
        joint: usize::MAX,
        shared,
    };
    // The runs in the place of inner tiles, each a split.
    let of_w = Tiling {
        patches: x,
        tiles: [1, 1, runs],
        size: [SLICE, SUMS_COLUMNS],
        run: 1,
        least: segments,
        joint: segments,
        shared,
    };
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
        unused: 0,
    };
    Some(([of_x, of_w], joint))
}

/// Appends the launch of both gradients from one tile, which [`one_tile`](super::joint::one_tile) allows; false: the kernels for it cannot
/// take the sizes, or the card has none such.
pub(super) fn launch(lowering: &mut Lowering<'_>, dgrad: &Job<'_>, wgrad: &Job<'_>) -> Result<bool> {
    let kernels = match lowering.operands {
        Operands::F16 => ["conv2d_wgmma_joint_f16", "conv2d_wgmma_joint_pair_f16"],
        Operands::Bf16 => ["conv2d_wgmma_joint_bf16", "conv2d_wgmma_joint_pair_bf16"],
        Operands::F32 | Operands::Tf32 => return Ok(false),
    };
    let branches = lowering.branches();
    let (segments, weights) = (dgrad.all_segments(branches), dgrad.terms[0][1].meta.per_branch);
    let scale = Scale { segments, branches: dgrad.out.branches(branches), weights };
    let Some(([of_x, of_w], tiling)) = joint(dgrad.geom, scale).filter(|_| lowering.generation == Generation::Hopper)
    else {
        return Ok(false);
    };
    let mut params = JointParams { tiling, ..JointParams::zeroed() };
    let blocks;
    (params.both.dgrad, blocks) = dgrad.lower(lowering, &of_x, Beside::Nothing)?;
    (params.both.wgrad, _) = wgrad.lower(lowering, &of_w, Beside::Dgrad)?;
    let count = lowering.narrow("blocks", blocks)?;
    (params.both.dgrad_blocks, params.both.wgrad_blocks) = (count, count);
    let pairs = [dgrad, wgrad].iter().any(|job| job.pairs().next().is_some());
    lowering.push(kernels[usize::from(pairs)], &params, [blocks, 1, 1], THREADS, of_x.shared);
    Ok(true)
}
