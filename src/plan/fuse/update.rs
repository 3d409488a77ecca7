//! What the states become at the end of a step is one operation.

use super::Graph;
use crate::ops::{Chain, LinComb, Link, Op, Term, Update};
use crate::tape::{Coef, Kind, Node, Tensor};
use std::collections::{HashMap, HashSet};

/// A state and what it becomes.
struct New {
    /// Position among the assignments.
    assign: usize,
    state: Tensor,
    /// Its value where there is no guard or the guard lets it be taken.
    value: Tensor,
    guard: Option<Tensor>,
    /// The value in terms of others; of itself, where it has other readers that need it sooner.
    terms: Vec<(Coef, Tensor)>,
}

/// Linear combinations of parameters and statistics that become states, and the guarded copies into states, become one [`Update`] at the
/// end of the step for each guard there is. It is behind all readers of the old states.
///
/// A value that something else reads is made where it was. Guarded, it is made again from states that are there anyway, or else copied
/// into its state; without a guard it is left alone: it is written in place already. So are chains that are too long for the kernel.
pub(super) fn join(graph: &mut Graph) {
    let mut news = find(graph);
    let inlined = inline(graph, &mut news);
    while let Some(guard) = news.first().map(|new| new.guard) {
        let (of_this, others) = news.into_iter().partition(|new| new.guard == guard);
        news = others;
        emit(graph, guard, chains(of_this, &inlined), &inlined);
    }
}

/// The terms of `node` if it is an unguarded linear combination of shared parameters or other small tensors, none of which is broadcast.
fn terms(graph: &Graph, node: &Node) -> Option<Vec<(Coef, Tensor)>> {
    let Op::LinComb(LinComb { coefs, guarded: false }) = &node.op else { return None };
    let meta = graph.metas[node.outputs[0].index()];
    let alike = meta.kind != Kind::Activation && node.inputs.iter().all(|t| graph.metas[t.index()] == meta);
    (alike && !meta.per_branch).then(|| coefs.iter().copied().zip(node.inputs.iter().copied()).collect())
}

/// The states that a linear combination alone becomes, or the guarded copy of a tensor.
fn find(graph: &Graph) -> Vec<New> {
    let (uses, producers) = (graph.uses(), graph.producers());
    let read = |t: &Tensor| !uses[t.index()].is_empty() || graph.outputs.iter().any(|o| o.tensor == *t);
    let of = |(assign, (id, value)): (usize, &(u32, Tensor))| {
        let (state, node) = (graph.states[*id as usize].tensor, &graph.nodes[producers[value.index()]?]);
        let Op::LinComb(LinComb { coefs, guarded }) = &node.op else { return None };
        if !guarded {
            return Some(New { assign, state, value: *value, guard: None, terms: terms(graph, node)? });
        }
        let counting: Vec<_> = coefs.iter().zip(&node.inputs).filter(|(c, _)| **c != Coef::constant(0.0)).collect();
        let (&[(&Coef::ONE, &new)], false) = (&counting[..], read(value)) else { return None };
        let small = graph.metas[state.index()].kind != Kind::Activation;
        let inner = producers[new.index()].and_then(|p| terms(graph, &graph.nodes[p]));
        let terms = inner.unwrap_or_else(|| vec![(Coef::ONE, new)]);
        let keeps = node.inputs[0] == state;
        (small && keeps).then(|| New { assign, state, value: new, guard: node.inputs.last().copied(), terms })
    };
    graph.assigns.iter().enumerate().filter_map(of).collect()
}

