//! Which messages are left out for a receiver that would rather miss some, or has its share of the slots of a lossy sender.

use std::collections::VecDeque;

use crate::{
    memory::{MemoryError, wrapping::WrappingTable},
    ring::board::{BoardReader, BoardView},
    slot::{Mark, SlotId},
};

/// How many messages that a receiver has are looked at in search of one that is back, before the next is left out.
const LOOKS: usize = 64;

/// For a receiver that would rather miss messages than have more than so many, or of a sender that is lossy.
#[derive(Debug)]
pub(super) struct Skipping {
    /// How many messages the receiver wants to have at most.
    backlog: usize,
    /// What is lent, or was when it was last looked at.
    lent: VecDeque<(SlotId, Mark)>,
    /// A ledger of its own: for each slot, when it was sent last, the mark if it was lent over this link.
    ledger: WrappingTable<Mark>,
}

impl Skipping {
    pub(super) fn new(backlog: usize, slots: u32) -> Result<Self, MemoryError> {
        Ok(Self { backlog, lent: VecDeque::new(), ledger: WrappingTable::of_zeroes(slots as usize)? })
    }

    /// Whether the next message is to be lent: with it the receiver has no more messages than it wants, nor than `limit`. If it
    /// seems to have, looks again, at so many that it costs little however many a receiver has that is stopped.
    pub(super) fn has_room(&mut self, limit: usize, board: &BoardReader<BoardView>) -> bool {
        let most = self.backlog.min(limit);
        let mut looks = LOOKS.min(self.lent.len());
        while self.lent.len() >= most && looks > 0 {
            let Some(oldest @ (slot, mark)) = self.lent.pop_front() else { break };
            if self.lends(slot, mark) && !board.is_back(slot, mark) {
                self.lent.push_back(oldest);
                looks -= 1;
            }
        }
        self.lent.len() < most
    }

    /// Whether the receiver wants the next message, and has as many as `limit`.
    pub(super) fn is_limited(&mut self, limit: usize, board: &BoardReader<BoardView>) -> bool {
        self.has_room(usize::MAX, board) && !self.has_room(limit, board)
    }

    /// Enters a message that is lent.
    pub(super) fn lend(&mut self, slot: SlotId, mark: Mark) {
        *self.ledger.at_mut(slot.index()) = mark;
        self.lent.push_back((slot, mark));
    }

    /// Enters a message that is left out.
    pub(super) fn leave_out(&mut self, slot: SlotId) {
        *self.ledger.at_mut(slot.index()) = Mark::NONE;
    }

    /// The numbers of the messages that are lent.
    pub(super) fn lent(&self, board: &BoardReader<BoardView>) -> impl Iterator<Item = u64> {
        let lent = self.lent.iter().filter(move |&&(slot, mark)| self.lends(slot, mark) && !board.is_back(slot, mark));
        lent.map(|(_, mark)| mark.sequence())
    }

    /// Whether the message was not left out.
    pub(super) fn lends(&self, slot: SlotId, mark: Mark) -> bool {
        *self.ledger.at(slot.index()) == mark
    }
}
