//! The forward lane: a ring in the sender's memory through which it tells one receiver which slots
//! it lends. Single producer, single consumer, no shared indices.
//!
//! An entry is two words. The head word carries a mark of the position it was written at and is stored
//! last, with Release; the reader polls the head word where the next entry will stand, so flag and
//! descriptor arrive in one transfer of a cache line. The lane has room for every slot that the
//! sender can lend (see [`capacity_for`]): it cannot overflow, so "full" is not among its states.

#[cfg(not(loom))]
use zerocopy::FromBytes;

use crate::{
    abort::Abort,
    points,
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

/// One entry of the ring.
#[cfg_attr(not(loom), derive(FromBytes))]
#[repr(C)]
#[derive(Debug)]
pub struct Entry {
    /// `position << 24 | kind << 20 | slot`, stored last.
    head: AtomicU64,
    /// The length of a message in bytes; the number of messages left out, of a gap.
    body: AtomicU64,
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<LaneHead>() == 128 && align_of::<LaneHead>() == 128);
    assert!(size_of::<Entry>() == 16 && align_of::<Entry>() == 8);
    assert!(std::mem::offset_of!(Entry, head) == 0 && std::mem::offset_of!(Entry, body) == 8);
};

#[cfg(all(any(test, fuzzing), not(loom)))]
impl Entry {
    /// Writes any words, as a hostile peer would.
    pub fn scribble(&self, head: u64, body: u64) {
        self.head.store(head, Ordering::Relaxed);
        self.body.store(body, Ordering::Relaxed);
    }
}

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

/// How many bits of a head word name a slot, and how many say what kind of entry it is.
const SLOT_BITS: u32 = 20;
const KIND_BITS: u32 = 4;
const MESSAGE: u64 = 0;
const GAP: u64 = 1;
const _: () = assert!(crate::limits::MAX_SLOTS <= 1 << SLOT_BITS);

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

impl<'a> ReadOnly<'a, Entry> {
    #[inline]
    fn head(self) -> ReadOnly<'a, AtomicU64> {
        self.part(|entry| &entry.head)
    }

    #[inline]
    fn body(self) -> ReadOnly<'a, AtomicU64> {
        self.part(|entry| &entry.body)
    }
}

/// How many entries the lane has that joins a sender with `slots` slots to a receiver that does or
/// does not want to be skipped.
///
/// A slot that is lent has at most one message in the lane, and a message at most one gap before it.
/// A power of two, so that a position is masked, not divided.
#[must_use]
pub const fn capacity_for(slots: u32, skips: bool) -> usize {
    (slots as usize * if skips { 2 } else { 1 }).next_power_of_two()
}

/// What an entry says, still to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// So many bytes of the slot with this number are lent.
    Message(u32, u64),
    /// So many messages were left out for this receiver before the next one.
    Gap(u64),
}

/// The head word of an entry of some kind at a position, but for the slot. Its mark, the lower 40 bits of
/// the position, does not come again for 2⁴⁰ entries.
#[inline]
fn head_of(position: u64, kind: u64) -> u64 {
    (position << KIND_BITS | kind) << SLOT_BITS
}

