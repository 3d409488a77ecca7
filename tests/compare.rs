//! `mlnt compare`: its runs are those of `mlnt train`, and its table is what their files say.
#![cfg(unix)]

mod program;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use program::*;
use serde_json::Value;

const SETTINGS: &str = "train-size = 0\nepochs = 2\nfeature-epochs = 1\nwidths = [4, 6]\nblocks = [1, 1]\nbatch = 15\n\
                        neighbours = 4\nbranches = 2\nseed = 77\nmethod = \"ce\"\nthreads = 1\n";
const FILES: [&str; 3] = ["compare.csv", "compare.json", "compare.md"];

/// `compare` of the tiny data set in `out` with `flags`.
fn line(folder: &Folder, data: &Path, out: &Path, flags: &str) -> String {
    let file = folder.path("settings.toml");
    fs::write(&file, SETTINGS).unwrap();
    format!("compare --config {} --data {} --out {} {flags}", file.display(), data.display(), out.display())
}

fn files(out: &Path) -> Vec<Vec<u8>> {
    FILES.iter().map(|name| fs::read(out.join(name)).unwrap()).collect()
}

fn refused(line: &str, what: &str) {
    let said = mlnt(line);
    assert_eq!(said.status, Some(2), "{line}");
    assert!(said.error_line().contains(what), "{line}: {}", said.stderr);
}

