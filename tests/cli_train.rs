//! `mlnt train`, run as a person runs it: the real program on tiny data.

mod program;

use std::fs;
use std::path::Path;

use program::*;

#[test]
fn the_same_seed_gives_the_same_bytes_whatever_the_threads() {
    let folder = Folder::new();
    let data = folder.idx();
    let one = train(&folder, &data, &folder.path("one"), "--threads 1");
    let two = train(&folder, &data, &folder.path("two"), "--threads 2");
    assert_eq!(results(&one), results(&two));
    assert_eq!(settings(&one), settings(&two));
    let other = train(&folder, &data, &folder.path("other"), "--threads 2 --seed 2");
    for (name, (a, b)) in RESULTS.iter().zip(results(&one).iter().zip(results(&other))) {
        assert_ne!(*a, b, "{name} of another seed");
    }
    let same: Vec<String> = names_in(&one);
    assert_eq!(
        same,
        [
            "best.safetensors",
            "checkpoint.safetensors",
            "config.toml",
            "iterations.jsonl",
            "labels.csv",
            "losses.f32",
            "metrics.jsonl",
            "student.safetensors",
            "summary.json",
            "summary.txt",
            "teacher.safetensors",
            "tensorboard",
            "timing.jsonl"
        ]
    );
}

#[test]
fn every_kind_of_run_trains_and_reports() {
    let folder = Folder::new();
    let data = folder.idx();
    let fashion = folder.idx_named("fashion");
    let kinds = [
        "--recipe paper",
        "--recipe released",
        "--recipe paper --first-order",
        "--recipe released --first-order",
        "--precision f64 --epochs 1",
        "--noise none",
        "--noise symmetric-exclusive --noise-rate 0.3",
        "--noise pair --noise-rate 0.3",
        "--noise asymmetric --noise-rate 0.4",
        "--augment pad-crop-flip --pad 2",
        "--val-labels clean",
        "--no-baseline --feature-epochs 0",
        "--branches 1 --rho 1 --neighbours 1",
    ];
    let mut students = Vec::new();
    for (i, kind) in kinds.iter().enumerate() {
        let data = if kind.contains("asymmetric") { &fashion } else { &data };
        let run = train(&folder, data, &folder.path(&format!("run{i}")), kind);
        let records = metrics(&run);
        let epochs = if kind.contains("--epochs 1") { 1 } else { 2 };
        let count = |phase: &str| records.iter().filter(|r| r["phase"] == phase).count();
        assert_eq!(count("cross-entropy"), if kind.contains("no-baseline") { 0 } else { epochs }, "{kind}");
        assert_eq!(count("features"), usize::from(!kind.contains("feature-epochs 0")), "{kind}");
        assert_eq!(count("mlnt"), epochs, "{kind}");
        for r in records.iter().filter(|r| r["phase"] == "mlnt") {
            for key in ["train_loss", "meta_loss"] {
                assert!(r[key].as_f64().is_some_and(f64::is_finite), "{kind}: {r}");
            }
            let accuracies =
                ["train_accuracy", "val_accuracy", "test_accuracy", "teacher_val_accuracy", "teacher_test_accuracy"];
            for key in accuracies {
                assert!(r[key].as_f64().is_some_and(|v| (0.0..=1.0).contains(&v)), "{kind}: {r}");
            }
        }
        let table = fs::read_to_string(run.join("summary.txt")).unwrap();
        let baseline = !kind.contains("no-baseline");
        assert_eq!(table.contains("cross entropy"), baseline, "{kind}");
        assert!(table.contains("MLNT student") && table.contains("MLNT teacher"), "{kind}");
        students.push(fs::read(run.join("student.safetensors")).unwrap());
    }
    for (i, a) in students.iter().enumerate() {
        for (j, b) in students.iter().enumerate().take(i) {
            // Validation labels decide nothing, and the joint recipe is the default.
            let equal = a == b;
            let expected = kinds[i].contains("val-labels") && kinds[j] == "--recipe released";
            assert_eq!(equal, expected, "{} and {}", kinds[i], kinds[j]);
        }
    }
}

