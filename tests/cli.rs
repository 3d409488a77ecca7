//! The command line, run as a person runs it: the real program on tiny data.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use program::*;
use serde_json::{Value, json};

/// Tiny settings.
const TINY: &str = "train-size = 0\nepochs = 2\nfeature-epochs = 1\nwidths = [4, 6]\nblocks = [1, 1]\nbatch = 12\n\
                    neighbours = 3\nbranches = 2\n";

/// `config.toml` without the number of threads.
fn settings(run: &Path) -> String {
    let text = fs::read_to_string(run.join("config.toml")).unwrap();
    text.lines().filter(|line| !line.starts_with("threads")).map(|line| format!("{line}\n")).collect()
}

/// Trains on `data` with the given flags in `out`.
fn train(folder: &Folder, data: &Path, out: &Path, flags: &str) -> PathBuf {
    let said = mlnt(&format!("{} {flags}", folder.train(TINY, data, out)));
    assert_eq!(said.status, Some(0), "{flags}: {}", said.stderr);
    assert_eq!(said.stderr, "", "{flags}");
    out.to_path_buf()
}

/// Runs that must be refused: status 2, one line on standard error that names `names`.
fn refused(line: &str, names: &[&str]) -> String {
    let said = mlnt(line);
    assert_eq!(said.status, Some(2), "{line}: {} {}", said.stdout, said.stderr);
    let error = said.error_line();
    for name in names {
        assert!(error.contains(name), "`{line}` says `{error}`, which does not name `{name}`");
    }
    error
}

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
fn eval_and_predict_agree_with_the_last_epoch() {
    let folder = Folder::new();
    let data = folder.idx();
    let run = train(&folder, &data, &folder.path("run"), "--epochs 3 --noise-rate 0.2");
    let last = metrics(&run).pop().unwrap();
    let line = format!("eval {} --json --batch 7", run.display());
    let said = mlnt(&line);
    assert_eq!(said.status, Some(0), "{}", said.stderr);
    let lines: Vec<Value> = said.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (object, key) in lines.iter().zip(["test_accuracy", "teacher_test_accuracy"]) {
        assert_eq!(object["accuracy"], last[key], "{key}");
        assert_eq!(object["images"], TEST, "{key}");
        assert!(object["cross_entropy"].as_f64().is_some_and(f64::is_finite));
    }
    // Any batch size, larger than the data too; the file instead of the run.
    let again = mlnt(&format!("eval {} --json --batch 1000000 --model teacher", run.display()));
    let again: Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!(again["accuracy"], lines[1]["accuracy"]);
    let text = mlnt(&format!("eval {}", run.join("teacher.safetensors").display())).stdout;
    let percent = format!("accuracy {:.2} %", 100.0 * last["teacher_test_accuracy"].as_f64().unwrap());
    assert!(text.contains(&percent), "{text}");

    for (model, key) in [("student", "test_accuracy"), ("teacher", "teacher_test_accuracy")] {
        let out = folder.path(&format!("{model}.csv"));
        let said = mlnt(&format!("predict {} --model {model} --out {}", run.display(), out.display()));
        assert_eq!((said.status, said.stdout.as_str()), (Some(0), ""), "{}", said.stderr);
        let printed = mlnt(&format!("predict {} --model {model}", run.display())).stdout;
        assert_eq!(fs::read_to_string(&out).unwrap(), printed);
        let mut rows = printed.lines();
        let header = rows.next().unwrap();
        assert_eq!(header.split(',').take(4).collect::<Vec<_>>(), ["index", "predicted", "predicted_name", "p_0"]);
        let labels = test_labels();
        let mut correct = 0;
        for (i, row) in rows.clone().enumerate() {
            let fields: Vec<&str> = row.split(',').collect();
            assert_eq!(fields.len(), 3 + CLASSES);
            assert_eq!(fields[0].parse::<usize>().unwrap(), i);
            let predicted: usize = fields[1].parse().unwrap();
            let p: Vec<f64> = fields[3..].iter().map(|v| v.parse().unwrap()).collect();
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{row}");
            assert!(p.iter().all(|v| *v <= p[predicted]), "{row}");
            correct += usize::from(predicted == usize::from(labels[i]));
        }
        assert_eq!(rows.count(), TEST);
        assert_eq!(correct as f64 / TEST as f64, last[key].as_f64().unwrap(), "{model}");
    }
    let train_rows = mlnt(&format!("predict {} --split train", run.display())).stdout.lines().count();
    assert_eq!(train_rows, TRAIN + 1);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let folder = Folder::new();
    let data = folder.idx();
    let run = folder.path("run");
    let training = folder.train(TINY, &data, &run);
    let plan = "plan".to_string();
    let verify = format!("verify {}", golden("step_joint").display());
    for line in [&training, &plan, &verify] {
        let (status, error) = with_closed_output(line);
        assert_eq!((status, error.as_str()), (Some(0), ""), "{line}");
    }
    assert!(run.join("student.safetensors").is_file(), "training goes on");
    for line in [format!("predict {}", run.display()), format!("eval {}", run.display()), "--help".into()] {
        let (status, error) = with_closed_output(&line);
        assert_eq!(status, Some(0), "{line}: {error}");
        assert!(!error.contains("panicked") && !error.contains("mlnt: "), "{line}: {error}");
    }
}

