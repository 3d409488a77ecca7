//! Batches made on the device are those that the host makes, and do not disturb the run under way.

use mlnt::data::augment::{Augment, Normalise, Placement};
use mlnt::data::dataset::ImageShape;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Crop, Device, HostSlice, ImageSet, ImagesId, PlanId};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::rng::{Purpose, below, stream};
use mlnt::tape::{Coef, Meta, Tape};

const SHAPES: [ImageShape; 3] = [
    ImageShape { channels: 1, height: 5, width: 3 },
    ImageShape { channels: 3, height: 4, width: 7 },
    ImageShape { channels: 2, height: 17, width: 19 },
];

/// Images of random pixels with a normalisation of their own for every channel.
struct Set {
    shape: ImageShape,
    pixels: Vec<u8>,
    normalise: Normalise,
}

impl Set {
    const COUNT: usize = 7;

    fn new(shape: ImageShape) -> Self {
        let rng = &mut stream(3, Purpose::Test, 21, shape.numel() as u64);
        let pixels = (0..Set::COUNT * shape.numel()).map(|_| below(256, rng) as u8).collect();
        let per_channel = |from: f64, by: f64| (0..shape.channels).map(|c| from + by * c as f64).collect();
        let normalise = Normalise::new(per_channel(0.3, 0.1), per_channel(0.2, 0.05)).unwrap();
        Set { shape, pixels, normalise }
    }

    fn image(&self, i: usize) -> &[u8] {
        &self.pixels[i * self.shape.numel()..][..self.shape.numel()]
    }

    fn keep(&self, device: &mut dyn Device) -> Option<ImagesId> {
        let ImageShape { channels, height, width } = self.shape;
        let table: Vec<f32> = (0..channels).flat_map(|c| *self.normalise.table(c)).collect();
        let shape = [channels, height, width];
        device.keep_images(&ImageSet { count: Set::COUNT, shape, image: &|i| self.image(i), table: &table }).unwrap()
    }

    /// What the host makes of the images `crops` show.
    fn on_the_host(&self, pad: usize, crops: &[Crop]) -> Vec<f64> {
        let mut batch = Vec::new();
        for crop in crops {
            let at = |from: i32| usize::try_from(from + pad as i32).unwrap();
            let place = Placement { dy: at(crop.row), dx: at(crop.column), flip: crop.flip == 1 };
            let mut out = vec![f32::NAN; self.shape.numel()];
            let image = self.image(crop.image as usize);
            Augment { pad, flip: true }.write(image, self.shape, place, &self.normalise, &mut out);
            batch.extend(out.into_iter().map(f64::from));
        }
        batch
    }
}

/// Every placement within `pad`, mirrored and not, each of another image.
fn placements(pad: i32) -> Vec<Crop> {
    let shifts = (-pad..=pad).flat_map(|row| (-pad..=pad).map(move |column| (row, column)));
    let crops = shifts.flat_map(|(row, column)| [0, 1].map(|flip| Crop { image: 0, row, column, flip }));
    crops.enumerate().map(|(i, crop)| Crop { image: (i % Set::COUNT) as i32, ..crop }).collect()
}

/// A plan whose outputs are its input itself and twice the input, for `samples` images.
fn identity(device: &mut dyn Device, shape: ImageShape, samples: usize) -> PlanId {
    let mut tape = Tape::new(2);
    let meta = Meta::activation(samples, shape.channels, shape.height, shape.width);
    let x = tape.input("x", meta).unwrap();
    let unused = tape.input("unused", meta).unwrap();
    assert_ne!(x, unused);
    let branched = tape.input("branched", meta.branched()).unwrap();
    let twice = tape.scale(Coef::constant(2.0), x).unwrap();
    tape.output("same", x);
    tape.output("twice", twice);
    tape.output("branched", branched);
    device.load(Plan::build(&tape, &PlanOptions::default()).unwrap()).unwrap()
}

fn simt() -> Cuda {
    Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F32, Mode::Graph)
}

#[test]
fn every_placement_is_what_the_host_makes() {
    for shape in SHAPES {
        let set = Set::new(shape);
        for pad in 0..shape.height.min(shape.width) as i32 {
            let crops = placements(pad);
            // Batches of one size: the last begins again from the first placement.
            let size = crops.len().min(50);
            let mut device = simt();
            let id = identity(&mut device, shape, size);
            let images = set.keep(&mut device).unwrap();
            for from in (0..crops.len()).step_by(size) {
                let batch: Vec<Crop> = crops[from..].iter().chain(&crops).copied().take(size).collect();
                device.stage(images, id, "x", &batch).unwrap();
                device.run(id, &[]).unwrap();
                let want = set.on_the_host(pad as usize, &batch);
                let read = |name| device.read_output(id, name).unwrap().to_f64();
                assert!(read("same") == want, "{shape}, padding {pad}, from {from}");
                let twice: Vec<f64> = want.iter().map(|v| 2.0 * v).collect();
                assert!(read("twice") == twice, "{shape}, padding {pad}, from {from}");
            }
        }
    }
}

