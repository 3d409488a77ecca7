//! Methods whose loss the host computes: their runs from end to end, against cross entropy, and stopped at a step.

mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mlnt::device::cpu::Cpu;
use mlnt::train::checkpoint::{NamedTensor, TensorData, read_model};
use mlnt::train::config::Config;
use mlnt::train::engine::{Engine, StepOutcome};
use mlnt::train::method::Part;
use mlnt::train::metrics::{EpochRecord, IterationRecord};
use mlnt::train::prepare::Prepared;
use mlnt::train::run::{Ending, Observer, Run};
use mlnt::train::run_dir::RunDir;
use program::*;
use serde_json::Value;

/// 135 images to train on, 15 for validation; 11 steps an epoch, which leave 3 images out.
const KEPT: usize = 135;
const STEPS: usize = 11;
const EPOCHS: usize = 3;
const SETTINGS: &str = "train-size = 0\nepochs = 3\nwidths = [4, 6]\nblocks = [1, 1]\nbatch = 12\nneighbours = 3\n\
                        lr = 0.02\njoint-lr = 0.03\nforget-ramp = 2.0\njoint-memory = 2\n\
                        augment = \"pad-crop-flip\"\npad = 1\n";
const METHODS: [&str; 3] = ["elr", "joint-opt", "co-teaching"];

fn train(folder: &Folder, data: &Path, name: &str, flags: &str) -> PathBuf {
    let out = folder.path(name);
    let said = mlnt(&format!("{} {flags}", folder.train(SETTINGS, data, &out)));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""), "{flags}");
    out
}

/// Every file that two runs of the same settings share.
fn bytes(run: &Path) -> BTreeMap<&'static str, Option<Vec<u8>>> {
    RESULTS.into_iter().map(|name| (name, fs::read(run.join(name)).ok())).collect()
}

fn network(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let reals = |NamedTensor { name, data, .. }| match data {
        TensorData::F32(v) => Some((name, v.into_iter().map(f64::from).collect())),
        TensorData::F64(v) => Some((name, v)),
        _ => None,
    };
    read_model(path).unwrap().0.into_iter().filter_map(reals).collect()
}

