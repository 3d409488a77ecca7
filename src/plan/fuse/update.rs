//! What the states become at the end of a step is one operation.

use super::Graph;
use crate::ops::{Chain, LinComb, Link, Op, Term, Update};
use crate::tape::{Coef, Kind, Node, Tensor};
use std::collections::{BTreeSet, HashSet};

/// A result of an update.
struct New {
    /// The tensor that the graph has for it: what a state becomes where there is no guard or the guard lets it be taken, or what others read.
    value: Tensor,
    /// The value in terms of others; of itself, where it is copied into a state and has other readers that need it sooner.
    terms: Vec<(Coef, Tensor)>,
    /// The state that becomes it.
    state: Option<Target>,
}

/// A state that becomes a new value.
struct Target {
    state: Tensor,
    /// Position among the assignments.
    assign: usize,
    guard: Option<Tensor>,
}

impl New {
    fn guard(&self) -> Option<Tensor> {
        self.state.as_ref()?.guard
    }

    fn is_copy(&self) -> bool {
        self.terms == [(Coef::ONE, self.value)]
    }
}

/// Linear combinations of parameters and statistics that become states, and the guarded copies into states, become one [`Update`] at the
/// end of the step for each guard there is. It is behind all readers of the old states.
///
/// A value that something else reads is made where it was. Guarded, it is made again from states that are there anyway, or else copied
/// into its state; without a guard it is left alone: it is written in place already. So are chains that are too long for the kernel.
///
/// Parameters that move within the step become an update of their own, if they are several kinds of sums, together with the gradients by
/// which they move where these are sums too.
pub(super) fn join(graph: &mut Graph) {
    let mut news = find(graph);
    let made = inline(graph, &mut news);
    while let Some(guard) = news.first().map(New::guard) {
        let (of_this, others) = news.into_iter().partition(|new| new.guard() == guard);
        news = others;
        if let Some(node) = update(graph, guard, chains(of_this, &made), &made) {
            graph.nodes.push(node);
        }
    }
    graph.remove_dead();
    join_moves(graph);
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
        let target = |guard| Some(Target { state, assign, guard });
        let Op::LinComb(LinComb { coefs, guarded }) = &node.op else { return None };
        if !guarded {
            return Some(New { value: *value, terms: terms(graph, node)?, state: target(None) });
        }
        let counting: Vec<_> = coefs.iter().zip(&node.inputs).filter(|(c, _)| **c != Coef::constant(0.0)).collect();
        let (&[(&Coef::ONE, &new)], false) = (&counting[..], read(value)) else { return None };
        let small = graph.metas[state.index()].kind != Kind::Activation;
        let made = producers[new.index()].and_then(|p| terms(graph, &graph.nodes[p]));
        let terms = made.unwrap_or_else(|| vec![(Coef::ONE, new)]);
        let keeps = node.inputs[0] == state;
        (small && keeps).then(|| New { value: new, terms, state: target(node.inputs.last().copied()) })
    };
    graph.assigns.iter().enumerate().filter_map(of).collect()
}

/// Decides which values are made in the update: those that nothing else reads, and those made of states. Leaves the others to be copied, or
/// out. Puts what is made of others behind them, and returns the values that are made.
fn inline(graph: &Graph, news: &mut Vec<New>) -> HashSet<Tensor> {
    let (uses, producers) = (graph.uses(), graph.producers());
    let outputs: HashSet<Tensor> = graph.outputs.iter().map(|o| o.tensor).collect();
    let made = |new: &New| if new.is_copy() { None } else { producers[new.value.index()] };
    loop {
        let targets = || news.iter().filter_map(|new| new.state.as_ref());
        // What the update stands for.
        let guarded = targets().filter(|target| target.guard.is_some());
        let copies = guarded.filter_map(|target| producers[graph.assigns[target.assign].1.index()]);
        let gone: HashSet<usize> = copies.chain(news.iter().filter_map(made)).collect();
        let states: HashSet<Tensor> = targets().map(|target| target.state).collect();
        let elsewhere = |new: &New| {
            let read = uses[new.value.index()].iter().any(|(n, _)| !gone.contains(n));
            read || outputs.contains(&new.value)
        };
        let again = |new: &New| new.guard().is_some() && new.terms.iter().all(|(_, t)| states.contains(t));
        let Some(at) = news.iter().position(|new| !new.is_copy() && elsewhere(new) && !again(new)) else { break };
        if news[at].guard().is_some() {
            news[at].terms = vec![(Coef::ONE, news[at].value)];
        } else {
            news.remove(at);
        }
    }
    news.sort_by_key(made);
    news.iter().filter(|new| !new.is_copy()).map(|new| new.value).collect()
}

/// Puts together what has operands or states in common, or is made of one another, in the order in which it is made.
fn chains(news: Vec<New>, made: &HashSet<Tensor>) -> Vec<Vec<New>> {
    let mut chains: Vec<(usize, HashSet<Tensor>, Vec<New>)> = Vec::new();
    for (n, new) in news.into_iter().enumerate() {
        let mut keys: HashSet<Tensor> = new.terms.iter().map(|(_, t)| *t).collect();
        keys.extend(new.state.as_ref().map(|target| target.state));
        keys.extend(made.get(&new.value));
        let (mut first, mut chain) = (n, Vec::new());
        while let Some(at) = chains.iter().position(|(_, other, _)| !other.is_disjoint(&keys)) {
            let (its_first, its_keys, mut its_chain) = chains.swap_remove(at);
            first = first.min(its_first);
            keys.extend(its_keys);
            chain.append(&mut its_chain);
        }
        chain.push(new);
        chains.push((first, keys, chain));
    }
    chains.sort_by_key(|chain| chain.0);
    chains.into_iter().map(|chain| chain.2).collect()
}

