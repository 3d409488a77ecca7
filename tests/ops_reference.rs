//! Every operation against loops written as plainly as its formula, in `[N, C, H, W]` order.

mod common;

use common::{Runner, deviation, on_two_threads};
use mlnt::cases::{Case, all};
use mlnt::device::HostVec;
use mlnt::ops::{BN_EPS, Conv, ConvKind, Op, Window};
use mlnt::tape::Meta;

/// One branch of one operand.
type Slice<'a> = &'a [f64];

fn conv(op: &Conv, ins: &[Slice], out: &mut [f64]) {
    let g = &op.geom;
    let x_at = |n: usize, c: usize, h: usize, w: usize| ((n * g.c + c) * g.h + h) * g.w + w;
    let y_at = |n: usize, k: usize, p: usize, q: usize| ((n * g.k + k) * g.p + p) * g.q + q;
    let w_at = |k: usize, c: usize, r: usize, s: usize| ((k * g.c + c) * g.r + r) * g.s + s;
    for n in 0..g.n {
        for k in 0..g.k {
            for (p, q) in grid(g.p, g.q) {
                for c in 0..g.c {
                    for (r, s) in grid(g.r, g.s) {
                        let (Some(h), Some(w)) = (
                            (p * g.stride + r).checked_sub(g.pad).filter(|h| *h < g.h),
                            (q * g.stride + s).checked_sub(g.pad).filter(|w| *w < g.w),
                        ) else {
                            continue;
                        };
                        let (x, y, weight) = (x_at(n, c, h, w), y_at(n, k, p, q), w_at(k, c, r, s));
                        match op.kind {
                            ConvKind::Fprop => out[y] += ins[0][x] * ins[1][weight],
                            ConvKind::Dgrad => out[x] += ins[0][y] * ins[1][weight],
                            ConvKind::Wgrad => out[weight] += ins[0][x] * ins[1][y],
                        }
                    }
                }
            }
        }
    }
}

fn grid(a: usize, b: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    (0..a).flat_map(move |i| (0..b).map(move |j| (i, j)))
}

/// Positions of channel `c` in an activation.
fn channel(meta: &Meta, c: usize) -> impl Iterator<Item = usize> + Clone {
    let [n, channels, h, w] = meta.dims;
    grid(n, h * w).map(move |(n, i)| (n * channels + c) * h * w + i)
}

/// ⟨·⟩ over a channel.
fn mean(at: impl Iterator<Item = usize>, f: impl Fn(usize) -> f64) -> f64 {
    let (count, sum) = at.fold((0, 0.0), |(count, sum), i| (count + 1, sum + f(i)));
    sum / f64::from(count)
}

fn bn_forward(relu: bool, x_meta: &Meta, ins: &[Slice], outs: &mut [Vec<f64>]) {
    for c in 0..x_meta.dims[1] {
        let at = channel(x_meta, c);
        let mu = mean(at.clone(), |i| ins[0][i]);
        let var = mean(at.clone(), |i| (ins[0][i] - mu).powi(2));
        for i in at {
            let y = ins[1][c] * (ins[0][i] - mu) / (var + BN_EPS).sqrt() + ins[2][c];
            outs[0][i] = if relu { y.max(0.0) } else { y };
        }
        (outs[1][c], outs[2][c]) = (mu, var);
    }
}

fn bn_eval(relu: bool, x_meta: &Meta, ins: &[Slice], out: &mut [f64]) {
    for c in 0..x_meta.dims[1] {
        for i in channel(x_meta, c) {
            let y = ins[1][c] * (ins[0][i] - ins[3][c]) / (ins[4][c] + BN_EPS).sqrt() + ins[2][c];
            out[i] = if relu { y.max(0.0) } else { y };
        }
    }
}

fn bn_backward(relu: bool, x_meta: &Meta, ins: &[Slice], outs: &mut [Vec<f64>]) {
    for c in 0..x_meta.dims[1] {
        let at = channel(x_meta, c);
        let r = 1.0 / (ins[4][c] + BN_EPS).sqrt();
        let hat = |i: usize| (ins[1][i] - ins[3][c]) * r;
        let dy = |i: usize| if relu && ins[5][i] <= 0.0 { 0.0 } else { ins[0][i] };
        let (mean_dy, mean_dy_hat) = (mean(at.clone(), dy), mean(at.clone(), |i| dy(i) * hat(i)));
        for i in at {
            outs[0][i] = ins[2][c] * r * (dy(i) - mean_dy - hat(i) * mean_dy_hat);
            outs[1][c] += dy(i) * hat(i);
            outs[2][c] += dy(i);
        }
    }
}

