//! What the CUDA device needs of a machine: memory, copies, streams, events, launches, graphs.
//!
//! Two implementations: the GPU through cudarc, and the SIMT host machine, which runs the same kernel sources as
//! C++. Nothing above this module knows which of the two it talks to.

pub mod gpu;
pub mod simt;

use crate::error::Result;
use bytemuck::{Pod, Zeroable};

/// An address in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Address(pub u64);

impl Address {
    /// No memory: an operand that is absent.
    pub const NULL: Address = Address(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// Queues of work. Work of one stream runs in order; streams run side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// The training step.
    Compute,
    /// Copies and augmentation of the next batch.
    Copy,
}

/// A point in a stream that another stream, or the host, can wait for or measure from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(pub usize);

/// A recorded sequence of launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph(pub usize);

/// One kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's name, as in its `KERNEL(...)` line.
    pub kernel: &'static str,
    /// The parameter struct's bytes.
    pub params: Box<[u8]>,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, a multiple of 32.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Operation and shapes, for errors and profiles.
    pub label: Box<str>,
}

/// What a kernel's `KERNEL(...)` line says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelInfo {
    /// Size of its parameter struct, bytes.
    pub params: usize,
    /// Most threads of a block.
    pub threads: u32,
}

/// Which kernels a machine is given, where there are several for one purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Generation {
    /// Those that every card runs.
    #[default]
    Portable,
    /// Those for compute capability 9.0 alone, where there are any.
    Hopper,
}

/// Sizes a launch must keep within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Limits {
    /// What the compute capabilities 8.0 and later have in common. Shared memory: the 99 KiB of sm_86 and sm_89.
    pub const COMMON: Limits = Limits { grid: [0x7fff_ffff, 65_535, 65_535], threads: 1024, shared: 99 * 1024 };

    /// Those of compute capability 9.0, with 227 KiB of shared memory.
    pub const HOPPER: Limits = Limits { shared: 227 * 1024, ..Limits::COMMON };

    /// Why a launch does not fit; `None` when it does.
    pub fn refuse(&self, launch: &Launch, kernel: &KernelInfo) -> Option<String> {
        let Launch { kernel: name, grid, threads, shared, label, .. } = launch;
        let what = if launch.params.len() != kernel.params {
            format!("{} bytes of parameters, the kernel takes {}", launch.params.len(), kernel.params)
        } else if grid.iter().zip(&self.grid).any(|(have, most)| have > most || *have == 0) {
            format!("a grid of {grid:?} blocks, the limit is {:?} and none may be 0", self.grid)
        } else if *threads == 0 || threads % 32 != 0 || *threads > self.threads.min(kernel.threads) {
            let most = self.threads.min(kernel.threads);
            format!("{threads} threads per block; it takes multiples of 32 up to {most}")
        } else if *shared > self.shared {
            format!("{shared} bytes of shared memory per block, the limit is {}", self.shared)
        } else {
            return None;
        };
        Some(format!("kernel {name} ({label}): {what}"))
    }
}

/// A machine that runs kernels. Methods take `&self`: a machine orders its own work.
pub trait Driver {
    /// Name as the user asked for it, e.g. `cuda:0` or `simt`.
    fn name(&self) -> String;

    /// The machine in words, e.g. `NVIDIA H200, sm_90, 140 GB`.
    fn describe(&self) -> String;

    /// What launches must keep within.
    fn limits(&self) -> Limits;

    /// Which kernels it runs best.
    fn generation(&self) -> Generation {
        Generation::Portable
    }

    /// What is known of a kernel.
    ///
    /// # Errors
    /// When there is no such kernel for this machine.
    fn kernel(&self, name: &'static str) -> Result<KernelInfo>;

    /// Memory of `bytes` bytes, aligned to 256; its content is undefined.
    ///
    /// # Errors
    /// When the memory cannot be had; `what` is what it is for.
    fn allocate(&self, bytes: usize, what: &str) -> Result<Address>;

    /// Gives memory back that [`Driver::allocate`] gave, after the work that uses it.
    fn free(&self, at: Address);

    /// Bytes that can still be allocated, where the machine tells.
    fn free_bytes(&self) -> Option<usize>;

    /// Sets `bytes` bytes to zero.
    ///
    /// # Errors
    /// When the machine fails.
    fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<()>;

    /// Copies from the host. The host may change `from` as soon as this returns.
    ///
    /// # Errors
    /// When the machine fails.
    fn upload(&self, stream: Stream, to: Address, from: &[u8]) -> Result<()>;

    /// Copies to the host, after all work queued on `stream`.
    ///
    /// # Errors
    /// When the machine, or work queued before, fails.
    fn download(&self, stream: Stream, from: Address, to: &mut [u8]) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Errors
    /// When the machine fails.
    fn copy(&self, stream: Stream, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Queues a launch.
    ///
    /// # Errors
    /// When the launch does not fit ([`Limits::refuse`]) or the machine fails.
    fn launch(&self, stream: Stream, launch: &Launch) -> Result<()>;

    /// A new event.
    ///
    /// # Errors
    /// When the machine fails.
    fn event(&self) -> Result<Event>;

    /// Marks the present end of `stream`.
    ///
    /// # Errors
    /// When the machine fails.
    fn record(&self, stream: Stream, event: Event) -> Result<()>;

    /// Lets what is queued on `stream` from now on wait for `event`.
    ///
    /// # Errors
    /// When the machine fails.
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;

    /// Seconds from one recorded event to another; waits for both.
    ///
    /// # Errors
    /// When the machine fails.
    fn seconds(&self, from: Event, to: Event) -> Result<f64>;

    /// Records what `body` queues on the compute stream instead of running it.
    ///
    /// # Errors
    /// Whatever `body` returns, and when the machine fails.
    fn capture(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Graph>;

    /// Queues a recorded sequence on the compute stream.
    ///
    /// # Errors
    /// When the machine fails.
    fn replay(&self, graph: Graph) -> Result<()>;

    /// Forgets a recorded sequence, after the work that uses it.
    fn forget(&self, graph: Graph);

    /// Waits for everything.
    ///
    /// # Errors
    /// When work queued before has failed.
    fn synchronize(&self) -> Result<()>;

    /// Opens a named range for profilers.
    fn range_push(&self, name: &str);

    /// Closes the range opened last.
    fn range_pop(&self);
}
