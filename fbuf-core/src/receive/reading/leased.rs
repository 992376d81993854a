//! The receiver's side of leased messages: takes a lease on each, and when it is broken puts a copy in the place of the slot.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{Kept, grants::Grants, lease_thread::LeaseThread};
use crate::{
    memory::{HUGE_PAGE, Leasable, Map, MemoryError, Pages},
    points,
    process::{
        deferred::{Cause, LARGE, Slow},
        foreign::Foreign,
        lease::{Breaks, Lease, is_leased, lease},
    },
    receive::link::Returns,
    ring::entry::Body,
    slot::{Geometry, SlotId},
    violation::Unsuitable,
};

/// One slot, as its receiver has it.
#[derive(Debug)]
pub(crate) struct LeasedSlot {
    memory: Arc<Leasable>,
    /// Where it is read, always at the same address.
    view: Map,
    standing: Mutex<LeaseState>,
    lease_thread: Arc<LeaseThread>,
}

/// How it stands with a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
enum LeaseState {
    /// Nobody reads it.
    Idle,
    /// It is read under a lease. A view that is written for itself may be there as well: its pages that
    /// were not written yet are those of the slot.
    Leased(Option<Range<usize>>),
    /// The lease was broken, and a copy is read at the same address.
    Copied,
    /// The kernel took the lease away before there was a copy: what is read may have changed.
    Lost,
    /// The slot could not be put back in the place of the copy: it cannot be leased any more.
    Closed,
}

