//! Plans: fusions change no result, live tensors never overlap, dead code goes, assignments keep their meaning, and
//! a step costs what it must.

mod common;

use common::{Runner, deviation, load_step, small_model, step_spec};
use mlnt::device::HostVec;
use mlnt::device::cpu::Cpu;
use mlnt::device::{Device, HostSlice};
use mlnt::mlnt::{CeSpec, Recipe, Report, record_ce_step, record_step};
use mlnt::model::{Arch, ModelSpec};
use mlnt::ops::{Op, Operation};
use mlnt::plan::{Place, Plan, PlanOptions};
use mlnt::tape::{Coef, DType, Fan, Kind, Meta, Tape};
use std::collections::HashMap;

const ARCHS: [Arch; 2] = [Arch::PreactResnet, Arch::ResnetBottleneck];
const RECIPES: [Recipe; 2] = [Recipe::Sequential, Recipe::Joint];

/// Plans of every kind of step of both networks, with their names.
fn plans(options: &PlanOptions) -> Vec<(String, Plan)> {
    let mut list = Vec::new();
    for arch in ARCHS {
        for recipe in RECIPES {
            for first_order in [false, true] {
                for report in [Report::Losses, Report::Everything, Report::Replay] {
                    let spec = step_spec(small_model(arch), 4, 3, recipe, first_order);
                    let plan = Plan::build(&record_step(&spec, report).unwrap(), options).unwrap();
                    list.push((format!("{arch:?} {recipe:?} first order {first_order} {report:?}"), plan));
                }
            }
        }
        let spec = CeSpec { model: small_model(arch), batch: 4, momentum: 0.9, weight_decay: 1e-3, scaled: false };
        let plan = Plan::build(&record_ce_step(&spec, "").unwrap(), options).unwrap();
        list.push((format!("{arch:?} cross entropy"), plan));
    }
    list
}

#[test]
fn fused_plans_compute_the_same_in_fewer_launches() {
    for arch in ARCHS {
        for recipe in RECIPES {
            for first_order in [false, true] {
                let spec = step_spec(small_model(arch), 4, 3, recipe, first_order);
                let run = |fuse: bool| {
                    let mut step = load_step::<f64>(&spec, Report::Losses, fuse, 2);
                    step.run();
                    (step.states(), step.launches)
                };
                let ((fused, few), (plain, many)) = (run(true), run(false));
                println!("{arch:?} {recipe:?} first order {first_order}: {few} launches instead of {many}");
                assert!(few < many);
                for ((name, have), (same, want)) in fused.iter().zip(&plain) {
                    assert_eq!(name, same);
                    let off = deviation(&have.to_f64(), &want.to_f64());
                    assert!(off <= 1e-13, "{arch:?} {recipe:?} first order {first_order}: {name} is off by {off:.1e}");
                }
            }
        }
    }
}

/// Whether operand `i` of an operation may share its memory with result `o`.
fn in_place(op: &Op, i: usize, o: usize) -> bool {
    match op {
        Op::LinComb(_) => true,
        Op::Conv(_) => i == 2,
        Op::FusedConv(op) => op.start_operand() == Some(i),
        Op::BnReluBackward(_) => i == 0 || i == 6,
        Op::BnReluBackwardApply(op) => i == 0 || i >= op.first_start(),
        Op::BnReluDoubleBackward(_) => i == 0 || i == 3,
        Op::BnReluDoubleBackwardApply(_) => i == 0 || i == 2 || i == 12,
        Op::Update(op) => op.parts().any(|part| part.operands.contains(&i) && part.results.contains(&o)),
        _ => false,
    }
}

