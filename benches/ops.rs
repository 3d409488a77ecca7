//! Time and throughput of every case of `mlnt::cases` on the CPU in single precision, on as many threads as there
//! are cores. `cargo bench --bench ops -- conv2d_fprop` picks some of them.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mlnt::cases::all;
use mlnt::device::Device;
use mlnt::device::cpu::Cpu;
use mlnt::plan::{Plan, PlanOptions};
use std::time::Duration;

fn operations(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for case in all() {
        let (flops, bytes) = case.cost(4).map(|cost| (cost.flops(), cost.bytes_moved())).unwrap();
        let mut group = c.benchmark_group(case.op_name());
        group.throughput(if flops > 0 { Throughput::Elements(flops) } else { Throughput::Bytes(bytes) });
        let what = case.name.trim_start_matches(case.op_name()).trim();
        group.bench_function(what, |b| {
            let plan =
                Plan::build(&case.record().unwrap().tape, &PlanOptions { fuse: false, ..PlanOptions::default() })
                    .unwrap();
            let mut device = Cpu::<f32>::new(threads).unwrap();
            let id = device.load(plan).unwrap();
            for (operand, values) in case.operands.iter().zip(case.values(1)) {
                device.write_input(id, operand.name, values.as_slice()).unwrap();
            }
            b.iter(|| device.run(id, &[]).unwrap());
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .without_plots()
        .sample_size(10)
        .nresamples(1000)
        .warm_up_time(Duration::from_millis(5))
        .measurement_time(Duration::from_millis(25));
    targets = operations
}
criterion_main!(benches);
