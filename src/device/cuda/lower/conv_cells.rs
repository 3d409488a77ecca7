//! How the products of convolutions are divided for the warpgroups of Hopper: patches of cells of 8 × 8 pixels
//! (`kernels/include/conv_cells.cuh`).

use super::conv_params::{ConvBackwardParams, ConvParams, ConvProduct};
use super::conv_tiles::{ABREAST, MOST_PADDING, Patches, SLICE, Tiling};
use crate::device::cuda::driver::Limits;
use crate::ops::{ConvGeom, ConvKind};
use bytemuck::{Pod, Zeroable};

/// `GROUP_THREADS`: threads of a block.
pub(super) const THREADS: usize = 256;
/// Pixels of a cell's side.
const SIDE: usize = 8;
/// `CELLS`: cells of a patch.
const CELLS: usize = 4;
/// Pixels of a patch.
pub(super) const PIXELS: usize = CELLS * SIDE * SIDE;
/// `GRANULE`: bytes of eight elements.
pub(super) const GRANULE: usize = 16;
/// `PARTS`: granules of a pixel of a slice.
pub(super) const PARTS: usize = SLICE / 8;
/// Bytes of `CellRows`, the tables of a product of the other forms.
const ROWS_TABLES: usize = 3120;
/// Bytes of `CellTaps`, those of a weight gradient.
const TAPS_TABLES: usize = 4192;
/// Bytes of a `HaloPixel`.
pub(super) const PLACE: usize = 8;
/// Bytes of shared memory with which two blocks fit a multiprocessor: each takes 1 KiB more for the system.
const OF_TWO: usize = (228 << 10) / 2 - (1 << 10);

/// Twin of `CellTiling`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct CellTiling {
    places: i32,
    halos: i32,
    halo_step: i32,
    halo_pitch: i32,
    matrices: i32,
    matrix_bytes: i32,
    finish: i32,
    finish_step: i32,
    run: i32,
    keeps: i32,
}
const _: () = assert!(size_of::<CellTiling>() == 40);

/// Twin of `CellParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct CellParams {
    pub product: ConvProduct,
    pub tiling: CellTiling,
}
const _: () = assert!(size_of::<CellParams>() == size_of::<ConvParams>() + 40);

/// Twin of `CellBackwardParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct CellBackwardParams {
    pub both: ConvBackwardParams,
    pub dgrad: CellTiling,
    pub wgrad: CellTiling,
}
const _: () = assert!(size_of::<CellBackwardParams>() == size_of::<ConvBackwardParams>() + 80);

/// What else decides how a product is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    /// Segments of the sum that the result is.
    pub segments: usize,
    /// Branches of the result.
    pub branches: usize,
    /// Columns of a tile, or rows of a weight gradient's: 32 or 64.
    pub width: usize,
}

/// Rows of a tile of a lone weight gradient, or columns of another product's.
pub(super) fn width(kind: ConvKind, g: &ConvGeom) -> usize {
    let lines = if kind == ConvKind::Dgrad { g.c } else { g.k };
    if lines > 32 { 64 } else { 32 }
}

/// The tiles of a product, and how its blocks use their shared memory, if its kernel can take the sizes: channels in eights, which is
/// what copies and descriptors count in, and filters whose weights for 32 channels fit shared memory beside a halo. Pixels
/// need not fill their cells, and any stride will do.
pub(super) fn cells(kind: ConvKind, g: &ConvGeom, scale: Scale) -> Option<(Tiling, CellTiling)> {
    if !g.c.is_multiple_of(8) || !g.k.is_multiple_of(8) || g.pad.max(g.r).max(g.s).max(g.stride) > MOST_PADDING {
        return None;
    }
    let all = patches(kind, g)?.into_iter().filter_map(|patches| {
        let (tiling, cells) = divided(kind, g, scale, patches)?;
        let halo = patches.images * patches.halo[0] * patches.halo[1];
        Some((patches.number(kind, g) * (2 * PIXELS + halo), tiling, cells))
    });
    all.min_by_key(|(cost, ..)| *cost).map(|(_, tiling, cells)| (tiling, cells))
}

