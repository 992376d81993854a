//! What a received message keeps alive: the mappings of its link. The link may end first; then they
//! stay until the last message is dropped, on whatever thread. A count would cost a shared
//! read-modify-write for each message, so there is none: the receiver marks the slots it holds, and
//! only when a link ends while some are marked does anybody look.

use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
#[cfg(not(loom))]
use zerocopy::FromZeros;

#[cfg(not(loom))]
use crate::memory::MemoryError;

use crate::{
    memory::wrapping::WrappingTable,
    ring::board::{BoardWriter, WritableBoard},
    slot::{Mark, SlotId},
    sync::{AtomicPtr, AtomicU32, AtomicU64, Mutex, Ordering, fence, yield_now},
    wait::Fencing,
};

/// What a receiver knows of the slots of a link: where their bytes are, and which of them it holds.
#[derive(Debug)]
pub struct Held {
    cells: WrappingTable<Cell>,
    /// How many slots are known: no cell behind them has ever been looked at. Not modelled: it is written by the
    /// receiver only; all other code reads it with a lock, or for a report.
    known: std::sync::atomic::AtomicUsize,
}

/// One slot, as its receiver knows it.
#[cfg_attr(not(loom), derive(FromZeros))]
#[derive(Debug)]
pub struct Cell {
    /// Where its bytes are. Written and read by the receiver only.
    bytes: AtomicPtr<u8>,
    /// The mark of the message that is held in it, or [`FREE`], or [`UNKNOWN`].
    mark: AtomicU64,
}

/// Why a slot is not to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untaken {
    /// There is no such slot, or its holder has not handed it back.
    Held,
    /// Its holder has handed it back, and did not get to clear the mark yet: to be tried again.
    NotCleared,
}

/// For how long the processor is left again and again to a holder that is about to clear its mark, and for how long then.
const PATIENCE: Duration = Duration::from_micros(50);

/// Nothing is held in the slot.
const FREE: u64 = Mark::OUT.word();
/// It was not announced yet: so is memory that was never written.
const UNKNOWN: u64 = Mark::NONE.word();
const _: () = assert!(UNKNOWN == 0);

impl Held {
    /// No slot is known of `slots` that there may be. They take memory once they are.
    ///
    /// # Errors
    /// [`MemoryError`]
    #[cfg(not(loom))]
    pub fn new(slots: usize) -> Result<Self, MemoryError> {
        Ok(Self { cells: WrappingTable::of_zeroes(slots)?, known: 0.into() })
    }

    /// No slot is known of `slots` that there may be.
    #[cfg(loom)]
    pub fn new(slots: usize) -> Result<Self, std::convert::Infallible> {
        let cell = || Cell { bytes: AtomicPtr::default(), mark: AtomicU64::new(UNKNOWN) };
        Ok(Self { cells: WrappingTable::new(slots, cell), known: 0.into() })
    }

