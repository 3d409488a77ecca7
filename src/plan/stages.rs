//! Work on branches by stages: within a group, fewer branches at a time where images are large, so that what one launch leaves in the
//! second-level cache is still there for the next.
//!
//! A stage is all work on branches whose largest images have one size; the first has the largest. A stretch of neighbouring
//! nodes of one stage is a region of its own, taken in passes as groups take the whole (`region`); what crosses its border keeps its
//! place among the tensors of the group.

use super::Plan;
use super::graph::Graph;
use super::groups::ranges;
use super::region::{Region, made};
use crate::error::Result;
use crate::tape::{Kind, Meta, Node, Tensor};
use std::ops::Range;

/// The most stages that have a size of their own; those beyond take all branches of a group at a time.
pub const MOST_STAGES: usize = 8;

/// Branches at a time in each stage, within a group; where nothing is said, all of the group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StageGroups {
    /// Zero for all.
    sizes: [u16; MOST_STAGES],
}

impl StageGroups {
    /// All branches of a group in every stage.
    pub const WHOLE: Self = StageGroups { sizes: [0; MOST_STAGES] };

    /// Branches at a time in `stage`, 0 for the largest images; `None` for all of a group.
    pub fn size(&self, stage: usize) -> Option<usize> {
        self.sizes.get(stage).map(|size| usize::from(*size)).filter(|size| *size > 0)
    }

    /// The same with `size` in `stage`: changes nothing for a stage beyond [`MOST_STAGES`].
    #[must_use]
    pub fn with(mut self, stage: usize, size: Option<usize>) -> Self {
        if let Some(place) = self.sizes.get_mut(stage) {
            *place = size.map_or(0, |size| u16::try_from(size).unwrap_or(u16::MAX));
        }
        self
    }

    /// Whether no stage has a size of its own.
    pub fn is_whole(&self) -> bool {
        self.sizes.iter().all(|size| *size == 0)
    }
}

impl std::fmt::Display for StageGroups {
    /// The sizes up to the last that is not all, e.g. `2,all,4`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = self.sizes.iter().rposition(|size| *size > 0).map_or(0, |last| last + 1);
        let texts = (0..named).map(|stage| self.size(stage).map_or("all".to_string(), |size| size.to_string()));
        f.write_str(&texts.collect::<Vec<_>>().join(","))
    }
}

/// Pixels of an image of `meta`; 0 for what is none.
fn pixels(meta: &Meta) -> usize {
    let [_, _, h, w] = meta.dims;
    if meta.kind == Kind::Activation && h * w > 1 { h * w } else { 0 }
}

/// Pixels of the largest image among tensors, if work on them is work on branches and there is one.
fn extent<'a>(metas: impl Iterator<Item = &'a Meta>) -> Option<usize> {
    let of = |(largest, branched): (usize, bool), meta: &Meta| (largest.max(pixels(meta)), branched || meta.per_branch);
    let (largest, branched) = metas.fold((0, false), of);
    (largest > 0 && branched).then_some(largest)
}

/// The stage of each, by extent.
fn stages_of(extents: &[Option<usize>]) -> Vec<Option<usize>> {
    let mut all: Vec<usize> = extents.iter().flatten().copied().collect();
    all.sort_unstable_by_key(|pixels| std::cmp::Reverse(*pixels));
    all.dedup();
    extents.iter().map(|extent| all.iter().position(|pixels| Some(*pixels) == *extent)).collect()
}

impl Plan {
    /// The stage of every launch; `None` for one that does no work on branches, or touches no image.
    pub(super) fn stages(&self) -> Vec<Option<usize>> {
        let of = |launch: &super::Launch| {
            let sets = launch.args.iter();
            sets.filter_map(|args| extent(args.buffers().map(|b| &self.buffers[*b].meta))).max()
        };
        stages_of(&self.launches.iter().map(of).collect::<Vec<_>>())
    }
}

/// Neighbouring nodes of one stage that work on the same branches.
struct Stretch {
    nodes: Range<usize>,
    /// The passes it is taken in.
    passes: Vec<Range<usize>>,
}

fn stretches(graph: &Graph, sizes: &StageGroups) -> Vec<Stretch> {
    let of = |node: &Node| extent(node.inputs.iter().chain(&node.outputs).map(|t| &graph.metas[t.index()]));
    let stages = stages_of(&graph.nodes.iter().map(of).collect::<Vec<_>>());
    let of = |n: usize| Some((stages[n]?, graph.branches_of(&graph.nodes[n])?));
    let mut found = Vec::new();
    let mut from = 0;
    while from < graph.nodes.len() {
        let kind = of(from);
        let to = from + (from..graph.nodes.len()).take_while(|n| of(*n) == kind).count();
        if let Some((stage, branches)) = kind {
            let passes = ranges(branches.len(), sizes.size(stage)).into_iter();
            let passes: Vec<_> = passes.map(|r| branches.start + r.start..branches.start + r.end).collect();
            if passes.len() > 1 {
                found.push(Stretch { nodes: from..to, passes });
            }
        }
        from = to;
    }
    found
}

/// Takes every stage in passes of its size.
pub(super) fn divide(graph: &mut Graph, sizes: &StageGroups) -> Result<()> {
    let (stretches, made) = (stretches(graph, sizes), made(graph)?);
    // For every tensor the stretch that makes it, and whether anything else needs it or the tensor in whose memory it lies.
    let mut maker: Vec<Option<usize>> = vec![None; graph.metas.len()];
    for (s, stretch) in stretches.iter().enumerate() {
        let results = graph.nodes[stretch.nodes.clone()].iter().flat_map(|node| &node.outputs);
        results.for_each(|t| maker[t.index()] = Some(s));
    }
    let mut outside = graph.escapes();
    for t in (0..graph.metas.len() as u32).map(Tensor) {
        outside[t.index()] |= graph.root(t) != t;
    }
    let mut reads = |nodes: Range<usize>, by: Option<usize>| {
        for t in graph.nodes[nodes].iter().flat_map(|node| &node.inputs) {
            let root = graph.root(*t);
            outside[t.index()] |= maker[t.index()] != by;
            outside[root.index()] |= root != *t || maker[root.index()] != by;
        }
    };
    let mut from = 0;
    for (s, stretch) in stretches.iter().enumerate() {
        reads(from..stretch.nodes.start, None);
        reads(stretch.nodes.clone(), Some(s));
        from = stretch.nodes.end;
    }
    reads(from..graph.nodes.len(), None);

    let nodes = std::mem::take(&mut graph.nodes);
    let mut from = 0;
    for stretch in &stretches {
        graph.nodes.extend_from_slice(&nodes[from..stretch.nodes.start]);
        Region::new(graph, &nodes[stretch.nodes.clone()], &made, &outside).emit(&stretch.passes);
        from = stretch.nodes.end;
    }
    graph.nodes.extend_from_slice(&nodes[from..]);
    Ok(())
}
