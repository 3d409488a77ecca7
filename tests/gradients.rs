//! Derivatives of every operation at first and second order, against finite differences in double precision.
//!
//! Kinks: the numbers behind a ReLU or a mask lie at least 0.25 from zero, those behind a maximum at least 0.5
//! apart (`Data::Clear`, `Data::Spaced`), and directions are scaled so that no entry moves by more than 0.02.

mod common;

use common::{Runner, derivative, deviation, dot, moved, normals, on_two_threads, small_model, start_values};
use mlnt::Error;
use mlnt::cases::{Case, Operand, Recorded, all};
use mlnt::device::HostVec;
use mlnt::model::{Arch, Scope};
use mlnt::ops::{BnBackward, BnForward, Op, Operation};
use mlnt::plan::PlanOptions;
use mlnt::tape::{Coef, DType, Fan, Meta, Tape, Tensor};
use std::collections::HashMap;

/// Half width of the narrower central difference.
const STEP: f64 = 2e-3;

/// Cases that have a derivative, in which a result can have a cotangent.
fn cases() -> Vec<Case> {
    let differentiable = |c: &Case| !c.fused && c.operands.iter().any(|o| o.differentiable);
    all().into_iter().filter(differentiable).collect()
}

/// Results that may have a cotangent: batch statistics may not.
fn seeded(case: &Case, results: usize) -> usize {
    if matches!(case.op, Op::BnForward(_)) { 1 } else { results }
}

/// A case with its first derivative on the same tape: inputs are the operands, then a cotangent per result.
struct First {
    tape: Tape,
    operands: Vec<Tensor>,
    /// Positions of the operands that are differentiated.
    wrt: Vec<usize>,
    cots: Vec<Tensor>,
    cot_metas: Vec<Meta>,
    /// One per entry of `wrt`.
    grads: Vec<Tensor>,
}

fn first(case: &Case, fan: Fan, branching: impl Fn(&Meta) -> bool) -> First {
    let mut tape = Tape::new(case.branches);
    let operands: Vec<Tensor> = case.operands.iter().map(|o| tape.input(o.name, o.meta).unwrap()).collect();
    let results = tape.record(case.op.clone(), &operands, &case.sum).unwrap();
    let mut seeds = Vec::new();
    for (i, y) in results.iter().enumerate().take(seeded(case, results.len())) {
        let meta = tape.meta(*y).with_branching(branching(tape.meta(*y)));
        seeds.push((*y, tape.input(&format!("cot{i}"), meta).unwrap()));
    }
    let wrt: Vec<usize> = (0..operands.len()).filter(|&i| case.operands[i].differentiable).collect();
    let tensors: Vec<Tensor> = wrt.iter().map(|&i| operands[i]).collect();
    let grads = tape.vjp(&seeds, &tensors, fan).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let grads: Vec<Tensor> =
        grads.into_iter().map(|g| g.unwrap_or_else(|| panic!("{}: no gradient", case.name))).collect();
    let cots: Vec<Tensor> = seeds.into_iter().map(|s| s.1).collect();
    let cot_metas = cots.iter().map(|t| *tape.meta(*t)).collect();
    First { tape, operands, wrt, cots, cot_metas, grads }
}

fn output(tape: &mut Tape, tensors: &[Tensor]) {
    tensors.iter().enumerate().for_each(|(i, t)| tape.output(format!("result{i}"), *t));
}

fn random(meta: &Meta, branches: usize, seed: u64) -> Vec<f64> {
    normals(meta.total(branches), seed)
}

/// A direction of which no entry exceeds 10 in size: `2·STEP` times it stays below 0.05.
fn direction(n: usize, seed: u64) -> Vec<f64> {
    normals(n, seed).into_iter().map(|v| v.clamp(-5.0, 5.0)).collect()
}

/// A gradient as large as its operand: one that is the same in every branch may be recorded once.
fn spread(grad: &[f64], n: usize) -> Vec<f64> {
    assert_eq!(n % grad.len(), 0);
    grad.iter().copied().cycle().take(n).collect()
}

