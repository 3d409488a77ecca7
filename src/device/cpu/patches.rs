//! Image patches as shifted views of zero-padded planes: a convolution without gathering.
//!
//! A tile of images is copied into planes whose rows are separated by zeros. Column t of the patch matrix, for
//! output pixel (i, j), is then read in plane-row order, and every row of the patch matrix (a channel and a tap of
//! the kernel) is one plane from a fixed offset on. Strided convolutions read from stride² planes per channel, one
//! per residue of the pixel's position. Columns that fall between rows are computed and thrown away.

use super::lines::{self, Lines};
use super::real::Real;

use std::ops::Range;

/// How columns are taken from images `[C, N, H, W]`: column (n, i, j), row (c, tap) is the pixel at
/// `(i·step + tap.0, j·step + tap.1)` of channel c of sample n, or 0 outside the image.
#[derive(Clone, Debug)]
pub(super) struct Patches {
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
    /// Residues of pixel positions that any tap reads.
    phases: Vec<(usize, usize)>,
    rows: Axis,
    cols: Axis,
}

/// Zeros around and between the lines of one direction.
#[derive(Clone, Copy, Debug)]
struct Axis {
    before: usize,
    after: usize,
    /// Zeros between two neighbours: they share them where neither has pixels there.
    gap: usize,
}

impl Axis {
    fn new(reach: impl Iterator<Item = (usize, isize)> + Clone, grid: usize, size: usize, step: usize) -> Self {
        let before = reach.clone().map(|(_, q)| (-q).max(0)).max().unwrap_or(0) as usize;
        let after = reach.clone().map(|(_, q)| q.max(0)).max().unwrap_or(0) as usize;
        let only_zeros_after = reach.clone().all(|(a, _)| grid * step + a >= size);
        let gap = if only_zeros_after { before.max(after) } else { before + after };
        Axis { before, after, gap }
    }
}

/// Some whole images, or some lines of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// Samples.
    pub images: Range<usize>,
    /// Grid lines of each; all of them unless there is one image.
    pub lines: Range<usize>,
}

impl Patches {
    pub fn new(
        [channels, samples, height, width]: [usize; 4],
        grid: (usize, usize),
        step: usize,
        taps: Vec<(isize, isize)>,
    ) -> Self {
        let split = |d: isize| (d.rem_euclid(step as isize) as usize, d.div_euclid(step as isize));
        let mut phases: Vec<_> = taps.iter().map(|(r, c)| (split(*r).0, split(*c).0)).collect();
        phases.sort_unstable();
        phases.dedup();
        let rows = Axis::new(taps.iter().map(|t| split(t.0)), grid.0, height, step);
        let cols = Axis::new(taps.iter().map(|t| split(t.1)), grid.1, width, step);
        Patches { channels, samples, height, width, grid, step, taps, phases, rows, cols }
    }

    /// Rows of the patch matrix.
    pub fn depth(&self) -> usize {
        self.channels * self.taps.len()
    }

    /// Pixels of one channel of the source, over all samples.
    pub fn pixels(&self) -> usize {
        self.samples * self.height * self.width
    }

    /// True when the patch matrix is the images themselves.
    pub fn is_identity(&self) -> bool {
        self.taps == [(0, 0)] && self.step == 1 && self.grid == (self.height, self.width)
    }

    /// Tiles of about `target` columns: as many whole images as fit, or some lines of one.
    pub fn tiles(&self, target: usize) -> Vec<Tile> {
        let area = self.grid.0 * self.grid.1;
        if area > 2 * target {
            let lines = (target / self.grid.1).max(1);
            let cuts = |image: usize| {
                let from = (0..self.grid.0).step_by(lines);
                from.map(move |i| Tile { images: image..image + 1, lines: i..(i + lines).min(self.grid.0) })
            };
            return (0..self.samples).flat_map(cuts).collect();
        }
        let images = (target / area.max(1)).max(1);
        let from = (0..self.samples).step_by(images);
        from.map(|n| Tile { images: n..(n + images).min(self.samples), lines: 0..self.grid.0 }).collect()
    }

    /// Elements from one plane row to the next.
    pub fn line_stride(&self) -> usize {
        self.grid.1 + self.cols.gap
    }

    fn image_stride(&self, tile: &Tile) -> usize {
        (tile.lines.len() + self.rows.gap) * self.line_stride()
    }

    /// Column of pixel (line, 0) of the tile's image `image`, both counted from the tile's first.
    pub fn column(&self, tile: &Tile, image: usize, line: usize) -> usize {
        image * self.image_stride(tile) + line * self.line_stride()
    }

    /// Columns of a tile, those between rows included.
    pub fn columns(&self, tile: &Tile) -> usize {
        match (tile.images.len(), tile.lines.len()) {
            (0, _) | (_, 0) => 0,
            (images, lines) => self.column(tile, images - 1, lines - 1) + self.grid.1,
        }
    }

    /// Elements of one plane, with room for `slack` columns read beyond the last.
    fn plane_len(&self, tile: &Tile, slack: usize) -> usize {
        let lines = self.rows.before + self.rows.after;
        tile.images.len() * self.image_stride(tile)
            + (lines + 1) * self.line_stride()
            + self.cols.before
            + self.cols.after
            + slack
    }

