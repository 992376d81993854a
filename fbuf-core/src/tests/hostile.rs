//! Both halves of a link against a peer that writes anything into its pages and sends anything over
//! its socket. What comes out is messages inside their slots, nothing, or the end of that link.

mod boards;
mod bounds;
mod copied;

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use nix::{sys::eventfd::EventFd, unistd::geteuid};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::{
    limits::MAX_SEQUENCE,
    memory::{Leasable, Map, Pages, Reserved},
    peer::{Credentials, LinkId, Peer},
    protection::Mechanism,
    receive::link::{Answered, Greeted, Inbound, SlotSource},
    ring::{
        board::BoardTable,
        entry::{LaneFormat, capacity_for},
        lane::{LaneTable, LaneWriter},
    },
    send::{
        link::{Arrived, Expected},
        pool::{Pool, Published, Unsent},
    },
    slot::{Geometry, SlotId},
    socket::{
        PacketSocket,
        link_message::{self, Hello, LinkEnd, LinkMessage, NewSegment, OneShot, Welcome, WriteGrant},
        wire::{self, Descriptor, Letter},
    },
    violation::Violation,
};

#[cfg(not(miri))]
mod freed_deferred;
mod gifts;
#[cfg(not(miri))]
mod inode_lock;

const SLOTS: u32 = 4;
const SLOT_BYTES: u32 = 100;

fn geometry() -> Geometry {
    Geometry::new(SLOT_BYTES.into(), SLOTS.into()).unwrap()
}

fn peer() -> Peer {
    Peer {
        endpoint: 1,
        process: Credentials { pid: 1, uid: 1, gid: 1 },
        same_user: false,
        trusted: true,
        link: LinkId::default(),
    }
}

fn sockets() -> (PacketSocket, PacketSocket) {
    let (one, other) = PacketSocket::pair().unwrap();
    (PacketSocket::new(one).unwrap(), PacketSocket::new(other).unwrap())
}

/// Something that a peer can send as a descriptor.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Null,
    Pipe,
    Socket,
    Regular,
    Unsealed(u64),
    Sealed(u64),
    /// Sealed, and open for writing only.
    Unreadable(u64),
    Writable(u64),
}

