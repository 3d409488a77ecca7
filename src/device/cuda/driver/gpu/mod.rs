//! A GPU, through the CUDA driver.
//!
//! Only this folder names cudarc, and only its layer of bare functions: its safe layer records an event for every
//! buffer, which does not go with recorded launches. The program holds no CUDA library: the driver is looked for at
//! run time ([`library`]), and one as new as the nvcc that built the kernels (nvcc 13:
//! driver 580) will do, but none older than CUDA 12.0.

#![allow(unsafe_code)]

mod handles;
mod kernels;
mod library;
mod nvtx;
mod staging;

pub use library::{Card, Missing, Probe};

use super::{Address, Driver, Event, Generation, Graph, KernelInfo, Launch, Limits, Stream};
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute};
use handles::{Call, Context, Mark, Queue, Recorded, Replay, check};
use kernels::{Kernel, Kernels};
use staging::{Downloads, Uploads};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ffi::c_void;
use std::ptr::null_mut;

/// Sixteen bytes of parameters, aligned as the strictest type in a parameter struct.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
struct Word([u8; 16]);

/// What is to be given back once recording is over: the driver forbids it before.
#[derive(Default)]
struct Late {
    memory: Vec<Address>,
    graphs: Vec<Graph>,
}

/// A GPU. It stays on the thread that opened it; several may be open at a time.
pub struct Gpu {
    // Fields are dropped in this order: graphs before the kernels they launch, and the context last.
    graphs: RefCell<Vec<Option<Replay>>>,
    kernels: Kernels,
    events: RefCell<Vec<Mark>>,
    uploads: RefCell<Uploads>,
    downloads: RefCell<Downloads>,
    compute: Queue,
    copy: Queue,
    context: Context,
    card: Card,
    generation: Generation,
    limits: Limits,
    /// Launches are being recorded.
    capturing: Cell<bool>,
    late: RefCell<Late>,
    /// Allocations that have not been given back.
    memory: RefCell<BTreeSet<Address>>,
    /// Parameters of a launch, where they are aligned.
    words: RefCell<Vec<Word>>,
}

impl Gpu {
    /// The driver's version and the cards of this machine.
    ///
    /// # Errors
    /// What is missing, when no card can be used.
    pub fn probe() -> std::result::Result<Probe, Missing> {
        library::probe()
    }

    /// Opens card number `ordinal`, counted from 0, and loads all kernels.
    ///
    /// # Errors
    /// When there is no driver, no card of that number, no kernels for it in this program, or the driver fails.
    pub fn open(ordinal: usize) -> Result<Self> {
        let lacks = |what: &dyn std::fmt::Display| Error::usage(format_args!("device cuda:{ordinal}: {what}"));
        let library = library::library().map_err(|missing| lacks(&missing))?;
        let cards = library::probe().map_err(|missing| lacks(&missing))?.cards;
        let Some(card) = cards.get(ordinal) else {
            let number = match cards.len() {
                1 => "there is one card, cuda:0".to_string(),
                n => format!("there are {n} cards, cuda:0 to cuda:{}", n - 1),
            };
            return Err(lacks(&number));
        };
        let images = kernels::images(card).map_err(|why| lacks(&why))?;
        let open = || -> Call<Self> {
            let device = library::device(ordinal)?;
            let limits = limits(device)?;
            // From here on an error drops what is there already, last first, while its context is current.
            let context = Context::retain(device)?;
            let copy = Queue::new()?;
            let compute = Queue::new()?;
            let downloads = Downloads::new()?.into();
            let uploads = Uploads::new()?.into();
            let kernels = Kernels::load(library, card, &images, limits.shared)?;
            let (card, capturing) = (card.clone(), Cell::new(false));
            let generation = best(&card);
            let (graphs, events, late, memory, words) = Default::default();
            Ok(Gpu {
                graphs,
                kernels,
                events,
                uploads,
                downloads,
                compute,
                copy,
                context,
                card,
                generation,
                limits,
                capturing,
                late,
                memory,
                words,
            })
        };
        open().map_err(|failure| failure.on(ordinal))
    }

