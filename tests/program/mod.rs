//! What the tests of the command line share: the program, tiny data sets, and files to take apart.
#![allow(dead_code)] // every test binary uses its own part

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use mlnt::train::checkpoint::{Checkpoint, NamedTensor, TensorData};
use serde_json::Value;

/// Images of the tiny data set.
pub const TRAIN: usize = 150;
/// Test images of the tiny data set.
pub const TEST: usize = 30;
/// Its classes.
pub const CLASSES: usize = 10;

/// What the same seed must give again, byte for byte.
pub const RESULTS: [&str; 8] = [
    "student.safetensors",
    "teacher.safetensors",
    "best.safetensors",
    "metrics.jsonl",
    "iterations.jsonl",
    "losses.f32",
    "labels.csv",
    "summary.json",
];

/// The bytes of those files of a run.
pub fn results(run: &Path) -> Vec<Vec<u8>> {
    let read = |name: &&str| std::fs::read(run.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    RESULTS.iter().map(read).collect()
}

/// What the program said, and its exit status.
pub struct Said {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Said { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// The one line on standard error, without `mlnt: ` in front.
    pub fn error_line(&self) -> String {
        assert_eq!(self.stderr.lines().count(), 1, "one line: {:?}", self.stderr);
        let line = self.stderr.trim_end();
        line.strip_prefix("mlnt: ").unwrap_or_else(|| panic!("starts with the program's name: {line}")).to_string()
    }
}

/// The program with the words of `line`.
pub fn program(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlnt"));
    command.args(line.split_whitespace()).stdin(Stdio::null());
    command
}

/// Runs the program with the words of `line` in `folder`.
pub fn mlnt_in(folder: &Path, line: &str) -> Said {
    let mut command = assert_cmd::Command::from_std(program(line));
    Said::of(command.current_dir(folder).timeout(Duration::from_secs(100)).output().unwrap())
}

/// Runs the program with the words of `line`.
pub fn mlnt(line: &str) -> Said {
    mlnt_in(Path::new(env!("CARGO_MANIFEST_DIR")), line)
}

/// Runs the program with an output that nobody reads; its status and what it says on standard error.
pub fn with_closed_output(line: &str) -> (Option<i32>, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = program(line).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// A golden step of the project.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.safetensors"))
}

/// Names in a folder, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The lines of a run's `metrics.jsonl`.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A run's checkpoint.
pub fn checkpoint(run: &Path) -> Checkpoint {
    Checkpoint::load(run.join("checkpoint.safetensors")).unwrap()
}

/// True for a tensor of finite numbers.
pub fn finite(tensor: &NamedTensor) -> bool {
    match &tensor.data {
        TensorData::F32(v) => v.iter().all(|x| x.is_finite()),
        TensorData::F64(v) => v.iter().all(|x| x.is_finite()),
        _ => true,
    }
}

/// Numbers without a pattern, the same every time.
fn noise(n: usize, seed: u64) -> impl Iterator<Item = u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

/// An IDX file of `n` images whose brightest rows tell the class, `i mod 10`.
pub fn idx_images(n: usize, width: usize, height: usize) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 3];
    [n, height, width].iter().for_each(|size| bytes.extend((*size as u32).to_be_bytes()));
    for i in 0..n {
        let bright = i % CLASSES;
        let pixels = noise(width * height, i as u64 + 1).enumerate();
        bytes.extend(pixels.map(|(at, v)| if at / width == bright % height { 128 + v / 2 } else { v / 2 }));
    }
    bytes
}

fn idx_labels(n: usize) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 1];
    bytes.extend((n as u32).to_be_bytes());
    bytes.extend((0..n).map(|i| (i % CLASSES) as u8));
    bytes
}

/// Labels of the tiny test images.
pub fn test_labels() -> Vec<u8> {
    idx_labels(TEST)[8..].to_vec()
}

