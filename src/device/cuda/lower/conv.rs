//! Convolutions, plain and fused: `kernels/conv.cu`, `kernels/conv_direct.cu` and `kernels/conv_wgmma.cu`.

use super::conv_cells::{self, CellTiling, Scale};
use super::conv_tiles::Tiling;
use super::{Lowering, Operand, Operands};
use crate::device::cuda::driver::{Address, Generation};
use crate::error::{Error, Result};
use crate::ops::{BN_EPS, Conv, ConvForm, ConvGeom, ConvKind, FusedConv, Operation};
use crate::plan::Args;
use bytemuck::{Pod, Zeroable};

/// Threads of a block.
const THREADS: usize = 128;
/// Bytes of shared memory of a block: the tables of positions and two pairs of tiles (`Shared` in the kernels).
const SHARED_32: usize = 40_192;
/// The same with operands of 16 bits.
const SHARED_16: usize = 23_808;
/// Blocks that keep any present card busy. A product with fewer tiles is split along its inner dimension.
const BLOCKS: usize = 264;
/// Most bytes of partial results.
const PARTIAL_BYTES: usize = 64 << 20;
/// `MOMENT_GROUP`: row tiles whose statistics are combined at a time.
const MOMENT_GROUP: usize = 32;
/// Bytes of `Moments`.
const MOMENTS: usize = 16;
/// Bytes to which the direct kernels want tensors aligned.
const ALIGN: u64 = 16;
/// The kernels add up paddings, image sizes and kernel sizes in 32 bits.
const MOST_PADDED_SIDE: usize = 1 << 29;
/// The kernels number the stride² remainders of a pixel in 32 bits.
const MOST_STRIDE: usize = 1 << 15;

/// Twin of `ConvTerm`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvTerm {
    image: Address,
    matrix: Address,
    image_branch: i64,
    matrix_branch: i64,
    segments: i32,
    image_half: i32,
    matrix_half: i32,
    norm: i32,
}
const _: () = assert!(size_of::<ConvTerm>() == 48);

/// Twin of `ConvNorm`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvNorm {
    at: [Address; 4],
    branch: [i64; 4],
    epsilon: f32,
    unused: i32,
}
const _: () = assert!(size_of::<ConvNorm>() == 72);

/// Twin of `ConvProduct`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvProduct {
    terms: [ConvTerm; 2],
    norm: ConvNorm,
    start: Address,
    out: Address,
    start_branch: i64,
    out_branch: i64,
    mean: Address,
    var: Address,
    partial: Address,
    tile_sums: Address,
    group_sums: Address,
    arrivals: Address,
    rows: i32,
    columns: i32,
    inner: i32,
    image_height: i32,
    image_width: i32,
    image_channels: i32,
    grid_height: i32,
    grid_width: i32,
    kernel_width: i32,
    stride: i32,
    pad: i32,
    filter: i32,
    row_tiles: i32,
    column_tiles: i32,
    inner_tiles: i32,
    segments: i32,
    splits: i32,
    branches: i32,
    by_pixel: i32,
    start_half: i32,
    out_half: i32,
    kernel_height: i32,
    images: i32,
    patch_images: i32,
    patch_height: i32,
    patch_width: i32,
    patches_down: i32,
    patches_across: i32,
    halo_height: i32,
    halo_width: i32,
}
const _: () = assert!(size_of::<ConvProduct>() == 368);

/// Twin of `ConvParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvParams {
    product: ConvProduct,
}
const _: () = assert!(size_of::<ConvParams>() == 368);

/// Twin of `ConvBackwardParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvBackwardParams {
    dgrad: ConvProduct,
    wgrad: ConvProduct,
    dgrad_blocks: i32,
    wgrad_blocks: i32,
}
const _: () = assert!(size_of::<ConvBackwardParams>() == 744);

/// Twin of `CellParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CellParams {
    product: ConvProduct,
    tiling: CellTiling,
}
const _: () = assert!(size_of::<CellParams>() == size_of::<ConvParams>() + 32);

/// Twin of `CellBackwardParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CellBackwardParams {
    both: ConvBackwardParams,
    dgrad: CellTiling,
    wgrad: CellTiling,
}
const _: () = assert!(size_of::<CellBackwardParams>() == size_of::<ConvBackwardParams>() + 64);

/// A form as the kernels see it: a matrix product of gathered operands.
struct Shape {
    /// `[height, width, channels]` of the operand that is gathered by pixel and tap.
    image: [usize; 3],
    /// `[height, width]` of the pixels of each sample.
    grid: [usize; 2],
    rows: usize,
    columns: usize,
    inner: usize,
}

