//! The forward lane: a ring in the sender's memory through which it tells one receiver which slots
//! it lends. Single producer, single consumer, no shared indices. [`LaneReader::look`] checks the shape of what stands there.
//!
//! An [`Entry`] is two words. The head word carries a mark of the position it was written at and is stored
//! last, with Release; the reader polls the head word where the next entry will stand, so flag and
//! descriptor arrive in one transfer of a cache line. A message with prefixes is written from its end: the reader that
//! sees the first of its entries sees all of them. The lane has room for every slot that the
//! sender can lend (see [`capacity_for`](super::entry::capacity_for)): it cannot overflow, so "full" is not among its states.

#[cfg(not(loom))]
use zerocopy::FromBytes;

use crate::{
    abort::Abort,
    points,
    ring::entry::{Body, Entry, MESSAGE, Note, Prefix, Prefixes, head_of, kind, mark, slot},
    slot::SlotId,
    sync::{AtomicU64, Ordering, fence, read_only::ReadOnly},
    violation::Violation,
    wait::{Flag, LastRing},
};

/// The head of a lane: words that its sender writes beside the entries.
#[cfg_attr(not(loom), derive(FromBytes))]
#[repr(C, align(128))]
#[derive(Debug)]
pub struct LaneHead {
    /// The sender's flag: parked, gone.
    pub(crate) flag: Flag,
    /// Zero while the sender sends; afterwards the position behind its last entry.
    closed: AtomicU64,
    /// Messages that were left out behind the last one, once it is closed.
    left_out: AtomicU64,
    /// Once it is closed, and not in order: why, as [`Abort::to_word`].
    aborted: AtomicU64,
    /// When the sender rang last.
    pub(crate) last_ring: LastRing,
    /// Whether the sender has disconnected the receiver: then what it copies of a slot may be of another message.
    dropped: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<LaneHead>() == 128 && align_of::<LaneHead>() == 128);

#[cfg(fuzzing)]
impl LaneHead {
    /// Writes any words, as a hostile peer would.
    pub fn scribble(&self, flag: u64, closed: u64, left_out: u64, dropped: u64) {
        self.dropped.store(dropped, Ordering::Relaxed);
        self.flag.scribble(flag);
        self.closed.store(closed, Ordering::Relaxed);
        self.left_out.store(left_out, Ordering::Relaxed);
        self.aborted.store(left_out, Ordering::Relaxed);
    }
}

/// The memory of a lane, as its sender has it. Positions are counted from one, so that the zeroes of fresh memory stand
/// at none.
pub trait WritableLane {
    /// Its head.
    fn head(&self) -> &LaneHead;
    /// The entry that stands at a position of the endless sequence.
    fn entry(&self, position: u64) -> &Entry;
}

/// The memory of a lane, as its receiver has it.
pub trait LaneMemory {
    /// Its head.
    fn head(&self) -> ReadOnly<'_, LaneHead>;
    /// The entry that stands at a position of the endless sequence.
    fn entry(&self, position: u64) -> ReadOnly<'_, Entry>;
    /// How many entries there are: a power of two that never changes.
    fn capacity(&self) -> u64;
}

/// A lane between two processes, as its sender has it.
#[cfg(not(loom))]
pub type LaneTable = crate::memory::Table<LaneHead, Entry>;

/// A lane between two processes, as its receiver has it.
#[cfg(not(loom))]
pub type LaneView = crate::memory::TableView<LaneHead, Entry>;

#[cfg(not(loom))]
impl WritableLane for LaneTable {
    #[inline]
    fn head(&self) -> &LaneHead {
        Self::head(self)
    }
    #[inline]
    fn entry(&self, position: u64) -> &Entry {
        self.at(position as usize)
    }
}

#[cfg(not(loom))]
impl LaneMemory for LaneView {
    #[inline]
    fn head(&self) -> ReadOnly<'_, LaneHead> {
        Self::head(self)
    }
    #[inline]
    fn entry(&self, position: u64) -> ReadOnly<'_, Entry> {
        self.at(position as usize)
    }
    fn capacity(&self) -> u64 {
        Self::capacity(self) as u64
    }
}

impl<'a> ReadOnly<'a, LaneHead> {
    /// The sender's flag.
    #[inline]
    #[must_use]
    pub fn flag(self) -> ReadOnly<'a, Flag> {
        self.part(|head| &head.flag)
    }

    /// When the sender rang last.
    #[must_use]
    pub fn last_ring(self) -> ReadOnly<'a, LastRing> {
        self.part(|head| &head.last_ring)
    }
}

