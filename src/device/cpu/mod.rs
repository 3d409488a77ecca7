//! The CPU device: the reference for every other one, and fast enough to train on.
//!
//! Generic over `f32` and `f64`, multi-threaded with results that do not depend on the number of threads.
#![allow(unsafe_code)]

mod batch_norm;
mod conv;
mod elementwise;
mod gemm;
mod launch;
mod layout;
mod lines;
mod memory;
mod microkernel;
mod neighbours;
mod patches;
mod pool;
mod real;
mod simd;
mod softmax;

pub use real::Real;

use super::check::check;
use super::{Crop, Device, HostSlice, HostVec, ImagesId, PlanId};
use crate::error::{Error, Result};
use crate::ops::{Conv, Op, Operation};
use crate::plan::{Place, Plan, Port};
use crate::tape::{DType, Meta};
use memory::{Block, Memory};
use std::collections::HashMap;

/// A state: its shape, the branches it is kept for, and its values in device order.
struct State<T> {
    name: String,
    meta: Meta,
    branches: usize,
    data: Block<T>,
}

/// An input of a loaded plan.
enum Input<T> {
    Reals(Block<T>),
    Indices(Block<i32>),
    Unused,
}

struct Loaded<T> {
    plan: Plan,
    layouts: HashMap<Conv, conv::Layout>,
    inputs: Vec<Input<T>>,
    /// For every state of the plan its position among the device's, if the plan touches it.
    states: Vec<Option<usize>>,
}

/// The device. See the [module documentation](self).
pub struct Cpu<T> {
    pool: rayon::ThreadPool,
    plans: Vec<Loaded<T>>,
    states: Vec<State<T>>,
    by_name: HashMap<String, usize>,
    reals: Block<T>,
    indices: Block<i32>,
    work: Block<T>,
    last_run: Option<PlanId>,
    /// Bytes that were free at the start, and those given out since. Pages come when they are touched: a system
    /// promises more than it has.
    free: Option<usize>,
    given: usize,
}

impl<T: Real> Cpu<T> {
    /// A CPU device on `threads` threads; 0 takes one per core.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|e| Error::Device { device: "cpu".into(), what: format!("{threads} threads: {e}") })?;
        Ok(Cpu {
            pool,
            plans: Vec::new(),
            states: Vec::new(),
            by_name: HashMap::new(),
            reals: Block::new(0)?,
            indices: Block::new(0)?,
            work: Block::new(0)?,
            last_run: None,
            free: memory::available(),
            given: 0,
        })
    }

    fn error(what: String) -> Error {
        Error::Device { device: "cpu".into(), what }
    }

    fn plan(&self, id: PlanId) -> Result<&Loaded<T>> {
        self.plans.get(id.0).ok_or_else(|| Self::error("no such plan".into()))
    }

    fn state_index(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| Self::error(format!("no state named {name}")))
    }

    /// Counts the memory that loading `plan` takes, and refuses what the machine does not have.
    fn reserve(&mut self, plan: &Plan, work: usize) -> Result<()> {
        let used = |ports: &[Port], new: &dyn Fn(&Port) -> bool| -> usize {
            let ports = ports.iter().filter(|p| p.buffer.is_some() && new(p));
            ports.map(|p| p.meta.total(plan.branches)).fold(0, usize::saturating_add)
        };
        let reals = used(&plan.states, &|p| !self.by_name.contains_key(&p.name))
            .saturating_add(used(&plan.inputs, &|_| true))
            .saturating_add(plan.arena_reals.saturating_sub(self.reals.len()))
            .saturating_add(plan.arena_indices.saturating_sub(self.indices.len()))
            .saturating_add(work.saturating_sub(self.work.len()));
        let need = self.given.saturating_add(reals.saturating_mul(size_of::<T>()));
        match self.free {
            Some(free) if need > free => {
                Err(memory::shortage(need, format_args!("{:.3} GB are free", free as f64 / 1e9)))
            }
            _ => {
                self.given = need;
                Ok(())
            }
        }
    }

    /// The state for a port of a plan, made with zeros if it is new.
    fn bind_state(&mut self, port: &Port, branches: usize) -> Result<usize> {
        if let Some(&i) = self.by_name.get(&port.name) {
            let (have, m) = (&self.states[i].meta, self.states[i].branches);
            if port.meta.per_branch && m != branches {
                let what = format!("state {} is kept for {m} branches, the plan has {branches}", port.name);
                return Err(Self::error(what));
            }
            if *have != port.meta {
                return Err(Self::error(format!("state {} is {have}, the plan has {}", port.name, port.meta)));
            }
            return Ok(i);
        }
        let data = Block::new(port.meta.total(branches))?;
        self.by_name.insert(port.name.clone(), self.states.len());
        self.states.push(State { name: port.name.clone(), meta: port.meta, branches, data });
        Ok(self.states.len() - 1)
    }

    /// Runs the launches of a plan in order, each through `each`, which must call what it is given.
    fn run_launches(
        &mut self,
        id: PlanId,
        scalars: &[f64],
        mut each: impl FnMut(&Op, &mut dyn FnMut()) + Send,
    ) -> Result<()> {
        let loaded = self.plans.get_mut(id.0).ok_or_else(|| Self::error("no such plan".into()))?;
        if scalars.len() != loaded.plan.scalars.len() {
            let (have, want) = (scalars.len(), loaded.plan.scalars.len());
            return Err(Self::error(format!("{have} runtime scalars for a plan with {want}")));
        }
        let mut states = Vec::with_capacity(loaded.states.len());
        for s in &loaded.states {
            states.push(s.map_or(std::ptr::null_mut(), |i| self.states[i].data.slice_mut().as_mut_ptr()));
        }
        let mut real_inputs = Vec::with_capacity(loaded.inputs.len());
        let mut index_inputs = Vec::with_capacity(loaded.inputs.len());
        for input in &mut loaded.inputs {
            let (real, index) = match input {
                Input::Reals(b) => (b.slice_mut().as_mut_ptr(), std::ptr::null_mut()),
                Input::Indices(b) => (std::ptr::null_mut(), b.slice_mut().as_mut_ptr()),
                Input::Unused => (std::ptr::null_mut(), std::ptr::null_mut()),
            };
            real_inputs.push(real);
            index_inputs.push(index);
        }
        let memory = Memory {
            reals: self.reals.slice_mut().as_mut_ptr(),
            indices: self.indices.slice_mut().as_mut_ptr(),
            states: &states,
            real_inputs: &real_inputs,
            index_inputs: &index_inputs,
            branches: loaded.plan.branches,
        };
        let work = self.work.slice_mut();
        // The pointers stay on this thread's stack; tasks see slices only.
        let context = launch::Context { plan: &loaded.plan, memory, scalars, layouts: &loaded.layouts };
        self.pool.install(|| {
            for l in &context.plan.launches {
                each(&l.op, &mut || launch::run(&context, l, work));
            }
        });
        self.last_run = Some(id);
        Ok(())
    }
}