    /// Enters a slot, and where its bytes are. By the receiver only.
    pub fn add(&self, slot: SlotId, bytes: *mut u8) {
        let cell = self.cells.at(slot.index());
        cell.bytes.store(bytes, Ordering::Relaxed);
        cell.mark.store(FREE, Ordering::Relaxed);
        self.known.fetch_max(slot.index() + 1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Marks a slot as held with a message; none if there is no such slot, or it is held already. By the
    /// receiver only.
    #[inline]
    pub fn take(&self, number: u64, message: Mark) -> Option<&Cell> {
        let cell = self.cells.get(number)?;
        // Acquire: partner is the Release store in `clear`, by whichever thread held it last.
        if cell.mark.load(Ordering::Acquire) != FREE {
            return None;
        }
        cell.mark.store(message.word(), Ordering::Relaxed);
        Some(cell)
    }

    /// As [`Self::take`], for a slot that could not be taken. A holder hands its slot back and clears
    /// the mark a moment later; the sender may have lent it again by then. Waits for that moment, but not longer than some
    /// 100 µs: the holder may not be running, and cannot run while a thread of a higher real-time priority waits for it
    /// on its processor. So the wait ends with a sleep.
    ///
    /// # Errors
    /// [`Untaken`]
    pub fn take_patiently<M: WritableBoard>(
        &self,
        number: u64,
        message: Mark,
        board: &BoardWriter<M>,
    ) -> Result<&Cell, Untaken> {
        let cell = self.cells.get(number).ok_or(Untaken::Held)?;
        let begin = Instant::now();
        loop {
            // Acquire: as in `take`.
            let held = cell.mark.load(Ordering::Acquire);
            if held == FREE {
                return self.take(number, message).ok_or(Untaken::Held);
            }
            // The word of a slot that is not known need not exist.
            if held == UNKNOWN || !board.is_back(SlotId::new(number as u32), Mark::from_word(held)) {
                return Err(Untaken::Held);
            }
            // Loom knows no time, and each thread gets on there.
            if !cfg!(loom) && begin.elapsed() >= PATIENCE {
                break;
            }
            yield_now();
        }
        std::thread::sleep(PATIENCE);
        self.take(number, message).ok_or(Untaken::NotCleared)
    }

    /// What is known of a slot.
    #[cfg(all(test, loom))]
    pub fn cell(&self, slot: u32) -> &Cell {
        self.cells.at(slot as usize)
    }

    fn known(&self) -> &[Cell] {
        self.cells.slice(0..self.known.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// How many are held, and which message of those was sent first.
    pub fn survey(&self) -> (usize, Option<Mark>) {
        // Relaxed: it is for a report, and nothing follows from it.
        let marks = self.known().iter().map(|cell| cell.mark.load(Ordering::Relaxed));
        let held = marks.filter(|mark| !matches!(*mark, FREE | UNKNOWN));
        held.fold((0, None), |(count, least), mark| {
            let mark = Mark::from_word(mark);
            (count + 1, Some(least.map_or(mark, |least: Mark| least.min(mark))))
        })
    }

    /// How many are held.
    pub fn count(&self) -> usize {
        self.known().iter().filter(|cell| cell.is_held()).count()
    }

    /// The first slot that is held, from this number on.
    pub fn next(&self, from: usize) -> Option<usize> {
        self.known().iter().skip(from).position(Cell::is_held).map(|ahead| from + ahead)
    }
}

impl Cell {
    fn is_held(&self) -> bool {
        // Acquire: partner is the Release store in `clear`.
        !matches!(self.mark.load(Ordering::Acquire), FREE | UNKNOWN)
    }

    /// Where its bytes are.
    #[inline]
    pub fn bytes(&self) -> *mut u8 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Marks the slot as no longer held, by its one holder. The holder touches nothing of the link
    /// after this: it may be gone.
    #[inline]
    pub fn clear(&self) {
        // Release: partners are the Acquire loads in `take` and `is_held`.
        self.mark.store(FREE, Ordering::Release);
    }
}

/// What is left of a link that ended while some of its slots were held.
pub trait Retire {
    /// Whether nothing is held any more. Nothing is taken any more either, so that what was found idle need not be
    /// looked at again.
    fn is_idle(&mut self) -> bool;
}

/// In the count of [`Retired`]: it is to be looked at once more, behind a full fence.
const FENCE: u32 = 1 << 31;

/// Links that ended while some of their slots were held. A process has several of these and deals its
/// links out among them, so that holders of most links need not look for the remains of others.
#[derive(Debug)]
pub struct Retired<T> {
    /// How many there are, and perhaps [`FENCE`], on a cache line that rarely changes. Written with `list`
    /// locked.
    count: CachePadded<AtomicU32>,
    list: Mutex<Vec<T>>,
}

impl<T: Retire> Retired<T> {
    /// None yet.
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new() -> Self {
        Self { count: CachePadded::new(AtomicU32::new(0)), list: Mutex::new(Vec::new()) }
    }

    /// None yet.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self { count: CachePadded::new(AtomicU32::new(0)), list: Mutex::new(Vec::new()) }
    }

    /// Has holders fence in full, for a process that cannot do without.
    pub fn ask_for_fences(&self) {
        let list = self.lock();
        self.count.store(list.len() as u32 | FENCE, Ordering::Relaxed);
    }

    /// Notes how many there are; with the list locked.
    fn note(&self, count: usize) {
        let fence = self.count.load(Ordering::Relaxed) & FENCE;
        self.count.store(count as u32 | fence, Ordering::Relaxed);
    }

    /// Ends a link: its remains are dropped as soon as nothing of it is held, possibly now.
    pub fn leave(&self, remains: T) {
        {
            let mut list = self.lock();
            list.push(remains);
            self.note(list.len());
        }
        // Partner: the fence in `after_clear`, or `look`. Either the sweep below sees the mark of a holder
        // gone, or that holder sees the count and sweeps.
        // Should the kernel refuse, the worst is that a holder that is dropping just now is missed
        // by both: then the mappings stay, as they do for a message that is never dropped.
        let _ = Fencing::of_this_process().before_sleeping();
        self.sweep();
    }

    /// To be called after [`Cell::clear`] by the holder of a slot of a link that is dealt to this.
    #[inline]
    pub fn after_clear(&self) {
        // Partner: the fence in `leave`. In a process for which this is not enough, the count asks for
        // more.
        Fencing::Asymmetric.after_publishing();
        if self.count.load(Ordering::Relaxed) != 0 {
            self.look();
        }
    }

    /// Sweeps if there is anything, as is seen behind a fence.
    #[cold]
    #[inline(never)]
    fn look(&self) {
        // Partner: the fence in `leave`.
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::Relaxed) & !FENCE != 0 {
            self.sweep();
        }
    }

    /// Drops the remains of which nothing is held.
    fn sweep(&self) {
        let mut list = self.lock();
        let idle: Vec<T> = list.extract_if(.., |remains| remains.is_idle()).collect();
        self.note(list.len());
        drop(list);
        drop(idle);
    }

    #[cfg(not(loom))]
    pub(crate) fn lock(&self) -> std::sync::MutexGuard<'_, Vec<T>> {
        // A panic while it was locked cannot have left the list half changed.
        self.list.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[cfg(loom)]
    fn lock(&self) -> loom::sync::MutexGuard<'_, Vec<T>> {
        self.list.lock().unwrap()
    }
}

#[cfg(not(loom))]
impl<T: Retire> Default for Retired<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::ring::board::heap::HeapBoard;
    use std::sync::Arc;

