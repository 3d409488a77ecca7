//! Writes a plan with fused operations out again in the plain ones that they stand for, so that the CPU device can run it.

use crate::ops::{
    BnBackward, BnDoubleBackward, BnEval, BnForward, Conv, ConvForm, ConvKind, Epilogue, Fill, FusedConv, LinComb, Op,
    Update,
};
use crate::plan::{Args, Buffer, Launch, Place, Plan};
use crate::tape::{Coef, Meta};
use std::ops::Range;

/// The plan in plain operations. Each fused launch becomes its composition, with tensors of its own behind the arena.
pub fn expand(plan: &Plan) -> Plan {
    let blank = Plan { launches: Vec::new(), ..plan.clone() };
    let mut expansion = Expansion { plan: blank, next: plan.arena_reals, branches: 0..plan.branches, phase: "" };
    for launch in &plan.launches {
        expansion.next = plan.arena_reals;
        (expansion.branches, expansion.phase) = (launch.branches.clone(), launch.phase);
        match (&launch.op, &launch.args[0]) {
            (Op::FusedConv(op), args) => expansion.fused_conv(op, args),
            (Op::Update(op), args) => expansion.update(op, args),
            (Op::BnStats(_), args) => expansion.stats(args.inputs[0], args.outputs[0], args.outputs[1]),
            (Op::BnReluBackward(op), args) => expansion.backward(op.start, args),
            (Op::BnReluBackwardApply(op), args) => {
                let norm = [1, 2, 3, 4, 5].map(|i| args.inputs[i]);
                let summed = !expansion.meta(args.outputs[0]).per_branch;
                let dx = expansion.cotangent(args.inputs[0], norm, summed);
                let mut terms = vec![(1.0, dx)];
                terms.extend(op.second_order.then(|| (-1.0, expansion.last_term(norm, args.inputs[8]))));
                terms.extend(args.inputs[op.first_start()..].iter().map(|start| (1.0, *start)));
                expansion.combine(&terms, args.outputs[0]);
            }
            (Op::BnReluDoubleBackward(_), args) => {
                let i = &args.inputs;
                let norm = [4, 5, 6, 7, 8].map(|at| i[at]);
                let like = [0, 1, 2].map(|o| expansion.meta(args.outputs[o]));
                let results = expansion.double([i[0], i[1], i[2], i[3]], norm, like);
                results.iter().zip(&args.outputs).for_each(|(from, to)| expansion.add(*from, None, *to));
            }
            (Op::BnReluDoubleBackwardApply(op), args) => {
                let i = &args.inputs;
                let norm = [3, 4, 5, 6, 7].map(|at| i[at]);
                let (x_bar, g_bar) = (args.outputs[0], args.outputs[1]);
                // The tangent of the bias is no part of these results.
                let b_dot = expansion.filled(expansion.meta(i[1]).shared(), 0.0);
                let branched = expansion.any_branched(&i[..8]);
                let summed = !expansion.meta(x_bar).per_branch;
                let like = [(i[0], branched), (x_bar, branched && !summed), (i[4], branched)];
                let like = like.map(|(at, branched)| expansion.meta(at).with_branching(branched));
                // The last term is of each branch's own ḡ.
                let [_, bar, g] = expansion.double([i[0], i[1], b_dot, i[2]], norm, like);
                let mut terms = vec![(1.0, bar), (1.0, expansion.last_term(norm, g))];
                terms.extend(op.start.then(|| (1.0, i[12])));
                expansion.combine(&terms, x_bar);
                expansion.add(g, None, g_bar);
            }
            _ => expansion.plan.launches.push(launch.clone()),
        }
    }
    expansion.plan
}

struct Expansion {
    plan: Plan,
    /// The next free element behind the arena.
    next: usize,
    /// Branches and phase of the launch at hand.
    branches: Range<usize>,
    phase: &'static str,
}

impl Expansion {
    fn push(&mut self, op: Op, inputs: &[usize], outputs: &[usize]) {
        let args = vec![Args { inputs: inputs.to_vec(), outputs: outputs.to_vec() }];
        self.plan.launches.push(Launch { op, args, branches: self.branches.clone(), phase: self.phase });
    }

