//! The end of a step: what all its states become, each element read once and written once.

use super::{Operation, PullbackArgs, any_branched, third_order};
use crate::error::{Error, Result};
use crate::tape::{Coef, Kind, Meta, Tape, Tensor};
use std::ops::Range;

/// A term of a [`Link`]: `coef · x`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// The coefficient.
    pub coef: Coef,
    /// x, counted through the chain: its operands, then its results.
    pub of: usize,
}

/// One result of a [`Chain`]: the sum of its terms, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    /// What is added up: operands, and results of the links before.
    pub terms: Vec<Term>,
    /// The operand that the result is where an [`Update`] does not take place; `None` where it always does.
    pub kept: Option<usize>,
}

/// Results that follow from the same operands, all of one shape: `x_1, …, x_n → y_1, …, y_k` with `y_j = Σ_i c_ji x_i + Σ_{l<j} d_jl y_l`.
///
/// SGD is one of two links, of the velocity v, the gradient g and the parameter θ: `v' = μ v + g + λ θ`, `θ' = θ − lr v'`; a teacher's moving
/// average is a third, `γ t + (1−γ) θ'`.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    /// Number of operands: at most [`Update::MOST_OPERANDS`].
    pub operands: usize,
    /// Its results, in order: at most [`Update::MOST_RESULTS`].
    pub links: Vec<Link>,
}

impl Chain {
    /// Number of the first operands that contain all that its terms are of; those behind are only kept.
    pub fn loads(&self) -> usize {
        let terms = self.links.iter().flat_map(|link| &link.terms);
        terms.filter(|term| term.of < self.operands).map(|term| term.of + 1).max().unwrap_or(0)
    }

    fn is_sound(&self, guarded: bool) -> bool {
        let link = |(j, link): (usize, &Link)| {
            let there = link.terms.iter().all(|term| term.of < self.operands + j);
            let kept = link.kept.map_or(!guarded, |kept| guarded && kept < self.operands);
            there && kept && !link.terms.is_empty()
        };
        (1..=Update::MOST_OPERANDS).contains(&self.operands)
            && (1..=Update::MOST_RESULTS).contains(&self.links.len())
            && self.links.iter().enumerate().all(link)
    }
}

/// All [`Chain`]s of a step in one launch: operands those of the chains, one chain after the other, results likewise. Made by the planner for
/// the CUDA kernels; it stands for as many linear combinations as it has results, guarded or not.
///
/// An element's operands are read before its results are written, so that a result may lie where any operand of its own chain does.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The chains. No tensor is an operand of two.
    pub chains: Vec<Chain>,
    /// There is one more operand, a vector of one value: where that times this coefficient is 0, every result is the operand that it keeps, as it
    /// is.
    pub guard: Option<Coef>,
}

/// A chain of an [`Update`] with the positions of its tensors.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The chain.
    pub chain: &'a Chain,
    /// Its operands among those of the operation.
    pub operands: Range<usize>,
    /// Its results among those of the operation.
    pub results: Range<usize>,
}

impl Update {
    /// Operands that a chain can have.
    pub const MOST_OPERANDS: usize = 6;
    /// Results that a chain can have.
    pub const MOST_RESULTS: usize = 3;

    /// The chains and where their tensors stand.
    pub fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        self.chains.iter().scan((0, 0), |(operands, results), chain| {
            let (i, o) = (*operands, *results);
            (*operands, *results) = (i + chain.operands, o + chain.links.len());
            Some(Part { chain, operands: i..*operands, results: o..*results })
        })
    }

    /// Position of the guard, if there is one.
    pub fn guard_operand(&self) -> Option<usize> {
        self.guard.map(|_| self.chains.iter().map(|chain| chain.operands).sum())
    }

    /// Whether operand `i` and result `o` are of one chain.
    pub(super) fn is_of_one_chain(&self, i: usize, o: usize) -> bool {
        self.parts().any(|part| part.operands.contains(&i) && part.results.contains(&o))
    }
}

