//! What stands in a lane: entries, each of which is a message, or a gap before one. If messages of a link may have tags or times of
//! sending, its lane is wide: each entry has a second cell right behind the first.
//!
//! ```text
//!            63             24 23  20 19      0     63 62   61      31 30      0
//!  message  | lap mark        | 0    | slot    |   | 0|more| offset   | length  |
//!  gap      | lap mark        | 1    | 0       |   | how many, not zero         |
//!  beside   | tag, zero if it has none         |   | time, zero if it has none  |
//! ```

#[cfg(not(loom))]
use zerocopy::FromBytes;

pub use crate::slot::LaneFormat;

use crate::{
    slot::SlotId,
    sync::{AtomicU64, read_only::ReadOnly},
};

/// Two words: an entry of a narrow lane, or a half of one of a wide lane.
#[cfg_attr(not(loom), derive(FromBytes))]
#[repr(C)]
#[derive(Debug)]
pub struct LaneCell {
    /// `position << 24 | kind << 20 | slot`, stored last; in a second cell the tag.
    pub(super) first: AtomicU64,
    /// The [`Body`] of a message, or how many were left out; in a second cell the time.
    pub(super) second: AtomicU64,
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<LaneCell>() == 16 && align_of::<LaneCell>() == 8);
    assert!(std::mem::offset_of!(LaneCell, first) == 0 && std::mem::offset_of!(LaneCell, second) == 8);
};

#[cfg(all(any(test, fuzzing), not(loom)))]
impl LaneCell {
    /// Writes any words, as a hostile peer would.
    pub fn scribble(&self, first: u64, second: u64) {
        use crate::sync::Ordering;
        self.first.store(first, Ordering::Relaxed);
        self.second.store(second, Ordering::Relaxed);
    }
}

impl<'a> ReadOnly<'a, LaneCell> {
    #[inline]
    pub(super) fn first(self) -> ReadOnly<'a, AtomicU64> {
        self.part(|cell| &cell.first)
    }

    #[inline]
    pub(super) fn second(self) -> ReadOnly<'a, AtomicU64> {
        self.part(|cell| &cell.second)
    }
}

/// How many bits of a head word name a slot, and how many say what kind of entry it is.
const SLOT_BITS: u32 = 20;
const KIND_BITS: u32 = 4;
const _: () = assert!(crate::limits::MAX_SLOTS <= 1 << SLOT_BITS);
/// How many bits of a body are the length of a message, and how many its offset.
const LENGTH_BITS: u32 = 31;
const _: () = assert!(crate::limits::MAX_SLOT_BYTES < 1 << LENGTH_BITS);
const MORE: u64 = 1 << (2 * LENGTH_BITS);

/// The kind of an entry that is a message.
pub(super) const MESSAGE: u64 = 0;
/// That of an entry which says how many messages were left out before the one behind it.
pub const GAP: u64 = 1;
/// That of one which says that the slot is one that the sender has received: of no link yet.
pub const ORIGIN: u64 = 2;

/// The head word of an entry of some kind at a position, but for the slot. Its mark, the lower 40 bits of
/// the position, does not come again for 2⁴⁰ entries.
#[inline]
pub(super) fn head_of(position: u64, kind: u64) -> u64 {
    (position << KIND_BITS | kind) << SLOT_BITS
}

/// The mark in a head word.
#[inline]
pub(super) fn mark(head: u64) -> u64 {
    head >> (SLOT_BITS + KIND_BITS)
}

/// The kind in a head word.
pub(super) fn kind(head: u64) -> u64 {
    head >> SLOT_BITS & ((1 << KIND_BITS) - 1)
}

/// The slot in a head word.
pub(super) fn slot(head: u64) -> u32 {
    (head & ((1 << SLOT_BITS) - 1)) as u32
}

/// Where the bytes of a message are in its slot, and whether it ends with them: still to be checked against the size of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body(u64);

impl Body {
    /// So many bytes from this offset on, which lie in a slot.
    #[must_use]
    #[inline]
    pub const fn new(offset: u32, length: u32) -> Self {
        Self((offset as u64) << LENGTH_BITS | length as u64)
    }

