//! From a finished tape to a list of launches: dead code removed, operations fused, memory laid out by lifetime.
//!
//! A plan is built once per shape and allocates nothing itself; it can describe a step far larger than this machine.

mod arena;
mod cache;
mod cost;
mod fuse;
mod graph;
mod groups;
mod half;
mod machine;
mod region;
mod stages;

pub use cache::Traffic;
pub use cost::{Cost, OperationCost, PhaseCost};
pub use fuse::{Fusion, Fusions};
pub use machine::{LEAST_GROUP, Machine};
pub use stages::{MOST_STAGES, StageGroups};

use crate::error::Result;
use crate::ops::Op;
use crate::tape::{Meta, Tape, Tensor};
use graph::Graph;
use std::ops::Range;

/// How to build a plan.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    /// Fuse operations; without it every recorded operation is a launch of its own (the reference for the fusions).
    pub fuse: bool,
    /// Fuse further, to operations that only the CUDA kernels know (`ops::fused`, `ops::update`); without `fuse` it does nothing.
    pub kernels: bool,
    /// Which of the fusions that `fuse`, `kernels` and `recompute` stand for are applied: all, but where their effects are told apart.
    pub fusions: Fusions,
    /// Keep activations, their cotangents and weights per branch in 16 bits, in the device's half-width type.
    pub half: bool,
    /// Compute the cotangents of residual sums again for the second order instead of keeping them: a smaller arena, more bytes moved; only
    /// with `kernels`.
    pub recompute: bool,
    /// Run the work on branches in groups of at most this many, one group after the other; `None` takes all at a time.
    pub group: Option<usize>,
    /// Take fewer branches at a time within a group, by stage.
    pub stages: StageGroups,
}

impl PlanOptions {
    /// Every operation as it is recorded, all branches at a time.
    pub const AS_RECORDED: Self = PlanOptions {
        fuse: false,
        kernels: false,
        fusions: Fusions::ALL,
        half: false,
        recompute: false,
        group: None,
        stages: StageGroups::WHOLE,
    };
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions { fuse: true, ..PlanOptions::AS_RECORDED }
    }
}

/// Where a buffer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// In the arena of its element type and width, from this element on.
    Arena(usize),
    /// In the device memory of this state: index into [`Plan::states`].
    State(usize),
    /// In the memory of this input: index into [`Plan::inputs`].
    Input(usize),
}

/// A tensor of the plan: what it is and where it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Shape, kind, element type, branching.
    pub meta: Meta,
    /// Its reals take 16 bits; only activations, and weights per branch, in the arena.
    pub half: bool,
    /// The first branch that it holds; 0 for a shared tensor.
    pub first: usize,
    /// Number of branches that it holds; 1 for a shared tensor.
    pub count: usize,
    /// Where it lives: in the arena its own place, of a state or an input these branches. Two buffers alive at the same time
    /// share a place only where an operation works in place.
    pub place: Place,
}

impl Buffer {
    /// Elements, over the branches that it holds.
    pub fn elements(&self) -> usize {
        self.meta.len() * self.count
    }

    /// Elements before its first one in its memory: the arena, the state or the input.
    pub fn start(&self) -> usize {
        match self.place {
            Place::Arena(at) => at,
            Place::State(_) | Place::Input(_) => self.first * self.meta.len(),
        }
    }
}

/// Operands and results of one execution of an operation: indices into [`Plan::buffers`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// Operands.
    pub inputs: Vec<usize>,
    /// Results.
    pub outputs: Vec<usize>,
}

impl Args {
    /// Operands and results.
    pub fn buffers(&self) -> impl Iterator<Item = &usize> {
        self.inputs.iter().chain(&self.outputs)
    }
}

/// One launch: an operation on one set of operands, or on several independent ones.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What is computed.
    pub op: Op,
    /// The operand sets; only linear combinations have more than one.
    pub args: Vec<Args>,
    /// The branches it works on. Every per-branch operand and result holds these and no others.
    pub branches: Range<usize>,
    /// The phase of the step.
    pub phase: &'static str,
}

/// A named buffer.
#[derive(Clone, Debug)]
pub struct Port {
    /// Name given on the tape.
    pub name: String,
    /// Shape, kind, element type, branching.
    pub meta: Meta,
    /// Index into [`Plan::buffers`]; `None` for a state or input that the plan neither reads nor writes.
    pub buffer: Option<usize>,
}

/// A plan. See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct Plan {
    /// M, the number of tensors that a per-branch state, input or output holds.
    pub branches: usize,
    /// All tensors.
    pub buffers: Vec<Buffer>,
    /// The work, in order.
    pub launches: Vec<Launch>,
    /// Memory that outlives a run.
    pub states: Vec<Port>,
    /// Memory the host writes before a run.
    pub inputs: Vec<Port>,
    /// Names of the numbers given anew at every run.
    pub scalars: Vec<String>,
    /// Tensors the host may read after a run.
    pub outputs: Vec<Port>,
    /// Branches at a time in each stage, within a group.
    pub stages: StageGroups,
    /// Size of the arena of reals, in elements.
    pub arena_reals: usize,
    /// Size of the arena of 16-bit reals, in elements.
    pub arena_halves: usize,
    /// Size of the arena of indices, in elements.
    pub arena_indices: usize,
}

