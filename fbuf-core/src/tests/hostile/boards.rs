//! What a peer announces takes no memory: boards and tables grow with the segments that there are.

use super::*;
use crate::{
    limits::MAX_SLOTS,
    ring::entry::{LaneFormat, capacity_for},
    socket::link_message,
};

fn pages(fd: impl AsFd) -> i64 {
    nix::sys::stat::fstat(fd).unwrap().st_blocks / 8
}

/// As many slots as there can be, each as small as can be.
fn most() -> Geometry {
    Geometry::new(1, MAX_SLOTS.into()).unwrap()
}

fn segment(slots: u32) -> NewSegment {
    let (_map, memory) = Map::create("fbuf-test", most().segment_bytes(slots)).unwrap();
    NewSegment { memory: memory.into(), slots }
}

#[test]
fn a_board_grows_with_the_segments_of_its_sender() {
    let (own, its) = sockets();
    let greeted = Greeted::new(peer(), its, most(), Mechanism::Shared, SlotSource::Segments, None).unwrap();
    let Ok(Some(LinkMessage::Hello(hello))) = link_message::receive_first(&own) else { panic!("no hello") };
    assert_eq!(pages(&hello.board), 1, "before anything was said");
    let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(MAX_SLOTS, LaneFormat::PLAIN)).unwrap();
    let welcome = Welcome {
        lane: lane_fd.into(),
        format: LaneFormat::PLAIN,
        first_sequence: 0,
        segments: vec![segment(400)],
        slots: Vec::new(),
    };
    own.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap()).unwrap();
    let Ok(Answered::Open(mut inbound)) = greeted.look() else { panic!("an honest welcome was refused") };
    assert_eq!(pages(&hello.board), 1);
    own.send(&wire::encode(&LinkMessage::Segment(segment(4600))).unwrap()).unwrap();
    let mut lane = LaneWriter::new(lane, LaneFormat::PLAIN);
    for (sequence, slot) in [0, 399, 400, 4999].into_iter().enumerate() {
        lane.message(SlotId::new(slot), 1);
        assert_eq!(inbound.take().map(|received| received.sequence()), Some(sequence as u64));
    }
    assert_eq!(pages(&hello.board), 10);
    assert_eq!((inbound.held(), inbound.holdings().survey()), (0, (0, None)));
    // It was announced, and does not exist: it may be on its way.
    lane.message(SlotId::new(5000), 1);
    assert!(inbound.take().is_none() && !inbound.is_over() && !inbound.is_ready());
    own.send(&wire::encode(&LinkMessage::Segment(segment(1))).unwrap()).unwrap();
    inbound.attend();
    assert!(inbound.is_ready() && inbound.take().is_some_and(|received| received.sequence() == 4));
    // What cannot be on its way.
    lane.message(SlotId::new(5001), 1);
    assert!(inbound.take().is_none() && !inbound.is_over());
    drop(own);
    inbound.attend();
    assert!(inbound.take().is_none());
    assert!(matches!(inbound.end(), Err(LinkEnd::Violation(Violation::Slot { named: 5001, known: 5001 }))));
}

/// A board of which nothing but its size is true costs its sender what the sender's own slots need of it.
#[test]
fn a_sender_reads_nothing_of_a_board_that_does_not_exist() {
    let (own, its) = sockets();
    let mut pool = Pool::new(most(), 3000, Arc::new(EventFd::new().unwrap())).unwrap();
    let board = ::memfd::MemfdOptions::new().allow_sealing(true).create("fbuf-test").unwrap();
    board.as_file().set_len(BoardTable::size(MAX_SLOTS as usize)).unwrap();
    use ::memfd::FileSeal::{SealFutureWrite, SealGrow, SealSeal, SealShrink};
    board.add_seals(&[SealFutureWrite, SealShrink, SealGrow, SealSeal]).unwrap();
    assert_eq!(pages(board.as_file()), 0);
    let hello = Hello {
        board: board.as_file().as_fd().try_clone_to_owned().unwrap().into(),
        skip_above: None,
        fences: false,
        wants_slots: false,
    };
    own.send(&wire::encode(&LinkMessage::Hello(hello)).unwrap()).unwrap();
    let Ok(Arrived::Here) = pool.link(Expected::new(peer(), its)) else { panic!("no link") };
    assert_eq!(pages(board.as_file()), 6);
    pool.grow().unwrap();
    assert!(pool.announce_to(0).unwrap());
    pool.use_segment();
    assert_eq!(pages(board.as_file()), 12);
    for _ in 0..6000 {
        assert_eq!(send(&mut pool).unwrap().receivers, 1);
    }
    // Nothing comes back, and nothing else exists.
    assert!(!pool.search_all());
    assert_eq!((pool.places().lent, pages(board.as_file())), (6000, 12));
}
