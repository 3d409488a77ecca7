//! Convolutions over tiles of images.
//!
//! Shared and per-branch operands, and sums over branches, cost what they must: a tile of a shared image is laid out
//! once for all branches, whose weights then form the rows of one matrix. A convolution that is a plain matrix
//! product (1×1, stride 1) goes to the `gemm` crate.
#![allow(unsafe_code)]

use super::gemm::{Mat, gemm};
use super::lines::{self, Lines};
use super::memory::{Out, View};
use super::microkernel::{Dot, Product, ROWS, SLACK};
use super::patches::{Patches, Tile, TileOffsets};
use super::real::Real;
use super::scratch::with_scratch;
use super::simd;
use crate::ops::{Conv, ConvGeom, ConvKind};
use crate::tape::Meta;
use rayon::prelude::*;

/// Columns of a tile, about.
const TILE: usize = 1024;
/// Most parts into which a weight gradient's sum is divided: fixed, so that the result does not depend on threads.
const CHUNKS: usize = 16;
/// Most bytes of partial weight gradients.
const PARTIAL_BYTES: usize = 64 << 20;

/// Where the sum of a conv's result starts.
#[derive(Clone, Copy)]
pub(super) enum Start<'a, T> {
    /// At zero.
    Zero,
    /// At what the result's memory holds.
    InPlace,
    /// At another tensor of the result's shape.
    From(View<'a, T>),
}

/// Everything about a convolution that its sizes decide, worked out once.
pub(super) struct Layout {
    passes: Vec<Pass>,
}

/// One product of weights and patches: all of a forward convolution, or one residue class of an input gradient. A
/// weight gradient uses the patches, tiles and offsets of the forward one.
struct Pass {
    patches: Patches,
    place: Placement,
    tiles: Vec<Tile>,
    offsets: TileOffsets,
    /// Rows of the weight matrix: row r, patch row d is element `r · row_step + at[d]` of a branch's weights.
    rows: usize,
    row_step: usize,
    at: Vec<usize>,
}

impl Pass {
    fn new(patches: Patches, place: Placement, rows: usize, row_step: usize, at: Vec<usize>) -> Self {
        let tiles = patches.tiles(TILE);
        let offsets = TileOffsets::new(&patches, &tiles, SLACK);
        Pass { patches, place, tiles, offsets, rows, row_step, at }
    }
}

impl Layout {
    pub fn new(conv: &Conv) -> Self {
        let g = &conv.geom;
        let passes = match conv.kind {
            ConvKind::Fprop | ConvKind::Wgrad => {
                let patches = forward_patches(g);
                let place = Placement { origin: (0, 0), stride: 1, height: g.p, width: g.q };
                let at = (0..patches.depth()).collect();
                vec![Pass::new(patches, place, g.k, g.c * g.r * g.s, at)]
            }
            ConvKind::Dgrad => {
                let classes = (0..g.stride.min(g.h)).flat_map(|a| (0..g.stride.min(g.w)).map(move |b| (a, b)));
                classes.map(|class| dgrad_pass(g, class)).collect()
            }
        };
        Layout { passes }
    }
}

/// Input gradient. The input pixels fall into stride² residue classes, each of which sees its own subset of the
/// kernel: per class a dense product of patches of `dy` with the weights of that subset, without wasted zeros.
fn dgrad_pass(g: &ConvGeom, (a, b): (usize, usize)) -> Pass {
    let axis = |origin: usize, size: usize| -> Vec<(usize, isize)> {
        let reach = |r: &usize| (origin + g.pad).abs_diff(*r).is_multiple_of(g.stride);
        let shift = |r: usize| (origin as isize + g.pad as isize - r as isize) / g.stride as isize;
        (0..size).filter(reach).map(|r| (r, shift(r))).collect()
    };
    let (rows, cols) = (axis(a, g.r), axis(b, g.s));
    let taps: Vec<_> = rows.iter().flat_map(|r| cols.iter().map(move |c| (*r, *c))).collect();
    let filter = g.r * g.s;
    let at = (0..g.k).flat_map(|k| taps.iter().map(move |((r, _), (s, _))| k * g.c * filter + r * g.s + s));
    let grid = ((g.h - a).div_ceil(g.stride), (g.w - b).div_ceil(g.stride));
    let shifts = taps.iter().map(|((_, dr), (_, dc))| (*dr, *dc)).collect();
    let patches = Patches::new([g.k, g.n, g.p, g.q], grid, 1, shifts);
    let place = Placement { origin: (a, b), stride: g.stride, height: g.h, width: g.w };
    Pass::new(patches, place, g.c, filter, at.collect())
}

