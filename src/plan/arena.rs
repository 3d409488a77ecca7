//! Places for all tensors: states and inputs where they are, everything else in one arena by lifetime.

use super::Place;
use super::graph::Graph;
use crate::ops::Op;
use crate::tape::{DType, Source, Tensor};
use std::collections::HashMap;

/// Elements to which every tensor in the arena is aligned: 64 bytes of f32.
const ALIGN: usize = 16;

/// Places by tensor, and the size of the two arenas in elements.
pub(super) struct Layout {
    pub places: Vec<Place>,
    /// Whether a launch or an assignment touches the tensor.
    pub used: Vec<bool>,
    pub reals: usize,
    pub indices: usize,
}

/// A piece of the arena: one or several tensors that hand the same memory on, alive from launch `first` to `last`.
struct Block {
    len: usize,
    first: usize,
    last: usize,
    index: bool,
}

pub(super) fn lay_out(graph: &Graph, groups: &[Vec<usize>]) -> Layout {
    let count = graph.metas.len();
    let mut places: Vec<Option<Place>> = vec![None; count];
    let mut used = vec![false; count];
    for (t, source) in graph.sources.iter().enumerate() {
        places[t] = match source {
            Source::State(i) => Some(Place::State(*i as usize)),
            Source::Input(i) => Some(Place::Input(*i as usize)),
            Source::Node(_) => None,
        };
    }
    for (state, value) in &graph.assigns {
        places[value.index()] = Some(Place::State(*state as usize));
        used[graph.states[*state as usize].tensor.index()] = true;
    }

    let end = groups.len();
    let mut last = vec![0usize; count];
    for (g, group) in groups.iter().enumerate() {
        for node in group.iter().map(|&n| &graph.nodes[n]) {
            for t in node.inputs.iter().chain(&node.outputs) {
                (last[t.index()], used[t.index()]) = (g, true);
            }
        }
    }
    for output in &graph.outputs {
        (last[output.tensor.index()], used[output.tensor.index()]) = (end, true);
    }

    let mut blocks: Vec<Block> = Vec::new();
    let mut block_of: Vec<Option<usize>> = vec![None; count];
    for (g, group) in groups.iter().enumerate() {
        // The operand sets of one launch may run at the same time: memory read by two of them is not handed on.
        let mut reads = HashMap::new();
        for t in group.iter().flat_map(|&n| &graph.nodes[n].inputs) {
            *reads.entry(*t).or_insert(0) += 1;
        }
        for node in group.iter().map(|&n| &graph.nodes[n]) {
            for t in node.outputs.iter().filter(|t| places[t.index()].is_none()) {
                let meta = &graph.metas[t.index()];
                let handed_on = in_place_operands(&node.op, &node.inputs).iter().copied().find(|&i| {
                    let same = graph.metas[i.index()] == *meta;
                    same && reads[&i] == 1
                        && last[i.index()] == g
                        && block_of[i.index()].is_some_and(|b| blocks[b].last == g)
                });
                match handed_on.and_then(|i| block_of[i.index()]) {
                    Some(b) => {
                        blocks[b].last = last[t.index()].max(g);
                        block_of[t.index()] = Some(b);
                    }
                    None => {
                        block_of[t.index()] = Some(blocks.len());
                        let len = meta.total(graph.branches).next_multiple_of(ALIGN);
                        let index = meta.dtype == DType::Index;
                        blocks.push(Block { len, first: g, last: last[t.index()].max(g), index });
                    }
                }
            }
        }
    }

    let (reals, mut offsets) = pack(&blocks, false);
    let (indices, index_offsets) = pack(&blocks, true);
    for (offset, other) in offsets.iter_mut().zip(index_offsets) {
        *offset = (*offset).max(other);
    }
    let places = places
        .into_iter()
        .enumerate()
        .map(|(t, place)| place.unwrap_or_else(|| Place::Arena(block_of[t].map_or(0, |b| offsets[b]))))
        .collect();
    Layout { places, used, reals, indices }
}

/// Operands whose memory the result may take over when they are not needed any more.
fn in_place_operands<'a>(op: &Op, inputs: &'a [Tensor]) -> &'a [Tensor] {
    match op {
        Op::LinComb(op) => op.terms(inputs),
        Op::Conv(_) => &inputs[2..],
        _ => &[],
    }
}

/// Offsets for the blocks of one element type: largest first, each at the lowest place that is free all its life.
fn pack(blocks: &[Block], index: bool) -> (usize, Vec<usize>) {
    let mut order: Vec<usize> = (0..blocks.len()).filter(|&b| blocks[b].index == index).collect();
    order.sort_by_key(|&b| (std::cmp::Reverse(blocks[b].len), blocks[b].first));
    let mut offsets = vec![0; blocks.len()];
    let mut placed: Vec<usize> = Vec::new(); // by offset
    let mut size = 0;
    for b in order {
        let block = &blocks[b];
        let mut offset = 0;
        for &p in &placed {
            let other = &blocks[p];
            if other.first > block.last || block.first > other.last {
                continue;
            }
            if offset + block.len <= offsets[p] {
                break;
            }
            offset = offset.max(offsets[p] + other.len);
        }
        offsets[b] = offset;
        size = size.max(offset + block.len);
        let at = placed.partition_point(|&p| offsets[p] <= offset);
        placed.insert(at, b);
    }
    (size, offsets)
}
