//! The return board: words in the receiver's memory, one for each slot of the sender, by which it
//! hands slots back.
//!
//! The word of a slot holds the mark of the last message that lent it and was dropped. A slot that is
//! held has one holder, so any thread may hand it back with one plain store: there is no index to
//! claim, no lock to take, and nothing to overflow. And there is nothing to forge: a word can only
//! give back the slot it stands for, and only the lending it names.

use std::ops::Range;
#[cfg(not(loom))]
use std::os::fd::BorrowedFd;

#[cfg(not(loom))]
use zerocopy::FromBytes;

use crate::{
    abort::Abort,
    slot::{Mark, SlotId},
    sync::{AtomicU64, Ordering, read_only::ReadOnly},
    wait::{Flag, LastRing},
};
#[cfg(not(loom))]
use crate::{memory::MemoryError, socket::link_message::LinkEnd};

/// The head of a board.
#[cfg_attr(not(loom), derive(FromBytes))]
#[repr(C, align(128))]
#[derive(Debug)]
pub struct BoardHead {
    /// The receiver's flag: parked, gone.
    pub(crate) flag: Flag,
    /// Once the receiver is gone: the number of the first message that it did not read.
    next: AtomicU64,
    /// Once the receiver is gone, and not in order: why, as [`Abort::to_word`].
    aborted: AtomicU64,
    /// When the receiver rang last.
    pub(crate) last_ring: LastRing,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<BoardHead>() == 128 && align_of::<BoardHead>() == 128);

#[cfg(all(any(test, fuzzing), not(loom)))]
impl BoardHead {
    /// Writes any words, as a hostile peer would.
    pub fn scribble(&self, flag: u64, next: u64) {
        self.flag.scribble(flag);
        self.next.store(next, Ordering::Relaxed);
        self.aborted.store(next, Ordering::Relaxed);
    }
}

/// The memory of a board, as its receiver has it.
pub trait WritableBoard {
    /// Its head.
    fn head(&self) -> &BoardHead;
    /// The word of a slot.
    fn word(&self, slot: SlotId) -> &AtomicU64;
}

/// The memory of a board, as its sender has it.
pub trait BoardMemory {
    /// Its head.
    fn head(&self) -> ReadOnly<'_, BoardHead>;
    /// The word of a slot.
    fn word(&self, slot: SlotId) -> ReadOnly<'_, AtomicU64>;
    /// The words of slots one behind the other; none if there are not so many.
    fn words(&self, slots: Range<usize>) -> ReadOnly<'_, [AtomicU64]>;
}

/// A board between two processes, as its receiver has it.
#[cfg(not(loom))]
pub type BoardTable = crate::memory::Table<BoardHead, AtomicU64>;

/// A board between two processes, as its sender has it.
#[cfg(not(loom))]
pub type BoardView = crate::memory::TableView<BoardHead, AtomicU64>;

#[cfg(not(loom))]
impl WritableBoard for BoardTable {
    #[inline]
    fn head(&self) -> &BoardHead {
        Self::head(self)
    }
    #[inline]
    fn word(&self, slot: SlotId) -> &AtomicU64 {
        self.at(slot.index())
    }
}

#[cfg(not(loom))]
impl BoardMemory for BoardView {
    #[inline]
    fn head(&self) -> ReadOnly<'_, BoardHead> {
        Self::head(self)
    }
    #[inline]
    fn word(&self, slot: SlotId) -> ReadOnly<'_, AtomicU64> {
        self.at(slot.index())
    }
    #[inline]
    fn words(&self, slots: Range<usize>) -> ReadOnly<'_, [AtomicU64]> {
        self.slice(slots)
    }
}

impl<'a> ReadOnly<'a, BoardHead> {
    /// The receiver's flag.
    #[inline]
    #[must_use]
    pub fn flag(self) -> ReadOnly<'a, Flag> {
        self.part(|head| &head.flag)
    }

    /// When the receiver rang last.
    #[must_use]
    pub fn last_ring(self) -> ReadOnly<'a, LastRing> {
        self.part(|head| &head.last_ring)
    }
}

/// The receiver's end. Shared by all threads that hold something.
#[derive(Debug)]
pub struct BoardWriter<M>(M);

impl<M: WritableBoard> BoardWriter<M> {
    /// Takes the writing end of fresh memory.
    pub fn new(memory: M) -> Self {
        Self(memory)
    }

    /// The head of this board.
    #[inline]
    pub fn head(&self) -> &BoardHead {
        self.0.head()
    }

    /// Hands a slot back that came with the message of this mark. By its one holder.
    #[inline]
    pub fn hand_back(&self, slot: SlotId, mark: Mark) {
        // Release: partner is the Acquire load in `BoardReader::has`. All reading of the slot comes
        // before the sender writes it again.
        self.0.word(slot).store(mark.word(), Ordering::Release);
    }

    /// Whether the slot was handed back by the holder of the message of this mark.
    pub(crate) fn is_back(&self, slot: SlotId, mark: Mark) -> bool {
        // Relaxed: it is asked once the sender has lent the slot again, which it does only after it
        // has seen the word; that came with the entry.
        self.0.word(slot).load(Ordering::Relaxed) == mark.word()
    }

