//! Compiles `kernels/*.cu` twice: with nvcc for graphics cards, and as C++ for the SIMT host machine.
//!
//! Neither compiler has to be there. What there is goes into the program: `$OUT_DIR/kernels.rs`, included by
//! `src/device/cuda/embedded.rs`, lists the kernels, the modules with their images, and the table of the host machine.

#[path = "build/jobs.rs"]
mod jobs;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/simt.rs"]
mod simt;
#[path = "build/sources.rs"]
mod sources;

use nvcc::Nvcc;
use sources::Source;
use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    if let Err(error) = build() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    // A folder stands for all that is in it.
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rustc-check-cfg=cfg(mlnt_simt)");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: cargo runs this")?);
    let sources = sources::find(Path::new("kernels"))?;

    let nvcc = nvcc::find()?;
    if nvcc.is_none() {
        println!(
            "cargo:warning=nvcc (12.0 or later) was not found: built without CUDA kernels. \
             scripts/install_nvcc.sh installs it into this folder."
        );
    }
    let images = folder(&out, "kernels")?;
    let mut jobs = match &nvcc {
        Some(nvcc) => nvcc::jobs(nvcc, &sources, &images)?,
        None => Vec::new(),
    };

    let host = simt::find();
    let objects = folder(&out, "simt")?;
    let mut made = Vec::new();
    match &host {
        Some(compiler) => {
            let table = out.join("simt_table.cpp");
            let names = sources.iter().flat_map(|source| &source.kernels).map(|kernel| kernel.name.as_str());
            write(&table, &simt::table(names))?;
            let host_jobs = compiler.jobs(&sources, table, &objects)?;
            made.extend(host_jobs.iter().map(|job| job.output.clone()));
            jobs.extend(host_jobs);
        }
        None => println!("cargo:warning=no C++20 compiler works here: built without the SIMT host machine."),
    }

    for warning in jobs::run(jobs, workers())? {
        println!("cargo:warning={warning}");
    }
    if let Some(compiler) = host {
        compiler.archive(&made)?;
        println!("cargo:rustc-cfg=mlnt_simt");
    }
    // Says to `scripts/kernel_report.py` that the images are this build's, and who made them.
    let stamp = images.join("nvcc.txt");
    match &nvcc {
        Some(nvcc) => {
            end_ptx_with_nul(&images, &sources)?;
            write(&stamp, &format!("{}\n{}\n", nvcc.version, nvcc.path.display()))?;
        }
        None if stamp.is_file() => std::fs::remove_file(&stamp).map_err(|e| format!("{}: {e}", stamp.display()))?,
        None => {}
    }
    write(&out.join("kernels.rs"), &listing(nvcc.as_ref(), &sources))
}

/// As many compilations at a time as cargo was allowed jobs.
fn workers() -> usize {
    let allowed = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok());
    allowed.or(std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1).max(1)
}

fn folder(out: &Path, name: &str) -> Result<PathBuf, String> {
    let path = out.join(name);
    std::fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The driver takes PTX as a C string.
fn end_ptx_with_nul(images: &Path, sources: &[Source]) -> Result<(), String> {
    for source in sources.iter().filter(|source| !source.sm_90a) {
        let path = images.join(format!("{}.compute_80.ptx", source.module));
        let mut text = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        if text.last() != Some(&0) {
            text.push(0);
            std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    Ok(())
}

/// The text of `kernels.rs`.
fn listing(nvcc: Option<&Nvcc>, sources: &[Source]) -> String {
    let (mut kernels, mut modules) = (String::new(), String::new());
    for source in sources {
        for kernel in &source.kernels {
            let (name, params) = (&kernel.name, &kernel.params);
            let _ = writeln!(
                kernels,
                "    EmbeddedKernel {{ name: {name:?}, module: {:?}, params: {params:?}, threads: {}, sm_90a: {} }},",
                source.module, kernel.threads, source.sm_90a
            );
        }
        for target in nvcc.iter().flat_map(|_| nvcc::targets(source)) {
            let _ = writeln!(
                modules,
                "    EmbeddedModule {{ name: {:?}, arch: {}, image: &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \
                 \"/kernels/{}.{}\"))).0 }},",
                source.module, target.arch, source.module, target.suffix
            );
        }
    }
    let version = nvcc.map(|nvcc| &nvcc.version);
    format!(
        "const NVCC: Option<&str> = {version:?};\n\
         const ALL_KERNELS: &[EmbeddedKernel] = &[\n{kernels}];\n\
         static ALL_MODULES: &[EmbeddedModule] = &[\n{modules}];\n"
    )
}
