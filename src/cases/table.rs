//! The table: every operation of the set, with shared and per-branch operands, sums, odd sizes and strides.

use super::{Bad, Case, Data, Operand};
use crate::ops::{
    AllFinite, AvgPool, AvgPoolBackward, BnBackward, BnDoubleBackward, BnEval, BnForward, CeGrad, CeLoss,
    ChannelBroadcast, ChannelSum, Conv, ConvGeom, ConvKind, Fill, KlGrad, KlLoss, LinComb, Mask, MaxPoolIndex,
    NearestNeighbours, Op, PoolGather, PoolScatter, Relu, Softmax, SoftmaxJvp, TransferLabels, Window,
};
use crate::tape::{Coef, DType, Meta};

/// M of the cases with several branches.
const M: usize = 3;

/// Every case. Names are unique.
pub fn all() -> Vec<Case> {
    let mut table = Table::default();
    table.convolutions();
    table.batch_norms();
    table.pointwise();
    table.pools();
    table.heads();
    table.neighbours();
    table.guards();
    table.cases
}

fn operand(name: &'static str, meta: Meta, data: Data) -> Operand {
    Operand { name, meta, data, differentiable: true }
}

/// An operand without derivative.
pub(super) fn fixed(name: &'static str, meta: Meta, data: Data) -> Operand {
    Operand { differentiable: false, ..operand(name, meta, data) }
}

/// Every mixture of shared and per-branch among `n` operands: bit i for operand i.
fn mixtures(n: usize) -> std::ops::Range<u32> {
    0..1 << n
}

#[derive(Default)]
struct Table {
    cases: Vec<Case>,
}

/// Operands of a case to be: names, shapes, numbers, all shared.
#[derive(Clone)]
struct Template {
    op: Op,
    sizes: String,
    operands: Vec<Operand>,
    tolerance: f64,
    fused: bool,
}

impl Template {
    fn new(op: impl Into<Op>, sizes: impl Into<String>, operands: Vec<Operand>) -> Self {
        Template { op: op.into(), sizes: sizes.into(), operands, tolerance: 1e-5, fused: false }
    }

    fn tolerance(self, tolerance: f64) -> Self {
        Template { tolerance, ..self }
    }

    fn fused(self) -> Self {
        Template { fused: true, ..self }
    }
}

impl Table {
    /// Adds a case: operand i is per-branch where bit i of `mixture` is set, statistics where their source is.
    fn add(&mut self, template: &Template, branches: usize, mixture: u32, sum: &[bool]) {
        let mut operands = template.operands.clone();
        for (i, operand) in operands.iter_mut().enumerate() {
            let bit = operand.data.derived_from().unwrap_or(i);
            operand.meta = operand.meta.with_branching(mixture >> bit & 1 == 1);
        }
        let case = Case::new(template.op.clone(), &template.sizes, branches, operands, sum);
        self.cases.push(Case { tolerance: template.tolerance, fused: template.fused, ..case });
    }

    /// Adds the mixtures with M branches, each as it is and, where anything is per-branch, with each of `sums`.
    fn mix(&mut self, template: &Template, mixtures: impl IntoIterator<Item = u32>, sums: &[&[bool]]) {
        for mixture in mixtures {
            self.add(template, M, mixture, &[]);
            if mixture != 0 {
                sums.iter().for_each(|sum| self.add(template, M, mixture, sum));
            }
        }
    }

