//! Label files and CIFAR's Python version in their true layouts, good and bad, and `mlnt noise`.

mod files;
mod program;

use std::path::{Path, PathBuf};

use clap::Parser;
use files::{bytes, cifar_n, cifar_n_pickle, cifar10_python, fixture, fixtures, source, zip};
use mlnt::cli::{Cli, Command};
use mlnt::data::cifar::{CIFAR_10, CIFAR_100};
use mlnt::data::labels::{self, Format, LabelFile, json, npy};
use mlnt::data::{DataPair, Dataset, open};
use mlnt::train::config::Config;
use mlnt::train::prepare::Prepared;
use program::mlnt;

/// Labels of the fixtures: what `scripts/make_label_fixtures.py` computes.
const COUNT: usize = 40;

fn clean(i: usize) -> i64 {
    (i * 7 % 10) as i64
}

/// The set whose every `step`-th label is the next class.
fn shifted(step: usize) -> Vec<i64> {
    (0..COUNT).map(|i| if i % step == 0 { (clean(i) + 1) % 10 } else { clean(i) }).collect()
}

const NAMES: [&str; 5] = ["aggre_label", "worse_label", "random_label1", "random_label2", "random_label3"];

fn sets() -> Vec<(&'static str, Vec<i64>)> {
    let noisy = NAMES.iter().enumerate().map(|(k, name)| (*name, shifted(k + 2)));
    std::iter::once(("clean_label", (0..COUNT).map(clean).collect())).chain(noisy).collect()
}

/// A CIFAR-10 training set of 5·`each` images with the fixtures' labels.
fn cifar10(each: usize) -> Dataset {
    let file = |k: usize| {
        let records = (0..each).flat_map(|i| [vec![clean(k * each + i) as u8], bytes(3072, i as u64)].concat());
        source(format!("data_batch_{}.bin", k + 1), records.collect())
    };
    let train: Vec<_> = (0..5).map(file).collect();
    CIFAR_10.load(&train, &train[0], None).unwrap().train
}

fn read(bytes: &[u8], set: Option<&str>, data: &Dataset) -> Result<LabelFile, String> {
    let result = labels::read(Path::new("l"), bytes, set, data);
    result.map_err(|e| {
        assert_eq!(e.exit_code(), 2);
        e.to_string().strip_prefix("l: ").unwrap_or_else(|| panic!("names the file: {e}")).to_string()
    })
}

fn narrow(labels: &[i64]) -> Vec<u16> {
    labels.iter().map(|&label| label as u16).collect()
}

// ---------------------------------------------------------------- label files

#[test]
fn cifar_n_is_read_as_torch_writes_it() {
    let data = cifar10(8);
    let own = cifar_n_pickle(&sets());
    let torch = fixture("cifar-10n.pt");
    assert!(torch.windows(own.len()).any(|window| window == own), "the test's pickle is torch's, byte for byte");
    let deflated = zip("a/data.pkl", &own, true);
    for file in [&torch, &fixture("cifar-10n-old.pt"), &cifar_n(&sets()), &deflated] {
        for (name, expected) in sets() {
            let found = read(file, Some(name), &data).unwrap();
            assert_eq!(found.labels, narrow(&expected), "{name}");
            assert_eq!(found.covered, (0..COUNT as u32).collect::<Vec<_>>());
            assert!(found.had_truth && found.format == Format::CifarN && found.provenance.is_none());
            let wrong = expected.iter().enumerate().filter(|&(i, &label)| label != clean(i)).count();
            assert_eq!(found.realised_rate, wrong as f64 / COUNT as f64, "{name}");
        }
    }
    // One set besides the true labels needs no choice.
    let two = [sets()[0].clone(), sets()[2].clone()];
    assert_eq!(read(&cifar_n(&two), None, &data).unwrap().labels, narrow(&shifted(3)));
}

