//! Short lines of an image, many at a time: copied and added without a call or a check per line.
#![allow(unsafe_code)]

use super::real::Real;

/// Lines in a slice: `count` of them, `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    pub stride: usize,
    pub count: usize,
}

impl Lines {
    /// Elements from the first of the first line to the last of the last.
    fn span(self, width: usize) -> usize {
        if self.count == 0 { 0 } else { (self.count - 1) * self.stride + width }
    }
}

/// Copies lines of `width` elements; `from` has as many as `to`.
#[inline(always)]
pub(super) fn copy<T: Real>(to: &mut [T], to_lines: Lines, from: &[T], from_stride: usize, width: usize) {
    let from_lines = Lines { stride: from_stride, ..to_lines };
    assert!(to.len() >= to_lines.span(width) && from.len() >= from_lines.span(width));
    // SAFETY: every line lies in its slice by the assertion, and each branch's vectors are no wider than a line.
    unsafe {
        match width {
            16.. => copy_by::<T, 16>(to.as_mut_ptr(), to_lines, from.as_ptr(), from_stride, width),
            8.. => copy_by::<T, 8>(to.as_mut_ptr(), to_lines, from.as_ptr(), from_stride, width),
            4.. => copy_by::<T, 4>(to.as_mut_ptr(), to_lines, from.as_ptr(), from_stride, width),
            _ => copy_by::<T, 1>(to.as_mut_ptr(), to_lines, from.as_ptr(), from_stride, width),
        }
    }
}

/// Whole vectors of `W` elements, the last overlapping the one before.
#[inline(always)]
unsafe fn copy_by<T: Real, const W: usize>(to: *mut T, lines: Lines, from: *const T, from_stride: usize, width: usize) {
    for line in 0..lines.count {
        // SAFETY: the caller's bounds; W is at most `width`, which is not 0 where W is not.
        unsafe {
            let (to, from) = (to.add(line * lines.stride), from.add(line * from_stride));
            let piece =
                |at: usize| to.add(at).cast::<[T; W]>().write_unaligned(from.add(at).cast::<[T; W]>().read_unaligned());
            let mut at = 0;
            while at + W <= width {
                piece(at);
                at += W;
            }
            if at < width {
                piece(width - W);
            }
        }
    }
}

/// `to = start + from` line by line, where `start` lies as `to` does; `None` is what `to` holds.
#[inline(always)]
pub(super) fn add<T: Real>(
    to: &mut [T],
    to_lines: Lines,
    start: Option<&[T]>,
    from: &[T],
    from_stride: usize,
    width: usize,
) {
    let from_lines = Lines { stride: from_stride, ..to_lines };
    assert!(to.len() >= to_lines.span(width) && from.len() >= from_lines.span(width));
    assert!(start.is_none_or(|s| s.len() >= to_lines.span(width)));
    let (to, from) = (to.as_mut_ptr(), from.as_ptr());
    for line in 0..to_lines.count {
        // SAFETY: every line lies in its slice by the assertions.
        unsafe {
            let first = line * to_lines.stride;
            let (to, from) = (to.add(first), from.add(line * from_stride));
            let start = start.map_or(to.cast_const(), |s| s.as_ptr().add(first));
            let mut at = 0;
            add_by::<T, 16>(&mut at, to, start, from, width);
            add_by::<T, 8>(&mut at, to, start, from, width);
            add_by::<T, 4>(&mut at, to, start, from, width);
            add_by::<T, 1>(&mut at, to, start, from, width);
        }
    }
}

#[inline(always)]
unsafe fn add_by<T: Real, const W: usize>(at: &mut usize, to: *mut T, start: *const T, from: *const T, width: usize) {
    while *at + W <= width {
        // SAFETY: the caller's bounds.
        unsafe {
            let mut sum = start.add(*at).cast::<[T; W]>().read_unaligned();
            let from = from.add(*at).cast::<[T; W]>().read_unaligned();
            for i in 0..W {
                sum[i] += from[i];
            }
            to.add(*at).cast::<[T; W]>().write_unaligned(sum);
        }
        *at += W;
    }
}
