//! The program on its devices: which it takes, what it says of those it cannot take, and a run on the SIMT machine.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use mlnt::device::cuda::driver::gpu::Gpu;
use program::*;
use serde_json::Value;

/// Tiny settings: 7 steps per epoch.
const TINY: &str = "train-size = 0\nepochs = 2\nfeature-epochs = 2\nwidths = [4, 6]\nblocks = [1, 1]\nbatch = 12\n\
                    neighbours = 3\nbranches = 2\naugment = \"pad-crop-flip\"\npad = 2\n";

/// 96 training images, 30 test images, 1×9×7.
fn data(folder: &Folder) -> PathBuf {
    folder.idx_sized("data", 96)
}

/// What a run says, line by line.
fn train(folder: &Folder, data: &Path, out: &Path, flags: &str) -> Vec<String> {
    let said = mlnt(&format!("{} {flags}", folder.train(TINY, data, out)));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""), "{flags}");
    said.stdout.lines().map(str::to_string).collect()
}

/// The value of a key of the run's `config.toml`.
fn setting(run: &Path, key: &str) -> String {
    let text = fs::read_to_string(run.join("config.toml")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
    value.unwrap_or_else(|| panic!("{key} in {text}")).trim().to_string()
}

/// A command that must end with status 2 and one line that has `words` in it.
fn refused(folder: &Path, line: &str, words: &[&str]) {
    let said = mlnt_in(folder, line);
    assert_eq!(said.status, Some(2), "{line}: {} {}", said.stdout, said.stderr);
    let error = said.error_line();
    for word in words {
        assert!(error.contains(word), "`{line}` says `{error}`, which does not have `{word}`");
    }
}

#[test]
fn a_run_on_the_simt_machine_follows_the_one_on_the_cpu() {
    let folder = Folder::new();
    let data = data(&folder);
    for recipe in ["paper", "released"] {
        let [cpu, simt] = ["cpu", "simt"].map(|device| {
            let out = folder.path(&format!("{recipe}-{device}"));
            let said = train(&folder, &data, &out, &format!("--recipe {recipe} --device {device} --precision f32"));
            assert!(said[0].starts_with(&format!("device: {device} (f32, ")) && said[0].ends_with(": asked for"));
            assert_eq!(setting(&out, "device"), format!("{device:?}"));
            metrics(&out)
        });
        assert_eq!((cpu.len(), simt.len()), (6, 6));
        let mut compared = 0;
        for (want, have) in cpu.iter().zip(&simt) {
            assert_eq!((&want["phase"], &want["epoch"]), (&have["phase"], &have["epoch"]));
            for key in ["train_loss", "meta_loss"] {
                let Some(want) = want[key].as_f64() else { continue };
                let have = have[key].as_f64().unwrap();
                let off = (have - want).abs() / want.abs();
                println!("{recipe}: {key} {have} on simt, {want} on the CPU: {off:.1e}");
                assert!(off <= 1e-3, "{recipe}: {key} {have} on simt, {want} on the CPU");
                compared += 1;
            }
        }
        assert_eq!(compared, 8, "losses of six epochs, meta losses of two");
    }
}

#[test]
fn a_stopped_run_on_the_simt_machine_ends_with_the_same_bytes() {
    let folder = Folder::new();
    let data = data(&folder);
    let whole = folder.path("whole");
    train(&folder, &data, &whole, "--device simt --precision f16");

    // Killed in the second epoch of MLNT, it continues from the checkpoint of the first.
    let run = folder.path("stopped");
    let line = format!("{} --device simt --precision f16", folder.train(TINY, &data, &run));
    let mut child = program(&line).stdout(std::process::Stdio::null()).spawn().unwrap();
    let began = std::time::Instant::now();
    while lines_written(&run) < 5 {
        assert!(began.elapsed().as_secs() < 90, "the first epoch of MLNT");
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was stopped");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!run.join("student.safetensors").exists());
    let resume = format!("train --resume {}", run.display());
    refused(
        folder.root(),
        &format!("{resume} --device cpu --precision f32"),
        &["device: \"simt\" in the run, \"cpu\" asked for"],
    );
    let asked = format!("{resume} --precision f32");
    refused(folder.root(), &asked, &["precision: \"f16\" in the run, \"f32\" asked for"]);
    // Left open on this machine, the precision would be f32: the run keeps its own.
    let said = mlnt(&format!("{resume} --precision auto"));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    assert_eq!(setting(&run, "precision"), "\"f16\"");
    assert!(said.stdout.starts_with("device: simt (f16, "), "{}", said.stdout);
    assert!(results(&run) == results(&whole));
}

/// Whole lines of `metrics.jsonl`, while a run writes it.
fn lines_written(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.matches('\n').count())
}

#[test]
fn auto_takes_what_is_there_and_says_why() {
    let folder = Folder::new();
    let data = data(&folder);
    let quick = "--epochs 1 --feature-epochs 0 --no-baseline";
    let run = folder.path("f64");
    let said = train(&folder, &data, &run, &format!("{quick} --precision f64 --device auto"));
    assert!(said[0].starts_with("device: cpu (f64, ") && said[0].ends_with(": the only one that computes in f64"));
    assert_eq!(setting(&run, "device"), "\"cpu\"", "a run keeps to the device it began on");

    let run = folder.path("f32");
    let why = match (Gpu::probe(), Gpu::open(0)) {
        (Err(missing), _) => format!(": {} (mlnt info says more)", missing.brief()),
        (Ok(_), Err(why)) => format!(": no GPU is used: {why}"),
        (Ok(_), Ok(_)) => {
            let said = train(&folder, &data, &run, quick);
            assert!(
                said[0].starts_with("device: cuda:0 (f16, ") && said[0].ends_with(": the GPU works"),
                "{}",
                said[0]
            );
            assert_eq!((setting(&run, "device"), setting(&run, "precision")), ("\"cuda\"".into(), "\"f16\"".into()));
            return;
        }
    };
    let said = train(&folder, &data, &run, quick);
    assert!(said[0].starts_with("device: cpu (f32, "), "{}", said[0]);
    assert!(said[0].ends_with(&why), "{}", said[0]);
    assert_eq!(setting(&run, "device"), "\"cpu\"");
    assert_eq!(setting(&run, "precision"), "\"f32\"", "a run keeps to the precision it began in");
}

#[test]
fn the_simt_machine_computes_in_f32_unless_told() {
    let folder = Folder::new();
    let data = data(&folder);
    let run = folder.path("run");
    let said = train(&folder, &data, &run, "--device simt --epochs 1 --feature-epochs 0 --no-baseline");
    assert!(said[0].starts_with("device: simt (f32, "), "{}", said[0]);
    assert_eq!((setting(&run, "device"), setting(&run, "precision")), ("\"simt\"".into(), "\"f32\"".into()));
    let said = mlnt(&format!("eval {} --device simt", run.display()));
    assert!(said.stderr.contains("device: simt (f32, "), "{}", said.stderr);
}

/// The object that a command prints.
fn object(line: &str) -> Value {
    let said = mlnt(line);
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""), "{line}");
    serde_json::from_str(&said.stdout).unwrap()
}

