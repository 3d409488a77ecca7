//! Elementwise kernels, pooling and the head on the SIMT host machine, beyond the table of cases: sizes that fill several
//! blocks, slices and tiles, numbers that are none, tensors grouped in one launch.

mod common;

use common::{deviation, normals, on_two_threads};
use mlnt::cases::{Case, Data, Operand};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, Mode, Operands};
use mlnt::device::{Device, HostSlice, HostVec};
use mlnt::ops::{
    AvgPool, AvgPoolBackward, CeGrad, CeLoss, ChannelBroadcast, ChannelSum, KlGrad, KlLoss, LinComb, Mask,
    MaxPoolIndex, Op, Operation, PoolGather, PoolScatter, Relu, Softmax, SoftmaxJvp, Window,
};
use mlnt::plan::{Plan, PlanOptions};
use mlnt::tape::{Coef, DType, Meta, Tape};

const SEEDS: [u64; 2] = [1, 2];

fn simt(seed: u64, mode: Mode) -> Cuda {
    Cuda::new(Box::new(Simt::open(seed).unwrap()), Operands::F32, mode)
}

fn case(op: impl Into<Op>, branches: usize, operands: &[(Meta, Data)], sum: bool) -> Case {
    let names = ["a", "b", "c", "d"];
    let named = names.iter().zip(operands);
    let operands: Vec<Operand> =
        named.map(|(name, (meta, data))| Operand { name, meta: *meta, data: *data, differentiable: false }).collect();
    let op = op.into();
    let shapes: Vec<String> = operands.iter().map(|o| o.meta.to_string()).collect();
    let name = format!("{} of {}, M = {branches}, sum {sum}", op.name(), shapes.join(" "));
    Case { name, op, branches, operands, sum: vec![sum], tolerance: 1e-6, fused: false }
}

/// The one result of a case, given its operands.
fn result(device: &mut dyn Device, case: &Case, values: &[HostVec]) -> Vec<f64> {
    let plan =
        Plan::build(&case.record().unwrap().tape, &PlanOptions { fuse: false, ..PlanOptions::default() }).unwrap();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    device.read_output(id, "out0").unwrap().to_f64()
}

/// Results of the CPU in double precision and of the machine with each seed.
fn compare(case: &Case, values: &[HostVec]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let want = result(&mut Cpu::<f64>::new(1).unwrap(), case, values);
    (want, SEEDS.map(|seed| result(&mut simt(seed, Mode::Eager), case, values)).into())
}

