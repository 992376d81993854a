//! What messages need in order to go back, for as long as any of them is held.

use std::{
    io,
    ops::Range,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use nix::sys::eventfd::EventFd;
use zerocopy::FromZeros;

use super::Segment;
use crate::process::fork::{AtFork, Rank};
use crate::{
    memory::{CannotReopen, Leasable, Map, MemoryError, page_bytes, wrapping::Ring},
    peer::Peer,
    points,
    process::deferred::{Cause, DeferredDrop, LARGE, Slow},
    protection::Mechanism,
    receive::{
        held::{Held, Retire, Retired},
        reading::leased::{LeasedSlot, PendingGrant},
    },
    ring::{
        board::{BoardTable, BoardWriter},
        entry::Entry,
        lane::{LaneHead, LaneMemory, LaneView},
    },
    slot::{Mark, SlotId},
    socket::{PacketSocket, link_message, wire::Descriptor},
    sync::read_only::ReadOnly,
    wait::Fencing,
};

/// What a [`Received`](crate::receive::received::Received) needs in order to go back, shared by all of a link.
#[derive(Debug)]
pub(crate) struct Returns {
    pub(super) lane: LaneView,
    pub(super) board: BoardWriter<BoardTable>,
    pub(super) held: Held,
    /// What came beside the messages that are held, if the sender declared that something may.
    pub(super) beside: Option<Ring<Beside>>,
    /// Where the remains of this link will be put.
    pub(super) among: &'static Retired<RetiredLink>,
    pub(super) peer: Peer,
    pub(super) mechanism: Mechanism,
    /// Where the user header is in a slot.
    pub(super) header: Range<usize>,
    pub(super) socket: PacketSocket,
    /// The segments, by address, for views of messages that may be written.
    pub(super) memory: Mutex<Vec<(Range<usize>, Descriptor)>>,
    /// The sleep of the sender for which the bell was rung last.
    pub(super) rung: AtomicU64,
    /// Whether the slots are this process's, and the right to write one goes back with each message.
    pub(super) returns_rights: bool,
    /// Slots whose right to write is still to be sent.
    pub(super) pending_grants: Mutex<PendingGrants>,
    /// What wakes the receiver, which tries it again.
    pub(super) wake: Option<Arc<EventFd>>,
    /// Leases that were refused.
    pub(super) refused: AtomicU64,
    /// Leases that were taken away, and not reported yet.
    pub(super) lost: AtomicU64,
}

/// What came beside the message that is held in a slot. Written by the receiver before there is that message, and read by
/// its holder.
#[derive(Debug, FromZeros)]
pub(super) struct Beside {
    tag: AtomicU64,
    time: AtomicU64,
}

impl Beside {
    /// Notes the tag of a message, and when it was sent; zero if that is not known.
    #[inline]
    pub(super) fn note(&self, tag: u64, time: u64) {
        // Relaxed: whatever passes the message to another thread orders this too.
        self.tag.store(tag, Ordering::Relaxed);
        self.time.store(time, Ordering::Relaxed);
    }
}

/// Rights to write slots that are still to be given, and why they are not.
#[derive(Debug)]
pub(super) struct PendingGrants {
    grants: Vec<PendingGrant>,
    why: Option<CannotReopen>,
    /// Which reason was told.
    told: Option<CannotReopen>,
}

impl PendingGrants {
    pub(super) fn new(grants: Vec<PendingGrant>) -> Self {
        Self { grants, why: None, told: None }
    }

    /// Gives those that can be given now: whether none is left.
    fn give(&mut self, socket: &PacketSocket) -> bool {
        self.why = PendingGrant::give_all(&mut self.grants, socket);
        self.grants.is_empty()
    }

    fn tell(&mut self) -> Option<CannotReopen> {
        let is_new = self.why != self.told;
        self.told = self.why;
        self.why.filter(|_| is_new)
    }
}

impl LaneMemory for Arc<Returns> {
    #[inline]
    fn head(&self) -> ReadOnly<'_, LaneHead> {
        self.lane.head()
    }
    #[inline]
    fn entry(&self, position: u64) -> ReadOnly<'_, Entry> {
        self.lane.entry(position)
    }
    fn capacity(&self) -> u64 {
        LaneMemory::capacity(&self.lane)
    }
}