fn bn_double_backward(relu: bool, x_meta: &Meta, ins: &[Slice], outs: &mut [Vec<f64>]) {
    for c in 0..x_meta.dims[1] {
        let at = channel(x_meta, c);
        let r = 1.0 / (ins[7][c] + BN_EPS).sqrt();
        let (x_dot, g_dot, b_dot, g) = (ins[0], ins[1][c], ins[2][c], ins[5][c]);
        let on = |i: usize| !relu || ins[8][i] > 0.0;
        let hat = |i: usize| (ins[4][i] - ins[6][c]) * r;
        let dy = |i: usize| if on(i) { ins[3][i] } else { 0.0 };
        let rho = mean(at.clone(), |i| hat(i) * x_dot[i]);
        let mean_dot = mean(at.clone(), |i| x_dot[i]);
        let hat_dot = |i: usize| r * (x_dot[i] - mean_dot - hat(i) * rho);
        let r_dot = -r * r * rho;
        let mean_dy = mean(at.clone(), dy);
        let dy_hat = mean(at.clone(), |i| dy(i) * hat(i));
        let dy_hat_dot = mean(at.clone(), |i| dy(i) * hat_dot(i));
        for i in at {
            outs[0][i] = if on(i) { g * hat_dot(i) + g_dot * hat(i) + b_dot } else { 0.0 };
            outs[1][i] = (g_dot * r + g * r_dot) * (dy(i) - mean_dy - hat(i) * dy_hat)
                - g * r * (hat_dot(i) * dy_hat + hat(i) * dy_hat_dot);
            outs[2][c] += dy(i) * hat_dot(i);
        }
    }
}

fn max_index(window: &Window, x: Slice, out: &mut [f64]) {
    let ([n, c, h, w], [_, _, p, q]) = (window.image.dims, window.pooled.dims);
    for (image, o) in grid(n * c, p * q) {
        let mut best: Option<usize> = None;
        for (r, s) in grid(window.size, window.size) {
            let at =
                |o: usize, r: usize, size: usize| (o * window.stride + r).checked_sub(window.pad).filter(|i| *i < size);
            if let (Some(i), Some(j)) = (at(o / q, r, h), at(o % q, s, w)) {
                let value = |k: usize| x[image * h * w + k];
                if best.is_none_or(|b| value(i * w + j) > value(b)) {
                    best = Some(i * w + j);
                }
            }
        }
        out[image * p * q + o] = best.unwrap() as f64;
    }
}

fn softmax(z: Slice, sample: usize, classes: usize) -> Vec<f64> {
    let z = &z[sample * classes..][..classes];
    let total: f64 = z.iter().map(|v| v.exp()).sum();
    z.iter().map(|v| v.exp() / total).collect()
}