fn check(cases: &[Case]) {
    let failures = on_two_threads(cases, |case| {
        let (want, have) = compare(case, &case.values(3));
        let off = deviation(&have[0], &want);
        let mut found = Vec::new();
        if off > case.tolerance {
            found.push(format!("{}: {off:.1e} > {:.0e}", case.name, case.tolerance));
        }
        if have[0] != have[1] {
            found.push(format!("{}: depends on the order of threads", case.name));
        }
        found
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn window(image: Meta, size: usize, stride: usize, pad: usize) -> Window {
    let [n, c, h, w] = image.dims;
    let side = |of: usize| (of + 2 * pad - size) / stride + 1;
    Window { size, stride, pad, image, pooled: Meta::activation(n, c, side(h), side(w)) }
}

fn pool_cases(window: Window, branches: usize) -> Vec<Case> {
    let branched = |meta: Meta| meta.with_branching(branches > 1);
    let index = (branched(Meta { dtype: DType::Index, ..window.pooled }), Data::Position(window));
    let (image, pooled) = (branched(window.image), branched(window.pooled));
    vec![
        case(MaxPoolIndex(window), branches, &[(image, Data::Spaced)], false),
        case(PoolGather(window), branches, &[(image, Data::Normal), index], false),
        case(PoolScatter(window), branches, &[(pooled, Data::Normal), index], false),
        case(PoolScatter(window), branches, &[(pooled, Data::Normal), index], true),
    ]
}

#[test]
fn long_rows_and_many_channels() {
    let mut cases = Vec::new();
    // One tile of few channels over several slices; several tiles; both; more channels than fill a tile by one.
    for (n, c, h, w) in [(16, 32, 40, 40), (2, 300, 6, 5), (3, 257, 13, 11), (70, 1, 30, 30), (2, 5, 100, 100)] {
        let (x, one) = (Meta::activation(n, c, h, w), Meta::activation(n, c, 1, 1));
        for (branches, sum) in [(1, false), (3, false), (3, true)] {
            let positive = |meta: Meta| [(meta.with_branching(branches > 1), Data::Positive)];
            cases.push(case(ChannelSum { of: x }, branches, &positive(x), sum));
            cases.push(case(ChannelBroadcast { to: x }, branches, &positive(Meta::vector(c)), sum));
            cases.push(case(AvgPool { of: x }, branches, &positive(x), sum));
            cases.push(case(AvgPoolBackward { to: x }, branches, &positive(one), sum));
        }
    }
    check(&cases);
}

#[test]
fn grids_that_are_folded() {
    // More groups, images and branches than a grid has blocks in y.
    let many = Meta::activation(66_000, 1, 2, 2);
    let mut cases = pool_cases(window(many, 2, 1, 0), 1);
    cases.push(case(AvgPool { of: many }, 1, &[(many, Data::Normal)], false));
    cases.push(case(AvgPoolBackward { to: many }, 1, &[(Meta::activation(66_000, 1, 1, 1), Data::Normal)], false));
    let (one, branches) = (Meta::vector(1).branched(), 66_000);
    cases.push(case(Mask, branches, &[(one, Data::Normal), (one, Data::Clear)], false));
    let logits = Meta::activation(1, 2, 1, 1);
    cases.push(case(Softmax { logits }, branches, &[(logits.branched(), Data::Normal)], false));
    check(&cases);
}

#[test]
fn windows_that_overlap_much_and_not_at_all() {
    let image = Meta::activation(2, 3, 9, 7);
    let windows = [(5, 1, 2), (3, 4, 0), (2, 3, 1), (4, 3, 2), (7, 7, 0), (1, 2, 0)];
    let cases = windows.map(|(size, stride, pad)| window(image, size, stride, pad));
    check(&cases.into_iter().flat_map(|w| [pool_cases(w, 1), pool_cases(w, 3)]).flatten().collect::<Vec<_>>());
}

#[test]
fn heads_of_any_width() {
    let mut cases = Vec::new();
    for (n, classes) in [(3, 1000), (9, 1), (40, 32), (35, 33)] {
        let logits = Meta::activation(n, classes, 1, 1);
        let z = (logits.branched(), Data::Normal);
        let labels = (Meta::labels(n), Data::Labels(classes));
        let (target, weights) = ((logits, Data::Distribution), (Meta::vector(n), Data::Positive));
        let scale = (Meta::vector(1).branched(), Data::Normal);
        cases.push(case(Softmax { logits }, 2, &[z], false));
        for sum in [false, true] {
            cases.push(case(SoftmaxJvp { logits }, 2, &[z, (logits, Data::Normal), weights, scale], sum));
            cases.push(case(CeLoss { logits }, 2, &[z, labels, weights], sum));
            cases.push(case(CeGrad { logits }, 2, &[z, labels, weights, scale], sum));
            cases.push(case(KlLoss { logits }, 2, &[z, target, weights], sum));
            cases.push(case(KlGrad { logits }, 2, &[z, target, weights, scale], sum));
        }
    }
    check(&cases);
}

/// Compares element by element: a NaN must stand where the CPU has one.
fn check_special(case: &Case, values: &[HostVec]) {
    let (want, have) = compare(case, values);
    for have in have {
        for (i, (have, want)) in have.iter().zip(&want).enumerate() {
            let near = (have - want).abs() <= 1e-6 * want.abs() || have == want;
            assert!(near || (have.is_nan() && want.is_nan()), "{}: {have} at {i}, expected {want}", case.name);
        }
    }
}

#[test]
fn numbers_that_are_none_stay_visible() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let x = HostVec::F64(vec![nan, -1.0, 2.0, -inf, inf, -0.0, nan]);
    let seven = (Meta::vector(7), Data::Normal);
    check_special(&case(Relu, 1, &[seven], false), std::slice::from_ref(&x));
    let ones = HostVec::F64(vec![1.0; 7]);
    check_special(&case(Mask, 1, &[seven, seven], false), &[x.clone(), ones.clone()]);
    check_special(&case(Mask, 1, &[seven, seven], false), &[ones.clone(), x.clone()]);
    let sum = LinComb::new(vec![Coef::ONE, Coef::constant(2.0)]);
    check_special(&case(sum, 1, &[seven, seven], false), &[ones, x]);

    // Maxima: ties, one NaN, two NaNs, nothing but -inf.
    let image = Meta::activation(1, 1, 4, 8);
    let pixels = [
        [1.0, 1.0, nan, 0.0, nan, 3.0, -inf, -inf],
        [1.0, 1.0, 5.0, 0.0, 1.0, nan, -inf, -inf],
        [2.0, 3.0, -1.0, -1.0, inf, inf, -inf, -0.0],
        [3.0, 2.0, -1.0, -0.5, 0.0, 1.0, 0.0, -inf],
    ];
    for (size, stride, pad) in [(2, 2, 0), (3, 1, 1), (3, 2, 1)] {
        let case = case(MaxPoolIndex(window(image, size, stride, pad)), 1, &[(image, Data::Normal)], false);
        check_special(&case, &[HostVec::F64(pixels.concat())]);
    }

    // Samples: ordinary, sure of itself, NaN, infinite either way, -inf throughout; the last two with weight 0.
    let logits = Meta::activation(7, 3, 1, 1);
    let rows = [
        [1.0, -2.0, 0.5],
        [40.0, 0.0, -30.0],
        [0.0, nan, 1.0],
        [inf, 0.0, 1.0],
        [-inf, 0.0, 1.0],
        [-inf, -inf, -inf],
        [nan, nan, nan],
    ];
    let z = HostVec::F64(rows.concat());
    let all = Meta::vector(7);
    let metas = |target: Meta| [logits, target, all, Meta::vector(1)].map(|meta| (meta, Data::Normal));
    let labels = HostVec::I32(vec![0, 0, 0, 1, 1, 2, 0]);
    let target = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]];
    let target = HostVec::F64([target.concat(), vec![0.0, 0.0, 1.0, nan, 0.0, 1.0]].concat());
    let scale = HostVec::F64(vec![-0.75]);
    let metas = |labels: bool| metas(if labels { Meta::labels(7) } else { logits });
    check_special(&case(Softmax { logits }, 1, &metas(true)[..1], false), std::slice::from_ref(&z));
    // A NaN that counts, and then none that does.
    for weights in [[1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0]] {
        let weights = HostVec::F64(weights.into());
        let ce = [z.clone(), labels.clone(), weights.clone(), scale.clone()];
        let kl = [z.clone(), target.clone(), weights.clone(), scale.clone()];
        check_special(&case(CeLoss { logits }, 1, &metas(true)[..3], false), &ce[..3]);
        check_special(&case(KlLoss { logits }, 1, &metas(false)[..3], false), &kl[..3]);
        check_special(&case(CeGrad { logits }, 1, &metas(true), false), &ce);
        check_special(&case(KlGrad { logits }, 1, &metas(false), false), &kl);
        check_special(
            &case(SoftmaxJvp { logits }, 1, &metas(false), false),
            &[target.clone(), z.clone(), weights, scale.clone()],
        );
    }
    // A label that no class has is never an address.
    let strange = HostVec::I32(vec![3, -1, i32::MAX, i32::MIN, 1, 2, 0]);
    let ce = [z, strange, HostVec::F64(vec![1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]), scale];
    check_special(&case(CeLoss { logits }, 1, &metas(true)[..3], false), &ce[..3]);
    check_special(&case(CeGrad { logits }, 1, &metas(true), false), &ce);
}

