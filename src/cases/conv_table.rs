//! The table of fused convolutions: every form with what the planner puts before and behind it, on sizes for all kernels.

use super::conv::{Mixture, NEXT, NORM, RESIDUAL, X, Y};
use super::plan::Planned;
use crate::ops::{self, ConvForm, ConvGeom, Epilogue, FusedConv};

/// Sizes, `[n, c, h, w, k, r, s, stride, pad]`: for kernels that gather, for those that load patches, and for those of few channels, in tiles
/// of one width and of the other, with tiles in part and in full.
const SIZES: [[usize; 9]; 15] = [
    [2, 5, 15, 11, 8, 3, 3, 1, 1],
    [1, 3, 15, 11, 5, 7, 7, 2, 3],
    [2, 32, 8, 8, 32, 3, 3, 1, 1],
    [2, 8, 9, 7, 64, 3, 3, 2, 1],
    [3, 64, 5, 5, 8, 1, 1, 1, 0],
    [2, 64, 6, 6, 72, 3, 3, 1, 1],
    [5, 16, 7, 7, 32, 1, 1, 2, 0],
    [4, 8, 16, 16, 8, 3, 3, 1, 1],
    [1, 1, 4, 5, 1, 2, 3, 1, 1],
    [7, 24, 3, 3, 40, 3, 3, 1, 1],
    [2, 24, 15, 11, 8, 3, 3, 1, 1],
    [1, 8, 7, 5, 32, 3, 3, 1, 1],
    [3, 3, 15, 11, 32, 3, 3, 1, 1],
    [2, 3, 15, 11, 64, 7, 7, 2, 3],
    [5, 1, 9, 7, 40, 5, 5, 1, 2],
];

/// Bits of [`Mixture::half`] of what a product loads.
pub const LOADED: u32 = 0b10_1100_1111;

fn geom([n, c, h, w, k, r, s, stride, pad]: [usize; 9]) -> ConvGeom {
    let (p, q) = ((h + 2 * pad - r) / stride + 1, (w + 2 * pad - s) / stride + 1);
    ConvGeom { n, c, h, w, k, r, s, p, q, stride, pad }
}

/// What stands before and behind a form.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Norm,
    /// With `Norm`.
    Tangent,
    Delta,
    /// With `Delta`.
    Residual,
    /// With `Delta`.
    Kept,
    Start,
    /// The epilogue of the form.
    Found,
    /// That of a tangent.
    TangentSums,
}

