//! What a receiver says: how much was done, and why there is no message.

use fbuf_core::{
    abort::Abort, memory::CannotReopen, peer::Peer, process::fork::Forked, receive::link::Inbound, violation::Violation,
};

#[cfg(feature = "tokio")]
use crate::tasks::RuntimeEnded;
use crate::{by_user::OfPeer, client::ClientFailed};

/// What a receiver has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReceiverCounters {
    /// Messages received.
    pub messages: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Messages that senders left out because this receiver asked them to.
    pub missed: u64,
    /// Messages that senders had written before they were linked with this receiver: if there are any, it has missed
    /// the beginning of a stream. The first message that it gets of such a sender does not have the
    /// [number](crate::Received::sequence) 0.
    pub missed_before: u64,
    /// Messages that are held now, of senders that are linked.
    pub held: usize,
    /// Times that it slept while it waited.
    pub sleeps: u64,
    /// Messages that were to be leased, and were copied because the kernel refused, of senders that are
    /// linked: somebody could write them still.
    pub leases_refused: u64,
    /// Senders that are linked now.
    pub senders: usize,
}

/// Why there is no message. What is told of one sender is no end of the stream: other senders go on.
///
/// Errors of senders wait for the next calls; each call returns one. While messages are ready, one error is returned after each
/// round of messages. Errors of one user's senders come in the order in which they were found, those of several users by turns:
/// however many there are of one user, they delay those of another by one. At most 1024 errors wait: if there are more, the
/// oldest of the user that has most of them is forgotten. The own user and root count as one user.
///
/// ```
/// use fbuf_client::GetError;
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// # let mut receiver = client.receiver("lines").open()?;
/// # let mut sender = client.sender("lines").require_finish().open()?;
/// # sender.wait_for_receivers(1)?;
/// # let fbuf = sender.allocate()?;
/// # sender.write(fbuf)?;
/// # sender.abort(7);
/// loop {
///     match receiver.get() {
///         Ok(message) => println!("{} bytes", message.len()),
///         Err(GetError::Ended) => break, // each sender has ended, in order or not
///         Err(GetError::Interrupted) => continue,
///         Err(error @ GetError::ClientFailed(_)) => return Err(error.into()),
///         Err(error) => eprintln!("{error}"), // of one sender: "… broke off its stream with code 7 …"
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GetError {
    /// This process was forked from the one that opened the receiver.
    #[error(transparent)]
    Forked(#[from] Forked),
    /// No sender is left. Each that did not end in order was reported before, by an error of its own, unless that error was
    /// [forgotten](Self); of all others, everything that they sent was received. Another one may come.
    #[error(
        "no sender is left, and what was sent was received, but for what was reported before: to wait for the next one, let the \
         receiver keep waiting"
    )]
    Ended,
    /// A sender's process died. Everything it sent was received; it may have meant to send more.
    /// Reported once; other senders go on.
    #[error("sender {} ({}) died before it ended its stream: what it had sent was received, the rest is missing", peer.endpoint, peer.process)]
    Disconnected {
        /// Which sender.
        peer: Peer,
    },
    /// A sender has disconnected this receiver ([`Sender::disconnect`](crate::Sender::disconnect)), perhaps because it
    /// was held up by it. What this receiver had not taken is lost. Reported once; other senders go on.
    #[error("sender {} ({}) has disconnected this receiver: messages may be missing; take and drop them sooner", peer.endpoint, peer.process)]
    Dropped {
        /// Which sender.
        peer: Peer,
    },
    /// A sender has broken its stream off: by [`Sender::abort`](crate::Sender::abort), in a panic, or without a word
    /// although it had announced one. Everything it sent was received; the rest is missing. Reported once; other
    /// senders go on.
    #[error("sender {} ({}) broke off its stream {reason}: what it had sent was received, the rest is missing", peer.endpoint, peer.process)]
    Aborted {
        /// Which sender.
        peer: Peer,
        /// Why.
        reason: Abort,
    },
    /// A sender broke a rule, and its link was closed: what was not received before is lost. Reported once; other senders go on.
    #[error("sender {} ({}) broke a rule of the link, which is closed, so that messages may be missing: {violation}", peer.endpoint, peer.process)]
    PeerViolation {
        /// Which sender.
        peer: Peer,
        /// Which rule.
        violation: Box<Violation>,
    },
    /// This process had no memory or no descriptor left for a link, and there is none. Reported once; other senders go on.
    #[error("sender {} ({}) could not be linked: {what}", peer.endpoint, peer.process)]
    Exhausted {
        /// Which sender.
        peer: Peer,
        /// What was missing.
        what: Box<str>,
    },
    /// This process had no memory or no descriptor left for a link over which messages came, such as for new slots of the sender, and
    /// has ended it. The sender is told ([`Abort::Exhausted`]). What it sent before this message was received; the rest is
    /// missing. Reported once; other senders go on.
    #[error(
        "the stream of sender {} ({}) was given up here at message {message}, for which this process has no room: {what}; what came \
         before was received, the rest is missing",
        peer.endpoint, peer.process
    )]
    GivenUp {
        /// Which sender.
        peer: Peer,
        /// The number of the first message that is missing.
        message: u64,
        /// What was missing.
        what: Box<str>,
    },
    /// Something that a sender has sent waits for a descriptor, of which this process has none left. It is not lost: call
    /// again when some are closed. Reported by each call that finds nothing else.
    #[error(
        "no descriptor is left for what sender {} ({}) has sent (RLIMIT_NOFILE): drop messages or sealed bytes that are \
         kept, or raise `ulimit -n`; nothing is lost",
        peer.endpoint, peer.process
    )]
    NoDescriptor {
        /// Which sender.
        peer: Peer,
    },
    /// This process has no room now for the next message of a sender: no memory for a copy, or none of its addresses or mappings for a
    /// one-shot. It is not lost: call again when some are free. Reported by each call that finds nothing else.
    #[error(
        "no memory for the next message of sender {} ({}): {what}; drop messages or sealed bytes that are kept, and call again; nothing \
         is lost",
        peer.endpoint, peer.process
    )]
    NoMemory {
        /// Which sender.
        peer: Peer,
        /// What is missing.
        what: Box<str>,
    },
    /// Slots that this receiver made for a sender ([`SenderBuilder::from_receiver`](crate::SenderBuilder::from_receiver)) cannot be
    /// given to it: at first, or when their messages were dropped. The sender gets no other slots. It is tried again by each
    /// call, and while one waits; each reason is reported once, until all are given.
    #[error(
        "slots cannot be given to sender {} ({}), which waits for them: {why}; it is tried again",
        peer.endpoint, peer.process
    )]
    SlotsWithheld {
        /// Which sender.
        peer: Peer,
        /// What is in the way, and what to do.
        why: CannotReopen,
    },
    /// Messages may have changed while they were held, since the kernel took their leases away. Reported
    /// when they are dropped; [`Received::is_intact`](crate::Received::is_intact) tells before.
    #[error(
        "{messages} messages of sender {} ({}) may have changed while they were held: somebody opened them for writing, and this process did not run for as long as fs.lease-break-time",
        peer.endpoint, peer.process
    )]
    LeaseLost {
        /// Which sender's.
        peer: Peer,
        /// How many.
        messages: u64,
    },
    /// No sender is linked, and none can come.
    #[error(transparent)]
    ClientFailed(#[from] ClientFailed),
    /// No message came in time.
    #[error("no message came in time")]
    TimedOut,
    /// A signal handler ran while a message was waited for, or an [`InterruptHandle`](crate::InterruptHandle) was used. Nothing
    /// is lost: call again, or stop.
    #[error("the wait for a message was interrupted by a signal handler or an interrupt handle; nothing is lost")]
    Interrupted,
    /// The tokio runtime of an [`AsyncReceiver`](crate::AsyncReceiver) has ended.
    #[cfg(feature = "tokio")]
    #[error(transparent)]
    RuntimeEnded(#[from] RuntimeEnded),
}

impl GetError {
    /// Whether each call that follows says the same.
    pub(crate) fn is_last(&self) -> bool {
        match self {
            #[cfg(feature = "tokio")]
            Self::RuntimeEnded(_) => true,
            error => matches!(error, Self::Ended | Self::Forked(_) | Self::ClientFailed(_)),
        }
    }
}

impl OfPeer for GetError {
    fn peer(&self) -> Option<&Peer> {
        match self {
            Self::Disconnected { peer }
            | Self::Dropped { peer }
            | Self::Aborted { peer, .. }
            | Self::PeerViolation { peer, .. }
            | Self::Exhausted { peer, .. }
            | Self::GivenUp { peer, .. }
            | Self::NoDescriptor { peer }
            | Self::NoMemory { peer, .. }
            | Self::SlotsWithheld { peer, .. }
            | Self::LeaseLost { peer, .. } => Some(peer),
            Self::Forked(_) | Self::Ended | Self::ClientFailed(_) | Self::TimedOut | Self::Interrupted => None,
            #[cfg(feature = "tokio")]
            Self::RuntimeEnded(_) => None,
        }
    }
}

/// Why slots cannot be given back to a sender, if it was not told yet.
pub(super) fn withheld(link: &Inbound) -> Option<GetError> {
    link.withholds_anew().map(|why| GetError::SlotsWithheld { peer: link.peer(), why })
}