/// An optimiser's step over parameters of all sizes: velocities, parameters, moving averages and per-branch fast weights.
fn optimiser(metas: &[Meta]) -> Tape {
    let mut tape = Tape::new(3);
    tape.set_phase("update");
    let (lr, gamma) = (tape.scalar("lr"), tape.scalar("gamma"));
    let mut all = |name: &str, branched: &dyn Fn(usize) -> bool| -> Vec<_> {
        let metas = metas.iter().enumerate().map(|(i, m)| (i, m.with_branching(branched(i))));
        metas.map(|(i, meta)| tape.state(&format!("{name}{i}"), meta).unwrap()).collect()
    };
    let (params, velocities, averages) = (all("p", &|_| false), all("v", &|_| false), all("a", &|_| false));
    // Shared and per-branch cotangents side by side in one launch.
    let (grads, inner) = (all("g", &|_| false), all("i", &|i| i % 3 != 1));
    let minus = lr.times(-1.0);
    let both = || params.iter().zip(&inner);
    let fast: Vec<_> = both().map(|(p, i)| tape.lin_comb(&[(Coef::ONE, *p), (minus, *i)]).unwrap()).collect();
    fast.iter().enumerate().for_each(|(i, t)| tape.output(format!("fast{i}"), *t));
    // What is per-branch is summed, what is shared counts once.
    let coefs = vec![Coef::constant(0.5), Coef::ONE];
    let mut total = |g, i| tape.record1(LinComb::new(coefs.clone()), &[g, i], true).unwrap();
    let totals: Vec<_> = grads.iter().zip(&inner).map(|(g, i)| total(*g, *i)).collect();
    let mut assign = |state: &[_], coefs: &[Coef], terms: &[&[_]]| -> Vec<_> {
        let value = |i: usize| terms.iter().zip(coefs).map(|(t, c)| (*c, t[i])).collect::<Vec<_>>();
        let new: Vec<_> = (0..state.len()).map(|i| tape.lin_comb(&value(i)).unwrap()).collect();
        state.iter().zip(&new).for_each(|(s, n)| tape.assign(*s, *n).unwrap());
        new
    };
    let decay = Coef::constant(1e-3);
    let velocity = assign(&velocities, &[Coef::constant(0.9), Coef::ONE, decay], &[&velocities, &totals, &params]);
    let moved = assign(&params, &[Coef::ONE, minus], &[&params, &velocity]);
    assign(&averages, &[gamma, gamma.times(-0.5), Coef::constant(0.01)], &[&averages, &averages, &moved]);
    tape
}

