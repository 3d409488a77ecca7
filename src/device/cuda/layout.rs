//! Order of elements: activations `[N, C, H, W]` and weights `[K, C, R, S]` outside, channels innermost on this
//! device: `[N, H, W, C]` and `[K, R, S, C]`.
//!
//! With the channel innermost the operands of a convolution, seen as a matrix product, are rows of consecutive
//! elements, and a warp that works on neighbouring channels reads consecutive memory.

use crate::tape::{Kind, Meta};

/// Which way values go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Towards {
    Device,
    Host,
}

/// Copies `from` to `to` in the other order, each element through `convert`.
pub(super) fn permute<A: Copy, B>(
    meta: &Meta,
    branches: usize,
    from: &[A],
    to: &mut [B],
    towards: Towards,
    convert: impl Fn(A) -> B,
) {
    let [outer, channels, h, w] = meta.dims;
    let image = h * w;
    if meta.kind == Kind::Vector || channels == 1 || image == 1 {
        to.iter_mut().zip(from).for_each(|(t, f)| *t = convert(*f));
        return;
    }
    let blocks = outer * if meta.per_branch { branches } else { 1 };
    let block = channels * image;
    for (from, to) in from.chunks_exact(block).zip(to.chunks_exact_mut(block)).take(blocks) {
        for c in 0..channels {
            for i in 0..image {
                let (outside, inside) = (c * image + i, i * channels + c);
                match towards {
                    Towards::Device => to[inside] = convert(from[outside]),
                    Towards::Host => to[outside] = convert(from[inside]),
                }
            }
        }
    }
}
