//! Gathering of image patches into the columns of a matrix, tile by tile.

use super::real::Real;

/// How the columns of a patch matrix are gathered from images `[C, N, H, W]`: column (n, i, j), row (c, tap) is the
/// pixel at `(i·step + tap.0, j·step + tap.1)` of channel c of sample n, or 0 outside the image.
#[derive(Clone, Debug)]
pub(super) struct Gather {
    /// Source images: channels, samples, height, width.
    pub channels: usize,
    pub samples: usize,
    pub height: usize,
    pub width: usize,
    /// Columns per sample: `grid.0 × grid.1`.
    pub grid: (usize, usize),
    /// Distance of neighbouring columns in the source.
    pub step: usize,
    /// Offsets of the rows of one channel.
    pub taps: Vec<(isize, isize)>,
}

impl Gather {
    /// Rows of the patch matrix.
    pub fn depth(&self) -> usize {
        self.channels * self.taps.len()
    }

    /// Grid rows over all samples.
    pub fn lines(&self) -> usize {
        self.samples * self.grid.0
    }

    /// Pixels of one channel of the source, over all samples.
    pub fn pixels(&self) -> usize {
        self.samples * self.height * self.width
    }

    /// True when the patch matrix is the image itself.
    pub fn is_identity(&self) -> bool {
        self.taps == [(0, 0)] && self.same_grid()
    }

    fn same_grid(&self) -> bool {
        self.step == 1 && self.grid == (self.height, self.width)
    }

    /// Writes the columns of grid lines `lines` to `cols`, `[depth, lines.len() · grid.1]` row-major.
    pub fn fill<T: Real>(&self, src: &[T], lines: std::ops::Range<usize>, cols: &mut [T]) {
        let width = lines.len() * self.grid.1;
        let rows = cols.chunks_exact_mut(width);
        let channel_len = self.pixels();
        let pairs = (0..self.channels).flat_map(|c| self.taps.iter().map(move |tap| (c, *tap)));
        for ((c, tap), row) in pairs.zip(rows) {
            let channel = &src[c * channel_len..(c + 1) * channel_len];
            if self.same_grid() {
                self.fill_shifted(channel, tap, lines.clone(), row);
            } else {
                self.fill_lines(channel, tap, lines.clone(), row);
            }
        }
    }

    /// Range of grid columns whose source column lies in the image.
    fn inside(&self, dc: isize) -> (usize, usize) {
        let step = self.step as isize;
        let last = self.width as isize - 1 - dc;
        let lo = (-dc).max(0).div_euclid(step) + isize::from((-dc).max(0).rem_euclid(step) != 0);
        let hi = if last < 0 { 0 } else { last / step + 1 };
        let (lo, hi) = (lo as usize, hi as usize);
        (lo.min(self.grid.1), hi.clamp(lo.min(self.grid.1), self.grid.1))
    }

    fn source_line(&self, line: usize, dr: isize) -> Option<usize> {
        let (sample, i) = (line / self.grid.0, line % self.grid.0);
        let r = (i * self.step) as isize + dr;
        (0..self.height as isize).contains(&r).then(|| (sample * self.height + r as usize) * self.width)
    }

    fn fill_lines<T: Real>(&self, src: &[T], (dr, dc): (isize, isize), lines: std::ops::Range<usize>, row: &mut [T]) {
        let (lo, hi) = self.inside(dc);
        for (line, out) in lines.zip(row.chunks_exact_mut(self.grid.1)) {
            let Some(at) = self.source_line(line, dr) else {
                out.fill(T::zero());
                continue;
            };
            out[..lo].fill(T::zero());
            out[hi..].fill(T::zero());
            if lo == hi {
                continue;
            }
            let first = (at as isize + (lo * self.step) as isize + dc) as usize;
            match self.step {
                1 => out[lo..hi].copy_from_slice(&src[first..first + hi - lo]),
                step => {
                    let source = src[first..].iter().step_by(step);
                    out[lo..hi].iter_mut().zip(source).for_each(|(o, s)| *o = *s);
                }
            }
        }
    }

    /// The grid is the image: one shifted copy of the whole tile, then zeros where the shift crossed an edge.
    fn fill_shifted<T: Real>(&self, src: &[T], (dr, dc): (isize, isize), lines: std::ops::Range<usize>, row: &mut [T]) {
        let w = self.width;
        let from = (lines.start * w) as isize + dr * w as isize + dc;
        let skip = (-from).max(0) as usize;
        let count = row.len().min((src.len() as isize - from).max(0) as usize);
        if skip < count {
            let at = (from + skip as isize) as usize;
            row[skip..count].copy_from_slice(&src[at..at + count - skip]);
        }
        let (lo, hi) = self.inside(dc);
        for (line, out) in lines.zip(row.chunks_exact_mut(w)) {
            if self.source_line(line, dr).is_none() {
                out.fill(T::zero());
            } else {
                out[..lo].fill(T::zero());
                out[hi..].fill(T::zero());
            }
        }
    }
}
