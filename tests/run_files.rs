//! Files of a run: whole or not there, back bit for bit, and one clear line when they are damaged.

use std::path::Path;

use mlnt::fs::{create_run_dir, write_atomic};
use mlnt::train::checkpoint::{
    Checkpoint, Dtype, NamedTensor, TensorData, TensorSpec, load_model, match_tensors, read_model, save_model,
};
use mlnt::train::metrics::{EpochRecord, Phase};
use mlnt::train::preset::Preset;
use mlnt::train::run_dir::{JsonLines, RunDir, free_name};
use serde_json::{Value, json};

fn tensor(name: &str, shape: &[usize], data: TensorData) -> NamedTensor {
    NamedTensor { name: name.into(), shape: shape.to_vec(), data }
}

/// Values of every type, the awkward ones among them.
fn checkpoint() -> Checkpoint {
    let f32s = vec![0.1, -0.0, f32::MIN_POSITIVE / 2.0, f32::MAX, f32::INFINITY, 3.0];
    Checkpoint {
        tensors: vec![
            tensor("bytes", &[3], TensorData::U8(vec![0, 127, 255])),
            tensor("conv1.weight", &[2, 3], TensorData::F32(f32s)),
            tensor("empty", &[0, 4], TensorData::F32(vec![])),
            tensor("exact", &[2], TensorData::F64(vec![1.0 / 3.0, 5e-324])),
            tensor("layer1.0.bn1.num_batches_tracked", &[], TensorData::I64(vec![i64::MIN])),
        ],
        meta: json!({"epoch": 3, "arch": "preact", "zeta": [1, 2], "alpha": {"b": 1, "a": 2}}),
    }
}

fn specs(tensors: &[NamedTensor]) -> Vec<TensorSpec> {
    let spec = |t: &NamedTensor| TensorSpec { name: t.name.clone(), shape: t.shape.clone(), dtype: t.data.dtype() };
    tensors.iter().map(spec).collect()
}

/// The message of an error about `path`, without the path in front, on one line.
fn about<T: std::fmt::Debug>(path: &Path, result: mlnt::Result<T>) -> String {
    let error = result.expect_err("an error");
    assert_eq!(error.exit_code(), 2, "{error}");
    let line = error.to_string();
    assert!(!line.contains('\n'), "one line: {line}");
    line.strip_prefix(&format!("{}: ", path.display())).unwrap_or_else(|| panic!("names the file: {line}")).into()
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_atomic_write_replaces_the_file_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    write_atomic(&path, b"old").unwrap();
    write_atomic(&path, b"new").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(names_in(folder.path()), ["file"]);
}

#[cfg(unix)]
#[test]
fn a_written_file_has_the_permissions_of_any_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
    write_atomic(&ours, b"").unwrap();
    std::fs::write(&plain, b"").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&plain));
}

#[test]
fn a_write_that_fails_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    // The rename fails: the target is a folder that is not empty.
    let target = folder.path().join("target");
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("old"), b"old").unwrap();
    about(&target, write_atomic(&target, b"new"));
    assert_eq!(names_in(folder.path()), ["target"], "no temporary file stays");
    assert_eq!(std::fs::read(target.join("old")).unwrap(), b"old");
    // The folder does not exist.
    let nowhere = folder.path().join("no/such/file");
    about(&nowhere, write_atomic(&nowhere, b"new"));
    assert!(!folder.path().join("no").exists());
}

#[test]
fn a_run_directory_is_made_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b/run");
    create_run_dir(&path).unwrap();
    let expected =
        format!("this run directory exists; choose another --out or continue it with --resume {}", path.display());
    assert_eq!(about(&path, create_run_dir(&path)), expected);

    let mut config = Preset::Small.config();
    config.out = Some(path.clone());
    assert_eq!(about(&path, RunDir::create(&config)), expected);
    assert_eq!(about(&path, RunDir::open(&path)), "not a run directory: it has no config.toml");
    let missing = folder.path().join("missing");
    assert_eq!(about(&missing, RunDir::open(&missing)), "no such run directory");

    config.out = Some(folder.path().join("new"));
    let run = RunDir::create(&config).unwrap();
    let reopened = RunDir::open(run.path()).unwrap();
    config.out = None;
    assert_eq!(mlnt::train::config::Config::load(&reopened.config()).unwrap(), config);
}