    fn convolutions(&mut self) {
        // (n, c, h, w, k, r, stride, pad)
        let sizes = [
            (2, 3, 15, 11, 5, 3, 1, 1),
            (2, 3, 15, 11, 5, 3, 2, 1),
            (9, 5, 28, 28, 6, 3, 1, 1),
            (1, 5, 7, 7, 13, 3, 2, 1),
            (3, 5, 15, 11, 3, 1, 1, 0),
            (3, 5, 15, 11, 13, 1, 2, 0),
            (2, 3, 15, 11, 5, 7, 2, 3),
            (5, 13, 1, 1, 3, 1, 1, 0),
            (2, 3, 1, 1, 5, 3, 1, 1),
            (2, 3, 1, 1, 5, 3, 2, 1),
            (2, 3, 5, 2, 4, 5, 3, 2),
            (9, 6, 28, 28, 5, 3, 2, 1),
            // Channels in eights, for kernels that load patches.
            (3, 8, 7, 7, 16, 3, 2, 1),
            (2, 40, 9, 7, 48, 3, 1, 1),
            (2, 3, 15, 11, 32, 3, 1, 1),
            (2, 4, 15, 11, 64, 7, 2, 3),
            (3, 1, 9, 7, 8, 5, 1, 2),
            (2, 2, 8, 9, 40, 3, 2, 1),
        ];
        for (i, (n, c, h, w, k, r, stride, pad)) in sizes.into_iter().enumerate() {
            let (p, q) = ((h + 2 * pad - r) / stride + 1, (w + 2 * pad - r) / stride + 1);
            let geom = ConvGeom { n, c, h, w, k, r, s: r, p, q, stride, pad };
            let text = format!("n{n} c{c} {h}x{w} k{k} {r}x{r} stride {stride}");
            for kind in [ConvKind::Fprop, ConvKind::Dgrad, ConvKind::Wgrad] {
                let (x, weight, y) = (("x", geom.x()), ("w", geom.weight()), ("dy", geom.y()));
                let (ins, out) = match kind {
                    ConvKind::Fprop => ([x, weight], y),
                    ConvKind::Dgrad => ([y, weight], x),
                    ConvKind::Wgrad => ([x, y], weight),
                };
                let mut operands: Vec<Operand> = ins.map(|(name, meta)| operand(name, meta, Data::Normal)).into();
                let plain = Template::new(Conv { kind, geom }, &text, operands.clone());
                // The first three sizes see every mixture, the rest the two extremes.
                let some = if i < 3 { mixtures(2) } else { 2..4 };
                self.mix(&plain, some, &[&[true]]);
                if i >= 3 {
                    self.add(&plain, M, 0, &[]);
                }
                self.add(&plain, 1, 3, &[true]);
                operands.push(operand("start", out.1, Data::Normal));
                let added = Template::new(Conv { kind, geom }, format!("{text} added"), operands).fused();
                if i < 3 {
                    [0, 4, 5, 6, 7].into_iter().for_each(|mixture| self.add(&added, M, mixture, &[]));
                    [1, 2, 3].into_iter().for_each(|mixture| self.add(&added, M, mixture, &[true]));
                } else {
                    self.add(&added, M, 7, &[]);
                    self.add(&added, M, 3, &[true]);
                }
            }
        }
    }