#[test]
fn plan_counts_what_the_method_promises() {
    for (branches, bound) in [(1, 13.0), (4, 40.0), (10, 94.0)] {
        let said = mlnt(&format!("plan --preset cifar10 --recipe released --branches {branches} --json"));
        assert_eq!(said.status, Some(0), "{}", said.stderr);
        let object: Value = serde_json::from_str(&said.stdout).unwrap();
        let number = |key: &str| object[key].as_f64().unwrap_or_else(|| panic!("{key} in {object}"));
        for key in ["flops", "forward_flops", "launches", "bytes_moved", "arena_bytes"] {
            assert!(object[key].as_u64().is_some_and(|n| n > 0), "{key} in {object}");
        }
        assert!((number("ratio") * number("forward_flops") / number("flops") - 1.0).abs() < 1e-12);
        assert!(number("ratio") <= bound * 1.01, "M = {branches}: {}", number("ratio"));
    }
    let exact: Value = serde_json::from_str(&mlnt("plan --json").stdout).unwrap();
    let first: Value = serde_json::from_str(&mlnt("plan --json --first-order").stdout).unwrap();
    assert!(first["flops"].as_u64() < exact["flops"].as_u64());
    let listed = mlnt("plan --device simt --precision f16 --json --launches").stdout;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let launches = listed["listing"].as_array().unwrap();
    assert_eq!(Some(launches.len() as u64), listed["launches"].as_u64());
    let kernels = launches.iter().map(|l| l["kernels"].as_array().unwrap().len() as u64).sum::<u64>();
    assert_eq!(Some(kernels), listed["kernel_launches"].as_u64());
    for key in ["flops", "bytes_moved"] {
        let sum = launches.iter().map(|l| l[key].as_u64().unwrap()).sum::<u64>();
        assert_eq!(Some(sum), listed[key].as_u64(), "{key}");
    }
    let hopper = mlnt("plan --device simt --precision f16 --hopper --json --launches").stdout;
    assert!(hopper.contains("conv2d_wgmma_fprop") && !listed.to_string().contains("wgmma"), "{hopper}");
    refused("plan --launches", &["--json"]);
    let table = mlnt("plan --preset cifar10 --recipe paper").stdout;
    assert!(table.contains("whole step") && table.contains("forward passes") && table.contains("arena"), "{table}");
}

