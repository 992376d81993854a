//! Links that are closed: what is lent over them still, and how they end.
//!
//! A receiver chooses when it leaves, which slots it keeps, and how often its sender looks at its sockets. So no look goes through
//! all slots: nothing is lent over a link that is closed, so a slot that is not lent over it never is again, and each search goes
//! on where the last one ended. All searches for one link together go once through the slots, and those of one call through a bounded number.

use std::{mem, time::Instant};

use super::{Pool, SEARCH};
use crate::{
    abort::Abort,
    peer::LinkId,
    send::{link::Outbound, unread::Unread},
    slot::{Mark, SlotId},
};

/// How many slots one look at the sockets goes through: some 100 µs.
const LOOKS: u32 = 65_536;
/// How many links that were parted with one call attends to.
const PARTED_AT_ONCE: usize = 8;

/// How many slots a call may still look at in search of those that are lent over links that are closed.
#[derive(Debug)]
pub struct Looks(u32);

impl Looks {
    /// Of a call that looks at all links.
    #[must_use]
    pub fn of_call() -> Self {
        Self(LOOKS)
    }

    /// Of a [search](Pool::search) for a free slot.
    pub(super) fn of_search() -> Self {
        Self(SEARCH)
    }

    /// How many there were.
    #[cfg(test)]
    fn count(&self) -> u32 {
        LOOKS - self.0
    }

    /// Whether a search may have ended before it found anything: the next call goes on with it.
    #[must_use]
    pub fn are_used_up(&self) -> bool {
        self.0 == 0
    }
}

impl Pool {
    /// Ends a link. What was lent over it alone is free then, to the next [search](Self::collect): only links that exist lend; but
    /// for what the receiver may still read in place, which it is [parted](Self::forget_parted) with.
    pub(super) fn unlink(&mut self, index: usize, returns: bool) -> Option<Unread> {
        let begin = Instant::now();
        let mut link = self.links.swap_remove(index);
        link.notice_leaving(self.next_sequence);
        let mut lent = self.lent_over(&link).peekable();
        let first = lent.peek().map(|(slot, _)| slot.number());
        let unread = link.unread(lent.map(|(_, mark)| mark), self.next_sequence);
        self.storage.forget_giver(link.peer());
        // Where slots are memory of their own, the kernel says when they can be written; what the receiver has not taken by
        // then it does not take any more.
        if self.is_leased() && !link.is_over() {
            link.disconnect_receiver();
        }
        self.note_time_of(&link.peer(), begin);
        if !returns
            && !self.storage.has_own_memory()
            && !link.is_over()
            && let Some(first) = first
        {
            link.close(self.next_sequence, Some(Abort::Disconnected));
            link.note_searched(first);
            self.parted.push_back(link);
        }
        unread
    }

    /// Whether a slot may be lent over this one of the [links](Self::links), as far as was looked.
    ///
    /// # Panics
    /// There is no such link.
    pub fn may_lend_over(&mut self, index: usize, looks: &mut Looks) -> bool {
        let searched = self.search_lent(&self.links[index], looks);
        self.links[index].note_searched(searched);
        searched < self.used
    }

    /// Looks whether receivers that were parted with have let go of all that they had, a few at a time.
    pub fn forget_parted(&mut self, looks: &mut Looks) {
        for _ in 0..self.parted.len().min(PARTED_AT_ONCE) {
            let Some(mut link) = self.parted.pop_front() else { return };
            let searched = self.search_lent(&link, looks);
            link.note_searched(searched);
            if searched < self.used && link.attend(self.next_sequence).is_ok() {
                self.parted.push_back(link);
            } else {
                self.forgotten.push(link.peer().link);
            }
        }
    }

    /// Links that were parted with and are over, since this was asked last.
    pub fn take_forgotten(&mut self) -> Vec<LinkId> {
        mem::take(&mut self.forgotten)
    }

    /// Whether a link was ended from this side and its receiver may read on.
    #[must_use]
    pub fn is_parted(&self, link: LinkId) -> bool {
        self.parted.iter().any(|parted| parted.peer().link == link)
    }

