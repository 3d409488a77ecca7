//! Settings: precedence of preset, file and flags, and one clear line for everything that cannot work.

use std::path::{Path, PathBuf};

use clap::Parser;
use mlnt::cli::{Cli, Command};
use mlnt::data::NoiseKind;
use mlnt::train::choice::{DeviceKind, Method, Precision, PrecisionChoice, Recipe};
use mlnt::train::config::{Config, Overrides};
use mlnt::train::preset::Preset;
use tempfile::TempDir;

/// The settings of `mlnt train ARGS`.
fn train(args: &str) -> mlnt::Result<Config> {
    let words = ["mlnt", "train"].into_iter().chain(args.split_whitespace());
    match Cli::try_parse_from(words).expect("the line is well-formed").command {
        Command::Train(args) => args.config(),
        other => panic!("{other:?}"),
    }
}

/// A file with `text` in a folder that lives as long as the first value.
fn toml(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("mine.toml");
    std::fs::write(&path, text).expect("a file is written");
    (folder, path)
}

/// The error of a file with `text`, without the file's path, which must stand in front.
fn file_error(text: &str) -> String {
    let (_folder, path) = toml(text);
    let error = Config::resolve(Some(&path), &Overrides::default()).expect_err(text);
    assert_eq!(error.exit_code(), 2, "{error}");
    let line = error.to_string();
    assert!(!line.contains('\n'), "one line: {line}");
    line.strip_prefix(&format!("{}: ", path.display())).unwrap_or_else(|| panic!("names the file: {line}")).to_string()
}

#[test]
fn presets_are_valid() {
    for preset in [Preset::Small, Preset::Cifar10] {
        preset.config().validate().unwrap();
    }
    assert_eq!(train("").unwrap(), Preset::Small.config());
}

#[test]
fn cifar10_has_the_papers_values() {
    let config = train("--preset cifar10").unwrap();
    assert_eq!((config.widths.as_slice(), config.blocks.as_slice()), (&[32, 64, 128][..], &[5, 5, 5][..]));
    assert_eq!((config.batch, config.branches, config.neighbours, config.rho), (128, 10, 10, 0.5));
    assert_eq!((config.alpha, config.eta, config.eta_ramp), (0.2, 0.4, 20.0));
    assert_eq!((config.lr, config.lr_drop_epochs.as_slice(), config.epochs), (0.2, &[80][..], 120));
    assert_eq!((config.momentum, config.weight_decay, config.recipe), (0.9, 1e-4, Recipe::Paper));
}

#[test]
fn flags_go_before_the_file_and_the_file_before_the_preset() {
    let (_folder, path) = toml("preset = 'cifar10'\nrho = 0.25\nbatch = 32\nnoise = 'pair'\nout = 'there'\n");
    let config = train(&format!("--config {} --batch 16", path.display())).unwrap();
    assert_eq!(config.epochs, 120, "the preset of the file");
    assert_eq!((config.rho, config.noise), (0.25, NoiseKind::Pair), "the file");
    assert_eq!(config.batch, 16, "the flag");
    assert_eq!(config.out.as_deref(), Some(Path::new("there")));

    let config = train(&format!("--config {} --preset small", path.display())).unwrap();
    assert_eq!((config.widths.as_slice(), config.batch), (&[16, 32, 64][..], 32), "the flag's preset, then the file");
}

#[test]
fn settings_of_the_iterations_come_from_file_and_flags() {
    let (_folder, path) =
        toml("iterations = 2\ntau = 0.5\nlambda = 0.25\nlambda-ramp = 3.0\nmethod = 'iterative-ce'\n");
    let config = train(&format!("--config {} --iterations 3 --lambda 1", path.display())).unwrap();
    assert_eq!((config.iterations, config.method), (3, Method::IterativeCe));
    assert_eq!((config.tau, config.lambda, config.lambda_ramp), (0.5, 1.0, 3.0));
    let preset = train("--preset cifar10").unwrap();
    assert_eq!((preset.iterations, preset.tau, preset.lambda, preset.lambda_ramp), (1, 0.01, 0.5, 20.0));
    assert!(file_error("method = 'magic'").starts_with("line 1: `method`: unknown variant `magic`"));
    assert!(file_error("iterations = 1.5").starts_with("line 1: `iterations`: invalid type"));
    let (_folder, path) = toml("tau = 2.0");
    let error = Config::resolve(Some(&path), &Overrides::default()).unwrap_err();
    assert_eq!(error.to_string(), "--tau 2: takes a number from 0 to 1");
}

