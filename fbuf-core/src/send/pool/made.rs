//! How a pool is made, by where its slots are to lie.

use std::{io, os::fd::OwnedFd, sync::Arc};

use nix::sys::eventfd::EventFd;

use super::{Pool, Storage, UnsentFbufs};
use crate::{
    memory::{Leasable, MemoryError, Pages, Pieces, page_bytes, wrapping::Ring},
    send::{
        guard::Guard,
        storage::{leased::LeasedSlots, one_shot::OneShotBuffers},
    },
    slot::Geometry,
    violation::Unsuitable,
};

impl Pool {
    /// A pool with `slots` slots to start with, at least one. `wake` is signalled when an fbuf is put back while
    /// the sender waits for one.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn new(geometry: Geometry, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        Self::with(geometry, geometry.slot_bytes(), slots, wake, None, Storage::Segments(Vec::new()))
    }

    /// As [`Self::new`], of buffers that are sent once.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_one_shots(geometry: Geometry, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let memory = Storage::OneShots(OneShotBuffers::new(geometry.segment_bytes(1)));
        Self::with(geometry, geometry.slot_bytes(), slots, wake, None, memory)
    }

    /// As [`Self::new`], of slots that receivers lease, each in one of these pieces of memory, which belong
    /// to this user, in such pages if they can be had: and in which they lie.
    ///
    /// # Errors
    /// [`MemoryError`]
    ///
    /// # Safety
    /// The broker has made this memory for this endpoint alone (`Opened` of fbuf-protocol), and no other code of
    /// this process has, or had, its descriptors: an [`Fbuf`](crate::send::fbuf::Fbuf) is the only way to write it.
    #[expect(unsafe_code, reason = "only its caller knows where the memory comes from")]
    pub unsafe fn of_leases(
        geometry: Geometry,
        memory: Vec<OwnedFd>,
        pages: Pages,
        wake: Arc<EventFd>,
    ) -> Result<(Self, Pages), MemoryError> {
        Self::of_memory(geometry, memory, pages, wake)
    }

    /// As [`Self::of_leases`], for this crate, which does nothing else with the memory.
    pub(crate) fn of_memory(
        geometry: Geometry,
        memory: Vec<OwnedFd>,
        pages: Pages,
        wake: Arc<EventFd>,
    ) -> Result<(Self, Pages), MemoryError> {
        let refused = |error: Unsuitable| MemoryError::Refused {
            call: "what the broker gave",
            asked: geometry.slot_bytes().into(),
            error: io::Error::other(error),
        };
        let given = |memory| Leasable::given(memory, geometry.slot_bytes().into()).map_err(refused);
        let memory: Vec<_> = memory.into_iter().map(given).collect::<Result<_, _>>()?;
        // Two fbufs would write the same bytes.
        if (0..memory.len()).any(|index| memory[..index].iter().any(|other| other.is_same(&memory[index]))) {
            return Err(refused(Unsuitable::Shared));
        }
        let slots = geometry.max_slots();
        if memory.len() != slots as usize {
            return Err(refused(Unsuitable::Size { found: memory.len() as u64, wanted: slots.into() }));
        }
        let (leased, pages) = LeasedSlots::own(memory, geometry.slot_bytes(), pages)?;
        Ok((Self::with(geometry, geometry.slot_bytes(), slots, wake, None, Storage::Leased(leased))?, pages))
    }

    /// As [`Self::of_leases`], of slots that a receiver gives when it is linked.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_receiver(geometry: Geometry, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let slots = geometry.max_slots();
        let memory = Storage::Leased(LeasedSlots::of_receiver(slots, geometry.slot_bytes()));
        Self::with(geometry, geometry.slot_bytes(), slots, wake, None, memory)
    }

    /// As [`Self::new`], with fbufs that hold less than a slot does; and with a guard, if a channel is named for its
    /// reports. Slots that are guarded fill whole pages.
    ///
    /// # Errors
    /// [`MemoryError`], also if they do not fill whole pages: to guard one would take the right to write from another.
    pub fn with_guard(
        geometry: Geometry,
        capacity: u32,
        slots: u32,
        wake: Arc<EventFd>,
        channel: Option<&str>,
    ) -> Result<Self, MemoryError> {
        let refused = |call, source| MemoryError::Refused { call, asked: geometry.stride(), error: source };
        if channel.is_some() && !geometry.stride().is_multiple_of(page_bytes()) {
            let source = io::Error::other("slots that are guarded have to fill whole pages");
            return Err(refused("mprotect", source));
        }
        let guard = channel.map(|channel| Guard::new(channel, geometry)).transpose();
        let guard = guard.map_err(|source| refused("sigaction", source))?;
        Self::with(geometry, capacity, slots, wake, guard, Storage::Segments(Vec::new()))
    }

    fn with(
        geometry: Geometry,
        capacity: u32,
        slots: u32,
        wake: Arc<EventFd>,
        guard: Option<Guard>,
        storage: Storage,
    ) -> Result<Self, MemoryError> {
        let unsent = UnsentFbufs::new(capacity.min(geometry.slot_bytes()), wake);
        let mut pool = Self {
            geometry,
            storage,
            lack: None,
            free: Pieces::none(0),
            ledger: Ring::of_zeroes(geometry.max_slots() as usize)?,
            retained: Vec::new(),
            links: Vec::new(),
            parted: Vec::new(),
            next_sequence: 0,
            used: 0,
            searched: 0,
            unsent,
            guard,
            unguarded: 0,
        };
        pool.add_segment(slots.clamp(1, geometry.max_slots()))?;
        pool.use_segment();
        Ok(pool)
    }
}
