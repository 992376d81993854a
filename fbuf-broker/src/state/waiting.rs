//! Pairs that fit and could not be made: which ends wait, for what, and when they are compared again.
//!
//! Nothing is kept of a pair, so no user can have the broker keep many. An end that lacks something has a place in its
//! user's queue. When it comes to its turn, it is compared with all ends that it is not linked with. A turn of a user is
//! short, however many ends there are, and each link that is made counts as a request of the user that came last.

use std::time::Instant;

use fbuf_core::peer::LinkId;
use fbuf_protocol::Mismatch;

use super::{Client, ClientId, Opening, Pair, PairEnd, State, channel_of};
use crate::share::Holding;

/// How many ends are compared in one turn of a user at most, so that other users have theirs soon.
pub(super) const MOST_LOOKS: usize = 1024;
/// How many links are made at most in one turn, or when an endpoint is opened.
pub(super) const MOST_PAIRS: usize = 32;

/// Why a pair cannot be introduced now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// This client has not read what it was sent before.
    Room(ClientId),
    /// There is no descriptor for the socket of the link.
    Socket,
}

/// That an end waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wait {
    /// Its place in the queue of its user.
    pub ticket: u64,
    /// What it, or another end that it fits with, lacked last.
    pub why: Mismatch,
}

/// What a user's turn came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turn {
    /// How many links were made.
    pub pairs: usize,
    /// How many ends were looked at.
    pub looks: usize,
}

impl Turn {
    fn is_over(&self) -> bool {
        self.looks >= MOST_LOOKS || self.pairs >= MOST_PAIRS
    }
}

impl State {
    /// Introduces the first pairs of an endpoint that was opened, by a function that may lack something for it. The other
    /// pairs, and those that lack something, wait.
    pub fn introduce(
        &mut self,
        opening: &Opening,
        now: Instant,
        mut introduce: impl FnMut(&Pair, [Holding; 2]) -> Result<(), Lack>,
    ) {
        for (count, pair) in opening.pairs.iter().enumerate() {
            let introduced = match count < MOST_PAIRS {
                true => self.try_to_introduce(opening.number, pair, &mut introduce),
                false => Err((opening.number, Mismatch::Due)),
            };
            match introduced {
                Ok(()) => self.note_link(opening.number, now),
                Err((end, why)) => self.postpone(pair, end, why),
            }
        }
    }

    /// Compares ends of a user that wait with all others again, and introduces those that lack nothing any more. It
    /// begins with the end that has waited for longest, and goes on as long as a turn may be.
    pub fn pair_again(
        &mut self,
        user: u32,
        now: Instant,
        mut introduce: impl FnMut(&Pair, [Holding; 2]) -> Result<(), Lack>,
    ) -> Turn {
        let (newest, mut turn) = (self.last, Turn::default());
        while !turn.is_over()
            && let Some((&(_, ticket), &end)) = self.waiting.range((user, 0)..=(user, newest)).next()
        {
            self.waiting.remove(&(user, ticket));
            if let Some(why) = self.compare(end, now, &mut turn, &mut introduce) {
                self.wait(end, why);
            }
        }
        turn
    }

    /// Compares an end with all others with which it is not linked: why it has to wait again.
    fn compare(
        &mut self,
        end: u64,
        now: Instant,
        turn: &mut Turn,
        introduce: &mut impl FnMut(&Pair, [Holding; 2]) -> Result<(), Lack>,
    ) -> Option<Mismatch> {
        let name = self.channel_of(end)?.clone();
        let is_confidential = self.policy.is_confidential(&name);
        self.channels.get_mut(&name)?.side_mut(end)?.waits = None;
        let mut behind = 0;
        loop {
            let channel = self.channels.get(&name)?;
            let (looks, other) = channel.next_apart(end, behind);
            turn.looks += looks;
            let other = other?;
            behind = other;
            if let Some(Ok(pair)) = channel.fit(end, other, is_confidential) {
                let lacks = match self.charge_link(pair.payer) {
                    Err(spent) => Err((self.end_of(&pair, pair.payer, end), Mismatch::Quota { user: spent.user })),
                    Ok(charge) => self.try_to_introduce(end, &pair, introduce).map(|()| charge),
                };
                match lacks {
                    Ok(charge) => {
                        self.channels.get_mut(&name)?.link(end, other, charge);
                        self.note_link(end.max(other), now);
                        turn.pairs += 1;
                    }
                    Err((lacking, why)) if lacking == end => return Some(why),
                    Err((lacking, why)) => self.wait(lacking, why),
                }
            }
            if turn.is_over() {
                return Some(Mismatch::Due);
            }
        }
    }