impl LeasedSlot {
    /// Takes a slot of which the memory exists, and the maker can be trusted.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn new(memory: Arc<Leasable>) -> io::Result<Arc<Self>> {
        let lease_thread = LeaseThread::of_this_process()?;
        let view = Map::of_reader(memory.as_fd(), memory.size())?;
        let leased_slot = Arc::new(Self { memory, view, standing: Mutex::new(LeaseState::Idle), lease_thread });
        leased_slot.lease_thread.add(leased_slot.memory.as_fd().as_raw_fd(), Arc::downgrade(&leased_slot));
        Ok(leased_slot)
    }

    /// Whether this process was forked from the one that has it.
    fn is_inherited(&self) -> bool {
        self.lease_thread.is_inherited()
    }

    fn lock(&self) -> MutexGuard<'_, LeaseState> {
        // A panic while it was locked cannot have left it half changed.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where its bytes are.
    pub(crate) fn bytes(&self) -> *mut u8 {
        self.view.beginning()
    }

    /// Takes the lease: from here on the bytes do not change, until it is released.
    ///
    /// # Errors
    /// `WouldBlock`: somebody can write the slot; what else the kernel says. Nothing is taken then.
    pub(crate) fn take(&self) -> io::Result<()> {
        // Locked all the while: it may be broken at once.
        let mut standing = self.lock();
        if *standing != LeaseState::Idle {
            return Err(io::Error::other("the slot is read already"));
        }
        Breaks::are_for(self.lease_thread.told(), self.memory.as_fd())?;
        lease(self.memory.as_fd(), Lease::Read)?;
        // A page that somebody has removed could be missing for good.
        if !self.memory.is_whole() {
            lease(self.memory.as_fd(), Lease::Release)?;
            return Err(io::Error::other("pages of the slot were removed"));
        }
        *standing = LeaseState::Leased(None);
        points::reach("lease: taken");
        Ok(())
    }

    /// Gives the lease up: whether the bytes were the same all the while.
    fn release(&self) -> bool {
        let mut standing = self.lock();
        let (copied, intact) = match *standing {
            LeaseState::Idle | LeaseState::Closed => return true,
            // That there was a lease to give up is what shows that it was there all the while. A process that has changed its
            // user since may not give it up, and has it still.
            LeaseState::Leased(_) => {
                let memory = self.memory.as_fd();
                (false, lease(memory, Lease::Release).is_ok() || is_leased(memory))
            }
            LeaseState::Copied => (true, true),
            LeaseState::Lost => (true, false),
        };
        *standing = LeaseState::Idle;
        if copied {
            // SAFETY: its only reader (`take`), has just ended (invariant 2).
            #[expect(unsafe_code, reason = "only here is it known which messages read the slot")]
            let put_back = unsafe { self.view.reattach(self.memory.as_fd()) };
            if put_back.is_err() {
                *standing = LeaseState::Closed;
            }
            points::reach("break: put back");
        }
        intact
    }

    /// Ends the reading of a message, before its slot is handed back.
    pub(crate) fn let_go(this: Arc<Self>, slot: SlotId, home: &Returns) {
        if this.is_inherited() {
            // The lease is the parent's.
            return std::mem::forget(this);
        }
        let intact = this.release();
        points::reach("lease: released");
        if !intact {
            home.lose_lease();
        }
        home.return_right(slot, &this.memory);
    }

    /// Whether the bytes have been the same since the lease was taken.
    pub(crate) fn is_intact(&self) -> bool {
        if self.is_inherited() {
            return false;
        }
        // If somebody breaks it just now, what follows tells whether it came to that.
        self.serve();
        matches!(*self.lock(), LeaseState::Leased(_) | LeaseState::Copied)
    }

    /// If the lease is about to be broken, puts a copy in the place of the slot and lets go. False if
    /// there was no memory for it yet.
    pub(super) fn serve(&self) -> bool {
        let mut standing = self.lock();
        let LeaseState::Leased(private) = &*standing else { return true };
        if is_leased(self.memory.as_fd()) {
            return true;
        }
        points::reach("break: found");
        let separated = private.as_ref().is_none_or(|range| Map::separate(range).is_ok());
        // SAFETY: no process can open the memory for writing before the lease is given up below. If the kernel takes it
        // away (fs.lease-break-time), what was read is said to be lost, and the peer is trusted (`Trusted`).
        #[expect(unsafe_code, reason = "only here is it known that the lease is there")]
        let detached = separated && unsafe { self.view.detach() }.is_ok();
        if !detached {
            return false;
        }
        points::reach("break: copied");
        // It was there until here, and so nothing has changed before it was copied; or it was not.
        *standing = match lease(self.memory.as_fd(), Lease::Release) {
            Ok(()) => LeaseState::Copied,
            Err(_) => LeaseState::Lost,
        };
        points::reach("break: let go");
        true
    }

    /// A view of the first bytes of the slot, while they are read, that this process may write for itself; none if
    /// what is read is a copy, which it may write as it is.
    pub(crate) fn make_private(&self, end: usize) -> Result<Option<Map>, MemoryError> {
        if self.is_inherited() {
            return Map::copy_on_write(self.memory.as_fd(), 0, end as u64).map(Some);
        }
        let mut standing = self.lock();
        let LeaseState::Leased(private) = &mut *standing else { return Ok(None) };
        let map = Map::copy_on_write(self.memory.as_fd(), 0, end as u64)?;
        *private = Some(map.addresses());
        Ok(Some(map))
    }

    /// Forgets such a view, which is about to be unmapped.
    pub(crate) fn end_private(&self) {
        if self.is_inherited() {
            return;
        }
        if let LeaseState::Leased(private) = &mut *self.lock() {
            *private = None;
        }
    }
}

impl Drop for LeasedSlot {
    fn drop(&mut self) {
        if self.is_inherited() {
            return;
        }
        self.lease_thread.remove(self.memory.as_fd().as_raw_fd());
    }
}

/// The slots of one link, each of which is memory of its own.
#[derive(Debug)]
pub(crate) struct ReceiverSlots {
    memory: Vec<Arc<Leasable>>,
    /// The same, once they can be leased; none, if they are copied.
    leased_slots: Vec<Arc<LeasedSlot>>,
    header: Range<usize>,
    leases: bool,
    made_here: bool,
    /// How many leases the kernel refused.
    refused: u64,
}

impl Slow for ReceiverSlots {
    /// Their memory is large all together, and nobody else may have it any more.
    fn cause(&mut self) -> Option<Cause> {
        let bytes: u64 = self.memory.iter().map(|memory| memory.size()).sum();
        (bytes >= LARGE).then_some(Cause::Memory)
    }
}

