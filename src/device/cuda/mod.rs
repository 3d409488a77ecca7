//! The CUDA device: runs plans through hand-written kernels, on a GPU or on the SIMT host machine.
//!
//! A plan is lowered once to kernel launches with all their addresses; a run uploads the coefficients of the step and
//! replays the launches as one graph. Tensors in device memory are f32 (indices: i32), activations NHWC; what a plan marks as
//! half is f16 or bf16, as the operands of convolutions are.

pub mod driver;
pub mod embedded;
mod images;
mod layout;
mod lower;
mod machine;
mod memory;

pub use lower::Operands;
pub use machine::machine;

use super::check::check;
use super::shortage::REMEDY;
use super::states::States;
use super::{Crop, Destinations, Device, HostSlice, HostVec, ImageSet, ImagesId, PlanId};
use crate::error::{Error, Result};
use crate::ops::Operation;
use crate::plan::{Machine, Place, Plan, PlanOptions, Port};
use crate::tape::{DType, Meta};
use driver::{Address, Driver, Event, Generation, Graph, Launch, Stream};
use images::{Images, Landing};
use layout::{Towards, permute};
use lower::{Bases, Lowered, Lowering};
use memory::{Arenas, allocate};
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// How a plan's launches reach the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Recorded once as a graph, then replayed.
    Graph,
    /// One by one, at every run.
    Eager,
}

/// A plan on the device.
struct Loaded {
    plan: Plan,
    inputs: Vec<Address>,
    /// For every state of the plan its position among the device's, if the plan touches it.
    states: Vec<Option<usize>>,
    coefs: Address,
    tables: Address,
    /// Bytes of scratch that its launches take.
    scratch: usize,
    /// Bytes of counters that its launches take.
    counters: usize,
    /// Launches for the addresses of now; none after shared memory has moved.
    lowered: Option<Lowered>,
    graph: Option<Graph>,
    /// Inputs that are made on the device, beside the run before.
    landings: Vec<Landing>,
}

/// The device. See the [module documentation](self).
pub struct Cuda {
    driver: Box<dyn Driver>,
    operands: Operands,
    mode: Mode,
    plans: Vec<Loaded>,
    states: States<Address>,
    arenas: Arenas,
    images: Vec<Images>,
    last_run: Option<PlanId>,
    /// Two events to measure with, once they are needed.
    stopwatch: Cell<Option<(Event, Event)>>,
    /// Values on their way to or from the device, in its order.
    staging: RefCell<Vec<u32>>,
}

impl Cuda {
    /// How plans for a device with these operands are best built; no machine is needed.
    pub fn plan_options_for(operands: Operands) -> PlanOptions {
        PlanOptions { kernels: true, half: operands.is_half(), ..PlanOptions::default() }
    }

    /// The device on `driver`, whose convolutions round their operands to `operands`.
    pub fn new(driver: Box<dyn Driver>, operands: Operands, mode: Mode) -> Self {
        let states = States::new(driver.name());
        let (plans, images, last_run) = (Vec::new(), Vec::new(), None);
        let (arenas, stopwatch, staging) = Default::default();
        Cuda { driver, operands, mode, plans, states, arenas, images, last_run, stopwatch, staging }
    }