/// Largest relative difference of two networks' tensors, parameters and running statistics.
fn difference(a: &Path, b: &Path) -> f64 {
    let (a, b) = (network(a), network(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let off = |(a, b): (&Vec<f64>, &Vec<f64>)| {
        norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-3)
    };
    a.values().zip(b.values()).map(off).fold(0.0, f64::max)
}

fn numbers(records: &[Value], phase: &str, key: &str) -> Vec<f64> {
    records.iter().filter(|r| r["phase"] == phase).map(|r| r[key].as_f64().unwrap()).collect()
}

#[test]
fn every_method_trains_is_audited_and_reported() {
    let folder = Folder::new();
    let data = folder.idx();
    let mut runs = String::new();
    for (method, phases, networks) in [
        ("elr", &["cross-entropy", "elr"][..], &["ELR"][..]),
        ("joint-opt", &["cross-entropy", "joint-labels", "joint-opt"], &["joint-opt labels", "joint-opt"]),
        ("co-teaching", &["cross-entropy", "co-teaching"], &["co-teaching network 1", "co-teaching network 2"]),
    ] {
        let run = train(&folder, &data, method, &format!("--method {method}"));
        let records = metrics(&run);
        let expected: Vec<&str> = phases.iter().flat_map(|phase| [*phase; EPOCHS]).collect();
        assert_eq!(records.iter().map(|r| r["phase"].as_str().unwrap()).collect::<Vec<_>>(), expected, "{method}");
        let two = method == "co-teaching";
        for r in &records[records.len() - EPOCHS..] {
            assert_eq!((&r["iteration"], &r["skipped"]), (&Value::from(1), &Value::from(0)), "{r}");
            assert!(r["val_accuracy"].is_f64() && r["test_accuracy"].is_f64() && r["meta_loss"].is_null(), "{r}");
            assert_eq!((r["teacher_val_accuracy"].is_f64(), r["teacher_test_accuracy"].is_f64()), (two, two), "{r}");
        }
        assert_eq!(run.join("teacher.safetensors").is_file(), two);
        assert_eq!(fs::metadata(run.join("losses.f32")).unwrap().len(), (EPOCHS * KEPT * 4) as u64);
        assert!(checkpoint(&run).tensors.iter().all(finite), "{method}");
        let (_, meta) = read_model(run.join("best.safetensors")).unwrap();
        let best: Value = serde_json::from_str(&fs::read_to_string(run.join("iterations.jsonl")).unwrap()).unwrap();
        assert_eq!(meta["epoch"], best["mentor"]["epoch"], "{method}");

        let table = fs::read_to_string(run.join("summary.txt")).unwrap();
        for name in networks.iter().chain(&["cross entropy"]) {
            assert!(table.contains(&format!("| {name} ")), "{method}: no {name} in\n{table}");
        }
        let eval = mlnt(&format!("eval {} --json --model student", run.display()));
        let object: Value = serde_json::from_str(&eval.stdout).unwrap();
        assert_eq!(object["accuracy"], records.last().unwrap()["test_accuracy"], "{method}");
        let audit = mlnt(&format!("audit {} --json", run.display()));
        let object: Value = serde_json::from_str(&audit.stdout).unwrap_or_else(|e| panic!("{e}: {}", audit.stderr));
        assert_eq!((&object["labels"], &object["known_errors"]["auc"].is_f64()), (&Value::from(TRAIN), &true));
        assert_eq!(fs::read_dir(run.join("tensorboard")).unwrap().count(), 1);
        runs += &format!(" {}", run.display());
    }
    // Other settings, but the same comparison.
    let ce = |method: &str| numbers(&metrics(&folder.path(method)), "cross-entropy", "train_loss");
    assert!(ce("elr") == ce("joint-opt") && ce("elr") == ce("co-teaching"));
    let page = folder.path("page.html");
    let said = mlnt(&format!("report{runs} --out {}", page.display()));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    let page = fs::read_to_string(page).unwrap();
    for name in ["ELR", "joint-opt labels", "joint-opt", "co-teaching network 1", "co-teaching network 2"] {
        assert!(page.contains(&format!(">{name}</th>")), "{name}");
    }
}

/// Without their own part all methods are cross entropy and give its networks up to rounding: weights, and running
/// statistics, in which a second update per step would show.
#[test]
fn without_its_own_part_a_method_is_cross_entropy() {
    let folder = Folder::new();
    let data = folder.idx();
    let ce = train(&folder, &data, "ce", "--method ce --precision f64");
    let file = |run: &Path, name: &str| run.join(name).with_extension("safetensors");
    let elr = train(&folder, &data, "elr", "--method elr --precision f64 --no-baseline --elr-lambda 0");
    let off = difference(&file(&elr, "student"), &file(&ce, "student"));
    assert!(off < 1e-9, "ELR without its regulariser is off by {off}");
    let two = train(&folder, &data, "two", "--method co-teaching --precision f64 --no-baseline --forget-rate 0");
    let off = difference(&file(&two, "student"), &file(&ce, "student"));
    assert!(off < 1e-9, "the first of two networks that forget nothing is off by {off}");
    let off = difference(&file(&two, "teacher"), &file(&ce, "student"));
    assert!(off > 1e-2, "the second one starts from other weights: {off}");
    // Joint optimisation that never replaces a label, and whose regularisers weigh nothing.
    let flags = "--method joint-opt --precision f64 --lr 0.03 --lr-drop-factor 1 --joint-warmup 1 --joint-alpha 0";
    let joint = train(&folder, &data, "joint", &format!("{flags} --joint-beta 0"));
    let of = |phase: &str| numbers(&metrics(&joint), phase, "train_loss");
    for (have, want) in of("joint-labels").iter().zip(of("cross-entropy")) {
        assert!((have - want).abs() < 1e-9 * want, "{have}, cross entropy {want}");
    }
    assert_ne!(of("joint-opt"), of("joint-labels"), "what was learned has become the labels");
    // With it they are something else.
    for (method, flags) in [("elr", ""), ("co-teaching", "--forget-rate 0.5")] {
        let flags = format!("--method {method} --precision f64 --no-baseline {flags}");
        let off = difference(
            &file(&train(&folder, &data, &format!("own-{method}"), &flags), "student"),
            &file(&ce, "student"),
        );
        assert!(off > 1e-2, "{method}: {off}");
    }
}

/// Asks for a stop after some steps.
struct Steps(std::cell::Cell<usize>);

impl Observer for Steps {
    fn filtered(&mut self, _: &Part, _: &IterationRecord) {}
    fn part(&mut self, _: &Part, _: usize, _: usize) {}
    fn step(&mut self, _: &StepOutcome) {
        self.0.set(self.0.get().saturating_sub(1));
    }
    fn epoch(&mut self, _: &Part, _: &EpochRecord) {}
    fn wants_stop(&self) -> bool {
        self.0.get() == 0
    }
}

fn engine(config: &Config) -> (Prepared, Engine) {
    let data = Prepared::new(config).unwrap();
    let model = data.model(config).unwrap();
    (data, Engine::new(Box::new(Cpu::<f32>::new(1).unwrap()), config, model).unwrap())
}

#[test]
fn a_run_stopped_at_any_step_ends_with_the_same_bytes() {
    let folder = Folder::new();
    let data = folder.idx();
    for method in METHODS {
        let whole = train(&folder, &data, method, &format!("--method {method} --no-baseline --device cpu --threads 1"));
        let expected = bytes(&whole);
        let parts = if method == "joint-opt" { 2 } else { 1 };
        let run = folder.path(&format!("{method}-stopped"));
        let config = Config { out: Some(run.clone()), ..Config::load(&whole.join("config.toml")).unwrap() };
        // In the middle of epochs, at their ends, and at the end of a part.
        let pieces = [4, STEPS - 4, 1, STEPS + 5, STEPS - 6, 2, STEPS, 3];
        let (prepared, device) = engine(&config);
        let mut training = Run::create(config.clone(), prepared, device).unwrap();
        let mut gone = 0;
        for steps in pieces {
            let ending = training.train(&mut Steps(steps.into())).unwrap();
            gone += steps;
            if gone >= parts * EPOCHS * STEPS {
                assert!(matches!(ending, Ending::Complete(_)) || gone == parts * EPOCHS * STEPS, "{method}");
                break;
            }
            assert_eq!(ending, Ending::Stopped, "{method}, {gone} steps");
            // Nothing but the checkpoint goes on.
            drop(training);
            let (prepared, device) = engine(&config);
            training = Run::resume(config.clone(), prepared, device, RunDir::open(&run).unwrap()).unwrap();
        }
        assert!(matches!(training.train(&mut Steps(usize::MAX.into())).unwrap(), Ending::Complete(_)), "{method}");
        assert!(bytes(&run) == expected, "{method}");
        let tensors = checkpoint(&run).tensors;
        let memory = tensors.iter().find(|t| t.name == "progress.memory").map(|t| t.shape.clone());
        let slots = ["elr", "joint-opt"].iter().position(|m| *m == method);
        assert_eq!(memory, slots.map(|slot| vec![KEPT, slot + 1, CLASSES]), "{method}");
    }
}

#[test]
fn a_checkpoint_without_its_memory_is_refused() {
    let folder = Folder::new();
    let data = folder.idx();
    let run = train(&folder, &data, "run", "--method elr --no-baseline");
    let path = run.join("checkpoint.safetensors");
    let whole = SafeTensors::parse(&fs::read(&path).unwrap());
    for name in ["progress.memory", "progress.visits"] {
        let mut file = whole.clone();
        file.tensors.remove(name).unwrap();
        fs::write(&path, file.bytes()).unwrap();
        let said = mlnt(&format!("train --resume {}", run.display()));
        assert_eq!(said.status, Some(2));
        assert!(said.error_line().contains(&format!("it has no tensor {name}")), "{}", said.stderr);
    }
}

#[test]
fn on_the_simt_machine_a_run_follows_the_one_on_the_cpu() {
    let folder = Folder::new();
    let data = folder.idx_sized("small", 120);
    for method in METHODS {
        let [cpu, simt] = ["cpu", "simt"].map(|device| {
            let flags = format!("--method {method} --no-baseline --epochs 2 --device {device} --precision f32");
            metrics(&train(&folder, &data, &format!("{method}-{device}"), &flags))
        });
        assert_eq!(cpu.len(), simt.len());
        for (want, have) in cpu.iter().zip(&simt) {
            let [want, have] = [want, have].map(|r| r["train_loss"].as_f64().unwrap());
            let off = (have - want).abs() / want.abs();
            println!("{method}: train_loss {have} on simt, {want} on the CPU: {off:.1e}");
            assert!(off <= 1e-3, "{method}: train_loss {have} on simt, {want} on the CPU");
        }
    }
}