impl Kind {
    fn make(self) -> OwnedFd {
        match self {
            Self::Null => File::open("/dev/null").unwrap().into(),
            Self::Pipe => nix::unistd::pipe().unwrap().0,
            Self::Socket => PacketSocket::pair().unwrap().0,
            Self::Regular => File::open("/proc/self/exe").unwrap().into(),
            Self::Unsealed(size) => Reserved::new("fbuf-test", size).unwrap().as_fd().try_clone_to_owned().unwrap(),
            Self::Sealed(size) => Map::create("fbuf-test", size).unwrap().1,
            Self::Unreadable(size) => {
                let (_, memory) = Map::create("fbuf-test", size).unwrap();
                let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
                File::options().write(true).open(path).unwrap().into()
            }
            Self::Writable(size) => {
                Leasable::create("fbuf-test", size, false, geteuid().as_raw()).unwrap().open_writer().unwrap()
            }
        }
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    let size = prop_oneof![Just(4096u64), Just(8192), Just(geometry().segment_bytes(SLOTS))];
    prop_oneof![
        Just(Kind::Null),
        Just(Kind::Pipe),
        Just(Kind::Socket),
        Just(Kind::Regular),
        size.clone().prop_map(Kind::Unsealed),
        size.clone().prop_map(Kind::Sealed),
        size.clone().prop_map(Kind::Unreadable),
        size.prop_map(Kind::Writable),
    ]
}

/// Something that a peer can send over the link socket.
#[derive(Debug, Clone)]
enum Packet {
    Garbage(Vec<u8>, Vec<Kind>),
    Bell,
    Hello(Kind, Option<u32>, bool),
    Welcome(Kind, u64, Vec<(Kind, u32)>),
    Segment(Kind, u32),
    OneShot(Kind, u64),
    Right(Kind, Option<Kind>, u32),
}

fn packet() -> impl Strategy<Value = Packet> {
    let slots = prop_oneof![Just(SLOTS), Just(0), Just(1), any::<u32>()];
    prop_oneof![
        (vec(any::<u8>(), 1..40), vec(kind(), 0..3)).prop_map(|(bytes, kinds)| Packet::Garbage(bytes, kinds)),
        Just(Packet::Bell),
        (kind(), any::<Option<u32>>(), any::<bool>())
            .prop_map(|(board, skip, fences)| Packet::Hello(board, skip, fences)),
        (kind(), any::<u64>(), vec((kind(), slots.clone()), 0..3))
            .prop_map(|(lane, first, segments)| Packet::Welcome(lane, first, segments)),
        (kind(), slots).prop_map(|(memory, slots)| Packet::Segment(memory, slots)),
        (kind(), 0..3u64).prop_map(|(memory, sequence)| Packet::OneShot(memory, sequence)),
        right(),
    ]
}

fn right() -> impl Strategy<Value = Packet> {
    let slot = prop_oneof![4 => 0..SLOTS, 1 => any::<u32>()];
    (kind(), proptest::option::of(kind()), slot).prop_map(|(writer, reader, slot)| Packet::Right(writer, reader, slot))
}

fn say(socket: &PacketSocket, packet: &Packet) {
    let descriptor = |kind: &Kind| Descriptor::from(kind.make());
    let segment = |&(kind, slots): &(Kind, u32)| NewSegment { memory: descriptor(&kind), slots };
    let letter = match packet {
        Packet::Garbage(bytes, kinds) => {
            Letter { bytes: bytes.clone(), descriptors: kinds.iter().map(descriptor).collect() }
        }
        Packet::Bell => wire::encode(&LinkMessage::Bell).unwrap(),
        &Packet::Hello(board, skip_above, fences) => wire::encode(&LinkMessage::Hello(Hello {
            board: descriptor(&board),
            skip_above,
            fences,
            wants_slots: false,
        }))
        .unwrap(),
        Packet::Welcome(lane, first_sequence, segments) => {
            let (lane, segments) = (descriptor(lane), segments.iter().map(segment).collect());
            let welcome = Welcome {
                lane,
                format: LaneFormat::PLAIN,
                first_sequence: *first_sequence,
                segments,
                slots: Vec::new(),
            };
            wire::encode(&LinkMessage::Welcome(welcome)).unwrap()
        }
        &Packet::Segment(memory, slots) => wire::encode(&LinkMessage::Segment(segment(&(memory, slots)))).unwrap(),
        &Packet::OneShot(memory, sequence) => {
            wire::encode(&LinkMessage::OneShot(OneShot { memory: descriptor(&memory), sequence })).unwrap()
        }
        Packet::Right(writer, reader, slot) => {
            let (writer, reader) = (descriptor(writer), reader.as_ref().map(descriptor));
            wire::encode(&LinkMessage::WriteGrant(WriteGrant { slot: *slot, writer, reader })).unwrap()
        }
    };
    // The victim may have hung up already.
    let _ = socket.send(&letter);
}

/// The slots that an honest broker gives.
fn slot_source(mechanism: Mechanism) -> SlotSource {
    let slot = |_| {
        let memory = Leasable::create("fbuf-test", SLOT_BYTES.into(), false, geteuid().as_raw()).unwrap();
        memory.reserve(Pages::Base).unwrap();
        Descriptor::from(OwnedFd::from(memory))
    };
    if mechanism == Mechanism::Lease {
        SlotSource::FromBroker((0..SLOTS).map(slot).collect())
    } else {
        SlotSource::Segments
    }
}

/// A receiver, linked with a sender, all memory of which is this test's to write.
fn victim_receiver(mechanism: Mechanism) -> (Inbound, PacketSocket, LaneTable, Vec<Map>) {
    victim_receiver_with(mechanism, LaneFormat::PLAIN)
}

/// The same, with such a lane. It asks to be skipped if there can be gaps.
fn victim_receiver_with(mechanism: Mechanism, format: LaneFormat) -> (Inbound, PacketSocket, LaneTable, Vec<Map>) {
    let (own, its) = sockets();
    let above = format.gaps.then_some(1);
    let greeted = Greeted::new(peer(), its, geometry(), mechanism, slot_source(mechanism), above).unwrap();
    let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(SLOTS, format)).unwrap();
    let (memory, memory_fd) = Map::create("fbuf-test", geometry().segment_bytes(2)).unwrap();
    let mut segments = vec![NewSegment { memory: memory_fd.into(), slots: 2 }];
    if matches!(mechanism, Mechanism::Lease | Mechanism::OneShot) {
        segments.clear();
    }
    let welcome = Welcome { lane: lane_fd.into(), format, first_sequence: 0, segments, slots: Vec::new() };
    own.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap()).unwrap();
    let Ok(Answered::Open(inbound)) = greeted.look() else { panic!("an honest welcome was refused") };
    (*inbound, own, lane, vec![memory])
}