/// The update of all chains that its kernel can take, if there are any.
fn update(graph: &mut Graph, guard: Option<Tensor>, chains: Vec<Vec<New>>, made: &HashSet<Tensor>) -> Option<Node> {
    let (mut inputs, mut outputs, mut taken) = (Vec::new(), Vec::new(), Vec::new());
    for news in chains {
        let mut operands: Vec<Tensor> = Vec::new();
        let read = news.iter().flat_map(|new| &new.terms).map(|term| term.1).filter(|t| !made.contains(t));
        let kept = |new: &New| new.state.as_ref().filter(|_| guard.is_some()).map(|target| target.state);
        for t in read.chain(news.iter().filter_map(kept)) {
            if !operands.contains(&t) {
                operands.push(t);
            }
        }
        if operands.len() > Update::MOST_OPERANDS || news.len() > Update::MOST_RESULTS {
            continue;
        }
        let slot = |t: Tensor| match made.contains(&t) {
            true => news.iter().position(|new| new.value == t).map(|j| operands.len() + j),
            false => operands.iter().position(|operand| *operand == t),
        };
        let links = news.iter().map(|new| Link {
            terms: new.terms.iter().filter_map(|(coef, t)| Some(Term { coef: *coef, of: slot(*t)? })).collect(),
            kept: kept(new).and_then(slot),
        });
        taken.push(Chain { operands: operands.len(), links: links.collect() });
        inputs.extend(operands);
        for new in news {
            outputs.push(match new.state {
                Some(Target { state, assign, .. }) => {
                    let result = graph.like(state);
                    graph.assigns[assign].1 = result;
                    result
                }
                None => new.value,
            });
        }
    }
    if taken.is_empty() {
        return None;
    }
    let guard = guard.map(|guard| factored(graph, guard));
    inputs.extend(guard.map(|(_, t)| t));
    let op = Update { chains: taken, guard: guard.map(|(factor, _)| factor) };
    Some(Node { op: op.into(), inputs, outputs, phase: "update" })
}

/// A guard as a factor of another vector of one value, if it is made so; else of itself.
fn factored(graph: &Graph, guard: Tensor) -> (Coef, Tensor) {
    let node = graph.producers()[guard.index()].map(|p| &graph.nodes[p]);
    match node.and_then(|node| terms(graph, node)).as_deref() {
        Some(&[term]) => term,
        _ => (Coef::ONE, guard),
    }
}

/// New values of states that are read within the step: linear combinations in several forms, or of sums, become one update in front of their
/// first reader, with those sums.
fn join_moves(graph: &mut Graph) {
    let (uses, producers, escapes) = (graph.uses(), graph.producers(), graph.escapes());
    let states: HashSet<Tensor> = graph.assigns.iter().map(|a| graph.states[a.0 as usize].tensor).collect();
    let made: Vec<Option<Vec<(Coef, Tensor)>>> = graph.nodes.iter().map(|node| terms(graph, node)).collect();
    let moves = |n: &usize| {
        let of_state = made[*n].as_ref().is_some_and(|terms| terms.iter().any(|(_, t)| states.contains(t)));
        of_state && !escapes[graph.nodes[*n].outputs[0].index()]
    };
    let moved: Vec<usize> = (0..graph.nodes.len()).filter(moves).collect();
    let of = |t: &Tensor| producers[t.index()].filter(|p| made[*p].is_some() && !moves(p));
    let sums: BTreeSet<usize> = moved.iter().flat_map(|n| &graph.nodes[*n].inputs).filter_map(of).collect();
    let alike = moved.windows(2).all(|pair| graph.nodes[pair[0]].op == graph.nodes[pair[1]].op);
    if sums.is_empty() && alike {
        return;
    }
    let all: BTreeSet<usize> = sums.into_iter().chain(moved).collect();
    let new = |n: &usize| Some(New { value: graph.nodes[*n].outputs[0], terms: made[*n].clone()?, state: None });
    let news: Vec<New> = all.iter().filter_map(new).collect();
    let values: HashSet<Tensor> = news.iter().map(|new| new.value).collect();
    let readers = values.iter().flat_map(|t| &uses[t.index()]).map(|u| u.0).filter(|n| !all.contains(n));
    let Some(first_reader) = readers.min() else { return };
    let operands = news.iter().flat_map(|new| &new.terms).map(|term| term.1).filter(|t| !values.contains(t));
    // A step that alternates between the two is left as it is.
    if operands.filter_map(|t| producers[t.index()]).any(|p| p >= first_reader) {
        return;
    }
    let Some(node) = update(graph, None, chains(news, &values), &values) else { return };
    let joined = |n: usize, graph: &Graph| all.contains(&n) && node.outputs.contains(&graph.nodes[n].outputs[0]);
    let gone: Vec<bool> = (0..graph.nodes.len()).map(|n| joined(n, graph)).collect();
    let at = (0..first_reader).filter(|n| !gone[*n]).count();
    let mut gone = gone.into_iter();
    graph.nodes.retain(|_| gone.next() == Some(false));
    graph.nodes.insert(at, node);
}