#[test]
fn plan_is_in_the_precision_that_the_device_would_take() {
    let planned = |flags: &str| {
        let plan = object(&format!("plan --json {flags}"));
        let word = |key: &str| plan[key].as_str().unwrap().to_string();
        ((word("device"), word("precision")), plan)
    };
    let pair = |device: &str, precision: &str| (device.to_string(), precision.to_string());
    for (flags, expected) in [
        ("", pair("cpu", "f32")),
        ("--device cpu --precision f64", pair("cpu", "f64")),
        ("--device simt", pair("simt", "f32")),
        ("--device cuda:1", pair("cuda:1", "f16")),
        ("--device cuda --precision auto", pair("cuda", "f16")),
        ("--device cuda --precision f32", pair("cuda", "f32")),
        ("--precision f16", pair("cuda", "f16")),
    ] {
        assert_eq!(planned(flags).0, expected, "{flags}");
    }
    // Not only in name: 16-bit activations, and gradients that are looked through.
    let (open, named) = (planned("--device cuda").1, planned("--device cuda --precision f16").1);
    assert_eq!(open, named);
    assert!(open["arena_bytes"].as_u64() < planned("--device cuda --precision f32").1["arena_bytes"].as_u64());
    assert!(mlnt("plan --device cuda").stdout.contains(", f16; PreAct ResNet"));
}

#[test]
fn a_benchmark_tells_its_precision() {
    let step = "bench-step --json --batch 4 --branches 1 --widths 2,4 --blocks 1,1 --steps 1 --warmup 0 --device";
    for (device, precision) in [("cpu", "f32"), ("simt", "f32"), ("simt --precision f16", "f16")] {
        assert_eq!(object(&format!("{step} {device}"))["precision"], precision, "{device}");
    }
}