/// The sender's end.
#[derive(Debug)]
pub struct LaneWriter<M> {
    memory: M,
    /// Where the next entry will stand.
    position: u64,
}

impl<M: WritableLane> LaneWriter<M> {
    /// Takes the writing end of fresh memory.
    pub fn new(memory: M) -> Self {
        Self { memory, position: 1 }
    }

    /// The head of this lane.
    pub fn head(&self) -> &LaneHead {
        self.memory.head()
    }

    /// Publishes a message. The caller lends the slot in its ledger, which is what keeps the lane
    /// from overflowing.
    #[inline]
    pub fn message(&mut self, slot: SlotId, body: impl Into<Body>) {
        self.entry(MESSAGE, slot.number().into(), body.into().word());
    }

    /// Publishes a message with a tag, which is not zero.
    #[inline]
    pub fn tagged(&mut self, slot: SlotId, body: Body, tag: u64) {
        let position = self.position;
        self.position += 2;
        self.store(position + 1, MESSAGE, slot.number().into(), body.word());
        self.store(position, Prefix::Tag as u64, 0, tag);
    }

    /// Publishes a message with what stands before it.
    pub fn prefixed(&mut self, note: &Note) {
        let first = self.position;
        self.position += note.entries();
        self.store(self.position - 1, MESSAGE, note.slot.into(), note.body.word());
        for (position, (prefix, word)) in (first..self.position - 1).rev().zip(note.prefixes.iter().rev()) {
            self.store(position, prefix as u64, 0, word);
        }
    }

    /// Publishes one entry, of any kind. An honest sender publishes whole messages.
    #[inline]
    pub fn entry(&mut self, kind: u64, slot: u64, body: u64) {
        let position = self.position;
        self.position += 1;
        self.store(position, kind, slot, body);
    }

    #[inline]
    fn store(&self, position: u64, kind: u64, slot: u64, body: u64) {
        let entry = self.memory.entry(position);
        entry.body.store(body, Ordering::Relaxed);
        points::reach("write: half an entry");
        // Release: partner is the Acquire load in `LaneReader::peek`. It carries the body, the entries that come after it of
        // the same message, and the bytes of the slot.
        entry.head.store(head_of(position, kind) + slot, Ordering::Release);
    }

    /// Says that the receiver is disconnected, before any slot is used again that it has.
    pub(crate) fn disconnect_receiver(&self) {
        self.memory.head().dropped.store(1, Ordering::Relaxed);
        // Partner: the fence in `is_disconnected`. A reader that sees a byte of a later message in a slot sees this.
        fence(Ordering::Release);
    }

    /// Says that nothing follows but messages that were left out, or that the stream is broken off here.
    /// The first word counts.
    pub fn close(&mut self, left_out: u64, abort: Option<Abort>) {
        // Relaxed: only this side writes it.
        if self.memory.head().closed.load(Ordering::Relaxed) != 0 {
            return;
        }
        self.memory.head().left_out.store(left_out, Ordering::Relaxed);
        self.memory.head().aborted.store(Abort::to_word(abort), Ordering::Relaxed);
        // Release: partner is the Acquire load in `LaneReader::ending`.
        self.memory.head().closed.store(self.position, Ordering::Release);
        points::reach("end: closed");
    }
}

/// The receiver's end.
#[derive(Debug)]
pub struct LaneReader<M> {
    memory: M,
    /// Where the next entry stands.
    position: u64,
}

impl<M: LaneMemory> LaneReader<M> {
    /// Takes the reading end of a lane from which nothing was read yet.
    pub fn new(memory: M) -> Self {
        Self { memory, position: 1 }
    }

