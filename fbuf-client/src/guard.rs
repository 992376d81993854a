//! Sleeping without losing a wake-up, in one place: a call that blocks, an event loop and [`poll`](crate::poll) all do it by
//! these steps. Raise the flags in which peers look, fence, look again; sleep; lower the flags, and read what has come.

use std::{
    fmt,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    time::{Duration, Instant},
};

use fbuf_core::{points, wait::Fencing};

use crate::{
    receiver::Receiver,
    sender::Sender,
    sockets::Sockets,
    wait::{Next, UNSURE, Waiting, within},
};

/// A sender or a receiver, as far as it waits.
pub(crate) trait Endpoint {
    fn sockets(&self) -> &Sockets;

    /// How it waits until a deadline.
    fn waiting(&self, deadline: Option<Instant>) -> Waiting;

    /// Whether it knows of something that came over its sockets and that it has not read.
    fn is_behind(&self) -> bool;

    /// Reads it. Lowers the flags.
    fn look(&mut self);

    /// Whether there is what it waits for, or something to report; with more effort if that is worth it.
    fn has_news(&mut self, thorough: bool) -> bool;

    /// Raises the flags, if peers are to ring at all: whether a fence is needed.
    fn raise(&mut self) -> bool;

    /// Looks once more, behind the fence: for how long to sleep at most; none if there is something to do.
    fn look_again(&mut self) -> Option<Duration>;

    /// What asks it for something next ends the wait.
    fn leave(&mut self) {}

    /// It is awake: lowers the flags and, unless something is there to be taken first, [looks](Self::look).
    fn wake(&mut self, slept: bool);
}

/// Prepares to sleep: for how long at most. None if there is something to do; in either case [`Endpoint::wake`] follows.
pub(crate) fn arm(endpoint: &mut (impl Endpoint + ?Sized)) -> Option<Duration> {
    if endpoint.is_behind() {
        return None;
    }
    let sure = !endpoint.raise() || Fencing::of_this_process().before_sleeping();
    endpoint.look_again().map(|time| bounded(time, sure))
}

/// For how long to sleep that may last for `time`, if a wake-up is `sure` to come.
pub(crate) fn bounded(time: Duration, sure: bool) -> Duration {
    if sure { time } else { time.min(UNSURE) }
}

/// What an attempt has come to.
pub(crate) enum Attempt<T> {
    /// It is over.
    Found(T),
    /// There is nothing.
    Nothing,
    /// There is something that cannot be had just now, and perhaps not for long.
    Stuck,
}

impl<T> From<Option<T>> for Attempt<T> {
    fn from(found: Option<T>) -> Self {
        found.map_or(Self::Nothing, Self::Found)
    }
}

/// Why waiting ended before there was anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmet {
    Interrupted,
    Expired,
}

/// Waits as `waiting` says until an attempt finds something. Attempts that are worth more effort are told so.
pub(crate) fn wait<E: Endpoint, T>(
    endpoint: &mut E,
    mut waiting: Waiting,
    mut attempt: impl FnMut(&mut E, bool) -> Attempt<T>,
) -> Result<T, Unmet> {
    loop {
        let thorough = waiting.is_thorough();
        let is_stuck = match attempt(endpoint, thorough) {
            Attempt::Found(found) => return Ok(found),
            Attempt::Nothing => false,
            Attempt::Stuck => true,
        };
        if (thorough || is_stuck) && endpoint.sockets().interrupts().take() {
            return Err(Unmet::Interrupted);
        }
        match if is_stuck { waiting.at_the_clock(Instant::now()) } else { waiting.next() } {
            Next::Again => {}
            Next::Look => endpoint.look(),
            Next::Sleep => sleep(endpoint, waiting.deadline()),
            Next::Expired => return Err(Unmet::Expired),
        }
    }
}

/// Sleeps until something happens, unless it has happened already.
fn sleep(endpoint: &mut impl Endpoint, deadline: Option<Instant>) {
    let armed = arm(endpoint);
    if let Some(time) = armed {
        endpoint.sockets().sleep(within(time, deadline));
    }
    points::reach("park: awake");
    endpoint.wake(armed.is_some());
}