/// All results of one branch.
fn one_branch(case: &Case, metas: &[Meta], ins: &[Slice]) -> Vec<Vec<f64>> {
    let mut outs: Vec<Vec<f64>> = metas.iter().map(|m| vec![0.0; m.len()]).collect();
    let meta = |i: usize| &case.operands[i].meta;
    let target = |i: usize, n: usize, c: usize, classes: usize| match &case.op {
        Op::CeLoss(_) | Op::CeGrad(_) => f64::from(u8::from(ins[i][n] as usize == c)),
        _ => ins[i][n * classes + c],
    };
    match &case.op {
        Op::Conv(op) => {
            conv(op, ins, &mut outs[0]);
            ins.iter().skip(2).for_each(|start| outs[0].iter_mut().zip(*start).for_each(|(o, s)| *o += s));
        }
        Op::BnForward(op) => bn_forward(op.relu, meta(0), ins, &mut outs),
        Op::BnEval(op) => bn_eval(op.relu, meta(0), ins, &mut outs[0]),
        Op::BnBackward(op) => bn_backward(op.relu, meta(1), ins, &mut outs),
        Op::BnDoubleBackward(op) => bn_double_backward(op.relu, meta(4), ins, &mut outs),
        Op::Relu(_) => outs[0] = ins[0].iter().map(|x| x.max(0.0)).collect(),
        Op::Mask(_) => outs[0] = ins[0].iter().zip(ins[1]).map(|(x, r)| if *r > 0.0 { *x } else { 0.0 }).collect(),
        Op::AllFinite(_) => unreachable!("looks at all branches together"),
        Op::FusedConv(_)
        | Op::BnStats(_)
        | Op::BnReluBackward(_)
        | Op::BnReluBackwardApply(_)
        | Op::BnReluDoubleBackward(_)
        | Op::BnReluDoubleBackwardApply(_)
        | Op::Update(_) => {
            panic!("{:?}: only the planner makes it, the table has no case of it", case.op)
        }
        Op::MaxPoolIndex(op) => max_index(&op.0, ins[0], &mut outs[0]),
        Op::PoolGather(op) => {
            let area = |m: &Meta| m.dims[2] * m.dims[3];
            let (image, pooled) = (area(&op.0.image), area(&op.0.pooled));
            for o in 0..outs[0].len() {
                outs[0][o] = ins[0][o / pooled * image + ins[1][o] as usize];
            }
        }
        Op::PoolScatter(op) => {
            let area = |m: &Meta| m.dims[2] * m.dims[3];
            let (image, pooled) = (area(&op.0.image), area(&op.0.pooled));
            for o in 0..ins[0].len() {
                outs[0][o / pooled * image + ins[1][o] as usize] += ins[0][o];
            }
        }
        Op::AvgPool(op) => {
            let image = op.of.dims[2] * op.of.dims[3];
            for (i, x) in ins[0].iter().enumerate() {
                outs[0][i / image] += x / image as f64;
            }
        }
        Op::AvgPoolBackward(op) => {
            let image = op.to.dims[2] * op.to.dims[3];
            outs[0] = (0..op.to.len()).map(|i| ins[0][i / image] / image as f64).collect();
        }
        Op::ChannelSum(op) => (0..op.of.dims[1]).for_each(|c| outs[0][c] = channel(&op.of, c).map(|i| ins[0][i]).sum()),
        Op::ChannelBroadcast(op) => {
            (0..op.to.dims[1]).for_each(|c| channel(&op.to, c).for_each(|i| outs[0][i] = ins[0][c]));
        }
        Op::LinComb(_) => unreachable!("sums its operands over the branches one by one"),
        Op::Fill(op) => outs[0].fill(op.value.value(&[])),
        Op::Softmax(op) => {
            let [n, classes, ..] = op.logits.dims;
            outs[0] = (0..n).flat_map(|i| softmax(ins[0], i, classes)).collect();
        }
        Op::SoftmaxJvp(op) => {
            let [n, classes, ..] = op.logits.dims;
            for i in 0..n {
                let (p, e) = (softmax(ins[1], i, classes), &ins[0][i * classes..][..classes]);
                let along: f64 = p.iter().zip(e).map(|(p, e)| p * e).sum();
                (0..classes).for_each(|c| outs[0][i * classes + c] = ins[3][0] * ins[2][i] * p[c] * (e[c] - along));
            }
        }
        Op::CeLoss(_) | Op::KlLoss(_) => {
            let [n, classes, ..] = meta(0).dims;
            for (i, c) in grid(n, classes) {
                let (p, t) = (softmax(ins[0], i, classes), target(1, i, c, classes));
                if t > 0.0 {
                    outs[0][0] += ins[2][i] * t * (t.ln() - p[c].ln());
                }
            }
        }
        Op::CeGrad(_) | Op::KlGrad(_) => {
            let [n, classes, ..] = meta(0).dims;
            for (i, c) in grid(n, classes) {
                let (p, t) = (softmax(ins[0], i, classes), target(1, i, c, classes));
                outs[0][i * classes + c] = ins[3][0] * ins[2][i] * (p[c] - t);
            }
        }
        Op::NearestNeighbours(op) => {
            let [k, dim, ..] = meta(0).dims;
            let row = |i: usize| &ins[0][i * dim..][..dim];
            for i in 0..k {
                let distance = |j: usize| row(i).iter().zip(row(j)).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
                let mut others: Vec<usize> = (0..k).filter(|j| *j != i).collect();
                others.sort_by(|a, b| distance(*a).total_cmp(&distance(*b)).then(a.cmp(b)));
                (0..op.count).for_each(|r| outs[0][i * op.count + r] = others[r] as f64);
            }
        }
        Op::TransferLabels(_) => {
            let count = meta(1).dims[1];
            for (i, rank) in ins[2].iter().enumerate() {
                let from = if *rank < 0.0 { i } else { ins[1][i * count + *rank as usize] as usize };
                outs[0][i] = ins[0][from];
            }
        }
    }
    outs
}