    fn meta(&self, buffer: usize) -> Meta {
        self.plan.buffers[buffer].meta
    }

    fn any_branched(&self, buffers: &[usize]) -> bool {
        buffers.iter().any(|b| self.meta(*b).per_branch)
    }

    fn tensor(&mut self, meta: Meta) -> usize {
        let (first, count) = if meta.per_branch { (self.branches.start, self.branches.len()) } else { (0, 1) };
        self.plan.buffers.push(Buffer { meta, half: false, first, count, place: Place::Arena(self.next) });
        self.next += (meta.len() * count).next_multiple_of(16);
        self.plan.arena_reals = self.plan.arena_reals.max(self.next);
        self.plan.buffers.len() - 1
    }

    /// `relu(bn(x))` of `x, g, b, mean, var`.
    fn recomputed(&mut self, operands: [usize; 5]) -> usize {
        let branched = self.any_branched(&operands);
        let y = self.tensor(self.meta(operands[0]).with_branching(branched));
        self.push(BnEval { relu: true }.into(), &operands, &[y]);
        y
    }

    /// A tensor like another.
    fn like(&mut self, buffer: usize) -> usize {
        self.tensor(self.meta(buffer))
    }

    fn filled(&mut self, meta: Meta, value: f64) -> usize {
        let to = self.tensor(meta);
        self.push(Fill { meta, value: Coef::constant(value) }.into(), &[], &[to]);
        to
    }

    fn combine(&mut self, terms: &[(f64, usize)], to: usize) {
        let (coefs, inputs): (Vec<Coef>, Vec<usize>) = terms.iter().map(|(c, t)| (Coef::constant(*c), *t)).unzip();
        self.push(LinComb::new(coefs).into(), &inputs, &[to]);
    }

    /// `to = from + start`
    fn add(&mut self, from: usize, start: Option<usize>, to: usize) {
        let terms: Vec<(f64, usize)> = [from].into_iter().chain(start).map(|t| (1.0, t)).collect();
        self.combine(&terms, to);
    }

    /// `g r x̂ ḡ/n` for `x, g, b, mean, var` and ḡ.
    fn last_term(&mut self, norm: [usize; 5], g_bar: usize) -> usize {
        let [x, g, _, mean, var] = norm;
        let (meta, vector) = (self.meta(x), self.meta(g_bar));
        let channels = vector.dims[0];
        // `g r ḡ`: the batch norm of ḡ, seen as an activation of one pixel.
        let pixel = Meta::activation(1, channels, 1, 1).with_branching(vector.per_branch);
        let as_pixel = self.tensor(pixel);
        let (scaled, factor) = (self.tensor(pixel), self.tensor(vector));
        let zero = self.filled(vector.shared(), 0.0);
        self.copy_as(g_bar, as_pixel);
        self.push(BnEval { relu: false }.into(), &[as_pixel, g, zero, zero, var], &[scaled]);
        self.copy_as(scaled, factor);
        let term = self.tensor(meta.with_branching(meta.per_branch || vector.per_branch));
        self.push(BnEval { relu: false }.into(), &[x, factor, zero, mean, var], &[term]);
        let count = (meta.len() / channels) as f64;
        let result = self.like(term);
        self.combine(&[(1.0 / count, term)], result);
        result
    }

    /// Copies a vector to an activation of one pixel, or back: the second buffer is seen as one of the first's kind.
    fn copy_as(&mut self, from: usize, to: usize) {
        let like = Buffer { meta: self.meta(from), ..self.plan.buffers[to] };
        self.plan.buffers.push(like);
        self.add(from, None, self.plan.buffers.len() - 1);
    }

    /// The cotangent of x from that of `relu(bn(x))`, of `x, g, b, mean, var`; or its sum over the branches.
    fn cotangent(&mut self, dy: usize, norm: [usize; 5], summed: bool) -> usize {
        let branched = !summed && (self.any_branched(&norm) || self.meta(dy).per_branch);
        let channels = self.meta(norm[1]).with_branching(branched);
        let dx = self.meta(norm[0]).with_branching(branched);
        let outputs = [dx, channels, channels].map(|meta| self.tensor(meta));
        self.bn_backward(dy, norm, outputs);
        outputs[0]
    }

