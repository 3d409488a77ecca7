//! The SIMT host machine finds faults: each broken kernel of `tests/simt/` is caught, and its right twin passes.
//!
//! The kernels and the machine are compiled here, with the system's C++ compiler. Without one the tests are skipped.
#![allow(unsafe_code)]

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::driver::{Address, Driver, Launch, Stream};
use mlnt::device::cuda::embedded::{SimtKernel, SimtLaunch};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Seeds with which every kernel is tried: enough that each fault of order shows.
const SEEDS: std::ops::Range<u64> = 0..8;

/// `struct Buffers` of `tests/simt/buffers.h`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Buffers {
    x: Address,
    w: Address,
    y: Address,
    n: i64,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Compiles `sources` and the machine; `None` when there is no compiler.
fn compile(sources: &[&str], flags: &[&str], out: &str) -> Option<(PathBuf, Output)> {
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
fn load(flags: &[&str], out: &str) -> Option<libloading::Library> {
    let sources = ["waiting", "bounds", "tensor_cores", "conversions", "matrices", "warpgroups"]
        .map(|s| format!("tests/simt/{s}.cu"));
    let flags = [&["-shared", "-fPIC"], flags].concat();
    let (path, output) = compile(&sources.each_ref().map(String::as_str), &flags, out)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: a library of ours, whose start runs no code.
    Some(unsafe { libloading::Library::new(path) }.unwrap())
}

/// The kernels that the tests' sources define.
fn kernel_names() -> Vec<String> {
    let read = |file: &str| std::fs::read_to_string(root().join("tests/simt").join(file)).unwrap();
    let files = ["waiting.cu", "bounds.cu", "tensor_cores.cu", "conversions.cu", "matrices.cu", "warpgroups.cu"];
    let text = files.map(read).concat();
    let names = text.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next());
    names.map(str::to_string).collect()
}

fn machine_of(library: &'static libloading::Library, seed: u64) -> Simt {
    // SAFETY: the symbols have these types, and the library is never unloaded.
    unsafe {
        let symbol = |name: &String| *library.get(format!("mlnt_simt_{name}").as_bytes()).unwrap();
        let kernels: Vec<&'static SimtKernel> = kernel_names().iter().map(symbol).collect();
        let launch: SimtLaunch = *library.get(b"mlnt_simt_launch").unwrap();
        Simt::new(launch, &kernels, seed)
    }
}

/// A machine with the tests' kernels, or `None` without a compiler.
fn machine(seed: u64) -> Option<Simt> {
    static LIBRARY: OnceLock<Option<libloading::Library>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| load(&[], "simt_kernels.so")).as_ref()?;
    Some(machine_of(library, seed))
}

/// One launch of a kernel on the buffers of these tests.
struct Try {
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
}

impl Try {
    /// One block of 256 threads with a float of shared memory each.
    fn block(kernel: &'static str) -> Self {
        Try { kernel, grid: [1, 1, 1], threads: 256, shared: 1024 }
    }

    fn warp(kernel: &'static str) -> Self {
        Try { kernel, grid: [1, 1, 1], threads: 32, shared: 0 }
    }

    /// Enough blocks for `n` elements.
    fn elements(kernel: &'static str, n: usize) -> Self {
        Try { kernel, grid: [n.div_ceil(256) as u32, 1, 1], threads: 256, shared: 0 }
    }

    fn launch(&self, buffers: Buffers) -> Launch {
        let Try { kernel, grid, threads, shared } = *self;
        Launch { kernel, params: bytemuck::bytes_of(&buffers).into(), grid, threads, shared, label: "test".into() }
    }

    /// The bits of `y` after a run; `y` starts as `start`, or as fresh memory of `x.len()` elements.
    fn bits(&self, simt: &Simt, x: &[u32], w: &[u32], start: Option<&[u32]>) -> Result<Vec<u32>, String> {
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
            simt.download(Stream::Compute, y_at, bytemuck::cast_slice_mut(&mut y))?;
            [x_at, w_at, y_at].into_iter().for_each(|at| simt.free(at));
            Ok(y)
        };
        run().map_err(|e| e.to_string())
    }

    fn floats(&self, simt: &Simt, x: &[f32]) -> Result<Vec<f32>, String> {
        self.bits(simt, bytemuck::cast_slice(x), &[], None).map(floats)
    }
}

