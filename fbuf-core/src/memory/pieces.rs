//! Where pieces of a mapping lie.
#![allow(unsafe_code)]

use std::{ops::Range, ptr::NonNull};

use super::Map;

/// Addresses of pieces of a mapping.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// Where the next lies, or would lie.
    pub(super) next: *mut u8,
    pub(super) stride: usize,
    pub(super) numbers: Range<u32>,
}

// SAFETY: addresses, which are numbers; the code that follows them says why it may.
unsafe impl Send for Pieces {}
// SAFETY: addresses, which are numbers; the code that follows them says why it may.
unsafe impl Sync for Pieces {}

impl Pieces {
    /// None, where number `next` would be the next.
    #[must_use]
    pub(crate) const fn none(next: u32) -> Self {
        Self { next: std::ptr::null_mut(), stride: 0, numbers: next..next }
    }

    /// The beginning of a mapping, as number `number`.
    #[must_use]
    pub(crate) fn one(map: &Map, number: u32) -> Self {
        Self { next: map.beginning(), stride: 0, numbers: number..number + 1 }
    }

    /// The same pieces, with other numbers: the next is number `first`.
    #[must_use]
    pub(crate) fn numbered_from(self, first: u32) -> Self {
        Self { numbers: first..first + (self.numbers.end - self.numbers.start), ..self }
    }

    /// The number of the next, or of that which would come after the last.
    #[must_use]
    #[inline]
    pub(crate) fn next_number(&self) -> u32 {
        self.numbers.start
    }

    /// How many are left.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether none is left.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.numbers.start == self.numbers.end
    }
}

impl Iterator for Pieces {
    type Item = (u32, Address);

    #[inline]
    fn next(&mut self) -> Option<(u32, Address)> {
        if self.is_empty() {
            return None;
        }
        let number = self.numbers.start;
        self.numbers.start += 1;
        let address = self.next;
        ask_for_eighth(address, self.stride);
        self.next = address.wrapping_add(self.stride);
        // SAFETY: all pieces with these numbers lie inside the mapping (`Map::pieces`), which does not
        // begin at address zero.
        Some((number, Address(unsafe { NonNull::new_unchecked(address) })))
    }
}

/// Has the first cache line of the eighth piece behind one brought here to be written, without waiting for
/// it: until it is needed, several short messages are written. Lines that somebody else has read last would
/// otherwise be waited for one by one, since stores leave a core in order.
#[inline(always)]
#[expect(clippy::pointers_in_nomem_asm_block, reason = "a hint reads and writes nothing")]
fn ask_for_eighth(piece: *mut u8, stride: usize) {
    // SAFETY: a hint, which neither reads nor writes anything, and never traps, whatever the address.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        std::arch::asm!("prefetchw [{} + 8 * {}]", in(reg) piece, in(reg) stride, options(nostack, nomem, preserves_flags));
    }
    // SAFETY: a hint, which neither reads nor writes anything, and never traps, whatever the address.
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{}, {}, lsl #3]", in(reg) piece, in(reg) stride, options(nostack, nomem, preserves_flags));
    }
    #[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = (piece, stride);
}

/// Where something lies in a mapping. Who may follow it is settled where that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address(NonNull<u8>);

// SAFETY: a number; the code that follows it says why it may.
unsafe impl Send for Address {}
// SAFETY: a number; the code that follows it says why it may.
unsafe impl Sync for Address {}

impl Address {
    /// The pointer.
    #[inline]
    pub(crate) fn pointer(self) -> NonNull<u8> {
        self.0
    }
}
