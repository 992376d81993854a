//! The forward lane: a ring in the sender's memory through which it tells one receiver which slots
//! it lends. Single producer, single consumer, no shared indices. [`LaneReader::look`] checks the shape of what stands there.
//!
//! An entry is one [`LaneCell`], or two if the lane is wide; positions count cells. The head word carries a mark of the position it was
//! written at and is stored last, with Release; the reader polls the head word where the next entry will stand, so flag and
//! descriptor arrive in one transfer of a cache line. A message is written before the gap that stands before it: the reader that
//! sees the gap sees the message. The lane has room for every slot that the
//! sender can lend (see [`capacity_for`](super::entry::capacity_for)): it cannot overflow, so "full" is not among its states.

#[cfg(not(loom))]
use zerocopy::FromBytes;

use crate::{
    abort::Abort,
    points,
    ring::entry::{Body, GAP, LaneCell, LaneFormat, MESSAGE, Note, ORIGIN, head_of, kind, mark, slot},
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

/// The memory of a lane, as its sender has it. Positions are counted from the width of an entry on, so that the zeroes of fresh
/// memory stand at none.
pub trait WritableLane {
    /// Its head.
    fn head(&self) -> &LaneHead;
    /// The cell that stands at a position of the endless sequence.
    fn cell(&self, position: u64) -> &LaneCell;
    /// Two cells that lie side by side, of which the first stands at this position, if that is even.
    fn pair(&self, position: u64) -> [&LaneCell; 2];
}

/// The memory of a lane, as its receiver has it.
pub trait LaneMemory {
    /// Its head.
    fn head(&self) -> ReadOnly<'_, LaneHead>;
    /// The cell that stands at a position of the endless sequence.
    fn cell(&self, position: u64) -> ReadOnly<'_, LaneCell>;
    /// Two cells that lie side by side, of which the first stands at this position, if that is even.
    fn pair(&self, position: u64) -> [ReadOnly<'_, LaneCell>; 2];
    /// How many cells there are: a power of two that never changes.
    fn capacity(&self) -> u64;
}

/// A lane between two processes, as its sender has it.
#[cfg(not(loom))]
pub type LaneTable = crate::memory::Table<LaneHead, LaneCell>;

/// A lane between two processes, as its receiver has it.
#[cfg(not(loom))]
pub type LaneView = crate::memory::TableView<LaneHead, LaneCell>;

#[cfg(not(loom))]
impl WritableLane for LaneTable {
    #[inline]
    fn head(&self) -> &LaneHead {
        Self::head(self)
    }
    #[inline]
    fn cell(&self, position: u64) -> &LaneCell {
        self.at(position as usize)
    }
    #[inline]
    fn pair(&self, position: u64) -> [&LaneCell; 2] {
        Self::pair(self, position as usize)
    }
}

#[cfg(not(loom))]
impl LaneMemory for LaneView {
    #[inline]
    fn head(&self) -> ReadOnly<'_, LaneHead> {
        Self::head(self)
    }
    #[inline]
    fn cell(&self, position: u64) -> ReadOnly<'_, LaneCell> {
        self.at(position as usize)
    }
    #[inline]
    fn pair(&self, position: u64) -> [ReadOnly<'_, LaneCell>; 2] {
        Self::pair(self, position as usize)
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
    /// How many cells an entry has.
    width: u64,
    /// Where the next entry will stand.
    position: u64,
}

impl<M: WritableLane> LaneWriter<M> {
    /// Takes the writing end of fresh memory.
    pub fn new(memory: M, format: LaneFormat) -> Self {
        Self { memory, width: format.width(), position: format.width() }
    }

    /// The head of this lane.
    pub fn head(&self) -> &LaneHead {
        self.memory.head()
    }

    /// Publishes a message with which nothing goes. The caller lends the slot in its ledger, which is what keeps the lane
    /// from overflowing.
    pub fn message(&mut self, slot: SlotId, body: impl Into<Body>) {
        self.noted(&Note::plain(slot, body.into()));
    }

    /// Publishes a message, with its tag if the lane is `WIDE`: the caller knows, and this does not look.
    #[inline]
    pub(crate) fn simple<const WIDE: bool>(&mut self, slot: SlotId, body: Body, tag: u64) {
        debug_assert_eq!(self.width, 1 + u64::from(WIDE));
        let position = self.position;
        self.position += 1 + u64::from(WIDE);
        self.store::<WIDE>(position, head_of(position, MESSAGE) + u64::from(slot.number()), body.word(), [tag, 0]);
    }

    /// Publishes a message with all that goes with it, as far as the lane has room for it.
    pub fn noted(&mut self, note: &Note) {
        let last = self.position + (note.entries() - 1) * self.width;
        self.publish(last, head_of(last, MESSAGE) + u64::from(note.slot), note.body.word(), [note.tag, note.time]);
        if note.gap != 0 {
            self.publish(self.position, head_of(self.position, GAP), note.gap, [0; 2]);
        }
        self.position = last + self.width;
    }

    /// Publishes one entry, of any kind. An honest sender publishes whole messages.
    pub fn entry(&mut self, kind: u64, slot: u64, body: u64) {
        self.publish(self.position, head_of(self.position, kind) + slot, body, [0; 2]);
        self.position += self.width;
    }

    fn publish(&self, position: u64, head: u64, body: u64, beside: [u64; 2]) {
        match self.width {
            1 => self.store::<false>(position, head, body, beside),
            _ => self.store::<true>(position, head, body, beside),
        }
    }

    #[inline]
    fn store<const WIDE: bool>(&self, position: u64, head: u64, body: u64, [tag, time]: [u64; 2]) {
        let cell = if WIDE {
            let [cell, beside] = self.memory.pair(position);
            beside.first.store(tag, Ordering::Relaxed);
            beside.second.store(time, Ordering::Relaxed);
            cell
        } else {
            self.memory.cell(position)
        };
        cell.second.store(body, Ordering::Relaxed);
        points::reach("write: half an entry");
        // Release: partner is the Acquire load in `LaneReader::peek`. It carries the body, what is beside it, the message behind a
        // gap, and the bytes of the slot.
        cell.first.store(head, Ordering::Release);
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
    /// How many cells an entry has.
    width: u64,
    /// Where the next entry stands.
    position: u64,
}

impl<M: LaneMemory> LaneReader<M> {
    /// Takes the reading end of a lane from which nothing was read yet.
    pub fn new(memory: M, format: LaneFormat) -> Self {
        Self { memory, width: format.width(), position: format.width() }
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

    /// How many entries were read.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn entries(&self) -> u64 {
        self.position / self.width - 1
    }

    /// The slot that the next entry names, and the word of its [`Body`], if it is a message. If it is not, or there is
    /// none, the number of the slot is beyond all that can be: it is to be checked anyway, and one
    /// comparison does for both. Beside these the tag, if it is `WIDE`, and otherwise zero.
    #[inline]
    pub(crate) fn peek<const WIDE: bool>(&self) -> ((u64, u64), u64) {
        let (cell, beside) = if WIDE {
            let [cell, beside] = self.memory.pair(self.position);
            (cell, Some(beside))
        } else {
            (self.memory.cell(self.position), None)
        };
        // Acquire: partner is the Release store in `LaneWriter::store`.
        let slot = cell.first().load(Ordering::Acquire) ^ head_of(self.position, MESSAGE);
        let body = cell.second().load(Ordering::Relaxed);
        // Relaxed: it came with the head.
        ((slot, body), beside.map_or(0, |beside| beside.first().load(Ordering::Relaxed)))
    }

    /// Goes on behind what [`Self::peek`] looked at.
    #[inline]
    pub(crate) fn pass<const WIDE: bool>(&mut self) {
        self.position += 1 + u64::from(WIDE);
    }

    /// Goes on behind so many entries that were looked at.
    pub fn advance(&mut self, entries: u64) {
        self.position += entries * self.width;
    }

    /// The next message, if there is one, with what goes with it. Looks at two entries at most, as many as one message can have.
    ///
    /// # Errors
    /// [`Violation`] if they are none that a sender may write.
    pub fn look(&self) -> Result<Option<Note>, Violation> {
        let (mut gap, mut position) = (0, self.position);
        loop {
            let cell = self.memory.cell(position);
            // Acquire: partner is the Release store in `LaneWriter::store`.
            let head = cell.first().load(Ordering::Acquire);
            let (found, expected) = (mark(head), mark(head_of(position, 0)));
            if found != expected {
                let is_none = gap == 0 && found == self.mark_before();
                return if is_none { Ok(None) } else { Err(Violation::Mark { found, expected }) };
            }
            let word = cell.second().load(Ordering::Relaxed);
            match kind(head) {
                MESSAGE => {
                    let [tag, time] = self.beside(position);
                    return Ok(Some(Note { gap, slot: slot(head), body: Body::from_word(word), tag, time }));
                }
                GAP if word == 0 || slot(head) != 0 => return Err(Violation::EmptyPrefix { prefix: "a gap" }),
                GAP if gap != 0 => return Err(Violation::PrefixOrder { prefix: "a gap" }),
                GAP => (gap, position) = (word, position + self.width),
                ORIGIN => return Err(Violation::PrefixUndeclared { prefix: "an origin" }),
                kind => return Err(Violation::Kind { kind: kind as u8 }),
            }
        }
    }

    /// The tag and the time of the message at a position.
    fn beside(&self, position: u64) -> [u64; 2] {
        if self.width == 1 {
            return [0; 2];
        }
        let [_, beside] = self.memory.pair(position);
        // Relaxed: they came with the head.
        [beside.first(), beside.second()].map(|word| word.load(Ordering::Relaxed))
    }

    /// Whether something stands where the next entry would be.
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        // Relaxed: `peek` and `look` do so again.
        mark(self.memory.cell(self.position).first().load(Ordering::Relaxed)) != self.mark_before()
    }

    /// Whether the entry is there that has `count` before it which were not read yet; then those are.
    #[inline]
    pub(crate) fn has(&self, count: u64) -> bool {
        let position = self.position + count * self.width;
        // Relaxed: `peek` and `look` do so at each.
        mark(self.memory.cell(position).first().load(Ordering::Relaxed)) == mark(head_of(position, 0))
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
mod tests;

#[cfg(all(test, loom))]
mod model {
    use super::{heap::HeapLane, *};
    use loom::thread;

    /// A plain message, and one behind a gap: every message arrives once, in order, whole, with what stands before it, and the
    /// bytes that were written before it are there.
    #[test]
    fn entries_arrive_whole_and_in_order() {
        loom::model(|| {
            let payload = loom::sync::Arc::new(loom::cell::UnsafeCell::new(0u32));
            let (mut writer, mut reader) = HeapLane::ends(4, LaneFormat::WITH_GAPS);
            let sent = [
                Note::plain(SlotId::new(5), Body::new(0, 2)),
                Note { gap: 9, ..Note::plain(SlotId::new(6), Body::new(1, 2)) },
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
                writer.noted(&sent[1]);
                writer.close(4, Some(Abort::Panic));
            });
            let mut seen = Vec::new();
            while seen.len() < 2 {
                // As a receiver does: messages the short way, the rest the long one.
                let note = match reader.peek::<false>().0 {
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

    /// A wide lane, the short way of both sides: the reader that sees a message sees its own tag and time, also in cells of an
    /// earlier message that was handed back.
    #[test]
    fn what_is_beside_a_message_arrives_with_it() {
        loom::model(|| {
            let (mut writer, mut reader) = HeapLane::ends(4, LaneFormat { gaps: false, tags: true, times: true });
            let back = loom::sync::Arc::new(AtomicU64::new(0));
            let seen = back.clone();
            let sender = thread::spawn(move || {
                for n in 1..4 {
                    if n == 3 && back.load(Ordering::Acquire) == 0 {
                        return 2;
                    }
                    let note = Note { tag: n.into(), time: (10 * n).into(), ..Note::plain(SlotId::new(n), n.into()) };
                    match n {
                        1 => writer.simple::<true>(SlotId::new(n), n.into(), n.into()),
                        _ => writer.noted(&note),
                    }
                }
                3
            });
            let mut take = |n: u64| {
                let found = loop {
                    match reader.peek::<true>() {
                        (named, tag) if named.0 < 8 => break (named, tag),
                        _ => thread::yield_now(),
                    }
                };
                assert_eq!(found, ((n, n), n));
                let note = reader.look().expect("an honest sender").expect("it is there");
                assert_eq!((note.tag, note.time), (n, if n == 1 { 0 } else { 10 * n }));
                reader.advance(1);
            };
            take(1);
            seen.store(1, Ordering::Release);
            take(2);
            if sender.join().unwrap() == 3 {
                take(3);
            }
        });
    }
}
