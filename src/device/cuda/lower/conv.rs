//! Convolutions: `kernels/conv.cu`.

use super::{Lowering, Operand, Operands};
use crate::device::cuda::driver::Address;
use crate::error::{Error, Result};
use crate::ops::{Conv, ConvKind, Operation};
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

/// Lines of a tile, both of rows and of columns.
const TILE: usize = 64;
/// Inner indices of a tile.
const DEPTH: usize = 32;
/// Threads of a block that computes a tile of the result.
const THREADS: usize = 128;
/// Bytes of shared memory of such a block: the tables of positions and two pairs of tiles (`Shared` in the kernels).
const SHARED_32: usize = 39_168;
/// The same with operands of 16 bits.
const SHARED_16: usize = 22_784;
/// Blocks that keep any present card busy. A product with fewer tiles is split along its inner dimension.
const BLOCKS: usize = 264;
/// Iterations that a split has at least: below that, adding up the splits costs more than they gain.
const SPLIT_ITERATIONS: usize = 8;
/// Most bytes of partial results.
const PARTIAL_BYTES: usize = 64 << 20;
/// Threads of a block of the kernels that stream through memory.
const STREAM_THREADS: usize = 256;
/// Most blocks of the kernel that finds the largest magnitude; each ends in atomic operations on one word.
const AMAX_BLOCKS: usize = 1024;
/// The kernels add up paddings, image sizes and kernel sizes in 32 bits.
const MOST_PADDED_SIDE: usize = 1 << 29;
/// The kernels number the stride² remainders of a pixel in 32 bits.
const MOST_STRIDE: usize = 1 << 15;

/// Twin of `ConvParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvParams {
    image: Address,
    matrix: Address,
    start: Address,
    out: Address,
    amax: Address,
    image_branch: i64,
    matrix_branch: i64,
    start_branch: i64,
    out_branch: i64,
    out_split: i64,
    rows: i32,
    columns: i32,
    inner: i32,
    image_height: i32,
    image_width: i32,
    image_channels: i32,
    grid_height: i32,
    grid_width: i32,
    kernel_width: i32,
    stride: i32,
    pad: i32,
    filter: i32,
    row_tiles: i32,
    column_tiles: i32,
    inner_tiles: i32,
    iterations: i32,
    splits: i32,
    unused: i32,
}
const _: () = assert!(size_of::<ConvParams>() == 152);

/// Twin of `ConvSumParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvSumParams {
    partial: Address,
    start: Address,
    out: Address,
    start_branch: i64,
    len: i64,
    branches: i32,
    splits: i32,
}
const _: () = assert!(size_of::<ConvSumParams>() == 48);

/// Twin of `AmaxParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AmaxParams {
    image: Address,
    matrix: Address,
    amax: Address,
    image_len: i64,
    matrix_len: i64,
}
const _: () = assert!(size_of::<AmaxParams>() == 40);

/// A form as the kernels see it: a matrix product of gathered operands.
struct Product {
    /// `[height, width, channels]` of the operand that is gathered by pixel and tap.
    image: [usize; 3],
    /// `[height, width]` of the pixels of each sample.
    grid: [usize; 2],
    rows: usize,
    columns: usize,
    inner: usize,
}

impl Product {
    fn new(conv: &Conv) -> Self {
        let g = &conv.geom;
        let (x, y) = ([g.h, g.w, g.c], [g.p, g.q, g.k]);
        match conv.kind {
            ConvKind::Fprop => {
                Product { image: x, grid: [g.p, g.q], rows: g.n * g.p * g.q, columns: g.k, inner: g.r * g.s * g.c }
            }
            ConvKind::Dgrad => {
                Product { image: y, grid: [g.h, g.w], rows: g.n * g.h * g.w, columns: g.c, inner: g.r * g.s * g.k }
            }
            ConvKind::Wgrad => {
                Product { image: x, grid: [g.p, g.q], rows: g.k, columns: g.r * g.s * g.c, inner: g.n * g.p * g.q }
            }
        }
    }
}

fn kernel(kind: ConvKind, operands: Operands) -> &'static str {
    match (kind, operands) {
        (ConvKind::Fprop, Operands::F32) => "conv2d_fprop_f32",
        (ConvKind::Fprop, Operands::Tf32) => "conv2d_fprop_tf32",
        (ConvKind::Fprop, Operands::F16) => "conv2d_fprop_f16",
        (ConvKind::Fprop, Operands::Bf16) => "conv2d_fprop_bf16",
        (ConvKind::Dgrad, Operands::F32) => "conv2d_dgrad_f32",
        (ConvKind::Dgrad, Operands::Tf32) => "conv2d_dgrad_tf32",
        (ConvKind::Dgrad, Operands::F16) => "conv2d_dgrad_f16",
        (ConvKind::Dgrad, Operands::Bf16) => "conv2d_dgrad_bf16",
        (ConvKind::Wgrad, Operands::F32) => "conv2d_wgrad_f32",
        (ConvKind::Wgrad, Operands::Tf32) => "conv2d_wgrad_tf32",
        (ConvKind::Wgrad, Operands::F16) => "conv2d_wgrad_f16",
        (ConvKind::Wgrad, Operands::Bf16) => "conv2d_wgrad_bf16",
    }
}

