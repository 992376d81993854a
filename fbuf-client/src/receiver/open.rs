//! How a receiver is opened, and where senders are introduced to it.

use std::sync::Arc;

use fbuf_core::{
    introduced::Introduced,
    limits::{MAX_LEASED, MAX_REPORTS},
    peer::{LinkId, Peer},
    process::fork::Generation,
    protection::Protection,
    receive::link::{GreetError, Greeted},
};
use fbuf_protocol::{Limits, Report, Role, channel::ChannelName, name::Label};

use super::Receiver;
use crate::{
    acceptance::{Acceptance, Predicate},
    by_user::ByUser,
    client::{Client, OpenError},
    endpoint::{Brought, LinkSink, NO_ROOM, PendingLinks},
    link_source::LinkSource,
    sender::OptionsError,
    sockets::{Ready, Sockets},
    wait::{Batching, Pace, SameCpuPeers, SpinBudget, Wait},
};

/// Prepares a [`Receiver`].
///
/// ```
/// use fbuf_client::{Protection, Wait};
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let receiver = client
///     .receiver("camera/front")
///     .max_backlog(2)
///     .require(Protection::Sealed)
///     .max_slot_size(16 << 20)
///     .wait(Wait::Block)
///     .keep_waiting()
///     .open()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct ReceiverBuilder {
    client: Client,
    channel: String,
    label: Option<String>,
    wait: Wait,
    max_backlog: Option<usize>,
    keep_waiting: bool,
    require: Protection,
    accepts: Limits,
    acceptance: Acceptance,
}

impl ReceiverBuilder {
    pub(crate) fn new(client: Client, channel: &str) -> Self {
        Self {
            client,
            channel: channel.to_owned(),
            label: None,
            wait: Wait::default(),
            max_backlog: None,
            keep_waiting: false,
            require: Protection::default(),
            accepts: Limits::default(),
            acceptance: Acceptance::default(),
        }
    }

    /// The name of this receiver, as that of a [sender](crate::SenderBuilder::label): 1 to 64 bytes of UTF-8 that
    /// print, without white space. If not set, it has none.
    pub fn label(mut self, label: &str) -> Self {
        self.label = Some(label.to_owned());
        self
    }

    /// How [`Receiver::get`] passes the time while there is no message.
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Rather miss messages than hold senders back: while so many messages of one sender wait here to be read, or are held,
    /// that sender leaves messages out for this receiver. At least 1. If not set, senders wait for this receiver.
    ///
    /// A step of more than one between two [sequence numbers](crate::Received::sequence) of a sender shows how many were left
    /// out; [`ReceiverCounters::missed`](super::ReceiverCounters::missed) has their sum.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut display = client.receiver("frames").max_backlog(2).open()?;
    /// let mut camera = client.sender("frames").slot_size(64).slots(4).open()?;
    /// camera.wait_for_receivers(1)?;
    /// for _ in 0..100 {
    ///     let fbuf = camera.allocate()?; // waits for no display
    ///     camera.write(fbuf)?;
    /// }
    /// let shown = [display.get()?.sequence(), display.get()?.sequence()];
    /// assert_eq!(shown, [0, 1]);
    /// let fbuf = camera.allocate()?;
    /// camera.write(fbuf)?;
    /// assert_eq!(display.get()?.sequence(), 100);
    /// assert_eq!(display.counters().missed, 98);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias("skip_above", "queue_size", "conflate"))]
    pub fn max_backlog(mut self, messages: usize) -> Self {
        self.max_backlog = Some(messages);
        self
    }

    /// Wait for the next sender when the last one has ended, rather than return [`GetError::Ended`](super::GetError::Ended).
    pub fn keep_waiting(mut self) -> Self {
        self.keep_waiting = true;
        self
    }

