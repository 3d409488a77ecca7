//! The GPU driver on a card: `cargo test --release --test gpu -- --ignored`.
//!
//! What kernels compute is tested elsewhere; here it is memory, streams, events and recorded work.

use mlnt::device::cuda::driver::gpu::Gpu;
use mlnt::device::cuda::driver::{Address, Driver, Event, Graph, Launch, Stream};
use mlnt::error::{Error, Result};

fn open() -> Gpu {
    Gpu::open(0).unwrap_or_else(|error| panic!("{error}"))
}

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7) as u8).collect()
}

fn read(gpu: &Gpu, stream: Stream, at: Address, len: usize) -> Vec<u8> {
    let mut to = vec![0xAA; len];
    gpu.download(stream, &[(at, len)], &mut to).unwrap();
    to
}

fn refused<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("this must be refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn what_goes_up_comes_down() {
    let gpu = open();
    // Below and above the sizes of the pieces in which copies are made, and of all page-locked memory.
    for len in [1, 3, 255, 256, 257, 4 << 20, (4 << 20) + 1, 70_000_003] {
        let at = gpu.allocate(len, "a test").unwrap();
        assert_eq!(at.0 % 256, 0);
        for stream in [Stream::Compute, Stream::Copy] {
            let mut from = bytes(len, len);
            let expected = from.clone();
            gpu.upload(stream, at, &from).unwrap();
            from.fill(0x55);
            assert!(read(&gpu, stream, at, len) == expected, "{len} bytes on {stream:?}");
        }
        gpu.free(at);
    }
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn several_ranges_come_down_one_behind_the_other() {
    let gpu = open();
    let ranges =
        [5, 4 << 20, 0, 1, (8 << 20) + 3, 256, 77].map(|len| (gpu.allocate(len.max(1), "a test").unwrap(), len));
    let mut expected = Vec::new();
    for (i, (at, len)) in ranges.into_iter().enumerate() {
        gpu.upload(Stream::Compute, at, &bytes(len, i)).unwrap();
        expected.extend(bytes(len, i));
    }
    for stretch in [&ranges[..], &ranges[..1], &ranges[4..], &[]] {
        let before: usize = ranges.iter().take_while(|r| stretch.first() != Some(r)).map(|(_, len)| len).sum();
        let mut to = vec![0xAA; stretch.iter().map(|(_, len)| len).sum()];
        gpu.download(Stream::Compute, stretch, &mut to).unwrap();
        assert!(stretch.is_empty() || to == expected[before..before + to.len()]);
    }
    assert!(refused(gpu.download(Stream::Compute, &ranges[..1], &mut [0; 4])).contains("a download of"));
    ranges.into_iter().for_each(|(at, _)| gpu.free(at));
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn many_small_uploads_keep_their_values_and_order() {
    let gpu = open();
    let at = gpu.allocate(1 << 20, "a test").unwrap();
    for i in 0..5_000 {
        let stream = if i % 2 == 0 { Stream::Compute } else { Stream::Copy };
        gpu.upload(stream, at.offset(200 * i), &bytes(200, i)).unwrap();
    }
    gpu.synchronize().unwrap();
    let all = read(&gpu, Stream::Compute, at, 1_000_000);
    assert!(all.chunks(200).enumerate().all(|(i, piece)| piece == bytes(200, i)));
    gpu.upload(Stream::Compute, at, &bytes(64, 1)).unwrap();
    gpu.upload(Stream::Compute, at, &bytes(64, 2)).unwrap();
    assert_eq!(read(&gpu, Stream::Compute, at, 64), bytes(64, 2));
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn memory_is_zeroed_and_copied_across_streams() {
    let gpu = open();
    let (a, b) = (gpu.allocate(1000, "a").unwrap(), gpu.allocate(1000, "b").unwrap());
    gpu.upload(Stream::Copy, a, &bytes(1000, 1)).unwrap();
    let (first, second) = (gpu.event().unwrap(), gpu.event().unwrap());
    gpu.record(Stream::Copy, first).unwrap();
    gpu.wait(Stream::Compute, first).unwrap();
    gpu.copy(Stream::Compute, a, b, 1000).unwrap();
    gpu.zero(Stream::Compute, b.offset(100), 50).unwrap();
    gpu.zero(Stream::Compute, b, 0).unwrap();
    gpu.record(Stream::Compute, second).unwrap();
    let mut expected = bytes(1000, 1);
    expected[100..150].fill(0);
    assert_eq!(read(&gpu, Stream::Compute, b, 1000), expected);
    let seconds = gpu.seconds(first, second).unwrap();
    assert!(seconds > 0.0 && seconds < 10.0, "{seconds}");
    assert!(refused(gpu.seconds(first, Event(7))).contains("no event number 7"));
    assert!(refused(gpu.replay(Graph(7))).contains("no graph number 7"));
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn recorded_work_runs_at_each_replay_and_not_before() {
    let gpu = open();
    let (a, b) = (gpu.allocate(512, "a").unwrap(), gpu.allocate(512, "b").unwrap());
    gpu.zero(Stream::Compute, b, 512).unwrap();
    let event = gpu.event().unwrap();
    let mut inside = Vec::new();
    let graph = gpu
        .capture(&mut || {
            gpu.copy(Stream::Compute, a, b, 256)?;
            gpu.zero(Stream::Compute, b.offset(128), 64)?;
            inside.push(refused(gpu.upload(Stream::Compute, a, &[0; 4])));
            inside.push(refused(gpu.download(Stream::Compute, &[(a, 4)], &mut [0; 4])));
            inside.push(refused(gpu.synchronize()));
            inside.push(refused(gpu.allocate(1, "a test")));
            inside.push(refused(gpu.record(Stream::Compute, event)));
            inside.push(refused(gpu.zero(Stream::Copy, a, 1)));
            inside.push(refused(gpu.capture(&mut || Ok(()))));
            Ok(())
        })
        .unwrap();
    assert!(inside.iter().all(|text| text.contains("cannot be recorded")), "{inside:?}");
    assert_eq!(read(&gpu, Stream::Compute, b, 512), [0; 512], "nothing has run yet");
    for seed in 1..4 {
        gpu.upload(Stream::Compute, a, &bytes(512, seed)).unwrap();
        gpu.replay(graph).unwrap();
        let mut expected = bytes(512, seed);
        expected[128..192].fill(0);
        expected[256..].fill(0);
        assert_eq!(read(&gpu, Stream::Compute, b, 512), expected);
    }
    gpu.forget(graph);
    assert!(refused(gpu.replay(graph)).contains("no graph"));
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn a_failing_body_ends_the_recording_and_its_error_is_told() {
    let gpu = open();
    let at = gpu.allocate(256, "a test").unwrap();
    let late = gpu.allocate(256, "a test").unwrap();
    let text = refused(gpu.capture(&mut || {
        gpu.zero(Stream::Compute, at, 256)?;
        gpu.free(late);
        Err(Error::usage("the body's own error"))
    }));
    assert_eq!(text, "the body's own error");
    gpu.upload(Stream::Compute, at, &bytes(256, 1)).unwrap();
    assert_eq!(read(&gpu, Stream::Compute, at, 256), bytes(256, 1));
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        gpu.capture(&mut || panic!("on purpose")).map(|_| ())
    }));
    assert!(unwound.is_err());
    assert_eq!(read(&gpu, Stream::Compute, at, 256), bytes(256, 1));
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn errors_name_what_was_asked_for() {
    let gpu = open();
    let text = refused(gpu.allocate(1 << 50, "all there is"));
    for word in ["all there is", "CUDA_ERROR_OUT_OF_MEMORY", "GB are free"] {
        assert!(text.contains(word), "{text}");
    }
    let (kernel, label) = ("no_such_kernel", "a test".into());
    let launch = Launch { kernel, params: Box::default(), grid: [1; 3], threads: 32, shared: 0, label };
    assert!(refused(gpu.launch(Stream::Compute, &launch)).contains("no kernel named no_such_kernel"));
}

#[test]
#[ignore = "needs an NVIDIA card"]
fn a_card_can_be_open_twice_and_opened_again() {
    let first = open();
    let at = first.allocate(64, "a test").unwrap();
    first.upload(Stream::Compute, at, &bytes(64, 3)).unwrap();
    let second = open();
    second.allocate(64, "a test").unwrap();
    drop(second);
    // The context of this thread went with the second; the first makes its own current.
    assert_eq!(read(&first, Stream::Compute, at, 64), bytes(64, 3));
    let card = &Gpu::probe().unwrap().cards[0];
    assert!(card.free_bytes().unwrap() <= card.memory);
    assert!(first.free_bytes().unwrap() <= card.memory);
    drop(first);
    assert!(open().limits().shared >= 48 * 1024);
}
