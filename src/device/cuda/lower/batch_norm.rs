//! Batch norm: `kernels/batch_norm.cu`, `kernels/batch_norm_backward.cu`, `kernels/batch_norm_double.cu`.

use super::super::driver::Address;
use super::{Lowering, Operand, stored};
use crate::error::{Error, Result};
use crate::ops::BN_EPS;
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

/// `BN_THREADS`: threads of a block.
const THREADS: usize = 256;
/// Neighbouring channels of a thread.
const QUAD: usize = 4;
/// Most neighbouring channels of a block: 128 bytes of a row of halves.
const WIDEST: usize = 64;
/// Branches times channels whose factors a block keeps at a time: 40 KiB.
const SLOTS: usize = 1024;
/// Blocks that a launch aims at: two or three of these fit each multiprocessor of a large card at a time, and that many take turns
/// that the last turn does not leave it idle for long. It is the same number on every card, so that the order of additions is too.
const BLOCKS: usize = 1024;
/// Rows that a thread of a reduce kernel takes at least, if there are as many.
const REDUCE_ROWS: usize = 16;
/// Rows that a thread of an apply kernel takes at least, if there are as many: those in flight at a time.
const APPLY_ROWS: usize = 4;
/// Most rows of a chunk; kernels count them in 32 bits.
const LONGEST: usize = 1 << 20;

/// `BnActivation` or `BnVector`.
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

/// `BnMask`: where backward operations find what the ReLU let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mask {
    /// There is no ReLU.
    Plain,
    /// In the forward result, their last operand.
    Result,
    /// It is computed again from x; the bias is an operand.
    Recomputed,
}

impl Mask {
    /// Of the operations whose last operand is the forward result if there is a ReLU.
    pub fn of(relu: bool) -> Self {
        if relu { Mask::Result } else { Mask::Plain }
    }
}

/// `BnShape`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Shape {
    rows: i64,
    total_branch: i64,
    reduce_rows: i32,
    apply_rows: i32,
    channels: i32,
    width: i32,
    branches: i32,
    group: i32,
    epsilon: f32,
    mask: i32,
}
const _: () = assert!(size_of::<Shape>() == 48);

/// What a reduce kernel writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Sums {
    partials: Address,
    totals: Address,
    counters: Address,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct BnForwardParams {
    x: Tensor,
    g: Tensor,
    b: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    sums: Sums,
    shape: Shape,
}
const _: () = assert!(size_of::<BnForwardParams>() == 168);

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
    b: Tensor,
    mean: Tensor,
    var: Tensor,
    y: Tensor,
    start: Tensor,
    dx: Tensor,
    dg: Tensor,
    db: Tensor,
    sums: Sums,
    shape: Shape,
}
const _: () = assert!(size_of::<BnBackwardParams>() == 248);

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct BnDoubleParams {
    x_dot: Tensor,
    g_dot: Tensor,
    b_dot: Tensor,
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    b: Tensor,
    mean: Tensor,
    var: Tensor,
    y: Tensor,
    y_dot: Tensor,
    x_bar: Tensor,
    g_bar: Tensor,
    sums: Sums,
    shape: Shape,
}
const _: () = assert!(size_of::<BnDoubleParams>() == 280);