#[test]
fn runs_are_those_of_train_and_the_table_is_what_their_files_say() {
    let folder = Folder::new();
    let data = folder.idx();
    let out = folder.path("out");
    let flags = "--methods mlnt,iterative-ce,ce --seeds 1,2 --iterations 2";
    let said = mlnt(&line(&folder, &data, &out, flags));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    let runs = ["ce-s1", "ce-s2", "iterative-ce-s1", "iterative-ce-s2", "mlnt-s1", "mlnt-s2"];
    assert_eq!(names_in(&out), [&runs[..2], &FILES[..], &runs[2..]].concat());

    // A run is what `train` makes of the same settings, without a comparison of its own.
    for (method, flags) in [("mlnt", "--method mlnt --iterations 2"), ("ce", "--method ce")] {
        let alone = folder.path(&format!("alone-{method}"));
        let said = mlnt(&format!("{} {flags} --no-baseline --seed 2", folder.train(SETTINGS, &data, &alone)));
        assert_eq!(said.status, Some(0), "{}", said.stderr);
        for file in ["student.safetensors", "metrics.jsonl", "labels.csv", "config.toml"] {
            let both = [&alone, &out.join(format!("{method}-s2"))].map(|run| fs::read(run.join(file)).unwrap());
            assert!(both[0] == both[1], "{method}: {file}");
        }
    }
    let labels = runs.map(|run| fs::read(out.join(run).join("labels.csv")).unwrap());
    assert!(labels[0] == labels[2] && labels[0] == labels[4], "one seed, the same labels");
    assert!(labels[0] != labels[1], "a seed has its own");

    // Every mean and deviation, from the lines of metrics.jsonl.
    let table: Value = serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    let networks = table["networks"].as_array().unwrap();
    let expected = [
        ("mlnt", "MLNT 1/2 student", Some(1), "test_accuracy", "val_accuracy"),
        ("mlnt", "MLNT 1/2 teacher", Some(1), "teacher_test_accuracy", "teacher_val_accuracy"),
        ("mlnt", "MLNT 2/2 student", Some(2), "test_accuracy", "val_accuracy"),
        ("mlnt", "MLNT 2/2 teacher", Some(2), "teacher_test_accuracy", "teacher_val_accuracy"),
        ("iterative-ce", "iterative CE 1/2 student", Some(1), "test_accuracy", "val_accuracy"),
        ("iterative-ce", "iterative CE 1/2 teacher", Some(1), "teacher_test_accuracy", "teacher_val_accuracy"),
        ("iterative-ce", "iterative CE 2/2 student", Some(2), "test_accuracy", "val_accuracy"),
        ("iterative-ce", "iterative CE 2/2 teacher", Some(2), "teacher_test_accuracy", "teacher_val_accuracy"),
        ("ce", "cross entropy", Some(1), "test_accuracy", "val_accuracy"),
    ];
    assert_eq!(networks.len(), expected.len());
    let markdown = fs::read_to_string(out.join("compare.md")).unwrap();
    assert!(said.stdout.contains(&markdown), "{}", said.stdout);
    for (network, (method, name, iteration, test, val)) in networks.iter().zip(expected) {
        assert_eq!((&network["method"], &network["network"]), (&Value::from(method), &Value::from(name)));
        let (mut chosen, mut last) = (Vec::new(), Vec::new());
        for seed in [1, 2] {
            let mut records = metrics(&out.join(format!("{method}-s{seed}")));
            records.retain(|r| r["iteration"] == Value::from(iteration) && r["phase"] != "features");
            assert_eq!(records.len(), 2, "{name}");
            let of = |r: &Value, key: &str| r[key].as_f64().unwrap();
            let later = of(&records[1], val) > of(&records[0], val);
            chosen.push(of(&records[usize::from(later)], test));
            last.push(of(&records[1], test));
        }
        for (key, values) in [("test_at_best_val", chosen), ("last_test", last)] {
            assert_eq!(network[key]["values"], Value::from(values.clone()), "{name}: {key}");
            let (mean, std) = ((values[0] + values[1]) / 2.0, (values[0] - values[1]).abs() / 2f64.sqrt());
            assert!((network[key]["mean"].as_f64().unwrap() - mean).abs() < 1e-12, "{name}: {key}");
            assert!((network[key]["std"].as_f64().unwrap() - std).abs() < 1e-12, "{name}: {key}");
            let cell = format!("{:.2} ± {:.2}", 100.0 * mean, 100.0 * std);
            let shown = markdown.lines().any(|row| row.contains(name) && row.contains(&cell));
            assert!(shown, "{name}: {cell} in\n{markdown}");
        }
    }
    let csv = fs::read_to_string(out.join("compare.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 2 * expected.len());

    // Again: nothing is trained, the same files. Fewer of the runs: a smaller table.
    let (before, written) = (files(&out), fs::metadata(out.join("ce-s1/checkpoint.safetensors")).unwrap().modified());
    let again = mlnt(&line(&folder, &data, &out, flags));
    assert_eq!((again.status, again.stderr.as_str()), (Some(0), ""));
    assert_eq!(again.stdout.matches("is complete").count(), 6, "{}", again.stdout);
    assert!(files(&out) == before);
    let now = fs::metadata(out.join("ce-s1/checkpoint.safetensors")).unwrap().modified();
    assert_eq!(now.unwrap(), written.unwrap());
    let one = mlnt(&line(&folder, &data, &out, "--methods ce --seeds 2"));
    assert!(one.stdout.contains("Test accuracy in per cent, seed 2.\n") && !one.stdout.contains('±'), "{}", one.stdout);

    // Other settings are refused before anything is trained, the first difference with both values; threads are free.
    let changed = "--methods mlnt,iterative-ce,ce --seeds 3,1 --iterations 2 --lr 0.3";
    let said = mlnt(&line(&folder, &data, &out, changed));
    assert_eq!(said.status, Some(2), "{}", said.stdout);
    assert!(
        said.error_line().contains("a run of other settings (lr: 0.05 in the run, 0.3 asked for)"),
        "{}",
        said.stderr
    );
    assert!(!out.join("mlnt-s3").exists());
    let threads = mlnt(&line(&folder, &data, &out, &format!("{flags} --threads 2")));
    assert_eq!((threads.status, threads.stderr.as_str()), (Some(0), ""));

    // Labels that are not those of the other methods.
    let path = out.join("ce-s2/labels.csv");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}\n")).unwrap();
    refused(&line(&folder, &data, &out, flags), "not the labels of");
}

#[test]
fn an_interrupted_comparison_goes_on_to_the_same_bytes() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", 3000);
    let flags = "--methods ce,mlnt --seeds 1 --epochs 3 --batch 6 --feature-epochs 0";
    let whole = folder.path("whole");
    let said = mlnt(&line(&folder, &data, &whole, flags));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));

    let out = folder.path("out");
    let same = line(&folder, &data, &out, flags);
    let child = program(&same).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    let epochs = |run: &str| fs::read_to_string(out.join(run).join("metrics.jsonl")).map_or(0, |t| t.lines().count());
    while epochs("mlnt-s1") < 1 {
        assert!(begin.elapsed() < Duration::from_secs(60), "the first epoch of MLNT");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let (said, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!((output.status.code(), error.as_str()), (Some(130), ""), "{said}");
    assert!(said.ends_with("the same command goes on from here\n"), "{said}");
    assert!(!out.join("compare.md").exists() && !out.join("mlnt-s1/summary.json").exists());

    let said = mlnt(&same);
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    assert!(said.stdout.contains("ce-s1 is complete") && said.stdout.contains("mlnt-s1 continues"), "{}", said.stdout);
    assert!(files(&out) == files(&whole));
    assert_eq!(results(&out.join("mlnt-s1")), results(&whole.join("mlnt-s1")));
}

#[test]
fn a_comparison_keeps_the_precision_that_it_began_in() {
    let folder = Folder::new();
    let (data, out) = (folder.idx(), folder.path("out"));
    let again = |flags: &str| mlnt(&line(&folder, &data, &out, flags));
    assert_eq!(again("--methods ce --seeds 1 --precision f64").status, Some(0));
    let said = again("--methods ce --seeds 1,2");
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    assert!(said.stdout.contains("ce-s1 is complete") && said.stdout.contains("device: cpu (f64, "), "{}", said.stdout);
    let other = line(&folder, &data, &out, "--methods ce --seeds 1 --precision f32");
    refused(&other, "precision: \"f64\" in the run, \"f32\" asked for");
}

#[test]
fn labels_of_a_file_are_the_same_for_all_seeds() {
    let folder = Folder::new();
    let data = folder.idx();
    let labels = folder.path("noisy.csv");
    let noise =
        format!("noise --data {} --noise symmetric --noise-rate 0.4 --out {}", data.display(), labels.display());
    assert_eq!(mlnt(&noise).status, Some(0));
    let out = folder.path("out");
    let flags = format!("--methods ce --seeds 1,2 --labels {}", labels.display());
    let said = mlnt(&line(&folder, &data, &out, &flags));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    let given = ["ce-s1", "ce-s2"].map(|run| fs::read(out.join(run).join("labels.csv")).unwrap());
    assert!(given[0] == given[1]);
    let table: Value = serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    assert_eq!(table["seeds"][0]["realised_noise"], table["seeds"][1]["realised_noise"]);
    assert!(table["seeds"][0]["realised_noise"].as_f64().unwrap() > 0.2);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let folder = Folder::new();
    let data = folder.idx();
    let out = folder.path("out");
    let of = |flags: &str| line(&folder, &data, &out, flags);
    refused(&of("--methods ce,magic"), "magic");
    refused(&of("--methods ce,mlnt,ce"), "--methods: ce stands there twice");
    refused(&of("--seeds 4,4"), "--seeds: 4 stands there twice");
    refused(&of("--seeds -1"), "'-1'");
    refused(&of("--method ce"), "--method: compare takes --methods");
    refused(&of("--seed 3"), "--seed: compare takes --seeds");
    refused(&of("--first-order"), "compare takes --methods mlnt-first-order");
    refused(&of("--no-baseline"), "--no-baseline: compare takes --methods");
    refused(&of("--rho 7"), "--rho 7");
    refused(&of("--labels nowhere.csv"), "nowhere.csv");
    assert!(!out.exists(), "nothing was begun");

    fs::create_dir_all(out.join("ce-s1")).unwrap();
    refused(&of("--methods ce --seeds 1"), "not a run directory: it has no config.toml");
    fs::remove_dir(out.join("ce-s1")).unwrap();
    let file = folder.path("settings.toml");
    refused(&line(&folder, &data, &file, ""), "a file; --out takes a folder");

    // Killed before its first checkpoint.
    assert_eq!(mlnt(&of("--methods ce --seeds 1")).status, Some(0));
    fs::remove_file(out.join("ce-s1/summary.json")).unwrap();
    fs::remove_file(out.join("ce-s1/checkpoint.safetensors")).unwrap();
    refused(&of("--methods ce --seeds 1"), "begun, but without a checkpoint to continue from");
}

#[test]
fn help_has_the_settings_of_train_but_those_that_it_chooses() {
    let help = mlnt("compare --help").stdout;
    for flag in ["--methods", "--seeds", "--labels", "--epochs", "--iterations"] {
        assert!(help.contains(flag), "{flag}: {help}");
    }
    for flag in ["--method ", "--seed ", "--first-order", "--no-baseline"] {
        assert!(!help.contains(&format!("      {flag}")), "{flag}: {help}");
    }
}

#[test]
fn every_method_has_its_lines() {
    let folder = Folder::new();
    let data = folder.idx();
    let out = folder.path("out");
    let methods = "mlnt,mlnt-first-order,ce,iterative-ce,joint-opt,elr,co-teaching";
    let said = mlnt(&line(&folder, &data, &out, &format!("--methods {methods} --seeds 3")));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    let table: Value = serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    let lines = |method: &str| -> Vec<&str> {
        let networks = table["networks"].as_array().unwrap().iter().filter(|n| n["method"] == method);
        networks.map(|n| n["network"].as_str().unwrap()).collect()
    };
    assert_eq!(lines("mlnt-first-order"), ["MLNT student", "MLNT teacher"]);
    assert_eq!(lines("iterative-ce"), ["iterative CE student", "iterative CE teacher"]);
    assert_eq!(lines("ce"), ["cross entropy"]);
    assert_eq!(lines("elr"), ["ELR"]);
    assert_eq!(lines("joint-opt").last(), Some(&"joint-opt"));
    assert_eq!(lines("co-teaching"), ["co-teaching network 1", "co-teaching network 2"]);
    for network in table["networks"].as_array().unwrap() {
        assert_eq!(network["test_at_best_val"]["values"].as_array().unwrap().len(), 1, "{network}");
        assert!(network["test_at_best_val"]["std"].is_null(), "{network}");
    }
}
