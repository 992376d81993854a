//! How a sender is opened.

use std::{env, sync::Arc, time::Duration};

use fbuf_core::{
    limits::{MAX_DEPARTURES, MAX_LEASED, MAX_ONE_SHOTS, SLOT_ALIGNMENT},
    memory::{Pages, page_bytes},
    peer::Peer,
    process::fork::Generation,
    protection::{Mechanism, Protection},
    send::{
        link::LinkCounts,
        pool::{Extras, Format},
    },
    slot::{Geometry, GeometryError, GeometryTerms},
};
use fbuf_protocol::{Refusal, channel::ChannelName, name::Label};

use super::{
    Counts, Sender,
    options::{Options, OptionsError},
    protection::{OpenRequest, Place, ProtectionRequest},
    wait::WaitFor,
};
use crate::{
    acceptance::{Acceptance, Predicate},
    by_user::ByUser,
    caches::{ENOUGH_SLOTS, default_slots_here},
    client::{Client, OpenError},
    sockets::{Ready, Sockets},
    wait::{Batching, Pace, SameCpuPeers, SpinBudget, Wait},
};

/// The slot size if none is given.
const DEFAULT_SLOT_SIZE: usize = 64 << 10;
/// How many slots if none is given, of those that are memory of their own.
const FEW_SLOTS: u64 = 4;
/// The most messages that are given away and under way, if none is given.
const MOST_SHOTS: u64 = 16;

/// Prepares a [`Sender`]. Options that contradict each other are an [error](super::OptionsError) when it is opened, whatever
/// their order.
///
/// ```
/// use std::time::Duration;
/// use fbuf_client::{Protection, Wait};
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let sender = client
///     .sender("camera/front")
///     .slot_size(1 << 20)
///     .slots(4)
///     .grow_to(16)
///     .protection(Protection::Sealed)
///     .wait(Wait::Block)
///     .disconnect_after(Duration::from_secs(2))
///     .open()?;
/// println!("messages are {}", sender.protection_info()); // sealed by copying: sealed was asked for
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct SenderBuilder {
    client: Client,
    channel: String,
    label: Option<String>,
    slot_size: usize,
    slots: Option<usize>,
    grow_to: Option<usize>,
    header_size: usize,
    alignment: usize,
    extras: Extras,
    wait: Wait,
    disconnect_after: Option<Duration>,
    options: Options,
    acceptance: Acceptance,
    requires_finish: bool,
}

impl SenderBuilder {
    pub(crate) fn new(client: Client, channel: &str) -> Self {
        Self {
            client,
            channel: channel.to_owned(),
            label: None,
            slot_size: DEFAULT_SLOT_SIZE,
            slots: None,
            grow_to: None,
            header_size: 0,
            alignment: SLOT_ALIGNMENT as usize,
            extras: Extras::default(),
            wait: Wait::default(),
            disconnect_after: None,
            options: Options::default(),
            acceptance: Acceptance::default(),
            requires_finish: false,
        }
    }