    /// The machine.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    fn error(&self, what: String) -> Error {
        Error::Device { device: self.driver.name(), what }
    }

    fn plan(&self, id: PlanId) -> Result<&Loaded> {
        self.plans.get(id.0).ok_or_else(|| self.error("no such plan".into()))
    }

    /// Makes the launches of a plan for the addresses of now, and the memory that all plans share large enough for it.
    fn lower(&mut self, id: PlanId) -> Result<()> {
        if self.plan(id)?.lowered.is_some() {
            return Ok(());
        }
        self.make_room(id)?;
        let loaded = self.plan(id)?;
        let lowered = Lowering::run(&loaded.plan, &self.bases(loaded), self.operands, self.driver.generation())?;
        for launch in &lowered.launches {
            let kernel = self.driver.kernel(launch.kernel)?;
            if let Some(why) = self.driver.limits().refuse(launch, &kernel) {
                return Err(Error::usage(format_args!("device {}: {why}; {REMEDY}", self.driver.name())));
            }
        }
        if !lowered.tables.is_empty() {
            self.driver.upload(Stream::Compute, loaded.tables, &lowered.tables)?;
        }
        self.plans[id.0].lowered = Some(lowered);
        Ok(())
    }

    /// Checks the scalars of a run, makes the plan's launches if need be, and uploads this run's coefficients.
    fn prepare(&mut self, id: PlanId, scalars: &[f64]) -> Result<()> {
        let want = self.plan(id)?.plan.scalars.len();
        if scalars.len() != want {
            return Err(self.error(format!("{} runtime scalars for a plan with {want}", scalars.len())));
        }
        self.lower(id)?;
        let loaded = &self.plans[id.0];
        let coefs = loaded.lowered.as_ref().map_or(&[][..], |l| &l.coefs);
        if !coefs.is_empty() {
            let mut staging = self.staging.borrow_mut();
            staging.clear();
            staging.extend(coefs.iter().map(|c| (c.value(scalars) as f32).to_bits()));
            self.driver.upload(Stream::Compute, loaded.coefs, bytemuck::cast_slice(&staging))?;
        }
        let Loaded { landings, inputs, .. } = &mut self.plans[id.0];
        landings.iter_mut().filter(|l| l.staged).try_for_each(|l| l.take(&*self.driver, inputs))
    }

    /// Queues the launches of a lowered plan one by one.
    fn launch_all(&self, id: PlanId) -> Result<()> {
        let loaded = self.plan(id)?;
        let Some(lowered) = &loaded.lowered else { return Ok(()) };
        let (mut from, mut phase) = (0, "");
        for (launch, end) in loaded.plan.launches.iter().zip(&lowered.ends) {
            if launch.phase != phase {
                if !phase.is_empty() {
                    self.driver.range_pop();
                }
                self.driver.range_push(launch.phase);
                phase = launch.phase;
            }
            self.driver.range_push(launch.op.name());
            let queued = lowered.launches[from..*end].iter().try_for_each(|l| self.driver.launch(Stream::Compute, l));
            self.driver.range_pop();
            queued?;
            from = *end;
        }
        if !phase.is_empty() {
            self.driver.range_pop();
        }
        Ok(())
    }

    /// Two events to measure with.
    fn stopwatch(&self) -> Result<(Event, Event)> {
        let pair = match self.stopwatch.get() {
            Some(pair) => pair,
            None => (self.driver.event()?, self.driver.event()?),
        };
        self.stopwatch.set(Some(pair));
        Ok(pair)
    }

    fn upload(&self, meta: &Meta, branches: usize, to: Address, values: HostSlice<'_>, name: &str) -> Result<()> {
        let total = meta.total(branches);
        let given = match values {
            HostSlice::F32(v) => v.len(),
            HostSlice::F64(v) => v.len(),
            HostSlice::I32(v) => v.len(),
        };
        if given != total {
            return Err(self.error(format!("{name} is {meta}, {total} values in all, and was given {given}")));
        }
        let mut staging = self.staging.borrow_mut();
        staging.resize(total, 0);
        let to_device = Towards::Device;
        match (meta.dtype, values) {
            (DType::Real, HostSlice::F32(v)) => permute(meta, branches, v, &mut staging, to_device, f32::to_bits),
            (DType::Real, HostSlice::F64(v)) => {
                permute(meta, branches, v, &mut staging, to_device, |x| (x as f32).to_bits());
            }
            (DType::Index, HostSlice::I32(v)) => permute(meta, branches, v, &mut staging, to_device, |x| x as u32),
            (DType::Real, HostSlice::I32(_)) => return Err(self.error(format!("{name} takes reals"))),
            (DType::Index, _) => return Err(self.error(format!("{name} takes indices"))),
        }
        self.driver.upload(Stream::Compute, to, bytemuck::cast_slice(&staging))
    }

    /// Reads tensors, address and bytes of each, with one wait; `read` gets their bits in the order of the device.
    fn download(&self, from: &[(Address, usize)], read: impl FnOnce(&[u32])) -> Result<()> {
        let mut staging = self.staging.borrow_mut();
        staging.resize(from.iter().map(|(_, bytes)| bytes / 4).sum(), 0);
        self.driver.download(Stream::Compute, from, bytemuck::cast_slice_mut(&mut staging))?;
        read(&staging);
        Ok(())
    }

    fn read(&self, meta: &Meta, branches: usize, from: Address) -> Result<HostVec> {
        let total = meta.total(branches);
        let range = [(from, 4 * total)];
        Ok(match meta.dtype {
            DType::Real => {
                let mut values = vec![0.0; total];
                self.download(&range, |bits| {
                    permute(meta, branches, bits, &mut values, Towards::Host, f32::from_bits);
                })?;
                HostVec::F32(values)
            }
            DType::Index => {
                let mut values = vec![0; total];
                self.download(&range, |bits| {
                    permute(meta, branches, bits, &mut values, Towards::Host, |b| b as i32);
                })?;
                HostVec::I32(values)
            }
        })
    }

    /// Shape and address of an output of the plan that ran last.
    fn output(&self, id: PlanId, name: &str) -> Result<(Meta, usize, Address)> {
        let loaded = self.plan(id)?;
        if self.last_run != Some(id) {
            return Err(self.error(format!("output {name} of a plan that did not run last")));
        }
        let port = loaded.plan.output(name);
        let Some((port, b)) = port.and_then(|p| p.buffer.map(|b| (p, b))) else {
            return Err(self.error(format!("the plan has no output named {name}")));
        };
        let at = match (loaded.plan.buffers[b].place, port.meta.dtype) {
            // The planner keeps what the host reads in 32 bits.
            (Place::Arena(at), DType::Real) => self.arenas.reals.at.offset(4 * at),
            (Place::Arena(at), DType::Index) => self.arenas.indices.at.offset(4 * at),
            (Place::State(i), _) => loaded.states[i].map_or(Address::NULL, |s| self.states.list()[s].data),
            (Place::Input(i), _) => loaded.inputs[i],
        };
        Ok((port.meta, loaded.plan.branches, at))
    }
}

