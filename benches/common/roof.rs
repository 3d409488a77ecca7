//! The measured roof: what the engine's own copy and a large convolution of it reach on the device.
//!
//! It is the roof of these kernels, not of the machine: that one a library measures (`baseline/torch_roof.py`).

use mlnt::device::{Device, HostSlice};
use mlnt::ops::{Conv, ConvGeom, ConvKind, LinComb};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::tape::{Coef, Meta, Tape};
use mlnt::train::choice::DeviceKind;

/// Most that was reached, per second.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes.
    pub bytes: f64,
}

/// Runs before the timed ones, and those.
const RUNS: (usize, usize) = (3, 10);

impl Roof {
    /// Measures `device`, with sizes fit for its kind.
    pub fn measure(kind: DeviceKind, device: &mut dyn Device) -> Self {
        // Elements of the copy; samples, channels and pixels of a side of the convolution.
        let (elements, [n, c, side]) = match kind {
            DeviceKind::Cuda(_) | DeviceKind::Auto => (1 << 26, [64, 512, 32]),
            DeviceKind::Cpu => (1 << 24, [8, 128, 16]),
            DeviceKind::Simt => (1 << 12, [1, 16, 4]),
        };
        let (_, bytes) = per_second(device, copy(elements));
        let (flops, _) = per_second(device, convolution(n, c, side));
        Roof { flops, bytes }
    }
}

fn copy(elements: usize) -> Tape {
    let mut tape = Tape::new(1);
    tape.set_phase("roof");
    let x = tape.input("x", Meta::vector(elements)).unwrap();
    let y = tape.record1(LinComb::new(vec![Coef::ONE]), &[x], false).unwrap();
    tape.output("y", y);
    tape
}

fn convolution(n: usize, c: usize, side: usize) -> Tape {
    let (x, w) = (Meta::activation(n, c, side, side), Meta::weight(c, c, 3, 3));
    let geom = ConvGeom::new(&x, &w, 1, 1).unwrap();
    let mut tape = Tape::new(1);
    tape.set_phase("roof");
    let operands = [tape.input("x", x).unwrap(), tape.input("w", w).unwrap()];
    let y = tape.record1(Conv { kind: ConvKind::Fprop, geom }, &operands, false).unwrap();
    tape.output("y", y);
    tape
}

/// Operations and bytes per second, at the median time.
fn per_second(device: &mut dyn Device, tape: Tape) -> (f64, f64) {
    let plan = Plan::build(&tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    let cost = plan.cost(device.real_bytes());
    let inputs = plan.inputs.clone();
    let id = device.load(plan).unwrap();
    for port in inputs {
        // Numbers without a pattern: a card computes faster, and cooler, with zeros.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let values: Vec<f32> = (0..port.meta.len()).map(|_| next()).collect();
        device.write_input(id, &port.name, HostSlice::F32(&values)).unwrap();
    }
    let mut times: Vec<f64> = (0..RUNS.0 + RUNS.1).map(|_| device.run_timed(id, &[]).unwrap()).collect();
    let timed = &mut times[RUNS.0..];
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    (cost.flops() as f64 / median, cost.bytes_moved() as f64 / median)
}
