//! Writes a plan with fused operations out again in the plain ones that they stand for, so that the CPU device can run it.

use mlnt::ops::{
    BnBackward, BnDoubleBackward, BnEval, BnForward, Conv, ConvForm, ConvKind, Epilogue, Fill, FusedConv, LinComb, Op,
};
use mlnt::plan::{Args, Buffer, Launch, Place, Plan};
use mlnt::tape::{Coef, Meta};
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
            (Op::BnStats(_), args) => expansion.stats(args.inputs[0], args.outputs[0], args.outputs[1]),
            (Op::BnReluBackward(op), args) => expansion.backward(op.start, args),
            (Op::BnReluDoubleBackward(_), args) => {
                let y = expansion.recomputed([4, 5, 6, 7, 8].map(|i| args.inputs[i]));
                let mut inputs = [0, 1, 2, 3, 4, 5, 7, 8].map(|i| args.inputs[i]).to_vec();
                inputs.push(y);
                // The results may lie where operands do.
                let results: Vec<usize> = args.outputs.iter().map(|o| expansion.tensor(expansion.meta(*o))).collect();
                expansion.push(BnDoubleBackward { relu: true }.into(), &inputs, &results);
                for (from, to) in results.iter().zip(&args.outputs) {
                    let copy = LinComb::new(vec![Coef::ONE]);
                    expansion.push(copy.into(), &[*from], &[*to]);
                }
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

    fn tensor(&mut self, meta: Meta) -> usize {
        let (first, count) = if meta.per_branch { (self.branches.start, self.branches.len()) } else { (0, 1) };
        self.plan.buffers.push(Buffer { meta, half: false, first, count, place: Place::Arena(self.next) });
        self.next += (meta.len() * count).next_multiple_of(16);
        self.plan.arena_reals = self.plan.arena_reals.max(self.next);
        self.plan.buffers.len() - 1
    }

    /// `relu(bn(x))` of `x, g, b, mean, var`.
    fn recomputed(&mut self, operands: [usize; 5]) -> usize {
        let branched = operands.iter().any(|b| self.meta(*b).per_branch);
        let y = self.tensor(self.meta(operands[0]).with_branching(branched));
        self.push(BnEval { relu: true }.into(), &operands, &[y]);
        y
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
        let dx = self.tensor(self.meta(args.outputs[0]));
        let outputs = [dx, args.outputs[1], args.outputs[2]];
        self.push(BnBackward { relu: true }.into(), &[i[0], i[1], i[2], i[4], i[5], y], &outputs);
        let mut terms = vec![dx];
        terms.extend(start.then(|| i[6]));
        let op = LinComb::new(vec![Coef::ONE; terms.len()]);
        self.push(op.into(), &terms, &args.outputs[..1]);
    }

    fn fused_conv(&mut self, op: &FusedConv, args: &Args) {
        let mut i = args.inputs.clone();
        if let Some(norm) = op.norm_operands() {
            let [g, b, mean, var] = norm.map(|at| i[at]);
            i[op.x_operand()] = self.recomputed([i[op.x_operand()], g, b, mean, var]);
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
        if op.epilogue == Epilogue::Stats {
            self.stats(out[0], out[1], out[2]);
        }
    }
}