#[test]
fn bad_cifar_n_is_refused() {
    let data = cifar10(8);
    let all = "clean_label, aggre_label, worse_label, random_label1, random_label2, random_label3";
    let good = cifar_n(&sets());
    let error = |bytes: &[u8], set| read(bytes, set, &data).unwrap_err();
    assert_eq!(error(&good, Some("worst")), format!("no set of labels `worst`; it has {all}"));
    assert_eq!(error(&good, None), format!("choose one of its sets of labels with --label-set: {all}"));
    let small = cifar10(7);
    assert_eq!(read(&good, Some("worse_label"), &small).unwrap_err(), "40 labels, but cifar-10 has 35 samples");
    let mut lie = sets();
    lie[0].1[33] = 5;
    let has = clean(33);
    let what = format!("worse_label[33]: true label 5, but sample 33 of cifar-10 has {has}");
    assert_eq!(error(&cifar_n(&lie), Some("worse_label")), what);
    let mut wild = sets();
    wild[2].1[7] = 10;
    assert_eq!(error(&cifar_n(&wild), Some("worse_label")), "worse_label[7]: label 10 is outside 0..=9");
    wild[2].1[7] = -1;
    assert_eq!(error(&cifar_n(&wild), Some("worse_label")), "worse_label[7]: label -1 is outside 0..=9");
    let mut short = sets();
    short[0].1.pop();
    assert_eq!(error(&cifar_n(&short), Some("worse_label")), "40 labels, but 39 true ones");

    // Bytes above 127 take two in UTF-8.
    let train: Vec<u8> =
        (0..COUNT).flat_map(|i| [vec![0, ((i * 61 + 130) % 100) as u8], bytes(3072, 1)].concat()).collect();
    let hundred =
        CIFAR_100.load(&[source("train.bin", train.clone())], &source("test.bin", train), None).unwrap().train;
    let two_bytes = read(&fixture("cifar-100n-bytes.pt"), Some("noisy_label"), &hundred).unwrap_err();
    assert_eq!(two_bytes, "noisy_label[0]: label 255 is outside 0..=99");
    assert_eq!(read(&fixture("cifar-100n-bytes.pt"), Some("clean_label"), &hundred).unwrap().realised_rate, 0.0);

    let tensor = error(&fixture("tensor.pt"), Some("tensor"));
    assert!(tensor.starts_with("data.pkl: byte ") && tensor.contains("is refused"), "{tensor}");
    let evil = zip("a/data.pkl", b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", false);
    assert_eq!(error(&evil, Some("a")), "data.pkl: byte 2: global `os.system` is refused");
    let newer = zip("a/data.pkl", b"\x80\x04.", false);
    assert_eq!(error(&newer, Some("a")), "data.pkl: byte 0: pickle protocol 4 here; only protocol 2 is read");
    assert_eq!(error(&zip("a/b", b"", false), None), "a zip archive without data.pkl: not written by torch.save");
    assert!(error(&good[..good.len() / 2], None).starts_with("damaged zip archive: "));
    let mut flipped = good.clone();
    flipped[200] ^= 1;
    assert!(error(&flipped, Some("worse_label")).starts_with("data.pkl in the zip archive: "));
}

#[test]
fn numpy_and_json_are_read_as_they_are_written() {
    let data = cifar10(12);
    let worse = narrow(&shifted(3));
    assert_eq!(npy::write(&worse), fixture("labels-i8.npy"));
    assert_eq!(json::write(&worse), fixture("labels.json"));
    for (name, format) in
        [("labels-i8.npy", Format::Npy), ("labels-u1.npy", Format::Npy), ("labels.json", Format::Json)]
    {
        let found = read(&fixture(name), None, &data).unwrap();
        assert_eq!((&found.labels, found.format, found.had_truth), (&worse, format, false), "{name}");
        assert_eq!(found.covered, (0..40).collect::<Vec<u32>>(), "the first 40 of 60 images");
        assert_eq!(found.realised_rate, 14.0 / 40.0);
        let more = read(&fixture(name), None, &cifar10(7)).unwrap_err();
        assert_eq!(more, "40 labels, but cifar-10 has 35 samples");
        assert!(
            read(&fixture(name), Some("x"), &data)
                .unwrap_err()
                .ends_with("has one set of labels: leave out --label-set x")
        );
    }
    let mut wild = worse.clone();
    wild[25] = 12;
    assert_eq!(read(&npy::write(&wild), None, &data).unwrap_err(), "item 25: label 12 is outside 0..=9");
    assert_eq!(read(&json::write(&wild), None, &data).unwrap_err(), "item 25: label 12 is outside 0..=9");
    assert_eq!(read(b"[]", None, &data).unwrap_err(), "no labels");
}

// ---------------------------------------------------------------- CIFAR for Python

/// The pixels of the Python fixtures.
fn grid(seed: usize, n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (0..3072).map(move |at| ((i * 5 + at / 64 + seed) % 256) as u8)).collect()
}

