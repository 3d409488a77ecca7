//! Convolutions, plain and fused: `kernels/conv.cu`, `kernels/conv_stem.cu`, `kernels/conv_direct.cu`, `kernels/conv_wgmma.cu`, and both gradients
//! from one tile, `kernels/conv_direct_joint.cu` and `kernels/conv_wgmma_joint.cu`.

use super::conv_around::{Found, Pair, Sums};
use super::conv_cells::{self, CellBackwardParams, CellParams, CellTiling, Scale};
use super::conv_names::{Way, kernel};
use super::conv_params::{ConvBackwardParams, ConvNorm, ConvPair, ConvParams, ConvProduct, ConvTerm};
use super::conv_stem;
use super::conv_tiles::Tiling;
use super::{Lowering, Operand, Operands, joint_cells, joint_direct};
use crate::device::cuda::driver::{Address, Generation};
use crate::error::{Error, Result};
use crate::ops::{Conv, ConvForm, ConvGeom, ConvKind, Epilogue, FusedConv, Operation};
use crate::plan::Args;
use bytemuck::Zeroable;

/// Threads of a block.
pub(super) const THREADS: usize = 128;
/// Bytes of shared memory of a block: the tables of positions and two pairs of tiles (`Shared` in the kernels).
const SHARED_32: usize = 43_264;
/// The same with operands of 16 bits.
const SHARED_16: usize = 26_880;
/// Most bytes of partial results.
const PARTIAL_BYTES: usize = 64 << 20;
/// `RECORD_GROUP`: row tiles whose records are combined at a time.
const RECORD_GROUP: usize = 32;
/// `RECORD`: bytes of the largest record of a column.
const RECORD: usize = 16;
/// Bytes to which the direct kernels want tensors aligned.
const ALIGN: u64 = 16;
/// The kernels add up paddings, image sizes and kernel sizes in 32 bits.
const MOST_PADDED_SIDE: usize = 1 << 29;
/// The kernels number the stride² remainders of a pixel in 32 bits.
const MOST_STRIDE: usize = 1 << 15;

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
pub(super) struct Job<'a> {
    kind: ConvKind,
    pub geom: &'a ConvGeom,
    /// Image and matrix of each term.
    pub terms: &'a [[Operand; 2]],
    /// The term whose image is `relu(bn(·))` of what is given, and the batch norm's `g, b, mean, var`.
    norm: Option<(usize, [Operand; 4])>,
    /// The pair that the first term's image is: delta in dgrad, else a tangent.
    image: Option<Pair>,
    /// The pair that the matrix of a weight gradient is: delta.
    matrix: Option<Pair>,
    start: Option<Operand>,
    pub out: Operand,
    found: Found,
}

impl<'a> Job<'a> {
    /// A product with nothing around it.
    fn plain(kind: ConvKind, geom: &'a ConvGeom, terms: &'a [[Operand; 2]], out: Operand) -> Self {
        Job { kind, geom, terms, norm: None, image: None, matrix: None, start: None, out, found: Found::Nothing }
    }
}

/// What runs beside a product in the same launch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    Nothing,
    /// The gradient of the input, per branch.
    Dgrad,
    /// The gradient of the input, summed over the branches.
    SummedDgrad,
    /// Both gradients are made by the same blocks, so many for each branch of the results.
    OneTile(usize),
}

