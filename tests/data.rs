//! Data sets on disk, good and bad, and the embedded sample.

mod files;

use std::fs;
use std::path::Path;

use files::{bytes, cifar_records, gzip, idx_file, idx_split};
use mlnt::data::dataset::Family;
use mlnt::data::{DataPair, Dataset, NoiseKind, Normalise, epoch_order, noise, open};

// ---------------------------------------------------------------- files made by the tests

const IDX_NAMES: [&str; 4] =
    ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"];

/// A folder with a valid IDX data set of 12 training and 7 test images.
fn idx_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in IDX_NAMES.iter().zip([idx_split(12, 1), idx_split(7, 2)].concat()) {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

/// Writes a valid CIFAR-10 of 5×4 and 3 images.
fn write_cifar10(folder: &Path) {
    for batch in 1..=5 {
        let records = cifar_records(4, batch, |i| vec![((batch as usize * 4 + i) % 10) as u8]);
        fs::write(folder.join(format!("data_batch_{batch}.bin")), records).unwrap();
    }
    fs::write(folder.join("test_batch.bin"), cifar_records(3, 9, |i| vec![9 - i as u8])).unwrap();
}

/// Writes a valid CIFAR-100 of 6 and 3 images.
fn write_cifar100(folder: &Path) {
    fs::write(folder.join("train.bin"), cifar_records(6, 3, |i| vec![19, 99 - i as u8])).unwrap();
    fs::write(folder.join("test.bin"), cifar_records(3, 4, |i| vec![0, i as u8])).unwrap();
}

fn error(folder: &Path) -> String {
    let text = open(folder.to_str().unwrap()).unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    assert!(text.starts_with(folder.to_str().unwrap()), "{text}");
    text
}

/// Asserts that opening `folder` fails with exactly "`folder`/`file`: `what`".
#[track_caller]
fn assert_error(folder: &Path, file: &str, what: &str) {
    assert_eq!(error(folder), format!("{}: {what}", folder.join(file).display()));
}

// ---------------------------------------------------------------- round trips

#[test]
fn idx_round_trip_raw_gzip_and_dotted() {
    let source = idx_folder();
    for variant in ["plain", "dotted", "gzip", "dotted gzip", "plain bytes named .gz"] {
        let folder = tempfile::tempdir().unwrap();
        for name in IDX_NAMES {
            let mut content = fs::read(source.path().join(name)).unwrap();
            let mut name = name.to_string();
            if variant.contains("dotted") {
                name = name.replace("-idx", ".idx");
            }
            if variant.contains("gz") {
                name += ".gz";
            }
            if variant.contains("gzip") {
                content = gzip(&content);
            }
            fs::write(folder.path().join(name), content).unwrap();
        }
        let DataPair { train, test } = open(folder.path().to_str().unwrap()).unwrap();
        assert_eq!((train.len(), test.len(), train.classes, train.family), (12, 7, 10, Family::Other), "{variant}");
        assert_eq!((train.channels, train.height, train.width), (1, 5, 3));
        assert_eq!(train.class_names[7], "7");
        for (data, [images, _]) in [(&train, idx_split(12, 1)), (&test, idx_split(7, 2))] {
            for i in 0..data.len() {
                assert_eq!(data.image(i), &images[16 + 15 * i..][..15]);
                assert_eq!(data.label(i), i * 3 % 10);
            }
        }
    }
}

#[test]
fn fashion_is_known_by_its_folder() {
    let outer = tempfile::tempdir().unwrap();
    let raw = outer.path().join("FashionMNIST/raw");
    fs::create_dir_all(&raw).unwrap();
    for name in IDX_NAMES {
        fs::copy(idx_folder().path().join(name), raw.join(name)).unwrap();
    }
    let train = open(raw.to_str().unwrap()).unwrap().train;
    assert_eq!((train.name.as_str(), train.family), ("fashion-mnist", Family::FashionMnist));
    assert_eq!((train.class_names[0].as_str(), train.class_names[9].as_str()), ("T-shirt/top", "Ankle boot"));
}

#[test]
fn cifar10_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("cifar-10-batches-bin");
    fs::create_dir(&inner).unwrap();
    write_cifar10(&inner);
    for path in [folder.path(), &inner] {
        let DataPair { train, test } = open(path.to_str().unwrap()).unwrap();
        assert_eq!((train.len(), test.len(), train.classes, train.family), (20, 3, 10, Family::Cifar10));
        assert_eq!((train.channels, train.height, train.width), (3, 32, 32));
        assert_eq!((train.class_names[3].as_str(), train.name.as_str()), ("cat", "cifar-10"));
        for i in 0..20 {
            assert_eq!(train.label(i), (i + 4) % 10);
            assert_eq!(train.image(i), bytes(3072, (i as u64 / 4 + 1) * 1000 + i as u64 % 4));
        }
        assert_eq!(test.labels(), [9, 8, 7]);
        let view = train.subset(&[19, 4, 4]).unwrap().subset(&[2, 0]).unwrap();
        assert_eq!((view.image(0), view.image(1), view.labels()), (train.image(4), train.image(19), &[8, 3][..]));
        assert_eq!(train.subset(&[20]).unwrap_err().to_string(), "cifar-10: sample 20 of 20");
    }
    fs::write(inner.join("batches.meta.txt"), "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n").unwrap();
    assert_eq!(open(inner.to_str().unwrap()).unwrap().test.class_names[9], "j");
    fs::write(inner.join("batches.meta.txt"), "a\nb\n").unwrap();
    assert_error(&inner, "batches.meta.txt", "2 class names, expected 10");
    fs::write(inner.join("batches.meta.txt"), b"\xff\n").unwrap();
    assert_error(&inner, "batches.meta.txt", "class names are not UTF-8 text");
}

