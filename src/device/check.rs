//! What every device asks of a plan before it runs it.

use crate::error::{Error, Result};
use crate::ops::{Op, Operation};
use crate::plan::{Args, Buffer, Place, Plan};
use crate::tape::{DType, Kind};

/// Refuses a plan whose buffers do not lie in their memory, whose launches take reals for indices or the other way
/// round, in which a launch would read what it writes, other than where the kernel works in place, or in which a
/// convolution's shared result starts from values per branch.
///
/// This is what makes the slices that the CPU's kernels get sound, and keeps the kernels of a GPU within their memory.
///
/// # Errors
/// [`Error::Device`], naming the operation.
pub(super) fn check(device: &str, plan: &Plan) -> Result<()> {
    let found = check_branches(plan)
        .and_then(|()| check_places(plan))
        .and_then(|()| check_types(plan))
        .and_then(|()| check_starts(plan))
        .and_then(|()| check_aliasing(plan));
    found.map_err(|what| Error::Device { device: device.into(), what })
}

/// What a launch works on holds the branches of the launch, no more and no less.
fn check_branches(plan: &Plan) -> std::result::Result<(), String> {
    let whole = |b: &Buffer| b.first == 0 && b.count == if b.meta.per_branch { plan.branches } else { 1 };
    let mut ports = plan.states.iter().chain(&plan.inputs).chain(&plan.outputs).filter_map(|port| port.buffer);
    if ports.any(|b| !whole(&plan.buffers[b])) {
        return Err("a state, an input or an output lacks branches".into());
    }
    for launch in &plan.launches {
        let fits = |b: &usize| match &plan.buffers[*b] {
            b if b.meta.per_branch => b.first == launch.branches.start && b.count == launch.branches.len(),
            b => b.first == 0 && b.count == 1,
        };
        if launch.branches.end > plan.branches || !launch.args.iter().flat_map(Args::buffers).all(fits) {
            return Err(format!("{}: a tensor does not hold the branches of the launch", launch.op.name()));
        }
    }
    Ok(())
}

fn check_places(plan: &Plan) -> std::result::Result<(), String> {
    for buffer in &plan.buffers {
        let meta = &buffer.meta;
        let inside = match (buffer.place, meta.dtype) {
            (Place::Arena(at), DType::Real) if buffer.half => at + buffer.elements() <= plan.arena_halves,
            (Place::Arena(at), DType::Real) => at + buffer.elements() <= plan.arena_reals,
            (Place::Arena(at), DType::Index) => at + buffer.elements() <= plan.arena_indices,
            (Place::State(i), dtype) => plan.states.get(i).is_some_and(|s| s.meta == *meta) && dtype == DType::Real,
            (Place::Input(i), _) => plan.inputs.get(i).is_some_and(|s| s.meta == *meta),
        };
        if !inside {
            return Err(format!("a tensor ({meta}) does not lie in its memory, or is a state of indices"));
        }
        let may = meta.kind == Kind::Activation || (meta.kind == Kind::Weight && meta.per_branch);
        if buffer.half && !(may && matches!((buffer.place, meta.dtype), (Place::Arena(_), DType::Real))) {
            return Err(format!(
                "a tensor ({meta}) takes 16 bits and is no activation or weight per branch in the arena"
            ));
        }
    }
    if plan.outputs.iter().any(|port| port.buffer.is_some_and(|b| plan.buffers[b].half)) {
        return Err("an output takes 16 bits".into());
    }
    Ok(())
}