impl Shape {
    fn new(kind: ConvKind, g: &ConvGeom) -> Self {
        let (x, y) = ([g.h, g.w, g.c], [g.p, g.q, g.k]);
        match kind {
            ConvKind::Fprop => {
                Shape { image: x, grid: [g.p, g.q], rows: g.n * g.p * g.q, columns: g.k, inner: g.r * g.s * g.c }
            }
            ConvKind::Dgrad => {
                Shape { image: y, grid: [g.h, g.w], rows: g.n * g.h * g.w, columns: g.c, inner: g.r * g.s * g.k }
            }
            ConvKind::Wgrad => {
                Shape { image: x, grid: [g.p, g.q], rows: g.k, columns: g.r * g.s * g.c, inner: g.n * g.p * g.q }
            }
        }
    }
}

/// Operands and results of one product. The image is x or dy; the matrix is w, or dy of a weight gradient.
struct Job<'a> {
    kind: ConvKind,
    geom: &'a ConvGeom,
    /// Image and matrix of each term.
    terms: &'a [[Operand; 2]],
    /// The term to whose image the batch norm belongs, and its `g, b, mean, var`.
    norm: Option<(usize, [Operand; 4])>,
    start: Option<Operand>,
    out: Operand,
    /// Mean and variance of the result.
    stats: Option<[Operand; 2]>,
}

/// What runs beside a product in the same launch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// The gradient of the input, per branch.
    Dgrad,
    /// The gradient of the input, summed over the branches.
    SummedDgrad,
}

