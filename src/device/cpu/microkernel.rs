//! The two inner loops of convolutions, on registers, for the vectors of the machine at hand.
//!
//! Both read rows of the patch matrix as shifted planes (see `patches`), so that nothing is gathered or packed but
//! the weights. Blocks are sized for 32 vector registers, and smaller ones for 16.
#![allow(unsafe_code)]

use pulp::{Arch, Simd, WithSimd};

/// Rows of a packed block of weights.
pub(super) const ROWS: usize = 8;
/// Rows of `a` that a block of [`Kernels::dot`] handles.
pub(super) const DOT_A: usize = 3;
/// Columns beyond the last that a kernel may read or write: `3` vectors of at most 16 elements.
pub(super) const SLACK: usize = 48;

/// `dst[r, t] = (dst[r, t] if add) + Σ_d weights[r, d] · src[offsets[d] + t]` for t < columns.
pub struct Product<'a, T> {
    /// `[row_blocks, depth, ROWS]`
    pub weights: &'a [T],
    pub row_blocks: usize,
    pub offsets: &'a [usize],
    pub src: &'a [T],
    pub columns: usize,
    /// `[row_blocks · ROWS, stride]`; columns up to the next multiple of [`SLACK`] are written.
    pub dst: &'a mut [T],
    pub stride: usize,
    pub add: bool,
}

/// `dst[r, d] += Σ_t a[r·a_stride + t] · src[offsets[d] + t]` for t < columns, r < rows.
pub struct Dot<'a, T> {
    /// `[rows, a_stride]`, zeros from `columns` to the next multiple of 16.
    pub a: &'a [T],
    pub a_stride: usize,
    pub rows: usize,
    pub offsets: &'a [usize],
    pub src: &'a [T],
    pub columns: usize,
    /// `[rows, depth]`
    pub dst: &'a mut [T],
}

/// The inner loops for an element type.
pub trait Kernels: Sized {
    /// See [`Product`].
    fn product(args: Product<'_, Self>);
    /// See [`Dot`].
    fn dot(args: Dot<'_, Self>);
}

impl<T> Product<'_, T> {
    fn check(&self) {
        let depth = self.offsets.len();
        let reach = self.offsets.iter().max().map_or(0, |o| o + self.columns.next_multiple_of(SLACK));
        assert!(self.weights.len() >= self.row_blocks * depth * ROWS && self.src.len() >= reach);
        assert!(self.stride >= self.columns.next_multiple_of(SLACK));
        assert!(self.dst.len() >= self.row_blocks * ROWS * self.stride);
    }
}

impl<T> Dot<'_, T> {
    fn check(&self) {
        let padded = self.columns.next_multiple_of(16);
        let reach = self.offsets.iter().max().map_or(0, |o| o + padded);
        assert!(self.src.len() >= reach && self.a_stride >= padded);
        assert!(self.a.len() >= self.rows * self.a_stride && self.dst.len() >= self.rows * self.offsets.len());
    }
}