#[test]
fn cifar100_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    write_cifar100(folder.path());
    let DataPair { train, test } = open(folder.path().to_str().unwrap()).unwrap();
    assert_eq!((train.labels(), test.labels()), (&[99, 98, 97, 96, 95, 94][..], &[0, 1, 2][..]));
    assert_eq!((train.classes, train.class_names[42].as_str(), train.family), (100, "42", Family::Cifar100));
    for i in 0..6 {
        assert_eq!(train.image(i), bytes(3072, 3000 + i as u64));
    }
    let names: Vec<String> = (0..100).map(|i| format!("thing {i}")).collect();
    fs::write(folder.path().join("fine_label_names.txt"), names.join("\n")).unwrap();
    assert_eq!(open(folder.path().to_str().unwrap()).unwrap().train.class_names, names);
}

// ---------------------------------------------------------------- bad input

#[test]
fn unknown_places() {
    let folder = tempfile::tempdir().unwrap();
    assert!(error(folder.path()).contains(": holds no data set known here; data is the word `sample`, or a folder"));
    let missing = folder.path().join("nowhere");
    assert!(error(&missing).contains("nowhere: does not exist; data is the word `sample`"));
    fs::write(folder.path().join("train.bin.zip"), "x").unwrap();
    assert!(error(&folder.path().join("train.bin.zip")).contains(": is a file; data is"));
    write_cifar10(folder.path());
    write_cifar100(folder.path());
    assert!(error(folder.path()).contains(": holds more than one data set: CIFAR-10 in "));
    assert!(open("").unwrap_err().to_string().contains("does not exist"));
    assert!(open("a\0b").is_err());
}

#[test]
fn bad_cifar() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_cifar10(path);
    let good = fs::read(path.join("data_batch_3.bin")).unwrap();
    let rewrite = |content: &[u8]| fs::write(path.join("data_batch_3.bin"), content).unwrap();
    rewrite(&good[..good.len() - 1]);
    let tail = "expected 10000 records of 3073 bytes = 30730000";
    let size = "12291 bytes, not a whole number of records";
    assert_error(path, "data_batch_3.bin", &format!("truncated: {size}; {tail}"));
    rewrite(&[]);
    assert_error(path, "data_batch_3.bin", &format!("empty, no images; {tail}"));
    fs::File::create(path.join("data_batch_3.bin")).unwrap().set_len(30_733_073).unwrap();
    assert_error(path, "data_batch_3.bin", &format!("oversized: 30733073 bytes; {tail}"));
    let mut labelled = good.clone();
    labelled[3073] = 10;
    rewrite(&labelled);
    assert_error(path, "data_batch_3.bin", "label 10 of record 1 is outside 0..=9");
    fs::remove_file(path.join("data_batch_3.bin")).unwrap();
    assert_eq!(error(path), format!("{}: data_batch_3.bin not found", path.display()));
    fs::create_dir(path.join("data_batch_3.bin")).unwrap();
    assert_error(path, "data_batch_3.bin", "not a regular file");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_cifar100(path);
    fs::write(path.join("test.bin"), cifar_records(2, 1, |i| vec![20 * i as u8, 5])).unwrap();
    assert_error(path, "test.bin", "coarse label 20 of record 1 is outside 0..=19");
    fs::write(path.join("test.bin"), cifar_records(2, 1, |_| vec![1, 100])).unwrap();
    assert_error(path, "test.bin", "fine label 100 of record 0 is outside 0..=99");
    fs::remove_file(path.join("test.bin")).unwrap();
    assert!(error(path).ends_with(": test.bin not found"));
}

