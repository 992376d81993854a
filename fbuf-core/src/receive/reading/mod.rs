//! How messages are read: one file for each mechanism, chosen once, when a link is made.
//!
//! [`Reading`] is what a link has for it, [`Kept`] what one message has.

pub(crate) mod claim;
pub(crate) mod copied;
pub(crate) mod grants;
pub(crate) mod lease_thread;
pub(crate) mod leased;
pub(crate) mod one_shot;
pub(crate) mod shared;

use std::{os::fd::AsFd, sync::Arc};

use self::{
    copied::CopiedSegments,
    grants::Grants,
    leased::{LeasedSlot, ReceiverSlots},
    one_shot::OneShots,
    shared::SharedSegments,
};
use crate::{
    memory::{Map, MemoryError, Pieces, SealedMemory},
    process::deferred::{Cause, DeferredDrop, Slow},
    protection::Mechanism,
    receive::link::Returns,
    ring::entry::Body,
    slot::{Geometry, Mark, SlotId},
    socket::link_message::{LinkEnd, NewSegment, OneShot},
    violation::{Unsuitable, Violation},
};

/// Why a message cannot be read.
#[derive(Debug)]
pub(crate) enum Unreadable {
    /// This process has no room for it now.
    Now(String),
    /// It cannot be delivered.
    Never(LinkEnd),
}

impl From<MemoryError> for Unreadable {
    fn from(error: MemoryError) -> Self {
        Self::Now(error.to_string())
    }
}

impl From<Violation> for Unreadable {
    fn from(violation: Violation) -> Self {
        Self::Never(violation.into())
    }
}

impl From<Unsuitable> for Unreadable {
    fn from(unsuitable: Unsuitable) -> Self {
        match unsuitable {
            Unsuitable::Unmappable { reason } => Self::Now(reason),
            other => Self::Never(other.into()),
        }
    }
}

/// How the messages of a link are read.
#[derive(Debug)]
pub(crate) enum Reading {
    /// Where they were written, in segments.
    Shared(SharedSegments),
    /// As copies, in memory as large as the segments.
    Copied(CopiedSegments),
    /// Under leases, in slots each of which is memory of its own; or as copies, each in memory of its own.
    Leased(ReceiverSlots),
    /// Each is memory of its own, which came over the socket.
    OneShot(OneShots),
}

impl Reading {
    /// Of messages that lie in segments, or are sealed for good.
    pub(crate) fn new(mechanism: Mechanism, geometry: Geometry) -> Self {
        match mechanism {
            Mechanism::Shared => Self::Shared(SharedSegments::default()),
            // A lease is of memory of its own, and a segment has many slots.
            Mechanism::Copy | Mechanism::Lease => Self::Copied(CopiedSegments::new(geometry)),
            Mechanism::OneShot => Self::OneShot(OneShots::new(geometry)),
        }
    }

    /// The rights to write its slots, which the sender has to be given, if this process made them for it.
    pub(crate) fn grants(&self) -> Option<Grants> {
        if let Self::Leased(slots) = self { slots.grants() } else { None }
    }

    /// Once the sender has answered, and so the memory of all slots exists.
    pub(crate) fn open(&mut self) {
        if let Self::Leased(slots) = self {
            slots.map_for_lease();
        }
    }

    /// Whether slots are added by segments. If not, all are known from the beginning, and are only numbers.
    pub(crate) fn has_segments(&self) -> bool {
        matches!(self, Self::Shared(_) | Self::Copied(_))
    }

    /// Whether messages are read where they were written, without a word to anybody.
    pub(crate) fn is_in_place(&self) -> bool {
        matches!(self, Self::Shared(_))
    }

    /// Whether messages come over the socket.
    pub(crate) fn is_one_shot(&self) -> bool {
        matches!(self, Self::OneShot(_))
    }

    /// Whether a sender that has disconnected its receiver uses slots again before they are handed back, so that what was
    /// just read may be of another message.
    pub(crate) fn is_reused_when_disconnected(&self) -> bool {
        matches!(self, Self::Copied(_) | Self::Leased(_))
    }

    /// How many leases the kernel refused, of messages that were copied then.
    pub(crate) fn refused(&self) -> u64 {
        if let Self::Leased(slots) = self { slots.refused() } else { 0 }
    }

    /// How many segments there are.
    pub(crate) fn segments(&self) -> usize {
        match self {
            Self::Shared(segments) => segments.count(),
            Self::Copied(segments) => segments.count(),
            Self::Leased(_) | Self::OneShot(_) => 0,
        }
    }

    /// Maps a new segment, which begins with the slot of this number: where the messages of its slots are read.
    ///
    /// # Errors
    /// [`LinkEnd`]
    pub(crate) fn add(
        &mut self,
        new: &NewSegment,
        first: u32,
        geometry: Geometry,
        home: &Returns,
    ) -> Result<Option<Pieces>, LinkEnd> {
        match self {
            Self::Shared(segments) => segments.add(new, geometry, home),
            Self::Copied(segments) => segments.add(new, first, home.peer()),
            Self::Leased(_) | Self::OneShot(_) => {
                Err(Violation::OutOfTurn { found: "a segment", wanted: "none, since all slots are known" }.into())
            }
        }
    }

