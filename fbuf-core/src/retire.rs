//! What a received message keeps alive: the mappings of its link. The link may end first; then they
//! stay until the last message is dropped, on whatever thread. A count would cost a shared
//! read-modify-write for each message, so there is none: the receiver marks the slots it holds, and
//! only when a link ends while some are marked does anybody look.

use crossbeam_utils::CachePadded;

use crate::{
    park::Fencing,
    sync::{AtomicU8, AtomicU32, Mutex, Ordering},
};

/// The receiver's private ledger: which slots of a link it holds.
#[derive(Debug)]
pub struct Held(Box<[AtomicU8]>);

impl Held {
    /// Nothing is held of `slots` slots.
    pub fn new(slots: usize) -> Self {
        Self((0..slots).map(|_| AtomicU8::new(0)).collect())
    }

    /// Marks a slot as held; false if it is held already. By the receiver only.
    #[inline]
    pub fn take(&self, index: u32) -> bool {
        let Some(mark) = self.0.get(index as usize) else { return false };
        // Acquire: partner is the Release store in `put`, by whichever thread held it last.
        let free = mark.load(Ordering::Acquire) == 0;
        if free {
            mark.store(1, Ordering::Relaxed);
        }
        free
    }

    /// Marks a slot as no longer held, by its one holder. The holder touches nothing of the link
    /// after this.
    #[inline]
    pub fn put(&self, index: u32) {
        if let Some(mark) = self.0.get(index as usize) {
            // Release: partners are the Acquire loads in `take` and `count`.
            mark.store(0, Ordering::Release);
        }
    }

    /// How many are held.
    pub fn count(&self) -> usize {
        // Acquire: partner is the Release store in `put`.
        self.0.iter().filter(|mark| mark.load(Ordering::Acquire) != 0).count()
    }
}

#[cfg(not(loom))]
impl<T: Remains> Default for Retired<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// What is left of a link that ended while some of its slots were held.
pub trait Remains {
    /// Which of the counters it is counted in; any number, best a different one for each link.
    fn bucket(&self) -> usize;
    /// Whether nothing is held any more.
    fn is_idle(&self) -> bool;
}

const BUCKETS: usize = 16;

/// The links of this process that ended while some of their slots were held.
#[derive(Debug)]
pub struct Retired<T> {
    /// How many links are in `list`, by bucket, so that holders of other links need not look.
    /// Written with `list` locked.
    counts: [CachePadded<AtomicU32>; BUCKETS],
    list: Mutex<Vec<T>>,
}

impl<T: Remains> Retired<T> {
    /// None yet.
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new() -> Self {
        Self { counts: [const { CachePadded::new(AtomicU32::new(0)) }; BUCKETS], list: Mutex::new(Vec::new()) }
    }

    /// None yet.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self { counts: std::array::from_fn(|_| CachePadded::new(AtomicU32::new(0))), list: Mutex::new(Vec::new()) }
    }

    /// Ends a link: its remains are dropped as soon as nothing of it is held, possibly now.
    pub fn leave(&self, remains: T, fencing: Fencing) {
        let bucket = remains.bucket() % BUCKETS;
        {
            let mut list = self.lock();
            list.push(remains);
            let count = self.counts[bucket].load(Ordering::Relaxed);
            self.counts[bucket].store(count + 1, Ordering::Relaxed);
        }
        // Partner: the fence in `after_put`. Either the sweep below sees the mark of a holder gone,
        // or that holder sees the count and sweeps.
        fencing.before_sleeping();
        self.sweep();
    }

    /// To be called after [`Held::put`] by whoever held the slot.
    #[inline]
    pub fn after_put(&self, bucket: usize, fencing: Fencing) {
        // Partner: the fence in `leave`.
        fencing.after_publishing();
        if self.counts[bucket % BUCKETS].load(Ordering::Relaxed) != 0 {
            self.sweep();
        }
    }

    fn sweep(&self) {
        let idle: Vec<T> = {
            let mut list = self.lock();
            let idle: Vec<T> = list.extract_if(.., |remains| remains.is_idle()).collect();
            for remains in &idle {
                let count = &self.counts[remains.bucket() % BUCKETS];
                count.store(count.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
            }
            idle
        };
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct Link(Arc<Held>);

    impl Remains for Link {
        fn bucket(&self) -> usize {
            17
        }
        fn is_idle(&self) -> bool {
            self.0.count() == 0
        }
    }

    #[test]
    fn remains_stay_until_the_last_slot_is_put() {
        let (held, retired) = (Arc::new(Held::new(3)), Retired::new());
        assert!(held.take(0) && held.take(2));
        assert!(!held.take(0), "a slot is held once");
        assert!(!held.take(3), "a slot that does not exist cannot be held");
        retired.leave(Link(held.clone()), Fencing::Full);
        held.put(0);
        retired.after_put(17, Fencing::Full);
        assert_eq!(Arc::strong_count(&held), 2);
        held.put(2);
        retired.after_put(17, Fencing::Full);
        assert_eq!(Arc::strong_count(&held), 1, "the remains were dropped");
        assert_eq!(retired.counts[1].load(Ordering::Relaxed), 0);
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
    use loom::{
        sync::{Arc, atomic::AtomicBool},
        thread,
    };

    struct Link {
        held: Arc<Held>,
        gone: Arc<AtomicBool>,
    }

    impl Remains for Link {
        fn bucket(&self) -> usize {
            0
        }
        fn is_idle(&self) -> bool {
            self.held.count() == 0
        }
    }

    impl Drop for Link {
        fn drop(&mut self) {
            assert_eq!(self.held.count(), 0, "the mappings went while a slot was held");
            assert!(!self.gone.swap(true, Ordering::Relaxed), "the mappings went twice");
        }
    }

    /// Two holders drop while the receiver ends the link: the remains go, once, after both.
    #[test]
    fn remains_go_once_and_not_too_early() {
        loom::model(|| {
            let gone = Arc::new(AtomicBool::new(false));
            let (held, retired) = (Arc::new(Held::new(2)), Arc::new(Retired::new()));
            assert!(held.take(0) && held.take(1));
            let holders: Vec<_> = (0..2)
                .map(|index| {
                    let (held, retired) = (held.clone(), retired.clone());
                    thread::spawn(move || {
                        held.put(index);
                        retired.after_put(0, Fencing::Full);
                    })
                })
                .collect();
            retired.leave(Link { held, gone: gone.clone() }, Fencing::Full);
            for holder in holders {
                holder.join().unwrap();
            }
            assert!(gone.load(Ordering::Relaxed), "the mappings were never dropped");
        });
    }
}
