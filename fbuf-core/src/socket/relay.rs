//! Sockets of [slow](super::waiters) users: another thread makes the calls of them.
//!
//! The socket is exchanged for one end of a pair, the *near* socket. The thread of its user, which is called `fbuf-relay`, takes what comes
//! over the other end and sends it over the socket, the *far* one, and the other way round: messages with their descriptors, in
//! order, and the hang-up behind the last of them. What has no room stays where it is, so that a peer that does not read holds up the
//! near end as it would the far one, with one socket buffer more.
//!
//! Nothing is held in between: a message is looked at, sent, and only then taken off, with no more descriptors than the near end [asked
//! for](PacketSocket::look) last. Those that wait in the pair this user has sent, as far as the kernel knows, so they are
//! [counted](super::under_way) as those that it is to receive.
//!
//! The two descriptors that a relay takes are a part of the [share](super::shares) of the peer's user, which each link reserves. The
//! thread takes a quarter of a processor at most, beside a tenth of a second.

use std::{
    collections::BTreeMap,
    io, mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
    thread::sleep,
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::{
    Arrival, PacketSocket, Socket, means_gone,
    shares::Share,
    under_way::Kind,
    waiters::{Debt, used},
    wire::Letter,
};
use crate::{
    limits::{MAX_AT_ONCE, MAX_MESSAGE},
    process::{
        deferred,
        fork::{ForkMutex, Rank, Withheld},
        sys, threads,
    },
    wait::now,
};

/// How many descriptors a socket takes more if it is relayed.
pub const DESCRIPTORS: u64 = 2;
/// When something is tried again that fails for want of memory or descriptors.
const LATER: Duration = Duration::from_millis(10);
/// Of so many parts of a processor, a thread takes one,
const PART: u32 = 4;
/// beside so much.
const BURST: Duration = Duration::from_millis(100);

/// One of the two ways between a socket and the near end.
#[derive(Debug, Default)]
struct Way {
    /// How many descriptors the first message carries that waits, if it was refused for that.
    refused: usize,
    /// Whether nothing can be sent any more.
    is_closed: bool,
}

/// What has to be before a way goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Another message comes.
    Input,
    /// There is room.
    Room,
    /// Some time passes.
    Later,
    /// Nothing is carried any more.
    Never,
    /// All that came was sent, and nothing comes any more.
    Over,
}

impl Way {
    /// Carries messages, as many as are there, but not for ever. `send` is how one is sent, and `has_room` whether so many descriptors can.
    fn carry(
        &mut self,
        from: &PacketSocket,
        send: impl Fn(&Letter) -> io::Result<()>,
        has_room: impl Fn(usize) -> bool,
    ) -> Next {
        for _ in 0..MAX_AT_ONCE {
            if self.is_closed {
                return Next::Never;
            }
            if self.refused > 0 && !has_room(self.refused) {
                return Next::Later;
            }
            let letter = match from.look::<MAX_MESSAGE>() {
                Ok(Arrival::Message(bytes, descriptors)) => {
                    Letter { bytes, descriptors: descriptors.into_iter().map(Into::into).collect() }
                }
                Ok(Arrival::Nothing) => return Next::Input,
                Ok(Arrival::NoDescriptors) => return Next::Later,
                // What is too long is nothing that a peer may send.
                Ok(Arrival::HangUp | Arrival::TooLong) | Err(_) => return Next::Over,
            };
            self.refused = 0;
            match send(&letter) {
                // Not before: what is taken off passes for received.
                Ok(()) if from.take_off().is_ok() => {}
                Ok(()) => return Next::Over,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Room,
                Err(error) if means_gone(&error) || error.kind() == io::ErrorKind::InvalidInput => {
                    self.is_closed = true;
                    return Next::Never;
                }
                Err(_) => {
                    self.refused = letter.descriptors.len();
                    return Next::Later;
                }
            }
        }
        // There may be more: whether there is, poll(2) says.
        Next::Input
    }
}

