//! Messages that are taken and do not reach the program: they stay, or their sender hears that they were not read.

use super::*;
use crate::{
    abort::Abort,
    memory::{Leasable, Map, Pages, available::without_memory},
    ring::{board::BoardReader, lane::LaneWriter},
    send::unread::Unread,
    slot::{Mark, SlotId},
    socket::link_message::{LinkEnd, OneShot, Welcome},
    socket::wire,
};

const SLOTS: u32 = 4;
/// Copies of messages have their memory by parts, of which no two slots share one.
const SLOT_BYTES: u64 = 1 << 20;

fn geometry() -> Geometry {
    Geometry::new(SLOT_BYTES, SLOTS.into()).unwrap()
}

/// A receiver that reads by this mechanism, and the pool that sends to it; each slot is memory of its own, or all lie in a segment.
fn linked(mechanism: Mechanism, own_memory: bool) -> (Pool, Inbound) {
    if own_memory {
        let slot =
            |_| Leasable::create("fbuf-test", SLOT_BYTES, false, nix::unistd::geteuid().as_raw()).unwrap().into();
        let slots = (0..SLOTS).map(slot).collect();
        let (mut pool, _) = Pool::of_memory(geometry().into(), slots, Pages::Base, wake()).unwrap();
        let slots = SlotSource::FromBroker(pool.hand_over().unwrap());
        let inbound = link(&mut pool, mechanism, slots, |_| {});
        return (pool, inbound);
    }
    let mut pool = match mechanism {
        Mechanism::OneShot => Pool::of_one_shots(geometry(), SLOTS, wake()).unwrap(),
        _ => Pool::new(geometry(), SLOTS, wake()).unwrap(),
    };
    let inbound = link(&mut pool, mechanism, SlotSource::Segments, |_| {});
    (pool, inbound)
}

fn send_four(pool: &mut Pool) {
    for number in 0..4 {
        assert!(collect(pool));
        shoot(pool, number).unwrap();
    }
}

/// How many slots the sender takes for lent, after each look that it has.
fn lent(pool: &mut Pool) -> usize {
    pool.notice_leaving();
    collect(pool);
    pool.search_all();
    pool.count_lent_over(0)
}

#[test]
fn a_message_for_which_there_is_no_memory_stays_and_is_unread_once_its_receiver_leaves() {
    for (mechanism, own_memory) in [(Mechanism::Copy, false), (Mechanism::Copy, true), (Mechanism::OneShot, false)] {
        let (mut pool, mut inbound) = linked(mechanism, own_memory);
        send_four(&mut pool);
        assert_eq!(read(&mut inbound), Some(0), "{mechanism:?}");
        assert_eq!(lent(&mut pool), 3, "{mechanism:?}");
        for _ in 0..3 {
            assert!(without_memory(|| inbound.take()).is_none(), "{mechanism:?}");
            let lacks = inbound.lacks_memory().expect("it lacks nothing");
            assert!(lacks.contains("memory"), "{mechanism:?}: {lacks}");
            assert!(inbound.is_ready() && !inbound.is_over(), "{mechanism:?}");
            assert_eq!(
                (inbound.held(), lent(&mut pool)),
                (0, 3),
                "{mechanism:?}: it was handed back, and nobody read it"
            );
        }
        assert_eq!(read(&mut inbound), Some(1), "{mechanism:?}");
        assert_eq!(inbound.lacks_memory(), None, "{mechanism:?}");
        assert!(without_memory(|| inbound.take()).is_none(), "{mechanism:?}");
        drop(inbound);
        assert_eq!(lent(&mut pool), 0, "{mechanism:?}");
        assert_eq!(pool.end(0), Some(Unread { messages: 2, first: 2, last: 3 }), "{mechanism:?}");
    }
}

#[test]
fn a_message_that_is_taken_when_its_receiver_is_disconnected_is_unread() {
    for (mechanism, own_memory) in [(Mechanism::Copy, false), (Mechanism::Copy, true), (Mechanism::Lease, true)] {
        let (mut pool, mut inbound) = linked(mechanism, own_memory);
        send_four(&mut pool);
        assert_eq!(read(&mut inbound), Some(0), "{mechanism:?}");
        pool.tell_disconnected(0);
        assert!(inbound.take().is_none(), "{mechanism:?}");
        assert!(matches!(inbound.end(), Err(LinkEnd::Disconnected)), "{mechanism:?}");
        assert_eq!(inbound.held(), 0, "{mechanism:?}");
        assert_eq!(pool.disconnect(0), Some(Unread { messages: 3, first: 1, last: 3 }), "{mechanism:?}");
    }
}