impl Returns {
    /// The tag of the message that is held in a slot, and when it was sent; zero if that is not known.
    #[inline]
    pub fn beside(&self, slot: SlotId) -> (u64, u64) {
        let words = |beside: &Beside| (beside.tag.load(Ordering::Relaxed), beside.time.load(Ordering::Relaxed));
        self.beside.as_ref().map_or((0, 0), |beside| words(beside.at(slot.index())))
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

    pub(super) fn memory(&self) -> MutexGuard<'_, Vec<(Range<usize>, Descriptor)>> {
        // A panic while it was locked cannot have left it half changed.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A view of so many bytes at an address in a segment, to be written by this process alone: the
    /// mapping, and where they begin in it.
    pub(crate) fn copy_on_write(&self, address: usize, length: usize) -> Result<(Map, usize), MemoryError> {
        let memory = self.memory();
        let found = memory.iter().find(|(addresses, _)| addresses.contains(&address));
        let Some((addresses, memory)) = found else {
            let source = io::Error::other("the message is in no segment");
            return Err(MemoryError::Refused { call: "mmap", asked: length as u64, error: source });
        };
        let page = page_bytes() as usize;
        let begin = address - addresses.start;
        let (first, end) = (begin / page * page, begin + length);
        Ok((Map::copy_on_write(memory.as_fd(), first as u64, (end - first) as u64)?, begin - first))
    }

    /// Ends the reading of a slot under a lease, before it is handed back.
    pub(crate) fn release(&self, slot: SlotId, leased_slot: &LeasedSlot) {
        let intact = leased_slot.release();
        points::reach("lease: released");
        if !intact {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.return_right(slot, leased_slot.memory());
    }

    /// Gives the right to write a slot back, which nobody here reads any more, if it is one of this process.
    pub(super) fn return_right(&self, slot: SlotId, memory: &Arc<Leasable>) {
        if !self.returns_rights {
            return;
        }
        self.pending_grants().grants.push(PendingGrant::again(slot, memory.clone()));
        if !self.settle()
            && let Some(wake) = &self.wake
        {
            // The receiver may sleep, and would have no reason to try it again. A counter that is full wakes as well.
            let _ = wake.write(1);
        }
    }

    /// Gives the rights back that could not be given before: whether all could.
    pub(super) fn settle(&self) -> bool {
        !self.returns_rights || self.pending_grants().give(&self.socket)
    }

    /// Why rights cannot be given back, if there is a reason that was not told yet.
    pub(super) fn withholds_anew(&self) -> Option<CannotReopen> {
        if self.returns_rights { self.pending_grants().tell() } else { None }
    }

    fn pending_grants(&self) -> MutexGuard<'_, PendingGrants> {
        // A panic while it was locked cannot have left it half changed.
        self.pending_grants.lock().unwrap_or_else(PoisonError::into_inner)
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
#[cfg(test)]
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

/// The segments of a link that has ended, perhaps the last that anybody has of them. None of them may be large, and all of
/// them together so large that it takes long to free them.
#[derive(Debug)]
pub(super) struct Segments(pub Vec<Segment>);

impl Slow for Segments {
    fn cause(&mut self) -> Option<Cause> {
        let bytes = |segment: &Segment| {
            let copies = segment.copies.as_ref().map_or(0, |copies| copies.map().addresses().len());
            (segment.map.addresses().len() + copies) as u64
        };
        (self.0.iter().map(bytes).sum::<u64>() >= LARGE).then_some(Cause::Memory)
    }
}

/// What is left of such a link: all that its messages point into.
#[derive(Debug)]
pub(crate) struct RetiredLink {
    pub(super) returns: Arc<Returns>,
    pub(super) _segments: DeferredDrop<Segments>,
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

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    /// A sender may have several segments, none of which is large, and leave them to its receiver alone.
    #[test]
    fn segments_that_are_large_together_are_unmapped_by_another_thread() {
        let segments = |count| {
            let segment = |_| Segment { map: Map::create("fbuf-test", LARGE / 4).unwrap().0, copies: None, first: 0 };
            Segments((0..count).map(segment).collect())
        };
        assert_eq!([3, 4].map(|count| segments(count).cause()), [None, Some(Cause::Memory)]);
    }
}
