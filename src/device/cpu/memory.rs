//! The memory of the CPU device: states, inputs, one arena; and views of it for launches.
#![allow(unsafe_code)]

use super::real::Real;
use crate::device::shortage::shortage;
use crate::device::states::State;
use crate::error::Result;
use crate::plan::{Buffer, Place};

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

/// Memory aligned to pages, zeroed; in huge pages where the system has them, for the rows of a tensor lie far apart.
pub(super) struct Block<E> {
    map: Option<memmap2::MmapRaw>,
    len: usize,
    element: std::marker::PhantomData<E>,
}

impl<E: bytemuck::Pod> Block<E> {
    /// Room for `len` elements.
    ///
    /// # Errors
    /// [`Error::Usage`] when the memory cannot be had, saying how much was asked for.
    pub fn new(len: usize) -> Result<Self> {
        let element = std::marker::PhantomData;
        if len == 0 {
            return Ok(Block { map: None, len, element });
        }
        let bytes = len.saturating_mul(size_of::<E>());
        let map = memmap2::MmapMut::map_anon(bytes).map_err(|e| shortage("cpu", bytes, e))?;
        let map = memmap2::MmapRaw::from(map);
        #[cfg(target_os = "linux")]
        // A system without huge pages serves as well, only slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Block { map: Some(map), len, element })
    }
    pub fn len(&self) -> usize {
        self.len
    }
    pub fn slice(&self) -> &[E] {
        // SAFETY: the map holds `len` elements, which any bytes are; who writes through `address` answers for that no
        // slice is live.
        unsafe { std::slice::from_raw_parts(self.address(), self.len) }
    }
    pub fn slice_mut(&mut self) -> &mut [E] {
        // SAFETY: as in `slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len) }
    }
    /// Address of the first element: valid for reads and writes of `len` elements while the block lives, aligned to
    /// pages; dangling for an empty block. The elements lie in memory of their own, so that a shared borrow of the
    /// block is none of them. Whoever writes through the address answers for that no slice of what is written is
    /// live, and no other thread reads or writes it.
    pub fn address(&self) -> *mut E {
        self.map.as_ref().map_or(std::ptr::dangling_mut(), |map| map.as_mut_ptr().cast())
    }
}

/// An input of a loaded plan.
pub(super) enum Input<T> {
    Reals(Block<T>),
    Indices(Block<i32>),
    Unused,
}

/// Everything one plan can touch while it runs.
pub(super) struct Memory<'a, T> {
    pub reals: &'a Block<T>,
    pub indices: &'a Block<i32>,
    /// Of the device.
    pub states: &'a [State<Block<T>>],
    /// For every state of the plan its position among the device's, if the plan touches it.
    pub positions: &'a [Option<usize>],
    /// Of the plan.
    pub inputs: &'a [Input<T>],
}

impl<'a, T: Real> Memory<'a, T> {
    fn sizes(buffer: &Buffer) -> (usize, usize) {
        (buffer.meta.len(), buffer.elements())
    }

    fn real(&self, buffer: &Buffer) -> *mut T {
        let memory = match buffer.place {
            Place::Arena(_) => self.reals.address(),
            Place::State(i) => match self.positions[i] {
                Some(position) => self.states[position].data.address(),
                None => unreachable!("a launch has a state that the plan does not touch"),
            },
            Place::Input(i) => match &self.inputs[i] {
                Input::Reals(block) => block.address(),
                _ => unreachable!("a launch reads labels, or what the plan does not touch, as reals"),
            },
        };
        memory.wrapping_add(buffer.start())
    }

    /// A buffer of reals to read.
    ///
    /// # Safety
    /// The buffer belongs to the plan this memory was made for, and no slice that is written overlaps it.
    pub unsafe fn read(&self, buffer: &Buffer) -> View<'a, T> {
        let (len, total) = Self::sizes(buffer);
        // SAFETY: `load` sized every block for the plan; aliasing is the caller's promise.
        View { data: unsafe { std::slice::from_raw_parts(self.real(buffer), total) }, len }
    }

    /// A buffer of indices to read.
    ///
    /// # Safety
    /// As [`Memory::read`].
    pub unsafe fn read_indices(&self, buffer: &Buffer) -> View<'a, i32> {
        let (len, total) = Self::sizes(buffer);
        let memory = match buffer.place {
            Place::Arena(_) => self.indices.address(),
            Place::Input(i) => match &self.inputs[i] {
                Input::Indices(block) => block.address(),
                _ => unreachable!("a launch reads reals, or what the plan does not touch, as labels"),
            },
            Place::State(_) => unreachable!("states are reals"),
        };
        // SAFETY: as above.
        View { data: unsafe { std::slice::from_raw_parts(memory.wrapping_add(buffer.start()), total) }, len }
    }

    /// A buffer of reals to write.
    ///
    /// # Safety
    /// The buffer belongs to the plan this memory was made for, and nothing else reads or writes it meanwhile.
    pub unsafe fn write(&self, buffer: &Buffer) -> Out<'a, T> {
        let (len, total) = Self::sizes(buffer);
        Out { data: self.real(buffer), total, len, life: std::marker::PhantomData }
    }

    /// A buffer of indices to write.
    ///
    /// # Safety
    /// As [`Memory::write`].
    pub unsafe fn write_indices(&self, buffer: &Buffer) -> Out<'a, i32> {
        let (len, total) = Self::sizes(buffer);
        let Place::Arena(at) = buffer.place else { unreachable!("indices are written to the arena") };
        Out { data: self.indices.address().wrapping_add(at), total, len, life: std::marker::PhantomData }
    }
}
