//! How the products of convolutions of images of few channels are divided into tiles (`kernels/conv_stem.cu`).

use super::conv_tiles::{ABREAST, MOST_PADDING, PATCH, PIXEL, Patches, SLICE, Tiling, finish};
use crate::ops::{ConvGeom, ConvKind};

/// `STEM_CHANNELS`: the most channels of the image.
const CHANNELS: usize = 4;
/// `STEM_PIXEL`: bytes of a pixel of the halo.
const STEM_PIXEL: usize = 8;
/// `STEM_BANKS`: pixels side by side in the banks of shared memory.
const BANKS: usize = 16;
/// `STEM_TAPS`: most taps of fprop.
const MOST_TAPS: usize = 128;
/// Most pixels of a side of a halo: a place in it is told in 12 bits.
const MOST_SIDE: usize = 1 << 12;
/// Bytes of `StemRows`.
const ROWS_TABLES: usize = 1024;
/// Bytes of `StemColumns`.
const COLUMNS_TABLES: usize = 2048;
/// Bytes in which the sums of the warps of a tile of few taps meet.
const SUMS: usize = 32 << 10;

/// The tiles of a product, and how many columns or, of a weight gradient, taps they have, if its kernel can take the sizes: output
/// channels in eights and any filter whose halo fits.
pub(super) fn tiling(kind: ConvKind, g: &ConvGeom) -> Option<(Tiling, usize)> {
    let taps = g.r * g.s;
    let takes = match kind {
        ConvKind::Fprop => taps <= MOST_TAPS,
        ConvKind::Dgrad => false,
        ConvKind::Wgrad => true,
    };
    let sizes = (1..=CHANNELS).contains(&g.c) && g.k.is_multiple_of(8);
    if !takes || !sizes || g.pad.max(g.r).max(g.s).max(g.stride) > MOST_PADDING {
        return None;
    }
    let width = match kind {
        ConvKind::Wgrad => {
            if taps <= 16 {
                16
            } else {
                64
            }
        }
        _ => {
            if g.k <= 32 {
                32
            } else {
                64
            }
        }
    };
    let (.., step) = Patches::reach(kind, g)?;
    let (patches, shared) = Patches::choose(kind, g, |patches| {
        let halo = patches.images * patches.halo[0] * pitch(kind, g, patches.halo[1], step) * STEM_PIXEL;
        if kind == ConvKind::Wgrad {
            let slots = 2 * (PIXEL * PATCH + halo.next_multiple_of(8 * PIXEL));
            let sums = if width == 16 { SUMS } else { 0 };
            let loads = COLUMNS_TABLES + slots + 4 * patches.halo_pixels();
            loads.max(sums).max(finish(SLICE, CHANNELS * width))
        } else {
            (ROWS_TABLES + taps.next_multiple_of(4) * width * STEM_PIXEL + halo).max(finish(PATCH, width))
        }
    })?;
    if patches.halo.into_iter().any(|side| side > MOST_SIDE) {
        return None;
    }
    let number = patches.number(kind, g);
    let (tiles, size, least) = match kind {
        ConvKind::Wgrad => ([g.k.div_ceil(SLICE), taps.div_ceil(width), number], [SLICE, CHANNELS * width], 4),
        _ => ([number, g.k.div_ceil(width), 1], [PATCH, width], 1),
    };
    Some((Tiling { patches, tiles, size, run: 1, least, joint: usize::MAX, shared, abreast: ABREAST }, width))
}

/// `stem_pitch`: pixels from a line of a halo to the next, of so many with so many from a pixel of the patch to its neighbour.
fn pitch(kind: ConvKind, g: &ConvGeom, line: usize, step: usize) -> usize {
    let wanted = g.s + if kind == ConvKind::Wgrad { 6 } else { 3 } * step;
    line + wanted.wrapping_sub(line) % BANKS
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Most pixels of different places that half a warp loads from one of the banks' places for a pixel. Lanes are those of four taps,
    /// from `tap` on, by those of four pixels.
    fn met(kind: ConvKind, g: &ConvGeom, line: usize, step: usize, tap: usize) -> usize {
        let pitch = pitch(kind, g, line, step);
        let apart = if kind == ConvKind::Wgrad { 2 * step } else { step };
        let mut banks: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for tap in (tap..tap + 4).map(|tap| tap.min(g.r * g.s - 1)) {
            for pixel in 0..4 {
                let at = tap / g.s * pitch + tap % g.s + pixel * apart;
                let places = banks.entry(at % BANKS).or_default();
                if !places.contains(&at) {
                    places.push(at);
                }
            }
        }
        banks.values().map(Vec::len).max().unwrap_or(0)
    }

    /// Neighbouring pixels of a line, at the strides and filters that networks begin with.
    #[test]
    fn halves_of_warps_meet_no_bank_twice() {
        for (side, stride) in [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)] {
            let g = ConvGeom { n: 1, c: 3, h: 64, w: 64, k: 32, r: side, s: side, p: 1, q: 1, stride, pad: 0 };
            for kind in [ConvKind::Fprop, ConvKind::Wgrad] {
                for (line, tap) in (1..80).flat_map(|line| (0..side * side).step_by(4).map(move |tap| (line, tap))) {
                    assert_eq!(met(kind, &g, line, stride, tap), 1, "{kind:?} {side} stride {stride}: {line} {tap}");
                }
            }
        }
    }
}
