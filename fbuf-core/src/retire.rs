//! What a received message keeps alive: the mappings of its link. The link may end first; then they
//! stay until the last message is dropped, on whatever thread. A count would cost a shared
//! read-modify-write for each message, so there is none: the receiver marks the slots it holds, and
//! only when a link ends while some are marked does anybody look.

use crossbeam_utils::CachePadded;

use crate::{
    board::{BoardMemory, BoardWriter},
    park::Fencing,
    ring::Ring,
    slot::SlotId,
    sync::{AtomicU32, AtomicU64, Mutex, Ordering, yield_now},
};

/// The receiver's private ledger: which slots of a link it holds. The mark of a slot is zero, or the
/// position of the entry that lent it, plus one.
#[derive(Debug)]
pub struct Held(Ring<AtomicU64>);

impl Held {
    /// Nothing is held of `slots` slots.
    pub fn new(slots: usize) -> Self {
        Self(Ring::new(slots, || AtomicU64::new(0)))
    }

    /// Marks a slot as held since the entry at `position`; false if it is held already. By the
    /// receiver only.
    #[inline]
    pub fn take(&self, slot: SlotId, position: u64) -> bool {
        let mark = self.mark(slot);
        // Acquire: partner is the Release store in `clear`, by whichever thread held it last.
        if mark.load(Ordering::Acquire) != 0 {
            return false;
        }
        mark.store(position + 1, Ordering::Relaxed);
        true
    }

    /// As [`Self::take`], for a slot that could not be taken. A holder hands its slot back and clears
    /// the mark a moment later; the sender may have lent it again by then. Waits for that moment; false
    /// if the slot was not handed back, and so is held in earnest.
    pub fn take_patiently<M: BoardMemory>(&self, slot: SlotId, position: u64, board: &BoardWriter<M>) -> bool {
        let mark = self.mark(slot);
        loop {
            // Acquire: as in `take`.
            let held = mark.load(Ordering::Acquire);
            if held == 0 {
                return self.take(slot, position);
            }
            if !board.is_back(slot, held - 1) {
                return false;
            }
            yield_now();
        }
    }

    /// The mark of a slot, for its holder to clear.
    #[inline]
    pub fn mark(&self, slot: SlotId) -> &AtomicU64 {
        self.0.at(slot.index())
    }

    /// Marks a slot as no longer held, by its one holder. The holder touches nothing of the link
    /// after this: it may be gone.
    #[inline]
    pub fn clear(mark: &AtomicU64) {
        // Release: partners are the Acquire loads in `take` and `count`.
        mark.store(0, Ordering::Release);
    }

    /// How many are held.
    pub fn count(&self) -> usize {
        // Acquire: partner is the Release store in `clear`.
        self.0.iter().filter(|mark| mark.load(Ordering::Acquire) != 0).count()
    }
}

/// What is left of a link that ended while some of its slots were held.
pub trait Remains {
    /// Whether nothing is held any more.
    fn is_idle(&self) -> bool;
}

/// Links that ended while some of their slots were held. A process has several of these and deals its
/// links out among them, so that holders of most links need not look for the remains of others.
#[derive(Debug)]
pub struct Retired<T> {
    /// How many there are, on a cache line that rarely changes. Written with `list` locked.
    count: CachePadded<AtomicU32>,
    list: Mutex<Vec<T>>,
}

impl<T: Remains> Retired<T> {
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

    /// Ends a link: its remains are dropped as soon as nothing of it is held, possibly now.
    pub fn leave(&self, remains: T, fencing: Fencing) {
        {
            let mut list = self.lock();
            list.push(remains);
            self.count.store(list.len() as u32, Ordering::Relaxed);
        }
        // Partner: the fence in `after_clear`. Either the sweep below sees the mark of a holder gone,
        // or that holder sees the count and sweeps.
        // Should the kernel refuse, the worst is that a holder that is dropping just now is missed
        // by both: then the mappings stay, as they do for a message that is never dropped.
        let _ = fencing.before_sleeping();
        self.sweep();
    }

    /// To be called after [`Held::clear`] by whoever held a slot of a link that is dealt to this.
    #[inline]
    pub fn after_clear(&self, fencing: Fencing) {
        // Partner: the fence in `leave`.
        fencing.after_publishing();
        if self.count.load(Ordering::Relaxed) != 0 {
            self.sweep();
        }
    }

    /// Drops the remains of which nothing is held.
    #[cold]
    #[inline(never)]
    fn sweep(&self) {
        let mut list = self.lock();
        let idle: Vec<T> = list.extract_if(.., |remains| remains.is_idle()).collect();
        self.count.store(list.len() as u32, Ordering::Relaxed);
        drop(list);
        drop(idle);
    }

