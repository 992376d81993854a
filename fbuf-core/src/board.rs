//! The return board: words in the receiver's memory, one for each slot of the sender, by which it
//! hands slots back.
//!
//! The word of a slot holds the lane position of the last message that lent it and was dropped, plus
//! one. A slot that is held has one holder, so any thread may hand it back with one plain store:
//! there is no index to claim, no lock to take, and nothing to overflow. And there is nothing to
//! forge: a word can only give back the slot it stands for, and only the lending it names.

#[cfg(not(loom))]
use zerocopy::FromBytes;

use crate::{
    park::{Flag, Rang},
    slot::SlotId,
    sync::{AtomicU64, Ordering},
};

/// The head of a board.
#[cfg_attr(not(loom), derive(FromBytes))]
#[repr(C, align(128))]
#[derive(Debug)]
pub struct BoardHead {
    /// The receiver's flag: parked, gone.
    pub flag: Flag,
    /// Once the receiver is gone: how many lane entries it had read.
    read: AtomicU64,
    /// When the receiver rang last.
    pub rang: Rang,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<BoardHead>() == 128 && align_of::<BoardHead>() == 128);

#[cfg(all(test, not(loom)))]
impl BoardHead {
    /// Writes any words, as a hostile peer would.
    pub(crate) fn scribble(&self, flag: u64, read: u64) {
        self.flag.scribble(flag);
        self.read.store(read, Ordering::Relaxed);
    }
}

/// The memory of a board, as seen from either end.
pub trait BoardMemory {
    /// Its head.
    fn head(&self) -> &BoardHead;
    /// The word of a slot.
    fn word(&self, slot: SlotId) -> &AtomicU64;
}

/// A board between two processes.
#[cfg(not(loom))]
pub type BoardTable = crate::memory::Table<BoardHead, AtomicU64>;

#[cfg(not(loom))]
impl BoardMemory for BoardTable {
    #[inline]
    fn head(&self) -> &BoardHead {
        Self::head(self)
    }
    #[inline]
    fn word(&self, slot: SlotId) -> &AtomicU64 {
        self.at(slot.index())
    }
}

/// The receiver's end. Shared by all threads that hold something.
#[derive(Debug)]
pub struct BoardWriter<M>(M);

impl<M: BoardMemory> BoardWriter<M> {
    /// Takes the writing end of fresh memory.
    pub fn new(memory: M) -> Self {
        Self(memory)
    }

    /// The head of this board.
    #[inline]
    pub fn head(&self) -> &BoardHead {
        self.0.head()
    }

    /// Hands back the slot that was lent by the entry at `position`. By its one holder.
    #[inline]
    pub fn hand_back(&self, slot: SlotId, position: u64) {
        // Release: partner is the Acquire load in `BoardReader::has`. All reading of the slot comes
        // before the sender writes it again.
        self.0.word(slot).store(position + 1, Ordering::Release);
    }

    /// Whether the slot, lent by the entry at `position`, was handed back by its holder.
    pub fn is_back(&self, slot: SlotId, position: u64) -> bool {
        // Relaxed: it is asked once the sender has lent the slot again, which it does only after it
        // has seen the word; that came with the entry.
        self.0.word(slot).load(Ordering::Relaxed) == position + 1
    }

    /// Says that only the first `read` entries of the lane were ever read, and no more will be.
    pub fn leave(&self, read: u64) {
        self.head().read.store(read, Ordering::Relaxed);
        self.head().flag.leave();
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
    pub fn head(&self) -> &BoardHead {
        self.0.head()
    }

    /// Whether the slot, lent by the entry at `position`, is back.
    #[inline]
    pub fn has(&self, slot: SlotId, position: u64) -> bool {
        // Acquire: partner is the Release store in `BoardWriter::hand_back`.
        self.0.word(slot).load(Ordering::Acquire) == position + 1
    }

    /// If the receiver is gone: how many entries it has read. What it never read, it does not hold.
    pub fn left_at(&self) -> Option<u64> {
        self.head().flag.read().gone().then(|| self.head().read.load(Ordering::Relaxed))
    }
}

/// A board on the heap of one process, for tests and models.
#[cfg(any(test, loom))]
pub(crate) mod heap {
    use super::*;
    use crate::ring::Ring;

    #[cfg(loom)]
    use loom::sync::Arc;
    #[cfg(not(loom))]
    use std::sync::Arc;

    #[derive(Debug, Clone)]
    pub(crate) struct HeapBoard(Arc<(BoardHead, Ring<AtomicU64>)>);

    impl HeapBoard {
        pub(crate) fn new(slots: usize) -> Self {
            let head = BoardHead { flag: Flag::new(), read: AtomicU64::new(0), rang: Rang::new() };
            Self(Arc::new((head, Ring::new(slots, || AtomicU64::new(0)))))
        }
    }

    impl BoardMemory for HeapBoard {
        fn head(&self) -> &BoardHead {
            &self.0.0
        }
        fn word(&self, slot: SlotId) -> &AtomicU64 {
            self.0.1.at(slot.index())
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
        assert!(!reader.has(SlotId::new(0), 0));
        writer.hand_back(SlotId::new(0), 0);
        assert!(reader.has(SlotId::new(0), 0));
        assert!(!reader.has(SlotId::new(0), 1), "an older return does not count for a newer lending");
        assert!(!reader.has(SlotId::new(1), 0));
    }

    #[test]
    fn a_receiver_that_left_says_how_far_it_read() {
        let memory = HeapBoard::new(1);
        let (writer, reader) = (BoardWriter::new(memory.clone()), BoardReader::new(memory));
        assert_eq!(reader.left_at(), None);
        writer.leave(17);
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
                writer.leave(17);
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
                        writer.hand_back(SlotId::new(index), u64::from(index) + 5);
                    })
                })
                .collect();
            for index in 0..2u32 {
                while !reader.has(SlotId::new(index), u64::from(index) + 5) {
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
