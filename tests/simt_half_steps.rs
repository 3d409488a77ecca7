//! Whole training steps with activations of 16 bits on the SIMT host machine.

mod common;

use common::on_two_threads;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::mlnt::golden::{Golden, Groups};
use mlnt::plan::PlanOptions;
use mlnt::train::choice::Precision;
use std::path::Path;

const FILES: [&str; 4] = ["step_sequential", "step_joint", "step_mentor", "step_bottleneck"];
const HALF: PlanOptions = PlanOptions { fuse: true, kernels: false, half: true, group: None };

fn golden(name: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.safetensors"));
    Golden::read(&path).unwrap()
}

fn simt(operands: Operands, seed: u64) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), operands, Mode::Graph)
}

/// They keep to the tolerances of activations in f32. Cotangents are not scaled here; those of these steps are large enough for f16.
#[test]
fn golden_steps_in_16_bits() {
    let precisions = [(Operands::F16, Precision::F16), (Operands::Bf16, Precision::Bf16)];
    let cases: Vec<_> = FILES.iter().flat_map(|name| precisions.map(|precision| (*name, precision))).collect();
    let failures = on_two_threads(&cases, |(name, (operands, precision))| {
        let (golden, tolerance) = (golden(name), precision.tolerance());
        let judge = |options: &PlanOptions| {
            let result = golden.run(&mut simt(*operands, 1), options).unwrap();
            let judgement = golden.judge(&result).unwrap();
            let worst = judgement.replayed.iter().max_by(|a, b| a.1.rel.total_cmp(&b.1.rel)).unwrap();
            (format!("{} {:.1e}", worst.0, worst.1.rel), judgement)
        };
        let ((halves, judgement), (full, _)) = (judge(&HALF), judge(&PlanOptions::default()));
        let text = format!("{name} {}: {halves}, with activations in f32 {full}", operands.name());
        println!("{text}");
        let wrong = !judgement.pass(tolerance) || judgement.replayed.len() != 13;
        wrong.then(|| format!("{text}: {judgement:?}")).into_iter().collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn neither_another_run_nor_another_order_of_threads_changes_a_bit() {
    let run = |seed| -> Groups { golden("step_sequential").run(&mut simt(Operands::F16, seed), &HALF).unwrap().groups };
    let first = run(1);
    for seed in [1, 2] {
        assert!(run(seed) == first, "seed {seed}");
    }
}
