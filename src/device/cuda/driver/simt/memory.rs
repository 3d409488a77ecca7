//! Device memory of the SIMT host machine: poisoned allocations between guard bands.
#![allow(unsafe_code)]

use super::super::Address;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of the guard band on either side of an allocation, and the alignment of allocations.
pub const GUARD_BYTES: usize = 256;
/// What guard bands hold, by address modulo 4: a NaN too, but one that no computation gives.
const GUARD: [u8; 4] = 0x7fe5_a5a5u32.to_ne_bytes();
/// A guard band at any address modulo 4.
const BAND: [u8; GUARD_BYTES + 4] = {
    let mut band = [0; GUARD_BYTES + 4];
    let mut i = 0;
    while i < band.len() {
        band[i] = GUARD[i % 4];
        i += 1;
    }
    band
};
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

    /// The guard bands, each with the offset of its first byte from the start.
    fn guards(&self) -> [(usize, &[u8]); 2] {
        [0, GUARD_BYTES + self.bytes].map(|from| {
            // SAFETY: both bands lie in the allocation, which lives as long as the block.
            (from, unsafe { std::slice::from_raw_parts(self.start.wrapping_add(from), GUARD_BYTES) })
        })
    }

    /// What was written into a guard band, in words.
    fn overrun(&self) -> Option<String> {
        let [before, behind] = self.guards().map(|(from, guard)| {
            let want = &BAND[from % 4..][..GUARD_BYTES];
            if guard == want {
                return None;
            }
            let changed = |i: &usize| guard[*i] != want[*i];
            Some(((0..GUARD_BYTES).find(changed)?, (0..GUARD_BYTES).rfind(changed)?))
        });
        let place = match (before, behind) {
            (Some((_, last)), _) => format!("{} bytes before", GUARD_BYTES - last),
            (None, Some((first, _))) => format!("{first} bytes behind the end of"),
            (None, None) => return None,
        };
        Some(format!("something was written {place} the {} bytes of \"{}\"", self.bytes, self.what))
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
            for from in [0, GUARD_BYTES + bytes] {
                start.add(from).copy_from_nonoverlapping(BAND[from % 4..].as_ptr(), GUARD_BYTES);
            }
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