fn floats(bits: Vec<u32>) -> Vec<f32> {
    bits.into_iter().map(f32::from_bits).collect()
}

/// 1, 2, 3, …
fn ramp(n: usize) -> Vec<f32> {
    (1..=n).map(|i| i as f32).collect()
}

/// Results of a kernel on a ramp, one per seed; `None` without a compiler.
fn over_seeds(kernel: &'static str) -> Option<Vec<Result<Vec<f32>, String>>> {
    SEEDS.map(|seed| machine(seed).map(|simt| Try::block(kernel).floats(&simt, &ramp(256)))).collect()
}

/// That every seed gives the bits of `want`.
fn all_give(kernel: &'static str, want: &[f32]) {
    for (seed, result) in over_seeds(kernel).into_iter().flatten().enumerate() {
        assert_eq!(result.as_deref(), Ok(want), "{kernel}, seed {seed}");
    }
}

/// That some seeds give other bits than others.
fn seeds_differ(kernel: &'static str) {
    let Some(results) = over_seeds(kernel) else { return };
    let bits = |r: &Result<Vec<f32>, String>| r.as_ref().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(results.iter().any(|r| bits(r) != bits(&results[0])), "{kernel}: all seeds agree");
}

/// That every seed ends with an error that contains all of `parts`.
fn all_fail(kernel: &'static str, parts: &[&str]) {
    for (seed, result) in over_seeds(kernel).into_iter().flatten().enumerate() {
        let error = result.expect_err(kernel);
        for part in parts.iter().chain([&kernel]) {
            assert!(error.contains(part), "{kernel}, seed {seed}: {error}");
        }
    }
}

/// The line of a source of these tests that holds `text` for the `nth` time.
fn line_of(file: &str, text: &str, nth: usize) -> String {
    let path = root().join("tests/simt").join(file);
    let source = std::fs::read_to_string(path).unwrap();
    let line = source.lines().enumerate().filter(|(_, l)| l.contains(text)).nth(nth).unwrap().0 + 1;
    format!("{file}:{line}")
}

#[test]
fn a_missing_barrier_shows_as_a_difference_between_seeds() {
    let x = ramp(256);
    let rotated: Vec<f32> = (0..256).map(|i| x[(i + 37) % 256]).collect();
    all_give("rotate_right_f32", &rotated);
    seeds_differ("rotate_unsynchronised_f32");

    let within: Vec<f32> = (0..256).map(|i| x[i / 32 * 32 + (i + 11) % 32]).collect();
    all_give("rotate_warp_right_f32", &within);
    seeds_differ("rotate_warp_unsynchronised_f32");

    let round = |v: Vec<f32>| -> Vec<f32> { (0..256).map(|i| 0.5 * v[i] + v[(i + 37) % 256]).collect() };
    all_give("rounds_right_f32", &(0..4).fold(x, |v, _| round(v)));
    seeds_differ("rounds_one_barrier_f32");
}

#[test]
fn shuffles_exchange_values_of_the_warp() {
    all_give("sum_right_f32", &[256.0 * 257.0 / 2.0; 256]);
    let want: Vec<f32> = (0..256).map(|i| -(((i % 32) ^ 31) as f32)).collect();
    all_give("shuffle_types_f32", &want);
}

#[test]
fn matrices_come_from_shared_memory_in_the_documented_order() {
    let x = ramp(256);
    all_give("matrices_right_f32", &x);
    let transposed: Vec<f32> = (0..256).map(|i| x[i / 64 * 64 + i % 8 * 8 + i % 64 / 8]).collect();
    all_give("matrices_transposed_f32", &transposed);
    all_fail("matrices_unaligned_f32", &["not 16 aligned bytes", "matrices.cu"]);
}

