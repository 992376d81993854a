//! What messages need in order to go back, for as long as any of them is held.

use std::{
    ops::Range,
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use crate::process::fork::{AtFork, Rank};
use crate::{
    memory::{CannotReopen, Leasable, wrapping::WrappingTable},
    peer::Peer,
    points,
    process::deferred::DeferredDrop,
    protection::Mechanism,
    receive::{
        held::{Held, Retire, Retired},
        reading::{Reading, grants::Grants, shared::Views},
    },
    ring::{
        board::{BoardTable, BoardWriter},
        entry::LaneCell,
        lane::{LaneHead, LaneMemory, LaneView},
    },
    slot::{Mark, SlotId},
    socket::{PacketSocket, link_message},
    sync::read_only::ReadOnly,
    wait::Fencing,
};

/// What a [`Received`](crate::receive::received::Received) needs in order to go back, shared by all of a link.
#[derive(Debug)]
pub(crate) struct Returns {
    pub(super) lane: LaneView,
    pub(super) board: BoardWriter<BoardTable>,
    pub(super) held: Held,
    /// When the messages that are held were sent, if the sender declared that it says so. Written by the receiver before there is
    /// a message, and read by its holder.
    pub(super) times: Option<WrappingTable<AtomicU64>>,
    /// Where the remains of this link will be put.
    pub(super) among: &'static Retired<RetiredLink>,
    pub(super) peer: Peer,
    pub(super) mechanism: Mechanism,
    /// Where the user header is in a slot.
    pub(super) header: Range<usize>,
    pub(super) socket: PacketSocket,
    /// Segments that are read where they are.
    pub(super) views: Views,
    /// The sleep of the sender for which the bell was rung last.
    pub(super) rung: AtomicU64,
    /// If the slots are this process's, and the right to write one goes back with each message.
    pub(super) grants: Option<Grants>,
    /// Leases that were taken away, and not reported yet.
    pub(super) lost: AtomicU64,
}

impl LaneMemory for Arc<Returns> {
    #[inline]
    fn head(&self) -> ReadOnly<'_, LaneHead> {
        self.lane.head()
    }
    #[inline]
    fn cell(&self, position: u64) -> ReadOnly<'_, LaneCell> {
        self.lane.cell(position)
    }
    #[inline]
    fn pair(&self, position: u64) -> [ReadOnly<'_, LaneCell>; 2] {
        LaneMemory::pair(&self.lane, position)
    }
    fn capacity(&self) -> u64 {
        LaneMemory::capacity(&self.lane)
    }
}

impl Returns {
    /// When the message that is held in a slot was sent; zero if that is not known.
    pub(crate) fn time(&self, slot: SlotId) -> u64 {
        // Relaxed: whatever passed the message to this thread orders this too.
        self.times.as_ref().map_or(0, |times| times.at(slot.index()).load(Ordering::Relaxed))
    }

    pub(crate) fn peer(&self) -> Peer {
        self.peer
    }

    pub(crate) fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    pub(crate) fn header(&self) -> Range<usize> {
        self.header.clone()
    }

    pub(crate) fn views(&self) -> &Views {
        &self.views
    }

    /// A lease was taken away.
    pub(crate) fn lose_lease(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives the right to write a slot back, of which nothing is read here any more, if it is one of this process.
    pub(crate) fn return_right(&self, slot: SlotId, memory: &Arc<Leasable>) {
        if let Some(grants) = &self.grants {
            grants.give_back(slot, memory, &self.socket);
        }
    }

    /// Gives the rights back that could not be given before: whether all could.
    pub(super) fn settle(&self) -> bool {
        self.grants.as_ref().is_none_or(|grants| grants.settle(&self.socket))
    }

    /// Why rights cannot be given back, if there is a reason that was not told yet.
    pub(super) fn withholds_anew(&self) -> Option<CannotReopen> {
        self.grants.as_ref()?.withholds_anew()
    }

    #[inline]
    pub(crate) fn among(&self) -> &'static Retired<RetiredLink> {
        self.among
    }

    /// Hands a slot back to its sender, and rings if that one sleeps. Its holder clears its mark
    /// afterwards.
    #[inline]
    pub(crate) fn hand_back(&self, slot: SlotId, mark: Mark) {
        self.board.hand_back(slot, mark);
        // In a process for which this is not enough, the flag asks for more.
        Fencing::Asymmetric.after_publishing();
        self.wake_sender();
    }

    /// Rings if the sender sleeps, once for each sleep.
    #[inline]
    pub(super) fn wake_sender(&self) {
        if !self.lane.head().flag().read().is_awake() {
            self.ring_if_asleep();
        }
    }

    #[cold]
    #[inline(never)]
    fn ring_if_asleep(&self) {
        let Some(sleep) = self.lane.head().flag().read_behind_fence().asleep() else { return };
        // Two threads may both ring; it does no harm.
        if self.rung.load(Ordering::Relaxed) != sleep {
            self.board.head().last_ring.note();
            points::reach("return: bell");
            if link_message::ring(&self.socket) {
                self.rung.store(sleep, Ordering::Relaxed);
            }
        }
    }
}

/// Links that ended while some of their messages were held.
static RETIRED: [Retired<RetiredLink>; 16] = [const { Retired::new() }; 16];

/// Holds their locks.
pub(crate) type Locked = [MutexGuard<'static, Vec<RetiredLink>>; RETIRED.len()];

static AT_FORK: AtFork<Locked> = AtFork::new(Rank::Retired, locked, |_| {});

/// Takes them.
#[cfg(all(test, not(miri)))]
pub(crate) fn lock() -> Locked {
    AT_FORK.register();
    locked()
}

fn locked() -> Locked {
    std::array::from_fn(|index| RETIRED[index].lock())
}

/// Deals links out.
pub(super) fn next_retired(fencing: Fencing) -> &'static Retired<RetiredLink> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    AT_FORK.register();
    let next = &RETIRED[NEXT.fetch_add(1, Ordering::Relaxed) % RETIRED.len()];
    if fencing == Fencing::Full {
        next.ask_for_fences();
    }
    next
}

/// What is left of such a link: all that its messages point into.
#[derive(Debug)]
pub(crate) struct RetiredLink {
    pub(super) returns: Arc<Returns>,
    pub(super) _segments: Option<DeferredDrop<Reading>>,
    /// No slot before this one is held.
    pub(super) searched: usize,
}

impl Retire for RetiredLink {
    fn is_idle(&mut self) -> bool {
        let held = self.returns.held.next(self.searched);
        self.searched = held.unwrap_or(self.searched);
        held.is_none()
    }
}
