//! Order of activations: `[N, C, H, W]` outside, `[C, N, H, W]` on this device.
//!
//! With the channel outermost every channel is one contiguous row of N·H·W values: batch norm works on rows, and
//! a convolution is a matrix product whose columns are pixels of all samples.

use crate::tape::{Kind, Meta};

/// Where the values come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the host to the device.
    In,
    /// From the device to the host.
    Out,
}

/// Copies from one order to the other, each value through `convert`. Weights and vectors keep their order.
///
/// # Panics
/// When `from` and `to` differ in length.
pub(super) fn permute<A: Copy, B>(
    meta: &Meta,
    branches: usize,
    way: Way,
    from: &[A],
    to: &mut [B],
    convert: impl Fn(A) -> B,
) {
    assert_eq!(from.len(), to.len(), "both sides of a copy");
    let copy = |from: &[A], to: &mut [B]| to.iter_mut().zip(from).for_each(|(t, f)| *t = convert(*f));
    let [n, c, h, w] = meta.dims;
    if meta.kind != Kind::Activation || n == 1 || c == 1 {
        copy(from, to);
        return;
    }
    let image = h * w;
    for m in 0..if meta.per_branch { branches } else { 1 } {
        let base = m * meta.len();
        for i in 0..n {
            for j in 0..c {
                let outside = base + (i * c + j) * image;
                let inside = base + (j * n + i) * image;
                let (src, dst) = if way == Way::In { (outside, inside) } else { (inside, outside) };
                copy(&from[src..src + image], &mut to[dst..dst + image]);
            }
        }
    }
}