#[test]
fn plan_of_any_size_works_or_is_refused() {
    let largest = "--batch 1000000 --branches 10000 --widths 65536 --blocks 1";
    refused(&format!("plan {largest}"), &["too large to plan"]);
    refused(&format!("plan {largest} --image-size 1x1"), &["too large to plan"]);
    refused("plan --image-size 65536x65536 --batch 1000000", &["too large to plan"]);
    refused("plan --batch 4 --widths 4,4 --blocks 1000,1000", &["2000 blocks"]);
    refused("plan --batch 4 --widths 4,4 --blocks 1000000000000,1", &["--blocks"]);
    refused("plan --batch 1000001", &["--batch 1000001"]);
    refused("plan --branches 0", &["--branches 0"]);
    refused("plan --image-size 28", &["--image-size"]);
    // Far larger than any machine, and still counted.
    for line in [
        "plan --widths 65536 --blocks 1 --json",
        "plan --batch 1000000 --branches 60 --json",
        "plan --batch 1000000 --branches 10000 --widths 1,1 --blocks 1,1 --image-size 1x1 --json",
        "plan --batch 2 --branches 1 --widths 1 --blocks 1 --image-size 65536x65536 --json",
        "plan --widths 4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4 --blocks 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1 --json",
        "plan --widths 4,4 --blocks 50,50 --json",
    ] {
        let said = mlnt(line);
        assert_eq!(said.status, Some(0), "{line}: {}", said.stderr);
        let object: Value = serde_json::from_str(&said.stdout).unwrap();
        assert!(object["arena_bytes"].as_u64().is_some_and(|n| n > 0), "{line}: {object}");
    }
}

#[test]
fn help_and_version_teach() {
    for (line, words) in [
        ("--help", vec!["train", "eval", "predict", "verify", "plan"]),
        ("train --help", vec!["--noise-rate", "--resume", "Examples:"]),
        ("verify --help", vec!["Exit status", "--precision"]),
        ("--version", vec!["mlnt "]),
    ] {
        let said = mlnt(line);
        assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""), "{line}");
        for word in words {
            assert!(said.stdout.contains(word), "{line}: {word}");
        }
    }
}

#[test]
fn wrong_usage_is_one_line_that_names_the_flag() {
    let cases = [
        ("train --rho 1.5", "--rho 1.5"),
        ("train --rho 0", "--rho 0"),
        ("train --rho much", "--rho"),
        ("train --branches 0", "--branches 0"),
        ("train --branches -1", "--branches"),
        ("train --noise loud", "--noise"),
        ("train --nois pair", "--noise"),
        ("train --noise-rate 1.1", "--noise-rate 1.1"),
        ("train --lr nan", "--lr"),
        ("train --gamma 1", "--gamma 1"),
        ("train --batch 1", "--batch 1"),
        ("train --neighbours 64", "--neighbours 64"),
        ("train --epochs 0", "--epochs 0"),
        ("train --widths 8,0", "--widths"),
        ("train --widths 8,x", "--widths"),
        ("train --blocks 1,1", "--blocks"),
        ("train --val-fraction 0.9", "--val-fraction"),
        ("train --seed -1", "--seed"),
        ("train --threads 100000", "--threads"),
        ("train --train-size 100000", "--train-size 100000"),
        ("train --train-size 7", "--train-size 7"),
        ("train --train-size 20", "--val-fraction"),
        ("train --train-size 100 --batch 91", "--batch 91"),
        ("train --augment pad-crop-flip --pad 28", "--pad 28"),
        ("train --resume a --out b", "--resume"),
        ("train --resume a --config b.toml", "--resume"),
        ("train --config missing.toml", "missing.toml"),
        ("train --data missing", "missing"),
        ("train --branches 10000 --no-baseline", "GB of memory: "),
        ("train --widths 65536 --blocks 1 --no-baseline", "GB of memory: "),
        ("verify", "<FILE>"),
        ("verify missing.safetensors", "missing.safetensors"),
        ("eval", "<RUN|FILE.safetensors>"),
        ("eval missing", "missing"),
        ("predict missing --batch 0", "--batch"),
        ("frobnicate", "frobnicate"),
    ];
    let folder = Folder::new();
    for (line, name) in cases {
        let said = mlnt_in(folder.root(), line);
        assert_eq!(said.status, Some(2), "{line}: {}", said.stderr);
        let error = said.error_line();
        assert!(error.contains(name), "`{line}` says `{error}`");
        assert_eq!(names_in(folder.root()), [""; 0], "`{line}` leaves nothing");
    }
}

