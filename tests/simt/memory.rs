//! Guard bands and poison, in device memory and in shared memory.

use crate::machine::{Try, machine, ramp};

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