/// A sender, linked with a receiver, all memory of which is this test's to write.
fn victim_sender() -> (Pool, PacketSocket, BoardTable) {
    sender_with(SLOTS)
}

fn sender_with(slots: u32) -> (Pool, PacketSocket, BoardTable) {
    let (own, its) = sockets();
    let mut pool = Pool::new(geometry(), slots, Arc::new(EventFd::new().unwrap())).unwrap();
    let (board, descriptor) = BoardTable::create("fbuf-test", SLOTS as usize).unwrap();
    let hello = Hello { board: descriptor.into(), skip_above: None, fences: false, wants_slots: false };
    own.send(&wire::encode(&LinkMessage::Hello(hello)).unwrap()).unwrap();
    let Ok(Arrived::Here) = pool.link(Expected::new(peer(), its)) else { panic!("an honest hello was refused") };
    (pool, own, board)
}

/// Sends what is in the next slot that is free.
fn send(pool: &mut Pool) -> Result<Published, Unsent> {
    let found = pool.collect(64) || pool.search() && pool.collect(64);
    assert!(found, "message {} found no slot", pool.next_sequence());
    let fbuf = pool.allocate().unwrap();
    pool.send(fbuf)
}

/// So many cases; few where Miri runs them, each of which takes seconds there.
pub(crate) fn cases(count: u32) -> ProptestConfig {
    if cfg!(miri) {
        // There are no files.
        ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() }
    } else {
        ProptestConfig::with_cases(count)
    }
}

#[cfg(miri)]
fn mechanism() -> impl Strategy<Value = Mechanism> {
    prop_oneof![Just(Mechanism::Shared), Just(Mechanism::Copy)]
}

