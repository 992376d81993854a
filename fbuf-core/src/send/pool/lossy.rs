//! Which receivers get the next message, and how a lossy pool comes to have a free slot at any time: it leaves messages out
//! ([`crate::send::link`] does, for one receiver).
//!
//! Receivers and the sender have equal shares of its slots. A message is left out for a receiver that has its share, however many
//! slots are free, so that one that is stopped takes nothing from others, or from those that are linked later; and for all, if no slot
//! were free behind it.

use super::{Pool, SEARCH};
use crate::slot::SlotId;

impl Pool {
    /// Whether it leaves messages out rather than run out of slots.
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        self.extras.lossy
    }

    /// Asks every link whether it takes the next message, of which each may have so many with it: how many do.
    pub(super) fn admit(&mut self, limit: usize) -> usize {
        let full: Vec<_> = match self.is_lossy() && self.sends_one_shots() {
            true => self.links.iter().map(|link| link.lacks_room(1, &self.links).is_some()).collect(),
            false => Vec::new(),
        };
        let limits = full.into_iter().map(|full| if full { 0 } else { limit }).chain(std::iter::repeat(limit));
        self.links.iter_mut().zip(limits).filter_map(|(link, limit)| link.admit(limit).then_some(())).count()
    }

    /// Whether the next message will be left out for a receiver that would get it if there were more slots.
    pub fn is_short(&mut self) -> bool {
        let limit = self.limit();
        self.links.iter_mut().any(|link| link.is_limited(limit))
    }

    /// The most messages that one receiver may have, counting the next one, whose slot is still an fbuf.
    pub(super) fn limit(&mut self) -> usize {
        match self.is_lossy() {
            false => usize::MAX,
            true if self.has_spare() => (self.used as usize / (self.receivers() + 1)).max(1),
            true => 0,
        }
    }

    /// Whether a slot is free beside those that are fbufs.
    fn has_spare(&mut self) -> bool {
        if self.collect(SEARCH) {
            return true;
        }
        // Everywhere at first; once that was in vain, a part each time.
        let found = if self.searched == 0 { self.search_all() } else { self.search() };
        found && self.collect(SEARCH)
    }

    /// After a message that so many receivers got: the slot of one that nobody got comes next, if no other is known to be free, or
    /// each is memory of its own, of which no more is to be had than is used.
    pub(super) fn come_back_to(&mut self, slot: SlotId, receivers: usize) {
        let is_next = self.is_dry() || self.storage.has_own_memory();
        if self.is_lossy() && receivers == 0 && is_next {
            self.move_to(slot);
        }
    }
}
