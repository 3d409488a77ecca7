//! From a launch of a plan to kernel launches: one file per family of kernels, each beside its parameter structs.
//!
//! Lowering computes addresses and sizes only. It touches no memory and needs no machine.

mod batch_norm;
mod conv;
mod conv_around;
mod conv_cells;
mod conv_names;
mod conv_params;
mod conv_stem;
mod conv_tiles;
mod elementwise;
mod finite;
mod joint;
mod joint_cells;
mod joint_direct;
mod neighbours;
mod pool;
mod rows;
mod softmax;
mod update;

use super::driver::{Address, Generation, Launch, Limits};
use crate::device::shortage::REMEDY;
use crate::error::{Error, Result};
use crate::ops::{Op, Operation};
use crate::plan::{Args, Place, Plan};
use crate::tape::{Coef, DType, Meta};
use batch_norm::Mask;

/// Element type to which the operands of convolutions are rounded; they accumulate in f32 whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operands {
    /// IEEE single precision, on the ordinary arithmetic units.
    F32,
    /// 10 bits of mantissa, range of f32.
    Tf32,
    /// IEEE half precision; what leaves its range becomes infinite.
    F16,
    /// 7 bits of mantissa, range of f32.
    Bf16,
}

impl Operands {
    /// Its name on the command line and at the end of kernel names.
    pub fn name(self) -> &'static str {
        match self {
            Operands::F32 => "f32",
            Operands::Tf32 => "tf32",
            Operands::F16 => "f16",
            Operands::Bf16 => "bf16",
        }
    }

    /// Whether activations and their cotangents can lie in 16 bits.
    pub fn is_half(self) -> bool {
        matches!(self, Operands::F16 | Operands::Bf16)
    }

    /// What a number becomes in a tensor that lies in 16 bits, or in 32 where there are none such: the nearest one, ties to even.
    pub fn stored(self, x: f64) -> f64 {
        match self {
            Operands::F16 => half::f16::from_f64(x).to_f64(),
            Operands::Bf16 => half::bf16::from_f64(x).to_f64(),
            Operands::F32 | Operands::Tf32 => f64::from(x as f32),
        }
    }
}

/// How the reals of a tensor lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    F32,
    F16,
    Bf16,
}

/// The name of the kernel for a [`Storage`]: the given one, its end saying what it loads and stores.
macro_rules! stored {
    ($storage:expr, $name:literal) => {
        match $storage {
            $crate::device::cuda::lower::Storage::F32 => concat!($name, "_f32"),
            $crate::device::cuda::lower::Storage::F16 => concat!($name, "_f16"),
            $crate::device::cuda::lower::Storage::Bf16 => concat!($name, "_bf16"),
        }
    };
}
use stored;

/// Where everything lies that a plan can touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bases {
    pub reals: Address,
    pub halves: Address,
    pub indices: Address,
    /// Partial sums and the like; dead after the launches of one operation.
    pub scratch: Address,
    /// Words that are 0 between launches.
    pub counters: Address,
    /// Coefficients of this run, f32.
    pub coefs: Address,
    /// Tables of operands.
    pub tables: Address,
    /// One per state of the plan; null where the plan does not touch it.
    pub states: Vec<Address>,
    /// One per input of the plan; null where the plan does not touch it.
    pub inputs: Vec<Address>,
}

/// A tensor as kernels see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    /// Its first element.
    pub at: Address,
    /// Shape and branching.
    pub meta: Meta,
    /// Elements from one branch to the next; 0 for a shared tensor, which is the same in every branch.
    pub branch: i64,
    /// Its elements take 16 bits.
    pub half: bool,
}

impl Operand {
    /// Elements of one branch.
    pub fn len(&self) -> usize {
        self.meta.len()
    }

    /// Branches it holds: `branches`, or 1 if it is shared.
    pub fn branches(&self, branches: usize) -> usize {
        if self.meta.per_branch { branches } else { 1 }
    }
}

/// What lowering a plan yields.
#[derive(Clone, Debug, Default)]
pub(super) struct Lowered {
    /// Kernel launches, in order.
    pub launches: Vec<Launch>,
    /// For every launch of the plan the number of kernel launches up to and with it.
    pub ends: Vec<usize>,
    /// Coefficients in the order in which they lie in memory.
    pub coefs: Vec<Coef>,
    /// Content of the tables.
    pub tables: Vec<u8>,
    /// Bytes of scratch.
    pub scratch: usize,
    /// Bytes of counters.
    pub counters: usize,
    /// Bytes of partial sums that all launches write, and read again.
    pub partial_bytes: u64,
}

/// Blocks in y or z for `extent` pieces of work. What is beyond the limit is left to loops in the kernels.
fn folded(extent: usize) -> usize {
    extent.min(Limits::COMMON.grid[1] as usize)
}

/// The state of lowering.
pub(super) struct Lowering<'a> {
    plan: &'a Plan,
    bases: &'a Bases,
    /// Operand type of convolutions.
    pub operands: Operands,
    /// The machine that the launches are for.
    pub generation: Generation,
    out: Lowered,
    /// Number of branches of the present launch.
    branches: usize,
    scratch: usize,
    counters: usize,
    label: String,
}

