//! Where the bytes of a pool's slots are.

pub(crate) mod leased;
pub(crate) mod one_shot;

use std::{ops::Range, os::fd::OwnedFd, sync::Arc};

use super::storage::one_shot::OneShotBuffers;
use crate::{
    memory::{Map, MemoryError, Pieces},
    send::{guard::Guard, storage::leased::LeasedSlots},
    slot::{Geometry, SlotId},
    socket::{link_message::NewSegment, wire::Descriptor},
};

#[derive(Debug)]
pub(super) enum Storage {
    /// In segments.
    Segments(Vec<Segment>),
    /// Each in memory of its own, which is sent once, and given away.
    OneShots(OneShotBuffers),
    /// Each in memory of its own, which is read under leases, and comes back.
    Leased(LeasedSlots),
}

/// A memfd with many slots.
#[derive(Debug)]
pub(super) struct Segment {
    map: Map,
    descriptor: Arc<OwnedFd>,
    pub slots: u32,
    /// The number of its first slot.
    pub first: u32,
}

impl Storage {
    /// How many slots there are.
    pub(super) fn slots(&self) -> u32 {
        match self {
            Self::Segments(segments) => segments.last().map_or(0, |segment| segment.first + segment.slots),
            Self::OneShots(buffers) => buffers.slots(),
            Self::Leased(slots) => slots.len(),
        }
    }

    /// Adds slots, if that is possible.
    pub(super) fn add(&mut self, geometry: Geometry, slots: u32, guard: Option<&Guard>) -> Result<(), MemoryError> {
        let first = self.slots();
        match self {
            Self::Segments(segments) => {
                let (map, descriptor) = Map::create("fbuf-segment", geometry.segment_bytes(slots))?;
                if let Some(guard) = guard {
                    guard.add_segment(&map, first);
                }
                segments.push(Segment { map, descriptor: Arc::new(descriptor), slots, first });
            }
            Self::OneShots(buffers) => buffers.add(slots),
            Self::Leased(_) => {}
        }
        Ok(())
    }

    pub(super) fn segments(&self) -> &[Segment] {
        if let Self::Segments(segments) = self { segments } else { &[] }
    }

    /// The segment that a slot is in.
    pub(super) fn segment_of(&self, slot: SlotId) -> Option<&Segment> {
        self.segments().iter().rfind(|segment| segment.first <= slot.number())
    }

    /// Whether a slot that receivers have handed back can be had now.
    pub(super) fn is_available(&self, slot: SlotId) -> bool {
        if let Self::Leased(slots) = self { slots.is_available(slot) } else { true }
    }

    /// The bytes of a slot that is free; none if they cannot be had now.
    pub(super) fn draft(&mut self, geometry: Geometry, slot: SlotId) -> Result<Option<Pieces>, MemoryError> {
        match self {
            Self::Segments(_) => Ok(self.segment_of(slot).map(|segment| segment.pieces(geometry, slot, 1))),
            Self::OneShots(buffers) => buffers.draft(slot).map(Some),
            Self::Leased(slots) => slots.draft(slot),
        }
    }

    /// The bytes of a slot that was not sent after all.
    pub(super) fn recall(&mut self, geometry: Geometry, slot: SlotId) -> Result<Option<Pieces>, MemoryError> {
        if let Self::Leased(slots) = self { slots.recall(slot) } else { self.draft(geometry, slot) }
    }

    pub(super) fn leased(&self) -> Option<&LeasedSlots> {
        if let Self::Leased(slots) = self { Some(slots) } else { None }
    }

    pub(super) fn leased_mut(&mut self) -> Option<&mut LeasedSlots> {
        if let Self::Leased(slots) = self { Some(slots) } else { None }
    }
}

impl Segment {
    /// The bytes of so many of its slots.
    pub(super) fn pieces(&self, geometry: Geometry, first: SlotId, count: u32) -> Pieces {
        let begin = first.number() - self.first;
        let pieces = self.map.pieces(begin..begin + count, geometry.stride(), geometry.slot_bytes());
        debug_assert!(pieces.is_some() || count == 0, "slots {first:?} and {count} more lie in no segment");
        pieces.unwrap_or(Pieces::none(begin)).numbered_from(first.number())
    }

    /// Lets the owner write so many of its slots, or not.
    ///
    /// # Safety
    /// Slots that are not to be written fill whole pages, and are no fbufs (invariant 2).
    #[expect(unsafe_code, reason = "a guard takes the right to write from this very process")]
    pub(super) unsafe fn protect(
        &self,
        geometry: Geometry,
        first: SlotId,
        count: u32,
        writable: bool,
    ) -> std::io::Result<()> {
        let (begin, stride) = ((first.number() - self.first) as usize, geometry.stride() as usize);
        let bytes: Range<usize> = begin * stride..(begin + count as usize) * stride;
        // SAFETY: these pages hold nothing but these slots, to which there is no reference (see above).
        unsafe { self.map.protect(bytes, writable) }
    }

    /// What receivers are told of it.
    pub(super) fn announce(&self) -> NewSegment {
        NewSegment { memory: Descriptor::from(self.descriptor.clone()), slots: self.slots }
    }
}
