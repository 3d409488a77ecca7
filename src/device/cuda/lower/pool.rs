//! Global average pooling, and max-pooling as a choice of positions. Kernels: `kernels/pool.cu`, `kernels/rows.cu`.

use super::{Lowering, Operand, folded, rows, stored};
use crate::device::cuda::driver::Address;
use crate::error::Result;
use crate::ops::Window;
use crate::plan::Args;
use crate::tape::Meta;
use bytemuck::{Pod, Zeroable};

/// Most threads of a block.
const THREADS: usize = 256;

/// A pooling window: image, pooled image, channels of both, window.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PoolWindow {
    h: i32,
    w: i32,
    p: i32,
    q: i32,
    c: i32,
    size: i32,
    stride: i32,
    pad: i32,
}
const _: () = assert!(size_of::<PoolWindow>() == 32);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MaxPoolIndexParams {
    x: Address,
    index: Address,
    images: i64,
    window: PoolWindow,
}
const _: () = assert!(size_of::<MaxPoolIndexParams>() == 56);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PoolMoveParams {
    x: Address,
    index: Address,
    y: Address,
    x_branch: i64,
    index_branch: i64,
    images: i64,
    samples: i32,
    summed: i32,
    half_x: i32,
    half_y: i32,
    window: PoolWindow,
}
const _: () = assert!(size_of::<PoolMoveParams>() == 96);

/// The window for a kernel, which counts the elements of an image and the edges of windows in 32 bits.
fn window(lowering: &Lowering<'_>, window: &Window) -> Result<PoolWindow> {
    let ([_, c, h, w], [_, _, p, q]) = (window.image.dims, window.pooled.dims);
    let int = |v: usize| lowering.narrow("elements in one image", v);
    // The last block counts up to its threads further.
    int(c * (h + 2 * window.pad) * (w + 2 * window.pad) + THREADS)?;
    let stride = int(window.stride)?;
    Ok(PoolWindow {
        h: int(h)?,
        w: int(w)?,
        p: int(p)?,
        q: int(q)?,
        c: int(c)?,
        size: int(window.size)?,
        stride,
        pad: int(window.pad)?,
    })
}

/// Blocks and threads that work through the images of `meta`.
fn division(meta: &Meta, images: usize) -> ([usize; 3], usize) {
    let [_, c, h, w] = meta.dims;
    let threads = (c * h * w).next_multiple_of(32).min(THREADS);
    ([(c * h * w).div_ceil(threads), folded(images), 1], threads)
}

/// Mean of every image.
pub(super) fn average(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (x, y) = (lowering.input(args, 0), lowering.output(args, 0));
    let shape = images(lowering, args, &x.meta, &y);
    rows::sum(lowering, x, y.at, shape, 1.0 / shape.rows as f32)
}

/// `1/(H·W)` of each value to every pixel of its image.
pub(super) fn average_backward(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (x, y) = (lowering.input(args, 0), lowering.output(args, 0));
    let shape = images(lowering, args, &y.meta, &y);
    rows::broadcast(lowering, x.at, y, shape, 1.0 / shape.rows as f32)
}

/// Images `of` as groups of rows, one per sample of the result `y`.
fn images(lowering: &Lowering<'_>, args: &Args, of: &Meta, y: &Operand) -> rows::Shape {
    let [n, channels, h, w] = of.dims;
    let groups = y.branches(lowering.branches()) * n;
    rows::Shape { summed: lowering.summed(args, y), groups, rows: h * w, channels }
}

/// Position of each window's maximum.
pub(super) fn max_index(lowering: &mut Lowering<'_>, op: &Window, args: &Args) -> Result<()> {
    let (x, index) = (lowering.input(args, 0), lowering.output(args, 0));
    let images = op.image.dims[0] * index.branches(lowering.branches());
    let window = window(lowering, op)?;
    let (grid, threads) = division(&op.pooled, images);
    let params = MaxPoolIndexParams { x: x.at, index: index.at, images: images as i64, window };
    lowering.push(stored!(lowering.any_storage(&[x]), "max_pool_index"), &params, grid, threads, 0);
    Ok(())
}

/// Picks the values at positions.
pub(super) fn gather(lowering: &mut Lowering<'_>, op: &Window, args: &Args) -> Result<()> {
    let storage = lowering.any_storage(&[lowering.input(args, 0), lowering.output(args, 0)]);
    along_positions(lowering, stored!(storage, "pool_gather"), op, &op.pooled, args)
}

/// Adds values at positions.
pub(super) fn scatter(lowering: &mut Lowering<'_>, op: &Window, args: &Args) -> Result<()> {
    let storage = lowering.any_storage(&[lowering.input(args, 0), lowering.output(args, 0)]);
    along_positions(lowering, stored!(storage, "pool_scatter"), op, &op.image, args)
}

/// A kernel that moves values along positions into images of shape `to`.
fn along_positions(
    lowering: &mut Lowering<'_>,
    kernel: &'static str,
    op: &Window,
    to: &Meta,
    args: &Args,
) -> Result<()> {
    let (x, index, y) = (lowering.input(args, 0), lowering.input(args, 1), lowering.output(args, 0));
    let samples = op.image.dims[0];
    let images = samples * y.branches(lowering.branches());
    let params = PoolMoveParams {
        x: x.at,
        index: index.at,
        y: y.at,
        x_branch: x.branch,
        index_branch: index.branch,
        images: lowering.narrow("images", images)?.into(),
        samples: lowering.narrow("samples", samples)?,
        summed: lowering.narrow("branches", lowering.summed(args, &y))?,
        half_x: x.half.into(),
        half_y: y.half.into(),
        window: window(lowering, op)?,
    };
    let (grid, threads) = division(to, images);
    lowering.push(kernel, &params, grid, threads, 0);
    Ok(())
}