    /// The memory of a message came over the socket. `is_published` says whether there are more entries than so many.
    ///
    /// # Errors
    /// [`Violation`]
    pub(crate) fn add_one_shot(
        &mut self,
        one_shot: OneShot,
        is_published: impl FnOnce(u64) -> bool,
    ) -> Result<(), Violation> {
        match self {
            Self::OneShot(one_shots) => one_shots.add(one_shot, is_published),
            _ => Err(Violation::OutOfTurn { found: "a one-shot", wanted: "a bell or a new segment" }),
        }
    }

    /// Whether the memory of a message came over the socket that was not taken yet.
    pub(crate) fn has_arrived(&self) -> bool {
        matches!(self, Self::OneShot(one_shots) if one_shots.has_arrived())
    }

    /// Whether the socket may have the memory of this message, or another that takes its place.
    pub(crate) fn awaits(&self, message: Mark) -> bool {
        matches!(self, Self::OneShot(one_shots) if one_shots.awaits(message.sequence()))
    }

    /// Before a message in a known slot is taken: has the memory exist to which it will be copied.
    ///
    /// # Errors
    /// [`MemoryError`]: there is none.
    pub(crate) fn provide(&mut self, slot: SlotId, body: Body) -> Result<(), MemoryError> {
        if let Self::Copied(segments) = self { segments.provide(slot, body) } else { Ok(()) }
    }

    /// Once a message is taken: has its bytes stay as they are. What has them, if not the slot's own place.
    ///
    /// # Errors
    /// [`Unreadable`]: nothing has changed.
    pub(crate) fn read(
        &mut self,
        slot: SlotId,
        body: Body,
        message: Mark,
        home: &Returns,
    ) -> Result<Option<Kept>, Unreadable> {
        match self {
            Self::Shared(_) => Ok(None),
            Self::Copied(segments) => segments.copy(slot, body).map(|()| None).map_err(Unreadable::Never),
            Self::Leased(slots) => Ok(slots.read(slot, body, home).map(Some)?),
            Self::OneShot(one_shots) => {
                one_shots.take(message.sequence(), body).map(|sealed| Some(Kept::Sealed(sealed)))
            }
        }
    }

    /// What is left when its link ends: the segments, in which messages lie that may still be held.
    pub(crate) fn into_remains(self) -> Option<DeferredDrop<Self>> {
        let this = DeferredDrop::from(self);
        this.has_segments().then_some(this)
    }
}

impl Slow for Reading {
    fn cause(&mut self) -> Option<Cause> {
        match self {
            Self::Shared(segments) => segments.cause(),
            Self::Copied(segments) => segments.cause(),
            Self::Leased(slots) => slots.cause(),
            // Each of them is dropped by another thread by itself.
            Self::OneShot(_) => None,
        }
    }
}

/// What has the bytes of a message.
#[derive(Debug)]
pub(crate) enum Kept {
    /// Memory that was given away.
    Sealed(SealedMemory),
    /// A slot, under a lease.
    Leased(Arc<LeasedSlot>),
    /// A copy of a slot that could not be leased.
    Copied(Map),
}

impl Kept {
    /// Where they are.
    pub(crate) fn bytes(&self) -> *const u8 {
        match self {
            Self::Sealed(sealed) => sealed.bytes.as_ptr(),
            Self::Leased(leased_slot) => leased_slot.bytes(),
            Self::Copied(map) => map.beginning(),
        }
    }

    /// By which means they are protected.
    pub(crate) fn mechanism(&self) -> Mechanism {
        match self {
            Self::Sealed(_) => Mechanism::OneShot,
            Self::Leased(_) => Mechanism::Lease,
            Self::Copied(_) => Mechanism::Copy,
        }
    }

    /// Whether they are those that arrived.
    pub(crate) fn is_intact(&self) -> bool {
        if let Self::Leased(leased_slot) = self { leased_slot.is_intact() } else { true }
    }

    /// A view of so many of them, from an address on, that this process may write for itself: the mapping, and where they begin
    /// in it. None if this process may write them as they are.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn make_private(&self, from: *const u8, length: usize) -> Result<Option<(Map, usize)>, MemoryError> {
        let begin = from.addr() - self.bytes().addr();
        let map = match self {
            Self::Sealed(sealed) => Some(Map::copy_on_write(sealed.memory.as_fd(), 0, (begin + length) as u64)?),
            Self::Leased(leased_slot) => leased_slot.make_private(begin + length)?,
            Self::Copied(_) => None,
        };
        Ok(map.map(|map| (map, begin)))
    }

    /// Forgets such a view, which is about to be unmapped.
    pub(crate) fn end_private(&self) {
        if let Self::Leased(leased_slot) = self {
            leased_slot.end_private();
        }
    }

    /// Ends the reading, before the slot is handed back.
    pub(crate) fn let_go(self, slot: SlotId, home: &Returns) {
        if let Self::Leased(leased_slot) = self {
            LeasedSlot::let_go(leased_slot, slot, home);
        }
    }
}
