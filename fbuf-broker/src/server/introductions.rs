//! Introductions: made at once, or when what they lacked is there.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use fbuf_core::{
    introduced::Introduction,
    peer::LinkId,
    points,
    process::{foreign::Foreign, sys::said},
    receive::link::SlotSource,
    socket::{PacketSocket, wire::Descriptor},
};
use fbuf_protocol::Slots;
use tokio::{task::yield_now, time::sleep};
use tracing::warn;

use super::{Broker, Inner, LOOKS, lock, mailbox::Mailbox};
use crate::{
    share::Holding,
    state::{ClientId, Lack, Opening, Pair, PairEnd, Turn},
};

/// How long pairs wait before they are tried again, at least.
const AGAIN: Duration = Duration::from_millis(20);
/// Of so many parts of the time trying again takes one.
const PARTS: u32 = 10;
/// How long they wait at most.
const LATEST: Duration = Duration::from_secs(1);

impl Inner {
    /// Introduces the first pairs of an endpoint that was opened. The others wait, as those do that lack something.
    pub(super) fn introduce(&mut self, opening: &Opening, user: u32) {
        let (now, mut refused) = (Instant::now(), None);
        let Self { state, mailboxes, slots, log_limit, .. } = self;
        let mut made = Vec::new();
        state.introduce(opening, now, |pair, holdings| {
            introduce(mailboxes, slots, pair, holdings, &mut refused).map(|link| made.push((*pair, link)))
        });
        made.iter().for_each(|(pair, link)| state.name(pair, *link));
        if let Some(error) = refused.filter(|_| log_limit.may_log(user, now)) {
            warn!(error = said(&error), "the socket of a link cannot be made");
        }
        self.have_tried_again();
    }

    /// Introduces pairs of a user that lack nothing any more.
    fn pair_again(&mut self, user: u32) -> Turn {
        let Self { state, mailboxes, slots, .. } = self;
        let mut made = Vec::new();
        let turn = state.pair_again(user, Instant::now(), |pair, holdings| {
            introduce(mailboxes, slots, pair, holdings, &mut None).map(|link| made.push((*pair, link)))
        });
        made.iter().for_each(|(pair, link)| state.name(pair, *link));
        turn
    }

    /// Sees to it that pairs that wait now are tried again.
    pub(super) fn have_tried_again(&self) {
        if self.state.waiting().next().is_some() {
            self.waiting.notify_one();
        }
    }
}

impl Broker {
    /// A client has read, or opened, something: introduces the pairs of its user that wait only for that. Other users have
    /// their turn in between.
    pub(super) async fn pair_now(&self, client: ClientId, user: u32) {
        loop {
            let turn = {
                let mut inner = lock(&self.0);
                let turn = inner.pair_again(user);
                inner.state.note_work(client, turn.looks / LOOKS, Instant::now());
                turn
            };
            if turn.pairs == 0 {
                return;
            }
            yield_now().await;
        }
    }

    /// Tries again, for ever, to introduce what waits: one turn of each user after the other. What a pair lacks can come
    /// back in many ways, so this looks every now and then, while there is such a pair, for a small part of the time.
    pub(super) async fn pair_waiting(&self) -> Infallible {
        let waiting = lock(&self.0).waiting.clone();
        loop {
            waiting.notified().await;
            loop {
                let start = Instant::now();
                let users: Vec<_> = lock(&self.0).state.waiting().collect();
                if users.is_empty() {
                    break;
                }
                for user in users {
                    let _ = lock(&self.0).pair_again(user);
                    yield_now().await;
                }
                sleep((start.elapsed() * (PARTS - 1)).clamp(AGAIN, LATEST)).await;
            }
        }
    }
}

/// Makes the link socket of a pair, and posts both ends: the name of the link. If there is none, what the kernel has said.
fn introduce(
    mailboxes: &HashMap<ClientId, Arc<Mailbox>>,
    slots: &HashMap<ClientId, HashMap<u64, Vec<Arc<Foreign>>>>,
    pair: &Pair,
    holdings: [Holding; 2],
    refused: &mut Option<io::Error>,
) -> Result<LinkId, Lack> {
    let &Pair { sender, receiver, geometry, mechanism, .. } = pair;
    let mailbox = |party: PairEnd| match mailboxes.get(&party.client) {
        Some(mailbox) if mailbox.has_room() => Ok(mailbox),
        _ => Err(Lack::Room(party.client)),
    };
    let mailboxes = [mailbox(sender)?, mailbox(receiver)?];
    let link = PacketSocket::pair().and_then(|ends| Ok((ends, LinkId::draw()?)));
    let ((to_sender, to_receiver), link) = link.map_err(|error| {
        *refused = Some(error);
        Lack::Socket
    })?;
    let slots = slots.get(&sender.client).and_then(|slots| slots.get(&sender.endpoint)).into_iter().flatten();
    let slot_source = match pair.slots {
        Slots::Segments => SlotSource::Segments,
        Slots::Broker { .. } => SlotSource::FromBroker(slots.cloned().map(Descriptor::from).collect()),
        Slots::Receiver => SlotSource::FromReceiver,
        Slots::Sender => SlotSource::FromSender,
    };
    // As soon as the other client has its end, it may send what takes long to close into this one: until that is done, it
    // takes up one of the descriptors that its user may have here.
    let closed_for = |other: PairEnd, socket: OwnedFd, holding: &Arc<Holding>| {
        Foreign::from(socket).of_user(Some(other.peer.process.uid)).with(holding.clone())
    };
    let introduction = |own: PairEnd, other: PairEnd, slot_source: SlotSource, socket: Foreign| Introduction {
        endpoint: own.endpoint,
        peer: other.peer.with_link(link),
        geometry: geometry.terms(),
        mechanism,
        slot_source,
        socket: Descriptor::from(socket),
    };
    let ([to_senders, to_receivers], [for_sender, for_receiver]) = (mailboxes, holdings.map(Arc::new));
    let to_receiver = closed_for(sender, to_receiver, &for_sender);
    let to_sender = closed_for(receiver, to_sender, &for_receiver);
    to_receivers.post(introduction(receiver, sender, slot_source, to_receiver), for_receiver);
    points::reach("broker: introduced to one");
    to_senders.post(introduction(sender, receiver, SlotSource::Segments, to_sender), for_sender);
    points::reach("broker: introduced to both");
    Ok(link)
}
