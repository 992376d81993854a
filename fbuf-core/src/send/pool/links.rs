//! The links of a pool. They belong to it: only the state of all links says which slots are free.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, vec_deque},
    iter, slice,
    time::Instant,
};

use super::Pool;
use crate::{
    abort::Abort,
    peer::Peer,
    send::{
        link::{Arrived, Expected, Outbound},
        unread::Unread,
    },
    slot::{Mark, SlotId},
    socket::{link_message::LinkEnd, shares},
};

impl Pool {
    /// The links, in an order that changes only when one [ends](Self::end).
    #[must_use]
    #[inline]
    pub fn links(&self) -> &[Outbound] {
        &self.links
    }

    /// How many receivers are linked, as far as is known.
    #[must_use]
    pub fn receivers(&self) -> usize {
        self.links.iter().filter(|link| link.is_open()).count()
    }

    /// All links over which a slot may be lent: those that are there, and those that were parted with.
    #[inline]
    pub(super) fn linked(&self) -> iter::Chain<slice::Iter<'_, Outbound>, vec_deque::Iter<'_, Outbound>> {
        self.links.iter().chain(&self.parted)
    }

    /// Looks for the hello of a receiver that is expected. If it came, the link is open, and the last of
    /// [`Self::links`]: what is sent from now on reaches that receiver. It may have to [wait](Expected::is_unanswered), so
    /// that those of one other user do not take up all the time of this sender.
    ///
    /// # Errors
    /// [`LinkEnd`]: there will be no link.
    pub fn link(&mut self, expected: Expected) -> Result<Arrived, LinkEnd> {
        let (peer, begin) = (expected.peer(), Instant::now());
        let looked = expected.look(self, self.next_sequence);
        self.note_time_of(&peer, begin);
        match looked? {
            Ok(link) => {
                self.links.push(link);
                Ok(Arrived::Here)
            }
            Err(expected) => Ok(Arrived::NotYet(expected)),
        }
    }

    /// What a link with this peer has taken since then counts as the time of its user.
    pub(super) fn note_time_of(&mut self, peer: &Peer, begin: Instant) {
        if let Some(user) = shares::bounded(peer) {
            let now = Instant::now();
            self.turns.note(user, now - begin, now);
        }
    }

    /// Whether links of this user have taken so much time that the next one waits.
    pub(in crate::send) fn is_early(&self, user: u32) -> bool {
        self.turns.is_early(user, Instant::now())
    }

    /// Reads what a receiver sent over its socket, takes what it gave, and looks whether it has left.
    ///
    /// # Errors
    /// [`LinkEnd`]: the link is over, and is to be [ended](Self::end).
    ///
    /// # Panics
    /// There is no such link.
    pub fn attend(&mut self, index: usize) -> Result<(), LinkEnd> {
        let link = &mut self.links[index];
        let attended = link.attend(self.next_sequence);
        let given = link.received_grants().into_iter().try_for_each(|grant| self.storage.give(grant));
        attended.and(given.map_err(LinkEnd::from))
    }

    /// Looks which receivers have left. What they never read is back at once; what they hold on to stays lent until
    /// it is handed back, or the link hangs up. Fbufs that were dropped unsent do not keep memory of a receiver that has
    /// gone.
    pub fn notice_leaving(&mut self) {
        if self.is_receivers() {
            self.take_unsent();
        }
        for link in &mut self.links {
            link.notice_leaving(self.next_sequence);
        }
    }

    /// Announces the segments that a receiver does not know, before the first message that lies in one of them:
    /// whether it knows all now. The kernel may have no room for a descriptor, or no memory for the words of their slots
    /// on the board, which passes.
    ///
    /// # Errors
    /// [`LinkEnd`]: the link is over, and is to be [ended](Self::end).
    ///
    /// # Panics
    /// There is no such link.
    pub fn announce_to(&mut self, index: usize) -> Result<bool, LinkEnd> {
        let segments: Vec<_> = self.announce(self.links[index].announced()).collect();
        let slots = self.slots();
        self.links[index].announce(segments, slots)
    }