/// Has an endpoint's descriptor become readable when it has to look again; none if it has to look now.
pub(crate) fn prepare<'a>(endpoint: &'a mut (dyn Endpoint + Send + 'a)) -> Option<WaitGuard<'a>> {
    if endpoint.is_behind() {
        endpoint.look();
    }
    if endpoint.has_news(true) || endpoint.sockets().interrupts().take() {
        return None;
    }
    endpoint.sockets().make_timer();
    let armed = arm(endpoint);
    // What came before is not told again to an event loop that is told of changes only.
    let is_quiet = |time| endpoint.sockets().ring_after(time) && !endpoint.sockets().is_readable();
    if armed.is_some_and(is_quiet) {
        endpoint.leave();
        return Some(WaitGuard(endpoint));
    }
    endpoint.wake(false);
    None
}

/// A [`Receiver`] or a [`Sender`] that may be slept on: its descriptor becomes readable when it has to look again.
///
/// [`Receiver::prepare_wait`] and [`Sender::prepare_wait`] return it. What is to be slept on is the descriptor
/// ([`AsFd`]), by poll(2), select(2), epoll(7), io_uring or an event loop that is built on these, level-triggered or edge-triggered. It
/// is readable for every reason to look: a message or a slot, a peer that comes, goes or dies, an
/// [interrupt](crate::InterruptHandle), and a moment at which something has to be tried again. So no timeout is needed.
/// It may be readable for no reason. Nothing may be read from it or written to it.
///
/// The endpoint stays armed when the guard is gone, for event loops that have only callbacks, or futures, and cannot keep
/// it: the next call that asks the endpoint for something ends the wait. Until then each peer rings once, which costs it a
/// system call, and nothing is lost however late that call is. To [finish](Self::finish) the guard tells peers at once that
/// they need not ring. Where there is no guard the endpoint is not borrowed, in an `else` or an arm of `match` either:
///
/// ```edition2021
/// use std::{io::Write, os::fd::AsFd};
/// use fbuf_client::WaitFor;
/// use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let mut orders = client.receiver("orders").open()?;
/// let mut answers = client.sender("answers").slots(1).open()?;
/// # let mut asking = client.sender("orders").open()?;
/// # let mut hearing = client.receiver("answers").open()?;
/// # asking.wait_for_receivers(1)?;
/// # answers.wait_for_receivers(1)?;
/// # for _ in 0..3 {
/// #     let fbuf = asking.allocate()?;
/// #     asking.write(fbuf)?;
/// # }
/// # let mut heard = 0;
/// let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
/// epoll.add(orders.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
/// epoll.add(answers.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
/// let mut order = None; // one that waits for a slot
/// loop {
///     let guard = match order {
///         None => orders.prepare_wait(),
///         Some(_) => answers.prepare_wait(WaitFor::Slot),
///     };
///     match (guard, &order) {
///         (Some(_), _) => {
/// #           heard += hearing.try_iter().count(); // so that there is a slot
/// #           if heard == 3 { break }
///             epoll.wait(&mut [EpollEvent::empty(); 2], EpollTimeout::NONE)?;
///         }
///         (None, None) => order = orders.try_get()?,
///         (None, Some(taken)) => {
///             if let Some(mut answer) = answers.try_allocate()? {
///                 writeln!(answer, "{} bytes", taken.len())?;
///                 answers.write(answer)?;
///                 order = None;
///             }
///         }
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "without a guard there is something to do, and nothing to sleep for"]
pub struct WaitGuard<'a>(&'a mut (dyn Endpoint + Send + 'a));

impl WaitGuard<'_> {
    /// Ends the wait, and reads what has come: for an endpoint that is not asked for something soon, or only for its peers.
    pub fn finish(self) {
        self.0.wake(false);
    }
}

impl AsFd for WaitGuard<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.sockets().as_fd()
    }
}

impl AsRawFd for WaitGuard<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl fmt::Debug for WaitGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WaitGuard").field(self.0.sockets()).finish()
    }
}

/// The descriptor on which this endpoint sleeps, always the same one. That it is not readable says nothing, but after
/// [`prepare_wait`](Receiver::prepare_wait) has returned a guard, and until the endpoint is asked for something again.
impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sockets().as_fd()
    }
}

/// As of [`AsFd`], for event loops that ask for the number.
impl AsRawFd for Receiver {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// The descriptor on which this endpoint sleeps, always the same one. That it is not readable says nothing, but after
/// [`prepare_wait`](Sender::prepare_wait) has returned a guard, and until the endpoint is asked for something again.
impl AsFd for Sender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sockets().as_fd()
    }
}

/// As of [`AsFd`], for event loops that ask for the number.
impl AsRawFd for Sender {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
