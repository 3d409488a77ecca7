//! `mlnt eval` and `mlnt predict`: what they say of a trained network, and files that are none.

mod program;

use std::fs;

use program::*;
use serde_json::{Value, json};

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