    /// The same, of a message that goes on in the next entry.
    #[must_use]
    pub const fn with_more(self) -> Self {
        Self(self.0 | MORE)
    }

    pub(crate) const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// As it stands in an entry. Less than the size of a slot, plus one, only if all of it is a length that fits.
    #[must_use]
    #[inline]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// How many bytes.
    #[must_use]
    pub const fn length(self) -> u32 {
        (self.0 & ((1 << LENGTH_BITS) - 1)) as u32
    }

    /// How many bytes of the slot come before them.
    #[must_use]
    pub const fn offset(self) -> u32 {
        (self.0 >> LENGTH_BITS & ((1 << LENGTH_BITS) - 1)) as u32
    }

    /// Whether the message goes on in the next entry.
    #[must_use]
    pub const fn has_more(self) -> bool {
        self.0 & MORE != 0
    }

    /// Whether it is a whole message inside of a slot of so many bytes.
    #[must_use]
    pub const fn fits(self, slot_bytes: u32) -> bool {
        self.0 < MORE && self.offset() as u64 + self.length() as u64 <= slot_bytes as u64
    }
}

impl From<u32> for Body {
    fn from(length: u32) -> Self {
        Self::new(0, length)
    }
}

/// A message as it stands in a lane, with what goes with it: still to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// How many messages were left out before it.
    pub gap: u64,
    /// The number of its slot.
    pub slot: u32,
    /// Where its bytes are there.
    pub body: Body,
    /// Its tag, zero if it has none. Always zero in a narrow lane, as the time is.
    pub tag: u64,
    /// When it was sent, zero if that is not said.
    pub time: u64,
}

impl Note {
    /// A message with which nothing goes.
    #[must_use]
    pub fn plain(slot: SlotId, body: Body) -> Self {
        Self { gap: 0, slot: slot.number(), body, tag: 0, time: 0 }
    }

    /// How many entries it takes.
    #[must_use]
    pub fn entries(&self) -> u64 {
        1 + u64::from(self.gap != 0)
    }
}

/// How many cells the lane has that joins a sender with `slots` slots to a receiver.
///
/// A slot that is lent has at most one message in the lane, and a message at most one gap before it.
/// A power of two, so that a position is masked, not divided.
#[must_use]
pub const fn capacity_for(slots: u32, format: LaneFormat) -> usize {
    (slots as usize * (1 + format.gaps as usize) * format.width() as usize).next_power_of_two()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::limits::{MAX_SLOT_BYTES, MAX_SLOTS};

    #[test]
    fn a_body_keeps_what_it_is_made_of_and_fits_only_inside_of_a_slot() {
        for (offset, length) in [(0, 0), (0, MAX_SLOT_BYTES), (MAX_SLOT_BYTES, 0), (7, 9)] {
            let body = Body::new(offset, length);
            assert_eq!((body.offset(), body.length(), body.has_more()), (offset, length, false));
            let more = body.with_more();
            assert_eq!((more.offset(), more.length(), more.has_more()), (offset, length, true));
            assert!(body.fits(offset + length) && !more.fits(MAX_SLOT_BYTES));
            assert!(offset + length == 0 || !body.fits(offset + length - 1));
            assert!(!Body::from_word(body.word() | 1 << 63).fits(MAX_SLOT_BYTES), "a bit that means nothing");
            // As a reader compares it that looks for messages at the beginning of a slot.
            assert_eq!(body.word() <= MAX_SLOT_BYTES.into(), offset == 0);
        }
    }

    #[test]
    fn capacity_holds_a_message_and_a_gap_for_each_slot() {
        let tagged = LaneFormat { tags: true, ..LaneFormat::PLAIN };
        let all = LaneFormat { gaps: true, tags: true, times: true };
        for slots in [1, 2, 3, 64, 1000, MAX_SLOTS] {
            for (format, cells) in [(LaneFormat::PLAIN, 1), (LaneFormat::WITH_GAPS, 2), (tagged, 2), (all, 4)] {
                let capacity = capacity_for(slots, format);
                assert!(capacity >= cells * slots as usize && capacity.is_power_of_two());
            }
        }
    }
}