#[test]
fn bad_toml_is_named_with_its_line() {
    let folder = Folder::new();
    let file = folder.path("mine.toml");
    for (text, what) in [
        ("rho = 0.5\nbranchs = 3\n", "line 2: unknown key `branchs`; did you mean `branches`?"),
        ("rho = 1.5\n", "--rho 1.5"),
        ("batch = \"many\"\n", "line 1: `batch`"),
        ("rho = \n", "line 1"),
        ("[data]\n", "data"),
    ] {
        fs::write(&file, text).unwrap();
        let out = folder.path("run");
        let error = refused(&format!("train --config {} --out {}", file.display(), out.display()), &[what]);
        assert!(what.starts_with("--") || error.contains(file.to_str().unwrap()), "{error}");
        assert!(!out.exists());
    }
    fs::write(&file, format!("train-size = 0\nepochs = 1\nwidths = [4]\nblocks = [1]\ndata = {:?}\n", folder.idx()))
        .unwrap();
    let out = folder.path("run");
    let flags = "--batch 12 --neighbours 3 --feature-epochs 0";
    let said = mlnt(&format!("train --config {} --out {} {flags}", file.display(), out.display()));
    assert_eq!(said.status, Some(0), "{}", said.stderr);
    assert!(settings(&out).contains("widths = [4]\n"));
}