#[test]
fn copies_to_shared_memory_are_poison_until_they_are_done() {
    let at = |i: usize| (i + 37) % 256;
    let want: Vec<f32> = (0..256).map(|i| if at(i) / 4 % 3 == 0 { 0.0 } else { (at(i) + 1) as f32 }).collect();
    all_give("copies_right_f32", &want);
    for result in over_seeds("copies_read_too_early_f32").into_iter().flatten() {
        assert!(result.unwrap().iter().all(|v| v.is_nan()));
    }
}

/// A product of a warpgroup, one per seed: x [64, 32] · w [32, 32] of small integers, and what comes out of it.
fn group_products(kernel: &'static str) -> Option<Vec<Vec<f32>>> {
    let try_ = Try { threads: 128, shared: 4 * 8 * 144 * 2, ..Try::block(kernel) };
    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let (x, w) = group_operands();
    let run = |simt: Simt| floats(try_.bits(&simt, &bits(&x), &bits(&w), Some(&[7; 64 * 32])).expect(kernel));
    SEEDS.map(|seed| machine(seed).map(run)).collect()
}

fn group_operands() -> (Vec<f32>, Vec<f32>) {
    let draw = |i: usize, by: usize| ((i * by + i / 7) % 11) as f32 - 5.0;
    ((0..64 * 32).map(|i| draw(i, 5)).collect(), (0..32 * 32).map(|i| draw(i, 3)).collect())
}

#[test]
fn warpgroups_multiply_what_descriptors_say() {
    let (x, w) = group_operands();
    let sum = |i: usize| (0..32).map(|k| x[i / 32 * 32 + k] * w[k * 32 + i % 32]).sum();
    let want: Vec<f32> = (0..64 * 32).map(sum).collect();
    for kernel in ["group_right_f16", "group_transposed_f16", "group_mixed_f16"] {
        for have in group_products(kernel).into_iter().flatten() {
            assert_eq!(have, want, "{kernel}");
        }
    }
    // Every step that is left out shows: the parts of the result that it touches are no numbers, and so is nothing else.
    let part = |kernel: &'static str, touched: &dyn Fn(usize) -> bool| {
        for have in group_products(kernel).into_iter().flatten() {
            let right = |i: usize| if touched(i) { have[i].is_nan() } else { have[i] == want[i] };
            assert!((0..64 * 32).all(right), "{kernel}: {:?}", (0..64 * 32).find(|i| !right(*i)));
        }
    };
    part("group_no_wait_f16", &|_| true);
    part("group_no_commit_f16", &|_| true);
    part("group_no_proxy_fence_f16", &|_| true);
    part("group_early_proxy_fence_f16", &|_| true);
    part("group_no_fence_f16", &|_| true);
    // Thread 77 is lane 13 of warp 2: element 5 is row 32 + 3, column 8 + 2 + 1.
    part("group_changed_f16", &|i| i == 35 * 32 + 11);
    // The granule holds k = 16 of the lines 40 to 47.
    part("group_overwritten_f16", &|i| (40..48).contains(&(i / 32)));
    for have in group_products("group_strides_f16").into_iter().flatten() {
        assert!(have != want);
    }
    // Without the barrier nothing that a thread stores is there for the products.
    for have in group_products("group_no_barrier_f16").into_iter().flatten() {
        assert!(have.iter().all(|v| v.is_nan()));
    }
}

#[test]
fn warpgroups_act_together_and_within_shared_memory() {
    let fails = |kernel: &'static str, threads: u32, parts: &[&str]| {
        let Some(simt) = machine(1) else { return };
        let try_ = Try { threads, shared: 2048, ..Try::block(kernel) };
        let error = try_.floats(&simt, &ramp(256)).expect_err(kernel);
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    fails("group_differs_f16", 128, &["warps 0 and 2", "in different ways"]);
    let line = line_of("warpgroups.cu", "wgmma_f16<false, false>(d, a, a);", 0);
    fails("group_swizzled_f16", 128, &[&line, "unknown"]);
    fails("group_beyond_f16", 128, &[&line, "not in shared memory"]);
    fails("group_in_part_f16", 64, &[&line, "no whole warpgroup"]);
}

