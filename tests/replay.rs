//! Mask replay: the forced reference is the same function, tells rounding from faults, and no wrong decision hides in it.

mod program;

use mlnt::device::cpu::Cpu;
use mlnt::mlnt::KlScale;
use mlnt::mlnt::golden::{Deviation, Golden, StepResult, deviations};
use mlnt::mlnt::replay::{Decisions, Differences, Judgement, Replay};
use mlnt::plan::PlanOptions;
use program::{Folder, SafeTensors};
use std::collections::BTreeMap;

const FILES: [&str; 4] = ["step_sequential", "step_joint", "step_mentor", "step_bottleneck"];
const F32: f64 = 1e-5;

fn read(name: &str) -> Golden {
    Golden::read(&program::golden(name)).unwrap()
}

/// The golden step with its file changed.
fn edited(name: &str, edit: impl FnOnce(&mut SafeTensors)) -> Golden {
    let mut file = SafeTensors::parse(&std::fs::read(program::golden(name)).unwrap());
    edit(&mut file);
    let folder = Folder::new();
    let path = folder.path("step.safetensors");
    std::fs::write(&path, file.bytes()).unwrap();
    Golden::read(&path).unwrap()
}

fn single(golden: &Golden) -> StepResult {
    golden.run(&mut Cpu::<f32>::new(2).unwrap(), &PlanOptions::default()).unwrap()
}

fn double(golden: &Golden) -> StepResult {
    golden.run(&mut Cpu::<f64>::new(2).unwrap(), &PlanOptions::default()).unwrap()
}

fn worst(groups: &BTreeMap<String, Deviation>) -> f64 {
    assert_eq!(groups.len(), 13);
    groups.values().map(|d| d.rel).fold(0.0, f64::max)
}

fn replay(golden: &Golden, decisions: &Decisions) -> mlnt::Result<Replay> {
    golden.replay(&mut Cpu::<f64>::new(2).unwrap(), &PlanOptions::default(), decisions)
}

#[test]
fn with_its_own_decisions_a_replayed_step_is_the_free_one() {
    for name in FILES {
        for fuse in [false, true] {
            let (golden, options) = (read(name), PlanOptions { fuse, ..PlanOptions::default() });
            let free = golden.run(&mut Cpu::<f64>::new(2).unwrap(), &options).unwrap();
            let replay = golden.replay(&mut Cpu::<f64>::new(2).unwrap(), &options, &free.decisions).unwrap();
            let off = worst(&deviations(&replay.groups, &free.groups));
            println!("{name} fuse={fuse}: {off:.1e}, tie distance {:.1e}", replay.tie_distance);
            assert!(off <= 1e-12, "{name} (fused: {fuse}): off by {off:.1e}");
            assert_eq!(replay.tie_distance, 0.0, "{name} (fused: {fuse})");
        }
    }
}

#[test]
fn right_single_precision_passes_and_planted_faults_do_not() {
    let judge = |golden: &Golden, engine: &Golden| golden.judge(&single(engine)).unwrap();
    for name in FILES {
        let golden = read(name);
        let right = judge(&golden, &golden);
        println!("{name}: free {:.1e}, replayed {:.1e}", worst(&right.free), worst(&right.replayed));
        assert!(right.pass(F32) && right.file_right && worst(&right.replayed) <= F32, "{name}: {right:?}");

        type Fault = (&'static str, &'static str, fn(&mut Golden));
        let faults: [Fault; 7] = [
            ("lr", "param", |g| g.scalars.lr *= 1.01),
            ("eta", "momentum", |g| g.scalars.eta *= 1.01),
            ("gamma", "teacher.param", |g| g.scalars.gamma *= 0.999),
            ("alpha", "meta_grad", |g| g.spec.alpha *= 1.01),
            ("momentum", "momentum", |g| g.scalars.momentum *= 1.01),
            ("weight decay", "momentum", |g| g.scalars.weight_decay *= 1.5),
            ("first order", "momentum", |g| g.spec.first_order = true),
        ];
        for (what, group, plant) in faults {
            let mut engine = golden.clone();
            plant(&mut engine);
            let judgement = judge(&golden, &engine);
            println!("  {what}: {group} {:.1e}", judgement.replayed[group].rel);
            assert!(!judgement.pass(F32) && judgement.replayed[group].rel > F32, "{name}, {what}: {judgement:?}");
        }
        let mut engine = golden.clone();
        engine.spec.kl = if engine.spec.kl == KlScale::Mean { KlScale::BatchMean } else { KlScale::Mean };
        assert!(judge(&golden, &engine).replayed["consistency"].rel > 0.1, "{name}, divisor");
        // One value of one state.
        for state in ["in.param.conv1.weight", "in.momentum.conv1.weight", "in.teacher.param.conv1.weight"] {
            let engine = edited(name, |file| {
                let value = &mut file.tensors.get_mut(state).unwrap().2[..4];
                let old = f32::from_le_bytes(value.try_into().unwrap());
                value.copy_from_slice(&(old + 0.01).to_le_bytes());
            });
            let judgement = judge(&golden, &engine);
            let off = worst(&judgement.replayed);
            println!("  {state}: {off:.1e}");
            assert!(!judgement.pass(F32) && off > F32, "{name}, {state}: {judgement:?}");
        }
    }
    let (golden, mut engine) = (read("step_mentor"), read("step_mentor"));
    engine.scalars.lambda += 0.01;
    let judgement = judge(&golden, &engine);
    assert!(!judgement.pass(F32) && judgement.replayed["target"].rel > F32, "lambda: {judgement:?}");
}

