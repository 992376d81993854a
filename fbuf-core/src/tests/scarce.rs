//! Honest peers on a machine that grants little: a send buffer that holds a few messages, while the other side does not
//! read. Whatever does not fit waits, and nothing is lost.

#[cfg(not(miri))]
mod unread;
#[cfg(not(miri))]
mod unsent;

use std::{
    cell::RefCell,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::{
    eventfd::EventFd,
    socket::{setsockopt, sockopt},
};

use crate::{
    limits::{MAX_DESCRIPTORS, MAX_LEASED, MAX_ONE_SHOTS},
    peer::{Credentials, Peer},
    protection::Mechanism,
    receive::link::{Answered, Greeted, Inbound, SlotSource},
    ring::{
        board::BoardTable,
        entry::{LaneFormat, capacity_for},
        lane::LaneTable,
    },
    send::{
        link::{Arrived, Expected, NoRoom},
        pool::{Extras, Format, Pool, Published, Unsent},
    },
    slot::Geometry,
    socket::{
        Arrival, PacketSocket,
        link_message::{self, Hello, LinkMessage},
        under_way::Kind,
        wire::Letter,
    },
};

fn peer() -> Peer {
    Peer {
        endpoint: 1,
        link: crate::peer::LinkId::default(),
        process: Credentials { pid: 1, uid: 1, gid: 1 },
        same_user: true,
        trusted: true,
    }
}

/// As net.core.wmem_max=4608 grants it.
fn narrow(socket: &impl AsFd) {
    setsockopt(&socket.as_fd(), sockopt::SndBuf, &0).unwrap();
}

fn wake() -> Arc<EventFd> {
    Arc::new(EventFd::new().unwrap())
}

/// Links a pool over two sockets, of which `before` sees both ends before there is a link.
fn link(pool: &mut Pool, mechanism: Mechanism, slot_source: SlotSource, before: impl Fn(&PacketSocket)) -> Inbound {
    link_with(peer(), pool, mechanism, slot_source, before)
}

/// The same, with a peer that each of the two takes the other for.
fn link_with(
    peer: Peer,
    pool: &mut Pool,
    mechanism: Mechanism,
    slot_source: SlotSource,
    before: impl Fn(&PacketSocket),
) -> Inbound {
    let (to_sender, to_receiver) = PacketSocket::pair().unwrap();
    let socket = |end: OwnedFd| PacketSocket::new(end).unwrap().of_link_with(&peer);
    let (to_sender, to_receiver) = (socket(to_sender), socket(to_receiver));
    before(&to_sender);
    before(&to_receiver);
    let greeted = Greeted::new(peer, to_receiver, pool.geometry(), mechanism, slot_source, None).unwrap();
    let Ok(Arrived::Here) = pool.link(Expected::new(peer, to_sender)) else { panic!("no hello") };
    let Ok(Answered::Open(inbound)) = greeted.look() else { panic!("no welcome") };
    *inbound
}

fn one_shots() -> Pool {
    Pool::of_one_shots(Geometry::new(8, MAX_ONE_SHOTS.into()).unwrap(), MAX_ONE_SHOTS, wake()).unwrap()
}

fn lossy_one_shots() -> Pool {
    let geometry = Geometry::new(8, MAX_ONE_SHOTS.into()).unwrap();
    let format = Format { geometry, extras: Extras { lossy: true, ..Extras::default() } };
    Pool::of_one_shots(format, MAX_ONE_SHOTS, wake()).unwrap()
}

fn collect(pool: &mut Pool) -> bool {
    pool.collect(1) || pool.search() && pool.collect(1)
}

fn shoot(pool: &mut Pool, content: u64) -> Result<Published, Unsent> {
    let mut fbuf = pool.allocate().unwrap();
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&content.to_ne_bytes());
    pool.send(fbuf)
}

fn read(inbound: &mut Inbound) -> Option<u64> {
    let received = inbound.take();
    assert!(matches!(inbound.end(), Ok(None)), "the link is over");
    received.map(|received| u64::from_ne_bytes(received[..].try_into().unwrap()))
}

