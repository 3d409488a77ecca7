//! Time of a whole training step, by M, k, recipe, order and precision.
//!
//!     cargo bench --bench step
//!     cargo bench --bench step -- --device cuda --network resnet32 --precision f16,f32 --branches 1,4,10 --out step.json
//!
//! Throughput is in floating-point operations of the plan. Every run has fresh random data, which are copied before
//! the clock starts.

mod common;

use clap::Parser;
use common::args::Common;
use common::results::{Results, Samples};
use common::step::{Loaded, Network, plan, spec};
use criterion::{Criterion, SamplingMode, Throughput};
use mlnt::train::choice::Recipe;
use serde_json::json;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Times whole training steps")]
struct Args {
    #[command(flatten)]
    common: Common,
    /// The network.
    #[arg(long, value_enum, default_value = "small")]
    network: Network,
    /// Sets of synthetic labels, M.
    #[arg(long, value_name = "M,…", value_delimiter = ',', default_value = "1,4,10")]
    branches: Vec<usize>,
    /// Images per step, k.
    #[arg(long, value_name = "K,…", value_delimiter = ',', default_value = "128")]
    batch: Vec<usize>,
    /// Update rules.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "paper,released")]
    recipe: Vec<Recipe>,
    /// Seconds of measurement per step.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

fn main() {
    let args = Args::parse();
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .nresamples(2000)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs_f64(args.seconds.clamp(0.01, 600.0)));
    if let Some(filter) = &args.common.filter {
        criterion = criterion.with_filter(filter);
    }
    let mut results = Results::new("step", &args.common);
    for precision in args.common.precisions() {
        let device = args.common.open(precision);
        let roof = args.common.roof(precision);
        results.begin(device.describe(), precision.to_string(), roof);
        let mut group = criterion.benchmark_group("step");
        group.sampling_mode(SamplingMode::Flat);
        for (&recipe, &batch) in args.recipe.iter().flat_map(|r| args.batch.iter().map(move |k| (r, k))) {
            for (first_order, &branches) in
                [false, true].iter().flat_map(|o| args.branches.iter().map(move |m| (*o, m)))
            {
                let spec = spec(args.network.model(), [batch, branches], recipe, first_order, precision);
                let planned = plan(&spec, &*device);
                let cost = planned.cost(4);
                let order = if first_order { "first order" } else { "exact" };
                let name = format!("{recipe} {order} k={batch} M={branches}");
                group.throughput(Throughput::Elements(cost.flops()));
                // A device of its own, which gives its memory back.
                let (samples, mut loaded) = (Samples::default(), None);
                group.bench_function(format!("{name} {} {precision}", args.common.device), |b| {
                    let (device, step) = loaded.get_or_insert_with(|| {
                        let mut device = args.common.open(precision);
                        let step = Loaded::new(&mut *device, spec.clone(), planned.clone());
                        (device, step)
                    });
                    b.iter_custom(|times| samples.run(times, || step.run(&mut **device)));
                });
                results.add(name, 1, (cost.flops(), cost.bytes_moved()), &samples);
            }
        }
        group.finish();
    }
    results.finish(json!({ "network": format!("{:?}", args.network).to_lowercase() }));
}
