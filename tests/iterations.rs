//! Iterations: what the files of a run say is what a plain computation from other files gives.

mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mlnt::data::epoch_order;
use mlnt::device::cpu::Cpu;
use mlnt::mlnt::draw_ranks;
use mlnt::model::he_init;
use mlnt::rng::{Purpose, stream};
use mlnt::train::checkpoint::{NamedTensor, TensorData, read_model};
use mlnt::train::config::Config;
use mlnt::train::engine::{Engine, Network, StepInputs};
use mlnt::train::feed::Images;
use mlnt::train::method::{Moment, parts};
use mlnt::train::prepare::Prepared;
use program::*;
use serde_json::Value;

/// Images: 450 to train on, 50 for validation; 37 steps an epoch.
const IMAGES: usize = 500;
const KEPT: usize = 450;
const BATCH: usize = 12;
const EPOCHS: usize = 3;
const SETTINGS: &str = "train-size = 0\nepochs = 3\nfeature-epochs = 1\nwidths = [4, 6]\nblocks = [1, 1]\nbatch = 12\n\
                        neighbours = 3\nbranches = 2\nno-baseline = true\nlr = 0.02\nlambda-ramp = 2.0\neta-ramp = 1.0\n";

fn train(folder: &Folder, data: &Path, name: &str, flags: &str) -> PathBuf {
    let out = folder.path(name);
    let said = mlnt(&format!("{} {flags}", folder.train(SETTINGS, data, &out)));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""), "{flags}");
    out
}

fn json_lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The fields of a CSV file's lines, without comments and header.
fn rows(text: &str) -> Vec<Vec<String>> {
    let lines = text.lines().filter(|line| !line.starts_with('#')).skip(1);
    lines.map(|line| line.split(',').map(String::from).collect()).collect()
}

/// `losses.f32`, a row per epoch.
fn losses(run: &Path) -> Vec<Vec<f32>> {
    let bytes = fs::read(run.join("losses.f32")).unwrap();
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    values.chunks(KEPT).map(<[f32]>::to_vec).collect()
}

/// Best network of an iteration, from its epochs' lines: network, epoch, accuracy.
fn best(records: &[Value], iteration: u64) -> (String, u64, f64) {
    let mut best = (String::new(), 0, -1.0);
    for r in records.iter().filter(|r| r["iteration"] == iteration) {
        for (network, key) in [("student", "val_accuracy"), ("teacher", "teacher_val_accuracy")] {
            let accuracy = r[key].as_f64().unwrap();
            if accuracy > best.2 {
                best = (network.to_string(), r["epoch"].as_u64().unwrap(), accuracy);
            }
        }
    }
    best
}

/// Mean over the batches of an epoch, in the order of stream number `drawn`, of the mean loss of what is kept; and the
/// number of batches of which nothing is.
fn mean_loss(row: &[f32], keep: &[bool], drawn: u64) -> (f64, u64) {
    let order = epoch_order(KEPT, 1, drawn);
    let (mut sum, mut batches, mut skipped) = (0.0, 0.0, 0);
    for batch in order.chunks_exact(BATCH) {
        let kept: Vec<f64> = batch.iter().filter(|i| keep[**i as usize]).map(|i| f64::from(row[*i as usize])).collect();
        if kept.is_empty() {
            skipped += 1;
        } else {
            sum += kept.iter().sum::<f64>() / kept.len() as f64;
            batches += 1.0;
        }
    }
    (sum / batches, skipped)
}

