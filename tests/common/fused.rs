//! What the tests of the planner's fusions share: steps of small networks, their plans, and what the fused ones are held against.
#![allow(dead_code)]

use crate::common::{LoadedStep, deviation, load_plan_on, step_spec};
use mlnt::device::cpu::Cpu;
use mlnt::mlnt::{Recipe, Report, StepSpec, record_step};
use mlnt::model::{Arch, ModelSpec};
use mlnt::ops::{Epilogue, Op, Operation};
use mlnt::plan::{Args, Plan, PlanOptions};
use std::collections::HashMap;

pub const RECIPES: [Recipe; 2] = [Recipe::Sequential, Recipe::Joint];
pub const PLAIN: PlanOptions = PlanOptions::AS_RECORDED;
pub const FUSED: PlanOptions = PlanOptions { fuse: true, ..PLAIN };
pub const KERNELS: PlanOptions = PlanOptions { kernels: true, ..FUSED };

/// A network with an identity and a projection in every stage but the first, which has two identities.
pub fn model(arch: Arch) -> ModelSpec {
    ModelSpec { arch, in_channels: 2, size: [9, 7], classes: 3, widths: vec![4, 6], blocks: vec![2, 2] }
}

pub fn specs(m: usize) -> Vec<(String, StepSpec)> {
    let mut list = Vec::new();
    for arch in [Arch::PreactResnet, Arch::ResnetBottleneck] {
        for recipe in RECIPES {
            for first_order in [false, true] {
                let name = format!("{arch:?} {recipe:?} first order {first_order} M={m}");
                list.push((name, step_spec(model(arch), 4, m, recipe, first_order)));
            }
        }
    }
    list
}

pub fn plan(spec: &StepSpec, options: PlanOptions) -> Plan {
    Plan::build(&record_step(spec, Report::Losses).unwrap(), &options).unwrap()
}

pub fn count(plan: &Plan, wanted: impl Fn(&Op) -> bool) -> usize {
    plan.launches.iter().filter(|launch| wanted(&launch.op)).map(|launch| launch.args.len()).sum()
}

fn load(spec: &StepSpec, plan: Plan) -> LoadedStep<Cpu<f64>> {
    load_plan_on(Cpu::new(2).unwrap(), spec, plan)
}

/// The states after a step, by name.
pub fn states(spec: &StepSpec, plan: Plan) -> Vec<(String, Vec<f64>)> {
    let mut step = load(spec, plan);
    step.run();
    step.states().into_iter().map(|(name, values)| (name, values.to_f64())).collect()
}

/// The largest deviation of a state, and its name.
pub fn worst(have: &[(String, Vec<f64>)], want: &[(String, Vec<f64>)]) -> (f64, String) {
    assert_eq!(have.len(), want.len());
    let each = have.iter().zip(want).map(|((name, have), (same, want))| {
        assert_eq!(name, same);
        (deviation(have, want), name.clone())
    });
    each.fold((0.0, String::new()), |worst, next| if next.0 > worst.0 { next } else { worst })
}

/// What a batch norm's operations are given of sums is what was found of the very tensors that they belong to: the compositions find
/// the sums themselves, so that they would not notice.
pub fn check_sums(plan: &Plan) {
    // By the two sums: which tensors they are of.
    let mut of: HashMap<[usize; 2], [usize; 2]> = HashMap::new();
    for launch in &plan.launches {
        let Args { inputs: i, outputs: o } = &launch.args[0];
        let mut wanted: Vec<([usize; 2], [usize; 2])> = Vec::new();
        match launch.op {
            Op::FusedConv(op) => {
                wanted.extend(
                    op.delta_operands().zip(op.dy_operand()).map(|(d, dy)| ([i[d[5]], i[d[6]]], [i[dy], i[d[0]]])),
                );
                let x = op.x_operand();
                wanted.extend(op.tangent_operands().map(|t| ([i[t[2]], i[t[3]]], [i[0], i[x]])));
                let found = op.epilogue_results().map(|at| at.map(|at| o[at]));
                match (op.epilogue, op.epilogue_operands()) {
                    (Epilogue::BackwardSums, _) => of.extend(found.map(|sums| (sums, [o[0], i[x]]))),
                    (Epilogue::TangentSums, Some(at)) => of.extend(found.map(|sums| (sums, [o[0], i[at[0]]]))),
                    _ => {}
                }
            }
            Op::BnReluBackward(_) => of.extend([([o[1], o[2]], [i[0], i[1]])]),
            Op::BnReluBackwardApply(_) => wanted.push(([i[6], i[7]], [i[0], i[1]])),
            Op::BnReluDoubleBackwardApply(_) => {
                wanted.extend([([i[8], i[9]], [i[2], i[3]]), ([i[10], i[11]], [i[0], i[3]])]);
            }
            _ => {}
        }
        for (sums, tensors) in wanted {
            assert_eq!(of.get(&sums), Some(&tensors), "{}: sums of other tensors", launch.op.name());
        }
    }
}
