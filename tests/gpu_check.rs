//! `scripts/gpu_check.py` end to end: on the SIMT host machine, and on a card that is the SIMT host machine in disguise.
//!
//! Skipped without python3 or without the machine.

#![cfg(unix)]

use mlnt::device::cuda::embedded::has_simt;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MLNT: &str = env!("CARGO_BIN_EXE_mlnt");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether the script can be tried here.
fn possible() -> bool {
    let python = Command::new("python3").arg("--version").output().is_ok_and(|o| o.status.success());
    if !python || !has_simt() {
        println!("skipped: no python3, or built without the SIMT host machine");
    }
    python && has_simt()
}

struct Ended {
    status: i32,
    text: String,
    report: Option<Value>,
}

impl Ended {
    /// The result of a line of the summary.
    fn result(&self, what: &str) -> &str {
        let summary = self.report.as_ref().unwrap()["summary"].as_array().unwrap();
        let found = summary.iter().find(|row| row["what"] == what);
        found.unwrap_or_else(|| panic!("no {what} in\n{}", self.text))["result"].as_str().unwrap()
    }
}

/// Runs the script, with `folder` first in the PATH.
fn gpu_check(folder: &Path, mlnt: &Path, golden: &Path, arguments: &[&str]) -> Ended {
    let out = folder.join("results/out.json");
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("python3");
    command.arg(root().join("scripts/gpu_check.py")).arg(mlnt).arg(golden).arg("--out").arg(&out);
    let output = command.args(arguments).env("PATH", path).output().unwrap();
    let text = [output.stdout, output.stderr].map(|t| String::from_utf8(t).unwrap()).concat();
    let report = std::fs::read_to_string(&out).ok().map(|text| serde_json::from_str(&text).unwrap());
    Ended { status: output.status.code().unwrap(), text, report }
}

fn executable(path: PathBuf, text: &str) -> PathBuf {
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A folder of one golden step; a `broken` one says that something else comes out.
fn golden(folder: &Path, broken: bool) -> PathBuf {
    let to = folder.join("golden");
    std::fs::create_dir(&to).unwrap();
    let mut bytes = std::fs::read(root().join("golden/step_joint.safetensors")).unwrap();
    if broken {
        let end = bytes.len() - 8;
        bytes[end..].copy_from_slice(&1e3f64.to_le_bytes());
    }
    std::fs::write(to.join("step_joint.safetensors"), bytes).unwrap();
    to
}

#[test]
fn a_selection_passes_on_the_simt_machine() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let golden = golden(folder.path(), false);
    let only = ["--only", "n2 c3", "--per-operation", "1", "--precision", "f32,f16"];
    let arguments = [&["--device", "simt", "--parts", "check,verify,bench,sanitizer"], &only[..]].concat();
    let ended = gpu_check(folder.path(), Path::new(MLNT), &golden, &arguments);
    assert_eq!(ended.status, 0, "{}", ended.text);
    for what in ["operations, f16", "operations, any precision", "golden steps, f32", "time of a step, f16"] {
        assert_eq!(ended.result(what), "pass", "{}", ended.text);
    }
    assert_eq!(ended.result("sanitizer"), "not run");
    assert!(ended.text.contains("pass: 7 ran, 0 failed, 1 not run"), "{}", ended.text);
    let report = ended.report.unwrap();
    assert_eq!((&report["pass"], &report["card"]), (&Value::Bool(true), &Value::Null));
    assert_eq!(report["verify"].as_array().unwrap().len(), 2);
    assert_eq!(report["verify"][0]["file"], "step_joint.safetensors");
    let worst = report["check"].as_array().unwrap().iter().map(|row| row["worst"].as_f64().unwrap());
    assert!(worst.fold(0.0, f64::max) > 1e-5, "f16 rounds");
    assert_eq!(report["binary_sha256"].as_str().unwrap().len(), 64);
}

