//! The memory of the CPU device: states, inputs, one arena; and views of it for launches.
#![allow(unsafe_code)]

use super::real::Real;
use crate::plan::{Buffer, Place};
use crate::tape::Meta;

/// Values a launch reads: one branch, or M.
#[derive(Clone, Copy)]
pub(super) struct View<'a, E> {
    data: &'a [E],
    /// Elements of one branch.
    pub len: usize,
}

impl<'a, E> View<'a, E> {
    /// True for M branches.
    pub fn branched(&self) -> bool {
        self.data.len() != self.len
    }
    /// Branch `m`; a shared tensor is the same in every branch.
    #[inline(always)]
    pub fn branch(&self, m: usize) -> &'a [E] {
        if self.branched() { &self.data[m * self.len..(m + 1) * self.len] } else { self.data }
    }
    /// All branches one after the other.
    pub fn all(&self) -> &'a [E] {
        self.data
    }
}

/// Values a launch writes. Tasks of one launch write to disjoint parts at the same time, so parts are handed out
/// by number and it is the launcher that answers for their being disjoint.
#[derive(Clone, Copy)]
pub(super) struct Out<'a, E> {
    data: *mut E,
    total: usize,
    /// Elements of one branch.
    pub len: usize,
    life: std::marker::PhantomData<&'a mut E>,
}

// SAFETY: an `Out` hands out parts only through `part`, whose caller promises that no two threads hold the same part.
unsafe impl<E: Send> Send for Out<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Send> Sync for Out<'_, E> {}

impl<'a, E> Out<'a, E> {
    /// True for M branches.
    pub fn branched(&self) -> bool {
        self.total != self.len
    }
    /// Number of branches.
    pub fn branches(&self) -> usize {
        self.total.checked_div(self.len).unwrap_or(0)
    }
    /// All elements, over branches.
    pub fn total(&self) -> usize {
        self.total
    }
    /// Elements `from..from + len`.
    ///
    /// # Safety
    /// No other live slice overlaps the range.
    #[inline(always)]
    pub unsafe fn part(&self, from: usize, len: usize) -> &'a mut [E] {
        assert!(from + len <= self.total, "a launcher asked for {from}..{} of {}", from + len, self.total);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(from), len) }
    }
    /// Address of element `at`, for a strided tile.
    pub fn address(&self, at: usize) -> *mut E {
        assert!(at < self.total);
        self.data.wrapping_add(at)
    }
    /// Everything.
    ///
    /// # Safety
    /// No other live slice overlaps it.
    pub unsafe fn all(&self) -> &'a mut [E] {
        // SAFETY: the caller's promise.
        unsafe { self.part(0, self.total) }
    }
}

/// Memory aligned to cache lines, zeroed.
pub(super) struct Block<E> {
    words: Vec<Line>,
    len: usize,
    element: std::marker::PhantomData<E>,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

impl<E: bytemuck::Pod> Block<E> {
    pub fn new(len: usize) -> Self {
        let lines = (len * size_of::<E>()).div_ceil(64);
        Block { words: vec![Line([0; 8]); lines], len, element: std::marker::PhantomData }
    }
    pub fn len(&self) -> usize {
        self.len
    }
    pub fn slice(&self) -> &[E] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
    pub fn slice_mut(&mut self) -> &mut [E] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

/// Everything one plan can touch while it runs.
pub(super) struct Memory<'a, T> {
    pub reals: *mut T,
    pub indices: *mut i32,
    /// One per state of the plan; null where the plan does not touch it.
    pub states: &'a [*mut T],
    pub real_inputs: &'a [*mut T],
    pub index_inputs: &'a [*mut i32],
    pub branches: usize,
}

impl<'a, T: Real> Memory<'a, T> {
    fn sizes(&self, meta: &Meta) -> (usize, usize) {
        (meta.len(), meta.total(self.branches))
    }

    fn real(&self, place: Place) -> *mut T {
        match place {
            Place::Arena(at) => self.reals.wrapping_add(at),
            Place::State(i) => self.states[i],
            Place::Input(i) => self.real_inputs[i],
        }
    }

    /// A buffer of reals to read.
    ///
    /// # Safety
    /// The buffer belongs to the plan this memory was made for, and no slice that is written overlaps it.
    pub unsafe fn read(&self, buffer: &Buffer) -> View<'a, T> {
        let (len, total) = self.sizes(&buffer.meta);
        // SAFETY: `load` sized every block for the plan; aliasing is the caller's promise.
        View { data: unsafe { std::slice::from_raw_parts(self.real(buffer.place), total) }, len }
    }

    /// A buffer of indices to read.
    ///
    /// # Safety
    /// As [`Memory::read`].
    pub unsafe fn read_indices(&self, buffer: &Buffer) -> View<'a, i32> {
        let (len, total) = self.sizes(&buffer.meta);
        let at = match buffer.place {
            Place::Arena(at) => self.indices.wrapping_add(at),
            Place::Input(i) => self.index_inputs[i],
            Place::State(_) => unreachable!("states are reals"),
        };
        // SAFETY: as above.
        View { data: unsafe { std::slice::from_raw_parts(at, total) }, len }
    }

    /// A buffer of reals to write.
    ///
    /// # Safety
    /// The buffer belongs to the plan this memory was made for, and nothing else reads or writes it meanwhile.
    pub unsafe fn write(&self, buffer: &Buffer) -> Out<'a, T> {
        let (len, total) = self.sizes(&buffer.meta);
        Out { data: self.real(buffer.place), total, len, life: std::marker::PhantomData }
    }

    /// A buffer of indices to write.
    ///
    /// # Safety
    /// As [`Memory::write`].
    pub unsafe fn write_indices(&self, buffer: &Buffer) -> Out<'a, i32> {
        let (len, total) = self.sizes(&buffer.meta);
        let Place::Arena(at) = buffer.place else { unreachable!("indices are written to the arena") };
        Out { data: self.indices.wrapping_add(at), total, len, life: std::marker::PhantomData }
    }
}