#[test]
fn one_shots_wait_in_their_pool_while_a_narrow_socket_is_full() {
    let mut pool = one_shots();
    let mut inbound = link(&mut pool, Mechanism::OneShot, SlotSource::Segments, narrow);
    let (mut rounds, mut sequence) = (0, 0);
    while sequence < 1000 {
        let first = sequence;
        while collect(&mut pool) {
            assert_eq!(shoot(&mut pool, sequence).unwrap().sequence, sequence);
            sequence += 1;
        }
        assert!(sequence > first, "none has room, though all were read");
        assert!(
            pool.lacks_room().is_some_and(|why| matches!(why, NoRoom::Buffer(..10_000))),
            "it is the slots that are used up"
        );
        for number in first..sequence {
            assert_eq!(read(&mut inbound), Some(number));
        }
        assert_eq!(read(&mut inbound), None);
        rounds += 1;
    }
    assert!(rounds > 50, "the socket is not narrow");
}

#[test]
fn over_a_socket_of_full_size_as_many_one_shots_are_under_way_as_there_may_be() {
    let mut pool = one_shots();
    let mut inbound = link(&mut pool, Mechanism::OneShot, SlotSource::Segments, |_| {});
    for number in 0..MAX_ONE_SHOTS.into() {
        assert!(collect(&mut pool));
        shoot(&mut pool, number).unwrap();
    }
    assert!(!collect(&mut pool) && pool.lacks_room().is_none());
    (0..MAX_ONE_SHOTS.into()).for_each(|number| assert_eq!(read(&mut inbound), Some(number)));
}

/// A sender with two receivers, the socket to the second of which is narrow: behind the back of the sender, which therefore does
/// not wait.
fn one_of_two_narrow() -> (Pool, Inbound, Inbound) {
    let mut pool = one_shots();
    let one = link(&mut pool, Mechanism::OneShot, SlotSource::Segments, |_| {});
    let ends = RefCell::new(Vec::new());
    let keep = |end: &PacketSocket| ends.borrow_mut().push(end.as_fd().try_clone_to_owned().unwrap());
    let other = link(&mut pool, Mechanism::OneShot, SlotSource::Segments, keep);
    narrow(&ends.take().swap_remove(0));
    (pool, one, other)
}

/// However often: the limit may be there for long, and no receiver is to blame.
#[test]
fn no_link_ends_while_a_limit_keeps_one_shots_from_one_of_two_receivers() {
    let (mut pool, mut one, mut other) = one_of_two_narrow();
    let mut refusals = |reads: bool, times: usize, one: &mut Inbound| {
        let mut reasons = Vec::new();
        while reasons.len() < times {
            assert!(collect(&mut pool));
            match shoot(&mut pool, 7) {
                Ok(_) => reasons.clear(),
                Err(Unsent::NotPassed { reason, .. }) => reasons.push(reason),
                Err(unsent) => panic!("{unsent:?}"),
            }
            if reads {
                one.attend();
                while read(one).is_some() {}
            }
            assert_eq!(pool.receivers(), 2);
        }
        reasons.pop().unwrap()
    };
    assert!(refusals(true, 300, &mut one).contains("net.core.wmem_max"));
    // One that does not look at what the other was not sent is waited for.
    assert!(refusals(false, 300, &mut one).contains("look at"));
    one.attend();
    other.attend();
    while read(&mut one).is_some() || read(&mut other).is_some() {}
    assert!(collect(&mut pool));
    assert!(shoot(&mut pool, 8).is_ok_and(|published| published.receivers == 2));
    assert_eq!([read(&mut one), read(&mut other)], [Some(8), Some(8)]);
}

#[test]
fn a_one_shot_that_one_receiver_cannot_be_passed_comes_back_and_none_gets_it() {
    let (mut pool, mut one, mut other) = one_of_two_narrow();
    let (mut sent, mut refused) = (Vec::new(), 0);
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for content in 0..100 {
        assert!(collect(&mut pool));
        match shoot(&mut pool, content) {
            Ok(published) => {
                assert_eq!((published.sequence, published.receivers), (sent.len() as u64, 2));
                sent.push(content);
            }
            Err(Unsent::NotPassed { fbuf, reason }) => {
                assert!(reason.contains("net.core.wmem_max"), "{reason}");
                assert_eq!(fbuf[..], content.to_ne_bytes(), "what comes back is not what was written");
                refused += 1;
                // The next has other content and the same number.
                if refused % 3 == 0 {
                    second.extend(std::iter::from_fn(|| read(&mut other)));
                }
                if refused % 5 == 0 {
                    first.extend(std::iter::from_fn(|| read(&mut one)));
                }
            }
            Err(unsent) => panic!("{unsent:?}"),
        }
    }
    first.extend(std::iter::from_fn(|| read(&mut one)));
    second.extend(std::iter::from_fn(|| read(&mut other)));
    assert!(refused > 10 && sent.len() > 10, "{refused} were refused, {} were not", sent.len());
    assert_eq!((&first, &second), (&sent, &sent));
    assert_eq!(pool.receivers(), 2);
}