/// Records of the binary version with these label bytes and pixels.
fn records(labels: &[Vec<u8>], pixels: &[u8]) -> Vec<u8> {
    labels.iter().zip(pixels.chunks(3072)).flat_map(|(label, image)| [label, image].concat()).collect()
}

fn assert_same(a: &DataPair, b: &DataPair) {
    for (a, b) in [(&a.train, &b.train), (&a.test, &b.test)] {
        assert_eq!((&a.name, a.family, a.shape()), (&b.name, b.family, b.shape()));
        assert_eq!((a.labels(), &a.class_names), (b.labels(), &b.class_names));
        assert!((0..a.len()).all(|i| a.image(i) == b.image(i)));
    }
}

#[test]
fn cifar_for_python_equals_the_binary_version() {
    // What the test makes is what Python 2 writes.
    let own = cifar10_python("training batch 3 of 5", &grid(3, 2), &[9, 0]);
    assert_eq!(own, fixture("cifar-10-batches-py/data_batch_3"));

    let folder = tempfile::tempdir().unwrap();
    let write = |name: String, content: Vec<u8>| std::fs::write(folder.path().join(name), content).unwrap();
    for k in 1..=5 {
        let labels = [vec![(3 * k % 10) as u8], vec![((3 * k + 1) % 10) as u8]];
        write(format!("data_batch_{k}.bin"), records(&labels, &grid(k, 2)));
    }
    write("test_batch.bin".into(), records(&[vec![7], vec![8], vec![9]], &grid(9, 3)));
    let path = |name: &str| fixtures().join(name).to_str().unwrap().to_string();
    assert_same(&open(&path("cifar-10-batches-py")).unwrap(), &open(folder.path().to_str().unwrap()).unwrap());

    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: Vec<u8>| std::fs::write(folder.path().join(name), content).unwrap();
    write("train.bin", records(&[vec![19, 19], vec![19, 99], vec![2, 42]], &grid(11, 3)));
    write("test.bin", records(&[vec![17, 77]], &grid(12, 1)));
    write("fine_label_names.txt", (0..100).map(|i| format!("fine {i}\n")).collect::<String>().into_bytes());
    assert_same(&open(&path("cifar-100-python")).unwrap(), &open(folder.path().to_str().unwrap()).unwrap());
}

#[test]
fn bad_cifar_for_python_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("cifar-10-batches-py");
    std::fs::create_dir(&inner).unwrap();
    for entry in std::fs::read_dir(fixtures().join("cifar-10-batches-py")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), inner.join(entry.file_name())).unwrap();
    }
    assert_eq!(open(folder.path().to_str().unwrap()).unwrap().train.len(), 10, "one folder down");
    let file = inner.join("data_batch_2");
    let error = |content: &[u8]| {
        std::fs::write(&file, content).unwrap();
        let error = open(inner.to_str().unwrap()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string().strip_prefix(&format!("{}: ", file.display())).unwrap().to_string()
    };
    let good = cifar10_python("t", &grid(2, 2), &[6, 7]);
    let labels = |labels: &[u8]| error(&cifar10_python("t", &grid(2, 2), labels));
    assert_eq!(labels(&[6, 10]), "label 10 in `labels[1]` is outside 0..=9");
    assert_eq!(labels(&[6]), "`data`: 6144 bytes for an array [1, 3072] of type `|u1`");
    assert!(error(&good[..good.len() / 2]).starts_with("byte 139: truncated: 6144 bytes wanted, "));
    assert_eq!(error(b""), "byte 0: truncated: 1 bytes wanted, 0 left");
    assert_eq!(error(b"\x80\x02]."), "not a dictionary");
    assert_eq!(error(b"\x80\x02}."), "no entry `data`");
    assert_eq!(error(b"plain text"), "byte 0: no pickle of protocol 2");
    let at = good.windows(5).position(|window| window == b"cnump").unwrap();
    let mut evil = good.clone();
    evil[at + 1..at + 6].copy_from_slice(b"dumpy");
    assert_eq!(error(&evil), format!("byte {at}: global `dumpy.core.multiarray._reconstruct` is refused"));
    std::fs::remove_file(&file).unwrap();
    let missing = open(inner.to_str().unwrap()).unwrap_err().to_string();
    assert_eq!(missing, format!("{}: data_batch_2 not found", inner.display()));
    std::fs::write(&file, &good).unwrap();
    std::fs::write(inner.join("batches.meta"), files::cifar_meta("label_names", &["a".into()])).unwrap();
    let names = open(inner.to_str().unwrap()).unwrap_err().to_string();
    assert!(names.ends_with("batches.meta: 1 class names, expected 10"), "{names}");
}