/// Decides which values are made in the update: those that nothing else reads, and those made of states. Leaves the others to be copied, or
/// out. Returns the values that are made.
fn inline(graph: &Graph, news: &mut Vec<New>) -> HashSet<Tensor> {
    let (uses, producers) = (graph.uses(), graph.producers());
    let outputs: HashSet<Tensor> = graph.outputs.iter().map(|o| o.tensor).collect();
    let itself = |new: &New| new.terms == [(Coef::ONE, new.value)];
    loop {
        // What the update stands for.
        let guarded = news.iter().filter(|new| new.guard.is_some());
        let copies = guarded.filter_map(|new| producers[graph.assigns[new.assign].1.index()]);
        let values = news.iter().filter(|new| !itself(new)).filter_map(|new| producers[new.value.index()]);
        let gone: HashSet<usize> = copies.chain(values).collect();
        let states: HashSet<Tensor> = news.iter().map(|new| new.state).collect();
        let elsewhere = |new: &New| {
            let read = uses[new.value.index()].iter().any(|(n, _)| !gone.contains(n));
            read || outputs.contains(&new.value)
        };
        let again = |new: &New| new.guard.is_some() && new.terms.iter().all(|(_, t)| states.contains(t));
        let Some(at) = news.iter().position(|new| !itself(new) && elsewhere(new) && !again(new)) else { break };
        if news[at].guard.is_some() {
            news[at].terms = vec![(Coef::ONE, news[at].value)];
        } else {
            news.remove(at);
        }
    }
    let values: HashMap<Tensor, usize> = news
        .iter()
        .filter(|new| !itself(new))
        .filter_map(|new| Some((new.value, producers[new.value.index()]?)))
        .collect();
    // What is made of others comes behind them.
    news.sort_by_key(|new| values.get(&new.value).copied());
    values.into_keys().collect()
}

/// Puts together what has operands or states in common, or is made of one another, in the order in which it is made.
fn chains(news: Vec<New>, inlined: &HashSet<Tensor>) -> Vec<Vec<New>> {
    let mut chains: Vec<Vec<New>> = Vec::new();
    let mut keys: Vec<HashSet<Tensor>> = Vec::new();
    for new in news {
        let mut own: HashSet<Tensor> = new.terms.iter().map(|(_, t)| *t).chain([new.state]).collect();
        own.extend(inlined.get(&new.value));
        let mut chain = Vec::new();
        while let Some(at) = keys.iter().position(|keys| !keys.is_disjoint(&own)) {
            own.extend(keys.swap_remove(at));
            chain.append(&mut chains.swap_remove(at));
        }
        chain.push(new);
        chains.push(chain);
        keys.push(own);
    }
    chains.sort_by_key(|chain| chain.iter().map(|new| new.assign).min());
    chains
}

/// Ends the graph with the update of all chains that its kernel can take.
fn emit(graph: &mut Graph, guard: Option<Tensor>, chains: Vec<Vec<New>>, inlined: &HashSet<Tensor>) {
    let (mut inputs, mut outputs, mut taken) = (Vec::new(), Vec::new(), Vec::new());
    for news in chains {
        let mut operands: Vec<Tensor> = Vec::new();
        let is_result = |t: &Tensor| inlined.contains(t);
        let read = news.iter().flat_map(|new| &new.terms).map(|term| term.1).filter(|t| !is_result(t));
        let kept = news.iter().filter(|new| new.guard.is_some()).map(|new| new.state);
        for t in read.chain(kept) {
            if !operands.contains(&t) {
                operands.push(t);
            }
        }
        if operands.len() > Update::MOST_OPERANDS || news.len() > Update::MOST_RESULTS {
            continue;
        }
        let slot = |t: &Tensor| match is_result(t) {
            true => news.iter().position(|new| new.value == *t).map(|j| operands.len() + j),
            false => operands.iter().position(|operand| operand == t),
        };
        let links = news.iter().map(|new| Link {
            terms: new.terms.iter().filter_map(|(coef, t)| Some(Term { coef: *coef, of: slot(t)? })).collect(),
            kept: guard.and_then(|_| slot(&new.state)),
        });
        taken.push(Chain { operands: operands.len(), links: links.collect() });
        inputs.extend(operands);
        for new in news {
            let result = graph.like(new.state);
            graph.assigns[new.assign].1 = result;
            outputs.push(result);
        }
    }
    if taken.is_empty() {
        return;
    }
    let guard = guard.map(|guard| factored(graph, guard));
    inputs.extend(guard.map(|(_, t)| t));
    let op = Update { chains: taken, guard: guard.map(|(factor, _)| factor) };
    graph.nodes.push(Node { op: op.into(), inputs, outputs, phase: "update" });
}

/// A guard as a factor of another vector of one value, if it is made so; else of itself.
fn factored(graph: &Graph, guard: Tensor) -> (Coef, Tensor) {
    let node = graph.producers()[guard.index()].map(|p| &graph.nodes[p]);
    match node.and_then(|node| terms(graph, node)).as_deref() {
        Some(&[term]) => term,
        _ => (Coef::ONE, guard),
    }
}
