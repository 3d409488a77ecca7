//! Convolutions as matrix products over tiles of gathered patches.
//!
//! Shared and per-branch operands, and sums over branches, cost what they must: patches of a shared image are
//! gathered once for all branches, whose weights then form the rows of one matrix.
#![allow(unsafe_code)]

use super::gemm::{Mat, gemm};
use super::im2col::Gather;
use super::memory::{Out, View};
use super::real::Real;
use super::simd;
use crate::ops::{Conv, ConvGeom, ConvKind};
use crate::tape::Meta;
use rayon::prelude::*;
use std::cell::RefCell;

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

/// Elements of launch-wide workspace that `conv` needs.
pub(super) fn workspace<T>(conv: &Conv, inputs: &[Meta], out: &Meta, branches: usize) -> usize {
    match conv.kind {
        ConvKind::Fprop => 0,
        ConvKind::Dgrad => inputs[1].total(branches),
        ConvKind::Wgrad => {
            let units = out.total(branches);
            units * chunk_count::<T>(&conv.geom, units)
        }
    }
}

/// Runs one convolution.
pub(super) fn run<T: Real>(
    conv: &Conv,
    branches: usize,
    a: View<'_, T>,
    b: View<'_, T>,
    start: Start<'_, T>,
    out: Out<'_, T>,
    work: &mut [T],
) {
    match conv.kind {
        ConvKind::Fprop => {
            let gather = forward_gather(&conv.geom);
            let place = Placement { origin: (0, 0), stride: 1, height: conv.geom.p, width: conv.geom.q };
            product(&gather, &place, branches, a, b, conv.geom.k, start, out);
        }
        ConvKind::Dgrad => dgrad(&conv.geom, branches, a, b, start, out, work),
        ConvKind::Wgrad => wgrad(&conv.geom, branches, a, b, start, out, work),
    }
}

fn forward_gather(g: &ConvGeom) -> Gather {
    let pad = g.pad as isize;
    let taps = (0..g.r as isize).flat_map(|r| (0..g.s as isize).map(move |s| (r - pad, s - pad)));
    Gather {
        channels: g.c,
        samples: g.n,
        height: g.h,
        width: g.w,
        grid: (g.p, g.q),
        step: g.stride,
        taps: taps.collect(),
    }
}

/// Where the columns of a product go in the result's images.
struct Placement {
    origin: (usize, usize),
    stride: usize,
    height: usize,
    width: usize,
}

thread_local! {
    /// Patches of a tile and, behind them, a tile of results; grows to what the largest tile needs and stays.
    static SCRATCH: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

fn with_scratch<T: Real, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    SCRATCH.with_borrow_mut(|words| {
        let need = (len * size_of::<T>()).div_ceil(8);
        if words.len() < need {
            words.resize(need, 0);
        }
        f(&mut bytemuck::cast_slice_mut(words)[..len])
    })
}

/// Lines of a tile for a grid of `width` columns.
fn tile_lines(width: usize) -> usize {
    (TILE / width).max(1)
}

/// `out = start + matrix · patches(src)`, where `matrix` has `rows` rows per branch; summed over the branches when
/// `out` is shared and an operand is not.
#[allow(clippy::too_many_arguments)]
fn product<T: Real>(
    gather: &Gather,
    place: &Placement,
    branches: usize,
    src: View<'_, T>,
    matrix: View<'_, T>,
    rows: usize,
    start: Start<'_, T>,
    out: Out<'_, T>,
) {
    let depth = gather.depth();
    let (lines, per_tile) = (gather.lines(), tile_lines(gather.grid.1));
    let tiles = lines.div_ceil(per_tile);
    let summed = !out.branched() && (src.branched() || matrix.branched());
    // Patches of a shared image serve all branches in one product, whose rows are (branch, row).
    let stacked = !src.branched() && out.branched();
    let outer = if out.branched() && !stacked { branches } else { 1 };
    let out_rows = if stacked { rows * branches } else { rows };
    let channel = gather.samples * place.height * place.width;
    let direct = place.stride == 1 && (place.height, place.width) == gather.grid;

    (0..outer * tiles).into_par_iter().for_each(|task| {
        let (m, tile) = (task / tiles, task % tiles);
        let range = tile * per_tile..((tile + 1) * per_tile).min(lines);
        let width = range.len() * gather.grid.1;
        let first = range.start * gather.grid.1;
        let temp_len = if direct { 0 } else { out_rows * width };
        let cols_len = if gather.is_identity() { 0 } else { depth * width };
        with_scratch(cols_len + temp_len, |scratch: &mut [T]| {
            let (cols, temp) = scratch.split_at_mut(cols_len);
            let base = if stacked { 0 } else { m * out.len };
            if depth == 0 {
                // No tap of the kernel reaches these pixels.
                temp.fill(T::zero());
            }
            let (dst, dst_stride, mut add) = if direct {
                (out.address(base + first), channel, begin_tile(start, out, base, out_rows, channel, first, width))
            } else {
                (temp.as_mut_ptr(), width, false)
            };
            let all_branches = if summed { 0..branches } else { m..m + 1 };
            for branch in if depth == 0 { 0..0 } else { all_branches } {
                let b = if gather.is_identity() {
                    Mat { data: &src.branch(branch)[first..], row_stride: gather.pixels(), col_stride: 1 }
                } else {
                    if branch == m || src.branched() {
                        gather.fill(src.branch(branch), range.clone(), cols);
                    }
                    Mat { data: cols, row_stride: width, col_stride: 1 }
                };
                let data = if stacked { matrix.all() } else { matrix.branch(branch) };
                // A shared matrix repeats for every branch only when nothing is per-branch, which `stacked` excludes.
                let a = Mat { data, row_stride: depth, col_stride: 1 };
                // SAFETY: the tile's columns of these rows belong to this task alone; `temp` is this thread's.
                unsafe { gemm((out_rows, width, depth), dst, dst_stride, add, a, b) };
                add = true;
            }
            if !direct {
                scatter(gather, place, &range, temp, start, out, base);
            }
        });
    });
}