#[test]
fn bad_idx() {
    let folder = idx_folder();
    let path = folder.path();
    let [images, labels] = idx_split(12, 1);
    let rewrite = |name: &str, content: &[u8]| fs::write(path.join(name), content).unwrap();
    let (image_name, label_name) = (IDX_NAMES[0], IDX_NAMES[1]);

    rewrite(image_name, &labels);
    let magic = "IDX magic number 0x00000801 (a label file), expected 0x00000803 (an image file)";
    assert_error(path, image_name, magic);
    rewrite(image_name, &idx_file(0xd03, &[1, 1, 1], &[0]));
    assert_error(path, image_name, "IDX magic number 0x00000d03, expected 0x00000803 (an image file)");
    rewrite(image_name, &[0, 0, 8]);
    assert_error(path, image_name, "truncated: 3 bytes are too few for the 16-byte IDX header");
    rewrite(image_name, &[]);
    assert_error(path, image_name, "truncated: 0 bytes are too few for the 16-byte IDX header");
    let promise = "the header promises 12 images of 5×3 = 180 bytes";
    rewrite(image_name, &images[..images.len() - 1]);
    assert_error(path, image_name, &format!("truncated: {promise} after itself, found 179"));
    rewrite(image_name, &[&images[..], &[0, 0]].concat());
    assert_error(path, image_name, &format!("oversized: {promise} after itself, found 182"));
    rewrite(image_name, &idx_file(0x803, &[0, 5, 3], &[]));
    assert_error(path, image_name, "empty: the header promises 0 images of 5×3");
    rewrite(image_name, &idx_file(0x803, &[u32::MAX; 3], &[]));
    let huge = "impossible header: 4294967295 images of 4294967295×4294967295";
    assert_error(path, image_name, huge);
    rewrite(image_name, &images);
    rewrite(label_name, &idx_split(11, 1)[1]);
    let disagree = format!("holds 11 labels, but {} holds 12 images", path.join(image_name).display());
    assert_error(path, label_name, &disagree);
    let mut wrong = labels.clone();
    wrong[8 + 5] = 10;
    rewrite(label_name, &wrong);
    assert_error(path, label_name, "label 10 of image 5 is outside 0..=9");
    rewrite(label_name, &labels);
    rewrite(IDX_NAMES[2], &idx_file(0x803, &[7, 3, 5], &[0; 105]));
    assert_error(path, IDX_NAMES[2], "test images are 1×3×5, the training images 1×5×3");
    fs::remove_file(path.join(IDX_NAMES[2])).unwrap();
    let names = "t10k-images-idx3-ubyte not found, nor t10k-images.idx3-ubyte, t10k-images-idx3-ubyte.gz, \
                 t10k-images.idx3-ubyte.gz";
    assert!(error(path).ends_with(&format!(": {names}")));
}