/// The mark in a head word.
#[inline]
fn mark(head: u64) -> u64 {
    head >> (SLOT_BITS + KIND_BITS)
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
    pub fn message(&mut self, slot: SlotId, length: u32) {
        self.publish(MESSAGE, slot.number().into(), length.into());
    }

    /// Publishes that messages were left out before the next one, which is published at once.
    pub fn gap(&mut self, missed: u64) {
        self.publish(GAP, 0, missed);
    }

    #[inline]
    fn publish(&mut self, kind: u64, slot: u64, body: u64) {
        let (entry, position) = (self.memory.entry(self.position), self.position);
        self.position += 1;
        entry.body.store(body, Ordering::Relaxed);
        points::reach("write: half an entry");
        // Release: partner is the Acquire load in `LaneReader::peek`. It carries the body, and the
        // bytes of the slot.
        entry.head.store(head_of(position, kind) + slot, Ordering::Release);
    }

    /// Says that the receiver is disconnected, before any slot is used again that it has.
    pub(crate) fn drop_receiver(&self) {
        self.memory.head().dropped.store(1, Ordering::Relaxed);
        // Partner: the fence in `is_dropped`. A reader that sees a byte of a later message in a slot sees this.
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
    #[inline]
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The slot and the length that the next entry names, if it is a message. If it is not, or there is
    /// none, the number of the slot is beyond all that can be: it is to be checked anyway, and one
    /// comparison does for both.
    #[inline]
    pub(crate) fn peek(&self) -> (u64, u64) {
        let (entry, expected) = (self.memory.entry(self.position), head_of(self.position, MESSAGE));
        // Acquire: partner is the Release store in `LaneWriter::publish`.
        let slot = entry.head().load(Ordering::Acquire) ^ expected;
        (slot, entry.body().load(Ordering::Relaxed))
    }

    /// Goes on to the entry after the one that was looked at.
    #[inline]
    pub fn advance(&mut self) {
        self.position += 1;
    }

    /// The next entry, if there is one, whatever it is.
    ///
    /// # Errors
    /// [`Violation`] if the entry is not one that a sender may write.
    pub fn look(&self) -> Result<Option<Note>, Violation> {
        let entry = self.memory.entry(self.position);
        // Acquire: partner is the Release store in `LaneWriter::publish`.
        let head = entry.head().load(Ordering::Acquire);
        let (found, expected) = (mark(head), mark(head_of(self.position, 0)));
        if found != expected {
            return if found == self.mark_before() { Ok(None) } else { Err(Violation::Mark { found, expected }) };
        }
        let body = entry.body().load(Ordering::Relaxed);
        Ok(Some(match head >> SLOT_BITS & ((1 << KIND_BITS) - 1) {
            MESSAGE => Note::Message((head & ((1 << SLOT_BITS) - 1)) as u32, body),
            GAP if body == 0 => return Err(Violation::EmptyGap),
            GAP => Note::Gap(body),
            kind => return Err(Violation::Kind(kind as u8)),
        }))
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
    pub fn is_dropped(&self) -> bool {
        // Partner: the fence in `drop_receiver`.
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

/// A lane on the heap of one process, for tests and models.
#[cfg(any(test, loom))]
pub(crate) mod heap {
    use super::*;
    use crate::{memory::wrapping::Ring, wait};

    #[cfg(loom)]
    use loom::sync::Arc;
    #[cfg(not(loom))]
    use std::sync::Arc;

    #[derive(Debug, Clone)]
    pub(crate) struct HeapLane(Arc<(LaneHead, Ring<Entry>)>);

    impl HeapLane {
        pub(crate) fn new(capacity: usize) -> Self {
            let head = LaneHead {
                flag: wait::Flag::new(),
                closed: AtomicU64::new(0),
                left_out: AtomicU64::new(0),
                aborted: AtomicU64::new(0),
                last_ring: LastRing::new(),
                dropped: AtomicU64::new(0),
            };
            let ring = Ring::new(capacity, || Entry { head: AtomicU64::new(0), body: AtomicU64::new(0) });
            Self(Arc::new((head, ring)))
        }

        /// Writes any words into the ring, as a hostile peer would.
        #[cfg(not(loom))]
        pub(crate) fn scribble(&self, index: usize, head: u64, body: u64) {
            self.0.1.at(index).scribble(head, body);
        }
    }

    impl WritableLane for HeapLane {
        fn head(&self) -> &LaneHead {
            &self.0.0
        }
        fn entry(&self, position: u64) -> &Entry {
            self.0.1.at(position as usize)
        }
    }

    impl LaneMemory for HeapLane {
        fn head(&self) -> ReadOnly<'_, LaneHead> {
            ReadOnly::of(&self.0.0)
        }
        fn entry(&self, position: u64) -> ReadOnly<'_, Entry> {
            ReadOnly::of(self.0.1.at(position as usize))
        }
        fn capacity(&self) -> u64 {
            self.0.1.iter().count() as u64
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{heap::HeapLane, *};
    use proptest::prelude::*;

    #[test]
    fn entries_arrive_in_order_over_many_laps() {
        let memory = HeapLane::new(4);
        let (mut writer, mut reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
        for n in 0..4 * if cfg!(miri) { 10 } else { 600 } {
            assert_eq!(reader.look(), Ok(None));
            assert!(!reader.is_ready() && reader.peek().0 >= crate::limits::MAX_SLOTS.into());
            writer.message(SlotId::new(n), n + 1);
            assert!(reader.is_ready() && reader.has(0) && !reader.has(1));
            assert_eq!(reader.peek(), (n.into(), u64::from(n) + 1));
            assert_eq!(reader.look(), Ok(Some(Note::Message(n, u64::from(n) + 1))));
            reader.advance();
        }
    }

    #[test]
    fn marks_begin_again_without_a_word_being_lost() {
        let memory = HeapLane::new(4);
        let position = (1 << (u64::BITS - KIND_BITS - SLOT_BITS)) - 7;
        let mut writer = LaneWriter { memory: memory.clone(), position };
        let mut reader = LaneReader { memory, position };
        for n in 0..16 {
            assert!(n < 4 || !reader.is_ready());
            writer.message(SlotId::new(n), n);
            assert!(reader.is_ready());
            assert_eq!(reader.peek(), (n.into(), n.into()));
            assert_eq!(reader.look(), Ok(Some(Note::Message(n, n.into()))));
            reader.advance();
        }
    }

    #[test]
    fn a_whole_lane_of_entries_is_kept() {
        let memory = HeapLane::new(8);
        let (mut writer, mut reader) = (LaneWriter::new(memory.clone()), LaneReader::new(memory));
        for n in 1..=8 {
            writer.gap(n);
        }
        writer.close(3, Some(Abort::Code(7)));
        for n in 1..=8 {
            assert_eq!(reader.ending(), None);
            assert!(reader.peek().0 >= crate::limits::MAX_SLOTS.into(), "a gap is no message");
            assert_eq!(reader.look(), Ok(Some(Note::Gap(n))));
            reader.advance();
        }
        assert_eq!(reader.look(), Ok(None));
        assert_eq!((reader.ending(), reader.abort()), (Some(3), Some(Abort::Code(7))));
    }

    #[test]
    fn capacity_holds_a_message_for_each_slot_and_a_gap_for_each_message() {
        for slots in [1, 2, 3, 64, 1000, crate::limits::MAX_SLOTS] {
            assert!(capacity_for(slots, false) >= slots as usize);
            assert!(capacity_for(slots, true) >= 2 * slots as usize);
            assert!(capacity_for(slots, false).is_power_of_two() && capacity_for(slots, true).is_power_of_two());
        }
    }

    proptest! {
        #![proptest_config(crate::tests::hostile::cases(256))]

        /// Whatever a peer writes into a lane, its reader answers with an entry, with nothing, or
        /// with a violation, and never goes past the lane.
        #[test]
        fn random_lanes_are_survived(words in prop::collection::vec((any::<u64>(), any::<u64>()), 8), small in any::<bool>()) {
            let memory = HeapLane::new(8);
            for (index, (head, body)) in words.iter().enumerate() {
                // Half of the runs keep near the marks and kinds that would be accepted.
                let head = if small { head_of(if index == 0 { 8 } else { index as u64 }, head & 3) + (head >> 60) } else { *head };
                memory.scribble(index, head, *body);
            }
            let mut reader = LaneReader::new(memory);
            let mut taken = 0;
            while let Ok(Some(_)) = reader.look() {
                reader.advance();
                taken += 1;
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

    /// Two laps over a lane of two: every entry arrives once, in order, whole, and the bytes that
    /// were written before it are there.
    #[test]
    fn entries_arrive_whole_and_in_order() {
        loom::model(|| {
            let memory = HeapLane::new(2);
            let payload = loom::sync::Arc::new(loom::cell::UnsafeCell::new(0u32));
            let mut writer = LaneWriter::new(memory.clone());
            let mut reader = LaneReader::new(memory);
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
                writer.message(SlotId::new(5), 2);
                writer.gap(9);
                writer.close(4, Some(Abort::Panic));
            });
            let mut seen = Vec::new();
            while seen.len() < 2 {
                // As a receiver does: messages the short way, the rest the long one.
                let note = match reader.peek() {
                    (slot @ 0..8, length) => Some(Note::Message(slot as u32, length)),
                    _ => reader.look().expect("an honest sender"),
                };
                match note {
                    Some(note) => {
                        seen.push(note);
                        reader.advance();
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
            assert_eq!(seen, [Note::Message(5, 2), Note::Gap(9)]);
            while reader.ending().is_none() {
                thread::yield_now();
            }
            assert_eq!((reader.ending(), reader.abort()), (Some(4), Some(Abort::Panic)));
            sender.join().unwrap();
        });
    }
}