#[test]
fn two_iterations_agree_with_plain_loops_over_their_files() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", IMAGES);
    let tau = 0.095;
    let one = train(&folder, &data, "one", "");
    let two = train(&folder, &data, "two", &format!("--iterations 2 --tau {tau}"));

    // The first iteration is a run of one iteration.
    let (metrics_one, metrics_two) = (metrics(&one), metrics(&two));
    assert_eq!(metrics_two[..1 + EPOCHS], metrics_one[..]);
    assert_eq!(metrics_two.len(), 1 + 2 * EPOCHS);
    assert!(!one.join("kept.csv").exists());
    for file in ["student.safetensors", "teacher.safetensors", "best.safetensors"] {
        assert_ne!(fs::read(one.join(file)).unwrap(), fs::read(two.join(file)).unwrap(), "{file}");
    }

    // The mentor is the best by validation, and best.safetensors is the best of the last iteration.
    let iterations = json_lines(&two.join("iterations.jsonl"));
    assert_eq!(iterations.len(), 2);
    for (i, run) in [(1u64, &one), (2, &two)] {
        let (network, epoch, accuracy) = best(&metrics_two, i);
        let mentor = &iterations[i as usize - 1]["mentor"];
        assert_eq!(iterations[i as usize - 1]["iteration"], i);
        assert_eq!((&mentor["network"], &mentor["epoch"]), (&Value::from(network.clone()), &Value::from(epoch)));
        assert_eq!(mentor["val_accuracy"].as_f64(), Some(accuracy));
        let (_, meta) = read_model(run.join("best.safetensors")).unwrap();
        assert_eq!((&meta["network"], &meta["epoch"]), (&Value::from(network), &Value::from(epoch)));
    }

    // The filter: probabilities of the mentor, as `predict` gives them.
    let labels = rows(&fs::read_to_string(two.join("labels.csv")).unwrap());
    let predicted = rows(&mlnt(&format!("predict {} --model best --split train", one.display())).stdout);
    assert_eq!((labels.len(), predicted.len()), (IMAGES, IMAGES));
    let kept = rows(&fs::read_to_string(two.join("kept.csv")).unwrap());
    assert_eq!(kept.len(), KEPT);
    let (mut keep, mut dropped, mut wrong, mut found) = (Vec::new(), 0, 0, 0);
    let mut last = None;
    for row in &kept {
        let index: usize = row[0].parse().unwrap();
        assert!(last < Some(index), "ascending");
        last = Some(index);
        let given: usize = row[1].parse().unwrap();
        assert_eq!(labels[index][0..2], row[0..2]);
        let probability: f64 = row[2].parse().unwrap();
        let expected: f64 = predicted[index][3 + given].parse().unwrap();
        assert!((probability - expected).abs() < 1e-6, "{index}: {probability}, predict says {expected}");
        assert_eq!(row[3], if probability > tau { "1" } else { "0" });
        keep.push(row[3] == "1");
        let is_wrong = labels[index][1] != labels[index][2];
        dropped += usize::from(row[3] == "0");
        wrong += usize::from(is_wrong);
        found += usize::from(is_wrong && row[3] == "0");
    }
    assert!(dropped > 20 && dropped < KEPT - 20, "{dropped} are dropped: the test needs a mixture");
    let second = &iterations[1];
    assert_eq!((&second["kept"], &second["dropped"]), (&Value::from(KEPT - dropped), &Value::from(dropped)));
    assert_eq!(second["precision"].as_f64(), Some(found as f64 / dropped as f64));
    assert_eq!(second["recall"].as_f64(), Some(found as f64 / wrong as f64));
    for key in ["kept", "dropped", "precision", "recall"] {
        assert!(iterations[0][key].is_null());
    }

    // The losses per sample give the epochs' losses, each batch weighing what it keeps.
    let losses = losses(&two);
    assert_eq!(losses.len(), 2 * EPOCHS);
    let all = vec![true; KEPT];
    let records: Vec<&Value> = metrics_two.iter().filter(|r| r["phase"] == "mlnt").collect();
    for (i, (row, record)) in losses.iter().zip(&records).enumerate() {
        assert_eq!(record["iteration"], i / EPOCHS + 1);
        assert_eq!(record["epoch"], i % EPOCHS + 1);
        assert_eq!(row.iter().filter(|v| v.is_nan()).count(), KEPT % BATCH);
        let filtered = i >= EPOCHS;
        let (mean, skipped) = mean_loss(row, if filtered { &keep } else { &all }, i as u64);
        let said = record["train_loss"].as_f64().unwrap();
        assert!((said / mean - 1.0).abs() < 1e-5, "epoch {i}: {said}, from the losses {mean}");
        assert_eq!(record["skipped"], skipped, "epoch {i}");
        assert_eq!(record["kept"], if filtered { Value::from(KEPT - dropped) } else { Value::Null });
    }
    let table = fs::read_to_string(two.join("summary.txt")).unwrap();
    for name in ["MLNT 1/2 student", "MLNT 1/2 teacher", "MLNT 2/2 student", "MLNT 2/2 teacher"] {
        assert!(table.contains(name), "{table}");
    }
    let eval = mlnt(&format!("eval {} --model best", two.display()));
    assert!(eval.status == Some(0) && eval.stdout.contains("best.safetensors: accuracy"), "{}", eval.stderr);
}