impl<'a> Lowering<'a> {
    /// Lowers every launch of `plan`.
    ///
    /// # Errors
    /// When an operation has sizes that its kernels cannot take, or the plan holds reals of 16 bits and `operands` have more.
    pub fn run(plan: &'a Plan, bases: &'a Bases, operands: Operands, generation: Generation) -> Result<Lowered> {
        let (out, label) = Default::default();
        let (branches, scratch, counters) = (1, 0, 0);
        let mut lowering = Lowering { plan, bases, operands, generation, out, branches, scratch, counters, label };
        if plan.arena_halves > 0 && lowering.half_storage() == Storage::F32 {
            let what = format!("a plan that keeps activations in 16 bits needs f16 or bf16, not {}", operands.name());
            return Err(Error::usage(what));
        }
        for launch in &plan.launches {
            (lowering.scratch, lowering.counters) = (0, 0);
            lowering.branches = launch.branches.len();
            if let Op::LinComb(op) = &launch.op {
                // Independent combinations with the same coefficients are one launch.
                lowering.set_label(&launch.op, &launch.args[0]);
                elementwise::lin_comb(&mut lowering, op, &launch.args)?;
            } else {
                for args in &launch.args {
                    lowering.set_label(&launch.op, args);
                    lowering.operation(&launch.op, args)?;
                }
            }
            lowering.out.ends.push(lowering.out.launches.len());
        }
        Ok(lowering.out)
    }

    fn set_label(&mut self, op: &Op, args: &Args) {
        let metas = |ids: &[usize]| -> String {
            ids.iter().map(|&b| self.plan.buffers[b].meta.to_string()).collect::<Vec<_>>().join(", ")
        };
        self.label = format!("{}: {} -> {}", op.name(), metas(&args.inputs), metas(&args.outputs));
    }

    fn operation(&mut self, op: &Op, args: &Args) -> Result<()> {
        match op {
            Op::Conv(op) => conv::conv(self, op, args),
            Op::BnForward(op) => batch_norm::forward(self, op.relu, args),
            Op::BnEval(op) => batch_norm::eval(self, op.relu, args),
            Op::BnBackward(op) => batch_norm::backward(self, Mask::of(op.relu), args),
            Op::BnDoubleBackward(op) => batch_norm::double_backward(self, Mask::of(op.relu), args),
            Op::BnStats(_) => batch_norm::stats(self, args),
            Op::BnReluBackward(_) => batch_norm::backward(self, Mask::Recomputed, args),
            Op::BnReluDoubleBackward(_) => batch_norm::double_backward(self, Mask::Recomputed, args),
            Op::BnReluBackwardApply(op) => batch_norm::backward_apply(self, op, args),
            Op::BnReluDoubleBackwardApply(_) => batch_norm::double_backward_apply(self, args),
            Op::FusedConv(op) => conv::fused(self, op, args),
            Op::Relu(_) => elementwise::relu(self, args),
            Op::Mask(_) => elementwise::mask(self, args),
            Op::LinComb(op) => elementwise::lin_comb(self, op, std::slice::from_ref(args)),
            Op::AllFinite(_) => finite::all_finite(self, args),
            Op::Update(op) => update::update(self, op, args),
            Op::Fill(op) => elementwise::fill(self, op, args),
            Op::ChannelSum(_) => elementwise::channel_sum(self, args),
            Op::ChannelBroadcast(_) => elementwise::channel_broadcast(self, args),
            Op::NearestNeighbours(_) => neighbours::nearest(self, args),
            Op::TransferLabels(_) => neighbours::transfer(self, args),
            Op::AvgPool(_) => pool::average(self, args),
            Op::AvgPoolBackward(_) => pool::average_backward(self, args),
            Op::MaxPoolIndex(op) => pool::max_index(self, &op.0, args),
            Op::PoolGather(op) => pool::gather(self, &op.0, args),
            Op::PoolScatter(op) => pool::scatter(self, &op.0, args),
            Op::Softmax(_) => softmax::softmax(self, args),
            Op::SoftmaxJvp(_) => softmax::jvp(self, args),
            Op::CeLoss(_) | Op::KlLoss(_) => softmax::loss(self, op, args),
            Op::CeGrad(_) | Op::KlGrad(_) => softmax::grad(self, op, args),
        }
    }

    /// Branches that the present launch works on: what each of its per-branch tensors holds.
    pub fn branches(&self) -> usize {
        self.branches
    }

    /// Branches that an operation runs over: those of the launch if any operand is per-branch, else 1.
    pub fn live_branches(&self, args: &Args) -> usize {
        if args.inputs.iter().any(|&b| self.plan.buffers[b].meta.per_branch) { self.branches } else { 1 }
    }

    /// Operand `i`.
    pub fn input(&self, args: &Args, i: usize) -> Operand {
        self.operand(args.inputs[i])
    }

