//! Names for memory: which slot, how slots lie in a segment, and what there is in a lane.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use zerocopy::FromZeros;

use crate::limits::{
    MAX_ALIGNMENT, MAX_HEADER_BYTES, MAX_LEASED, MAX_ONE_SHOTS, MAX_SLOT_BYTES, MAX_SLOTS, SLOT_ALIGNMENT,
};

/// A slot of a sender, by its number among all slots of that sender: a name, and no right to anything. The right to
/// write a slot is its [`Fbuf`](crate::send::fbuf::Fbuf), the right to read it a [`Received`](crate::receive::received::Received).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotId(u32);

impl SlotId {
    /// The slot with this number, be there one or not.
    #[must_use]
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// Its number.
    #[must_use]
    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// Its number as an entry of a lane names it.
    #[inline]
    pub(crate) fn number(self) -> u32 {
        self.0
    }
}

/// Which message used a slot last, as the ledger of a sender and the boards of its receivers have it: its
/// sequence number, plus one.
///
/// One number for all links of a sender: a slot that is sent is entered once, however many receivers
/// there are, and each hands back what that number names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, FromZeros)]
pub struct Mark(u64);

impl Mark {
    /// No message: so is the memory of a fresh board.
    pub const NONE: Self = Self(0);
    /// In a ledger: an fbuf, or free and about to become one. Never the mark of a message.
    pub(crate) const OUT: Self = Self(u64::MAX);

    /// Of the message with this number, which is less than [`MAX_SEQUENCE`](crate::limits::MAX_SEQUENCE).
    #[must_use]
    #[inline]
    pub const fn of(sequence: u64) -> Self {
        Self(sequence + 1)
    }

    /// The number of the message.
    #[must_use]
    #[inline]
    pub const fn sequence(self) -> u64 {
        self.0.wrapping_sub(1)
    }

    /// Of the message behind this one.
    #[must_use]
    #[inline]
    pub(crate) const fn following(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    /// Whether it is of a message before this one.
    #[must_use]
    #[inline]
    pub(crate) fn is_before(self, sequence: u64) -> bool {
        self.0 <= sequence
    }

    /// As it stands in shared memory.
    #[inline]
    pub(crate) const fn word(self) -> u64 {
        self.0
    }

    /// The mark that a word is.
    #[inline]
    pub(crate) const fn from_word(word: u64) -> Self {
        Self(word)
    }
}

/// How big a sender's slots are, how they lie, and how many it may ever have. Checked: one that exists is allowed.
///
/// A slot begins at a multiple of the [alignment](Self::alignment) from the start of its segment, which begins at a page.
/// Its payload comes first, its [header](Self::header_bytes) behind that, at a multiple of [`SLOT_ALIGNMENT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    slot_bytes: u32,
    max_slots: u32,
    header_bytes: u32,
    alignment: u32,
}

/// A [`Geometry`] as it is told to another process, still to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeometryTerms {
    /// [`Geometry::slot_bytes`]
    pub slot_bytes: u64,
    /// [`Geometry::max_slots`]
    pub max_slots: u64,
    /// [`Geometry::header_bytes`]
    pub header_bytes: u64,
    /// [`Geometry::alignment`]
    pub alignment: u64,
}

/// Slots of a size or number that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// No bytes, or too many.
    #[error("no slot can have {bytes} bytes: 1 to {MAX_SLOT_BYTES} are possible")]
    SlotBytes {
        /// Bytes of a slot that were asked for.
        bytes: u64,
    },
    /// No slots, or too many.
    #[error("no sender can have {slots} slots: 1 to {MAX_SLOTS} are possible")]
    Slots {
        /// How many were asked for.
        slots: u64,
    },
    /// A header that is larger than one can be.
    #[error("no user header can have {bytes} bytes: 0 to {MAX_HEADER_BYTES} are possible")]
    HeaderBytes {
        /// Bytes that were asked for.
        bytes: u64,
    },
    /// Slots that cannot begin there.
    #[error(
        "slots cannot begin at multiples of {bytes} bytes: powers of two from {SLOT_ALIGNMENT} to the size of a page are possible"
    )]
    Alignment {
        /// Bytes that were asked for.
        bytes: u64,
    },
    /// More buffers that are sent once than can be under way.
    #[error("no sender of one-shots can have {slots} slots: 1 to {MAX_ONE_SHOTS} are possible")]
    OneShots {
        /// How many were asked for.
        slots: u32,
    },
    /// More slots that are leased than can be.
    #[error("no sender of leased messages can have {slots} slots: 1 to {MAX_LEASED} are possible")]
    Leased {
        /// How many were asked for.
        slots: u32,
    },
    /// More slots at the start than at the end.
    #[error("no sender can start with {start} slots and grow to {limit}: the limit cannot be less than the start")]
    Growth {
        /// To start with.
        start: u32,
        /// To grow to.
        limit: u32,
    },
}