/// A folder that goes when the test ends.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    /// `train` on `data` in `out` with the settings of a small TOML file, which flags may change.
    pub fn train(&self, settings: &str, data: &Path, out: &Path) -> String {
        let file = self.path("settings.toml");
        std::fs::write(&file, settings).unwrap();
        format!("train --config {} --data {} --out {}", file.display(), data.display(), out.display())
    }

    pub fn root(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A tiny data set in IDX format: 1×9×7, ten classes.
    pub fn idx(&self) -> PathBuf {
        self.idx_named("tiny")
    }

    pub fn idx_named(&self, name: &str) -> PathBuf {
        self.idx_sized(name, TRAIN)
    }

    /// The same with `train` training images.
    pub fn idx_sized(&self, name: &str, train: usize) -> PathBuf {
        let folder = self.path(name);
        std::fs::create_dir(&folder).unwrap();
        let write = |file: &str, bytes: Vec<u8>| std::fs::write(folder.join(file), bytes).unwrap();
        write("train-images-idx3-ubyte", idx_images(train, 7, 9));
        write("train-labels-idx1-ubyte", idx_labels(train));
        write("t10k-images-idx3-ubyte", idx_images(TEST, 7, 9));
        write("t10k-labels-idx1-ubyte", idx_labels(TEST));
        folder
    }

    /// A tiny data set in CIFAR-10's format.
    pub fn cifar(&self, name: &str) -> PathBuf {
        let folder = self.path(name);
        std::fs::create_dir(&folder).unwrap();
        let records = |n: usize, seed: u64| -> Vec<u8> {
            (0..n).flat_map(|i| std::iter::once((i % CLASSES) as u8).chain(noise(3072, seed + i as u64))).collect()
        };
        for i in 1..=5 {
            std::fs::write(folder.join(format!("data_batch_{i}.bin")), records(10, i * 100)).unwrap();
        }
        std::fs::write(folder.join("test_batch.bin"), records(10, 1000)).unwrap();
        let names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n";
        std::fs::write(folder.join("batches.meta.txt"), names).unwrap();
        folder
    }
}

/// A safetensors file taken apart, to be changed and put together again, wrongly too.
#[derive(Clone)]
pub struct SafeTensors {
    pub metadata: BTreeMap<String, String>,
    /// Name, dtype, shape, bytes.
    pub tensors: BTreeMap<String, (String, Vec<usize>, Vec<u8>)>,
}

impl SafeTensors {
    pub fn parse(bytes: &[u8]) -> Self {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let (header, data) = bytes[8..].split_at(length);
        let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
        let mut file = SafeTensors { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        for (name, entry) in header {
            if name == "__metadata__" {
                file.metadata = serde_json::from_value(entry).unwrap();
                continue;
            }
            let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
            let shape = serde_json::from_value(entry["shape"].clone()).unwrap();
            let dtype = entry["dtype"].as_str().unwrap().to_string();
            file.tensors.insert(name, (dtype, shape, data[at(0)..at(1)].to_vec()));
        }
        file
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::to_value(&self.metadata).unwrap());
        let mut data: Vec<u8> = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            data.extend(bytes);
            let entry = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
            header.insert(name.clone(), entry);
        }
        let mut header = Value::Object(header).to_string();
        header.push_str(&" ".repeat((8 - header.len() % 8) % 8));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(data);
        file
    }
}

/// Tiny settings.
pub const TINY: &str = "train-size = 0\nepochs = 2\nfeature-epochs = 1\nwidths = [4, 6]\nblocks = [1, 1]\nbatch = 12\n\
                        neighbours = 3\nbranches = 2\n";

/// `config.toml` without the number of threads.
pub fn settings(run: &Path) -> String {
    let text = std::fs::read_to_string(run.join("config.toml")).unwrap();
    text.lines().filter(|line| !line.starts_with("threads")).map(|line| format!("{line}\n")).collect()
}

/// Trains on `data` with the given flags in `out`.
pub fn train(folder: &Folder, data: &Path, out: &Path, flags: &str) -> PathBuf {
    let said = mlnt(&format!("{} {flags}", folder.train(TINY, data, out)));
    assert_eq!(said.status, Some(0), "{flags}: {}", said.stderr);
    assert_eq!(said.stderr, "", "{flags}");
    out.to_path_buf()
}

/// Runs that must be refused: status 2, one line on standard error that names `names`.
pub fn refused(line: &str, names: &[&str]) -> String {
    let said = mlnt(line);
    assert_eq!(said.status, Some(2), "{line}: {} {}", said.stdout, said.stderr);
    let error = said.error_line();
    for name in names {
        assert!(error.contains(name), "`{line}` says `{error}`, which does not name `{name}`");
    }
    error
}