    /// Says that no message from this number on was ever read, nor will be, and why if it is not in order.
    pub(crate) fn leave(&self, next: u64, abort: Option<Abort>) {
        self.head().next.store(next, Ordering::Relaxed);
        self.head().aborted.store(Abort::to_word(abort), Ordering::Relaxed);
        self.head().flag.leave();
    }
}

#[cfg(not(loom))]
impl BoardWriter<BoardTable> {
    /// Has the words of the first so many slots exist, before any of them is handed back.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn provide(&self, slots: u32) -> Result<(), MemoryError> {
        self.0.provide(slots as usize)
    }
}

#[cfg(not(loom))]
impl BoardReader<BoardView> {
    /// Maps the board of a receiver, with the words of all of so many slots.
    ///
    /// # Errors
    /// [`LinkEnd`]: it is not what a receiver may send, or there is no memory.
    pub fn attach(board: BorrowedFd<'_>, slots: u32) -> Result<Self, LinkEnd> {
        Self::attach_first(board, slots, slots)
    }

    /// As [`Self::attach`], with the words of the first so many of them. Those of others are to be
    /// [provided](Self::provide) before they are looked at: a page that does not exist may find no memory then, which ends
    /// this process with SIGBUS.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_first(board: BorrowedFd<'_>, most_slots: u32, slots: u32) -> Result<Self, LinkEnd> {
        let board = Self(BoardView::attach_growing(board, most_slots as usize)?);
        board.provide(slots).map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
        Ok(board)
    }

    /// The same, of a receiver of this user, if it is another than that of this process: another thread unmaps it.
    pub(crate) fn made_by(self, user: Option<u32>) -> Self {
        Self(self.0.made_by(user))
    }

    /// Has the words of the first so many slots exist, before any of them is lent.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn provide(&self, slots: u32) -> Result<(), MemoryError> {
        self.0.provide(slots as usize)
    }
}

/// The sender's end.
#[derive(Debug)]
pub struct BoardReader<M>(M);

impl<M: BoardMemory> BoardReader<M> {
    /// Takes the reading end.
    pub fn new(memory: M) -> Self {
        Self(memory)
    }

    /// The head of this board.
    #[inline]
    pub fn head(&self) -> ReadOnly<'_, BoardHead> {
        self.0.head()
    }

    /// Whether the slot that was lent with the message of this mark is back.
    #[inline]
    pub fn is_back(&self, slot: SlotId, mark: Mark) -> bool {
        is_back(self.0.word(slot), mark)
    }

    /// Slots with these marks, one behind the other from a first one on: each with its mark, and whether it
    /// is back.
    #[inline]
    pub(crate) fn look_through(&self, first: SlotId, marks: &[Mark]) -> impl Iterator<Item = (SlotId, Mark, bool)> {
        let words = self.0.words(first.index()..first.index() + marks.len());
        let looks = marks.iter().zip(words.iter()).enumerate();
        looks.map(move |(index, (&mark, word))| (SlotId::new(first.number() + index as u32), mark, is_back(word, mark)))
    }

    /// If the receiver is gone: the number of the first message that it never read, and so does not hold.
    pub(crate) fn left_at(&self) -> Option<u64> {
        self.head().flag().read().gone().then(|| self.head().part(|head| &head.next).load(Ordering::Relaxed))
    }

    /// If the receiver is gone, and not in order: why.
    pub(crate) fn abort(&self) -> Option<Abort> {
        let gone = self.head().flag().read().gone();
        gone.then(|| Abort::from_word(self.head().part(|head| &head.aborted).load(Ordering::Relaxed))).flatten()
    }
}

/// The bits of a word that tell a message. [`Mark::OUT`] has one more.
const MESSAGE_BITS: u64 = u64::MAX >> 1;
const _: () = assert!(crate::limits::MAX_SEQUENCE < MESSAGE_BITS && Mark::OUT.word() > MESSAGE_BITS);

/// Whether what a word stands for, lent with the message of this mark, is back. What is not lent never is, whatever stands
/// there.
#[inline]
fn is_back(word: ReadOnly<'_, AtomicU64>, mark: Mark) -> bool {
    // Acquire: partner is the Release store in `BoardWriter::hand_back`.
    word.load(Ordering::Acquire) & MESSAGE_BITS == mark.word()
}

/// A board on the heap of one process, for tests and models.
#[cfg(any(test, loom))]
pub(crate) mod heap {
    use super::*;
    use crate::memory::wrapping::WrappingTable;

    #[cfg(loom)]
    use loom::sync::Arc;
    #[cfg(not(loom))]
    use std::sync::Arc;

    #[derive(Debug, Clone)]
    pub(crate) struct HeapBoard(Arc<(BoardHead, WrappingTable<AtomicU64>)>);

    impl HeapBoard {
        pub(crate) fn new(slots: usize) -> Self {
            let head = BoardHead {
                flag: Flag::new(),
                next: AtomicU64::new(0),
                aborted: AtomicU64::new(0),
                last_ring: LastRing::new(),
            };
            Self(Arc::new((head, WrappingTable::new(slots, || AtomicU64::new(0)))))
        }
    }

