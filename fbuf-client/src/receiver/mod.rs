//! The receiving end of a channel.

mod iter;
mod open;
mod report;
mod state;
mod wait;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fbuf_core::{
    abort::Abort,
    peer::Peer,
    process::fork::Generation,
    process::sys::said,
    receive::{
        link::{Answered, GreetError, Greeted, Inbound},
        received::Received,
    },
    socket::{close_received, link_message::LinkEnd},
};
use fbuf_protocol::Report;

use self::{open::NewLink, report::withheld};
use crate::{
    by_user::ByUser,
    client::{ClientFailed, Registration},
    endpoint::PendingLinks,
    guard::{self, WaitGuard},
    interrupt::InterruptHandle,
    sockets::{Ready, Sockets},
    wait::{
        Attention, BUSY_LOOK_TIME, Batching, LATE_AT_ONCE, LOOK_TIME, Pace, SameCpuPeers, SpinBudget, Wait, deadline,
    },
};

pub use iter::{Iter, TryIter};
pub use open::ReceiverBuilder;
pub use report::{GetError, ReceiverCounters};

/// The receiving end of a channel: gets every message of every sender, in each sender's order.
///
/// It belongs to one thread at a time; what it has received may go to others.
///
/// # How long a call may take
///
/// No sender can hold a call up. Whatever senders write into their memory and send over their sockets, a call
/// - looks at each link at most twice, and each time at no more than two entries of its lane;
/// - reads what came over sockets, and unmaps what is left of links that have ended, for 0.5 ms each, and ends what
///   it has begun: 176 short messages on one socket, or one segment to be mapped;
/// - takes one message, and copies it if messages are [copied](crate::Mechanism::Copy);
/// - waits some 100 µs if a thread of this process is just dropping the message before in the same slot. A message whose
///   slot is not free then is taken by a later call.
///
/// What is left is done by the next call. [`Self::get_timeout`] does so again and again, and looks at the clock
/// in between. Each sender has its turn after at most 4096 messages of all others, or one message of each.
#[derive(Debug)]
pub struct Receiver {
    /// The first is the one whose turn it is.
    links: Vec<Inbound>,
    /// Which of the others had its turn last.
    turn: usize,
    greeted: Vec<Greeted>,
    sockets: Sockets,
    /// The sockets at which something happened and that were not attended to yet.
    ready: Ready,
    pending_links: Arc<PendingLinks<NewLink>>,
    wait: Wait,
    keep_waiting: bool,
    had_sender: bool,
    spin_budget: SpinBudget,
    same_cpu: SameCpuPeers,
    batching: Batching,
    /// Whether flags may be raised: it sleeps, or was left armed.
    is_armed: bool,
    /// Whether there is something on the sockets that has woken it and was not read.
    unread: bool,
    pace: Pace,
    /// What is to be reported by the next calls, by turns of the users of the senders.
    troubles: ByUser<GetError>,
    /// Messages that were left out on links that are over.
    past_missed: u64,
    /// Messages that were written before links were open that are over.
    past_missed_before: u64,
    /// Messages that were received over links that are over.
    past_messages: u64,
    /// Bytes in them.
    past_bytes: u64,
    sleeps: u64,
    /// Senders that broke a rule.
    violations: u64,
    generation: Generation,
    registration: Registration,
}

impl Receiver {
    /// Takes the next message; waits until there is one (uf_get). What senders do that is no message
    /// [does not hold it up](Self#how-long-a-call-may-take).
    ///
    /// A signal handler that runs while it sleeps interrupts it; [`InterruptHandle`] has an example of a program that is
    /// to stop then.
    ///
    /// # Errors
    /// [`GetError`], but for [`GetError::TimedOut`]. The receiver can be used further after each.
    #[doc(alias("uf_get", "recv", "receive", "take"))]
    #[inline(always)]
    pub fn get(&mut self) -> Result<Received, GetError> {
        match self.take_fast() {
            Some(received) => Ok(received),
            // Taken apart and put together, what is returned never has to be in memory above.
            None => match self.get_slow(None) {
                Ok(received) => Ok(received),
                Err(error) => Err(error),
            },
        }
    }

