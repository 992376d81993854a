//! Slots in segments: memfds with many slots each, which receivers map once. Nothing but the board says when a slot can be
//! written again, and nothing but this process's own code keeps it from being written before: a guard, if one is asked for,
//! makes what was sent read-only here too.
//!
//! One of the files of this crate that may be `unsafe`.

use std::{io, os::fd::OwnedFd, sync::Arc};

use crate::{
    memory::{Address, Map, MemoryError, Pieces, page_bytes},
    points,
    send::{fbuf::Outgoing, guard::Guard},
    slot::{Geometry, Mark, SlotId},
    socket::{link_message::NewSegment, wire::Descriptor},
};

/// The segments of a pool.
#[derive(Debug)]
pub(crate) struct Segments {
    geometry: Geometry,
    // Dropped first: what is guarded is mapped.
    guard: Option<Guard>,
    /// Messages that were sent without being guarded, although they should have been.
    unguarded: u64,
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    map: Map,
    descriptor: Arc<OwnedFd>,
    slots: u32,
    /// The number of its first slot.
    first: u32,
}

impl Segments {
    /// None yet.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { geometry, guard: None, unguarded: 0, segments: Vec::new() }
    }

    /// None yet, of slots that are guarded; reports name the channel.
    ///
    /// # Errors
    /// [`MemoryError`], also if slots do not begin at pages: to guard one would take the right to write from another.
    pub(crate) fn guarded(geometry: Geometry, channel: &str) -> Result<Self, MemoryError> {
        let refused = |call, source| MemoryError::Refused { call, asked: geometry.stride(), error: source };
        if !geometry.stride().is_multiple_of(page_bytes()) {
            let source = io::Error::other("slots that are guarded have to fill whole pages");
            return Err(refused("mprotect", source));
        }
        let guard = Guard::new(channel, geometry).map_err(|source| refused("sigaction", source))?;
        Ok(Self { guard: Some(guard), ..Self::new(geometry) })
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> u32 {
        self.segments.last().map_or(0, |segment| segment.first + segment.slots)
    }

    /// How many segments there are.
    pub(crate) fn count(&self) -> usize {
        self.segments.len()
    }

    /// The guard, if there is one.
    pub(crate) fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    /// Messages that were sent without being guarded.
    pub(crate) fn unguarded(&self) -> u64 {
        self.unguarded
    }

    /// Makes a segment of so many slots.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn add(&mut self, slots: u32) -> Result<(), MemoryError> {
        let first = self.slots();
        let (map, descriptor) = Map::create("fbuf-segment", self.geometry.segment_bytes(slots))?;
        if let Some(guard) = &self.guard {
            guard.add_segment(&map, first);
        }
        self.segments.push(Segment { map, descriptor: Arc::new(descriptor), slots, first });
        Ok(())
    }

    /// What receivers are told of the segments, but for the first `known`.
    pub(crate) fn announce(&self, known: usize) -> impl Iterator<Item = NewSegment> {
        let announce = |segment: &Segment| NewSegment {
            memory: Descriptor::from(segment.descriptor.clone()),
            slots: segment.slots,
        };
        self.segments.iter().skip(known).map(announce)
    }

    fn of(&self, slot: SlotId) -> Option<&Segment> {
        self.segments.iter().rfind(|segment| segment.first <= slot.number())
    }

    /// The slot behind the last of the segment that a slot is in.
    pub(crate) fn end_of(&self, slot: SlotId) -> Option<u32> {
        self.of(slot).map(|segment| segment.first + segment.slots)
    }

    /// The bytes of a slot.
    pub(crate) fn bytes(&self, slot: SlotId) -> Option<Address> {
        self.pieces(slot, 1)?.next().map(|(_, bytes)| bytes)
    }

    fn pieces(&self, first: SlotId, count: u32) -> Option<Pieces> {
        let segment = self.of(first)?;
        let begin = first.number() - segment.first;
        let pieces = segment.map.pieces(begin..begin + count, self.geometry.stride(), self.geometry.slot_bytes());
        debug_assert!(pieces.is_some() || count == 0, "slots {first:?} and {count} more lie in no segment");
        Some(pieces.unwrap_or(Pieces::none(begin)).numbered_from(first.number()))
    }

    /// The bytes of so many slots of one segment, to be written; none if there is a guard, and the kernel has no mapping left
    /// to make them writable: slots come back, and with them mappings.
    pub(crate) fn prepare(&self, first: SlotId, count: u32) -> Option<Pieces> {
        if let Some(guard) = &self.guard {
            // SAFETY: they are to be written.
            #[expect(unsafe_code, reason = "a guard has taken the right to write from this very process")]
            let protected = unsafe { self.protect(first, count, true) };
            protected.ok()?;
            points::reach("seal: released");
            (first.number()..first.number() + count).for_each(|slot| guard.sent(SlotId::new(slot), Mark::NONE));
        }
        self.pieces(first, count)
    }

    /// Before a slot is sent with a message: makes it read-only, if there is a guard.
    pub(crate) fn publish(&mut self, outgoing: &Outgoing, message: Mark) {
        let Some(guard) = &self.guard else { return };
        guard.sent(outgoing.slot, message);
        // SAFETY: slots that are guarded fill whole pages (`guarded`), and the fbuf of this one has ended (`Outgoing`); the
        // slot is writable again before it is one once more (`prepare`).
        #[expect(unsafe_code, reason = "a guard takes the right to write from this very process")]
        let protected = unsafe { self.protect(outgoing.slot, 1, false) };
        self.unguarded += u64::from(protected.is_err());
        points::reach("seal: guarded");
    }

    /// Lets the owner write so many slots of one segment, or not.
    ///
    /// # Safety
    /// Slots that are not to be written fill whole pages, and are no fbufs (invariant 2).
    #[expect(unsafe_code, reason = "only its caller knows which slots are fbufs")]
    unsafe fn protect(&self, first: SlotId, count: u32, writable: bool) -> io::Result<()> {
        let segment = self.of(first).ok_or(io::ErrorKind::NotFound)?;
        let (begin, stride) = ((first.number() - segment.first) as usize, self.geometry.stride() as usize);
        // SAFETY: these pages hold nothing but these slots, to which there is no reference (see above).
        unsafe { segment.map.protect(begin * stride..(begin + count as usize) * stride, writable) }
    }
}