    /// A link that was found to be over while something was sent, and why. It is to be [ended](Self::end).
    pub fn lost(&mut self) -> Option<(usize, LinkEnd)> {
        self.links.iter_mut().enumerate().find_map(|(index, link)| Some((index, link.lost()?)))
    }

    /// Ends a link; the last one takes its place. What its receiver has not read to the end is returned. What is lent over
    /// it alone is back, if its receiver has hung up, or has broken a rule. Otherwise the receiver is told that its
    /// stream is broken off, and what it has, or has yet to read, stays lent until it lets go of it or hangs up; of slots
    /// that are leased, only what it reads.
    ///
    /// # Panics
    /// There is no such link.
    pub fn end(&mut self, index: usize) -> Option<Unread> {
        self.unlink(index, false)
    }

    /// As [`Self::end`], of a receiver that is still there, and is told that it is disconnected. If it reads copies, all
    /// that was lent over the link alone is back at once, also what it has not copied yet.
    ///
    /// # Panics
    /// There is no such link.
    pub fn disconnect(&mut self, index: usize) -> Option<Unread> {
        let returns = self.links[index].disconnect_receiver();
        self.unlink(index, returns)
    }

    /// Tells a receiver that it is disconnected, as if its link were about to be ended.
    #[cfg(test)]
    pub(crate) fn tell_disconnected(&mut self, index: usize) {
        self.links[index].disconnect_receiver();
    }

    /// The receivers that hold this sender up. Of the users that hold slots it is the one that holds most of them, over all its
    /// links together; among equals another user than that of this process. Of another user these are all receivers that hold
    /// any, so that it gains nothing by more receivers; of the user of this process only the one that holds most, and the
    /// oldest link among equals. So no user makes this sender choose a receiver of a user that holds fewer slots.
    #[must_use]
    pub fn holders_of_most(&self) -> Vec<Peer> {
        let mut users: BTreeMap<Option<u32>, Vec<&Outbound>> = BTreeMap::new();
        for link in &self.links {
            users.entry(link.peer().other_user()).or_default().push(link);
        }
        // Of equals the last is taken, and the user of this process, which is none, comes first.
        let most = users.into_iter().max_by_key(|(_, links)| self.count_lent_over_any(links));
        let Some((user, links)) = most else { return Vec::new() };
        let count = |link| (self.lent_over(link).count(), Reverse(link.first_sequence()), link.peer());
        let holding = links.into_iter().map(count).filter(|&(held, ..)| held > 0);
        match user {
            Some(_) => holding.map(|(.., peer)| peer).collect(),
            None => holding.max_by_key(|&(held, first, _)| (held, first)).map(|(.., peer)| peer).into_iter().collect(),
        }
    }

    /// How many slots are lent over any of these links. Goes through all slots.
    fn count_lent_over_any(&self, links: &[&Outbound]) -> usize {
        let is_lent = |&slot: &SlotId| {
            let mark = self.mark(slot);
            mark != Mark::OUT && links.iter().any(|link| link.has(slot, mark))
        };
        self.all().filter(is_lent).count()
    }

    /// How many slots are lent over this one of the [links](Self::links).
    ///
    /// # Panics
    /// There is no such link.
    #[must_use]
    pub fn count_lent_over(&self, index: usize) -> usize {
        self.lent_over(&self.links[index]).count()
    }

    /// The slots that are lent over a link, and with which messages. Goes through all slots, or those that were not
    /// [searched](Outbound::searched).
    pub(super) fn lent_over(&self, link: &Outbound) -> impl Iterator<Item = (SlotId, Mark)> {
        let marks = (link.searched()..self.used).map(|number| (SlotId::new(number), self.mark(SlotId::new(number))));
        marks.filter(move |&(slot, mark)| mark != Mark::OUT && link.has(slot, mark))
    }

