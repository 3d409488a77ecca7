//! Matrix products through the `gemm` crate, on one thread: the launchers divide the work.
//!
//! The crate takes memory anew for every product, and its interface has no way to hand it some: `mc/MR` bytes of flags
//! for an `m × n` product of inner dimension k, and, in one more block of 64 bytes beyond them, the panels that it packs:
//! up to `kc·nc` elements of one operand and `kc·m` of the other (m and nc rounded up to the kernel's MR and NR; kc ≤ k
//! and nc ≤ n, or what fits its guess of the caches). It takes none where k ≤ 2, for a product with a vector, and for
//! at most 256 results of rows that are contiguous in both operands. Nothing else in a warm step allocates
//! (`tests/allocation.rs`).
#![allow(unsafe_code)]

use super::real::Real;

/// A matrix to read: `rows × cols` elements at `data[i·row_stride + j·col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a, T> {
    pub data: &'a [T],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<T> Mat<'_, T> {
    fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// `dst[i·dst_stride + j] = (dst if add) + Σ_l a[i, l]·b[l, j]` for `m × n` elements and inner dimension `k`.
///
/// # Safety
/// `dst` is valid for writes of `m` rows of `n` elements at that stride, and no other live slice overlaps them.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn gemm<T: Real>(
    (m, n, k): (usize, usize, usize),
    dst: *mut T,
    dst_stride: usize,
    add: bool,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
) {
    assert!(a.holds(m, k) && b.holds(k, n), "gemm operands of {m}x{n}x{k} out of bounds");
    let stride = |s: usize| s as isize;
    // SAFETY: operands are in bounds by the assertion, the destination by the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            stride(dst_stride),
            add,
            a.data.as_ptr(),
            stride(a.col_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.col_stride),
            stride(b.row_stride),
            T::one(),
            T::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