fn forward_patches(g: &ConvGeom) -> Patches {
    let pad = g.pad as isize;
    let taps = (0..g.r as isize).flat_map(|r| (0..g.s as isize).map(move |s| (r - pad, s - pad)));
    Patches::new([g.c, g.n, g.h, g.w], (g.p, g.q), g.stride, taps.collect())
}

/// Elements of launch-wide workspace that `conv` needs.
pub(super) fn workspace<T>(conv: &Conv, weights: &Meta, out: &Meta, branches: usize) -> usize {
    let g = &conv.geom;
    let copies = if weights.per_branch { branches } else { 1 };
    match conv.kind {
        ConvKind::Fprop => copies * g.k.next_multiple_of(ROWS) * g.c * g.r * g.s,
        ConvKind::Dgrad => copies * g.c.next_multiple_of(ROWS) * g.k * g.r * g.s,
        ConvKind::Wgrad => {
            let units = out.total(branches);
            units * chunk_count::<T>(&forward_patches(g), units)
        }
    }
}

/// Bytes of a thread's scratch that a task of `conv` needs; `src` is what patches are taken from.
pub(super) fn scratch<T>(conv: &Conv, layout: &Layout, src: &Meta, out: &Meta, branches: usize) -> usize {
    let stacks = if !src.per_branch && out.per_branch { branches } else { 1 };
    let tiles = layout.passes.iter().filter(|pass| !pass.is_plain()).flat_map(|p| p.tiles.iter().map(move |t| (p, t)));
    let elements = tiles.map(|(pass, tile)| {
        let room = match conv.kind {
            ConvKind::Wgrad => pass.dot_room(tile, stacks * conv.geom.k),
            _ => pass.product_room(tile, stacks * pass.rows),
        };
        room.planes + room.rows
    });
    elements.max().unwrap_or(0) * size_of::<T>()
}

/// Runs one convolution.
#[allow(clippy::too_many_arguments)]
pub(super) fn run<T: Real>(
    conv: &Conv,
    layout: &Layout,
    branches: usize,
    a: View<'_, T>,
    b: View<'_, T>,
    start: Start<'_, T>,
    out: Out<'_, T>,
    work: &mut [T],
) {
    match conv.kind {
        ConvKind::Wgrad => layout.passes.iter().for_each(|p| wgrad(p, &conv.geom, branches, a, b, start, out, work)),
        _ => layout.passes.iter().for_each(|p| product(p, branches, a, b, start, out, work)),
    }
}

/// Where the columns of a product go in the result's images.
struct Placement {
    origin: (usize, usize),
    stride: usize,
    height: usize,
    width: usize,
}

/// A task's share of its thread's scratch, in elements.
struct Room {
    /// Planes of a tile.
    planes: usize,
    /// Behind them, rows of as many elements as the tile has columns.
    rows: usize,
    /// From one of these rows to the next.
    stride: usize,
}

impl Pass {
    /// True when the patch matrix is the images and the result's columns are its pixels: a plain matrix product.
    fn is_plain(&self) -> bool {
        self.patches.is_identity() && self.place.stride == 1
    }

    /// Room for the product of `out_rows` rows of weights with a tile.
    fn product_room(&self, tile: &Tile, out_rows: usize) -> Room {
        let stride = self.patches.columns(tile).next_multiple_of(SLACK);
        let planes = self.patches.planes_len(tile, SLACK) + SLACK;
        Room { planes, rows: out_rows.next_multiple_of(ROWS) * stride, stride }
    }

