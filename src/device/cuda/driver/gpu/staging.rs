//! Copies between host and card through page-locked memory.
//!
//! Uploads go through a ring: each piece lies there until the card has fetched it, and the host goes on at once.
//! [`Ring`] keeps the books and needs no card.

#![allow(unsafe_code)]

use super::handles::{Call, Mark, Pinned, Queue, check};
use crate::device::cuda::driver::Address;
use cudarc::driver::sys;
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of the ring for uploads.
const RING: usize = 32 << 20;

/// The most bytes of one piece; the ring holds several, so that copying into it and out of it overlap.
const PIECE: usize = RING / 8;

/// The most pieces in the ring at a time; each has an event.
const PIECES: usize = 64;

/// Bytes of each half of the memory for downloads.
const HALF: usize = 4 << 20;

/// Pieces start at multiples of this, in bytes.
const ALIGNMENT: usize = 256;

/// Where a piece lies and which event tells that it may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    start: usize,
    event: usize,
}

/// What to do before a piece can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Nothing: here is room.
    Write(Place),
    /// Wait for this event, then retire the oldest piece.
    Wait(usize),
}

/// Which bytes of a ring hold pieces that the card may not have fetched yet. Pieces retire in the order they came.
#[derive(Debug)]
struct Ring {
    bytes: usize,
    events: usize,
    /// Start and occupied bytes of each piece, oldest first. None is empty, so start and end of all differ unless full.
    pieces: VecDeque<(usize, usize)>,
    /// Event of the oldest piece; the others have those that follow.
    oldest_event: usize,
}

impl Ring {
    fn new(bytes: usize, events: usize) -> Self {
        Ring { bytes, events, pieces: VecDeque::with_capacity(events), oldest_event: 0 }
    }

    /// Room for `len` bytes, at least 1 and at most the ring's.
    fn next(&self, len: usize) -> Next {
        let len = len.next_multiple_of(ALIGNMENT);
        let place = |start| Next::Write(Place { start, event: (self.oldest_event + self.pieces.len()) % self.events });
        let (Some(&(tail, _)), Some(&(start, occupied))) = (self.pieces.front(), self.pieces.back()) else {
            return place(0);
        };
        let head = start + occupied;
        if self.pieces.len() == self.events {
            Next::Wait(self.oldest_event)
        } else if head > tail && self.bytes - head >= len {
            place(head)
        } else if head > tail && tail >= len {
            place(0)
        } else if head < tail && tail - head >= len {
            place(head)
        } else {
            Next::Wait(self.oldest_event)
        }
    }

    /// A piece of `len` bytes has been written where [`Ring::next`] said.
    fn keep(&mut self, place: Place, len: usize) {
        self.pieces.push_back((place.start, len.next_multiple_of(ALIGNMENT)));
    }

    /// The event of the oldest piece.
    fn oldest(&self) -> Option<usize> {
        (!self.pieces.is_empty()).then_some(self.oldest_event)
    }

    /// The oldest piece has been fetched.
    fn retire(&mut self) {
        if self.pieces.pop_front().is_some() {
            self.oldest_event = (self.oldest_event + 1) % self.events;
        }
    }
}

/// Host to card.
pub(super) struct Uploads {
    pinned: Pinned,
    marks: Vec<Mark>,
    ring: Ring,
}

impl Uploads {
    pub fn new() -> Call<Self> {
        let marks = (0..PIECES).map(|_| Mark::untimed()).collect::<Call<_>>()?;
        Ok(Uploads { pinned: Pinned::new(RING)?, marks, ring: Ring::new(RING, PIECES) })
    }