/// Follows the content of memory through the launches: which buffer was last written where.
///
/// Operand sets of one launch may run at the same time: all reads must be good before the launch, and no result may
/// lie over anything read or written by the same launch, except where an operation works in place.
fn check_memory(name: &str, plan: &Plan) {
    type Space = (usize, DType, bool);
    let span = |b: usize| -> (Space, usize, usize) {
        let buffer = &plan.buffers[b];
        let space = match buffer.place {
            Place::Arena(_) => (0, buffer.meta.dtype, buffer.half),
            Place::State(i) => (1 + 2 * i, DType::Real, false),
            Place::Input(i) => (2 + 2 * i, DType::Real, false),
        };
        (space, buffer.start(), buffer.start() + buffer.elements())
    };
    let overlap = |a: usize, b: usize| {
        let ((sa, fa, ta), (sb, fb, tb)) = (span(a), span(b));
        sa == sb && fa < tb && fb < ta
    };
    // Whether a buffer can be read: itself, or each of its branches as part of another one that holds some of them.
    let can_be_read = |whole: &[usize], b: usize| {
        let (buffer, (space, from, _)) = (&plan.buffers[b], span(b));
        let holds = |other: usize, m: usize| {
            let (o, (other_space, other_from, _)) = (&plan.buffers[other], span(other));
            let there = other_space == space && (o.meta, o.half) == (buffer.meta, buffer.half);
            let part = (o.first, o.count) != (buffer.first, buffer.count) && (o.first..o.first + o.count).contains(&m);
            there && part && other_from + (m - o.first) * o.meta.len() == from + (m - buffer.first) * o.meta.len()
        };
        let mut branches = buffer.first..buffer.first + buffer.count;
        whole.contains(&b) || branches.all(|m| whole.iter().any(|other| holds(*other, m)))
    };
    // Buffers whose content is whole at the moment.
    let mut whole: Vec<usize> = Vec::new();
    for port in plan.states.iter().chain(&plan.inputs) {
        whole.extend(port.buffer);
    }
    for (l, launch) in plan.launches.iter().enumerate() {
        let what = format!("{name}, launch {l}, {}", launch.op.name());
        for (s, set) in launch.args.iter().enumerate() {
            set.inputs.iter().for_each(|b| assert!(can_be_read(&whole, *b), "{what}: reads {b}, which is gone"));
            for (o, out) in set.outputs.iter().enumerate() {
                let (space, _, end) = span(*out);
                let arena = match space {
                    (_, DType::Index, _) => plan.arena_indices,
                    (_, DType::Real, true) => plan.arena_halves,
                    (_, DType::Real, false) => plan.arena_reals,
                };
                assert!(space.0 != 0 || end <= arena, "{what}: past the end of the arena");
                for (t, other) in launch.args.iter().enumerate() {
                    for (i, input) in other.inputs.iter().enumerate() {
                        let (a, b) = (&plan.buffers[*input], &plan.buffers[*out]);
                        let allowed = s == t
                            && in_place(&launch.op, i, o)
                            && (a.place, a.meta, a.half) == (b.place, b.meta, b.half);
                        assert!(allowed || !overlap(*input, *out), "{what}: {out} over its operand {input}");
                    }
                    let same = |o: usize| s == t && o == *out;
                    let clash = other.outputs.iter().find(|o| !same(**o) && overlap(**o, *out));
                    assert_eq!(clash, None, "{what}: {out} over another result");
                }
            }
        }
        for out in launch.args.iter().flat_map(|set| &set.outputs) {
            whole.retain(|b| !overlap(*b, *out));
            whole.push(*out);
        }
    }
    for port in &plan.outputs {
        let buffer = port.buffer.unwrap();
        assert!(can_be_read(&whole, buffer), "{name}: output {} is gone at the end", port.name);
    }
}

#[test]
fn live_tensors_never_overlap() {
    let plain = PlanOptions::default();
    for options in [
        PlanOptions { fuse: false, ..plain },
        plain,
        PlanOptions { fuse: false, group: Some(2), ..plain },
        PlanOptions { group: Some(1), ..plain },
        PlanOptions { group: Some(2), ..plain },
        PlanOptions { group: Some(2), kernels: true, ..plain },
        PlanOptions { group: Some(2), kernels: true, half: true, ..plain },
        PlanOptions { group: Some(2), kernels: true, half: true, recompute: true, ..plain },
    ] {
        for (name, plan) in plans(&options) {
            check_memory(&format!("{name}, {options:?}"), &plan);
            let used: usize = plan
                .buffers
                .iter()
                .filter(|b| matches!(b.place, Place::Arena(_)) && b.meta.dtype == DType::Real)
                .map(|b| b.elements())
                .sum();
            assert!(plan.arena_reals + plan.arena_halves < used, "{name}: no memory is used twice");
        }
    }
}

#[test]
fn a_large_plan_keeps_its_tensors_apart() {
    let tape = record_step(&step_spec(paper_model(), 128, 4, Recipe::Joint, false), Report::Losses).unwrap();
    let plain = PlanOptions::default();
    let groups = PlanOptions { group: Some(3), ..plain };
    let kernels = PlanOptions { kernels: true, half: true, ..groups };
    for options in [plain, groups, kernels, PlanOptions { recompute: true, ..kernels }] {
        check_memory("PreAct-32", &Plan::build(&tape, &options).unwrap());
    }
}