#[test]
fn names_of_runs_are_free_names() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Preset::Small.config();
    let next = |config: &_| {
        let path = free_name(folder.path(), config);
        create_run_dir(&path).unwrap();
        path.file_name().unwrap().to_str().unwrap().to_string()
    };
    assert_eq!(next(&config), "sample-symmetric-0.5-s1");
    assert_eq!(next(&config), "sample-symmetric-0.5-s1-2");
    assert_eq!(next(&config), "sample-symmetric-0.5-s1-3");
    config.data = "/data/cifar-10.bin/".into();
    config.noise = mlnt::data::NoiseKind::None;
    config.seed = 7;
    assert_eq!(next(&config), "cifar-10.bin-none-s7");
    config.data = "..".into();
    assert_eq!(next(&config), "data-none-s7");
}

#[test]
fn a_checkpoint_comes_back_bit_for_bit_and_its_bytes_are_always_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let saved = checkpoint();
    saved.save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let loaded = Checkpoint::load(&path).unwrap();
    assert_eq!(loaded, saved);
    let Some(TensorData::F32(values)) = loaded.tensors.get(1).map(|t| t.data.clone()) else { panic!("conv1.weight") };
    assert!(values[1].is_sign_negative(), "-0 stays -0");

    let mut shuffled = saved.clone();
    shuffled.tensors.reverse();
    shuffled.save(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn a_checkpoint_cut_short_anywhere_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    checkpoint().save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for len in 0..bytes.len() {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = about(&path, Checkpoint::load(&path));
        assert!(error.starts_with("cut short"), "{len} bytes: {error}");
    }
    std::fs::write(&path, [bytes.as_slice(), b"more"].concat()).unwrap();
    assert!(about(&path, Checkpoint::load(&path)).starts_with("cut short or overlong"));
}

#[test]
fn other_files_are_not_taken_for_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "Fashion is a form of self-expression.").unwrap();
    assert!(about(&path, Checkpoint::load(&path)).starts_with("not a safetensors file"));
    let mut bytes = 8u64.to_le_bytes().to_vec();
    bytes.extend(b"[1,2,3] ");
    std::fs::write(&path, &bytes).unwrap();
    assert!(about(&path, Checkpoint::load(&path)).starts_with("not a safetensors file"));

    save_model(&path, &checkpoint().tensors, &Value::Null).unwrap();
    let error = about(&path, Checkpoint::load(&path));
    assert_eq!(error, "format mlnt-model-1; this program reads mlnt-checkpoint-1 here");
    let newer: Vec<u8> = std::fs::read(&path).unwrap();
    let position = newer.windows(12).position(|bytes| bytes == b"mlnt-model-1").unwrap();
    let newer = [&newer[..position + 11], b"2", &newer[position + 12..]].concat();
    std::fs::write(&path, newer).unwrap();
    let error = about(&path, read_model(&path));
    assert_eq!(error, "format mlnt-model-2; this program reads mlnt-model-1 here");

    // A file of another program, with a dtype that is of no use here.
    let half = safetensors::tensor::TensorView::new(Dtype::F16, vec![1], &[0, 0]).unwrap();
    std::fs::write(&path, safetensors::serialize([("w", &half)], None).unwrap()).unwrap();
    let error = about(&path, Checkpoint::load(&path));
    assert_eq!(error, "tensor w has dtype F16; this program reads F32, F64, I64 and U8");
    let one = safetensors::tensor::TensorView::new(Dtype::U8, vec![1], &[7]).unwrap();
    std::fs::write(&path, safetensors::serialize([("w", &one)], None).unwrap()).unwrap();
    let error = about(&path, Checkpoint::load(&path));
    assert_eq!(error, "a safetensors file, but no checkpoint of this program");
    assert_eq!(read_model(&path).unwrap(), (vec![tensor("w", &[1], TensorData::U8(vec![7]))], Value::Null));
}

#[test]
fn damaged_bytes_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    checkpoint().save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for position in 0..bytes.len() {
        for change in [b'9', b'"', 0xff] {
            let mut damaged = bytes.clone();
            damaged[position] = change;
            std::fs::write(&path, &damaged).unwrap();
            if let Err(error) = Checkpoint::load(&path) {
                assert_eq!(error.exit_code(), 2, "{error}");
            }
        }
    }
}

