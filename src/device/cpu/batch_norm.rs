//! Batch norm at three orders, row by row: on this device a channel of a branch is one contiguous row.
//! Formulas: [`crate::ops`], batch norm.
#![allow(unsafe_code)]

use super::elementwise::positive;
use super::memory::{Out, View};
use super::real::Real;
use super::simd::{map, sums, update, wide};
use crate::ops::BN_EPS;
use rayon::prelude::*;

/// Elements of a row that pass 2 of the double backward handles for all branches before it moves on.
const STRIP: usize = 4096;

/// Statistics of one row as the kernels use them.
#[derive(Clone, Copy)]
struct Stats<T> {
    mean: T,
    /// 1/√(σ²+ε)
    r: T,
}

impl<T: Real> Stats<T> {
    fn new(mean: T, var: T) -> Self {
        Stats { mean, r: T::of(1.0 / (var.f64() + BN_EPS).sqrt()) }
    }
    #[inline(always)]
    fn hat(self, x: T) -> T {
        (x - self.mean) * self.r
    }
}

/// Row `c` of branch `m` of an activation.
#[inline(always)]
fn row<'a, T>(view: View<'a, T>, m: usize, c: usize, len: usize) -> &'a [T] {
    &view.branch(m)[c * len..(c + 1) * len]
}

#[inline(always)]
fn keep<T: Real>(value: T, reference: T) -> T {
    if reference > T::zero() { value } else { T::zero() }
}

/// Mean and biased variance of a row: the mean first, then squares around it.
fn statistics<T: Real>(x: &[T]) -> (T, T) {
    let n = x.len() as f64;
    let mean = T::of(
        wide(
            #[inline(always)]
            || sums([x], |v| v),
        )[0] / n,
    );
    let [first, second] = wide(
        #[inline(always)]
        || {
            sums([x], |[v]| {
                let d = v - mean;
                [d, d * d]
            })
        },
    );
    // The rounding error of the mean is taken out of the variance.
    (mean, T::of(second / n - (first / n) * (first / n)))
}

fn normalise<T: Real>(x: &[T], y: &mut [T], stats: Stats<T>, g: T, b: T, relu: bool) {
    wide(
        #[inline(always)]
        || match relu {
            true => map(y, [x], |[x]| positive(g * stats.hat(x) + b)),
            false => map(y, [x], |[x]| g * stats.hat(x) + b),
        },
    );
}

/// `(x, g, b) → (y, mean, var)`.
pub(super) fn forward<T: Real>(relu: bool, ins: [View<'_, T>; 3], outs: [Out<'_, T>; 3], channels: usize) {
    let ([x, g, b], [y, mean, var]) = (ins, outs);
    let len = x.len / channels;
    // With shared x and per-branch gains one row's statistics serve all branches.
    let repeats = if y.branched() && !x.branched() { y.branches() } else { 1 };
    (0..mean.total()).into_par_iter().for_each(|i| {
        let (m, c) = (i / channels, i % channels);
        let source = row(x, m, c, len);
        let (mu, sigma2) = statistics(source);
        // SAFETY: element i of the statistics, and the rows computed from it, belong to this task.
        unsafe {
            mean.part(i, 1)[0] = mu;
            var.part(i, 1)[0] = sigma2;
            for m in m..m + repeats {
                let target = y.part((m * channels + c) * len, len);
                normalise(source, target, Stats::new(mu, sigma2), g.branch(m)[c], b.branch(m)[c], relu);
            }
        }
    });
}

