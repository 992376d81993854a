//! The sending end of a channel.

mod links;
mod open;
mod options;
mod protection;
mod report;
mod slots;
mod state;
mod wait;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use self::wait::SlotDeadlines;
use crate::{
    by_user::ByUser,
    client::Registration,
    endpoint::PendingLinks,
    guard::{self, WaitGuard},
    interrupt::InterruptHandle,
    sockets::{Ready, Sockets},
    wait::{Batching, Pace, SameCpuPeers, SpinBudget, Wait, deadline},
};
use fbuf_core::{
    abort::Abort,
    process::fork::{Generation, Notice},
    send::{
        fbuf::Fbuf,
        link::{Expected, LinkCounts},
        pool::{Looks, Pool, Published, Unsent},
        retained::Retained,
    },
    socket::close_received,
};

pub use open::SenderBuilder;
pub use options::OptionsError;
pub use protection::{LEASE_BASE_FROM, LEASE_FROM, ProtectionInfo};
pub use report::{AllocateError, Departure, DisconnectReason, SenderCounters, Sent, WaitError, WriteError};
pub use wait::WaitFor;

use protection::NewReceiver;

/// The sending end of a channel: allocates fbufs out of its own pool and gives them to every
/// receiver that is linked.
///
/// It belongs to one thread at a time.
///
/// # The end of a stream
///
/// Receivers get all that was written, and then how the stream has ended:
///
/// * [`finish`](Self::finish) says that it is complete: [`GetError::Ended`](crate::GetError::Ended). To drop a sender
///   says the same, unless it was opened with [`require_finish`](SenderBuilder::require_finish).
/// * [`abort`](Self::abort) says that it is not: [`GetError::Aborted`](crate::GetError::Aborted). So does a panic that
///   drops the sender, and a sender that is dropped although it requires `finish`.
/// * If its process ends before the sender is dropped, nothing is said:
///   [`GetError::Disconnected`](crate::GetError::Disconnected). This is the case when the process is killed or aborts,
///   and also for a sender that is in a `static`, or that is on the stack when [`std::process::exit`] is called: neither is
///   ever dropped. Receivers cannot tell such a stream from one that broke off, even if it was complete. So keep such a
///   sender in an `Option`, and take it out and finish it before the process ends; at the latest in a handler of atexit(3).
///   A thread-local is dropped when its thread ends, and may hold a sender.
///
/// ```
/// # use std::sync::Mutex;
/// # use fbuf_client::{GetError, Sender};
/// static SENDER: Mutex<Option<Sender>> = Mutex::new(None);
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let mut receiver = client.receiver("lines").open()?;
/// let mut sender = client.sender("lines").open()?;
/// sender.wait_for_receivers(1)?;
/// *SENDER.lock().unwrap() = Some(sender);
/// // … and before main returns, or exit is called:
/// if let Some(sender) = SENDER.lock().unwrap().take() {
///     sender.finish();
/// }
/// assert_eq!(receiver.get().unwrap_err(), GetError::Ended);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A stream that breaks off:
///
/// ```
/// use fbuf_client::{Abort, GetError};
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let mut receiver = client.receiver("lines").keep_waiting().open()?;
/// let mut sender = client.sender("lines").require_finish().open()?;
/// sender.wait_for_receivers(1)?;
/// sender.abort(7); // its source has failed
/// assert!(matches!(receiver.get(), Err(GetError::Aborted { reason: Abort::Code(7), .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Sender {
    pool: Pool,
    expected: Vec<Expected>,
    sockets: Sockets,
    /// The sockets at which something happened and that were not attended to yet.
    ready: Ready,
    pending_links: Arc<PendingLinks<NewReceiver>>,
    /// Whether the last look at links that are closed ended before it was through.
    is_searching: bool,
    /// Whether there is anything in the inbox, or this process was forked.
    notice: Notice,
    generation: Generation,
    wait: Wait,
    spin_budget: SpinBudget,
    batching: Batching,
    same_cpu: SameCpuPeers,
    /// Whether it grows only when receivers keep all slots for long: nobody told it how many to have.
    grows_late: bool,
    /// When it tries to grow again, if it could not.
    next_growth: Option<Instant>,
    /// For how long a receiver may hold it up.
    disconnect_after: Option<Duration>,
    /// Since it has found no slot.
    slot_deadlines: Option<SlotDeadlines>,
    /// What it waits for, or did last.
    awaits: WaitFor,
    /// Whether flags may be raised: it sleeps, or was left armed.
    is_armed: bool,
    pace: Pace,
    /// The receivers that went and were not asked about yet.
    departures: ByUser<Departure>,
    /// The counts of links that are over.
    past: LinkCounts,
    counters: Counts,
    protection_info: ProtectionInfo,
    /// Whether to be dropped is no end in order.
    requires_finish: bool,
    registration: Registration,
}

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    bytes: u64,
    waits: u64,
    sleeps: u64,
    growths: u64,
    growth_refused: u64,
    violations: u64,
}