/// A socket that is relayed.
#[derive(Debug)]
struct Relay {
    far: PacketSocket,
    /// The other end of the pair.
    inner: PacketSocket,
    out: Way,
    back: Way,
    next_out: Next,
    next_back: Next,
    user: u32,
    /// What it takes up of the share of its user, once no link does that for it.
    share: Option<Share>,
}

impl Relay {
    /// Carries what is there. Whether anything may be carried yet.
    fn carry(&mut self) -> bool {
        // What is under way in the pair may go on to be.
        self.next_out = self.out.carry(&self.inner, |letter| self.far.send_on(letter), |_| true);
        let has_room = |descriptors| self.inner.has_room(|| descriptors, Kind::Other);
        // Nor is more taken while what that user has passed before takes long to close.
        self.next_back = match deferred::is_overrun(self.user) {
            true => Next::Later,
            false => self.back.carry(&self.far, |letter| self.inner.send(letter), has_room),
        };
        if self.share.is_none() && self.inner.has_hung_up() {
            self.share = Some(Share::keep(self.user, DESCRIPTORS));
        }
        let is_over = self.next_out == Next::Over || self.next_back == Next::Over;
        // The peer is gone, and what it said last is not wanted any more; or the other way round.
        !is_over && (self.next_out, self.next_back) != (Next::Never, Next::Never)
    }

    /// What is waited for: which sockets, and what of them beside a hang-up. A socket of which nothing is waited for is not looked at, or
    /// its hang-up would be seen again and again; but for the first time that of the inner one.
    fn awaited(&self) -> impl Iterator<Item = (&PacketSocket, PollFlags)> {
        let flags = |incoming: Next, outgoing: Next| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, incoming == Next::Input);
            flags.set(PollFlags::POLLOUT, outgoing == Next::Room);
            flags
        };
        let far = (&self.far, flags(self.next_back, self.next_out));
        let inner = (&self.inner, flags(self.next_out, self.next_back));
        let is_awaited = move |&(socket, flags): &(&PacketSocket, PollFlags)| {
            !flags.is_empty() || (std::ptr::eq(socket, &self.inner) && self.share.is_none())
        };
        [far, inner].into_iter().filter(is_awaited)
    }

    fn is_later(&self) -> bool {
        self.next_out == Next::Later || self.next_back == Next::Later
    }
}

/// What a thread is told.
#[derive(Debug)]
struct Line {
    /// Sockets that are its from now on.
    incoming: Vec<Relay>,
    /// Wakes it.
    bell: Arc<Withheld<EventFd>>,
}

/// By user. A line is there for as long as its thread is.
#[derive(Debug)]
pub(crate) struct Lines(BTreeMap<u32, Line>);

pub(crate) static LINES: ForkMutex<Lines> =
    ForkMutex::new(Rank::Relays, Mutex::new(Lines(BTreeMap::new())), |lines| lines.forget());

impl Lines {
    /// In a child that was forked: the threads are the parent's, as what they carry. Neither allocates nor frees.
    fn forget(&mut self) {
        mem::forget(mem::take(&mut self.0));
    }
}

/// A pair of sockets that stand for one: the end that the rest of this process has, and the other one.
pub(super) struct Pair {
    pub near: Arc<Withheld<OwnedFd>>,
    inner: PacketSocket,
    share: Option<Share>,
}

impl Pair {
    /// For a socket of this user, which has this share, or one by its link.
    ///
    /// # Errors
    /// What socketpair(2) says.
    pub(super) fn new(user: u32, share: Option<Share>) -> io::Result<Self> {
        let (near, inner) = PacketSocket::pair()?;
        let mut inner = Socket::new(Arc::new(inner.into()));
        (inner.user, inner.is_bounded) = (Some(user), true);
        Ok(Self { near: Arc::new(near.into()), inner: inner.into(), share })
    }
}

