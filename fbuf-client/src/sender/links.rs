//! The receivers that are linked to a sender: they come, say something, and go.

use std::{ops::Add, time::Duration};

use fbuf_core::{
    peer::Peer,
    process::sys::said,
    send::{
        link::{Arrived, Expected, LinkCounts, Outbound},
        pool::Looks,
        unread::Unread,
    },
    socket::link_message::LinkEnd,
};
use fbuf_protocol::Report;

use super::{Departure, DisconnectReason, Sender};
use crate::wait::{Attention, BUSY_LOOK_TIME, LATE_AT_ONCE, LOOK_TIME};

impl Sender {
    /// Looks at the sockets, but not more often than every so many milliseconds: the number of
    /// system calls depends on time, not on messages.
    #[cold]
    #[inline(never)]
    pub(super) fn look_if_due(&mut self) {
        // A receiver is on its way, or there is none.
        let urgent = !self.expected.is_empty() || self.receivers() == 0;
        if self.is_armed
            || self.pending_links.has_hung_up()
            || self.pace.is_due(if urgent { LOOK_TIME } else { BUSY_LOOK_TIME })
        {
            self.poll_events();
        } else if self.pending_links.is_filled() {
            self.read_new_links(&Attention::begin());
        }
    }

    /// Looks if there is a reason, before a message is written: false if this process was forked.
    #[cold]
    #[inline(never)]
    pub(super) fn heed(&mut self) -> bool {
        let here = self.generation.is_current();
        if here {
            self.look_if_due();
        }
        here
    }

    /// Reads what came over sockets, and letters, as long as [`Attention`] lasts: the rest is read by the next call.
    pub(super) fn attend(&mut self) {
        self.pace.looked();
        self.say();
        let attention = Attention::begin();
        self.read_new_links(&attention);
        self.answer_late();
        // One at least, so that letters do not keep it from any.
        while let Some(link) = self.ready.next() {
            if let Some(index) = self.pool.links().iter().position(|other| other.peer().link == link) {
                self.attend_to(index);
            } else if let Some(index) = self.expected.iter().position(|other| other.peer().link == link) {
                let expected = self.expected.swap_remove(index);
                self.look_for(expected);
            }
            if !attention.lasts() {
                break;
            }
        }
    }

    /// Answers receivers that could not be answered before. A few at a time: it may be that these cannot either.
    fn answer_late(&mut self) {
        for _ in 0..LATE_AT_ONCE {
            let Some(index) = self.expected.iter().position(Expected::is_unanswered) else { return };
            // Behind the others, if it cannot.
            let expected = self.expected.remove(index);
            self.look_for(expected);
        }
    }

    /// Says what it has done, for reports.
    pub(super) fn say(&self) {
        self.pending_links.say(|| {
            let links = self.pool.links().iter().map(Outbound::counts).fold(self.past, LinkCounts::add);
            Report {
                messages: self.pool.next_sequence(),
                bytes: self.counters.bytes,
                left_out: links.skipped,
                waits: self.counters.waits,
                sleeps: self.counters.sleeps,
                violations: self.counters.violations,
                slots: self.pool.slots().into(),
                ..Report::default()
            }
        });
    }

    /// Reads what came from one receiver.
    pub(super) fn attend_to(&mut self, index: usize) {
        if let Err(end) = self.pool.attend(index) {
            self.end(index, end);
        }
    }

    pub(super) fn read_new_links(&mut self, attention: &Attention) {
        while let Some(new_link) = self.pending_links.next() {
            match new_link {
                Ok(expected) => match self.sockets.add(expected.socket(), expected.peer().link) {
                    Ok(()) => self.look_for(expected),
                    Err(error) => self.fail(expected.peer(), DisconnectReason::Exhausted { what: said(&error) }),
                },
                Err((peer, what)) => self.fail(peer, DisconnectReason::Exhausted { what }),
            }
            if !attention.lasts() {
                break;
            }
        }
        if !self.expected.is_empty() {
            // Until they are here, each message looks.
            self.pending_links.remind();
        }
    }

