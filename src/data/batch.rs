//! Filling batches: images of chosen samples as network input, in parallel and without allocation.

use rayon::prelude::*;

use super::augment::{Augment, Normalise, Placement};
use super::dataset::Dataset;
use crate::error::{Error, Result};
use crate::rng::{Purpose, permutation, stream};

/// The order in which epoch `epoch` visits `n` samples: a permutation of `0..n`.
pub fn epoch_order(n: usize, seed: u64, epoch: u64) -> Vec<u32> {
    permutation(n, &mut stream(seed, Purpose::Shuffle, epoch, 0))
}

/// Turns sample indices into network input.
#[derive(Debug, Clone)]
pub struct Batcher<'a> {
    data: &'a Dataset,
    normalise: &'a Normalise,
    augment: Augment,
    seed: u64,
}

impl<'a> Batcher<'a> {
    /// A batcher over `data`; `seed` names the augmentation streams.
    ///
    /// # Errors
    /// [`Error::Usage`] if `normalise` is for another number of channels or the padding is not smaller than the
    /// image's sides.
    pub fn new(data: &'a Dataset, normalise: &'a Normalise, augment: Augment, seed: u64) -> Result<Self> {
        if normalise.mean().len() != data.channels {
            return Err(Error::usage(format!(
                "normalisation for {} channels, but the images of {} are {}",
                normalise.mean().len(),
                data.name,
                data.shape()
            )));
        }
        if augment.pad >= data.height.min(data.width) {
            return Err(Error::usage(format!(
                "padding {} is not smaller than the images of {}, {}",
                augment.pad,
                data.name,
                data.shape()
            )));
        }
        Ok(Batcher { data, normalise, augment, seed })
    }

    /// How `sample` is placed in `epoch`, as [`Batcher::fill`] does it.
    pub fn placement(&self, epoch: u64, sample: u32) -> Placement {
        self.augment.place(self.seed, epoch, sample.into())
    }

    /// The padding of the augmentation, pixels.
    pub fn pad(&self) -> usize {
        self.augment.pad
    }