    /// The same card with kernels of this generation.
    ///
    /// # Errors
    /// When they are not for its compute capability.
    pub fn like(mut self, generation: Generation) -> Result<Self> {
        if generation != Generation::Portable && generation != best(&self.card) {
            let (major, minor) = self.card.capability;
            let what = format!("the kernels for compute capability 9.0 alone do not run on one of {major}.{minor}");
            return Err(Error::usage(format_args!("device {}: {what}", self.name())));
        }
        self.generation = generation;
        Ok(self)
    }

    fn queue(&self, stream: Stream) -> &Queue {
        match stream {
            Stream::Compute => &self.compute,
            Stream::Copy => &self.copy,
        }
    }

    fn error(&self, what: String) -> Error {
        Error::Device { device: self.name(), what }
    }

    fn tell<T>(&self, call: Call<T>) -> Result<T> {
        call.map_err(|failure| failure.on(self.card.ordinal))
    }

    /// Before every call that cannot be recorded: other calls on this thread may have made another card current.
    fn enter(&self, what: &str) -> Result<()> {
        if self.capturing.get() {
            return Err(self.error(format!("{what} cannot be recorded: only launches and work on memory can")));
        }
        self.tell(self.context.bind())
    }

    /// Before every call that can be recorded, which is only so on the compute stream.
    fn enter_recordable(&self, stream: Stream, what: &str) -> Result<()> {
        match stream {
            Stream::Compute => self.tell(self.context.bind()),
            Stream::Copy => self.enter(what),
        }
    }

    fn find(&self, name: &str) -> Result<&Kernel> {
        self.kernels.get(name).ok_or_else(|| self.error(format!("no kernel named {name}")))
    }

    fn with_event<T>(&self, event: Event, then: impl FnOnce(&Mark) -> Call<T>) -> Result<T> {
        match self.events.borrow().get(event.0) {
            Some(mark) => self.tell(then(mark)),
            None => Err(self.error(format!("no event number {}", event.0))),
        }
    }

    /// Stops recording and makes up for what had to wait.
    fn end_capture(&self) -> Call<Recorded> {
        self.capturing.set(false);
        let recorded = self.context.bind().and_then(|()| self.compute.end_capture());
        let Late { memory, graphs } = self.late.take();
        memory.into_iter().for_each(|at| self.free(at));
        graphs.into_iter().for_each(|graph| self.forget(graph));
        recorded
    }
}

/// Recording is under way. Ends with it, also when the thread unwinds.
struct Recording<'a>(&'a Gpu);

impl Recording<'_> {
    fn end(self) -> Call<Recorded> {
        let gpu = self.0;
        std::mem::forget(self);
        gpu.end_capture()
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        drop(self.0.end_capture());
    }
}