#[test]
fn a_golden_step_that_does_not_come_out_fails() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let golden = golden(folder.path(), true);
    let arguments = ["--device", "simt", "--parts", "verify", "--precision", "f32"];
    let ended = gpu_check(folder.path(), Path::new(MLNT), &golden, &arguments);
    assert_eq!((ended.status, ended.result("golden steps, f32")), (1, "FAIL"), "{}", ended.text);
    assert!(ended.text.contains("FAIL: golden steps, f32: step_joint.safetensors: "), "{}", ended.text);
    assert_eq!(ended.report.unwrap()["pass"], false);
}

/// The program, but its `info` shows a card, on which it runs what it is told to run on `cuda`.
fn disguised(folder: &Path, check: &str) -> PathBuf {
    let text = format!(
        r#"#!/usr/bin/env python3
import json, subprocess, sys
given = ["simt" if a.startswith("cuda") else a for a in sys.argv[1:]]
if given[0] == "info":
    info = json.loads(subprocess.run([{MLNT:?}, *given], capture_output=True).stdout)
    info["cards"] = [{{"device": "cuda:0", "name": "NVIDIA X 1", "compute_capability": "9.0", "kernels": ["sm_90a"]}}]
    print(json.dumps(info))
    sys.exit(0)
{check}
sys.exit(subprocess.run([{MLNT:?}, *given]).returncode)
"#
    );
    executable(folder.join("disguised"), &text)
}

#[test]
fn on_a_card_the_sanitizers_errors_count_and_silence_is_no_pass() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let sanitizer = r#"#!/bin/sh
case "$2" in
memcheck | initcheck) echo "========= ERROR SUMMARY: 0 errors" ;;
racecheck) echo "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)" ;;
*) echo "========= the card is not supported"; exit 1 ;;
esac
"#;
    executable(folder.path().join("compute-sanitizer"), sanitizer);
    executable(folder.path().join("nvidia-smi"), "#!/bin/sh\necho 123.45\n");
    let mlnt = disguised(folder.path(), "");
    let arguments = ["--parts", "check,sanitizer", "--only", "kl_grad n7", "--precision", "f32"];
    let ended = gpu_check(folder.path(), &mlnt, &root().join("golden"), &arguments);
    assert_eq!(ended.status, 1, "{}", ended.text);
    let results = ["operations, any precision", "memcheck", "initcheck", "racecheck", "synccheck"];
    assert_eq!(results.map(|what| ended.result(what)), ["pass", "pass", "pass", "FAIL", "not run"], "{}", ended.text);
    assert!(ended.text.contains("FAIL: racecheck: 2 errors"), "{}", ended.text);
    let report = ended.report.unwrap();
    assert_eq!((&report["card"], &report["driver"]), (&"NVIDIA X 1".into(), &"123.45".into()));
    assert_eq!(report["compute_capability"], "9.0");
}

#[test]
fn a_check_that_hangs_or_breaks_off_fails_and_what_it_said_before_counts() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // A row of Python's, which is JSON but for the words for nothing.
    let failure = r#"{"case": "relu a", "fault": "accuracy", "what": "far"}"#;
    let row = format!(
        r#"{{"what": "relu", "precision": None, "cases": 2, "failed": 1, "worst": None, "tolerance": 0.0, "seconds": 0.1,
        "failures": [{failure}]}}"#
    );
    let hang = format!("import time\nprint(json.dumps({row}), flush=True)\ntime.sleep(600)\n");
    let mlnt = disguised(folder.path(), &hang);
    let ended = gpu_check(folder.path(), &mlnt, &root().join("golden"), &["--parts", "check,verify", "--budget", "3"]);
    assert_eq!(ended.status, 1, "{}", ended.text);
    assert!(ended.text.contains("FAIL: operations, any precision: relu a: accuracy: far"), "{}", ended.text);
    assert!(ended.text.contains("FAIL: check ran to its end: no end within"), "{}", ended.text);
    assert_eq!(ended.result("verify"), "not run");
}

#[test]
fn without_a_card_nothing_is_checked() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let ended = gpu_check(folder.path(), Path::new(MLNT), folder.path(), &["--device", "cuda:99"]);
    assert_eq!(ended.status, 2, "{}", ended.text);
    assert!(ended.text.contains("gpu_check: no device cuda:99: "), "{}", ended.text);
    assert!(ended.report.is_none());
}
