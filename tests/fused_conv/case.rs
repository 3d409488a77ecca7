//! A fused convolution, its operands, and the plain operations that it stands for.

use half::{bf16, f16};
use mlnt::device::cuda::Operands;
use mlnt::ops::{
    BN_EPS, BnBackward, BnDoubleBackward, BnEval, Conv, ConvForm, ConvGeom, ConvKind, Epilogue, FusedConv,
};
use mlnt::rng::{Purpose, normal, stream, uniform};
use mlnt::tape::{Kind, Meta, Tape, Tensor};

/// Bits of [`Case::others`].
pub const X: u32 = 1;
pub const NORM: u32 = 2;
pub const Y: u32 = 4;
pub const NEXT: u32 = 8;
pub const DY: u32 = 16;

/// One fused convolution and what its tensors are like.
#[derive(Clone, Debug)]
pub struct Case {
    pub op: FusedConv,
    pub branches: usize,
    /// Bit i: operand i of the form is per-branch.
    pub branched: u32,
    /// Which of the other operands are per-branch: [`X`], the four of `norm`, `y` and its four, `next` and its four, its `dy`. Sums
    /// are per-branch where anything is that they are of.
    pub others: u32,
    /// Whether result 0 and 1 of the form are summed over the branches.
    pub summed: [bool; 2],
    /// Activations among the operands (bit i: operand i of the form; 4: the start; 6 to 9: x, y, next and its dy) and the first result
    /// (bit 5) have 16 bits.
    pub half: u32,
}

/// An operand of a case.
#[derive(Clone, Debug)]
pub struct Operand {
    pub name: String,
    pub meta: Meta,
    pub half: bool,
    pub values: Vec<f64>,
}

impl Operand {
    /// Its values in a branch.
    pub fn of(&self, branch: usize) -> &[f64] {
        let from = if self.meta.per_branch { branch * self.meta.len() } else { 0 };
        &self.values[from..from + self.meta.len()]
    }
}

/// The operand of that name.
pub fn find<'a>(operands: &'a [Operand], name: &str) -> &'a Operand {
    operands.iter().find(|o| o.name == name).unwrap_or_else(|| panic!("no operand {name}"))
}

pub fn geom([n, c, h, w, k, r, s, stride, pad]: [usize; 9]) -> ConvGeom {
    ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, r, s), stride, pad).unwrap()
}

fn rounded(operands: Operands, v: f64) -> f64 {
    match operands {
        Operands::F16 => f16::from_f64(v).to_f64(),
        Operands::Bf16 => bf16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    }
}

/// `(x̂, whether the ReLU lets it through)` of a batch norm's operand and its `g, b, mean, var` in one channel.
pub fn normalised(x: f64, [g, b, mean, var]: [f64; 4]) -> (f64, bool) {
    let hat = (x - mean) / (var + BN_EPS).sqrt();
    (hat, g * hat + b > 0.0)
}

/// For every channel `Σ f(i)` over the elements i of the channel in activations `[N, C, H, W]`.
pub fn per_channel(meta: &Meta, f: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let [n, c, h, w] = meta.dims;
    let sum = |channel: usize| {
        let pixels = (0..n).flat_map(|i| (i * c + channel) * h * w..(i * c + channel + 1) * h * w);
        pixels.map(|at| f(channel, at)).sum()
    };
    (0..c).map(sum).collect()
}

/// The four values of a batch norm in a channel of a branch; `prefix` is that of their names.
pub fn norm_at(operands: &[Operand], prefix: &str, branch: usize, channel: usize) -> [f64; 4] {
    ["g", "b", "mean", "var"].map(|name| find(operands, &format!("{prefix}{name}")).of(branch)[channel])
}

impl Case {
    fn on(&self, bits: u32) -> bool {
        self.branched & bits != 0
    }

    fn other(&self, bits: u32) -> bool {
        self.others & bits != 0
    }

