//! What `percent of the roof` is a percentage of. Where a library has been measured on the same card (`baseline/torch_roof.py`), what its
//! matrix product and copy reach; else the best that the engine's own convolutions reach, in the widths that a step has, and its own
//! copy: a roof of these kernels, not of the machine.

use mlnt::device::{Device, HostSlice};
use mlnt::ops::{Conv, ConvGeom, ConvKind, LinComb, Op};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::tape::{Coef, Meta, Tape};
use mlnt::train::choice::DeviceKind;
use serde_json::Value;
use std::path::Path;

/// Most that was reached, per second.
#[derive(Clone, Debug)]
pub struct Roof {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes. What stays in a cache can be faster.
    pub bytes: f64,
    /// What reached that many operations.
    pub best: String,
    /// Whether it is a library's.
    pub library: bool,
}

/// Runs before the timed ones, and those.
const RUNS: (usize, usize) = (3, 10);

/// The three convolutions.
const KINDS: [ConvKind; 3] = [ConvKind::Fprop, ConvKind::Dgrad, ConvKind::Wgrad];

impl Roof {
    /// The library's roof of `device` in `precision` from `folder`, or what the engine itself reaches on it.
    pub fn find(folder: &Path, kind: DeviceKind, precision: &str, device: &mut dyn Device) -> Self {
        Self::of_library(folder, &device.describe(), precision).unwrap_or_else(|| Self::measure(kind, device))
    }

    /// That of the newest `*roof.json` in `folder` that is of the card that `described` names and has the precision.
    pub fn of_library(folder: &Path, described: &str, precision: &str) -> Option<Self> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder).ok()?.flatten() {
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            let Some(text) = name.ends_with("roof.json").then(|| std::fs::read_to_string(&path).ok()).flatten() else {
                continue;
            };
            let Ok(value) = serde_json::from_str::<Value>(&text) else { continue };
            let card = value["card"].as_str().unwrap_or("");
            let same = described.split([',', '(', ')']).any(|part| !card.is_empty() && part.trim() == card);
            let rates = [&value["flop_per_second"][precision], &value["bytes_per_second"]].map(Value::as_f64);
            if let (true, [Some(flops), Some(bytes)]) = (same, rates) {
                let best = format!("a library's matrix product, {name}");
                let when = entry.metadata().and_then(|m| m.modified()).ok();
                found.push((when, Roof { flops, bytes, best, library: true }));
            }
        }
        found.into_iter().max_by_key(|(when, _)| *when).map(|(_, roof)| roof)
    }

    /// Measures `device`, with sizes fit for its kind: the best of several convolutions, and a copy.
    pub fn measure(kind: DeviceKind, device: &mut dyn Device) -> Self {
        // Elements of the copy; samples, channels and pixels of a side of the convolutions.
        let (elements, shapes): (usize, &[[usize; 3]]) = match kind {
            DeviceKind::Cuda(_) | DeviceKind::Auto => {
                (1 << 26, &[[64, 512, 32], [128, 256, 32], [128, 128, 32], [256, 512, 16]])
            }
            DeviceKind::Cpu => (1 << 24, &[[8, 128, 16], [16, 64, 32], [8, 256, 8]]),
            DeviceKind::Simt => (1 << 12, &[[1, 16, 4], [1, 8, 8]]),
        };
        let half = device.plan_options().half;
        let (_, bytes) = per_second(device, copy(elements));
        let mut roof = Roof { flops: 0.0, bytes, best: String::new(), library: false };
        for &[n, c, side] in shapes {
            for kind in KINDS {
                let (flops, _) = per_second(device, convolution(kind, [n, c, side], half));
                roof.raise(flops, || format!("{kind:?} of {n}x{c}x{side}x{side}, {c} filters 3x3"));
            }
        }
        roof
    }

    /// Takes what the run itself has reached with `what`, where that is more: no kernel of ours is above our own roof. A library's stays.
    pub fn raise(&mut self, flops: f64, what: impl FnOnce() -> String) {
        if !self.library && flops > self.flops {
            (self.flops, self.best) = (flops, what());
        }
    }

    /// What the percentages are of, in words.
    pub fn text(&self) -> String {
        let of = if self.library { "roof of a library" } else { "the best that our own convolutions reach" };
        format!("{of}: {:.3} TFLOP/s ({}), {:.1} GB/s (a copy)", self.flops / 1e12, self.best, self.bytes / 1e9)
    }
}

fn copy(elements: usize) -> Plan {
    let mut tape = Tape::new(1);
    tape.set_phase("roof");
    let x = tape.input("x", Meta::vector(elements)).unwrap();
    let y = tape.record1(LinComb::new(vec![Coef::ONE]), &[x], false).unwrap();
    tape.output("y", y);
    Plan::build(&tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap()
}

/// A convolution on activations of the plan's own, in 16 bits with `half`; inputs and outputs are in 32.
fn convolution(kind: ConvKind, [n, c, side]: [usize; 3], half: bool) -> Plan {
    let (x, w) = (Meta::activation(n, c, side, side), Meta::weight(c, c, 3, 3));
    let geom = ConvGeom::new(&x, &w, 1, 1).unwrap();
    let mut tape = Tape::new(1);
    tape.set_phase("roof");
    let second = if kind == ConvKind::Wgrad { x } else { w };
    let operands = [("a", x), ("b", second)].map(|(name, meta)| {
        let given = tape.input(name, meta).unwrap();
        tape.scale(Coef::ONE, given).unwrap()
    });
    let y = tape.record1(Conv { kind, geom }, &operands, false).unwrap();
    let read = tape.scale(Coef::ONE, y).unwrap();
    tape.output("y", read);
    Plan::build(&tape, &PlanOptions { fuse: false, half, ..PlanOptions::default() }).unwrap()
}

/// Operations and bytes per second at the median time: of the only convolution among the plan's launches, or of the whole plan without one.
fn per_second(device: &mut dyn Device, plan: Plan) -> (f64, f64) {
    let inputs = plan.inputs.clone();
    let at = plan.launches.iter().position(|launch| matches!(launch.op, Op::Conv(_)));
    let whole = plan.cost(device.real_bytes());
    let (flops, bytes) = match at {
        Some(at) => plan.launch_cost(&plan.launches[at], device.real_bytes()),
        None => (whole.flops(), whole.bytes_moved()),
    };
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
    let mut once = || match at {
        Some(at) => device.time_launches(id, &[]).unwrap()[at].1,
        None => device.run_timed(id, &[]).unwrap(),
    };
    let mut times: Vec<f64> = (0..RUNS.0 + RUNS.1).map(|_| once()).collect();
    let timed = &mut times[RUNS.0..];
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    (flops as f64 / median, bytes as f64 / median)
}