/// Lowers for no addresses. Sizes do not depend on them: it tells how much memory there must be.
fn lower_nowhere(plan: &Plan, operands: Operands, generation: Generation) -> Result<Lowered> {
    let states = vec![Address::NULL; plan.states.len()];
    let inputs = vec![Address::NULL; plan.inputs.len()];
    Lowering::run(plan, &Bases { states, inputs, ..Bases::default() }, operands, generation)
}

/// How a plan uses one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KernelUse {
    /// Launches of a run.
    pub launches: usize,
    /// Threads of a block, at most.
    pub threads: u32,
    /// Blocks of a launch: the fewest, and the most.
    pub blocks: [u64; 2],
    /// Bytes of dynamic shared memory of a block: the fewest, and the most.
    pub shared: [u32; 2],
}

impl KernelUse {
    fn of(launch: &Launch) -> Self {
        let blocks = launch.grid.iter().map(|n| u64::from(*n)).product();
        KernelUse { launches: 1, threads: launch.threads, blocks: [blocks; 2], shared: [launch.shared; 2] }
    }

    fn and(self, other: Self) -> Self {
        let ([fewest, most], [least, greatest]) = (other.blocks, other.shared);
        KernelUse {
            launches: self.launches + other.launches,
            threads: self.threads.max(other.threads),
            blocks: [self.blocks[0].min(fewest), self.blocks[1].max(most)],
            shared: [self.shared[0].min(least), self.shared[1].max(greatest)],
        }
    }
}

/// What a plan takes beyond its arena on this device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelCost {
    /// Kernel launches of a run.
    pub launches: usize,
    /// Their kernels, by launch of the plan.
    pub kernels: Vec<Vec<&'static str>>,
    /// How it uses each, by name.
    pub uses: BTreeMap<&'static str, KernelUse>,
    /// Bytes of scratch: partial sums, counters and the like.
    pub scratch_bytes: usize,
    /// Bytes of partial sums that the launches of a run write there, and read again as soon as the last of a tile's blocks is done.
    pub partial_bytes: u64,
}

