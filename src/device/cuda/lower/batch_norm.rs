//! Batch norm: `kernels/batch_norm.cu`.

use super::super::driver::Address;
use super::{Lowering, Operand};
use crate::error::Result;
use crate::ops::BN_EPS;
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

/// `BN_THREADS`: threads of a block.
const THREADS: usize = 256;
/// `BN_GROUP`: branches whose factors a block keeps at a time.
const GROUP: usize = 16;
/// Most neighbouring channels of a block: 128 bytes of a row, what a warp reads at a time.
const WIDEST: usize = 32;
/// Blocks that a launch aims at: about four of these on each multiprocessor of a large card. It is the same number on
/// every card, so that the order of additions is too.
const BLOCKS: usize = 512;
/// Most chunks of a reduce kernel: each block of the apply kernel reads all their sums.
const MOST_CHUNKS: usize = 128;
/// Rows that a thread of a reduce kernel takes at least, if there are as many.
const REDUCE_ROWS: usize = 16;
/// Rows that a thread of an apply kernel takes at least, if there are as many: those in flight at a time, `BN_ROWS`.
const APPLY_ROWS: usize = 4;
/// Most rows of a chunk; kernels count them in 32 bits.
const LONGEST: usize = 1 << 20;

/// `BnSource` or `BnTarget`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Tensor {
    at: Address,
    branch: i64,
}

impl From<Operand> for Tensor {
    fn from(operand: Operand) -> Self {
        Tensor { at: operand.at, branch: operand.branch }
    }
}

/// No operand.
const NONE: Tensor = Tensor { at: Address::NULL, branch: 0 };

/// `BnShape`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Shape {
    rows: i64,
    sums_branch: i64,
    reduce_rows: i32,
    apply_rows: i32,
    chunks: i32,
    channels: i32,
    width: i32,
    branches: i32,
    epsilon: f32,
    padding: i32,
}
const _: () = assert!(size_of::<Shape>() == 48);

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct BnForwardParams {
    x: Tensor,
    g: Tensor,
    b: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    partials: Address,
    shape: Shape,
}
const _: () = assert!(size_of::<BnForwardParams>() == 152);

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct BnEvalParams {
    x: Tensor,
    g: Tensor,
    b: Tensor,
    mean: Tensor,
    var: Tensor,
    y: Tensor,
    shape: Shape,
}
const _: () = assert!(size_of::<BnEvalParams>() == 144);

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct BnBackwardParams {
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    mean: Tensor,
    var: Tensor,
    y: Tensor,
    dx: Tensor,
    dg: Tensor,
    db: Tensor,
    partials: Address,
    shape: Shape,
}
const _: () = assert!(size_of::<BnBackwardParams>() == 200);

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct BnDoubleParams {
    x_dot: Tensor,
    g_dot: Tensor,
    b_dot: Tensor,
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    mean: Tensor,
    var: Tensor,
    y: Tensor,
    y_dot: Tensor,
    x_bar: Tensor,
    g_bar: Tensor,
    partials: Address,
    shape: Shape,
}
const _: () = assert!(size_of::<BnDoubleParams>() == 248);

/// Bytes of `BnForwardSums` and `BnForwardFactors`, and so on.
const FORWARD: Sizes = Sizes { sums: 16, factors: 16 };
const BACKWARD: Sizes = Sizes { sums: 8, factors: 20 };
const DOUBLE: Sizes = Sizes { sums: 24, factors: 44 };

/// Bytes per channel.
#[derive(Clone, Copy)]
struct Sizes {
    /// Of a chunk's sums.
    sums: usize,
    /// Of what an apply kernel keeps per branch.
    factors: usize,
}

/// How an operation is divided into blocks.
struct Division {
    shape: Shape,
    reduce: [usize; 3],
    apply: [usize; 3],
}

/// Rows of a chunk and number of chunks: about `blocks`, but no less than `least` rows for each thread.
fn chunks(rows: usize, lines: usize, blocks: usize, least: usize) -> (usize, usize) {
    let count = blocks.min(rows.div_ceil(lines * least)).max(rows.div_ceil(LONGEST - THREADS));
    let length = rows.div_ceil(count).next_multiple_of(lines);
    (length, rows.div_ceil(length))
}

impl Division {
    /// For activations of the shape of `x`: partial sums of `reduced` branches, results of `live` branches, which each
    /// block of the apply kernel goes through if a result is `summed` over them.
    fn new(x: &Operand, reduced: usize, live: usize, summed: bool) -> Self {
        let [n, channels, h, w] = x.meta.dims;
        let rows = n * h * w;
        let tiles = channels.div_ceil(WIDEST);
        let width = channels.div_ceil(tiles);
        let lines = THREADS / width;
        let (branches, apart) = if summed { (live, 1) } else { (1, live) };
        let blocks = (BLOCKS / (reduced * tiles)).clamp(1, MOST_CHUNKS);
        let (reduce_rows, reduce_chunks) = chunks(rows, lines, blocks, REDUCE_ROWS);
        let (apply_rows, apply_chunks) = chunks(rows, lines, (BLOCKS / (apart * tiles)).max(1), APPLY_ROWS);
        let shape = Shape {
            rows: rows as i64,
            sums_branch: if reduced > 1 { (reduce_chunks * channels) as i64 } else { 0 },
            reduce_rows: reduce_rows as i32,
            apply_rows: apply_rows as i32,
            chunks: reduce_chunks as i32,
            channels: channels as i32,
            width: width as i32,
            branches: branches as i32,
            epsilon: BN_EPS as f32,
            padding: 0,
        };
        let (reduce, apply) = ([reduce_chunks, tiles, reduced], [apply_chunks, tiles, apart]);
        Division { shape, reduce, apply }
    }

