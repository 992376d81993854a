//! What people write by hand: a block of memory by the crate shared_memory, the simplest ring in it,
//! and a copy at each end.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering;

use shared_memory::ShmemConf;

use super::{End, Handle, Patience, Receiving, Sending, Way, memory::Memory};
use crate::{Result, terms::Terms};

pub(crate) struct SharedMemory;

impl Way for SharedMemory {
    type Sender = Copying;
    type Receiver = Copying;
}

/// How many messages the ring holds if it is not told: some megabytes, or a thousand.
fn slots(terms: &Terms) -> usize {
    terms.slots.map_or_else(|| (8 << 20) / terms.size.max(1), |slots| slots as usize).clamp(8, 1024)
}

/// Where the words stand: how many messages were written, and, on a cache line of its own, how many
/// were read.
const WRITTEN: usize = 0;
const READ: usize = 16;
const WORDS: usize = 32;

/// Either end.
pub(crate) struct Copying {
    memory: Memory,
    slots: usize,
    /// How many messages went through this end.
    count: u64,
    buffer: Vec<u8>,
}

impl Copying {
    fn new(terms: &Terms, shmem: shared_memory::Shmem) -> Result<Self> {
        let slots = slots(terms);
        let memory = Memory::of(shmem, WORDS, slots * terms.size)?;
        Ok(Self { memory, slots, count: 0, buffer: vec![0; terms.size] })
    }

    fn offset(&self) -> usize {
        (self.count % self.slots as u64) as usize * self.buffer.len()
    }
}

impl End for Copying {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let shmem = ShmemConf::new().size(Memory::size(WORDS, slots(terms) * terms.size)).create()?;
        let name = shmem.get_os_id().to_owned();
        Ok((Self::new(terms, shmem)?, Handle { descriptors: Vec::new(), name }))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Self::new(terms, ShmemConf::new().os_id(handle.name).open()?)
    }
}

impl Sending for Copying {
    #[inline(always)]
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        write(&mut self.buffer);
        let mut patience = Patience::default();
        // Acquire: partner is the Release store in `receive`.
        while self.count - self.memory.words()[READ].load(Ordering::Acquire) == self.slots as u64 {
            patience.spin()?;
        }
        let offset = self.offset();
        // SAFETY: read already, or never written.
        unsafe { self.memory.bytes_mut(offset, self.buffer.len()) }.copy_from_slice(&self.buffer);
        self.count += 1;
        // Release: partner is the Acquire load in `receive`.
        self.memory.words()[WRITTEN].store(self.count, Ordering::Release);
        Ok(())
    }
}

impl Receiving for Copying {
    #[inline(always)]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let mut patience = Patience::default();
        // Acquire: partner is the Release store in `send`.
        while self.memory.words()[WRITTEN].load(Ordering::Acquire) == self.count {
            patience.spin()?;
        }
        let (offset, length) = (self.offset(), self.buffer.len());
        // SAFETY: written, and not written again before the store below.
        self.buffer.copy_from_slice(unsafe { self.memory.bytes(offset, length) });
        self.count += 1;
        // Release: partner is the Acquire load in `send`.
        self.memory.words()[READ].store(self.count, Ordering::Release);
        Ok(read(&self.buffer))
    }
}
