//! How the products of convolutions are divided into tiles: those whose operands are gathered one element at a time, and those
//! that work on patches of pixels (`kernels/include/conv_patch.cuh`).

use crate::ops::{ConvGeom, ConvKind};

/// Lines of a gathered tile, both of rows and of columns.
const TILE: usize = 64;
/// Inner indices of a gathered tile.
const DEPTH: usize = 32;
/// `PATCH`: pixels of a patch.
pub(super) const PATCH: usize = 128;
/// Blocks that keep any present card busy.
pub(super) const ABREAST: usize = 264;
/// `SLICE`: channels of a halo.
pub(super) const SLICE: usize = 32;
/// `MOST_TAPS`: taps of a tile of a weight gradient.
pub(super) const MOST_TAPS: usize = 9;
/// `MOST_PATCH_TAPS`: taps of fprop and dgrad on patches.
const MOST_PATCH_TAPS: usize = 128;
/// Bytes of `DirectTables`.
const TABLES: usize = 3072;
/// Bytes of a pixel of a halo, of a pixel of dy in a weight gradient, and of a column's weights of a tap.
pub(super) const PIXEL: usize = 64;
/// `STAGES`: places for the weights of taps.
const STAGES: usize = 3;
/// Most bytes of shared memory of a direct kernel: what every card has.
pub(super) const MOST_SHARED: usize = 99 << 10;
/// The direct kernels add up small numbers without a thought of overflow.
pub(super) const MOST_PADDING: usize = 1 << 10;

/// The patches of a direct kernel.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Patches {
    /// Neighbouring images of a patch.
    pub images: usize,
    /// Pixels of each of them, down and across.
    pub size: [usize; 2],
    /// Patches of an image, down and across.
    pub count: [usize; 2],
    /// Pixels of the halo of each image, down and across.
    pub halo: [usize; 2],
}

/// How a product is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    /// Of the direct kernels.
    pub patches: Patches,
    /// Tiles along the rows, the columns and the inner dimension of one segment.
    pub tiles: [usize; 3],
    /// Rows and columns of a tile.
    pub size: [usize; 2],
    /// Tiles along the rows that a block works on, one after the other.
    pub run: usize,
    /// Iterations that a split has at least: below that, adding up the splits costs more than they gain.
    pub least: usize,
    /// Iterations of a split of a weight gradient that runs beside the gradient of the input: so few that both are about the same
    /// part of dy, so many that the partial sums are small beside what is read.
    pub joint: usize,
    /// Bytes of shared memory.
    pub shared: usize,
    /// Blocks that a card runs at a time. A product with fewer is split along its inner dimension.
    pub abreast: usize,
}

/// Bytes of `ConvFinish` of a tile, with as many threads as a patch has pixels.
pub(super) fn finish(rows: usize, columns: usize) -> usize {
    4 * rows * (columns + 8) + 16 * PATCH + 4 * rows
}

impl Tiling {
    /// That of the kernels that gather; `shape`: rows, columns and inner dimension of the product.
    pub fn gathered(shape: [usize; 3], shared: usize) -> Self {
        let [rows, columns, inner] = shape;
        let tiles = [rows.div_ceil(TILE), columns.div_ceil(TILE), inner.div_ceil(DEPTH)];
        Tiling {
            patches: Patches::default(),
            tiles,
            size: [TILE; 2],
            run: 1,
            least: 8,
            joint: 128,
            shared,
            abreast: ABREAST,
        }
    }

