//! Where the bytes of a pool's slots lie, and what keeps them from being written once they are sent: one file for each
//! mechanism.
//!
//! Each *prepares* slots that are free, so that they can be written; *publishes* a slot, which gives up the right to write it,
//! before any receiver is told of it; and *reclaims* a slot that was not sent after all.

pub(crate) mod leased;
pub(crate) mod one_shot;
pub(crate) mod segments;

use std::{io, os::fd::OwnedFd};

use self::{
    leased::{LeasedSlots, View},
    one_shot::OneShotBuffers,
    segments::Segments,
};
use crate::{
    memory::{MemoryError, Pieces},
    peer::Peer,
    send::{fbuf::Outgoing, guard::Guard},
    slot::{Mark, SlotId},
    socket::{
        link_message::{NewSegment, ReceivedGrant},
        wire::Descriptor,
    },
    violation::Violation,
};

#[derive(Debug)]
pub(super) enum Storage {
    /// In segments, read where they lie or copied.
    Segments(Segments),
    /// Each in memory of its own, which is sent once, and given away.
    OneShots(OneShotBuffers),
    /// Each in memory of its own, which is read under leases, and comes back.
    Leased(LeasedSlots),
}

/// Why a slot cannot be sent.
#[derive(Debug)]
pub(crate) enum Unpublished {
    /// It was written in memory of a receiver that has gone, and there is no other yet.
    Stale,
    /// It was written in memory of a receiver that has gone, and that of another cannot be mapped.
    NotMoved(MemoryError),
    /// It cannot be sealed for good, nor can a copy.
    NotSealed(MemoryError),
    /// The same, and it cannot be mapped any more.
    Lost,
}

/// Why a slot cannot be read on once it is sent.
#[derive(Debug)]
pub(crate) enum Unkept {
    /// It was written in memory of a receiver that has gone, and there is no other yet.
    Stale,
    /// It cannot be mapped once more.
    NotMapped(MemoryError),
}

impl Storage {
    /// How many slots there are.
    pub(super) fn slots(&self) -> u32 {
        match self {
            Self::Segments(segments) => segments.slots(),
            Self::OneShots(buffers) => buffers.slots(),
            Self::Leased(slots) => slots.len(),
        }
    }

    /// Adds slots, if that is possible.
    pub(super) fn add(&mut self, slots: u32) -> Result<(), MemoryError> {
        match self {
            Self::Segments(segments) => return segments.add(slots),
            Self::OneShots(buffers) => buffers.add(slots),
            Self::Leased(_) => {}
        }
        Ok(())
    }

    /// How many segments there are.
    pub(super) fn count_segments(&self) -> usize {
        if let Self::Segments(segments) = self { segments.count() } else { 0 }
    }

    /// What receivers are told of the segments there are, but for the first `known`.
    pub(super) fn announce(&self, known: usize) -> impl Iterator<Item = NewSegment> {
        let segments = if let Self::Segments(segments) = self { Some(segments) } else { None };
        segments.into_iter().flat_map(move |segments| segments.announce(known))
    }

    /// The guard, if there is one.
    pub(super) fn guard(&self) -> Option<&Guard> {
        if let Self::Segments(segments) = self { segments.guard() } else { None }
    }

    /// Messages that were sent without being guarded, although there is a guard.
    pub(super) fn unguarded(&self) -> u64 {
        if let Self::Segments(segments) = self { segments.unguarded() } else { 0 }
    }