/// Compares `⟨gradient, v⟩` with the derivative of `f` along v.
fn along(what: &str, gradient: &[f64], v: &[f64], f: impl FnMut(f64) -> f64) -> Option<String> {
    let (have, want) = (dot(gradient, v), derivative(STEP, f));
    // Where the direction happens to be orthogonal to the gradient, its size is still the measure.
    let size = have.abs().max((dot(gradient, gradient) * dot(v, v) / v.len() as f64).sqrt()).max(1e-3);
    let right = (have - want).abs() <= 1e-7 * size;
    (!right).then(|| format!("{what}: {have:.10e}, by finite differences {want:.10e}"))
}

fn real(values: &[HostVec], i: usize) -> &[f64] {
    match &values[i] {
        HostVec::F64(v) => v,
        _ => panic!("operand {i} is no real"),
    }
}

/// Runs `check` on every case and collects what it finds.
fn check_all(cases: Vec<Case>, check: impl Fn(&Case) -> Vec<String> + Sync) {
    let failures = on_two_threads(&cases, check);
    let shown = failures.iter().take(60).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} failures in {} cases:\n{shown}", failures.len(), cases.len());
}

#[test]
fn first_order_is_the_finite_difference() {
    check_all(cases(), |case| {
        let First { mut tape, wrt, cot_metas, grads, .. } = first(case, Fan::Sum, |m| m.per_branch);
        output(&mut tape, &grads);
        let mut values = case.values(2);
        let cots: Vec<Vec<f64>> =
            cot_metas.iter().enumerate().map(|(i, m)| random(m, case.branches, 50 + i as u64)).collect();
        let plain = case.record().unwrap();
        let mut forward = Runner::<f64>::unfused(&plain.tape);
        let inputs: Vec<HostVec> = values.iter().cloned().chain(cots.iter().cloned().map(HostVec::F64)).collect();
        let gradients = Runner::<f64>::unfused(&tape).run(&tape, &inputs);
        let mut failures = Vec::new();
        for (&i, (gradient, t)) in wrt.iter().zip(gradients.iter().zip(&grads)) {
            let operand = &case.operands[i];
            if tape.meta(*t).per_branch && !operand.meta.per_branch {
                failures
                    .push(format!("{}: the gradient of {} is not summed over the branches", case.name, operand.name));
                continue;
            }
            let x = real(&values, i).to_vec();
            let v = direction(x.len(), 70 + i as u64);
            let f = |t: f64| {
                values[i] = HostVec::F64(moved(&x, t, &v));
                case.derive(&mut values);
                let results = forward.run(&plain.tape, &values);
                cots.iter().zip(&results).map(|(c, y)| dot(c, y)).sum()
            };
            let what = format!("{}, {}", case.name, operand.name);
            failures.extend(along(&what, &spread(gradient, x.len()), &v, f));
            values[i] = HostVec::F64(x);
            case.derive(&mut values);
        }
        failures
    });
}