    #[cfg(not(loom))]
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<T>> {
        // A panic while it was locked cannot have left the list half changed.
        self.list.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[cfg(loom)]
    fn lock(&self) -> loom::sync::MutexGuard<'_, Vec<T>> {
        self.list.lock().unwrap()
    }
}

#[cfg(not(loom))]
impl<T: Remains> Default for Retired<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::board::heap::HeapBoard;
    use std::sync::Arc;

    struct Link(Arc<Held>);

    impl Remains for Link {
        fn is_idle(&self) -> bool {
            self.0.count() == 0
        }
    }

    #[test]
    fn a_slot_is_held_once() {
        let (held, board) = (Held::new(3), BoardWriter::new(HeapBoard::new(3)));
        assert!(held.take(SlotId::new(0), 0) && held.take(SlotId::new(2), 1));
        assert!(!held.take(SlotId::new(0), 2) && !held.take_patiently(SlotId::new(0), 2, &board));
        assert_eq!(held.count(), 2);
    }

    #[test]
    fn a_slot_that_was_handed_back_is_waited_for() {
        let (held, board) = (Arc::new(Held::new(1)), BoardWriter::new(HeapBoard::new(1)));
        assert!(held.take(SlotId::new(0), 5));
        board.hand_back(SlotId::new(0), 5);
        let holder = held.clone();
        let clearing = std::thread::spawn(move || Held::clear(holder.mark(SlotId::new(0))));
        assert!(held.take_patiently(SlotId::new(0), 6, &board));
        clearing.join().unwrap();
        assert_eq!(held.count(), 1);
    }

    #[test]
    fn remains_stay_until_the_last_slot_is_put() {
        let (held, retired) = (Arc::new(Held::new(3)), Retired::new());
        assert!(held.take(SlotId::new(0), 0) && held.take(SlotId::new(2), 1));
        retired.leave(Link(held.clone()), Fencing::Full);
        Held::clear(held.mark(SlotId::new(0)));
        retired.after_clear(Fencing::Full);
        assert_eq!(Arc::strong_count(&held), 2);
        Held::clear(held.mark(SlotId::new(2)));
        retired.after_clear(Fencing::Full);
        assert_eq!(Arc::strong_count(&held), 1, "the remains were not dropped");
        assert_eq!(retired.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn idle_remains_go_at_once() {
        let (held, retired) = (Arc::new(Held::new(3)), Retired::new());
        retired.leave(Link(held.clone()), Fencing::Full);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::board::{BoardReader, heap::HeapBoard};
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

    impl Remains for Link {
        fn is_idle(&self) -> bool {
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
            let (held, retired) = (Arc::new(Held::new(2)), Arc::new(Retired::new()));
            assert!(held.take(SlotId::new(0), 0) && held.take(SlotId::new(1), 1));
            let holders: Vec<_> = (0..2u32)
                .map(|index| {
                    let (held, retired, bytes) = (held.clone(), retired.clone(), bytes.clone());
                    thread::spawn(move || {
                        read(&bytes[index as usize]);
                        Held::clear(held.mark(SlotId::new(index)));
                        retired.after_clear(Fencing::Full);
                    })
                })
                .collect();
            retired.leave(Link { held, bytes, gone: gone.clone() }, Fencing::Full);
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
            let held = Arc::new(Held::new(1));
            assert!(held.take(SlotId::new(0), 0));
            let holder = {
                let (board, held) = (board.clone(), held.clone());
                thread::spawn(move || {
                    board.hand_back(SlotId::new(0), 0);
                    Held::clear(held.mark(SlotId::new(0)));
                })
            };
            while !sender.has(SlotId::new(0), 0) {
                thread::yield_now();
            }
            assert!(held.take_patiently(SlotId::new(0), 1, &board), "an honest sender was taken for another");
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
            let (held, retired) = (Arc::new(Held::new(1)), Arc::new(Retired::new()));
            assert!(held.take(SlotId::new(0), 0));
            let holder = {
                let (held, retired, bytes) = (held.clone(), retired.clone(), bytes.clone());
                thread::spawn(move || {
                    read(&bytes[0]);
                    Held::clear(held.mark(SlotId::new(0)));
                    retired.after_clear(Fencing::Full);
                })
            };
            if held.take(SlotId::new(0), 1) {
                Held::clear(held.mark(SlotId::new(0)));
            }
            retired.leave(Link { held, bytes, gone: gone.clone() }, Fencing::Full);
            holder.join().unwrap();
            assert!(gone.load(Ordering::Relaxed), "the mappings were never dropped");
        });
    }
}
