//! Relays between real sockets.

use super::*;
use crate::{limits::MAX_DESCRIPTORS, socket::under_way::UNDER_WAY};
use crate::{
    peer::{Credentials, LinkId, Peer},
    socket::{shares, waiters},
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::{
    fs::File,
    sync::atomic::{AtomicU32, Ordering},
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

/// How many descriptors this process has of each kind of file.
fn open_files() -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for file in std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.unwrap().path().read_link().ok()) {
        let name = file.to_string_lossy();
        *kinds.entry(name.split(':').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    kinds
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
    let sent = links.iter().map(|(own, _)| {
        let is_sent = own.send_as(&letter(0, 3), Kind::Greeting).is_ok();
        // For a moment before, it is in both sockets.
        until(|| is_carried(own.0.fd()));
        is_sent
    });
    assert_eq!(sent.collect::<Vec<_>>(), [true, true, false, false]);
    assert!(is_relayed(&links[0].0));
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
    const ROUNDS: u32 = 30;
    for user in 4_290_000_000..4_290_000_000 + ROUNDS {
        let (own, its) = link(user);
        // How many are sent, once that is known.
        let total = AtomicU32::new(u32::MAX);
        thread::scope(|scope| {
            // One message after the other, until some were sent since.
            scope.spawn(|| {
                let (mut number, mut since) = (0, 0);
                until(|| {
                    let is_sent = u32::from(its.send(&letter(number, 0)).is_ok());
                    (number, since) = (number + is_sent, if is_relayed(&own) { since + is_sent } else { 0 });
                    since == 50
                });
                total.store(number, Ordering::Relaxed);
            });
            // As others that hand something back: it is one of them that exchanges it, most likely.
            for _ in 0..2 {
                scope.spawn(|| {
                    until(|| own.send_bytes(&[0; 4]).is_err_and(|error| means_gone(&error)) || is_relayed(&own))
                });
            }
            scope.spawn(|| slow_down(user));
            let mut number = 0;
            while number < total.load(Ordering::Relaxed) {
                match own.receive::<64>().unwrap() {
                    Arrival::Message(bytes, _) => {
                        assert_eq!(bytes, number.to_le_bytes(), "in round {}", user - 4_290_000_000);
                        number += 1;
                    }
                    Arrival::Nothing => {}
                    other => panic!("{other:?}"),
                }
            }
        });
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
    until(|| shares::taken(USER) == shares::OF_RELAY);
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
    // One that may come, or more than any may have.
    let (few, many) = links.split_at(LINKS / 2);
    // Together no more than may be under way to this process, which does not read meanwhile.
    few.iter().for_each(|(_, its)| assert!((0..5).all(|_| its.send(&letter(0, 1)).is_ok())));
    many.iter().for_each(|(_, its)| while its.send(&letter(0, MAX_DESCRIPTORS)).is_ok() {});
    until(|| {
        // Beside sockets that are being closed, or kept until the peer has received what it was sent.
        let now = count();
        assert!(now <= before + MAX_DESCRIPTORS + 4 * LINKS, "{now} descriptors, before {before}: {:?}", open_files());
        many.iter().all(|(own, _)| own.has_hung_up()) && few.iter().all(|(own, _)| !own.is_drained())
    });
    assert!(few.iter().all(|(own, _)| next(own) == Some((0, 1))));
    assert!(many.iter().all(|(own, _)| next(own).is_none()), "what may not come was carried");
    drop(links);
    ended(USER);
}

#[test]
fn descriptors_that_wait_in_a_pair_are_bounded() {
    const USER: u32 = 4_294_000_000 - 18;
    const DESCRIPTORS: usize = 16;
    slow_down(USER);
    let most = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap().0 / 8;
    let links: Vec<_> = (0..20).map(|_| link(USER)).collect();
    assert!(links.iter().all(|(own, _)| matches!(own.receive::<64>(), Ok(Arrival::Nothing))));
    for (_, its) in &links {
        while its.send(&letter(0, DESCRIPTORS)).is_ok() {}
    }
    // Until no message more has room.
    until(|| {
        let under_way = UNDER_WAY.lock().under_way(USER);
        assert!(under_way <= most.max(DESCRIPTORS as u64), "{under_way} of {most}");
        under_way + DESCRIPTORS as u64 > most
    });
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

/// A message is taken off only once it is sent on, also where none can carry descriptors.
#[test]
fn a_connection_to_which_no_descriptors_can_be_sent_is_relayed() {
    const USER: u32 = 4_294_000_000 - 19;
    slow_down(USER);
    let (one, its) = PacketSocket::pair().unwrap();
    let its = PacketSocket::new(its).unwrap();
    let mut own = PacketSocket::accepted(one).with_peer(USER, false);
    // As of a listener that refuses them.
    own.0.is_vetted = true;
    let own = own.relayed_if_slow().unwrap();
    for number in 0..10 {
        its.send(&letter(number, 0)).unwrap();
        own.send(&letter(number, 0)).unwrap();
    }
    assert!((0..10).all(|number| next(&own) == Some((number, 0)) && next(&its) == Some((number, 0))));
    drop((own, its));
    ended(USER);
}