/// Checks the derivative of the first-order gradients, made with `fan`, against their finite differences.
fn second_order(case: &Case, fan: Fan, branching: impl Fn(&Meta) -> bool) -> Vec<String> {
    let one = first(case, fan, branching);
    let mut plain = one.tape.clone();
    output(&mut plain, &one.grads);
    let mut values = case.values(3);
    for (i, m) in one.cot_metas.iter().enumerate() {
        values.push(HostVec::F64(random(m, case.branches, 150 + i as u64)));
    }
    let grad_metas: Vec<Meta> = one.grads.iter().map(|t| *one.tape.meta(*t)).collect();
    let weights: Vec<Vec<f64>> =
        grad_metas.iter().enumerate().map(|(i, m)| random(m, case.branches, 250 + i as u64)).collect();
    let mut gradients = Runner::<f64>::unfused(&plain);

    // The operands and, behind them, the cotangents of the first order.
    let mut targets: Vec<(usize, Tensor, String)> = Vec::new();
    for &i in &one.wrt {
        targets.push((i, one.operands[i], case.operands[i].name.to_string()));
    }
    for (i, t) in one.cots.iter().enumerate() {
        targets.push((one.operands.len() + i, *t, format!("cot{i}")));
    }
    let mut failures = Vec::new();
    for (position, tensor, name) in targets {
        let what = format!("{}, {name}", case.name);
        let mut tape = one.tape.clone();
        let mut seeds = Vec::new();
        for (i, (g, m)) in one.grads.iter().zip(&grad_metas).enumerate() {
            seeds.push((*g, tape.input(&format!("weight{i}"), *m).unwrap()));
        }
        let missing = missing_at_second_order(&case.op, &name);
        let second = match (tape.vjp(&seeds, &[tensor], Fan::Sum), missing) {
            (Ok(second), false) => second[0],
            (Err(Error::NotDifferentiable { .. }), true) => continue,
            (Ok(_), true) => {
                failures.push(format!("{what}: has a second derivative, none is in the set"));
                continue;
            }
            (Err(e), _) => {
                failures.push(format!("{what}: {e}"));
                continue;
            }
        };
        let x = real(&values, position).to_vec();
        let n = x.len();
        let gradient = match second {
            None => vec![0.0; n],
            Some(t) => {
                tape.output("second", t);
                let more = weights.iter().cloned().map(HostVec::F64);
                let inputs: Vec<HostVec> = values.iter().cloned().chain(more).collect();
                spread(&Runner::<f64>::unfused(&tape).run(&tape, &inputs)[0], n)
            }
        };
        let v = direction(n, 170 + position as u64);
        let f = |t: f64| {
            values[position] = HostVec::F64(moved(&x, t, &v));
            case.derive(&mut values);
            let results = gradients.run(&plain, &values);
            weights.iter().zip(&results).map(|(c, y)| dot(c, y)).sum()
        };
        failures.extend(along(&what, &gradient, &v, f));
        values[position] = HostVec::F64(x);
        case.derive(&mut values);
    }
    failures
}

/// What differentiating the pullback of `op` again is refused for, by operand or cotangent.
fn missing_at_second_order(op: &Op, name: &str) -> bool {
    match op {
        // Their pullback is the double backward, which has none.
        Op::BnBackward(_) => true,
        // Their pullback is the Jacobian of softmax, linear in its first operand only.
        Op::Softmax(_) => name == "z",
        Op::CeGrad(_) | Op::KlGrad(_) => name == "z",
        // Their pullback is the gradient of the loss, whose scale is the loss's cotangent.
        Op::CeLoss(_) | Op::KlLoss(_) => name == "cot0",
        _ => false,
    }
}

#[test]
fn second_order_is_the_finite_difference_of_the_first() {
    check_all(cases(), |case| second_order(case, Fan::Sum, |m| m.per_branch));
}

#[test]
fn second_order_of_separate_gradients() {
    // Mlnt's use: M gradients at a shared operand, kept apart, then differentiated and summed.
    let apart = cases().into_iter().filter(|c| !c.sum.contains(&true)).collect();
    check_all(apart, |case| second_order(case, Fan::Keep, |_| true));
}

/// The case for branch `m` alone, as a case with one branch.
fn alone(case: &Case) -> Case {
    Case { branches: 1, ..case.clone() }
}

fn branch_of(values: &HostVec, meta: &Meta, branches: usize, m: usize) -> HostVec {
    let from = if meta.per_branch && branches > 1 { m * meta.len() } else { 0 };
    match (values, meta.dtype) {
        (HostVec::I32(v), DType::Index) => HostVec::I32(v[from..from + meta.len()].to_vec()),
        _ => HostVec::F64(values.to_f64()[from..from + meta.len()].to_vec()),
    }
}