#[test]
fn activations_take_16_bits_where_the_step_makes_them() {
    for arch in ARCHS {
        for report in [Report::Losses, Report::Everything, Report::Replay] {
            let spec = step_spec(small_model(arch), 4, 3, Recipe::Sequential, false);
            let tape = record_step(&spec, report).unwrap();
            let build = |half| Plan::build(&tape, &PlanOptions { half, ..PlanOptions::default() }).unwrap();
            let (plan, full) = (build(true), build(false));
            let name = format!("{arch:?} {report:?}");
            check_memory(&name, &plan);
            let large = |b: &usize| {
                let meta = &plan.buffers[*b].meta;
                meta.kind == Kind::Activation && meta.dtype == DType::Real && meta.dims[2] * meta.dims[3] > 1
            };
            let outputs: Vec<usize> = plan.outputs.iter().filter_map(|p| p.buffer).collect();
            let mut narrow_weights = 0;
            for launch in &plan.launches {
                for set in &launch.args {
                    for b in &set.outputs {
                        // Of activations nothing but what the host reads stays in 32 bits; of all else, weights per branch alone leave them.
                        let meta = &plan.buffers[*b].meta;
                        if meta.kind == Kind::Weight && meta.per_branch {
                            narrow_weights += usize::from(plan.buffers[*b].half);
                            continue;
                        }
                        let expected = large(b) && !outputs.contains(b);
                        assert_eq!(plan.buffers[*b].half, expected, "{name}: {}", launch.op.name());
                    }
                }
            }
            assert!(narrow_weights > 0, "{name}: the fast weights of convolutions");
            assert!(plan.buffers.iter().all(|b| !b.half || matches!(b.place, Place::Arena(_))));
            assert_eq!((full.arena_halves, plan.arena_indices), (0, full.arena_indices));
            let bytes = |plan: &Plan| plan.cost(4).bytes_moved();
            assert!(report == Report::Replay || bytes(&plan) < bytes(&full), "{name}");
            assert!(report == Report::Replay || plan.arena_bytes(4) < full.arena_bytes(4), "{name}");
        }
    }
}

#[test]
fn dead_code_is_removed() {
    let mut tape = Tape::new(2);
    let x = tape.input("x", Meta::activation(2, 3, 4, 4)).unwrap();
    let unused = tape.input("unused", Meta::vector(3)).unwrap();
    let forgotten = tape.state("forgotten", Meta::vector(3)).unwrap();
    let dead = tape.add(unused, forgotten).unwrap();
    tape.scale(Coef::constant(2.0), dead).unwrap();
    let y = tape.relu(x).unwrap();
    tape.relu(y).unwrap();
    tape.output("y", y);
    for fuse in [false, true] {
        let plan = Plan::build(&tape, &PlanOptions { fuse, ..PlanOptions::default() }).unwrap();
        assert_eq!(plan.launches.len(), 1);
        assert_eq!(plan.launches[0].op.name(), "relu");
        assert_eq!(plan.states[0].buffer, None);
        assert!(plan.inputs[0].buffer.is_some());
        assert_eq!(plan.inputs[1].buffer, None);
        let mut device = Cpu::<f32>::new(1).unwrap();
        let id = device.load(plan).unwrap();
        assert!(!device.write_input(id, "unused", HostSlice::F32(&[0.0; 3])).unwrap());
        assert!(device.states().is_empty());
    }
    let empty = Plan::build(&Tape::new(1), &PlanOptions::default()).unwrap();
    assert_eq!((empty.launches.len(), empty.arena_reals), (0, 0));
}

/// Runs a tape on states `a`, `b`, `c` of one value, with values 1, 10 and 100, and returns them and the outputs.
fn run_states(tape: &Tape, runs: usize) -> (HashMap<String, f64>, Vec<f64>) {
    let mut results = Vec::new();
    for fuse in [false, true] {
        let plan = Plan::build(tape, &PlanOptions { fuse, ..PlanOptions::default() }).unwrap();
        check_memory("states", &plan);
        let outputs: Vec<String> = plan.outputs.iter().map(|p| p.name.clone()).collect();
        let mut device = Cpu::<f64>::new(1).unwrap();
        let id = device.load(plan).unwrap();
        for (name, value) in [("a", 1.0), ("b", 10.0), ("c", 100.0)] {
            if device.states().iter().any(|s| s.0 == name) {
                device.write_state(name, HostSlice::F64(&[value])).unwrap();
            }
        }
        (0..runs).for_each(|_| device.run(id, &[]).unwrap());
        let read = |name: String| (name.clone(), device.read_state(&name).unwrap().to_f64()[0]);
        let states: HashMap<String, f64> = device.states().into_iter().map(|s| read(s.0)).collect();
        let read = |name: &String| device.read_output(id, name).unwrap().to_f64()[0];
        results.push((states, outputs.iter().map(read).collect::<Vec<_>>()));
    }
    assert_eq!(results[0], results[1], "fused and unfused");
    results.swap_remove(0)
}