#[test]
fn the_next_batch_waits_for_the_next_run() {
    let set = Set::new(SHAPES[1]);
    let mut device = simt();
    let (id, other) = (identity(&mut device, set.shape, 2), identity(&mut device, set.shape, 3));
    let images = set.keep(&mut device).unwrap();
    let all = placements(2);
    let batch = |i: usize| &all[2 * i..2 * i + 2];
    let want = |i: usize| set.on_the_host(2, batch(i));
    let read = |device: &Cuda, id, name| device.read_output(id, name).unwrap().to_f64();

    device.stage(images, id, "x", batch(0)).unwrap();
    device.run(id, &[]).unwrap();
    for i in 1..4 {
        device.stage(images, id, "x", batch(i)).unwrap();
        assert!(read(&device, id, "same") == want(i - 1), "batch {i} overtakes the run before");
        device.run(id, &[]).unwrap();
        assert!(read(&device, id, "same") == want(i), "batch {i}");
    }
    // Staged twice, the later one counts; a run without a new batch has the old one.
    device.stage(images, id, "x", batch(5)).unwrap();
    device.stage(images, id, "x", batch(6)).unwrap();
    for _ in 0..2 {
        device.run(id, &[]).unwrap();
        assert!(read(&device, id, "same") == want(6));
    }
    // Another plan has its own batch, and a batch that the host writes takes the place of an older one.
    device.stage(images, id, "x", batch(7)).unwrap();
    device.stage(images, other, "x", &all[..3]).unwrap();
    device.run(other, &[]).unwrap();
    assert!(read(&device, other, "same") == set.on_the_host(2, &all[..3]));
    device.run(id, &[]).unwrap();
    assert!(read(&device, id, "same") == want(7));
    let written: Vec<f64> = (0..2 * set.shape.numel()).map(|i| i as f64).collect();
    device.write_input(id, "x", HostSlice::F64(&written)).unwrap();
    device.run(id, &[]).unwrap();
    assert!(read(&device, id, "same") == written);
}

#[test]
fn of_two_sets_of_images_the_one_staged_last_counts() {
    let first = Set::new(SHAPES[1]);
    let mut second = Set::new(SHAPES[1]);
    second.pixels.reverse();
    let mut device = simt();
    let id = identity(&mut device, first.shape, 2);
    let kept = [first.keep(&mut device).unwrap(), second.keep(&mut device).unwrap()];
    let batch = &placements(2)[..2];
    let want = [first.on_the_host(2, batch), second.on_the_host(2, batch)];
    assert!(want[0] != want[1]);
    for order in [[0, 1], [1, 0], [0, 1]] {
        order.iter().for_each(|&set| device.stage(kept[set], id, "x", batch).unwrap());
        device.run(id, &[]).unwrap();
        assert!(device.read_output(id, "same").unwrap().to_f64() == want[order[1]], "{order:?}");
    }
}

#[test]
fn batches_that_cannot_be_made_are_refused() {
    let set = Set::new(SHAPES[0]);
    let mut device = simt();
    let (id, wider) = (identity(&mut device, set.shape, 2), identity(&mut device, SHAPES[1], 2));
    let images = set.keep(&mut device).unwrap();
    let crop = |image: i32| Crop { image, row: 0, column: 0, flip: 0 };
    let mut refused = |id, input: &str, crops: &[Crop], what: &str| {
        let error = device.stage(images, id, input, crops).unwrap_err().to_string();
        assert!(error.starts_with("device simt: ") && error.contains(what), "{error}");
    };
    refused(id, "x", &[crop(0)], "cannot be made of 1 images 1x5x3");
    refused(id, "x", &[crop(0), crop(1), crop(2)], "cannot be made of 3 images 1x5x3");
    refused(id, "x", &[], "cannot be made of 0 images 1x5x3");
    refused(wider, "x", &[crop(0); 2], "cannot be made of 2 images 1x5x3");
    refused(id, "branched", &[crop(0); 2], "cannot be made of 2 images 1x5x3");
    refused(id, "x", &[crop(0), crop(7)], "image 7 of 7");
    refused(id, "x", &[crop(-1), crop(0)], "image -1 of 7");
    refused(id, "z", &[crop(0); 2], "no input named z");
    refused(id, "unused", &[crop(0); 2], "no input named unused, or does not use it");
    // None of that has changed what comes next.
    device.stage(images, id, "x", &[crop(3), crop(6)]).unwrap();
    device.run(id, &[]).unwrap();
    let have = device.read_output(id, "same").unwrap().to_f64();
    assert!(have == set.on_the_host(0, &[crop(3), crop(6)]));

    // Of another device.
    let mut fresh = simt();
    let id = identity(&mut fresh, set.shape, 2);
    let error = fresh.stage(images, id, "x", &[crop(0); 2]).unwrap_err().to_string();
    assert!(error.contains("no such images"), "{error}");
    assert_eq!(set.keep(&mut Cpu::<f32>::new(1).unwrap()), None, "the CPU leaves batches to the host");
}