fn check_types(plan: &Plan) -> std::result::Result<(), String> {
    for launch in &plan.launches {
        // The operands and results of an operation that are indices.
        let (operands, results): (&[usize], &[usize]) = match launch.op {
            Op::MaxPoolIndex(_) | Op::NearestNeighbours(_) => (&[], &[0]),
            Op::PoolGather(_) | Op::PoolScatter(_) | Op::CeLoss(_) | Op::CeGrad(_) => (&[1], &[]),
            Op::TransferLabels(_) => (&[0, 1, 2], &[0]),
            _ => (&[], &[]),
        };
        for args in &launch.args {
            let fits = |ids: &[usize], indices: &[usize]| {
                let is_index = |b: &usize| plan.buffers[*b].meta.dtype == DType::Index;
                ids.iter().enumerate().all(|(i, b)| is_index(b) == indices.contains(&i))
            };
            if !fits(&args.inputs, operands) || !fits(&args.outputs, results) {
                return Err(format!("{}: takes reals where it was given indices", launch.op.name()));
            }
        }
    }
    Ok(())
}

/// A sum over branches begins once, at what the operand holds that is added to it.
fn check_starts(plan: &Plan) -> std::result::Result<(), String> {
    for launch in &plan.launches {
        let start = match &launch.op {
            Op::Conv(_) => Some(2),
            Op::FusedConv(op) => op.start_operand(),
            Op::BnReluBackward(_) => Some(6),
            Op::BnReluBackwardApply(op) => Some(op.first_start()),
            Op::BnReluDoubleBackwardApply(_) => Some(12),
            _ => None,
        };
        let branched = |b: usize| plan.buffers[b].meta.per_branch;
        // What is added comes last.
        let begins =
            |inputs: &[usize]| start.and_then(|i| inputs.get(i..)).is_some_and(|s| s.iter().any(|b| branched(*b)));
        if launch.args.iter().any(|a| begins(&a.inputs) && !branched(a.outputs[0])) {
            let what = "a result that is shared cannot start from values per branch";
            return Err(format!("{}: {what}", launch.op.name()));
        }
    }
    Ok(())
}

fn check_aliasing(plan: &Plan) -> std::result::Result<(), String> {
    let span = |b: &Buffer| {
        let space = match b.place {
            Place::Arena(_) if b.half => (4, 0),
            Place::Arena(_) => (if b.meta.dtype == DType::Real { 0 } else { 1 }, 0),
            Place::State(i) => (2, i),
            Place::Input(i) => (3, i),
        };
        (space, b.start(), b.start() + b.elements())
    };
    let overlap = |a: &Buffer, b: &Buffer| {
        let ((sa, fa, ta), (sb, fb, tb)) = (span(a), span(b));
        sa == sb && fa < tb && fb < ta
    };
    for launch in &plan.launches {
        for args in &launch.args {
            let buffers = |ids: &[usize]| -> Vec<Buffer> { ids.iter().map(|&b| plan.buffers[b]).collect() };
            let (inputs, outputs) = (buffers(&args.inputs), buffers(&args.outputs));
            for (o, out) in outputs.iter().enumerate() {
                let other_output = outputs[..o].iter().any(|other| overlap(other, out));
                let summed = !out.meta.per_branch && inputs.iter().any(|b| b.meta.per_branch);
                let input = inputs
                    .iter()
                    .enumerate()
                    .any(|(i, input)| overlap(input, out) && !(input == out && launch.op.works_in_place(i, o, summed)));
                let constant = matches!(out.place, Place::Input(_));
                if other_output || input || constant {
                    let what = format!("{}: result {o} ({}) is laid over something else", launch.op.name(), out.meta);
                    return Err(what);
                }
            }
        }
        // The operand sets of a launch run side by side.
        let buffer = |b: &usize| &plan.buffers[*b];
        for (a, args) in launch.args.iter().enumerate() {
            let others = launch.args.iter().enumerate().filter(|(b, _)| *b != a).map(|(_, other)| other);
            let mut touched = others.flat_map(|other| other.inputs.iter().chain(&other.outputs));
            if touched.any(|t| args.outputs.iter().any(|o| overlap(buffer(o), buffer(t)))) {
                return Err(format!("{}: a result is laid over a tensor of another set", launch.op.name()));
            }
        }
    }
    Ok(())
}