/// The tensors of a network by name.
fn network(path: &Path) -> BTreeMap<String, TensorData> {
    let (tensors, _) = read_model(path).unwrap();
    tensors.into_iter().map(|NamedTensor { name, data, .. }| (name, data)).collect()
}

/// A second iteration without filter and with a target that is the teacher's alone is the plain method from other
/// weights; computed here step by step, in double precision, bit for bit.
#[test]
fn a_second_iteration_that_keeps_all_differs_by_the_mentors_target_only() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", 200);
    let flags = "--iterations 2 --tau 0 --precision f64 --epochs 2 --feature-epochs 0 --threads 1";
    for recipe in ["paper", "released"] {
        let flags = format!("{flags} --recipe {recipe} --eta 5");
        let run = train(&folder, &data, &format!("{recipe}-teacher"), &format!("{flags} --lambda 1 --lambda-ramp 0"));
        let mixed = train(&folder, &data, &format!("{recipe}-mixed"), &flags);
        assert_ne!(network(&run.join("student.safetensors")), network(&mixed.join("student.safetensors")));
        let iterations = json_lines(&run.join("iterations.jsonl"));
        assert_eq!((&iterations[1]["kept"], &iterations[1]["dropped"]), (&Value::from(180), &Value::from(0)));

        let config = Config { iterations: 1, ..Config::load(&run.join("config.toml")).unwrap() };
        let prepared = Prepared::new(&config).unwrap();
        let model = prepared.model(&config).unwrap();
        let mut engine = Engine::new(Box::new(Cpu::<f64>::new(1).unwrap()), &config, model.clone()).unwrap();
        engine.start(&[Network::Student, Network::Teacher], config.seed, 1).unwrap();
        let part = *parts(&config).last().unwrap();
        let (n, k) = (prepared.train.len(), config.batch);
        let batcher =
            mlnt::data::Batcher::new(&prepared.train.images, &prepared.normalise, prepared.augment, 1).unwrap();
        let mut x = vec![0.0f32; k * prepared.train.images.shape().numel()];
        for epoch in 0..config.epochs {
            let drawn = (config.epochs + epoch) as u64;
            for (step, ids) in epoch_order(n, 1, drawn).chunks_exact(k).enumerate() {
                batcher.fill(drawn, ids, &mut x).unwrap();
                let y: Vec<i32> = ids.iter().map(|i| prepared.train.labels[*i as usize]).collect();
                let mut rng = stream(1, Purpose::Synthetic, drawn, step as u64);
                let ranks = draw_ranks(k, config.neighbours, k / 2, config.branches, &mut rng);
                let inputs =
                    StepInputs { x: Images::Host(&x), y: &y, class_weight: &vec![1.0 / k as f64; k], ranks: &ranks };
                let progress = epoch as f64 + step as f64 / (n / k) as f64;
                let scalars = part.phase.scalars(&config, Moment { epoch, progress, kept: true });
                engine.write(&part, inputs).unwrap();
                engine.begin(&part, scalars).unwrap();
                engine.outcome(&part, &y).unwrap();
            }
        }
        for (owner, file) in [("", "student.safetensors"), ("teacher.", "teacher.safetensors")] {
            let network = network(&run.join(file));
            for param in model.params() {
                let have = engine.device().read_state(&format!("{owner}param.{}", param.name)).unwrap().to_f64();
                assert_eq!(network[&param.name], TensorData::F64(have), "{recipe}: {file}: {}", param.name);
            }
        }
    }
}

