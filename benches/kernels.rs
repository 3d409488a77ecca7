//! Every launch of a whole step where it stands: time, throughput and percentage of the measured roof.
//!
//!     cargo bench --bench kernels -- --device cuda --network resnet32 --precision f16 --branches 10 --out kernels.json
//!
//! Launches of one operation on operands of one shape are one row, the longest in all first. `--profile` runs one step,
//! launch by launch, for a profiler that watches the process, and writes what each launch should do.

mod common;

use clap::Parser;
use common::args::Common;
use common::results::{Results, Samples};
use common::step::{Loaded, Network, plan, spec};
use mlnt::ops::Operation;
use mlnt::plan::{Launch, Plan};
use mlnt::train::choice::Recipe;
use serde_json::{Value, json};

#[derive(Parser)]
#[command(about = "Times every launch of a training step")]
struct Args {
    #[command(flatten)]
    common: Common,
    /// The network.
    #[arg(long, value_enum, default_value = "small")]
    network: Network,
    /// Sets of synthetic labels, M.
    #[arg(long, default_value_t = 4)]
    branches: usize,
    /// Images per step, k.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Update rule.
    #[arg(long, value_enum, default_value = "released")]
    recipe: Recipe,
    /// Timed steps, after two that warm up.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Run one step for a profiler and write its launches, untimed.
    #[arg(long)]
    profile: bool,
}

/// What a launch is and should do, and how many kernels it was.
fn expected(plan: &Plan, launch: &Launch, kernels: usize) -> Value {
    let (flops, bytes) = plan.launch_cost(launch, 4);
    let (op, what) = (launch.op.name(), plan.launch_label(launch));
    json!({ "op": op, "what": what, "phase": launch.phase, "kernels": kernels, "flops": flops, "bytes": bytes })
}

fn main() {
    let args = Args::parse();
    let step = json!({ "network": format!("{:?}", args.network).to_lowercase(), "batch": args.batch,
                       "branches": args.branches, "recipe": args.recipe.to_string() });
    let mut results = Results::new("kernels", &args.common);
    for precision in args.common.precisions() {
        let mut device = args.common.open(precision);
        let spec = spec(args.network.model(), [args.batch, args.branches], args.recipe, false, precision);
        let planned = plan(&spec, &*device);
        if args.profile {
            let kernels = Loaded::new(&mut *device, spec.clone(), planned.clone()).profiled(&mut *device);
            let launches = planned.launches.iter().zip(&kernels);
            let launches: Vec<Value> = launches.map(|(launch, (n, _))| expected(&planned, launch, *n)).collect();
            results.finish(json!({ "step": step, "launches": launches }));
            return;
        }
        let roof = args.common.roof(precision);
        results.begin(device.describe(), precision.to_string(), roof);
        let mut loaded = Loaded::new(&mut *device, spec.clone(), planned.clone());
        // Rows in order of first appearance: name, launches, cost of one, times.
        let mut rows: Vec<(String, usize, (u64, u64), Samples)> = Vec::new();
        let positions: Vec<usize> = planned
            .launches
            .iter()
            .map(|launch| {
                let (name, cost) = (planned.launch_label(launch), planned.launch_cost(launch, 4));
                let at = rows.iter().position(|r| r.0 == name && r.2 == cost).unwrap_or(rows.len());
                if at == rows.len() {
                    rows.push((name, 0, cost, Samples::default()));
                }
                rows[at].1 += 1;
                at
            })
            .collect();
        for run in 0..2 + args.steps.max(1) {
            for (at, (_, seconds)) in positions.iter().zip(loaded.time_launches(&mut *device)) {
                if run >= 2 {
                    rows[*at].3.push(seconds);
                }
            }
        }
        for (name, count, cost, samples) in rows {
            results.add(name, count, cost, &samples);
        }
    }
    results.rows_mut().sort_by(|a, b| (b.seconds * b.count as f64).total_cmp(&(a.seconds * a.count as f64)));
    results.finish(json!({ "step": step }));
}