/// All shapes of a patch, the widest first: of equals it reads the longest runs of memory.
pub(super) fn patches(kind: ConvKind, g: &ConvGeom) -> Option<Vec<Patches>> {
    let (grid, taps, step) = Patches::reach(kind, g)?;
    let fill = grid.map(|v| v.div_ceil(SIDE));
    let mut all = Vec::new();
    for across in (1..=CELLS.min(fill[1])).rev() {
        for down in (1..=(CELLS / across).min(fill[0])).rev() {
            let size = [down * SIDE, across * SIDE];
            let count = [grid[0].div_ceil(size[0]), grid[1].div_ceil(size[1])];
            let halo = [0, 1].map(|i| (size[i] - 1) * step + taps[i]);
            let most = if count == [1, 1] { (CELLS / (down * across)).min(g.n) } else { 1 };
            all.extend((1..=most).rev().map(|images| Patches { images, size, count, halo }));
        }
    }
    Some(all)
}

/// The product with these patches, if they fit shared memory.
fn divided(kind: ConvKind, g: &ConvGeom, scale: Scale, patches: Patches) -> Option<(Tiling, CellTiling)> {
    let Scale { segments, branches, width } = scale;
    let (.., taps, step) = Patches::reach(kind, g)?;
    let limit = Limits::HOPPER.shared as usize;
    // Two blocks of 32 columns fit a multiprocessor, one of 64. A product's blocks end at about the same time if there are no more.
    let abreast = if width == 32 { ABREAST } else { ABREAST / 2 };
    let number = patches.number(kind, g);
    let slices = |channels: usize| channels.div_ceil(SLICE);
    // A part of a line: its columns by their remainders, and what keeps eight threads' stores from meeting in a bank.
    let columns = patches.halo[1].div_ceil(step) * step;
    let halo_pitch = columns + [2, 1, 0, 3][columns % 4];
    let line = PARTS * halo_pitch * GRANULE;
    let finish = |rows: usize, columns: usize| 4 * rows * (columns + 8) + 16 * THREADS + 4 * rows;
    let lines = patches.images * patches.halo[0];
    let places = if kind == ConvKind::Wgrad { TAPS_TABLES } else { ROWS_TABLES };
    let halos = places + (patches.halo[0] * patches.halo[1] * PLACE).next_multiple_of(GRANULE);
    let (tiling, halo_step, matrices, matrix_bytes, finish_step, run, keeps);
    match kind {
        ConvKind::Wgrad => {
            // `TapsTile`: columns of so many taps, and so many columns. Taps that the last of them has too many are read, for nothing.
            let [down, units] = if width == 64 { [3, 3] } else { [2, 6] };
            halo_step = (lines + g.r.next_multiple_of(down) - g.r) * line;
            matrix_bytes = width / 8 * (PIXELS + if width == 64 { 1 } else { 2 }) * GRANULE;
            matrices = halos + 2 * halo_step;
            (finish_step, run, keeps) = (0, 1, false);
            let columns = units * down * SLICE;
            let shared = (matrices + 2 * matrix_bytes).max(halos + finish(width, columns));
            let groups = (g.r.div_ceil(down) * g.s).div_ceil(units);
            let tiles = [g.k.div_ceil(width), slices(g.c) * groups, number];
            tiling = Tiling { patches, tiles, size: [width, columns], run: 1, least: 2, joint: 16, shared, abreast };
        }
        ConvKind::Fprop | ConvKind::Dgrad => {
            let halo_bytes = lines * line;
            let (inner, columns, tap, phases) = match kind {
                ConvKind::Fprop => (g.c, g.k, PARTS * (width + 2), 1),
                _ => (g.k, g.c, width / 8 * (SLICE + if width == 64 { 1 } else { 2 }), g.stride * g.stride),
            };
            matrix_bytes = taps[0] * taps[1] * tap * GRANULE;
            let column_tiles = columns.div_ceil(width);
            let stages = slices(inner) * segments;
            // Of 64 columns a patch makes two tiles.
            let halves = width / 32;
            let finish = finish(PIXELS / halves, width);
            // A block that goes on to another patch has its halo while it finishes the present one, in the other slot and the room
            // between both, and keeps the weights if they fit as well.
            let wanted = (number * column_tiles * branches).div_ceil(abreast).min(number);
            let step = halo_bytes.max(finish);
            let behind = halos + step + halo_bytes;
            let room = if width == 32 { OF_TWO } else { limit };
            let kept = behind + stages.max(phases.min(2)) * matrix_bytes;
            let passing = behind + 2 * matrix_bytes;
            let shared;
            (halo_step, finish_step, matrices, run, keeps, shared) = if wanted > 1 && kept.min(passing) <= room {
                let keeps = kept <= room;
                (step, halo_bytes, behind, wanted, keeps, if keeps { kept } else { passing })
            } else {
                let (slots, finish) = (stages.min(2), halos + finish);
                let matrices = halos + slots * halo_bytes;
                (halo_bytes, 0, matrices, 1, false, finish.max(matrices + slots * matrix_bytes))
            };
            let tiles = [halves * number, column_tiles, slices(inner)];
            let size = [PIXELS / halves, width];
            tiling = Tiling { patches, tiles, size, run: halves * run, least: 1, joint: usize::MAX, shared, abreast };
        }
    }
    // Descriptors have 14 bits for steps, in granules.
    if tiling.shared > limit || line * step >= GRANULE << 14 {
        return None;
    }
    let cells = CellTiling {
        places: places as i32,
        halos: halos as i32,
        halo_step: halo_step as i32,
        halo_pitch: halo_pitch as i32,
        matrices: matrices as i32,
        matrix_bytes: matrix_bytes as i32,
        finish: halos as i32,
        finish_step: finish_step as i32,
        run: i32::try_from(run).ok()?,
        keeps: keeps.into(),
    };
    Some((tiling, cells))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Meta;

    type Size = [usize; 9];

    fn tiled(kind: ConvKind, size: Size, segments: usize, branches: usize) -> (Tiling, CellTiling, usize) {
        let [n, c, h, w, k, r, s, stride, pad] = size;
        let geom = ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, r, s), stride, pad).unwrap();
        let width = width(kind, &geom);
        let (tiling, cells) = super::cells(kind, &geom, Scale { segments, branches, width }).unwrap();
        (tiling, cells, width)
    }

    /// The shapes of a PreAct ResNet-32 in ten branches: two blocks of 32 columns fit a multiprocessor, all go on from patch to patch, and
    /// weights stay, but for the tangents of the last stage.
    #[test]
    fn blocks_of_the_network_go_on_from_patch_to_patch() {
        let (first, second, third) =
            ([128, 32, 32, 32, 32, 3, 3, 1, 1], [128, 64, 16, 16, 64, 3, 3, 1, 1], [128, 128, 8, 8, 128, 3, 3, 1, 1]);
        let between = [[128, 32, 32, 32, 64, 3, 3, 2, 1], [128, 32, 32, 32, 64, 1, 1, 2, 0]];
        for kind in [ConvKind::Fprop, ConvKind::Dgrad] {
            for size in [first, second, third].into_iter().chain(between) {
                for segments in 1..=if kind == ConvKind::Fprop { 2 } else { 1 } {
                    let (tiling, cells, width) = tiled(kind, size, segments, 10);
                    let what = format!("{kind:?} {size:?} {segments}: {tiling:?} {cells:?}");
                    assert!(tiling.shared <= if width == 32 { OF_TWO } else { 227 << 10 }, "{what}");
                    assert!(cells.run > 1, "{what}");
                    assert_eq!(cells.keeps == 1, size != third || segments == 1, "{what}");
                }
            }
        }
    }

    /// What follows a product touches neither the tables, nor the slot with the next halo, nor the weights.
    #[test]
    fn results_lie_beside_the_next_halo() {
        let sizes =
            [[71, 40, 16, 16, 24, 3, 3, 1, 1], [71, 40, 32, 32, 72, 3, 3, 2, 1], [299, 72, 7, 8, 136, 1, 1, 1, 0]];
        for (size, kind) in sizes.into_iter().flat_map(|size| [(size, ConvKind::Fprop), (size, ConvKind::Dgrad)]) {
            let (tiling, cells, width) = tiled(kind, size, 1, 20);
            let [places, halos, step, matrices] =
                [cells.places, cells.halos, cells.halo_step, cells.matrices].map(|v| v as usize);
            let of_halo = tiling.patches.halo[0] * tiling.patches.halo[1];
            let slot = tiling.patches.images * tiling.patches.halo[0] * PARTS * cells.halo_pitch as usize * GRANULE;
            let rows = tiling.size[0];
            let finish = 4 * rows * (width + 8) + 16 * THREADS + 4 * rows;
            assert!(
                cells.run > 1 && places == ROWS_TABLES && places + of_halo * PLACE <= halos,
                "{kind:?} {size:?} {cells:?}"
            );
            for free in [0, 1] {
                let from = (cells.finish + free * cells.finish_step) as usize;
                let next = halos + (1 - free) as usize * step;
                let beside = from + finish <= next || next + slot <= from;
                assert!(beside && from >= halos && from + finish <= matrices, "{kind:?} {size:?} {cells:?}");
                assert!(next + slot <= matrices && matrices < tiling.shared, "{kind:?} {size:?} {cells:?}");
            }
        }
    }

    /// What `tests/simt_patches.rs` says of its sizes.
    #[test]
    fn tested_runs_are_what_they_are_said_to_be() {
        use ConvKind::{Dgrad, Fprop};
        // Branches; patches of a run and beyond the last full one; whether weights stay.
        let cases: [(_, Size, usize, usize, [i32; 2], bool); 13] = [
            (Fprop, [71, 8, 16, 16, 24, 3, 3, 1, 1], 1, 4, [2, 1], true),
            (Fprop, [71, 40, 14, 16, 24, 1, 3, 1, 1], 1, 4, [2, 1], true),
            (Fprop, [133, 72, 16, 16, 8, 1, 1, 1, 0], 1, 2, [2, 1], true),
            (Fprop, [299, 72, 7, 8, 136, 1, 1, 1, 0], 1, 2, [4, 3], true),
            (Fprop, [271, 8, 16, 16, 8, 1, 1, 1, 0], 2, 1, [2, 1], true),
            (Fprop, [71, 40, 14, 16, 24, 1, 3, 1, 1], 2, 4, [2, 1], true),
            (Dgrad, [71, 16, 32, 32, 40, 3, 3, 2, 1], 1, 2, [3, 2], true),
            (Dgrad, [71, 8, 32, 32, 8, 3, 3, 2, 1], 1, 2, [3, 2], true),
            (Dgrad, [35, 8, 32, 32, 40, 3, 3, 2, 1], 1, 2, [2, 0], true),
            (Dgrad, [36, 72, 32, 32, 40, 2, 2, 2, 0], 1, 2, [5, 4], true),
            (Dgrad, [71, 8, 32, 32, 72, 1, 1, 2, 0], 1, 2, [3, 2], true),
            (Dgrad, [35, 8, 32, 32, 8, 1, 1, 3, 1], 1, 2, [3, 0], true),
            (Dgrad, [36, 72, 32, 32, 40, 1, 1, 2, 0], 1, 2, [5, 4], true),
        ];
        for (kind, size, segments, branches, [run, rest], keeps) in cases {
            let (tiling, cells, width) = tiled(kind, size, segments, branches);
            let patches = (tiling.tiles[0] / (width / 32)) as i32;
            assert_eq!([cells.run, patches % cells.run], [run, rest], "{kind:?} {size:?} {patches}");
            assert_eq!(cells.keeps == 1, keeps, "{kind:?} {size:?}");
        }
    }
}
