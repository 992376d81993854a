//! What a sender and a receiver have in common: a queue that the control thread fills with introductions, and what is known of
//! their links.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
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
    socket::shares::{self, MOST_LINKS, Share},
};
use fbuf_protocol::Report;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::{hangup::Alarm, link_failure::LinkFailure};

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
    /// What users take up with links that this side has ended while their peers may read on. Locked after `links`.
    parted: Mutex<BTreeMap<LinkId, Taken>>,
    /// The last peer with which no link could be made: of the own user or root, if there was any.
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
            let (mut links, parted) = (lock(&self.links), lock(&self.parted));
            let all = links.values().filter_map(|link| link.share.as_ref()).chain(parted.values());
            let of_user = all.filter(|taken| taken.user == user);
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
        let (new_links, links, parted, report) =
            (Mutex::default(), Mutex::default(), Mutex::default(), Mutex::default());
        let (filled, failure, swept) = (Notice::new()?, Mutex::default(), Mutex::default());
        let [hung_up, is_closed] = [false; 2].map(AtomicBool::new);
        Ok(Self {
            filled,
            hung_up,
            is_closed,
            new_links,
            links,
            parted,
            failure,
            swept,
            report,
            wake: Arc::new(wake).into(),
        })
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

    /// As [`Self::forget`], of a peer that may read on what it was sent: what its user takes up with it stays counted, until
    /// this is [released](Self::release_shares).
    pub(crate) fn keep_share(&self, peer: Peer) {
        let mut links = lock(&self.links);
        if let Some(taken) = links.remove(&peer.link).and_then(|link| link.share) {
            lock(&self.parted).insert(peer.link, taken);
        }
    }

    /// Counts no more what users take up with these links, of which nothing is left.
    pub(crate) fn release_shares(&self, links: Vec<LinkId>) {
        if !links.is_empty() {
            lock(&self.parted).retain(|link, _| !links.contains(link));
        }
    }

    /// As [`Self::forget`], of one with which no link could be made: why, or none if it has closed its end.
    pub(crate) fn fail(&self, peer: Peer, reason: Option<String>) {
        {
            let mut failure = lock(&self.failure);
            let is_of_other = |peer| shares::bounded(peer).is_some();
            // A peer of another user can fail as often as it likes, and does not hide what the own user can mend.
            if !is_of_other(&peer) || failure.as_ref().is_none_or(|last| is_of_other(&last.peer)) {
                *failure = Some(LinkFailure { peer, reason });
            }
        }
        self.forget(peer);
    }

    /// The last peer with which no link could be made: of the own user or root, if there was any.
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

#[cfg(test)]
mod tests;
