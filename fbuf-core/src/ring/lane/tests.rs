//! Lanes on the heap: honest ones, and any.

use super::{heap::HeapLane, *};
use crate::{limits::MAX_SLOTS, ring::entry::capacity_for};
use proptest::prelude::*;

const WIDE: LaneFormat = LaneFormat { gaps: true, tags: true, times: true };

fn body(length: u32) -> Body {
    Body::new(0, length)
}

fn plain(slot: u32) -> Note {
    Note::plain(SlotId::new(slot), body(slot + 1))
}

#[test]
fn messages_arrive_in_order_over_many_laps() {
    for format in [LaneFormat::PLAIN, WIDE] {
        let (mut writer, mut reader) = HeapLane::ends(4, format);
        for n in 0..4 * if cfg!(miri) { 10 } else { 600 } {
            assert_eq!(reader.look(), Ok(None));
            assert!(!reader.is_ready() && reader.peek::<false>().0.0 >= MAX_SLOTS.into());
            writer.message(SlotId::new(n), body(n + 1));
            assert!(reader.is_ready() && reader.has(0) && !reader.has(1));
            assert_eq!(reader.peek::<false>(), ((n.into(), u64::from(n) + 1), 0));
            assert_eq!(reader.look(), Ok(Some(plain(n))));
            reader.advance(1);
            assert_eq!(reader.entries(), u64::from(n) + 1);
        }
    }
}

#[test]
fn messages_arrive_with_all_that_goes_with_them() {
    let (mut writer, mut reader) = HeapLane::ends(8, WIDE);
    for n in 0..64 {
        let [gap, tag, time] = [0, 1, 2].map(|bit| if n >> bit & 1 == 0 { 0 } else { u64::MAX - bit });
        let sent = Note { gap, tag, time, ..plain(n) };
        writer.noted(&sent);
        assert_eq!(reader.look(), Ok(Some(sent)));
        assert_eq!((sent.entries(), reader.has(1)), (1 + u64::from(gap != 0), gap != 0));
        let (named, found) = reader.peek::<true>();
        assert_eq!(named.0 < MAX_SLOTS.into(), gap == 0, "a gap is no message");
        assert_eq!(found, if gap == 0 { tag } else { 0 });
        reader.advance(sent.entries());
        writer.simple::<true>(SlotId::new(n), body(n + 1), 7);
        assert_eq!(reader.peek::<true>(), ((n.into(), u64::from(n) + 1), 7));
        assert_eq!(reader.look(), Ok(Some(Note { tag: 7, ..plain(n) })));
        reader.advance(1);
        assert_eq!(reader.look(), Ok(None));
    }
}

/// What was beside the message that stood there one lap before is not beside this one.
#[test]
fn a_message_has_no_tag_but_its_own() {
    let (mut writer, mut reader) = HeapLane::ends(2, LaneFormat { tags: true, ..LaneFormat::PLAIN });
    for tag in [5, 0, u64::MAX, 0] {
        writer.simple::<true>(SlotId::new(1), body(2), tag);
        assert_eq!(reader.peek::<true>().1, tag);
        reader.advance(1);
    }
    let (mut writer, reader) = HeapLane::ends(2, LaneFormat::PLAIN);
    writer.noted(&Note { tag: 5, time: 6, ..plain(1) });
    assert_eq!(reader.look(), Ok(Some(plain(1))), "a narrow lane has no room for them");
}

#[test]
fn one_gap_stands_before_a_message() {
    for (entries, violation) in [
        (&[(GAP, 0, 0)][..], Violation::EmptyPrefix { prefix: "a gap" }),
        (&[(GAP, 5, 1)], Violation::EmptyPrefix { prefix: "a gap" }),
        (&[(GAP, 0, 1), (GAP, 0, 1)], Violation::PrefixOrder { prefix: "a gap" }),
        (&[(ORIGIN, 0, 1)], Violation::PrefixUndeclared { prefix: "an origin" }),
        (&[(GAP, 0, 1), (5, 0, 1)], Violation::Kind { kind: 5 }),
    ] {
        for format in [LaneFormat::WITH_GAPS, WIDE] {
            let (mut writer, reader) = HeapLane::ends(8, format);
            entries.iter().for_each(|&(kind, slot, word)| writer.entry(kind, slot, word));
            assert_eq!(reader.look(), Err(violation.clone()));
        }
    }
    // A gap is published after its message.
    for (format, expected) in [(LaneFormat::WITH_GAPS, 2), (WIDE, 4)] {
        let (mut writer, reader) = HeapLane::ends(8, format);
        writer.entry(GAP, 0, 1);
        assert_eq!(reader.look(), Err(Violation::Mark { found: 0, expected }));
    }
}

#[test]
fn marks_begin_again_without_a_word_being_lost() {
    for format in [LaneFormat::PLAIN, WIDE] {
        let (mut writer, mut reader) = HeapLane::ends(4, format);
        (writer.position, reader.position) = ((1 << 40) - 6, (1 << 40) - 6);
        for n in 0..16 {
            assert!(u64::from(n) * format.width() < 4 || !reader.is_ready());
            writer.message(SlotId::new(n), body(n + 1));
            assert!(reader.is_ready());
            assert_eq!(reader.peek::<false>(), ((n.into(), u64::from(n) + 1), 0));
            assert_eq!(reader.look(), Ok(Some(plain(n))));
            reader.advance(1);
        }
    }
}

#[test]
fn a_whole_lane_of_entries_is_kept() {
    for format in [LaneFormat::WITH_GAPS, WIDE] {
        let (mut writer, mut reader) = HeapLane::ends(capacity_for(4, format), format);
        let sent = |n: u32| Note { gap: (n + 1).into(), tag: if format.tags { 7 } else { 0 }, ..plain(n) };
        (0..4).for_each(|n| writer.noted(&sent(n)));
        writer.close(3, Some(Abort::Code(7)));
        for n in 0..4 {
            assert_eq!(reader.ending(), None);
            assert!(reader.peek::<false>().0.0 >= MAX_SLOTS.into(), "a gap is no message");
            assert_eq!(reader.look(), Ok(Some(sent(n))));
            reader.advance(2);
        }
        assert_eq!(reader.look(), Ok(None));
        assert_eq!((reader.ending(), reader.abort()), (Some(3), Some(Abort::Code(7))));
    }
}

proptest! {
    #![proptest_config(crate::tests::hostile::cases(256))]

    /// Whatever a peer writes into a lane, its reader answers with a message, with nothing, or
    /// with a violation, and never goes past the lane.
    #[test]
    fn random_lanes_are_survived(
        words in prop::collection::vec((any::<u64>(), 0..3u64), 8),
        small in any::<bool>(),
        wide in any::<bool>(),
    ) {
        let format = if wide { WIDE } else { LaneFormat::WITH_GAPS };
        let memory = HeapLane::new(8);
        for (index, (first, second)) in words.iter().enumerate() {
            // Half of the runs keep near the marks and kinds that would be accepted.
            let near = head_of(if index == 0 { 8 } else { index as u64 }, first & 3) + (first >> 63);
            memory.scribble(index, if small { near } else { *first }, *second);
        }
        let mut reader = LaneReader::new(memory, format);
        let mut taken = 0;
        while let Ok(Some(note)) = reader.look() {
            prop_assert!(wide || (note.tag, note.time) == (0, 0));
            reader.advance(note.entries());
            taken += note.entries();
            prop_assert!(taken * format.width() <= 8, "one lap was written, more were read");
        }
        prop_assert_eq!(reader.entries(), taken);
    }
}
