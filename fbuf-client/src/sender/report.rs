//! What a sender says: what became of a message, what went wrong, which receivers have gone, how much was done.

use std::{io, time::Duration};

use fbuf_core::{
    abort::Abort,
    memory::MemoryError,
    peer::Peer,
    process::{fork::Forked, sys::said},
    send::{
        fbuf::Fbuf,
        link::NoRoom,
        pool::{Places, Shortage, Unsent},
        unread::Unread,
    },
    violation::Violation,
};

#[cfg(feature = "tokio")]
use crate::tasks::RuntimeEnded;
use crate::{
    by_user::OfPeer,
    client::ClientFailed,
    link_failure::{LinkFailure, and_failure},
};

/// What a sender has done so far, and where its slots are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SenderCounters {
    /// Messages written.
    pub messages: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Messages that were left out for some receiver, counted once for each: it asked to be skipped, or this sender is
    /// [lossy](super::SenderBuilder::lossy).
    pub skipped: u64,
    /// Times that allocation found no free slot and had to wait: back-pressure.
    pub waits: u64,
    /// Times that it slept while it waited.
    pub sleeps: u64,
    /// Times that a receiver had to be woken.
    pub bells: u64,
    /// Segments that were added.
    pub growths: u64,
    /// Segments that could not be added, for lack of memory.
    pub growth_refused: u64,
    /// Messages that a guarded sender could not guard, for lack of mappings (vm.max_map_count).
    pub unguarded: u64,
    /// Receivers that are linked now.
    pub receivers: usize,
    /// Where the slots are. Those that have come back since the last look count as lent.
    pub slots: Places,
}

/// A message that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sent {
    /// Its number: 0, 1, 2 …
    pub sequence: u64,
    /// How many receivers it was given to. Fewer than are linked if some asked to be skipped, or if this sender is
    /// [lossy](super::SenderBuilder::lossy); then it may be none.
    pub receivers: usize,
}

/// Why an fbuf was not sent. It comes back in the error.
///
/// ```
/// use fbuf_client::WriteError;
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// # let mut sender = client.sender("frames").open()?;
/// let fbuf = sender.allocate()?;
/// match sender.write(fbuf) {
///     Err(WriteError::NoReceiver { fbuf }) => drop(fbuf), // or wait for a receiver, and write it then
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// No receiver is linked.
    #[error("the channel has no receiver: wait for one, and write the message again")]
    NoReceiver {
        /// The fbuf.
        fbuf: Fbuf,
    },
    /// It belongs to another sender.
    #[error("the fbuf was allocated by another sender: write it to that one, or copy it")]
    OtherSender {
        /// The fbuf.
        fbuf: Fbuf,
    },
    /// This process was forked from the one that opened the sender.
    #[error("{}", Forked)]
    Forked {
        /// The fbuf.
        fbuf: Fbuf,
    },
    /// A one-shot could not be sealed: another process can write it, such as a child that was forked, and there
    /// is no memory for a copy.
    #[error("the one-shot cannot be sealed, and no copy of it can be made: {error}")]
    NotSealed {
        /// The fbuf.
        fbuf: Fbuf,
        /// What the kernel says.
        error: MemoryError,
    },
    /// It could not be passed to every receiver now, and no receiver was told of it: a one-shot, or a slot that was allocated from a
    /// receiver ([`from_receiver`](super::SenderBuilder::from_receiver)) that has gone since.
    #[error("the message was not sent: {reason}; write it again later")]
    NotPassed {
        /// The fbuf.
        fbuf: Fbuf,
        /// Which limit is in the way.
        reason: String,
    },
    /// It was to be kept ([`write_retained`](super::Sender::write_retained)), and cannot be mapped to be read on.
    #[error("the message was not sent, since it cannot be kept: {error}; write it without keeping it, or again later")]
    NotKept {
        /// The fbuf.
        fbuf: Fbuf,
        /// Why not.
        error: MemoryError,
    },
    /// It was not sent, and could not be taken back either: it lacked memory, mappings or a descriptor, or the receiver has gone
    /// that made the slot. The slot is free.
    #[error(
        "the message was not sent and is lost, since its fbuf cannot be had again: allocate another, and write it anew"
    )]
    Lost,
}

impl WriteError {
    /// The fbuf, to be written again or dropped; none if it is [lost](Self::Lost).
    #[must_use]
    pub fn into_fbuf(self) -> Option<Fbuf> {
        match self {
            Self::NoReceiver { fbuf }
            | Self::OtherSender { fbuf }
            | Self::Forked { fbuf }
            | Self::NotSealed { fbuf, .. }
            | Self::NotPassed { fbuf, .. }
            | Self::NotKept { fbuf, .. } => Some(fbuf),
            Self::Lost => None,
        }
    }
}

