//! What can be asked of a sender: what it is, which receivers it has, and what it has done.

use std::ops::Add;

use fbuf_core::{
    peer::Peer,
    send::link::{Expected, LinkCounts, Outbound},
};
use fbuf_protocol::Unpaired;

use super::{Counts, Departure, DisconnectReason, ProtectionInfo, Sender, SenderCounters};
use crate::{client::OpenError, link_failure::LinkFailure};

impl Sender {
    /// How many bytes an fbuf holds.
    #[must_use]
    pub fn slot_size(&self) -> usize {
        self.pool.capacity() as usize
    }

    /// By which means what it sends is protected, and why by these. Receivers of other users may have it
    /// [copied](crate::Mechanism::Copy) all the same; each message says ([`Received::mechanism`](crate::Received::mechanism)).
    ///
    /// ```
    /// use fbuf_client::{Mechanism, Protection};
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let sender = client.sender("frames").protection(Protection::Sealed).open()?;
    /// let info = sender.protection_info();
    /// println!("{info}"); // the mechanism, and why it was chosen
    /// assert_eq!(info.mechanism.protection(), Protection::Sealed);
    /// # assert_ne!(info.mechanism, Mechanism::Shared);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn protection_info(&self) -> &ProtectionInfo {
        &self.protection_info
    }

    /// By what number peers know this endpoint, and `fbuf ls` lists it; no other has it, nor will have.
    #[must_use]
    pub fn endpoint(&self) -> u64 {
        self.registration.endpoint
    }

    /// How many receivers are linked, as far as is known: one that comes is counted after the next call that
    /// allocates, writes, waits or [looks](Self::poll_events), one that goes is not counted from some microseconds on.
    #[must_use]
    pub fn receivers(&self) -> usize {
        let doubted = self.pending_links.has_hung_up();
        self.pool.links().iter().filter(|link| link.is_open() && !(doubted && link.has_hung_up())).count()
    }

    /// The receivers that are linked, or about to be, as far as is known.
    pub fn peers(&self) -> impl Iterator<Item = Peer> {
        let doubted = self.pending_links.has_hung_up();
        let linked = self.pool.links().iter().filter(move |link| !(doubted && link.has_hung_up())).map(Outbound::peer);
        let expected = self.expected.iter().filter(move |peer| !(doubted && peer.has_hung_up())).map(Expected::peer);
        linked.chain(expected)
    }

    /// The receivers of the channel with which this sender is not paired, and why: [`Unpaired`] says it in words. Asks
    /// the broker, and waits for its answer.
    ///
    /// # Errors
    /// [`OpenError::BrokerGone`] if there is no broker now, [`OpenError::NoAnswer`] if it does not answer.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// for unpaired in sender.unpaired()? {
    ///     eprintln!("{unpaired}"); // not paired with receiver 7 (pid 4711 of user 1000): the receiver accepts …
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unpaired(&self) -> Result<Vec<Unpaired>, OpenError> {
        self.registration.unpaired()
    }

    /// The last receiver that the broker introduced and with which no link could be made, and why, as far as this process knows. Once
    /// there was one of the own user or of root, those of other users are not told.
    #[must_use]
    pub fn link_failure(&self) -> Option<LinkFailure> {
        self.pending_links.failure()
    }

    /// The receivers that have messages which they have not handed back, and how many each has.
    ///
    /// Takes time for each slot and receiver: O(slots × receivers).
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// # let fbuf = sender.allocate()?;
    /// # sender.write(fbuf)?;
    /// for (peer, slots) in sender.lent() {
    ///     println!("{} holds {slots} slots", peer.process); // "process 4711 holds 1 slots"
    /// }
    /// # assert_eq!(sender.lent().map(|(_, slots)| slots).collect::<Vec<_>>(), [1]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn lent(&self) -> impl Iterator<Item = (Peer, usize)> {
        let links = self.pool.links().iter().enumerate();
        links.map(|(index, link)| (link.peer(), self.pool.count_lent_over(index))).filter(|&(_, messages)| messages > 0)
    }

    /// A receiver that went and was not asked about yet: how it went, and what it left unread. Those of one user are told in the
    /// order in which they went, those of several users by turns. 64 are remembered: if there are more, the oldest of the user
    /// that has most of them is forgotten. The own user and root count as one.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// let fbuf = sender.allocate()?;
    /// sender.write(fbuf)?;
    /// drop(receiver);
    /// let departure = loop {
    ///     sender.poll_events();
    ///     if let Some(departure) = sender.next_departure() {
    ///         break departure;
    ///     }
    /// };
    /// assert_eq!(departure.unread.map(|unread| unread.messages), Some(1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn next_departure(&mut self) -> Option<Departure> {
        self.departures.next()
    }

    /// Disconnects a receiver: it is sent nothing more, and told so ([`GetError::Dropped`](crate::GetError::Dropped));
    /// [`Self::next_departure`] tells of it as [`DisconnectReason::Disconnected`]. False if it is not linked, nor about to be.
    ///
    /// If the receiver copies messages, as those of other users do that do not trust this sender, its slots are free
    /// at once, and what it has not copied yet is lost for it. If it reads messages where they lie, it can take what was
    /// sent, and keeps the slots of what it holds until it lets go, or ends.
    ///
    /// ```
    /// use fbuf_client::DisconnectReason;
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// let slowest = sender.lent().max_by_key(|&(_, messages)| messages);
    /// if let Some((receiver, _)) = slowest {
    ///     sender.disconnect(receiver);
    /// }
    /// # assert!(slowest.is_none());
    /// # let peer = sender.peers().next().unwrap();
    /// # assert!(sender.disconnect(peer));
    /// while let Some(departure) = sender.next_departure() {
    ///     assert_eq!(departure.reason, DisconnectReason::Disconnected);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn disconnect(&mut self, receiver: Peer) -> bool {
        self.drop_receiver(receiver, DisconnectReason::Disconnected)
    }

    /// What was done so far, and where the slots are.
    ///
    /// Takes time for each slot and receiver: O(slots × receivers).
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// let fbuf = sender.allocate()?;
    /// sender.write(fbuf)?;
    /// let counters = sender.counters();
    /// assert_eq!((counters.messages, counters.slots.lent, counters.slots.free), (1, 1, 3));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn counters(&self) -> SenderCounters {
        let Counts { bytes, waits, sleeps, growths, growth_refused, violations: _ } = self.counters;
        let links = self.pool.links().iter().map(Outbound::counts).fold(self.past, LinkCounts::add);
        SenderCounters {
            messages: self.pool.next_sequence(),
            bytes,
            skipped: links.skipped,
            waits,
            sleeps,
            bells: links.bells,
            growths,
            growth_refused,
            unguarded: self.pool.unguarded(),
            receivers: self.receivers(),
            slots: self.pool.places(),
        }
    }
}