#[test]
fn bad_data_are_named_and_no_run_begins() {
    let folder = Folder::new();
    let out = folder.path("run");
    let check = |data: &Path, names: &[&str]| {
        let error = refused(&folder.train(TINY, data, &out), names);
        assert!(error.contains(data.file_name().unwrap().to_str().unwrap()), "{error}");
        assert!(!out.exists(), "{error}: nothing is left behind");
    };
    let empty = folder.path("empty");
    fs::create_dir(&empty).unwrap();
    check(&empty, &["no data set known here"]);
    check(&folder.path("missing"), &["does not exist"]);
    fs::write(folder.path("plain"), b"").unwrap();
    check(&folder.path("plain"), &["is a file"]);

    let (images, labels) = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte");
    type Edit = fn(&mut Vec<u8>);
    let edits: [(&str, Edit, &str); 13] = [
        (images, |b| b.truncate(b.len() - 1), "truncated"),
        (images, |b| b.truncate(7), "truncated"),
        (images, Vec::clear, "truncated"),
        (images, |b| b.push(0), "oversized"),
        (images, |b| b[3] = 9, "magic number"),
        (images, |b| b[4..8].fill(0), "empty"),
        (images, |b| b[4..16].fill(0xff), "impossible header"),
        (labels, |b| b.truncate(b.len() - 1), "truncated"),
        (labels, |b| b.push(0), "oversized"),
        (labels, |b| b[3] = 3, "magic number"),
        (labels, |b| b[20] = 10, "label 10 of image 12"),
        (labels, |b| (b[7] -= 1, b.truncate(b.len() - 1)).1, "images"),
        (labels, |b| b.splice(..0, *b"\x1f\x8b").for_each(drop), "gzip"),
    ];
    for (i, (file, edit, what)) in edits.into_iter().enumerate() {
        let data = folder.idx_named(&format!("idx{i}"));
        let path = data.join(file);
        let mut bytes = fs::read(&path).unwrap();
        edit(&mut bytes);
        fs::write(&path, bytes).unwrap();
        check(&data, &[what, file]);
    }
    let data = folder.idx_named("incomplete");
    fs::remove_file(data.join("t10k-labels-idx1-ubyte")).unwrap();
    check(&data, &["t10k-labels-idx1-ubyte"]);
    let data = folder.idx_named("sizes");
    fs::write(data.join("t10k-images-idx3-ubyte"), idx_images(TEST, 9, 7)).unwrap();
    check(&data, &["t10k-images-idx3-ubyte", "1×7×9"]);

    let edits: [(&str, Edit, &str); 6] = [
        ("data_batch_2.bin", |b| b.truncate(b.len() - 1), "truncated"),
        ("test_batch.bin", |b| b.resize(10_001 * 3073, 0), "oversized"),
        ("data_batch_3.bin", |b| b[3073] = 10, "label 10 of record 1"),
        ("data_batch_4.bin", Vec::clear, "empty"),
        ("test_batch.bin", |b| b.truncate(100), "truncated"),
        ("batches.meta.txt", |b| b.extend(b"airplane\n"), "class names"),
    ];
    for (i, (file, edit, what)) in edits.into_iter().enumerate() {
        let data = folder.cifar(&format!("cifar{i}"));
        let path = data.join(file);
        let mut bytes = fs::read(&path).unwrap_or_default();
        edit(&mut bytes);
        fs::write(&path, bytes).unwrap();
        check(&data, &[what, file]);
    }
    let data = folder.cifar("cifar-incomplete");
    fs::remove_file(data.join("data_batch_5.bin")).unwrap();
    check(&data, &["data_batch_5.bin"]);
    // And whole, it trains.
    train(&folder, &folder.cifar("cifar"), &out, "--epochs 1 --no-baseline --val-fraction 0.4");
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

#[test]
fn a_run_continues_only_as_what_it_is() {
    let folder = Folder::new();
    let data = folder.idx();
    let run = train(&folder, &data, &folder.path("run"), "");
    let before = results(&run);
    let resume = format!("train --resume {}", run.display());

    // A complete run stays as it is.
    let said = mlnt(&format!("{resume} --threads 1"));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    assert!(said.stdout.contains("MLNT teacher") && said.stdout.contains("complete"), "{}", said.stdout);
    assert_eq!(results(&run), before);

    refused(&format!("{resume} --lr 0.1"), &["--resume", "lr"]);
    refused(&format!("{resume} --seed 2 --rho 0.25"), &["seed: 1 in the run, 2 asked for", "rho"]);
    refused(&format!("{resume} --first-order"), &["first-order"]);
    refused(&format!("{resume} --branches 0"), &["--branches 0"]);
    refused(&format!("train --resume {}", folder.path("none").display()), &["none", "no such run directory"]);
    refused(&format!("train --resume {}", data.display()), &["not a run directory"]);
    refused(&format!("train --resume {}", run.join("labels.csv").display()), &["labels.csv"]);

    let damage = |file: &str, edit: &dyn Fn(Vec<u8>) -> Vec<u8>, names: &[&str]| {
        let path = run.join(file);
        let whole = fs::read(&path).unwrap();
        let all = names_in(&run);
        fs::write(&path, edit(whole.clone())).unwrap();
        refused(&resume, &[&[file], names].concat());
        fs::write(&path, whole).unwrap();
        assert_eq!(names_in(&run), all);
        assert_eq!(results(&run), before, "{file}: nothing else changed");
    };
    let replaced = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains(from), "{from}");
            text.replacen(from, to, 1).into_bytes()
        }
    };
    let cut = |n: usize| move |bytes: Vec<u8>| bytes[..bytes.len() - n.min(bytes.len())].to_vec();
    damage("labels.csv", &replaced("\n0,", "\n00,"), &["not the labels"]);
    damage("labels.csv", &cut(3), &["not the labels"]);
    damage("metrics.jsonl", &cut(1), &["cut short"]);
    damage("metrics.jsonl", &cut(usize::MAX), &["cut short"]);
    damage("timing.jsonl", &cut(5), &["cut short"]);
    damage("config.toml", &replaced("rho = ", "roh = "), &["unknown key `roh`"]);
    damage("config.toml", &replaced("rho = 0.5", "rho = 5.0"), &["--rho 5"]);
    damage("config.toml", &replaced("rho = 0.5\n", ""), &["rho"]);
    damage("checkpoint.safetensors", &|_| b"no checkpoint".to_vec(), &["not a safetensors file"]);
    damage("checkpoint.safetensors", &|_| fs::read(run.join("student.safetensors")).unwrap(), &["mlnt-model-1"]);
    damage("checkpoint.safetensors", &|_| fs::read(golden("step_joint")).unwrap(), &["no checkpoint of this program"]);
    let whole = fs::metadata(run.join("checkpoint.safetensors")).unwrap().len() as usize;
    for n in [1, 7, whole / 3, whole / 2, whole - 9, whole - 8, whole - 1, whole] {
        damage("checkpoint.safetensors", &cut(n), &["cut short"]);
    }
    // Of other settings, and of another network.
    let other = train(&folder, &data, &folder.path("other"), "--lr 0.1");
    damage(
        "checkpoint.safetensors",
        &|_| fs::read(other.join("checkpoint.safetensors")).unwrap(),
        &["other settings than config.toml"],
    );
    let wider = train(&folder, &data, &folder.path("wider"), "--widths 4,8");
    damage(
        "checkpoint.safetensors",
        &|_| fs::read(wider.join("checkpoint.safetensors")).unwrap(),
        &["another architecture", "layer2.0"],
    );
    // Data that are not those of the run any more.
    fs::remove_file(data.join("train-labels-idx1-ubyte")).unwrap();
    refused(&resume, &["train-labels-idx1-ubyte"]);
    assert_eq!(results(&run), before);
}

