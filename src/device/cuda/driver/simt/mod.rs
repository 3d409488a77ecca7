//! The SIMT host machine as a driver: the kernels' sources, compiled as C++, run on the CPU's threads.
//!
//! Work runs when it is queued, so streams and events need nothing. The blocks of a launch are divided over rayon's
//! threads; the machine itself is `kernels/simt/`. After every launch the guard bands around all allocations are
//! checked, so that a stray write is reported with its kernel.
#![allow(unsafe_code)]

mod memory;

use super::{Address, Driver, Event, Generation, Graph, KernelInfo, Launch, Limits, Stream};
use crate::device::cuda::embedded::{self, BankUse, SimtBanks, SimtKernel, SimtLaunch};
use crate::device::shortage::host_memory;
use crate::error::{Error, Result};
use memory::Memory;
use rayon::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Work that a graph replays.
enum Work {
    Zero(Address, usize),
    Copy(Address, Address, usize),
    Launch(Launch),
}

/// Launches by kernel and label.
pub type Tally = Arc<Mutex<BTreeMap<(&'static str, Box<str>), u64>>>;

/// How the launches of a kernel with a label meet in the banks of shared memory: rows of matrices, stores and copies of 16 bytes.
pub type Banks = Arc<Mutex<BTreeMap<(&'static str, Box<str>), [BankUse; 3]>>>;

/// The machine.
pub struct Simt {
    launch: SimtLaunch,
    kernels: BTreeMap<&'static str, &'static SimtKernel>,
    seed: u64,
    memory: RefCell<Memory>,
    events: RefCell<Vec<Option<Instant>>>,
    graphs: RefCell<Vec<Option<Vec<Work>>>>,
    recording: RefCell<Option<Vec<Work>>>,
    launches: Cell<u64>,
    generation: Generation,
    tally: Tally,
    count_banks: Option<SimtBanks>,
    banks: Banks,
}

impl Simt {
    /// The machine with the kernels of this program; see [`Simt::new`] for the seed.
    ///
    /// # Errors
    /// When the program was built without one.
    pub fn open(seed: u64) -> Result<Self> {
        let Some(launch) = embedded::simt_launch() else {
            return Err(Error::usage(
                "device simt: this program was built without it; it needs a C++20 compiler (for instance g++) when \
                 mlnt is built",
            ));
        };
        // SAFETY: entry and descriptors come from the one library that the build made of them.
        let machine = unsafe { Simt::new(launch, embedded::simt_kernels(), seed) };
        Ok(Simt { count_banks: embedded::simt_banks(), ..machine })
    }

    /// A machine with these kernels. `seed` draws the order in which warps, lanes and blocks run: a right kernel gives
    /// the same bits with every seed.
    ///
    /// # Safety
    /// `launch` is the entry of the machine, and `kernels` are descriptors that were compiled for it.
    pub unsafe fn new(launch: SimtLaunch, kernels: &[&'static SimtKernel], seed: u64) -> Self {
        // SAFETY: `KERNEL` names a kernel by a string constant of ASCII letters.
        let name = |k: &'static SimtKernel| unsafe { CStr::from_ptr(k.name) }.to_str().unwrap_or_default();
        let kernels = kernels.iter().map(|&k| (name(k), k)).collect();
        let (memory, events, graphs, recording, launches, generation, tally, banks) = Default::default();
        let count_banks = None;
        Simt {
            launch,
            kernels,
            seed,
            memory,
            events,
            graphs,
            recording,
            launches,
            generation,
            tally,
            count_banks,
            banks,
        }
    }

    /// The same machine, which fills [`Simt::banks`] as well.
    ///
    /// # Safety
    /// `count` belongs to the machine whose entry this was made of.
    pub unsafe fn counting(self, count: SimtBanks) -> Self {
        Simt { count_banks: Some(count), ..self }
    }

    /// The same machine in the place of a card of this kind: with its kernels and its limits.
    pub fn like(self, generation: Generation) -> Self {
        Simt { generation, ..self }
    }

    /// Checks the guard bands around all allocations.
    ///
    /// # Errors
    /// When something was written before or behind an allocation; names it.
    pub fn check(&self) -> Result<()> {
        self.memory.borrow().fault().map_or(Ok(()), |what| Err(self.error(what)))
    }

    /// Launches run so far, those of graphs included.
    pub fn launches(&self) -> u64 {
        self.launches.get()
    }

    /// Where it counts its launches: what was kept of this tells of them when the machine has gone into a device.
    pub fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// Where it counts what meets in the banks of shared memory.
    pub fn banks(&self) -> Banks {
        self.banks.clone()
    }

    fn error(&self, what: impl Into<String>) -> Error {
        Error::Device { device: self.name(), what: what.into() }
    }

    fn find(&self, name: &str) -> Result<&'static SimtKernel> {
        self.kernels.get(name).copied().ok_or_else(|| {
            let known: Vec<_> = self.kernels.keys().copied().collect();
            self.error(format!("no kernel named {name}; it has {}", known.join(", ")))
        })
    }

    /// A pointer to `bytes` bytes of device memory.
    fn range(&self, at: Address, bytes: usize) -> Result<*mut u8> {
        let found = self.memory.borrow().range(at, bytes);
        found.ok_or_else(|| self.error(format!("{bytes} bytes at {:#x} are in no allocation", at.0)))
    }

    /// Runs work now, or adds it to the recording.
    fn queue(&self, stream: Stream, work: Work) -> Result<()> {
        match self.recording.borrow_mut().as_mut() {
            Some(list) if stream == Stream::Compute => list.push(work),
            _ => return self.run(&work),
        }
        Ok(())
    }

    /// The host's side of a copy is not part of a recording.
    fn refuse_recording(&self, stream: Stream) -> Result<()> {
        match stream == Stream::Compute && self.recording.borrow().is_some() {
            true => Err(self.error("a copy between host and device cannot be recorded")),
            false => Ok(()),
        }
    }

    fn run(&self, work: &Work) -> Result<()> {
        match work {
            // SAFETY: the range lies in an allocation.
            Work::Zero(at, bytes) => unsafe { self.range(*at, *bytes)?.write_bytes(0, *bytes) },
            Work::Copy(from, to, bytes) => {
                let (from, to) = (self.range(*from, *bytes)?, self.range(*to, *bytes)?);
                // SAFETY: both ranges lie in allocations.
                unsafe { from.copy_to(to, *bytes) }
            }
            Work::Launch(launch) => return self.run_launch(launch),
        }
        Ok(())
    }

    /// Divides a launch's blocks over rayon's threads.
    fn run_launch(&self, launch: &Launch) -> Result<()> {
        let kernel = self.find(launch.kernel)?;
        let [x, y, z] = launch.grid.map(u64::from);
        let blocks = x * y * z;
        let pieces = blocks.min(4 * rayon::current_num_threads() as u64);
        let cut = |piece: u64| (u128::from(blocks) * u128::from(piece) / u128::from(pieces)) as u64;
        let (enter, seed) = (self.launch, self.seed);
        let key = (launch.kernel, launch.label.clone());
        let (count_banks, all_banks, banks_key) = (self.count_banks, &*self.banks, &key);
        let run_piece = |piece: u64| {
            let mut error = [0u8; 1024];
            let (params, shared) = (launch.params.as_ptr().cast(), launch.shared as usize);
            // SAFETY: `new` vouches for the entry and the kernel; the parameters are as long as said, and the kernel's
            // own size is checked there. That their addresses are right is for the launch's author to see to.
            let code = unsafe {
                let grid = launch.grid.as_ptr();
                let (from, to) = (cut(piece), cut(piece + 1));
                let (at, len) = (error.as_mut_ptr().cast(), error.len());
                enter(kernel, params, launch.params.len(), grid, launch.threads, shared, from, to, seed, at, len)
            };
            if let Some(count) = count_banks {
                let mut banks = [BankUse::default(); 3];
                // SAFETY: `open` or `counting` vouches for it.
                unsafe { count(&mut banks) };
                let mut all = all_banks.lock().unwrap_or_else(PoisonError::into_inner);
                for (sum, more) in all.entry(banks_key.clone()).or_default().iter_mut().zip(banks) {
                    sum.add(more);
                }
            }
            let text = CStr::from_bytes_until_nul(&error).unwrap_or_default();
            if code == 0 { Ok(()) } else { Err(text.to_string_lossy().into_owned()) }
        };
        (0..pieces)
            .into_par_iter()
            .try_for_each(run_piece)
            .map_err(|what| self.error(format!("{what} ({})", launch.label)))?;
        self.launches.set(self.launches.get() + 1);
        *self.tally.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
        match self.memory.borrow().fault() {
            Some(what) => Err(self.error(format!("kernel {} ({}): {what}", launch.kernel, launch.label))),
            None => Ok(()),
        }
    }
}

impl Driver for Simt {
    fn name(&self) -> String {
        "simt".into()
    }

    fn describe(&self) -> String {
        format!("SIMT host machine, {} threads", rayon::current_num_threads())
    }

    fn limits(&self) -> Limits {
        match self.generation {
            Generation::Portable => Limits::COMMON,
            Generation::Hopper => Limits::HOPPER,
        }
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn kernel(&self, name: &'static str) -> Result<KernelInfo> {
        self.find(name).map(|k| KernelInfo { params: k.params_size as usize, threads: k.most_threads })
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Address> {
        let at = self.memory.borrow_mut().allocate(bytes, what);
        at.ok_or_else(|| self.error(format!("no memory for {what}, {bytes} bytes")))
    }

    fn free(&self, at: Address) {
        self.memory.borrow_mut().free(at);
    }

    fn free_bytes(&self) -> Option<usize> {
        host_memory()
    }

    fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<()> {
        self.queue(stream, Work::Zero(at, bytes))
    }

    fn upload(&self, stream: Stream, to: Address, from: &[u8]) -> Result<()> {
        self.refuse_recording(stream)?;
        let to = self.range(to, from.len())?;
        // SAFETY: the range lies in an allocation, which `from` is not a part of.
        unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) }
        Ok(())
    }

    fn download(&self, stream: Stream, from: &[(Address, usize)], to: &mut [u8]) -> Result<()> {
        self.refuse_recording(stream)?;
        if from.iter().map(|(_, bytes)| bytes).sum::<usize>() != to.len() {
            return Err(self.error(format!("a download of {from:?} into {} bytes", to.len())));
        }
        let mut rest = to;
        for (at, bytes) in from {
            let from = self.range(*at, *bytes)?;
            let (part, others) = rest.split_at_mut(*bytes);
            // SAFETY: the range lies in an allocation, which `part` is not a part of.
            unsafe { from.copy_to_nonoverlapping(part.as_mut_ptr(), part.len()) }
            rest = others;
        }
        Ok(())
    }

    fn copy(&self, stream: Stream, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.queue(stream, Work::Copy(from, to, bytes))
    }

    fn launch(&self, stream: Stream, launch: &Launch) -> Result<()> {
        match self.limits().refuse(launch, &self.kernel(launch.kernel)?) {
            Some(why) => Err(self.error(why)),
            None => self.queue(stream, Work::Launch(launch.clone())),
        }
    }

    fn event(&self) -> Result<Event> {
        self.events.borrow_mut().push(None);
        Ok(Event(self.events.borrow().len() - 1))
    }

    fn record(&self, _: Stream, event: Event) -> Result<()> {
        match self.events.borrow_mut().get_mut(event.0) {
            Some(slot) => *slot = Some(Instant::now()),
            None => return Err(self.error("no such event")),
        }
        Ok(())
    }

    fn wait(&self, _: Stream, _: Event) -> Result<()> {
        Ok(())
    }

    fn seconds(&self, from: Event, to: Event) -> Result<f64> {
        let events = self.events.borrow();
        let at = |event: Event| events.get(event.0).copied().flatten();
        match (at(from), at(to)) {
            (Some(from), Some(to)) => Ok(to.saturating_duration_since(from).as_secs_f64()),
            _ => Err(self.error("seconds between events that were not recorded")),
        }
    }

    fn capture(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        if self.recording.replace(Some(Vec::new())).is_some() {
            return Err(self.error("a recording within a recording"));
        }
        let done = body();
        let work = self.recording.take().unwrap_or_default();
        done?;
        self.graphs.borrow_mut().push(Some(work));
        Ok(Graph(self.graphs.borrow().len() - 1))
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        let graphs = self.graphs.borrow();
        let Some(Some(work)) = graphs.get(graph.0) else { return Err(self.error("no such graph")) };
        work.iter().try_for_each(|w| self.run(w))
    }

    fn forget(&self, graph: Graph) {
        if let Some(slot) = self.graphs.borrow_mut().get_mut(graph.0) {
            *slot = None;
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.check()
    }

    fn range_push(&self, _: &str) {}

    fn range_pop(&self) {}
}
