//! Sleeping without losing a wake-up, and without a fence or a system call per message.
//!
//! Each side of a link has a flag in memory that only it writes. Before it sleeps it raises the flag
//! and looks once more; whoever publishes something looks at the other's flag and rings the bell if
//! it is up. That is Dekker's pattern: store mine, then load yours, on both sides, with a full fence
//! between. The fence is needed only when somebody sleeps, so the sleeper pays for both: membarrier(2)
//! makes every running processor execute one, and the publisher only keeps its compiler from
//! reordering. Where one of the two cannot have that, the flag itself asks for a fence, and the
//! publisher reads it once more behind one: those who need none spend no instruction on the question.

use std::sync::OnceLock;

#[cfg(not(loom))]
use crate::sync::compiler_fence;
use crate::{
    read_only::ReadOnly,
    sync::{AtomicU64, Ordering, fence},
};

/// How this process orders "store, then load" against its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fencing {
    /// Who sleeps runs membarrier; who publishes runs no instruction.
    Asymmetric,
    /// Both sides run a full fence each time.
    Full,
}

impl Fencing {
    /// What this process can do. Found out, and registered with the kernel, at the first call.
    ///
    /// `FBUF_FENCE=full` in the environment forgoes membarrier, for measuring what it saves.
    pub fn of_this_process() -> Self {
        static FOUND: OnceLock<Fencing> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let forgone = std::env::var_os("FBUF_FENCE").is_some_and(|value| value == "full");
            if !forgone && register() { Self::Asymmetric } else { Self::Full }
        })
    }

    /// Between publishing something and looking whether the other side sleeps, in a process that can do
    /// this much.
    #[inline]
    pub(crate) fn after_publishing(self) {
        match self {
            // Partner: the membarrier in `before_sleeping`, which runs a fence here for us. Loom
            // knows no membarrier; a fence on this side is what one on the other amounts to.
            #[cfg(not(loom))]
            Self::Asymmetric => compiler_fence(Ordering::SeqCst),
            #[cfg(loom)]
            Self::Asymmetric => fence(Ordering::SeqCst),
            // Partner: the fence in `before_sleeping`.
            Self::Full => fence(Ordering::SeqCst),
        }
    }

    /// Between raising the own flag and looking once more. False if the kernel, or a filter that was
    /// installed meanwhile, refused: then a wake-up may be lost, and sleep has to be short.
    #[must_use]
    pub fn before_sleeping(self) -> bool {
        // Partner: `after_publishing`. The fence serves peers that fence in full, and this
        // processor; membarrier serves the others.
        fence(Ordering::SeqCst);
        #[cfg(not(loom))]
        if self == Self::Asymmetric {
            return crate::sys::membarrier(crate::sys::Membarrier::Everywhere).is_ok();
        }
        true
    }
}

#[cfg(not(any(loom, miri)))]
fn register() -> bool {
    use crate::sys::{Membarrier, membarrier};
    membarrier(Membarrier::Register).and_then(|()| membarrier(Membarrier::Everywhere)).is_ok()
}

#[cfg(loom)]
fn register() -> bool {
    true
}

/// Miri has no membarrier.
#[cfg(miri)]
fn register() -> bool {
    false
}

const PARKED: u64 = 1;
const GONE: u64 = 2;
const FENCE: u64 = 4;
const EPOCH: u64 = 8;

