//! Fusions: one pass per file. Each replaces a named composition of operations by one operation with the same result.

mod backward;
mod batch_norm_backward;
mod batch_norm_relu;
mod batch_norm_tangent;
mod constants;
mod lin_combs;
mod recompute;
mod residual_chain;
mod statistics;
mod sums;
mod tangent;

pub(super) use lin_combs::{gather, group_lin_combs};

use super::PlanOptions;
use super::graph::Graph;
use crate::error::Result;

/// A pass: it rewrites the graph and leaves its results as they are.
type Pass = fn(&mut Graph);

/// What every device can run.
const PLAIN: [Pass; 2] = [batch_norm_relu::fuse, sums::accumulate];

/// For the CUDA kernels. The order matters: pairs are found among plain convolutions, sums are pushed into what they became, and
/// statistics and the sums of batch norms are those of a finished sum.
const KERNELS: [Pass; 12] = [
    batch_norm_relu::fuse,
    constants::share,
    tangent::join,
    backward::join,
    recompute::fuse,
    sums::accumulate,
    sums::flatten,
    statistics::fuse,
    batch_norm_backward::sums,
    batch_norm_backward::starts,
    batch_norm_tangent::fuse,
    batch_norm_backward::prologue,
];

/// Applies all passes.
///
/// # Errors
/// When a pass leaves a graph that does not hold together: its defect.
pub(super) fn fuse(graph: &mut Graph, options: &PlanOptions) -> Result<()> {
    let passes: &[Pass] = if options.kernels { &KERNELS } else { &PLAIN };
    let chain: &[Pass] = if options.kernels && options.recompute { &[residual_chain::recompute] } else { &[] };
    passes.iter().chain(chain).try_for_each(|pass| {
        pass(graph);
        graph.remove_dead();
        graph.check()
    })
}