    /// Introduces a pair; or which of its ends lacks what, this one if it may be either.
    fn try_to_introduce(
        &self,
        end: u64,
        pair: &Pair,
        introduce: &mut impl FnMut(&Pair, [Holding; 2]) -> Result<(), Lack>,
    ) -> Result<(), (u64, Mismatch)> {
        let user = |client| self.clients.get(&client).map_or(0, |client: &Client| client.payer.user.id);
        let lacks = |client, why: fn(u32) -> Mismatch| (self.end_of(pair, client, end), why(user(client)));
        let hold = |client| {
            let held = self.clients.get(&client).and_then(|client| client.payer.account.take_descriptor());
            held.ok_or_else(|| lacks(client, |user| Mismatch::Descriptors { user }))
        };
        let holdings = [hold(pair.sender.client)?, hold(pair.receiver.client)?];
        introduce(pair, holdings).map_err(|lack| match lack {
            Lack::Room(client) => lacks(client, |user| Mismatch::Unread { user }),
            Lack::Socket => lacks(pair.payer, |_| Mismatch::Exhausted),
        })
    }

    /// The end of a pair that is of this client; this one, if it is.
    fn end_of(&self, pair: &Pair, client: ClientId, this: u64) -> u64 {
        let number = |party: &PairEnd| {
            let of = self.clients.get(&party.client).filter(|_| party.client == client)?;
            Some(of.endpoints.get(&party.endpoint)?.number)
        };
        let ends = [number(&pair.sender), number(&pair.receiver)];
        if ends.contains(&Some(this)) { this } else { ends.into_iter().flatten().next().unwrap_or(this) }
    }

    fn number_of(&self, party: &PairEnd) -> Option<u64> {
        Some(self.clients.get(&party.client)?.endpoints.get(&party.endpoint)?.number)
    }

    /// A pair was introduced by this name. An end that comes again, since it had lost its connection, is known by that to be
    /// linked with the other.
    pub fn name(&mut self, pair: &Pair, link: LinkId) {
        if let (Some(sender), Some(receiver)) = (self.number_of(&pair.sender), self.number_of(&pair.receiver))
            && let Some(name) = self.channel_of(sender).cloned()
            && let Some(channel) = self.channels.get_mut(&name)
        {
            channel.name(sender, receiver, link);
        }
    }

    /// A pair is not linked yet, for what this end lacks.
    fn postpone(&mut self, pair: &Pair, end: u64, why: Mismatch) {
        if let (Some(sender), Some(receiver)) = (self.number_of(&pair.sender), self.number_of(&pair.receiver))
            && let Some(name) = self.channel_of(sender).cloned()
            && let Some(channel) = self.channels.get_mut(&name)
            && channel.unlink(sender, receiver)
        {
            // Another receiver may do as well.
            self.wait(sender, why);
        }
        self.wait(end, why);
    }

    /// An end waits from now on, or goes on waiting.
    pub(super) fn wait(&mut self, end: u64, why: Mismatch) {
        let ticket = self.next();
        let Some(name) = channel_of(&self.numbers, &self.clients, end) else { return };
        let Some(side) = self.channels.get_mut(name).and_then(|channel| channel.side_mut(end)) else { return };
        match &mut side.waits {
            Some(wait) => wait.why = why,
            none => {
                *none = Some(Wait { ticket, why });
                self.waiting.insert((side.user(), ticket), end);
            }
        }
    }

    /// The users with ends that wait.
    pub fn waiting(&self) -> impl Iterator<Item = u32> {
        let first = |from| Some(self.waiting.range((from?, 0)..).next()?.0.0);
        std::iter::successors(first(Some(0)), move |&user| first(user.checked_add(1)))
    }

    /// A link is as much work as a request of the user of the end that came last.
    fn note_link(&self, end: u64, now: Instant) {
        if let Some(&(client, _)) = self.numbers.get(&end) {
            self.note_work(client, 1, now);
        }
    }
}