    fn batch_norms(&mut self) {
        for (n, c, h, w) in [(3, 5, 15, 11), (2, 3, 7, 7), (9, 3, 28, 28), (5, 13, 1, 1)] {
            let text = format!("n{n} c{c} {h}x{w}");
            let (x, v) = (Meta::activation(n, c, h, w), Meta::vector(c));
            let full = (n, c) == (2, 3);
            let normal = |name, meta| operand(name, meta, Data::Normal);

            for relu in [false, true] {
                let operands = vec![normal("x", x), normal("g", v), normal("b", v)];
                let mut forward = Template::new(BnForward { relu }, &text, operands);
                forward.fused = relu;
                let some = if full { mixtures(3).collect() } else { vec![0, 6, 7] };
                self.mix(&forward, some, &[]);
                self.add(&forward, 1, 7, &[]);

                let statistics = [fixed("mean", v, Data::Normal), fixed("var", v, Data::Positive)];
                let mut operands = vec![fixed("x", x, Data::Normal), fixed("g", v, Data::Normal)];
                operands.push(fixed("b", v, Data::Normal));
                operands.extend(statistics);
                let eval = Template::new(BnEval { relu }, &text, operands);
                [0, 1, 6, 31].into_iter().for_each(|mixture| self.add(&eval, M, mixture, &[]));

                let mut operands = vec![normal("dy", x), normal("x", x), normal("g", v)];
                operands.push(fixed("mean", v, Data::MeanOf(1)));
                operands.push(fixed("var", v, Data::VarianceOf(1)));
                operands.extend(relu.then(|| fixed("y", x, Data::Clear)));
                let mut backward = Template::new(BnBackward { relu }, &text, operands);
                backward.fused = relu;
                let y = u32::from(relu) << 5;
                let sums: [&[bool]; 3] = [&[true; 3], &[false, true, true], &[true, false, false]];
                match full {
                    true => {
                        self.mix(&backward, mixtures(3), &sums);
                        self.mix(&backward, mixtures(3).map(|m| m | y).filter(|_| relu), &sums);
                    }
                    false => self.mix(&backward, [1, 7 | y], &sums[..2]),
                }
                self.add(&backward, 1, 7 | y, &[true; 3]);

                let fixed = |name, meta| fixed(name, meta, Data::Normal);
                let mut operands = vec![fixed("x_dot", x), fixed("g_dot", v), fixed("b_dot", v)];
                operands.extend([fixed("dy", x), fixed("x", x), fixed("g", v)]);
                operands.push(Operand { data: Data::MeanOf(4), ..fixed("mean", v) });
                operands.push(Operand { data: Data::VarianceOf(4), ..fixed("var", v) });
                operands.extend(relu.then(|| Operand { data: Data::Clear, ..fixed("y", x) }));
                let double = Template::new(BnDoubleBackward { relu }, &text, operands).tolerance(2e-5);
                let double = if relu { double.fused() } else { double };
                let y = u32::from(relu) << 8;
                // Per-branch tangents and cotangents at a shared network: MLNT's second order.
                let sums: [&[bool]; 3] = [&[false, true, true], &[true; 3], &[true, false, false]];
                match full {
                    true => {
                        self.mix(&double, [0, 7, 8, 15, 16 | y, 32, 63 | y], &sums);
                        self.mix(&double, Some(y).filter(|_| relu), &sums);
                    }
                    false => self.mix(&double, [15], &sums[..1]),
                }
                self.add(&double, 1, 63 | y, &[true; 3]);
            }
        }
    }

    fn pointwise(&mut self) {
        let (small, large) = (Meta::activation(2, 3, 15, 11), Meta::activation(9, 5, 28, 28));
        for meta in [small, large] {
            let [n, c, h, w] = meta.dims;
            let text = format!("n{n} c{c} {h}x{w}");
            let relu = Template::new(Relu, &text, vec![operand("x", meta, Data::Clear)]).tolerance(0.0);
            self.mix(&relu, mixtures(1), &[]);
            let operands = vec![operand("x", meta, Data::Normal), fixed("reference", meta, Data::Clear)];
            let mask = Template::new(Mask, &text, operands).tolerance(1e-6);
            self.mix(&mask, mixtures(2), &[&[true]]);
            self.add(&mask, 1, 3, &[true]);

            let sum = Template::new(ChannelSum { of: meta }, &text, vec![operand("x", meta, Data::Normal)]);
            self.mix(&sum, mixtures(1), &[&[true]]);
            let operands = vec![operand("x", Meta::vector(c), Data::Normal)];
            let broadcast = Template::new(ChannelBroadcast { to: meta }, &text, operands).tolerance(1e-6);
            self.mix(&broadcast, mixtures(1), &[&[true]]);

            let average = Template::new(AvgPool { of: meta }, &text, vec![operand("x", meta, Data::Normal)]);
            self.mix(&average, mixtures(1), &[&[true]]);
            let operands = vec![operand("x", Meta::activation(n, c, 1, 1), Data::Normal)];
            let spread = Template::new(AvgPoolBackward { to: meta }, &text, operands).tolerance(1e-6);
            self.mix(&spread, mixtures(1), &[&[true]]);
        }
        let one = Meta::activation(5, 13, 1, 1);
        let average = Template::new(AvgPool { of: one }, "n5 c13 1x1", vec![operand("x", one, Data::Normal)]);
        self.add(&average, 1, 1, &[true]);

        let names = ["x0", "x1", "x2"];
        for (text, meta) in [("n2 c3 15x11", small), ("n9 c5 28x28", large), ("k5 c3 3x3", Meta::weight(5, 3, 3, 3))] {
            let coefs = [1.0, -0.5, 1.0].map(Coef::constant);
            let operands: Vec<Operand> = names.map(|name| operand(name, meta, Data::Normal)).into();
            for terms in 1..=3 {
                let op = LinComb::new(coefs[..terms].to_vec());
                let text = format!("{terms} terms {text}");
                let sum = Template::new(op, text, operands[..terms].to_vec()).tolerance(1e-6);
                self.mix(&sum, mixtures(terms), &[&[true]]);
            }
        }
        for meta in [Meta::vector(13), small.branched()] {
            let op = Fill { meta, value: Coef::constant(0.375) };
            self.add(&Template::new(op, meta.to_string(), Vec::new()).tolerance(0.0), M, 0, &[]);
        }
    }