    /// Memory for the partial sums.
    fn partials(&self, l: &mut Lowering<'_>, sizes: Sizes) -> Address {
        let [chunks, _, reduced] = self.reduce;
        l.scratch(reduced * chunks * self.shape.channels as usize * sizes.sums)
    }

    /// Appends the two launches of an operation.
    fn push<P: Pod>(&self, l: &mut Lowering<'_>, kernels: [&'static str; 2], params: &P, sizes: Sizes) {
        let kept = GROUP.min(self.shape.branches as usize) * self.shape.width as usize;
        let sums = THREADS * sizes.sums;
        l.push(kernels[0], params, self.reduce, THREADS, sums);
        l.push(kernels[1], params, self.apply, THREADS, sums + kept * sizes.factors);
    }
}

/// `live` if any of the operands is per-branch, else 1.
fn branches_of(operands: &[Operand], live: usize) -> usize {
    if operands.iter().any(|o| o.branch != 0) { live } else { 1 }
}

/// Whether a result is a sum over the branches.
fn any_summed(results: [Operand; 3], live: usize) -> bool {
    live > 1 && results.iter().any(|o| o.branch == 0)
}

/// `(x, g, b) → (y, mean, var)`.
pub(super) fn forward(l: &mut Lowering<'_>, relu: bool, args: &Args) -> Result<()> {
    let [x, g, b] = [0, 1, 2].map(|i| l.input(args, i));
    let [y, mean, var] = [0, 1, 2].map(|i| l.output(args, i).into());
    let live = l.live_branches(args);
    let division = Division::new(&x, branches_of(&[x], live), live, false);
    let partials = division.partials(l, FORWARD);
    let shape = division.shape;
    let params = BnForwardParams { x: x.into(), g: g.into(), b: b.into(), y, mean, var, partials, shape };
    let apply = if relu { "bn_relu_forward_apply_f32" } else { "bn_forward_apply_f32" };
    division.push(l, ["bn_forward_reduce_f32", apply], &params, FORWARD);
    Ok(())
}

/// `(x, g, b, mean, var) → y`.
pub(super) fn eval(l: &mut Lowering<'_>, relu: bool, args: &Args) -> Result<()> {
    let source = l.input(args, 0);
    let [x, g, b, mean, var] = [0, 1, 2, 3, 4].map(|i| l.input(args, i).into());
    let y = l.output(args, 0).into();
    let Division { shape, apply, .. } = Division::new(&source, 1, l.live_branches(args), false);
    let kernel = if relu { "bn_relu_eval_f32" } else { "bn_eval_f32" };
    l.push(kernel, &BnEvalParams { x, g, b, mean, var, y, shape }, apply, THREADS, 0);
    Ok(())
}

/// `(dy, x, g, mean, var[, y]) → (dx, dg, db)`.
pub(super) fn backward(l: &mut Lowering<'_>, relu: bool, args: &Args) -> Result<()> {
    let inputs = [0, 1, 2, 3, 4].map(|i| l.input(args, i));
    let result = l.optional_input(args, 5);
    let outputs = [0, 1, 2].map(|i| l.output(args, i));
    let live = l.live_branches(args);
    let [source_dy, source_x, _, source_mean, _] = inputs;
    let reduced = branches_of(&[source_dy, source_x, source_mean, result.unwrap_or(source_x)], live);
    let division = Division::new(&source_x, reduced, live, any_summed(outputs, live));
    let partials = division.partials(l, BACKWARD);
    let [dy, x, g, mean, var] = inputs.map(Tensor::from);
    let [dx, dg, db] = outputs.map(Tensor::from);
    let (y, shape) = (result.map_or(NONE, Tensor::from), division.shape);
    let params = BnBackwardParams { dy, x, g, mean, var, y, dx, dg, db, partials, shape };
    let kernels = match relu {
        false => ["bn_backward_reduce_f32", "bn_backward_apply_f32"],
        true => ["bn_relu_backward_reduce_f32", "bn_relu_backward_apply_f32"],
    };
    division.push(l, kernels, &params, BACKWARD);
    Ok(())
}

/// `(ẋ, ġ, ḃ, dy, x, g, mean, var[, y]) → (ẏ, x̄, ḡ)`.
pub(super) fn double_backward(l: &mut Lowering<'_>, relu: bool, args: &Args) -> Result<()> {
    let inputs = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| l.input(args, i));
    let result = l.optional_input(args, 8);
    let outputs = [0, 1, 2].map(|i| l.output(args, i));
    let live = l.live_branches(args);
    let [source_dot, _, _, source_dy, source_x, _, source_mean, _] = inputs;
    let summands = [source_dot, source_dy, source_x, source_mean, result.unwrap_or(source_x)];
    let division = Division::new(&source_x, branches_of(&summands, live), live, any_summed(outputs, live));
    let partials = division.partials(l, DOUBLE);
    let [x_dot, g_dot, b_dot, dy, x, g, mean, var] = inputs.map(Tensor::from);
    let [y_dot, x_bar, g_bar] = outputs.map(Tensor::from);
    let (y, shape) = (result.map_or(NONE, Tensor::from), division.shape);
    let params = BnDoubleParams { x_dot, g_dot, b_dot, dy, x, g, mean, var, y, y_dot, x_bar, g_bar, partials, shape };
    let kernels = match relu {
        false => ["bn_double_backward_reduce_f32", "bn_double_backward_apply_f32"],
        true => ["bn_relu_double_backward_reduce_f32", "bn_relu_double_backward_apply_f32"],
    };
    division.push(l, kernels, &params, DOUBLE);
    Ok(())
}