    struct Link(Arc<Held>);

    impl Retire for Link {
        fn is_idle(&mut self) -> bool {
            self.0.count() == 0
        }
    }

    fn held(slots: u32) -> Arc<Held> {
        let held = Held::new(slots as usize).unwrap();
        (0..slots).for_each(|slot| held.add(SlotId::new(slot), std::ptr::null_mut()));
        Arc::new(held)
    }

    #[test]
    fn a_slot_is_held_once() {
        let (held, board) = (held(3), BoardWriter::new(HeapBoard::new(3)));
        assert!(held.take(0, Mark::of(0)).is_some() && held.take(2, Mark::of(1)).is_some());
        assert!(held.take(0, Mark::of(2)).is_none());
        assert_eq!(held.take_patiently(0, Mark::of(2), &board).unwrap_err(), Untaken::Held);
        assert_eq!(held.count(), 2);
    }

    #[test]
    fn a_slot_that_is_not_known_is_not_taken() {
        let (held, board) = (held(2), BoardWriter::new(HeapBoard::new(4)));
        let more = Held::new(4).unwrap();
        for number in [2, 3, 4, u64::MAX] {
            assert!(held.take(number, Mark::of(0)).is_none() && more.take(number, Mark::of(0)).is_none());
            assert_eq!(more.take_patiently(number, Mark::of(0), &board).unwrap_err(), Untaken::Held);
        }
        assert_eq!(held.count() + more.count(), 0);
    }

