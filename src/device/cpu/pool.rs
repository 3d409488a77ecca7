//! Pooling. On this device a channel of a sample is one contiguous image of a row of images.
#![allow(unsafe_code)]

use super::elementwise;
use super::memory::{Out, View};
use super::real::Real;
use crate::ops::Window;
use rayon::prelude::*;

/// Mean of every image; summed over `sum_over` branches. Each image counts as a channel of its own.
pub(super) fn average<T: Real>(x: View<'_, T>, sum_over: usize, out: Out<'_, T>) {
    let image = T::of((x.len / out.len) as f64);
    elementwise::channel_sum(x, sum_over, out);
    // SAFETY: the launch above is over; nothing else holds the result.
    unsafe { out.all() }.iter_mut().for_each(|v| *v /= image);
}

/// `1/(H·W)` of each value to every pixel of its image; summed over `sum_over` branches.
pub(super) fn average_backward<T: Real>(x: View<'_, T>, sum_over: usize, out: Out<'_, T>) {
    let factor = T::one() / T::of((out.len / x.len) as f64);
    elementwise::channel_broadcast(x, sum_over, factor, out);
}

/// Position of each window's maximum, the first on ties.
pub(super) fn max_index<T: Real>(window: &Window, x: View<'_, T>, index: Out<'_, i32>) {
    let ([_, _, h, w], [_, _, p, q]) = (window.image.dims, window.pooled.dims);
    (0..index.total() / (p * q)).into_par_iter().for_each(|i| {
        let images = x.len / (h * w);
        let image = &x.branch(i / images)[(i % images) * h * w..][..h * w];
        // SAFETY: image i belongs to this task.
        let out = unsafe { index.part(i * p * q, p * q) };
        let reach = |o: usize, size: usize| {
            let from = o * window.stride;
            from.saturating_sub(window.pad)..(from + window.size).saturating_sub(window.pad).min(size)
        };
        for (o, slot) in out.iter_mut().enumerate() {
            let mut best: Option<usize> = None;
            for r in reach(o / q, h) {
                for at in reach(o % q, w).map(|c| r * w + c) {
                    // A NaN wins, so that it is seen and not hidden.
                    if best.is_none_or(|b| image[at] > image[b] || image[at].is_nan()) {
                        best = Some(at);
                    }
                }
            }
            *slot = best.unwrap_or(0) as i32;
        }
    });
}

/// `out = x` at the positions; summed over `sum_over` branches.
pub(super) fn gather<T: Real>(window: &Window, x: View<'_, T>, index: View<'_, i32>, sum_over: usize, out: Out<'_, T>) {
    let (image, pooled) = areas(window);
    (0..out.total() / pooled).into_par_iter().for_each(|i| {
        let images = out.len / pooled;
        let (m, i_in_branch) = (i / images, i % images);
        // SAFETY: image i belongs to this task.
        let dst = unsafe { out.part(i * pooled, pooled) };
        dst.fill(T::zero());
        for m in if sum_over > 1 { 0..sum_over } else { m..m + 1 } {
            let source = &x.branch(m)[i_in_branch * image..][..image];
            let at = &index.branch(m)[i_in_branch * pooled..][..pooled];
            dst.iter_mut().zip(at).for_each(|(o, at)| *o += source[*at as usize]);
        }
    });
}

/// `out[position] += x`; summed over `sum_over` branches.
pub(super) fn scatter<T: Real>(
    window: &Window,
    x: View<'_, T>,
    index: View<'_, i32>,
    sum_over: usize,
    out: Out<'_, T>,
) {
    let (image, pooled) = areas(window);
    (0..out.total() / image).into_par_iter().for_each(|i| {
        let images = out.len / image;
        let (m, i_in_branch) = (i / images, i % images);
        // SAFETY: image i belongs to this task.
        let dst = unsafe { out.part(i * image, image) };
        dst.fill(T::zero());
        for m in if sum_over > 1 { 0..sum_over } else { m..m + 1 } {
            let source = &x.branch(m)[i_in_branch * pooled..][..pooled];
            let at = &index.branch(m)[i_in_branch * pooled..][..pooled];
            source.iter().zip(at).for_each(|(v, at)| dst[*at as usize] += *v);
        }
    });
}

fn areas(window: &Window) -> (usize, usize) {
    let area = |dims: [usize; 4]| dims[2] * dims[3];
    (area(window.image.dims), area(window.pooled.dims))
}
