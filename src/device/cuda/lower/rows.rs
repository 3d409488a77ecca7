//! Sums over rows of channels, and their transpose: what channel sums, biases and global average pooling have in
//! common. Kernels: `kernels/rows.cu`.

use super::{Lowering, Operand, folded, stored};
use crate::device::cuda::driver::Address;
use crate::error::Result;
use bytemuck::{Pod, Zeroable};

/// Most threads of a block, and most channels of a tile.
const THREADS: usize = 256;
/// Most rows that a thread adds up in f32, in four sums.
const ROWS_PER_THREAD: usize = 64;
/// Channels of a block that adds up slices.
const FINISH_CHANNELS: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowSumParams {
    x: Address,
    y: Address,
    partial: Address,
    groups: i64,
    rows: i64,
    slice: i64,
    slices: i32,
    summed: i32,
    channels: i32,
    width: i32,
    factor: f32,
    padding: i32,
}
const _: () = assert!(size_of::<RowSumParams>() == 72);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowSumFinishParams {
    partial: Address,
    y: Address,
    groups: i64,
    slices: i64,
    channels: i32,
    factor: f32,
}
const _: () = assert!(size_of::<RowSumFinishParams>() == 40);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowBroadcastParams {
    x: Address,
    y: Address,
    groups: i64,
    rows: i64,
    slice: i64,
    slices: i32,
    summed: i32,
    channels: i32,
    width: i32,
    factor: f32,
    padding: i32,
}
const _: () = assert!(size_of::<RowBroadcastParams>() == 64);

/// A tensor seen as `[summed, groups, rows, channels]`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Outermost extent, added up.
    pub summed: usize,
    /// Extent of the result.
    pub groups: usize,
    /// Extent that is added up, or filled.
    pub rows: usize,
    /// Innermost extent.
    pub channels: usize,
}

/// How a shape is divided over blocks; it depends on the shape alone.
struct Division {
    /// Channels of a tile.
    width: usize,
    /// Rows of a slice.
    slice: usize,
    slices: usize,
    grid: [usize; 3],
    threads: usize,
}

impl Shape {
    fn divide(&self) -> Division {
        let width = self.channels.clamp(1, THREADS);
        let step = (THREADS / width).min(self.rows.max(1));
        let slice = (step * ROWS_PER_THREAD).min(self.rows.max(1));
        let slices = self.rows.div_ceil(slice);
        let grid = [self.channels.div_ceil(width) * slices, folded(self.groups), 1];
        Division { width, slice, slices, grid, threads: (step * width).next_multiple_of(32) }
    }
}

/// `y [groups, channels] = factor · Σ x` over the outermost extent and the rows.
pub(super) fn sum(lowering: &mut Lowering<'_>, x: Operand, y: Address, shape: Shape, factor: f32) -> Result<()> {
    let Division { width, slice, slices, grid, threads } = shape.divide();
    let partial = match slices {
        1 => Address::NULL,
        _ => lowering.scratch(8 * shape.groups * slices * shape.channels),
    };
    let params = RowSumParams {
        x: x.at,
        y: if slices == 1 { y } else { Address::NULL },
        partial,
        groups: shape.groups as i64,
        rows: shape.rows as i64,
        slice: slice as i64,
        slices: lowering.narrow("slices", slices)?,
        summed: lowering.narrow("branches", shape.summed)?,
        channels: lowering.narrow("channels", shape.channels)?,
        width: lowering.narrow("channels", width)?,
        factor,
        padding: 0,
    };
    let kernel = stored!(lowering.any_storage(&[x]), "row_sum");
    lowering.push(kernel, &params, grid, threads, 8 * threads);
    if slices > 1 {
        finish(lowering, partial, y, Shape { rows: slices, ..shape }, factor)?;
    }
    Ok(())
}

/// `y [groups, channels] = factor · Σ partial` over the rows of `partial`, which is in double precision.
pub(super) fn finish(
    lowering: &mut Lowering<'_>,
    partial: Address,
    y: Address,
    shape: Shape,
    factor: f32,
) -> Result<()> {
    let params = RowSumFinishParams {
        partial,
        y,
        groups: shape.groups as i64,
        slices: shape.rows as i64,
        channels: lowering.narrow("channels", shape.channels)?,
        factor,
    };
    let grid = [shape.channels.div_ceil(FINISH_CHANNELS), folded(shape.groups), 1];
    lowering.push("row_sum_finish_f32", &params, grid, THREADS, 8 * THREADS);
    Ok(())
}

/// Every row of `y [groups, rows, channels]` is `factor · Σ x` over the outermost extent of `x [summed, groups, channels]`.
pub(super) fn broadcast(lowering: &mut Lowering<'_>, x: Address, y: Operand, shape: Shape, factor: f32) -> Result<()> {
    let Division { width, slice, slices, grid, threads } = shape.divide();
    let params = RowBroadcastParams {
        x,
        y: y.at,
        groups: shape.groups as i64,
        rows: shape.rows as i64,
        slice: slice as i64,
        slices: lowering.narrow("slices", slices)?,
        summed: lowering.narrow("branches", shape.summed)?,
        channels: lowering.narrow("channels", shape.channels)?,
        width: lowering.narrow("channels", width)?,
        factor,
        padding: 0,
    };
    let kernel = stored!(lowering.any_storage(&[y]), "row_broadcast");
    lowering.push(kernel, &params, grid, threads, 0);
    Ok(())
}