    impl WritableBoard for HeapBoard {
        fn head(&self) -> &BoardHead {
            &self.0.0
        }
        fn word(&self, slot: SlotId) -> &AtomicU64 {
            self.0.1.at(slot.index())
        }
    }

    impl BoardMemory for HeapBoard {
        fn head(&self) -> ReadOnly<'_, BoardHead> {
            ReadOnly::of(&self.0.0)
        }
        fn word(&self, slot: SlotId) -> ReadOnly<'_, AtomicU64> {
            ReadOnly::of(self.0.1.at(slot.index()))
        }
        fn words(&self, slots: Range<usize>) -> ReadOnly<'_, [AtomicU64]> {
            ReadOnly::of(self.0.1.slice(slots))
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{heap::HeapBoard, *};

    #[test]
    fn only_the_lending_that_was_handed_back_is_back() {
        let memory = HeapBoard::new(2);
        let (writer, reader) = (BoardWriter::new(memory.clone()), BoardReader::new(memory));
        assert!(!reader.is_back(SlotId::new(0), Mark::of(0)));
        writer.hand_back(SlotId::new(0), Mark::of(0));
        assert!(reader.is_back(SlotId::new(0), Mark::of(0)));
        assert!(!reader.is_back(SlotId::new(0), Mark::of(1)), "an older return does not count for a newer lending");
        assert!(!reader.is_back(SlotId::new(1), Mark::of(0)));
    }

    #[test]
    fn what_is_not_lent_is_not_back_whatever_the_receiver_writes() {
        let memory = HeapBoard::new(1);
        let reader = BoardReader::new(memory.clone());
        for word in [Mark::OUT.word(), MESSAGE_BITS, 1 << 63, 0] {
            WritableBoard::word(&memory, SlotId::new(0)).store(word, Ordering::Relaxed);
            assert!(!reader.is_back(SlotId::new(0), Mark::OUT), "{word:x}");
        }
    }

    #[test]
    fn a_receiver_that_left_says_how_far_it_read() {
        let memory = HeapBoard::new(1);
        let (writer, reader) = (BoardWriter::new(memory.clone()), BoardReader::new(memory));
        assert_eq!(reader.left_at(), None);
        writer.leave(17, Some(Abort::Panic));
        assert_eq!(reader.left_at(), Some(17));
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::{heap::HeapBoard, *};
    use loom::{cell::UnsafeCell, sync::Arc, thread};

    /// A receiver that leaves says how far it has read, and reads nothing any more.
    #[test]
    fn a_receiver_that_left_no_longer_reads() {
        loom::model(|| {
            let memory = HeapBoard::new(1);
            let (writer, reader) = (BoardWriter::new(memory.clone()), BoardReader::new(memory));
            let slot = Arc::new(UnsafeCell::new(1u8));
            let bytes = slot.clone();
            let receiver = thread::spawn(move || {
                bytes.with(|p| {
                    // SAFETY: lent, so not written (invariant 2); loom checks just that.
                    #[allow(unsafe_code)]
                    unsafe {
                        assert_eq!(*p, 1)
                    }
                });
                writer.leave(17, Some(Abort::Panic));
            });
            loop {
                match reader.left_at() {
                    None => thread::yield_now(),
                    Some(read) => break assert_eq!(read, 17),
                }
            }
            slot.with_mut(|p| {
                // SAFETY: its reader has left (invariant 2); loom checks just that.
                #[allow(unsafe_code)]
                unsafe {
                    *p = 2
                }
            });
            receiver.join().unwrap();
        });
    }

    /// Two threads hand two slots back; the sender writes a slot again only after it was read.
    #[test]
    fn a_returned_slot_is_no_longer_read() {
        loom::model(|| {
            let memory = HeapBoard::new(2);
            let writer = Arc::new(BoardWriter::new(memory.clone()));
            let reader = BoardReader::new(memory);
            let slots = Arc::new([UnsafeCell::new(1u8), UnsafeCell::new(2u8)]);
            let holders: Vec<_> = (0..2u32)
                .map(|index| {
                    let (writer, slots) = (writer.clone(), slots.clone());
                    thread::spawn(move || {
                        slots[index as usize].with(|p| {
                            // SAFETY: lent, so not written (invariant 2); loom checks just that.
                            #[allow(unsafe_code)]
                            unsafe {
                                assert_eq!(u32::from(*p), index + 1)
                            }
                        });
                        writer.hand_back(SlotId::new(index), Mark::of(index.into()));
                    })
                })
                .collect();
            for index in 0..2u32 {
                while !reader.is_back(SlotId::new(index), Mark::of(index.into())) {
                    thread::yield_now();
                }
                slots[index as usize].with_mut(|p| {
                    // SAFETY: back, so not read any more (invariant 2); loom checks just that.
                    #[allow(unsafe_code)]
                    unsafe {
                        *p = 9
                    }
                });
            }
            for holder in holders {
                holder.join().unwrap();
            }
        });
    }
}
