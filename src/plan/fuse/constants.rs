//! Constants that are there once.

use super::Graph;
use crate::ops::{Fill, Op};
use crate::tape::{Kind, Tensor};

/// Small tensors filled with the same number are one tensor: seeds and weights of losses, cotangents that are zero.
pub(super) fn share(graph: &mut Graph) {
    let mut first: Vec<(Fill, Tensor)> = Vec::new();
    let mut copies: Vec<(Tensor, Tensor)> = Vec::new();
    for node in &graph.nodes {
        let Op::Fill(fill) = node.op else { continue };
        match first.iter().find(|(known, _)| *known == fill) {
            Some((_, original)) => copies.push((node.outputs[0], *original)),
            None if fill.meta.kind == Kind::Vector => first.push((fill, node.outputs[0])),
            None => {}
        }
    }
    copies.into_iter().for_each(|(copy, original)| graph.replace(copy, original));
}
