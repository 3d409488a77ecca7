//! Time, throughput and percentage of the measured roof of every case of `mlnt::cases`.
//!
//!     cargo bench --bench ops -- conv2d_fprop
//!     cargo bench --bench ops -- --device cuda --precision f32,f16 --out ops.json
//!
//! Operations that do not round their operands run in the first precision only.

mod common;

use clap::Parser;
use common::args::Common;
use common::results::{Results, Samples};
use common::roof::Roof;
use criterion::{Criterion, Throughput};
use mlnt::cases::{Case, all};
use mlnt::device::{Device, PlanId};
use mlnt::ops::Op;
use mlnt::plan::{Plan, PlanOptions};
use serde_json::json;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Times every operation case of the engine")]
struct Args {
    #[command(flatten)]
    common: Common,
}

fn load(device: &mut dyn Device, case: &Case) -> PlanId {
    let plan =
        Plan::build(&case.record().unwrap().tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.operands.iter().zip(case.values(1)) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    id
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
        let roof = Roof::measure(args.device, &mut *device);
        results.begin(device.describe(), precision.to_string(), roof);
        for case in all().into_iter().filter(|case| i == 0 || matches!(case.op, Op::Conv(_))) {
            let (flops, bytes) = case.cost(device.real_bytes()).map(|c| (c.flops(), c.bytes_moved())).unwrap();
            let (samples, mut id) = (Samples::default(), None);
            let mut group = criterion.benchmark_group(case.op_name());
            group.throughput(if flops > 0 { Throughput::Elements(flops) } else { Throughput::Bytes(bytes) });
            let what = case.name.trim_start_matches(case.op_name()).trim();
            group.bench_function(format!("{what} {} {precision}", args.device), |b| {
                let id = *id.get_or_insert_with(|| load(&mut *device, &case));
                b.iter_custom(|times| samples.run(times, || device.run_timed(id, &[]).unwrap()));
            });
            group.finish();
            results.add(case.name.clone(), 1, (flops, bytes), &samples);
        }
    }
    results.finish(json!({}));
}
