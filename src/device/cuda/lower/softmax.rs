//! The head: softmax and losses. Kernels: `kernels/softmax.cu`.

use super::{Lowering, Operand, folded, rows};
use crate::device::cuda::driver::Address;
use crate::error::Result;
use crate::ops::Op;
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

/// Most threads of a block of the losses, one block per branch.
const LOSS_THREADS: usize = 512;
/// Samples of a block of the others, one warp each.
const SAMPLES: usize = 8;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct HeadParams {
    z: Address,
    target: Address,
    labels: Address,
    e: Address,
    weights: Address,
    scale: Address,
    y: Address,
    z_branch: i64,
    target_branch: i64,
    e_branch: i64,
    weights_branch: i64,
    scale_branch: i64,
    samples: i64,
    classes: i32,
    branches: i32,
    summed: i32,
    padding: i32,
}
const _: () = assert!(size_of::<HeadParams>() == 120);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LossParams {
    z: Address,
    target: Address,
    labels: Address,
    weights: Address,
    y: Address,
    partial: Address,
    z_branch: i64,
    target_branch: i64,
    weights_branch: i64,
    samples: i64,
    classes: i32,
    padding: i32,
}
const _: () = assert!(size_of::<LossParams>() == 88);

/// Launches `kernel` on logits `z`, after `fill` has set the operands that it has beside them.
fn launch(
    lowering: &mut Lowering<'_>,
    kernel: &'static str,
    args: &Args,
    z: Operand,
    fill: impl FnOnce(&mut HeadParams),
) -> Result<()> {
    let y = lowering.output(args, 0);
    let [samples, classes, ..] = z.meta.dims;
    let branches = y.branches(lowering.branches());
    let mut params = HeadParams {
        z: z.at,
        y: y.at,
        z_branch: z.branch,
        samples: samples as i64,
        classes: lowering.narrow("classes", classes)?,
        branches: lowering.narrow("branches", branches)?,
        summed: lowering.narrow("branches", lowering.summed(args, &y))?,
        ..Zeroable::zeroed()
    };
    fill(&mut params);
    lowering.push(kernel, &params, [samples.div_ceil(SAMPLES), folded(branches), 1], 32 * SAMPLES, 0);
    Ok(())
}

/// `softmax(z)`.
pub(super) fn softmax(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let z = lowering.input(args, 0);
    launch(lowering, "softmax_f32", args, z, |_| ())
}

/// `s w_i p ⊙ (E − ⟨p, E⟩)`.
pub(super) fn jvp(lowering: &mut Lowering<'_>, args: &Args) -> Result<()> {
    let [e, z, weights, scale] = [0, 1, 2, 3].map(|i| lowering.input(args, i));
    launch(lowering, "softmax_jvp_f32", args, z, |params| {
        (params.e, params.e_branch) = (e.at, e.branch);
        (params.weights, params.weights_branch) = (weights.at, weights.branch);
        (params.scale, params.scale_branch) = (scale.at, scale.branch);
    })
}

/// `s w_i (p − target)`, for labels or probabilities.
pub(super) fn grad(lowering: &mut Lowering<'_>, op: &Op, args: &Args) -> Result<()> {
    let [z, target, weights, scale] = [0, 1, 2, 3].map(|i| lowering.input(args, i));
    let labels = matches!(op, Op::CeGrad(_));
    launch(lowering, if labels { "ce_grad_f32" } else { "kl_grad_f32" }, args, z, |params| {
        *(if labels { &mut params.labels } else { &mut params.target }) = target.at;
        params.target_branch = target.branch;
        (params.weights, params.weights_branch) = (weights.at, weights.branch);
        (params.scale, params.scale_branch) = (scale.at, scale.branch);
    })
}

/// `Σ_i w_i Σ_c t (log t − log p)`: cross entropy for labels, divergence for probabilities.
pub(super) fn loss(lowering: &mut Lowering<'_>, op: &Op, args: &Args) -> Result<()> {
    let [z, target, weights] = [0, 1, 2].map(|i| lowering.input(args, i));
    let (y, live) = (lowering.output(args, 0), lowering.live_branches(args));
    let [samples, classes, ..] = z.meta.dims;
    let labels = matches!(op, Op::CeLoss(_));
    let [label_at, target_at] = if labels { [target.at, Address::NULL] } else { [Address::NULL, target.at] };
    let summed = lowering.summed(args, &y) > 1;
    let partial = if summed { lowering.scratch(8 * live) } else { Address::NULL };
    let params = LossParams {
        z: z.at,
        target: target_at,
        labels: label_at,
        weights: weights.at,
        y: if summed { Address::NULL } else { y.at },
        partial,
        z_branch: z.branch,
        target_branch: target.branch,
        weights_branch: weights.branch,
        samples: samples as i64,
        classes: lowering.narrow("classes", classes)?,
        padding: 0,
    };
    let threads = samples.saturating_mul(32).min(LOSS_THREADS);
    let kernel = if labels { "ce_loss_f32" } else { "kl_loss_f32" };
    lowering.push(kernel, &params, [live, 1, 1], threads, 8 * (threads / 32));
    if summed {
        rows::finish(lowering, partial, y.at, rows::Shape { summed: 1, groups: 1, rows: live, channels: 1 }, 1.0)?;
    }
    Ok(())
}
