//! Losses of other methods for noisy labels with their gradients at the logits, on the host in double precision.
//!
//! Logits are rows `[k, classes]` of a training-mode forward; `p = softmax(z)` per row. All values are means over the
//! batch, nats. Through `p` a cotangent `e` becomes `p ⊙ (e − ⟨p, e⟩)` at the logits.

/// A loss of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitLoss {
    /// Its value, nats.
    pub value: f64,
    /// Its gradient at the logits `[k, classes]`.
    pub gradient: Vec<f64>,
}

/// Weights of early-learning regularisation (Liu et al., NeurIPS 2020).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Elr {
    /// β, share of the old target in the new one.
    pub beta: f64,
    /// λ, weight of the regulariser.
    pub lambda: f64,
}

/// Probabilities in the regulariser of ELR stay this far from 0 and 1, as in the authors' code.
const ELR_MARGIN: f64 = 1e-4;

/// Weights of the regularisers of joint optimisation (Tanaka et al., CVPR 2018).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct JointOpt {
    /// α, weight of the divergence of the mean prediction from uniform classes.
    pub alpha: f64,
    /// β, weight of the entropy of the predictions.
    pub beta: f64,
}

/// `log Σ exp(z)` of one row.
fn log_sum_exp(logits: &[f64]) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + logits.iter().map(|v| (v - largest).exp()).sum::<f64>().ln()
}

/// `log softmax(z)` of one row.
fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let log_sum = log_sum_exp(logits);
    logits.iter().map(|v| v - log_sum).collect()
}

/// `softmax(z)` of one row.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    log_softmax(logits).into_iter().map(f64::exp).collect()
}

/// `−log softmax(z)[label]` of one row, nats.
pub fn cross_entropy(logits: &[f64], label: usize) -> f64 {
    log_sum_exp(logits) - logits[label]
}

/// Early-learning regularisation: `CE + λ/k Σ_i log(1 − ⟨p̃_i, t_i⟩)` with `p̃` the probabilities cut off at 1e-4 and
/// `1 − 1e-4`. The `targets` `[k, classes]` move first, `t ← β t + (1−β) p̃/Σp̃`, and count as constants.
pub fn elr(logits: &[f64], labels: &[i32], targets: &mut [f64], weights: Elr) -> LogitLoss {
    let (k, classes) = (labels.len() as f64, logits.len() / labels.len());
    let (mut value, mut gradient) = (0.0, Vec::with_capacity(logits.len()));
    let rows = logits.chunks_exact(classes).zip(labels).zip(targets.chunks_exact_mut(classes));
    for ((z, label), target) in rows {
        let (p, label) = (softmax(z), *label as usize);
        let cut: Vec<f64> = p.iter().map(|p| p.clamp(ELR_MARGIN, 1.0 - ELR_MARGIN)).collect();
        let total: f64 = cut.iter().sum();
        for (t, cut) in target.iter_mut().zip(&cut) {
            *t = weights.beta * *t + (1.0 - weights.beta) * cut / total;
        }
        let rest = 1.0 - dot(target, &cut);
        value += (cross_entropy(z, label) + weights.lambda * rest.ln()) / k;
        // Where a probability is cut off, nothing of the regulariser depends on it.
        let slope: Vec<f64> =
            p.iter().zip(&cut).zip(&*target).map(|((p, cut), t)| if p == cut { -t / rest } else { 0.0 }).collect();
        let mean = dot(&p, &slope);
        gradient.extend(
            p.iter()
                .zip(&slope)
                .enumerate()
                .map(|(j, (p, slope))| (p - f64::from(u8::from(j == label)) + weights.lambda * p * (slope - mean)) / k),
        );
    }
    LogitLoss { value, gradient }
}

