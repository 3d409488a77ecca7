//! What does not fit a machine is refused with what it takes and what to do: launches beyond its limits, and memory.

mod frame;

use frame::Framed;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::driver::{Driver, KernelInfo, Launch, Limits};
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostSlice, PlanId};
use mlnt::error::Result;
use mlnt::plan::{Plan, PlanOptions};
use mlnt::tape::{Meta, Tape};
use std::cell::Cell;
use std::rc::Rc;

const REMEDY: &str = "; --batch, --branches, --widths or --blocks lower the need, and mlnt plan shows it";

/// A device with its free memory and its largest allocation.
fn narrow(limits: Limits) -> (Cuda, [Rc<Cell<usize>>; 2]) {
    let machine = Framed::new(limits);
    let knobs = [Rc::clone(&machine.free), Rc::clone(&machine.largest)];
    (Cuda::new(Box::new(machine), Operands::F32, Mode::Graph), knobs)
}

/// A plan of one ReLU: `4·n` bytes of input, as many of activations.
fn relu(n: usize) -> Plan {
    let mut tape = Tape::new(1);
    let x = tape.input("x", Meta::vector(n)).unwrap();
    let y = tape.relu(x).unwrap();
    tape.output("y", y);
    Plan::build(&tape, &PlanOptions::default()).unwrap()
}

fn launch(grid: [u32; 3], threads: u32, shared: u32) -> Launch {
    Launch { kernel: "k", params: [0u8; 24].into(), grid, threads, shared, label: "op: [3] -> [4]".into() }
}

#[test]
fn a_launch_beyond_a_limit_names_kernel_shapes_and_limit() {
    let limits = Limits { grid: [1000, 20, 10], threads: 512, shared: 4096 };
    let kernel = KernelInfo { params: 24, threads: 256 };
    let refuse = |launch: Launch| limits.refuse(&launch, &kernel);
    assert_eq!(refuse(launch([1000, 20, 10], 256, 4096)), None);
    assert_eq!(refuse(launch([1, 1, 1], 32, 0)), None);
    let refused = [
        (launch([1001, 1, 1], 256, 0), "a grid of [1001, 1, 1] blocks, the limit is [1000, 20, 10]"),
        (launch([1, 21, 1], 256, 0), "a grid of [1, 21, 1] blocks"),
        (launch([1, 1, 11], 256, 0), "a grid of [1, 1, 11] blocks"),
        (launch([1, 0, 1], 256, 0), "none may be 0"),
        (launch([1, 1, 1], 288, 0), "288 threads per block; it takes multiples of 32 up to 256"),
        (launch([1, 1, 1], 0, 0), "0 threads per block"),
        (launch([1, 1, 1], 40, 0), "40 threads per block"),
        (launch([1, 1, 1], 256, 4097), "4097 bytes of shared memory per block, the limit is 4096"),
        (
            Launch { params: [0u8; 25].into(), ..launch([1, 1, 1], 256, 0) },
            "25 bytes of parameters, the kernel takes 24",
        ),
    ];
    for (launch, what) in refused {
        let why = refuse(launch).unwrap();
        assert!(why.starts_with("kernel k (op: [3] -> [4]): ") && why.contains(what), "{why}");
    }
    // The machine's limit, where it is the lower one.
    let most = KernelInfo { params: 24, threads: 1024 };
    assert!(limits.refuse(&launch([1, 1, 1], 544, 0), &most).unwrap().contains("up to 512"));
}