/// Bytes of `Moments`, and of what its apply kernel keeps per branch and channel; and so on.
const FORWARD: Sizes = Sizes { sums: 16, factors: 0 };
const BACKWARD: Sizes = Sizes { sums: 8, factors: 24 };
const DOUBLE: Sizes = Sizes { sums: 24, factors: 40 };

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
    /// For activations of the shape of `x`: sums of `reduced` branches, results of `live` branches, which each block of
    /// the apply kernel goes through if a result is `summed` over them.
    fn new(x: &Operand, reduced: usize, live: usize, summed: bool, mask: Mask) -> Self {
        let [n, channels, h, w] = x.meta.dims;
        let rows = n * h * w;
        let (branches, apart) = if summed { (live, 1) } else { (1, live) };
        // The narrower the tile, the more branches a block can keep.
        let widest = (SLOTS / branches / QUAD * QUAD).clamp(QUAD, WIDEST);
        let width = channels.div_ceil(channels.div_ceil(widest)).next_multiple_of(QUAD);
        let tiles = channels.div_ceil(width);
        let lines = THREADS / (width / QUAD);
        let blocks = (BLOCKS / (reduced * tiles)).max(1);
        let (reduce_rows, reduce_chunks) = chunks(rows, lines, blocks, REDUCE_ROWS);
        let (apply_rows, apply_chunks) = chunks(rows, lines, (BLOCKS / (apart * tiles)).max(1), APPLY_ROWS);
        let shape = Shape {
            rows: rows as i64,
            total_branch: if reduced > 1 { channels as i64 } else { 0 },
            reduce_rows: reduce_rows as i32,
            apply_rows: apply_rows as i32,
            channels: channels as i32,
            width: width as i32,
            branches: branches as i32,
            group: branches.min(SLOTS / width) as i32,
            epsilon: BN_EPS as f32,
            mask: mask as i32,
        };
        let (reduce, apply) = ([reduce_chunks, tiles, reduced], [apply_chunks, tiles, apart]);
        Division { shape, reduce, apply }
    }

    /// Memory for sums over rows.
    fn sums(&self, l: &mut Lowering<'_>, sizes: Sizes) -> Sums {
        let [chunks, tiles, reduced] = self.reduce;
        let channels = reduced * self.shape.channels as usize;
        Sums {
            partials: if chunks > 1 { l.scratch(chunks * channels * sizes.sums) } else { Address::NULL },
            totals: l.scratch(channels * sizes.sums),
            counters: if chunks > 1 { l.counters(reduced * tiles) } else { Address::NULL },
        }
    }

    /// Appends the launch that makes the sums.
    fn reduce<P: Pod>(&self, l: &mut Lowering<'_>, kernel: &'static str, params: &P, sizes: Sizes) {
        l.push(kernel, params, self.reduce, THREADS, QUAD * THREADS * sizes.sums);
    }

    /// Appends the launch that works element by element.
    fn apply<P: Pod>(&self, l: &mut Lowering<'_>, kernel: &'static str, params: &P, sizes: Sizes) {
        let kept = (self.shape.group * self.shape.width) as usize;
        l.push(kernel, params, self.apply, THREADS, kept * sizes.factors);
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
    let [y, mean, var] = [0, 1, 2].map(|i| l.output(args, i));
    let storage = l.one_storage(&[x, y])?;
    let live = l.live_branches(args);
    let division = Division::new(&x, branches_of(&[x], live), live, false, Mask::of(relu));
    let (sums, shape) = (division.sums(l, FORWARD), division.shape);
    let [x, g, b, y, mean, var] = [x, g, b, y, mean, var].map(Tensor::from);
    let params = BnForwardParams { x, g, b, y, mean, var, sums, shape };
    division.reduce(l, stored!(storage, "bn_forward_reduce"), &params, FORWARD);
    division.apply(l, stored!(storage, "bn_forward_apply"), &params, FORWARD);
    Ok(())
}

/// `(x) → (mean, var)`.
pub(super) fn stats(l: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let x = l.input(args, 0);
    let storage = l.any_storage(&[x]);
    let live = l.live_branches(args);
    let division = Division::new(&x, live, live, false, Mask::Plain);
    let (sums, shape) = (Sums { totals: Address::NULL, ..division.sums(l, FORWARD) }, division.shape);
    let [mean, var] = [0, 1].map(|i| l.output(args, i).into());
    let params = BnForwardParams { x: x.into(), g: NONE, b: NONE, y: NONE, mean, var, sums, shape };
    division.reduce(l, stored!(storage, "bn_forward_reduce"), &params, FORWARD);
    Ok(())
}

/// `(x, g, b, mean, var) → y`.
pub(super) fn eval(l: &mut Lowering<'_>, relu: bool, args: &Args) -> Result<()> {
    let (source, result) = (l.input(args, 0), l.output(args, 0));
    let storage = l.one_storage(&[source, result])?;
    let [x, g, b, mean, var] = [0, 1, 2, 3, 4].map(|i| l.input(args, i).into());
    let division = Division::new(&source, 1, l.live_branches(args), false, Mask::of(relu));
    let params = BnEvalParams { x, g, b, mean, var, y: result.into(), shape: division.shape };
    division.apply(l, stored!(storage, "bn_eval"), &params, FORWARD);
    Ok(())
}