#[test]
fn a_filter_that_keeps_nothing_skips_every_batch() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", IMAGES);
    for (i, method) in ["--recipe paper", "--recipe released", "--method iterative-ce"].into_iter().enumerate() {
        let run = train(&folder, &data, &format!("run{i}"), &format!("{method} --iterations 2 --tau 1 --epochs 2"));
        let records: Vec<Value> = metrics(&run).into_iter().filter(|r| r["iteration"] == 2).collect();
        assert_eq!(records.len(), 2);
        for r in &records {
            assert_eq!((&r["kept"], &r["skipped"]), (&Value::from(0), &Value::from(KEPT / BATCH)), "{method}");
            assert_eq!(r["train_loss"].as_f64(), Some(0.0), "{method}");
            if method != "--method iterative-ce" {
                assert!(r["meta_loss"].as_f64().is_some_and(|v| v.is_finite() && v > 0.0), "{method}: {r}");
            }
        }
        assert!(checkpoint(&run).tensors.iter().all(finite), "{method}");
        let last = &json_lines(&run.join("iterations.jsonl"))[1];
        assert_eq!((&last["kept"], &last["dropped"]), (&Value::from(0), &Value::from(KEPT)));
        assert_eq!(last["recall"].as_f64(), Some(1.0));
        assert!(losses(&run).iter().flatten().filter(|v| !v.is_nan()).all(|v| v.is_finite()), "{method}");

        // Without a meta-gradient nothing moves the student from where the second iteration starts.
        let config = Config::load(&run.join("config.toml")).unwrap();
        let model = Prepared::new(&config).unwrap().model(&config).unwrap();
        let student = network(&run.join("student.safetensors"));
        for (param, start) in model.params().iter().zip(he_init(&model, 1, 1)) {
            if start.iter().all(|v| *v == 0.0 || *v == 1.0) {
                continue;
            }
            let stays = student[&param.name] == TensorData::F32(start);
            assert_eq!(stays, method == "--method iterative-ce", "{method}: {}", param.name);
        }
    }
}

#[test]
fn cross_entropy_alone_is_the_comparison_of_other_runs() {
    let folder = Folder::new();
    let data = folder.idx();
    let ce = train(&folder, &data, "ce", "--method ce");
    let mlnt_run = train(&folder, &data, "mlnt", "--no-baseline=false");
    let of = |run: &Path| -> Vec<Value> {
        let mut records = metrics(run);
        records.retain(|r| r["phase"] == "cross-entropy");
        for r in &mut records {
            (r["iteration"], r["skipped"]) = (Value::Null, Value::Null);
        }
        records
    };
    assert_eq!(metrics(&ce).len(), EPOCHS, "nothing but cross entropy");
    assert_eq!(of(&ce), of(&mlnt_run));
    let table = fs::read_to_string(ce.join("summary.txt")).unwrap();
    assert!(table.contains("cross entropy") && !table.contains("MLNT"), "{table}");
    assert!(!ce.join("teacher.safetensors").exists());
    assert_eq!(fs::metadata(ce.join("losses.f32")).unwrap().len(), (EPOCHS * 135 * 4) as u64);

    let eval = mlnt(&format!("eval {} --json", ce.display()));
    let object: Value = serde_json::from_str(&eval.stdout).unwrap();
    assert_eq!(object["accuracy"], of(&ce).pop().unwrap()["test_accuracy"]);
    assert_eq!(mlnt(&format!("predict {}", ce.display())).stdout.lines().count(), TEST + 1);
    let refused = mlnt(&format!("eval {} --model teacher", ce.display()));
    assert_eq!(refused.status, Some(2));
    assert!(refused.error_line().contains("no such network"), "{}", refused.stderr);
}

#[test]
fn methods_train_what_they_name() {
    let folder = Folder::new();
    let data = folder.idx();
    let run = train(&folder, &data, "iterative", "--method iterative-ce --iterations 2 --no-baseline=false");
    let records = metrics(&run);
    let phases: Vec<(&str, Option<u64>)> =
        records.iter().map(|r| (r["phase"].as_str().unwrap(), r["iteration"].as_u64())).collect();
    let of = |phase, iteration| vec![(phase, iteration); EPOCHS];
    let expected = [of("cross-entropy", None), of("iterative-ce", Some(1)), of("iterative-ce", Some(2))].concat();
    assert_eq!(phases, expected);
    for r in &records[EPOCHS..] {
        assert!(r["meta_loss"].is_null() && r["teacher_test_accuracy"].is_f64(), "{r}");
    }
    assert!(run.join("kept.csv").is_file() && run.join("teacher.safetensors").is_file());
    let table = fs::read_to_string(run.join("summary.txt")).unwrap();
    assert!(table.contains("iterative CE 2/2 teacher"), "{table}");

    let named = train(&folder, &data, "named", "--method mlnt-first-order --epochs 1");
    let flag = train(&folder, &data, "flag", "--first-order --epochs 1");
    assert_eq!(network(&named.join("student.safetensors")), network(&flag.join("student.safetensors")));
}
