//! Which messages are left out for a receiver that would rather miss some.

use crate::{
    memory::{MemoryError, wrapping::Ring},
    ring::board::{BoardReader, BoardView},
    slot::{Mark, SlotId},
};

/// For a receiver that would rather miss messages than hold more than so many.
#[derive(Debug)]
pub(super) struct Skipping {
    most: u32,
    /// What is lent, or was when it was last looked at.
    lent: Vec<(SlotId, Mark)>,
    /// A ledger of its own: for each slot, when it was sent last, the mark if it was lent over this link.
    ledger: Ring<Mark>,
}

impl Skipping {
    pub(super) fn new(most: u32, slots: u32) -> Result<Self, MemoryError> {
        Ok(Self { most: most.min(slots), lent: Vec::new(), ledger: Ring::of_zeroes(slots as usize)? })
    }

    /// Whether the next message is to be lent: the receiver does not hold more than it wants to. If it seems
    /// to, looks again.
    pub(super) fn has_room(&mut self, board: &BoardReader<BoardView>) -> bool {
        let most = self.most as usize;
        if self.lent.len() > most {
            let ledger = &self.ledger;
            self.lent.retain(|&(slot, mark)| *ledger.at(slot.index()) == mark && !board.has(slot, mark));
        }
        self.lent.len() <= most
    }

    /// Enters a message that is lent.
    pub(super) fn lend(&mut self, slot: SlotId, mark: Mark) {
        *self.ledger.at_mut(slot.index()) = mark;
        self.lent.push((slot, mark));
    }

    /// Enters a message that is left out.
    pub(super) fn leave_out(&mut self, slot: SlotId) {
        *self.ledger.at_mut(slot.index()) = Mark::NONE;
    }

    /// The numbers of the messages that are lent.
    pub(super) fn lent(&self, board: &BoardReader<BoardView>) -> impl Iterator<Item = u64> {
        let lent = self.lent.iter().filter(move |&&(slot, mark)| self.lends(slot, mark) && !board.has(slot, mark));
        lent.map(|(_, mark)| mark.sequence())
    }

    /// Whether the message was not left out.
    pub(super) fn lends(&self, slot: SlotId, mark: Mark) -> bool {
        *self.ledger.at(slot.index()) == mark
    }
}