/// Has the thread of this user carry what goes over a socket and one end of a pair.
///
/// # Errors
/// No thread can be started, or no descriptor is left for it. The socket hangs up then.
pub(super) fn begin(user: u32, far: PacketSocket, pair: Pair) -> io::Result<()> {
    let Pair { inner, share, .. } = pair;
    let relay = Relay {
        far,
        inner,
        out: Way::default(),
        back: Way::default(),
        next_out: Next::Input,
        next_back: Next::Input,
        user,
        share,
    };
    // Before the lock, as in a process that forks.
    let bell = Arc::new(Withheld::from(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?));
    let mut lines = LINES.lock();
    if let Some(line) = lines.0.get_mut(&user) {
        line.incoming.push(relay);
        let _ = line.bell.write(1);
        return Ok(());
    }
    lines.0.insert(user, Line { incoming: vec![relay], bell: bell.clone() });
    drop(lines);
    threads::spawn("fbuf-relay", move || run(user, &bell)).map(drop).inspect_err(|_| {
        let line = LINES.lock().0.remove(&user);
        drop(line);
    })
}

/// What the thread of a user does, until nothing is left to carry.
fn run(user: u32, bell: &Withheld<EventFd>) {
    let (mut relays, mut due): (Vec<Relay>, Vec<bool>) = Default::default();
    let mut debt = Debt::default();
    loop {
        let begin = used();
        let mut lines = LINES.lock();
        relays.extend(lines.0.get_mut(&user).map(|line| mem::take(&mut line.incoming)).unwrap_or_default());
        if relays.is_empty() {
            let line = lines.0.remove(&user);
            drop(lines);
            return drop(line);
        }
        drop(lines);
        due.resize(relays.len(), true);
        let mut due_ones = due.iter();
        relays.retain_mut(|relay| due_ones.next() == Some(&false) || relay.carry());
        if let (Some(begin), Some(end), Some(now)) = (begin, used(), now()) {
            let owed = debt.add(end.saturating_sub(begin), now, PART);
            sleep(owed.saturating_sub(BURST) * PART);
        }
        due = if relays.is_empty() { Vec::new() } else { wait(bell, &relays) };
    }
}

/// Waits until something can be carried, or somebody rings: which of them are to be looked at.
fn wait(bell: &Withheld<EventFd>, relays: &[Relay]) -> Vec<bool> {
    let is_later = relays.iter().any(Relay::is_later);
    let mut polled = vec![PollFd::new((**bell).as_fd(), PollFlags::POLLIN)];
    let mut owners = vec![None];
    for (owner, relay) in relays.iter().enumerate() {
        for (socket, flags) in relay.awaited() {
            polled.push(PollFd::new(socket.as_fd(), flags));
            owners.push(Some(owner));
        }
    }
    let patience = if is_later { PollTimeout::from(LATER.as_millis() as u16) } else { PollTimeout::NONE };
    let polled = match poll(&mut polled, patience) {
        Ok(_) => polled.iter().map(|one| one.any() != Some(false)).collect(),
        Err(error) => {
            if error != nix::errno::Errno::EINTR {
                // No memory: all are looked at, in a while.
                sleep(LATER);
            }
            vec![true; polled.len()]
        }
    };
    let _ = bell.read();
    let mut due: Vec<_> = relays.iter().map(Relay::is_later).collect();
    for owner in owners.into_iter().zip(polled).filter_map(|(owner, is_ready)| owner.filter(|_| is_ready)) {
        due[owner] = true;
    }
    due
}

