//! Names for memory: which slot, which bytes of it, and how slots lie in a segment.

use crate::limits::{MAX_SLOT_BYTES, MAX_SLOTS, SLOT_ALIGNMENT};

/// A slot of a sender: the segment it lies in and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotId {
    /// Which segment.
    pub segment: u16,
    /// Which slot of it.
    pub slot: u32,
}

impl SlotId {
    /// As in an entry's head word; the low 16 bits are the entry's own.
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.slot) << 32 | u64::from(self.segment) << 16
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self { segment: (bits >> 16) as u16, slot: (bits >> 32) as u32 }
    }
}

/// Bytes of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Where they begin, in bytes from the start of the slot.
    pub offset: u32,
    /// How many they are.
    pub length: u32,
}

impl Span {
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.length) << 32 | u64::from(self.offset)
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self { offset: bits as u32, length: (bits >> 32) as u32 }
    }

    /// Whether all of it lies inside a slot of `slot_bytes`.
    #[must_use]
    #[inline]
    pub fn fits(self, slot_bytes: u32) -> bool {
        self.offset <= slot_bytes && self.length <= slot_bytes - self.offset
    }
}

/// How big a sender's slots are and how many it may ever have. Checked: one that exists is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    slot_bytes: u32,
    max_slots: u32,
}

/// Slots of a size or number that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// No bytes, or too many.
    #[error("a slot of {0} bytes was asked for: 1 to {MAX_SLOT_BYTES} are possible")]
    SlotBytes(u64),
    /// No slots, or too many.
    #[error("{0} slots were asked for: 1 to {MAX_SLOTS} are possible")]
    Slots(u64),
    /// More slots at the start than at the end.
    #[error(
        "{start} slots were asked for to start with, and growth to {limit}: the limit cannot be less than the start"
    )]
    Growth {
        /// To start with.
        start: u32,
        /// To grow to.
        limit: u32,
    },
}

impl Geometry {
    /// Slots of `slot_bytes` bytes, at most `max_slots` of them.
    ///
    /// # Errors
    /// [`GeometryError`] for zero, and beyond [`MAX_SLOT_BYTES`] and [`MAX_SLOTS`].
    pub fn new(slot_bytes: u64, max_slots: u64) -> Result<Self, GeometryError> {
        let checked = |value: u64, limit: u32| u32::try_from(value).ok().filter(|value| (1..=limit).contains(value));
        Ok(Self {
            slot_bytes: checked(slot_bytes, MAX_SLOT_BYTES).ok_or(GeometryError::SlotBytes(slot_bytes))?,
            max_slots: checked(max_slots, MAX_SLOTS).ok_or(GeometryError::Slots(max_slots))?,
        })
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

    /// From the start of a slot to the start of the next, in bytes.
    #[must_use]
    pub fn stride(self) -> u64 {
        u64::from(self.slot_bytes).next_multiple_of(SLOT_ALIGNMENT)
    }

    /// The size of a segment with so many slots, in bytes: whole pages.
    #[must_use]
    pub fn segment_bytes(self, slots: u32) -> u64 {
        (self.stride() * u64::from(slots)).next_multiple_of(4096)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn impossible_geometries_are_named() {
        assert_eq!(Geometry::new(0, 1), Err(GeometryError::SlotBytes(0)));
        assert_eq!(Geometry::new(1 << 31, 1), Err(GeometryError::SlotBytes(1 << 31)));
        assert_eq!(Geometry::new(64, 0), Err(GeometryError::Slots(0)));
        assert_eq!(Geometry::new(64, 1 << 33), Err(GeometryError::Slots(1 << 33)));
        assert!(Geometry::new(MAX_SLOT_BYTES.into(), MAX_SLOTS.into()).is_ok());
    }

    proptest! {
        #[test]
        fn names_survive_their_encoding(segment: u16, slot: u32, offset: u32, length: u32, low: u16) {
            let id = SlotId { segment, slot };
            prop_assert_eq!(SlotId::from_bits(id.to_bits() | u64::from(low)), id);
            let span = Span { offset, length };
            prop_assert_eq!(Span::from_bits(span.to_bits()), span);
        }

        #[test]
        fn a_span_fits_exactly_when_its_end_does(offset: u32, length: u32, slot_bytes in 1..=MAX_SLOT_BYTES) {
            let fits = u64::from(offset) + u64::from(length) <= u64::from(slot_bytes);
            prop_assert_eq!(Span { offset, length }.fits(slot_bytes), fits);
        }
    }
}