    /// The number of the first slot that is lent over a link, or that was not looked at; that behind the last slot if none is.
    fn search_lent(&self, link: &Outbound, looks: &mut Looks) -> u32 {
        let from = link.searched();
        let most = looks.0.min(self.used - from);
        let is_lent = |&number: &u32| {
            let (slot, mark) = (SlotId::new(number), self.mark(SlotId::new(number)));
            mark != Mark::OUT && link.has(slot, mark)
        };
        let found = (from..from + most).find(is_lent);
        looks.0 -= found.map_or(most, |number| number - from + 1);
        found.unwrap_or(from + most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        peer::{Credentials, Peer},
        receive::{link::Inbound, received::Received},
        tests::exchange::{link, link_with, pool, send},
    };

    const SLOTS: u32 = 512;

    /// Sends so many messages, of which the receivers keep each last one.
    fn exchange(pool: &mut Pool, inbounds: &mut [Inbound], messages: u32) -> Vec<Received> {
        let mut kept = Vec::new();
        for message in 1..=messages {
            send(pool, 7);
            let received = inbounds.iter_mut().map(|inbound| inbound.take().unwrap());
            kept.extend(received.filter(|_| message == messages));
        }
        kept
    }

    fn looks(pool: &mut Pool) -> u32 {
        let mut looks = Looks::of_call();
        (0..pool.links().len()).for_each(|index| assert!(pool.may_lend_over(index, &mut looks)));
        looks.count()
    }

    /// Each keeps the last slot that a search comes to.
    #[test]
    fn all_looks_at_links_that_are_closed_go_once_through_the_slots() {
        let mut pool = pool(SLOTS);
        let mut inbounds = [(); 4].map(|()| link(&mut pool, None));
        let kept = exchange(&mut pool, &mut inbounds, SLOTS);
        drop(inbounds);
        pool.notice_leaving();
        assert_eq!(looks(&mut pool), 4 * SLOTS);
        for _ in 0..3 {
            assert_eq!(looks(&mut pool), 4, "slots are looked at again");
        }
        drop(kept);
        let mut looks = Looks::of_call();
        assert!((0..4).all(|index| !pool.may_lend_over(index, &mut looks)));
        // What is not lent need not be counted as unread.
        assert!((0..4).all(|_| pool.end(0).is_none()) && !looks.are_used_up());
    }

    #[test]
    fn a_call_looks_at_so_many_slots_and_the_next_goes_on() {
        let mut pool = pool(SLOTS);
        let mut inbounds = [link(&mut pool, None)];
        let kept = exchange(&mut pool, &mut inbounds, SLOTS);
        drop((inbounds, kept));
        pool.notice_leaving();
        for rest in [SLOTS - 100, SLOTS - 200] {
            let mut looks = Looks(100);
            assert!(pool.may_lend_over(0, &mut looks) && looks.are_used_up());
            assert_eq!(SLOTS - pool.links()[0].searched(), rest);
        }
        assert!(!pool.may_lend_over(0, &mut Looks::of_call()));
    }

    /// A slot of a link that is open may be lent over it later.
    #[test]
    fn a_search_for_what_is_lent_over_an_open_link_begins_anew() {
        let mut pool = pool(4);
        let mut inbounds = [link(&mut pool, None)];
        assert!(!pool.may_lend_over(0, &mut Looks::of_call()));
        let kept = exchange(&mut pool, &mut inbounds, 1);
        assert!(pool.may_lend_over(0, &mut Looks::of_call()));
        assert_eq!((pool.count_lent_over(0), kept.len()), (1, 1));
    }

    #[test]
    fn parted_links_are_attended_to_a_few_at_a_time_and_go_once_through_the_slots() {
        let mut pool = pool(SLOTS);
        let mut inbounds: Vec<_> = (0..2 * PARTED_AT_ONCE).map(|_| link(&mut pool, None)).collect();
        let kept = exchange(&mut pool, &mut inbounds, SLOTS);
        while !pool.links().is_empty() {
            pool.disconnect(0);
        }
        assert_eq!(pool.parted.len(), 2 * PARTED_AT_ONCE);
        for _ in 0..4 {
            let mut looks = Looks::of_call();
            pool.forget_parted(&mut looks);
            assert_eq!(looks.count(), PARTED_AT_ONCE as u32, "slots are looked at again");
        }
        assert!(pool.take_forgotten().is_empty());
        drop((kept, inbounds));
        pool.forget_parted(&mut Looks::of_call());
        assert_eq!(pool.parted.len(), PARTED_AT_ONCE);
        pool.forget_parted(&mut Looks::of_call());
        assert_eq!((pool.parted.len(), pool.take_forgotten().len()), (0, 2 * PARTED_AT_ONCE));
    }

    #[test]
    fn what_the_end_of_a_link_takes_counts_as_time_of_its_user() {
        const USER: u32 = 4_100_000_003;
        let mut pool = pool(4);
        let peer = Peer::new(1, Credentials::new(1, USER, 1)).with_same_user(false);
        let _inbound = link_with(&mut pool, peer);
        pool.turns = super::super::Turns::default();
        pool.end(0);
        assert!(pool.turns.knows(USER));
    }
}
