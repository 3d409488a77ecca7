//! `relu(bn(x))` becomes one operation, and so do the masks in its backward and double backward.

use super::Graph;
use crate::ops::{BnBackward, BnDoubleBackward, BnEval, BnForward, Op};
use crate::tape::Tensor;

/// `relu(bn_forward(x))`, `bn_backward(mask(dy, y))` and `mask(bn_double_backward(.., mask(dy, y), ..), y)`, each as one operation.
pub(super) fn fuse(graph: &mut Graph) {
    forward(graph);
    backward(graph);
    graph.remove_dead();
}

/// `relu(bn(x))` where nothing else reads `bn(x)`.
fn forward(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    for n in 0..graph.nodes.len() {
        if !matches!(graph.nodes[n].op, Op::Relu(_)) {
            continue;
        }
        let (x, y) = (graph.nodes[n].inputs[0], graph.nodes[n].outputs[0]);
        let Some(bn) = producers[x.index()].filter(|_| uses[x.index()].len() == 1 && !escapes[x.index()]) else {
            continue;
        };
        let fused = match graph.nodes[bn].op {
            Op::BnForward(BnForward { relu: false }) => BnForward { relu: true }.into(),
            Op::BnEval(BnEval { relu: false }) => BnEval { relu: true }.into(),
            _ => continue,
        };
        graph.nodes[bn].op = fused;
        graph.nodes[bn].outputs[0] = y;
        // What is left of the ReLU computes a tensor that nobody reads.
        graph.nodes[n].outputs[0] = x;
    }
    graph.remove_dead();
}

/// `dy` of a batch norm's backward and double backward that is `mask(e, y)` for the `y` of the fused forward.
fn backward(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    let sole_use = |t: Tensor| match uses[t.index()][..] {
        [(n, i)] if !escapes[t.index()] => Some((n, i)),
        _ => None,
    };
    for n in 0..graph.nodes.len() {
        if !matches!(graph.nodes[n].op, Op::Mask(_)) {
            continue;
        }
        let (e, y, masked) = (graph.nodes[n].inputs[0], graph.nodes[n].inputs[1], graph.nodes[n].outputs[0]);
        let Some(bn) = producers[y.index()] else { continue };
        let is_fused_forward = matches!(graph.nodes[bn].op, Op::BnForward(BnForward { relu: true }));
        let same_branching = graph.metas[e.index()] == graph.metas[masked.index()];
        if !is_fused_forward || !same_branching || escapes[masked.index()] {
            continue;
        }
        let x = graph.nodes[bn].inputs[0];
        // Every reader must be this batch norm's backward, or its double backward with ẏ read by the same mask only.
        let mut tangent_masks = Vec::new();
        let readers = &uses[masked.index()];
        let fits = readers.iter().all(|&(r, i)| {
            let reader = &graph.nodes[r];
            match reader.op {
                Op::BnBackward(BnBackward { relu: false }) => i == 0 && reader.inputs[1] == x,
                Op::BnDoubleBackward(BnDoubleBackward { relu: false }) if i == 3 && reader.inputs[4] == x => {
                    let tangent = reader.outputs[0];
                    match sole_use(tangent) {
                        Some((m, 0)) => {
                            let mask = &graph.nodes[m];
                            let same = matches!(mask.op, Op::Mask(_)) && mask.inputs[1] == y;
                            let plain = graph.metas[tangent.index()] == graph.metas[mask.outputs[0].index()];
                            tangent_masks.push((r, m));
                            same && plain
                        }
                        _ => uses[tangent.index()].is_empty() && !escapes[tangent.index()],
                    }
                }
                _ => false,
            }
        });
        if !fits {
            continue;
        }
        for &(r, i) in readers {
            let reader = &mut graph.nodes[r];
            reader.op = match reader.op {
                Op::BnBackward(_) => BnBackward { relu: true }.into(),
                _ => BnDoubleBackward { relu: true }.into(),
            };
            reader.inputs[i] = e;
            reader.inputs.push(y);
        }
        for (r, m) in tangent_masks {
            let unmasked = graph.nodes[r].outputs[0];
            graph.nodes[r].outputs[0] = graph.nodes[m].outputs[0];
            graph.nodes[m].outputs[0] = unmasked;
        }
    }
}
