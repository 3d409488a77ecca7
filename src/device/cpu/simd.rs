//! Loops over slices, compiled for the widest vectors of the machine at hand.

use super::real::Real;

/// Lanes of the partial sums: fixed, so that a sum does not depend on the machine's vector width.
const LANES: usize = 32;
/// Elements after which partial sums move to double precision.
const BLOCK: usize = 2048;

/// Runs `f` compiled for the machine's vector instructions.
#[inline(always)]
pub(super) fn wide<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// `out[i] = f(out[i], ins[0][i], ins[1][i], …)`.
#[inline(always)]
pub(super) fn update<T: Real, const I: usize>(out: &mut [T], ins: [&[T]; I], f: impl Fn(T, [T; I]) -> T) {
    let n = out.len();
    let ins = ins.map(|s| &s[..n]);
    for i in 0..n {
        out[i] = f(out[i], ins.map(|s| s[i]));
    }
}

/// `out[i] = f(ins[0][i], ins[1][i], …)`.
#[inline(always)]
pub(super) fn map<T: Real, const I: usize>(out: &mut [T], ins: [&[T]; I], f: impl Fn([T; I]) -> T) {
    update(out, ins, |_, v| f(v));
}

/// `Σ_i f(ins[0][i], ins[1][i], …)`, component by component.
#[inline(always)]
pub(super) fn sums<T: Real, const I: usize, const S: usize>(ins: [&[T]; I], f: impl Fn([T; I]) -> [T; S]) -> [f64; S] {
    let n = ins[0].len();
    let mut total = [0.0f64; S];
    let mut start = 0;
    while start < n {
        let end = (start + BLOCK).min(n);
        let block = ins.map(|s| &s[start..end]);
        let mut acc = [[T::zero(); LANES]; S];
        let whole = (end - start) / LANES * LANES;
        let mut at = 0;
        while at < whole {
            let lanes = block.map(|s| &s[at..at + LANES]);
            for l in 0..LANES {
                let v = f(lanes.map(|s| s[l]));
                for s in 0..S {
                    acc[s][l] += v[s];
                }
            }
            at += LANES;
        }
        for i in whole..end - start {
            let v = f(block.map(|s| s[i]));
            for s in 0..S {
                acc[s][i - whole] += v[s];
            }
        }
        for s in 0..S {
            total[s] += acc[s].iter().fold(0.0, |sum, lane| sum + lane.f64());
        }
        start = end;
    }
    total
}