/// `(dy, x, g[, b], mean, var[, y][, start]) → (dx, dg, db)`, with b if the mask is recomputed, with y if it is in the result.
pub(super) fn backward(l: &mut Lowering<'_>, mask: Mask, args: &Args) -> Result<()> {
    let inputs: Vec<Operand> = (0..args.inputs.len()).map(|i| l.input(args, i)).collect();
    let outputs = [0, 1, 2].map(|i| l.output(args, i));
    let at = |i: usize| inputs[i];
    let (dy, x, g) = (at(0), at(1), at(2));
    let (b, mean, var, y, start) = match mask {
        Mask::Plain => (None, at(3), at(4), None, None),
        Mask::Result => (None, at(3), at(4), Some(at(5)), None),
        Mask::Recomputed => (Some(at(3)), at(4), at(5), None, inputs.get(6).copied()),
    };
    let storage = l.one_storage(&[dy, x, y.unwrap_or(x), start.unwrap_or(x), outputs[0]])?;
    let live = l.live_branches(args);
    let mut summands = vec![dy, x, mean];
    summands.extend(y);
    summands.extend(b.iter().flat_map(|b| [*b, g, var]));
    let division = Division::new(&x, branches_of(&summands, live), live, any_summed(outputs, live), mask);
    let (sums, shape) = (division.sums(l, BACKWARD), division.shape);
    let [dx, dg, db] = outputs.map(Tensor::from);
    let optional = |operand: Option<Operand>| operand.map_or(NONE, Tensor::from);
    let (b, y, start) = (optional(b), optional(y), optional(start));
    let [dy, x, g, mean, var] = [dy, x, g, mean, var].map(Tensor::from);
    let params = BnBackwardParams { dy, x, g, b, mean, var, y, start, dx, dg, db, sums, shape };
    division.reduce(l, stored!(storage, "bn_backward_reduce"), &params, BACKWARD);
    division.apply(l, stored!(storage, "bn_backward_apply"), &params, BACKWARD);
    Ok(())
}

/// `(ẋ, ġ, ḃ, dy, x, g[, b], mean, var[, y]) → (ẏ, x̄, ḡ)`, with b and y as in [`backward`].
pub(super) fn double_backward(l: &mut Lowering<'_>, mask: Mask, args: &Args) -> Result<()> {
    let at = |i: usize| l.input(args, i);
    let [x_dot, g_dot, b_dot, dy, x, g] = [0, 1, 2, 3, 4, 5].map(at);
    let outputs = [0, 1, 2].map(|i| l.output(args, i));
    let (b, mean, var, y) = match mask {
        Mask::Plain => (None, at(6), at(7), None),
        Mask::Result => (None, at(6), at(7), Some(at(8))),
        Mask::Recomputed => (Some(at(6)), at(7), at(8), None),
    };
    let [result_dot, result_bar, _] = outputs;
    let storage = l.one_storage(&[x_dot, dy, x, y.unwrap_or(x), result_dot, result_bar])?;
    let live = l.live_branches(args);
    let mut summands = vec![x_dot, dy, x, mean];
    summands.extend(y);
    summands.extend(b.iter().flat_map(|b| [*b, g, var]));
    let division = Division::new(&x, branches_of(&summands, live), live, any_summed(outputs, live), mask);
    let (sums, shape) = (division.sums(l, DOUBLE), division.shape);
    let [y_dot, x_bar, g_bar] = outputs.map(Tensor::from);
    let (b, y) = (b.map_or(NONE, Tensor::from), y.map_or(NONE, Tensor::from));
    let [x_dot, g_dot, b_dot, dy, x, g, mean, var] = [x_dot, g_dot, b_dot, dy, x, g, mean, var].map(Tensor::from);
    let params = BnDoubleParams { x_dot, g_dot, b_dot, dy, x, g, b, mean, var, y, y_dot, x_bar, g_bar, sums, shape };
    division.reduce(l, stored!(storage, "bn_double_backward_reduce"), &params, DOUBLE);
    division.apply(l, stored!(storage, "bn_double_backward_apply"), &params, DOUBLE);
    Ok(())
}

/// `(dy, x, g, b, mean, var, dg, db[, start]) → dx`.
pub(super) fn backward_apply(l: &mut Lowering<'_>, _: &Args) -> Result<()> {
    Err(Error::shape("bn_relu_backward_apply", format!("is not lowered yet ({})", l.label)))
}

/// `(ẋ, ġ, dy, x, g, b, mean, var, dg, db, ⟨ẋ⟩, ρ, cov[, start]) → (x̄, ḡ)`.
pub(super) fn double_backward_apply(l: &mut Lowering<'_>, _: &Args) -> Result<()> {
    Err(Error::shape("bn_relu_double_backward_apply", format!("is not lowered yet ({})", l.label)))
}
