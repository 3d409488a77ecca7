//! Order of activations: `[N, C, H, W]` outside, `[C, N, H, W]` on this device.
//!
//! With the channel outermost every channel is one contiguous row of N·H·W values: batch norm works on rows, and
//! a convolution is a matrix product whose columns are pixels of all samples.

use crate::tape::{Kind, Meta};

/// Copies between the two orders; `to_device` gives the direction. Weights and vectors are copied as they are.
pub(super) fn permute<E: Copy>(meta: &Meta, branches: usize, from: &[E], to: &mut [E], to_device: bool) {
    let [n, c, h, w] = meta.dims;
    if meta.kind != Kind::Activation || n == 1 || c == 1 {
        to.copy_from_slice(from);
        return;
    }
    let image = h * w;
    for m in 0..if meta.per_branch { branches } else { 1 } {
        let base = m * meta.len();
        for i in 0..n {
            for j in 0..c {
                let outside = base + (i * c + j) * image;
                let inside = base + (j * n + i) * image;
                let (src, dst) = if to_device { (outside, inside) } else { (inside, outside) };
                to[dst..dst + image].copy_from_slice(&from[src..src + image]);
            }
        }
    }
}
