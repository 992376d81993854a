//! What a sender and a receiver have in common: a queue that the control thread fills with
//! introductions, and the set of sockets on which they sleep.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use fbuf_core::{
    introduced::Introduced,
    peer::{LinkId, Peer},
    process::{
        fork::{Notice, Withheld},
        sys::in_call,
    },
    receive::link::Holdings,
    socket::{
        LinkSocket,
        shares::{self, MOST_LINKS, Share},
    },
};
use fbuf_protocol::Report;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use crate::{
    hangup::{Alarm, Watch},
    interrupt::InterruptHandle,
    link_failure::LinkFailure,
    wait::FOR_EVER,
};

/// Where the control thread brings introductions.
pub(crate) trait LinkSink: Send {
    /// A peer was introduced.
    fn introduce(&self, introduced: Introduced);

    /// A peer was introduced with which no link can be made, for want of something.
    fn fail(&self, peer: Peer, reason: String);

    /// The links that there are, or will be.
    fn links(&self) -> Vec<LinkId>;

    /// What the endpoint has done, as far as it has said.
    fn report(&self) -> Report;

    /// What is held of the messages of each link: how many, and which of them was sent first.
    fn held(&self) -> Vec<(LinkId, usize, u64)>;
}

/// What the control thread brings of a peer.
pub(crate) trait Brought {
    /// The peer, if that is gone and has left nothing for the endpoint to read.
    fn is_void(&self) -> Option<Peer>;
}

/// Why a link is not [admitted](PendingLinks::admit).
pub(crate) const NO_ROOM: &str = "its user has as many links with this process as one other user may have, or as much of its \
                                  descriptors (RLIMIT_NOFILE) or memory";

/// How often letters are looked through for those of peers that are gone, at most.
const SWEEP_PAUSE: Duration = Duration::from_millis(20);

/// A queue of new links: filled by the control thread, emptied by the endpoint.
#[derive(Debug)]
pub(crate) struct PendingLinks<T> {
    filled: Notice,
    /// Whether a peer has hung up since the endpoint last looked at its sockets.
    hung_up: AtomicBool,
    /// Whether nothing comes any more: the control thread has ended.
    is_closed: AtomicBool,
    new_links: Mutex<VecDeque<T>>,
    /// The links with peers that were introduced and have not gone. One peer may have several: when a broker dies
    /// between its two introductions, the next one introduces the two again.
    links: Mutex<BTreeMap<LinkId, Link>>,
    /// The last peer with which no link could be made.
    failure: Mutex<Option<LinkFailure>>,
    /// When letters were looked through last.
    swept: Mutex<Option<Instant>>,
    /// What the endpoint says of itself whenever it looks at its sockets; but for its links.
    report: Mutex<Report>,
    wake: Withheld<Arc<EventFd>>,
}

/// A link, as the control thread knows it.
#[derive(Debug, Default)]
struct Link {
    /// Whether the two are linked, and not only about to be.
    is_open: bool,
    /// Whether the peer has hung up. What it had sent may be received still.
    has_hung_up: bool,
    /// What is held of a sender's messages.
    holdings: Option<Holdings>,
    /// What the user of the peer takes up with it, if that is bounded.
    share: Option<Taken>,
}

/// What a user takes up with a link.
#[derive(Debug)]
struct Taken {
    user: u32,
    /// Memory of this process for the user's messages, in bytes.
    pool: u64,
    _descriptors: Share,
}

impl<T: Brought> PendingLinks<T> {
    /// Has room for a link with a peer, which takes so many descriptors, and so many bytes of a pool of which its user may
    /// have so many: whether there is any. A letter about it will come.
    pub(crate) fn admit(&self, peer: &Peer, descriptors: usize, pool: u64, most: u64) -> bool {
        let Some(user) = shares::bounded(peer) else {
            self.expect(*peer);
            return true;
        };
        let admit = || {
            let mut links = lock(&self.links);
            let of_user = links.values().filter_map(|link| link.share.as_ref()).filter(|taken| taken.user == user);
            let (count, made) =
                of_user.fold((0, 0), |(count, made), taken| (count + 1, taken.pool.saturating_add(made)));
            if count >= MOST_LINKS || (pool > 0 && pool.saturating_add(made) > most) {
                return false;
            }
            // With those that it takes once the user is found out.
            let share = Share::take(user, descriptors as u64 + shares::OF_RELAY);
            share.is_some_and(|share| {
                links.entry(peer.link).or_default().share = Some(Taken { user, pool, _descriptors: share });
                true
            })
        };
        admit() || (self.sweep() && admit())
    }

    /// Removes letters about peers that are gone, of which the endpoint need not know: whether there were any. Not again
    /// and again, since it takes as long as there are letters.
    fn sweep(&self) -> bool {
        let (mut swept, now) = (lock(&self.swept), Instant::now());
        if swept.is_some_and(|swept| now < swept + SWEEP_PAUSE) {
            return false;
        }
        *swept = Some(now);
        // Dropped after the lock is released.
        let void = {
            let mut new_links = lock(&self.new_links);
            let (void, rest): (VecDeque<_>, _) = new_links.drain(..).partition(|new_link| new_link.is_void().is_some());
            *new_links = rest;
            void
        };
        void.iter().filter_map(Brought::is_void).for_each(|peer| self.forget(peer));
        !void.is_empty()
    }
}

