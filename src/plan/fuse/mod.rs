//! Fusions: one pass per file. Each replaces a named composition of operations by one operation with the same result.

mod backward;
mod batch_norm_backward;
mod batch_norm_relu;
mod batch_norm_tangent;
mod constants;
mod fusion;
mod lin_combs;
mod recompute;
mod residual_chain;
mod statistics;
mod sums;
mod tangent;
mod update;

pub use fusion::{Fusion, Fusions};
pub(super) use lin_combs::{gather, group_lin_combs};

use super::PlanOptions;
use super::graph::Graph;
use crate::error::Result;

/// A pass: it rewrites the graph and leaves its results as they are.
type Pass = fn(&mut Graph);

fn pass(fusion: Fusion) -> Pass {
    match fusion {
        Fusion::BatchNormRelu => batch_norm_relu::fuse,
        Fusion::SharedConstants => constants::share,
        Fusion::TangentPairs => tangent::join,
        Fusion::BackwardPairs => backward::join,
        Fusion::Recomputation => recompute::fuse,
        Fusion::StartedSums => sums::accumulate,
        Fusion::FlatSums => sums::flatten,
        Fusion::Statistics => statistics::fuse,
        Fusion::BackwardSums => batch_norm_backward::sums,
        Fusion::BackwardStarts => batch_norm_backward::starts,
        Fusion::SecondOrder => batch_norm_tangent::fuse,
        Fusion::LoadedCotangents => batch_norm_backward::prologue,
        Fusion::ResidualChain => residual_chain::recompute,
        Fusion::Update => update::join,
    }
}

fn is_wanted(fusion: Fusion, options: &PlanOptions) -> bool {
    let runs = match fusion {
        // What every device can run.
        Fusion::BatchNormRelu | Fusion::StartedSums => true,
        Fusion::ResidualChain => options.kernels && options.recompute,
        _ => options.kernels,
    };
    runs && options.fusions.has(fusion)
}

/// Applies the passes that `options` want.
///
/// # Errors
/// When a pass leaves a graph that does not hold together: its defect.
pub(super) fn fuse(graph: &mut Graph, options: &PlanOptions) -> Result<()> {
    Fusion::ALL.into_iter().filter(|fusion| is_wanted(*fusion, options)).try_for_each(|fusion| {
        pass(fusion)(graph);
        graph.remove_dead();
        graph.check()
    })
}
