//! The images of every step, made while the step before runs: on the device where it can, else on the host.

use super::engine::Engine;
use super::method::Part;
use crate::data::Batcher;
use crate::device::{Crop, ImageSet, ImagesId};
use crate::error::Result;

/// Where the images of a batch are.
#[derive(Clone, Copy, Debug)]
pub enum Images<'a> {
    /// Made on the device: [`Device::stage`](crate::device::Device::stage) was told which.
    Staged,
    /// `[k, C, H, W]` on the host.
    Host(&'a [f32]),
}

/// Makes batches of one set of images.
pub struct Feed<'a> {
    batcher: Batcher<'a>,
    kept: Option<ImagesId>,
    x: Vec<f32>,
    crops: Vec<Crop>,
}

/// Gives the images of `batcher` to the device of `engine`; `None` when it leaves batches to the host.
///
/// # Errors
/// When the device fails.
pub fn keep_images(engine: &mut Engine, batcher: &Batcher<'_>) -> Result<Option<ImagesId>> {
    let (data, normalise) = (batcher.data(), batcher.normalise());
    let table: Vec<f32> = (0..data.channels).flat_map(|c| normalise.table(c).iter().copied()).collect();
    let shape = [data.channels, data.height, data.width];
    engine.device_mut().keep_images(&ImageSet { count: data.len(), shape, image: &|i| data.image(i), table: &table })
}

impl<'a> Feed<'a> {
    /// Batches by `batcher`, of images that the device keeps as `kept`.
    pub fn new(batcher: Batcher<'a>, kept: Option<ImagesId>) -> Self {
        Feed { batcher, kept, x: Vec::new(), crops: Vec::new() }
    }

    /// Begins to make the batch of samples `ids` for the next step of `part`.
    ///
    /// # Errors
    /// When the device fails or a sample is not there.
    pub fn prepare(&mut self, engine: &mut Engine, part: &Part, epoch: u64, ids: &[u32]) -> Result<()> {
        let Some(kept) = self.kept else {
            self.x.resize(ids.len() * self.batcher.data().shape().numel(), 0.0);
            return self.batcher.fill(epoch, ids, &mut self.x);
        };
        let pad = self.batcher.pad() as i32;
        self.crops.clear();
        self.crops.extend(ids.iter().map(|&id| {
            let place = self.batcher.placement(epoch, id);
            let (row, column) = (place.dy as i32 - pad, place.dx as i32 - pad);
            Crop { image: id as i32, row, column, flip: i32::from(place.flip) }
        }));
        engine.stage(part, kept, &self.crops)
    }

    /// The batch made last.
    pub fn images(&self) -> Images<'_> {
        match self.kept {
            Some(_) => Images::Staged,
            None => Images::Host(&self.x),
        }
    }
}
