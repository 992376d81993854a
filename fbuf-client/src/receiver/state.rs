//! What can be asked of a receiver: which senders it has, and what it has done.

use fbuf_core::{
    peer::Peer,
    receive::link::{Greeted, Inbound},
};
use fbuf_protocol::Unpaired;

use super::{Receiver, ReceiverCounters};
use crate::{client::OpenError, link_failure::LinkFailure};

impl Receiver {
    /// By what number peers know this endpoint, and `fbuf ls` lists it; no other has it, nor will have.
    #[must_use]
    pub fn endpoint(&self) -> u64 {
        self.registration.endpoint
    }

    /// How many senders are linked, as far as is known.
    #[must_use]
    pub fn senders(&self) -> usize {
        self.links.len()
    }

    /// The senders that are linked, or about to be, as far as is known.
    pub fn peers(&self) -> impl Iterator<Item = Peer> {
        self.links.iter().map(Inbound::peer).chain(self.greeted.iter().map(Greeted::peer))
    }

    /// The senders of the channel with which this receiver is not paired, and why: [`Unpaired`] says it in words. Asks the
    /// broker, and waits for its answer.
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
    /// if receiver.senders() == 0 {
    ///     for unpaired in receiver.unpaired()? {
    ///         eprintln!("{unpaired}"); // not paired with sender 7 (pid 4711 of user 1000): the receiver requires …
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unpaired(&self) -> Result<Vec<Unpaired>, OpenError> {
        self.registration.unpaired()
    }

    /// The last sender that the broker introduced and with which no link could be made, and why, as far as this process knows. Once
    /// there was one of the own user or of root, those of other users are not told.
    #[must_use]
    pub fn link_failure(&self) -> Option<LinkFailure> {
        self.pending_links.failure()
    }

    /// What was done so far. Takes time for each sender, and for no slot.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// let fbuf = sender.allocate()?;
    /// sender.write(fbuf)?;
    /// let message = receiver.get()?;
    /// let counters = receiver.counters();
    /// assert_eq!((counters.messages, counters.missed, counters.held), (1, 0, 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn counters(&self) -> ReceiverCounters {
        ReceiverCounters {
            messages: self.messages(),
            bytes: self.links.iter().map(Inbound::bytes).sum::<u64>() + self.past_bytes,
            missed: self.links.iter().map(Inbound::missed).fold(self.past_missed, u64::saturating_add),
            missed_before: self
                .links
                .iter()
                .map(Inbound::missed_before)
                .fold(self.past_missed_before, u64::saturating_add),
            held: self.links.iter().map(Inbound::held).sum(),
            leases_refused: self.links.iter().map(Inbound::refused_leases).sum(),
            sleeps: self.sleeps,
            senders: self.links.len(),
        }
    }
}