impl Plan {
    /// Builds the plan of everything that the tape's outputs and assignments need.
    ///
    /// # Errors
    /// When a fused operation does not accept its operands: a defect of a planner pass. [`Error::Usage`](crate::Error::Usage) when the work
    /// or the bytes it moves exceed 64 bits.
    pub fn build(tape: &Tape, options: &PlanOptions) -> Result<Plan> {
        let mut graph = Graph::new(tape);
        let groups = groups::ranges(tape.branches(), options.group);
        if groups.len() > 1 || !options.stages.is_whole() {
            groups::order(&mut graph)?;
        }
        if options.fuse {
            fuse::fuse(&mut graph, options)?;
        }
        graph.remove_dead();
        if options.half {
            half::narrow(&mut graph);
        }
        if groups.len() > 1 {
            groups::divide(&mut graph, &groups)?;
        }
        if !options.stages.is_whole() {
            stages::divide(&mut graph, &options.stages)?;
        }
        graph.copy_old_states();
        graph.copy_pending_assigns();
        graph.check()?;
        graph.check_size()?;
        if options.fuse && options.kernels {
            fuse::gather(&mut graph);
            graph.check()?;
        }
        let launches = if options.fuse { fuse::group_lin_combs(&graph) } else { graph.one_by_one() };
        Ok(Plan { stages: options.stages, ..assemble(graph, launches) })
    }

    /// Branches that its launches work on at a time, at most.
    pub fn largest_group(&self) -> usize {
        let branched = |launch: &&Launch| {
            let mut buffers = launch.args.iter().flat_map(Args::buffers);
            buffers.any(|b| self.buffers[*b].meta.per_branch)
        };
        self.launches.iter().filter(branched).map(|launch| launch.branches.len()).max().unwrap_or(self.branches)
    }

    /// Bytes of all arenas when a real takes `real_bytes`.
    pub fn arena_bytes(&self, real_bytes: usize) -> usize {
        self.arena_reals * real_bytes + self.arena_halves * 2 + self.arena_indices * 4
    }

    /// Bytes of the states when a real takes `real_bytes`.
    pub fn state_bytes(&self, real_bytes: usize) -> usize {
        self.states.iter().map(|s| s.meta.total(self.branches) * real_bytes).sum()
    }

    /// The buffer of `name` among the outputs.
    pub fn output(&self, name: &str) -> Option<&Port> {
        self.outputs.iter().find(|p| p.name == name)
    }
}

fn assemble(graph: Graph, groups: Vec<Vec<usize>>) -> Plan {
    let layout = arena::lay_out(&graph, &groups);
    let mut index = vec![None; graph.metas.len()];
    let mut buffers = Vec::new();
    let mut buffer_of = |t: Tensor| {
        *index[t.index()].get_or_insert_with(|| {
            let (first, count) = graph.span(t);
            let (meta, place) = (graph.metas[t.index()], layout.places[t.index()]);
            buffers.push(Buffer { meta, half: graph.half[t.index()], first, count, place });
            buffers.len() - 1
        })
    };
    let launches = groups
        .iter()
        .map(|group| {
            let first = &graph.nodes[group[0]];
            let args = group
                .iter()
                .map(|&n| Args {
                    inputs: graph.nodes[n].inputs.iter().map(|t| buffer_of(*t)).collect(),
                    outputs: graph.nodes[n].outputs.iter().map(|t| buffer_of(*t)).collect(),
                })
                .collect();
            let branches = group.iter().find_map(|&n| graph.branches_of(&graph.nodes[n])).unwrap_or(0..graph.branches);
            Launch { op: first.op.clone(), args, branches, phase: first.phase }
        })
        .collect();
    let mut ports = |named: &[crate::tape::Named], force: bool| -> Vec<Port> {
        named
            .iter()
            .map(|n| {
                let used = force || layout.used[n.tensor.index()];
                let meta = graph.metas[n.tensor.index()];
                Port { name: n.name.clone(), meta, buffer: used.then(|| buffer_of(n.tensor)) }
            })
            .collect()
    };
    let (states, inputs, outputs) =
        (ports(&graph.states, false), ports(&graph.inputs, false), ports(&graph.outputs, true));
    Plan {
        branches: graph.branches,
        buffers,
        launches,
        states,
        inputs,
        scalars: graph.scalars,
        outputs,
        stages: StageGroups::WHOLE,
        arena_reals: layout.reals,
        arena_halves: layout.halves,
        arena_indices: layout.indices,
    }
}
