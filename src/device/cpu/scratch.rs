//! Memory of a thread for what a task makes and throws away: kept from task to task and from run to run.

use super::real::Real;
use std::cell::RefCell;

thread_local! {
    static SCRATCH: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Makes the calling thread's scratch hold `bytes`, so that tasks that take no more do not allocate.
pub(super) fn reserve(bytes: usize) {
    let words = bytes.div_ceil(size_of::<u64>());
    SCRATCH.with_borrow_mut(|scratch| scratch.resize(words.max(scratch.len()), 0));
}

/// Runs `f` with `len` elements of the calling thread's scratch, which hold anything. There is one scratch per thread:
/// `f` must neither take it again nor wait for other tasks, of which this thread could take one up meanwhile.
///
/// # Panics
/// When `f` was called from another `f`.
pub(super) fn with_scratch<T: Real, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    reserve(len * size_of::<T>());
    SCRATCH.with_borrow_mut(|words| f(&mut bytemuck::cast_slice_mut(words)[..len]))
}
