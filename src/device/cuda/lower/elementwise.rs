//! Elementwise operations: ReLU and its mask, linear combinations, filling. Kernels: `kernels/elementwise.cu`.

use super::{Lowering, Storage, folded, rows, stored};
use crate::device::cuda::driver::Address;
use crate::error::Result;
use crate::ops::{Fill, LinComb};
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

/// Threads of a block.
const THREADS: usize = 256;

/// Elements of a block: 32 bytes of a thread.
fn chunk(storage: Storage) -> usize {
    THREADS * if storage == Storage::F32 { 8 } else { 16 }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ReluParams {
    x: Address,
    y: Address,
    len: i64,
}
const _: () = assert!(size_of::<ReluParams>() == 24);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MaskParams {
    x: Address,
    reference: Address,
    y: Address,
    len: i64,
    x_branch: i64,
    reference_branch: i64,
    branches: i32,
    summed: i32,
}
const _: () = assert!(size_of::<MaskParams>() == 56);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FillParams {
    value: Address,
    y: Address,
    len: i64,
}
const _: () = assert!(size_of::<FillParams>() == 24);

/// One operand of a linear combination.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinCombTerm {
    x: Address,
    branch: i64,
    summed: i32,
    half: i32,
}
const _: () = assert!(size_of::<LinCombTerm>() == 24);

/// One of the tensors that a launch computes.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinCombSet {
    y: Address,
    len: i64,
    chunks: i32,
    half: i32,
}
const _: () = assert!(size_of::<LinCombSet>() == 24);

/// What one block does.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinCombPiece {
    set: i32,
    chunk: i32,
}
const _: () = assert!(size_of::<LinCombPiece>() == 8);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinCombParams {
    sets: Address,
    terms: Address,
    pieces: Address,
    coefs: Address,
    guard: Address,
    count: i64,
}
const _: () = assert!(size_of::<LinCombParams>() == 48);

/// `Σ_i c_i x_i` for several sets of operands with the same coefficients, in one launch.
pub(super) fn lin_comb(lowering: &mut Lowering<'_>, op: &LinComb, sets: &[Args]) -> Result<()> {
    let (mut table, mut terms, mut pieces) = (Vec::new(), Vec::new(), Vec::new());
    let mut blocks = 0;
    let touched = |args: &Args| {
        let operands = (0..args.inputs.len()).map(|i| lowering.input(args, i));
        operands.chain([lowering.output(args, 0)]).collect::<Vec<_>>()
    };
    let storage = lowering.any_storage(&sets.iter().flat_map(touched).collect::<Vec<_>>());
    for (s, args) in sets.iter().enumerate() {
        let (y, live) = (lowering.output(args, 0), lowering.live_branches(args));
        let operands: Vec<_> = (0..op.coefs.len()).map(|i| lowering.input(args, i)).collect();
        let (mut branches, mut len) = (y.branches(lowering.branches()), y.len());
        if operands.iter().all(|x| x.branch == y.branch) {
            // Branches lie one after the other everywhere: the set is one long tensor.
            (branches, len) = (1, branches * len);
        }
        let live = lowering.narrow("branches", live)?;
        terms.extend(operands.iter().map(|x| LinCombTerm {
            x: x.at,
            branch: x.branch,
            summed: if x.meta.per_branch && !y.meta.per_branch { live } else { 1 },
            half: x.half.into(),
        }));
        let chunks = len.div_ceil(chunk(storage));
        blocks += branches * chunks;
        let set = lowering.narrow("tensors in one launch", s)?;
        let count = lowering.narrow("blocks", branches * chunks)?;
        let chunks = lowering.narrow("blocks", chunks)?;
        table.push(LinCombSet { y: y.at, len: len as i64, chunks, half: y.half.into() });
        if sets.len() > 1 {
            pieces.extend((0..count).map(|chunk| LinCombPiece { set, chunk }));
        }
    }
    // All sets of a launch have the same guard.
    let guard = lowering.optional_input(&sets[0], op.coefs.len()).map_or(Address::NULL, |guard| guard.at);
    let params = LinCombParams {
        sets: lowering.table(&table),
        terms: lowering.table(&terms),
        pieces: if pieces.is_empty() { Address::NULL } else { lowering.table(&pieces) },
        coefs: lowering.coefs(&op.coefs),
        guard,
        count: op.coefs.len() as i64,
    };
    lowering.push(stored!(storage, "lin_comb"), &params, [blocks, 1, 1], THREADS, 0);
    Ok(())
}

/// A tensor of one value.
pub(super) fn fill(lowering: &mut Lowering<'_>, op: &Fill, args: &Args) -> Result<()> {
    let y = lowering.output(args, 0);
    let len = y.meta.total(lowering.branches());
    let storage = lowering.any_storage(&[y]);
    let params = FillParams { value: lowering.coefs(&[op.value]), y: y.at, len: len as i64 };
    lowering.push(stored!(storage, "fill"), &params, [len.div_ceil(chunk(storage)), 1, 1], THREADS, 0);
    Ok(())
}

/// `max(x, 0)`.
pub(super) fn relu(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (x, y) = (lowering.input(args, 0), lowering.output(args, 0));
    let len = y.meta.total(lowering.branches());
    let storage = lowering.one_storage(&[x, y])?;
    let params = ReluParams { x: x.at, y: y.at, len: len as i64 };
    lowering.push(stored!(storage, "relu"), &params, [len.div_ceil(chunk(storage)), 1, 1], THREADS, 0);
    Ok(())
}

/// `x` where the reference is positive, else 0.
pub(super) fn mask(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (x, reference, y) = (lowering.input(args, 0), lowering.input(args, 1), lowering.output(args, 0));
    let branches = y.branches(lowering.branches());
    let params = MaskParams {
        x: x.at,
        reference: reference.at,
        y: y.at,
        len: y.len() as i64,
        x_branch: x.branch,
        reference_branch: reference.branch,
        branches: lowering.narrow("branches", branches)?,
        summed: lowering.narrow("branches", lowering.summed(args, &y))?,
    };
    let storage = lowering.one_storage(&[x, reference, y])?;
    let grid = [y.len().div_ceil(chunk(storage)), folded(branches), 1];
    lowering.push(stored!(storage, "mask"), &params, grid, THREADS, 0);
    Ok(())
}

/// Sum over samples and pixels per channel.
pub(super) fn channel_sum(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (x, y) = (lowering.input(args, 0), lowering.output(args, 0));
    let [n, channels, h, w] = x.meta.dims;
    // The rows of all branches lie one after the other: a sum over the branches is one over more rows.
    let rows = n * h * w * lowering.summed(args, &y);
    let groups = y.branches(lowering.branches());
    rows::sum(lowering, x, y.at, rows::Shape { summed: 1, groups, rows, channels }, 1.0)
}

/// The same value for every sample and pixel of a channel.
pub(super) fn channel_broadcast(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (x, y) = (lowering.input(args, 0), lowering.output(args, 0));
    let [n, channels, h, w] = y.meta.dims;
    let (summed, groups) = (lowering.summed(args, &y), y.branches(lowering.branches()));
    rows::broadcast(lowering, x.at, y, rows::Shape { summed, groups, rows: n * h * w, channels }, 1.0)
}