    /// Queues a copy of `from` to the card's address `to`; `from` is free as soon as this returns.
    pub fn write(&mut self, queue: &Queue, to: u64, from: &[u8]) -> Call<()> {
        let mut at = to;
        for piece in from.chunks(PIECE) {
            let place = self.room(piece.len())?;
            // SAFETY: the ring gives room only where every copy has been waited for.
            unsafe { self.pinned.slice_mut(place.start, piece.len()) }.copy_from_slice(piece);
            let source = self.pinned.as_ptr().wrapping_byte_add(place.start);
            // SAFETY: `source` stays as it is until the event is done, which `room` waits for; the address is the
            // caller's, who allocated it.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(at, source, piece.len(), queue.0) };
            let queued = check(code, format_args!("copying {} bytes to the card", piece.len()));
            if let Err(failure) = queued.and_then(|()| self.marks[place.event].record(queue)) {
                // No event stands for this copy: without waiting here its bytes could be written over too early.
                let _ = queue.synchronize();
                return Err(failure);
            }
            self.ring.keep(place, piece.len());
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn room(&mut self, len: usize) -> Call<Place> {
        while let Some(event) = self.ring.oldest()
            && self.marks[event].is_done()?
        {
            self.ring.retire();
        }
        loop {
            match self.ring.next(len) {
                Next::Write(place) => return Ok(place),
                Next::Wait(event) => {
                    self.marks[event].wait()?;
                    self.ring.retire();
                }
            }
        }
    }
}

/// Card to host, through two halves in turn: one is copied from while the card fills the other.
pub(super) struct Downloads {
    pinned: Pinned,
    marks: [Mark; 2],
}

impl Downloads {
    pub fn new() -> Call<Self> {
        let marks = [Mark::untimed()?, Mark::untimed()?];
        Ok(Downloads { pinned: Pinned::new(2 * HALF)?, marks })
    }

    /// Copies the ranges `from` of the card, address and bytes of each, one behind the other, after all work queued on `queue`;
    /// `to`, as long as all of them, is filled when this returns.
    pub fn read(&mut self, queue: &Queue, from: &[(Address, usize)], to: &mut [u8]) -> Call<()> {
        let done = self.pieces(queue, from, to);
        if done.is_err() {
            // The next download must not meet a copy that is still under way.
            let _ = queue.synchronize();
        }
        done
    }

    fn pieces(&mut self, queue: &Queue, from: &[(Address, usize)], to: &mut [u8]) -> Call<()> {
        let total = to.len();
        for (i, piece) in to.chunks_mut(HALF).enumerate() {
            if i == 0 {
                self.queue(queue, from, 0, piece.len())?;
            }
            let after = (i + 1) * HALF;
            if after < total {
                self.queue(queue, from, i + 1, HALF.min(total - after))?;
            }
            self.marks[i % 2].wait()?;
            // SAFETY: the copy into this half is done, and the next into it is queued only after the lines below.
            piece.copy_from_slice(unsafe { self.pinned.slice_mut(i % 2 * HALF, piece.len()) });
        }
        Ok(())
    }

    /// Queues the copies that make piece `i`, `len` bytes, in its half.
    fn queue(&mut self, queue: &Queue, from: &[(Address, usize)], i: usize, len: usize) -> Call<()> {
        for (at, place) in within(from, i * HALF..i * HALF + len) {
            // SAFETY: no copy into this half is under way; the slice is only asked for its address.
            let part = unsafe { self.pinned.slice_mut(i % 2 * HALF + place.start, place.len()) }.as_mut_ptr();
            // SAFETY: the half is left alone until its event is done; the address is the caller's, who allocated it.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(part.cast(), at.0, place.len(), queue.0) };
            check(code, format_args!("copying {} bytes from the card", place.len()))?;
        }
        self.marks[i % 2].record(queue)
    }
}

/// What of `ranges`, laid one behind the other, lies within `piece`: where on the card, and where within the piece.
fn within(ranges: &[(Address, usize)], piece: Range<usize>) -> impl Iterator<Item = (Address, Range<usize>)> {
    let starts = ranges.iter().scan(0, |end, (_, bytes)| {
        let start = *end;
        *end += bytes;
        Some(start)
    });
    ranges.iter().zip(starts).filter_map(move |((at, bytes), start)| {
        let (low, high) = (piece.start.max(start), piece.end.min(start + bytes));
        (low < high).then(|| (at.offset(low - start), low - piece.start..high - piece.start))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random uploads against a model that knows of each byte whether it may be written.
    #[test]
    fn no_byte_is_given_out_before_its_piece_has_retired() {
        const BYTES: usize = 16 * ALIGNMENT;
        const EVENTS: usize = 5;
        let mut random = 1u64;
        let mut below = |n: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % n
        };
        let mut ring = Ring::new(BYTES, EVENTS);
        let mut live: VecDeque<(Place, usize)> = VecDeque::new();
        let (mut waits, mut wraps, mut full) = (0, 0, 0);
        for _ in 0..20_000 {
            let most = if below(10) == 0 { BYTES } else { 4 * ALIGNMENT };
            let len = 1 + below(most);
            loop {
                match ring.next(len) {
                    Next::Write(place) => {
                        assert_eq!(place.start % ALIGNMENT, 0);
                        assert!(place.start + len <= BYTES);
                        for (other, other_len) in &live {
                            let apart = other.start + other_len <= place.start || place.start + len <= other.start;
                            assert!(apart, "{place:?} {len} {other:?} {other_len}");
                            assert_ne!(other.event, place.event);
                        }
                        wraps += usize::from(live.back().is_some_and(|(last, _)| last.start > place.start));
                        ring.keep(place, len);
                        live.push_back((place, len));
                        break;
                    }
                    Next::Wait(event) => {
                        let (oldest, _) = live.pop_front().expect("a wait is for a piece");
                        assert_eq!(oldest.event, event);
                        ring.retire();
                        waits += 1;
                    }
                }
            }
            full += usize::from(live.len() == EVENTS);
            // Sometimes the card is faster than the host.
            for _ in 0..below(3) {
                assert_eq!(ring.oldest(), live.front().map(|(place, _)| place.event));
                live.pop_front();
                ring.retire();
            }
        }
        assert!(waits > 100 && wraps > 100 && full > 100, "{waits} waits, {wraps} wraps, {full} times full");
    }

    #[test]
    fn pieces_of_ranges_cover_each_byte_once() {
        // Ranges that are empty, within a piece, across a border and across several.
        let lengths = [3, 0, 1, 4, 9, 1, 0, 2];
        let ranges: Vec<_> = lengths.iter().enumerate().map(|(i, n)| (Address(1000 * i as u64), *n)).collect();
        let expected: Vec<u64> = ranges.iter().flat_map(|(at, n)| (0..*n as u64).map(|byte| at.0 + byte)).collect();
        for size in 1..=expected.len() + 1 {
            let mut seen = vec![u64::MAX; expected.len()];
            for start in (0..expected.len()).step_by(size) {
                let piece = start..(start + size).min(expected.len());
                for (at, place) in within(&ranges, piece) {
                    for (byte, i) in place.enumerate() {
                        assert_eq!(seen[start + i], u64::MAX, "twice");
                        seen[start + i] = at.0 + byte as u64;
                    }
                }
            }
            assert_eq!(seen, expected, "pieces of {size} bytes");
        }
    }

    #[test]
    fn the_whole_ring_can_be_one_piece_and_is_full_then() {
        let mut ring = Ring::new(1024, 4);
        assert_eq!(ring.oldest(), None);
        let Next::Write(place) = ring.next(1024) else { panic!("an empty ring has room") };
        ring.keep(place, 1024);
        assert_eq!(ring.next(1), Next::Wait(0));
        ring.retire();
        assert_eq!(ring.next(1), Next::Write(Place { start: 0, event: 1 }));
        // A piece at the end, one wrapped to the start, and both meet: full although neither fills the ring.
        ring.keep(Place { start: 0, event: 1 }, 512);
        let Next::Write(second) = ring.next(512) else { panic!("half of it is free") };
        assert_eq!(second, Place { start: 512, event: 2 });
        ring.keep(second, 512);
        ring.retire();
        let Next::Write(third) = ring.next(500) else { panic!("the first half is free again") };
        assert_eq!(third, Place { start: 0, event: 3 });
        ring.keep(third, 500);
        assert_eq!(ring.next(1), Next::Wait(2));
    }

    #[test]
    fn pieces_fit_their_memory() {
        const { assert!(PIECE <= RING && RING.is_multiple_of(ALIGNMENT) && HALF.is_multiple_of(ALIGNMENT) && PIECES > 1) }
    }
}