#[doc(hidden)]
impl From<Unsent> for WriteError {
    fn from(unsent: Unsent) -> Self {
        match unsent {
            Unsent::OtherPool(fbuf) => Self::OtherSender { fbuf },
            Unsent::NoReceiver(fbuf) => Self::NoReceiver { fbuf },
            Unsent::NotSealed { fbuf, error } => Self::NotSealed { fbuf, error },
            Unsent::NotPassed { fbuf, reason } => Self::NotPassed { fbuf, reason },
            Unsent::NotKept { fbuf, error } => Self::NotKept { fbuf, error },
            Unsent::Lost => Self::Lost,
        }
    }
}

/// Why there is no fbuf to be filled.
///
/// ```
/// use std::{io, time::Duration};
/// use fbuf_client::AllocateError;
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// # let mut sender = client.sender("frames").slots(1).open()?;
/// let fbuf = sender.allocate()?; // the only one
/// match sender.allocate_timeout(Duration::from_millis(1)) {
///     Err(AllocateError::TimedOut { slots }) => println!("all {slots} slots are in use"),
///     other => panic!("{other:?}"),
/// }
/// // In code that deals with I/O each error has a kind.
/// let error: io::Error = sender.allocate_timeout(Duration::ZERO).unwrap_err().into();
/// assert_eq!(error.kind(), io::ErrorKind::TimedOut);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AllocateError {
    /// This process was forked from the one that opened the sender.
    #[error(transparent)]
    Forked(#[from] Forked),
    /// All slots were in use until the time was over.
    #[error("{}", no_slot(*slots))]
    TimedOut {
        /// How many slots there are: none if they are [receivers'](super::SenderBuilder::from_receiver) and none is linked.
        slots: usize,
    },
    /// All slots are in use, and a [lossy](super::SenderBuilder::lossy) sender does not wait: the program holds its share of them as
    /// fbufs, and receivers have the rest.
    #[error(
        "no free slot: all {slots} are in use, and a lossy sender does not wait for receivers; write or drop an fbuf first, \
         or open the sender with more slots"
    )]
    WouldWait {
        /// How many slots there are.
        slots: usize,
    },
    /// The slots are receivers', none is linked, and none can come.
    #[error(transparent)]
    ClientFailed(#[from] ClientFailed),
    /// A signal handler ran while a slot was waited for, or an [`InterruptHandle`](crate::InterruptHandle) was used: call again,
    /// or stop.
    #[error("the wait for a slot was interrupted by a signal handler or an interrupt handle")]
    Interrupted,
    /// The tokio runtime of an [`AsyncSender`](crate::AsyncSender) has ended.
    #[cfg(feature = "tokio")]
    #[error(transparent)]
    RuntimeEnded(#[from] RuntimeEnded),
    /// There is no descriptor for a slot: for a one-shot, or for one that a receiver gives, which waits until there is.
    #[error("no descriptor is left for a slot of {bytes} bytes (RLIMIT_NOFILE): close some, or raise `ulimit -n`")]
    NoDescriptor {
        /// The size of a slot.
        bytes: usize,
    },
    /// A slot is free, and no one-shot can be sent: the send buffer of the link to some receiver is full of messages that
    /// it has not read, and smaller than it should be.
    #[error(
        "no room for a message: the send buffer of a link is full, of which the kernel grants {bytes} bytes: \
         let receivers take what was sent, or raise net.core.wmem_max"
    )]
    NoRoom {
        /// The size of that send buffer.
        bytes: usize,
    },
    /// A slot is free, and no one-shot can be sent: receivers of another user have not received what was sent before, and the
    /// kernel counts the descriptors that are under way for all processes of a user (ETOOMANYREFS in sendmsg(2)).
    #[error(
        "no room for a message: receivers of another user have not received the descriptors that they were sent, of which a part of \
         RLIMIT_NOFILE may be under way: let them run, or raise `ulimit -n`"
    )]
    UnderWay,
    /// There is no memory for a one-shot, or none for a leased slot that is free.
    #[error("no memory for {} of {bytes} bytes: {shortage}", shortage.slot())]
    NoMemory {
        /// The size of a slot.
        bytes: usize,
        /// Which limit is in the way, and what helps.
        shortage: Shortage,
    },
    /// A slot is free, and this process may not open it again: slots that are leased belong to the user that opened the
    /// sender, and the process has changed its user since.
    #[error(
        "a slot of {bytes} bytes is free, and this process may not open it again (EACCES): slots that are leased belong to \
         the user that opened the sender; if this process has changed its user since, let it open another sender"
    )]
    NotPermitted {
        /// The size of a slot.
        bytes: usize,
    },
    /// A slot is free, and cannot be opened again: slots that are leased are opened through /proc, which this process does
    /// not have any more.
    #[error(
        "a slot of {bytes} bytes is free, and cannot be opened again (ENOENT): slots that are leased are opened through \
         /proc/self/fd; if this process has changed its root folder since, mount proc there"
    )]
    NoProc {
        /// The size of a slot.
        bytes: usize,
    },
    /// A slot is free, and the kernel refuses a call without which it cannot be had.
    #[error(
        "no slot of {bytes} bytes: the kernel refused {call}: {}; `fbuf doctor` shows what this machine allows",
        said(&io::Error::from_raw_os_error(*code))
    )]
    Refused {
        /// The size of a slot.
        bytes: usize,
        /// The call.
        call: &'static str,
        /// What the kernel says, a number of errno(3).
        code: i32,
    },
}

