//! `mlnt verify` on golden steps, whole and damaged.

mod program;

use std::fs;
use std::path::Path;

use program::*;
use serde_json::{Value, json};

const FILES: [&str; 4] = ["step_sequential", "step_joint", "step_mentor", "step_bottleneck"];
const GROUPS: [&str; 13] = [
    "logits",
    "target",
    "inner_loss",
    "inner_grad",
    "consistency",
    "meta_grad",
    "meta_grad_first_order",
    "class_loss",
    "param",
    "momentum",
    "buffer",
    "teacher.param",
    "teacher.buffer",
];

/// `verify --json` on a file: the exit status and the object.
fn verdict(file: &Path, precision: &str) -> (Option<i32>, Value) {
    let said = mlnt(&format!("verify {} --precision {precision} --json", file.display()));
    assert_eq!(said.stderr, "");
    (said.status, serde_json::from_str(&said.stdout).unwrap())
}

fn refused(file: &Path, what: &str) {
    let said = mlnt(&format!("verify {}", file.display()));
    assert_eq!((said.status, said.stdout.as_str()), (Some(2), ""), "{what}: {}", said.stderr);
    let error = said.error_line();
    assert!(error.starts_with(&format!("{}: ", file.display())) && error.contains(what), "{what}: {error}");
}

#[test]
fn every_golden_step_passes_in_both_precisions() {
    let files: Vec<String> = FILES.iter().map(|name| golden(name).display().to_string()).collect();
    for (precision, tolerance) in [("f64", 1e-10), ("f32", 1e-5)] {
        let said = mlnt(&format!("verify {} --precision {precision} --device cpu --json", files.join(" ")));
        assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
        let lines: Vec<Value> = said.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), FILES.len());
        for (object, file) in lines.iter().zip(&files) {
            assert_eq!(object["file"], *file);
            assert_eq!((&object["device"], &object["precision"]), (&json!("cpu"), &json!(precision)));
            assert_eq!(object["pass"], true);
            let groups = object["groups"].as_object().unwrap();
            assert_eq!(groups.len(), GROUPS.len());
            let single = precision == "f32";
            for key in ["relu_masks", "pool_choices", "tie_distance", "file_right"] {
                assert_eq!(object.get(key).is_some(), single, "{key} {precision}");
            }
            let count = |kind: &str, key: &str| object[kind][key].as_u64().unwrap_or(0);
            assert_eq!(count("relu_masks", "of") > 0, single);
            assert_eq!(count("pool_choices", "of") > 0, single && file.contains("bottleneck"));
            let moved = count("relu_masks", "differ") + count("pool_choices", "differ") > 0;
            for name in GROUPS {
                let number = |key: &str| groups[name][key].as_f64().unwrap_or_else(|| panic!("{key} of {name}"));
                assert!(number("rel") <= tolerance || moved, "{file} {precision} {name}: {}", number("rel"));
                assert_eq!(groups[name].get("rel_replayed").is_some(), single);
                assert!(!single || number("rel_replayed") <= tolerance, "{file} {name}: {}", groups[name]);
                assert!((1.0 - number("cos")).abs() < 1e-2, "{file} {precision} {name}: {}", number("cos"));
            }
        }
    }
    let table = mlnt(&format!("verify {}", files.join(" "))).stdout;
    for word in GROUPS.iter().copied().chain(files.iter().map(String::as_str)).chain(["relative L2 error", "cosine"]) {
        assert!(table.contains(word), "{word} in {table}");
    }
    assert_eq!(table.lines().filter(|line| *line == "pass").count(), FILES.len());
    assert!(!table.contains("replayed"));
    let table = mlnt(&format!("verify {} --precision f32", files[3])).stdout;
    for words in ["relative L2 error, replayed", "ReLU decisions", "max-pool choices", "from a tie", "\npass\n"] {
        assert!(table.contains(words), "{words} in {table}");
    }
}

