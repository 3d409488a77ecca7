//! Bytes that a plan's launches move to and from memory behind a second-level cache: a model of the cache, not of a machine.
//!
//! Memory is cut into lines of [`LINE`] bytes, and the cache holds those touched last. A launch works on its branches one after the
//! other, as the blocks of the kernels do, and goes through its operands and results side by side; one that sums over the
//! branches goes through all of them once. A line that is written is not read first, and goes to memory when it leaves the cache: what
//! is overwritten before costs nothing. The plan runs twice, and the second run counts, so that it finds what a step leaves behind.

use super::{Buffer, Launch, Place, Plan};
use crate::tape::DType;

/// Bytes of the model's lines: far longer than a machine's, which keeps the model quick and changes little for large tensors.
pub const LINE: usize = 1 << 15;

/// Bytes to and from memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Read from memory.
    pub read: u64,
    /// Written to memory.
    pub written: u64,
}

impl Traffic {
    /// Both.
    pub fn bytes(self) -> u64 {
        self.read + self.written
    }
}

impl Plan {
    /// Traffic of every launch behind a cache of `cache_bytes`, when a real takes `real_bytes`. What a launch drives out of the cache is
    /// counted as its own.
    pub fn traffic(&self, real_bytes: usize, cache_bytes: usize) -> Vec<Traffic> {
        let memory = Memory::of(self, real_bytes);
        let mut cache = Cache::new(memory.lines, (cache_bytes / LINE).max(1));
        let mut traffic: Vec<Traffic> = Vec::new();
        for _ in 0..2 {
            traffic = self.launches.iter().map(|launch| run(self, launch, &memory, &mut cache)).collect();
        }
        traffic
    }
}

/// Where the plan's memories begin, in lines: each at a line of its own.
struct Memory {
    real_bytes: usize,
    /// Of reals, of halves, of indices.
    arenas: [usize; 3],
    states: Vec<usize>,
    inputs: Vec<usize>,
    lines: usize,
}

impl Memory {
    fn of(plan: &Plan, real_bytes: usize) -> Self {
        let mut lines = 0;
        let mut take = |bytes: usize| {
            let from = lines;
            lines += bytes.div_ceil(LINE);
            from
        };
        let arenas = [plan.arena_reals * real_bytes, plan.arena_halves * 2, plan.arena_indices * 4].map(&mut take);
        let mut ports = |ports: &[super::Port]| -> Vec<usize> {
            ports.iter().map(|p| take(p.meta.total(plan.branches) * real_bytes.max(4))).collect()
        };
        let (states, inputs) = (ports(&plan.states), ports(&plan.inputs));
        Memory { real_bytes, arenas, states, inputs, lines }
    }

    /// First byte and bytes of one branch of a buffer, or of the whole of it.
    fn span(&self, buffer: &Buffer, branch: Option<usize>) -> (usize, usize) {
        let (pool, width) = match (buffer.meta.dtype, buffer.half) {
            (DType::Real, false) => (0, self.real_bytes),
            (DType::Real, true) => (1, 2),
            (DType::Index, _) => (2, 4),
        };
        let base = match buffer.place {
            Place::Arena(_) => self.arenas[pool],
            Place::State(i) => self.states[i],
            Place::Input(i) => self.inputs[i],
        };
        let (skipped, count) = match branch {
            Some(m) if buffer.meta.per_branch => (m - buffer.first, 1),
            _ => (0, buffer.count),
        };
        let len = buffer.meta.len();
        (base * LINE + (buffer.start() + skipped * len) * width, len * count * width)
    }
}

/// One launch through the cache.
fn run(plan: &Plan, launch: &Launch, memory: &Memory, cache: &mut Cache) -> Traffic {
    let mut traffic = Traffic::default();
    for args in &launch.args {
        let per_branch = |ids: &[usize]| ids.iter().any(|&b| plan.buffers[b].meta.per_branch);
        let passes: Vec<Option<usize>> =
            if per_branch(&args.outputs) { launch.branches.clone().map(Some).collect() } else { vec![None] };
        for pass in passes {
            let spans: Vec<(usize, usize, bool)> = (args.inputs.iter().map(|b| (b, false)))
                .chain(args.outputs.iter().map(|b| (b, true)))
                .map(|(&b, written)| {
                    let (first, bytes) = memory.span(&plan.buffers[b], pass);
                    (first, bytes, written)
                })
                .collect();
            side_by_side(&spans, cache, &mut traffic);
        }
    }
    traffic
}

/// Touches all `(first byte, bytes, written)` from their beginnings to their ends at the same pace.
fn side_by_side(spans: &[(usize, usize, bool)], cache: &mut Cache, traffic: &mut Traffic) {
    let lines = |&(first, bytes, _): &(usize, usize, bool)| {
        if bytes == 0 { 0 } else { (first + bytes - 1) / LINE - first / LINE + 1 }
    };
    let steps = spans.iter().map(lines).max().unwrap_or(0);
    for step in 0..steps {
        for span in spans {
            let &(first, bytes, written) = span;
            let count = lines(span);
            for i in step * count / steps..(step + 1) * count / steps {
                let line = first / LINE + i;
                let (from, to) = ((line * LINE).max(first), ((line + 1) * LINE).min(first + bytes));
                cache.touch(line, (to - from) as u32, written, traffic);
            }
        }
    }
}

const NONE: u32 = u32::MAX;

/// The lines touched last, in that order.
struct Cache {
    capacity: usize,
    held: usize,
    newest: u32,
    oldest: u32,
    /// By line: the next older one, the next newer one, whether it is held, and how many of its bytes wait to be written.
    older: Vec<u32>,
    newer: Vec<u32>,
    present: Vec<bool>,
    dirty: Vec<u32>,
}

impl Cache {
    fn new(lines: usize, capacity: usize) -> Self {
        Cache {
            capacity,
            held: 0,
            newest: NONE,
            oldest: NONE,
            older: vec![NONE; lines],
            newer: vec![NONE; lines],
            present: vec![false; lines],
            dirty: vec![0; lines],
        }
    }

    fn touch(&mut self, line: usize, bytes: u32, written: bool, traffic: &mut Traffic) {
        if self.present[line] {
            self.unlink(line);
        } else {
            if !written {
                traffic.read += u64::from(bytes);
            }
            if self.held == self.capacity {
                let out = self.oldest as usize;
                self.unlink(out);
                self.present[out] = false;
                traffic.written += u64::from(std::mem::take(&mut self.dirty[out]));
            } else {
                self.held += 1;
            }
            self.present[line] = true;
        }
        if written {
            self.dirty[line] = self.dirty[line].saturating_add(bytes).min(LINE as u32);
        }
        self.link(line);
    }

    fn link(&mut self, line: usize) {
        self.older[line] = self.newest;
        self.newer[line] = NONE;
        match self.newest {
            NONE => self.oldest = line as u32,
            newest => self.newer[newest as usize] = line as u32,
        }
        self.newest = line as u32;
    }

    fn unlink(&mut self, line: usize) {
        let (older, newer) = (self.older[line], self.newer[line]);
        match older {
            NONE => self.oldest = newer,
            older => self.newer[older as usize] = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.older[newer as usize] = older,
        }
    }
}