fn no_slot(slots: usize) -> String {
    match slots {
        0 => "no slot: they are given by a receiver, and none is linked; wait for one, and see link_failure() for why none could be".into(),
        _ => format!(
            "no free slot: all {slots} are in use; let receivers drop what they hold or limit their backlog, or open the sender with \
             more slots"
        ),
    }
}

/// Why a wait for receivers has ended before they came, or before they had handed everything back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// This process was forked from the one that opened the sender.
    #[error(transparent)]
    Forked(#[from] Forked),
    /// A signal handler ran meanwhile, or an [`InterruptHandle`](crate::InterruptHandle) was used: call again, or stop.
    #[error("the wait for receivers was interrupted by a signal handler or an interrupt handle")]
    Interrupted,
    /// The tokio runtime of an [`AsyncSender`](crate::AsyncSender) has ended.
    #[cfg(feature = "tokio")]
    #[error(transparent)]
    RuntimeEnded(#[from] RuntimeEnded),
    /// They cannot come.
    #[error(transparent)]
    ClientFailed(#[from] ClientFailed),
    /// They did not come in time.
    #[error("{linked} receivers are linked, and {wanted} were waited for{}", and_failure(failure.as_ref()))]
    TimedOut {
        /// How many were waited for.
        wanted: usize,
        /// How many are there.
        linked: usize,
        /// The last receiver with which no link could be made since the sender was opened, and why.
        failure: Option<LinkFailure>,
    },
    /// Receivers did not hand everything back in time.
    #[error("receivers still hold {slots} slots, and were to hand all of them back")]
    StillLent {
        /// How many slots are lent.
        slots: usize,
    },
}

/// A receiver that is linked no more.
///
/// ```
/// use fbuf_client::{Abort, DisconnectReason};
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// # let receiver = client.receiver("frames").open()?;
/// # let mut sender = client.sender("frames").slots(2).open()?;
/// # sender.wait_for_receivers(1)?;
/// # let fbuf = sender.allocate()?;
/// # sender.write(fbuf)?;
/// # receiver.abort(28);
/// # while sender.receivers() > 0 { sender.poll_events(); }
/// while let Some(departure) = sender.next_departure() {
///     match departure.reason {
///         DisconnectReason::Left => {}
///         DisconnectReason::Failed { reason: Abort::Code(code) } => println!("{:?} failed with {code}", departure.peer),
///         other => println!("{:?} is gone: {other:?}", departure.peer),
///     }
///     if let Some(unread) = departure.unread {
///         println!("it has not read {unread:?}"); // which messages: to be written again, or told
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Departure {
    /// Which receiver.
    pub peer: Peer,
    /// How it went.
    pub reason: DisconnectReason,
    /// The messages that [`write`](super::Sender::write) reported as sent to it, and that it did not read to the end:
    /// it never took them, or it held them still. None if it read all, or was never sent any.
    pub unread: Option<Unread>,
}

impl OfPeer for Departure {
    fn peer(&self) -> Option<&Peer> {
        Some(&self.peer)
    }
}

/// How a receiver went.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DisconnectReason {
    /// It closed its receiver.
    Left,
    /// It left because it had failed: [`Receiver::abort`](crate::Receiver::abort), a panic, or no room for the link in its process.
    Failed {
        /// Why it did.
        reason: Abort,
    },
    /// Its process died.
    Died,
    /// This sender has [disconnected](super::Sender::disconnect) it.
    Disconnected,
    /// This sender waited for a slot for longer than [it may](super::SenderBuilder::disconnect_after), and disconnected this
    /// receiver: its user held most slots.
    HeldUp {
        /// How long it may hold the sender up.
        limit: Duration,
    },
    /// It broke a rule, and the link was closed.
    Violation {
        /// Which one.
        violation: Violation,
    },
    /// This process had no memory or no descriptor left for the link.
    Exhausted {
        /// What was missing.
        what: String,
    },
}

#[doc(hidden)]
impl From<NoRoom> for AllocateError {
    fn from(why: NoRoom) -> Self {
        match why {
            NoRoom::Buffer(bytes) => Self::NoRoom { bytes },
            NoRoom::UnderWay => Self::UnderWay,
        }
    }
}