/// Whether one side of a link sleeps, and whether it is gone. Written by that side only.
///
/// Bit 0: asleep, or about to be. Bit 1: it will never look again. Bit 2: who does not find bit 0 set
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
    pub fn is_quiet(self) -> bool {
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
/// Written by that side, so that the one who wakes learns what waking costs on this machine.
#[cfg_attr(not(loom), derive(zerocopy::FromBytes))]
#[repr(transparent)]
#[derive(Debug)]
pub struct Rang(AtomicU64);

impl Rang {
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
impl ReadOnly<'_, Rang> {
    /// How long ago the bell was rung; none if it never was. What a peer says can be anything.
    #[must_use]
    pub fn elapsed(self) -> Option<std::time::Duration> {
        let rang = self.part(|rang| &rang.0).load(Ordering::Relaxed);
        (rang != 0).then(|| now()?.checked_sub(rang).map(std::time::Duration::from_nanos))?
    }
}

/// CLOCK_MONOTONIC of clock_gettime(2).
#[cfg(not(loom))]
fn now() -> Option<u64> {
    use nix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?;
    u64::try_from(time.tv_sec()).ok()?.checked_mul(1_000_000_000)?.checked_add(u64::try_from(time.tv_nsec()).ok()?)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_time_since_the_bell_is_known() {
        let rang = Rang::new();
        let elapsed = || ReadOnly::of(&rang).elapsed();
        assert_eq!(elapsed(), None);
        rang.note();
        assert!(elapsed().is_some_and(|elapsed| elapsed < std::time::Duration::from_secs(60)));
        // A peer that lies.
        rang.0.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(elapsed(), None);
    }

    #[test]
    fn each_sleep_is_told_from_the_next() {
        let flag = Flag::new();
        let read = || ReadOnly::of(&flag).read();
        assert!(read().is_quiet());
        flag.raise();
        let first = read().asleep().unwrap();
        assert_eq!(read().asleep(), Some(first));
        flag.lower();
        assert!(read().is_quiet());
        flag.raise();
        assert_ne!(read().asleep(), Some(first));
        flag.lower();
        flag.leave();
        assert!(read().gone() && !read().is_quiet() && read().asleep().is_none());
    }

    #[test]
    fn a_flag_that_asks_for_fences_is_never_quiet() {
        let flag = Flag::new();
        let (read, behind_fence) = (|| ReadOnly::of(&flag).read(), || ReadOnly::of(&flag).read_behind_fence());
        flag.ask_for_fences();
        assert!(!read().is_quiet() && !read().is_awake());
        assert_eq!(behind_fence().asleep(), None);
        flag.raise();
        assert!(behind_fence().asleep().is_some());
        flag.lower();
        assert!(behind_fence().asleep().is_none() && !read().is_awake());
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::{
        board::{BoardReader, BoardWriter, WritableBoard, heap::HeapBoard},
        lane::{LaneReader, LaneWriter, WritableLane, heap::HeapLane},
        slot::{Mark, SlotId},
    };
    use loom::{
        sync::{Arc, Condvar, Mutex},
        thread,
    };

    /// The bell: what a socket is in the real program.
    #[derive(Clone)]
    struct Bell(Arc<(Mutex<bool>, Condvar)>);

    impl Bell {
        fn new() -> Self {
            Self(Arc::new((Mutex::new(false), Condvar::new())))
        }
        fn ring(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_one();
        }
        fn wait(&self) {
            let mut rung = self.0.0.lock().unwrap();
            while !*rung {
                rung = self.0.1.wait(rung).unwrap();
            }
            *rung = false;
        }
    }

    /// Raises, looks again, sleeps. Loom reports a deadlock if a wake-up can be lost.
    fn sleep_until(flag: &Flag, bell: &Bell, mut look: impl FnMut() -> bool) {
        while !look() {
            flag.raise();
            assert!(Fencing::Full.before_sleeping());
            let found = look();
            if !found {
                bell.wait();
            }
            flag.lower();
            if found {
                return;
            }
        }
    }

    fn ring_if_asleep(flag: &Flag, bell: &Bell, fencing: Option<Fencing>) {
        if let Some(fencing) = fencing {
            fencing.after_publishing();
        }
        if ReadOnly::of(flag).read_behind_fence().asleep().is_some() {
            bell.ring();
        }
    }

    /// The two ways: the publisher fences, or what stands for it; or the flag asks for it.
    fn both_ways(model: impl Fn(Option<Fencing>) + Sync + Send + Copy + 'static) {
        for fencing in [Some(Fencing::Asymmetric), None] {
            loom::model(move || model(fencing));
        }
    }

    /// A receiver that sleeps on an empty lane wakes for every message.
    #[test]
    fn no_message_is_slept_over() {
        both_ways(|fencing| {
            let (lane, board, bell) = (HeapLane::new(2), HeapBoard::new(1), Bell::new());
            if fencing.is_none() {
                board.head().flag.ask_for_fences();
            }
            let (mut writer, mut reader) = (LaneWriter::new(lane.clone()), LaneReader::new(lane));
            let sender = {
                let (board, bell) = (board.clone(), bell.clone());
                thread::spawn(move || {
                    for length in 0..2 {
                        writer.message(SlotId::new(0), length);
                        ring_if_asleep(&board.head().flag, &bell, fencing);
                    }
                })
            };
            for _ in 0..2 {
                sleep_until(&board.head().flag, &bell, || {
                    let found = reader.look().expect("an honest sender").is_some();
                    if found {
                        reader.advance();
                    }
                    found
                });
            }
            sender.join().unwrap();
        });
    }

    /// A sender that sleeps on an empty pool wakes when its slot is handed back.
    #[test]
    fn no_return_is_slept_over() {
        both_ways(|fencing| {
            let (lane, board, bell) = (HeapLane::new(2), HeapBoard::new(1), Bell::new());
            if fencing.is_none() {
                lane.head().flag.ask_for_fences();
            }
            let returned = BoardReader::new(board.clone());
            let receiver = {
                let (lane, bell) = (lane.clone(), bell.clone());
                thread::spawn(move || {
                    BoardWriter::new(board).hand_back(SlotId::new(0), Mark::of(4));
                    ring_if_asleep(&lane.head().flag, &bell, fencing);
                })
            };
            sleep_until(&lane.head().flag, &bell, || returned.has(SlotId::new(0), Mark::of(4)));
            receiver.join().unwrap();
        });
    }
}