    /// Room for a tile and `rows` rows of the gradient that its patches are multiplied with.
    fn dot_room(&self, tile: &Tile, rows: usize) -> Room {
        let stride = self.patches.columns(tile).next_multiple_of(16);
        let planes = self.patches.planes_len(tile, SLACK) + SLACK;
        Room { planes, rows: rows * stride, stride }
    }

    /// Packs `count` rows of the weights from branch `branch` on (rows of later branches follow) as the kernel wants.
    fn pack<T: Real>(&self, weights: View<'_, T>, branch: usize, count: usize, packed: &mut [T]) {
        let depth = self.at.len();
        packed.fill(T::zero());
        for r in 0..count {
            let source = &weights.branch(branch + r / self.rows)[r % self.rows * self.row_step..];
            let block = &mut packed[r / ROWS * depth * ROWS..];
            for (d, at) in self.at.iter().enumerate() {
                block[d * ROWS + r % ROWS] = source[*at];
            }
        }
    }
}

/// `out = start + weights · patches(src)`; summed over the branches when `out` is shared and an operand is not.
fn product<T: Real>(
    pass: &Pass,
    branches: usize,
    src: View<'_, T>,
    weights: View<'_, T>,
    start: Start<'_, T>,
    out: Out<'_, T>,
    work: &mut [T],
) {
    let Pass { patches, place, tiles, offsets, .. } = pass;
    let (depth, rows) = (patches.depth(), pass.rows);
    let summed = !out.branched() && (src.branched() || weights.branched());
    // A tile of a shared image serves all branches in one product, whose rows are (branch, row).
    let stacked = !src.branched() && weights.branched() && out.branched();
    let outer = if out.branched() && !stacked { branches } else { 1 };
    let out_rows = if stacked { rows * branches } else { rows };

    if pass.is_plain() {
        let task = PlainProduct { depth, out_rows, pixels: patches.pixels(), summed, stacked, outer, branches };
        return plain_product(&task, pass, src, weights, start, out);
    }

    let blocks = out_rows.div_ceil(ROWS);
    let copies = if weights.branched() && !stacked { branches } else { 1 };
    let packed_len = blocks * depth * ROWS;
    let packed = &mut work[..copies * packed_len];
    if packed_len > 0 {
        let pack = |(m, part): (usize, &mut [T])| pass.pack(weights, m, out_rows, part);
        packed.par_chunks_mut(packed_len).enumerate().for_each(pack);
    }
    let packed = &*packed;
    (0..outer * tiles.len()).into_par_iter().for_each(|task| {
        let (m, tile) = (task / tiles.len(), &tiles[task % tiles.len()]);
        let columns = patches.columns(tile);
        let room = pass.product_room(tile, out_rows);
        let stride = room.stride;
        with_scratch(room.planes + room.rows, |scratch: &mut [T]| {
            let (planes, result) = scratch.split_at_mut(room.planes);
            if depth == 0 {
                // No tap of the kernel reaches these pixels.
                result.fill(T::zero());
            }
            let all_branches = if summed { 0..branches } else { m..m + 1 };
            for (i, branch) in (if depth == 0 { 0..0 } else { all_branches }).enumerate() {
                if i == 0 || src.branched() {
                    simd::wide(
                        #[inline(always)]
                        || patches.fill(src.branch(branch), tile, SLACK, planes),
                    );
                }
                let matrix = if copies == 1 { 0 } else { branch };
                T::product(Product {
                    weights: &packed[matrix * packed_len..(matrix + 1) * packed_len],
                    row_blocks: blocks,
                    offsets: offsets.of(tile),
                    src: planes,
                    columns,
                    dst: result,
                    stride,
                    add: i > 0,
                });
            }
            let base = if stacked { 0 } else { m * out.len };
            simd::wide(
                #[inline(always)]
                || place_tile(patches, place, tile, &result[..out_rows * stride], stride, start, out, base),
            );
        });
    });
}