impl Job<'_> {
    /// Branches that term `i` adds up in each element of the result.
    fn segments(&self, i: usize, branches: usize) -> usize {
        let norm = self.norm.iter().filter(|(term, _)| *term == i).flat_map(|(_, operands)| operands);
        let branched = self.terms[i].iter().chain(norm).any(|o| o.meta.per_branch);
        if branched && !self.out.meta.per_branch { branches } else { 1 }
    }

    /// All tensors.
    fn operands(&self) -> impl Iterator<Item = &Operand> {
        let norm = self.norm.iter().flat_map(|(_, operands)| operands);
        let stats = self.stats.iter().flatten();
        self.terms.iter().flatten().chain(norm).chain(&self.start).chain([&self.out]).chain(stats)
    }

    /// Segments of all terms.
    fn all_segments(&self, branches: usize) -> usize {
        (0..self.terms.len()).map(|i| self.segments(i, branches)).sum()
    }

    /// Whether kernels can take it that work on patches: if they can take its sizes.
    fn by_patches(&self, lowering: &Lowering<'_>) -> bool {
        let halves = matches!(lowering.operands, Operands::F16 | Operands::Bf16);
        let mut tensors = self.terms.iter().flatten().chain(&self.start).chain([&self.out]);
        halves && self.out.len() > 0 && tensors.all(|o| o.at.0.is_multiple_of(ALIGN))
    }

    /// Its tiles, if the direct kernels can take it.
    fn direct(&self, lowering: &Lowering<'_>) -> Option<Tiling> {
        let tiling = Tiling::direct(self.kind, self.geom, self.all_segments(lowering.branches()));
        tiling.filter(|_| self.by_patches(lowering))
    }

    /// Its tiles, if the kernels for Hopper can take it.
    fn cells(&self, lowering: &Lowering<'_>, width: usize) -> Option<(Tiling, CellTiling)> {
        if lowering.generation != Generation::Hopper || !self.by_patches(lowering) {
            return None;
        }
        let (segments, branches) = (self.all_segments(lowering.branches()), self.out.branches(lowering.branches()));
        conv_cells::cells(self.kind, self.geom, Scale { segments, branches, width })
    }

    /// Its tiles with the kernels that gather.
    fn gathered(&self, lowering: &Lowering<'_>) -> Tiling {
        let shape = Shape::new(self.kind, self.geom);
        let shared = match lowering.operands {
            Operands::F32 | Operands::Tf32 => SHARED_32,
            Operands::F16 | Operands::Bf16 => SHARED_16,
        };
        Tiling::gathered([shape.rows, shape.columns, shape.inner], shared)
    }

    /// Its parameters and its number of blocks; none where the result has no elements.
    fn lower(&self, lowering: &mut Lowering<'_>, tiling: &Tiling, beside: Beside) -> Result<(ConvProduct, usize)> {
        let narrow = |v: usize| lowering.narrow("elements of a branch", v);
        let g = self.geom;
        self.operands().try_for_each(|o| narrow(o.len()).map(drop))?;
        if self.out.len() == 0 {
            return Ok((ConvProduct::zeroed(), 0));
        }
        let shape = Shape::new(self.kind, g);
        let [row_tiles, column_tiles, inner_tiles] = tiling.tiles;
        let segments = self.all_segments(lowering.branches());
        let branches = self.out.branches(lowering.branches());
        let tiles = row_tiles * column_tiles * branches;
        narrow(inner_tiles * segments)?;
        let blocks = row_tiles.div_ceil(tiling.run) * column_tiles * branches;
        let splits = splits(tiling, [blocks, tiles], inner_tiles * segments, beside);
        let patches = &tiling.patches;
        let mut product = ConvProduct {
            start: self.start.map_or(Address::NULL, |s| s.at),
            out: self.out.at,
            start_branch: self.start.map_or(0, |s| s.branch),
            out_branch: self.out.branch,
            rows: narrow(shape.rows)?,
            columns: narrow(shape.columns)?,
            inner: narrow(shape.inner)?,
            image_height: narrow(shape.image[0])?,
            image_width: narrow(shape.image[1])?,
            image_channels: narrow(shape.image[2])?,
            grid_height: narrow(shape.grid[0])?,
            grid_width: narrow(shape.grid[1])?,
            kernel_width: narrow(g.s)?,
            stride: narrow(g.stride)?,
            pad: narrow(g.pad)?,
            filter: narrow(g.r * g.s * g.c)?,
            row_tiles: narrow(row_tiles)?,
            column_tiles: narrow(column_tiles)?,
            inner_tiles: narrow(inner_tiles)?,
            segments: narrow(segments)?,
            splits: narrow(splits)?,
            branches: narrow(branches)?,
            by_pixel: (beside == Beside::SummedDgrad).into(),
            start_half: self.start.is_some_and(|s| s.half).into(),
            out_half: self.out.half.into(),
            kernel_height: narrow(g.r)?,
            images: narrow(g.n)?,
            patch_images: narrow(patches.images)?,
            patch_height: narrow(patches.size[0])?,
            patch_width: narrow(patches.size[1])?,
            patches_down: narrow(patches.count[0])?,
            patches_across: narrow(patches.count[1])?,
            halo_height: narrow(patches.halo[0])?,
            halo_width: narrow(patches.halo[1])?,
            ..ConvProduct::zeroed()
        };
        for (i, [image, matrix]) in self.terms.iter().enumerate() {
            product.terms[i] = ConvTerm {
                image: image.at,
                matrix: matrix.at,
                image_branch: image.branch,
                matrix_branch: matrix.branch,
                segments: narrow(self.segments(i, lowering.branches()))?,
                image_half: image.half.into(),
                matrix_half: matrix.half.into(),
                norm: self.norm.as_ref().is_some_and(|(term, _)| *term == i).into(),
            };
        }
        if let Some((_, norm)) = &self.norm {
            let (at, branch) = (norm.map(|o| o.at), norm.map(|o| o.branch));
            product.norm = ConvNorm { at, branch, epsilon: BN_EPS as f32, unused: 0 };
        }
        let columns = column_tiles * branches;
        let groups = row_tiles.div_ceil(MOMENT_GROUP);
        if splits > 1 {
            product.partial = lowering.scratch(4 * tiling.size[0] * tiling.size[1] * tiles * splits);
        }
        if let Some([mean, var]) = &self.stats {
            (product.mean, product.var) = (mean.at, var.at);
            product.tile_sums = lowering.scratch(MOMENTS * tiling.size[1] * columns * row_tiles);
            product.group_sums = lowering.scratch(MOMENTS * tiling.size[1] * columns * groups);
        }
        if splits > 1 || self.stats.is_some() {
            product.arrivals = lowering.counters(tiles + columns * (groups + 1));
        }
        Ok((product, blocks * splits))
    }
}

/// Parts into which the inner dimension of the tiles of the result, and of the blocks that make them, is divided; shapes alone decide it.
fn splits(tiling: &Tiling, [blocks, tiles]: [usize; 2], iterations: usize, beside: Beside) -> usize {
    let wanted = match beside {
        Beside::Nothing => BLOCKS.div_ceil(blocks),
        Beside::Dgrad | Beside::SummedDgrad => BLOCKS.div_ceil(blocks).max(iterations.div_ceil(tiling.joint)),
    };
    let worth = iterations / tiling.least;
    let fit = PARTIAL_BYTES / (4 * tiling.size[0] * tiling.size[1] * tiles);
    wanted.min(worth).min(fit).max(1)
}