// ---------------------------------------------------------------- settings and runs

/// The settings of `mlnt train ARGS`.
fn config(args: &str) -> mlnt::Result<Config> {
    let words = ["mlnt", "train"].into_iter().chain(args.split_whitespace());
    match Cli::try_parse_from(words).expect("the line is well-formed").command {
        Command::Train(args) => args.config(),
        other => panic!("{other:?}"),
    }
}

fn prepared(args: &str) -> mlnt::Result<Prepared> {
    Prepared::new(&config(args)?)
}

/// Labels of all images of a run, with the images' places in the data set.
fn training_labels(args: &str) -> Vec<(u32, i32)> {
    let data = prepared(args).unwrap();
    let part = |set: &mlnt::train::prepare::LabelledSet| -> Vec<(u32, i32)> {
        (0..set.len()).map(|i| (set.images.original(i), set.labels[i])).collect()
    };
    [part(&data.train), part(&data.validation)].concat()
}

struct Out(tempfile::TempDir);

impl Out {
    fn new() -> Self {
        Out(tempfile::tempdir().unwrap())
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

#[test]
fn noise_writes_the_labels_that_train_uses() {
    let out = Out::new();
    for (size, format) in [(1500, "csv"), (0, "csv"), (0, "json"), (0, "npy")] {
        for noise in ["--noise instance --noise-rate 0.4", "--noise symmetric --noise-rate 0.5"] {
            let path = out.path("labels");
            let settings = format!("{noise} --seed 3 --train-size {size}");
            let said = mlnt(&format!("noise {settings} --format {format} --out {}", path.display()));
            assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""), "{settings}");
            let count = if size == 0 { 6000 } else { size };
            assert!(said.stdout.contains(&format!("{count} labels of fashion-mnist-sample")), "{}", said.stdout);
            let injected = prepared(&format!("{settings} --data sample")).unwrap();
            let rate = format!("realised {:.2} % of the labels are wrong", 100.0 * injected.realised_noise);
            assert!(said.stdout.contains(&rate), "{rate}\n{}", said.stdout);
            let again = format!("--data sample --labels {} --seed 3 --train-size {size}", path.display());
            assert_eq!(training_labels(&again), training_labels(&settings), "{settings} {format}");
            let read = prepared(&again).unwrap();
            assert_eq!(read.realised_noise, injected.realised_noise);
            assert_eq!(read.nominal_noise, injected.nominal_noise.filter(|_| format == "csv"));
            if format == "csv" {
                assert_eq!(std::fs::read(&path).unwrap(), injected.label_file, "the file that the run keeps too");
            }
        }
    }
    let path = out.path("list.json");
    let said =
        mlnt(&format!("noise --noise pair --noise-rate 0.3 --train-size 100 --format json --out {}", path.display()));
    assert_eq!((said.status, path.exists()), (Some(2), false));
    assert!(said.stderr.contains("cannot say which images its labels are of"), "{}", said.stderr);
}

