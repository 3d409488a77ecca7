//! Every kernel has cases: whoever adds one without is told here.

use mlnt::cases::{Planned, every};
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::embedded::kernels;
use mlnt::device::cuda::{KernelCost, Operands};
use std::collections::BTreeMap;

/// Kernels that no operation of the table launches, and what checks them.
const ELSEWHERE: [(&str, &str); 1] =
    [("augment_u8_f32", "makes batches beside the step: the check of whole steps compares them with the host's")];

/// The kernels that do the work of a case on a card of this generation.
fn of(case: &Planned, operands: Operands, generation: Generation) -> Vec<&'static str> {
    let plan = case.plan(operands.is_half()).unwrap();
    let at = plan.launches.iter().position(|launch| launch.op == case.case.op).unwrap();
    KernelCost::of(&plan, operands, generation).unwrap().kernels[at].clone()
}

/// How many cases launch each kernel, in the precisions and on the generations in which the table is run: `mlnt check` and the tests on the
/// SIMT machine hold each against the plain operations that it stands for.
fn launched() -> BTreeMap<&'static str, usize> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for case in every() {
        for operands in [Operands::F32, Operands::Tf32, Operands::F16, Operands::Bf16] {
            if operands != Operands::F32 && !case.rounds() && !(operands.is_half() && case.narrows().unwrap()) {
                continue;
            }
            for generation in [Generation::Portable, Generation::Hopper] {
                of(&case, operands, generation).into_iter().for_each(|k| *counts.entry(k).or_default() += 1);
            }
        }
    }
    counts
}

#[test]
fn every_kernel_is_launched_by_the_table_of_cases() {
    let counts = launched();
    let elsewhere = |name: &str| ELSEWHERE.iter().any(|(other, _)| *other == name);
    for kernel in kernels() {
        let cases = counts.get(kernel.name).copied().unwrap_or(0);
        println!("{:40} {cases}", kernel.name);
        if elsewhere(kernel.name) {
            assert_eq!(cases, 0, "{} has cases: no reason is wanted", kernel.name);
        } else {
            assert!(cases > 0, "no case of src/cases launches {}", kernel.name);
        }
    }
    for (name, _) in ELSEWHERE {
        assert!(kernels().iter().any(|kernel| kernel.name == name), "there is no kernel {name}");
    }
    println!("{} of {} kernels, by {} cases", counts.len(), kernels().len(), every().len());
}