/// `(x, g, b, mean, var) → y` with given statistics.
pub(super) fn eval<T: Real>(relu: bool, ins: [View<'_, T>; 5], y: Out<'_, T>, channels: usize) {
    let [x, g, b, mean, var] = ins;
    let len = x.len / channels;
    (0..y.total() / len).into_par_iter().for_each(|i| {
        let (m, c) = (i / channels, i % channels);
        let stats = Stats::new(mean.branch(m)[c], var.branch(m)[c]);
        // SAFETY: row i belongs to this task.
        let target = unsafe { y.part(i * len, len) };
        normalise(row(x, m, c, len), target, stats, g.branch(m)[c], b.branch(m)[c], relu);
    });
}

/// Work items of a kernel over channels whose results may be sums over branches: `(channel, branches)` where the
/// branches of one item must stay with one task.
fn items(
    channels: usize,
    branches: usize,
    summed: bool,
) -> impl IndexedParallelIterator<Item = (usize, std::ops::Range<usize>)> {
    let count = if summed { channels } else { channels * branches };
    (0..count).into_par_iter().map(move |i| match summed {
        true => (i, 0..branches),
        false => (i % channels, i / channels..i / channels + 1),
    })
}

/// Adds `value` to the element of a per-channel result that channel `c` of branch `m` counts towards.
///
/// # Safety
/// The element belongs to the calling task, which calls first with `first`.
unsafe fn put<T: Real>(out: Out<'_, T>, m: usize, c: usize, value: f64, first: bool) {
    let channels = out.len;
    let at = if out.branched() { m * channels + c } else { c };
    // SAFETY: the caller's promise.
    let slot = unsafe { &mut out.part(at, 1)[0] };
    *slot = if first || out.branched() { T::of(value) } else { *slot + T::of(value) };
}

/// `(dy, x, g, mean, var[, y]) → (dx, dg, db)`.
pub(super) fn backward<T: Real>(
    branches: usize,
    ins: [View<'_, T>; 5],
    y: Option<View<'_, T>>,
    outs: [Out<'_, T>; 3],
    channels: usize,
) {
    let ([dy, x, g, mean, var], [dx, dg, db]) = (ins, outs);
    let len = x.len / channels;
    let n = len as f64;
    let live = if ins.iter().chain(&y).any(View::branched) { branches } else { 1 };
    let summed = live > 1 && outs.iter().any(|o| !o.branched());
    items(channels, live, summed).for_each(|(c, range)| {
        for m in range.clone() {
            let first = m == range.start;
            let stats = Stats::new(mean.branch(m)[c], var.branch(m)[c]);
            let (dy, x, gain) = (row(dy, m, c, len), row(x, m, c, len), g.branch(m)[c]);
            let y = y.map(|y| row(y, m, c, len));
            let [sum_dy, sum_dy_hat] = wide(
                #[inline(always)]
                || match y {
                    Some(y) => sums([dy, x, y], |[dy, x, y]| {
                        let dy = keep(dy, y);
                        [dy, dy * stats.hat(x)]
                    }),
                    None => sums([dy, x], |[dy, x]| [dy, dy * stats.hat(x)]),
                },
            );
            let scale = gain * stats.r;
            let (mean_dy, mean_dy_hat) = (T::of(sum_dy / n), T::of(sum_dy_hat / n));
            let at = if dx.branched() { m * channels + c } else { c } * len;
            // SAFETY: this row, and channel c of the sums, belong to this task.
            let target = unsafe {
                put(dg, m, c, sum_dy_hat, first);
                put(db, m, c, sum_dy, first);
                dx.part(at, len)
            };
            let rule = |dy: T, x: T| scale * (dy - mean_dy - stats.hat(x) * mean_dy_hat);
            wide(
                #[inline(always)]
                || match (y, first || dx.branched()) {
                    (Some(y), true) => map(target, [dy, x, y], |[dy, x, y]| rule(keep(dy, y), x)),
                    (None, true) => map(target, [dy, x], |[dy, x]| rule(dy, x)),
                    (Some(y), false) => update(target, [dy, x, y], |o, [dy, x, y]| o + rule(keep(dy, y), x)),
                    (None, false) => update(target, [dy, x], |o, [dy, x]| o + rule(dy, x)),
                },
            );
        }
    });
}

/// Factors of the double backward's second pass for one channel of one branch.
#[derive(Clone, Copy)]
struct Second<T> {
    stats: Stats<T>,
    /// `x̂' = r·ẋ − hat·x̂ − shift`
    hat: T,
    shift: T,
    gain: T,
    gain_dot: T,
    bias_dot: T,
    /// `x̄ = a·(dy − mean_dy − x̂·s1) − b·(x̂'·s1 + x̂·s2)`
    a: T,
    b: T,
    mean_dy: T,
    s1: T,
    s2: T,
}

impl<T: Real> Second<T> {
    /// Returns `(ẏ, x̄)`.
    #[inline(always)]
    fn apply(&self, dot: T, dy: T, x: T) -> (T, T) {
        let hat = self.stats.hat(x);
        let hat_dot = self.stats.r * dot - self.hat * hat - self.shift;
        let y_dot = self.gain * hat_dot + self.gain_dot * hat + self.bias_dot;
        let x_bar = self.a * (dy - self.mean_dy - hat * self.s1) - self.b * (hat_dot * self.s1 + hat * self.s2);
        (y_dot, x_bar)
    }
}

/// `(ẋ, ġ, ḃ, dy, x, g, mean, var[, y]) → (ẏ, x̄, ḡ)`.
pub(super) fn double_backward<T: Real>(
    branches: usize,
    ins: [View<'_, T>; 8],
    y: Option<View<'_, T>>,
    outs: [Out<'_, T>; 3],
    channels: usize,
) {
    let ([dot, g_dot, b_dot, dy, x, g, mean, var], [y_dot, x_bar, g_bar]) = (ins, outs);
    let len = x.len / channels;
    let n = len as f64;
    let live = if ins.iter().chain(&y).any(View::branched) { branches } else { 1 };
    let summed = live > 1 && outs.iter().any(|o| !o.branched());
    items(channels, live, summed).for_each(|(c, range)| {
        let second = |m: usize| {
            let stats = Stats::new(mean.branch(m)[c], var.branch(m)[c]);
            let (dot, dy, x) = (row(dot, m, c, len), row(dy, m, c, len), row(x, m, c, len));
            let terms = |dot: T, dy: T, x: T| {
                let hat = stats.hat(x);
                [dy, dy * hat, dot, dot * hat, dy * dot]
            };
            let total = wide(
                #[inline(always)]
                || match y.map(|y| row(y, m, c, len)) {
                    Some(y) => sums([dot, dy, x, y], |[dot, dy, x, y]| terms(dot, keep(dy, y), x)),
                    None => sums([dot, dy, x], |[dot, dy, x]| terms(dot, dy, x)),
                },
            );
            let [mean_dy, s1, mean_dot, rho, dy_dot] = total.map(|s| s / n);
            let r = 1.0 / (var.branch(m)[c].f64() + BN_EPS).sqrt();
            let s2 = r * (dy_dot - mean_dot * mean_dy - rho * s1);
            let (gain, gain_dot) = (g.branch(m)[c].f64(), g_dot.branch(m)[c].f64());
            let factors = Second {
                stats,
                hat: T::of(r * rho),
                shift: T::of(r * mean_dot),
                gain: T::of(gain),
                gain_dot: T::of(gain_dot),
                bias_dot: b_dot.branch(m)[c],
                a: T::of(gain_dot * r - gain * r * r * rho),
                b: T::of(gain * r),
                mean_dy: T::of(mean_dy),
                s1: T::of(s1),
                s2: T::of(s2),
            };
            (factors, s2 * n)
        };
        // One branch's factors at a time where the rows are apart; all of them where strips are shared.
        let at = |out: Out<'_, T>, m: usize| if out.branched() { m * channels + c } else { c } * len;
        for m in range.clone() {
            let (factors, sum_hat_dot) = second(m);
            let first = m == range.start;
            let (dot, dy, x) = (row(dot, m, c, len), row(dy, m, c, len), row(x, m, c, len));
            let y = y.map(|y| row(y, m, c, len));
            // SAFETY: channel c of the sums belongs to this task.
            unsafe { put(g_bar, m, c, sum_hat_dot, first) };
            for from in (0..len).step_by(STRIP) {
                let strip = from..(from + STRIP).min(len);
                // SAFETY: these rows belong to this task, and the two results are different buffers.
                let (y_dot_row, x_bar_row) = unsafe {
                    (y_dot.part(at(y_dot, m) + from, strip.len()), x_bar.part(at(x_bar, m) + from, strip.len()))
                };
                let ins = [&dot[strip.clone()], &dy[strip.clone()], &x[strip.clone()]];
                let y = y.map(|y| &y[strip]);
                let fresh = (first || y_dot.branched(), first || x_bar.branched());
                second_pass(&factors, ins, y, y_dot_row, x_bar_row, fresh);
            }
        }
    });
}

/// The double backward's second pass over a strip; results are stored where `fresh`, else added.
fn second_pass<T: Real>(
    factors: &Second<T>,
    [dot, dy, x]: [&[T]; 3],
    y: Option<&[T]>,
    y_dot: &mut [T],
    x_bar: &mut [T],
    fresh: (bool, bool),
) {
    if fresh.0 {
        y_dot.fill(T::zero());
    }
    if fresh.1 {
        x_bar.fill(T::zero());
    }
    wide(
        #[inline(always)]
        || {
            let n = dot.len();
            let (dot, dy, x, y_dot, x_bar) = (&dot[..n], &dy[..n], &x[..n], &mut y_dot[..n], &mut x_bar[..n]);
            match y {
                Some(y) => {
                    let y = &y[..n];
                    for i in 0..n {
                        let (t, b) = factors.apply(dot[i], keep(dy[i], y[i]), x[i]);
                        y_dot[i] += keep(t, y[i]);
                        x_bar[i] += b;
                    }
                }
                None => {
                    for i in 0..n {
                        let (t, b) = factors.apply(dot[i], dy[i], x[i]);
                        y_dot[i] += t;
                        x_bar[i] += b;
                    }
                }
            }
        },
    );
}