#[test]
fn separate_gradients_are_those_of_separate_runs_and_sum_to_the_sum() {
    let apart = cases().into_iter().filter(|c| !c.sum.contains(&true) && c.branches > 1).collect();
    check_all(apart, |case| {
        let mut failures = Vec::new();
        let mut keep = first(case, Fan::Keep, |_| true);
        let mut sum = first(case, Fan::Sum, |_| true);
        let mut single = first(&alone(case), Fan::Sum, |_| true);
        for one in [&mut keep, &mut sum, &mut single] {
            let grads = one.grads.clone();
            output(&mut one.tape, &grads);
        }
        let mut values = case.values(4);
        let mut metas: Vec<Meta> = case.operands.iter().map(|o| o.meta).collect();
        for (i, m) in keep.cot_metas.iter().enumerate() {
            values.push(HostVec::F64(random(m, case.branches, 350 + i as u64)));
            metas.push(*m);
        }
        let kept = Runner::<f64>::unfused(&keep.tape).run(&keep.tape, &values);
        let summed = Runner::<f64>::unfused(&sum.tape).run(&sum.tape, &values);
        let mut totals: Vec<Vec<f64>> = keep.wrt.iter().map(|&i| vec![0.0; case.operands[i].meta.len()]).collect();
        let mut runner = Runner::<f64>::unfused(&single.tape);
        for m in 0..case.branches {
            let part: Vec<HostVec> =
                values.iter().zip(&metas).map(|(v, meta)| branch_of(v, meta, case.branches, m)).collect();
            for (w, want) in runner.run(&single.tape, &part).iter().enumerate() {
                let Operand { name, meta, .. } = &case.operands[keep.wrt[w]];
                let have = spread(&kept[w], case.branches * meta.len());
                let off = deviation(&have[m * meta.len()..][..meta.len()], want);
                if off > 1e-12 {
                    failures.push(format!("{}, {name}: branch {m} kept apart is off by {off:.1e}", case.name));
                }
                if meta.per_branch {
                    let have = spread(&summed[w], case.branches * meta.len());
                    let off = deviation(&have[m * meta.len()..][..meta.len()], want);
                    if off > 1e-12 {
                        failures.push(format!("{}, {name}: branch {m} is off by {off:.1e}", case.name));
                    }
                }
                totals[w].iter_mut().zip(want).for_each(|(t, g)| *t += g);
            }
        }
        for (w, total) in totals.iter().enumerate() {
            let Operand { name, meta, .. } = &case.operands[keep.wrt[w]];
            if !meta.per_branch {
                let off = deviation(&summed[w], total);
                if summed[w].len() != total.len() || off > 1e-12 {
                    failures.push(format!("{}, {name}: the sum over branches is off by {off:.1e}", case.name));
                }
            }
        }
        failures
    });
}

#[test]
fn a_shared_cotangent_counts_in_every_branch() {
    let several = cases().into_iter().filter(|c| c.branches > 1).collect();
    check_all(several, |case| {
        let mut failures = Vec::new();
        let mut shared = first(case, Fan::Sum, |_| false);
        let mut apart = first(case, Fan::Sum, |m| m.per_branch);
        for one in [&mut shared, &mut apart] {
            let grads = one.grads.clone();
            output(&mut one.tape, &grads);
        }
        let mut values = case.values(5);
        let mut repeated = values.clone();
        for (i, (one, many)) in shared.cot_metas.iter().zip(&apart.cot_metas).enumerate() {
            let cot = random(one, case.branches, 450 + i as u64);
            repeated.push(HostVec::F64(spread(&cot, many.total(case.branches))));
            values.push(HostVec::F64(cot));
        }
        let have = Runner::<f64>::unfused(&shared.tape).run(&shared.tape, &values);
        let want = Runner::<f64>::unfused(&apart.tape).run(&apart.tape, &repeated);
        for (w, (have, want)) in have.iter().zip(&want).enumerate() {
            let n = have.len().max(want.len());
            let off = deviation(&spread(have, n), &spread(want, n));
            if off > 1e-12 {
                let name = case.operands[shared.wrt[w]].name;
                failures.push(format!("{}, {name}: a shared cotangent is off by {off:.1e}", case.name));
            }
        }
        failures
    });
}

