//! Whether all elements of a list of tensors are finite: `kernels/finite.cu`.

use super::Lowering;
use crate::device::cuda::driver::Address;
use crate::error::Result;
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

/// Threads of a block.
const THREADS: usize = 256;
/// Elements of a piece, which is one block's.
const PIECE: usize = 1 << 12;
/// Bytes of shared memory of a block.
const SHARED: usize = 16;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FinitePiece {
    x: Address,
    len: i64,
}
const _: () = assert!(size_of::<FinitePiece>() == 16);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FiniteParams {
    pieces: Address,
    partial: Address,
    arrivals: Address,
    all: Address,
}
const _: () = assert!(size_of::<FiniteParams>() == 32);

pub(super) fn all_finite(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let mut pieces = Vec::new();
    for i in 0..args.inputs.len() {
        let x = lowering.input(args, i);
        let total = x.meta.total(lowering.branches());
        let piece = |from| FinitePiece { x: x.at.offset(4 * from), len: PIECE.min(total - from) as i64 };
        pieces.extend((0..total).step_by(PIECE).map(piece));
    }
    let params = FiniteParams {
        pieces: lowering.table(&pieces),
        partial: lowering.scratch(4 * pieces.len()),
        arrivals: lowering.counters(1),
        all: lowering.output(args, 0).at,
    };
    lowering.push("all_finite_f32", &params, [pieces.len(), 1, 1], THREADS, SHARED);
    Ok(())
}
