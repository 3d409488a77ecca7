//! Device memory of the SIMT host machine: poisoned allocations between guard bands.
#![allow(unsafe_code)]

use super::super::Address;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of the guard band on either side of an allocation, and the alignment of allocations.
pub const GUARD_BYTES: usize = 256;
/// What guard bands hold.
const GUARD: u8 = 0xa5;
/// What fresh memory holds: NaN in floats, -1 in integers.
const POISON: u8 = 0xff;

/// One allocation: guard, memory, guard.
struct Block {
    what: String,
    bytes: usize,
    start: *mut u8,
    layout: Layout,
}

impl Block {
    /// Where the memory between the guards begins.
    fn base(&self) -> *mut u8 {
        self.start.wrapping_add(GUARD_BYTES)
    }

    /// How many bytes before or behind the memory the first change of a guard band lies, in words.
    fn overrun(&self) -> Option<String> {
        // SAFETY: both bands lie in the allocation, which lives as long as the block.
        let (before, behind) = unsafe {
            let behind = self.base().wrapping_add(self.bytes);
            (std::slice::from_raw_parts(self.start, GUARD_BYTES), std::slice::from_raw_parts(behind, GUARD_BYTES))
        };
        let changed = |b: &u8| *b != GUARD;
        let what = if let Some(i) = before.iter().rposition(changed) {
            format!("{} bytes before", GUARD_BYTES - i)
        } else {
            format!("{} bytes behind the end of", behind.iter().position(changed)?)
        };
        Some(format!("something was written {what} the {} bytes of \"{}\"", self.bytes, self.what))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout and freed nowhere else.
        unsafe { dealloc(self.start, self.layout) }
    }
}

/// All allocations, by address.
#[derive(Default)]
pub struct Memory {
    blocks: BTreeMap<u64, Block>,
}

impl Memory {
    /// Memory of `bytes` bytes, aligned to [`GUARD_BYTES`] and poisoned. `None` when there is not enough.
    pub fn allocate(&mut self, bytes: usize, what: &str) -> Option<Address> {
        let layout = Layout::from_size_align(bytes.checked_add(2 * GUARD_BYTES)?, GUARD_BYTES).ok()?;
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            return None;
        }
        let block = Block { what: what.to_string(), bytes, start, layout };
        // SAFETY: the layout holds the guards and the bytes between them.
        unsafe {
            start.write_bytes(GUARD, layout.size());
            block.base().write_bytes(POISON, bytes);
        }
        let at = block.base().expose_provenance() as u64;
        self.blocks.insert(at, block);
        Some(Address(at))
    }

    /// Frees an allocation; false when there is none at this address.
    pub fn free(&mut self, at: Address) -> bool {
        self.blocks.remove(&at.0).is_some()
    }

    /// The bytes `at..at + bytes` as a pointer; `None` unless they lie in one allocation.
    pub fn range(&self, at: Address, bytes: usize) -> Option<*mut u8> {
        let (base, block) = self.blocks.range(..=at.0).next_back()?;
        let Range { start, end } = usize::try_from(at.0 - base).ok().and_then(|s| Some(s..s.checked_add(bytes)?))?;
        (end <= block.bytes).then(|| block.base().wrapping_add(start))
    }

    /// The first fault that the guard bands show, in words, with the name of its allocation.
    pub fn fault(&self) -> Option<String> {
        self.blocks.values().find_map(Block::overrun)
    }
}