#[test]
fn operands_without_derivative_are_refused() {
    let refuses = |case: &Case, position: usize| {
        let Recorded { mut tape, operands, results } = case.record().unwrap();
        let mut seeds = Vec::new();
        for (i, y) in results.iter().enumerate().take(seeded(case, results.len())) {
            let meta = *tape.meta(*y);
            if meta.dtype == DType::Real {
                seeds.push((*y, tape.input(&format!("cot{i}"), meta).unwrap()));
            }
        }
        matches!(tape.vjp(&seeds, &[operands[position]], Fan::Sum), Err(Error::NotDifferentiable { .. }))
    };
    for case in all().iter().filter(|c| !c.fused) {
        for (i, operand) in case.operands.iter().enumerate() {
            // References, positions, statistics and what only leads to indices are constants; labels and the like have
            // no derivative in the set.
            let constant = matches!(operand.name, "reference" | "index")
                || matches!(case.op, Op::MaxPoolIndex(_) | Op::NearestNeighbours(_) | Op::TransferLabels(_))
                || (matches!(case.op, Op::BnBackward(_)) && matches!(operand.name, "mean" | "var"));
            let expected = !operand.differentiable && !constant;
            assert_eq!(refuses(case, i), expected, "{}, {}", case.name, operand.name);
        }
    }
}

#[test]
fn statistics_and_fused_operations_are_refused() {
    for relu in [false, true] {
        let mut tape = Tape::new(1);
        let x = tape.input("x", Meta::activation(2, 3, 4, 5)).unwrap();
        let [g, b] = ["g", "b"].map(|name| tape.input(name, Meta::vector(3)).unwrap());
        let out = tape.record(BnForward { relu }, &[x, g, b], &[]).unwrap();
        let seed = tape.fill(Meta::vector(3), Coef::ONE).unwrap();
        let refused = |r: mlnt::Result<Vec<Option<Tensor>>>| matches!(r, Err(Error::NotDifferentiable { .. }));
        assert!(refused(tape.vjp(&[(out[1], seed)], &[x], Fan::Sum)));
        assert!(refused(tape.vjp(&[(out[2], seed)], &[x], Fan::Sum)));
        let seed = tape.fill(Meta::activation(2, 3, 4, 5), Coef::ONE).unwrap();
        assert_eq!(refused(tape.vjp(&[(out[0], seed)], &[x], Fan::Sum)), relu);
        let mut operands = vec![seed, x, g, out[1], out[2]];
        operands.extend(relu.then_some(out[0]));
        let op = BnBackward { relu };
        assert_eq!(op.name(), if relu { "bn_relu_backward" } else { "bn_backward" });
        let dx = tape.record(op, &operands, &[]).unwrap()[0];
        assert_eq!(refused(tape.vjp(&[(dx, seed)], &[x], Fan::Sum)), relu);
    }
}

#[test]
fn max_pooling_as_a_whole() {
    for (h, w, size, stride, pad) in [(15, 11, 3, 2, 1), (7, 7, 2, 2, 0), (5, 4, 3, 1, 1)] {
        let mut tape = Tape::new(3);
        let x = tape.input("x", Meta::activation(2, 3, h, w).branched()).unwrap();
        let y = tape.max_pool(x, size, stride, pad).unwrap().y;
        let plain = {
            let mut tape = tape.clone();
            tape.output("y", y);
            tape
        };
        let cot_meta = *tape.meta(y);
        let cot = tape.input("cot", cot_meta).unwrap();
        let g = tape.vjp(&[(y, cot)], &[x], Fan::Sum).unwrap()[0].unwrap();
        tape.output("g", g);
        // Distinct multiples of 0.5 in an order that is not monotonic anywhere.
        let n = 18 * h * w;
        let order = mlnt::rng::permutation(n, &mut mlnt::rng::stream(1, mlnt::rng::Purpose::Test, 8, 8));
        let values: Vec<f64> = order.iter().map(|i| 0.5 * f64::from(*i) - 0.25 * n as f64).collect();
        let c = random(&cot_meta, 3, 5);
        let inputs = [HostVec::F64(values.clone()), HostVec::F64(c.clone())];
        let gradient = Runner::<f64>::unfused(&tape).run(&tape, &inputs).remove(0);
        let mut forward = Runner::<f64>::unfused(&plain);
        let v = direction(n, 6);
        let f = |t: f64| dot(&c, &forward.run(&plain, &[HostVec::F64(moved(&values, t, &v))])[0]);
        assert_eq!(along("max_pool", &gradient, &v, f), None);
    }
}