    /// Operand `i`, if there is one.
    pub fn optional_input(&self, args: &Args, i: usize) -> Option<Operand> {
        args.inputs.get(i).map(|&b| self.operand(b))
    }

    /// Result `i`.
    pub fn output(&self, args: &Args, i: usize) -> Operand {
        self.operand(args.outputs[i])
    }

    fn operand(&self, buffer: usize) -> Operand {
        let buffer = &self.plan.buffers[buffer];
        let memory = match (buffer.place, buffer.meta.dtype) {
            (Place::Arena(_), DType::Real) if buffer.half => self.bases.halves,
            (Place::Arena(_), DType::Real) => self.bases.reals,
            (Place::Arena(_), DType::Index) => self.bases.indices,
            (Place::State(i), _) => self.bases.states[i],
            (Place::Input(i), _) => self.bases.inputs[i],
        };
        let at = memory.offset(if buffer.half { 2 } else { 4 } * buffer.start());
        let branch = if buffer.meta.per_branch { buffer.meta.len() as i64 } else { 0 };
        Operand { at, meta: buffer.meta, branch, half: buffer.half }
    }

    /// How tensors of 16 bits lie in memory.
    fn half_storage(&self) -> Storage {
        match self.operands {
            Operands::F32 | Operands::Tf32 => Storage::F32,
            Operands::F16 => Storage::F16,
            Operands::Bf16 => Storage::Bf16,
        }
    }

    /// For kernels whose 16-bit variant takes each operand either way: whether any takes 16 bits.
    pub fn any_storage(&self, operands: &[Operand]) -> Storage {
        if operands.iter().any(|o| o.half) { self.half_storage() } else { Storage::F32 }
    }

    /// For kernels whose operands all lie in memory alike.
    ///
    /// # Errors
    /// When they do not: a defect of the planner.
    pub fn one_storage(&self, operands: &[Operand]) -> Result<Storage> {
        if operands.iter().any(|o| o.half != operands[0].half) {
            return Err(Error::usage(format_args!("{}: operands of different widths", self.label)));
        }
        Ok(self.any_storage(operands))
    }

    /// Branches that a launch adds up in each element of the result `output`, and 1 where it adds none.
    pub fn summed(&self, args: &Args, output: &Operand) -> usize {
        if output.meta.per_branch { 1 } else { self.live_branches(args) }
    }

    /// `value` for a field of 32 bits.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn narrow(&self, what: &str, value: usize) -> Result<i32> {
        i32::try_from(value).map_err(|_| {
            let limit = "are too many for its kernel, which counts them in 32 bits";
            Error::usage(format_args!("{}: {value} {what} {limit}; {REMEDY}", self.label))
        })
    }

    /// `bytes` of scratch, aligned to 256, for the launches of the present operation.
    pub fn scratch(&mut self, bytes: usize) -> Address {
        let at = self.bases.scratch.offset(self.scratch);
        self.scratch += bytes.next_multiple_of(256);
        self.out.scratch = self.out.scratch.max(self.scratch);
        at
    }

    /// Counts bytes of partial sums that are written and read once more, where others were.
    pub fn partial_sums_again(&mut self, bytes: usize) {
        self.out.partial_bytes += 2 * bytes as u64;
    }

    /// Scratch as [`Lowering::scratch`] gives it, for partial sums: every byte is written once and read once.
    pub fn partial_sums(&mut self, bytes: usize) -> Address {
        self.partial_sums_again(bytes);
        self.scratch(bytes)
    }

    /// `count` words for the launches of the present operation, which find them 0 and leave them 0.
    pub fn counters(&mut self, count: usize) -> Address {
        let at = self.bases.counters.offset(self.counters);
        self.counters += 4 * count;
        self.out.counters = self.out.counters.max(self.counters);
        at
    }

    /// Where the values of `coefs` will lie, one after the other, as f32.
    pub fn coefs(&mut self, coefs: &[Coef]) -> Address {
        let at = self.bases.coefs.offset(4 * self.out.coefs.len());
        self.out.coefs.extend_from_slice(coefs);
        at
    }

    /// Where a copy of `table` will lie that never changes: operand lists too long for a parameter struct.
    pub fn table<E: bytemuck::Pod>(&mut self, table: &[E]) -> Address {
        let at = self.bases.tables.offset(self.out.tables.len());
        self.out.tables.extend_from_slice(bytemuck::cast_slice(table));
        self.out.tables.resize(self.out.tables.len().next_multiple_of(16), 0);
        at
    }

    /// Appends a launch: blocks in x, y and z, threads of a block, bytes of dynamic shared memory of a block.
    pub fn push<P: bytemuck::Pod>(
        &mut self,
        kernel: &'static str,
        params: &P,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
    ) {
        // What does not fit 32 bits is beyond every machine's limits and is refused there.
        let narrow = |v: usize| u32::try_from(v).unwrap_or(u32::MAX);
        self.out.launches.push(Launch {
            kernel,
            params: bytemuck::bytes_of(params).into(),
            grid: grid.map(narrow),
            threads: narrow(threads),
            shared: narrow(shared),
            label: self.label.as_str().into(),
        });
    }
}