#[test]
fn a_plan_whose_launches_do_not_fit_is_refused_when_it_is_loaded() {
    let (mut device, _) = narrow(Limits { grid: [2, 1, 1], ..Limits::COMMON });
    device.load(relu(8)).unwrap();
    let error = device.load(relu(1 << 20)).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("device narrow: kernel relu") && text.ends_with(REMEDY), "{text}");
    assert!(text.contains("(relu: vector[1048576] -> ") && text.contains("the limit is [2, 1, 1]"), "{text}");
    assert_eq!(error.exit_code(), 2);

    // The neighbours of a large batch do not fit the shared memory of a block, on any card that is supported.
    let mut tape = Tape::new(1);
    let x = tape.input("x", Meta::activation(20_000, 1, 1, 1)).unwrap();
    let nearest = tape.nearest_neighbours(x, 3).unwrap();
    tape.output("nearest", nearest);
    let plan = Plan::build(&tape, &PlanOptions::default()).unwrap();
    let text = narrow(Limits::COMMON).0.load(plan).unwrap_err().to_string();
    assert!(
        text.contains("nearest_neighbours_f32 (nearest_neighbours: activation[20000, ") && text.ends_with(REMEDY),
        "{text}"
    );
    assert!(text.contains("161536 bytes of shared memory per block, the limit is 101376"), "{text}");
}

#[test]
fn a_plan_larger_than_the_memory_is_refused_before_any_is_taken() {
    let (mut device, [free, largest]) = narrow(Limits::COMMON);
    // An input and a result of 4 MB each.
    free.set(7_999_999);
    largest.set(0);
    let error = device.load(relu(1_000_000)).unwrap_err();
    assert_eq!(error.to_string(), format!("device narrow: 0.008 GB of memory: 0.008 GB are free{REMEDY}"));
    assert_eq!(error.exit_code(), 2);
    free.set(8_000_100);
    largest.set(usize::MAX);
    device.load(relu(1_000_000)).unwrap();
    // The next one works in the memory that is there already: it needs room for its input alone.
    free.set(4_000_100);
    device.load(relu(1_000_000)).unwrap();
    // And a larger one takes the place of the shared memory.
    free.set(8_000_000 + 4_000_000 + 200);
    device.load(relu(2_000_000)).unwrap();
    free.set(7_999_999);
    device.load(relu(2_000_000)).unwrap_err();
}

#[test]
fn memory_that_cannot_be_had_leaves_no_launch_behind() {
    let (mut device, [_, largest]) = narrow(Limits::COMMON);
    let id = device.load(relu(1000)).unwrap();
    let other = device.load(relu(500)).unwrap();
    let values: Vec<f32> = (0..1000).map(|i| i as f32 - 500.0).collect();
    let run = |device: &mut Cuda, id: PlanId, values: &[f32]| -> Result<Vec<f64>> {
        device.write_input(id, "x", HostSlice::F32(values))?;
        device.run(id, &[])?;
        Ok(device.read_output(id, "y")?.to_f64())
    };
    let before = run(&mut device, id, &values).unwrap();
    assert_eq!(before[501], 1.0);

    // The input of the larger plan fits; its activations, which are padded, do not.
    let plan = relu(100_001);
    largest.set(4 * plan.arena_reals - 1);
    let error = device.load(plan).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("for activations") && text.ends_with(REMEDY), "{text}");
    assert_eq!(error.exit_code(), 2);
    // The shared memory is gone with all that lay in it; a plan that worked in it gets as much as it needs.
    assert!(device.read_output(id, "y").unwrap_err().to_string().contains("did not run last"));
    assert_eq!(run(&mut device, other, &values[..500]).unwrap(), before[..500]);
    assert_eq!(run(&mut device, id, &values).unwrap(), before);
}

#[test]
fn the_simt_machine_has_the_memory_of_the_host() {
    let free = Simt::open(1).unwrap().free_bytes();
    assert!(free.is_none_or(|bytes| bytes > 1 << 20), "{free:?}");
    #[cfg(target_os = "linux")]
    assert!(free.is_some());
    let mut device = Cuda::new(Box::new(Simt::open(1).unwrap()), Operands::F32, Mode::Graph);
    let error = device.load(relu(1 << 40)).unwrap_err().to_string();
    assert!(error.starts_with("device simt: ") && error.ends_with(REMEDY), "{error}");
}