    /// The name of this sender in `fbuf ls`, `fbuf top` and metrics, beside the name of the program: 1 to 64 bytes
    /// of UTF-8 that print, without white space. Senders with the same label are one series of the metrics. If not set, it
    /// has none.
    ///
    /// ```
    /// # use fbuf_client::Client;
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = Client::connect_to(broker.address())?;
    /// let sender = client.sender("camera/front").label("decoder").open()?;
    /// # assert_eq!(client.status()?[0].label.as_ref().map(|label| label.as_str()), Some("decoder"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn label(mut self, label: &str) -> Self {
        self.label = Some(label.to_owned());
        self
    }

    /// How many bytes each slot holds, and so the longest message: 1 to 1 GiB; 64 KiB if not set.
    pub fn slot_size(mut self, bytes: usize) -> Self {
        self.slot_size = bytes;
        self
    }

    /// With how many slots to start: 1 to 2²⁰. Receivers that keep messages while they wait for others
    /// need as many more.
    ///
    /// If not set, as many as suit the caches of this machine, which `fbuf doctor` shows: 512 KiB to 8 MiB together, but at
    /// least 2 and at most 16,384, and no more than [`Self::grow_to`]; and if all have been in use for 20 ms and none came back,
    /// more of them, up to 8. Of slots that are leased there are 4 if not set, and up to 16 of one-shots.
    pub fn slots(mut self, count: usize) -> Self {
        self.slots = Some(count);
        self
    }

    /// To how many slots to grow, by doubling, rather than wait for receivers. If not set, a number that
    /// was set stays as it is. An error for slots that are leased: all of them are made when the sender is opened.
    pub fn grow_to(mut self, count: usize) -> Self {
        self.grow_to = Some(count);
        self
    }

    /// Gives each slot a user header of so many bytes, 0 to 64, beside its payload ([`Fbuf::header_mut`](crate::Fbuf::header_mut),
    /// [`Received::header`](crate::Received::header)): what a program says of each message, in a place of its own and at a multiple
    /// of 64 bytes. None if not set. It takes 64 bytes of each slot.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("camera").open()?;
    /// let mut sender = client.sender("camera").header_size(16).open()?;
    /// sender.wait_for_receivers(1)?;
    /// let mut fbuf = sender.allocate()?;
    /// fbuf.header_mut().copy_from_slice(b"640 x 480, grey ");
    /// sender.write(fbuf)?;
    /// assert_eq!(receiver.get()?.header(), b"640 x 480, grey ");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn header_size(mut self, bytes: usize) -> Self {
        self.header_size = bytes;
        self
    }

    /// Has each slot begin at a multiple of so many bytes, here and in receivers: a power of two from 64, which it is if not set,
    /// to the size of a page, as `O_DIRECT` wants it.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut sender = client.sender("blocks").slot_size(512).align(4096).open()?;
    /// let fbuf = sender.allocate()?;
    /// assert_eq!(fbuf.as_ptr() as usize % 4096, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn align(mut self, bytes: usize) -> Self {
        self.alignment = bytes;
        self
    }

    /// Messages may have a tag each, a number of 64 bits ([`Fbuf::set_tag`](crate::Fbuf::set_tag),
    /// [`Received::tag`](crate::Received::tag)). One with a tag takes two entries of a link's lane in place of one.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("requests").open()?;
    /// let mut sender = client.sender("requests").tags().open()?;
    /// sender.wait_for_receivers(1)?;
    /// let mut fbuf = sender.allocate()?;
    /// fbuf.set_tag(4711)?;
    /// sender.write(fbuf)?;
    /// assert_eq!(receiver.get()?.tag(), 4711);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn tags(mut self) -> Self {
        self.extras.tags = true;
        self
    }

    /// Each message has the time at which it is written ([`Received::sent_at`](crate::Received::sent_at),
    /// [`Received::age`](crate::Received::age)): a call of clock_gettime(2), and one more entry of a link's lane, for each.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("camera").open()?;
    /// let mut sender = client.sender("camera").times().open()?;
    /// sender.wait_for_receivers(1)?;
    /// let fbuf = sender.allocate()?;
    /// sender.write(fbuf)?;
    /// println!("latency: {:?}", receiver.get()?.age());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn times(mut self) -> Self {
        self.extras.times = true;
        self
    }

    /// Never waits for receivers: a message for which there is no room is left out. Each receiver learns exactly how many it did
    /// not get, also at the end of the stream: [`ReceiverCounters::missed`](crate::ReceiverCounters::missed), and the step
    /// between two [sequence numbers](crate::Received::sequence).
    ///
    /// The sender and its receivers have equal shares of the slots, of at least one: with two receivers each may have a third.
    /// A message is left out for a receiver that has its share, waiting or held, and goes to the others. So a receiver that is
    /// slow or stopped takes nothing from the others. If no other slot is free, a message is left out for all.
    /// [`Sent::receivers`](super::Sent::receivers) says how many got it, [`SenderCounters::skipped`](super::SenderCounters::skipped)
    /// has the sum. A sender that may [grow](Self::grow_to) does so before it leaves anything out.
    ///
    /// After each [`write`](Sender::write) a slot is free. A program that takes more fbufs than it writes may come to have the
    /// sender's whole share. Then it gets [`AllocateError::WouldWait`](super::AllocateError::WouldWait), and is not kept waiting.
    ///
    /// Contradicts [`disconnect_after`](Self::disconnect_after), since no receiver holds such a sender up. Contradicts
    /// [`from_receiver`](Self::from_receiver): such slots are there only if the receiver gives them back. Needs two slots.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("samples").open()?;
    /// let mut sender = client.sender("samples").slot_size(64).slots(8).lossy().open()?;
    /// sender.wait_for_receivers(1)?;
    /// for _ in 0..100 {
    ///     let fbuf = sender.allocate()?; // never waits
    ///     sender.write(fbuf)?;
    /// }
    /// sender.finish();
    /// let received = receiver.iter().filter(Result::is_ok).count() as u64;
    /// assert_eq!((received, receiver.counters().missed), (4, 96));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias("best_effort", "drop", "non_blocking", "conflate"))]
    pub fn lossy(mut self) -> Self {
        self.extras.lossy = true;
        self
    }

    /// How [`Sender::allocate`] passes the time while all slots are in use.
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Disconnects receivers when an allocation has waited for this time and no slot came back, as [`Sender::disconnect`] does.
    /// [`Sender::next_departure`] tells of them as [`DisconnectReason::HeldUp`](super::DisconnectReason::HeldUp). If not set, a
    /// sender waits as long as its receivers take.
    ///
    /// The user is chosen that holds most slots, over all links of its receivers together; if the sender's own user holds as
    /// many as another one, the other one. Of another user all receivers are disconnected that hold a slot. Of the sender's own
    /// user one receiver is disconnected: the one that holds most slots, and of those that hold as many the one that was linked first.
    /// For one-shots that have no room on their way, although slots are free, it is the receivers for which there is none.
    ///
    /// This is for receivers that hang. A receiver that hands back one slot just in time, each time, is slow and is never
    /// disconnected, and one that was disconnected may be linked again. So this does not keep a receiver of another user from
    /// slowing the sender down: [`to_users`](Self::to_users) and [`accept`](Self::accept) choose the receivers, and a
    /// [`lossy`](Self::lossy) sender waits for none. What receivers ask for ([`max_backlog`](crate::ReceiverBuilder::max_backlog)) binds
    /// only those that ask.
    ///
    /// Slots that a receiver reads in place stay its own until it lets go or ends, also when it is disconnected: a sender
    /// that may not [grow](Self::grow_to) beyond them goes on only if its messages are copied, or are one-shots.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # let client = fbuf_client::Client::connect()?;
    /// let sender = client.sender("camera").disconnect_after(Duration::from_secs(2)).open()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn disconnect_after(mut self, time: Duration) -> Self {
        self.disconnect_after = Some(time);
        self
    }

    /// What receivers may rely on; [`Protection::Volatile`] if not set. With [`Protection::Leased`] no code can
    /// change a message while a receiver holds it: those of slots of 2 MiB and more are leased if there are huge
    /// pages for them, and from 8 MiB on without; others are copied. With
    /// [`Protection::Sealed`] not even I/O that was begun before can, and all are copied; or they are given away
    /// ([`Mechanism::OneShot`]). [`Sender::protection_info`] tells which, and why.
    ///
    /// Receivers of other users are never given less than sealed messages, unless the broker was told to trust
    /// this one.
    pub fn protection(mut self, protection: Protection) -> Self {
        self.options.protection = Some(protection);
        self
    }

    /// As [`Self::protection`], by these means. They have to give at least the protection, if that is set as well.
    ///
    /// With [`Mechanism::Lease`] each slot is memory of its own, which this process maps to write a message
    /// and unmaps when it sends it; there are at most 32, and no more are added. Receivers of the same user
    /// read it under a lease of the kernel; those of other users, or that require sealed messages, copy it.
    /// Where there are no leases to be had, all copy it.
    ///
    /// With [`Mechanism::OneShot`] each message is memory of its own, which is made, sealed for good and
    /// given away: receivers may keep it for ever, clone it and pass it on
    /// ([`Received::into_sealed`](crate::Received::into_sealed)). It is not used again, and so costs more
    /// than a copy; at most 128 messages are under way. A thread makes up to four buffers in advance, of 64 MiB
    /// together or one, so that an allocation seldom waits for the kernel to find and clear memory.
    pub fn mechanism(mut self, mechanism: Mechanism) -> Self {
        self.options.mechanism = Some(mechanism);
        self
    }

    /// Slots that are leased lie in these pages, or in smaller ones; if not set, in the largest that can be
    /// had. An error for a sender that leases none of its own.
    ///
    /// ```
    /// use fbuf_client::{Mechanism, Pages};
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let sender = client.sender("frames").slot_size(8 << 20).slots(2).mechanism(Mechanism::Lease).pages(Pages::Base).open()?;
    /// println!("{:?}: {}", sender.protection_info().pages, sender.protection_info().reason);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pages(mut self, pages: Pages) -> Self {
        self.options.pages = Some(pages);
        self
    }

    /// Allocates from the pool of the channel's receiver, of which there can be only one (uf_allocb): the
    /// slots are memory that the receiver makes and owns, and so it can lease them ([`Mechanism::Lease`])
    /// also if the sender is another user's that the broker was told to trust; if not, it copies them. With each
    /// message the right to write its slot goes to the receiver, and it comes back over the socket of the link.
    ///
    /// # Trust
    /// The receiver can write the memory of such a slot at any time, also while this process has it as a [`Fbuf`](crate::Fbuf) or
    /// reads it as a [`Retained`](crate::Retained), and nothing in the kernel could prevent that. So the sender trusts the
    /// receiver: it is linked only with one of the same user, or of a user that the broker's policy trusts to receive
    /// from this channel. This process looks at that itself ([`Peer::trusted`](crate::Peer::trusted)), and closes a link
    /// with any other ([`Violation::UntrustedReceiver`](crate::Violation::UntrustedReceiver)). Of a trusted receiver, too,
    /// it takes only memory of exactly the size of a slot, with all its pages and of a size that cannot change; the descriptors to write and to
    /// read it must name the same file; and of another user's receiver none in huge pages, which could be taken away.
    ///
    /// [`Sender::allocate`] waits until there is a receiver. What was allocated from one that goes can be
    /// sent to the next.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("jobs").open()?;
    /// let mut sender = client.sender("jobs").slot_size(4096).slots(2).from_receiver().open()?;
    /// let mut fbuf = sender.allocate()?; // in memory of the receiver
    /// fbuf.set_len(1)?;
    /// sender.write(fbuf)?;
    /// assert_eq!(receiver.get()?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "uf_allocb")]
    pub fn from_receiver(mut self) -> Self {
        self.options.from_receiver = true;
        self
    }

    /// Finds stray writes: code that writes into a message after it was sent, through a pointer that was kept,
    /// traps at that instruction. A report on standard error names the channel, the message and the receivers that
    /// hold it, and the process dies of SIGSEGV as if it had written to memory that does not exist.
    ///
    /// A system call that is to write there, such as read(2) with such a pointer, does not trap: it fails with `EFAULT`,
    /// without a report, and the message is unchanged. So look at what system calls return. I/O that was begun before
    /// the message was sent (io_uring, `O_DIRECT`) writes all the same.
    ///
    /// If not set, `FBUF_GUARD=1` in the environment does it for all senders of a process. While there is
    /// a guarded sender, SIGSEGV has a handler, which goes on to the one that was there before. Each slot
    /// fills whole pages, and each message costs two calls of mprotect(2).
    ///
    /// Slots that are leased or [sent once](Mechanism::OneShot) cannot be guarded: for them a guard that is set is an
    /// error, and `FBUF_GUARD` does nothing, which [`Sender::protection_info`] says.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let sender = client.sender("frames").guard(true).open()?;
    /// assert_eq!(sender.protection_info().to_string(), "shared: volatile was asked for, with a guard");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn guard(mut self, guard: bool) -> Self {
        self.options.guard = Some(guard);
        self
    }

    /// Sends to receivers of these users only, by their ids as the broker knows them ([`Peer::process`]); at most 256. If
    /// not set, to those of all users that the broker's policy permits to receive.
    pub fn to_users(mut self, users: impl IntoIterator<Item = u32>) -> Self {
        self.acceptance.users = Some(users.into_iter().collect());
        self
    }

    /// Is linked only with receivers for which this returns true, which is asked before anything is sent to them. It runs
    /// on the thread of the [`Client`] and must not wait for anything.
    ///
    /// If it panics, the peer is not accepted; a panic of it, or of what it owns when that is dropped, ends nothing else. It runs with
    /// all signals blocked, and a child that it forks (fork(2)) has only that thread, with them blocked: let such a child execute a program
    /// or end by _exit(2). One that returns from here aborts. [`Command`](std::process::Command) takes care of both.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let child = 4711; // a process that this one has started
    /// let sender = client.sender("secrets").accept(move |peer| peer.process.pid == child).open()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn accept(mut self, accept: impl Fn(&Peer) -> bool + Send + Sync + 'static) -> Self {
        self.acceptance.accept = Some(Arc::new(Predicate::new(accept)));
        self
    }

    /// The stream is complete only if [`Sender::finish`] says so: a sender that is merely dropped, as by an error that
    /// is passed on with `?`, breaks its stream off ([`Abort::Unfinished`](crate::Abort::Unfinished)).
    ///
    /// ```
    /// use fbuf_client::{Abort, GetError};
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("lines").open()?;
    /// let mut sender = client.sender("lines").require_finish().open()?;
    /// sender.wait_for_receivers(1)?;
    /// drop(sender); // sender.finish() would be the end of a complete stream
    /// assert!(matches!(receiver.get(), Err(GetError::Aborted { reason: Abort::Unfinished, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn require_finish(mut self) -> Self {
        self.requires_finish = true;
        self
    }

    /// Reserves the memory and opens the sender.
    ///
    /// On a channel that the broker's policy declares confidential, a sender that was not told by which
    /// [mechanism](Self::mechanism) to send sends [one-shot messages](Mechanism::OneShot); one that was told another is
    /// refused, and so is one that asks for a [guard](Self::guard) or a kind of [pages](Self::pages)
    /// ([`OptionsError::Confidential`](super::OptionsError::Confidential)).
    ///
    /// Waits for the broker for 5 s if it is gone just now, and as long as the kernel takes to reserve the memory.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is kept then. [`OpenError::Channel`], [`OpenError::Label`] and [`OpenError::Geometry`] if the names, the sizes or the
    /// numbers cannot be; [`OpenError::Options`] if options contradict each other; [`OpenError::Memory`] if there is not enough; [`OpenError::Refused`] if the policy or a quota does
    /// not allow it, or an endpoint of the same user does not fit; [`OpenError::BrokerGone`], [`OpenError::NoAnswer`];
    /// [`OpenError::Forked`] in a child of the process that connected.
    pub fn open(self) -> Result<Sender, OpenError> {
        let again = (self.options.mechanism.is_none() && !self.options.from_receiver).then(|| self.clone());
        let (refusal, mut again) = match (self.open_as_wanted(), again) {
            (Err(refusal @ OpenError::Refused(Refusal::Confidential { .. })), Some(again)) => (refusal, again),
            (result, _) => return result,
        };
        again.options.is_confidential = true;
        match again.open_as_wanted() {
            // As many slots as were asked for cannot be.
            Err(OpenError::Geometry(_)) => Err(refusal),
            result => result,
        }
    }

    fn open_as_wanted(self) -> Result<Sender, OpenError> {
        let Self {
            client,
            channel,
            label,
            slot_size,
            slots,
            grow_to,
            header_size,
            alignment,
            extras,
            wait,
            disconnect_after,
            options,
            acceptance,
            requires_finish,
        } = self;
        ChannelName::new(channel.as_str())?;
        let label = label.map(Label::new).transpose()?;
        // Lossless: both have 64 bits.
        let slot_size = slot_size as u64;
        let [slots, grow_to] = [slots, grow_to].map(|count| count.map(|count| count as u64));
        acceptance.check()?;
        let wanted = options.check(slot_size)?;
        if extras.lossy {
            options.check_lossy(disconnect_after)?;
        }
        let one_shot = matches!(wanted, ProtectionRequest::Means(Mechanism::OneShot) | ProtectionRequest::Confidential);
        let few = one_shot || wanted.may_lease(slot_size);
        let guard = options.guard.unwrap_or_else(|| env::var_os("FBUF_GUARD").is_some_and(|value| value == "1"));
        // What was given away, or is unmapped, can be guarded no better than the kernel does.
        let guarded = guard && !few;
        let pages = options.pages.unwrap_or(Pages::Huge);
        let (header_bytes, alignment) = (header_size as u64, alignment as u64);
        if alignment > page_bytes() {
            return Err(GeometryError::Alignment { bytes: alignment }.into());
        }
        // Slots that are guarded fill whole pages.
        let alignment = if guarded { page_bytes() } else { alignment };
        let untold = slots.is_none() && grow_to.is_none();
        let most = if one_shot {
            MOST_SHOTS
        } else if few {
            FEW_SLOTS
        } else {
            u64::MAX
        };
        if few
            && !one_shot
            && let Some(limit) = grow_to
            && slots.is_some_and(|slots| slots != limit)
        {
            return Err(OptionsError::Growth { limit }.into());
        }
        let slots_of =
            |max_slots| Geometry::try_from(GeometryTerms { slot_bytes: slot_size, max_slots, header_bytes, alignment });
        // Whether there can be any of this size and alignment, before it is reckoned how many.
        slots_of(1)?;
        let some =
            || default_slots_here(slot_size.next_multiple_of(alignment)).max(if few { FEW_SLOTS } else { 1 }).min(most);
        let slots = slots.unwrap_or_else(|| some().min(grow_to.unwrap_or(u64::MAX)));
        let start = slots_of(slots)?.max_slots();
        let limit = grow_to.unwrap_or(if untold && !few { slots.max(ENOUGH_SLOTS) } else { slots });
        let geometry = slots_of(limit)?;
        if extras.lossy && geometry.max_slots() == 1 {
            return Err(OptionsError::Nothing { asked: "one slot, kept for the next message (lossy)," }.into());
        }
        if geometry.max_slots() < start {
            return Err(GeometryError::Growth { start, limit: geometry.max_slots() }.into());
        }
        match geometry.max_slots() {
            count if one_shot && count > MAX_ONE_SHOTS => return Err(GeometryError::OneShots { slots: count }.into()),
            count if !one_shot && few && count > MAX_LEASED => {
                return Err(GeometryError::Leased { slots: count }.into());
            }
            _ => {}
        }
        let terms = OpenRequest {
            client: &client,
            channel: &channel,
            label,
            wanted,
            format: Format { geometry, extras },
            start,
            guarded,
            pages,
            acceptance,
        };
        let Place { pool, pending_links, registration, mut protection_info } = terms.open()?;
        if guard && !guarded {
            protection_info.reason += ", and such slots cannot be guarded (FBUF_GUARD)";
        }
        Ok(Sender {
            pool,
            expected: Vec::new(),
            sockets: Sockets::new(pending_links.wake().clone(), registration.watch_hang_ups(&pending_links))?,
            ready: Ready::none(),
            is_searching: false,
            notice: pending_links.notice(),
            pending_links,
            wait,
            spin_budget: SpinBudget::new(),
            batching: Batching::default(),
            same_cpu: SameCpuPeers::default(),
            grows_late: untold && !few && !extras.lossy,
            next_growth: None,
            disconnect_after,
            slot_deadlines: None,
            awaits: WaitFor::Slot,
            is_armed: false,
            pace: Pace::new(),
            departures: ByUser::with_most(MAX_DEPARTURES),
            past: LinkCounts::default(),
            counters: Counts::default(),
            protection_info,
            requires_finish,
            generation: Generation::current(),
            registration,
        })
    }
}