/// Whether it knows before it seals a message that there is no room, or hears it when it passes it.
#[test]
fn a_lossy_pool_leaves_one_shots_out_for_a_receiver_for_which_there_is_no_room() {
    for is_known in [true, false] {
        let mut pool = lossy_one_shots();
        let mut one = link(&mut pool, Mechanism::OneShot, SlotSource::Segments, |_| {});
        let ends = RefCell::new(Vec::new());
        let keep = |end: &PacketSocket| ends.borrow_mut().push(end.as_fd().try_clone_to_owned().unwrap());
        let before = |end: &PacketSocket| if is_known { narrow(end) } else { keep(end) };
        let mut other = link(&mut pool, Mechanism::OneShot, SlotSource::Segments, before);
        ends.take().iter().take(1).for_each(narrow);
        let mut fewer = 0;
        for content in 0..300 {
            assert!(collect(&mut pool) && pool.lacks_room().is_none());
            fewer += u64::from(shoot(&mut pool, content).unwrap().receivers == 1);
            assert_eq!(read(&mut one), Some(content));
        }
        assert!((200..300).contains(&fewer), "{fewer} were left out");
        (0..300 - fewer).for_each(|content| assert_eq!(read(&mut other), Some(content)));
        assert_eq!(read(&mut other), None);
        assert!(collect(&mut pool));
        assert_eq!(shoot(&mut pool, 300).unwrap().receivers, 2);
        assert_eq!((read(&mut other), other.missed(), one.missed()), (Some(300), fewer, 0));
    }
}

/// Its memory is used for the next message: what was written is still there.
#[test]
fn a_one_shot_that_is_left_out_for_all_is_not_sealed() {
    let mut pool = lossy_one_shots();
    let _inbound = link(&mut pool, Mechanism::OneShot, SlotSource::Segments, narrow);
    let mut left_out = 0;
    while left_out < 10 {
        assert!(collect(&mut pool));
        let mut fbuf = pool.allocate().unwrap();
        fbuf.set_len(8).unwrap();
        // Two take turns.
        assert!(left_out < 2 || fbuf[..] == [7; 8], "fresh memory, after {left_out}");
        fbuf.fill(7);
        left_out += u32::from(pool.send(fbuf).unwrap().receivers == 0);
    }
}

#[test]
fn growth_waits_while_a_narrow_socket_is_full() {
    let mut pool = Pool::new(Geometry::new(8, 1 << 20).unwrap(), 1, wake()).unwrap();
    let mut inbound = link(&mut pool, Mechanism::Shared, SlotSource::Segments, narrow);
    let mut waited = 0;
    while pool.can_grow() {
        pool.grow().unwrap();
        while !pool.announce_to(0).unwrap() {
            waited += 1;
            inbound.attend();
        }
        pool.use_segment();
    }
    assert!(waited > 0, "the socket is not narrow");
    assert!(!inbound.is_broken() && pool.receivers() == 1);
}

#[test]
fn rights_to_write_wait_while_a_narrow_socket_is_full() {
    let geometry = Geometry::new(8, MAX_LEASED.into()).unwrap();
    let mut pool = Pool::of_receiver(geometry, wake()).unwrap();
    let inbound = link(&mut pool, Mechanism::Copy, SlotSource::FromReceiver, narrow);
    let (mut given, mut rounds) = (Vec::new(), 0);
    while given.len() < MAX_LEASED as usize {
        assert!(rounds < 1000, "{} of {MAX_LEASED} slots are given", given.len());
        pool.attend(0).unwrap();
        while collect(&mut pool) {
            given.push(pool.allocate().unwrap());
        }
        rounds += 1;
        let _ = inbound.settle();
    }
    assert!(rounds > 2, "the socket is not narrow");
    assert!(inbound.settle());
}

