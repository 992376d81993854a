//! The links of a pool. They belong to it: only the state of all links says which slots are free.

use std::{collections::vec_deque, iter, slice, time::Instant};

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

    /// The receivers that hold the message that was sent first of all that are held.
    #[must_use]
    pub fn holders_of_oldest(&self) -> Vec<Peer> {
        let oldest = |link| Some((self.lent_over(link).map(|(_, mark)| mark).min()?, link.peer()));
        let held: Vec<(Mark, Peer)> = self.links.iter().filter_map(oldest).collect();
        let first = held.iter().map(|&(mark, _)| mark).min();
        held.into_iter().filter(|&(mark, _)| Some(mark) == first).map(|(_, peer)| peer).collect()
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