/// Refuses what the kernels' numbers have no room for, and halves where the operand type has none.
fn check(lowering: &Lowering<'_>, name: &'static str, g: &ConvGeom, job: &Job<'_>) -> Result<()> {
    if g.h.max(g.w) + 2 * g.pad > MOST_PADDED_SIDE || g.stride > MOST_STRIDE {
        let what = format!("padding {} or stride {} is too large for its kernel", g.pad, g.stride);
        return Err(Error::shape(name, format!("{what} ({})", lowering.label)));
    }
    let wide = matches!(lowering.operands, Operands::F32 | Operands::Tf32);
    if wide && job.operands().any(|o| o.half) {
        let what = format!("tensors of 16 bits with operands of type {}", lowering.operands.name());
        return Err(Error::shape(name, format!("{what} ({})", lowering.label)));
    }
    Ok(())
}

/// Kernels by operand type.
struct Kernels {
    f32: &'static str,
    tf32: &'static str,
    f16: &'static str,
    bf16: &'static str,
}

/// The kernels `name` of all operand types, or those of 16 bits, which others do not ask for.
macro_rules! kernels {
    ($name:literal) => {
        Kernels {
            f32: concat!($name, "_f32"),
            tf32: concat!($name, "_tf32"),
            f16: concat!($name, "_f16"),
            bf16: concat!($name, "_bf16"),
        }
    };
}

/// Ways to compute a product, with the columns of a tile where there are several.
#[derive(Clone, Copy)]
enum Way {
    Gathered,
    Direct(usize),
    Cells(usize),
}

/// The kernel of fprop, or else of the gradients.
fn kernel(operands: Operands, fprop: bool, way: Way) -> &'static str {
    let kernels = match (fprop, way) {
        (true, Way::Gathered) => kernels!("conv2d_fprop"),
        (true, Way::Direct(32)) => kernels!("conv2d_direct_fprop_32"),
        (true, Way::Direct(_)) => kernels!("conv2d_direct_fprop_64"),
        (true, Way::Cells(32)) => kernels!("conv2d_wgmma_fprop_32"),
        (true, Way::Cells(_)) => kernels!("conv2d_wgmma_fprop_64"),
        (false, Way::Gathered) => kernels!("conv2d_backward"),
        (false, Way::Direct(32)) => kernels!("conv2d_direct_backward_32"),
        (false, Way::Direct(_)) => kernels!("conv2d_direct_backward_64"),
        (false, Way::Cells(32)) => kernels!("conv2d_wgmma_backward_32"),
        (false, Way::Cells(_)) => kernels!("conv2d_wgmma_backward_64"),
    };
    match operands {
        Operands::F32 => kernels.f32,
        Operands::Tf32 => kernels.tf32,
        Operands::F16 => kernels.f16,
        Operands::Bf16 => kernels.bf16,
    }
}