#[test]
fn waiting_in_divergent_code_is_an_error_that_names_the_line() {
    let line = |text: &str, nth| line_of("waiting.cu", text, nth);
    let divergent = line("if (threadIdx.x < 40) sync_threads();", 0);
    all_fail("barrier_divergent_f32", &["40 of 256 threads wait", &divergent]);
    all_fail("barrier_two_places_f32", &["block (0, 0, 0)", &line("        sync_threads();", 2)]);
    let shuffle = line("if (threadIdx.x % 32 < 16) v = shuffle_xor(v, 1);", 0);
    all_fail("shuffle_divergent_f32", &["shuffle", "has ended", &shuffle]);
    all_fail("shuffle_against_barrier_f32", &["shuffle", &line("else sync_threads();", 0)]);
    all_fail("warp_two_collectives_f32", &["shuffle", &line("else sync_warp();", 0)]);
    // The machine works on after a fault.
    all_give("sum_right_f32", &[256.0 * 257.0 / 2.0; 256]);
}

#[test]
fn writes_beyond_an_allocation_break_its_guard_band() {
    let Some(simt) = machine(1) else { return };
    let x = ramp(1000);
    let doubled: Vec<f32> = x.iter().map(|v| 2.0 * v).collect();
    assert_eq!(Try::elements("double_right_f32", 1000).floats(&simt, &x), Ok(doubled));
    let behind = Try::elements("double_writes_behind_f32", 1000).floats(&simt, &x).unwrap_err();
    let words = ["kernel double_writes_behind_f32", "0 bytes behind the end of", "4000 bytes of \"the output\""];
    assert!(words.iter().all(|w| behind.contains(w)), "{behind}");
    let simt = machine(1).unwrap();
    let before = Try::elements("double_writes_before_f32", 1000).floats(&simt, &x).unwrap_err();
    assert!(before.contains("bytes before the 4000 bytes of \"the output\""), "{before}");
}

#[test]
fn poison_shows_reads_beyond_and_outputs_not_written() {
    let Some(simt) = machine(2) else { return };
    let x = ramp(1000);
    let sums: Vec<f32> = (0..1000).map(|i| x[i] + x.get(i + 1).copied().unwrap_or(0.0)).collect();
    assert_eq!(Try::elements("pairs_right_f32", 1000).floats(&simt, &x), Ok(sums.clone()));
    // What lies behind the input is a guard band, whose floats are NaN.
    let read = Try::elements("pairs_reads_behind_f32", 1000).floats(&simt, &x).unwrap();
    assert_eq!(read[..999], sums[..999]);
    assert!(read[999].is_nan());

    let short = Try::elements("double_forgets_last_f32", 1000).floats(&simt, &x).unwrap();
    assert!(short[998] == 2.0 * x[998] && short[999].is_nan(), "{:?}", &short[998..]);
}

#[test]
fn shared_memory_is_poisoned_and_guarded() {
    let Some(simt) = machine(3) else { return };
    let x = ramp(256);
    assert_eq!(Try::block("shared_right_f32").floats(&simt, &x), Ok(x.clone()));
    let behind = Try::block("shared_writes_behind_f32").floats(&simt, &x).unwrap_err();
    assert!(behind.contains("behind its 1024 bytes of shared memory"), "{behind}");
    let before = Try::block("shared_writes_before_f32").floats(&simt, &x).unwrap_err();
    assert!(before.contains("before its 1024 bytes of shared memory"), "{before}");

    let blocks = Try { grid: [40, 1, 1], ..Try::block("shared_unwritten_f32") };
    let unwritten = blocks.floats(&simt, &ramp(40 * 256)).unwrap();
    assert!(unwritten.iter().all(|v| v.is_nan()));
}