    /// The head of this lane.
    pub fn head(&self) -> ReadOnly<'_, LaneHead> {
        self.memory.head()
    }

    /// Its memory.
    #[inline]
    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }

    /// Where the next entry stands: one more than were read.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The slot that the next entry names, and the word of its [`Body`], if it is a message. If it is not, or there is
    /// none, the number of the slot is beyond all that can be: it is to be checked anyway, and one
    /// comparison does for both.
    #[inline]
    pub(crate) fn peek(&self) -> (u64, u64) {
        let entry = self.memory.entry(self.position);
        // Acquire: partner is the Release store in `LaneWriter::store`.
        let slot = entry.head().load(Ordering::Acquire) ^ head_of(self.position, MESSAGE);
        (slot, entry.body().load(Ordering::Relaxed))
    }

    /// If the next entry is a tag: that, and what [`Self::peek`] says of the message behind it. An honest sender's is not zero.
    #[inline(always)]
    pub(crate) fn peek_tagged(&self) -> Option<(u64, (u64, u64))> {
        let [first, second] = [0, 1].map(|ahead| self.memory.entry(self.position + ahead));
        let [expected, message] = [head_of(self.position, Prefix::Tag as u64), head_of(self.position + 1, MESSAGE)];
        // Acquire: partner is the Release store in `LaneWriter::store`.
        if first.head().load(Ordering::Acquire) != expected {
            return None;
        }
        let tag = first.body().load(Ordering::Relaxed);
        // Relaxed: a message is written from its end, so that the rest of it is there.
        let slot = second.head().load(Ordering::Relaxed) ^ message;
        Some((tag, (slot, second.body().load(Ordering::Relaxed))))
    }

    /// Goes on behind so many entries that were looked at.
    #[inline]
    pub fn advance(&mut self, entries: u64) {
        self.position += entries;
    }

    /// The next message, if there is one, with what stands before it. Looks at so many entries at most as one message can have.
    ///
    /// # Errors
    /// [`Violation`] if they are none that a sender may write.
    pub fn look(&self) -> Result<Option<Note>, Violation> {
        let mut prefixes = Prefixes::default();
        let mut last = None;
        for position in self.position.. {
            let entry = self.memory.entry(position);
            // Acquire: partner is the Release store in `LaneWriter::store`.
            let head = entry.head().load(Ordering::Acquire);
            let (found, expected) = (mark(head), mark(head_of(position, 0)));
            if found != expected {
                let is_none = last.is_none() && found == self.mark_before();
                return if is_none { Ok(None) } else { Err(Violation::Mark { found, expected }) };
            }
            let word = entry.body().load(Ordering::Relaxed);
            if kind(head) == MESSAGE {
                return Ok(Some(Note { prefixes, slot: slot(head), body: Body::from_word(word) }));
            }
            let prefix = Prefix::of_kind(kind(head))?;
            if word == 0 || slot(head) != 0 {
                return Err(Violation::EmptyPrefix { prefix: prefix.name() });
            }
            if last >= Some(prefix) {
                return Err(Violation::PrefixOrder { prefix: prefix.name() });
            }
            last = Some(prefix);
            prefixes = prefixes.with(prefix, word);
        }
        // The loop ends at the first entry that is no prefix of a higher kind.
        Ok(None)
    }

    /// Whether something stands where the next entry would be.
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        // Relaxed: `peek` and `look` do so again.
        mark(self.memory.entry(self.position).head().load(Ordering::Relaxed)) != self.mark_before()
    }

    /// Whether the entry is there that has `count` before it which were not read yet; then those are.
    #[inline]
    pub(crate) fn has(&self, count: u64) -> bool {
        let position = self.position + count;
        // Relaxed: `peek` and `look` do so at each.
        mark(self.memory.entry(position).head().load(Ordering::Relaxed)) == mark(head_of(position, 0))
    }

    /// The mark that stands where the next entry will be, until it is there.
    #[inline]
    fn mark_before(&self) -> u64 {
        mark(head_of(self.position.saturating_sub(self.memory.capacity()), 0))
    }

    /// Whether the sender has disconnected this receiver. To be asked after the bytes of a message were copied: if it
    /// has not, they are that message's.
    pub fn is_disconnected(&self) -> bool {
        // Partner: the fence in `disconnect_receiver`.
        fence(Ordering::Acquire);
        self.memory.head().part(|head| &head.dropped).load(Ordering::Relaxed) != 0
    }

    /// If the sender has said that nothing follows the entries read so far: how many messages it
    /// has left out behind them.
    #[inline]
    pub(crate) fn ending(&self) -> Option<u64> {
        let head = self.memory.head();
        // Acquire: partner is the Release store in `LaneWriter::close`.
        let closed = head.part(|head| &head.closed).load(Ordering::Acquire);
        (closed == self.position).then(|| head.part(|head| &head.left_out).load(Ordering::Relaxed))
    }

    /// Why the stream was broken off, if it was; once there is an [ending](Self::ending).
    pub(crate) fn abort(&self) -> Option<Abort> {
        // Relaxed: it came with the ending.
        Abort::from_word(self.memory.head().part(|head| &head.aborted).load(Ordering::Relaxed))
    }
}

