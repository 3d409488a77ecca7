//! Time, throughput and percentage of the measured roof of every case of `mlnt::cases`.
//!
//!     cargo bench --bench ops -- conv2d_fprop
//!     cargo bench --bench ops -- --device cuda --precision f32,f16 --out ops.json
//!
//! Operations that do not depend on the precision run in the first one only; those of the planner, on devices that run the kernels.

mod common;

use clap::Parser;
use common::args::Common;
use common::results::{Results, Samples};
use criterion::{Criterion, Throughput};
use mlnt::cases::{Planned, every};
use mlnt::device::{Device, PlanId};
use mlnt::train::choice::{DeviceKind, Precision};
use serde_json::json;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Times every operation case of the engine")]
struct Args {
    #[command(flatten)]
    common: Common,
}

/// A case on a device.
struct Loaded {
    id: PlanId,
    /// Its launch, if it stands among others that bring operands into their width and results out of it.
    among: Option<usize>,
}

fn load(device: &mut dyn Device, case: &Planned, half: bool) -> Loaded {
    let plan = case.plan(half).unwrap();
    let at = plan.launches.iter().position(|launch| launch.op == case.case.op).unwrap();
    let among = (plan.launches.len() > 1).then_some(at);
    let id = device.load(plan).unwrap();
    for (operand, values) in case.case.operands.iter().zip(case.values(1, |v| v)) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    Loaded { id, among }
}

impl Loaded {
    /// Seconds that the operation takes in a run.
    fn seconds(&self, device: &mut dyn Device) -> f64 {
        match self.among {
            None => device.run_timed(self.id, &[]).unwrap(),
            Some(at) => device.time_launches(self.id, &[]).unwrap()[at].1,
        }
    }
}

fn main() {
    let args = Args::parse().common;
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .nresamples(2000)
        .warm_up_time(Duration::from_millis(5))
        .measurement_time(Duration::from_millis(25));
    if let Some(filter) = &args.filter {
        criterion = criterion.with_filter(filter);
    }
    let mut results = Results::new("ops", &args);
    for (i, precision) in args.precisions().into_iter().enumerate() {
        let mut device = args.open(precision);
        let roof = args.roof(precision);
        results.begin(device.describe(), precision.to_string(), roof);
        let half = matches!(precision, Precision::F16 | Precision::Bf16);
        let kernels = matches!(args.device, DeviceKind::Cuda(_) | DeviceKind::Simt);
        for planned in every().into_iter().filter(|case| kernels || !case.case.op.is_for_kernels()) {
            let case = &planned.case;
            if i > 0 && !planned.rounds() && !(half && planned.narrows().unwrap()) {
                continue;
            }
            let plan = planned.plan(half).unwrap();
            let launch = plan.launches.iter().find(|launch| launch.op == case.op).unwrap();
            let (flops, bytes) = plan.launch_cost(launch, device.real_bytes());
            let (samples, mut loaded) = (Samples::default(), None);
            let mut group = criterion.benchmark_group(case.op_name());
            group.throughput(if flops > 0 { Throughput::Elements(flops) } else { Throughput::Bytes(bytes) });
            let what = case.name.trim_start_matches(case.op_name()).trim();
            group.bench_function(format!("{what} {} {precision}", args.device), |b| {
                let loaded = loaded.get_or_insert_with(|| load(&mut *device, &planned, half));
                b.iter_custom(|times| samples.run(times, || loaded.seconds(&mut *device)));
            });
            group.finish();
            results.add(case.name.clone(), 1, (flops, bytes), &samples);
        }
    }
    results.finish(json!({}));
}