impl Sender {
    /// Takes a free slot; waits while all are in use (uf_allocate).
    ///
    /// Grows first, if the sender may. Waits for ever if every slot is held as a [`Fbuf`] by the
    /// thread that calls.
    ///
    /// # Errors
    /// [`AllocateError::NoMemory`] if each message or slot is memory of its own
    /// ([`Mechanism::OneShot`](crate::Mechanism::OneShot), [`Mechanism::Lease`](crate::Mechanism::Lease)) and
    /// there is none; [`AllocateError::Interrupted`] if it waits and is [interrupted](InterruptHandle);
    /// [`AllocateError::Forked`].
    #[doc(alias("uf_allocate", "loan", "reserve", "acquire"))]
    #[inline(always)]
    pub fn allocate(&mut self) -> Result<Fbuf, AllocateError> {
        loop {
            if let Some(fbuf) = self.pool.allocate() {
                return Ok(fbuf);
            }
            self.provide(None)?;
        }
    }

    /// Takes a free slot; waits for at most `time`.
    ///
    /// # Errors
    /// [`AllocateError::TimedOut`], and as [`Self::allocate`].
    #[inline]
    pub fn allocate_timeout(&mut self, time: Duration) -> Result<Fbuf, AllocateError> {
        loop {
            if let Some(fbuf) = self.pool.allocate() {
                return Ok(fbuf);
            }
            self.provide(deadline(time))?;
        }
    }

    /// Takes a free slot, if there is one; grows, but never waits. None if all are in use.
    ///
    /// # Errors
    /// As [`Self::allocate`], but for what waits, and [`AllocateError::NoDescriptor`] and [`AllocateError::NoRoom`]: a slot is free, and cannot
    /// be had.
    #[doc(alias("try_loan", "try_reserve"))]
    #[inline]
    pub fn try_allocate(&mut self) -> Result<Option<Fbuf>, AllocateError> {
        match self.pool.allocate() {
            Some(fbuf) => Ok(Some(fbuf)),
            None => self.try_provide(),
        }
    }

    #[cold]
    #[inline(never)]
    fn try_provide(&mut self) -> Result<Option<Fbuf>, AllocateError> {
        self.generation.check()?;
        if self.collect_or_find(true) || self.lose_patience() && self.find_slot(true) {
            return Ok(self.pool.allocate());
        }
        self.lack().map_or(Ok(None), Err)
    }

    /// Sees to it that the pool knows of a free slot; looks at a round of slots, and waits if none of any
    /// is back.
    #[cold]
    #[inline(never)]
    fn provide(&mut self, deadline: Option<Instant>) -> Result<(), AllocateError> {
        self.generation.check()?;
        if self.collect_or_find(!self.grows_late) {
            Ok(())
        } else if self.pool.is_lossy() {
            Err(self.lack().unwrap_or(AllocateError::WouldWait { slots: self.pool.slots() as usize }))
        } else {
            self.wait_for_slot(deadline)
        }
    }

