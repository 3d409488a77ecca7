//! Linear combinations, masks and per-channel sums.
#![allow(unsafe_code)]

use super::memory::{Out, View};
use super::real::Real;
use super::simd::{map, sums, update, wide};
use rayon::prelude::*;

/// Elements per task.
const GRAIN: usize = 1 << 14;

/// Runs `f(branch, element range)` over branches and pieces of `len` elements, in parallel where it pays.
fn pieces(branches: usize, len: usize, f: impl Fn(usize, std::ops::Range<usize>) + Sync + Send) {
    let per_branch = len.div_ceil(GRAIN).max(1);
    let piece = |i: usize| {
        let (m, p) = (i / per_branch, i % per_branch);
        f(m, p * GRAIN..((p + 1) * GRAIN).min(len));
    };
    match branches * len <= GRAIN {
        true => (0..branches * per_branch).for_each(piece),
        false => (0..branches * per_branch).into_par_iter().for_each(piece),
    }
}

/// One operand of a linear combination.
#[derive(Clone, Copy)]
pub(super) enum Term<'a, T> {
    /// Another tensor.
    Of(View<'a, T>),
    /// What the result's memory holds.
    InPlace,
}

/// `out = Σ c_i x_i` over `count` terms; summed over the branches when `out` is shared and an operand is not.
/// `sum_over` is the number of branches then, else 1.
pub(super) fn lin_comb<'a, T: Real>(
    count: usize,
    term: impl Fn(usize) -> (T, Term<'a, T>) + Sync + Send,
    sum_over: usize,
    out: Out<'_, T>,
) {
    pieces(out.branches(), out.len, |m, range| {
        // SAFETY: pieces are disjoint.
        let dst = unsafe { out.part(m * out.len + range.start, range.len()) };
        wide(
            #[inline(always)]
            || {
                let terms = (0..count).map(&term);
                let in_place = terms.clone().filter(|t| matches!(t.1, Term::InPlace));
                let kept = in_place.fold(T::zero(), |sum, t| sum + t.0);
                if kept == T::zero() {
                    dst.fill(T::zero());
                } else if kept != T::one() {
                    update(dst, [], |o, []| kept * o);
                }
                for (c, term) in terms {
                    let Term::Of(view) = term else { continue };
                    for branch in if sum_over > 1 && view.branched() { 0..sum_over } else { m..m + 1 } {
                        update(dst, [&view.branch(branch)[range.clone()]], |o, [x]| o + c * x);
                    }
                }
            },
        );
    });
}

/// Whether all elements of all `branches` are finite.
pub(super) fn all_finite<T: Real>(x: View<'_, T>, branches: usize) -> bool {
    (0..if x.branched() { branches } else { 1 }).all(|m| x.branch(m).iter().all(|v| v.is_finite()))
}

/// `out = x` where `reference > 0`, else 0; summed over `sum_over` branches.
pub(super) fn mask<T: Real>(x: View<'_, T>, reference: View<'_, T>, sum_over: usize, out: Out<'_, T>) {
    pieces(out.branches(), out.len, |m, range| {
        // SAFETY: pieces are disjoint.
        let dst = unsafe { out.part(m * out.len + range.start, range.len()) };
        let ins = |m: usize| [&x.branch(m)[range.clone()], &reference.branch(m)[range.clone()]];
        let rule = |x: T, r: T| if r > T::zero() { x } else { T::zero() };
        wide(
            #[inline(always)]
            || map(dst, ins(m), |[x, r]| rule(x, r)),
        );
        for branch in 1..sum_over {
            wide(
                #[inline(always)]
                || update(dst, ins(branch), |o, [x, r]| o + rule(x, r)),
            );
        }
    });
}

/// `max(x, 0)`. A NaN stays one, so that a broken network is seen and not hidden.
#[inline(always)]
pub(super) fn positive<T: Real>(x: T) -> T {
    if T::zero() > x { T::zero() } else { x }
}

/// `out = max(x, 0)`.
pub(super) fn relu<T: Real>(x: View<'_, T>, out: Out<'_, T>) {
    pieces(out.branches(), out.len, |m, range| {
        // SAFETY: pieces are disjoint.
        let dst = unsafe { out.part(m * out.len + range.start, range.len()) };
        wide(
            #[inline(always)]
            || map(dst, [&x.branch(m)[range.clone()]], |[x]| positive(x)),
        );
    });
}

/// `out[c] = Σ` of row c; summed over `sum_over` branches.
pub(super) fn channel_sum<T: Real>(x: View<'_, T>, sum_over: usize, out: Out<'_, T>) {
    let (channels, len) = (out.len, x.len / out.len);
    (0..out.total()).into_par_iter().for_each(|i| {
        let (m, c) = (i / channels, i % channels);
        let branches = if sum_over > 1 { 0..sum_over } else { m..m + 1 };
        let rows = branches.map(|m| &x.branch(m)[c * len..(c + 1) * len]);
        let total: f64 = rows
            .map(|row| {
                wide(
                    #[inline(always)]
                    || sums([row], |v| v),
                )[0]
            })
            .sum();
        // SAFETY: element i belongs to this task.
        unsafe { out.part(i, 1)[0] = T::of(total) };
    });
}

/// Row c of `out` is filled with `x[c]`, summed over `sum_over` branches, times `factor`.
pub(super) fn channel_broadcast<T: Real>(x: View<'_, T>, sum_over: usize, factor: T, out: Out<'_, T>) {
    let (channels, len) = (x.len, out.len / x.len);
    (0..out.branches() * channels).into_par_iter().for_each(|i| {
        let (m, c) = (i / channels, i % channels);
        let branches = if sum_over > 1 { 0..sum_over } else { m..m + 1 };
        let value = branches.fold(T::zero(), |sum, m| sum + x.branch(m)[c]);
        // SAFETY: row i belongs to this task.
        unsafe { out.part(i * len, len) }.fill(value * factor);
    });
}
