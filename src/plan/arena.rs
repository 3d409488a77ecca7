//! Places for all tensors: states and inputs where they are, everything else in one arena by lifetime.

use super::Place;
use super::graph::Graph;
use crate::tape::{DType, Source, Tensor};
use std::collections::HashMap;

/// Bytes to which every tensor in an arena is aligned.
const ALIGN: usize = 64;

/// What an arena holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pool {
    Reals,
    Halves,
    Indices,
}

impl Pool {
    /// Elements to which its tensors are aligned.
    fn align(self) -> usize {
        ALIGN / if self == Pool::Halves { 2 } else { 4 }
    }
}

/// Places by tensor, and the size of the arenas in elements.
pub(super) struct Layout {
    pub places: Vec<Place>,
    /// Whether a launch or an assignment touches the tensor.
    pub used: Vec<bool>,
    pub reals: usize,
    pub halves: usize,
    pub indices: usize,
}

/// A piece of the arena: one or several tensors that hand the same memory on, alive from launch `first` to `last`.
struct Block {
    len: usize,
    first: usize,
    last: usize,
    pool: Pool,
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
            for t in node.inputs.iter().chain(&node.outputs).map(|t| graph.root(*t)) {
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
            *reads.entry(graph.root(*t)).or_insert(0) += 1;
        }
        // Blocks that this launch has handed on.
        let mut taken = Vec::new();
        for node in group.iter().map(|&n| &graph.nodes[n]) {
            // What lies in another tensor's memory comes with that tensor, when the first part of it is made.
            for t in node.outputs.iter().map(|t| graph.root(*t)) {
                if places[t.index()].is_some() || block_of[t.index()].is_some() {
                    continue;
                }
                let meta = &graph.metas[t.index()];
                let half = graph.half[t.index()];
                let summed = !meta.per_branch && node.inputs.iter().any(|i| graph.metas[i.index()].per_branch);
                let result = node.outputs.iter().position(|o| *o == t);
                let handed_on = node.inputs.iter().enumerate().find(|&(position, &i)| {
                    let same = graph.metas[i.index()] == *meta
                        && graph.span(i) == graph.span(t)
                        && graph.half[i.index()] == half;
                    same && graph.root(i) == i
                        && result.is_some_and(|o| node.op.works_in_place(position, o, summed))
                        && reads[&i] == 1
                        && last[i.index()] == g
                        && block_of[i.index()].is_some_and(|b| blocks[b].last == g && !taken.contains(&b))
                });
                match handed_on.and_then(|(_, i)| block_of[i.index()]) {
                    Some(b) => {
                        taken.push(b);
                        blocks[b].last = last[t.index()].max(g);
                        block_of[t.index()] = Some(b);
                    }
                    None => {
                        block_of[t.index()] = Some(blocks.len());
                        let pool = match (meta.dtype, half) {
                            (DType::Index, _) => Pool::Indices,
                            (DType::Real, true) => Pool::Halves,
                            (DType::Real, false) => Pool::Reals,
                        };
                        let len = graph.elements(t).next_multiple_of(pool.align());
                        blocks.push(Block { len, first: g, last: last[t.index()].max(g), pool });
                    }
                }
            }
        }
    }

    let mut offsets = vec![0; blocks.len()];
    let [reals, halves, indices] =
        [Pool::Reals, Pool::Halves, Pool::Indices].map(|pool| pack(&blocks, pool, &mut offsets));
    let place = |t: Tensor| {
        let root = graph.root(t);
        places[root.index()].unwrap_or_else(|| {
            let from = (graph.span(t).0 - graph.span(root).0) * graph.metas[t.index()].len();
            Place::Arena(block_of[root.index()].map_or(0, |b| offsets[b]) + from)
        })
    };
    let places = (0..count as u32).map(|t| place(Tensor(t))).collect();
    Layout { places, used, reals, halves, indices }
}

/// Offsets for the blocks of one arena, and its size: largest first, each at the lowest place that is free all its life.
fn pack(blocks: &[Block], pool: Pool, offsets: &mut [usize]) -> usize {
    let mut order: Vec<usize> = (0..blocks.len()).filter(|&b| blocks[b].pool == pool).collect();
    order.sort_by_key(|&b| (std::cmp::Reverse(blocks[b].len), blocks[b].first));
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
    size
}