    #[cold]
    #[inline(never)]
    fn collect_or_find(&mut self, may_grow: bool) -> bool {
        // The rounds in which slots are collected are those in which the time is looked at.
        self.look_if_due();
        self.collect() || self.find_slot(may_grow)
    }

    /// Gives an fbuf to every receiver: what is filled of it is the message (uf_write). From here on
    /// this process cannot change it.
    ///
    /// A receiver that has died is found out some microseconds after its process has ended. What was written to it
    /// until then is reported as sent, and its [`Departure`] says which messages it had not read.
    ///
    /// # Errors
    /// [`WriteError`], with the fbuf in it.
    #[doc(alias("uf_write", "publish", "send", "commit"))]
    #[inline(always)]
    pub fn write(&mut self, fbuf: Fbuf) -> Result<Sent, WriteError> {
        // All of this is inlined where messages are written; whatever is more goes through a call.
        if self.notice.is_raised() && !self.heed() {
            return Err(WriteError::Forked { fbuf });
        }
        match self.pool.send_fast(fbuf) {
            Ok(published) => {
                // Counted before a receiver is linked that gets the next message as its first.
                let sent = self.sent(published);
                if self.pool.is_dry() {
                    self.look_ahead();
                }
                Ok(sent)
            }
            Err(fbuf) => self.send(fbuf),
        }
    }

    /// Looks which slots are back when the last one is sent that was known to be: now it waits for nobody,
    /// and the next allocation need not wait for the memory of receivers.
    #[cold]
    #[inline(never)]
    fn look_ahead(&mut self) {
        self.look_if_due();
        self.collect();
    }

    /// As [`Self::write`], but keeps a handle through which the message can be read here too, and later
    /// [written again](Self::make_mut). Its slot is not used for anything else before that is dropped.
    ///
    /// While there are such handles, each look for free slots takes time for each handle, and one slot is looked at at a time
    /// where many are otherwise: keep a few, not thousands.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// let mut fbuf = sender.allocate()?;
    /// fbuf.set_len(8)?;
    /// let (_, last) = sender.write_retained(fbuf)?;
    /// println!("{last:?}: {:?}", &last[..]); // while receivers read it
    /// drop(receiver.get()?);
    /// let mut next = sender.make_mut(last).expect("a slot is free"); // the same slot, since the receiver has let go
    /// next[0] += 1;
    /// sender.write(next)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`WriteError`], with the fbuf in it.
    pub fn write_retained(&mut self, fbuf: Fbuf) -> Result<(Sent, Retained), WriteError> {
        if self.notice.is_raised() && !self.heed() {
            return Err(WriteError::Forked { fbuf });
        }
        let (published, retained) = self.send_by(fbuf, Pool::send_and_keep)?;
        Ok((self.sent(published), retained))
    }

    /// An fbuf with the content of a message that was sent and kept, to be changed: in the same slot, if
    /// every receiver has handed it back; or else in a fresh one, where the content is copied, as in
    /// [`Arc::make_mut`]. Receivers that still read see nothing of it. Never waits.
    ///
    /// # Errors
    /// What was given, if no slot is free, or if it is of another sender and longer than a message of this one.
    pub fn make_mut(&mut self, retained: Retained) -> Result<Fbuf, Retained> {
        if !self.generation.is_current() {
            return Err(retained);
        }
        self.pool.notice_leaving();
        let retained = match self.pool.rewrite(retained) {
            Ok(fbuf) => return Ok(fbuf),
            Err(retained) => retained,
        };
        let Ok(Some(mut fbuf)) = self.try_allocate() else { return Err(retained) };
        if fbuf.set_len(retained.len()).is_err() {
            return Err(retained);
        }
        fbuf.copy_from_slice(&retained);
        // Of another sender, it may have another header, and tags.
        if retained.header().len() == fbuf.header().len() {
            fbuf.header_mut().copy_from_slice(retained.header());
        }
        let _ = fbuf.set_tag(retained.tag());
        Ok(fbuf)
    }

