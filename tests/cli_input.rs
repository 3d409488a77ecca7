//! What `mlnt train` is given and cannot use: settings, data, run directories that are not whole.

mod program;

use std::fs;
use std::path::Path;

use program::*;

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
