//! What every device asks of a plan before it runs it.

use crate::error::{Error, Result};
use crate::ops::{Op, Operation};
use crate::plan::{Buffer, Place, Plan};
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
    let found = check_places(plan)
        .and_then(|()| check_types(plan))
        .and_then(|()| check_starts(plan))
        .and_then(|()| check_aliasing(plan));
    found.map_err(|what| Error::Device { device: device.into(), what })
}

fn check_places(plan: &Plan) -> std::result::Result<(), String> {
    for buffer in &plan.buffers {
        let meta = &buffer.meta;
        let inside = match (buffer.place, meta.dtype) {
            (Place::Arena(at), DType::Real) if buffer.half => at + meta.total(plan.branches) <= plan.arena_halves,
            (Place::Arena(at), DType::Real) => at + meta.total(plan.branches) <= plan.arena_reals,
            (Place::Arena(at), DType::Index) => at + meta.total(plan.branches) <= plan.arena_indices,
            (Place::State(i), dtype) => plan.states.get(i).is_some_and(|s| s.meta == *meta) && dtype == DType::Real,
            (Place::Input(i), _) => plan.inputs.get(i).is_some_and(|s| s.meta == *meta),
        };
        if !inside {
            return Err(format!("a tensor ({meta}) does not lie in its memory, or is a state of indices"));
        }
        if buffer.half
            && !matches!((buffer.place, meta.kind, meta.dtype), (Place::Arena(_), Kind::Activation, DType::Real))
        {
            return Err(format!("a tensor ({meta}) takes 16 bits and is no activation in the arena"));
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
            _ => None,
        };
        let branched = |b: usize| plan.buffers[b].meta.per_branch;
        let begins = |inputs: &[usize]| start.and_then(|i| inputs.get(i)).is_some_and(|b| branched(*b));
        if launch.args.iter().any(|a| begins(&a.inputs) && !branched(a.outputs[0])) {
            let what = "a result that is shared cannot start from values per branch";
            return Err(format!("{}: {what}", launch.op.name()));
        }
    }
    Ok(())
}

fn check_aliasing(plan: &Plan) -> std::result::Result<(), String> {
    let span = |b: &Buffer| {
        let len = b.meta.total(plan.branches);
        let (space, from) = match b.place {
            Place::Arena(at) if b.half => ((4, 0), at),
            Place::Arena(at) => (if b.meta.dtype == DType::Real { (0, 0) } else { (1, 0) }, at),
            Place::State(i) => ((2, i), 0),
            Place::Input(i) => ((3, i), 0),
        };
        (space, from, from + len)
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
                let input = inputs.iter().enumerate().any(|(i, input)| {
                    let whole = (input.place, input.meta, input.half) == (out.place, out.meta, out.half);
                    overlap(input, out) && !(whole && launch.op.works_in_place(i, summed))
                });
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