#[test]
fn a_launch_beyond_a_cards_limits_is_refused() {
    let Some(simt) = machine(4) else { return };
    let refused = |change: fn(&mut Try), what: &str| {
        let mut launch = Try::block("shared_right_f32");
        change(&mut launch);
        let error = launch.floats(&simt, &ramp(256)).unwrap_err();
        assert!(error.contains("shared_right_f32") && error.contains(what), "{error}");
    };
    refused(|l| l.threads = 288, "288 threads");
    refused(|l| l.threads = 100, "100 threads");
    refused(|l| l.threads = 0, "0 threads");
    refused(|l| l.shared = 99 * 1024 + 1, "101377 bytes of shared memory");
    refused(|l| l.grid = [1, 65_536, 1], "65536");
    refused(|l| l.grid = [1, 1, 65_536], "65536");
    refused(|l| l.grid = [0x8000_0000, 1, 1], "2147483648");
    refused(|l| l.grid = [0, 1, 1], "0");
    refused(|l| l.kernel = "no_such_kernel_shared_right_f32", "no kernel named");
    let largest = Try { shared: 99 * 1024, ..Try::block("shared_right_f32") };
    assert_eq!(largest.floats(&simt, &ramp(256)), Ok(ramp(256)));

    let short = Launch { params: vec![0; 24].into(), ..largest.launch(Buffers::zeroed()) };
    let error = simt.launch(Stream::Compute, &short).unwrap_err().to_string();
    assert!(error.contains("24 bytes of parameters"), "{error}");
}

#[test]
fn every_block_of_a_grid_runs_once() {
    for seed in SEEDS {
        let Some(simt) = machine(seed) else { return };
        let grid = Try { grid: [7, 5, 3], threads: 64, ..Try::block("count_u32") };
        let counts = grid.bits(&simt, &[], &[], Some(&[0, 0])).unwrap();
        assert_eq!(counts, [7 * 5 * 3 * 64, 7 * 5 * 3 * 64 - 1]);
    }
}

#[test]
fn a_graph_replays_what_was_recorded() {
    let Some(simt) = machine(5) else { return };
    let upload = |v: &[f32]| {
        let at = simt.allocate(4 * v.len(), "a test").unwrap();
        simt.upload(Stream::Compute, at, bytemuck::cast_slice(v)).unwrap();
        at
    };
    let (x, y, copy) = (upload(&ramp(256)), upload(&[0.0; 256]), upload(&[7.0; 257]));
    let launch = Try::block("double_right_f32").launch(Buffers { x, w: Address::NULL, y, n: 256 });
    let read = |at: Address, n: usize| {
        let mut values = vec![0.0f32; n];
        simt.download(Stream::Compute, at, bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    };
    let mut body = || {
        simt.launch(Stream::Compute, &launch)?;
        simt.copy(Stream::Compute, y, copy.offset(4), 1024)?;
        simt.zero(Stream::Compute, copy, 4)
    };
    let graph = simt.capture(&mut body).unwrap();
    assert_eq!((read(y, 256), read(copy, 257)), (vec![0.0; 256], vec![7.0; 257]));
    simt.replay(graph).unwrap();
    let doubled: Vec<f32> = ramp(256).iter().map(|v| 2.0 * v).collect();
    assert_eq!(read(y, 256), doubled);
    assert_eq!(read(copy, 257), [&[0.0], &doubled[..]].concat());
    simt.forget(graph);
    assert!(simt.replay(graph).is_err());

    let host = simt.capture(&mut || simt.upload(Stream::Compute, y, &[0; 4]));
    assert!(host.unwrap_err().to_string().contains("recorded"));
    let beyond = simt.zero(Stream::Compute, copy, 4 * 257 + 1).unwrap_err().to_string();
    assert!(beyond.contains("in no allocation"), "{beyond}");
    let (start, stop) = (simt.event().unwrap(), simt.event().unwrap());
    assert!(simt.seconds(start, stop).is_err());
    simt.record(Stream::Compute, start).and_then(|()| simt.record(Stream::Compute, stop)).unwrap();
    assert!(simt.seconds(start, stop).unwrap() >= 0.0);
}

/// Small integers, the same at every call.
fn integers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 24) % 41) as f32 - 20.0
    };
    (0..n).map(next).collect()
}

/// `y + x·w` for y [16, 8], x [16, K], w [K, 8].
fn product(x: &[f32], w: &[f32], y: &[f32]) -> Vec<f32> {
    let depth = w.len() / 8;
    let dot = |m: usize, n: usize| (0..depth).map(|k| x[m * depth + k] * w[k * 8 + n]).sum::<f32>();
    (0..128).map(|i| y[i] + dot(i / 8, i % 8)).collect()
}

