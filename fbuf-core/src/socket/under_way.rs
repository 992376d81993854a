//! Descriptors that were sent to peers of other users and not received.
//!
//! The kernel counts those that all processes of a user have sent over Unix sockets, and refuses more than RLIMIT_NOFILE
//! (ETOOMANYREFS in sendmsg(2)). A peer that receives nothing takes up a part of that count for as long as it likes, and so
//! keeps all processes of this user from passing any. So a process has no more than a few under way to one other user:
//! what is beyond waits, as it does where the kernel refuses it. Whether a peer has received what it was sent, the kernel
//! says of each socket (SIOCOUTQ in unix(7)), also of one that was shut down; so what a link leaves behind is counted
//! for as long as it is not received.

use std::{
    collections::BTreeMap,
    io, mem,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit};

use crate::{
    process::{
        deferred::{Cause, DeferredDrop, Slow},
        fork::{ForkMutex, Rank, Withheld},
        sys,
    },
    socket::{shares::Share, waiters},
    wait::now,
};

/// Of so many parts of RLIMIT_NOFILE, one may be under way to one other user,
const PARTS: u64 = 8;
/// but never less than so many.
const LEAST: u64 = 8;

/// For how long no greeting is made after the kernel has refused one: to make it takes some milliseconds, if a sender may
/// have many slots.
const AFTER_REFUSAL: Duration = Duration::from_millis(100);

/// When the kernel refused a greeting last, as it has too many descriptors of this user; 0 if it never did.
static REFUSED_AT: AtomicU64 = AtomicU64::new(0);

/// The kernel has refused something. If that was no greeting, one may have room all the same, and is not to wait for as long
/// as others are refused.
pub(crate) fn note_refusal(kind: Kind) {
    if kind == Kind::Greeting {
        REFUSED_AT.store(now().unwrap_or(0), Ordering::Relaxed);
    }
}

/// Whether it would most likely refuse a greeting, whichever user it is for.
pub(crate) fn would_be_refused(kind: Kind) -> bool {
    let refused_at = REFUSED_AT.load(Ordering::Relaxed);
    let since = || now()?.checked_sub(refused_at).map(Duration::from_nanos);
    kind == Kind::Greeting && refused_at != 0 && since().is_some_and(|since| since < AFTER_REFUSAL)
}

/// What is sent, and so how much of what may be under way it may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A greeting, or its answer. A peer that has not received it is none yet, so that few are at it at a time.
    Greeting,
    /// Something for a peer that has received something before.
    Other,
}

impl Kind {
    fn most(self) -> u64 {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        match self {
            Self::Greeting => LEAST,
            Self::Other => (limit / PARTS).max(LEAST),
        }
    }
}

/// A socket over which descriptors are under way.
#[derive(Debug)]
struct Path {
    descriptors: u64,
    /// How many of them are being sent just now: they are counted before they wait in the socket.
    leaving: u64,
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    /// Of a link that is there.
    Used(Weak<Withheld<OwnedFd>>),
    /// One that is only here still to see whether the peer receives what it was sent. Nothing waits in it. It is one of the
    /// descriptors that peers of this user take up.
    Left(DeferredDrop<Left>),
}

#[derive(Debug)]
struct Left {
    user: u32,
    socket: Option<Withheld<OwnedFd>>,
    _share: Share,
}

impl Slow for Left {
    fn cause(&mut self) -> Option<Cause> {
        waiters::is_slow(self.user).then_some(Cause::Peer(Some(self.user)))
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let socket = self.socket.take();
        waiters::measured(Some(self.user), || drop(socket));
    }
}

impl Path {
    /// Whether all was received, or the peer is gone.
    fn is_over(&self) -> bool {
        if self.leaving > 0 {
            return false;
        }
        let unread = match &self.socket {
            // Held for a moment under the lock, which the thread that closes it takes before.
            Socket::Used(socket) => socket.upgrade().map(|socket| sys::unread_bytes((*socket).as_fd())),
            Socket::Left(left) => left.socket.as_ref().map(|socket| sys::unread_bytes(socket.as_fd())),
        };
        !matches!(unread, Some(Ok(1..)))
    }
}

/// By user and descriptor.
#[derive(Debug)]
pub(crate) struct UnderWay(BTreeMap<u32, BTreeMap<RawFd, Path>>);

pub(crate) static UNDER_WAY: ForkMutex<UnderWay> =
    ForkMutex::new(Rank::UnderWay, Mutex::new(UnderWay(BTreeMap::new())), |under_way| under_way.forget());

impl UnderWay {
    /// In a child that was forked, which sends nothing over its parent's sockets. Neither allocates nor frees.
    fn forget(&mut self) {
        mem::forget(mem::take(&mut self.0));
    }