    fn pools(&mut self) {
        // (n, c, h, w, size, stride, pad)
        for (n, c, h, w, size, stride, pad) in [(2, 3, 15, 11, 3, 2, 1), (3, 5, 7, 7, 2, 2, 0), (1, 13, 1, 1, 3, 2, 1)]
        {
            let image = Meta::activation(n, c, h, w);
            let side = |size_in: usize| (size_in + 2 * pad - size) / stride + 1;
            let pooled = Meta::activation(n, c, side(h), side(w));
            let window = Window { size, stride, pad, image, pooled };
            let text = format!("n{n} c{c} {h}x{w} {size}x{size} stride {stride}");
            let operands = vec![fixed("x", image, Data::Spaced)];
            self.mix(&Template::new(MaxPoolIndex(window), &text, operands).tolerance(0.0), mixtures(1), &[]);

            let index = Meta { dtype: DType::Index, ..pooled };
            let index = fixed("index", index, Data::Position(window));
            let operands = vec![operand("x", image, Data::Normal), index.clone()];
            let gather = Template::new(PoolGather(window), &text, operands).tolerance(1e-6);
            self.mix(&gather, mixtures(2), &[&[true]]);
            self.add(&gather, 1, 3, &[true]);
            let operands = vec![operand("dy", pooled, Data::Normal), index];
            let scatter = Template::new(PoolScatter(window), &text, operands).tolerance(1e-6);
            self.mix(&scatter, mixtures(2), &[&[true]]);
            self.add(&scatter, 1, 3, &[true]);
        }
    }

    fn heads(&mut self) {
        for (n, classes) in [(7, 5), (1, 3), (33, 13)] {
            let text = format!("n{n} {classes} classes");
            let (logits, each) = (Meta::activation(n, classes, 1, 1), Meta::vector(n));
            let z = operand("z", logits, Data::Normal);
            let weights = fixed("weights", each, Data::Positive);
            let scale = fixed("s", Meta::vector(1), Data::Normal);
            let cot = operand("e", logits, Data::Normal);
            let labels = fixed("labels", Meta::labels(n), Data::Labels(classes));
            let target = fixed("target", logits, Data::Distribution);
            let still = Operand { differentiable: false, ..z.clone() };

            self.mix(&Template::new(Softmax { logits }, &text, vec![z.clone()]), mixtures(1), &[]);
            let operands = vec![cot, still, weights.clone(), scale.clone()];
            let jvp = Template::new(SoftmaxJvp { logits }, &text, operands);
            self.mix(&jvp, [0, 1, 2, 3, 4, 8, 15], &[&[true]]);
            self.add(&jvp, 1, 15, &[true]);

            let cases: [(Op, Op, Operand); 2] = [
                (CeLoss { logits }.into(), CeGrad { logits }.into(), labels),
                (KlLoss { logits }.into(), KlGrad { logits }.into(), target),
            ];
            for (loss, grad, target) in cases {
                let mut operands = vec![z.clone(), target, weights.clone()];
                self.mix(&Template::new(loss.clone(), &text, operands.clone()), mixtures(3), &[&[true]]);
                self.add(&Template::new(loss, &text, operands.clone()), 1, 7, &[true]);
                operands.push(scale.clone());
                let grad = Template::new(grad, &text, operands);
                self.mix(&grad, [0, 1, 2, 3, 4, 8, 15], &[&[true]]);
                self.add(&grad, 1, 15, &[true]);
            }
        }
    }