#[test]
fn a_network_of_another_architecture_is_named_with_both_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("student.safetensors");
    let tensors = checkpoint().tensors;
    save_model(&path, &tensors, &json!({"arch": "preact"})).unwrap();

    let mut expected = specs(&tensors);
    expected.reverse();
    let (loaded, metadata) = load_model(&path, &expected).unwrap();
    assert_eq!(
        loaded.iter().map(|t| &t.name).collect::<Vec<_>>(),
        expected.iter().map(|s| &s.name).collect::<Vec<_>>()
    );
    assert_eq!(metadata, json!({"arch": "preact"}));

    let message = |expected: &[TensorSpec]| about(&path, load_model(&path, expected));
    let mut wider = specs(&tensors);
    wider[1].shape = vec![4, 3];
    let start = "a checkpoint of another architecture: ";
    assert_eq!(message(&wider), format!("{start}tensor conv1.weight has shape [2, 3], the network needs [4, 3]"));
    let mut double = specs(&tensors);
    double[1].dtype = Dtype::F64;
    let what = "tensor conv1.weight of shape [2, 3] has dtype F32, the network needs F64";
    assert_eq!(message(&double), format!("{start}{what}"));
    let mut deeper = specs(&tensors);
    deeper.push(TensorSpec { name: "linear.bias".into(), shape: vec![10], dtype: Dtype::F32 });
    assert_eq!(message(&deeper), format!("{start}it has no tensor linear.bias of shape [10]"));
    let shallower = specs(&tensors[1..]);
    let what = "it has a tensor bytes of shape [3], which the network does not";
    assert_eq!(message(&shallower), format!("{start}{what}"));
    assert_eq!(match_tensors(&path, tensors.clone(), &specs(&tensors)).unwrap(), tensors);
}

#[test]
fn tensors_that_contradict_themselves_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("student.safetensors");
    let one = tensor("w", &[2], TensorData::F32(vec![1.0]));
    assert_eq!(about(&path, save_model(&path, &[one], &Value::Null)), "tensor w: 1 values for shape [2]");
    let twice = [tensor("w", &[1], TensorData::U8(vec![1])), tensor("w", &[1], TensorData::U8(vec![2]))];
    assert_eq!(about(&path, save_model(&path, &twice, &Value::Null)), "tensor w comes twice");
    assert!(!path.exists());
}

fn record(epoch: usize) -> EpochRecord {
    EpochRecord {
        phase: Phase::Mlnt,
        iteration: Some(1),
        epoch,
        lr: 0.05,
        eta: 2.0,
        train_loss: 1.0 / epoch as f64,
        meta_loss: Some(0.25),
        train_accuracy: 0.5,
        val_accuracy: Some(0.4),
        test_accuracy: Some(0.7),
        teacher_val_accuracy: None,
        teacher_test_accuracy: None,
        kept: None,
        overflows: None,
        skipped: Some(0),
    }
}

#[test]
fn the_metrics_of_a_resumed_run_equal_those_of_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole.jsonl"), folder.path().join("broken.jsonl"));
    let mut lines = JsonLines::create(&whole).unwrap();
    for epoch in 1..=4 {
        lines.append(&record(epoch)).unwrap();
    }
    let mut lines = JsonLines::create(&broken).unwrap();
    lines.append(&record(1)).unwrap();
    lines.append(&record(2)).unwrap();
    let len = lines.sync().unwrap();
    lines.append(&record(3)).unwrap();
    drop(lines);
    let torn = [std::fs::read(&broken).unwrap().as_slice(), b"{\"phase\":\"ml"].concat();
    std::fs::write(&broken, torn).unwrap();

    let mut lines = JsonLines::resume(&broken, len).unwrap();
    for epoch in 3..=4 {
        lines.append(&record(epoch)).unwrap();
    }
    assert_eq!(lines.sync().unwrap(), std::fs::metadata(&whole).unwrap().len());
    assert_eq!(std::fs::read(&broken).unwrap(), std::fs::read(&whole).unwrap());
    let text = std::fs::read_to_string(&whole).unwrap();
    let read: Vec<EpochRecord> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(read[1], record(2));
}

#[test]
fn metrics_that_do_not_fit_the_checkpoint_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    std::fs::write(&path, "{}\n{}\n").unwrap();
    assert_eq!(about(&path, JsonLines::resume(&path, 7)), "cut short: 6 bytes, the checkpoint counts 7");
    assert!(about(&path, JsonLines::resume(&path, 4)).starts_with("changed: no line ends at byte 4"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{}\n{}\n", "an error changes nothing");
    about(&path, JsonLines::create(&path));
    about(&folder.path().join("none"), JsonLines::resume(folder.path().join("none"), 0));
}