macro_rules! kernels {
    ($t:ty, $vec:ident, $lanes:ident, $splat:ident, $fma:ident, $sum:ident) => {
        impl Kernels for $t {
            fn product(args: Product<'_, $t>) {
                args.check();
                struct Run<'a>(Product<'a, $t>);
                impl WithSimd for Run<'_> {
                    type Output = ();
                    #[inline(always)]
                    fn with_simd<S: Simd>(self, simd: S) {
                        // SAFETY: `check` has compared every length with what is read and written.
                        unsafe {
                            match size_of::<S::$vec>() {
                                64 => product::<S, 8, 3>(simd, self.0),
                                _ => product::<S, 4, 3>(simd, self.0),
                            }
                        }
                    }
                }

                /// Blocks of `K` rows and `V` vectors of columns.
                #[inline(always)]
                unsafe fn product<S: Simd, const K: usize, const V: usize>(simd: S, p: Product<'_, $t>) {
                    let (lanes, depth) = (S::$lanes, p.offsets.len());
                    let mut t = 0;
                    while t < p.columns {
                        for block in 0..p.row_blocks * (ROWS / K) {
                            // SAFETY: within bounds by `check`: t + V·lanes stays below the next multiple of SLACK
                            // because V·lanes divides SLACK.
                            unsafe {
                                let (outer, inner) = (block / (ROWS / K), block % (ROWS / K));
                                let weights = p.weights.as_ptr().add(outer * depth * ROWS + inner * K);
                                let dst = p.dst.as_mut_ptr().add(block * K * p.stride + t);
                                let mut acc = [[simd.$splat(0.0); V]; K];
                                if p.add {
                                    for k in 0..K {
                                        for v in 0..V {
                                            let at = dst.add(k * p.stride + v * lanes);
                                            acc[k][v] = at.cast::<S::$vec>().read_unaligned();
                                        }
                                    }
                                }
                                for d in 0..depth {
                                    let src = p.src.as_ptr().add(*p.offsets.get_unchecked(d) + t);
                                    let mut x = [simd.$splat(0.0); V];
                                    for v in 0..V {
                                        x[v] = src.add(v * lanes).cast::<S::$vec>().read_unaligned();
                                    }
                                    for k in 0..K {
                                        let w = simd.$splat(*weights.add(d * ROWS + k));
                                        for v in 0..V {
                                            acc[k][v] = simd.$fma(w, x[v], acc[k][v]);
                                        }
                                    }
                                }
                                for k in 0..K {
                                    for v in 0..V {
                                        let at = dst.add(k * p.stride + v * lanes);
                                        at.cast::<S::$vec>().write_unaligned(acc[k][v]);
                                    }
                                }
                            }
                        }
                        t += V * lanes;
                    }
                }
                Arch::new().dispatch(Run(args));
            }

            fn dot(args: Dot<'_, $t>) {
                args.check();
                struct Run<'a>(Dot<'a, $t>);
                impl WithSimd for Run<'_> {
                    type Output = ();
                    #[inline(always)]
                    fn with_simd<S: Simd>(self, simd: S) {
                        // SAFETY: `check` has compared every length with what is read and written.
                        unsafe {
                            match size_of::<S::$vec>() {
                                64 => dot::<S, { DOT_A }, 9>(simd, self.0),
                                _ => dot::<S, 1, 9>(simd, self.0),
                            }
                        }
                    }
                }

                /// Blocks of `A` rows of `a` and `B` rows of patches; a last, incomplete block repeats a row and
                /// drops the result.
                #[inline(always)]
                unsafe fn dot<S: Simd, const A: usize, const B: usize>(simd: S, p: Dot<'_, $t>) {
                    let (lanes, depth) = (S::$lanes, p.offsets.len());
                    for d in (0..depth).step_by(B) {
                        for r in (0..p.rows).step_by(A) {
                            // SAFETY: within bounds by `check`; lanes divide 16, up to which `a` is padded.
                            unsafe {
                                let mut rows = [p.a.as_ptr(); A];
                                for i in 0..A {
                                    rows[i] = p.a.as_ptr().add((r + i).min(p.rows - 1) * p.a_stride);
                                }
                                let mut patches = [p.src.as_ptr(); B];
                                for j in 0..B {
                                    let offset = *p.offsets.get_unchecked((d + j).min(depth - 1));
                                    patches[j] = p.src.as_ptr().add(offset);
                                }
                                let mut acc = [[simd.$splat(0.0); B]; A];
                                let mut t = 0;
                                while t < p.columns {
                                    let mut y = [simd.$splat(0.0); A];
                                    for i in 0..A {
                                        y[i] = rows[i].add(t).cast::<S::$vec>().read_unaligned();
                                    }
                                    for j in 0..B {
                                        let x = patches[j].add(t).cast::<S::$vec>().read_unaligned();
                                        for i in 0..A {
                                            acc[i][j] = simd.$fma(y[i], x, acc[i][j]);
                                        }
                                    }
                                    t += lanes;
                                }
                                for i in 0..A.min(p.rows - r) {
                                    for j in 0..B.min(depth - d) {
                                        *p.dst.get_unchecked_mut((r + i) * depth + d + j) += simd.$sum(acc[i][j]);
                                    }
                                }
                            }
                        }
                    }
                }
                Arch::new().dispatch(Run(args));
            }
        }
    };
}

kernels!(f32, f32s, F32_LANES, splat_f32s, mul_add_e_f32s, reduce_sum_f32s);
kernels!(f64, f64s, F64_LANES, splat_f64s, mul_add_e_f64s, reduce_sum_f64s);