impl GeometryTerms {
    /// Slots without headers, at multiples of [`SLOT_ALIGNMENT`].
    #[must_use]
    pub const fn new(slot_bytes: u64, max_slots: u64) -> Self {
        Self { slot_bytes, max_slots, header_bytes: 0, alignment: SLOT_ALIGNMENT }
    }
}

impl Geometry {
    /// Slots of `slot_bytes` bytes, at most `max_slots` of them, without headers, at multiples of [`SLOT_ALIGNMENT`].
    ///
    /// # Errors
    /// [`GeometryError`] for zero, and beyond [`MAX_SLOT_BYTES`] and [`MAX_SLOTS`].
    pub fn new(slot_bytes: u64, max_slots: u64) -> Result<Self, GeometryError> {
        GeometryTerms::new(slot_bytes, max_slots).try_into()
    }

    /// The size of a slot in bytes.
    #[must_use]
    pub fn slot_bytes(self) -> u32 {
        self.slot_bytes
    }

    /// The most slots there may be, over all segments.
    #[must_use]
    pub fn max_slots(self) -> u32 {
        self.max_slots
    }

    /// The size of the user header of each slot in bytes: none if there is none.
    #[must_use]
    pub fn header_bytes(self) -> u32 {
        self.header_bytes
    }

    /// At multiples of how many bytes slots begin.
    #[must_use]
    pub fn alignment(self) -> u32 {
        self.alignment
    }

    /// From the start of a slot to its user header, in bytes.
    #[must_use]
    pub fn header_offset(self) -> u64 {
        u64::from(self.slot_bytes).next_multiple_of(SLOT_ALIGNMENT)
    }

    /// Where the user header is in a slot: nowhere, if it has no bytes.
    #[must_use]
    pub fn header(self) -> Range<usize> {
        match self.header_bytes {
            // There need be no memory behind the payload.
            0 => 0..0,
            _ => self.header_offset() as usize..self.cell_bytes() as usize,
        }
    }

    /// A slot with its user header, in bytes.
    #[must_use]
    pub fn cell_bytes(self) -> u64 {
        match self.header_bytes {
            0 => self.slot_bytes.into(),
            header_bytes => self.header_offset() + u64::from(header_bytes),
        }
    }

    /// From the start of a slot to the start of the next, in bytes.
    #[must_use]
    pub fn stride(self) -> u64 {
        self.cell_bytes().next_multiple_of(self.alignment.into())
    }

    /// The size of a segment with so many slots, in bytes: whole pages.
    #[must_use]
    pub fn segment_bytes(self, slots: u32) -> u64 {
        (self.stride() * u64::from(slots)).next_multiple_of(4096)
    }

    /// As it is told to another process.
    #[must_use]
    pub fn terms(self) -> GeometryTerms {
        GeometryTerms {
            slot_bytes: self.slot_bytes.into(),
            max_slots: self.max_slots.into(),
            header_bytes: self.header_bytes.into(),
            alignment: self.alignment.into(),
        }
    }
}

impl TryFrom<GeometryTerms> for Geometry {
    type Error = GeometryError;

