//! One call reads a bounded number of entries of a lane, whatever its sender writes.

use super::*;
use crate::{
    ring::lane::{LaneReader, LaneView, Note},
    slot::Mark,
};

/// A receiver that asked to be skipped, and the lane of its sender.
fn skipping() -> (Inbound, PacketSocket, LaneWriter<LaneTable>) {
    let (inbound, socket, lane, _memory) = victim_receiver_that_skips(Mechanism::Shared, Some(1));
    (inbound, socket, LaneWriter::new(lane))
}

fn violation(inbound: &mut Inbound) -> Option<Violation> {
    match inbound.end() {
        Err(LinkEnd::Violation(violation)) => Some(violation),
        Ok(None) => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_gap_behind_a_gap_ends_the_link_at_once() {
    let (mut inbound, _socket, mut lane) = skipping();
    (0..capacity_for(SLOTS, true)).for_each(|_| lane.gap(3));
    assert!(inbound.take().is_none());
    assert_eq!((inbound.missed(), violation(&mut inbound)), (3, Some(Violation::GapBehindGap)));
}

#[test]
fn a_gap_behind_a_gap_is_noticed_over_several_calls() {
    let (mut inbound, _socket, mut lane) = skipping();
    for violated in [false, true] {
        lane.gap(3);
        assert!(inbound.take().is_none());
        assert_eq!(inbound.is_over(), violated);
    }
    assert_eq!(violation(&mut inbound), Some(Violation::GapBehindGap));
}

/// What the attacks above are made of is allowed, if a message follows each gap.
#[test]
fn a_call_takes_one_gap_and_its_message() {
    let (mut inbound, _socket, mut lane) = skipping();
    for slot in 0..2 {
        lane.gap(3);
        lane.message(SlotId::new(slot), 5);
    }
    for taken in 1..=2 {
        let received = inbound.take().expect("a message was passed over");
        assert_eq!((received.sequence(), inbound.missed()), (4 * taken - 1, 3 * taken));
    }
    assert!(inbound.take().is_none() && !inbound.is_over());
}

#[test]
fn a_gap_waits_for_its_message() {
    let (mut inbound, socket, mut lane) = skipping();
    lane.gap(3);
    assert!(inbound.take().is_none());
    assert!(!inbound.is_ready() && !inbound.is_over(), "there is nothing to be taken");
    lane.message(SlotId::new(0), 5);
    assert_eq!(inbound.take().map(|received| received.sequence()), Some(3));
    // A sender that dies between the two has died, and has broken no rule.
    lane.gap(1);
    assert!(inbound.take().is_none());
    drop(socket);
    inbound.attend();
    assert!(inbound.is_over() && matches!(inbound.end(), Err(LinkEnd::HangUp)));
}

#[test]
fn a_gap_that_nobody_asked_for_ends_the_link() {
    let (mut inbound, _socket, lane, _memory) = victim_receiver(Mechanism::Shared);
    LaneWriter::new(lane).gap(3);
    assert!(inbound.take().is_none());
    assert_eq!(violation(&mut inbound), Some(Violation::GapUnasked(3)));
}

/// A message that is left out leaves nothing in the lane before another one follows.
#[test]
fn a_gap_is_published_with_the_message_behind_it() {
    let (own, its) = sockets();
    let mut pool = Pool::new(geometry(), SLOTS, Arc::new(EventFd::new().unwrap())).unwrap();
    let (board, descriptor) = BoardTable::create("fbuf-test", SLOTS as usize).unwrap();
    let hello = Hello { board: descriptor.into(), skip_above: Some(0), fences: false, wants_slots: false };
    own.send(&wire::encode(&LinkMessage::Hello(hello)).unwrap()).unwrap();
    let Ok(Arrived::Here) = pool.link(Expected::new(peer(), its)) else { panic!("an honest hello was refused") };
    let Ok(Some(LinkMessage::Welcome(welcome))) = link_message::receive_first(&own) else { panic!("no welcome") };
    let mut lane = LaneReader::new(LaneView::attach(welcome.lane.as_fd(), capacity_for(SLOTS, true)).unwrap());
    assert_eq!(send(&mut pool).unwrap().receivers, 1);
    assert_eq!(send(&mut pool).unwrap().receivers, 0);
    lane.advance();
    assert_eq!(lane.look(), Ok(None), "a gap, and no message");
    // Handed back: the next one is not left out.
    board.at(0).store(Mark::of(0).word(), Ordering::Release);
    assert_eq!(send(&mut pool).unwrap().receivers, 1);
    assert_eq!(lane.look(), Ok(Some(Note::Gap(1))));
    lane.advance();
    assert!(matches!(lane.look(), Ok(Some(Note::Message(..)))));
}