    #[inline]
    fn sent(&mut self, published: Published) -> Sent {
        let Published { sequence, length, receivers } = published;
        self.counters.bytes += u64::from(length);
        Sent { sequence, receivers }
    }

    /// Gives an fbuf to every receiver that takes it.
    #[inline(never)]
    fn send(&mut self, fbuf: Fbuf) -> Result<Sent, WriteError> {
        let published = self.send_by(fbuf, Pool::send)?;
        Ok(self.sent(published))
    }

    /// Sends an fbuf; once more, if there was no receiver and one has come meanwhile.
    fn send_by<T>(&mut self, fbuf: Fbuf, send: impl Fn(&mut Pool, Fbuf) -> Result<T, Unsent>) -> Result<T, WriteError> {
        if self.pool.is_lossy() {
            self.make_room();
        }
        let sent = match send(&mut self.pool, fbuf) {
            Err(Unsent::NoReceiver(fbuf)) => {
                self.look_if_due();
                send(&mut self.pool, fbuf)
            }
            sent => sent,
        };
        self.end_lost();
        Ok(sent?)
    }

    /// Ends links over which nothing could be sent.
    fn end_lost(&mut self) {
        while let Some((index, end)) = self.pool.lost() {
            self.end(index, end);
        }
    }

    /// Waits until at least `count` receivers are linked: how many are.
    ///
    /// # Errors
    /// [`WaitError::Interrupted`] if it is [interrupted](InterruptHandle), [`WaitError::Forked`] in a child of the process that
    /// opened the sender.
    pub fn wait_for_receivers(&mut self, count: usize) -> Result<usize, WaitError> {
        self.wait_until_linked(count, None)
    }

    /// Waits until at least `count` receivers are linked, for at most `time`: how many are.
    ///
    /// # Errors
    /// [`WaitError::TimedOut`], and as [`Self::wait_for_receivers`].
    pub fn wait_for_receivers_timeout(&mut self, count: usize, time: Duration) -> Result<usize, WaitError> {
        self.wait_until_linked(count, deadline(time))
    }

    /// Waits until every receiver has handed back everything it was given, and so is done with it.
    /// Receivers that go give everything back as well; [`Self::next_departure`] tells.
    ///
    /// It is not needed before [`finish`](Self::finish), or before the sender is dropped: what was written can be read
    /// when the sender and its process are gone. A receiver that keeps a message until the stream ends would be waited
    /// for in vain.
    ///
    /// # Errors
    /// As [`Self::wait_for_receivers`].
    #[doc(alias = "flush")]
    pub fn wait_for_returns(&mut self) -> Result<(), WaitError> {
        self.wait_until_returned(None)
    }

    /// As [`Self::wait_for_returns`], for at most `time`.
    ///
    /// # Errors
    /// [`WaitError::StillLent`], and as [`Self::wait_for_returns`].
    ///
    /// ```
    /// use std::time::Duration;
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// let fbuf = sender.allocate()?;
    /// sender.write(fbuf)?;
    /// let message = receiver.get()?;
    /// assert!(sender.wait_for_returns_timeout(Duration::from_millis(1)).is_err());
    /// drop(message);
    /// sender.wait_for_returns()?; // all that was written has been read
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_for_returns_timeout(&mut self, time: Duration) -> Result<(), WaitError> {
        self.wait_until_returned(deadline(time))
    }