#[cfg(not(miri))]
fn mechanism() -> impl Strategy<Value = Mechanism> {
    prop_oneof![Just(Mechanism::Shared), Just(Mechanism::Copy), Just(Mechanism::Lease), Just(Mechanism::OneShot)]
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_receiver_survives_any_lane(
        words in vec((any::<Index>(), any::<u64>(), any::<u64>(), 0..4u8), 1..40),
        mechanism in mechanism(),
        gaps: bool,
        tags: bool,
        times: bool,
    ) {
        let format = LaneFormat { gaps, tags, times };
        let (mut inbound, _socket, lane, _memory) = victim_receiver_with(mechanism, format);
        let mut held = Vec::new();
        for (at, head, body, near) in words {
            // Most words keep near to what would be accepted: this lap, a message, few slots.
            let head = match near {
                0 => head,
                1 => head & 1 | (at.index(lane.capacity()) as u64) << 24,
                _ => head & 0x0710_0007,
            };
            let body = if near == 0 { body } else { body & 0x0000_0000_0000_007f };
            lane.at(at.index(lane.capacity())).scribble(head, body);
            if let Some(received) = inbound.take() {
                prop_assert!(received.len() <= SLOT_BYTES as usize);
                prop_assert!(received.iter().all(|&byte| byte == 0), "bytes from elsewhere");
                held.push(received);
                let slots = if mechanism == Mechanism::Lease { 4 } else { 2 };
                prop_assert!(held.len() <= slots, "one slot was lent twice");
            }
            if inbound.is_over() {
                prop_assert!(matches!(inbound.end(), Err(LinkEnd::Violation(_))));
                return Ok(());
            }
            if near == 3 {
                held.pop();
            }
        }
    }

    #[test]
    fn a_receiver_survives_any_link_message(packets in vec(packet(), 1..6), linked: bool, mechanism in mechanism()) {
        if linked {
            let (mut inbound, socket, _lane, _memory) = victim_receiver(mechanism);
            for packet in packets {
                say(&socket, &packet);
                inbound.attend();
                prop_assert!(inbound.take().is_none());
                if inbound.is_over() {
                    prop_assert!(matches!(inbound.end(), Err(LinkEnd::Violation(_))));
                    return Ok(());
                }
            }
        } else {
            let (own, its) = sockets();
            let greeted = Greeted::new(peer(), its, geometry(), mechanism, slot_source(mechanism), None).unwrap();
            say(&own, &packets[0]);
            match greeted.look() {
                // Only a lane and segments that hold to every rule.
                Ok(Answered::Open(_)) => {
                    prop_assert!(matches!(packets[0], Packet::Welcome(Kind::Sealed(_), ..MAX_SEQUENCE, _)));
                }
                Ok(Answered::NotYet(_)) => prop_assert!(false, "a message was passed over"),
                Err(LinkEnd::Violation(_)) => {}
                Err(end) => prop_assert!(false, "{:?}", end),
            }
        }
    }

    #[test]
    fn a_sender_survives_any_board(steps in vec((any::<Index>(), any::<u64>(), 0..4u8, any::<u64>()), 1..40)) {
        let (mut pool, socket, board) = victim_sender();
        let mut fbufs = Vec::new();
        for (at, word, near, flag) in steps {
            // Some words say that what is out, or was never sent, is back.
            let word = [word, u64::MAX, word % 8, word % 8][usize::from(near)];
            board.at(at.index(board.capacity())).store(word, Ordering::Relaxed);
            if near == 3 {
                board.head().scribble(flag, word);
            }
            while pool.collect(64) && let Some(fbuf) = pool.allocate() {
                fbufs.push(fbuf);
            }
            let mut starts: Vec<_> = fbufs.iter().map(|fbuf| fbuf.as_ptr()).collect();
            starts.sort_unstable();
            starts.dedup();
            prop_assert_eq!(starts.len(), fbufs.len(), "one slot was allocated twice");
            if let Some(fbuf) = fbufs.pop() {
                // By either way.
                if let Err(fbuf) = pool.send_fast(fbuf) {
                    drop(pool.send(fbuf));
                }
            }
            pool.notice_leaving();
            pool.search();
            let places = pool.places();
            prop_assert_eq!(places.free + places.held + places.lent, SLOTS as usize);
        }
        // Without its receiver, everything is back.
        drop((fbufs, socket));
        prop_assert!(matches!(pool.attend(0), Err(LinkEnd::HangUp)));
        pool.end(0);
        prop_assert!(pool.search());
        prop_assert_eq!(std::iter::from_fn(|| pool.collect(64).then(|| pool.allocate())?).count(), SLOTS as usize);
    }

    #[test]
    fn a_sender_survives_any_right_to_write(rights in vec(right(), 1..12)) {
        let (mut pool, own) = gifts::sender_of_receivers_slots(peer()).unwrap();
        for right in &rights {
            say(&own, right);
            let given = pool.attend(0);
            let Packet::Right(writer, reader, _) = right else { continue };
            let good = |kind: &Kind| matches!(kind, Kind::Sealed(_) | Kind::Writable(_));
            prop_assert!(given.is_err() || good(writer) && reader.as_ref().is_none_or(good));
            if given.is_err() {
                return Ok(());
            }
            while (pool.collect(64) || pool.search() && pool.collect(64))
                && let Some(mut fbuf) = pool.allocate()
            {
                // All of it can be written.
                fbuf.set_len(SLOT_BYTES as usize).unwrap();
                fbuf.fill(1);
                prop_assert!(pool.send(fbuf).is_ok());
            }
        }
    }

    #[test]
    fn a_sender_survives_any_link_message(packets in vec(packet(), 1..6), linked: bool) {
        if linked {
            let (mut pool, socket, _board) = victim_sender();
            for packet in packets {
                say(&socket, &packet);
                match pool.attend(0) {
                    Ok(()) => prop_assert!(matches!(packet, Packet::Bell) || matches!(&packet, Packet::Garbage(bytes, _) if bytes[..] == [0])),
                    Err(LinkEnd::Violation(_)) => return Ok(()),
                    Err(end) => prop_assert!(false, "{:?}", end),
                }
            }
        } else {
            let (own, its) = sockets();
            let mut pool = Pool::new(geometry(), SLOTS, Arc::new(EventFd::new().unwrap())).unwrap();
            say(&own, &packets[0]);
            match pool.link(Expected::new(peer(), its)) {
                Ok(Arrived::Here) => prop_assert!(matches!(packets[0], Packet::Hello(Kind::Sealed(4096), ..))),
                Ok(Arrived::NotYet(_)) => prop_assert!(false, "a message was passed over"),
                Err(LinkEnd::Violation(_)) => {}
                Err(end) => prop_assert!(false, "{:?}", end),
            }
        }
    }
}