    /// Whether so many more may be sent to this user. Forgets what was received: what is no longer needed of it is to be
    /// dropped without the lock.
    fn may_send(&mut self, user: u32, more: u64, kind: Kind) -> (bool, Vec<Path>) {
        let count = |paths: &BTreeMap<RawFd, Path>| paths.values().map(|path| path.descriptors).sum::<u64>();
        let Some(paths) = self.0.get_mut(&user) else { return (true, Vec::new()) };
        let most = kind.most();
        let mut over = Vec::new();
        if count(paths) + more > most {
            let received: Vec<_> = paths.iter().filter(|(_, path)| path.is_over()).map(|(&number, _)| number).collect();
            over.extend(received.iter().filter_map(|number| paths.remove(number)));
        }
        let now = count(paths);
        if paths.is_empty() {
            self.0.remove(&user);
        }
        // One alone may have more than there may be together.
        (now == 0 || now + more <= most, over)
    }

    /// How many are under way to a user.
    #[cfg(test)]
    pub(crate) fn under_way(&self, user: u32) -> u64 {
        self.0.get(&user).map_or(0, |paths| paths.values().map(|path| path.descriptors).sum())
    }

    /// What is under way over the socket of a link.
    fn path(&mut self, user: u32, socket: &Arc<Withheld<OwnedFd>>) -> &mut Path {
        let new = || Path { descriptors: 0, leaving: 0, socket: Socket::Used(Arc::downgrade(socket)) };
        self.0.entry(user).or_default().entry(socket.as_raw_fd()).or_insert_with(new)
    }

    /// So many are to be sent over the socket of a link. They do not pass for received before they [are](Self::have_left).
    fn begin(&mut self, user: u32, socket: &Arc<Withheld<OwnedFd>>, more: u64) {
        let path = self.path(user, socket);
        path.descriptors += more;
        path.leaving += more;
    }

    /// So many were leaving, and have been sent, or have not.
    fn have_left(&mut self, user: u32, socket: RawFd, more: u64, are_sent: bool) {
        let Some(paths) = self.0.get_mut(&user) else { return };
        let Some(path) = paths.get_mut(&socket) else { return };
        path.leaving -= more;
        path.descriptors -= if are_sent { 0 } else { more };
        if path.descriptors == 0 {
            // Of a link that is there: nothing is closed under the lock.
            paths.remove(&socket);
        }
        if paths.is_empty() {
            self.0.remove(&user);
        }
    }

    /// As [`close`]: what is no longer needed, to be dropped without the lock.
    fn leave(
        &mut self,
        user: u32,
        socket: &Withheld<OwnedFd>,
        is_empty: bool,
        share: Share,
    ) -> (Vec<Path>, Option<Share>) {
        let mut share = Some(share);
        if let Some(paths) = self.0.get_mut(&user)
            && let Some(path) = paths.remove(&socket.as_raw_fd())
            && is_empty
            && let Ok(1..) = sys::unread_bytes(socket.as_fd())
            && let Ok(again) = socket.as_fd().try_clone_to_owned()
            && let Some(share) = share.take()
        {
            let number = again.as_raw_fd();
            let left = Left { user, socket: Some(again.into()), _share: share };
            paths.insert(number, Path { descriptors: path.descriptors, leaving: 0, socket: Socket::Left(left.into()) });
        }
        (self.received(), share)
    }

    /// Sockets that were only kept to see this.
    fn received(&mut self) -> Vec<Path> {
        let mut over = Vec::new();
        for paths in self.0.values_mut() {
            let is_over = |path: &Path| matches!(path.socket, Socket::Left(_)) && path.is_over();
            let received: Vec<_> = paths.iter().filter(|(_, path)| is_over(path)).map(|(&number, _)| number).collect();
            over.extend(received.iter().filter_map(|number| paths.remove(number)));
        }
        self.0.retain(|_, paths| !paths.is_empty());
        over
    }
}

/// Has so many sent over a socket to a peer of this user, without waiting, and notes it.
///
/// # Errors
/// What `send` says; or too many are under way, and it was not called.
pub(crate) fn send(
    user: u32,
    socket: &Arc<Withheld<OwnedFd>>,
    more: usize,
    kind: Kind,
    send: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let more = more as u64;
    let mut under_way = UNDER_WAY.lock();
    let (may, over) = under_way.may_send(user, more, kind);
    if may {
        under_way.begin(user, socket, more);
    }
    drop(under_way);
    drop(over);
    // Without the lock: it may take long.
    if may {
        let sent = send();
        UNDER_WAY.lock().have_left(user, socket.as_raw_fd(), more, sent.is_ok());
        sent
    } else {
        Err(io::Error::new(
            io::ErrorKind::QuotaExceeded,
            format!(
                "peers of user {user} do not receive the descriptors that they were sent, of which a part of RLIMIT_NOFILE may \
             be under way: let them run, or raise `ulimit -n`"
            ),
        ))
    }
}

