//! Cases of the batch norms that only the planner makes: those that compute `relu(bn(x))` again, and those whose sums are operands.

use super::{Case, Data, Operand, Sum};
use crate::ops::{
    BnBackward, BnDoubleBackward, BnReluBackward, BnReluBackwardApply, BnReluDoubleBackward, BnReluDoubleBackwardApply,
    BnStats, Op,
};
use crate::tape::Meta;

const KEPT: [bool; 3] = [false; 3];
/// MLNT's second order.
const MIXED: [bool; 3] = [false, true, true];
/// Operands that the tangents of a batch norm's operands make per-branch.
const TANGENTS: [&str; 3] = ["x_dot", "g_dot", "dy"];

/// The batch norms that compute `relu(bn(x))` again, in every mixture that a step has and some that it has not, for `[n, c, h, w]`.
pub fn recomputed(size: [usize; 4], branches: usize) -> Vec<Case> {
    let backward = |start| Op::from(BnReluBackward { start });
    let double = || Op::from(BnReluDoubleBackward);
    let tangents = ["x_dot", "g_dot", "b_dot", "dy"];
    let mut list: Vec<(Op, &[&str], &[bool])> = vec![
        (BnStats.into(), &[], &[]),
        (BnStats.into(), &["x"], &[]),
        (backward(false), &[], &KEPT),
        (backward(false), &["dy"], &KEPT),
        (backward(true), &["dy", "start"], &MIXED),
        (backward(true), &["dy", "x", "g", "b", "start"], &KEPT),
        (backward(true), &["dy", "x", "g", "b"], &KEPT),
        (backward(true), &["dy", "x"], &[true; 3]),
        (backward(true), &["start"], &KEPT),
        (backward(false), &["b"], &KEPT),
        (double(), &[], &KEPT),
        (double(), &tangents, &MIXED),
        (double(), &["x_dot", "g_dot", "b_dot", "dy", "x", "g", "b"], &KEPT),
        (double(), &["x_dot", "dy"], &[true, false, true]),
    ];
    if branches > 1 {
        list.push((double(), &["b"], &KEPT));
    }
    list.into_iter().map(|(op, branched, sum)| batch_norm(op, size, branches, branched, sum)).collect()
}

/// The batch norms whose sums are operands, in every mixture that a step has and some that it has not, for `[n, c, h, w]`.
pub fn applied(size: [usize; 4], branches: usize) -> Vec<Case> {
    let back = |second_order, starts, branched: &[&str], sum: bool| {
        batch_norm(BnReluBackwardApply { second_order, starts }, size, branches, branched, &[sum])
    };
    let double = |start, branched: &[&str], sum: [bool; 2]| {
        batch_norm(BnReluDoubleBackwardApply { start }, size, branches, branched, &sum)
    };
    let all = ["dy", "x", "g", "b", "g_bar", "start", "start2"];
    let mut list = vec![
        back(false, 0, &[], false),
        back(false, 1, &[], false),
        back(true, 1, &[], false),
        back(true, 2, &[], false),
        back(false, 0, &["dy"], false),
        back(false, 1, &["dy"], false),
        back(false, 2, &["dy", "start", "start2"], false),
        back(true, 2, &["dy", "g_bar", "start"], false),
        back(true, 1, &["dy"], false),
        back(true, 2, &all, false),
        back(false, 2, &["start2"], false),
        back(true, 0, &["g_bar"], false),
        back(false, 1, &["sums"], false),
        back(false, 1, &["dy", "x"], true),
        back(false, 0, &["dy", "g"], true),
        back(true, 2, &["dy"], true),
        back(true, 1, &["dy", "g_bar"], true),
        double(false, &[], [false; 2]),
        double(true, &[], [false; 2]),
        double(false, &TANGENTS, [true; 2]),
        double(true, &TANGENTS, [true; 2]),
        double(true, &TANGENTS, [false; 2]),
        double(true, &TANGENTS, [true, false]),
        double(false, &TANGENTS, [false, true]),
        double(true, &["x_dot", "g_dot", "dy", "start"], [false, true]),
        double(true, &["x_dot", "g_dot", "dy", "x", "g", "b", "start"], [false; 2]),
        double(true, &["x_dot", "g_dot", "dy", "x", "g", "b"], [true; 2]),
        double(true, &["x_dot"], [true; 2]),
        double(true, &["sums", "start"], [false; 2]),
    ];
    if branches > 1 {
        list.extend([back(false, 0, &["b"], false), double(false, &["b"], [false; 2])]);
    }
    list
}