    /// That of the direct kernels, if they can take the sizes.
    ///
    /// `segments`: those of the sum that the result is.
    pub fn direct(kind: ConvKind, g: &ConvGeom, segments: usize) -> Option<Self> {
        if !g.c.is_multiple_of(8) || !g.k.is_multiple_of(8) || g.pad.max(g.r).max(g.s).max(g.stride) > MOST_PADDING {
            return None;
        }
        if kind != ConvKind::Wgrad && g.r * g.s > MOST_PATCH_TAPS {
            return None;
        }
        let width = Self::width(kind, g);
        // The kernels' rule for where pieces of pixels lie has eight pixels at a time.
        let halo_bytes = |pixels: usize| PIXEL * pixels.next_multiple_of(8);
        let (patches, shared) = Patches::choose(kind, g, |patches| {
            let halo = halo_bytes(patches.halo_pixels());
            match kind {
                ConvKind::Wgrad => (TABLES + 2 * (halo + PIXEL * PATCH)).max(finish(SLICE, MOST_TAPS * SLICE)),
                _ => {
                    let channels = if kind == ConvKind::Fprop { g.c } else { g.k };
                    let slots = if channels.div_ceil(SLICE) * segments > 1 { 2 } else { 1 };
                    (TABLES + STAGES * PIXEL * width + slots * halo).max(finish(PATCH, width))
                }
            }
        })?;
        let number = patches.number(kind, g);
        let (taps, slices) = ((g.r * g.s).div_ceil(MOST_TAPS), |channels: usize| channels.div_ceil(SLICE));
        Some(match kind {
            ConvKind::Fprop | ConvKind::Dgrad => {
                let (inner, columns) = if kind == ConvKind::Fprop { (g.c, g.k) } else { (g.k, g.c) };
                let tiles = [number, columns.div_ceil(width), slices(inner)];
                Tiling {
                    patches,
                    tiles,
                    size: [PATCH, width],
                    run: 1,
                    least: 1,
                    joint: usize::MAX,
                    shared,
                    abreast: ABREAST,
                }
            }
            ConvKind::Wgrad => {
                let tiles = [slices(g.k), slices(g.c) * taps, number];
                Tiling {
                    patches,
                    tiles,
                    size: [SLICE, MOST_TAPS * SLICE],
                    run: 1,
                    least: 4,
                    joint: 32,
                    shared,
                    abreast: ABREAST,
                }
            }
        })
    }

    /// Columns of a tile of a direct kernel of fprop or dgrad.
    pub fn width(kind: ConvKind, g: &ConvGeom) -> usize {
        let columns = if kind == ConvKind::Fprop { g.k } else { g.c };
        if columns > 32 { 64 } else { 32 }
    }
}

impl Patches {
    /// The grid of pixels, taps, and pixels of the halo from a pixel to the next; none where there are no pixels.
    pub fn reach(kind: ConvKind, g: &ConvGeom) -> Option<([usize; 2], [usize; 2], usize)> {
        let single = g.r == 1 && g.s == 1;
        let (grid, taps, step) = match kind {
            ConvKind::Dgrad => ([g.h, g.w].map(|v| v.div_ceil(g.stride)), [g.r, g.s].map(|v| v.div_ceil(g.stride)), 1),
            _ => ([g.p, g.q], [g.r, g.s], if single { 1 } else { g.stride }),
        };
        (g.n > 0 && !grid.contains(&0)).then_some((grid, taps, step))
    }

    /// Pixels of a halo.
    pub fn halo_pixels(&self) -> usize {
        self.images * self.halo[0] * self.halo[1]
    }

    /// The patches with the least to compute and to load, and the bytes of shared memory that `shared` gives for them.
    pub fn choose(kind: ConvKind, g: &ConvGeom, shared: impl Fn(&Patches) -> usize) -> Option<(Self, usize)> {
        let (grid, taps, step) = Self::reach(kind, g)?;
        let with_width = |width: usize| {
            let most = (PATCH / width).min(grid[0]);
            let size = [grid[0].div_ceil(grid[0].div_ceil(most)), width];
            let count = [grid[0].div_ceil(size[0]), grid[1].div_ceil(width)];
            let images = if count == [1, 1] { (PATCH / (size[0] * width)).min(g.n) } else { 1 };
            let halo = [0, 1].map(|i| (size[i] - 1) * step + taps[i]);
            Patches { images, size, count, halo }
        };
        // Of equals the widest: it reads the longest runs of memory.
        let all = (1..=grid[1].min(PATCH)).rev().map(with_width).filter_map(|patches| {
            let halo = patches.halo_pixels();
            let bytes = shared(&patches);
            let tiles = g.n.div_ceil(patches.images) * patches.count[0] * patches.count[1];
            (bytes <= MOST_SHARED).then_some((tiles * (2 * PATCH + halo), patches, bytes))
        });
        all.min_by_key(|(cost, ..)| *cost).map(|(_, patches, bytes)| (patches, bytes))
    }

    /// Patches in all.
    pub fn number(&self, kind: ConvKind, g: &ConvGeom) -> usize {
        let phases = if kind == ConvKind::Dgrad { g.stride * g.stride } else { 1 };
        phases * g.n.div_ceil(self.images) * self.count[0] * self.count[1]
    }
}
