//! How often the host waits for the device in a training step: no more than its results must cross.

mod common;
mod frame;

use common::{normals, small_model};
use frame::Framed;
use mlnt::device::Device;
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::{Driver, Limits, Stream};
use mlnt::device::cuda::embedded::has_simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::mlnt::{Scales, StepScalars};
use mlnt::model::Arch;
use mlnt::train::choice::{Method, Precision};
use mlnt::train::config::Config;
use mlnt::train::engine::{Engine, StepInputs, StepOutcome};
use mlnt::train::feed::Images;
use mlnt::train::method::parts;
use mlnt::train::preset::Preset;
use std::cell::Cell;
use std::rc::Rc;

const BATCH: usize = 6;
const STEPS: usize = 3;

fn config(method: Method, precision: Precision) -> Config {
    Config {
        method,
        precision: precision.into(),
        batch: BATCH,
        neighbours: 3,
        no_baseline: true,
        forget_rate: 0.2,
        ..Preset::Small.config()
    }
}

/// Some steps of every part of a method: what each has come to, and the losses of its samples.
fn steps(config: &Config, device: Box<dyn Device>, mut after_each: impl FnMut()) -> Vec<(StepOutcome, Vec<f32>)> {
    let model = small_model(Arch::PreactResnet);
    let pixels = BATCH * model.in_channels * model.size.iter().product::<usize>();
    let x: Vec<f32> = normals(pixels, 3).into_iter().map(|v| v as f32).collect();
    let y: Vec<i32> = (0..BATCH).map(|i| (i % model.classes) as i32).collect();
    let ranks: Vec<i32> = (0..config.branches * BATCH).map(|i| (i % 4) as i32 - 1).collect();
    let (weights, classes) = ([1.0 / BATCH as f64; BATCH], model.classes);
    let mut engine = Engine::new(device, config, model).unwrap();
    let scales = Scales { inner: 256.0, outer: 256.0, second: 256.0, apply: true };
    let scalars =
        StepScalars { lr: 0.05, momentum: 0.9, weight_decay: 1e-4, eta: 0.3, gamma: 0.9, lambda: 1.0, scales };
    let mut seen = Vec::new();
    for part in parts(config) {
        for _ in 0..STEPS {
            let inputs = StepInputs { x: Images::Host(&x), y: &y, class_weight: &weights, ranks: &ranks };
            if part.phase.by_logits() {
                let networks = part.phase.networks().len();
                let logits = engine.look(&part, inputs.x).unwrap();
                assert_eq!(logits.iter().map(Vec::len).collect::<Vec<_>>(), vec![BATCH * classes; networks]);
                let gradients = logits.iter().map(|logits| logits.iter().map(|v| 0.1 * v).collect()).collect();
                let descent = mlnt::train::by_logits::Descent { gradients, objective: 1.5, loss: 0.5 };
                engine.write_descent(&part, descent).unwrap();
            } else {
                engine.write(&part, inputs).unwrap();
            }
            engine.begin(&part, scalars).unwrap();
            seen.push((engine.outcome(&part, &y).unwrap(), engine.sample_losses().to_vec()));
            after_each();
        }
    }
    seen
}

/// A device that counts how often the host waits for it.
fn counting(operands: Operands) -> (Box<dyn Device>, Rc<Cell<usize>>) {
    let machine = Framed::new(Limits::COMMON);
    let waits = Rc::clone(&machine.waits);
    (Box::new(Cuda::new(Box::new(machine), operands, Mode::Graph)), waits)
}

/// Waits of each step but those of the first of a part, when launches are made and recorded.
fn waits(method: Method, precision: Precision) -> Vec<usize> {
    let operands = if precision == Precision::F16 { Operands::F16 } else { Operands::F32 };
    let (device, waits) = counting(operands);
    let (mut before, mut each) = (0, Vec::new());
    let seen = steps(&config(method, precision), device, || {
        each.push(waits.get() - before);
        before = waits.get();
    });
    assert!(seen.iter().all(|(outcome, _)| outcome.taken && outcome.loss.is_finite()), "{method}: {seen:?}");
    each.chunks_exact(STEPS).flat_map(|part| part[1..].to_vec()).collect()
}

#[test]
fn a_step_waits_for_the_device_once() {
    if !has_simt() {
        return println!("skipped: built without the SIMT host machine");
    }
    for precision in [Precision::F32, Precision::F16] {
        for method in [Method::Mlnt, Method::MlntFirstOrder, Method::Ce, Method::IterativeCe] {
            let waits = waits(method, precision);
            assert!(!waits.is_empty() && waits.iter().all(|n| *n == 1), "{method} in {precision}: {waits:?}");
        }
        // The host takes the logits from the device and the gradient back; in f16 it asks once more whether it was finite.
        let expected = if precision == Precision::F16 { 2 } else { 1 };
        for method in [Method::Elr, Method::CoTeaching, Method::JointOpt] {
            let waits = waits(method, precision);
            assert!(!waits.is_empty() && waits.iter().all(|n| *n == expected), "{method} in {precision}: {waits:?}");
        }
    }
}

/// Read in one go, every output is still itself.
#[test]
fn what_is_read_together_is_what_the_cpu_says() {
    if !has_simt() {
        return println!("skipped: built without the SIMT host machine");
    }
    for method in [Method::Mlnt, Method::Ce, Method::IterativeCe, Method::CoTeaching] {
        let config = config(method, Precision::F32);
        let want = steps(&config, Box::new(Cpu::<f32>::new(1).unwrap()), || ());
        let have = steps(&config, counting(Operands::F32).0, || ());
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-3 * b.abs().max(1e-3);
        assert_eq!(have.len(), want.len());
        for ((have, of_samples), (want, samples)) in have.iter().zip(&want) {
            assert!(near(have.loss, want.loss), "{method}: {have:?} {want:?}");
            assert_eq!(have.meta_loss.is_some(), want.meta_loss.is_some());
            assert!(near(have.meta_loss.unwrap_or(0.0), want.meta_loss.unwrap_or(0.0)), "{method}: {have:?} {want:?}");
            assert_eq!((of_samples.len(), samples.len()), (BATCH, BATCH));
            let all_near = of_samples.iter().zip(samples).all(|(a, b)| near(f64::from(*a), f64::from(*b)));
            assert!(all_near, "{method}: {of_samples:?} {samples:?}");
        }
    }
}

#[test]
fn ranges_come_down_one_behind_the_other() {
    if !has_simt() {
        return println!("skipped: built without the SIMT host machine");
    }
    let machine = Framed::new(Limits::COMMON);
    let ranges = [[1u8, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]].map(|bytes| {
        let at = machine.allocate(4, "a test").unwrap();
        machine.upload(Stream::Compute, at, &bytes).unwrap();
        at
    });
    let [a, b, c] = ranges;
    let mut to = [0; 7];
    machine.download(Stream::Compute, &[(c, 4), (a, 1), (b.offset(2), 2)], &mut to).unwrap();
    assert_eq!((to, machine.waits.get()), ([9, 10, 11, 12, 1, 7, 8], 1));
    for (from, len) in [(&[(a, 4)][..], 3), (&[(a, 4), (b, 4)], 9), (&[], 1)] {
        let error = machine.download(Stream::Compute, from, &mut vec![0; len]).unwrap_err().to_string();
        assert!(error.contains("a download of"), "{error}");
    }
    assert!(machine.download(Stream::Compute, &[(a, 2), (b, 5)], &mut [0; 7]).is_err(), "beyond its allocation");
}