/// Whether all that was sent over a near end is on its way.
pub(super) fn is_carried(near: BorrowedFd<'_>) -> bool {
    !matches!(sys::unread_bytes(near), Ok(1..))
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::{limits::MAX_DESCRIPTORS, socket::under_way::UNDER_WAY};
    use crate::{
        peer::{Credentials, LinkId, Peer},
        socket::{shares, waiters},
    };
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
    use std::{
        fs::File,
        thread,
        time::{Duration, Instant},
    };

    /// Lets calls for this user take long.
    fn slow_down(user: u32) {
        let begin = Instant::now();
        while !waiters::is_slow(user) {
            assert!(begin.elapsed() < Duration::from_secs(60), "it is never found out");
            waiters::measured(Some(user), || {
                let begin = used().unwrap();
                while used().unwrap() - begin < Duration::from_millis(10) {}
            });
        }
    }

    /// A link socket with a peer of a user that no other test knows, and the peer's end.
    fn link(user: u32) -> (PacketSocket, PacketSocket) {
        let (own, its) = PacketSocket::pair().unwrap();
        let process = Credentials { pid: 1, uid: user, gid: user };
        let peer = Peer { endpoint: 1, process, same_user: false, trusted: false, link: LinkId::default() };
        (PacketSocket::new(own).unwrap().of_link_with(&peer), PacketSocket::new(its).unwrap())
    }

    fn letter(number: u32, descriptors: usize) -> Letter {
        let null = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        Letter { bytes: number.to_le_bytes().to_vec(), descriptors: vec![null.into(); descriptors] }
    }

    fn is_relayed(socket: &PacketSocket) -> bool {
        socket.0.near.get().is_some()
    }

    /// Waits until something is so.
    fn until(mut is_so: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !is_so() {
            assert!(begin.elapsed() < Duration::from_secs(60), "it never is");
            thread::yield_now();
        }
    }

    /// The next message: its number and how many descriptors it has; none behind the last.
    fn next(socket: &PacketSocket) -> Option<(u32, usize)> {
        let mut next = None;
        until(|| match socket.receive::<64>().unwrap() {
            Arrival::Message(bytes, descriptors) => {
                next = Some((u32::from_le_bytes(bytes.try_into().unwrap()), descriptors.len()));
                true
            }
            Arrival::HangUp => true,
            Arrival::Nothing => false,
            other => panic!("{other:?}"),
        });
        next
    }

    fn ended(user: u32) {
        until(|| {
            crate::socket::close_received();
            !LINES.lock().0.contains_key(&user) && shares::taken(user) == 0
        });
    }

    #[test]
    fn messages_with_their_descriptors_are_carried_both_ways_and_the_end_comes_behind_the_last() {
        for (user, is_peer_first) in [(4_294_000_000 - 10, false), (4_294_000_000 - 9, true)] {
            let (own, its) = link(user);
            own.send(&letter(0, 1)).unwrap();
            its.send(&letter(0, 1)).unwrap();
            assert!(!is_relayed(&own));
            slow_down(user);
            for number in 1..30 {
                own.send(&letter(number, number as usize % 3)).unwrap();
                its.send(&letter(number, number as usize % 3)).unwrap();
            }
            assert!(is_relayed(&own));
            let (first, second) = if is_peer_first { (its, own) } else { (own, its) };
            let expected: Vec<_> =
                (0..30).map(|number| (number, if number == 0 { 1 } else { number as usize % 3 })).collect();
            let read: Vec<_> = (0..30).map_while(|_| next(&first)).collect();
            assert_eq!(read, expected);
            drop(first);
            assert_eq!(std::iter::from_fn(|| next(&second)).collect::<Vec<_>>(), expected);
            assert!(second.has_ended());
            drop(second);
            ended(user);
        }
    }

    #[test]
    fn a_peer_that_does_not_read_holds_up_its_near_end_and_nothing_is_lost() {
        const USER: u32 = 4_294_000_000 - 11;
        let (own, its) = link(USER);
        slow_down(USER);
        let mut sent = 0;
        let mut refused_since = Instant::now();
        while refused_since.elapsed() < Duration::from_millis(200) {
            if own.send(&letter(sent, 0)).is_ok() {
                (sent, refused_since) = (sent + 1, Instant::now());
            }
            assert!(sent < 10_000, "nothing bounds it");
        }
        assert!(own.unread() > 0);
        drop(own);
        let read = std::iter::from_fn(|| next(&its)).map(|(number, _)| number);
        assert!(read.eq(0..sent));
        drop(its);
        ended(USER);
    }

    #[test]
    fn descriptors_under_way_are_as_few_as_without_a_relay() {
        const USER: u32 = 4_294_000_000 - 12;
        slow_down(USER);
        let links: Vec<_> = (0..4).map(|_| link(USER)).collect();
        let sent = links.iter().map(|(own, _)| own.send_as(&letter(0, 3), Kind::Greeting).is_ok());
        assert_eq!(sent.collect::<Vec<_>>(), [true, true, false, false]);
        assert!(is_relayed(&links[0].0));
        until(|| is_carried(links[0].0.0.fd()) && is_carried(links[1].0.0.fd()));
        assert!(links[3].0.send_as(&letter(0, 3), Kind::Greeting).is_err(), "what is carried counts as received");
        assert_eq!([next(&links[0].1), next(&links[1].1)], [Some((0, 3)); 2]);
        until(|| links[3].0.send_as(&letter(0, 3), Kind::Greeting).is_ok());
        drop(links);
        ended(USER);
    }

    #[test]
    fn what_watches_a_socket_watches_the_near_end() {
        const USER: u32 = 4_294_000_000 - 13;
        let (own, its) = link(USER);
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        own.of_link().watch(&epoll, EpollFlags::EPOLLIN, 7).unwrap();
        let mut events = [EpollEvent::empty()];
        let mut ready = |patience: u16| epoll.wait(&mut events, EpollTimeout::from(patience)).unwrap();
        slow_down(USER);
        assert!(matches!(own.receive::<64>().unwrap(), Arrival::Nothing) && is_relayed(&own));
        assert_eq!(ready(0), 0);
        its.send(&letter(1, 0)).unwrap();
        assert_eq!(ready(60_000), 1);
        assert_eq!(next(&own), Some((1, 0)));
        assert_eq!(ready(0), 0);
        own.of_link().unwatch(&epoll).unwrap();
        its.send(&letter(2, 0)).unwrap();
        until(|| matches!(own.receive::<64>().unwrap(), Arrival::Message(..)));
        drop((own, its));
        ended(USER);
    }

    #[test]
    fn no_message_is_lost_or_overtakes_another_while_the_socket_is_exchanged() {
        const ROUNDS: u32 = 20;
        const MESSAGES: u32 = 300;
        for user in 4_290_000_000..4_290_000_000 + ROUNDS {
            let (own, its) = link(user);
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut number = 0;
                    until(|| {
                        number += u32::from(its.send(&letter(number, 0)).is_ok());
                        number == MESSAGES
                    });
                });
                scope.spawn(|| {
                    slow_down(user);
                    // As another thread that hands something back.
                    own.send_bytes(&[0; 4]).unwrap();
                });
                assert!((0..MESSAGES).all(|number| next(&own) == Some((number, 0))));
            });
            assert_eq!(next(&its), Some((0, 0)));
        }
    }

    #[test]
    fn what_was_sent_before_a_socket_is_closed_is_on_its_way_when_that_is_done() {
        const USER: u32 = 4_294_000_000 - 14;
        slow_down(USER);
        for number in 0..10 {
            let (own, its) = link(USER);
            own.send(&letter(number, 1)).unwrap();
            drop(own);
            // As it would be seen if the process ended here.
            assert!(matches!(its.receive::<64>().unwrap(), Arrival::Message(..)), "{number} was not sent");
        }
        ended(USER);
    }

    /// What a link reserves of the share of its user, it has.
    #[test]
    fn a_user_that_has_its_share_of_descriptors_loses_no_link() {
        const USER: u32 = 4_294_000_000 - 15;
        if !crate::tests::is_alone("socket::relay::tests::a_user_that_has_its_share_of_descriptors_loses_no_link") {
            return;
        }
        let (own, its) = link(USER);
        slow_down(USER);
        let shares: Vec<_> = std::iter::from_fn(|| Share::take(USER, 1)).collect();
        own.send(&letter(7, 1)).unwrap();
        assert!(is_relayed(&own) && !own.is_given_up());
        assert_eq!(next(&its), Some((7, 1)));
        // A connection has none, and is refused.
        let (one, _other) = PacketSocket::pair().unwrap();
        let refused = PacketSocket::new(one).unwrap().with_peer(USER, false).relayed_if_slow();
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        drop((own, its, shares));
        ended(USER);
    }

    #[test]
    fn a_relay_that_outlives_its_link_is_a_part_of_the_share_of_its_user() {
        const USER: u32 = 4_294_000_000 - 16;
        let (own, its) = link(USER);
        slow_down(USER);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(200) {
            let _ = own.send(&letter(0, 0));
        }
        assert_eq!(shares::taken(USER), 0);
        drop(own);
        until(|| shares::taken(USER) == DESCRIPTORS);
        while next(&its).is_some() {}
        drop(its);
        ended(USER);
    }

    /// Descriptors that a peer sends are in no table of this process but for a moment, and few are under way in its name.
    #[test]
    fn a_peer_that_sends_descriptors_without_number_takes_none_of_this_process() {
        const USER: u32 = 4_294_000_000 - 17;
        const LINKS: usize = 20;
        if !crate::tests::is_alone(
            "socket::relay::tests::a_peer_that_sends_descriptors_without_number_takes_none_of_this_process",
        ) {
            return;
        }
        slow_down(USER);
        let links: Vec<_> = (0..LINKS).map(|_| link(USER)).collect();
        // None is a message that was asked for.
        assert!(links.iter().all(|(own, _)| matches!(own.receive_few::<64>(1), Ok(Arrival::Nothing))));
        let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = count();
        for descriptors in [1, MAX_DESCRIPTORS] {
            for (_, its) in &links {
                while its.send(&letter(0, descriptors)).is_ok() {}
            }
            for _ in 0..20 {
                thread::sleep(Duration::from_millis(5));
                assert!(count() <= before + MAX_DESCRIPTORS, "{} descriptors, before {before}", count());
            }
        }
        // Those that may not come are not carried, and those that may are bounded.
        let waiting: usize = links.iter().map(|(own, _)| std::iter::from_fn(|| next_now(own)).sum::<usize>()).sum();
        assert!(waiting > 0 && !links.iter().any(|(own, _)| matches!(own.receive::<64>(), Ok(Arrival::TooLong))));
        drop(links);
        ended(USER);
    }

    /// How many descriptors the next message has, if one is here.
    fn next_now(socket: &PacketSocket) -> Option<usize> {
        match socket.receive::<64>() {
            Ok(Arrival::Message(_, descriptors)) => Some(descriptors.len()),
            _ => None,
        }
    }

    #[test]
    fn descriptors_that_wait_in_a_pair_are_bounded() {
        const USER: u32 = 4_294_000_000 - 18;
        slow_down(USER);
        let most = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap().0 / 8;
        let links: Vec<_> = (0..20).map(|_| link(USER)).collect();
        assert!(links.iter().all(|(own, _)| matches!(own.receive::<64>(), Ok(Arrival::Nothing))));
        for (_, its) in &links {
            while its.send(&letter(0, 16)).is_ok() {}
        }
        thread::sleep(Duration::from_millis(300));
        let inner: u64 = UNDER_WAY.lock().under_way(USER);
        assert!(inner > 0 && inner <= most.max(8), "{inner} of {most}");
        drop(links);
        ended(USER);
    }

    #[test]
    fn a_thread_takes_a_part_of_a_processor() {
        let mut debt = Debt::default();
        // It would take all of one.
        let (mut now, mut busy) = (0u64, Duration::ZERO);
        let call = Duration::from_millis(200);
        while now < 100_000_000_000 {
            (now, busy) = (now + call.as_nanos() as u64, busy + call);
            now += (debt.add(call, now, PART).saturating_sub(BURST) * PART).as_nanos() as u64;
        }
        assert!(busy < Duration::from_nanos(now) / PART + 2 * BURST + call, "{busy:?}");
    }
}