    fn try_from(terms: GeometryTerms) -> Result<Self, GeometryError> {
        let checked = |value: u64, limit: u32| u32::try_from(value).ok().filter(|value| (1..=limit).contains(value));
        let GeometryTerms { slot_bytes, max_slots, header_bytes, alignment } = terms;
        let is_allowed = alignment.is_power_of_two() && (SLOT_ALIGNMENT..=MAX_ALIGNMENT).contains(&alignment);
        Ok(Self {
            slot_bytes: checked(slot_bytes, MAX_SLOT_BYTES).ok_or(GeometryError::SlotBytes { bytes: slot_bytes })?,
            max_slots: checked(max_slots, MAX_SLOTS).ok_or(GeometryError::Slots { slots: max_slots })?,
            header_bytes: match header_bytes {
                0..=MAX_HEADER_BYTES => header_bytes as u32,
                _ => return Err(GeometryError::HeaderBytes { bytes: header_bytes }),
            },
            alignment: if is_allowed {
                alignment as u32
            } else {
                return Err(GeometryError::Alignment { bytes: alignment });
            },
        })
    }
}

/// What there may be in the lane of a link but plain messages, as its sender says when the link is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneFormat {
    /// Gaps: messages may be left out.
    pub gaps: bool,
    /// Tags, which the sender's program sets.
    pub tags: bool,
    /// When messages were sent, in nanoseconds of CLOCK_MONOTONIC.
    pub times: bool,
}

impl LaneFormat {
    /// Nothing but messages.
    pub const PLAIN: Self = Self { gaps: false, tags: false, times: false };
    /// Messages and gaps.
    pub const WITH_GAPS: Self = Self { gaps: true, ..Self::PLAIN };

    /// How many cells an entry has: two, if there is something beside messages.
    #[must_use]
    pub const fn width(self) -> u64 {
        1 + (self.tags || self.times) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_geometries_are_named() {
        assert_eq!(Geometry::new(0, 1), Err(GeometryError::SlotBytes { bytes: 0 }));
        assert_eq!(Geometry::new(1 << 31, 1), Err(GeometryError::SlotBytes { bytes: 1 << 31 }));
        assert_eq!(Geometry::new(64, 0), Err(GeometryError::Slots { slots: 0 }));
        assert_eq!(Geometry::new(64, 1 << 33), Err(GeometryError::Slots { slots: 1 << 33 }));
        assert!(Geometry::new(MAX_SLOT_BYTES.into(), MAX_SLOTS.into()).is_ok());
        let like = |header_bytes, alignment| {
            Geometry::try_from(GeometryTerms { slot_bytes: 100, max_slots: 3, header_bytes, alignment })
        };
        assert_eq!(like(65, 64), Err(GeometryError::HeaderBytes { bytes: 65 }));
        for alignment in [0, 32, 96, 8192, u64::MAX] {
            assert_eq!(like(0, alignment), Err(GeometryError::Alignment { bytes: alignment }));
        }
    }

    #[test]
    fn a_header_lies_behind_the_payload_and_inside_of_the_stride() {
        let like = |slot_bytes, header_bytes, alignment| {
            Geometry::try_from(GeometryTerms { slot_bytes, max_slots: 3, header_bytes, alignment }).unwrap()
        };
        for (slot_bytes, header_bytes, alignment, offset, stride) in [
            (1, 0, 64, 64, 64),
            (64, 0, 64, 64, 64),
            (64, 1, 64, 64, 128),
            (100, 64, 64, 128, 192),
            (100, 64, 4096, 128, 4096),
            (4096, 0, 4096, 4096, 4096),
            (4096, 16, 4096, 4096, 8192),
            (MAX_SLOT_BYTES.into(), 64, 4096, u64::from(MAX_SLOT_BYTES), u64::from(MAX_SLOT_BYTES) + 4096),
        ] {
            let geometry = like(slot_bytes, header_bytes, alignment);
            assert_eq!((geometry.header_offset(), geometry.stride()), (offset, stride), "{geometry:?}");
            assert!(geometry.cell_bytes() <= geometry.stride() && geometry.segment_bytes(3).is_multiple_of(4096));
            assert_eq!(Geometry::try_from(geometry.terms()), Ok(geometry));
        }
    }
}