/// Results of the case by the formulas, branch by branch.
fn reference(case: &Case, metas: &[Meta], values: &[HostVec]) -> Vec<Vec<f64>> {
    let values: Vec<Vec<f64>> = values.iter().map(HostVec::to_f64).collect();
    let branch = |i: usize, m: usize| {
        let meta = &case.operands[i].meta;
        &values[i][if meta.per_branch { m * meta.len() } else { 0 }..][..meta.len()]
    };
    let live = if case.operands.iter().any(|o| o.meta.per_branch) { case.branches } else { 1 };
    if let Op::AllFinite(_) = &case.op {
        return vec![vec![f64::from(u8::from(values.iter().flatten().all(|v| v.is_finite())))]];
    }
    if let Op::LinComb(op) = &case.op {
        if op.guarded && values[op.coefs.len()] == [0.0] {
            return vec![values[0].clone()];
        }
        let mut out = vec![0.0; metas[0].total(case.branches)];
        for (i, coef) in op.coefs.iter().enumerate() {
            let repeats = if case.operands[i].meta.per_branch || metas[0].per_branch { live } else { 1 };
            for m in 0..repeats {
                let at = if metas[0].per_branch { m * metas[0].len() } else { 0 };
                out[at..].iter_mut().zip(branch(i, m)).for_each(|(o, x)| *o += coef.value(&[]) * x);
            }
        }
        return vec![out];
    }
    let mut totals: Vec<Vec<f64>> = metas.iter().map(|m| vec![0.0; m.total(case.branches)]).collect();
    // A result that an operation starts from counts once in a sum over branches, as a shared operand of a sum does.
    let start = |i: usize| matches!(case.op, Op::Conv(_)) && i == 2 && case.sum.first() == Some(&true);
    let zeros: Vec<Vec<f64>> = case.operands.iter().map(|o| vec![0.0; o.meta.len()]).collect();
    for m in 0..if matches!(case.op, Op::Fill(_)) && metas[0].per_branch { case.branches } else { live } {
        let ins: Vec<Slice> =
            (0..values.len()).map(|i| if start(i) && m > 0 { &zeros[i][..] } else { branch(i, m) }).collect();
        for (o, result) in one_branch(case, metas, &ins).into_iter().enumerate() {
            let summed = case.sum.get(o) == Some(&true);
            let at = if metas[o].per_branch { m * metas[o].len() } else { 0 };
            if metas[o].per_branch || summed || m == 0 {
                totals[o][at..].iter_mut().zip(result).for_each(|(t, r)| *t += r);
            }
        }
    }
    totals
}

/// What is wrong with the CPU device's results of a case.
fn faults(case: &Case) -> Vec<String> {
    let recorded = case.record().unwrap();
    let values = case.values(1);
    let want = reference(case, &case.results().unwrap(), &values);
    let double = Runner::<f64>::unfused(&recorded.tape).run(&recorded.tape, &values);
    let single = Runner::<f32>::unfused(&recorded.tape).run(&recorded.tape, &values);
    let mut wrong = Vec::new();
    for o in 0..want.len() {
        let (d, s) = (deviation(&double[o], &want[o]), deviation(&single[o], &double[o]));
        if !(d <= 1e-12 && s <= case.tolerance) {
            wrong.push(format!("{}: result {o} is off by {d:.1e} in f64, {s:.1e} in f32", case.name));
        }
    }
    wrong
}

#[test]
fn double_precision_is_the_formula_and_single_is_close() {
    let cases = all();
    let failures = on_two_threads(&cases, faults);
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// Where the forward result alone, which is the ReLU's mask, differs from branch to branch, so do all results.
#[test]
fn a_mask_per_branch_makes_results_per_branch() {
    let of_branches = |mut case: Case, sum: bool| {
        let name = |case: &Case| case.operands.last().map(|o| o.name);
        assert_eq!((name(&case), case.branches > 1), (Some("y"), true), "{}", case.name);
        case.operands.iter_mut().for_each(|o| o.meta = o.meta.with_branching(o.name == "y"));
        case.sum = vec![sum; 3];
        case.name = format!("{} of y alone, summed {sum}", case.name);
        case
    };
    let masked = |case: &Case| match &case.op {
        Op::BnBackward(op) => op.relu,
        Op::BnDoubleBackward(op) => op.relu,
        _ => false,
    };
    let cases: Vec<Case> = all().into_iter().filter(|case| masked(case) && case.branches > 1).collect();
    assert!(cases.len() > 10);
    for sum in [false, true] {
        let failures: Vec<String> = cases.iter().flat_map(|case| faults(&of_branches(case.clone(), sum))).collect();
        assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    }
}