#[test]
fn a_benchmark_times_steps_that_are_taken() {
    let step = "bench-step --json --batch 4 --branches 1 --widths 2,4 --blocks 1,1 --steps 2 --warmup 1 --device";
    let object = |flags: &str| object(&format!("{step} {flags}"));
    let plain = object("cpu");
    assert_eq!((&plain["taken"], &plain["scales"]), (&2.into(), &serde_json::json!([1.0, 1.0, 1.0])));
    if mlnt::device::cuda::embedded::has_simt() {
        // Found from the data: a first-order step has no second-order pass.
        let (exact, first) = (object("simt --precision f16"), object("simt --precision f16 --first-order"));
        assert_eq!((&exact["taken"], &first["taken"]), (&2.into(), &2.into()));
        assert!(exact["scales"].as_array().unwrap().iter().all(|scale| scale.as_f64() > Some(1.0)), "{exact}");
        assert_eq!(first["scales"][2], 1.0, "{first}");
    }
}

#[test]
fn info_says_what_a_device_computes_in() {
    let text = mlnt("info").stdout;
    assert!(text.contains("threads; f32 unless asked for f64"), "{text}");
    assert!(!text.contains("simt     built") || text.contains("on the processor; f32 unless asked for"), "{text}");
    for card in object("info --json")["cards"].as_array().unwrap() {
        assert_eq!(card["precision"], "f16", "{card}");
    }
}

#[test]
fn a_device_that_cannot_be_had_is_an_error_that_says_what_is_missing() {
    let folder = Folder::new();
    let root = folder.root();
    let file = golden("step_joint").display().to_string();
    for ordinal in [0, 7] {
        let Err(why) = Gpu::open(ordinal).map(drop) else { continue };
        let why = why.to_string();
        assert!(why.starts_with(&format!("device cuda:{ordinal}: ")), "{why}");
        let missing = ["libcuda", "NVIDIA", "kernels", "card"];
        assert!(missing.iter().any(|word| why.contains(word)), "{why}");
        refused(root, &format!("train --device cuda:{ordinal}"), &[&why]);
        refused(root, &format!("verify {file} --device cuda:{ordinal}"), &[&why]);
    }
    if let Err(why) = Gpu::open(0).map(drop) {
        refused(root, "train --device cuda", &[&why.to_string()]);
    }
    let possible = "possible are auto, cpu, cuda, cuda:N, simt";
    for name in ["nonsense", "cuda:", "cuda:x", "cuda:-1", "CPU", "cuda0"] {
        let quoted = format!("no device is called {name:?}");
        refused(root, &format!("train --device {name}"), &["--device", &quoted, possible]);
        refused(root, &format!("verify {file} --device {name}"), &["--device", &quoted, possible]);
        let toml = folder.path("mine.toml");
        fs::write(&toml, format!("epochs = 1\ndevice = {name:?}\n")).unwrap();
        refused(root, &format!("train --config {}", toml.display()), &["mine.toml", "line 2", &quoted, possible]);
        fs::remove_file(toml).unwrap();
    }
    refused(root, "train --precision f64 --device simt", &["f64 is for --device cpu"]);
    refused(root, &format!("verify {file} --precision f64 --device simt"), &["f64 is for --device cpu"]);
    for precision in ["f16", "bf16", "tf32"] {
        let words = ["the CPU computes in f32 and f64", precision, "--device cuda"];
        refused(root, &format!("train --precision {precision} --device cpu"), &words);
        refused(root, &format!("verify {file} --precision {precision}"), &words);
        if Gpu::open(0).is_err() {
            refused(root, &format!("train --precision {precision}"), &words);
        }
    }
    assert_eq!(names_in(root), [""; 0], "nothing is left behind");
}

#[test]
fn what_the_kernels_cannot_take_is_refused_with_the_flag_that_helps() {
    let folder = Folder::new();
    let data = folder.idx_sized("large", 14_000);
    let flags = "--device simt --batch 12500 --widths 2 --blocks 1 --branches 1 --no-baseline";
    let out = folder.path("run");
    let line = format!("{} {flags}", folder.train(TINY, &data, &out));
    let kernel = "device simt: kernel nearest_neighbours_f32 (nearest_neighbours: ";
    refused(folder.root(), &line, &[kernel, "12500", "bytes of shared memory per block, the limit is", "--batch"]);
    assert!(!out.exists());
    // The CPU has no such limit, and a smaller batch fits.
    let less = line.replace("--batch 12500", "--batch 12400 --epochs 1 --feature-epochs 0");
    let said = mlnt(&less.replace("--device simt", "--device cpu"));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));

    let line = "train --device simt --no-baseline --branches 10000 --group all";
    refused(folder.root(), line, &["device simt: ", " GB of memory: ", " GB are free; --batch, --branches"]);
    let line = "train --device simt --no-baseline --widths 65536 --blocks 1";
    let words = ["fprop: ", "weight[65536, 65536, 3, 3]", "elements of a branch", "32 bits; --batch, "];
    refused(folder.root(), line, &words);
}