    fn bn_backward(&mut self, dy: usize, norm: [usize; 5], outputs: [usize; 3]) {
        let y = self.recomputed(norm);
        let [x, g, _, mean, var] = norm;
        self.push(BnBackward { relu: true }.into(), &[dy, x, g, mean, var, y], &outputs);
    }

    /// Double backward of `ẋ, ġ, ḃ, dy` and `x, g, b, mean, var`, with results of these metas.
    fn double(&mut self, dots: [usize; 4], norm: [usize; 5], like: [Meta; 3]) -> [usize; 3] {
        let y = self.recomputed(norm);
        let [x, g, _, mean, var] = norm;
        let [x_dot, g_dot, b_dot, dy] = dots;
        let results = like.map(|meta| self.tensor(meta));
        let inputs = [x_dot, g_dot, b_dot, dy, x, g, mean, var, y];
        self.push(BnDoubleBackward { relu: true }.into(), &inputs, &results);
        results
    }

    /// The tangent of `relu(bn(x))` for tangents of x, of the gain and of the bias.
    fn tangent(&mut self, dots: [usize; 3], norm: [usize; 5]) -> usize {
        let [x_dot, g_dot, b_dot] = dots;
        let branched = self.any_branched(&norm) || self.any_branched(&dots);
        let [image, vector] = [x_dot, norm[1]].map(|at| self.meta(at).with_branching(branched));
        // The cotangent is no part of this result.
        self.double([x_dot, g_dot, b_dot, x_dot], norm, [image, image, vector])[0]
    }

    /// Mean of ẏ and `⟨x̂ẏ⟩` for `next, mean, var`.
    fn tangent_sums(&mut self, y_dot: usize, norm: [usize; 3], results: [usize; 2]) {
        let [next, mean, var] = norm;
        let meta = self.meta(next);
        let count = (meta.len() / meta.dims[1]) as f64;
        let channels = self.meta(results[0]);
        let [scratch, other] = [self.tensor(channels), self.tensor(channels)];
        self.stats(y_dot, results[0], scratch);
        let dx = self.like(y_dot);
        let one = self.filled(channels.shared(), 1.0);
        self.push(BnBackward { relu: false }.into(), &[y_dot, next, one, mean, var], &[dx, scratch, other]);
        self.combine(&[(1.0 / count, scratch)], results[1]);
    }

    /// Mean and variance are those of a batch norm whose result nobody reads.
    fn stats(&mut self, x: usize, mean: usize, var: usize) {
        let channels = self.meta(mean).shared();
        let (y, one) = (self.tensor(self.meta(x)), self.tensor(channels));
        self.push(Fill { meta: channels, value: Coef::ONE }.into(), &[], &[one]);
        self.push(BnForward { relu: false }.into(), &[x, one, one], &[y, mean, var]);
    }

    fn backward(&mut self, start: bool, args: &Args) {
        let i = &args.inputs;
        let y = self.recomputed([1, 2, 3, 4, 5].map(|at| i[at]));
        let operands = [i[0], i[1], i[2], i[4], i[5], y];
        let branched = operands.iter().any(|b| self.meta(*b).per_branch);
        // Where only what is added is per-branch, the batch norm's results are not.
        let own = |meta: Meta| meta.with_branching(meta.per_branch && branched);
        let results: Vec<usize> = args.outputs.iter().map(|o| self.tensor(own(self.meta(*o)))).collect();
        self.push(BnBackward { relu: true }.into(), &operands, &results);
        let mut starts = start.then(|| i[6]);
        for (from, to) in results.iter().zip(&args.outputs) {
            let terms: Vec<usize> = [*from].into_iter().chain(starts.take()).collect();
            self.push(LinComb::new(vec![Coef::ONE; terms.len()]).into(), &terms, &[*to]);
        }
    }