/// The products of a kernel for operands of depth `depth`, and the right ones.
fn products(simt: &Simt, kernel: &'static str, depth: usize, seed: u32) -> (Vec<f32>, Vec<f32>) {
    let (x, w, y) = (integers(16 * depth, seed), integers(8 * depth, seed + 1), integers(128, seed + 2));
    let cast = bytemuck::cast_slice::<f32, u32>;
    let got = Try::warp(kernel).bits(simt, cast(&x), cast(&w), Some(cast(&y))).unwrap();
    (floats(got), product(&x, &w, &y))
}

#[test]
fn tensor_core_products_are_exact_on_integers_and_misplaced_fragments_show() {
    for seed in SEEDS {
        let Some(simt) = machine(seed) else { return };
        for round in 0..50 {
            let right = [("product_right_f16", 16), ("product_right_bf16", 16), ("product_right_tf32", 8)];
            for (kernel, depth) in right {
                let (got, want) = products(&simt, kernel, depth, 1000 * round);
                assert_eq!(got, want, "{kernel}");
            }
        }
        let wrong = [("product_swapped_a_f16", 16), ("product_swapped_b_bf16", 16), ("product_swapped_d_tf32", 8)];
        for (kernel, depth) in wrong {
            let (got, want) = products(&simt, kernel, depth, 7);
            assert_ne!(got, want, "{kernel}");
        }
    }
}

#[test]
fn products_of_several_warps_keep_apart() {
    for seed in SEEDS {
        let Some(simt) = machine(seed) else { return };
        let cast = bytemuck::cast_slice::<f32, u32>;
        let chain = Try::block("product_chain_f16");
        let y = chain.bits(&simt, cast(&ramp(8)), &[], Some(&[0; 1024])).unwrap();
        let want: Vec<f32> = (0..1024).map(|i| 8.0 * 16.0 * (i / 128 + 1) as f32).collect();
        assert_eq!(floats(y), want);
    }
}

/// f32 patterns: all 16-bit ends of each exponent's neighbourhood, ties, subnormals, infinities and NaN.
fn patterns() -> Vec<u32> {
    let mut list = Vec::new();
    for sign in [0, 0x8000_0000u32] {
        for exponent in 0..=255u32 {
            for high in [0, 1, 2, 3, 0x155, 0x2aa, 0x3fe, 0x3ff] {
                for low in [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff] {
                    list.push(sign | exponent << 23 | high << 13 | low);
                }
            }
            for mantissa in [0x7fff, 0x8000, 0x8001, 0x1_7fff, 0x1_8000, 0x1_8001, 0x7f_7fff, 0x7f_8000, 0x7f_ffff] {
                list.push(sign | exponent << 23 | mantissa);
            }
        }
        // Every place of the last bit among the subnormals of f16.
        for shift in 0..24u32 {
            list.extend([0, 1, 2].map(|d| sign | (0x32ff_ffff + (shift << 20) + d)));
        }
    }
    let mut state = 1u32;
    list.extend((0..100_000).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.rotate_left(16)
    }));
    list
}

/// Runs a conversion over `input` and compares with `want`; two NaNs are equal.
fn converts(kernel: &'static str, input: &[u32], want: impl Fn(u32) -> u32, is_nan: impl Fn(u32) -> bool) {
    let Some(simt) = machine(6) else { return };
    let got = Try::elements(kernel, input.len()).bits(&simt, input, &[], None).unwrap();
    for (&x, &y) in input.iter().zip(&got) {
        let right = want(x);
        assert!(y == right || is_nan(y) && is_nan(right), "{kernel}({x:#010x}) = {y:#x}, not {right:#x}");
    }
}