#[test]
fn what_must_come_out_must_come_out() {
    let folder = Folder::new();
    let path = folder.path("step.safetensors");
    let whole = SafeTensors::parse(&fs::read(golden("step_joint")).unwrap());
    fs::write(&path, whole.bytes()).unwrap();
    assert_eq!(verdict(&path, "f64").0, Some(0), "taken apart and put together");

    // One value of one tensor in each group, changed in its sixth digit or no number at all.
    let first_of = |group: &str| {
        let inside = |name: &&String| {
            let rest = name.strip_prefix("out.").and_then(|name| name.strip_prefix(group));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        whole.tensors.keys().find(inside).unwrap_or_else(|| panic!("{group}")).clone()
    };
    for group in GROUPS {
        for value in [None, Some(f64::NAN), Some(f64::INFINITY)] {
            let mut file = whole.clone();
            let data = &mut file.tensors.get_mut(&first_of(group)).unwrap().2;
            let largest = |at: &usize| f64::from_le_bytes(data[8 * at..8 * at + 8].try_into().unwrap()).abs();
            let at = (0..data.len() / 8).max_by(|a, b| largest(a).total_cmp(&largest(b))).unwrap();
            let old = f64::from_le_bytes(data[8 * at..8 * at + 8].try_into().unwrap());
            let new = value.unwrap_or(old * (1.0 + 1e-5) + 1e-9);
            data[8 * at..8 * at + 8].copy_from_slice(&new.to_le_bytes());
            fs::write(&path, file.bytes()).unwrap();
            let (status, object) = verdict(&path, "f64");
            assert_eq!((status, &object["pass"]), (Some(1), &json!(false)), "{group} {value:?}: {object}");
            let failed: Vec<&str> = GROUPS
                .into_iter()
                .filter(|name| object["groups"][name]["rel"].as_f64().is_none_or(|rel| rel > 1e-10))
                .collect();
            assert_eq!(failed, [group], "{value:?}: {object}");
        }
    }
    // In single precision too, whatever the ReLUs do.
    let mut file = whole.clone();
    let name = first_of("meta_grad");
    file.tensors.get_mut(&name).unwrap().2.chunks_exact_mut(8).for_each(|v| v[7] ^= 0x80);
    fs::write(&path, file.bytes()).unwrap();
    let (status, object) = verdict(&path, "f32");
    assert_eq!((status, &object["file_right"]), (Some(1), &json!(false)));
    assert!(object["groups"]["meta_grad"]["rel_replayed"].as_f64().unwrap() <= 1e-5, "the engine is right: {object}");
    let table = mlnt(&format!("verify {}", path.display()));
    assert_eq!(table.status, Some(1));
    assert!(table.stdout.contains("FAIL"));

    // Inputs that are no numbers give outputs that are none; that is a failure and no pass.
    for name in ["in.x", "in.param.conv1.weight", "in.teacher.param.linear.bias"] {
        for (value, precision) in [(f32::NAN, "f64"), (f32::INFINITY, "f32")] {
            let mut file = whole.clone();
            file.tensors.get_mut(name).unwrap().2[..4].copy_from_slice(&value.to_le_bytes());
            fs::write(&path, file.bytes()).unwrap();
            let (status, object) = verdict(&path, precision);
            assert_eq!((status, &object["pass"]), (Some(1), &json!(false)), "{name} {value}: {object}");
        }
    }
    // One bad file among good ones.
    let (good, line) = (golden("step_joint"), |a: &Path, b: &Path| format!("verify {} {}", a.display(), b.display()));
    assert_eq!(mlnt(&line(&good, &path)).status, Some(1));
    assert_eq!(mlnt(&line(&path, &good)).status, Some(1));
    fs::write(&path, "").unwrap();
    assert_eq!(mlnt(&line(&good, &path)).status, Some(2));
}

#[test]
fn a_file_that_is_no_golden_step_is_refused() {
    let folder = Folder::new();
    let path = folder.path("step.safetensors");
    refused(&path, "No such file");
    refused(folder.root(), "directory");
    fs::write(&path, "a text\n".repeat(100)).unwrap();
    refused(&path, "not a safetensors file");
    let bytes = fs::read(golden("step_joint")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let lengths = (0..12).chain([header / 2, header - 1, header, header + 1, bytes.len() / 2, bytes.len() - 1]);
    for length in lengths.chain((1..20).map(|i| bytes.len() * i / 20)) {
        fs::write(&path, &bytes[..length]).unwrap();
        refused(&path, "");
    }
    fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
    refused(&path, "");
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
    refused(&path, "");

    let whole = SafeTensors::parse(&bytes);
    let edited = |edit: &dyn Fn(&mut SafeTensors), what: &str| {
        let mut file = whole.clone();
        edit(&mut file);
        fs::write(&path, file.bytes()).unwrap();
        refused(&path, what);
    };
    for name in whole.tensors.keys().filter(|name| name.matches('.').count() == 1 || name.contains("bn.")) {
        let without = |file: &mut SafeTensors| drop(file.tensors.remove(name));
        edited(&without, &format!("tensor {name} is missing"));
    }
    let transposed = |file: &mut SafeTensors| file.tensors.get_mut("in.x").unwrap().1.reverse();
    edited(&transposed, "tensor in.x has shape [12, 12, 3, 6], expected [6, 3, 12, 12]");
    let flat = |file: &mut SafeTensors| file.tensors.get_mut("out.param.linear.weight").unwrap().1 = vec![160];
    edited(&flat, "tensor out.param.linear.weight has shape [160], expected [5, 32]");
    let shorter = |file: &mut SafeTensors| {
        let tensor = file.tensors.get_mut("in.momentum.linear.bias").unwrap();
        (tensor.1, tensor.2) = (vec![4], tensor.2[..16].to_vec());
    };
    edited(&shorter, "tensor in.momentum.linear.bias has shape [4], expected [5]");
    let whole_numbers = |file: &mut SafeTensors| file.tensors.get_mut("out.logits").unwrap().0 = "I64".into();
    edited(&whole_numbers, "tensor out.logits does not hold reals");
    let halves = |file: &mut SafeTensors| {
        let tensor = file.tensors.get_mut("in.param.linear.bias").unwrap();
        (tensor.0, tensor.2) = ("F16".into(), vec![0; 10]);
    };
    edited(&halves, "tensor in.param.linear.bias has type");
    for (name, value, limit) in [("in.y", 5i64, 5), ("in.y", -1, 5), ("in.y_syn", i64::MAX, 5), ("in.y_syn", 5, 5)] {
        let label = |file: &mut SafeTensors| {
            file.tensors.get_mut(name).unwrap().2[..8].copy_from_slice(&value.to_le_bytes());
        };
        edited(&label, &format!("tensor {name} holds {value}, expected 0..{limit}"));
    }
    let kept = |value: u8| move |file: &mut SafeTensors| file.tensors.get_mut("in.keep").unwrap().2.fill(value);
    edited(&kept(2), "in.keep");
    edited(&kept(0), "in.keep");

    let config = |edit: &dyn Fn(&mut Value), what: &str| {
        let change = |file: &mut SafeTensors| {
            let mut config: Value = serde_json::from_str(&file.metadata["config"]).unwrap();
            edit(&mut config);
            file.metadata.insert("config".into(), config.to_string());
        };
        edited(&change, what);
    };
    edited(&|file| drop(file.metadata.remove("config")), "config");
    edited(&|file| drop(file.metadata.insert("config".into(), "{".into())), "config");
    edited(&|file| drop(file.metadata.insert("config".into(), "[]".into())), "config");
    let keys = ["format", "arch", "in_channels", "size", "classes", "widths", "blocks", "batch", "branches", "update"];
    for key in keys.into_iter().chain(["kl", "alpha", "eta", "lr", "momentum", "weight_decay", "gamma", "mentor"]) {
        config(&|c| drop(c.as_object_mut().unwrap().remove(key)), key);
        config(&|c| c[key] = json!({}), "config");
    }
    config(&|c| c["format"] = json!("mlnt-step-2"), "mlnt-step-2");
    config(&|c| c["arch"] = json!("vgg"), "vgg");
    config(&|c| c["update"] = json!("both"), "both");
    config(&|c| c["kl"] = json!("sum"), "sum");
    for (key, value) in [("batch", json!(0)), ("branches", json!(0)), ("classes", json!(1)), ("in_channels", json!(0))]
    {
        config(&|c| c[key] = value.clone(), "");
    }
    config(&|c| c["widths"] = json!([]), "widths");
    config(&|c| c["widths"] = json!([8, 0, 32]), "widths");
    config(&|c| c["blocks"] = json!([1, 1]), "blocks");
    config(&|c| c["widths"] = json!([8, 16, 31]), "expected");
    config(&|c| c["mentor"] = json!(true), "mentor.");
    config(&|c| c["arch"] = json!("resnet_bottleneck"), "tensor");
    // Sizes that no memory holds: refused before anything of that size is made.
    for huge in [1u64 << 20, 1 << 31, 1 << 40, 1 << 62, u64::MAX] {
        for key in ["batch", "branches", "classes", "in_channels"] {
            config(&|c| c[key] = json!(huge), "");
        }
        config(&|c| c["size"] = json!([huge, huge]), "");
        config(&|c| c["widths"] = json!([huge, huge, huge]), "");
        config(&|c| c["blocks"] = json!([huge, huge, huge]), "");
    }
    config(&|c| (c["widths"], c["blocks"]) = (json!(vec![8; 100]), json!(vec![1; 100])), "stages");
}
