//! The part of `build.rs` that reads the kernels' sources.

#[path = "../build/sources.rs"]
mod sources;

use sources::{Kernel, SM_90A, find, kernels_in, reached_from};
use std::path::Path;

#[test]
fn kernels_are_found_where_they_are_defined() {
    let text = "// KERNEL(not_this, P, 32)\n#define KERNEL(name, Params, threads) void name()\n\
                KERNEL(bn_forward_f32, BnForwardParams, 256) {\n}\nKERNEL( conv_fprop_f16 ,ConvParams,128 ) { conv<F16>(p); }\n";
    let kernel = |name: &str, params: &str, threads| Kernel { name: name.into(), params: params.into(), threads };
    let expected = [kernel("bn_forward_f32", "BnForwardParams", 256), kernel("conv_fprop_f16", "ConvParams", 128)];
    assert_eq!(kernels_in(text).unwrap(), expected);
}

#[test]
fn a_kernel_that_the_scan_would_miss_is_refused_with_its_line() {
    for wrong in [
        "  KERNEL(indented_f32, P, 256) {}",
        "KERNEL(two_lines_f32,\n       P, 256) {}",
        "KERNEL(named_f32, P, THREADS) {}",
        "KERNEL(no_threads_f32, P) {}",
        "KERNEL(half_a_warp_f32, P, 48) {}",
        "KERNEL(none_f32, P, 0) {}",
        "KERNEL(many_f32, P, 2048) {}",
        "KERNEL(name with blanks, P, 32) {}",
    ] {
        let error = kernels_in(&format!("// first line\n{wrong}\n")).unwrap_err();
        assert!(error.starts_with("2: expected KERNEL(name, Params, threads)"), "{error}");
    }
}

#[test]
fn a_folder_gives_its_files_in_order_and_a_name_once() {
    let folder = tempfile::tempdir().unwrap();
    assert!(find(&folder.path().join("absent")).unwrap().is_empty());
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("b.cu", "KERNEL(b_f32, P, 64) {}");
    write("a.cu", "KERNEL(a_f32, P, 32) {}");
    write("c.cuh", "KERNEL(c_f32, P, 32) {}");
    let found = find(folder.path()).unwrap();
    assert!(found.iter().map(|source| source.module.as_str()).eq(["a", "b"]));
    assert!(found.iter().all(|source| source.path.is_file() && source.kernels.len() == 1 && !source.sm_90a));
    write("a.cu", &format!("{SM_90A}\nKERNEL(a_f32, P, 32) {{}}"));
    write("b.cu", &format!("// {SM_90A}\nKERNEL(b_f32, P, 32) {{}}"));
    assert!(find(folder.path()).unwrap().iter().map(|source| source.sm_90a).eq([true, false]));
    write("d.cu", "KERNEL(a_f32, P, 32) {}");
    assert_eq!(find(folder.path()).err().unwrap(), "kernel a_f32 is defined twice");
}

#[test]
fn a_file_is_made_from_all_it_includes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("include")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
    write(
        "a.cu",
        "#include \"platform.cuh\"\n#include <stdint.h>\n#include \"missing.h\"\n# include \"beside.h\" // text\n",
    );
    write("beside.h", "");
    write("other.h", "");
    write("include/platform.cuh", "#pragma once\n  #include \"params.h\"\n");
    write("include/params.h", "#include \"platform.cuh\"\n");
    let found = reached_from(&at("a.cu"), &[Path::new(&at("include"))]).unwrap();
    let expected = ["a.cu", "beside.h", "include/params.h", "include/platform.cuh"].map(at);
    assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn the_program_holds_the_kernels_of_the_sources() {
    let sources = find(&Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")).unwrap();
    let expected =
        sources.iter().flat_map(|s| s.kernels.iter().map(|k| (&*k.name, &*s.module, &*k.params, k.threads, s.sm_90a)));
    let held =
        mlnt::device::cuda::embedded::kernels().iter().map(|k| (k.name, k.module, k.params, k.threads, k.sm_90a));
    assert_eq!(held.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
}
