//! How a pool is made, by where its slots are to lie.

use std::{io, os::fd::OwnedFd, sync::Arc};

use nix::sys::eventfd::EventFd;

use super::{Format, Pool, Storage, Turns, UnsentFbufs, unsent::SlotShape};
use crate::{
    memory::{Leasable, MemoryError, Pages, Pieces, page_bytes, wrapping::Ring},
    send::{
        guard::Guard,
        storage::{leased::LeasedSlots, one_shot::OneShotBuffers},
    },
    violation::Unsuitable,
};

impl Pool {
    /// A pool with `slots` slots to start with, at least one. `wake` is signalled when an fbuf is put back while
    /// the sender waits for one.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn new(format: impl Into<Format>, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        Self::with(format.into(), slots, wake, None, Storage::Segments(Vec::new()))
    }

    /// As [`Self::new`], of buffers that are sent once.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_one_shots(format: impl Into<Format>, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let format = format.into();
        let memory = Storage::OneShots(OneShotBuffers::new(format.geometry));
        Self::with(format, slots, wake, None, memory)
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
        format: impl Into<Format>,
        memory: Vec<OwnedFd>,
        pages: Pages,
        wake: Arc<EventFd>,
    ) -> Result<(Self, Pages), MemoryError> {
        Self::of_memory(format.into(), memory, pages, wake)
    }

    /// As [`Self::of_leases`], for this crate, which does nothing else with the memory.
    pub(crate) fn of_memory(
        format: Format,
        memory: Vec<OwnedFd>,
        pages: Pages,
        wake: Arc<EventFd>,
    ) -> Result<(Self, Pages), MemoryError> {
        let geometry = format.geometry;
        let refused = |error: Unsuitable| MemoryError::Refused {
            call: "what the broker gave",
            asked: geometry.cell_bytes(),
            error: io::Error::other(error),
        };
        let given = |memory| Leasable::given(memory, geometry.cell_bytes()).map_err(refused);
        let memory: Vec<_> = memory.into_iter().map(given).collect::<Result<_, _>>()?;
        // Two fbufs would write the same bytes.
        if (0..memory.len()).any(|index| memory[..index].iter().any(|other| other.is_same(&memory[index]))) {
            return Err(refused(Unsuitable::Shared));
        }
        let slots = geometry.max_slots();
        if memory.len() != slots as usize {
            return Err(refused(Unsuitable::Size { found: memory.len() as u64, wanted: slots.into() }));
        }
        let (leased, pages) = LeasedSlots::own(memory, geometry, pages)?;
        Ok((Self::with(format, slots, wake, None, Storage::Leased(leased))?, pages))
    }

    /// As [`Self::of_leases`], of slots that a receiver gives when it is linked.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_receiver(format: impl Into<Format>, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let format = format.into();
        let memory = Storage::Leased(LeasedSlots::of_receiver(format.geometry));
        Self::with(format, format.geometry.max_slots(), wake, None, memory)
    }

    /// As [`Self::new`], with a guard; its reports name the channel.
    ///
    /// # Errors
    /// [`MemoryError`], also if slots do not begin at pages: to guard one would take the right to write from another.
    pub fn with_guard(
        format: impl Into<Format>,
        slots: u32,
        wake: Arc<EventFd>,
        channel: &str,
    ) -> Result<Self, MemoryError> {
        let format = format.into();
        let stride = format.geometry.stride();
        let refused = |call, source| MemoryError::Refused { call, asked: stride, error: source };
        if !stride.is_multiple_of(page_bytes()) {
            let source = io::Error::other("slots that are guarded have to fill whole pages");
            return Err(refused("mprotect", source));
        }
        let guard = Guard::new(channel, format.geometry).map_err(|source| refused("sigaction", source))?;
        Self::with(format, slots, wake, Some(guard), Storage::Segments(Vec::new()))
    }

    fn with(
        format: Format,
        slots: u32,
        wake: Arc<EventFd>,
        guard: Option<Guard>,
        storage: Storage,
    ) -> Result<Self, MemoryError> {
        let Format { geometry, extras } = format;
        let unsent = UnsentFbufs::new(SlotShape::new(format), wake);
        let mut pool = Self {
            geometry,
            extras,
            storage,
            lack: None,
            free: Pieces::none(0),
            ledger: Ring::of_zeroes(geometry.max_slots() as usize)?,
            retained: Vec::new(),
            links: Vec::new(),
            turns: Turns::default(),
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