    pub(super) fn look_for(&mut self, expected: Expected) {
        let (peer, was_ignored) = (expected.peer(), expected.is_unanswered());
        match self.pool.link(expected) {
            Ok(Arrived::Here) => {
                let index = self.pool.links().len() - 1;
                if was_ignored && let Err(error) = self.sockets.hear(self.pool.links()[index].socket(), peer.link) {
                    return self.end(index, LinkEnd::Exhausted(said(&error)));
                }
                self.same_cpu.add(peer);
                self.pending_links.link(peer, None);
                if self.pool.is_leased() {
                    // It may have given its slots already.
                    self.attend_to(index);
                }
            }
            Ok(Arrived::NotYet(expected)) => {
                // What it sends is not read before it is answered.
                if expected.is_unanswered() {
                    self.sockets.ignore(expected.socket());
                }
                self.expected.push(expected);
            }
            Err(LinkEnd::HangUp | LinkEnd::Disconnected) => self.pending_links.fail(peer, None),
            Err(LinkEnd::Violation(violation)) => self.fail(peer, DisconnectReason::Violation { violation }),
            Err(LinkEnd::Exhausted(what)) => self.fail(peer, DisconnectReason::Exhausted { what }),
        }
    }

    /// No link can be made with a receiver.
    fn fail(&mut self, peer: Peer, reason: DisconnectReason) {
        let why = match &reason {
            DisconnectReason::Exhausted { what } => what.clone(),
            DisconnectReason::Violation { violation } => format!("it broke a rule: {violation}"),
            other => format!("{other:?}"),
        };
        self.pending_links.fail(peer, Some(why));
        self.depart(peer, reason, None);
    }

    /// Ends a link. All that was lent over it alone is back.
    pub(super) fn end(&mut self, index: usize, end: LinkEnd) {
        let link = &self.pool.links()[index];
        let peer = link.peer();
        self.same_cpu.remove(peer);
        self.sockets.remove(link.socket());
        self.past = self.past + link.counts();
        let reason = match end {
            LinkEnd::HangUp | LinkEnd::Disconnected if link.has_left() => {
                link.failure().map_or(DisconnectReason::Left, |reason| DisconnectReason::Failed { reason })
            }
            LinkEnd::HangUp | LinkEnd::Disconnected => DisconnectReason::Died,
            LinkEnd::Violation(violation) => DisconnectReason::Violation { violation },
            LinkEnd::Exhausted(what) => DisconnectReason::Exhausted { what },
        };
        let unread = self.pool.end(index);
        self.depart(peer, reason, unread);
    }

    /// Disconnects a receiver that is linked, or about to be: whether it was.
    pub(super) fn drop_receiver(&mut self, peer: Peer, reason: DisconnectReason) -> bool {
        let is_it = |other: Peer| other.endpoint == peer.endpoint;
        if let Some(index) = self.expected.iter().position(|expected| is_it(expected.peer())) {
            self.sockets.remove(self.expected[index].socket());
            self.expected.swap_remove(index);
            self.depart(peer, reason, None);
            return true;
        }
        let Some(index) = self.pool.links().iter().position(|link| is_it(link.peer())) else { return false };
        let link = &self.pool.links()[index];
        self.same_cpu.remove(peer);
        self.sockets.remove(link.socket());
        self.past = self.past + link.counts();
        let unread = self.pool.disconnect(index);
        self.depart(peer, reason, unread);
        true
    }

    /// Disconnects the receivers of the user that holds most slots, or of the own user the one that does, since none came back
    /// for so long. If there is no room for a message although slots are free, it is those of a user to which too much is
    /// under way, perhaps over links that have ended.
    pub(super) fn drop_holders(&mut self, time: Duration) {
        let without_room = self.pool.without_room();
        let peers = if without_room.is_empty() { self.pool.holders_of_most() } else { without_room };
        for peer in peers {
            self.drop_receiver(peer, DisconnectReason::HeldUp { limit: time });
        }
    }

    /// Ends the links of receivers that have closed and hold nothing any more.
    pub(super) fn remove_departed(&mut self, looks: &mut Looks) {
        for index in (0..self.pool.links().len()).rev() {
            let link = &self.pool.links()[index];
            if link.is_open() {
                continue;
            }
            self.pending_links.part(link.peer());
            if !self.pool.may_lend_over(index, looks) {
                self.end(index, LinkEnd::HangUp);
            }
        }
    }

    /// Forgets links that this side has ended, once their receivers have handed back all that they had.
    pub(super) fn forget_parted(&mut self, looks: &mut Looks) {
        self.pool.forget_parted(looks);
        self.pending_links.release_shares(self.pool.take_forgotten());
    }

    pub(super) fn depart(&mut self, peer: Peer, reason: DisconnectReason, unread: Option<Unread>) {
        if self.pool.is_parted(peer.link) {
            self.pending_links.keep_share(peer);
        }
        self.pending_links.forget(peer);
        self.counters.violations += u64::from(matches!(reason, DisconnectReason::Violation { .. }));
        self.departures.add(Departure { peer, reason, unread });
    }
}