#[test]
fn conversions_round_as_documented() {
    let input = patterns();
    let f16_nan = |b: u32| f16::from_bits(b as u16).is_nan();
    let bf16_nan = |b: u32| bf16::from_bits(b as u16).is_nan();
    let f32_nan = |b: u32| f32::from_bits(b).is_nan();
    converts("to_f16_f32", &input, |b| f16::from_f32(f32::from_bits(b)).to_bits().into(), f16_nan);
    converts("to_bf16_f32", &input, |b| bf16::from_f32(f32::from_bits(b)).to_bits().into(), bf16_nan);
    // To the nearest multiple of 2^(exponent - 10), ties away from zero: in double precision, where it is exact.
    let tf32 = |b: u32| {
        let x = f32::from_bits(b);
        if !x.is_finite() {
            return b;
        }
        let step = 2.0f64.powi(((b >> 23 & 255).max(1)) as i32 - 127 - 10);
        (((f64::from(x) / step).round() * step) as f32).to_bits()
    };
    converts("to_tf32_f32", &input, tf32, f32_nan);
    let all: Vec<u32> = (0..=0xffff).collect();
    converts("from_f16_u16", &all, |b| f16::from_bits(b as u16).to_f32().to_bits(), f32_nan);
    converts("from_bf16_u16", &all, |b| bf16::from_bits(b as u16).to_f32().to_bits(), f32_nan);
}

/// That a tensor core of `simt` multiplies each of the numbers in f16 by one.
fn reads_every_f16(simt: &Simt) {
    let all: Vec<u32> = (0..=0xffff).collect();
    let each = Try { grid: [65_536, 1, 1], ..Try::warp("mma_reads_f16") };
    let got = each.bits(simt, &all, &[], None).unwrap();
    for (&x, y) in all.iter().zip(floats(got)) {
        let want = f16::from_bits(x as u16).to_f32();
        assert!(y == want || y.is_nan() && want.is_nan(), "{x:#06x}: {y}, not {want}");
    }
}

#[test]
fn tensor_cores_read_every_f16() {
    let Some(simt) = machine(7) else { return };
    reads_every_f16(&simt);
}

#[test]
fn the_portable_machine_works_like_the_fast_one() {
    if !cfg!(target_os = "linux") {
        println!("skipped: other systems discourage ucontext");
        return;
    }
    let Some(library) = load(&["-DMLNT_SIMT_PORTABLE"], "simt_portable.so") else { return };
    let library: &'static _ = Box::leak(Box::new(library));
    for seed in SEEDS {
        let simt = machine_of(library, seed);
        let sum = Try::block("sum_right_f32").floats(&simt, &ramp(256));
        assert_eq!(sum, Ok(vec![256.0 * 257.0 / 2.0; 256]));
        for (kernel, depth) in [("product_right_f16", 16), ("product_right_bf16", 16), ("product_right_tf32", 8)] {
            let (got, want) = products(&simt, kernel, depth, 3);
            assert_eq!(got, want, "{kernel}");
        }
        let error = Try::block("barrier_divergent_f32").floats(&simt, &ramp(256)).unwrap_err();
        assert!(error.contains("40 of 256"), "{error}");
    }
    reads_every_f16(&machine_of(library, 7));
}

#[test]
fn address_sanitizer_sees_through_fibers() {
    let sources = ["tests/simt/waiting.cu", "tests/simt/bounds.cu", "tests/simt/standalone.cpp"];
    let Some((program, output)) = compile(&sources, &["-fsanitize=address"], "simt_asan") else { return };
    if !output.status.success() {
        println!("skipped: no AddressSanitizer ({})", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let run = |kernels: &[&str]| {
        let output = Command::new(&program).args(kernels).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    // A fault first: abandoned fibers must not confuse what runs after them on the same stacks.
    let right = ["barrier_divergent_f32", "rounds_right_f32", "sum_right_f32", "pairs_right_f32"];
    let (good, text) = run(&right);
    assert!(good && text.contains("sum_right_f32: 0  256"), "{text}");
    let (good, text) = run(&["pairs_reads_behind_f32"]);
    assert!(!good && text.contains("heap-buffer-overflow") && text.contains("bounds.cu"), "{text}");
    let (good, text) = run(&["shared_writes_behind_f32"]);
    assert!(!good && text.contains("AddressSanitizer") && text.contains("bounds.cu"), "{text}");
}