impl Job<'_> {
    /// Branches that term `i` adds up in each element of the result.
    fn segments(&self, i: usize, branches: usize) -> usize {
        let norm = self.norm.iter().filter(|(term, _)| *term == i).flat_map(|(_, operands)| operands);
        let pairs = self.pairs().filter(|_| i == 0).flat_map(Pair::operands);
        let branched = self.terms[i].iter().chain(norm).chain(pairs).any(|o| o.meta.per_branch);
        if branched && !self.out.meta.per_branch { branches } else { 1 }
    }

    pub fn pairs(&self) -> impl Iterator<Item = &Pair> {
        self.image.iter().chain(&self.matrix)
    }

    /// All tensors.
    fn operands(&self) -> impl Iterator<Item = &Operand> {
        let norm = self.norm.iter().flat_map(|(_, operands)| operands);
        let pairs = self.pairs().flat_map(|pair| pair.operands().chain(&pair.kept));
        let given = self.terms.iter().flatten().chain(norm).chain(pairs);
        given.chain(&self.start).chain([&self.out]).chain(self.found.operands())
    }

    /// Those with eight neighbours of which the direct kernels do something at a time.
    fn tensors(&self) -> impl Iterator<Item = &Operand> {
        let pairs = self.pairs().flat_map(Pair::activations);
        self.terms.iter().flatten().chain(pairs).chain(&self.start).chain([&self.out]).chain(self.found.next())
    }

    /// Segments of all terms.
    pub fn all_segments(&self, branches: usize) -> usize {
        (0..self.terms.len()).map(|i| self.segments(i, branches)).sum()
    }

    /// Whether kernels can take it that work on patches: if they can take its sizes.
    pub fn by_patches(&self, lowering: &Lowering<'_>) -> bool {
        let halves = matches!(lowering.operands, Operands::F16 | Operands::Bf16);
        let aligned = self.tensors().all(|o| o.at.0.is_multiple_of(ALIGN));
        halves && aligned && self.out.len() > 0
    }

    /// Its tiles, if the direct kernels can take it.
    fn direct(&self, lowering: &Lowering<'_>) -> Option<Tiling> {
        let tiling = Tiling::direct(self.kind, self.geom, self.all_segments(lowering.branches()));
        tiling.filter(|_| self.by_patches(lowering))
    }

    /// Its tiles, if the kernels for images of few channels can take it, to which they do nothing, and what is wide of them.
    fn stem(&self, lowering: &Lowering<'_>) -> Option<(Tiling, usize)> {
        let plain = self.norm.is_none() && self.image.is_none();
        conv_stem::tiling(self.kind, self.geom).filter(|_| plain && self.by_patches(lowering))
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
    pub fn lower(&self, lowering: &mut Lowering<'_>, tiling: &Tiling, beside: Beside) -> Result<(ConvProduct, usize)> {
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
            product.norm = ConvNorm::of_four(norm);
        }
        let count = g.n * g.p * g.q;
        product.image = self.image.as_ref().map_or(ConvPair::zeroed(), |pair| pair.lower(count));
        product.matrix = self.matrix.as_ref().map_or(ConvPair::zeroed(), |pair| pair.lower(count));
        match &self.found {
            Found::Nothing => {}
            Found::Statistics([mean, var]) => (product.mean, product.var) = (mean.at, var.at),
            Found::Sums(sums) => product.sums = sums.lower(),
        }
        let columns = column_tiles * branches;
        let groups = row_tiles.div_ceil(RECORD_GROUP);
        let finds = !matches!(self.found, Found::Nothing);
        if splits > 1 {
            product.partial = lowering.partial_sums(4 * tiling.size[0] * tiling.size[1] * tiles * splits);
        }
        if finds {
            product.tile_sums = lowering.scratch(RECORD * tiling.size[1] * columns * row_tiles);
            product.group_sums = lowering.scratch(RECORD * tiling.size[1] * columns * groups);
        }
        if splits > 1 || finds {
            product.arrivals = lowering.counters(tiles + columns * (groups + 1));
        }
        Ok((product, blocks * splits))
    }
}

/// Parts into which the inner dimension of the tiles of the result, and of the blocks that make them, is divided; shapes alone decide it.
pub(super) fn splits(tiling: &Tiling, [blocks, tiles]: [usize; 2], iterations: usize, beside: Beside) -> usize {
    // Rounded down: partial sums are written and read again, which costs more than blocks that are some too few.
    let idle = tiling.abreast / blocks;
    let wanted = match beside {
        Beside::Nothing => idle,
        Beside::Dgrad | Beside::SummedDgrad => idle.max(iterations.div_ceil(tiling.joint)),
        Beside::OneTile(runs) => return runs,
    };
    let worth = iterations / tiling.least;
    let fit = PARTIAL_BYTES / (4 * tiling.size[0] * tiling.size[1] * tiles);
    wanted.min(worth).min(fit).max(1)
}

/// Refuses what the kernels' numbers have no room for, halves where the operand type has none, what is found of a shared result
/// with tensors per branch, or of a result per branch for all branches together, and a delta that is kept for other branches than it has.
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
    let made = job.found.results();
    let branched = job.out.meta.per_branch;
    let read = job.found.operands().into_iter().any(|o| o.meta.per_branch && !branched);
    if read || made.iter().any(|o| o.meta.per_branch != branched) {
        let what = "what is found of a result must be per branch as it is, of operands that are no more so";
        return Err(Error::shape(name, format!("{what} ({})", lowering.label)));
    }
    let given = &job.terms[0][1].meta;
    for (pair, kept) in job.matrix.iter().filter_map(|pair| Some((pair, pair.kept?))) {
        let made = given.per_branch || pair.operands().any(|o| o.meta.per_branch);
        if kept.meta.per_branch != made {
            let what = "a cotangent that is kept must be per branch as it is";
            return Err(Error::shape(name, format!("{what} ({})", lowering.label)));
        }
    }
    Ok(())
}

