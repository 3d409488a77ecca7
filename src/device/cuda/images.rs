//! Images kept on the device, and batches made of them beside the step that runs: `kernels/augment.cu`.
//!
//! A batch is made on the copy stream in memory of its own and copied to the plan's input when the next run
//! begins: until then the step under way reads its own batch there.

use super::Cuda;
use super::driver::{Address, Driver, Event, Launch, Stream};
use crate::device::{Crop, ImageSet, ImagesId, PlanId};
use crate::error::Result;
use bytemuck::{Pod, Zeroable};

const THREADS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AugmentParams {
    pixels: Address,
    table: Address,
    crops: Address,
    out: Address,
    channels: i32,
    height: i32,
    width: i32,
    samples: i32,
}
const _: () = assert!(size_of::<AugmentParams>() == 48);

/// Images on the device.
pub(super) struct Images {
    pixels: Address,
    table: Address,
    count: usize,
    shape: [usize; 3],
}

/// Where an input of a plan is made while the plan still runs.
pub(super) struct Landing {
    /// Which input.
    input: usize,
    /// Of which images.
    images: ImagesId,
    /// What makes a batch of them.
    launch: Launch,
    crops: Address,
    values: Address,
    bytes: usize,
    /// The batch is made.
    made: Event,
    /// The batch has been copied to the input; its memory may be used again.
    taken: Event,
    /// Made since the last run.
    pub staged: bool,
    used: bool,
}

impl Landing {
    /// Queues the copy to the plan's input before the launches of a run.
    pub fn take(&mut self, driver: &dyn Driver, inputs: &[Address]) -> Result<()> {
        driver.wait(Stream::Compute, self.made)?;
        driver.copy(Stream::Compute, self.values, inputs[self.input], self.bytes)?;
        driver.record(Stream::Compute, self.taken)?;
        (self.staged, self.used) = (false, true);
        Ok(())
    }

    /// Its memory.
    pub fn memory(&self) -> [Address; 2] {
        [self.crops, self.values]
    }
}

impl Images {
    /// Their memory.
    pub fn memory(&self) -> [Address; 2] {
        [self.pixels, self.table]
    }
}

impl Cuda {
    /// Copies images to the device; `None` when they do not fit its memory.
    pub(super) fn copy_images(&mut self, set: &ImageSet<'_>) -> Result<Option<ImagesId>> {
        let bytes = set.shape.iter().product::<usize>();
        let total = (bytes * set.count).max(1);
        // Leave room for plans that are still to come: the host can make batches, but not run a step.
        if self.driver.free_bytes().is_some_and(|free| total > free / 2) {
            return Ok(None);
        }
        let pixels = self.driver.allocate(total, "images")?;
        for i in 0..set.count {
            self.driver.upload(Stream::Copy, pixels.offset(i * bytes), (set.image)(i))?;
        }
        let table = self.driver.allocate(size_of_val(set.table), "normalisation")?;
        self.driver.upload(Stream::Copy, table, bytemuck::cast_slice(set.table))?;
        self.images.push(Images { pixels, table, count: set.count, shape: set.shape });
        Ok(Some(ImagesId(self.images.len() - 1)))
    }

    /// Queues the making of a batch on the copy stream.
    pub(super) fn make_batch(&mut self, images: ImagesId, plan: PlanId, input: &str, crops: &[Crop]) -> Result<()> {
        let Some(Images { count, shape: [channels, height, width], .. }) = self.images.get(images.0) else {
            return Err(self.error("no such images".into()));
        };
        if let Some(bad) = crops.iter().find(|c| usize::try_from(c.image).map_or(true, |i| i >= *count)) {
            return Err(self.error(format!("image {} of {count}", bad.image)));
        }
        let loaded = self.plan(plan)?;
        let found = loaded.plan.inputs.iter().position(|p| p.name == input && p.buffer.is_some());
        let Some(position) = found else {
            return Err(self.error(format!("the plan has no input named {input}, or does not use it")));
        };
        let meta = &loaded.plan.inputs[position].meta;
        if meta.dims != [crops.len(), *channels, *height, *width] || meta.per_branch {
            let have = format!("{} images {channels}x{height}x{width}", crops.len());
            return Err(self.error(format!("{input} is {meta} and cannot be made of {have}")));
        }
        let known = loaded.landings.iter().position(|l| l.input == position && l.images == images);
        let at = match known {
            Some(at) => at,
            None => {
                let landing = self.landing(images, plan, position)?;
                self.plans[plan.0].landings.push(landing);
                self.plans[plan.0].landings.len() - 1
            }
        };
        let landing = &self.plans[plan.0].landings[at];
        if landing.used {
            self.driver.wait(Stream::Copy, landing.taken)?;
        }
        self.driver.upload(Stream::Copy, landing.crops, bytemuck::cast_slice(crops))?;
        self.driver.launch(Stream::Copy, &landing.launch)?;
        self.driver.record(Stream::Copy, landing.made)?;
        // The batch that was made last counts.
        for (i, landing) in self.plans[plan.0].landings.iter_mut().enumerate().filter(|(_, l)| l.input == position) {
            landing.staged = i == at;
        }
        Ok(())
    }

    /// Memory, events and the launch for batches of `images` that become input number `input` of `plan`.
    fn landing(&self, images: ImagesId, plan: PlanId, input: usize) -> Result<Landing> {
        let meta = &self.plan(plan)?.plan.inputs[input].meta;
        let Images { pixels, table, .. } = self.images[images.0];
        let [samples, channels, height, width] = meta.dims;
        let values = meta.len();
        let crops = self.driver.allocate(samples * size_of::<Crop>(), "crops")?;
        let out = self.driver.allocate(4 * values, "the next batch")?;
        // What does not fit 32 bits is beyond the limits of a launch and is refused there.
        let narrow = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
        let params = AugmentParams {
            pixels,
            table,
            crops,
            out,
            channels: narrow(channels),
            height: narrow(height),
            width: narrow(width),
            samples: narrow(samples),
        };
        let launch = Launch {
            kernel: "augment_u8_f32",
            params: bytemuck::bytes_of(&params).into(),
            grid: [u32::try_from(values.div_ceil(THREADS)).unwrap_or(u32::MAX), 1, 1],
            threads: THREADS as u32,
            shared: 0,
            label: format!("augment: {meta}").into(),
        };
        let (made, taken) = (self.driver.event()?, self.driver.event()?);
        let bytes = 4 * values;
        Ok(Landing { input, images, launch, crops, values: out, bytes, made, taken, staged: false, used: false })
    }
}
