//! How a receiver is opened, and where senders are introduced to it.

use std::{collections::VecDeque, sync::Arc};

use fbuf_core::{
    control::{LinkId, Lodging, Report, Role},
    inbound::{GreetError, Greeted, Peer},
    protection::{Mechanism, Protection},
    slot::Geometry,
    socket::PacketSocket,
};

use super::Receiver;
use crate::{
    client::{Client, OpenError},
    endpoint::{Inbox, Post, Ready, Sockets},
    wait::{Crowd, Gathering, Pace, Patience, Wait},
};

/// Prepares a [`Receiver`].
#[derive(Debug, Clone)]
#[must_use]
pub struct ReceiverBuilder {
    client: Client,
    channel: String,
    wait: Wait,
    skip_above: Option<u32>,
    stay: bool,
    require: Protection,
}

impl ReceiverBuilder {
    pub(crate) fn new(client: Client, channel: &str) -> Self {
        let (channel, require) = (channel.to_owned(), Protection::default());
        Self { client, channel, wait: Wait::default(), skip_above: None, stay: false, require }
    }

    /// How [`Receiver::get`] passes the time while there is no message.
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Rather miss messages than hold senders back: a sender leaves messages out for this receiver
    /// while more than `count` of its slots are waiting to be read here, or held. If not set, senders
    /// wait for this receiver.
    pub fn skip_above(mut self, count: u32) -> Self {
        self.skip_above = Some(count);
        self
    }

    /// Wait for the next sender when the last one has ended, rather than return [`GetError::Ended`](super::GetError::Ended).
    pub fn stay(mut self) -> Self {
        self.stay = true;
        self
    }

    /// Refuse senders whose messages are protected less than this. If not set, whatever the rule of trust
    /// allows: volatile messages come only from the own user, and from those whom the broker was told to
    /// trust.
    pub fn require(mut self, protection: Protection) -> Self {
        self.require = protection;
        self
    }

    /// Opens the receiver. It gets what is written from the moment it is linked with a sender; a
    /// sender can wait for that.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is kept then.
    pub fn open(self) -> Result<Receiver, OpenError> {
        let Self { client, channel, wait, skip_above, stay, require } = self;
        fbuf_core::channel::ChannelName::new(channel.as_str())?;
        let inbox = Arc::new(Inbox::new()?);
        let senders = Box::new(Senders { inbox: inbox.clone(), skip_above });
        let (registration, _) = client.open(&channel, Role::Receiver { require }, senders)?;
        let sockets = Sockets::new(inbox.wake().clone(), registration.watch_hang_ups(&inbox))?;
        Ok(Receiver {
            links: Vec::new(),
            turn: 0,
            greeted: Vec::new(),
            sockets,
            ready: Ready::none(),
            inbox,
            wait,
            stay,
            had_sender: false,
            patience: Patience::new(),
            crowd: Crowd::default(),
            gathering: Gathering::default(),
            unread: false,
            pace: Pace::new(),
            troubles: VecDeque::new(),
            past_missed: 0,
            past_messages: 0,
            past_bytes: 0,
            sleeps: 0,
            violations: 0,
            registration,
        })
    }
}

/// A sender that was greeted, or why it could not be.
pub(super) type Letter = Result<Greeted, (Peer, GreetError)>;

/// Where senders are introduced. They are greeted on the control thread, so that they find this receiver
/// ready even while it does something else.
struct Senders {
    inbox: Arc<Inbox<Letter>>,
    skip_above: Option<u32>,
}

impl Post for Senders {
    fn introduce(&self, peer: Peer, socket: PacketSocket, geometry: Geometry, mechanism: Mechanism, lodging: Lodging) {
        // Once it is greeted it may send, and the receiver must not find that all is over meanwhile.
        self.inbox.expect(peer);
        let greeted = Greeted::new(peer, socket, geometry, mechanism, lodging, self.skip_above);
        self.inbox.post(peer, greeted.map_err(|error| (peer, error)));
    }

    fn links(&self) -> Vec<LinkId> {
        self.inbox.links()
    }

    fn report(&self) -> Report {
        self.inbox.report()
    }

    fn held(&self) -> Vec<(LinkId, usize, u64)> {
        self.inbox.held()
    }
}