/// Writes a tile of results, `[rows, stride]`, to the pixels it belongs to.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn place_tile<T: Real>(
    patches: &Patches,
    place: &Placement,
    tile: &Tile,
    result: &[T],
    stride: usize,
    start: Start<'_, T>,
    out: Out<'_, T>,
    base: usize,
) {
    let (lines, width) = (tile.lines.clone(), patches.grid.1);
    let first = (place.origin.0 + lines.start * place.stride) * place.width;
    // From the first to the last line of the tile in an image of the result.
    let span = ((lines.len() - 1) * place.stride + 1) * place.width;
    let step = place.stride * place.width;
    for (row, values) in result.chunks_exact(stride).enumerate() {
        for (n, sample) in tile.images.clone().enumerate() {
            let at = base + (row * patches.samples + sample) * place.height * place.width + first;
            // SAFETY: pixels of this residue class in these lines belong to the calling task alone, and no other task
            // holds a slice of the lines: the classes run one after the other.
            let dst = unsafe { out.part(at, span) };
            let before = match start {
                Start::From(view) => &view.branch(at / out.len)[at % out.len..][..span],
                _ => &[],
            };
            let source = &values[patches.column(tile, n, 0)..];
            let from_stride = patches.line_stride();
            if place.stride == 1 {
                let to = Lines { stride: place.width, count: lines.len() };
                match start {
                    Start::Zero => lines::copy(dst, to, source, from_stride, width),
                    Start::InPlace => lines::add(dst, to, None, source, from_stride, width),
                    Start::From(_) => lines::add(dst, to, Some(before), source, from_stride, width),
                }
                continue;
            }
            for l in 0..lines.len() {
                let source = &source[l * from_stride..][..width];
                let line = l * step + place.origin.1..l * step + place.width;
                let (target, by) = (&mut dst[line.clone()], place.stride);
                match start {
                    Start::Zero => (0..width).for_each(|j| target[j * by] = source[j]),
                    Start::InPlace => (0..width).for_each(|j| target[j * by] += source[j]),
                    Start::From(_) => {
                        let before = &before[line];
                        (0..width).for_each(|j| target[j * by] = before[j * by] + source[j]);
                    }
                }
            }
        }
    }
}

/// A product whose patch matrix is the images themselves.
struct PlainProduct {
    depth: usize,
    out_rows: usize,
    pixels: usize,
    summed: bool,
    stacked: bool,
    outer: usize,
    branches: usize,
}

fn plain_product<T: Real>(
    p: &PlainProduct,
    pass: &Pass,
    src: View<'_, T>,
    weights: View<'_, T>,
    start: Start<'_, T>,
    out: Out<'_, T>,
) {
    let tiles = p.pixels.div_ceil(TILE);
    let (row_step, col_step) = (pass.row_step, pass.at.get(1).copied().unwrap_or(1));
    (0..p.outer * tiles).into_par_iter().for_each(|task| {
        let (m, first) = (task / tiles, task % tiles * TILE);
        let width = TILE.min(p.pixels - first);
        let base = if p.stacked { 0 } else { m * out.len };
        let mut add = match start {
            Start::Zero => false,
            Start::InPlace => true,
            Start::From(from) => {
                for at in (0..p.out_rows).map(|r| base + r * p.pixels + first) {
                    // SAFETY: the tile's columns of this row belong to this task alone.
                    let dst = unsafe { out.part(at, width) };
                    dst.copy_from_slice(&from.branch(at / out.len)[at % out.len..][..width]);
                }
                true
            }
        };
        for branch in if p.summed { 0..p.branches } else { m..m + 1 } {
            // Rows of stacked branches of a transposed matrix are not evenly spaced: one product per branch.
            let parts = if p.stacked { p.branches } else { 1 };
            let rows = p.out_rows / parts;
            for part in 0..parts {
                let data = weights.branch(if p.stacked { part } else { branch });
                let a = Mat { data, row_stride: row_step, col_stride: col_step };
                let b = Mat { data: &src.branch(branch)[first..], row_stride: p.pixels, col_stride: 1 };
                let dst = out.address(base + part * rows * p.pixels + first);
                // SAFETY: the tile's columns of these rows belong to this task alone.
                unsafe { gemm((rows, width, p.depth), dst, p.pixels, add, a, b) };
            }
            add = true;
        }
    });
}