    /// The name of the batch norm's operand.
    pub fn x_name(&self) -> &'static str {
        match self.op.x_operand() {
            0 => "in0",
            2 if self.op.form == ConvForm::Tangent => "in2",
            _ => "x",
        }
    }

    /// Whether x of the batch norm, and what is made of it, are per-branch.
    fn norm_branched(&self) -> bool {
        let x = match self.x_name() {
            "in0" => self.on(1),
            "in2" => self.on(4),
            _ => self.other(X),
        };
        x || (self.op.norm && self.other(NORM))
    }

    /// Whether ẋ, after its prologue, is per-branch.
    fn tangent_branched(&self) -> bool {
        self.on(1) || (self.op.tangent && self.norm_branched())
    }

    /// Whether dy, after its prologue, is per-branch.
    fn delta_branched(&self) -> bool {
        let dy = self.op.dy_operand().is_some_and(|i| self.on(1 << i));
        dy || (self.op.delta && self.other(Y))
    }

    /// Metas of the results.
    pub fn results(&self) -> Vec<Meta> {
        let (x, w, y) = (self.op.geom.x(), self.op.geom.weight(), self.op.geom.y());
        let image = if self.op.tangent { self.tangent_branched() } else { self.norm_branched() };
        let result = |meta: Meta, branched: bool, i: usize| meta.with_branching(branched && !self.summed[i]);
        let delta = self.delta_branched();
        let mut metas = match self.op.form {
            ConvForm::Fprop => vec![result(y, image || self.on(2), 0)],
            ConvForm::Wgrad => vec![result(w, image || delta, 0)],
            ConvForm::Backward => vec![result(x, delta || self.on(2), 0), result(w, image || delta, 1)],
            ConvForm::Tangent => {
                vec![result(y, self.tangent_branched() || self.norm_branched() || self.on(10), 0)]
            }
        };
        let first = metas[0];
        let vector = Meta::vector(first.dims[1]).with_branching(first.per_branch);
        metas.extend(match self.op.epilogue {
            Epilogue::None => vec![],
            Epilogue::Stats | Epilogue::BackwardSums => vec![vector; 2],
            Epilogue::TangentSums => vec![vector; 3],
        });
        metas
    }

    /// Names, metas and widths of the operands.
    fn signature(&self) -> Vec<(String, Meta, bool)> {
        let (x, w, y) = (self.op.geom.x(), self.op.geom.weight(), self.op.geom.y());
        let (of_x, of_y) = (Meta::vector(x.dims[1]), Meta::vector(y.dims[1]));
        let form = match self.op.form {
            ConvForm::Fprop => vec![x, w],
            ConvForm::Wgrad => vec![x, y],
            ConvForm::Backward => vec![x, w, y],
            ConvForm::Tangent => vec![x, w, x, w],
        };
        let mut list: Vec<(String, Meta, Option<u32>)> = Vec::new();
        for (i, meta) in form.into_iter().enumerate() {
            let bit = (meta.kind == Kind::Activation).then_some(i as u32);
            list.push((format!("in{i}"), meta.with_branching(self.on(1 << i)), bit));
        }
        let vectors = |list: &mut Vec<_>, names: &[&str], meta: Meta, branched: bool| {
            list.extend(names.iter().map(|name| (String::from(*name), meta.with_branching(branched), None)));
        };
        if self.x_name() == "x" {
            list.push(("x".into(), x.with_branching(self.other(X)), Some(6)));
        }
        if self.op.norm {
            vectors(&mut list, &["g", "b", "mean", "var"], of_x, self.other(NORM));
        }
        if self.op.tangent {
            vectors(&mut list, &["g_dot", "b_dot", "x_dot_mean", "rho"], of_x, self.tangent_branched());
        }
        if self.op.delta {
            list.push(("y".into(), y.with_branching(self.other(Y)), Some(7)));
            vectors(&mut list, &["y_g", "y_b", "y_mean", "y_var"], of_y, self.other(Y));
            vectors(&mut list, &["dg", "db"], of_y, self.delta_branched());
        }
        if self.op.epilogue == Epilogue::TangentSums {
            list.push(("next".into(), y.with_branching(self.other(NEXT)), Some(8)));
            vectors(&mut list, &["next_g", "next_b", "next_mean", "next_var"], of_y, self.other(NEXT));
            list.push(("next_dy".into(), y.with_branching(self.other(DY)), Some(9)));
            vectors(&mut list, &["next_db"], of_y, self.other(DY | NEXT));
        }
        if self.op.start {
            let meta = self.results()[0];
            list.push(("start".into(), meta, (meta.kind == Kind::Activation).then_some(4)));
        }
        let half = |bit: Option<u32>| bit.is_some_and(|bit| self.half >> bit & 1 == 1);
        list.into_iter().map(|(name, meta, bit)| (name, meta, half(bit))).collect()
    }

    /// Operands with random values. What is a sum of others is that sum, in double precision, rounded to single.
    pub fn operands(&self, operands: Operands) -> Vec<Operand> {
        let make = |(key, (name, meta, half)): (usize, (String, Meta, bool))| {
            let rng = &mut stream(11, Purpose::Test, key as u64, meta.total(self.branches) as u64);
            let kind = name.rsplit('_').next().unwrap_or(&name).to_string();
            let mut draw = || match kind.as_str() {
                "g" | "var" => 0.5 + uniform(rng),
                "b" | "mean" => 0.3 * normal(rng),
                _ => normal(rng),
            };
            let round = |v: f64| if half { rounded(operands, v) } else { f64::from(v as f32) };
            let values = (0..meta.total(self.branches)).map(|_| round(draw())).collect();
            Operand { name, meta, half, values }
        };
        let mut all: Vec<Operand> = self.signature().into_iter().enumerate().map(make).collect();
        for at in 0..all.len() {
            let branches = if all[at].meta.per_branch { self.branches } else { 1 };
            let sums: Vec<Vec<f64>> = (0..branches).map_while(|branch| self.sum(&all, &all[at].name, branch)).collect();
            if !sums.is_empty() {
                all[at].values = sums.concat().into_iter().map(|v| f64::from(v as f32)).collect();
            }
        }
        all
    }

    /// The values of an operand that is a sum, in one branch.
    fn sum(&self, all: &[Operand], name: &str, branch: usize) -> Option<Vec<f64>> {
        let of = |name: &str| find(all, name).of(branch);
        let behind = |prefix: &str, x: &str, channel: usize, at: usize| {
            normalised(of(x)[at], norm_at(all, prefix, branch, channel))
        };
        let masked = |v: f64, passes: bool| if passes { v } else { 0.0 };
        let (x, y) = (self.op.geom.x(), self.op.geom.y());
        let mean = |sums: Vec<f64>| sums.into_iter().map(|v| v * x.dims[1] as f64 / x.len() as f64).collect();
        Some(match name {
            "x_dot_mean" => mean(per_channel(&x, |_, at| of("in0")[at])),
            "rho" => mean(per_channel(&x, |c, at| behind("", self.x_name(), c, at).0 * of("in0")[at])),
            "dg" | "db" => {
                let dy = of(if self.op.dy_operand() == Some(1) { "in1" } else { "in2" });
                per_channel(&y, |c, at| {
                    let (hat, passes) = behind("y_", "y", c, at);
                    masked(dy[at] * if name == "dg" { hat } else { 1.0 }, passes)
                })
            }
            "next_db" => per_channel(&y, |c, at| masked(of("next_dy")[at], behind("next_", "next", c, at).1)),
            _ => return None,
        })
    }

    /// The composition of plain operations.
    pub fn composed(&self) -> Tape {
        let mut tape = Tape::new(self.branches);
        tape.set_phase("case");
        let inputs: Vec<Tensor> =
            self.signature().iter().map(|(name, meta, _)| tape.input(name, *meta).unwrap()).collect();
        let geom = self.op.geom;
        let mut form = inputs[..self.op.operands()].to_vec();
        if let Some(norm) = self.op.norm_operands() {
            let (x, [g, b, mean, var]) = (inputs[self.op.x_operand()], norm.map(|i| inputs[i]));
            let h = tape.record1(BnEval { relu: true }, &[x, g, b, mean, var], false).unwrap();
            if let Some(tangent) = self.op.tangent_operands() {
                let [g_dot, b_dot, ..] = tangent.map(|i| inputs[i]);
                // ẏ, the first result, does not depend on dy: ẋ stands in for it.
                let operands = [form[0], g_dot, b_dot, form[0], x, g, mean, var, h];
                form[0] = tape.record(BnDoubleBackward { relu: true }, &operands, &[false; 3]).unwrap()[0];
            }
            if self.op.x_operand() < form.len() {
                form[self.op.x_operand()] = h;
            }
        }
        if let (Some(delta), Some(dy)) = (self.op.delta_operands(), self.op.dy_operand()) {
            let [y, g, b, mean, var, ..] = delta.map(|i| inputs[i]);
            let h = tape.record1(BnEval { relu: true }, &[y, g, b, mean, var], false).unwrap();
            let operands = [form[dy], y, g, mean, var, h];
            form[dy] = tape.record(BnBackward { relu: true }, &operands, &[false; 3]).unwrap()[0];
        }
        let conv = |tape: &mut Tape, kind, a: usize, b: usize, sum: bool| {
            let branched = tape.meta(form[a]).per_branch || tape.meta(form[b]).per_branch;
            tape.record1(Conv { kind, geom }, &[form[a], form[b]], sum && branched).unwrap()
        };
        let mut results = match self.op.form {
            ConvForm::Fprop => vec![conv(&mut tape, ConvKind::Fprop, 0, 1, self.summed[0])],
            ConvForm::Wgrad => vec![conv(&mut tape, ConvKind::Wgrad, 0, 1, self.summed[0])],
            ConvForm::Backward => vec![
                conv(&mut tape, ConvKind::Dgrad, 2, 1, self.summed[0]),
                conv(&mut tape, ConvKind::Wgrad, 0, 2, self.summed[1]),
            ],
            ConvForm::Tangent => {
                let a = conv(&mut tape, ConvKind::Fprop, 0, 3, self.summed[0]);
                let b = conv(&mut tape, ConvKind::Fprop, 2, 1, self.summed[0]);
                vec![tape.add(a, b).unwrap()]
            }
        };
        if let Some(start) = self.op.start_operand() {
            results[0] = tape.add(results[0], inputs[start]).unwrap();
        }
        for (i, t) in results.into_iter().enumerate() {
            tape.output(format!("out{i}"), t);
        }
        tape
    }

    /// What the epilogue finds of a first result, by its name.
    pub fn found(&self, operands: &[Operand], result: &[f64]) -> Vec<(&'static str, Vec<f64>)> {
        let meta = self.results()[0];
        let count = (meta.len() / meta.dims[1].max(1)) as f64;
        let branches = if meta.per_branch { self.branches } else { 1 };
        let each = |f: &dyn Fn(usize, &[f64]) -> Vec<f64>| -> Vec<f64> {
            (0..branches).flat_map(|m| f(m, &result[m * meta.len()..][..meta.len()])).collect()
        };
        let mean = |v: &[f64]| -> Vec<f64> { per_channel(&meta, |_, at| v[at] / count) };
        // A sum of what x̂ and the mask of the batch norm make of an element.
        let sum = |prefix: &str, x: &str, m: usize, f: &dyn Fn(usize, usize, f64, bool) -> f64| {
            per_channel(&meta, |c, at| {
                let (hat, passes) = normalised(find(operands, x).of(m)[at], norm_at(operands, prefix, m, c));
                f(c, at, hat, passes)
            })
        };
        match self.op.epilogue {
            Epilogue::None => vec![],
            Epilogue::Stats => {
                let variance = |v: &[f64]| {
                    let mean = mean(v);
                    per_channel(&meta, |c, at| (v[at] - mean[c]) * (v[at] - mean[c]) / count)
                };
                vec![("mean", each(&|_, v| mean(v))), ("variance", each(&|_, v| variance(v)))]
            }
            Epilogue::BackwardSums => {
                let x = self.x_name();
                let dg =
                    |m: usize, v: &[f64]| sum("", x, m, &|_, at, hat, passes| if passes { v[at] * hat } else { 0.0 });
                let db = |m: usize, v: &[f64]| sum("", x, m, &|_, at, _, passes| if passes { v[at] } else { 0.0 });
                vec![("dg", each(&dg)), ("db", each(&db))]
            }
            Epilogue::TangentSums => {
                let rho = |m: usize, v: &[f64]| sum("next_", "next", m, &|_, at, hat, _| v[at] * hat / count);
                let covariance = |m: usize, v: &[f64]| {
                    let dy = find(operands, "next_dy").of(m);
                    let masked = |at: usize, passes: bool| if passes { dy[at] } else { 0.0 };
                    let dy_mean = sum("next_", "next", m, &|_, at, _, passes| masked(at, passes) / count);
                    sum("next_", "next", m, &|c, at, _, passes| (masked(at, passes) - dy_mean[c]) * v[at] / count)
                };
                vec![("mean", each(&|_, v| mean(v))), ("rho", each(&rho)), ("covariance", each(&covariance))]
            }
        }
    }
}