    /// Prepares to wait outside of this library, in an event loop: by poll(2), epoll(7), or what is built on them. None if
    /// what is waited for may be there already: then ask for it. Otherwise the descriptor of the guard becomes readable when
    /// it is to be asked for again; nothing else is needed, no timeout either. [`Receiver::prepare_wait`] has examples.
    ///
    /// Nothing is taken, so a wait can be given up at any time. An [interrupt](InterruptHandle) that was made before has this
    /// return none, once, and one that is made later makes the descriptor readable. Receivers that hold the sender up are
    /// [disconnected](SenderBuilder::disconnect_after) when it is asked for a slot, or prepared, after that time.
    ///
    /// ```
    /// use fbuf_client::{Fbuf, Sender, WaitFor};
    /// use tokio::io::{Interest, unix::AsyncFd};
    ///
    /// async fn allocate(sender: &mut AsyncFd<Sender>) -> std::io::Result<Fbuf> {
    ///     loop {
    ///         if let Some(fbuf) = sender.get_mut().try_allocate()? {
    ///             return Ok(fbuf);
    ///         }
    ///         if sender.get_mut().prepare_wait(WaitFor::Slot).is_some() {
    ///             sender.readable_mut().await?.clear_ready();
    ///         }
    ///     }
    /// }
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let sender = client.sender("orders").open()?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    /// # runtime.block_on(async {
    /// // SAFETY: its descriptor stays open, and the same, until it is dropped; it is not exchanged for another sender.
    /// let mut sender = unsafe { AsyncFd::register_with_interest(sender, Interest::READABLE) }?;
    /// let fbuf = allocate(&mut sender).await?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// [`Receiver::prepare_wait`]: crate::Receiver::prepare_wait
    pub fn prepare_wait(&mut self, what: WaitFor) -> Option<WaitGuard<'_>> {
        if !self.generation.is_current() {
            return None;
        }
        self.await_event(what);
        guard::prepare(self)
    }

    /// Whether every receiver has handed back everything it was given. Takes time for each slot: O(slots), or less if what was
    /// sent last is not back.
    #[must_use]
    pub fn has_all_back(&self) -> bool {
        !self.pool.lends()
    }

    /// A handle by which [`Self::allocate`], [`Self::wait_for_receivers`], [`Self::wait_for_returns`], and what they are with
    /// a timeout, are interrupted while they wait: from another thread, or from a signal handler.
    #[must_use]
    pub fn interrupt_handle(&self) -> InterruptHandle {
        self.sockets.interrupts().clone()
    }

    /// Looks for receivers that have come or gone, without waiting.
    /// Everything else does so too, but only when there is a reason.
    pub fn poll_events(&mut self) {
        if !self.generation.is_current() {
            return;
        }
        self.lower();
        let (hung_up, asks) = (self.pending_links.take_hang_up(), self.ready.is_empty());
        if asks {
            self.ready = self.sockets.look();
        }
        self.attend();
        if hung_up && (!asks || self.ready.is_partial()) {
            // It may be one of those that were not attended to.
            self.pending_links.doubt();
        }
        self.pool.notice_leaving();
        let mut looks = Looks::of_call();
        self.remove_departed(&mut looks);
        self.forget_parted(&mut looks);
        self.is_searching = looks.are_used_up();
        close_received();
    }

    /// Ends the stream, which is complete: receivers get all that was written, and then
    /// [`GetError::Ended`](crate::GetError::Ended). Does not wait for them; what was written can be read when the
    /// sender and its process are gone.
    pub fn finish(mut self) {
        self.end_stream(None);
    }

    /// Breaks the stream off, for instance because its source has failed: receivers get all that was written, and then
    /// [`GetError::Aborted`](crate::GetError::Aborted) with this code, rather than take it for complete.
    pub fn abort(mut self, code: u32) {
        self.end_stream(Some(Abort::Code(code)));
    }

    /// Whether a sender that is dropped has broken its stream off: whether it had before.
    #[cfg(feature = "tokio")]
    pub(crate) fn set_require_finish(&mut self, is_required: bool) -> bool {
        std::mem::replace(&mut self.requires_finish, is_required)
    }

    /// What was said first counts.
    fn end_stream(&mut self, abort: Option<Abort>) {
        if self.generation.is_current() {
            self.say();
        }
        for link in self.pool.links() {
            self.sockets.remove(link.socket());
        }
        self.pool.close(abort);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.end_stream(match (std::thread::panicking(), self.requires_finish) {
            (true, _) => Some(Abort::Panic),
            (false, true) => Some(Abort::Unfinished),
            (false, false) => None,
        });
    }
}