/// Puts the start values into a tile; returns whether the product is to be added to them.
fn begin_tile<T: Real>(
    start: Start<'_, T>,
    out: Out<'_, T>,
    base: usize,
    rows: usize,
    channel: usize,
    first: usize,
    width: usize,
) -> bool {
    match start {
        Start::Zero => false,
        Start::InPlace => true,
        Start::From(from) => {
            for r in 0..rows {
                let at = base + r * channel + first;
                // SAFETY: the tile's columns of this row belong to the calling task alone.
                let dst = unsafe { out.part(at, width) };
                let source = from.branch(at / out.len);
                dst.copy_from_slice(&source[at % out.len..][..width]);
            }
            true
        }
    }
}

/// Writes a tile of results to every `stride`-th pixel of the images.
fn scatter<T: Real>(
    gather: &Gather,
    place: &Placement,
    lines: &std::ops::Range<usize>,
    tile: &[T],
    start: Start<'_, T>,
    out: Out<'_, T>,
    base: usize,
) {
    let width = gather.grid.1;
    for (row, values) in tile.chunks_exact(lines.len() * width).enumerate() {
        for (line, values) in lines.clone().zip(values.chunks_exact(width)) {
            let (sample, i) = (line / gather.grid.0, line % gather.grid.0);
            let r = (row * gather.samples + sample) * place.height + place.origin.0 + i * place.stride;
            let at = base + r * place.width;
            // SAFETY: pixels of this residue class in this line belong to the calling task alone, and no other
            // task holds a slice of it: the classes run one after the other.
            let dst = unsafe { out.part(at, place.width) };
            let pixels = dst.iter_mut().skip(place.origin.1).step_by(place.stride).zip(values);
            match start {
                Start::Zero => pixels.for_each(|(o, v)| *o = *v),
                Start::InPlace => pixels.for_each(|(o, v)| *o += *v),
                Start::From(from) => {
                    let source = &from.branch(at / out.len)[at % out.len..][..place.width];
                    let source = source.iter().skip(place.origin.1).step_by(place.stride);
                    pixels.zip(source).for_each(|((o, v), s)| *o = *s + *v);
                }
            }
        }
    }
}

