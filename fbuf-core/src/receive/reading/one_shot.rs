//! Messages each of which is memory of its own, sealed for good. The memory comes over the socket before the entry comes through
//! the lane, in which the slot is only a number.

use std::collections::VecDeque;

use super::Unreadable;
use crate::{
    memory::SealedMemory,
    process::sys::said,
    ring::entry::Body,
    slot::Geometry,
    socket::{
        link_message::{LinkEnd, OneShot},
        wire::Descriptor,
    },
    violation::Violation,
};

/// The messages that came over the socket of a link and were not taken yet, by number.
#[derive(Debug)]
pub(crate) struct OneShots {
    geometry: Geometry,
    arrived: VecDeque<(u64, Descriptor)>,
}

impl OneShots {
    /// None yet.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { geometry, arrived: VecDeque::new() }
    }

    /// Whether any came.
    pub(crate) fn has_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// Whether the socket may have this message, or another that takes its place: the sender may have passed it again before it
    /// told of it.
    pub(crate) fn awaits(&self, sequence: u64) -> bool {
        self.arrived.back().is_none_or(|(last, _)| *last <= sequence)
    }

    /// One came. `is_published` says whether there are more entries than so many.
    ///
    /// # Errors
    /// [`Violation`]: the entry of the one before was not published before this one was sent.
    pub(crate) fn add(&mut self, one_shot: OneShot, is_published: impl FnOnce(u64) -> bool) -> Result<(), Violation> {
        // The sender could not pass the last one to all other receivers, and passes another of the same number.
        if self.arrived.back().is_some_and(|(number, _)| *number == one_shot.sequence) {
            self.arrived.pop_back();
        }
        if self.arrived.len().checked_sub(1).is_some_and(|before| !is_published(before as u64)) {
            return Err(Violation::OutOfTurn { found: "a message of its own", wanted: "the entry of the one before" });
        }
        self.arrived.push_back((one_shot.sequence, one_shot.memory));
        Ok(())
    }

    /// The memory of a message, which came before its entry did.
    ///
    /// # Errors
    /// [`Unreadable`]: what there is no room to map stays.
    pub(crate) fn take(&mut self, sequence: u64, body: Body) -> Result<SealedMemory, Unreadable> {
        let (length, offset) = (body.length(), body.offset());
        if offset != 0 {
            // Its memory is given away with the message at its beginning.
            return Err(Violation::Body { length, offset, slot_bytes: self.geometry.slot_bytes() }.into());
        }
        let memory = match self.arrived.pop_front() {
            Some((number, memory)) if number == sequence => memory,
            _ => {
                return Err(Violation::OutOfTurn {
                    found: "the entry of a message",
                    wanted: "the message itself, over the socket",
                }
                .into());
            }
        };
        let lost = |error| Unreadable::Never(LinkEnd::Exhausted(said(&error)));
        let memory = memory.into_foreign().map_err(lost)?;
        SealedMemory::new(memory, self.geometry.segment_bytes(1), length as usize).map_err(|(memory, unsuitable)| {
            self.arrived.push_front((sequence, memory.into()));
            unsuitable.into()
        })
    }
}