/// What launches must keep within on `device`.
fn limits(device: sys::CUdevice) -> Call<Limits> {
    use CUdevice_attribute as A;
    Ok(Limits {
        grid: [
            library::attribute(device, A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?,
            library::attribute(device, A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y)?,
            library::attribute(device, A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z)?,
        ],
        threads: library::attribute(device, A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        shared: library::attribute(device, A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// Copies `params` to where they are aligned to 16 bytes.
fn aligned(words: &mut Vec<Word>, params: &[u8]) -> *mut c_void {
    words.clear();
    words.resize(params.len().div_ceil(size_of::<Word>()), Word([0; 16]));
    bytemuck::cast_slice_mut(words)[..params.len()].copy_from_slice(params);
    words.as_mut_ptr().cast()
}

/// The kernels that a card runs best.
fn best(card: &Card) -> Generation {
    match card.capability {
        (9, 0) => Generation::Hopper,
        _ => Generation::Portable,
    }
}

impl Driver for Gpu {
    fn name(&self) -> String {
        format!("cuda:{}", self.card.ordinal)
    }

    fn describe(&self) -> String {
        self.card.to_string()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn kernel(&self, name: &'static str) -> Result<KernelInfo> {
        Ok(self.find(name)?.info)
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Address> {
        self.enter("allocating memory")?;
        let mut at = 0;
        // SAFETY: the context is current; writes one address. The driver aligns it to 256 at least (CUDA C++
        // programming guide, "Size and alignment requirement").
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut at, bytes.max(1)) };
        let free = || self.free_bytes().map_or("?".into(), |free| format!("{:.3}", free as f64 / 1e9));
        let gb = bytes as f64 / 1e9;
        self.tell(check(code, format_args!("allocating {gb:.3} GB for {what}"))).map_err(|error| match error {
            Error::Device { device, what } => Error::Device { device, what: format!("{what}; {} GB are free", free()) },
            other => other,
        })?;
        self.memory.borrow_mut().insert(Address(at));
        Ok(Address(at))
    }

    fn free(&self, at: Address) {
        if self.capturing.get() {
            self.late.borrow_mut().memory.push(at);
        } else if self.memory.borrow_mut().remove(&at) {
            // An error of work queued before is told by the next call that can; the memory is gone in any case.
            let _ = self.context.bind().and_then(|()| self.context.synchronize());
            // SAFETY: allocated here and removed from the list of what is; no work is left that uses it.
            let _ = unsafe { sys::cuMemFree_v2(at.0) };
        }
    }

    fn free_bytes(&self) -> Option<usize> {
        self.enter("asking for the free memory").ok()?;
        self.context.free_bytes().ok()
    }

    fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<()> {
        self.enter_recordable(stream, "work on the copy stream")?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the stream lives; the memory is the caller's, who allocated it.
        let code = unsafe { sys::cuMemsetD8Async(at.0, 0, bytes, self.queue(stream).0) };
        self.tell(check(code, format_args!("setting {bytes} bytes to zero")))
    }

    fn upload(&self, stream: Stream, to: Address, from: &[u8]) -> Result<()> {
        self.enter("an upload")?;
        self.tell(self.uploads.borrow_mut().write(self.queue(stream), to.0, from))
    }

    fn download(&self, stream: Stream, from: &[(Address, usize)], to: &mut [u8]) -> Result<()> {
        self.enter("a download")?;
        if from.iter().map(|(_, bytes)| bytes).sum::<usize>() != to.len() {
            return Err(self.error(format!("a download of {from:?} into {} bytes", to.len())));
        }
        self.tell(self.downloads.borrow_mut().read(self.queue(stream), from, to))
    }

    fn copy(&self, stream: Stream, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.enter_recordable(stream, "work on the copy stream")?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the stream lives; the memory is the caller's, who allocated it.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.queue(stream).0) };
        self.tell(check(code, format_args!("copying {bytes} bytes on the card")))
    }

    fn launch(&self, stream: Stream, launch: &Launch) -> Result<()> {
        self.enter_recordable(stream, "work on the copy stream")?;
        let kernel = self.find(launch.kernel)?;
        if let Some(why) = self.limits.refuse(launch, &kernel.info) {
            return Err(self.error(why));
        }
        let Launch { kernel: name, params, grid, threads, shared, label } = launch;
        let mut words = self.words.borrow_mut();
        let mut pointers = [aligned(&mut words, params)];
        // SAFETY: the kernel's module is loaded; it takes one parameter of as many bytes as `params` has (checked
        // above), which the driver copies before it returns; the addresses in it are the caller's.
        let code = unsafe {
            sys::cuLaunchKernel(
                kernel.function,
                grid[0],
                grid[1],
                grid[2],
                *threads,
                1,
                1,
                *shared,
                self.queue(stream).0,
                pointers.as_mut_ptr(),
                null_mut(),
            )
        };
        let doing = format_args!(
            "launching {name} ({label}; grid {grid:?}, {threads} threads, {shared} bytes of shared memory)"
        );
        self.tell(check(code, doing))
    }

    fn event(&self) -> Result<Event> {
        self.enter("creating an event")?;
        let mark = self.tell(Mark::timing())?;
        let mut events = self.events.borrow_mut();
        events.push(mark);
        Ok(Event(events.len() - 1))
    }

    fn record(&self, stream: Stream, event: Event) -> Result<()> {
        self.enter("an event")?;
        self.with_event(event, |mark| mark.record(self.queue(stream)))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.enter("waiting for an event")?;
        self.with_event(event, |mark| self.queue(stream).wait(mark))
    }

    fn seconds(&self, from: Event, to: Event) -> Result<f64> {
        self.enter("measuring time")?;
        self.with_event(from, Mark::wait)?;
        self.with_event(to, Mark::wait)?;
        let events = self.events.borrow();
        // Both are there: they were waited for.
        let milliseconds = self.tell(events[to.0].since(&events[from.0]))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn capture(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.enter("recording")?;
        self.tell(self.compute.begin_capture())?;
        self.capturing.set(true);
        let recording = Recording(self);
        let done = body();
        let recorded = recording.end();
        // The body's error says more than that of a recording it has spoilt.
        done?;
        let replay = self.tell(recorded.and_then(|recorded| recorded.instantiate()))?;
        let mut graphs = self.graphs.borrow_mut();
        graphs.push(Some(replay));
        Ok(Graph(graphs.len() - 1))
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        self.enter("a replay")?;
        match self.graphs.borrow().get(graph.0) {
            Some(Some(replay)) => self.tell(replay.launch(&self.compute)),
            _ => Err(self.error(format!("no graph number {}", graph.0))),
        }
    }

    fn forget(&self, graph: Graph) {
        if self.capturing.get() {
            self.late.borrow_mut().graphs.push(graph);
            return;
        }
        let replay = self.graphs.borrow_mut().get_mut(graph.0).and_then(Option::take);
        // Where the context cannot be made current, nothing of it can be given back.
        if self.context.bind().is_ok() {
            drop(replay);
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.enter("waiting for the card")?;
        self.tell(self.compute.synchronize())?;
        self.tell(self.copy.synchronize())
    }

    fn range_push(&self, name: &str) {
        nvtx::push(name);
    }

    fn range_pop(&self) {
        nvtx::pop();
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Errors have been told where they arose. Nothing is taken from under work that still runs, and the fields
        // find their context current.
        let _ = self.context.bind().and_then(|()| self.context.synchronize());
        for at in self.memory.take() {
            // SAFETY: allocated here and not given back yet; no work is left that uses it.
            let _ = unsafe { sys::cuMemFree_v2(at.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_that_is_not_there_is_an_error_in_words() {
        let (absent, says) = match Gpu::probe() {
            Ok(found) => (found.cards.len(), "card".to_string()),
            Err(missing) => (0, missing.to_string()),
        };
        for ordinal in [absent, absent + 1, usize::MAX] {
            let error = Gpu::open(ordinal).map(|_| ()).expect_err("there is no such card");
            let text = error.to_string();
            assert!(text.starts_with(&format!("device cuda:{ordinal}: ")) && text.contains(&says), "{text}");
            assert_eq!(error.exit_code(), 2, "a person can do something about it");
        }
    }

    #[test]
    fn every_lack_says_what_to_do() {
        for (missing, words) in [
            (Missing::Library, ["libcuda.so.1", "12.0 or later"]),
            (Missing::TooOld(11_080), ["up to 11.8", "12.0 or later"]),
            (Missing::Function("cuInit"), ["no function cuInit", "too old"]),
            (Missing::Start("cuInit: busy".into()), ["does not start", "cuInit: busy"]),
            (Missing::Card, ["nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
        ] {
            let text = missing.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    }

    #[test]
    fn parameters_are_copied_whole_to_an_aligned_place() {
        let mut words = Vec::new();
        for len in [0, 1, 15, 16, 17, 200, 4096, 3] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
            let at = aligned(&mut words, &bytes);
            assert_eq!(at as usize % 16, 0, "{len}");
            assert_eq!(at, words.as_mut_ptr().cast());
            assert_eq!(&bytemuck::cast_slice::<Word, u8>(&words)[..len], bytes);
        }
    }
}