    /// Tells all receivers that nothing more comes: everything that was sent arrives, and then the end, or why the stream
    /// is broken off. What is said first counts. Without this, a pool that is dropped ends its links as a process does
    /// that dies.
    pub fn close(&mut self, abort: Option<Abort>) {
        for link in &mut self.links {
            link.close(self.next_sequence, abort);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        peer::Credentials,
        receive::{link::Inbound, received::Received},
        tests::exchange::{link_with, pool, send},
    };

    const OWN: u32 = 4_100_000_010;
    const OTHER: u32 = 4_100_000_011;
    const THIRD: u32 = 4_100_000_012;

    /// A receiver that reads in place, and the messages that it keeps.
    struct Holder {
        peer: Peer,
        inbound: Inbound,
        kept: Vec<Received>,
    }

    impl Holder {
        fn link(pool: &mut Pool, endpoint: u64, user: u32) -> Self {
            let peer = Peer::new(endpoint, Credentials::new(1, user, 1)).with_same_user(user == OWN).with_trusted(true);
            Self { peer, inbound: link_with(pool, peer), kept: Vec::new() }
        }
    }

    /// Sends so many messages. Each receiver takes them, and keeps those that `keeps` says by its place and their number.
    fn exchange(pool: &mut Pool, holders: &mut [Holder], messages: usize, keeps: impl Fn(usize, usize) -> bool) {
        for number in 0..messages {
            send(pool, 7);
            for (place, holder) in holders.iter_mut().enumerate() {
                let received = holder.inbound.take().unwrap();
                holder.kept.extend(Some(received).filter(|_| keeps(place, number)));
            }
        }
    }

    fn peers(holders: &[Holder]) -> Vec<Peer> {
        holders.iter().map(|holder| holder.peer).collect()
    }

    #[test]
    fn a_user_that_keeps_most_slots_is_chosen_and_not_the_one_that_keeps_the_oldest() {
        let mut pool = pool(8);
        let mut holders = [(1, OWN), (2, OTHER)].map(|(endpoint, user)| Holder::link(&mut pool, endpoint, user));
        assert!(pool.holders_of_most().is_empty(), "no slot is held");
        exchange(&mut pool, &mut holders, 10, |place, number| if place == 0 { number == 0 } else { number > 2 });
        assert!(!pool.search_all(), "a slot is free");
        assert_eq!(pool.holders_of_most(), [holders[1].peer]);
    }

    /// All of them together hold more than the receiver that holds more than each.
    #[test]
    fn a_user_with_one_slot_for_each_of_many_receivers_is_chosen_with_all_of_them() {
        let mut pool = pool(36);
        let mut holders = vec![Holder::link(&mut pool, 1, OWN)];
        holders.extend((2..35).map(|endpoint| Holder::link(&mut pool, endpoint, OTHER)));
        exchange(
            &mut pool,
            &mut holders,
            35,
            |place, number| if place == 0 { number < 3 } else { number == place + 2 },
        );
        // The last one holds nothing.
        let last = holders.last_mut().unwrap();
        last.kept.clear();
        assert_eq!(pool.holders_of_most(), peers(&holders[1..33]));
    }

    #[test]
    fn a_slot_that_receivers_of_a_user_hold_together_counts_once() {
        let mut pool = pool(8);
        let users = [OWN, OTHER, OTHER, OTHER, THIRD];
        let mut holders: Vec<_> =
            (1..).zip(users).map(|(number, user)| Holder::link(&mut pool, number, user)).collect();
        exchange(&mut pool, &mut holders, 3, |place, number| match place {
            0 => false,
            1..4 => number == 0,
            _ => number < 2,
        });
        assert_eq!(pool.holders_of_most(), peers(&holders[4..]));
    }

    #[test]
    fn of_equal_users_another_one_is_chosen_and_of_the_own_user_the_oldest_link_that_holds_most() {
        let mut pool = pool(8);
        let users = [OWN, OWN, OTHER];
        let mut holders: Vec<_> =
            (1..).zip(users).map(|(number, user)| Holder::link(&mut pool, number, user)).collect();
        exchange(&mut pool, &mut holders, 2, |place, _| place > 0);
        holders.push(Holder::link(&mut pool, 4, OWN));
        assert_eq!(pool.holders_of_most(), [holders[2].peer]);
        holders[2].kept.clear();
        exchange(&mut pool, &mut holders, 2, |place, _| place == 3);
        assert_eq!(pool.holders_of_most(), [holders[1].peer], "the newest holds as much");
        holders[1].kept.pop();
        assert_eq!(pool.holders_of_most(), [holders[3].peer]);
    }
}
