//! `y = relu(bn(x))` is computed again from x wherever it is read, and not kept in memory.

use super::Graph;
use crate::ops::{
    BnBackward, BnDoubleBackward, BnEval, BnForward, BnReluBackward, BnReluDoubleBackward, BnStats, Conv, ConvForm,
    ConvKind, FusedConv, Op,
};
use crate::tape::{Node, Tensor};

/// Operands of `relu(bn(x))`.
#[derive(Clone, Copy)]
struct Norm {
    x: Tensor,
    /// `g, b, mean, var`.
    channels: [Tensor; 4],
}

/// How a reader of y does without it.
enum Reader {
    /// It is the image of `fprop(y, w)`, `wgrad(y, dy)` or of what these became: a [`FusedConv`] with `norm`.
    Image(FusedConv),
    /// It masks `dy` in [`BnBackward`]: [`BnReluBackward`].
    Backward,
    /// It masks `dy` and `ẏ` in [`BnDoubleBackward`]: [`BnReluDoubleBackward`].
    DoubleBackward,
}

/// A y that only convolutions, as their image, and masks of its own batch norm's backward read disappears, and what is left of its
/// forward is [`BnStats`]. A y that something else reads as well is made for that reader: the convolutions read x, which has as many bytes
/// and is there for the backward anyway, so that y is soon done with, and the masks, which read x in any case, read less.
pub(super) fn fuse(graph: &mut Graph) {
    let (uses, escapes) = (graph.uses(), graph.escapes());
    for n in 0..graph.nodes.len() {
        let node = &graph.nodes[n];
        let y = node.outputs[0];
        let norm = match (&node.op, &node.inputs[..]) {
            (Op::BnForward(BnForward { relu: true }), &[x, g, b]) => {
                Norm { x, channels: [g, b, node.outputs[1], node.outputs[2]] }
            }
            (Op::BnEval(BnEval { relu: true }), &[x, g, b, mean, var]) => Norm { x, channels: [g, b, mean, var] },
            _ => continue,
        };
        // Parameters per branch on activations that all share would make every reader compute per branch.
        if graph.metas[norm.x.index()] != graph.metas[y.index()] {
            continue;
        }
        let readers: Vec<(usize, Option<Reader>)> =
            uses[y.index()].iter().map(|&(r, i)| (r, reader(&graph.nodes[r], i, &norm))).collect();
        let vanishes = !escapes[y.index()] && readers.iter().all(|(_, reader)| reader.is_some());
        for (r, reader) in readers {
            if let Some(reader) = reader {
                recompute(&mut graph.nodes[r], reader, norm);
            }
        }
        let node = &mut graph.nodes[n];
        if vanishes && matches!(node.op, Op::BnForward(_)) {
            let [_, _, mean, var] = norm.channels;
            *node = Node { op: BnStats.into(), inputs: vec![norm.x], outputs: vec![mean, var], phase: node.phase };
        }
    }
}

/// How `node` does without its operand `i`, which is y.
fn reader(node: &Node, i: usize, norm: &Norm) -> Option<Reader> {
    let [g, _, mean, var] = norm.channels;
    let own = |at: usize| node.inputs[at..at + 4] == [norm.x, g, mean, var];
    let image = |form, geom| FusedConv { norm: true, ..FusedConv::plain(form, geom) };
    match node.op {
        Op::Conv(Conv { kind: ConvKind::Fprop, geom }) if i == 0 && node.inputs.len() == 2 => {
            Some(Reader::Image(image(ConvForm::Fprop, geom)))
        }
        Op::Conv(Conv { kind: ConvKind::Wgrad, geom }) if i == 0 && node.inputs.len() == 2 => {
            Some(Reader::Image(image(ConvForm::Wgrad, geom)))
        }
        Op::FusedConv(op) if i == op.x_operand() && !op.norm && !op.start => {
            Some(Reader::Image(FusedConv { norm: true, ..op }))
        }
        Op::BnBackward(BnBackward { relu: true }) if i == 5 && own(1) => Some(Reader::Backward),
        Op::BnDoubleBackward(BnDoubleBackward { relu: true }) if i == 8 && own(4) => Some(Reader::DoubleBackward),
        _ => None,
    }
}

fn recompute(node: &mut Node, reader: Reader, norm: Norm) {
    let Norm { x, channels } = norm;
    match reader {
        Reader::Image(op) => {
            node.inputs[op.x_operand()] = x;
            node.inputs.extend(channels);
            node.op = op.into();
        }
        Reader::Backward => {
            node.inputs.splice(2.., channels);
            node.op = BnReluBackward { start: false }.into();
        }
        Reader::DoubleBackward => {
            node.inputs.splice(5.., channels);
            node.op = BnReluDoubleBackward.into();
        }
    }
}
