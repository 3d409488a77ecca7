//! The machine with the tests' kernels, compiled here, and launches of single ones.
#![allow(unsafe_code)]

use bytemuck::{Pod, Zeroable};
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::driver::{Address, Driver, Launch, Stream};
use mlnt::device::cuda::embedded::{SimtKernel, SimtLaunch};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Seeds with which every kernel is tried: enough that each fault of order shows.
pub const SEEDS: std::ops::Range<u64> = 0..8;

/// `struct Buffers` of `tests/simt/buffers.h`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Buffers {
    pub x: Address,
    pub w: Address,
    pub y: Address,
    pub n: i64,
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Compiles `sources` and the machine; `None` when there is no compiler.
pub fn compile(sources: &[&str], flags: &[&str], out: &str) -> Option<(PathBuf, Output)> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(out);
    let machine = ["machine.cpp", "fiber.cpp", "mma.cpp", "wgmma.cpp"].map(|f| format!("kernels/simt/{f}"));
    let mut command = Command::new(&compiler);
    command.current_dir(root()).args(["-std=c++20", "-O2", "-g", "-DMLNT_SIMT", "-fno-strict-aliasing", "-pthread"]);
    command.args(["-Wall", "-Wextra", "-Werror", "-Ikernels/include", "-Ikernels/simt", "-Itests/simt"]);
    command.args(flags).args(["-x", "c++"]).args(sources).args(&machine).arg("-o").arg(&out);
    match command.output() {
        Ok(output) => Some((out, output)),
        Err(error) => {
            println!("skipped: no C++ compiler ({compiler}: {error})");
            None
        }
    }
}

/// Loads the tests' kernels, compiled with `flags`.
pub fn load(flags: &[&str], out: &str) -> Option<libloading::Library> {
    let sources = ["waiting", "bounds", "tensor_cores", "conversions", "matrices", "warpgroups"]
        .map(|s| format!("tests/simt/{s}.cu"));
    let flags = [&["-shared", "-fPIC"], flags].concat();
    let (path, output) = compile(&sources.each_ref().map(String::as_str), &flags, out)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: a library of ours, whose start runs no code.
    Some(unsafe { libloading::Library::new(path) }.unwrap())
}

/// The kernels that the tests' sources define.
pub fn kernel_names() -> Vec<String> {
    let read = |file: &str| std::fs::read_to_string(root().join("tests/simt").join(file)).unwrap();
    let files = ["waiting.cu", "bounds.cu", "tensor_cores.cu", "conversions.cu", "matrices.cu", "warpgroups.cu"];
    let text = files.map(read).concat();
    let names = text.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next());
    names.map(str::to_string).collect()
}

pub fn machine_of(library: &'static libloading::Library, seed: u64) -> Simt {
    // SAFETY: the symbols have these types, and the library is never unloaded.
    unsafe {
        let symbol = |name: &String| *library.get(format!("mlnt_simt_{name}").as_bytes()).unwrap();
        let kernels: Vec<&'static SimtKernel> = kernel_names().iter().map(symbol).collect();
        let launch: SimtLaunch = *library.get(b"mlnt_simt_launch").unwrap();
        Simt::new(launch, &kernels, seed)
    }
}

/// A machine with the tests' kernels, or `None` without a compiler.
pub fn machine(seed: u64) -> Option<Simt> {
    static LIBRARY: OnceLock<Option<libloading::Library>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| load(&[], "simt_kernels.so")).as_ref()?;
    Some(machine_of(library, seed))
}

/// One launch of a kernel on the buffers of these tests.
pub struct Try {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

impl Try {
    /// One block of 256 threads with a float of shared memory each.
    pub fn block(kernel: &'static str) -> Self {
        Try { kernel, grid: [1, 1, 1], threads: 256, shared: 1024 }
    }

    pub fn warp(kernel: &'static str) -> Self {
        Try { kernel, grid: [1, 1, 1], threads: 32, shared: 0 }
    }

    /// Enough blocks for `n` elements.
    pub fn elements(kernel: &'static str, n: usize) -> Self {
        Try { kernel, grid: [n.div_ceil(256) as u32, 1, 1], threads: 256, shared: 0 }
    }