    /// Whether a message needs nothing but to be told of.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self, Self::Segments(segments) if segments.guard().is_none())
    }

    /// Whether each slot is memory of its own: then the kernel says when it can be written again.
    pub(super) fn has_own_memory(&self) -> bool {
        !matches!(self, Self::Segments(_))
    }

    /// Whether what is sent is given away.
    pub(super) fn sends_one_shots(&self) -> bool {
        matches!(self, Self::OneShots(_))
    }

    /// Whether receivers lease what is sent.
    pub(super) fn is_leased(&self) -> bool {
        matches!(self, Self::Leased(_))
    }

    /// Whether the slots are those of a receiver.
    pub(super) fn is_given(&self) -> bool {
        matches!(self, Self::Leased(slots) if slots.are_given())
    }

    /// Whether a slot that receivers have handed back can be had now.
    pub(super) fn is_available(&self, slot: SlotId) -> bool {
        if let Self::Leased(slots) = self { slots.is_available(slot) } else { true }
    }

    /// Whether a slot cannot be had for a reason that passes without a word.
    pub(super) fn is_blocked(&self) -> bool {
        matches!(self, Self::Leased(slots) if slots.is_blocked())
    }

    /// The slot behind the last that can be prepared together with this one; none if there is no such slot.
    pub(super) fn end_of_run(&self, slot: SlotId) -> Option<u32> {
        if let Self::Segments(segments) = self { segments.end_of(slot) } else { Some(slot.number() + 1) }
    }

    /// The bytes of so many slots of one run that are free, to be written; none if they cannot be had now.
    pub(super) fn prepare(&mut self, first: SlotId, count: u32) -> Result<Option<Pieces>, MemoryError> {
        match self {
            Self::Segments(segments) => Ok(segments.prepare(first, count)),
            Self::OneShots(buffers) => buffers.prepare(first).map(Some),
            Self::Leased(slots) => slots.prepare(first),
        }
    }

    /// Before a slot is sent with a message, to receivers (`is_lent`), or only to be read on here (`is_kept`): nothing is written any
    /// more. A one-shot is the memory that is returned.
    pub(super) fn publish(
        &mut self,
        outgoing: &Outgoing,
        message: Mark,
        is_lent: bool,
        is_kept: bool,
    ) -> Result<Option<OwnedFd>, Unpublished> {
        match self {
            Self::Segments(segments) => segments.publish(outgoing, message),
            Self::OneShots(buffers) if is_lent || is_kept => return buffers.publish(outgoing).map(Some),
            // What it has is as good as before.
            Self::OneShots(_) => {}
            Self::Leased(slots) => slots.publish(outgoing, is_lent)?,
        }
        Ok(None)
    }

    /// The bytes of a slot that was not sent after all, to be written again; none if they cannot be had now.
    pub(super) fn reclaim(&mut self, slot: SlotId) -> Result<Option<Pieces>, MemoryError> {
        match self {
            Self::Leased(slots) => slots.reclaim(slot),
            _ => self.prepare(slot, 1),
        }
    }

    /// Forgets what was written of a slot and was not sent, if it is of no use any more.
    pub(super) fn forget(&mut self, slot: SlotId) {
        if let Self::Leased(slots) = self {
            slots.drop_stale(slot);
        }
    }

    /// Where a slot that is sent can be read on here, and the mapping through which, if that takes one of its own. One that is
    /// given away cannot be.
    pub(super) fn view(&self, slot: SlotId) -> Result<(*const u8, Option<View>), Unkept> {
        match self {
            Self::Segments(segments) => {
                let bytes = segments.bytes(slot).ok_or(Unkept::Stale)?;
                Ok((bytes.pointer().as_ptr(), None))
            }
            Self::OneShots(_) => Err(Unkept::Stale),
            Self::Leased(slots) => slots.view(slot).map(|view| (view.bytes(), Some(view))),
        }
    }

    /// Whether a slot is still that which such a mapping shows.
    pub(super) fn is_seen(&self, slot: SlotId, view: Option<&View>) -> bool {
        view.is_none_or(|view| matches!(self, Self::Leased(slots) if slots.is_seen(slot, view)))
    }

    /// The slots, to be read, if they are memory of this user.
    pub(super) fn hand_over(&self) -> io::Result<Vec<Descriptor>> {
        match self {
            Self::Leased(slots) if !slots.are_given() => slots.hand_over(),
            _ => Ok(Vec::new()),
        }
    }

    /// Takes what a receiver gives, if it may give anything.
    pub(super) fn give(&mut self, grant: ReceivedGrant) -> Result<(), Violation> {
        if let Self::Leased(slots) = self { slots.give(grant) } else { Ok(()) }
    }

    /// A receiver has gone. What it gave is of no use any more.
    pub(super) fn forget_giver(&mut self, giver: Peer) {
        if let Self::Leased(slots) = self {
            slots.forget_giver(giver);
        }
    }
}