/// Three states of one value.
fn three_states() -> (Tape, [mlnt::tape::Tensor; 3]) {
    let mut tape = Tape::new(1);
    let states = ["a", "b", "c"].map(|name| tape.state(name, Meta::vector(1)).unwrap());
    (tape, states)
}

#[test]
fn states_that_swap() {
    let (mut tape, [a, b, _]) = three_states();
    tape.assign(a, b).unwrap();
    tape.assign(b, a).unwrap();
    let (states, _) = run_states(&tape, 1);
    assert_eq!((states["a"], states["b"]), (10.0, 1.0));
    assert_eq!((run_states(&tape, 2).0["a"], run_states(&tape, 3).0["a"]), (1.0, 10.0));

    let (mut tape, [a, b, c]) = three_states();
    for (to, from) in [(a, b), (b, c), (c, a)] {
        tape.assign(to, from).unwrap();
    }
    let (states, _) = run_states(&tape, 1);
    assert_eq!((states["a"], states["b"], states["c"]), (10.0, 100.0, 1.0));
}

#[test]
fn a_state_and_its_previous_value() {
    // a := b, b := b + c
    let (mut tape, [a, b, c]) = three_states();
    let sum = tape.add(b, c).unwrap();
    tape.assign(a, b).unwrap();
    tape.assign(b, sum).unwrap();
    let (states, _) = run_states(&tape, 1);
    assert_eq!((states["a"], states["b"]), (10.0, 110.0));
    let (states, _) = run_states(&tape, 2);
    assert_eq!((states["a"], states["b"]), (110.0, 210.0));
}

#[test]
fn a_state_read_after_its_new_value_is_made() {
    // a := a + b; the old a is read by later operations and by the host.
    let (mut tape, [a, b, c]) = three_states();
    let sum = tape.add(a, b).unwrap();
    tape.assign(a, sum).unwrap();
    let late = tape.lin_comb(&[(Coef::constant(3.0), a), (Coef::ONE, sum)]).unwrap();
    tape.assign(c, late).unwrap();
    tape.output("late", late);
    tape.output("sum", sum);
    let (states, outputs) = run_states(&tape, 1);
    assert_eq!((states["a"], states["c"]), (11.0, 14.0));
    assert_eq!(outputs, [14.0, 11.0]);

    let (mut tape, [a, b, _]) = three_states();
    let sum = tape.add(a, b).unwrap();
    tape.assign(a, sum).unwrap();
    tape.output("old", a);
    tape.output("new", sum);
    let (states, outputs) = run_states(&tape, 1);
    assert_eq!((states["a"], outputs), (11.0, vec![1.0, 11.0]));
}

#[test]
fn one_value_for_several_states() {
    // a := b := a + c, and c := a constant.
    let (mut tape, [a, b, c]) = three_states();
    let sum = tape.add(a, c).unwrap();
    let seven = tape.fill(Meta::vector(1), Coef::constant(7.0)).unwrap();
    tape.assign(a, sum).unwrap();
    tape.assign(b, sum).unwrap();
    tape.assign(c, seven).unwrap();
    let (states, _) = run_states(&tape, 1);
    assert_eq!((states["a"], states["b"], states["c"]), (101.0, 101.0, 7.0));

    // An input becomes a state; a state becomes itself.
    let (mut tape, [a, b, _]) = three_states();
    let x = tape.input("x", Meta::vector(1)).unwrap();
    tape.assign(a, x).unwrap();
    tape.assign(b, b).unwrap();
    let (states, _) = run_states(&tape, 1);
    assert_eq!((states["a"], states["b"]), (0.0, 10.0));
}