#[test]
fn co_teaching_forgets_the_noise_rate_unless_told() {
    assert_eq!(train("--noise-rate 0.3").unwrap().forget_rate, 0.3);
    assert_eq!(train("--noise none").unwrap().forget_rate, 0.2);
    assert_eq!(train("--labels somebody.csv").unwrap().forget_rate, 0.2);
    assert_eq!(train("--noise-rate 0.3 --forget-rate 0.45").unwrap().forget_rate, 0.45);
    let (_folder, path) = toml("method = 'co-teaching'\nforget-rate = 0.1\n");
    let config = train(&format!("--config {} --noise-rate 0.4", path.display())).unwrap();
    assert_eq!((config.method, config.forget_rate), (Method::CoTeaching, 0.1));
}

#[test]
fn the_other_methods_have_their_papers_values() {
    let config = train("--preset cifar10 --method joint-opt").unwrap();
    assert_eq!((config.method, config.joint_alpha, config.joint_beta), (Method::JointOpt, 1.2, 0.8));
    assert_eq!((config.joint_lr, config.joint_memory), (0.08, 10));
    assert_eq!(mlnt::train::by_logits::first_label_update(&Config { epochs: 200, ..config }), 70);
    let config = train("--preset cifar10 --method elr").unwrap();
    assert_eq!((config.method, config.elr_beta, config.elr_lambda), (Method::Elr, 0.7, 3.0));
    assert_eq!((config.forget_rate, config.forget_ramp), (0.5, 10.0));
}

#[test]
fn drops_of_the_preset_follow_the_number_of_epochs() {
    assert_eq!(train("--preset cifar10 --epochs 60").unwrap().lr_drop_epochs, [40]);
    assert_eq!(train("--epochs 1").unwrap().lr_drop_epochs, [0; 0]);
    assert_eq!(train("--epochs 9 --lr-drop-epochs 3,8").unwrap().lr_drop_epochs, [3, 8]);
}

#[test]
fn the_written_configuration_comes_back_bit_for_bit() {
    let mut config = train("--preset cifar10 --rho 0.1 --weight-decay 1e-300 --lr 0.30000000000000004").unwrap();
    config.eta = 1.0 / 3.0;
    let text = config.to_toml().unwrap();
    let (_folder, path) = toml(&text);
    assert_eq!(Config::load(&path).unwrap(), config);
    assert_eq!(Config::resolve(Some(&path), &Overrides::default()).unwrap(), config, "also as --config");
    assert_eq!(text.lines().count(), mlnt::train::config::keys().len());
}

#[test]
fn a_run_configuration_must_be_complete_and_in_range() {
    let text = Preset::Small.config().to_toml().unwrap();
    let load = |text: &str| {
        let (_folder, path) = toml(text);
        Config::load(&path).unwrap_err().to_string()
    };
    let without_rho: String = text.lines().filter(|line| !line.starts_with("rho")).map(|l| format!("{l}\n")).collect();
    assert!(load(&without_rho).ends_with("missing field `rho`"), "{}", load(&without_rho));
    let out_of_range = text.replace("rho = 0.5", "rho = 1.5");
    assert!(load(&out_of_range).contains("mine.toml: --rho 1.5: takes"), "{}", load(&out_of_range));
    assert!(load(&format!("{text}preset = 'small'\n")).contains("unknown key `preset`"));
}

#[test]
fn unknown_keys_are_named_with_near_matches() {
    assert_eq!(
        file_error("rho = 0.5\nnoise_rate = 0.1\n"),
        "line 2: unknown key `noise_rate`; did you mean `noise-rate`?"
    );
    assert!(file_error("neighbors = 3").starts_with("line 1: unknown key `neighbors`; did you mean `neighbours`"));
    assert_eq!(file_error("quantum = 1"), "line 1: unknown key `quantum`; `mlnt train --help` lists the names");
    assert!(file_error("\n[model]\nwidths = [1]").starts_with("line 2: unknown key `model`"));
}

