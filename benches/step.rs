//! Time of a whole training step on the CPU in single precision: widths 8/16/32, one block per stage, images
//! 1×28×28, k = 128, by recipe, order and M. Throughput is in floating-point operations of the plan.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{load_step, step_spec};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use mlnt::mlnt::{Recipe, Report, record_step};
use mlnt::model::{Arch, ModelSpec};
use mlnt::plan::{Plan, PlanOptions};
use std::time::Duration;

fn model() -> ModelSpec {
    ModelSpec {
        arch: Arch::PreactResnet,
        in_channels: 1,
        size: [28, 28],
        classes: 10,
        widths: vec![8, 16, 32],
        blocks: vec![1, 1, 1],
    }
}

fn steps(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut group = c.benchmark_group("step");
    group.sampling_mode(SamplingMode::Flat);
    for (recipe, first_order, branches) in [
        (Recipe::Joint, false, 4),
        (Recipe::Joint, true, 4),
        (Recipe::Sequential, false, 4),
        (Recipe::Sequential, true, 4),
        (Recipe::Joint, false, 1),
        (Recipe::Joint, false, 10),
    ] {
        let spec = step_spec(model(), 128, branches, recipe, first_order);
        let plan = Plan::build(&record_step(&spec, Report::Losses).unwrap(), &PlanOptions::default()).unwrap();
        group.throughput(Throughput::Elements(plan.cost(4).flops()));
        let order = if first_order { "first order" } else { "exact" };
        let name = format!("{recipe:?} {order} M={branches}").to_lowercase();
        group.bench_function(name, |b| {
            let mut step = load_step::<f32>(&spec, Report::Losses, true, threads);
            b.iter(|| step.run());
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .without_plots()
        .sample_size(10)
        .nresamples(1000)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs(1));
    targets = steps
}
criterion_main!(benches);