fn to_device<E: Copy>(meta: &Meta, branches: usize, values: &[E], to: &mut [E], what: &str) -> Result<()> {
    if values.len() != to.len() {
        let text = format!("{what} is {meta}, {} values in all, and was given {}", to.len(), values.len());
        return Err(Error::Device { device: "cpu".into(), what: text });
    }
    layout::permute(meta, branches, values, to, true);
    Ok(())
}

fn to_host<E: Copy + Default>(meta: &Meta, branches: usize, data: &[E]) -> Vec<E> {
    let mut values = vec![E::default(); data.len()];
    layout::permute(meta, branches, data, &mut values, false);
    values
}

impl<T: Real + Default> Device for Cpu<T> {
    fn describe(&self) -> String {
        let threads = self.pool.current_num_threads();
        format!("cpu ({}, {threads} thread{})", T::NAME, if threads == 1 { "" } else { "s" })
    }

    fn real_bytes(&self) -> usize {
        size_of::<T>()
    }

    fn load(&mut self, plan: Plan) -> Result<PlanId> {
        check("cpu", &plan)?;
        let work = launch::workspace::<T>(&plan);
        self.reserve(&plan, work)?;
        let mut states = Vec::with_capacity(plan.states.len());
        for port in &plan.states {
            states.push(if port.buffer.is_some() { Some(self.bind_state(port, plan.branches)?) } else { None });
        }
        let input = |port: &Port| -> Result<Input<T>> {
            let len = port.meta.total(plan.branches);
            Ok(match (port.buffer, port.meta.dtype) {
                (None, _) => Input::Unused,
                (Some(_), DType::Real) => Input::Reals(Block::new(len)?),
                (Some(_), DType::Index) => Input::Indices(Block::new(len)?),
            })
        };
        let inputs = plan.inputs.iter().map(input).collect::<Result<_>>()?;
        if self.reals.len() < plan.arena_reals {
            self.reals = Block::new(plan.arena_reals)?;
        }
        if self.indices.len() < plan.arena_indices {
            self.indices = Block::new(plan.arena_indices)?;
        }
        if self.work.len() < work {
            self.work = Block::new(work)?;
        }
        let layouts = launch::layouts(&plan);
        self.plans.push(Loaded { plan, layouts, inputs, states });
        self.last_run = None;
        Ok(PlanId(self.plans.len() - 1))
    }