impl KernelCost {
    /// The cost of `plan`, without a machine: with the kernels that a card of this generation is given.
    ///
    /// # Errors
    /// When an operation has sizes that its kernels cannot take.
    pub fn of(plan: &Plan, operands: Operands, generation: Generation) -> Result<Self> {
        let lowered = lower_nowhere(plan, operands, generation)?;
        let starts = std::iter::once(0).chain(lowered.ends.iter().copied());
        let mut uses: BTreeMap<&'static str, KernelUse> = BTreeMap::new();
        for launch in &lowered.launches {
            let this = KernelUse::of(launch);
            uses.entry(launch.kernel).and_modify(|before| *before = before.and(this)).or_insert(this);
        }
        let names = |(from, to)| lowered.launches[from..to].iter().map(|launch| launch.kernel).collect();
        Ok(KernelCost {
            launches: lowered.launches.len(),
            kernels: starts.zip(lowered.ends.iter().copied()).map(names).collect(),
            uses,
            scratch_bytes: lowered.scratch + lowered.counters,
            partial_bytes: lowered.partial_bytes,
        })
    }
}

impl Device for Cuda {
    fn describe(&self) -> String {
        format!("{} ({}, {})", self.driver.name(), self.operands.name(), self.driver.describe())
    }

    fn real_bytes(&self) -> usize {
        4
    }

    fn plan_options(&self) -> PlanOptions {
        Self::plan_options_for(self.operands)
    }

    fn machine(&self) -> Option<Machine> {
        Some(machine(self.operands))
    }

    fn plan_bytes(&self, plan: &Plan) -> Result<Option<usize>> {
        let scratch = KernelCost::of(plan, self.operands, self.driver.generation())?.scratch_bytes;
        let inputs: usize = plan.inputs.iter().map(|p| 4 * p.meta.total(plan.branches)).sum();
        Ok(Some(plan.arena_bytes(4) + plan.state_bytes(4) + inputs + scratch))
    }

    fn load(&mut self, plan: Plan) -> Result<PlanId> {
        check(&self.driver.name(), &plan)?;
        let lowered = lower_nowhere(&plan, self.operands, self.driver.generation())?;
        self.check_memory(&plan, &lowered)?;
        let Lowered { coefs, tables, scratch, counters, .. } = lowered;
        let coefs = self.allocate(4 * coefs.len(), "coefficients")?;
        let tables = self.allocate(tables.len(), "tables of operands")?;
        let mut states = Vec::with_capacity(plan.states.len());
        for port in &plan.states {
            let driver = &*self.driver;
            let create = || {
                let bytes = 4 * port.meta.total(plan.branches);
                let at = allocate(driver, bytes, &port.name)?;
                driver.zero(Stream::Compute, at, bytes).map(|()| at)
            };
            states.push(match port.buffer {
                Some(_) => Some(self.states.bind(port, plan.branches, create)?),
                None => None,
            });
        }
        let input = |port: &Port| match port.buffer {
            Some(_) => self.allocate(4 * port.meta.total(plan.branches), &port.name),
            None => Ok(Address::NULL),
        };
        let inputs = plan.inputs.iter().map(input).collect::<Result<_>>()?;
        self.plans.push(Loaded {
            plan,
            inputs,
            states,
            coefs,
            tables,
            scratch,
            counters,
            lowered: None,
            graph: None,
            landings: Vec::new(),
        });
        self.last_run = None;
        let id = PlanId(self.plans.len() - 1);
        // What a launch cannot do is known now, not at the first step.
        self.lower(id)?;
        Ok(id)
    }

    fn write_input(&mut self, id: PlanId, name: &str, values: HostSlice<'_>) -> Result<bool> {
        let Loaded { plan, inputs, .. } = self.plan(id)?;
        let Some(i) = plan.inputs.iter().position(|p| p.name == name) else {
            return Err(self.error(format!("the plan has no input named {name}")));
        };
        if plan.inputs[i].buffer.is_none() {
            return Ok(false);
        }
        self.upload(&plan.inputs[i].meta, plan.branches, inputs[i], values, name)?;
        Ok(true)
    }

    fn keep_images(&mut self, images: &ImageSet<'_>) -> Result<Option<ImagesId>> {
        self.copy_images(images)
    }

    fn stage(&mut self, images: ImagesId, plan: PlanId, input: &str, crops: &[Crop]) -> Result<()> {
        self.make_batch(images, plan, input, crops)
    }

