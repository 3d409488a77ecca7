//! Barriers, shuffles and copies: what a warp or a block does together, and what shows when it does not.

use crate::machine::{all_fail, all_give, line_of, over_seeds, ramp, seeds_differ};

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
fn copies_to_shared_memory_are_poison_until_they_are_done() {
    let at = |i: usize| (i + 37) % 256;
    let want: Vec<f32> = (0..256).map(|i| if at(i) / 4 % 3 == 0 { 0.0 } else { (at(i) + 1) as f32 }).collect();
    all_give("copies_right_f32", &want);
    for result in over_seeds("copies_read_too_early_f32").into_iter().flatten() {
        assert!(result.unwrap().iter().all(|v| v.is_nan()));
    }
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
