//! What a plan costs, without running it.

use super::{Buffer, Launch, Plan};
use crate::ops::Operation;
use crate::tape::{DType, Meta};
use serde::Serialize;

/// Operands or results whose shapes a label gives: what is beyond is a list of parameters.
const NAMED: usize = 32;

/// Work of one phase.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PhaseCost {
    /// Name of the phase.
    pub phase: String,
    /// Floating-point operations.
    pub flops: u64,
    /// Launches.
    pub launches: usize,
    /// Bytes read and written when every kernel reads each of its operands once and writes every result once.
    pub bytes_moved: u64,
}

/// Work of one kind of operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OperationCost {
    /// Name of the operation.
    pub operation: &'static str,
    /// Floating-point operations.
    pub flops: u64,
    /// Launches.
    pub launches: usize,
    /// Bytes read and written when every kernel reads each of its operands once and writes every result once.
    pub bytes_moved: u64,
}

/// Work of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// By phase, in order of first appearance.
    pub phases: Vec<PhaseCost>,
    /// The same work by operation, most bytes first.
    pub operations: Vec<OperationCost>,
}

impl Cost {
    /// Floating-point operations of the whole plan.
    pub fn flops(&self) -> u64 {
        self.phases.iter().map(|p| p.flops).sum()
    }
    /// Launches of the whole plan.
    pub fn launches(&self) -> usize {
        self.phases.iter().map(|p| p.launches).sum()
    }
    /// Bytes read and written by the whole plan.
    pub fn bytes_moved(&self) -> u64 {
        self.phases.iter().map(|p| p.bytes_moved).sum()
    }
}

impl Plan {
    /// Counts the plan's work; `real_bytes` is the size of a real.
    pub fn cost(&self, real_bytes: usize) -> Cost {
        let mut cost = Cost::default();
        for launch in &self.launches {
            let (flops, bytes) = self.launch_cost(launch, real_bytes);
            let at = cost.phases.iter().position(|p| p.phase == launch.phase).unwrap_or_else(|| {
                cost.phases.push(PhaseCost { phase: launch.phase.to_string(), ..PhaseCost::default() });
                cost.phases.len() - 1
            });
            let phase = &mut cost.phases[at];
            phase.flops += flops;
            phase.launches += 1;
            phase.bytes_moved += bytes;
            let name = launch.op.name();
            let at = cost.operations.iter().position(|o| o.operation == name).unwrap_or_else(|| {
                cost.operations.push(OperationCost { operation: name, ..OperationCost::default() });
                cost.operations.len() - 1
            });
            let operation = &mut cost.operations[at];
            operation.flops += flops;
            operation.launches += 1;
            operation.bytes_moved += bytes;
        }
        cost.operations.sort_by_key(|o| std::cmp::Reverse(o.bytes_moved));
        cost
    }

    /// Operation and shapes of a launch: of its first operands and results, and how many more there are, and how many more sets it has.
    pub fn launch_label(&self, launch: &Launch) -> String {
        let shapes = |buffers: &[usize]| -> String {
            let texts = buffers.iter().take(NAMED).map(|&b| self.buffers[b].meta.to_string());
            let more = buffers.len().saturating_sub(NAMED);
            let more = if more > 0 { format!(", {more} more") } else { String::new() };
            texts.collect::<Vec<String>>().join(", ") + &more
        };
        let sets: Vec<String> =
            launch.args.iter().take(1).map(|a| format!("{} -> {}", shapes(&a.inputs), shapes(&a.outputs))).collect();
        let more = if launch.args.len() > 1 { format!(" and {} more", launch.args.len() - 1) } else { String::new() };
        format!("{} {}{more}", launch.op.name(), sets.concat())
    }

    /// FLOPs and bytes of one launch.
    pub fn launch_cost(&self, launch: &Launch, real_bytes: usize) -> (u64, u64) {
        let (mut flops, mut bytes) = (0, 0);
        for args in &launch.args {
            let metas = |ids: &[usize]| -> Vec<Meta> { ids.iter().map(|&b| self.buffers[b].meta).collect() };
            let width = |b: &Buffer| match (b.meta.dtype, b.half) {
                (DType::Real, false) => real_bytes,
                (DType::Real, true) => 2,
                (DType::Index, _) => 4,
            };
            let (inputs, outputs) = (metas(&args.inputs), metas(&args.outputs));
            flops += launch.op.flops(&inputs, &outputs, launch.branches.len());
            let again = launch.op.read_twice().iter().map(|&i| &args.inputs[i]);
            let touched = args.inputs.iter().chain(&args.outputs).chain(again).map(|&b| &self.buffers[b]);
            bytes += touched.map(|b| (b.elements() * width(b)) as u64).sum::<u64>();
        }
        (flops, bytes)
    }
}
