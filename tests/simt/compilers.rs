//! The machine compiled otherwise: without its own switching of fibers, and under AddressSanitizer.

use crate::conversions::reads_every_f16;
use crate::machine::{SEEDS, Try, compile, load, machine_of, ramp};
use crate::tensor_cores::products;
use std::process::Command;

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