impl Operation for Update {
    fn name(&self) -> &'static str {
        "update"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let operands: usize = self.chains.iter().map(|chain| chain.operands).sum();
        if inputs.len() != operands + usize::from(self.guard.is_some()) {
            return Err(Error::shape(self.name(), format!("{} operands", inputs.len())));
        }
        if any_branched(inputs) || inputs.iter().any(|meta| meta.kind == Kind::Activation) {
            return Err(Error::shape(self.name(), "an operand per branch, or an activation"));
        }
        if !self.chains.iter().all(|chain| chain.is_sound(self.guard.is_some())) {
            return Err(Error::shape(self.name(), "a chain that its kernel does not have"));
        }
        let (mut want, mut results) = (Vec::with_capacity(inputs.len()), Vec::new());
        for part in self.parts() {
            let meta = inputs[part.operands.start];
            want.extend(part.operands.map(|_| meta));
            results.extend(part.results.map(|_| meta));
        }
        want.extend(self.guard.map(|_| Meta::vector(1)));
        super::expect(self.name(), inputs, &want)?;
        Ok(results)
    }

    fn pullback(&self, _: &mut Tape, _: &PullbackArgs<'_>) -> Result<Vec<Option<Tensor>>> {
        Err(third_order(self.name(), "operands of a fused operation"))
    }

    fn flops(&self, _: &[Meta], outputs: &[Meta], _: usize) -> u64 {
        let links = self.chains.iter().flat_map(|chain| &chain.links);
        links.zip(outputs).map(|(link, meta)| ((2 * link.terms.len() - 1) * meta.len()) as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::{Chain, Link, Term, Update};
    use crate::ops::Operation;
    use crate::tape::{Coef, Meta};

    fn link(of: &[usize], kept: Option<usize>) -> Link {
        Link { terms: of.iter().map(|of| Term { coef: Coef::ONE, of: *of }).collect(), kept }
    }

    fn update(chains: &[(usize, Vec<Link>)], guarded: bool) -> Update {
        let chains = chains.iter().map(|(operands, links)| Chain { operands: *operands, links: links.clone() });
        Update { chains: chains.collect(), guard: guarded.then_some(Coef::ONE) }
    }

    #[test]
    fn a_chain_refers_to_what_is_there() {
        let metas = [vec![Meta::vector(5); 3], vec![Meta::weight(2, 3, 1, 1); 2], vec![Meta::vector(1)]].concat();
        let two = |first: Vec<Link>| update(&[(3, first), (2, vec![link(&[0, 1], Some(0))])], true);
        let good = two(vec![link(&[0, 1], Some(2)), link(&[2, 3], Some(0))]);
        assert_eq!(good.infer(&metas).unwrap(), [metas[0], metas[0], metas[3]]);
        assert_eq!(good.flops(&metas, &good.infer(&metas).unwrap(), 1), 3 * (5 + 5 + 6));
        assert_eq!((good.guard_operand(), good.chains[0].loads(), good.chains[1].loads()), (Some(5), 3, 2));
        assert!(good.is_of_one_chain(2, 1) && !good.is_of_one_chain(2, 2) && !good.is_of_one_chain(5, 2));
        // A result that is not there yet, an operand that is none, nothing kept, nothing added, more results than there can be.
        let bad = [
            vec![link(&[0, 3], Some(0))],
            vec![link(&[0], Some(3))],
            vec![link(&[0], None)],
            vec![link(&[], Some(0))],
            vec![link(&[0], Some(0)); Update::MOST_RESULTS + 1],
        ];
        bad.into_iter().for_each(|first| assert!(two(first.clone()).infer(&metas).is_err(), "{first:?}"));
        assert!(good.infer(&metas[..5]).is_err());
        assert!(good.infer(&[&metas[..2], &metas[3..4], &metas[3..]].concat()).is_err());
        assert!(good.infer(&metas.iter().map(|m| m.branched()).collect::<Vec<_>>()).is_err());
        let free = update(&[(3, vec![link(&[0, 1], None)])], false);
        assert_eq!(free.infer(&metas[..3]).unwrap(), [metas[0]]);
        assert!(update(&[(3, vec![link(&[0, 1], Some(0))])], false).infer(&metas[..3]).is_err());
    }
}
