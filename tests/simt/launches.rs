//! Launches: their limits, the blocks of a grid, and graphs of them.

use crate::machine::{Buffers, SEEDS, Try, machine, ramp};
use bytemuck::Zeroable;
use mlnt::device::cuda::driver::{Address, Driver, Launch, Stream};

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
        simt.download(Stream::Compute, &[(at, 4 * n)], bytemuck::cast_slice_mut(&mut values)).unwrap();
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