/// Joint optimisation: `1/k Σ_i KL(s_i ‖ p_i) + α Σ_j q_j log(q_j / p̄_j) + β/k Σ_i H(p_i)` for soft labels `s`
/// `[k, classes]`, with `p̄` the mean of `p` over the batch and `q` uniform, the paper's prior.
pub fn joint_opt(logits: &[f64], soft_labels: &[f64], classes: usize, weights: JointOpt) -> LogitLoss {
    let (k, prior) = ((logits.len() / classes) as f64, 1.0 / classes as f64);
    let logs: Vec<Vec<f64>> = logits.chunks_exact(classes).map(log_softmax).collect();
    let mut sums = vec![0.0; classes];
    for row in &logs {
        sums.iter_mut().zip(row).for_each(|(sum, log)| *sum += log.exp());
    }
    let mut value = weights.alpha * sums.iter().map(|sum| prior * (prior * k / sum).ln()).sum::<f64>();
    let mut gradient = Vec::with_capacity(logits.len());
    for (log, s) in logs.iter().zip(soft_labels.chunks_exact(classes)) {
        let p: Vec<f64> = log.iter().map(|log| log.exp()).collect();
        let divergence: f64 = s.iter().zip(log).filter(|(s, _)| **s > 0.0).map(|(s, log)| s * (s.ln() - log)).sum();
        let entropy = -dot(&p, log);
        value += (divergence + weights.beta * entropy) / k;
        let mass: f64 = s.iter().sum();
        // p_ij ∂/∂p_ij of the prior's term, up to its sign: a class that nobody predicts has no part in it.
        let share: Vec<f64> =
            p.iter().zip(&sums).map(|(p, sum)| if *sum > 0.0 { prior * p / sum } else { 0.0 }).collect();
        let shares: f64 = share.iter().sum();
        gradient.extend((0..classes).map(|j| {
            let fit = p[j] * mass - s[j];
            let spread = p[j] * (log[j] + entropy);
            (fit - weights.beta * spread) / k + weights.alpha * (p[j] * shares - share[j])
        }));
    }
    LogitLoss { value, gradient }
}

/// Part of a batch that co-teaching learns from in an epoch (from 0): `R = 1 − τ·min(epoch/T_k, 1)` (Han et al., NeurIPS
/// 2018), with τ the `forget_rate` and T_k the `ramp` in epochs; with a ramp of 0 it is `1 − τ` at once.
pub fn remember_rate(forget_rate: f64, ramp: f64, epoch: usize) -> f64 {
    let grown = if ramp > 0.0 { (epoch as f64 / ramp).min(1.0) } else { 1.0 };
    1.0 - forget_rate * grown
}

/// Co-teaching: each of two networks learns, by mean cross entropy, from those samples on which the *other* one has the
/// smallest losses: `rate · k` of them rounded down, at least one.
pub fn co_teaching(logits: [&[f64]; 2], labels: &[i32], rate: f64) -> [LogitLoss; 2] {
    let k = labels.len();
    // A product that is whole but for rounding counts as whole.
    let count = ((rate * k as f64 + 1e-9).floor() as usize).clamp(1, k);
    let [first, second] = logits.map(|logits| smallest(&cross_entropies(logits, labels), count));
    [cross_entropy_on(logits[0], labels, &second), cross_entropy_on(logits[1], labels, &first)]
}

/// Cross entropy of every row, nats.
pub fn cross_entropies(logits: &[f64], labels: &[i32]) -> Vec<f64> {
    let rows = logits.chunks_exact(logits.len() / labels.len());
    rows.zip(labels).map(|(z, label)| cross_entropy(z, *label as usize)).collect()
}

/// Places of the `count` smallest values; of equals the first.
fn smallest(values: &[f64], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    places.truncate(count);
    places
}

