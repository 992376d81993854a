//! How a pool is made, by where its slots are to lie.

use std::{collections::VecDeque, os::fd::OwnedFd, sync::Arc};

use nix::sys::eventfd::EventFd;

use super::{Format, Pool, Storage, Turns, UnsentFbufs, unsent::SlotShape};
use crate::{
    memory::{MemoryError, Pages, Pieces, wrapping::WrappingTable},
    send::storage::{leased::LeasedSlots, one_shot::OneShotBuffers, segments::Segments},
};

impl Pool {
    /// A pool with `slots` slots to start with, at least one. `wake` is signalled when an fbuf is put back while
    /// the sender waits for one.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn new(format: impl Into<Format>, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let format = format.into();
        Self::with(format, slots, wake, Storage::Segments(Segments::new(format.geometry)))
    }

    /// As [`Self::new`], of buffers that are sent once.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_one_shots(format: impl Into<Format>, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let format = format.into();
        Self::with(format, slots, wake, Storage::OneShots(OneShotBuffers::new(format.geometry)))
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
        let (leased, pages) = LeasedSlots::own(memory, format.geometry, pages)?;
        Ok((Self::with(format, format.geometry.max_slots(), wake, Storage::Leased(leased))?, pages))
    }

    /// As [`Self::of_leases`], of slots that a receiver gives when it is linked.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_receiver(format: impl Into<Format>, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let format = format.into();
        let slots = LeasedSlots::of_receiver(format.geometry);
        Self::with(format, format.geometry.max_slots(), wake, Storage::Leased(slots))
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
        let segments = Segments::guarded(format.geometry, channel)?;
        Self::with(format, slots, wake, Storage::Segments(segments))
    }

    fn with(format: Format, slots: u32, wake: Arc<EventFd>, storage: Storage) -> Result<Self, MemoryError> {
        let Format { geometry, extras } = format;
        let unsent = UnsentFbufs::new(SlotShape::new(format), wake);
        let mut pool = Self {
            geometry,
            extras,
            storage,
            lack: None,
            free: Pieces::none(0),
            ledger: WrappingTable::of_zeroes(geometry.max_slots() as usize)?,
            retained: Vec::new(),
            links: Vec::new(),
            turns: Turns::default(),
            parted: VecDeque::new(),
            forgotten: Vec::new(),
            next_sequence: 0,
            used: 0,
            searched: 0,
            unsent,
        };
        pool.storage.add(slots.clamp(1, geometry.max_slots()))?;
        pool.use_segment();
        Ok(pool)
    }
}