#[test]
fn a_socket_that_is_never_read_ends_the_link_when_it_matters() {
    let (mut pool, _socket, board) = sender_with(SLOTS / 2);
    // Bells fill it up; those that find no room are lost, silently: it has been rung often enough.
    for sleep in 0..10_000 {
        board.head().scribble(8 * sleep + 1, 0);
        let Published { sequence, receivers, .. } = send(&mut pool).unwrap();
        assert_eq!((sequence, receivers), (sleep, 1));
        board.at((sleep % 2) as usize).store(sleep + 1, Ordering::Relaxed);
    }
    pool.grow().unwrap();
    assert!(matches!(pool.announce_to(0), Err(LinkEnd::Violation(Violation::SocketFull))));
}

#[test]
fn a_receiver_that_left_claims_no_slot_that_is_used_later() {
    let (mut pool, _socket, board) = victim_sender();
    assert_eq!(send(&mut pool).unwrap().receivers, 1);
    // It leaves, and says that it has read messages that were never sent.
    board.head().scribble(2, u64::MAX);
    pool.notice_leaving();
    for _ in 1..20 {
        assert!(matches!(send(&mut pool), Err(Unsent::NoReceiver(_))));
    }
    assert_eq!(pool.places().lent, 1, "what it holds, it may hold");
}

/// What it says again and again would have all that it has gone through each time.
#[test]
fn what_a_receiver_says_when_it_leaves_counts_once() {
    let (mut pool, _socket, board) = victim_sender();
    assert_eq!(send(&mut pool).unwrap().receivers, 1);
    board.head().scribble(2, u64::MAX);
    pool.notice_leaving();
    board.head().scribble(2, 0);
    pool.notice_leaving();
    assert_eq!(pool.places().lent, 1, "it was asked again what it has read");
}

