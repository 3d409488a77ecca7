//! Products of single warps, and the order in which they take their operands.

use crate::machine::{SEEDS, Try, all_fail, all_give, floats, machine, ramp};
use mlnt::device::cuda::driver::simt::Simt;

#[test]
fn matrices_come_from_shared_memory_in_the_documented_order() {
    let x = ramp(256);
    all_give("matrices_right_f32", &x);
    let transposed: Vec<f32> = (0..256).map(|i| x[i / 64 * 64 + i % 8 * 8 + i % 64 / 8]).collect();
    all_give("matrices_transposed_f32", &transposed);
    all_fail("matrices_unaligned_f32", &["not 16 aligned bytes", "matrices.cu"]);
}

/// Small integers, the same at every call.
pub fn integers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 24) % 41) as f32 - 20.0
    };
    (0..n).map(next).collect()
}

/// `y + x·w` for y [16, 8], x [16, K], w [K, 8].
pub fn product(x: &[f32], w: &[f32], y: &[f32]) -> Vec<f32> {
    let depth = w.len() / 8;
    let dot = |m: usize, n: usize| (0..depth).map(|k| x[m * depth + k] * w[k * 8 + n]).sum::<f32>();
    (0..128).map(|i| y[i] + dot(i / 8, i % 8)).collect()
}

/// The products of a kernel for operands of depth `depth`, and the right ones.
pub fn products(simt: &Simt, kernel: &'static str, depth: usize, seed: u32) -> (Vec<f32>, Vec<f32>) {
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