    /// Elements of all planes of a tile.
    pub fn planes_len(&self, tile: &Tile, slack: usize) -> usize {
        self.channels * self.phases.len() * self.plane_len(tile, slack)
    }

    /// For every row of the patch matrix (channel-major) where its column 0 lies in the planes.
    pub fn offsets(&self, tile: &Tile, slack: usize) -> Vec<usize> {
        let (plane, stride) = (self.plane_len(tile, slack), self.line_stride() as isize);
        let origin = (self.rows.before * self.line_stride() + self.cols.before) as isize;
        let step = self.step as isize;
        let tap_offset = |(r, c): &(isize, isize)| {
            let phase = (r.rem_euclid(step) as usize, c.rem_euclid(step) as usize);
            let index = self.phases.iter().position(|p| *p == phase).unwrap_or(0);
            let shift = origin + r.div_euclid(step) * stride + c.div_euclid(step);
            index * plane + shift as usize
        };
        let taps: Vec<usize> = self.taps.iter().map(tap_offset).collect();
        let channel = self.phases.len() * plane;
        (0..self.channels).flat_map(|c| taps.iter().map(move |t| c * channel + t)).collect()
    }

    /// Copies the tile's images into `planes`.
    #[inline(always)]
    pub fn fill<T: Real>(&self, src: &[T], tile: &Tile, slack: usize, planes: &mut [T]) {
        planes.fill(T::zero());
        let (plane_len, stride, step) = (self.plane_len(tile, slack), self.line_stride(), self.step);
        let image_len = self.height * self.width;
        // Lines before the first and after the last belong to the tile only where they are pixels it can see.
        let first = tile.lines.start as isize - self.rows.before as isize;
        let last = tile.lines.end + self.rows.after;
        let count = self.channels * self.phases.len();
        for (p, plane) in planes.chunks_exact_mut(plane_len).take(count).enumerate() {
            let (channel, (a, b)) = (p / self.phases.len(), self.phases[p % self.phases.len()]);
            // Plane columns v with a pixel at v·step + b, and within reach of a tap.
            let width = if self.width > b { (self.width - b).div_ceil(step) } else { 0 };
            let width = width.min(self.grid.1 + self.cols.after);
            if width == 0 {
                continue;
            }
            let rows =
                (first.max(0) as usize)..last.min(if self.height > a { (self.height - a).div_ceil(step) } else { 0 });
            for (n, sample) in tile.images.clone().enumerate() {
                let image = &src[(channel * self.samples + sample) * image_len..][..image_len];
                let origin = self.rows.before * stride + self.cols.before + n * self.image_stride(tile);
                if rows.is_empty() {
                    continue;
                }
                let target = &mut plane[origin + rows.start * stride - tile.lines.start * stride..];
                let lines = Lines { stride, count: rows.len() };
                if step == 1 {
                    lines::copy(target, lines, &image[rows.start * self.width..], self.width, width);
                    continue;
                }
                for (l, u) in rows.clone().enumerate() {
                    let source = image[(u * step + a) * self.width + b..].iter().step_by(step);
                    target[l * stride..][..width].iter_mut().zip(source).for_each(|(t, s)| *t = *s);
                }
            }
        }
    }

    /// Copies the tile's columns of images `[rows, N, grid]` into rows of `columns` elements each, zeros between.
    #[inline(always)]
    pub fn fill_columns<T: Real>(&self, src: &[T], tile: &Tile, columns: usize, out: &mut [T]) {
        let (lines, width) = self.grid;
        out.fill(T::zero());
        for (row, out) in out.chunks_exact_mut(columns).enumerate() {
            let Some(source) = src.get(row * self.samples * lines * width..) else { break };
            if source.is_empty() {
                break;
            }
            for (n, sample) in tile.images.clone().enumerate() {
                let from = (sample * lines + tile.lines.start) * width;
                let to = &mut out[self.column(tile, n, 0)..];
                let copied = Lines { stride: self.line_stride(), count: tile.lines.len() };
                lines::copy(to, copied, &source[from..], width, width);
            }
        }
    }
}

/// Offsets of patch rows for the shapes of tile that occur: all but the last are alike.
pub(super) struct TileOffsets {
    by_shape: Vec<((usize, usize), Vec<usize>)>,
}

impl TileOffsets {
    /// Of `tiles` whose planes have room for `slack` columns beyond the last.
    pub fn new(patches: &Patches, tiles: &[Tile], slack: usize) -> Self {
        let mut by_shape: Vec<((usize, usize), Vec<usize>)> = Vec::new();
        for tile in tiles {
            let shape = (tile.images.len(), tile.lines.len());
            if !by_shape.iter().any(|(s, _)| *s == shape) {
                by_shape.push((shape, patches.offsets(tile, slack)));
            }
        }
        TileOffsets { by_shape }
    }

    /// Of one of the tiles.
    pub fn of(&self, tile: &Tile) -> &[usize] {
        let shape = (tile.images.len(), tile.lines.len());
        self.by_shape.iter().find(|(s, _)| *s == shape).map_or(&[], |(_, o)| o)
    }
}