impl<T> PendingLinks<T> {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(in_call("eventfd2"))?;
        let (new_links, links, report) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (filled, failure, swept) = (Notice::new()?, Mutex::default(), Mutex::default());
        let [hung_up, is_closed] = [false; 2].map(AtomicBool::new);
        Ok(Self { filled, hung_up, is_closed, new_links, links, failure, swept, report, wake: Arc::new(wake).into() })
    }

    /// What wakes the endpoint.
    pub(crate) fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// A letter about a peer will come.
    pub(crate) fn expect(&self, peer: Peer) {
        lock(&self.links).entry(peer.link).or_default();
    }

    pub(crate) fn post(&self, peer: Peer, new_link: T) {
        self.expect(peer);
        {
            let mut new_links = lock(&self.new_links);
            new_links.push_back(new_link);
            // Relaxed: what is said of the letters is said by their lock.
            self.filled.set(true);
        }
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }

    /// Nothing comes any more.
    pub(crate) fn close(&self) {
        // Release, for the Acquire in `is_over`: what came before is to be read before.
        self.is_closed.store(true, Ordering::Release);
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }

    /// Whether nothing will come, and nothing waits to be read.
    pub(crate) fn is_over(&self) -> bool {
        self.is_closed.load(Ordering::Acquire) && !self.has_new_links()
    }

    /// Whether there is anything; one load of memory that rarely changes. It says so in a child that was forked.
    #[inline]
    pub(crate) fn is_filled(&self) -> bool {
        self.filled.is_raised()
    }

    /// What [`Self::is_filled`] looks at.
    pub(crate) fn notice(&self) -> Notice {
        self.filled.clone()
    }

    /// Whether there is a letter.
    pub(crate) fn has_new_links(&self) -> bool {
        self.is_filled() && !lock(&self.new_links).is_empty()
    }

    /// Has [`Self::is_filled`] say so although there may be nothing: there is something else to look for.
    pub(crate) fn remind(&self) {
        self.filled.set(true);
    }

    /// Whether a peer has hung up, as far as the control thread has told.
    pub(crate) fn has_hung_up(&self) -> bool {
        // Relaxed: the kernel is asked next, which knows of it since before this was stored.
        self.hung_up.load(Ordering::Relaxed)
    }

    /// As [`Self::has_hung_up`], since this was called last.
    pub(crate) fn take_hang_up(&self) -> bool {
        self.has_hung_up() && self.hung_up.swap(false, Ordering::Relaxed)
    }

    /// Takes the letter that came first, if there is one.
    pub(crate) fn next(&self) -> Option<T> {
        if !self.is_filled() {
            return None;
        }
        let mut new_links = lock(&self.new_links);
        let new_link = new_links.pop_front();
        // With the letters locked, so that the word of one that is posted just now is not wiped out.
        self.filled.set(!new_links.is_empty() || self.has_hung_up());
        new_link
    }

    /// A peer is linked no more, or will not be.
    pub(crate) fn forget(&self, peer: Peer) {
        lock(&self.links).remove(&peer.link);
    }

    /// As [`Self::forget`], of one with which no link could be made: why, or none if it has closed its end.
    pub(crate) fn fail(&self, peer: Peer, reason: Option<String>) {
        *lock(&self.failure) = Some(LinkFailure { peer, reason });
        self.forget(peer);
    }

    /// The last peer with which no link could be made.
    pub(crate) fn failure(&self) -> Option<LinkFailure> {
        lock(&self.failure).clone()
    }

    /// Whether any peer is linked, or may be soon.
    pub(crate) fn has_peers(&self) -> bool {
        !lock(&self.links).is_empty()
    }

    /// As [`LinkSink::links`].
    pub(crate) fn links(&self) -> Vec<LinkId> {
        lock(&self.links).keys().copied().collect()
    }

    /// A peer is linked from now on; if it is a sender, this is what is held of its messages.
    pub(crate) fn link(&self, peer: Peer, holdings: Option<Holdings>) {
        let mut links = lock(&self.links);
        let link = links.entry(peer.link).or_default();
        (link.is_open, link.holdings) = (true, holdings);
    }

    /// A peer has closed its end, and may hold messages still.
    pub(crate) fn part(&self, peer: Peer) {
        if let Some(link) = lock(&self.links).get_mut(&peer.link) {
            link.is_open = false;
        }
    }

    /// As [`LinkSink::held`].
    pub(crate) fn held(&self) -> Vec<(LinkId, usize, u64)> {
        // The endpoint does not wait for the survey.
        let all: Vec<_> =
            lock(&self.links).iter().filter_map(|(&id, link)| Some((id, link.holdings.clone()?))).collect();
        let survey = |(link, holdings): (LinkId, Holdings)| {
            let (count, first) = holdings.survey();
            Some((link, count, first?))
        };
        all.into_iter().filter_map(survey).collect()
    }

    /// Says what the endpoint has done. Never waits: the next report says it.
    pub(crate) fn say(&self, report: impl FnOnce() -> Report) {
        if let Ok(mut said) = self.report.try_lock() {
            *said = report();
        }
    }

    /// As [`LinkSink::report`].
    pub(crate) fn report(&self) -> Report {
        // The endpoint may have said the rest long ago, and does not look while its thread does something else.
        let links = lock(&self.links).values().filter(|link| link.is_open && !link.has_hung_up).count();
        Report { links: links as u64, ..*lock(&self.report) }
    }

    /// Has the endpoint look for a peer that has hung up.
    pub(crate) fn doubt(&self) {
        // With the letters locked, as in `next`.
        let _letters = lock(&self.new_links);
        self.hung_up.store(true, Ordering::Relaxed);
        self.filled.set(true);
    }
}

