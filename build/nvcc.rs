//! Where nvcc is, and what it is asked for.

use crate::jobs::Job;
use crate::sources::{self, Source};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The first release with C++20 and sm_90a.
const OLDEST: u32 = 12;

/// Variables that nvcc reads.
const VARIABLES: [&str; 3] = ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"];

/// A compiler that runs.
pub struct Nvcc {
    pub path: PathBuf,
    /// For instance `13.0.88`.
    pub version: String,
}

/// What a source is compiled for.
pub struct Target {
    /// Of the module's file: `sm_80.cubin`.
    pub suffix: &'static str,
    /// As Rust, in the words of `src/device/cuda/embedded.rs`.
    pub arch: &'static str,
    flag: &'static str,
    gencode: &'static str,
}

/// All targets: one machine code per generation of cards, and PTX for those to come.
const TARGETS: [Target; 5] = [
    Target { suffix: "sm_80.cubin", arch: "Arch::Sm(80)", flag: "-cubin", gencode: "arch=compute_80,code=sm_80" },
    Target { suffix: "sm_86.cubin", arch: "Arch::Sm(86)", flag: "-cubin", gencode: "arch=compute_86,code=sm_86" },
    Target { suffix: "sm_89.cubin", arch: "Arch::Sm(89)", flag: "-cubin", gencode: "arch=compute_89,code=sm_89" },
    Target {
        suffix: "sm_90a.cubin",
        arch: "Arch::SmOnly(90)",
        flag: "-cubin",
        gencode: "arch=compute_90a,code=sm_90a",
    },
    Target {
        suffix: "compute_80.ptx",
        arch: "Arch::Ptx(80)",
        flag: "-ptx",
        gencode: "arch=compute_80,code=compute_80",
    },
];

/// Looks in `$NVCC`, `.nvcc/`, `PATH`, `$CUDA_HOME` and `/usr/local/cuda`, and tells cargo what the answer depends on.
///
/// Errors: `$NVCC` is set but does not run, or is too old. Elsewhere such a compiler is passed over.
pub fn find() -> Result<Option<Nvcc>, String> {
    // The script renews its own time when it has installed something: a file that is not there yet cannot be watched.
    println!("cargo:rerun-if-changed=scripts/install_nvcc.sh");
    if let Some(path) = variable("NVCC").filter(|value| !value.is_empty()) {
        return probe(Path::new(&path)).map(Some).map_err(|e| format!("NVCC={}: {e}", path.display()));
    }
    // Later places are asked for only where they are reached: another PATH should not mean another build.
    Ok(installed().or_else(on_this_machine))
}

/// What `scripts/install_nvcc.sh` installed.
fn installed() -> Option<Nvcc> {
    if !Path::new(".nvcc/installed").is_file() {
        return None;
    }
    println!("cargo:rerun-if-changed=.nvcc/installed");
    let mut pythons = std::fs::read_dir(".nvcc/lib").ok()?.flatten();
    pythons.find_map(|folder| probe(&folder.path().join("site-packages/nvidia/cu13/bin/nvcc")).ok())
}

fn on_this_machine() -> Option<Nvcc> {
    let mut places: Vec<PathBuf> = std::env::split_paths(&variable("PATH").unwrap_or_default()).collect();
    places.extend(variable("CUDA_HOME").map(|home| Path::new(&home).join("bin")));
    places.push("/usr/local/cuda/bin".into());
    places.iter().map(|place| place.join("nvcc")).filter(|path| path.is_file()).find_map(|path| probe(&path).ok())
}

fn variable(name: &str) -> Option<std::ffi::OsString> {
    println!("cargo:rerun-if-env-changed={name}");
    std::env::var_os(name)
}

fn probe(path: &Path) -> Result<Nvcc, String> {
    let said = Command::new(path).arg("--version").output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&said.stdout);
    // The line reads `Cuda compilation tools, release 13.0, V13.0.88`.
    let version = text.split_whitespace().find_map(|word| word.strip_prefix('V')).unwrap_or_default();
    let release: u32 = version.split('.').next().and_then(|n| n.parse().ok()).ok_or("this is not nvcc")?;
    if release < OLDEST {
        return Err(format!("release {version} is too old, {OLDEST}.0 or later is needed"));
    }
    Ok(Nvcc { path: path.to_path_buf(), version: version.to_string() })
}

/// What a source is compiled for.
pub fn targets(source: &Source) -> impl Iterator<Item = &'static Target> {
    let only = source.sm_90a;
    TARGETS.iter().filter(move |target| !only || target.suffix == "sm_90a.cubin")
}

/// The jobs that make all modules of `sources` in the folder `out`.
pub fn jobs(nvcc: &Nvcc, sources: &[Source], out: &Path) -> Result<Vec<Job>, String> {
    let settings: Vec<_> = VARIABLES.iter().map(|name| variable(name)).collect();
    let context = format!("{} {settings:?}", nvcc.version);
    let mut jobs = Vec::new();
    for source in sources {
        for target in targets(source) {
            let output = out.join(format!("{}.{}", source.module, target.suffix));
            let mut command = Command::new(&nvcc.path);
            command.args(["-std=c++20", "-O3", "-Ikernels/include", "-lineinfo"]);
            command.args([target.flag, "-gencode", target.gencode, "-o"]).arg(&output).arg(&source.path);
            let inputs = sources::reached_from(&source.path, &[Path::new("kernels/include")])?;
            jobs.push(Job { command, output, inputs, context: context.clone() });
        }
    }
    Ok(jobs)
}