    /// Results are made beside the operands, in which they may lie, and then copied.
    fn update(&mut self, op: &Update, args: &Args) {
        let guard = op.guard.zip(op.guard_operand()).map(|(factor, at)| {
            let guard = self.like(args.inputs[at]);
            self.push(LinComb::new(vec![factor]).into(), &[args.inputs[at]], &[guard]);
            guard
        });
        for part in op.parts() {
            let mut slots = args.inputs[part.operands].to_vec();
            let results = &args.outputs[part.results];
            for link in &part.chain.links {
                let (coefs, inputs): (Vec<Coef>, Vec<usize>) =
                    link.terms.iter().map(|term| (term.coef, slots[term.of])).unzip();
                let result = self.tensor(self.meta(slots[0]));
                self.push(LinComb::new(coefs).into(), &inputs, &[result]);
                slots.push(result);
            }
            for ((link, made), to) in part.chain.links.iter().zip(&slots[part.chain.operands..]).zip(results) {
                let (Some(guard), Some(kept)) = (guard, link.kept) else {
                    self.add(*made, None, *to);
                    continue;
                };
                let op = LinComb { coefs: vec![Coef::constant(0.0), Coef::ONE], guarded: true };
                self.push(op.into(), &[slots[kept], *made, guard], &[*to]);
            }
        }
    }

    fn fused_conv(&mut self, op: &FusedConv, args: &Args) {
        let mut i = args.inputs.clone();
        let mut normed = None;
        if let Some(operands) = op.norm_operands() {
            let [g, b, mean, var] = operands.map(|at| i[at]);
            let norm = [i[op.x_operand()], g, b, mean, var];
            if let Some(tangents) = op.tangent_operands() {
                let [g_dot, b_dot, ..] = tangents.map(|at| i[at]);
                i[0] = self.tangent([i[0], g_dot, b_dot], norm);
            }
            if !op.tangent || op.form == ConvForm::Tangent {
                i[op.x_operand()] = self.recomputed(norm);
            }
            normed = Some(norm);
        }
        if let (Some(at), Some(operands)) = (op.dy_operand(), op.delta_operands()) {
            let [y, g, b, mean, var, ..] = operands.map(|at| i[at]);
            let delta = self.cotangent(i[at], [y, g, b, mean, var], false);
            let residual = op.residual_operand().map(|residual| args.inputs[residual]);
            let branched = [delta].into_iter().chain(residual).any(|b| self.meta(b).per_branch);
            i[at] = match op.delta_result() {
                Some(kept) => args.outputs[kept],
                None => self.tensor(self.meta(delta).with_branching(branched)),
            };
            self.add(delta, residual, i[at]);
        }
        let start = op.start_operand().map(|at| i[at]);
        let mut conv = |kind, a: usize, b: usize, start: Option<usize>, out: usize| {
            let inputs: Vec<usize> = [a, b].into_iter().chain(start).collect();
            self.push(Conv { kind, geom: op.geom }.into(), &inputs, &[out]);
        };
        let out = &args.outputs;
        match op.form {
            ConvForm::Fprop => conv(ConvKind::Fprop, i[0], i[1], start, out[0]),
            ConvForm::Wgrad => conv(ConvKind::Wgrad, i[0], i[1], start, out[0]),
            ConvForm::Backward => {
                conv(ConvKind::Dgrad, i[2], i[1], start, out[0]);
                conv(ConvKind::Wgrad, i[0], i[2], None, out[1]);
            }
            ConvForm::Tangent => {
                let first = self.tensor(self.meta(out[0]));
                let mut conv = |a: usize, b: usize, start: Option<usize>, to: usize| {
                    let inputs: Vec<usize> = [a, b].into_iter().chain(start).collect();
                    let op = Conv { kind: ConvKind::Fprop, geom: op.geom };
                    self.push(op.into(), &inputs, &[to]);
                };
                conv(i[0], i[3], start, first);
                conv(i[2], i[1], Some(first), out[0]);
            }
        }
        let results = op.epilogue_results().map_or([0; 2], |at| at.map(|i| out[i]));
        match (op.epilogue, normed, op.epilogue_operands()) {
            (Epilogue::Stats, ..) => self.stats(out[0], results[0], results[1]),
            (Epilogue::BackwardSums, Some(norm), _) => {
                let dx = self.like(out[0]);
                self.bn_backward(out[0], norm, [dx, results[0], results[1]]);
            }
            (Epilogue::TangentSums, _, Some(operands)) => {
                self.tangent_sums(out[0], operands.map(|at| i[at]), results);
            }
            _ => {}
        }
    }
}