#[test]
fn bad_gzip() {
    let folder = idx_folder();
    let path = folder.path();
    let images = idx_split(12, 1)[0].clone();
    fs::remove_file(path.join(IDX_NAMES[0])).unwrap();
    let name = format!("{}.gz", IDX_NAMES[0]);
    let rewrite = |content: &[u8]| fs::write(path.join(&name), content).unwrap();
    let packed = gzip(&images);
    rewrite(&packed[..packed.len() / 2]);
    assert_error(path, &name, "truncated: the gzip stream ends early");
    rewrite(&packed[..packed.len() - 3]);
    assert_error(path, &name, "truncated: the gzip stream ends early");
    let mut damaged = packed.clone();
    let at = damaged.len() - 6;
    damaged[at] ^= 1;
    rewrite(&damaged);
    assert!(error(path).contains(": damaged gzip stream: "), "{}", error(path));
    let promise = "the header promises 12 images of 5×3 = 180 bytes after itself, found";
    rewrite(&gzip(&images[..100]));
    assert_error(path, &name, &format!("truncated: {promise} 84"));
    rewrite(&gzip(&[&images[..], &[7]].concat()));
    assert_error(path, &name, &format!("oversized: {promise} more"));
    // Four billion images in a small file: refused by the sizes alone.
    let huge = gzip(&idx_file(0x803, &[u32::MAX, 28, 28], &[0; 100]));
    rewrite(&huge);
    let promise = "the header promises 4294967295 images of 28×28 = 3367254359280 bytes";
    assert_error(path, &name, &format!("truncated: {promise}, more than {} bytes of gzip can hold", huge.len()));
    rewrite(&gzip(&idx_split(12, 1)[1]));
    assert!(error(path).contains("IDX magic number 0x00000801 (a label file)"));
    rewrite(&gzip(&[]));
    assert_error(path, &name, "truncated: 0 bytes are too few for the 16-byte IDX header");
    rewrite(b"\x1f\x8b");
    assert_error(path, &name, "truncated: the gzip stream ends early");
    rewrite(&packed);
    assert_eq!(open(path.to_str().unwrap()).unwrap().train.len(), 12);
}

// ---------------------------------------------------------------- the sample and the full set

/// FNV-1a, to pin values. The pinned ones were computed by a separate program from the generator's definition.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

fn hash_dataset(data: &Dataset) -> u64 {
    hash((0..data.len()).flat_map(|i| data.image(i).iter().copied().chain([data.label(i) as u8])))
}

#[test]
fn sample_is_balanced_and_known() {
    let DataPair { train, test } = open("sample").unwrap();
    assert_eq!(train.shape().to_string(), "1×28×28");
    assert_eq!((train.name.as_str(), train.family), ("fashion-mnist-sample", Family::FashionMnist));
    for (data, each) in [(&train, 600), (&test, 200)] {
        assert_eq!(data.len(), 10 * each);
        for class in 0..10 {
            assert_eq!(data.labels().iter().filter(|&&label| label == class).count(), each);
        }
        // Shuffled: among the first 1,000 every class is there about 100 times.
        for class in 0..10 {
            let early = data.labels()[..1000].iter().filter(|&&label| label == class).count();
            assert!((60..140).contains(&early), "{early}");
        }
    }
    assert_eq!((hash_dataset(&train), hash_dataset(&test)), (15629147403298137450, 3633756656071882607));
}

#[test]
fn debian_folder() {
    let folder = "/usr/share/datasets/fashion-mnist";
    if !Path::new(folder).is_dir() {
        println!("skipped: the Debian package dataset-fashion-mnist is not installed");
        return;
    }
    let DataPair { train, test } = open(folder).unwrap();
    assert_eq!((train.len(), test.len(), train.name.as_str()), (60_000, 10_000, "fashion-mnist"));
    assert_eq!(train.class_names[5], "Sandal");
    // The figures everyone uses for this set: 0.2860 and 0.3530.
    let normalise = Normalise::measure(&train).unwrap();
    assert!((normalise.mean()[0] - 0.2860).abs() < 5e-5 && (normalise.std()[0] - 0.3530).abs() < 5e-5);
    let whole: std::collections::HashSet<&[u8]> = (0..train.len()).map(|i| train.image(i)).collect();
    let sample = open("sample").unwrap().train;
    assert!((0..sample.len()).all(|i| whole.contains(sample.image(i))));
}

#[test]
fn noise_on_the_sample_is_pinned() {
    let train = open("sample").unwrap().train;
    let map = noise::ClassMap::of(&train);
    let corrupt = |kind, rate, seed| noise::corrupt(train.labels(), 10, kind, rate, seed, &map).unwrap();
    let pin = |labels: &[u16]| hash(labels.iter().map(|&label| label as u8));
    let asymmetric = corrupt(NoiseKind::Asymmetric, 0.4, 1);
    // Seven of the ten classes have a look-alike.
    assert_eq!(asymmetric.realised_rate, 0.28);
    assert_eq!(pin(&asymmetric.labels), 2131726844591411659);
    assert_eq!(pin(&corrupt(NoiseKind::SymmetricInclusive, 0.5, 1).labels), 12633431514237035404);
    assert_eq!(epoch_order(10, 1, 0), [1, 0, 8, 2, 9, 3, 7, 5, 6, 4]);
    assert_eq!(epoch_order(10, 1, 1), [2, 5, 0, 6, 7, 3, 1, 4, 8, 9]);
}
