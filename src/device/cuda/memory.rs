//! Memory that all plans of the device share, one after the other, and its growth.

use super::driver::{Address, Driver, Stream};
use super::lower::{Bases, Lowered};
use super::{Cuda, Loaded};
use crate::device::PlanId;
use crate::device::shortage::{REMEDY, shortage};
use crate::error::{Error, Result};
use crate::plan::{Plan, Port};

/// Memory of the device that grows when a plan needs more.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Growing {
    pub at: Address,
    bytes: usize,
}

/// What plans share.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arenas {
    pub reals: Growing,
    pub halves: Growing,
    pub indices: Growing,
    pub scratch: Growing,
    /// Words that are 0 between launches.
    pub counters: Growing,
}

impl Arenas {
    /// Where they lie.
    pub fn memory(&self) -> [Address; 5] {
        [&self.reals, &self.halves, &self.indices, &self.scratch, &self.counters].map(|growing| growing.at)
    }
}

/// Memory of a plan, or none for no bytes.
pub(super) fn allocate(driver: &dyn Driver, bytes: usize, what: &str) -> Result<Address> {
    match bytes {
        0 => Ok(Address::NULL),
        _ => driver.allocate(bytes, what).map_err(|why| Error::usage(format_args!("{why}; {REMEDY}"))),
    }
}

impl Cuda {
    /// Memory of a plan, or none for no bytes.
    pub(super) fn allocate(&self, bytes: usize, what: &str) -> Result<Address> {
        allocate(&*self.driver, bytes, what)
    }

    /// Refuses a plan whose memory cannot be had, before any of it is taken.
    pub(super) fn check_memory(&self, plan: &Plan, lowered: &Lowered) -> Result<()> {
        let ports = |ports: &[Port], new: &dyn Fn(&Port) -> bool| -> usize {
            let ports = ports.iter().filter(|p| p.buffer.is_some() && new(p));
            ports.map(|p| p.meta.total(plan.branches).saturating_mul(4)).fold(0, usize::saturating_add)
        };
        let growth = |have: &Growing, bytes: usize| bytes.saturating_sub(have.bytes);
        let need = ports(&plan.states, &|p| !self.states.contains(&p.name))
            .saturating_add(ports(&plan.inputs, &|_| true))
            .saturating_add(growth(&self.arenas.reals, plan.arena_reals.saturating_mul(4)))
            .saturating_add(growth(&self.arenas.halves, plan.arena_halves.saturating_mul(2)))
            .saturating_add(growth(&self.arenas.indices, plan.arena_indices.saturating_mul(4)))
            .saturating_add(growth(&self.arenas.scratch, lowered.scratch))
            .saturating_add(growth(&self.arenas.counters, lowered.counters));
        match self.driver.free_bytes() {
            Some(free) if need > free => {
                Err(shortage(&self.driver.name(), need, format_args!("{:.3} GB are free", free as f64 / 1e9)))
            }
            _ => Ok(()),
        }
    }

    /// Lets `which` hold `bytes`; whether that is new memory.
    fn grow(&mut self, which: fn(&mut Arenas) -> &mut Growing, bytes: usize, what: &str) -> Result<bool> {
        let Growing { at, bytes: have } = *which(&mut self.arenas);
        if bytes <= have {
            return Ok(false);
        }
        self.driver.synchronize()?;
        // Launches and outputs hold the address that goes now, also if there is no new one.
        self.forget_launches();
        self.last_run = None;
        if at != Address::NULL {
            self.driver.free(at);
        }
        *which(&mut self.arenas) = Growing::default();
        let at = self.allocate(bytes, what)?;
        *which(&mut self.arenas) = Growing { at, bytes };
        Ok(true)
    }

    /// Launches of all plans hold addresses of shared memory: they are made anew when it moves.
    pub(super) fn forget_launches(&mut self) {
        self.last_run = None;
        for loaded in &mut self.plans {
            loaded.lowered = None;
            if let Some(graph) = loaded.graph.take() {
                self.driver.forget(graph);
            }
        }
    }

    pub(super) fn bases(&self, loaded: &Loaded) -> Bases {
        let state = |s: &Option<usize>| s.map_or(Address::NULL, |i| self.states.list()[i].data);
        Bases {
            reals: self.arenas.reals.at,
            halves: self.arenas.halves.at,
            indices: self.arenas.indices.at,
            scratch: self.arenas.scratch.at,
            counters: self.arenas.counters.at,
            coefs: loaded.coefs,
            tables: loaded.tables,
            states: loaded.states.iter().map(state).collect(),
            inputs: loaded.inputs.clone(),
        }
    }

    /// Makes the shared memory large enough for a plan.
    pub(super) fn make_room(&mut self, id: PlanId) -> Result<()> {
        let Loaded { plan, scratch, counters, .. } = self.plan(id)?;
        let (reals, halves, indices) = (4 * plan.arena_reals, 2 * plan.arena_halves, 4 * plan.arena_indices);
        let (scratch, counters) = (*scratch, *counters);
        self.grow(|arenas| &mut arenas.reals, reals, "activations")?;
        self.grow(|arenas| &mut arenas.halves, halves, "activations of 16 bits")?;
        self.grow(|arenas| &mut arenas.indices, indices, "indices")?;
        self.grow(|arenas| &mut arenas.scratch, scratch, "scratch")?;
        if self.grow(|arenas| &mut arenas.counters, counters, "counters")? {
            let zeroed = self.driver.zero(Stream::Compute, self.arenas.counters.at, counters);
            if zeroed.is_err() {
                // What was not zeroed must not be taken for counters later.
                self.driver.free(std::mem::take(&mut self.arenas.counters).at);
            }
            zeroed?;
        }
        Ok(())
    }
}
