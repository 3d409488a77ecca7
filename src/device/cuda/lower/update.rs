//! What the states become at the end of a step: `kernels/update.cu`.

use super::Lowering;
use crate::device::cuda::driver::Address;
use crate::error::Result;
use crate::ops::{Chain, Update};
use crate::plan::Args;
use crate::tape::Coef;
use bytemuck::{Pod, Zeroable};

/// Threads of a block.
const THREADS: usize = 256;
/// Elements of a block: two times four of a thread.
const CHUNK: usize = THREADS * 8;

const OPERANDS: usize = Update::MOST_OPERANDS;
const RESULTS: usize = Update::MOST_RESULTS;

/// A term of a result.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UpdateTerm {
    slot: i32,
    coef: i32,
}
const _: () = assert!(size_of::<UpdateTerm>() == 8);

/// What chains have in common whose tensors differ.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UpdateForm {
    loads: i32,
    links: i32,
    first: i32,
    ends: [i32; RESULTS],
    kept: [i32; RESULTS],
    unused: i32,
}
const _: () = assert!(size_of::<UpdateForm>() == 40);

/// The tensors of one chain.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UpdateSet {
    x: [Address; OPERANDS],
    y: [Address; RESULTS],
    len: i64,
    form: i32,
    unused: i32,
}
const _: () = assert!(size_of::<UpdateSet>() == 88);

/// What one block does.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UpdatePiece {
    set: i32,
    chunk: i32,
}
const _: () = assert!(size_of::<UpdatePiece>() == 8);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UpdateParams {
    sets: Address,
    forms: Address,
    terms: Address,
    pieces: Address,
    coefs: Address,
    guard: Address,
    factor: Address,
}
const _: () = assert!(size_of::<UpdateParams>() == 56);

/// Position of `item` in `list`, at whose end it is put where it is not there yet.
fn position<T: PartialEq>(list: &mut Vec<T>, item: T) -> usize {
    list.iter().position(|known| *known == item).unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    })
}

/// All chains of an update in one launch.
pub(super) fn update(lowering: &mut Lowering<'_>, op: &Update, args: &Args) -> Result<()> {
    let mut chains: Vec<&Chain> = Vec::new();
    let (mut sets, mut pieces) = (Vec::new(), Vec::new());
    for (s, part) in op.parts().enumerate() {
        let mut set = UpdateSet::zeroed();
        for (x, i) in set.x.iter_mut().zip(part.operands) {
            *x = lowering.input(args, i).at;
        }
        let mut len = 0;
        for (y, o) in set.y.iter_mut().zip(part.results) {
            let result = lowering.output(args, o);
            (*y, len) = (result.at, result.len());
        }
        (set.len, set.form) = (len as i64, lowering.narrow("kinds of chains", position(&mut chains, part.chain))?);
        let (number, chunks) = (lowering.narrow("chains", s)?, lowering.narrow("blocks", len.div_ceil(CHUNK))?);
        pieces.extend((0..chunks).map(|chunk| UpdatePiece { set: number, chunk }));
        sets.push(set);
    }
    let (mut forms, mut terms, mut coefs) = (Vec::new(), Vec::new(), Vec::<Coef>::new());
    for chain in chains {
        let mut form = UpdateForm::zeroed();
        form.loads = lowering.narrow("operands", chain.loads())?;
        form.links = lowering.narrow("results", chain.links.len())?;
        form.first = lowering.narrow("terms", terms.len())?;
        for (j, link) in chain.links.iter().enumerate() {
            for term in &link.terms {
                let slot = if term.of < chain.operands { term.of } else { OPERANDS + term.of - chain.operands };
                let coef = lowering.narrow("coefficients", position(&mut coefs, term.coef))?;
                terms.push(UpdateTerm { slot: lowering.narrow("operands", slot)?, coef });
            }
            form.ends[j] = lowering.narrow("terms", terms.len())?;
            form.kept[j] = lowering.narrow("operands", link.kept.unwrap_or(0))?;
        }
        forms.push(form);
    }
    let guard = op.guard_operand().map_or(Address::NULL, |i| lowering.input(args, i).at);
    let params = UpdateParams {
        sets: lowering.table(&sets),
        forms: lowering.table(&forms),
        terms: lowering.table(&terms),
        pieces: lowering.table(&pieces),
        coefs: lowering.coefs(&coefs),
        guard,
        factor: op.guard.map_or(Address::NULL, |factor| lowering.coefs(&[factor])),
    };
    lowering.push("update_f32", &params, [pieces.len(), 1, 1], THREADS, 0);
    Ok(())
}