#[cfg(any(test, loom))]
pub(crate) mod heap;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{heap::HeapLane, *};
    use crate::ring::entry::{PrefixSet, capacity_for};
    use proptest::prelude::*;

    fn body(length: u32) -> Body {
        Body::new(0, length)
    }

    fn note(slot: u32, prefixes: [u64; 4]) -> Note {
        let kinds = [Prefix::Gap, Prefix::Tag, Prefix::Time, Prefix::Origin];
        let prefixes =
            kinds.into_iter().zip(prefixes).fold(Prefixes::default(), |all, (kind, word)| all.with(kind, word));
        Note { prefixes, ..Note::plain(SlotId::new(slot), body(slot + 1)) }
    }

    #[test]
    fn entries_arrive_in_order_over_many_laps() {
        let memory = HeapLane::new(4);
        let (mut writer, mut reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
        for n in 0..4 * if cfg!(miri) { 10 } else { 600 } {
            assert_eq!(reader.look(), Ok(None));
            assert!(!reader.is_ready() && reader.peek().0 >= crate::limits::MAX_SLOTS.into());
            writer.message(SlotId::new(n), body(n + 1));
            assert!(reader.is_ready() && reader.has(0) && !reader.has(1));
            assert_eq!(reader.peek(), (n.into(), u64::from(n) + 1));
            assert_eq!(reader.look(), Ok(Some(note(n, [0; 4]))));
            reader.advance(1);
        }
    }

    #[test]
    fn messages_arrive_with_all_that_stands_before_them() {
        let memory = HeapLane::new(8);
        let (mut writer, mut reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
        for n in 0..64 {
            let prefixes = [0, 1, 2, 3].map(|kind| if n >> kind & 1 == 0 { 0 } else { u64::MAX - kind });
            let sent = note(n, prefixes);
            writer.prefixed(&sent);
            assert_eq!(reader.look(), Ok(Some(sent)));
            assert_eq!(sent.entries(), 1 + u64::from((n & 15).count_ones()));
            assert_eq!(
                reader.peek().0 < crate::limits::MAX_SLOTS.into(),
                prefixes == [0; 4],
                "only a plain message is one"
            );
            assert_eq!(reader.peek_tagged().is_some(), n & 3 == 2, "only a tag that stands first is one");
            reader.advance(sent.entries());
            writer.tagged(SlotId::new(n), body(n + 1), 7);
            assert_eq!(reader.peek_tagged(), Some((7, (n.into(), u64::from(n) + 1))));
            assert_eq!(reader.look(), Ok(Some(note(n, [0, 7, 0, 0]))));
            reader.advance(2);
            assert_eq!(reader.look(), Ok(None));
        }
    }

    #[test]
    fn prefixes_stand_once_before_a_message_and_in_their_order() {
        let gap = Prefix::Gap as u64;
        let tag = Prefix::Tag as u64;
        for (entries, violation) in [
            (&[(gap, 0, 0)][..], Violation::EmptyPrefix { prefix: "a gap" }),
            (&[(tag, 5, 1)], Violation::EmptyPrefix { prefix: "a tag" }),
            (&[(gap, 0, 1), (gap, 0, 1)], Violation::PrefixOrder { prefix: "a gap" }),
            (&[(tag, 0, 1), (gap, 0, 1)], Violation::PrefixOrder { prefix: "a gap" }),
            (&[(gap, 0, 1), (5, 0, 1)], Violation::Kind { kind: 5 }),
            // A prefix is published after its message.
            (&[(tag, 0, 1)], Violation::Mark { found: 0, expected: 2 }),
        ] {
            let memory = HeapLane::new(8);
            let (mut writer, reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
            entries.iter().for_each(|&(kind, slot, word)| writer.entry(kind, slot, word));
            assert_eq!(reader.look(), Err(violation));
        }
    }

    #[test]
    fn marks_begin_again_without_a_word_being_lost() {
        let memory = HeapLane::new(4);
        let position = (1 << 40) - 7;
        let mut writer = LaneWriter { memory: memory.clone(), position };
        let mut reader = LaneReader { memory, position };
        for n in 0..16 {
            assert!(n < 4 || !reader.is_ready());
            writer.message(SlotId::new(n), body(n + 1));
            assert!(reader.is_ready());
            assert_eq!(reader.peek(), (n.into(), u64::from(n) + 1));
            assert_eq!(reader.look(), Ok(Some(note(n, [0; 4]))));
            reader.advance(1);
        }
    }

    #[test]
    fn a_whole_lane_of_entries_is_kept() {
        let prefixes = PrefixSet::NONE.with(Prefix::Gap);
        assert_eq!(capacity_for(4, prefixes), 8);
        let memory = HeapLane::new(8);
        let (mut writer, mut reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
        for n in 0..4 {
            writer.prefixed(&note(n, [n.into(), 0, 0, 0]));
        }
        writer.close(3, Some(Abort::Code(7)));
        for n in 0..4 {
            assert_eq!(reader.ending(), None);
            assert!(n == 0 || reader.peek().0 >= crate::limits::MAX_SLOTS.into(), "a gap is no message");
            assert_eq!(reader.look(), Ok(Some(note(n, [n.into(), 0, 0, 0]))));
            reader.advance(if n == 0 { 1 } else { 2 });
        }
        assert_eq!(reader.look(), Ok(None));
        assert_eq!((reader.ending(), reader.abort()), (Some(3), Some(Abort::Code(7))));
    }

    proptest! {
        #![proptest_config(crate::tests::hostile::cases(256))]

        /// Whatever a peer writes into a lane, its reader answers with a message, with nothing, or
        /// with a violation, and never goes past the lane.
        #[test]
        fn random_lanes_are_survived(words in prop::collection::vec((any::<u64>(), 0..3u64), 8), small in any::<bool>()) {
            let memory = HeapLane::new(8);
            for (index, (head, body)) in words.iter().enumerate() {
                // Half of the runs keep near the marks and kinds that would be accepted.
                let head = if small { head_of(if index == 0 { 8 } else { index as u64 }, head & 7) + (head >> 63) } else { *head };
                memory.scribble(index, head, *body);
            }
            let mut reader = LaneReader::new(memory);
            let mut taken = 0;
            while let Ok(Some(note)) = reader.look() {
                reader.advance(note.entries());
                taken += note.entries();
                prop_assert!(taken <= 8, "one lap was written, more were read");
            }
            prop_assert_eq!(reader.position(), taken + 1);
        }
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::{heap::HeapLane, *};
    use loom::thread;

    /// A plain message, and one with prefixes: every message arrives once, in order, whole, with all that stands before it, and the
    /// bytes that were written before it are there.
    #[test]
    fn entries_arrive_whole_and_in_order() {
        loom::model(|| {
            let memory = HeapLane::new(4);
            let payload = loom::sync::Arc::new(loom::cell::UnsafeCell::new(0u32));
            let (mut writer, mut reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
            let sent = [
                Note::plain(SlotId::new(5), Body::new(0, 2)),
                Note {
                    prefixes: Prefixes::default().with(Prefix::Gap, 9).with(Prefix::Time, 3),
                    ..Note::plain(SlotId::new(6), Body::new(1, 2))
                },
            ];
            let bytes = payload.clone();
            let sender = thread::spawn(move || {
                bytes.with_mut(|p| {
                    // SAFETY: the reader looks only after it has taken the entry (invariant 2);
                    // loom checks just that.
                    #[allow(unsafe_code)]
                    unsafe {
                        *p = 7
                    }
                });
                writer.message(SlotId::new(5), sent[0].body);
                writer.prefixed(&sent[1]);
                writer.close(4, Some(Abort::Panic));
            });
            let mut seen = Vec::new();
            while seen.len() < 2 {
                // As a receiver does: messages the short way, the rest the long one.
                let note = match reader.peek() {
                    (slot @ 0..8, word) => Some(Note::plain(SlotId::new(slot as u32), Body::from_word(word))),
                    _ => reader.look().expect("an honest sender"),
                };
                match note {
                    Some(note) => {
                        seen.push(note);
                        reader.advance(note.entries());
                    }
                    None => thread::yield_now(),
                }
                if seen.len() == 1 {
                    let value = payload.with(|p| {
                        // SAFETY: the entry was taken (invariant 2); loom checks just that.
                        #[allow(unsafe_code)]
                        unsafe {
                            *p
                        }
                    });
                    assert_eq!(value, 7);
                }
            }
            assert_eq!(seen, sent);
            while reader.ending().is_none() {
                thread::yield_now();
            }
            assert_eq!((reader.ending(), reader.abort()), (Some(4), Some(Abort::Panic)));
            sender.join().unwrap();
        });
    }

    /// A message with a tag, the short way of both sides: the reader that sees the tag sees the message.
    #[test]
    fn a_tag_arrives_with_its_message() {
        loom::model(|| {
            let memory = HeapLane::new(4);
            let (mut writer, mut reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
            let sender =
                thread::spawn(move || (1..3).for_each(|n| writer.tagged(SlotId::new(n), Body::new(0, n), n.into())));
            for n in 1..3 {
                let found = loop {
                    match reader.peek_tagged() {
                        Some(found) => break found,
                        None => thread::yield_now(),
                    }
                };
                assert_eq!(found, (n, (n, n)));
                let note = reader.look().expect("an honest sender").expect("it is there");
                assert_eq!((u64::from(note.slot), note.body.word(), note.prefixes.word(Prefix::Tag)), (n, n, n));
                reader.advance(2);
            }
            sender.join().unwrap();
        });
    }
}