#[test]
fn the_default_data_are_embedded_and_the_run_gets_a_name() {
    let folder = Folder::new();
    let flags = "--epochs 1 --feature-epochs 0 --no-baseline --widths 4 --blocks 1 --batch 30";
    let line = format!("train --train-size 100 {flags}");
    for name in ["runs/sample-symmetric-0.5-s1", "runs/sample-symmetric-0.5-s1-2"] {
        let said = mlnt_in(folder.root(), &line);
        assert_eq!(said.status, Some(0), "{}", said.stderr);
        assert!(said.stdout.contains(&format!("run directory: {name}\n")), "{}", said.stdout);
        assert!(folder.path(name).join("student.safetensors").is_file());
    }
}

#[test]
fn a_run_directory_is_never_written_over() {
    let folder = Folder::new();
    let data = folder.idx();
    let line = |out: &Path| folder.train(TINY, &data, out);
    let taken = folder.path("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("mine"), "mine").unwrap();
    refused(&line(&taken), &["taken", "exists", "--out", "--resume"]);
    assert_eq!(names_in(&taken), ["mine"]);
    let file = folder.path("file");
    fs::write(&file, "mine").unwrap();
    refused(&line(&file), &["file", "exists"]);
    refused(&line(&file.join("run")), &["file"]);
    refused(&line(Path::new("/proc/run")), &["/proc"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

#[cfg(unix)]
#[test]
fn a_run_that_cannot_be_written_leaves_nothing() {
    let folder = Folder::new();
    let data = folder.idx();
    let out = folder.path("run");
    // No file may grow past 2 KiB: settings and labels fit, the first checkpoint does not.
    let line =
        format!("trap '' XFSZ; ulimit -f 2; exec {} {}", env!("CARGO_BIN_EXE_mlnt"), folder.train(TINY, &data, &out));
    let done = std::process::Command::new("bash").args(["-c", &line]).output().unwrap();
    let error = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(2), "{error}");
    assert!(error.starts_with("mlnt: ") && error.lines().count() == 1, "{error}");
    assert!(error.contains("checkpoint.safetensors"), "{error}");
    assert!(!out.exists());
}

#[test]
fn a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint() {
    let folder = Folder::new();
    let data = folder.idx();
    // In cross entropy at once; in MLNT after the other two phases; with a meta step that explodes.
    let cases = [
        ("--lr 1e30", "cross-entropy", 0),
        ("--no-baseline --lr 1e30", "mlnt", 1),
        ("--no-baseline --feature-lr 1e30 --feature-epochs 3", "features", 0),
        ("--no-baseline --eta 1e39 --eta-ramp 0 --lr 1", "mlnt", 1),
        // One step per epoch: the loss is finite in the step that ruins the weights.
        ("--no-baseline --feature-epochs 0 --batch 120 --lr 1e39", "mlnt", 0),
    ];
    for (i, (flags, phase, epoch)) in cases.into_iter().enumerate() {
        let out = folder.path(&format!("run{i}"));
        let line = format!("{} --threads 1 {flags}", folder.train(TINY, &data, &out));
        let error = refused(&line, &["any more", "checkpoint.safetensors", "smaller --"]);
        let kept = checkpoint(&out);
        assert!(kept.tensors.iter().all(finite), "{flags}: {error}");
        let name = match phase {
            "cross-entropy" => "cross entropy",
            "features" => "feature network",
            _ => "MLNT",
        };
        assert!(error.contains(name), "{flags}: {error}");
        assert_eq!(kept.meta["epoch"].as_u64(), Some(epoch), "{flags}");
        assert!(!out.join("student.safetensors").exists());
        // It still loads, and goes the same way again.
        let again = mlnt(&format!("train --resume {}", out.display()));
        assert_eq!((again.status, again.error_line()), (Some(2), error), "{flags}");
        assert_eq!(checkpoint(&out).meta["epoch"], kept.meta["epoch"]);
    }
}