/// Input gradient. The input pixels fall into stride² residue classes, each of which sees its own subset of the
/// kernel: per class a dense product of patches of `dy` with the weights of that subset, without wasted zeros.
fn dgrad<T: Real>(
    g: &ConvGeom,
    branches: usize,
    dy: View<'_, T>,
    w: View<'_, T>,
    start: Start<'_, T>,
    out: Out<'_, T>,
    work: &mut [T],
) {
    let weights = w.all().len();
    let mut packed = &mut work[..weights];
    for a in 0..g.stride.min(g.h) {
        for b in 0..g.stride.min(g.w) {
            let axis = |origin: usize, size: usize| -> Vec<(usize, isize)> {
                let reach = |r: &usize| (origin + g.pad).abs_diff(*r).is_multiple_of(g.stride);
                let shift = |r: usize| (origin as isize + g.pad as isize - r as isize) / g.stride as isize;
                (0..size).filter(reach).map(|r| (r, shift(r))).collect()
            };
            let (rows, cols) = (axis(a, g.r), axis(b, g.s));
            let taps: Vec<_> = rows.iter().flat_map(|r| cols.iter().map(move |c| (*r, *c))).collect();
            let copies = weights / w.len;
            let (matrix, rest) = packed.split_at_mut(copies * g.c * g.k * taps.len());
            packed = rest;
            let filters = g.c * g.r * g.s;
            for (i, v) in matrix.iter_mut().enumerate() {
                let (mc, kt) = (i / (g.k * taps.len()), i % (g.k * taps.len()));
                let ((m, c), (k, t)) = ((mc / g.c, mc % g.c), (kt / taps.len(), kt % taps.len()));
                let ((r, _), (s, _)) = taps[t];
                *v = w.branch(m)[k * filters + (c * g.r + r) * g.s + s];
            }
            let gather = Gather {
                channels: g.k,
                samples: g.n,
                height: g.p,
                width: g.q,
                grid: ((g.h - a).div_ceil(g.stride), (g.w - b).div_ceil(g.stride)),
                step: 1,
                taps: taps.iter().map(|((_, dr), (_, dc))| (*dr, *dc)).collect(),
            };
            let place = Placement { origin: (a, b), stride: g.stride, height: g.h, width: g.w };
            let matrix = View::new(matrix, g.c * g.k * taps.len());
            product(&gather, &place, branches, dy, matrix, g.c, start, out);
        }
    }
}

/// Number of partial sums of a weight gradient with `units` elements.
fn chunk_count<T>(g: &ConvGeom, units: usize) -> usize {
    let tiles = (g.n * g.p).div_ceil(tile_lines(g.q));
    let fit = PARTIAL_BYTES / (units * size_of::<T>()).max(1);
    tiles.min(CHUNKS).min(fit).max(1)
}

/// Weight gradient: partial sums over chunks of tiles, then their sum in a fixed order.
fn wgrad<T: Real>(
    g: &ConvGeom,
    branches: usize,
    x: View<'_, T>,
    dy: View<'_, T>,
    start: Start<'_, T>,
    out: Out<'_, T>,
    work: &mut [T],
) {
    let gather = forward_gather(g);
    let depth = gather.depth();
    let (lines, per_tile) = (gather.lines(), tile_lines(g.q));
    let tiles = lines.div_ceil(per_tile);
    let units = out.total();
    let chunks = chunk_count::<T>(g, units);
    let summed = !out.branched() && (x.branched() || dy.branched());
    let stacked = !x.branched() && out.branched();
    let outer = if out.branched() && !stacked { branches } else { 1 };
    let rows = if stacked { g.k * branches } else { g.k };
    let pixels = g.n * g.p * g.q;
    let size = rows * depth;

    work[..chunks * units].par_chunks_mut(size).enumerate().for_each(|(task, partial)| {
        let (chunk, m) = (task / outer, task % outer);
        let mut add = false;
        for tile in chunk * tiles / chunks..(chunk + 1) * tiles / chunks {
            let range = tile * per_tile..((tile + 1) * per_tile).min(lines);
            let width = range.len() * g.q;
            let first = range.start * g.q;
            let cols_len = if gather.is_identity() { 0 } else { depth * width };
            with_scratch(cols_len, |cols: &mut [T]| {
                for branch in if summed { 0..branches } else { m..m + 1 } {
                    let patches = if gather.is_identity() {
                        Mat { data: &x.branch(branch)[first..], row_stride: 1, col_stride: pixels }
                    } else {
                        if branch == m || x.branched() {
                            gather.fill(x.branch(branch), range.clone(), cols);
                        }
                        Mat { data: cols, row_stride: 1, col_stride: width }
                    };
                    let data = if stacked { dy.all() } else { dy.branch(branch) };
                    let a = Mat { data: &data[first..], row_stride: pixels, col_stride: 1 };
                    // SAFETY: `partial` is this task's own chunk of the workspace.
                    unsafe { gemm((rows, depth, width), partial.as_mut_ptr(), depth, add, a, patches) };
                    add = true;
                }
            });
        }
    });

    let partials = &work[..chunks * units];
    // SAFETY: nothing else holds the result.
    let all = unsafe { out.all() };
    let len = out.len;
    all.par_chunks_mut(4096).enumerate().for_each(|(i, part)| {
        let from = i * 4096;
        simd::wide(|| {
            match start {
                Start::InPlace => {}
                Start::Zero => part.fill(T::zero()),
                Start::From(view) => {
                    part.iter_mut().enumerate().for_each(|(j, v)| *v = view.branch((from + j) / len)[(from + j) % len]);
                }
            }
            for chunk in partials.chunks_exact(units) {
                simd::update(part, [&chunk[from..from + part.len()]], |o, [p]| o + p);
            }
        });
    });
}