    /// Takes the next message; waits for at most `time`, and as long as
    /// [one call may take](Self#how-long-a-call-may-take).
    ///
    /// # Errors
    /// [`GetError`]
    #[doc(alias = "recv_timeout")]
    #[inline]
    pub fn get_timeout(&mut self, time: Duration) -> Result<Received, GetError> {
        match self.take_fast() {
            Some(received) => Ok(received),
            None => self.get_slow(deadline(time)),
        }
    }

    /// Takes the next message, if there is one; never waits. What it does in any case is
    /// [bounded](Self#how-long-a-call-may-take).
    ///
    /// # Errors
    /// [`GetError`], but for [`GetError::TimedOut`].
    #[doc(alias("try_recv", "poll"))]
    #[inline]
    pub fn try_get(&mut self) -> Result<Option<Received>, GetError> {
        match self.take_fast() {
            Some(received) => Ok(Some(received)),
            None => self.try_get_slowly(),
        }
    }

    /// Prepares to wait for a message outside of this library, in an event loop: by poll(2), epoll(7), or what is built on them.
    /// None if there may be something already: then [`Self::try_get`] says what. Otherwise the descriptor of the guard
    /// becomes readable when [`Self::try_get`] has to be called again; nothing else is needed, no timeout either.
    ///
    /// Nothing is taken, so a wait can be given up at any time. An [interrupt](InterruptHandle) that was made before has this
    /// return none, once, and one that is made later makes the descriptor readable.
    ///
    /// It costs a membarrier(2) and a poll(2), so call [`Self::try_get`] first, and prepare if there is nothing.
    ///
    /// # By poll(2)
    ///
    /// Here a thread waits for a message or for standard input;
    /// [`poll`](crate::poll()) does all of this.
    ///
    /// ```
    /// use std::os::fd::AsFd;
    /// use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    ///
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let (input, _other) = std::os::unix::net::UnixStream::pair()?;
    /// let mut receiver = client.receiver("orders").open()?;
    /// # let mut sender = client.sender("orders").open()?;
    /// # sender.wait_for_receivers(1)?;
    /// # let fbuf = sender.allocate()?;
    /// # sender.write(fbuf)?;
    /// loop {
    ///     while let Some(message) = receiver.try_get()? {
    ///         println!("{} bytes", message.len());
    /// #       return Ok(());
    ///     }
    ///     let Some(guard) = receiver.prepare_wait() else { continue };
    ///     let mut polled = [PollFd::new(guard.as_fd(), PollFlags::POLLIN), PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    ///     poll(&mut polled, PollTimeout::NONE)?;
    ///     if polled[1].any() == Some(true) {
    ///         // read from it
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # With tokio
    ///
    /// A future cannot keep the guard; the receiver stays armed. It may be dropped at any time, for instance by
    /// `select!`: nothing is taken before it returns. What is readable is cleared before the receiver is armed again.
    ///
    /// ```
    /// use fbuf_client::{Received, Receiver};
    /// use tokio::io::{Interest, unix::AsyncFd};
    ///
    /// /// The next message; an error of the event loop, or of the receiver.
    /// async fn get(receiver: &mut AsyncFd<Receiver>) -> std::io::Result<Received> {
    ///     loop {
    ///         if let Some(message) = receiver.get_mut().try_get()? {
    ///             return Ok(message);
    ///         }
    ///         if receiver.get_mut().prepare_wait().is_some() {
    ///             receiver.readable_mut().await?.clear_ready();
    ///         }
    ///     }
    /// }
    ///
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let receiver = client.receiver("orders").open()?;
    /// # let mut sender = client.sender("orders").open()?;
    /// # sender.wait_for_receivers(1)?;
    /// # let fbuf = sender.allocate()?;
    /// # sender.write(fbuf)?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    /// # runtime.block_on(async {
    /// // SAFETY: its descriptor stays open, and the same, until it is dropped; it is not exchanged for another receiver.
    /// let mut receiver = unsafe { AsyncFd::register_with_interest(receiver, Interest::READABLE) }?;
    /// let message = get(&mut receiver).await?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn prepare_wait(&mut self) -> Option<WaitGuard<'_>> {
        if !self.generation.is_current() {
            return None;
        }
        self.disarm();
        guard::prepare(self)
    }

    /// A handle by which [`Self::get`] and [`Self::get_timeout`] are interrupted while they wait: from another thread, or
    /// from a signal handler.
    #[must_use]
    pub fn interrupt_handle(&self) -> InterruptHandle {
        self.sockets.interrupts().clone()
    }

    /// Goes because what was received cannot be used, for instance since it cannot be stored: senders are told so with
    /// this code ([`DisconnectReason::Failed`](crate::DisconnectReason::Failed)), and which messages were not read. Messages that are
    /// still held count as read if they are dropped later.
    ///
    /// ```
    /// use fbuf_client::{Abort, DisconnectReason};
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let mut receiver = client.receiver("frames").open()?;
    /// # let mut sender = client.sender("frames").slot_size(64).slots(4).open()?;
    /// # sender.wait_for_receivers(1)?;
    /// receiver.abort(28); // No space left on device
    /// // and the sender hears of it:
    /// let departure = loop {
    ///     sender.poll_events();
    ///     if let Some(departure) = sender.next_departure() {
    ///         break departure;
    ///     }
    /// };
    /// assert_eq!(departure.reason, DisconnectReason::Failed { reason: Abort::Code(28) });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn abort(mut self, code: u32) {
        if self.generation.is_current() {
            // A sender that it has not looked for yet is told as well.
            self.look();
        }
        self.fail(Abort::Code(code));
    }

    fn fail(&mut self, abort: Abort) {
        self.links.iter_mut().filter(|link| !link.is_over()).for_each(|link| link.fail(abort));
    }

    fn messages(&self) -> u64 {
        self.links.iter().map(Inbound::messages).sum::<u64>() + self.past_messages
    }

    /// Takes the next message of the sender whose turn it is, if nothing else is to be done before. All
    /// of this is inlined where messages are taken; whatever is more goes through a call.
    #[inline(always)]
    fn take_fast(&mut self) -> Option<Received> {
        self.links.first_mut()?.take_fast()
    }

    #[cold]
    #[inline(never)]
    fn get_slow(&mut self, deadline: Option<Instant>) -> Result<Received, GetError> {
        self.generation.check()?;
        self.disarm();
        if let Some(received) = self.take() {
            return Ok(received);
        }
        // Before a message that waits: there may be one each time, while another sender has died.
        match self.troubles.next() {
            Some(trouble) => Err(trouble),
            None => self.wait_for_message(deadline),
        }
    }

    #[cold]
    #[inline(never)]
    fn try_get_slowly(&mut self) -> Result<Option<Received>, GetError> {
        self.generation.check()?;
        self.disarm();
        if let Some(received) = self.take() {
            return Ok(Some(received));
        }
        self.look_if_due(LOOK_TIME);
        self.next().transpose()
    }

    /// Takes the next message of the sender whose turn it is, or else of whoever has one. None also if
    /// there is something to report first.
    fn take(&mut self) -> Option<Received> {
        let mut left = self.links.first().map_or(0, Inbound::left_of_round);
        if left == 0 {
            // After so many messages it is the next sender's turn, and perhaps time to look around.
            self.pass_on();
            self.look_if_due(BUSY_LOOK_TIME);
            left = self.pace.round_among(self.links.len());
            self.begin_round(left);
            if !self.troubles.is_empty() {
                return None;
            }
            if let Some(received) = self.take_fast() {
                return Some(received);
            }
        }
        for index in 0..self.links.len() {
            if let Some(received) = self.links[index].take() {
                if index > 0 {
                    self.links.swap(0, index);
                }
                self.begin_round(left - 1);
                return Some(received);
            }
            if self.links[index].is_broken() {
                self.bury_one(index);
                return None;
            }
        }
        None
    }

    /// Of the sender whose turn it is.
    fn begin_round(&mut self, messages: u32) {
        if let Some(link) = self.links.first_mut() {
            link.begin_round(messages);
        }
    }

    /// Gives the turn to the next of the other senders. Each has it once while it goes round.
    fn pass_on(&mut self) {
        let others = self.links.len().saturating_sub(1);
        if others > 0 {
            self.turn = self.turn % others + 1;
            self.links.swap(0, self.turn);
        }
    }

    /// What there is to report or to take, in this order; the end, when all is over.
    fn next(&mut self) -> Option<Result<Received, GetError>> {
        self.tidy();
        if let Some(trouble) = self.troubles.next() {
            return Some(Err(trouble));
        }
        if let Some(received) = self.take() {
            return Some(Ok(received));
        }
        self.obstacle().map(Err)
    }

    /// Finds what there is to report.
    fn tidy(&mut self) {
        self.troubles.extend(self.links.iter().filter_map(lease_lost));
        self.settle();
        self.troubles.extend(self.links.iter().filter_map(withheld));
        self.remove_closed();
    }

    /// Why nothing that could be taken will come.
    fn obstacle(&mut self) -> Option<GetError> {
        // To sleep would be to wait for what is there already.
        if let Some(peer) = self.links.iter_mut().find_map(|link| link.lacks_descriptor().then(|| link.peer())) {
            return Some(GetError::NoDescriptor { peer });
        }
        if let Some((peer, what)) = self.links.iter().find_map(|link| Some((link.peer(), link.lacks_memory()?))) {
            return Some(GetError::NoMemory { peer, what: what.into() });
        }
        let nothing = self.links.is_empty() && self.greeted.is_empty() && self.troubles.is_empty();
        let over = !self.keep_waiting && self.had_sender && nothing && !self.pending_links.has_peers();
        let failed = || (nothing && self.pending_links.is_over()).then_some(ClientFailed.into());
        over.then_some(GetError::Ended).or_else(failed)
    }

    /// Removes the links that are over and have nothing more to give, as long as [`Attention`] lasts: each has memory
    /// to be unmapped.
    fn remove_closed(&mut self) {
        let over = self.links.iter().rposition(Inbound::is_over);
        let Some(last) = over else { return };
        let attention = Attention::begin();
        for index in (0..=last).rev() {
            if self.links[index].is_over() {
                self.bury_one(index);
                if !attention.lasts() {
                    return;
                }
            }
        }
    }

    #[cold]
    fn bury_one(&mut self, index: usize) {
        let mut link = self.remove(index);
        let peer = link.peer();
        match link.end() {
            Ok(None) => {}
            Ok(Some(reason)) => self.troubles.add(GetError::Aborted { peer, reason }),
            Err(LinkEnd::Exhausted(what)) => {
                let (message, what) = (link.next_sequence(), what.into());
                self.troubles.add(GetError::GivenUp { peer, message, what });
            }
            Err(end) => self.push_error(trouble(peer, end)),
        }
    }

    #[cold]
    fn look_if_due(&mut self, time: Duration) {
        if self.pace.is_due(time) || self.pending_links.is_filled() {
            self.look();
            // Of one that died, or of a lease that was lost, others hear even while they are busy.
            self.troubles.extend(self.links.iter().filter_map(lease_lost));
            self.remove_closed();
        }
    }

    fn look(&mut self) {
        self.lower();
        self.unread = false;
        let (hung_up, asks) = (self.pending_links.take_hang_up(), self.ready.is_empty());
        if asks {
            self.ready = self.sockets.look();
        }
        self.attend();
        if hung_up && (!asks || self.ready.is_partial()) {
            // It may be one of those that were not attended to.
            self.pending_links.doubt();
        }
        close_received();
    }

    /// What it says of itself to whoever watches.
    fn say(&self) {
        self.pending_links.say(|| Report {
            messages: self.messages(),
            bytes: self.links.iter().map(Inbound::bytes).sum::<u64>() + self.past_bytes,
            left_out: self.links.iter().map(Inbound::missed).fold(self.past_missed, u64::saturating_add),
            sleeps: self.sleeps,
            violations: self.violations,
            ..Report::default()
        });
    }

    /// Reads what came over sockets, and letters, as long as [`Attention`] lasts: the rest is read by the next call.
    fn attend(&mut self) {
        self.pace.looked();
        self.say();
        let attention = Attention::begin();
        while let Some(new_link) = self.pending_links.next() {
            self.read_new_link(new_link);
            if !attention.lasts() {
                break;
            }
        }
        self.greet_late();
        // One at least, so that letters do not keep it from any.
        while let Some(link) = self.ready.next() {
            if let Some(index) = self.links.iter().position(|other| other.peer().link == link) {
                self.links[index].attend();
            } else if let Some(index) = self.greeted.iter().position(|other| other.peer().link == link) {
                let greeted = self.greeted.swap_remove(index);
                self.look_for(greeted);
            }
            if !attention.lasts() {
                break;
            }
        }
    }

    /// Greets senders that could not be greeted before. A few at a time: it may be that these cannot either.
    fn greet_late(&mut self) {
        for _ in 0..LATE_AT_ONCE {
            let Some(index) = self.greeted.iter().position(Greeted::is_unsaid) else { return };
            // Behind the others, if it cannot.
            let greeted = self.greeted.remove(index);
            self.look_for(greeted);
        }
    }

    /// Reads of a sender that was greeted.
    fn read_new_link(&mut self, new_link: NewLink) {
        let (peer, what) = match new_link {
            Ok(greeted) => match self.sockets.add(greeted.socket(), greeted.peer().link) {
                Ok(()) => return self.look_for(greeted),
                Err(error) => (greeted.peer(), Some(said(&error))),
            },
            Err((peer, GreetError::Gone)) => (peer, None),
            Err((peer, error)) => (peer, Some(error.to_string())),
        };
        self.pending_links.fail(peer, what.clone());
        self.troubles.extend(what.map(|what| GetError::Exhausted { peer, what: what.into() }));
    }

    /// Whether a sender has answered, which opens a link.
    fn look_for(&mut self, greeted: Greeted) {
        let peer = greeted.peer();
        match greeted.look() {
            Ok(Answered::Open(mut link)) => {
                self.had_sender = true;
                // It may have said more already, and gone.
                link.attend();
                self.same_cpu.add(peer);
                self.pending_links.link(peer, Some(link.holdings()));
                self.links.push(*link);
            }
            Ok(Answered::NotYet(greeted)) => self.greeted.push(*greeted),
            Err(LinkEnd::HangUp) => self.pending_links.fail(peer, None),
            Err(end) => {
                let error = trouble(peer, end);
                self.pending_links.fail(peer, Some(error.to_string()));
                self.push_error(error);
            }
        }
    }

    fn push_error(&mut self, error: GetError) {
        self.violations += u64::from(matches!(error, GetError::PeerViolation { .. }));
        self.troubles.add(error);
    }

    fn remove(&mut self, index: usize) -> Inbound {
        let link = self.links.swap_remove(index);
        self.troubles.extend(lease_lost(&link));
        self.same_cpu.remove(link.peer());
        self.pending_links.forget(link.peer());
        self.sockets.remove(link.socket());
        self.past_missed = self.past_missed.saturating_add(link.missed());
        self.past_missed_before = self.past_missed_before.saturating_add(link.missed_before());
        self.past_messages += link.messages();
        self.past_bytes += link.bytes();
        link
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail(Abort::Panic);
        }
        if self.generation.is_current() {
            self.say();
        }
        for link in &self.links {
            // What is held keeps the socket of its link open.
            self.sockets.remove(link.socket());
        }
    }
}

fn lease_lost(link: &Inbound) -> Option<GetError> {
    let messages = link.lost_leases();
    (messages > 0).then(|| GetError::LeaseLost { peer: link.peer(), messages })
}

fn trouble(peer: Peer, end: LinkEnd) -> GetError {
    match end {
        LinkEnd::HangUp => GetError::Disconnected { peer },
        LinkEnd::Disconnected => GetError::Dropped { peer },
        LinkEnd::Violation(violation) => GetError::PeerViolation { peer, violation: Box::new(violation) },
        LinkEnd::Exhausted(what) => GetError::Exhausted { peer, what: what.into() },
    }
}
