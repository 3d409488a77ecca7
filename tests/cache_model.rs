//! The model of the second-level cache against traffic counted by hand.

use mlnt::plan::{Plan, PlanOptions, Traffic};
use mlnt::tape::{Meta, Tape};

/// Bytes of one tensor of the chain: four of the model's lines.
const TENSOR: usize = 4 * 32768;

/// `depth` ReLUs in a row on one tensor of 2^15 reals, as recorded: every launch reads one tensor and writes another.
fn chain(depth: usize) -> Plan {
    let mut tape = Tape::new(1);
    let mut x = tape.input("x", Meta::activation(8, 16, 16, 16)).unwrap();
    for _ in 0..depth {
        x = tape.relu(x).unwrap();
    }
    tape.output("y", x);
    let plan = Plan::build(&tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    assert_eq!(plan.launches.len(), depth);
    plan
}

fn total(traffic: &[Traffic]) -> (u64, u64) {
    (traffic.iter().map(|t| t.read).sum(), traffic.iter().map(|t| t.written).sum())
}

#[test]
fn what_fits_stays() {
    // In the second run all is there, and nothing has to leave.
    assert_eq!(total(&chain(5).traffic(4, 16 * TENSOR)), (0, 0));
}

#[test]
fn what_does_not_fit_is_read_and_written_whole() {
    // With half a tensor of cache nothing is found again but what was touched last; all that is written leaves.
    let depth = 6;
    let (read, written) = total(&chain(depth).traffic(4, TENSOR / 2));
    assert_eq!((read, written), ((depth * TENSOR) as u64, (depth * TENSOR) as u64));
}

#[test]
fn a_result_that_its_reader_finds_is_not_read() {
    // Two tensors fit: each launch finds what the one before has made, and only x is read, once in a run.
    let plan = chain(6);
    let traffic = plan.traffic(4, 2 * TENSOR + TENSOR / 2);
    assert_eq!(traffic[0].read, TENSOR as u64);
    assert_eq!(traffic[1..].iter().map(|t| t.read).sum::<u64>(), 0);
}

#[test]
fn more_cache_never_moves_more() {
    let plan = chain(7);
    let bytes = |cache: usize| plan.traffic(4, cache).iter().map(|t| t.bytes()).sum::<u64>();
    let by_size: Vec<u64> = (1..20).map(|quarters| bytes(quarters * TENSOR / 4)).collect();
    assert!(by_size.windows(2).all(|pair| pair[1] <= pair[0]), "{by_size:?}");
    assert!(by_size[0] > by_size[18]);
}