/// Reals rounded to nearest with `bits` of their mantissa left out.
fn round(reals: &mut [u8], bits: u32) {
    for real in reals.chunks_exact_mut(4) {
        let value = u32::from_le_bytes(real.try_into().unwrap());
        real.copy_from_slice(&((value + (1 << (bits - 1))) >> bits << bits).to_le_bytes());
    }
}

#[test]
fn rounding_that_moves_decisions_passes_by_replay_alone() {
    // Images and parameters as tf32 or f16 has them, and bf16, with the tolerances of these.
    for (bits, tolerance) in [(13, 3e-3), (16, 3e-2)] {
        for name in FILES {
            let engine = edited(name, |file| {
                for (name, tensor) in &mut file.tensors {
                    let parameter = name.starts_with("in.") && name.contains("param.") && tensor.1.len() > 1;
                    if parameter || name == "in.x" {
                        round(&mut tensor.2, bits);
                    }
                }
            });
            let judgement = read(name).judge(&single(&engine)).unwrap();
            let (free, replayed) = (worst(&judgement.free), worst(&judgement.replayed));
            let Judgement { relus, pools, tie_distance, .. } = &judgement;
            println!("{name}, {bits}: free {free:.1e}, replayed {replayed:.1e}, tie distance {tie_distance:.1e}");
            println!("  ReLUs {} of {}, max-pools {} of {}", relus.differ, relus.of, pools.differ, pools.of);
            assert!(relus.differ > 0 && relus.differ < relus.of / 50, "{name}, {bits}: {relus:?}");
            assert_eq!(pools.differ > 0, name == "step_bottleneck", "{name}, {bits}: {pools:?}");
            assert!(judgement.pass(tolerance), "{name}, {bits}: {judgement:?}");
            assert!(free > tolerance && free > 5.0 * replayed, "{name}, {bits}: {free:.1e} {replayed:.1e}");
            assert!(!judgement.pass(F32), "{name}, {bits}");
        }
    }
}

/// Changes every decision of the ReLUs of one pass.
fn flip(decisions: &mut Decisions, pass: &str) -> usize {
    let prefix = format!("relu.{pass}.");
    let of_pass = decisions.relus.iter_mut().filter(|(name, _)| name.starts_with(&prefix));
    of_pass.flat_map(|(_, mask)| mask).map(|m| *m = !*m).count()
}

