//! A step on a warm CPU device allocates nothing. Every allocation of the process is looked at, with the calls that
//! led to it: those inside the `gemm` crate, which its interface does not let us avoid, are told apart by them.
#![allow(unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{LoadedStep, load_step, step_spec};
use mlnt::device::cpu::Cpu;
use mlnt::device::{Device, HostSlice};
use mlnt::mlnt::{Recipe, Report};
use mlnt::model::{Arch, ModelSpec};

/// The system's allocator, which notes what is asked of it while [`WATCH`] is set.
struct Watched;

static WATCH: AtomicBool = AtomicBool::new(false);
static FOUND: Mutex<Vec<Found>> = Mutex::new(Vec::new());

thread_local! {
    /// Set while a thread notes an allocation: what that takes itself does not count.
    static NOTING: Cell<bool> = const { Cell::new(false) };
}

/// An allocation: its size, and the calls that led to it.
struct Found {
    bytes: usize,
    calls: Backtrace,
}

fn note(bytes: usize) {
    if WATCH.load(Ordering::SeqCst) && !NOTING.replace(true) {
        let calls = Backtrace::force_capture();
        FOUND.lock().unwrap().push(Found { bytes, calls });
        NOTING.set(false);
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// What all threads allocate while `f` runs.
fn allocations(f: impl FnOnce()) -> Vec<Found> {
    WATCH.store(true, Ordering::SeqCst);
    f();
    WATCH.store(false, Ordering::SeqCst);
    std::mem::take(&mut *FOUND.lock().unwrap())
}

/// Allocations inside the `gemm` crate, and all others with the calls that led to them.
fn told_apart(found: &[Found]) -> (Vec<usize>, Vec<String>) {
    let (mut gemm, mut others) = (Vec::new(), Vec::new());
    for Found { bytes, calls } in found {
        let calls = calls.to_string();
        match calls.contains("gemm_common::") || calls.contains("gemm_f32::") {
            true => gemm.push(*bytes),
            false => others.push(format!("{bytes} bytes:\n{calls}")),
        }
    }
    (gemm, others)
}

/// A pool that stays: nobody waits for the threads of one that goes, and each allocates when it ends. Its threads have
/// begun: each allocates then, too.
fn pool() -> ManuallyDrop<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap();
    pool.broadcast(|_| ());
    ManuallyDrop::new(pool)
}

const THREADS: usize = 2;
const WARM_UP: usize = 3;
/// More than the jobs of one block of the queue through which work enters a pool.
const STEPS: usize = 70;
const BATCH: usize = 6;
const BRANCHES: usize = 2;
const CLASSES: usize = 5;

/// What the host gives and takes at every step.
struct Host {
    x: Vec<f32>,
    y: Vec<i32>,
    y_syn: Vec<i32>,
    weights: Vec<f64>,
    outputs: [Vec<f64>; 3],
}

impl Host {
    fn new(model: &ModelSpec) -> Self {
        let labels = |n: usize| (0..n).map(|i| (i % CLASSES) as i32).collect();
        let pixels = BATCH * model.in_channels * model.size[0] * model.size[1];
        Host {
            x: (0..pixels).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect(),
            y: labels(BATCH),
            y_syn: labels(BRANCHES * BATCH),
            weights: vec![1.0 / BATCH as f64; BATCH],
            outputs: Default::default(),
        }
    }

    /// All that training asks of the device in a step.
    fn step(&mut self, LoadedStep { device, id, scalars, .. }: &mut LoadedStep<Cpu<f32>>) {
        device.write_input(*id, "x", HostSlice::F32(&self.x)).unwrap();
        device.write_input(*id, "y", HostSlice::I32(&self.y)).unwrap();
        device.write_input(*id, "y_syn", HostSlice::I32(&self.y_syn)).unwrap();
        device.write_input(*id, "class_weight", HostSlice::F64(&self.weights)).unwrap();
        device.run(*id, scalars).unwrap();
        let names = ["class_loss", "class_logits", "consistency"];
        device.read_outputs_into(*id, &mut names.into_iter().zip(&mut self.outputs)).unwrap();
    }
}

/// What the queue of a pool allocates for the runs of `STEPS` steps after the warm-up: that of empty work.
fn of_the_queue() -> usize {
    let pool = pool();
    (0..WARM_UP).for_each(|_| pool.install(|| ()));
    allocations(|| (0..STEPS).for_each(|_| pool.install(|| ()))).len()
}

fn check_step(arch: Arch, recipe: Recipe) {
    // Blocks of stride 1 and 2, several tiles, and logits per branch.
    let (widths, blocks) = (vec![4, 6], vec![1, 1]);
    let model = ModelSpec { arch, in_channels: 3, size: [24, 24], classes: CLASSES, widths, blocks };
    let mut host = Host::new(&model);
    let spec = step_spec(model, BATCH, BRANCHES, recipe, false);
    // Its threads stay too.
    let mut step = ManuallyDrop::new(load_step::<f32>(&spec, Report::Losses, true, THREADS));
    (0..WARM_UP).for_each(|_| host.step(&mut step));

    let found = allocations(|| (0..STEPS).for_each(|_| host.step(&mut step)));
    let (gemm, others) = told_apart(&found);
    println!("{arch:?} {recipe:?}: gemm {} allocations, {} bytes", gemm.len(), gemm.iter().sum::<usize>());
    assert!(host.outputs.iter().flatten().all(|v| v.is_finite()));
    let allowed = of_the_queue();
    let first = others[..others.len().min(3)].join("\n");
    assert_eq!(others.len(), allowed, "{arch:?} {recipe:?}: the queue takes {allowed}; the first found:\n{first}");

    // The same step, read in the way that makes a vector, is found.
    let (_, others) = told_apart(&allocations(|| drop(step.device.read_output(step.id, "class_loss").unwrap())));
    assert_eq!(others.len(), 1, "{arch:?} {recipe:?}: {}", others.join("\n"));
}

/// The counter sees allocations of every kind and on every thread, and takes none of them for another's.
fn check_counter() {
    let count = |f: &mut (dyn FnMut() + Send)| {
        let (gemm, others) = told_apart(&allocations(f));
        assert_eq!(gemm.len(), 0);
        others.len()
    };
    let mut list = Vec::with_capacity(1);
    assert_eq!(count(&mut || ()), 0);
    assert_eq!(count(&mut || drop(std::hint::black_box(Box::new(1u64)))), 1);
    assert_eq!(count(&mut || drop(std::hint::black_box(vec![0u8; 100]))), 1);
    assert_eq!(count(&mut || list.extend([1u64, 2])), 1);
    let pool = pool();
    pool.install(|| ());
    assert_eq!(count(&mut || pool.install(|| drop(std::hint::black_box(Box::new(1u64))))), 1);
    assert!(of_the_queue() > 0, "{STEPS} runs are too few to see what the queue takes");
}

/// One test, for the counter watches all threads: two tests would see each other.
#[test]
fn a_warm_step_allocates_nothing() {
    check_counter();
    for recipe in [Recipe::Joint, Recipe::Sequential] {
        check_step(Arch::PreactResnet, recipe);
        check_step(Arch::ResnetBottleneck, recipe);
    }
}