impl ReceiverSlots {
    /// Takes slots that the broker gave; to lease them, if `leases`.
    ///
    /// # Errors
    /// [`Unsuitable`]
    pub(crate) fn given(memory: Vec<Foreign>, geometry: Geometry, leases: bool) -> Result<Self, Unsuitable> {
        let given = |reader| Leasable::given(reader, geometry.cell_bytes()).map(Arc::new);
        let memory: Vec<_> = memory.into_iter().map(given).collect::<Result<_, _>>()?;
        let leases = leases && memory.iter().all(|memory| memory.is_own());
        Ok(Self { memory, leased_slots: Vec::new(), header: geometry.header(), leases, made_here: false, refused: 0 })
    }

    /// Makes slots for a sender, to lease them, if `leases`; in huge pages that were set aside only for one of
    /// the same user.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn make(geometry: Geometry, leases: bool, same_user: bool) -> Result<Self, MemoryError> {
        let huge = same_user && geometry.cell_bytes() >= HUGE_PAGE;
        let in_huge = if huge { Self::make_in(geometry, true).ok() } else { None };
        let memory = in_huge.map_or_else(|| Self::make_in(geometry, false), Ok)?;
        Ok(Self { memory, leased_slots: Vec::new(), header: geometry.header(), leases, made_here: true, refused: 0 })
    }

    fn make_in(geometry: Geometry, huge: bool) -> Result<Vec<Arc<Leasable>>, MemoryError> {
        let owner = nix::unistd::geteuid().as_raw();
        let make = |_| {
            let memory = Leasable::create("fbuf-slot", geometry.cell_bytes(), huge, owner)?;
            memory.reserve(Pages::Transparent).map(|_| Arc::new(memory))
        };
        (0..geometry.max_slots()).map(make).collect()
    }

    /// The rights to write them, which the sender has to be given, if this process made them for it.
    pub(crate) fn grants(&self) -> Option<Grants> {
        self.made_here.then(|| Grants::new(&self.memory))
    }

    /// Maps those that can be leased, once their memory exists. Where the kernel grants no thread, or no mapping, that takes, all
    /// messages are copied.
    pub(crate) fn map_for_lease(&mut self) {
        if self.leases {
            let leased_slots = self.memory.iter().cloned().map(LeasedSlot::new).collect::<io::Result<_>>();
            self.leased_slots = leased_slots.unwrap_or_default();
        }
    }

    /// How many leases the kernel refused.
    pub(crate) fn refused(&self) -> u64 {
        self.refused
    }

    /// Begins to read a message and its user header: under a lease, or else as a copy.
    ///
    /// # Errors
    /// [`MemoryError`]: there is none for a copy.
    pub(crate) fn read(&mut self, slot: SlotId, body: Body, home: &Returns) -> Result<Kept, MemoryError> {
        if let Some(leased_slot) = self.leased_slots.get(slot.index())
            && leased_slot.take().is_ok()
        {
            return Ok(Kept::Leased(leased_slot.clone()));
        }
        let end = (body.offset() + body.length()) as usize;
        let copy = |memory: &Arc<Leasable>| {
            // Not through a mapping: pages may be missing.
            let copy = Map::private_copy(memory.as_fd(), &[0..end, self.header.clone()])?;
            // The slot is not read any more, though it is handed back only when the copy is dropped.
            home.return_right(slot, memory);
            Ok(Kept::Copied(copy))
        };
        let refused = |source| MemoryError::Refused { call: "pread", asked: end as u64, error: source };
        let memory = self.memory.get(slot.index()).ok_or_else(|| refused(io::ErrorKind::NotFound.into()));
        let kept = memory.and_then(copy)?;
        self.refused += 1;
        Ok(kept)
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn slots_that_are_large_together_are_closed_by_another_thread() {
        let receiver_slots =
            |slots| ReceiverSlots::make(Geometry::new(LARGE / 4, slots).unwrap(), false, false).unwrap();
        assert_eq!([3, 4].map(|slots| receiver_slots(slots).cause()), [None, Some(Cause::Memory)]);
    }
}