#[test]
fn tensors_of_all_sizes_in_one_launch() {
    let mut metas: Vec<Meta> = [1, 2, 3, 4, 31, 33, 127, 2047, 2048, 2049, 5000].map(Meta::vector).into();
    metas.extend([Meta::weight(5, 3, 3, 3), Meta::weight(16, 8, 3, 3), Meta::weight(7, 13, 1, 1)]);
    let plan = Plan::build(&optimiser(&metas), &PlanOptions::default()).unwrap();
    let sets: Vec<usize> = plan.launches.iter().map(|l| l.args.len()).collect();
    assert_eq!(sets, [metas.len(); 5], "one launch for each kind of combination");

    let states = |device: &mut dyn Device| -> Vec<Vec<f64>> {
        let id = device.load(plan.clone()).unwrap();
        for (i, (name, meta)) in device.states().into_iter().enumerate() {
            let values: Vec<f64> = normals(meta.total(3), i as u64).iter().map(|x| f64::from(*x as f32)).collect();
            device.write_state(&name, HostSlice::F64(&values)).unwrap();
        }
        // The coefficients change from run to run, the recorded launches do not.
        for scalars in [[0.5, 0.25], [0.125, 0.75], [0.0, 1.0]] {
            device.run(id, &scalars).unwrap();
        }
        let outputs = (0..metas.len()).map(|i| device.read_output(id, &format!("fast{i}")).unwrap().to_f64());
        let outputs: Vec<Vec<f64>> = outputs.collect();
        let names = device.states().into_iter().map(|s| s.0);
        names.map(|name| device.read_state(&name).unwrap().to_f64()).chain(outputs).collect()
    };
    let want = states(&mut Cpu::<f64>::new(1).unwrap());
    let have = [(1, Mode::Graph), (2, Mode::Eager)].map(|(seed, mode)| states(&mut simt(seed, mode)));
    assert_eq!(want.len(), 6 * metas.len());
    for (i, (have, want)) in have[0].iter().zip(&want).enumerate() {
        let off = deviation(have, want);
        // Single elements are among them, some of them small differences of larger terms.
        assert!(off <= 1e-5, "tensor {i}, {} elements: off by {off:.1e}", want.len());
    }
    assert_eq!(have[0], have[1], "replayed and eager, any order of threads");
}
