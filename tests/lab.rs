//! The laboratory of convolution kernels: every version of `kernels/lab/`, forward and backward, is right on the SIMT host machine.
//!
//! The versions are no part of the program: they are compiled here, with the system's C++ compiler, together with the
//! harness that also times them on a card. Without a compiler the tests are skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Largest relative error in the Euclidean norm of a result rounded to f16: half its last place, and a little for the order
/// of sums. The harness fails beyond the same.
const TOLERANCE: f64 = 4.89e-4;

/// That of the gradient of the weights, in f32: what is left is the order of its sums. The harness allows more, for tensor
/// cores that cut off what they add up; the host machine does not.
const SUMS_TOLERANCE: f64 = 5e-6;

/// The versions of the backward that take up to 32 channels alone.
const NARROW: [&str; 2] = ["b3_wgmma_tile", "b4_tile"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of a folder that end in `.extension`, without that.
fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(root().join(folder)).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| name.strip_suffix(extension)?.strip_suffix('.').map(str::to_string)).collect()
}

/// The versions.
fn versions() -> BTreeSet<String> {
    stems("kernels/lab", "cu")
}

/// Compiles the harness with `flags`; `None` when there is no compiler, or none that knows the flags.
fn harness(flags: &[&str], out: &str) -> Option<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(out);
    let machine = stems("kernels/simt", "cpp").into_iter().map(|file| format!("kernels/simt/{file}.cpp"));
    let sources = versions().into_iter().map(|version| format!("kernels/lab/{version}.cu"));
    let mut command = Command::new(&compiler);
    command.current_dir(root()).args(["-std=c++20", "-O2", "-g", "-DMLNT_SIMT", "-fno-strict-aliasing", "-pthread"]);
    command.args(["-Wall", "-Wextra", "-Werror", "-Ikernels/include", "-Ikernels/simt"]).args(flags);
    command.args(["-x", "c++", "kernels/lab/harness.cpp"]).args(sources).args(machine).arg("-o").arg(&out);
    match command.output() {
        Err(error) => {
            println!("skipped: no C++ compiler ({compiler}: {error})");
            None
        }
        Ok(output) if output.status.success() => Some(out),
        Ok(output) if !flags.is_empty() => {
            println!("skipped: {flags:?}: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// Error and hash of a result, by shape and version; of a version of the backward there are `VERSION dx` and `VERSION dw`.
type Results = BTreeMap<(String, String), (f64, String)>;

/// Whether the harness found everything right, and what it found.
fn check(program: &Path, arguments: &[&str]) -> (bool, Results) {
    let Output { status, stdout, stderr } = Command::new(program).arg("check").args(arguments).output().unwrap();
    assert!(stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    let text = String::from_utf8(stdout).unwrap();
    let row = |line: &str| {
        let (shape, rest) = line.split_once(", ").unwrap();
        let (version, found) = rest.split_once(": ").unwrap();
        let (error, hash) = found.split_once(' ').unwrap();
        ((shape.to_string(), version.to_string()), (error.parse().unwrap(), hash.to_string()))
    };
    (status.success(), text.lines().map(row).collect())
}

/// Input and output channels of a shape, `… x C -> K` or `… x C <- K`.
fn sides(shape: &str) -> [u32; 2] {
    let (all, filters) = shape.split_once(" -> ").or(shape.split_once(" <- ")).unwrap();
    let channels = all.rsplit(" x ").next().unwrap();
    [channels, filters].map(|side| side.parse().unwrap())
}

#[test]
fn every_version_is_right_whatever_the_order_of_its_threads() {
    let Some(program) = harness(&[], "lab") else { return };
    let (right, rows) = check(&program, &["1"]);
    for ((shape, version), (error, _)) in &rows {
        let most = if version.ends_with(" dw") { SUMS_TOLERANCE } else { TOLERANCE };
        assert!(*error <= most, "{version} on {shape}: relative error {error:e}");
    }
    assert!(right);
    // None is left out, and each has every shape of its direction, or those that it takes.
    let of = |backward: bool| rows.keys().filter(move |(shape, _)| shape.contains("<-") == backward);
    for backward in [false, true] {
        let shapes: BTreeSet<&String> = of(backward).map(|(shape, _)| shape).collect();
        let found: BTreeSet<&String> = of(backward).map(|(_, version)| version).collect();
        assert!(shapes.len() >= 7, "{shapes:?}");
        let narrow = |version: &str| NARROW.iter().any(|name| version.starts_with(name));
        let takes = |shape: &str, version: &str| !narrow(version) || sides(shape).into_iter().all(|side| side <= 32);
        let all = shapes.iter().flat_map(|&shape| found.iter().map(move |&version| (shape.clone(), version.clone())));
        let expected: Vec<_> = all.filter(|(shape, version)| takes(shape, version)).collect();
        assert_eq!(of(backward).cloned().collect::<Vec<_>>(), expected);
        assert!(!backward || shapes.iter().filter(|shape| takes(shape, NARROW[0])).count() >= 5, "{shapes:?}");
    }
    let found: BTreeSet<&str> = rows.keys().map(|(_, version)| version.as_str()).collect();
    for version in versions() {
        let results = if version.starts_with('b') { vec![" dx", " dw"] } else { vec![""] };
        assert!(
            results.iter().all(|result| found.contains(format!("{version}{result}").as_str())),
            "{version}: {found:?}"
        );
    }
    for seed in ["2", "3"] {
        assert_eq!(check(&program, &[seed]), (true, rows.clone()), "seed {seed}");
    }
}

#[test]
fn a_wrong_result_is_found() {
    let Some(program) = harness(&[], "lab_spoilt") else { return };
    let (right, rows) = check(&program, &["1", "spoil"]);
    assert!(!right);
    for ((shape, version), (error, _)) in &rows {
        assert!(*error > TOLERANCE, "{version} on {shape}: relative error {error:e} of what is wrong");
    }
}

#[test]
fn no_version_reads_or_writes_beyond_its_memory() {
    let Some(program) = harness(&["-fsanitize=address"], "lab_asan") else { return };
    assert!(check(&program, &["4"]).0);
}
