//! `mlnt bench-step`: one training step on random data, timed. The benchmarks in `benches/` call it.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::json;

use super::console::say;
use super::plan::PlanArgs;
use crate::device::{Device, HostSlice};
use crate::error::Result;
use crate::mlnt::{Report, Scales, StateKind, StepScalars, record_step, state_name};
use crate::model::he_init;
use crate::ops::Operation;
use crate::rng::{Purpose, below, normal, stream};
use crate::train::engine::step_spec;
use crate::train::open_device::open_device_with;
use crate::train::timed_step::TimedStep;

/// The arguments of `mlnt bench-step`: those of `plan`, and how often to run.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct BenchStepArgs {
    /// The step.
    #[command(flatten)]
    pub plan: PlanArgs,
    /// Steps to time.
    #[arg(long, default_value_t = 10)]
    pub steps: usize,
    /// Steps before the timed ones.
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Threads; 0 = one per core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print the time of every operation.
    #[arg(long)]
    pub by_operation: bool,
}

/// Peak resident memory of this process, bytes; `None` where the system does not tell.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Median, least and greatest of some times.
fn spread(times: &mut [f64]) -> [f64; 3] {
    times.sort_by(f64::total_cmp);
    [times[times.len() / 2], times[0], times[times.len() - 1]]
}

/// Kernels and seconds of every operation, longest first, from those of a plan's launches.
fn by_operation(launches: &[&'static str], times: &[(usize, f64)]) -> Vec<(&'static str, (usize, f64))> {
    let mut sums: BTreeMap<&'static str, (usize, f64)> = BTreeMap::new();
    for (name, (kernels, time)) in launches.iter().zip(times) {
        let sum = sums.entry(name).or_default();
        *sum = (sum.0 + kernels, sum.1 + time);
    }
    let mut list: Vec<_> = sums.into_iter().collect();
    list.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    list
}

/// Runs `mlnt bench-step`.
///
/// # Errors
/// For settings that are no step, and when a step cannot be taken: a time would mean nothing.
pub(super) fn run(args: &BenchStepArgs) -> Result<u8> {
    let before = peak_rss();
    let mut config = args.plan.config()?;
    let (input, model) = (args.plan.input(), args.plan.model_spec(&config));
    let opened = open_device_with(args.plan.device, config.precision, args.threads, args.plan.kernels)?;
    (config.device, config.precision) = (opened.kind, opened.precision.into());
    let (mut device, why) = (opened.device, opened.text);
    let tape = record_step(&step_spec(&config, model.clone()), Report::Losses)?;
    let plan = config.group.plan(&tape, &device.plan_options(), device.machine())?;
    let (lr, momentum, weight_decay, scales) = (0.05, 0.9, 1e-4, Scales::NONE);
    let scalars = StepScalars { lr, momentum, weight_decay, eta: 0.4, gamma: 0.99, lambda: 1.0, scales };
    let memory = device.plan_bytes(&plan)?;
    let launches: Vec<&'static str> = plan.launches.iter().map(|l| l.op.name()).collect();
    let mut timed = TimedStep::load(&mut *device, plan, config.is_first_order(), scalars)?;
    let id = timed.plan();
    for owner in ["", "teacher."] {
        for (p, values) in model.params().iter().zip(he_init(&model, 1, 0)) {
            device.write_state(&state_name(owner, StateKind::Param, &p.name), HostSlice::F32(&values))?;
        }
    }
    let k = config.batch;
    let weights = vec![1.0 / k as f32; k];
    let (mut seconds, mut own_seconds) = (Vec::with_capacity(args.steps), Vec::with_capacity(args.steps));
    for step in 0..args.warmup + args.steps.max(1) {
        let mut rng = stream(1, Purpose::Test, step as u64, 0);
        let x: Vec<f32> =
            (0..k * input.channels * input.height * input.width).map(|_| normal(&mut rng) as f32).collect();
        let mut labels =
            |n: usize| -> Vec<i32> { (0..n).map(|_| below(input.classes as u64, &mut rng) as i32).collect() };
        let (y, y_syn) = (labels(k), labels(k * config.branches));
        let write = |device: &mut dyn Device| -> Result<()> {
            device.write_input(id, "x", HostSlice::F32(&x))?;
            device.write_input(id, "y", HostSlice::I32(&y))?;
            device.write_input(id, "y_syn", HostSlice::I32(&y_syn))?;
            device.write_input(id, "class_weight", HostSlice::F32(&weights)).map(drop)
        };
        if step == 0 {
            write(&mut *device)?;
            timed.find_scales(&mut *device)?;
        }
        // What overflowed was no step and is no time of one.
        let (start, own) = loop {
            let start = Instant::now();
            write(&mut *device)?;
            let run = |device: &mut dyn Device, id, scalars: &[f64]| device.run_timed(id, scalars);
            if let Some(own) = timed.attempt(&mut *device, run)? {
                break (start, own);
            }
        };
        if step >= args.warmup {
            seconds.push(start.elapsed().as_secs_f64());
            own_seconds.push(own);
        }
    }
    if args.by_operation {
        for (name, (kernels, time)) in by_operation(&launches, &device.time_launches(id, &timed.scalars())?) {
            say(format_args!("{:>10.3} ms {kernels:>5} x {name}", 1e3 * time))?;
        }
    }
    let scales = timed.scales();
    let ([median, min, max], [own, own_min, own_max]) = (spread(&mut seconds), spread(&mut own_seconds));
    match args.plan.json {
        true => say(json!({ "seconds_per_step": median, "min": min, "max": max, "steps": seconds.len(),
                    "device_seconds_per_step": own, "device_min": own_min, "device_max": own_max, "peak_device_bytes": memory,
                    "peak_rss_bytes": peak_rss(), "rss_before_bytes": before, "taken": seconds.len(),
                    "overflows": timed.overflows(), "scales": [scales.inner, scales.outer, scales.second], "device": device.describe(),
                    "precision": opened.precision.to_string() }))?,
        false => {
            let memory = peak_rss().map_or("unknown".into(), |b| format!("{:.0} MB", b as f64 / 1e6));
            say(format_args!("{why}\n{median:.4} s per step (least {min:.4}, most {max:.4}), peak memory {memory}"))?;
        }
    }
    Ok(0)
}
