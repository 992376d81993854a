//! One call reads a bounded number of entries of a lane, whatever its sender writes.

use std::time::Duration;

use super::*;
use crate::{
    ring::{
        entry::{Body, GAP, LaneFormat, Note, ORIGIN, capacity_for},
        lane::{LaneReader, LaneView},
    },
    slot::Mark,
};

/// A receiver that asked to be skipped, and the lane of its sender.
fn skipping() -> (Inbound, PacketSocket, LaneWriter<LaneTable>) {
    let (inbound, socket, lane, _memory) = victim_receiver_with(Mechanism::Shared, LaneFormat::WITH_GAPS);
    (inbound, socket, LaneWriter::new(lane, LaneFormat::WITH_GAPS))
}

fn violation(inbound: &mut Inbound) -> Option<Violation> {
    match inbound.end() {
        Err(LinkEnd::Violation(violation)) => Some(violation),
        Ok(None) => None,
        other => panic!("{other:?}"),
    }
}

/// A message with a gap, as an honest sender publishes it.
fn behind_gap(slot: u32, gap: u64) -> Note {
    Note { gap, ..Note::plain(SlotId::new(slot), Body::from(5)) }
}

#[test]
fn a_gap_behind_a_gap_ends_the_link_at_once() {
    let (mut inbound, _socket, mut lane) = skipping();
    (0..capacity_for(SLOTS, LaneFormat::WITH_GAPS)).for_each(|_| lane.entry(GAP, 0, 3));
    assert!(inbound.take().is_none());
    assert_eq!((inbound.missed(), violation(&mut inbound)), (0, Some(Violation::PrefixOrder { prefix: "a gap" })));
}

/// What the attacks above are made of is allowed, if a message follows each gap.
#[test]
fn a_call_takes_one_gap_and_its_message() {
    let (mut inbound, _socket, mut lane) = skipping();
    (0..2).for_each(|slot| lane.noted(&behind_gap(slot, 3)));
    for taken in 1..=2 {
        let received = inbound.take().expect("a message was passed over");
        assert_eq!((received.sequence(), inbound.missed()), (4 * taken - 1, 3 * taken));
    }
    assert!(inbound.take().is_none() && !inbound.is_over());
}

/// An honest sender publishes the message before its gap, so that a gap without one is none of an honest sender.
#[test]
fn a_gap_without_a_message_ends_the_link() {
    let (mut inbound, _socket, mut lane) = skipping();
    lane.entry(GAP, 0, 3);
    assert!(inbound.is_ready() && inbound.take().is_none());
    assert_eq!(violation(&mut inbound), Some(Violation::Mark { found: 0, expected: 2 }));
}

/// A sender that dies while it publishes has died, and has broken no rule: nothing of such a message is seen.
#[test]
fn a_message_of_which_the_beginning_is_missing_is_none() {
    let (mut inbound, socket, lane, _memory) = victim_receiver_with(Mechanism::Shared, LaneFormat::WITH_GAPS);
    lane.at(2).scribble(2 << 24, 5);
    assert!(!inbound.is_ready() && inbound.take().is_none());
    drop(socket);
    inbound.attend();
    assert!(inbound.is_over() && matches!(inbound.end(), Err(LinkEnd::HangUp)));
}

#[test]
fn what_was_not_declared_ends_the_link() {
    for (kind, prefix) in [(GAP, "a gap"), (ORIGIN, "an origin")] {
        let (mut inbound, _socket, lane, _memory) = victim_receiver(Mechanism::Shared);
        let mut lane = LaneWriter::new(lane, LaneFormat::PLAIN);
        lane.entry(kind, 0, 3);
        lane.message(SlotId::new(0), 5);
        assert!(inbound.take().is_none());
        assert_eq!(violation(&mut inbound), Some(Violation::PrefixUndeclared { prefix }));
    }
    let (mut inbound, _socket, lane, _memory) = victim_receiver(Mechanism::Shared);
    LaneWriter::new(lane, LaneFormat::PLAIN).message(SlotId::new(0), Body::from(5).with_more());
    assert!(inbound.take().is_none());
    assert!(matches!(violation(&mut inbound), Some(Violation::Body { length: 5, offset: 0, .. })));
}

/// Any word is a tag, and a time that was not declared is not told.
#[test]
fn any_words_may_be_beside_a_message() {
    for (tags, times) in [(true, false), (false, true), (true, true)] {
        let format = LaneFormat { tags, times, ..LaneFormat::PLAIN };
        let (mut inbound, _socket, lane, _memory) = victim_receiver_with(Mechanism::Shared, format);
        let mut lane = LaneWriter::new(lane, format);
        for (slot, fast) in [(0, true), (1, false)] {
            // The tag would be the head of a message in a narrow lane.
            lane.noted(&Note { tag: 5 << 24, time: u64::MAX, ..behind_gap(slot, 0) });
            inbound.begin_round(fast.into());
            let taken = inbound.take_fast();
            assert_eq!(taken.is_some(), fast && !times, "times are noted the long way");
            let received = taken.or_else(|| inbound.take()).expect("a message was refused");
            assert_eq!((received.tag(), inbound.entries()), (5 << 24, u64::from(slot) + 1));
            assert_eq!(received.sent_at(), times.then_some(Duration::from_nanos(u64::MAX)));
        }
        assert!(inbound.take().is_none() && !inbound.is_over());
    }
}

#[test]
fn bytes_from_an_offset_on_lie_in_the_slot() {
    for (offset, length, fits) in [(60, 40, true), (60, 41, false), (101, 0, false), (u32::MAX >> 1, 1, false)] {
        let (mut inbound, _socket, lane, _memory) = victim_receiver(Mechanism::Shared);
        LaneWriter::new(lane, LaneFormat::PLAIN).message(SlotId::new(0), Body::new(offset, length));
        assert_eq!(inbound.take().map(|received| received.len()), fits.then_some(length as usize));
        let violation = violation(&mut inbound);
        assert_eq!(matches!(violation, Some(Violation::Body { .. })), !fits, "{violation:?}");
    }
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
    assert_eq!(welcome.format, LaneFormat::WITH_GAPS);
    let lane = LaneView::attach(welcome.lane.as_fd(), capacity_for(SLOTS, welcome.format)).unwrap();
    let mut lane = LaneReader::new(lane, welcome.format);
    assert_eq!(send(&mut pool).unwrap().receivers, 1);
    assert_eq!(send(&mut pool).unwrap().receivers, 0);
    lane.advance(1);
    assert_eq!(lane.look(), Ok(None), "a gap, and no message");
    // Handed back: the next one is not left out.
    board.at(0).store(Mark::of(0).word(), Ordering::Release);
    assert_eq!(send(&mut pool).unwrap().receivers, 1);
    let note = lane.look().unwrap().expect("a message");
    assert_eq!((note.gap, note.entries()), (1, 2));
}
