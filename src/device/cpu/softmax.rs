//! Softmax, cross entropy and Kullback-Leibler divergence. Logits are small: one thread, double precision inside.
#![allow(unsafe_code)]

use super::memory::{Out, View};
use super::real::Real;
use super::scratch::with_scratch;

/// Sizes of a head: samples and classes. Logits lie class by class.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub samples: usize,
    pub classes: usize,
}

/// What a loss compares the probabilities with.
#[derive(Clone, Copy)]
pub(super) enum Target<'a, T> {
    Labels(View<'a, i32>),
    Probabilities(View<'a, T>),
}

impl<T: Real> Target<'_, T> {
    /// Probability of class `c` for sample `i` of branch `m`.
    fn of(&self, head: Head, m: usize, i: usize, c: usize) -> f64 {
        match self {
            Target::Labels(labels) => f64::from(u8::from(labels.branch(m)[i] as usize == c)),
            Target::Probabilities(t) => t.branch(m)[c * head.samples + i].f64(),
        }
    }
}

impl Head {
    fn at(self, c: usize, i: usize) -> usize {
        c * self.samples + i
    }

    /// `log p` of sample `i`, written to `log_p`.
    fn log_softmax<T: Real>(self, z: &[T], i: usize, log_p: &mut [f64]) {
        for (c, v) in log_p.iter_mut().enumerate() {
            *v = z[self.at(c, i)].f64();
        }
        // Whatever the maximum, a NaN among the values makes the sum one: a broken network is seen.
        let max = log_p.iter().fold(f64::NEG_INFINITY, |a, b| if *b <= a { a } else { *b });
        let log_sum = log_p.iter().map(|v| (v - max).exp()).sum::<f64>().ln() + max;
        log_p.iter_mut().for_each(|v| *v -= log_sum);
    }

    /// Bytes of a thread's scratch that the launches need.
    pub fn scratch(self) -> usize {
        self.classes * size_of::<f64>()
    }

    /// For every sample of one branch: `f(sample, log p)`, which takes no scratch.
    fn each_sample<T: Real>(self, z: &[T], mut f: impl FnMut(usize, &[f64])) {
        with_scratch(self.classes, |log_p: &mut [f64]| {
            for i in 0..self.samples {
                self.log_softmax(z, i, log_p);
                f(i, log_p);
            }
        });
    }

    /// For every sample and branch of `live`: `f(branch, sample, log p)`, which takes no scratch.
    fn each<T: Real>(self, z: View<'_, T>, live: usize, mut f: impl FnMut(usize, usize, &[f64])) {
        (0..live).for_each(|m| self.each_sample(z.branch(m), |i, log_p| f(m, i, log_p)));
    }

    /// Adds to an element of `[classes, samples]` that may be summed over the branches.
    fn put<T: Real>(self, out: &mut [T], branched: bool, m: usize, at: usize, value: f64) {
        let at = if branched { m * self.classes * self.samples + at } else { at };
        out[at] += T::of(value);
    }

    /// `softmax(z)`.
    pub fn softmax<T: Real>(self, z: View<'_, T>, out: Out<'_, T>) {
        // SAFETY: the launch has the result to itself.
        let dst = unsafe { out.all() };
        self.each(z, out.branches(), |m, i, log_p| {
            for (c, l) in log_p.iter().enumerate() {
                dst[m * out.len + self.at(c, i)] = T::of(l.exp());
            }
        });
    }

    /// `Σ_i w_i Σ_c t (log t − log p)`: the divergence, and cross entropy for labels.
    pub fn loss<T: Real>(self, z: View<'_, T>, target: Target<'_, T>, w: View<'_, T>, live: usize, out: Out<'_, T>) {
        // SAFETY: the launch has the result to itself.
        let dst = unsafe { out.all() };
        dst.fill(T::zero());
        for m in 0..live {
            let mut total = 0.0;
            self.each_sample(z.branch(m), |i, log_p| {
                let term = |(c, l): (usize, &f64)| {
                    let t = target.of(self, m, i, c);
                    if t == 0.0 { 0.0 } else { t * (t.ln() - l) }
                };
                let sum: f64 = log_p.iter().enumerate().map(term).sum();
                let weight = w.branch(m)[i].f64();
                // A sample of weight zero takes no part, whatever its loss.
                total += if weight == 0.0 { 0.0 } else { weight * sum };
            });
            dst[m % out.total()] += T::of(total);
        }
    }

    /// `s w_i (p − target)`.
    pub fn grad<T: Real>(
        self,
        z: View<'_, T>,
        target: Target<'_, T>,
        [w, s]: [View<'_, T>; 2],
        live: usize,
        out: Out<'_, T>,
    ) {
        // SAFETY: the launch has the result to itself.
        let dst = unsafe { out.all() };
        dst.fill(T::zero());
        self.each(z, live, |m, i, log_p| {
            let scale = s.branch(m)[0].f64() * w.branch(m)[i].f64();
            for (c, l) in log_p.iter().enumerate() {
                let value = scale * (l.exp() - target.of(self, m, i, c));
                self.put(dst, out.branched(), m, self.at(c, i), value);
            }
        });
    }

    /// `s w_i p ⊙ (E − ⟨p, E⟩)`.
    pub fn jvp<T: Real>(self, e: View<'_, T>, z: View<'_, T>, [w, s]: [View<'_, T>; 2], live: usize, out: Out<'_, T>) {
        // SAFETY: the launch has the result to itself.
        let dst = unsafe { out.all() };
        dst.fill(T::zero());
        self.each(z, live, |m, i, log_p| {
            let scale = s.branch(m)[0].f64() * w.branch(m)[i].f64();
            let e = |c: usize| e.branch(m)[self.at(c, i)].f64();
            let dot: f64 = log_p.iter().enumerate().map(|(c, l)| l.exp() * e(c)).sum();
            for (c, l) in log_p.iter().enumerate() {
                self.put(dst, out.branched(), m, self.at(c, i), scale * l.exp() * (e(c) - dot));
            }
        });
    }
}
