//! Plans of single fused operations, with copies between tensors of 32 and 16 bits.

use super::case::{Case, Operand, geom};
use mlnt::ops::{Conv, ConvKind, Op};
use mlnt::plan::{Args, Buffer, Launch, Place, Plan, Port};
use mlnt::tape::{Kind, Meta};

/// A plan of the fused operation.
pub fn fused(case: &Case, operands: &[Operand]) -> Plan {
    let mut plan = Plan {
        branches: case.branches,
        buffers: Vec::new(),
        launches: Vec::new(),
        states: Vec::new(),
        inputs: Vec::new(),
        scalars: Vec::new(),
        outputs: Vec::new(),
        arena_reals: 0,
        arena_halves: 0,
        arena_indices: 0,
    };
    let mut inputs = Vec::new();
    for operand in operands {
        let given = input(&mut plan, &operand.name, operand.meta);
        inputs.push(if operand.half { copied(&mut plan, given, true) } else { given });
    }
    let mut outputs = Vec::new();
    for (i, meta) in case.results().into_iter().enumerate() {
        let half = i == 0 && meta.kind == Kind::Activation && case.half >> 5 & 1 == 1;
        outputs.push(tensor(&mut plan, meta, half));
    }
    launch(&mut plan, Op::FusedConv(case.op), inputs, outputs.clone());
    for (i, buffer) in outputs.into_iter().enumerate() {
        let buffer = if plan.buffers[buffer].half { copied(&mut plan, buffer, false) } else { buffer };
        let meta = plan.buffers[buffer].meta;
        plan.outputs.push(Port { name: format!("out{i}"), meta, buffer: Some(buffer) });
    }
    plan
}

fn tensor(plan: &mut Plan, meta: Meta, half: bool) -> usize {
    let arena = if half { &mut plan.arena_halves } else { &mut plan.arena_reals };
    let count = if meta.per_branch { plan.branches } else { 1 };
    plan.buffers.push(Buffer { meta, half, first: 0, count, place: Place::Arena(*arena) });
    *arena += meta.total(plan.branches).next_multiple_of(64);
    plan.buffers.len() - 1
}

fn input(plan: &mut Plan, name: &str, meta: Meta) -> usize {
    let count = if meta.per_branch { plan.branches } else { 1 };
    plan.buffers.push(Buffer { meta, half: false, first: 0, count, place: Place::Input(plan.inputs.len()) });
    let buffer = Some(plan.buffers.len() - 1);
    plan.inputs.push(Port { name: name.into(), meta, buffer });
    plan.buffers.len() - 1
}

fn launch(plan: &mut Plan, op: Op, inputs: Vec<usize>, outputs: Vec<usize>) {
    let per_branch = |b: &usize| plan.buffers[*b].meta.per_branch;
    let live = if inputs.iter().chain(&outputs).any(per_branch) { plan.branches } else { 1 };
    plan.launches.push(Launch { op, args: vec![Args { inputs, outputs }], phase: "case", branches: 0..live });
}

/// The same numbers in the other width: a convolution with the identity.
fn copied(plan: &mut Plan, from: usize, half: bool) -> usize {
    let meta = plan.buffers[from].meta;
    let [n, c, h, w] = meta.dims;
    let name = format!("identity{c}");
    let identity = match plan.inputs.iter().find(|p| p.name == name) {
        Some(port) => port.buffer.unwrap(),
        None => input(plan, &name, Meta::weight(c, c, 1, 1)),
    };
    let to = tensor(plan, meta, half);
    let conv = Conv { kind: ConvKind::Fprop, geom: geom([n, c, h, w, c, 1, 1, 1, 0]) };
    launch(plan, Op::Conv(conv), vec![from, identity], vec![to]);
    to
}