#[test]
fn the_table_shows_where_labels_go() {
    let out = Out::new();
    let said = mlnt(&format!("noise --noise pair --noise-rate 0.25 --out {}", out.path("l.csv").display()));
    let rows: Vec<&str> = said.stdout.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 12, "{}", said.stdout);
    let cells = |row: &str| -> Vec<String> { row.split('|').map(|cell| cell.trim().to_string()).collect() };
    assert_eq!(cells(rows[0])[1..4], ["true class, % labelled", "0", "1"]);
    for class in 0..10 {
        let row = cells(rows[2 + class]);
        let part = |label: usize| row[2 + label].parse::<f64>().unwrap();
        assert!((part(class) + part((class + 1) % 10) - 100.0).abs() < 0.11, "{row:?}");
        assert!((15.0..35.0).contains(&part((class + 1) % 10)), "{row:?}");
    }
}

#[test]
fn only_covered_images_are_used() {
    let out = Out::new();
    let all = open("sample").unwrap().train;
    let path = out.path("pmd.npy");
    let first: Vec<u16> = all.labels()[..4500].iter().map(|label| (label + 1) % 10).collect();
    std::fs::write(&path, npy::write(&first)).unwrap();
    let found = training_labels(&format!("--train-size 0 --labels {}", path.display()));
    assert_eq!(found.len(), 4500);
    assert!(found.iter().all(|&(i, label)| i < 4500 && label == i32::from(first[i as usize])));
    let found = training_labels(&format!("--train-size 1000 --labels {}", path.display()));
    assert_eq!(found.len(), 1000);
    assert!(found.iter().all(|&(i, label)| i < 4500 && label == i32::from(first[i as usize])));
    let error = prepared(&format!("--train-size 5000 --labels {}", path.display())).unwrap_err();
    let text = format!("--labels {} covers 4500 images: --train-size 5000: a balanced training set", path.display());
    assert!(error.to_string().starts_with(&text), "{error}");
    let data = prepared(&format!("--train-size 0 --labels {}", path.display())).unwrap();
    assert_eq!((data.realised_noise, data.nominal_noise), (1.0, None));
    assert_eq!(data.label_source, "NumPy array pmd.npy, for 4500 of 6000 images, it has no true labels");
}

#[test]
fn labels_and_noise_exclude_each_other() {
    let error = |args: &str| config(args).unwrap_err().to_string();
    let plain = config("--labels f.csv").unwrap();
    assert_eq!((plain.labels.as_str(), plain.noise.to_string(), plain.noise_rate), ("f.csv", "none".into(), 0.0));
    assert!(config("--labels f.csv --noise none").is_ok());
    assert!(config("--preset cifar10 --labels f.pt --label-set worse_label").is_ok());
    let what = "takes nothing but none with --labels f.csv: its labels are noisy as they are";
    assert_eq!(error("--labels f.csv --noise pair"), format!("--noise pair: {what}"));
    let what = "takes nothing but 0 with --labels f.csv: no noise is injected";
    assert_eq!(error("--labels f.csv --noise-rate 0.4"), format!("--noise-rate 0.4: {what}"));
    let what = "takes a set of labels in the file of --labels, which is missing";
    assert_eq!(error("--label-set worse_label"), format!("--label-set worse_label: {what}"));

    let out = Out::new();
    let toml = out.path("mine.toml");
    std::fs::write(&toml, "labels = 'l.pt'\nlabel-set = 'worse_label'\n").unwrap();
    let from_file = config(&format!("--config {}", toml.display())).unwrap();
    assert_eq!((from_file.labels.as_str(), from_file.label_set.as_str()), ("l.pt", "worse_label"));
    std::fs::write(&toml, "noise = 'pair'\n").unwrap();
    assert!(error(&format!("--config {} --labels l.pt", toml.display())).starts_with("--noise pair: takes nothing"));
}

#[test]
fn the_program_names_file_and_place() {
    let out = Out::new();
    let path = out.path("l.json");
    std::fs::write(&path, "[1, 2, 77]").unwrap();
    let said = mlnt(&format!("train --labels {} --out {}", path.display(), out.path("run").display()));
    assert_eq!((said.status, out.path("run").exists()), (Some(2), false));
    let canonical = path.canonicalize().unwrap();
    assert!(
        said.stderr.contains(&format!("{}: item 2: label 77 is outside 0..=9", canonical.display())),
        "{}",
        said.stderr
    );
    let missing = mlnt(&format!("train --labels {} --out {}", out.path("no").display(), out.path("run").display()));
    assert!(missing.status == Some(2) && missing.stderr.contains("no: "), "{}", missing.stderr);
}