    /// The images.
    pub fn data(&self) -> &'a Dataset {
        self.data
    }

    /// The normalisation.
    pub fn normalise(&self) -> &'a Normalise {
        self.normalise
    }

    /// Writes samples `indices` as augmented in `epoch` to `out`, `[k, C, H, W]` with `k = indices.len()`.
    ///
    /// What a sample looks like depends on (seed, epoch, sample) only: neither on its place in the batch nor on the
    /// number of threads.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` has another length or an index is not below `len()` of the data.
    pub fn fill(&self, epoch: u64, indices: &[u32], out: &mut [f32]) -> Result<()> {
        let shape = self.data.shape();
        if out.len() != indices.len() * shape.numel() {
            return Err(Error::shape("batch", format!("{} values for {} images of {shape}", out.len(), indices.len())));
        }
        if let Some(bad) = indices.iter().find(|&&i| i as usize >= self.data.len()) {
            return Err(Error::shape("batch", format!("sample {bad} of {}", self.data.len())));
        }
        out.par_chunks_mut(shape.numel()).zip(indices).for_each(|(out, &i)| {
            let place = self.placement(epoch, i);
            self.augment.write(self.data.image(i as usize), shape, place, self.normalise, out);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::dataset::{Family, ImageShape, Segment};
    use super::super::sample;
    use super::*;
    use crate::rng::below;

    /// `n` images of random pixels, labelled 0, 1, 0, …
    fn random(n: usize, shape: ImageShape) -> Dataset {
        let mut rng = stream(1, Purpose::Test, 3, 0);
        let pixels: Vec<u8> = (0..n * shape.numel()).map(|_| below(256, &mut rng) as u8).collect();
        let segment = Segment { bytes: pixels.into(), first: 0, stride: shape.numel(), count: n };
        let labels = (0..n).map(|i| i as u16 % 2).collect();
        Dataset::from_parts("random", Family::Other, shape, vec!["a".into(), "b".into()], labels, vec![segment])
    }

    #[test]
    fn normalisation_is_exact() {
        let train = random(20, ImageShape { channels: 3, height: 32, width: 32 });
        let normalise = Normalise::measure(&train).unwrap();
        for c in 0..3 {
            let pixels: Vec<f64> = (0..train.len())
                .flat_map(|i| train.image(i)[c * 1024..][..1024].iter().map(|&v| f64::from(v) / 255.0))
                .collect();
            let mean = pixels.iter().sum::<f64>() / pixels.len() as f64;
            let variance = pixels.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / pixels.len() as f64;
            assert!((normalise.mean()[c] - mean).abs() < 1e-12);
            assert!((normalise.std()[c] - variance.sqrt()).abs() < 1e-12);
            let expected = ((200.0 / 255.0 - normalise.mean()[c]) / normalise.std()[c]) as f32;
            assert_eq!(normalise.table(c)[200], expected);
        }
        let one = Normalise::measure(&train.subset(&[]).unwrap()).unwrap_err().to_string();
        assert_eq!(one, "random: no images to measure");
        assert!(Normalise::new(vec![0.5], vec![0.0]).is_err());
        assert!(Normalise::new(vec![0.5, 0.5], vec![1.0]).is_err());
        assert!(Normalise::new(vec![f64::NAN], vec![1.0]).is_err());
        let flat = random(1, ImageShape { channels: 1, height: 1, width: 1 });
        assert_eq!(Normalise::measure(&flat).unwrap().std(), [1.0]);
    }

    /// The definition of pad, crop and flip, pixel by pixel.
    fn augmented_pixel(data: &Dataset, i: usize, pad: usize, p: Placement, c: usize, y: usize, x: usize) -> u8 {
        let x = if p.flip { data.width - 1 - x } else { x };
        let (sy, sx) = (y + p.dy, x + p.dx);
        if sy < pad || sx < pad || sy - pad >= data.height || sx - pad >= data.width {
            return 0;
        }
        data.image(i)[(c * data.height + sy - pad) * data.width + sx - pad]
    }

    #[test]
    fn augmentation_is_its_definition() {
        let train = random(12, ImageShape { channels: 2, height: 5, width: 3 });
        let normalise = Normalise::measure(&train).unwrap();
        let augment = Augment { pad: 2, flip: true };
        let batcher = Batcher::new(&train, &normalise, augment, 3).unwrap();
        let indices: Vec<u32> = (0..12).rev().collect();
        let mut out = vec![f32::NAN; 12 * 30];
        let mut seen = std::collections::HashSet::new();
        for epoch in 0..60 {
            batcher.fill(epoch, &indices, &mut out).unwrap();
            for (k, &i) in indices.iter().enumerate() {
                let p = augment.place(3, epoch, i.into());
                seen.insert((p.dy, p.dx, p.flip));
                for (at, &value) in out[k * 30..][..30].iter().enumerate() {
                    let pixel = augmented_pixel(&train, i as usize, 2, p, at / 15, at % 15 / 3, at % 3);
                    assert_eq!(value, normalise.table(at / 15)[usize::from(pixel)]);
                }
            }
        }
        assert_eq!(seen.len(), 50, "all 5·5·2 placements occur");
        let plain = Batcher::new(&train, &normalise, Augment::NONE, 3).unwrap();
        plain.fill(9, &[5], &mut out[..30]).unwrap();
        for (at, &value) in out[..30].iter().enumerate() {
            assert_eq!(value, normalise.table(at / 15)[usize::from(train.image(5)[at])]);
        }
    }

    #[test]
    fn batches_do_not_depend_on_threads_or_order() {
        let train = sample::load().unwrap().train;
        let augment = Augment { pad: 4, flip: true };
        let run = |threads: usize, indices: &[u32]| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let normalise = Normalise::measure(&train).unwrap();
                let mut out = vec![0.0; indices.len() * 784];
                Batcher::new(&train, &normalise, augment, 1).unwrap().fill(7, indices, &mut out).unwrap();
                out
            })
        };
        let order = &epoch_order(train.len(), 1, 7)[..500];
        let (one, two) = (run(1, order), run(2, order));
        assert_eq!(
            one.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            two.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        );
        let reversed: Vec<u32> = order.iter().rev().copied().collect();
        let back = run(2, &reversed);
        assert!((0..500).all(|k| back[k * 784..][..784] == one[(499 - k) * 784..][..784]));
    }

    #[test]
    fn batcher_refuses_what_does_not_fit() {
        let train = random(12, ImageShape { channels: 1, height: 5, width: 3 });
        let normalise = Normalise::measure(&train).unwrap();
        let name = &train.name;
        let error = Batcher::new(&train, &normalise, Augment { pad: 3, flip: false }, 0).unwrap_err().to_string();
        assert_eq!(error, format!("padding 3 is not smaller than the images of {name}, 1×5×3"));
        let three = Normalise::new(vec![0.0; 3], vec![1.0; 3]).unwrap();
        let error = Batcher::new(&train, &three, Augment::NONE, 0).unwrap_err().to_string();
        assert_eq!(error, format!("normalisation for 3 channels, but the images of {name} are 1×5×3"));
        let batcher = Batcher::new(&train, &normalise, Augment::NONE, 0).unwrap();
        let error = batcher.fill(0, &[0, 1], &mut [0.0; 29]).unwrap_err().to_string();
        assert_eq!(error, "batch: 29 values for 2 images of 1×5×3");
        assert_eq!(batcher.fill(0, &[12], &mut [0.0; 15]).unwrap_err().to_string(), "batch: sample 12 of 12");
        batcher.fill(0, &[], &mut []).unwrap();
    }
}