    fn run(&mut self, id: PlanId, scalars: &[f64]) -> Result<()> {
        self.prepare(id, scalars)?;
        match (self.mode, self.plans[id.0].graph) {
            (Mode::Eager, _) => self.launch_all(id)?,
            (Mode::Graph, Some(graph)) => self.driver.replay(graph)?,
            (Mode::Graph, None) => {
                let graph = self.driver.capture(&mut || self.launch_all(id))?;
                self.plans[id.0].graph = Some(graph);
                self.driver.replay(graph)?;
            }
        }
        self.last_run = Some(id);
        Ok(())
    }

    fn run_timed(&mut self, id: PlanId, scalars: &[f64]) -> Result<f64> {
        let (start, stop) = self.stopwatch()?;
        self.driver.record(Stream::Compute, start)?;
        self.run(id, scalars)?;
        self.driver.record(Stream::Compute, stop)?;
        self.driver.seconds(start, stop)
    }

    fn time_launches(&mut self, id: PlanId, scalars: &[f64]) -> Result<Vec<(usize, f64)>> {
        self.prepare(id, scalars)?;
        let (start, stop) = self.stopwatch()?;
        let Some(lowered) = &self.plan(id)?.lowered else { return Ok(Vec::new()) };
        let (mut times, mut from) = (Vec::with_capacity(lowered.ends.len()), 0);
        for end in &lowered.ends {
            self.driver.record(Stream::Compute, start)?;
            lowered.launches[from..*end].iter().try_for_each(|l| self.driver.launch(Stream::Compute, l))?;
            self.driver.record(Stream::Compute, stop)?;
            times.push((end - from, self.driver.seconds(start, stop)?));
            from = *end;
        }
        self.last_run = Some(id);
        Ok(times)
    }

    fn read_output(&self, id: PlanId, name: &str) -> Result<HostVec> {
        let (meta, branches, at) = self.output(id, name)?;
        self.read(&meta, branches, at)
    }

    fn read_outputs_into<'a>(&self, id: PlanId, outputs: Destinations<'_, 'a>) -> Result<()> {
        let (mut ranges, mut wanted) = (Vec::new(), Vec::new());
        for (name, to) in outputs {
            let (meta, branches, at) = self.output(id, name)?;
            to.resize(meta.total(branches), 0.0);
            ranges.push((at, 4 * to.len()));
            wanted.push((meta, branches, to));
        }
        let real = |bits| f64::from(f32::from_bits(bits));
        let index = |bits| f64::from(bits as i32);
        self.download(&ranges, |mut rest| {
            for (meta, branches, to) in wanted {
                let (bits, others) = rest.split_at(to.len());
                match meta.dtype {
                    DType::Real => permute(&meta, branches, bits, to, Towards::Host, real),
                    DType::Index => permute(&meta, branches, bits, to, Towards::Host, index),
                }
                rest = others;
            }
        })
    }

    fn states(&self) -> Vec<(String, Meta)> {
        self.states.list().iter().map(|s| (s.name.clone(), s.meta)).collect()
    }

    fn write_state(&mut self, name: &str, values: HostSlice<'_>) -> Result<()> {
        let state = self.states.get(name)?;
        self.upload(&state.meta, state.branches, state.data, values, name)
    }

    fn read_state(&self, name: &str) -> Result<HostVec> {
        let state = self.states.get(name)?;
        self.read(&state.meta, state.branches, state.data)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Errors have been told where they arose; memory goes with the machine in any case.
        let _ = self.driver.synchronize();
        self.forget_launches();
        let shared = self.arenas.memory();
        let images = self.images.iter().flat_map(Images::memory);
        let landings = self.plans.iter().flat_map(|l| l.landings.iter().flat_map(Landing::memory));
        let plans = self.plans.iter().flat_map(|l| l.inputs.iter().chain([&l.coefs, &l.tables]));
        let states = self.states.list().iter().map(|s| s.data);
        let all = plans.copied().chain(states).chain(shared).chain(images).chain(landings);
        all.filter(|at| *at != Address::NULL).for_each(|at| self.driver.free(at));
    }
}