    #[test]
    fn a_slot_that_was_handed_back_is_waited_for() {
        let (held, board) = (held(1), BoardWriter::new(HeapBoard::new(1)));
        assert!(held.take(0, Mark::of(5)).is_some());
        board.hand_back(SlotId::new(0), Mark::of(5));
        let holder = held.clone();
        let clearing = std::thread::spawn(move || holder.cells.at(0).clear());
        while held.take_patiently(0, Mark::of(6), &board).is_err() {}
        clearing.join().unwrap();
        assert_eq!(held.count(), 1);
    }

    #[test]
    fn a_holder_that_does_not_get_on_is_not_waited_for() {
        let (held, board) = (held(1), BoardWriter::new(HeapBoard::new(1)));
        let cell = held.take(0, Mark::of(5)).unwrap();
        board.hand_back(SlotId::new(0), Mark::of(5));
        for _ in 0..3 {
            assert_eq!(held.take_patiently(0, Mark::of(6), &board).unwrap_err(), Untaken::NotCleared);
        }
        cell.clear();
        assert!(held.take_patiently(0, Mark::of(6), &board).is_ok());
    }

    #[test]
    fn remains_stay_until_the_last_slot_is_put() {
        let (held, retired) = (held(3), Retired::new());
        let (one, other) = (held.take(0, Mark::of(0)).unwrap(), held.take(2, Mark::of(1)).unwrap());
        retired.leave(Link(held.clone()));
        one.clear();
        retired.after_clear();
        assert_eq!(Arc::strong_count(&held), 2);
        other.clear();
        retired.after_clear();
        assert_eq!(Arc::strong_count(&held), 1, "the remains were not dropped");
        assert_eq!(retired.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn idle_remains_go_at_once() {
        let (held, retired) = (held(3), Retired::new());
        retired.leave(Link(held.clone()));
        assert_eq!(Arc::strong_count(&held), 1);
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::ring::board::{BoardReader, heap::HeapBoard};
    use loom::{
        cell::UnsafeCell,
        sync::{Arc, atomic::AtomicBool},
        thread,
    };

    struct Link {
        held: Arc<Held>,
        bytes: Arc<[UnsafeCell<u8>; 2]>,
        gone: Arc<AtomicBool>,
    }

    impl Retire for Link {
        fn is_idle(&mut self) -> bool {
            self.held.count() == 0
        }
    }

    impl Drop for Link {
        fn drop(&mut self) {
            for byte in self.bytes.iter() {
                write(byte);
            }
            assert!(!self.gone.swap(true, Ordering::Relaxed), "the mappings went twice");
        }
    }

    fn held(slots: u32) -> Arc<Held> {
        let held = Held::new(slots as usize).unwrap();
        (0..slots).for_each(|slot| held.add(SlotId::new(slot), std::ptr::null_mut()));
        Arc::new(held)
    }

    fn read(byte: &UnsafeCell<u8>) {
        byte.with(|p| {
            // SAFETY: held (invariant 2); loom checks just that.
            #[allow(unsafe_code)]
            unsafe {
                std::hint::black_box(*p);
            }
        });
    }

    fn write(byte: &UnsafeCell<u8>) {
        byte.with_mut(|p| {
            // SAFETY: no longer held (invariant 2); loom checks just that.
            #[allow(unsafe_code)]
            unsafe {
                *p = 1;
            }
        });
    }

    /// Two holders read and drop while the receiver ends the link: the remains go, once, after both.
    #[test]
    fn remains_go_once_and_not_too_early() {
        // All interleavings of three threads take minutes; with up to three preemptions, seconds.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let gone = Arc::new(AtomicBool::new(false));
            let bytes = Arc::new([UnsafeCell::new(0), UnsafeCell::new(0)]);
            let (held, retired) = (held(2), Arc::new(Retired::new()));
            assert!(held.take(0, Mark::of(0)).is_some() && held.take(1, Mark::of(1)).is_some());
            let holders: Vec<_> = (0..2u32)
                .map(|index| {
                    let (held, retired, bytes) = (held.clone(), retired.clone(), bytes.clone());
                    thread::spawn(move || {
                        read(&bytes[index as usize]);
                        held.cells.at(index as usize).clear();
                        retired.after_clear();
                    })
                })
                .collect();
            retired.leave(Link { held, bytes, gone: gone.clone() });
            for holder in holders {
                holder.join().unwrap();
            }
            assert!(gone.load(Ordering::Relaxed), "the mappings were never dropped");
        });
    }

    /// A holder on another thread hands back and then clears its mark; the sender lends the slot again
    /// in between, and the receiver takes it: neither mark is lost.
    #[test]
    fn a_slot_that_is_lent_again_at_once_is_taken() {
        loom::model(|| {
            let memory = HeapBoard::new(1);
            let (board, sender) = (Arc::new(BoardWriter::new(memory.clone())), BoardReader::new(memory));
            let held = held(1);
            assert!(held.take(0, Mark::of(0)).is_some());
            let holder = {
                let (board, held) = (board.clone(), held.clone());
                thread::spawn(move || {
                    board.hand_back(SlotId::new(0), Mark::of(0));
                    held.cells.at(0).clear();
                })
            };
            while !sender.is_back(SlotId::new(0), Mark::of(0)) {
                thread::yield_now();
            }
            assert!(held.take_patiently(0, Mark::of(1), &board).is_ok(), "an honest sender was taken for another");
            holder.join().unwrap();
            assert_eq!(held.count(), 1, "the mark of the second lending was lost");
        });
    }

    /// A sender that lies lends a slot again without having seen it come back. The mappings still go only
    /// after its first holder has read.
    #[test]
    fn remains_go_after_all_holders_of_a_slot() {
        loom::model(|| {
            let gone = Arc::new(AtomicBool::new(false));
            let bytes = Arc::new([UnsafeCell::new(0), UnsafeCell::new(0)]);
            let (held, retired) = (held(1), Arc::new(Retired::new()));
            assert!(held.take(0, Mark::of(0)).is_some());
            let holder = {
                let (held, retired, bytes) = (held.clone(), retired.clone(), bytes.clone());
                thread::spawn(move || {
                    read(&bytes[0]);
                    held.cells.at(0).clear();
                    retired.after_clear();
                })
            };
            if let Some(cell) = held.take(0, Mark::of(1)) {
                cell.clear();
            }
            retired.leave(Link { held, bytes, gone: gone.clone() });
            holder.join().unwrap();
            assert!(gone.load(Ordering::Relaxed), "the mappings were never dropped");
        });
    }

    /// As a process does that cannot have others fence: nothing orders a holder but the fence that the
    /// count asks for.
    #[test]
    fn remains_go_where_the_count_asks_for_fences() {
        loom::model(|| {
            let gone = Arc::new(AtomicBool::new(false));
            let bytes = Arc::new([UnsafeCell::new(0), UnsafeCell::new(0)]);
            let (held, retired) = (held(1), Arc::new(Retired::new()));
            retired.ask_for_fences();
            assert!(held.take(0, Mark::of(0)).is_some());
            let holder = {
                let (held, retired, bytes) = (held.clone(), retired.clone(), bytes.clone());
                thread::spawn(move || {
                    read(&bytes[0]);
                    held.cells.at(0).clear();
                    assert_ne!(retired.count.load(Ordering::Relaxed), 0, "nothing asked for a fence");
                    retired.look();
                })
            };
            retired.leave(Link { held, bytes, gone: gone.clone() });
            holder.join().unwrap();
            assert!(gone.load(Ordering::Relaxed), "the mappings were never dropped");
            assert_eq!(retired.count.load(Ordering::Relaxed), FENCE);
        });
    }
}
