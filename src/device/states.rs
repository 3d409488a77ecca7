//! The states of a device by name: tensors that outlive a run and are shared by all of its plans.

use crate::error::{Error, Result};
use crate::plan::Port;
use crate::tape::Meta;
use std::collections::HashMap;

/// A state and where its values are.
pub(super) struct State<D> {
    pub name: String,
    pub meta: Meta,
    /// M, for a per-branch state.
    pub branches: usize,
    pub data: D,
}

/// All states of a device, in order of creation.
pub(super) struct States<D> {
    device: String,
    list: Vec<State<D>>,
    by_name: HashMap<String, usize>,
}

impl<D> States<D> {
    /// None yet; `device` is the device's name in errors.
    pub fn new(device: impl Into<String>) -> Self {
        States { device: device.into(), list: Vec::new(), by_name: HashMap::new() }
    }

    /// The state for a port of a plan with `branches`, made by `create` if it is new.
    ///
    /// # Errors
    /// When a state of that name has another shape or number of branches; whatever `create` returns.
    pub fn bind(&mut self, port: &Port, branches: usize, create: impl FnOnce() -> Result<D>) -> Result<usize> {
        if let Some(&i) = self.by_name.get(&port.name) {
            let State { meta, branches: m, .. } = &self.list[i];
            if port.meta.per_branch && *m != branches {
                let what = format!("state {} is kept for {m} branches, the plan has {branches}", port.name);
                return Err(self.error(what));
            }
            if *meta != port.meta {
                return Err(self.error(format!("state {} is {meta}, the plan has {}", port.name, port.meta)));
            }
            return Ok(i);
        }
        let data = create()?;
        self.by_name.insert(port.name.clone(), self.list.len());
        self.list.push(State { name: port.name.clone(), meta: port.meta, branches, data });
        Ok(self.list.len() - 1)
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| self.error(format!("no state named {name}")))
    }

    /// The state called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<&State<D>> {
        Ok(&self.list[self.position(name)?])
    }

    /// The state called `name`, to be changed.
    ///
    /// # Errors
    /// When there is none.
    pub fn get_mut(&mut self, name: &str) -> Result<&mut State<D>> {
        let at = self.position(name)?;
        Ok(&mut self.list[at])
    }

    /// True when there is a state called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// All of them.
    pub fn list(&self) -> &[State<D>] {
        &self.list
    }

    fn error(&self, what: String) -> Error {
        Error::Device { device: self.device.clone(), what }
    }
}