#[test]
fn a_message_that_breaks_a_rule_is_not_handed_back_as_read() {
    let (to_sender, to_receiver) = PacketSocket::pair().unwrap();
    let (own, its) = (PacketSocket::new(to_receiver).unwrap(), PacketSocket::new(to_sender).unwrap());
    let greeted = Greeted::new(peer(), its, geometry(), Mechanism::OneShot, SlotSource::Segments, None).unwrap();
    let Ok(Some(LinkMessage::Hello(hello))) = link_message::receive_first(&own) else { panic!("no hello") };
    let board = BoardReader::attach(hello.board.as_fd(), SLOTS).unwrap();
    let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(SLOTS, LaneFormat::PLAIN)).unwrap();
    let (segments, slots) = (Vec::new(), Vec::new());
    let welcome = Welcome { lane: lane_fd.into(), format: LaneFormat::PLAIN, first_sequence: 7, segments, slots };
    let say = |message| own.send(&wire::encode(&message).unwrap()).unwrap();
    say(LinkMessage::Welcome(welcome));
    let Ok(Answered::Open(mut inbound)) = greeted.look() else { panic!("an honest welcome was refused") };
    let unsealed = Map::create("fbuf-test", 4096).unwrap().1;
    say(LinkMessage::OneShot(OneShot { memory: unsealed.into(), sequence: 7 }));
    LaneWriter::new(lane, LaneFormat::PLAIN).message(SlotId::new(0), 1);
    assert!(inbound.take().is_none() && inbound.is_broken());
    assert!(matches!(inbound.end(), Err(LinkEnd::Violation(_))));
    assert!(!board.is_back(SlotId::new(0), Mark::of(7)), "it was handed back, and nobody read it");
    drop(inbound);
    assert_eq!((board.left_at(), board.abort()), (Some(7), Some(Abort::Violation)));
}

#[test]
fn a_sender_hears_that_its_receiver_had_no_room_for_more_slots_and_what_is_unread() {
    for mechanism in [Mechanism::Shared, Mechanism::Copy] {
        let mut pool = Pool::new(geometry(), 2, wake()).unwrap();
        let mut inbound = link(&mut pool, mechanism, SlotSource::Segments, |_| {});
        for number in 0..4 {
            if !collect(&mut pool) {
                pool.grow().unwrap();
                assert!(pool.announce_to(0).unwrap());
                pool.use_segment();
                assert!(collect(&mut pool));
            }
            shoot(&mut pool, number).unwrap();
        }
        without_memory(|| inbound.attend());
        for number in 0..2 {
            assert_eq!(inbound.take().unwrap().sequence(), number, "{mechanism:?}");
        }
        assert!(inbound.take().is_none() && inbound.is_broken(), "{mechanism:?}");
        assert!(matches!(inbound.end(), Err(LinkEnd::Exhausted(_))), "{mechanism:?}");
        assert_eq!(inbound.next_sequence(), 2, "{mechanism:?}");
        drop(inbound);
        pool.notice_leaving();
        assert_eq!(pool.links()[0].failure(), Some(Abort::Exhausted), "{mechanism:?}");
        assert_eq!(pool.end(0), Some(Unread { messages: 2, first: 2, last: 3 }), "{mechanism:?}");
    }
}

#[test]
fn a_sender_hears_that_its_receiver_had_no_room_for_the_link() {
    let mut pool = Pool::new(geometry(), SLOTS, wake()).unwrap();
    let (to_sender, to_receiver) = PacketSocket::pair().unwrap();
    let (to_sender, to_receiver) = (PacketSocket::new(to_sender).unwrap(), PacketSocket::new(to_receiver).unwrap());
    let (mechanism, segments) = (Mechanism::Shared, SlotSource::Segments);
    let greeted = Greeted::new(peer(), to_sender, pool.geometry(), mechanism, segments, None).unwrap();
    let Ok(Arrived::Here) = pool.link(Expected::new(peer(), to_receiver)) else { panic!("no hello") };
    let end = without_memory(|| greeted.look()).map(drop).unwrap_err();
    assert!(matches!(end, LinkEnd::Exhausted(_)), "{end:?}");
    assert_eq!(pool.links()[0].failure(), Some(Abort::Exhausted));
}