/// What one user does not receive leaves room for fewer descriptors than there are links, and for as many as that user has.
#[test]
fn one_shots_wait_for_room_for_the_links_of_a_user_and_not_for_all() {
    // Users that no other test knows.
    let [one, other] = [4_200_000_014, 4_200_000_015].map(|uid| {
        let process = Credentials { uid, ..peer().process };
        Peer { process, same_user: false, trusted: false, ..peer() }
    });
    let mut pool = one_shots();
    let mut inbound =
        [one, other, other].map(|peer| link_with(peer, &mut pool, Mechanism::OneShot, SlotSource::Segments, |_| {}));
    let null = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    let mut unread = Vec::new();
    for descriptors in [MAX_DESCRIPTORS, 1] {
        loop {
            let (own, theirs) = PacketSocket::pair().unwrap();
            let own = PacketSocket::new(own).unwrap().of_link_with(&one);
            if !own.has_room(|| descriptors + 2, Kind::Other) {
                break;
            }
            own.send(&Letter { bytes: vec![0], descriptors: vec![null.clone().into(); descriptors] }).unwrap();
            unread.push((own, theirs));
        }
    }
    assert!(collect(&mut pool) && pool.lacks_room().is_none(), "one descriptor has no room, where two have");
    assert_eq!(shoot(&mut pool, 7).unwrap().receivers, 3);
    inbound[1..].iter_mut().for_each(|inbound| assert_eq!(read(inbound), Some(7)));
    // The control: the next has no room.
    let (own, _theirs) = PacketSocket::pair().unwrap();
    let own = PacketSocket::new(own).unwrap().of_link_with(&one);
    own.send(&Letter { bytes: vec![0], descriptors: vec![null.into()] }).unwrap();
    assert!(!collect(&mut pool) && pool.lacks_room() == Some(NoRoom::UnderWay));
    assert_eq!(pool.without_room(), [one]);
}

/// Each message that is handed back tries it.
#[test]
fn rights_to_write_that_wait_are_tried_one_at_a_time() {
    // Of eight, some fit.
    let times = [8, MAX_LEASED.into()].map(|slots| {
        let mut pool = Pool::of_receiver(Geometry::new(8, slots).unwrap(), wake()).unwrap();
        let ends = RefCell::new(Vec::new());
        let fill = |end: &PacketSocket| {
            narrow(end);
            ends.borrow_mut().push(end.as_fd().try_clone_to_owned().unwrap());
        };
        let inbound = link(&mut pool, Mechanism::Copy, SlotSource::FromReceiver, fill);
        let to_sender = PacketSocket::new(ends.take().swap_remove(1)).unwrap();
        while to_sender.send_bytes(&[0]).is_ok() {}
        let settle = |_| {
            let start = Instant::now();
            assert!(!inbound.settle(), "the socket is not full");
            start.elapsed()
        };
        (0..100).map(settle).min().unwrap()
    });
    assert!(times[1] < 4 * times[0], "of 8 and {MAX_LEASED} rights, those that wait are tried for {times:?}");
}

/// A look at a word that has no memory may end the process.
#[test]
fn words_on_the_board_of_a_receiver_that_is_answered_late_exist_for_all_slots_that_there_are_then() {
    let mut pool = Pool::new(Geometry::new(8, 1 << 20).unwrap(), 1, wake()).unwrap();
    let process = Credentials { uid: 4_200_000_018, ..peer().process };
    let peer = Peer { process, same_user: false, trusted: false, ..peer() };
    let ends = || {
        let (own, other) = PacketSocket::pair().unwrap();
        (PacketSocket::new(own).unwrap().of_link_with(&peer), PacketSocket::new(other).unwrap())
    };
    let (filler, unread) = ends();
    let null = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    filler.send(&Letter { bytes: vec![0], descriptors: vec![null.into(); 9] }).unwrap();
    let (_table, board) = BoardTable::create_growing("fbuf-board", pool.geometry().max_slots() as usize).unwrap();
    let memory = board.try_clone().unwrap();
    let (to_receiver, to_sender) = ends();
    let hello = Hello { board: board.into(), skip_above: None, fences: false, wants_slots: false };
    link_message::send(&to_sender, &LinkMessage::Hello(hello)).unwrap();
    let Ok(Arrived::NotYet(late)) = pool.link(Expected::new(peer, to_receiver)) else { panic!("it is answered") };
    assert!(late.is_unanswered());
    while pool.slots() < 1 << 12 {
        pool.grow().unwrap();
        pool.use_segment();
    }
    let bytes = || nix::sys::stat::fstat(&memory).unwrap().st_blocks * 512;
    assert!(bytes() < 8 << 12);
    assert!(matches!(unread.receive::<64>(), Ok(Arrival::Message(..))));
    assert!(matches!(pool.link(late), Ok(Arrived::Here)));
    assert!(bytes() >= 8 << 12, "only {} bytes exist", bytes());
}