/// Appends the launch of one product, or of the gradients of the input and of the weights together.
fn launch(lowering: &mut Lowering<'_>, name: &'static str, jobs: &[Job<'_>]) -> Result<()> {
    jobs.iter().try_for_each(|job| check(lowering, name, job.geom, job))?;
    let dgrad = jobs.iter().find(|job| job.kind == ConvKind::Dgrad);
    if let [dgrad, wgrad] = jobs
        && (joint_cells::launch(lowering, dgrad, wgrad)? || joint_direct::launch(lowering, dgrad, wgrad)?)
    {
        return Ok(());
    }
    let leading = dgrad.unwrap_or(&jobs[0]);
    // Both gradients go one way: that of warpgroups, else on patches, else gathered. One alone may go that of few channels.
    let width = conv_cells::width(leading.kind, leading.geom);
    let cells: Option<Vec<_>> = jobs.iter().map(|job| job.cells(lowering, width)).collect();
    let direct: Option<Vec<Tiling>> = jobs.iter().map(|job| job.direct(lowering)).collect();
    let stem = if jobs.len() == 1 { leading.stem(lowering) } else { None };
    let (way, threads, tilings) = match (&cells, direct, stem) {
        (Some(cells), ..) => (Way::Cells(width), conv_cells::THREADS, cells.iter().map(|c| c.0).collect()),
        (None, Some(direct), _) => (Way::Direct(Tiling::width(leading.kind, leading.geom)), THREADS, direct),
        (None, None, Some((stem, width))) => (Way::Stem(width), THREADS, vec![stem]),
        (None, None, None) => (Way::Gathered, THREADS, jobs.iter().map(|job| job.gathered(lowering)).collect()),
    };
    let cells = |kind: ConvKind| -> Option<CellTiling> {
        let (_, (_, cells)) = jobs.iter().zip(cells.as_ref()?).find(|(job, _)| job.kind == kind)?;
        Some(*cells)
    };
    let pairs = jobs.iter().any(|job| job.pairs().next().is_some());
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
                let kernel = kernel(lowering.operands, true, way, pairs);
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
        let kernel = kernel(lowering.operands, false, way, pairs);
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
    launch(lowering, conv.name(), &[Job { start, ..Job::plain(conv.kind, &conv.geom, &terms, out) }])
}

pub(super) fn fused(lowering: &mut Lowering<'_>, op: &FusedConv, args: &Args) -> Result<()> {
    let operand = |i| lowering.input(args, i);
    let result = |i| lowering.output(args, i);
    let geom = &op.geom;
    let x = operand(op.x_operand());
    let norm = op.norm_operands().map(|at| at.map(operand));
    let start = op.start_operand().map(operand);
    let tangent = || {
        let vectors = op.tangent_operands()?.map(operand).to_vec();
        Some(Pair { with: x, norm: norm?, vectors, residual: None, kept: None })
    };
    // Of x as it is given, unless the form takes its tangent.
    let norm_of = |term| norm.filter(|_| !op.tangent || op.form == ConvForm::Tangent).map(|norm| (term, norm));
    let delta = || {
        let [y, g, b, mean, var, dg, db] = op.delta_operands()?.map(operand);
        let residual = op.residual_operand().map(operand);
        Some(Pair { with: y, norm: [g, b, mean, var], vectors: vec![dg, db], residual, kept: None })
    };
    // The weight gradient reads every element of dy as often as every other, and stores it.
    let kept_delta = || Some(Pair { kept: op.delta_result().map(result), ..delta()? });
    let sums = |next, gain, moments, results| Found::Sums(Box::new(Sums { next, gain, moments, results }));
    let found = match (op.epilogue_results().map(|at| at.map(result)), op.epilogue_operands(), op.epilogue, norm) {
        (Some(results), Some(at), ..) => {
            let [next, mean, var] = at.map(operand);
            sums(next, None, [mean, var], results)
        }
        (Some(results), _, Epilogue::BackwardSums, Some([g, b, mean, var])) => {
            sums(x, Some([g, b]), [mean, var], results)
        }
        (Some(results), ..) => Found::Statistics(results),
        (None, ..) => Found::Nothing,
    };
    match op.form {
        ConvForm::Fprop => {
            let terms = [[operand(0), operand(1)]];
            let job = Job { norm: norm_of(0), start, found, ..Job::plain(ConvKind::Fprop, geom, &terms, result(0)) };
            launch(lowering, op.name(), &[job])
        }
        ConvForm::Tangent => {
            let terms = [[operand(0), operand(3)], [operand(2), operand(1)]];
            let plain = Job::plain(ConvKind::Fprop, geom, &terms, result(0));
            launch(lowering, op.name(), &[Job { norm: norm_of(1), image: tangent(), start, found, ..plain }])
        }
        ConvForm::Wgrad => {
            let terms = [[operand(0), operand(1)]];
            let plain = Job::plain(ConvKind::Wgrad, geom, &terms, result(0));
            launch(
                lowering,
                op.name(),
                &[Job { norm: norm_of(0), image: tangent(), matrix: kept_delta(), start, ..plain }],
            )
        }
        ConvForm::Backward => {
            let (x, w, dy) = (operand(0), operand(1), operand(2));
            let (to_x, to_w) = ([[dy, w]], [[x, dy]]);
            let dgrad = Job::plain(ConvKind::Dgrad, geom, &to_x, result(0));
            let wgrad = Job::plain(ConvKind::Wgrad, geom, &to_w, result(1));
            let dgrad = Job { image: delta(), start, found, ..dgrad };
            let wgrad = Job { norm: norm_of(0), image: tangent(), matrix: kept_delta(), ..wgrad };
            launch(lowering, op.name(), &[dgrad, wgrad])
        }
    }
}