/// Number of partial sums of a weight gradient with `units` elements.
fn chunk_count<T>(patches: &Patches, units: usize) -> usize {
    let tiles = match patches.is_identity() {
        true => patches.pixels().div_ceil(TILE),
        false => patches.tile_count(TILE),
    };
    let fit = PARTIAL_BYTES / (units * size_of::<T>()).max(1);
    tiles.min(CHUNKS).min(fit).max(1)
}

/// Weight gradient: partial sums over chunks of tiles, then their sum in a fixed order.
#[allow(clippy::too_many_arguments)]
fn wgrad<T: Real>(
    pass: &Pass,
    g: &ConvGeom,
    branches: usize,
    x: View<'_, T>,
    dy: View<'_, T>,
    start: Start<'_, T>,
    out: Out<'_, T>,
    work: &mut [T],
) {
    let Pass { patches, tiles, offsets, .. } = pass;
    let depth = patches.depth();
    let units = out.total();
    let chunks = chunk_count::<T>(patches, units);
    let summed = !out.branched() && (x.branched() || dy.branched());
    let stacked = !x.branched() && dy.branched() && out.branched();
    let outer = if out.branched() && !stacked { branches } else { 1 };
    let rows = if stacked { g.k * branches } else { g.k };
    let size = rows * depth;
    let live = |m: usize| if summed { 0..branches } else { m..m + 1 };
    let rows_of = |branch: usize| if stacked { dy.all() } else { dy.branch(branch) };
    let work = &mut work[..chunks * units];

    if pass.is_plain() {
        let pixels = patches.pixels();
        let tiles = pixels.div_ceil(TILE);
        work.par_chunks_mut(size).enumerate().for_each(|(task, partial)| {
            let (chunk, m) = (task / outer, task % outer);
            let first = (chunk * tiles / chunks * TILE).min(pixels);
            let width = ((chunk + 1) * tiles / chunks * TILE).min(pixels) - first;
            for (i, branch) in live(m).enumerate() {
                let a = Mat { data: &rows_of(branch)[first..], row_stride: pixels, col_stride: 1 };
                let b = Mat { data: &x.branch(branch)[first..], row_stride: 1, col_stride: pixels };
                // SAFETY: `partial` is this task's own chunk of the workspace.
                unsafe { gemm((rows, depth, width), partial.as_mut_ptr(), depth, i > 0, a, b) };
            }
        });
    } else {
        work.par_chunks_mut(size).enumerate().for_each(|(task, partial)| {
            let (chunk, m) = (task / outer, task % outer);
            partial.fill(T::zero());
            for tile in &tiles[chunk * tiles.len() / chunks..(chunk + 1) * tiles.len() / chunks] {
                let columns = patches.columns(tile);
                let room = pass.dot_room(tile, rows);
                let stride = room.stride;
                with_scratch(room.planes + room.rows, |scratch: &mut [T]| {
                    let (planes, a) = scratch.split_at_mut(room.planes);
                    for (i, branch) in live(m).enumerate() {
                        if i == 0 || x.branched() {
                            simd::wide(
                                #[inline(always)]
                                || patches.fill(x.branch(branch), tile, SLACK, planes),
                            );
                        }
                        if i == 0 || dy.branched() {
                            simd::wide(
                                #[inline(always)]
                                || patches.fill_columns(rows_of(branch), tile, stride, a),
                            );
                        }
                        let offsets = offsets.of(tile);
                        let dst = &mut *partial;
                        T::dot(Dot { a, a_stride: stride, rows, offsets, src: planes, columns, dst });
                    }
                });
            }
        });
    }

    let partials = &*work;
    let len = out.len;
    // SAFETY: nothing else holds the result.
    let all = unsafe { out.all() };
    all.par_chunks_mut(4096).enumerate().for_each(|(i, part)| {
        let from = i * 4096;
        simd::wide(
            #[inline(always)]
            || {
                match start {
                    Start::InPlace => {}
                    Start::Zero => part.fill(T::zero()),
                    Start::From(view) => {
                        part.iter_mut()
                            .enumerate()
                            .for_each(|(j, v)| *v = view.branch((from + j) / len)[(from + j) % len]);
                    }
                }
                for chunk in partials.chunks_exact(units) {
                    simd::update(part, [&chunk[from..from + part.len()]], |o, [p]| o + p);
                }
            },
        );
    });
}
