//! The SIMT host machine in a frame that a test can narrow and that counts how often the host waits.

use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::driver::{Address, Driver, Event, Graph, KernelInfo, Launch, Limits, Stream};
use mlnt::error::{Error, Result};
use std::cell::Cell;
use std::rc::Rc;

/// The machine. Its cells stay with the test that made it.
pub struct Framed {
    machine: Simt,
    limits: Limits,
    /// What it says it has.
    pub free: Rc<Cell<usize>>,
    /// The largest allocation that succeeds.
    pub largest: Rc<Cell<usize>>,
    /// How often the host has waited for it.
    pub waits: Rc<Cell<usize>>,
}

impl Framed {
    /// A machine as wide as it is; `limits` for launches.
    pub fn new(limits: Limits) -> Self {
        let [free, largest] = [(); 2].map(|()| Rc::new(Cell::new(usize::MAX)));
        Framed { machine: Simt::open(1).unwrap(), limits, free, largest, waits: Rc::default() }
    }

    fn wait_for_it(&self) {
        self.waits.set(self.waits.get() + 1);
    }
}

impl Driver for Framed {
    fn name(&self) -> String {
        "narrow".into()
    }
    fn describe(&self) -> String {
        self.machine.describe()
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn kernel(&self, name: &'static str) -> Result<KernelInfo> {
        self.machine.kernel(name)
    }
    fn allocate(&self, bytes: usize, what: &str) -> Result<Address> {
        if bytes > self.largest.get() {
            let what = format!("allocating {bytes} bytes for {what}");
            return Err(Error::Device { device: self.name(), what });
        }
        self.machine.allocate(bytes, what)
    }
    fn free(&self, at: Address) {
        self.machine.free(at);
    }
    fn free_bytes(&self) -> Option<usize> {
        Some(self.free.get())
    }
    fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<()> {
        self.machine.zero(stream, at, bytes)
    }
    fn upload(&self, stream: Stream, to: Address, from: &[u8]) -> Result<()> {
        self.machine.upload(stream, to, from)
    }
    fn download(&self, stream: Stream, from: &[(Address, usize)], to: &mut [u8]) -> Result<()> {
        if !from.is_empty() {
            self.wait_for_it();
        }
        self.machine.download(stream, from, to)
    }
    fn copy(&self, stream: Stream, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.machine.copy(stream, from, to, bytes)
    }
    fn launch(&self, stream: Stream, launch: &Launch) -> Result<()> {
        self.machine.launch(stream, launch)
    }
    fn event(&self) -> Result<Event> {
        self.machine.event()
    }
    fn record(&self, stream: Stream, event: Event) -> Result<()> {
        self.machine.record(stream, event)
    }
    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.machine.wait(stream, event)
    }
    fn seconds(&self, from: Event, to: Event) -> Result<f64> {
        self.wait_for_it();
        self.machine.seconds(from, to)
    }
    fn capture(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.machine.capture(body)
    }
    fn replay(&self, graph: Graph) -> Result<()> {
        self.machine.replay(graph)
    }
    fn forget(&self, graph: Graph) {
        self.machine.forget(graph);
    }
    fn synchronize(&self) -> Result<()> {
        self.wait_for_it();
        self.machine.synchronize()
    }
    fn range_push(&self, name: &str) {
        self.machine.range_push(name);
    }
    fn range_pop(&self) {
        self.machine.range_pop();
    }
}
