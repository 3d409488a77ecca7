//! Cases of the update of a step's states.

use super::table::fixed;
use super::{Bad, Case, Data};
use crate::ops::{Chain, Link, Term, Update};
use crate::tape::{Coef, Meta};

const NAMES: [&str; 18] = [
    "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17",
];

/// A result: its terms, and the operand that it keeps.
fn link(terms: &[(f64, usize)], kept: usize) -> Link {
    let of = |&(coef, of): &(f64, usize)| Term { coef: Coef::constant(coef), of };
    Link { terms: terms.iter().map(of).collect(), kept: Some(kept) }
}

/// The chains of a step: SGD and the teacher of v, g, θ, t; SGD of a gradient in three parts at parameters that are not the state; a running
/// statistic; a copy.
fn chains() -> [Chain; 4] {
    let joint = vec![
        link(&[(0.9, 0), (0.25, 1), (1e-3, 2)], 0),
        link(&[(1.0, 2), (-0.1, 4)], 2),
        link(&[(0.99, 3), (0.01, 2)], 3),
    ];
    let parts = vec![
        link(&[(0.9, 0), (1.0, 1), (0.5, 2), (2.0, 3), (1e-3, 4)], 0),
        link(&[(1.0, 4), (-0.1, 6)], 5),
        // Of results alone, in another order than that in which they are made.
        link(&[(0.75, 7), (-0.25, 6)], 4),
    ];
    let chain = |operands, links| Chain { operands, links };
    [
        chain(4, joint),
        chain(6, parts),
        chain(2, vec![link(&[(0.9, 0), (0.1, 1)], 0)]),
        chain(2, vec![link(&[(1.0, 1)], 0)]),
    ]
}

/// Updates of tensors of these shapes, one for each chain: guarded and not, taken and not.
pub fn updates() -> Vec<Case> {
    let shapes = [
        [Meta::vector(1), Meta::vector(3), Meta::vector(5), Meta::vector(2)],
        [Meta::vector(1023), Meta::vector(1), Meta::weight(5, 3, 3, 3), Meta::vector(64)],
        [Meta::weight(8, 16, 3, 3), Meta::weight(7, 13, 1, 1), Meta::vector(2049), Meta::vector(31)],
        [Meta::weight(16, 8, 3, 3), Meta::weight(33, 7, 5, 5), Meta::vector(4096), Meta::vector(2048)],
    ];
    let mut cases = Vec::new();
    for metas in shapes {
        let sizes = metas.map(|meta| meta.to_string()).join(" ");
        for (what, guard, bad) in [
            ("always", None, None),
            ("taken", Some((1.0, 1.0)), None),
            ("taken as well", Some((-2.0, 0.5)), None),
            ("not taken", Some((1.0, 0.0)), None),
            ("not wanted", Some((0.0, 1.0)), None),
            ("not taken, infinite", Some((1.0, 0.0)), Some(Bad::Infinite)),
            ("not taken, none", Some((1.0, 0.0)), Some(Bad::None)),
        ] {
            cases.push(case(&metas, &format!("{sizes} {what}"), guard, bad));
        }
    }
    cases
}

/// `guard`: its factor and its value; `bad`: what stands in the second operand of each chain, its gradient.
fn case(metas: &[Meta; 4], text: &str, guard: Option<(f64, f64)>, bad: Option<Bad>) -> Case {
    let mut chains = chains();
    if guard.is_none() {
        chains.iter_mut().flat_map(|chain| &mut chain.links).for_each(|link| link.kept = None);
    }
    let mut names = NAMES.into_iter();
    let mut operands = Vec::new();
    for (chain, meta) in chains.iter().zip(metas) {
        for (i, name) in names.by_ref().take(chain.operands).enumerate() {
            let data = bad.filter(|_| i == 1).map_or(Data::Normal, |bad| Data::Planted(bad, -1));
            operands.push(fixed(name, *meta, data));
        }
    }
    operands.extend(guard.map(|(_, value)| fixed("guard", Meta::vector(1), Data::Constant(value))));
    let results: usize = chains.iter().map(|chain| chain.links.len()).sum();
    let op = Update { chains: chains.into(), guard: guard.map(|(factor, _)| Coef::constant(factor)) };
    let case = Case::new(op.into(), text, 1, operands, &vec![false; results]);
    let held = guard.is_some_and(|(factor, value)| factor * value == 0.0);
    Case { tolerance: if held { 0.0 } else { 1e-6 }, ..case }
}
