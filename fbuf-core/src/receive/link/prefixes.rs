//! What stands before a message: which of it the sender may use on this link, and what it says.

use super::{Inbound, check_sequence};
use crate::{
    ring::entry::{Note, Prefix, PrefixSet},
    slot::Mark,
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
    /// The mark of a message, behind the gap before it, if it has nothing before it but what was declared.
    pub(super) fn mark_of(&self, note: &Note) -> Result<Mark, Violation> {
        if let Some(prefix) = note.prefixes.set().first_outside(self.prefixes) {
            return Err(Violation::PrefixUndeclared { prefix: prefix.name() });
        }
        let next = self.next.sequence().checked_add(note.prefixes.word(Prefix::Gap));
        check_sequence(next).map(Mark::of)
    }

    /// Goes on behind a message that was taken.
    pub(super) fn pass(&mut self, note: &Note, mark: Mark) {
        self.missed += note.prefixes.word(Prefix::Gap);
        self.bytes += u64::from(note.body.length());
        self.reader.advance(note.entries());
        self.next = mark.following();
    }
}