/// As [`send`], of what may be under way, since it was before, over the near end of a [relay](super::relay).
///
/// # Errors
/// What `send` says.
pub(crate) fn send_on(
    user: u32,
    socket: &Arc<Withheld<OwnedFd>>,
    more: usize,
    send: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let more = more as u64;
    UNDER_WAY.lock().begin(user, socket, more);
    let sent = send();
    UNDER_WAY.lock().have_left(user, socket.as_raw_fd(), more, sent.is_ok());
    sent
}

/// Whether so many more could be sent.
pub(crate) fn has_room(user: u32, more: usize, kind: Kind) -> bool {
    let mut under_way = UNDER_WAY.lock();
    let (may, over) = under_way.may_send(user, more as u64, kind);
    drop(under_way);
    drop(over);
    may
}

/// Closes what was kept and need not be any more.
pub(crate) fn tidy() {
    let over = UNDER_WAY.lock().received();
    drop(over);
}

/// Before a socket is closed, which is shut down. If it is empty, and something is under way over it, it is kept open until
/// that is received. Those that were kept before, and need not be any more, are closed.
pub(crate) fn close(user: u32, socket: &Withheld<OwnedFd>, is_empty: bool) {
    // Before the lock, as in a process that forks.
    let share = Share::keep(user, 1);
    let mut under_way = UNDER_WAY.lock();
    let over = under_way.leave(user, socket, is_empty, share);
    drop(under_way);
    drop(over);
}