impl<T: Send> Alarm for PendingLinks<T> {
    fn raise(&self, link: LinkId) {
        match lock(&self.links).get_mut(&link) {
            Some(link) => link.has_hung_up = true,
            None => return,
        }
        self.doubt();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was locked cannot have left it half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

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

    /// Has the descriptor become readable after this time, if it is not [`FOR_EVER`]: false if that cannot be.
    pub(crate) fn ring_after(&self, time: Duration) -> bool {
        time == FOR_EVER || self.timer.set(&self.epoll, time).is_ok()
    }

    /// It is too late for that.
    pub(crate) fn stop_timer(&self) {
        self.timer.stop();
    }

    /// Whether the descriptor is readable.
    pub(crate) fn is_readable(&self) -> bool {
        let mut polled = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        // One that cannot be polled is to be looked at.
        poll(&mut polled, PollTimeout::ZERO) != Ok(0)
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

/// Wakes an endpoint that sleeps in an event loop, at a time when something has to be tried again. Made when that first
/// happens.
#[derive(Debug, Default)]
struct Timer {
    timer: OnceLock<Withheld<TimerFd>>,
    is_set: AtomicBool,
}

impl Timer {
    fn set(&self, epoll: &Epoll, time: Duration) -> nix::Result<()> {
        let timer = match self.timer.get() {
            Some(timer) => timer,
            None => {
                let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
                epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE.to_bits()))?;
                self.timer.get_or_init(|| timer.into())
            }
        };
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

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_core::peer::Credentials;

    /// A broker that died between two introductions leaves half a link, and the next one makes a whole one.
    #[test]
    fn a_link_that_ends_leaves_another_with_the_same_peer_known() {
        let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
        let process = Credentials::new(1, 1, 1);
        let [half, whole] = [(); 2].map(|()| Peer::new(7, process).with_link(LinkId::draw().unwrap()));
        pending_links.expect(half);
        pending_links.post(whole, ());
        pending_links.forget(half);
        assert_eq!(pending_links.links(), [whole.link]);
        pending_links.forget(whole);
        assert!(!pending_links.has_peers());
    }

    impl Brought for () {
        fn is_void(&self) -> Option<Peer> {
            None
        }
    }

    #[test]
    fn senders_of_another_user_have_no_larger_pool_together_than_one_may() {
        let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
        // Users that no other test knows.
        let peer = |link, uid, same_user| {
            let process = Credentials::new(1, uid, uid);
            Peer::new(link, process).with_same_user(same_user).with_link(LinkId::from_bits(link))
        };
        let admit = |peer: &Peer, bytes| pending_links.admit(peer, 1, bytes, 100);
        let [first, second] = [1, 2].map(|link| peer(link, 4_100_000_000, false));
        assert!(admit(&first, 60) && !admit(&second, 60) && !admit(&second, u64::MAX) && admit(&second, 40));
        pending_links.forget(second);
        assert!(admit(&second, 0) && admit(&peer(3, 4_100_000_001, false), 60));
        pending_links.forget(first);
        assert!(admit(&peer(4, 4_100_000_000, false), 100));
        // The own user, and root, are not bounded.
        assert!((5..9).all(|link| admit(&peer(link, 4_100_000_000, true), 60) && admit(&peer(2 * link, 0, false), 60)));
    }

    #[test]
    fn a_report_counts_links_that_are_open_and_whose_peer_has_not_hung_up() {
        let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
        let process = Credentials::new(1, 1, 1);
        let [one, other] = [1, 2].map(|link| Peer::new(link, process).with_link(LinkId::from_bits(link)));
        pending_links.post(one, ());
        pending_links.say(|| Report { messages: 3, links: 7, ..Report::default() });
        assert_eq!((pending_links.report().links, pending_links.report().messages), (0, 3));
        pending_links.link(one, None);
        pending_links.link(other, None);
        assert_eq!((pending_links.report().links, pending_links.has_hung_up()), (2, false));
        pending_links.raise(LinkId::from_bits(3));
        assert_eq!((pending_links.report().links, pending_links.has_hung_up()), (2, false), "no link of this endpoint");
        pending_links.raise(one.link);
        assert_eq!((pending_links.report().links, pending_links.has_hung_up()), (1, true));
        pending_links.part(other);
        assert_eq!(pending_links.report().links, 0);
    }
}
