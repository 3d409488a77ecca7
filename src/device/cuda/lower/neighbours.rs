//! Nearest neighbours within a batch and labels taken from them: `kernels/neighbours.cu`.

use super::Lowering;
use crate::device::cuda::driver::Address;
use crate::error::Result;
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

const THREADS: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct NearestParams {
    features: Address,
    indices: Address,
    features_branch: i64,
    indices_branch: i64,
    samples: i32,
    dim: i32,
    count: i32,
    padding: i32,
}
const _: () = assert!(size_of::<NearestParams>() == 48);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TransferParams {
    labels: Address,
    neighbours: Address,
    ranks: Address,
    out: Address,
    labels_branch: i64,
    neighbours_branch: i64,
    ranks_branch: i64,
    samples: i32,
    count: i32,
}
const _: () = assert!(size_of::<TransferParams>() == 64);

/// Features → indices of the nearest others.
pub(super) fn nearest(l: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (x, out) = (l.input(args, 0), l.output(args, 0));
    let [samples, dim, ..] = x.meta.dims;
    let count = out.meta.dims[1];
    let params = NearestParams {
        features: x.at,
        indices: out.at,
        features_branch: x.branch,
        indices_branch: out.branch,
        samples: l.narrow("samples", samples)?,
        dim: l.narrow("features", dim)?,
        count: l.narrow("neighbours", count)?,
        padding: 0,
    };
    // Distances, and one candidate (distance and index) per thread.
    let shared = 8 * samples + 12 * THREADS;
    l.push("nearest_neighbours_f32", &params, [samples, l.live_branches(args), 1], THREADS, shared);
    Ok(())
}

/// (labels, neighbours, ranks) → labels.
pub(super) fn transfer(l: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let (labels, neighbours, ranks, out) = (l.input(args, 0), l.input(args, 1), l.input(args, 2), l.output(args, 0));
    let [samples, count, ..] = neighbours.meta.dims;
    let params = TransferParams {
        labels: labels.at,
        neighbours: neighbours.at,
        ranks: ranks.at,
        out: out.at,
        labels_branch: labels.branch,
        neighbours_branch: neighbours.branch,
        ranks_branch: ranks.branch,
        samples: l.narrow("samples", samples)?,
        count: l.narrow("neighbours", count)?,
    };
    let grid = [samples.div_ceil(THREADS), l.live_branches(args), 1];
    l.push("transfer_labels_i32", &params, grid, THREADS, 0);
    Ok(())
}