#[test]
fn an_export_that_is_not_what_the_engine_did_fails() {
    for name in FILES {
        let golden = read(name);
        let right = single(&golden);
        let has = |pass: &str| right.decisions.relus.keys().any(|name| name.starts_with(&format!("relu.{pass}.")));
        assert_eq!(has("mentor"), name == "step_mentor");
        assert_eq!(has("classification"), name != "step_joint");
        for pass in ["teacher", "mentor", "student", "fast", "classification"].into_iter().filter(|pass| has(pass)) {
            let mut result = right.clone();
            let flipped = flip(&mut result.decisions, pass);
            let judgement = golden.judge(&result).unwrap();
            assert_eq!((judgement.relus.differ, judgement.pools.differ), (flipped, 0), "{name}, {pass}");
            let (free, replayed) = (worst(&judgement.free), worst(&judgement.replayed));
            assert!(free < F32 && replayed > 0.01, "{name}, {pass}: free {free:.1e}, replayed {replayed:.1e}");
            assert!(judgement.tie_distance > 1.0 && !judgement.pass(F32), "{name}, {pass}: {judgement:?}");
        }
        // A single decision of a fast branch.
        let mut result = right.clone();
        let mask = result.decisions.relus.iter_mut().find(|(name, _)| name.starts_with("relu.fast.layer2.")).unwrap().1;
        mask[0] = !mask[0];
        let judgement = golden.judge(&result).unwrap();
        assert_eq!(judgement.relus.differ, 1);
        assert!(worst(&judgement.replayed) > F32 && !judgement.pass(F32), "{name}: {judgement:?}");
    }
}

#[test]
fn the_choices_of_a_max_pool_are_replayed() {
    let golden = read("step_bottleneck");
    let right = single(&golden);
    assert_eq!(right.decisions.pools.len(), 4, "teacher, student, fast, classification");
    for name in right.decisions.pools.keys() {
        // The position below the chosen one, or above it: in the window of its neighbour at least.
        let mut noticed = 0;
        for at in 0..8 {
            for step in [1, -1] {
                let mut result = right.clone();
                result.decisions.pools.get_mut(name).unwrap()[at] += step;
                match golden.judge(&result) {
                    Ok(judgement) => {
                        let one = Differences { differ: 1, of: judgement.pools.of };
                        assert_eq!((judgement.relus.differ, judgement.pools), (0, one));
                        let off = worst(&judgement.replayed);
                        // Two zeros are the same in every respect.
                        assert_eq!(off > F32, judgement.tie_distance > 0.0, "{name}: {judgement:?}");
                        assert_eq!(judgement.pass(F32), off <= F32);
                        noticed += usize::from(off > F32);
                    }
                    Err(e) => assert!(e.to_string().contains("outside its window"), "{e}"),
                }
            }
        }
        println!("{name}: {noticed} of 16 seen in the result");
        assert!(noticed > 0, "{name}");
    }
}

#[test]
fn a_wrong_decision_that_the_engine_follows_does_not_hide() {
    // An engine with one ReLU of the student on its other side, in all it computes: replayed it is right.
    for name in FILES {
        let golden = read(name);
        let mut decisions = double(&golden).decisions;
        let mask = decisions.relus.iter_mut().find(|(name, _)| name.starts_with("relu.student.layer1.")).unwrap().1;
        mask[0] = !mask[0];
        let groups = replay(&golden, &decisions).unwrap().groups;
        let judgement = golden.judge(&StepResult { groups, decisions }).unwrap();
        println!("{name}: tie distance {:.1e}, free {:.1e}", judgement.tie_distance, worst(&judgement.free));
        assert_eq!(worst(&judgement.replayed), 0.0);
        assert_eq!(judgement.relus.differ, 1);
        assert!(judgement.tie_distance > 10.0 * F32 && !judgement.pass(F32), "{name}: {judgement:?}");
    }
}

#[test]
fn what_are_no_decisions_of_the_step_is_refused() {
    let golden = read("step_bottleneck");
    let right = double(&golden).decisions;
    let refused = |edit: &dyn Fn(&mut Decisions), what: &str| {
        let mut decisions = right.clone();
        edit(&mut decisions);
        let error = replay(&golden, &decisions).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    for position in [-1, i32::MIN, i32::MAX, 63, 64] {
        refused(&|d| d.pools.get_mut("pool.fast.bn1").unwrap()[0] = position, "outside its window");
    }
    refused(&|d| drop(d.pools.remove("pool.teacher.bn1")), "no decisions pool.teacher.bn1");
    refused(&|d| drop(d.relus.remove("relu.student.layer1.0")), "no decisions relu.student.layer1.0");
    refused(&|d| d.relus.get_mut("relu.student.layer1.0").unwrap().truncate(1), "relu.student.layer1.0");
    refused(&|d| d.pools.get_mut("pool.student.bn1").unwrap().truncate(1), "pool.student.bn1");
    refused(&|d| drop(d.relus.insert("relu.nobody.bn1".into(), vec![true])), "relu.nobody.bn1");
}
