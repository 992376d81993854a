//! Introductions: made at once, or when those who are introduced have read what they were sent before.

use std::{io, os::fd::OwnedFd};

use fbuf_core::{
    control::{Introduction, LinkId, Lodging, Refusal, Slots},
    inbound::Peer,
    points,
    socket::PacketSocket,
    wire::Descriptor,
};

use tracing::debug;

use super::Inner;
use crate::state::{ClientId, Pair, Party};

impl Inner {
    /// Introduces a pair; or has it wait, if either client has not read what it was sent before, for a link more to the
    /// account of the user that pays for it.
    pub(super) fn introduce(&mut self, pair: Pair) -> Result<(), Refusal> {
        let Some(client) = self.without_room(&pair) else {
            return self.make(pair).map_err(|error| Refusal::Exhausted(error.to_string()));
        };
        if let Some(charge) = self.state.charge_waiting(&pair)? {
            self.pending.entry(client).or_default().push_back((pair, charge));
        }
        Ok(())
    }

    /// Introduces those that an end has left to each other. What cannot be introduced now, is not.
    pub(super) fn introduce_all(&mut self, pairs: Vec<Pair>) {
        for pair in pairs {
            if let Err(error) = self.introduce(pair) {
                debug!(%error, "not introduced");
            }
        }
    }

    /// Of a pair, the client that has to read first, or one of a user that has its share of the broker's descriptors.
    fn without_room(&self, pair: &Pair) -> Option<ClientId> {
        let is_full = |client: &ClientId| {
            self.mailboxes.get(client).is_some_and(|mailbox| !mailbox.has_room())
                || self.state.take_descriptor(*client).is_none()
        };
        [pair.sender.client, pair.receiver.client].into_iter().find(is_full)
    }

    /// A client may have read what it was sent; whether it has read anything.
    pub(super) fn note_read(&mut self, client: ClientId, anything: bool) {
        self.catch_up(client);
        if anything {
            self.waiting_beside(client).into_iter().for_each(|other| self.catch_up(other));
        }
    }

    /// The other clients of the same user for which pairs wait: what one reads may be what another lacks.
    pub(super) fn waiting_beside(&self, client: ClientId) -> Vec<ClientId> {
        let others = self.pending.keys().copied().filter(|&other| other != client);
        others.filter(|&other| self.state.are_of_one_user(client, other)).collect()
    }

    /// Introduces those pairs that waited for a client, who may have read.
    pub(super) fn catch_up(&mut self, client: ClientId) {
        let Some(mut pending) = self.pending.remove(&client) else { return };
        while let Some((pair, charge)) = pending.pop_front() {
            if !self.state.is_open(&pair.sender) || !self.state.is_open(&pair.receiver) {
                continue;
            }
            match self.without_room(&pair) {
                Some(full) if full != client => self.pending.entry(full).or_default().push_back((pair, charge)),
                None if self.make(pair).is_ok() => {}
                // It has no room, or this process no descriptor: later.
                _ => {
                    pending.push_front((pair, charge));
                    break;
                }
            }
        }
        if !pending.is_empty() {
            self.pending.insert(client, pending);
        }
    }

    /// Makes the link socket of a pair and posts both ends.
    fn make(&self, pair: Pair) -> io::Result<()> {
        let (to_sender, to_receiver) = PacketSocket::pair()?;
        let link = LinkId::draw()?;
        let introduction = |own: Party, other: Party, lodging: Lodging, socket: OwnedFd| Introduction {
            endpoint: own.endpoint,
            peer: Peer { link, ..other.peer },
            slot_bytes: pair.geometry.slot_bytes().into(),
            max_slots: pair.geometry.max_slots().into(),
            mechanism: pair.mechanism,
            lodging,
            socket: Descriptor::from(socket),
        };
        let Pair { sender, receiver, .. } = pair;
        let slots = self.slots.get(&sender.client).and_then(|slots| slots.get(&sender.endpoint)).into_iter().flatten();
        let lodging = match pair.slots {
            Slots::Segments => Lodging::Segments,
            Slots::Broker { .. } => Lodging::Given(slots.cloned().map(Descriptor::from).collect()),
            Slots::Receiver => Lodging::Yours,
            Slots::Sender => Lodging::Theirs,
        };
        let ends = [(receiver, sender, lodging, to_receiver), (sender, receiver, Lodging::Segments, to_sender)];
        for (own, other, lodging, socket) in ends {
            if let Some(mailbox) = self.mailboxes.get(&own.client) {
                let introduction = introduction(own, other, lodging, socket);
                // Of two ends of one user the second may be one more than its share.
                mailbox.post(introduction, self.state.take_descriptor(own.client));
                points::reach("broker: introduced to one");
            }
        }
        points::reach("broker: introduced to both");
        Ok(())
    }
}