#[test]
fn neighbours_in_one_launch_do_not_disturb_one_another() {
    // a := 2a and b := 2b may share a launch; c := 2·(old a) may not be computed from the new one.
    let (mut tape, [a, b, c]) = three_states();
    let two = Coef::constant(2.0);
    for (to, from) in [(b, b), (c, a), (a, a)] {
        let value = tape.scale(two, from).unwrap();
        tape.assign(to, value).unwrap();
    }
    let (states, _) = run_states(&tape, 1);
    assert_eq!((states["a"], states["b"], states["c"]), (2.0, 20.0, 2.0));

    let (mut tape, [a, b, c]) = three_states();
    for (to, from) in [(a, b), (b, c), (c, a)] {
        let value = tape.scale(two, from).unwrap();
        tape.assign(to, value).unwrap();
    }
    let (states, _) = run_states(&tape, 1);
    assert_eq!((states["a"], states["b"], states["c"]), (20.0, 200.0, 2.0));
}

#[test]
fn sums_of_convolutions_start_where_the_last_one_ended() {
    // Mixtures of shared and per-branch terms, a term used twice, and a sum of sums.
    let mut tape = Tape::new(3);
    let x = tape.input("x", Meta::activation(2, 3, 5, 4)).unwrap();
    let xm = tape.input("xm", Meta::activation(2, 3, 5, 4).branched()).unwrap();
    let w = tape.input("w", Meta::weight(3, 3, 3, 3)).unwrap();
    let v = tape.input("v", Meta::weight(3, 3, 3, 3).branched()).unwrap();
    let mut conv = |a, b| tape.conv2d(a, b, 1, 1).unwrap();
    let (shared, one, two, three) = (conv(x, w), conv(xm, w), conv(x, v), conv(xm, v));
    let sum = |tape: &mut Tape, name: &str, parts: &[mlnt::tape::Tensor]| {
        let terms: Vec<_> = parts.iter().map(|t| (Coef::ONE, *t)).collect();
        let t = tape.lin_comb(&terms).unwrap();
        tape.output(name, t);
        t
    };
    let inner = sum(&mut tape, "inner", &[xm, one, two]);
    let outer = sum(&mut tape, "outer", &[inner, three, three, shared]);
    let again = tape.conv2d(inner, w, 1, 1).unwrap();
    let last = tape.conv2d(outer, v, 1, 1).unwrap();
    sum(&mut tape, "last", &[again, x, last, xm]);
    let inputs: Vec<HostVec> = tape
        .inputs()
        .iter()
        .enumerate()
        .map(|(i, n)| HostVec::F64(common::normals(tape.meta(n.tensor).total(3), i as u64)))
        .collect();
    let fused = Runner::<f64>::new(&tape, PlanOptions::default()).run(&tape, &inputs);
    let plain = Runner::<f64>::unfused(&tape).run(&tape, &inputs);
    for (have, want) in fused.iter().zip(&plain) {
        assert!(deviation(have, want) <= 1e-13);
    }
    check_memory("sums", &Plan::build(&tape, &PlanOptions::default()).unwrap());
}

/// The paper's network for CIFAR-10: PreAct ResNet-32.
fn paper_model() -> ModelSpec {
    ModelSpec {
        arch: Arch::PreactResnet,
        in_channels: 3,
        size: [32, 32],
        classes: 10,
        widths: vec![32, 64, 128],
        blocks: vec![5, 5, 5],
    }
}

#[test]
fn a_joint_step_costs_nine_passes_per_branch_and_four() {
    for m in [1, 4, 10] {
        let spec = step_spec(paper_model(), 128, m, Recipe::Joint, false);
        let plan = Plan::build(&record_step(&spec, Report::Losses).unwrap(), &PlanOptions::default()).unwrap();
        let cost = plan.cost(4);
        let forward = cost.phases.iter().find(|p| p.phase == "A forward").unwrap().flops as f64;
        let ratio = cost.flops() as f64 / forward;
        println!("M={m}: {:.4} forward passes of {:.3} GFLOP, bound {}", ratio, forward / 1e9, 9 * m + 4);
        for p in &cost.phases {
            println!("    {:<20} {:>10.4} F, {:>4} launches", p.phase, p.flops as f64 / forward, p.launches);
        }
        assert!(ratio <= (9 * m + 4) as f64 * 1.01, "M={m}: {ratio}");
    }
}

#[test]
fn gradients_that_stay_apart_do_not_pass_a_sum_over_the_branches() {
    let mut tape = Tape::new(3);
    let x = tape.input("x", Meta::vector(4).branched()).unwrap();
    let sum = tape.sum_branches(x).unwrap();
    let seed = tape.input("seed", Meta::vector(4).branched()).unwrap();
    let error = tape.vjp(&[(sum, seed)], &[x], Fan::Keep).unwrap_err();
    assert!(error.to_string().contains("sum over the branches"), "{error}");
}
