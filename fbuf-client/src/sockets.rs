//! The sockets on which an endpoint sleeps: an epoll over those of its links, the eventfd of its inbox, and a timer.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use fbuf_core::{
    peer::LinkId,
    process::{fork::Withheld, sys::in_call},
    socket::LinkSocket,
};
#[cfg(feature = "tokio")]
use fbuf_protocol::runtime::Witness;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::EventFd,
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use crate::{hangup::Watch, interrupt::InterruptHandle, wait::FOR_EVER};

/// How many sockets one look reports at most; the rest is reported by the next.
const EVENTS: usize = 32;

/// The sockets of an endpoint, the eventfd of its inbox, and a timer.
#[derive(Debug)]
pub(crate) struct Sockets {
    epoll: Withheld<Arc<Epoll>>,
    wake: Arc<EventFd>,
    timer: Timer,
    interrupts: InterruptHandle,
    hang_ups: Watch,
}

/// The links with events on their sockets that were not attended to yet.
#[derive(Debug)]
pub(crate) struct Ready {
    links: [LinkId; EVENTS],
    next: usize,
    count: usize,
}

impl Ready {
    pub(crate) const fn none() -> Self {
        Self { links: [LinkId::NONE; EVENTS], next: 0, count: 0 }
    }

    /// Whether there may be more than were attended to.
    pub(crate) fn is_partial(&self) -> bool {
        !self.is_empty() || self.count == EVENTS
    }

    /// Whether all were attended to.
    pub(crate) fn is_empty(&self) -> bool {
        self.next == self.count
    }
}

impl Iterator for Ready {
    type Item = LinkId;

    fn next(&mut self) -> Option<LinkId> {
        let link = (self.next < self.count).then(|| self.links[self.next])?;
        self.next += 1;
        Some(link)
    }
}

/// What the eventfd of the inbox and the timer are called among the links: no link is called that.
const WAKE: LinkId = LinkId::NONE;

impl Sockets {
    pub(crate) fn new(wake: Arc<EventFd>, hang_ups: Watch) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(in_call("epoll_create1"))?;
        let woken = epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE.to_bits()));
        woken.map_err(in_call("epoll_ctl"))?;
        let interrupts = InterruptHandle::new(wake.clone());
        Ok(Self { epoll: Arc::new(epoll).into(), wake, timer: Timer::default(), interrupts, hang_ups })
    }

    /// What an event loop of ours watches, and what tells that other code has closed it.
    #[cfg(feature = "tokio")]
    pub(crate) fn watched(&self) -> (Arc<Epoll>, Arc<Witness>) {
        (self.epoll.clone(), self.hang_ups.witness().clone())
    }

    /// Has the descriptor become readable after this time, if it is not [`FOR_EVER`]: false if that cannot be.
    pub(crate) fn ring_after(&self, time: Duration) -> bool {
        time == FOR_EVER || self.timer.set(&self.epoll, time).is_ok()
    }

    /// Has the timer made while there are descriptors, for a time when there are none. One that cannot be made is tried again.
    pub(crate) fn make_timer(&self) {
        let _ = self.timer.make(&self.epoll);
    }

    /// It is too late for that.
    pub(crate) fn stop_timer(&self) {
        self.timer.stop();
    }

    /// Whether the descriptor is readable.
    pub(crate) fn is_readable(&self) -> bool {
        let mut polled = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::ZERO) {
            // It may not poll a single descriptor (RLIMIT_NOFILE is 0). What is told here is told again.
            Err(Errno::EINVAL) => self.epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO) != Ok(0),
            // One that cannot be polled is to be looked at.
            readable => readable != Ok(0),
        }
    }

    pub(crate) fn add(&self, socket: LinkSocket<'_>, link: LinkId) -> io::Result<()> {
        self.hear(socket, link)?;
        self.hang_ups.add(socket, link)
    }

    /// Wakes for what happens there, and [tells](Self::look) of it.
    pub(crate) fn hear(&self, socket: LinkSocket<'_>, link: LinkId) -> io::Result<()> {
        socket.watch(&self.epoll, EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, link.to_bits())
    }

    /// Does so no more, until it is to [again](Self::hear); but for hang-ups, of which the control thread tells.
    pub(crate) fn ignore(&self, socket: LinkSocket<'_>) {
        // One that is ignored already cannot be removed, which is as well.
        let _ = socket.unwatch(&self.epoll);
    }

    /// To be called before the socket of a link is dropped over which something was received: that may keep it open.
    pub(crate) fn remove(&self, socket: LinkSocket<'_>) {
        // One that was never added cannot be removed, which is as well.
        let _ = socket.unwatch(&self.epoll);
        self.hang_ups.remove(socket);
    }

    /// What interrupts the calls that wait here.
    pub(crate) fn interrupts(&self) -> &InterruptHandle {
        &self.interrupts
    }

    /// Sleeps until something happens, which [`Self::look`] tells, or until `deadline`. A signal handler that runs
    /// meanwhile is an interrupt.
    pub(crate) fn sleep(&self, deadline: Option<Instant>) {
        let timeout = timeout_until(deadline);
        // By poll(2), which goes on by itself after the process was stopped, frozen or traced: then epoll_wait(2) returns
        // EINTR although no handler ran.
        let mut polled = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        let slept = match poll(&mut polled, timeout) {
            // It may not poll a single descriptor (RLIMIT_NOFILE is 0).
            Err(Errno::EINVAL) => self.epoll.wait(&mut [EpollEvent::empty()], timeout).map(drop),
            slept => slept.map(drop),
        };
        if slept == Err(Errno::EINTR) {
            self.interrupts.raise();
        }
    }

    /// What happened, without waiting.
    pub(crate) fn look(&self) -> Ready {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut ready = Ready::none();
        // No error is possible for a descriptor and a buffer of ours (epoll_wait(2)).
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in &events[..count] {
            let link = LinkId::from_bits(event.data());
            if link == WAKE {
                // Empty already is as well.
                let _ = self.wake.read();
            } else {
                ready.links[ready.count] = link;
                ready.count += 1;
            }
        }
        ready
    }
}

/// What poll(2) is told.
pub(crate) fn timeout_until(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else { return PollTimeout::NONE };
    let left = deadline.saturating_duration_since(Instant::now());
    // Rounded up, so as not to wake just before the time.
    let millis = left.as_millis() + u128::from(!left.is_zero());
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}

impl AsFd for Sockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

/// Wakes an endpoint that sleeps in an event loop, at a time when something has to be tried again. Made when it first does.
#[derive(Debug, Default)]
struct Timer {
    timer: OnceLock<Withheld<TimerFd>>,
    is_set: AtomicBool,
}

impl Timer {
    fn make(&self, epoll: &Epoll) -> nix::Result<&TimerFd> {
        if let Some(timer) = self.timer.get() {
            return Ok(timer);
        }
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE.to_bits()))?;
        Ok(self.timer.get_or_init(|| timer.into()))
    }

    fn set(&self, epoll: &Epoll, time: Duration) -> nix::Result<()> {
        let timer = self.make(epoll)?;
        // Zero would stop it.
        let time = TimeSpec::from_duration(time.max(Duration::from_nanos(1)));
        timer.set(Expiration::OneShot(time), TimerSetTimeFlags::empty())?;
        // Relaxed: it is set and stopped by the endpoint's thread.
        self.is_set.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn stop(&self) {
        if self.is_set.load(Ordering::Relaxed)
            && let Some(timer) = self.timer.get()
        {
            self.is_set.store(false, Ordering::Relaxed);
            // What it has told is forgotten as well (timerfd_settime(2)).
            let _ = timer.unset();
        }
    }
}