/// Parts into which the inner dimension of `tiles` tiles of the result is divided; shapes alone decide it.
fn splits(tiles: usize, iterations: usize, result_bytes: usize) -> usize {
    let wanted = BLOCKS.div_ceil(tiles);
    let worth = iterations / SPLIT_ITERATIONS;
    let fit = PARTIAL_BYTES / result_bytes;
    wanted.min(worth).min(fit).max(1)
}

pub(super) fn conv(lowering: &mut Lowering<'_>, conv: &Conv, args: &Args) -> Result<()> {
    // In all forms the first operand is the image: x or dy; the second is the matrix: w, or dy of a weight gradient.
    let (image, matrix, out) = (lowering.input(args, 0), lowering.input(args, 1), lowering.output(args, 0));
    let start = lowering.optional_input(args, 2);
    let narrow = |v: usize| lowering.narrow("elements of a branch", v);

    let g = &conv.geom;
    if g.h.max(g.w) + 2 * g.pad > MOST_PADDED_SIDE || g.stride > MOST_STRIDE {
        let what = format!("padding {} or stride {} is too large for its kernel", g.pad, g.stride);
        return Err(Error::shape(conv.name(), format!("{what} ({})", lowering.label)));
    }
    [image, matrix, out].iter().try_for_each(|o| narrow(o.len()).map(drop))?;
    if out.len() == 0 {
        return Ok(());
    }

    let live = lowering.live_branches(args);
    let (out_branches, summed) = if out.branch == 0 { (1, live) } else { (live, 1) };
    let product = Product::new(conv);
    let (row_tiles, column_tiles) = (product.rows.div_ceil(TILE), product.columns.div_ceil(TILE));
    let inner_tiles = product.inner.div_ceil(DEPTH);
    let iterations = inner_tiles * summed;
    let tiles = row_tiles * column_tiles * out_branches;
    let splits = splits(tiles, iterations, 4 * out.len() * out_branches);
    let mut params = ConvParams {
        image: image.at,
        matrix: matrix.at,
        start: start.map_or(Address::NULL, |s| s.at),
        out: out.at,
        amax: Address::NULL,
        image_branch: image.branch,
        matrix_branch: matrix.branch,
        start_branch: start.map_or(0, |s| s.branch),
        out_branch: out.branch,
        out_split: 0,
        rows: narrow(product.rows)?,
        columns: narrow(product.columns)?,
        inner: narrow(product.inner)?,
        image_height: narrow(product.image[0])?,
        image_width: narrow(product.image[1])?,
        image_channels: narrow(product.image[2])?,
        grid_height: narrow(product.grid[0])?,
        grid_width: narrow(product.grid[1])?,
        kernel_width: narrow(g.s)?,
        stride: narrow(g.stride)?,
        pad: narrow(g.pad)?,
        filter: narrow(g.r * g.s * g.c)?,
        row_tiles: narrow(row_tiles)?,
        column_tiles: narrow(column_tiles)?,
        inner_tiles: narrow(inner_tiles)?,
        iterations: narrow(iterations)?,
        splits: narrow(splits)?,
        unused: 0,
    };
    let sum_branches = narrow(out_branches)?;

    if lowering.operands == Operands::F16 {
        params.amax = amax(lowering, &image, &matrix);
    }
    if splits > 1 {
        let len = out.len() as i64;
        params.start = Address::NULL;
        params.out = lowering.scratch(4 * splits * out_branches * out.len());
        params.out_branch = len;
        params.out_split = len * out_branches as i64;
    }
    let shared = match lowering.operands {
        Operands::F32 | Operands::Tf32 => SHARED_32,
        Operands::F16 | Operands::Bf16 => SHARED_16,
    };
    lowering.push(kernel(conv.kind, lowering.operands), &params, [tiles * splits, 1, 1], THREADS, shared);
    if splits > 1 {
        let sum = ConvSumParams {
            partial: params.out,
            start: start.map_or(Address::NULL, |s| s.at),
            out: out.at,
            start_branch: params.start_branch,
            len: out.len() as i64,
            branches: sum_branches,
            splits: params.splits,
        };
        let grid = [out.len().div_ceil(STREAM_THREADS), out_branches.min(65_535), 1];
        lowering.push("conv2d_sum_f32", &sum, grid, STREAM_THREADS, 0);
    }
    Ok(())
}

/// Launches that find the largest magnitude of both operands, over all their branches; where they put them.
fn amax(lowering: &mut Lowering<'_>, image: &Operand, matrix: &Operand) -> Address {
    let branches = lowering.branches();
    let (image_len, matrix_len) = (image.meta.total(branches), matrix.meta.total(branches));
    let params = AmaxParams {
        image: image.at,
        matrix: matrix.at,
        amax: lowering.scratch(8),
        image_len: image_len as i64,
        matrix_len: matrix_len as i64,
    };
    let blocks = image_len.max(matrix_len).div_ceil(STREAM_THREADS).clamp(1, AMAX_BLOCKS);
    lowering.push("amax_clear_f32", &params, [1, 1, 1], 32, 0);
    lowering.push("amax_f32", &params, [blocks, 2, 1], STREAM_THREADS, 0);
    params.amax
}
