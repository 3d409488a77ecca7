//! The CPU device: the reference for every other one, and fast enough to train on.
//!
//! Generic over `f32` and `f64`, multi-threaded with results that do not depend on the number of threads.
#![allow(unsafe_code)]

mod batch_norm;
mod border;
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
mod scratch;
mod simd;
mod softmax;

pub use real::Real;

use super::check::check;
use super::shortage::{host_memory, shortage};
use super::states::{State, States};
use super::{Crop, Device, HostSlice, HostVec, ImagesId, PlanId};
use crate::error::{Error, Result};
use crate::ops::Conv;
use crate::plan::{Place, Plan, Port};
use crate::tape::{DType, Meta};
use border::{Data, Entry, Values};
use memory::{Block, Input, Memory};
use std::collections::HashMap;

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
    states: States<Block<T>>,
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
            states: States::new("cpu"),
            reals: Block::new(0)?,
            indices: Block::new(0)?,
            work: Block::new(0)?,
            last_run: None,
            free: host_memory(),
            given: 0,
        })
    }

    fn error(what: String) -> Error {
        Error::Device { device: "cpu".into(), what }
    }

    fn plan(&self, id: PlanId) -> Result<&Loaded<T>> {
        self.plans.get(id.0).ok_or_else(|| Self::error("no such plan".into()))
    }

    /// Counts the memory that loading `plan` takes, and refuses what the machine does not have.
    fn reserve(&mut self, plan: &Plan, work: usize) -> Result<()> {
        let used = |ports: &[Port], new: &dyn Fn(&Port) -> bool| -> usize {
            let ports = ports.iter().filter(|p| p.buffer.is_some() && new(p));
            ports.map(|p| p.meta.total(plan.branches)).fold(0, usize::saturating_add)
        };
        let reals = used(&plan.states, &|p| !self.states.contains(&p.name))
            .saturating_add(used(&plan.inputs, &|_| true))
            .saturating_add(plan.arena_reals.saturating_sub(self.reals.len()))
            .saturating_add(plan.arena_indices.saturating_sub(self.indices.len()))
            .saturating_add(work.saturating_sub(self.work.len()));
        let need = self.given.saturating_add(reals.saturating_mul(size_of::<T>()));
        match self.free {
            Some(free) if need > free => {
                Err(shortage("cpu", need, format_args!("{:.3} GB are free", free as f64 / 1e9)))
            }
            _ => {
                self.given = need;
                Ok(())
            }
        }
    }

    /// Runs the launches of a plan in order, each through `each`, which must call what it is given.
    fn run_launches(
        &mut self,
        id: PlanId,
        scalars: &[f64],
        mut each: impl FnMut(&mut dyn FnMut()) + Send,
    ) -> Result<()> {
        let loaded = self.plans.get(id.0).ok_or_else(|| Self::error("no such plan".into()))?;
        if scalars.len() != loaded.plan.scalars.len() {
            let (have, want) = (scalars.len(), loaded.plan.scalars.len());
            return Err(Self::error(format!("{have} runtime scalars for a plan with {want}")));
        }
        let memory = Memory {
            reals: &self.reals,
            indices: &self.indices,
            states: self.states.list(),
            positions: &loaded.states,
            inputs: &loaded.inputs,
        };
        let work = self.work.slice_mut();
        let context = launch::Context { plan: &loaded.plan, memory, scalars, layouts: &loaded.layouts };
        self.pool.install(|| {
            for l in &context.plan.launches {
                each(&mut || launch::run(&context, l, work));
            }
        });
        self.last_run = Some(id);
        Ok(())
    }

    /// The values of an output of the plan that ran last.
    fn output(&self, id: PlanId, name: &str) -> Result<Values<'_, T>> {
        let loaded = self.plan(id)?;
        if self.last_run != Some(id) {
            return Err(Self::error(format!("output {name} of a plan that did not run last")));
        }
        let port = loaded.plan.output(name);
        let Some((port, b)) = port.and_then(|p| p.buffer.map(|b| (p, b))) else {
            return Err(Self::error(format!("the plan has no output named {name}")));
        };
        let (meta, branches) = (port.meta, loaded.plan.branches);
        let total = meta.total(branches);
        let data = match (loaded.plan.buffers[b].place, meta.dtype) {
            (Place::Arena(at), DType::Real) => Data::Reals(&self.reals.slice()[at..at + total]),
            (Place::Arena(at), DType::Index) => Data::Indices(&self.indices.slice()[at..at + total]),
            (Place::State(i), _) => match loaded.states[i] {
                Some(s) => Data::Reals(&self.states.list()[s].data.slice()[..total]),
                None => return Err(Self::error(format!("output {name} lives in a state the plan does not use"))),
            },
            (Place::Input(i), _) => match &loaded.inputs[i] {
                Input::Reals(b) => Data::Reals(b.slice()),
                Input::Indices(b) => Data::Indices(b.slice()),
                Input::Unused => return Err(Self::error(format!("output {name} is an input nobody uses"))),
            },
        };
        Ok(Values { meta, branches, data })
    }
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
        if plan.launches.iter().any(|l| l.op.is_for_kernels()) || plan.arena_halves > 0 {
            return Err(Self::error("the plan is one for the CUDA kernels".into()));
        }
        check("cpu", &plan)?;
        let work = launch::workspace::<T>(&plan);
        self.reserve(&plan, work)?;
        let mut states = Vec::with_capacity(plan.states.len());
        for port in &plan.states {
            let create = || Block::new(port.meta.total(plan.branches));
            states.push(match port.buffer {
                Some(_) => Some(self.states.bind(port, plan.branches, create)?),
                None => None,
            });
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
        // Which thread meets the largest tile first is chance: all of them are ready for it.
        let scratch = launch::scratch::<T>(&plan, &layouts);
        self.pool.broadcast(|_| scratch::reserve(scratch));
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
        let (meta, branches) = (&plan.inputs[i].meta, plan.branches);
        let tensor = Entry { kind: "input", name, meta, branches };
        match &mut inputs[i] {
            Input::Unused => return Ok(false),
            Input::Indices(block) => tensor.write_indices(values, block.slice_mut())?,
            Input::Reals(block) => tensor.write_reals(values, block.slice_mut())?,
        }
        Ok(true)
    }

    fn stage(&mut self, _: ImagesId, _: PlanId, _: &str, _: &[Crop]) -> Result<()> {
        Err(Self::error("batches are made on the host".into()))
    }

    fn run(&mut self, id: PlanId, scalars: &[f64]) -> Result<()> {
        self.run_launches(id, scalars, |launch| launch())
    }

    fn time_launches(&mut self, id: PlanId, scalars: &[f64]) -> Result<Vec<(usize, f64)>> {
        let mut times = Vec::with_capacity(self.plan(id)?.plan.launches.len());
        self.run_launches(id, scalars, |launch| {
            let start = std::time::Instant::now();
            launch();
            times.push((1, start.elapsed().as_secs_f64()));
        })?;
        Ok(times)
    }

    fn read_output(&self, id: PlanId, name: &str) -> Result<HostVec> {
        Ok(self.output(id, name)?.to_host())
    }

    fn read_output_into(&self, id: PlanId, name: &str, to: &mut Vec<f64>) -> Result<()> {
        self.output(id, name)?.to_f64(to);
        Ok(())
    }

    fn states(&self) -> Vec<(String, Meta)> {
        self.states.list().iter().map(|s| (s.name.clone(), s.meta)).collect()
    }

    fn write_state(&mut self, name: &str, values: HostSlice<'_>) -> Result<()> {
        let State { meta, branches, data, .. } = self.states.get_mut(name)?;
        Entry { kind: "state", name, meta, branches: *branches }.write_reals(values, data.slice_mut())
    }

    fn read_state(&self, name: &str) -> Result<HostVec> {
        let State { meta, branches, data, .. } = self.states.get(name)?;
        Ok(Values { meta: *meta, branches: *branches, data: Data::Reals(data.slice()) }.to_host())
    }
}
