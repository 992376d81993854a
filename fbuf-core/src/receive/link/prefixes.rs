//! What stands before a message: which of it the sender may use on this link, and what it says.

use super::{Inbound, Loan, check_sequence};
use crate::{
    points,
    receive::received::Received,
    ring::entry::{Note, Prefix, PrefixSet},
    slot::{Mark, SlotId},
    socket::link_message::Welcome,
    violation::Violation,
};

/// The prefixes that messages of a link may have, as its sender says.
pub(super) fn declared(welcome: &Welcome, skips: bool) -> Result<PrefixSet, Violation> {
    let declared = PrefixSet::from_bits(welcome.prefixes).ok_or(Violation::Terms {
        what: "the prefixes that messages may have",
        found: welcome.prefixes.into(),
        allowed: "gaps, tags and times of sending",
    })?;
    // The lane of a receiver that asked to be skipped has room for gaps.
    if skips && !declared.has(Prefix::Gap) {
        return Err(Violation::PrefixUndeclared { prefix: Prefix::Gap.name() });
    }
    Ok(declared)
}

impl Inbound {
    /// As [`Self::take_fast`], where messages may have tags: of one that has a tag before it, or nothing.
    #[inline]
    pub fn take_tagged(&mut self) -> Option<Received> {
        let (home, mark) = (&**self.returns(), self.next_mark());
        let beside = home.beside.as_ref()?;
        if self.reader.position() >= self.until {
            return None;
        }
        let (entries, tag, (number, length)) = match self.reader.peek_tagged() {
            Some((tag, behind)) => (2, tag, behind),
            None => (1, 0, self.reader.peek()),
        };
        if length >= self.tagged_below {
            return None;
        }
        let cell = home.held.take(number, mark)?;
        let (slot, length) = (SlotId::new(number as u32), length as u32);
        beside.at(slot.index()).note(tag, 0);
        let received = Loan { cell, slot, offset: 0, length, mark, home }.receive();
        points::reach("get: marked");
        self.reader.advance(entries);
        // Both entries are one message.
        self.offset = self.offset.wrapping_sub(entries - 1);
        self.bytes += u64::from(length);
        Some(received)
    }

    /// The mark of a message, behind the gap before it, if it has nothing before it but what was declared.
    pub(super) fn mark_of(&self, note: &Note) -> Result<Mark, Violation> {
        if let Some(prefix) = note.prefixes.set().first_outside(self.prefixes) {
            return Err(Violation::PrefixUndeclared { prefix: prefix.name() });
        }
        let next = self.next_mark().sequence().checked_add(note.prefixes.word(Prefix::Gap));
        check_sequence(next).map(Mark::of)
    }

    /// Goes on behind a message that was taken.
    pub(super) fn pass(&mut self, note: &Note, mark: Mark) {
        self.missed += note.prefixes.word(Prefix::Gap);
        self.bytes += u64::from(note.body.length());
        self.reader.advance(note.entries());
        self.offset = mark.word().wrapping_add(1).wrapping_sub(self.reader.position());
    }
}
