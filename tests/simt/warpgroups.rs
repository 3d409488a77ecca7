//! Products of warpgroups: descriptors, fences and waits.

use crate::machine::{SEEDS, Try, floats, line_of, machine, ramp};
use mlnt::device::cuda::driver::simt::Simt;

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
    for kernel in ["group_right_f16", "group_transposed_f16", "group_mixed_f16", "group_anew_f16"] {
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
    part("group_anew_no_fence_f16", &|_| true);
    // Thread 77 is lane 13 of warp 2: element 5 is row 32 + 3, column 8 + 2 + 1.
    part("group_changed_f16", &|i| i == 35 * 32 + 11);
    // The granule holds k = 16 of the lines 40 to 47.
    part("group_overwritten_f16", &|i| (40..48).contains(&(i / 32)));
    for have in group_products("group_stale_f16").into_iter().flatten() {
        let before =
            |i: usize| (i / 32 / 16 * 32 + i / 32 % 8 * 4 + i % 8 / 2) + (i % 32 / 8 * 4 + i / 32 % 16 / 8 * 2 + i % 2);
        assert!((0..64 * 32).all(|i| have[i] == want[i] + before(i) as f32));
    }
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
    fails("group_adds_in_part_f16", 128, &["with other operands than its warp"]);
    let line = line_of("warpgroups.cu", "wgmma_f16<false, false>(d, a, a, adds);", 0);
    fails("group_swizzled_f16", 128, &[&line, "unknown"]);
    fails("group_beyond_f16", 128, &[&line, "not in shared memory"]);
    fails("group_in_part_f16", 64, &[&line, "no whole warpgroup"]);
}