/// The same holds for a receiver that comes and goes, again and again.
#[test]
fn receivers_of_one_other_user_that_come_and_go_take_a_part_of_the_time() {
    let mut pool = Pool::new(Geometry::new(8, 1 << 20).unwrap(), 1, wake()).unwrap();
    // Of a user that no other test knows.
    let process = Credentials { uid: 4_200_000_011, ..peer().process };
    let peer = Peer { process, same_user: false, trusted: false, ..peer() };
    let (begin, mut spent, mut links) = (Instant::now(), Duration::ZERO, 0);
    while begin.elapsed() < Duration::from_secs(4) {
        let (own, other) = PacketSocket::pair().unwrap();
        let socket = PacketSocket::new(other).unwrap();
        let greeted = Greeted::new(peer, socket, pool.geometry(), Mechanism::Copy, SlotSource::Segments, None).unwrap();
        let mut expected = Expected::new(peer, PacketSocket::new(own).unwrap().of_link_with(&peer));
        loop {
            let start = Instant::now();
            let linked = pool.link(expected);
            spent += start.elapsed();
            match linked {
                Ok(Arrived::NotYet(late)) => expected = late,
                Ok(Arrived::Here) => break,
                Err(end) => panic!("{end:?}"),
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        links += 1;
        drop(greeted.look());
        pool.end(pool.links().len() - 1);
    }
    let all = begin.elapsed();
    assert!(links > 1 && spent < all / 4 + Duration::from_millis(500), "{links} links took {spent:?} of {all:?}");
}

/// The lane of a sender that may have many slots takes some milliseconds.
#[test]
fn no_lane_is_made_for_a_receiver_that_cannot_be_answered() {
    let mut pool = Pool::new(Geometry::new(8, 1 << 20).unwrap(), 1, wake()).unwrap();
    pool.grow().unwrap();
    // Of a user that no other test knows. Each answer has three descriptors, and eight may be under way.
    let process = Credentials { uid: 4_200_000_010, ..peer().process };
    let peer = Peer { process, same_user: false, trusted: false, ..peer() };
    let mut unread = Vec::new();
    let mut expect = || {
        let (own, other) = PacketSocket::pair().unwrap();
        let socket = PacketSocket::new(other).unwrap();
        unread.push(Greeted::new(peer, socket, pool.geometry(), Mechanism::Copy, SlotSource::Segments, None).unwrap());
        Expected::new(peer, PacketSocket::new(own).unwrap().of_link_with(&peer))
    };
    let [first, second, mut late] = [expect(), expect(), expect()];
    for mut expected in [first, second] {
        // The links of a user have to wait for each other where a lane takes long.
        while let Arrived::NotYet(again) = pool.link(expected).unwrap() {
            expected = again;
        }
    }
    let (mut look, mut make) = (Duration::MAX, Duration::MAX);
    for _ in 0..20 {
        let start = Instant::now();
        let Ok(Arrived::NotYet(again)) = pool.link(late) else { panic!("it is answered") };
        look = look.min(start.elapsed());
        assert!(again.is_unanswered());
        late = again;
        let start = Instant::now();
        drop(LaneTable::create("fbuf-test", capacity_for(pool.geometry().max_slots(), LaneFormat::PLAIN)).unwrap());
        make = make.min(start.elapsed());
    }
    assert!(look < make / 4, "a look takes {look:?}, a lane {make:?}");
}
