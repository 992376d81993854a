//! The words of one side of a link that say whether it sleeps, and when it rang the bell.

use crate::sync::{AtomicU64, Ordering, fence, read_only::ReadOnly};

const PARKED: u64 = 1;
const GONE: u64 = 2;
const FENCE: u64 = 4;
const EPOCH: u64 = 8;

/// Whether one side of a link sleeps, and whether it is gone. Written by that side only.
///
/// Bit 0: asleep, or about to be. Bit 1: it will never look again. Bit 2: a peer that does not find bit 0 set
/// has to look once more, behind a full fence. Above: how often it has slept, so that the other side
/// rings once for each time.
#[cfg_attr(not(loom), derive(zerocopy::FromBytes))]
#[repr(transparent)]
#[derive(Debug)]
pub struct Flag(AtomicU64);

impl Flag {
    #[cfg(any(test, loom))]
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Writes any word, as a hostile peer would.
    #[cfg(all(any(test, fuzzing), not(loom)))]
    pub(crate) fn scribble(&self, word: u64) {
        self.0.store(word, Ordering::Relaxed);
    }

    /// Has the other side fence in full, from the first time it looks. Before the other side knows of the
    /// flag.
    pub(crate) fn ask_for_fences(&self) {
        self.0.store(FENCE, Ordering::Relaxed);
    }

    /// Announces sleep. To be followed by [`Fencing::before_sleeping`] and one more look.
    pub(crate) fn raise(&self) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store((before & !PARKED).wrapping_add(EPOCH) | PARKED, Ordering::Relaxed);
    }

    /// Takes it back.
    pub(crate) fn lower(&self) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before & !PARKED, Ordering::Relaxed);
    }

    /// Announces that this side is gone.
    pub(crate) fn leave(&self) {
        let before = self.0.load(Ordering::Relaxed);
        // Release: partner is the Acquire load in `read`. It carries what the side left behind.
        self.0.store(before | GONE, Ordering::Release);
    }
}

impl ReadOnly<'_, Flag> {
    /// What the other side says.
    #[inline]
    pub fn read(self) -> Signal {
        // Acquire: partner is the Release store in `Flag::leave`.
        Signal(self.part(|flag| &flag.0).load(Ordering::Acquire))
    }

    /// What the other side says after something was published that it may wait for.
    pub fn read_behind_fence(self) -> Signal {
        let signal = self.read();
        if signal.0 & FENCE == 0 {
            return signal;
        }
        // Partner: the fence in `before_sleeping`.
        fence(Ordering::SeqCst);
        self.read()
    }
}

/// What a flag said, read once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal(u64);

impl Signal {
    /// Nothing to do: awake, present, and to be believed.
    #[inline]
    #[must_use]
    pub fn needs_nothing(self) -> bool {
        self.0 & (PARKED | GONE | FENCE) == 0
    }

    /// Awake, and to be believed.
    #[inline]
    #[must_use]
    pub fn is_awake(self) -> bool {
        self.0 & (PARKED | FENCE) == 0
    }

    /// Asleep; the value tells one sleep from the next and is never zero.
    #[must_use]
    pub fn asleep(self) -> Option<u64> {
        (self.0 & PARKED != 0).then_some(self.0)
    }

    /// Gone.
    #[must_use]
    pub fn gone(self) -> bool {
        self.0 & GONE != 0
    }
}

/// When one side of a link rang the bell last, by the clock that all processes share, in nanoseconds.
/// Written by that side, so that the side that wakes learns what waking costs on this machine.
#[cfg_attr(not(loom), derive(zerocopy::FromBytes))]
#[repr(transparent)]
#[derive(Debug)]
pub struct LastRing(AtomicU64);

impl LastRing {
    #[cfg(any(test, loom))]
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Notes that the bell is rung now.
    #[cfg(not(loom))]
    pub(crate) fn note(&self) {
        self.0.store(now().unwrap_or(0), Ordering::Relaxed);
    }
}

#[cfg(not(loom))]
impl ReadOnly<'_, LastRing> {
    /// How long ago the bell was rung; none if it never was. What a peer says can be anything.
    #[must_use]
    pub fn elapsed(self) -> Option<std::time::Duration> {
        let last_ring = self.part(|last_ring| &last_ring.0).load(Ordering::Relaxed);
        (last_ring != 0).then(|| now()?.checked_sub(last_ring).map(std::time::Duration::from_nanos))?
    }
}

/// CLOCK_MONOTONIC of clock_gettime(2), in nanoseconds.
#[cfg(not(loom))]
pub(crate) fn now() -> Option<u64> {
    use nix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?;
    u64::try_from(time.tv_sec()).ok()?.checked_mul(1_000_000_000)?.checked_add(u64::try_from(time.tv_nsec()).ok()?)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_time_since_the_bell_is_known() {
        let last_ring = LastRing::new();
        let elapsed = || ReadOnly::of(&last_ring).elapsed();
        assert_eq!(elapsed(), None);
        last_ring.note();
        assert!(elapsed().is_some_and(|elapsed| elapsed < std::time::Duration::from_secs(60)));
        // A peer that lies.
        last_ring.0.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(elapsed(), None);
    }

    #[test]
    fn each_sleep_is_told_from_the_next() {
        let flag = Flag::new();
        let read = || ReadOnly::of(&flag).read();
        assert!(read().needs_nothing());
        flag.raise();
        let first = read().asleep().unwrap();
        assert_eq!(read().asleep(), Some(first));
        flag.lower();
        assert!(read().needs_nothing());
        flag.raise();
        assert_ne!(read().asleep(), Some(first));
        flag.lower();
        flag.leave();
        assert!(read().gone() && !read().needs_nothing() && read().asleep().is_none());
    }

    #[test]
    fn a_flag_that_asks_for_fences_is_never_quiet() {
        let flag = Flag::new();
        let (read, behind_fence) = (|| ReadOnly::of(&flag).read(), || ReadOnly::of(&flag).read_behind_fence());
        flag.ask_for_fences();
        assert!(!read().needs_nothing() && !read().is_awake());
        assert_eq!(behind_fence().asleep(), None);
        flag.raise();
        assert!(behind_fence().asleep().is_some());
        flag.lower();
        assert!(behind_fence().asleep().is_none() && !read().is_awake());
    }
}
