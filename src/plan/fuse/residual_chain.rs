//! Cotangents of residual sums that the second-order pass computes again instead of keeping them.
//!
//! The backward pass of a branch leaves, for the meta-gradient, two cotangents for each batch norm and one for each residual sum. The last
//! follow from one another, from the head to the stem, by one batch norm's backward each: `δ_l = δ_{l+1} + backward(dy_{l+1})`. Where the
//! convolutions that read them run in that order, each can make the next one's.

use super::Graph;
use super::batch_norm_backward::{cotangent, load_delta};
use crate::ops::{Delta, FusedConv, Op};
use crate::tape::{Node, Tensor};
use std::collections::HashMap;

/// How a convolution that keeps its cotangent makes it.
struct Made {
    /// `dy, x, g, b, mean, var, dg, db` and the residual term if there is one.
    operands: Vec<Tensor>,
    residual: bool,
    /// Where the second-order pass has it.
    again: Option<Tensor>,
}

/// Lets the convolutions whose results are sums over the branches compute again what they read of the cotangents that others keep, and moves
/// them behind all work on branches, in the order in which their results are wanted: from the head to the stem.
pub(super) fn recompute(graph: &mut Graph) {
    let mut made = kept(graph);
    sink(graph, &made);
    let readers: Vec<(usize, FusedConv, Tensor)> =
        (0..graph.nodes.len()).filter_map(|n| summing(graph, &graph.nodes[n]).map(|(op, dy)| (n, op, dy))).collect();
    for (i, &(n, op, dy)) in readers.iter().enumerate() {
        let Some(known) = made.get(&dy) else { continue };
        let mut operands = known.operands.clone();
        if let Some(again) = known.again {
            replace_dy(&mut graph.nodes[n], op, again);
            continue;
        }
        let residual = known.residual;
        if let Some(term) = operands.last_mut().filter(|_| residual) {
            *term = made.get(term).and_then(|before| before.again).unwrap_or(*term);
        }
        // Whether a later one reads it, or makes its own from it.
        let wants = |(_, _, other): &(usize, FusedConv, Tensor)| {
            *other == dy || made.get(other).is_some_and(|m| m.residual && m.operands.last() == Some(&dy))
        };
        let kept = readers[i + 1..].iter().any(wants);
        let again = graph.like(dy);
        let op = FusedConv { delta: Delta::Backward { residual, kept }, ..op };
        load_delta(&mut graph.nodes[n], op, &operands, again);
        if let Some(known) = made.get_mut(&dy).filter(|_| kept) {
            known.again = Some(again);
        }
    }
}

/// The cotangents per branch that convolutions keep.
fn kept(graph: &Graph) -> HashMap<Tensor, Made> {
    let of = |node: &Node| {
        let Op::FusedConv(op) = node.op else { return None };
        let (result, dy, at) = (op.delta_result()?, op.dy_operand()?, op.delta_operands()?);
        let residual = op.residual_operand();
        let operands = [dy].into_iter().chain(at).chain(residual).map(|i| node.inputs[i]).collect();
        let delta = node.outputs[result];
        let branched = graph.metas[delta.index()].per_branch;
        branched.then_some((delta, Made { operands, residual: residual.is_some(), again: None }))
    };
    graph.nodes.iter().filter_map(of).collect()
}

/// A convolution of cotangents per branch that needs them alone, and whose results are all sums over the branches.
fn summing(graph: &Graph, node: &Node) -> Option<(FusedConv, Tensor)> {
    let (op, i) = cotangent(node)?;
    let shared = node.outputs.iter().all(|t| !graph.metas[t.index()].per_branch);
    let dy = node.inputs[i];
    (shared && graph.metas[dy.index()].per_branch).then_some((op, dy))
}

fn replace_dy(node: &mut Node, op: FusedConv, dy: Tensor) {
    if let Some(i) = op.dy_operand() {
        node.inputs[i] = dy;
    }
}

/// Moves the summing convolutions that read a kept cotangent right in front of the first that reads one of their results.
fn sink(graph: &mut Graph, made: &HashMap<Tensor, Made>) {
    // From the last on: what reads their results may be one of them.
    for n in (0..graph.nodes.len()).rev() {
        if !summing(graph, &graph.nodes[n]).is_some_and(|(_, dy)| made.contains_key(&dy)) {
            continue;
        }
        let results = graph.nodes[n].outputs.clone();
        let reads = |node: &Node| node.inputs.iter().any(|t| results.contains(t));
        let Some(reader) = graph.nodes[n + 1..].iter().position(reads).map(|i| n + 1 + i) else { continue };
        graph.nodes[n..reader].rotate_left(1);
    }
}