/// Names of a batch norm's operands; none for an operation that is no batch norm.
fn names(op: &Op) -> Vec<&'static str> {
    let channels = ["g", "b", "mean", "var"];
    let mut list: Vec<&str> = match op {
        Op::BnForward(_) => vec!["x", "g", "b"],
        Op::BnEval(_) | Op::BnStats(_) => vec!["x"],
        Op::BnBackward(_) => vec!["dy", "x", "g", "mean", "var"],
        Op::BnDoubleBackward(_) => vec!["x_dot", "g_dot", "b_dot", "dy", "x", "g", "mean", "var"],
        Op::BnReluBackward(_) | Op::BnReluBackwardApply(_) => vec!["dy", "x"],
        Op::BnReluDoubleBackward(_) => vec!["x_dot", "g_dot", "b_dot", "dy", "x"],
        Op::BnReluDoubleBackwardApply(_) => vec!["x_dot", "g_dot", "dy", "x"],
        _ => Vec::new(),
    };
    match op {
        Op::BnEval(_) | Op::BnReluDoubleBackward(_) => list.extend(channels),
        Op::BnBackward(BnBackward { relu: true }) | Op::BnDoubleBackward(BnDoubleBackward { relu: true }) => {
            list.push("y")
        }
        Op::BnReluBackward(op) => {
            list.extend(channels);
            list.extend(op.start.then_some("start"));
        }
        Op::BnReluBackwardApply(op) => {
            list.extend(channels.into_iter().chain(["dg", "db"]));
            list.extend(op.second_order.then_some("g_bar"));
            list.extend(["start", "start2"].into_iter().take(op.starts));
        }
        Op::BnReluDoubleBackwardApply(op) => {
            list.extend(channels.into_iter().chain(["dg", "db", "x_dot_mean", "rho"]));
            list.extend(op.start.then_some("start"));
        }
        _ => {}
    }
    list
}

/// A batch norm on `[n, c, h, w]` in a plan of so many branches. Operands whose names are in `branched` are per-branch; statistics are so with
/// x, sums with what they are of, and with "sums" alone; `sum`: which results are summed over the branches.
pub fn batch_norm(op: impl Into<Op>, size: [usize; 4], branches: usize, branched: &[&str], sum: &[bool]) -> Case {
    let (op, [n, c, h, w]) = (op.into(), size);
    let (vector, activation) = (Meta::vector(c), Meta::activation(n, c, h, w));
    let names = names(&op);
    let at = |name: &str| names.iter().position(|other| *other == name).unwrap_or_default();
    let norm = || ["x", "g", "b", "mean", "var"].map(at);
    let operand = |name: &&'static str| {
        let (x, x_dot, dy) = (at("x"), at("x_dot"), at("dy"));
        let (meta, data, of): (Meta, Data, &[&str]) = match *name {
            "mean" => (vector, Data::MeanOf(x), &["x"]),
            "var" => (vector, Data::VarianceOf(x), &["x"]),
            "y" => (activation, Data::Clear, &["y"]),
            "x" | "dy" | "x_dot" | "start" | "start2" => (activation, Data::Normal, std::slice::from_ref(name)),
            "dg" => (vector, Data::Sum(Sum::Gain { dy, norm: norm() }), &["dy", "x", "g", "b", "sums"]),
            "db" => (vector, Data::Sum(Sum::Bias { dy, norm: norm() }), &["dy", "x", "g", "b", "sums"]),
            "x_dot_mean" => (vector, Data::Sum(Sum::Mean { x_dot }), &["x_dot", "sums"]),
            "rho" => (vector, Data::Sum(Sum::Correlation { x_dot, norm: norm() }), &["x_dot", "x", "sums"]),
            // Any number will do; of the size of a sum over rows it matters.
            "g_bar" => (vector, Data::Scaled((n * h * w) as f64), &["g_bar"]),
            _ => (vector, Data::Normal, std::slice::from_ref(name)),
        };
        let meta = meta.with_branching(of.iter().any(|source| branched.contains(source)));
        Operand { name, meta, data, differentiable: false }
    };
    let operands = names.iter().map(operand).collect();
    let parts = match &op {
        Op::BnReluBackwardApply(op) => {
            let order = if op.second_order { " second order" } else { "" };
            format!("{order}{}", ["", " added", " two added"][op.starts.min(2)])
        }
        _ if names.contains(&"start") => " added".to_string(),
        _ => String::new(),
    };
    Case::new(op, &format!("n{n} c{c} {h}x{w}{parts} in a plan of {branches}"), branches, operands, sum)
}