#[test]
fn eval_and_predict_refuse_what_is_no_network_for_the_data() {
    let folder = Folder::new();
    let data = folder.idx();
    let run = train(&folder, &data, &folder.path("run"), "--epochs 1 --no-baseline");
    let student = run.join("student.safetensors");
    let bytes = fs::read(&student).unwrap();
    let file = folder.path("network.safetensors");
    for command in ["eval", "predict"] {
        let line = format!("{command} {}", file.display());
        for length in [0, 1, 7, 8, 9, 100, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&file, &bytes[..length]).unwrap();
            refused(&line, &["network.safetensors", "cut short"]);
        }
        fs::write(&file, b"index,predicted\n0,1\n2,3\n").unwrap();
        refused(&line, &["network.safetensors", "safetensors"]);
        fs::write(&file, fs::read(golden("step_joint")).unwrap()).unwrap();
        refused(&line, &["network.safetensors", "not a network"]);
        fs::write(&file, fs::read(run.join("checkpoint.safetensors")).unwrap()).unwrap();
        refused(&line, &["network.safetensors", "mlnt-checkpoint-1"]);
        refused(&format!("{command} {} --data sample", student.display()), &["1×28×28", "1×9×7"]);
        refused(&format!("{command} {} --data {}", student.display(), folder.path("x").display()), &["does not exist"]);
        refused(&format!("{command} {} --model student", student.display()), &["--model"]);
        refused(&format!("{command} {}", data.display()), &["not a run directory"]);
    }
    let out = folder.path("no/such/folder.csv");
    refused(&format!("predict {} --out {}", run.display(), out.display()), &["folder.csv"]);

    // A description that does not fit the tensors, or describes nothing that could exist.
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut file = SafeTensors::parse(&bytes);
        let mut meta: Value = serde_json::from_str(&file.metadata["mlnt"]).unwrap();
        edit(&mut meta["meta"]);
        file.metadata.insert("mlnt".into(), meta.to_string());
        file.bytes()
    };
    type Edit = fn(&mut Value);
    let edits: [(Edit, &str); 9] = [
        (|m| m["model"]["widths"] = json!([4, 8]), "another architecture"),
        (|m| m["model"]["widths"] = json!([1u64 << 62, 1u64 << 62]), "extent"),
        (|m| m["model"]["blocks"] = json!([1u64 << 62, 1]), "blocks"),
        (|m| m["model"]["widths"] = json!([]), "widths"),
        (|m| m["model"]["size"] = json!([u64::MAX, 3]), "extent"),
        (|m| m["mean"] = json!([0.5, 0.5]), "normalisation"),
        (|m| m["std"] = json!([0.0]), "normalisation"),
        (|m| m["class_names"] = json!(["a"]), "class names"),
        (|m| m["model"] = Value::Null, "not a network"),
    ];
    for (edit, what) in edits {
        fs::write(&file, edited(&edit)).unwrap();
        refused(&format!("eval {}", file.display()), &["network.safetensors", what]);
    }
    fs::write(&file, edited(&|m| m["class_names"][0] = json!("a, \"b\""))).unwrap();
    let said = mlnt(&format!("predict {}", file.display()));
    assert_eq!(said.status, Some(0), "{}", said.stderr);
    assert!(said.stdout.lines().next().unwrap().contains("\"p_a, \"\"b\"\"\""));
}