#[test]
fn wrong_types_are_named_with_line_and_key() {
    let cases = [
        ("epochs = 3\nrho = 'half'", "line 2: `rho`: invalid type: string \"half\", expected f64"),
        ("batch = 1.5", "line 1: `batch`: invalid type: floating point `1.5`, expected usize"),
        ("batch = -1", "line 1: `batch`: invalid value: integer `-1`, expected usize"),
        ("first-order = 1", "line 1: `first-order`: invalid type: integer `1`, expected a boolean"),
        ("widths = [\n  8,\n  'x',\n]", "line 1: `widths`: invalid type: string \"x\", expected usize"),
        ("seed = 99999999999999999999", "line 1: "),
        ("noise = 'loud'", "line 1: `noise`: unknown variant `loud`, expected one of `symmetric`"),
        ("rho = ", "line 1: "),
        ("rho = 0.1\nrho = 0.2", "line 2: duplicate key"),
        ("preset = 'large'", "line 1: `preset`: unknown variant `large`"),
    ];
    for (text, expected) in cases {
        let error = file_error(text);
        assert!(error.starts_with(expected), "{text}\n  gives    {error}\n  expected {expected}");
    }
}

#[test]
fn a_file_that_is_not_there_or_not_text_is_named() {
    let error = Config::resolve(Some(Path::new("/no/such.toml")), &Overrides::default()).unwrap_err();
    assert!(error.to_string().starts_with("/no/such.toml: "), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bytes.toml");
    std::fs::write(&path, [0xff, 0xfe, 0]).unwrap();
    let error = Config::resolve(Some(&path), &Overrides::default()).unwrap_err();
    assert!(error.to_string().ends_with("not a TOML file: the text is not UTF-8"), "{error}");
}

#[test]
fn values_out_of_range_name_the_flag_and_what_it_takes() {
    let cases = [
        ("--rho 1.5", "--rho 1.5: takes a number greater than 0 and at most 1"),
        ("--rho 0", "--rho 0: takes a number greater than 0 and at most 1"),
        ("--rho NaN", "--rho NaN: takes a number greater than 0 and at most 1"),
        ("--branches 0", "--branches 0: takes a whole number from 1 to 10000"),
        ("--neighbours 0", "--neighbours 0: takes a whole number from 1 to 31 (less than --batch)"),
        ("--neighbours 64", "--neighbours 64: takes a whole number from 1 to 31 (less than --batch)"),
        ("--batch 1", "--batch 1: takes a whole number from 2 to 1000000"),
        ("--epochs 0", "--epochs 0: takes a whole number from 1 to 1000000"),
        ("--noise-rate 1.01", "--noise-rate 1.01: takes a number from 0 to 1"),
        ("--noise-rate -0.1", "--noise-rate -0.1: takes a number from 0 to 1"),
        ("--alpha -1", "--alpha -1: takes a number of at least 0"),
        ("--eta inf", "--eta inf: takes a number of at least 0"),
        ("--eta-ramp -2", "--eta-ramp -2: takes a number of at least 0"),
        ("--lr 0", "--lr 0: takes a number greater than 0"),
        ("--lr inf", "--lr inf: takes a number greater than 0"),
        ("--lr-drop-epochs 30", "--lr-drop-epochs 30: takes growing numbers from 1, less than --epochs (30)"),
        ("--lr-drop-epochs 9,9", "--lr-drop-epochs 9,9: takes growing numbers from 1, less than --epochs (30)"),
        ("--lr-drop-factor 0", "--lr-drop-factor 0: takes a number greater than 0 and at most 1"),
        ("--momentum 1", "--momentum 1: takes a number of at least 0 and less than 1"),
        ("--gamma 1", "--gamma 1: takes a number of at least 0 and less than 1"),
        ("--gamma-late -0.5", "--gamma-late -0.5: takes a number of at least 0 and less than 1"),
        ("--weight-decay=-1e-4", "--weight-decay -0.0001: takes a number of at least 0"),
        ("--feature-lr 0", "--feature-lr 0: takes a number greater than 0"),
        ("--widths 0,1,2", "--widths 0,1,2: takes 1 to 16 numbers of channels from 1 to 65536"),
        ("--widths 8,16", "--blocks 1,1,1: takes 2 numbers from 1 to 1000, one for each of --widths"),
        ("--blocks 1,0,1", "--blocks 1,0,1: takes 3 numbers from 1 to 1000, one for each of --widths"),
        ("--val-fraction 0.6", "--val-fraction 0.6: takes a number greater than 0 and at most 0.5"),
        ("--val-fraction 0", "--val-fraction 0: takes a number greater than 0 and at most 0.5"),
        ("--iterations 0", "--iterations 0: takes a whole number from 1 to 1000"),
        ("--method ce --iterations 2", "--iterations 2: takes 1 with --method ce, which has no mentor"),
        ("--method elr --iterations 2", "--iterations 2: takes 1 with --method elr, which has no mentor"),
        (
            "--method co-teaching --iterations 3",
            "--iterations 3: takes 1 with --method co-teaching, which has no mentor",
        ),
        ("--joint-alpha -1", "--joint-alpha -1: takes a number of at least 0"),
        ("--joint-beta inf", "--joint-beta inf: takes a number of at least 0"),
        ("--joint-lr 0", "--joint-lr 0: takes a number greater than 0"),
        ("--joint-warmup 1.1", "--joint-warmup 1.1: takes a number from 0 to 1"),
        ("--joint-memory 0", "--joint-memory 0: takes a whole number from 1 to 100"),
        ("--elr-beta 1", "--elr-beta 1: takes a number of at least 0 and less than 1"),
        ("--elr-lambda -3", "--elr-lambda -3: takes a number of at least 0"),
        ("--forget-rate 1.5", "--forget-rate 1.5: takes a number from 0 to 1"),
        ("--forget-ramp nan", "--forget-ramp NaN: takes a number of at least 0"),
        ("--tau 1.5", "--tau 1.5: takes a number from 0 to 1"),
        ("--tau -0.1", "--tau -0.1: takes a number from 0 to 1"),
        ("--tau nan", "--tau NaN: takes a number from 0 to 1"),
        ("--lambda 1.01", "--lambda 1.01: takes a number from 0 to 1"),
        ("--lambda -1", "--lambda -1: takes a number from 0 to 1"),
        ("--lambda-ramp inf", "--lambda-ramp inf: takes a number of at least 0"),
        ("--iterations 2 --val-fraction 0", "--val-fraction 0: takes a number greater than 0 and at most 0.5"),
        ("--pad 1000", "--pad 1000: takes a whole number from 0 to 256"),
        (
            "--group 20000",
            "--group 20000: takes auto, all or a whole number from 1 to 10000, and such numbers for stages",
        ),
        (
            "--group 5:1,20000",
            "--group 5:1,20000: takes auto, all or a whole number from 1 to 10000, and such numbers for stages",
        ),
        ("--threads 5000", "--threads 5000: takes a whole number from 0 to 1024"),
        ("--seed 18446744073709551615", "--seed 18446744073709551615: takes a whole number up to 9223372036854775807"),
    ];
    for (flags, expected) in cases {
        let error = train(flags).expect_err(flags);
        assert_eq!((error.to_string().as_str(), error.exit_code()), (expected, 2));
    }
    let (_folder, path) = toml("widths = []");
    let error = Config::resolve(Some(&path), &Overrides::default()).unwrap_err();
    assert!(error.to_string().starts_with("--widths (empty): takes 1 to 16"), "{error}");
}

#[test]
fn what_the_data_do_not_allow_is_refused() {
    let config = train("--batch 100").unwrap();
    config.check_against_data(100, 0).unwrap();
    let error = config.check_against_data(99, 10).unwrap_err().to_string();
    assert_eq!(error, "--batch 100: takes at most the number of training images, 99 without the validation images");
    let error = train("--iterations 2").unwrap().check_against_data(100, 0).unwrap_err();
    let expected = "--iterations 2: takes 1 without validation images: the mentor of an iteration is the best network by \
                    validation accuracy";
    assert_eq!((error.to_string().as_str(), error.exit_code()), (expected, 2));
}

#[test]
fn a_resumed_run_may_change_threads_and_place_only() {
    let run = train("--out a --threads 1").unwrap();
    let same = train("--out b --threads 2").unwrap();
    assert_eq!(run.fingerprint().unwrap(), same.fingerprint().unwrap());
    assert_eq!(run.diff(&same).unwrap(), [""; 0]);
    let other = train("--rho 0.25 --noise pair --widths 8,16,32").unwrap();
    assert_ne!(run.fingerprint().unwrap(), other.fingerprint().unwrap());
    let expected = [
        "noise: \"symmetric\" in the run, \"pair\" asked for",
        "rho: 0.5 in the run, 0.25 asked for",
        "widths: [16, 32, 64] in the run, [8, 16, 32] asked for",
    ];
    assert_eq!(run.diff(&other).unwrap(), expected);
}

#[test]
fn the_group_of_branches_comes_back_from_the_file() {
    for (flags, text) in [
        ("", "group = \"auto\""),
        ("--group all", "group = \"all\""),
        ("--group 3", "group = \"3\""),
        ("--group 5:2,all,3", "group = \"5:2,all,3\""),
        ("--group all:4,all", "group = \"all:4\""),
        ("--group 5:all", "group = \"5\""),
    ] {
        let config = train(flags).unwrap();
        let toml = config.to_toml().unwrap();
        assert!(toml.lines().any(|line| line == text), "{toml}");
        assert_eq!(toml::from_str::<Config>(&toml).unwrap().group, config.group);
    }
    for wrong in ["0", "some", "-1", "1.5", "5:", "5:0", "5:2,", "5:2,x", ":2", "auto:2", "5:1,1,1,1,1,1,1,1,1"] {
        let words = ["mlnt", "train", "--group", wrong];
        assert!(Cli::try_parse_from(words).is_err(), "--group {wrong}");
    }
}

#[test]
fn precision_is_f16_on_a_card_and_f32_elsewhere_unless_named() {
    let kinds = [DeviceKind::Auto, DeviceKind::Cpu, DeviceKind::Simt, DeviceKind::Cuda(0), DeviceKind::Cuda(3)];
    let left_open = [Precision::F32, Precision::F32, Precision::F32, Precision::F16, Precision::F16];
    for (kind, expected) in kinds.into_iter().zip(left_open) {
        let config = train(&format!("--device {kind}")).unwrap();
        assert_eq!((config.precision, config.computes_in()), (PrecisionChoice::Auto, expected), "{kind}");
        assert_eq!(config.scaled(), expected == Precision::F16, "{kind}: cotangents are scaled in f16");
        for (name, of) in [
            ("f32", Precision::F32),
            ("f64", Precision::F64),
            ("tf32", Precision::Tf32),
            ("f16", Precision::F16),
            ("bf16", Precision::Bf16),
        ] {
            let config = train(&format!("--device {kind} --precision {name}")).unwrap();
            assert_eq!((config.precision, config.computes_in()), (PrecisionChoice::Of(of), of), "{kind}");
        }
    }
    let (_folder, path) = toml("precision = 'bf16'\n");
    let file = Config::resolve(Some(&path), &Overrides::default()).unwrap();
    assert_eq!(file.precision, PrecisionChoice::Of(Precision::Bf16));
    assert_eq!(
        train(&format!("--config {} --precision auto", path.display())).unwrap().precision,
        PrecisionChoice::Auto
    );
    let possible = "possible are auto, f32, f64, tf32, f16, bf16";
    assert_eq!(
        file_error("epochs = 3\nprecision = 'f8'"),
        format!("line 2: `precision`: no precision is called \"f8\"; {possible}")
    );
    assert!(Cli::try_parse_from(["mlnt", "train", "--precision", "f8"]).is_err());
}

#[test]
fn what_is_left_open_is_taken_over_from_a_run() {
    let run = train("--device simt --precision bf16").unwrap();
    let settled = |flags: &str| {
        let mut config = train(flags).unwrap();
        config.settle(&run);
        (config.device, config.precision)
    };
    let bf16 = PrecisionChoice::Of(Precision::Bf16);
    assert_eq!(settled(""), (DeviceKind::Simt, bf16));
    assert_eq!(settled("--device cpu --precision auto"), (DeviceKind::Cpu, bf16));
    assert_eq!(settled("--precision f32"), (DeviceKind::Simt, PrecisionChoice::Of(Precision::F32)));
}

#[test]
fn resume_refuses_flags_that_ask_for_another_run() {
    let run = train("--epochs 12 --device simt --precision f16").unwrap();
    let resumed = |flags: &str| {
        let words = ["mlnt", "train", "--resume", "runs/a"].into_iter().chain(flags.split_whitespace());
        match Cli::try_parse_from(words).expect("the line is well-formed").command {
            Command::Train(args) => args.resumed(&run),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(resumed("").unwrap(), run);
    assert_eq!(resumed("--threads 2 --epochs 12").unwrap().threads, 2);
    assert_eq!(resumed("--device auto --precision auto").unwrap(), run);
    let error = resumed("--epochs 13").unwrap_err();
    let expected = "--resume continues a run as it began; epochs: 12 in the run, 13 asked for";
    assert_eq!((error.to_string().as_str(), error.exit_code()), (expected, 2));
    let error = resumed("--precision f32 --device cuda").unwrap_err();
    let expected = "--resume continues a run as it began; device: \"simt\" in the run, \"cuda\" asked for; precision: \"f16\" in \
                    the run, \"f32\" asked for";
    assert_eq!((error.to_string().as_str(), error.exit_code()), (expected, 2));
}