/// Mean cross entropy of the `chosen` rows.
fn cross_entropy_on(logits: &[f64], labels: &[i32], chosen: &[usize]) -> LogitLoss {
    let classes = logits.len() / labels.len();
    let weight = 1.0 / chosen.len() as f64;
    let (mut value, mut gradient) = (0.0, vec![0.0; logits.len()]);
    for &i in chosen {
        let (row, label) = (i * classes..(i + 1) * classes, labels[i] as usize);
        value += weight * cross_entropy(&logits[row.clone()], label);
        for (j, (g, p)) in gradient[row.clone()].iter_mut().zip(softmax(&logits[row])).enumerate() {
            *g = weight * (p - f64::from(u8::from(j == label)));
        }
    }
    LogitLoss { value, gradient }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LN_2: f64 = std::f64::consts::LN_2;

    fn near(have: &[f64], want: &[f64]) {
        assert_eq!(have.len(), want.len());
        for (have, want) in have.iter().zip(want) {
            assert!((have - want).abs() < 1e-12, "{have} instead of {want}");
        }
    }

    /// Logits of 3 samples in 4 classes, nothing special about them, and their labels.
    const LOGITS: [f64; 12] = [0.3, -1.2, 2.0, 0.1, 0.0, 0.7, -0.4, 1.1, -2.0, 0.5, 0.6, 0.2];
    const LABELS: [i32; 3] = [2, 0, 1];

    /// Holds a gradient against central differences of the value.
    fn check_gradient(loss: impl Fn(&[f64]) -> LogitLoss) {
        let gradient = loss(&LOGITS).gradient;
        for i in 0..LOGITS.len() {
            let at = |by: f64| {
                let mut moved = LOGITS;
                moved[i] += by;
                loss(&moved).value
            };
            let (h, g) = (1e-5, gradient[i]);
            let difference = (at(h) - at(-h)) / (2.0 * h);
            assert!((difference - g).abs() < 1e-9, "logit {i}: {g}, by differences {difference}");
        }
    }

    #[test]
    fn elr_moves_its_target_and_pulls_towards_it() {
        let weights = Elr { beta: 0.7, lambda: 3.0 };
        let mut targets = [0.0; 2];
        // p = (1/2, 1/2): t = 0.3 p, and the regulariser has no preference.
        let loss = elr(&[0.0, 0.0], &[0], &mut targets, weights);
        near(&targets, &[0.15, 0.15]);
        near(&[loss.value], &[LN_2 + 3.0 * 0.85f64.ln()]);
        near(&loss.gradient, &[-0.5, 0.5]);
        // p = (3/4, 1/4): t = (0.105 + 0.225, 0.105 + 0.075), ⟨t, p⟩ = 0.2925.
        let loss = elr(&[3f64.ln(), 0.0], &[1], &mut targets, weights);
        near(&targets, &[0.33, 0.18]);
        near(&[loss.value], &[4f64.ln() + 3.0 * 0.7075f64.ln()]);
        let pull = 3.0 * 0.75 * 0.25 * 0.15 / 0.7075;
        near(&loss.gradient, &[0.75 - pull, pull - 0.75]);
    }

    /// Differences of the value hold the targets fixed where they have moved to.
    #[test]
    fn elr_has_the_gradient_of_its_value() {
        let mut moved = [0.1, 0.0, 0.6, 0.2, 0.25, 0.25, 0.25, 0.25, 0.0, 0.9, 0.0, 0.0];
        let first = elr(&LOGITS, &LABELS, &mut moved, Elr { beta: 0.7, lambda: 3.0 });
        let fixed = |z: &[f64]| elr(z, &LABELS, &mut moved.clone(), Elr { beta: 1.0, lambda: 3.0 });
        check_gradient(fixed);
        near(&fixed(&LOGITS).gradient, &first.gradient);
    }

    #[test]
    fn elr_cuts_off_probabilities_of_nearly_one() {
        let mut targets = [1.0, 0.0];
        let loss = elr(&[20.0, 0.0], &[0], &mut targets, Elr { beta: 1.0, lambda: 3.0 });
        near(&[loss.value], &[3.0 * 1e-4f64.ln() + (-20.0f64).exp().ln_1p()]);
        assert!(loss.gradient.iter().all(|g| g.abs() < 1e-8), "the regulariser is flat there: {:?}", loss.gradient);
    }

    #[test]
    fn joint_optimisation_adds_up_three_terms() {
        // p = (3/4, 1/4) and (1/2, 1/2), their mean (5/8, 3/8).
        let (z, s) = ([3f64.ln(), 0.0, 0.0, 0.0], [1.0, 0.0, 0.5, 0.5]);
        let of = |alpha, beta| joint_opt(&z, &s, 2, JointOpt { alpha, beta });
        let fit = of(0.0, 0.0);
        near(&[fit.value], &[0.5 * (4.0f64 / 3.0).ln()]);
        near(&fit.gradient, &[-0.125, 0.125, 0.0, 0.0]);
        let with = |alpha: f64, beta: f64| {
            let LogitLoss { value, gradient } = of(alpha, beta);
            let gradient: Vec<f64> = gradient.iter().zip(&fit.gradient).map(|(a, b)| a - b).collect();
            (value - fit.value, gradient)
        };
        let (value, gradient) = with(1.0, 0.0);
        near(&[value], &[0.5 * 0.8f64.ln() + 0.5 * (4.0f64 / 3.0).ln()]);
        near(&gradient, &[0.05, -0.05, 1.0 / 15.0, -1.0 / 15.0]);
        let (value, gradient) = with(0.0, 1.0);
        let entropy = -(0.75 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
        near(&[value], &[0.5 * (entropy + LN_2)]);
        let slope = 0.5 * 0.75 * 0.25 * 3f64.ln();
        near(&gradient, &[-slope, slope, 0.0, 0.0]);
    }

    #[test]
    fn joint_optimisation_has_the_gradient_of_its_value() {
        let soft = [0.1, 0.2, 0.7, 0.0, 0.25, 0.25, 0.25, 0.25, 0.0, 1.0, 0.0, 0.0];
        check_gradient(|z| joint_opt(z, &soft, 4, JointOpt { alpha: 1.2, beta: 0.8 }));
    }

    #[test]
    fn a_class_that_nobody_predicts_gives_numbers() {
        let z = [0.0, -2000.0, 1.0, -2000.0];
        let loss = joint_opt(&z, &[1.0, 0.0, 1.0, 0.0], 2, JointOpt { alpha: 1.2, beta: 0.8 });
        assert!(loss.gradient.iter().all(|g| g.is_finite()), "{loss:?}");
    }

    #[test]
    fn each_network_learns_from_the_small_losses_of_the_other() {
        // Cross entropy of label 0 falls with the first logit; of equals the first sample counts.
        let first = [0.0, 0.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0];
        let second = [5.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0, 0.0];
        let labels = [0; 4];
        let [a, b] = co_teaching([&first, &second], &labels, 0.5);
        let p = |z: f64| 1.0 / (1.0 + (-z).exp());
        // The second network knows samples 0 and 3 best, the first one 1 and 2.
        let g = |z: f64| 0.5 * (p(z) - 1.0);
        near(&a.gradient, &[g(0.0), -g(0.0), 0.0, 0.0, 0.0, 0.0, g(1.0), -g(1.0)]);
        near(&b.gradient, &[0.0, 0.0, g(0.0), -g(0.0), g(1.0), -g(1.0), 0.0, 0.0]);
        near(&[a.value], &[-0.5 * (p(0.0).ln() + p(1.0).ln())]);
        near(&[b.value], &[-0.5 * (p(0.0).ln() + p(1.0).ln())]);
        // All samples at a rate of one, one at a rate of nothing.
        let [all, _] = co_teaching([&first, &second], &labels, 1.0);
        assert!(all.gradient.iter().all(|g| *g != 0.0));
        let [_, one] = co_teaching([&first, &second], &labels, 0.0);
        assert_eq!(one.gradient.iter().filter(|g| **g != 0.0).count(), 2);
        check_gradient(|z| cross_entropy_on(z, &LABELS, &[2, 0]));
    }

    #[test]
    fn co_teaching_forgets_more_from_epoch_to_epoch() {
        let rates = [0, 1, 5, 10, 11, 199].map(|epoch| remember_rate(0.5, 10.0, epoch));
        near(&rates, &[1.0, 0.95, 0.75, 0.5, 0.5, 0.5]);
        assert_eq!(remember_rate(0.25, 0.0, 0), 0.75);
        // 0.58 · 50 is less than 29 in binary.
        let labels = [0; 50];
        let logits: Vec<f64> = (0..100).map(|i| f64::from(i % 7)).collect();
        let [loss, _] = co_teaching([&logits, &logits], &labels, remember_rate(0.42, 0.0, 0));
        assert_eq!(loss.gradient.iter().filter(|g| **g != 0.0).count(), 2 * 29);
    }
}