    fn neighbours(&mut self) {
        for (k, dim, count) in [(7, 5, 3), (2, 1, 1), (33, 13, 10), (130, 64, 10)] {
            let text = format!("k{k} {dim} features {count} neighbours");
            let features = fixed("features", Meta::activation(k, dim, 1, 1), Data::Normal);
            let nearest = Template::new(NearestNeighbours { count }, &text, vec![features]).tolerance(0.0);
            self.mix(&nearest, mixtures(1), &[]);

            let lists = Meta { dtype: DType::Index, ..Meta::activation(k, count, 1, 1) };
            let operands = vec![
                fixed("labels", Meta::labels(k), Data::Labels(10)),
                fixed("neighbours", lists, Data::Labels(k)),
                fixed("ranks", Meta::labels(k), Data::Ranks(count)),
            ];
            let transfer = Template::new(TransferLabels, &text, operands).tolerance(0.0);
            self.mix(&transfer, mixtures(3), &[]);
        }
    }

    /// What decides whether a step is taken, and what is taken then.
    fn guards(&mut self) {
        let (one, vector) = (Meta::vector(1), Meta::vector(13));
        // Several pieces of the kernel, and an end that fills none.
        let large = Meta::weight(65, 32, 3, 3);
        let plants = [
            ("finite", Data::Normal),
            ("infinite at the start", Data::Planted(Bad::Infinite, 0)),
            ("none at the end", Data::Planted(Bad::None, -1)),
            ("infinite within", Data::Planted(Bad::NegativeInfinite, -7)),
        ];
        for (what, data) in plants {
            let alone = Template::new(AllFinite, format!("13 {what}"), vec![fixed("x0", vector, data)]).tolerance(0.0);
            self.add(&alone, M, 0, &[true]);
            self.add(&alone, M, 1, &[true]);
            for (list, planted) in [("first", 0), ("last", 2)] {
                let names = [("x0", large), ("x1", one), ("x2", large)];
                let mut operands: Vec<Operand> = names.map(|(name, meta)| fixed(name, meta, Data::Normal)).into();
                operands[planted].data = data;
                let several = Template::new(AllFinite, format!("k65 c32 3x3 {list} {what}"), operands).tolerance(0.0);
                [0, 4, 7].into_iter().for_each(|mixture| self.add(&several, M, mixture, &[true]));
            }
        }
        for meta in [Meta::vector(13), Meta::weight(5, 3, 3, 3), Meta::activation(2, 3, 15, 11)] {
            for (what, guard, data) in [
                ("taken", 1.0, Data::Normal),
                ("taken as well", -0.5, Data::Normal),
                ("not taken", 0.0, Data::Normal),
                ("not taken, infinite", 0.0, Data::Planted(Bad::Infinite, 3)),
                ("not taken, none", 0.0, Data::Planted(Bad::None, -1)),
            ] {
                let operands = vec![
                    fixed("x0", meta, Data::Normal),
                    fixed("x1", meta, data),
                    fixed("guard", one, Data::Constant(guard)),
                ];
                // As states are kept, and as velocities are updated.
                for coefs in [[0.0, 1.0], [0.9, 1.0]] {
                    let op = LinComb { coefs: coefs.map(Coef::constant).into(), guarded: true };
                    let text = format!("{meta} {} {what}", coefs[0]);
                    let sum = Template::new(op, text, operands.clone());
                    let sum = sum.tolerance(if guard == 0.0 { 0.0 } else { 1e-6 });
                    self.add(&sum, M, 0, &[]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_every_case_is_recorded() {
        let cases = all();
        let names: HashSet<&str> = cases.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names.len(), cases.len());
        for case in &cases {
            case.record().unwrap_or_else(|e| panic!("{}: {e}", case.name));
            for (operand, values) in case.operands.iter().zip(case.values(1)) {
                assert_eq!(values.to_f64().len(), operand.meta.total(case.branches), "{} {}", case.name, operand.name);
            }
        }
        println!("{} cases", cases.len());
    }

    #[test]
    fn every_operation_of_the_set_has_cases() {
        let ops: HashSet<std::mem::Discriminant<Op>> = all().iter().map(|c| std::mem::discriminant(&c.op)).collect();
        assert_eq!(ops.len(), 25);
    }
}