    /// Accepts only senders of messages that are protected at least like this. If not set, all that the rule of trust
    /// allows: volatile messages come only from senders of the same user, and of users that the broker was told to
    /// trust.
    ///
    /// If a sender of the same user gives less, the one of the two that is opened later is refused; a sender of another
    /// user is just not paired with this receiver, as [`Receiver::unpaired`] and `fbuf ls` tell.
    ///
    /// ```
    /// use fbuf_client::Protection;
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("uploads").require(Protection::Sealed).open()?;
    /// assert!(client.sender("uploads").open().is_err(), "its messages would be volatile");
    /// let mut sender = client.sender("uploads").protection(Protection::Sealed).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// # let fbuf = sender.allocate()?;
    /// # sender.write(fbuf)?;
    /// assert_eq!(receiver.get()?.mechanism().protection(), Protection::Sealed);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn require(mut self, protection: Protection) -> Self {
        self.require = protection;
        self
    }

    /// Accepts only senders with at most so many slots: this process keeps 24 bytes for each. If not set, 2²⁰ (all) of the
    /// own user's senders, and 65,536 of other users'.
    pub fn max_slots(mut self, count: usize) -> Self {
        let count = count as u64;
        (self.accepts.own.max_slots, self.accepts.others.max_slots) = (count, count);
        self
    }

    /// Accepts only senders with slots of at most so many bytes, which no message is longer than: of other users',
    /// messages are copied. If not set, 1 GiB (all) of the own user's senders, and 4 MiB of other users'.
    pub fn max_slot_size(mut self, bytes: usize) -> Self {
        let bytes = bytes as u64;
        (self.accepts.own.slot_bytes, self.accepts.others.slot_bytes) = (bytes, bytes);
        self
    }

    /// Receives from senders of these users only, by their ids as the broker knows them ([`Peer::process`]); at most 256.
    /// If not set, from those of all users that the broker's policy permits to send.
    pub fn from_users(mut self, users: impl IntoIterator<Item = u32>) -> Self {
        self.acceptance.users = Some(users.into_iter().collect());
        self
    }

    /// Is linked only with senders for which this returns true, which is asked before a sender hears of this receiver. It
    /// runs on the thread of the [`Client`] and must not wait for anything.
    ///
    /// If it panics, the peer is not accepted; a panic of it, or of what it owns when that is dropped, ends nothing else. It runs with
    /// all signals blocked, and a child that it forks (fork(2)) has only that thread, with them blocked: let such a child execute a program
    /// or end by _exit(2). One that returns from here aborts. [`Command`](std::process::Command) takes care of both.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let receiver = client.receiver("c").accept(|sender| sender.same_user || sender.process.uid == 0).open()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn accept(mut self, accept: impl Fn(&Peer) -> bool + Send + Sync + 'static) -> Self {
        self.acceptance.accept = Some(Arc::new(Predicate::new(accept)));
        self
    }

    /// Opens the receiver. It gets what is written from the moment it is linked with a sender; a
    /// sender can wait for that.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is kept then. As for a [sender](crate::SenderBuilder::open), but that no memory is reserved.
    pub fn open(self) -> Result<Receiver, OpenError> {
        let Self { client, channel, label, wait, max_backlog, keep_waiting, require, accepts, acceptance } = self;
        ChannelName::new(channel.as_str())?;
        let label = label.map(Label::new).transpose()?;
        acceptance.check()?;
        if accepts.own.max_slots == 0 || accepts.own.slot_bytes == 0 {
            return Err(OptionsError::Nothing { asked: "senders of no or empty slots" }.into());
        }
        let skip_above = max_backlog.map(skip_above).transpose()?;
        let pending_links = Arc::new(PendingLinks::new()?);
        let (role, users) = (Role::Receiver { require, accepts }, acceptance.users.clone());
        let senders =
            Box::new(Senders { pending_links: LinkSource::new(&pending_links), skip_above, accepts, acceptance });
        let (registration, _) = client.open(&channel, role, label, users, senders)?;
        let sockets = Sockets::new(pending_links.wake().clone(), registration.watch_hang_ups(&pending_links))?;
        Ok(Receiver {
            links: Vec::new(),
            turn: 0,
            greeted: Vec::new(),
            sockets,
            ready: Ready::none(),
            pending_links,
            wait,
            keep_waiting,
            had_sender: false,
            spin_budget: SpinBudget::new(),
            same_cpu: SameCpuPeers::default(),
            batching: Batching::default(),
            is_armed: false,
            unread: false,
            pace: Pace::new(),
            troubles: ByUser::with_most(MAX_REPORTS),
            past_missed: 0,
            past_missed_before: 0,
            past_messages: 0,
            past_bytes: 0,
            sleeps: 0,
            violations: 0,
            generation: Generation::current(),
            registration,
        })
    }
}

/// Of how many messages a sender has to have more under way before it leaves any out, so that there are never more than
/// these.
fn skip_above(max_backlog: usize) -> Result<u32, OptionsError> {
    let most = max_backlog.checked_sub(1).ok_or(OptionsError::Nothing { asked: "a backlog of no message" })?;
    Ok(u32::try_from(most).unwrap_or(u32::MAX))
}

/// A sender that was greeted, or why it could not be.
pub(super) type NewLink = Result<Greeted, (Peer, GreetError)>;

impl Brought for NewLink {
    fn is_void(&self) -> Option<Peer> {
        match self {
            Ok(greeted) => greeted.is_void().then(|| greeted.peer()),
            Err((peer, GreetError::Gone)) => Some(*peer),
            Err(_) => None,
        }
    }
}

/// Where senders are introduced. They are greeted on the control thread, so that they find this receiver
/// ready even while it does something else.
struct Senders {
    pending_links: LinkSource<NewLink>,
    skip_above: Option<u32>,
    accepts: Limits,
    acceptance: Acceptance,
}

impl LinkSink for Senders {
    fn introduce(&self, introduced: Introduced) {
        let peer = introduced.peer();
        // The broker introduces no sender with other slots; one that does is not believed. A sender that is not accepted
        // sees the socket hang up.
        if self.accepts.check(introduced.geometry(), peer.same_user).is_err() || !self.acceptance.accepts(&peer) {
            return;
        }
        // Once it is greeted it may send, and the receiver must not find that all is over meanwhile.
        // Slots that senders of one other user take from this receiver are no larger together than those of one may be.
        let most = self.accepts.others.slot_bytes.saturating_mul(MAX_LEASED.into());
        if !self.pending_links.admit(&peer, introduced.descriptors(), introduced.pool_bytes(), most) {
            return self.pending_links.fail(peer, Some(NO_ROOM.into()));
        }
        let greeted =
            introduced.greet(self.skip_above).map(|greeted| greeted.waking(self.pending_links.wake().clone()));
        self.pending_links.post(peer, greeted.map_err(|error| (peer, error)));
    }

    fn fail(&self, peer: Peer, reason: String) {
        if self.acceptance.accepts(&peer) {
            self.pending_links.post(peer, Err((peer, GreetError::Exhausted(reason))));
        }
    }

    fn links(&self) -> Vec<LinkId> {
        self.pending_links.links()
    }

    fn report(&self) -> Report {
        self.pending_links.report()
    }

    fn held(&self) -> Vec<(LinkId, usize, u64)> {
        self.pending_links.held()
    }
}
