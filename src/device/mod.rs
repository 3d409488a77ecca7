//! Devices: they run plans and hold the memory that outlives a run.
//!
//! A device knows operations and places, neither tapes nor models. Activations cross its border in `[N, C, H, W]`
//! order, whatever order it keeps them in.

mod check;
pub mod cpu;
pub mod cuda;
mod shortage;
mod states;

use crate::error::Result;
use crate::plan::{Machine, Plan, PlanOptions};
use crate::tape::Meta;
use std::time::Instant;

/// Values on their way to a device. Reals are converted to the precision of the device.
#[derive(Clone, Copy, Debug)]
pub enum HostSlice<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Double precision.
    F64(&'a [f64]),
    /// Labels.
    I32(&'a [i32]),
}

/// Values read from a device, in the precision in which it holds them.
#[derive(Clone, Debug, PartialEq)]
pub enum HostVec {
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
    /// Indices.
    I32(Vec<i32>),
}

impl HostVec {
    /// The values in double precision, which holds each of them exactly.
    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            HostVec::F32(v) => v.iter().map(|x| f64::from(*x)).collect(),
            HostVec::F64(v) => v.clone(),
            HostVec::I32(v) => v.iter().map(|x| f64::from(*x)).collect(),
        }
    }

    /// The same values on their way back.
    pub fn as_slice(&self) -> HostSlice<'_> {
        match self {
            HostVec::F32(v) => HostSlice::F32(v),
            HostVec::F64(v) => HostSlice::F64(v),
            HostVec::I32(v) => HostSlice::I32(v),
        }
    }
}

/// A plan loaded on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanId(pub(crate) usize);

/// Images of a data set, and what their bytes become as network input.
pub struct ImageSet<'a> {
    /// Number of images.
    pub count: usize,
    /// Channels, height and width of each.
    pub shape: [usize; 3],
    /// The bytes of an image, `[C, H, W]`.
    pub image: &'a dyn Fn(usize) -> &'a [u8],
    /// The normalised value of every byte, by channel: `[C, 256]`.
    pub table: &'a [f32],
}

/// Images that a device holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImagesId(pub(crate) usize);

/// Which image of an [`ImageSet`] a sample shows, and how: a window of the image's own size, filled up with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Crop {
    /// The image.
    pub image: i32,
    /// Row of the image at which the window begins; negative above it.
    pub row: i32,
    /// Column of the image at which the window begins; negative to the left of it.
    pub column: i32,
    /// 1 to mirror the window left to right, else 0.
    pub flip: i32,
}

/// Names of outputs, each with where its values go.
pub type Destinations<'i, 'a> = &'i mut dyn Iterator<Item = (&'a str, &'a mut Vec<f64>)>;

/// What every device does.
///
/// States are known by name and shared by all plans of a device; inputs belong to one plan. Outputs can be read
/// until another plan runs.
pub trait Device {
    /// Its name in a sentence, e.g. `cpu (f32, 2 threads)`.
    fn describe(&self) -> String;

    /// Bytes of one real.
    fn real_bytes(&self) -> usize;

    /// How plans for it are best built.
    fn plan_options(&self) -> PlanOptions {
        PlanOptions::default()
    }

    /// What the groups go by that a step's plan takes its branches in, unless somebody asks for other groups; `None` takes all
    /// branches at a time.
    fn machine(&self) -> Option<Machine> {
        None
    }

    /// Bytes of memory of its own that a plan takes there: arena, states, inputs and scratch; `None` from a device that has none.
    ///
    /// # Errors
    /// When an operation has sizes that the device cannot take.
    fn plan_bytes(&self, _plan: &Plan) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Makes a plan ready: its memory, and zeros in the states that are new.
    ///
    /// # Errors
    /// When a state exists with another shape, or memory is short.
    fn load(&mut self, plan: Plan) -> Result<PlanId>;

    /// Writes an input of a plan. Returns false for an input the plan does not use.
    ///
    /// # Errors
    /// When the plan has no such input or the number or type of the values is wrong.
    fn write_input(&mut self, plan: PlanId, name: &str, values: HostSlice<'_>) -> Result<bool>;

    /// Keeps a data set's images to make inputs of them with [`Device::stage`]; `None` from a device that leaves this
    /// to the host.
    ///
    /// # Errors
    /// When the device fails.
    fn keep_images(&mut self, _images: &ImageSet<'_>) -> Result<Option<ImagesId>> {
        Ok(None)
    }

    /// Begins to make an input `[crops, C, H, W]` for the next run of `plan`, beside the run under way if the
    /// device can.
    ///
    /// # Errors
    /// When there are no such images or no such input, a crop shows an image that is not there, or the device fails.
    fn stage(&mut self, images: ImagesId, plan: PlanId, input: &str, crops: &[Crop]) -> Result<()>;

    /// Runs a plan with one value per runtime scalar, in the order of [`Plan::scalars`].
    ///
    /// # Errors
    /// When a launch fails or the number of scalars is wrong.
    fn run(&mut self, plan: PlanId, scalars: &[f64]) -> Result<()>;

    /// Runs a plan as [`Device::run`] and returns the seconds this took: on a card between two events around the work
    /// queued, else by the host's clock.
    ///
    /// # Errors
    /// As [`Device::run`].
    fn run_timed(&mut self, plan: PlanId, scalars: &[f64]) -> Result<f64> {
        let start = Instant::now();
        self.run(plan, scalars)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Runs a plan launch by launch. For each of its launches, in order: how many kernels it is, and the seconds they
    /// took.
    ///
    /// # Errors
    /// As [`Device::run`].
    fn time_launches(&mut self, plan: PlanId, scalars: &[f64]) -> Result<Vec<(usize, f64)>>;

    /// Reads an output of the plan that ran last; per-branch outputs come branch by branch.
    ///
    /// # Errors
    /// When there is no such output or another plan has run since.
    fn read_output(&self, plan: PlanId, name: &str) -> Result<HostVec>;

    /// Reads several outputs as [`Device::read_output`] does, waiting for the device once, in double precision, which holds each
    /// value exactly: replaces what the vectors hold, and enlarges those alone that are too small.
    ///
    /// # Errors
    /// As [`Device::read_output`].
    fn read_outputs_into<'a>(&self, plan: PlanId, outputs: Destinations<'_, 'a>) -> Result<()>;

    /// Names and shapes of all states, in order of creation.
    fn states(&self) -> Vec<(String, Meta)>;

    /// Writes a state.
    ///
    /// # Errors
    /// When there is no such state or the number or type of the values is wrong.
    fn write_state(&mut self, name: &str, values: HostSlice<'_>) -> Result<()>;

    /// Reads a state.
    ///
    /// # Errors
    /// When there is no such state.
    fn read_state(&self, name: &str) -> Result<HostVec>;
}