/// Whether anything is noted of this user.
#[cfg(test)]
pub(crate) fn is_noted(user: u32) -> bool {
    UNDER_WAY.lock().0.contains_key(&user)
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::{
        peer::{Credentials, LinkId, Peer},
        socket::{Arrival, PacketSocket, shares, wire::Letter},
    };
    use std::{
        fs::File,
        thread,
        time::{Duration, Instant},
    };

    /// A link socket with a peer of a user that no other test knows, and the peer's end.
    fn link(user: u32) -> (PacketSocket, PacketSocket) {
        let (own, other) = PacketSocket::pair().unwrap();
        let process = Credentials { pid: 1, uid: user, gid: user };
        let peer = Peer { endpoint: 1, process, same_user: false, trusted: false, link: LinkId::default() };
        (PacketSocket::new(own).unwrap().of_link_with(&peer), PacketSocket::new(other).unwrap())
    }

    fn send(socket: &PacketSocket, descriptors: usize, kind: Kind) -> bool {
        let null = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        let letter = Letter { bytes: vec![1], descriptors: vec![null.into(); descriptors] };
        match socket.send_as(&letter, kind) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded, "{error}");
                assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
                false
            }
        }
    }

    fn receive(socket: &PacketSocket) {
        assert!(matches!(socket.receive::<64>().unwrap(), Arrival::Message(..)));
    }

    /// To send may take long, where very many wait at the other end.
    #[test]
    fn nothing_is_locked_while_something_is_sent_and_what_is_leaving_counts() {
        let user = 4_000_000_031;
        let (own, _its) = link(user);
        let mut has_room = None;
        let sends = || {
            has_room = Some([user, user + 1].map(|user| super::has_room(user, LEAST as usize, Kind::Greeting)));
            Ok(())
        };
        super::send(user, &own.0.descriptor, 1, Kind::Greeting, sends).unwrap();
        assert_eq!(has_room, Some([false, true]));
        // Nothing waits there.
        assert!(super::has_room(user, LEAST as usize, Kind::Greeting) && !is_noted(user));
        let fails = || Err(io::ErrorKind::BrokenPipe.into());
        assert!(super::send(user, &own.0.descriptor, 1, Kind::Greeting, fails).is_err() && !is_noted(user));
    }

    /// A peer's end is closed by another thread, if descriptors wait there.
    fn until_it_has_room(socket: &PacketSocket) {
        let start = Instant::now();
        while !socket.has_room(|| LEAST as usize, Kind::Greeting) {
            assert!(start.elapsed() < Duration::from_secs(10), "what was sent to a peer that has gone counts for ever");
            thread::yield_now();
        }
    }

    /// One-shots that are refused again and again would keep a process from all links.
    #[test]
    fn greetings_are_delayed_by_no_refusal_of_anything_else() {
        note_refusal(Kind::Other);
        assert!(!would_be_refused(Kind::Greeting));
    }

    #[test]
    fn few_greetings_are_under_way_to_a_user_until_they_are_received() {
        const USER: u32 = 4_200_000_000;
        let links: Vec<_> = (0..5).map(|_| link(USER)).collect();
        let sent: Vec<_> = links.iter().map(|(own, _)| send(own, 2, Kind::Greeting)).collect();
        assert_eq!(sent, [true, true, true, true, false]);
        // Others are not concerned, nor what carries none; and what is not a greeting may be more.
        assert!(send(&link(USER + 1).0, 2, Kind::Greeting) && send(&links[4].0, 0, Kind::Greeting));
        assert!(send(&links[0].0, 1, Kind::Other) && !links[4].0.has_room(|| 1, Kind::Greeting));
        receive(&links[1].1);
        assert!(links[4].0.has_room(|| 1, Kind::Greeting) && !send(&links[4].0, 2, Kind::Greeting));
        receive(&links[2].1);
        assert!(send(&links[4].0, 2, Kind::Greeting));
    }

    #[test]
    fn what_a_link_leaves_behind_counts_until_it_is_received_or_its_peer_has_gone() {
        const USER: u32 = 4_200_000_002;
        let (gone, left) = link(USER);
        assert!(send(&gone, LEAST as usize, Kind::Greeting));
        drop(gone);
        let (own, other) = link(USER);
        assert!(!send(&own, 1, Kind::Greeting));
        assert!(left.has_hung_up(), "the peer does not see that the link is over");
        receive(&left);
        assert!(send(&own, 1, Kind::Greeting));
        drop((own, other));
        let (own, other) = link(USER);
        until_it_has_room(&own);
        assert!(send(&own, LEAST as usize, Kind::Greeting) && !send(&own, 1, Kind::Greeting));
        drop(other);
        until_it_has_room(&own);
    }

    #[test]
    fn what_a_link_leaves_behind_is_taken_up_by_its_user() {
        const USER: u32 = 4_200_000_006;
        let (own, other) = link(USER);
        assert!(send(&own, 1, Kind::Greeting));
        assert_eq!(shares::taken(USER), 0);
        drop(own);
        assert_eq!(shares::taken(USER), 1);
        receive(&other);
        assert!(Share::take(USER, u64::from(u32::MAX)).is_none());
        assert_eq!(shares::taken(USER), 0, "what was received is not looked for");
    }

    /// A peer that has not received its greeting keeps the socket, but nothing that it has passed.
    #[test]
    fn what_the_peer_of_a_link_that_was_left_has_passed_is_closed() {
        const USER: u32 = 4_200_000_004;
        let (own, other) = link(USER);
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let letter = Letter { bytes: vec![1], descriptors: vec![Arc::new(writer).into()] };
        assert!(send(&own, 1, Kind::Greeting));
        other.send(&letter).unwrap();
        drop((letter, own));
        let patience = nix::poll::PollTimeout::from(10_000u16);
        let mut end = [nix::poll::PollFd::new(reader.as_fd(), nix::poll::PollFlags::empty())];
        assert_eq!(nix::poll::poll(&mut end, patience), Ok(1), "a descriptor stays open");
        receive(&other);
    }

    #[test]
    fn threads_that_send_at_once_have_no_more_under_way_together() {
        const USER: u32 = 4_200_001_000;
        const THREADS: u32 = 4;
        for round in 0..100 {
            let user = USER + round;
            let links: Vec<_> = (0..THREADS).map(|_| link(user)).collect();
            let together = std::sync::Barrier::new(links.len());
            let sent = thread::scope(|scope| {
                let threads: Vec<_> = links
                    .iter()
                    .map(|(own, _)| {
                        let together = &together;
                        scope.spawn(move || {
                            together.wait();
                            send(own, LEAST as usize, Kind::Greeting)
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).filter(|&sent| sent).count()
            });
            assert_eq!(sent, 1, "in round {round}");
        }
    }

    #[test]
    fn what_a_link_leaves_behind_is_closed_when_its_peer_has_gone_also_where_no_other_link_ends() {
        const USER: u32 = 4_200_000_006;
        let (own, other) = link(USER);
        assert!(send(&own, 1, Kind::Greeting));
        drop(own);
        crate::socket::close_received();
        assert!(is_noted(USER), "it is not kept until its peer receives what it was sent");
        drop(other);
        let start = Instant::now();
        while is_noted(USER) {
            assert!(start.elapsed() < Duration::from_secs(10), "a socket is kept for nothing");
            crate::socket::close_received();
            thread::yield_now();
        }
    }

    #[test]
    fn one_message_may_have_more_than_there_may_be_together() {
        const USER: u32 = 4_200_000_003;
        let (own, _other) = link(USER);
        assert!(send(&own, 3 * LEAST as usize, Kind::Greeting) && !send(&own, 1, Kind::Greeting));
    }
}