    fn write_input(&mut self, id: PlanId, name: &str, values: HostSlice<'_>) -> Result<bool> {
        self.plan(id)?;
        let Loaded { plan, inputs, .. } = &mut self.plans[id.0];
        let Some(i) = plan.inputs.iter().position(|p| p.name == name) else {
            return Err(Self::error(format!("the plan has no input named {name}")));
        };
        let meta = &plan.inputs[i].meta;
        match (&mut inputs[i], values) {
            (Input::Unused, _) => return Ok(false),
            (Input::Indices(block), HostSlice::I32(v)) => to_device(meta, plan.branches, v, block.slice_mut(), name)?,
            (Input::Reals(block), values) => {
                let Some(v) = T::from_host(values) else {
                    return Err(Self::error(format!("input {name} takes reals")));
                };
                to_device(meta, plan.branches, &v, block.slice_mut(), name)?;
            }
            (Input::Indices(_), _) => return Err(Self::error(format!("input {name} takes indices"))),
        }
        Ok(true)
    }

    fn stage(&mut self, _: ImagesId, _: PlanId, _: &str, _: &[Crop]) -> Result<()> {
        Err(Self::error("batches are made on the host".into()))
    }

    fn run(&mut self, id: PlanId, scalars: &[f64]) -> Result<()> {
        self.run_launches(id, scalars, |_, launch| launch())
    }

    fn profile(&mut self, id: PlanId, scalars: &[f64]) -> Result<Vec<(String, usize, f64)>> {
        let mut times: HashMap<String, (usize, f64)> = HashMap::new();
        self.run_launches(id, scalars, |op, launch| {
            let start = std::time::Instant::now();
            launch();
            let entry = times.entry(op.name().to_string()).or_default();
            *entry = (entry.0 + 1, entry.1 + start.elapsed().as_secs_f64());
        })?;
        let mut list: Vec<_> = times.into_iter().map(|(name, (n, t))| (name, n, t)).collect();
        list.sort_by(|a, b| b.2.total_cmp(&a.2).then_with(|| a.0.cmp(&b.0)));
        Ok(list)
    }

    fn read_output(&self, id: PlanId, name: &str) -> Result<HostVec> {
        let loaded = self.plan(id)?;
        if self.last_run != Some(id) {
            return Err(Self::error(format!("output {name} of a plan that did not run last")));
        }
        let port = loaded.plan.output(name);
        let Some((port, b)) = port.and_then(|p| p.buffer.map(|b| (p, b))) else {
            return Err(Self::error(format!("the plan has no output named {name}")));
        };
        let (meta, branches) = (&port.meta, loaded.plan.branches);
        let total = meta.total(branches);
        let reals = |data: &[T]| T::into_host(to_host(meta, branches, &data[..total]));
        Ok(match (loaded.plan.buffers[b].place, meta.dtype) {
            (Place::Arena(at), DType::Real) => reals(&self.reals.slice()[at..]),
            (Place::Arena(at), DType::Index) => {
                HostVec::I32(to_host(meta, branches, &self.indices.slice()[at..at + total]))
            }
            (Place::State(i), _) => match loaded.states[i] {
                Some(s) => reals(self.states[s].data.slice()),
                None => return Err(Self::error(format!("output {name} lives in a state the plan does not use"))),
            },
            (Place::Input(i), _) => match &loaded.inputs[i] {
                Input::Reals(b) => reals(b.slice()),
                Input::Indices(b) => HostVec::I32(to_host(meta, branches, b.slice())),
                Input::Unused => return Err(Self::error(format!("output {name} is an input nobody uses"))),
            },
        })
    }

    fn states(&self) -> Vec<(String, Meta)> {
        self.states.iter().map(|s| (s.name.clone(), s.meta)).collect()
    }

    fn write_state(&mut self, name: &str, values: HostSlice<'_>) -> Result<()> {
        let i = self.state_index(name)?;
        let values = T::from_host(values).ok_or_else(|| Self::error(format!("state {name} takes reals")))?;
        let state = &mut self.states[i];
        to_device(&state.meta, state.branches, &values, state.data.slice_mut(), name)
    }

    fn read_state(&self, name: &str) -> Result<HostVec> {
        let state = &self.states[self.state_index(name)?];
        Ok(T::into_host(to_host(&state.meta, state.branches, state.data.slice())))
    }
}
