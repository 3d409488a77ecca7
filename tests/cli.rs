//! The command line, run as a person runs it: help, plans, wrong usage, output that nobody reads.

mod program;

use program::*;
use serde_json::Value;

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
    let hopper = mlnt("plan --device simt --precision f16 --kernels hopper --json --launches").stdout;
    assert!(hopper.contains("conv2d_wgmma_fprop") && !listed.to_string().contains("wgmma"), "{hopper}");
    // The first stage of the step, with what is made of δ and without.
    for kernel in ["conv2d_wgmma_joint_f16", "conv2d_wgmma_joint_pair_f16"] {
        assert!(hopper.contains(kernel), "{hopper}");
    }
    refused("plan --launches", &["--json"]);
    // What is counted only is no flag of what is timed.
    refused("bench-step --as-trained", &["--as-trained"]);
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