/// Forms with the operands that can be per-branch: every mixture that differs in what is summed or strided.
fn lines() -> Vec<(FusedConv, Mixture)> {
    use ConvForm::{Backward, Fprop, Tangent as Jvp, Wgrad};
    use Part::{Delta, Found, Kept, Norm, Residual, Start, Tangent, TangentSums};
    let mut lines = Vec::new();
    let mut add = |form, parts: &[Part], branches, branched, others, summed| {
        let has = |part| parts.contains(&part);
        let epilogue = match form {
            _ if has(TangentSums) => Epilogue::TangentSums,
            _ if !has(Found) => Epilogue::None,
            Fprop => Epilogue::Stats,
            Jvp => Epilogue::TangentSums,
            _ => Epilogue::BackwardSums,
        };
        let (norm, tangent, start) = (has(Norm) || has(Tangent), has(Tangent), has(Start));
        let delta = match has(Delta) {
            true => ops::Delta::Backward { residual: has(Residual), kept: has(Kept) },
            false => ops::Delta::None,
        };
        let op = FusedConv { norm, tangent, delta, start, epilogue, ..FusedConv::plain(form, geom(SIZES[0])) };
        lines.push((op, Mixture { branches, branched, others, summed, half: 0 }));
    };
    let (no, yes) = ([false, false], [true, true]);
    add(Fprop, &[Norm, Start, Found], 1, 0, 0, no);
    add(Fprop, &[Norm, Found], 3, 3, NORM, no);
    add(Fprop, &[Start, Found], 3, 2, 0, no);
    add(Fprop, &[Norm, Start], 3, 1, NORM, yes);
    add(Wgrad, &[Norm], 3, 2, 0, no);
    add(Wgrad, &[Norm, Start], 3, 3, NORM, yes);
    add(Wgrad, &[Delta, Start], 1, 0, 0, no);
    add(Wgrad, &[Delta, Norm], 3, 2, 0, yes);
    add(Wgrad, &[Delta, Norm], 3, 0, Y, no);
    add(Wgrad, &[Tangent], 3, 1, 0, no);
    add(Wgrad, &[Delta, Tangent, Start], 3, 3, 0, yes);
    add(Wgrad, &[Delta, Tangent], 2, 3, X | NORM | Y, no);
    add(Backward, &[Norm, Start], 1, 0, 0, no);
    add(Backward, &[Norm, Start, Found], 3, 7, NORM, no);
    add(Backward, &[], 3, 7, 0, yes);
    add(Backward, &[Norm], 3, 4, 0, [false, true]);
    add(Backward, &[Norm, Start], 3, 5, NORM, [true, false]);
    add(Backward, &[Norm, Found], 2, 4, 0, no);
    add(Backward, &[Delta, Norm, Start, Found], 1, 0, 0, no);
    add(Backward, &[Delta, Norm, Found], 3, 7, NORM | Y, no);
    add(Backward, &[Delta, Norm, Found], 3, 4, 0, no);
    add(Backward, &[Delta, Norm, Start, Found], 3, 6, Y, yes);
    add(Backward, &[Delta, Start], 3, 7, Y, yes);
    add(Backward, &[Delta, Start], 2, 1, Y, no);
    add(Backward, &[Delta, Tangent], 1, 0, 0, no);
    add(Backward, &[Delta, Tangent, Start], 3, 7, 0, yes);
    add(Backward, &[Delta, Tangent], 3, 5, X | NORM | Y, [true, false]);
    add(Backward, &[Tangent, Start], 3, 5, X | NORM, [false, true]);
    add(Jvp, &[Norm, Start], 1, 0, 0, no);
    add(Jvp, &[Norm], 3, 9, 0, no);
    add(Jvp, &[Norm, Start], 3, 15, NORM, yes);
    add(Jvp, &[Start], 3, 8, 0, yes);
    add(Wgrad, &[Delta, Residual, Kept, Norm], 1, 0, 0, no);
    add(Wgrad, &[Delta, Residual, Kept, Norm, Start], 3, 2, 0, yes);
    add(Wgrad, &[Delta, Kept], 3, 1, 0, no);
    add(Wgrad, &[Delta, Residual, Kept], 3, 1, NORM, yes);
    add(Wgrad, &[Delta, Residual, Kept, Tangent], 2, 3, X | NORM | Y | RESIDUAL, no);
    add(Backward, &[Delta, Residual, Norm, Found], 1, 0, 0, no);
    add(Backward, &[Delta, Residual, Kept, Norm, Start, Found], 1, 0, 0, no);
    add(Backward, &[Delta, Residual, Kept, Norm, Found], 3, 7, NORM | Y | RESIDUAL, no);
    add(Backward, &[Delta, Kept, Norm, Found], 3, 4, 0, no);
    add(Backward, &[Delta, Residual, Kept, Norm, Start, Found], 3, 4, RESIDUAL, yes);
    add(Backward, &[Delta, Residual, Kept], 3, 6, Y, [true, false]);
    add(Backward, &[Delta, Residual, Norm], 3, 0, RESIDUAL, no);
    add(Backward, &[Delta, Residual, Kept, Start], 2, 1, 0, no);
    add(Backward, &[Delta, Residual, Kept, Tangent, Start], 3, 7, RESIDUAL, yes);
    add(Backward, &[Delta, Kept, Tangent], 3, 4, 0, [false, true]);
    add(Jvp, &[Tangent, Start, Found], 1, 0, 0, no);
    add(Jvp, &[Tangent, Found], 3, 9, 0, no);
    add(Jvp, &[Tangent, Start, Found], 3, 15, NORM | NEXT, no);
    add(Jvp, &[Tangent, Start, Found], 3, 9, 0, yes);
    add(Jvp, &[Norm, Found], 3, 8, 0, no);
    add(Jvp, &[Start, Found], 2, 8, NEXT, no);
    add(Fprop, &[TangentSums], 1, 0, 0, no);
    add(Fprop, &[Norm, Start, TangentSums], 3, 2, NEXT, no);
    add(Fprop, &[Start, TangentSums], 3, 1, 0, yes);
    add(Jvp, &[Tangent, Start], 3, 9, 0, no);
    add(Backward, &[Norm, Start], 3, 7, NORM, no);
    lines
}

/// All lines with all sizes, with a different mixture of widths in every case.
pub fn convolutions() -> Vec<Planned> {
    let mut cases = Vec::new();
    for (number, (op, mixture)) in lines().into_iter().enumerate() {
        for (size, geometry) in SIZES.into_iter().enumerate() {
            let any = (number * 419 + size * 173) as u32 % 2048;
            // The kernels that load patches prefer pairs of 16 bits.
            let half = if pairs(&op) && (number + size) % 2 != 0 { any | LOADED } else { any };
            cases.push(Planned::convolution(FusedConv { geom: geom(geometry), ..op }, Mixture { half, ..mixture }));
        }
    }
    cases
}

/// Whether a part works on two tensors at a time.
fn pairs(op: &FusedConv) -> bool {
    op.tangent || op.delta != ops::Delta::None
}