/// `∇θ ⟨∇θ CE(θ), v⟩` on the tape against the finite difference of `∇θ CE` along v.
fn hessian_vector(arch: Arch, fuse: bool) {
    let model = small_model(arch);
    let mut tape = Tape::new(1);
    let params = model.params();
    let theta: Vec<Tensor> = params.iter().map(|p| tape.input(&p.name, p.meta).unwrap()).collect();
    let by_name: HashMap<String, Tensor> = params.iter().map(|p| p.name.clone()).zip(theta.iter().copied()).collect();
    let x = tape.input("x", Meta::activation(6, model.in_channels, model.size[0], model.size[1])).unwrap();
    let y = tape.input("y", Meta::labels(6)).unwrap();
    let out = model.forward(&mut tape, &mut Scope::train(&by_name), x).unwrap();
    let weights = tape.fill(Meta::vector(6), Coef::constant(1.0 / 6.0)).unwrap();
    let loss = tape.ce_loss(out.logits, y, weights).unwrap();
    let one = tape.fill(Meta::vector(1), Coef::ONE).unwrap();
    let all_of = |grads: Vec<Option<Tensor>>| grads.into_iter().map(Option::unwrap).collect::<Vec<_>>();
    let grads = all_of(tape.vjp(&[(loss, one)], &theta, Fan::Sum).unwrap());
    let plain = {
        let mut tape = tape.clone();
        output(&mut tape, &grads);
        tape
    };
    let mut seeds = Vec::new();
    for (p, g) in params.iter().zip(&grads) {
        seeds.push((*g, tape.input(&format!("v.{}", p.name), p.meta).unwrap()));
    }
    let second = all_of(tape.vjp(&seeds, &theta, Fan::Sum).unwrap());
    output(&mut tape, &second);

    let values: Vec<Vec<f64>> =
        params.iter().enumerate().map(|(i, p)| start_values(&p.name, p.meta.len(), i as u64)).collect();
    let v: Vec<Vec<f64>> = params.iter().enumerate().map(|(i, p)| direction(p.meta.len(), 700 + i as u64)).collect();
    let images = normals(6 * model.in_channels * model.size[0] * model.size[1], 9);
    let rest = [HostVec::F64(images), HostVec::I32(vec![0, 1, 2, 0, 2, 1])];
    let inputs = |t: f64| {
        let theta = values.iter().zip(&v).map(|(x, v)| HostVec::F64(moved(x, t, v)));
        theta.chain(rest.iter().cloned()).collect::<Vec<_>>()
    };
    let options = PlanOptions { fuse, ..PlanOptions::default() };
    let mut gradient = Runner::<f64>::new(&plain, options);
    let mut at = |t: f64| gradient.run(&plain, &inputs(t)).concat();
    let full: Vec<HostVec> = inputs(0.0).into_iter().chain(v.iter().cloned().map(HostVec::F64)).collect();
    let have = Runner::<f64>::new(&tape, options).run(&tape, &full).concat();
    // So small that no ReLU changes sides; two widths remove the error of second order.
    let mut central = |h: f64| -> Vec<f64> { at(h).iter().zip(at(-h)).map(|(a, b)| (a - b) / (2.0 * h)).collect() };
    let (narrow, wide) = (central(2e-6), central(4e-6));
    let want: Vec<f64> = narrow.iter().zip(&wide).map(|(n, w)| (4.0 * n - w) / 3.0).collect();
    let off = deviation(&have, &want);
    println!("{arch:?}, fused: {fuse}: Hessian-vector product off by {off:.1e}");
    assert!(off <= 1e-6, "{arch:?}: {off:.3e}");
}

#[test]
fn hessian_vector_products_of_networks() {
    for arch in [Arch::PreactResnet, Arch::ResnetBottleneck] {
        for fuse in [false, true] {
            hessian_vector(arch, fuse);
        }
    }
}