    pub fn launch(&self, buffers: Buffers) -> Launch {
        let Try { kernel, grid, threads, shared } = *self;
        Launch { kernel, params: bytemuck::bytes_of(&buffers).into(), grid, threads, shared, label: "test".into() }
    }

    /// The bits of `y` after a run; `y` starts as `start`, or as fresh memory of `x.len()` elements.
    pub fn bits(&self, simt: &Simt, x: &[u32], w: &[u32], start: Option<&[u32]>) -> Result<Vec<u32>, String> {
        let upload = |v: &[u32], what: &str| -> mlnt::Result<Address> {
            let at = simt.allocate(4 * v.len(), what)?;
            simt.upload(Stream::Compute, at, bytemuck::cast_slice(v))?;
            Ok(at)
        };
        let run = || -> mlnt::Result<Vec<u32>> {
            let (x_at, w_at) = (upload(x, "the input")?, upload(w, "the weights")?);
            let y_at = match start {
                Some(y) => upload(y, "the output")?,
                None => simt.allocate(4 * x.len(), "the output")?,
            };
            let buffers = Buffers { x: x_at, w: w_at, y: y_at, n: x.len() as i64 };
            simt.launch(Stream::Compute, &self.launch(buffers))?;
            simt.synchronize()?;
            let mut y = vec![0u32; start.map_or(x.len(), <[u32]>::len)];
            simt.download(Stream::Compute, &[(y_at, 4 * y.len())], bytemuck::cast_slice_mut(&mut y))?;
            [x_at, w_at, y_at].into_iter().for_each(|at| simt.free(at));
            Ok(y)
        };
        run().map_err(|e| e.to_string())
    }

    pub fn floats(&self, simt: &Simt, x: &[f32]) -> Result<Vec<f32>, String> {
        self.bits(simt, bytemuck::cast_slice(x), &[], None).map(floats)
    }
}

pub fn floats(bits: Vec<u32>) -> Vec<f32> {
    bits.into_iter().map(f32::from_bits).collect()
}

/// 1, 2, 3, …
pub fn ramp(n: usize) -> Vec<f32> {
    (1..=n).map(|i| i as f32).collect()
}

/// Results of a kernel on a ramp, one per seed; `None` without a compiler.
pub fn over_seeds(kernel: &'static str) -> Option<Vec<Result<Vec<f32>, String>>> {
    SEEDS.map(|seed| machine(seed).map(|simt| Try::block(kernel).floats(&simt, &ramp(256)))).collect()
}

/// That every seed gives the bits of `want`.
pub fn all_give(kernel: &'static str, want: &[f32]) {
    for (seed, result) in over_seeds(kernel).into_iter().flatten().enumerate() {
        assert_eq!(result.as_deref(), Ok(want), "{kernel}, seed {seed}");
    }
}

/// That some seeds give other bits than others.
pub fn seeds_differ(kernel: &'static str) {
    let Some(results) = over_seeds(kernel) else { return };
    let bits = |r: &Result<Vec<f32>, String>| r.as_ref().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(results.iter().any(|r| bits(r) != bits(&results[0])), "{kernel}: all seeds agree");
}

/// That every seed ends with an error that contains all of `parts`.
pub fn all_fail(kernel: &'static str, parts: &[&str]) {
    for (seed, result) in over_seeds(kernel).into_iter().flatten().enumerate() {
        let error = result.expect_err(kernel);
        for part in parts.iter().chain([&kernel]) {
            assert!(error.contains(part), "{kernel}, seed {seed}: {error}");
        }
    }
}

/// The line of a source of these tests that holds `text` for the `nth` time.
pub fn line_of(file: &str, text: &str, nth: usize) -> String {
    let path = root().join("tests/simt").join(file);
    let source = std::fs::read_to_string(path).unwrap();
    let line = source.lines().enumerate().filter(|(_, l)| l.contains(text)).nth(nth).unwrap().0 + 1;
    format!("{file}:{line}")
}
