//! Buffers that are sent once: each is a memfd of its own, written, sealed for good and given away. What
//! takes the place of segments in the pool of a sender that sends like this.

use std::os::fd::OwnedFd;

use crate::{
    memory::{Map, MemoryError, Pieces, Reserved},
    slot::SlotId,
};

/// The buffers that are being written, by slot. A slot is only a number here: how many of them there are
/// says how many messages may be under way.
#[derive(Debug)]
pub(crate) struct Drafts {
    bytes: u64,
    slots: Vec<Option<Draft>>,
}

#[derive(Debug)]
struct Draft {
    // In this order: memory can be sealed once it is not mapped any more.
    map: Map,
    memory: Reserved,
}

impl Drafts {
    /// Buffers of `bytes` bytes each.
    pub(crate) fn new(bytes: u64) -> Self {
        Self { bytes, slots: Vec::new() }
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Adds slots.
    pub(crate) fn add(&mut self, slots: u32) {
        self.slots.resize_with(self.slots.len() + slots as usize, || None);
    }

    /// The bytes of the buffer in a slot. One that was given away is replaced by a fresh one.
    pub(crate) fn draft(&mut self, slot: SlotId) -> Result<Pieces, MemoryError> {
        let Some(place) = self.slots.get_mut(slot.index()) else { return Ok(Pieces::none(slot.number())) };
        if place.is_none() {
            let memory = Reserved::new("fbuf-sealed", self.bytes)?;
            *place = Some(Draft { map: Map::writable(&memory)?, memory });
        }
        Ok(place.as_ref().map_or(Pieces::none(slot.number()), |draft| Pieces::one(&draft.map, slot.number())))
    }

    /// Seals the buffer in a slot for good, and gives it away.
    ///
    /// # Errors
    /// As [`Reserved::seal_for_good`]; the buffer stays, perhaps at another address.
    pub(crate) fn seal(&mut self, slot: SlotId) -> Result<Option<OwnedFd>, MemoryError> {
        let Some(place) = self.slots.get_mut(slot.index()) else { return Ok(None) };
        let Some(Draft { map, memory }) = place.take() else { return Ok(None) };
        drop(map);
        match memory.seal_for_good() {
            Ok(sealed) => Ok(Some(sealed)),
            Err((memory, error)) => {
                *place = Some(Draft { map: Map::writable(&memory)?, memory });
                Err(error)
            }
        }
    }
}