/// Sends a descriptor as message 0 of five bytes, and its entry.
fn shoot(memory: OwnedFd, sequence: u64) -> Result<Vec<u8>, Violation> {
    let (mut inbound, socket, lane, _memory) = victim_receiver(Mechanism::OneShot);
    let one_shot = OneShot { memory: memory.into(), sequence };
    socket.send(&wire::encode(&LinkMessage::OneShot(one_shot)).unwrap()).unwrap();
    LaneWriter::new(lane, LaneFormat::PLAIN).message(SlotId::new(0), 5);
    match (inbound.take(), inbound.end()) {
        (Some(received), Ok(None)) => Ok(received.to_vec()),
        (None, Err(LinkEnd::Violation(violation))) => Err(violation),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_message_of_its_own_must_be_sealed_for_good() {
    use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
    let (write, shrink, grow) = (SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_SHRINK, SealFlag::F_SEAL_GROW);
    let size = geometry().segment_bytes(1);
    let with = |seals: SealFlag, punch: bool| {
        let memory = Reserved::new("fbuf-test", size).unwrap().as_fd().try_clone_to_owned().unwrap();
        if punch {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&memory, hole, 0, 4096).unwrap();
        }
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        memory
    };
    let all = write | shrink | grow | SealFlag::F_SEAL_SEAL;
    let good = || with(all, false);
    assert_eq!(shoot(good(), 0), Ok(vec![0; 5]));
    let out_of_turn = shoot(good(), 1).unwrap_err();
    assert!(matches!(out_of_turn, Violation::OutOfTurn { .. }), "{out_of_turn}");
    let shared = std::path::Path::new("/dev/shm").join(format!("fbuf-test-{}", std::process::id()));
    std::fs::write(&shared, vec![0; size as usize]).unwrap();
    let file = File::open(&shared).unwrap();
    std::fs::remove_file(&shared).unwrap();
    let bad: [(&str, OwnedFd); 10] = [
        ("no seals", Kind::Unsealed(size).make()),
        ("seals against other writers", Kind::Sealed(size).make()),
        ("no seal against writing", with(shrink | grow | SealFlag::F_SEAL_SEAL, false)),
        ("no seal against shrinking", with(write | grow | SealFlag::F_SEAL_SEAL, false)),
        ("seals that can be added to", with(write | shrink | grow, false)),
        ("a hole", with(all, true)),
        ("a file in /dev/shm", file.into()),
        ("a file", Kind::Regular.make()),
        ("a pipe", Kind::Pipe.make()),
        ("a socket", Kind::Socket.make()),
    ];
    for (name, memory) in bad {
        let violation = shoot(memory, 0).unwrap_err();
        assert!(matches!(violation, Violation::Descriptor(_)), "{name}: {violation}");
    }
    // Shorter than the message claims to be.
    let short = Reserved::new("fbuf-test", 4096).unwrap().seal_for_good().unwrap();
    let (mut inbound, socket, lane, _memory) = victim_receiver(Mechanism::OneShot);
    let one_shot = OneShot { memory: short.into(), sequence: 0 };
    socket.send(&wire::encode(&LinkMessage::OneShot(one_shot)).unwrap()).unwrap();
    LaneWriter::new(lane, LaneFormat::PLAIN).message(SlotId::new(0), SLOT_BYTES + 1);
    assert!(inbound.take().is_none());
    assert!(matches!(inbound.end(), Err(LinkEnd::Violation(Violation::Body { .. }))));
}

#[test]
fn a_sender_that_hands_over_fewer_slots_than_it_has_is_refused() {
    let (own, its) = sockets();
    let greeted = Greeted::new(peer(), its, geometry(), Mechanism::Copy, SlotSource::FromSender, None).unwrap();
    let (_lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(SLOTS, LaneFormat::PLAIN)).unwrap();
    let SlotSource::FromBroker(mut slots) = slot_source(Mechanism::Lease) else {
        panic!("slots to be leased are given")
    };
    slots.pop();
    let welcome =
        Welcome { lane: lane_fd.into(), format: LaneFormat::PLAIN, first_sequence: 0, segments: Vec::new(), slots };
    own.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap()).unwrap();
    assert!(matches!(greeted.look(), Err(LinkEnd::Violation(Violation::Terms { found: 3, .. }))));
}

/// It may still be on its way: another thread may be at it, of either process ([`crate::socket::waiters`]).
#[test]
fn an_entry_without_its_message_is_not_taken_and_ends_a_link_over_which_none_can_come() {
    let (mut inbound, socket, lane, memory) = victim_receiver(Mechanism::OneShot);
    let mut lane = LaneWriter::new(lane, LaneFormat::PLAIN);
    lane.message(SlotId::new(0), 5);
    assert!(inbound.is_ready() && inbound.take().is_none());
    // It is not looked for again and again.
    assert!(!inbound.is_ready() && !inbound.is_over() && inbound.take().is_none());
    drop((socket, memory));
    inbound.attend();
    assert!(inbound.is_ready() && inbound.take().is_none());
    assert!(matches!(inbound.end(), Err(LinkEnd::Violation(Violation::OutOfTurn { .. }))));
}