/// Appends the launch of one product, or of the gradients of the input and of the weights together.
fn launch(lowering: &mut Lowering<'_>, name: &'static str, jobs: &[Job<'_>]) -> Result<()> {
    jobs.iter().try_for_each(|job| check(lowering, name, job.geom, job))?;
    let dgrad = jobs.iter().find(|job| job.kind == ConvKind::Dgrad);
    let leading = dgrad.unwrap_or(&jobs[0]);
    // Both gradients go one way: that of warpgroups, else on patches, else gathered.
    let width = conv_cells::width(leading.kind, leading.geom);
    let cells: Option<Vec<_>> = jobs.iter().map(|job| job.cells(lowering, width)).collect();
    let direct: Option<Vec<Tiling>> = jobs.iter().map(|job| job.direct(lowering)).collect();
    let (way, threads, tilings) = match (&cells, direct) {
        (Some(cells), _) => (Way::Cells(width), conv_cells::THREADS, cells.iter().map(|c| c.0).collect()),
        (None, Some(direct)) => (Way::Direct(Tiling::width(leading.kind, leading.geom)), THREADS, direct),
        (None, None) => (Way::Gathered, THREADS, jobs.iter().map(|job| job.gathered(lowering)).collect()),
    };
    let cells = |kind: ConvKind| -> Option<CellTiling> {
        let (_, (_, cells)) = jobs.iter().zip(cells.as_ref()?).find(|(job, _)| job.kind == kind)?;
        Some(*cells)
    };
    let shared = tilings.iter().map(|t| t.shared).max().unwrap_or(0);
    let (mut params, mut blocks) = (ConvBackwardParams::zeroed(), 0);
    for (job, tiling) in jobs.iter().zip(&tilings) {
        let beside = match dgrad {
            Some(dgrad) if job.kind == ConvKind::Wgrad => {
                if dgrad.segments(0, lowering.branches()) > 1 {
                    Beside::SummedDgrad
                } else {
                    Beside::Dgrad
                }
            }
            _ => Beside::Nothing,
        };
        let (product, own) = job.lower(lowering, tiling, beside)?;
        blocks += own;
        let count = lowering.narrow("blocks", own)?;
        match job.kind {
            ConvKind::Fprop => {
                let kernel = kernel(lowering.operands, true, way);
                match cells(ConvKind::Fprop) {
                    _ if own == 0 => {}
                    Some(tiling) => {
                        lowering.push(kernel, &CellParams { product, tiling }, [own, 1, 1], threads, shared);
                    }
                    None => lowering.push(kernel, &ConvParams { product }, [own, 1, 1], threads, shared),
                }
                return Ok(());
            }
            ConvKind::Dgrad => (params.dgrad, params.dgrad_blocks) = (product, count),
            ConvKind::Wgrad => (params.wgrad, params.wgrad_blocks) = (product, count),
        }
    }
    if blocks > 0 {
        let kernel = kernel(lowering.operands, false, way);
        match (cells(ConvKind::Dgrad), cells(ConvKind::Wgrad)) {
            (None, None) => lowering.push(kernel, &params, [blocks, 1, 1], threads, shared),
            (dgrad, wgrad) => {
                let [dgrad, wgrad] = [dgrad, wgrad].map(|c| c.unwrap_or(CellTiling::zeroed()));
                let params = CellBackwardParams { both: params, dgrad, wgrad };
                lowering.push(kernel, &params, [blocks, 1, 1], threads, shared);
            }
        }
    }
    Ok(())
}

pub(super) fn conv(lowering: &mut Lowering<'_>, conv: &Conv, args: &Args) -> Result<()> {
    let terms = [[lowering.input(args, 0), lowering.input(args, 1)]];
    let (start, out) = (lowering.optional_input(args, 2), lowering.output(args, 0));
    let job = Job { kind: conv.kind, geom: &conv.geom, terms: &terms, norm: None, start, out, stats: None };
    launch(lowering, conv.name(), &[job])
}

pub(super) fn fused(lowering: &mut Lowering<'_>, op: &FusedConv, args: &Args) -> Result<()> {
    let operand = |i| lowering.input(args, i);
    let geom = &op.geom;
    let norm = |term| op.norm_operands().map(|at| (term, at.map(operand)));
    let start = op.start_operand().map(operand);
    let out = lowering.output(args, 0);
    let stats = op.stats.then(|| [1, 2].map(|i| lowering.output(args, i)));
    match op.form {
        ConvForm::Fprop => {
            let terms = [[operand(0), operand(1)]];
            let job = Job { kind: ConvKind::Fprop, geom, terms: &terms, norm: norm(0), start, out, stats };
            launch(lowering, op.name(), &[job])
        }
        ConvForm::Tangent => {
            let terms = [[operand(0), operand(3)], [operand(2), operand(1)]];
            let job = Job { kind: ConvKind::Fprop, geom, terms: &terms, norm: norm(1), start, out, stats: None };
            launch(lowering, op.name(), &[job])
        }
        ConvForm::Wgrad => {
            let terms = [[operand(0), operand(1)]];
            let job = Job { kind: ConvKind::Wgrad, geom, terms: &terms, norm: norm(0), start, out, stats: None };
            launch(lowering, op.name(), &[job])
        }
        ConvForm::Backward => {
            let (x, w, dy) = (operand(0), operand(1), operand(2));
            let dgrad = Job { kind: ConvKind::Dgrad, geom, terms: &[[dy, w]], norm: None, start, out, stats: None };
            let (norm, out) = (norm(0), lowering.output(args, 1));
            let wgrad = Job { kind: ConvKind::Wgrad, geom, terms: &[[x, dy]], norm, start: None, out, stats: None };
            launch(lowering, op.name(), &[dgrad, wgrad])
        }
    }
}
