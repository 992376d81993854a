//! The two shapes of a fbuf: [`Fbuf`], a slot that this process may write, and [`Received`], a slot
//! that it may read until it hands it back.
//!
//! One of the files of this crate that may be `unsafe`: here a slot's address becomes a slice.
#![allow(unsafe_code)]

use std::{
    fmt,
    io::{self, Read},
    mem::ManuallyDrop,
    ops::{Deref, DerefMut},
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::Arc,
};

use bytes::{BufMut, buf::UninitSlice};

use crate::{
    inbound::{Loan, Peer, Returns},
    memory::{Address, Map, MemoryError, Sealed, SealedMemory},
    outbound::Outbound,
    pool::{Pool, Shelf},
    protection::Mechanism,
    retire::Cell,
    slot::{Mark, SlotId},
};

/// A slot of this process's pool, held exclusively: fill it, then give it away.
///
/// It behaves like a `Vec<u8>` of fixed capacity: it dereferences to the bytes filled so far, and
/// [`io::Write`], [`BufMut`], [`Fbuf::resize`] and [`Fbuf::read_from`] fill more. What is filled is
/// what is sent. Dropped unsent, the slot goes back to its pool, from any thread.
///
/// Named and shaped after the fbufs of Druschel and Peterson, SOSP 1993.
pub struct Fbuf {
    bytes: Address,
    home: NonNull<Shelf>,
    slot: SlotId,
    filled: u32,
}

// SAFETY: a fbuf is the only owner of its slot (invariant 2), and `Shelf` is Sync.
unsafe impl Send for Fbuf {}
// SAFETY: through `&Fbuf` one can only read bytes that nobody writes meanwhile.
unsafe impl Sync for Fbuf {}

/// More bytes than a slot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{asked} bytes were asked for in a slot of {capacity}: open the sender with larger slots, or send several messages"
)]
pub struct TooLarge {
    /// Bytes that were asked for.
    pub asked: usize,
    /// Bytes that a slot has.
    pub capacity: usize,
}

impl Pool {
    /// The slot whose turn it is, as a fbuf; none if it is not known to be free.
    #[inline]
    pub fn allocate(&mut self) -> Option<Fbuf> {
        let (slot, bytes) = self.take_free()?;
        Some(self.fbuf(slot, bytes, 0))
    }

    /// Takes back what was to be sent, and was lent to nobody.
    pub fn recall(&mut self, slot: SlotId, length: u32) -> Option<Fbuf> {
        let bytes = self.take_back(slot)?;
        Some(self.fbuf(slot, bytes, length))
    }

    /// A slot that was just taken is owned by its fbuf from here on (invariant 2). Shelf and mappings
    /// live until it is put back or taken back (`Drop for Pool`).
    #[inline]
    fn fbuf(&self, slot: SlotId, bytes: Address, filled: u32) -> Fbuf {
        Fbuf { bytes, slot, filled, home: self.shelf() }
    }
}

impl Fbuf {
    /// Whose pool it came from.
    #[inline]
    pub(crate) fn home(&self) -> NonNull<Shelf> {
        self.home
    }

    /// Ends it without putting the slot back: the slot, and how many bytes are filled.
    #[inline]
    pub(crate) fn into_slot(self) -> (SlotId, u32) {
        let parts = (self.slot, self.filled);
        std::mem::forget(self);
        parts
    }

    #[inline]
    fn bytes(&self) -> *mut u8 {
        self.bytes.pointer().as_ptr()
    }

    /// How many bytes it can hold: the slot size of its sender.
    #[must_use]
    #[inline]
    pub fn capacity(&self) -> usize {
        // SAFETY: `home` lives until this slot is put back (`Drop for Pool`), which only `drop` does.
        unsafe { self.home.as_ref() }.slot_bytes() as usize
    }

    /// How many bytes are filled, and will be sent.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.filled as usize
    }

    /// Whether nothing is filled. An empty message can be sent.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Sets how many bytes are filled, without touching them: bytes that were not filled before
    /// hold whatever this sender wrote into the slot when it last used it, or zeroes.
    ///
    /// # Errors
    /// [`TooLarge`] beyond the capacity.
    #[inline]
    pub fn resize(&mut self, length: usize) -> Result<(), TooLarge> {
        if length > self.capacity() {
            return Err(TooLarge { asked: length, capacity: self.capacity() });
        }
        self.filled = length as u32;
        Ok(())
    }

    /// The bytes that are not filled yet.
    #[inline]
    pub fn spare_mut(&mut self) -> &mut [u8] {
        // SAFETY: filled ≤ capacity, all bytes of a slot are initialised (memory from the kernel is
        // zeroed), and this fbuf owns them (invariant 2).
        unsafe {
            slice::from_raw_parts_mut(self.bytes().add(self.filled as usize), self.capacity() - self.filled as usize)
        }
    }

    /// Reads once from `source` straight into the slot, and counts what came as filled.
    ///
    /// Returns how many bytes came; 0 at the end of `source`, or when the slot is full.
    ///
    /// # Errors
    /// What `source` says.
    pub fn read_from(&mut self, source: &mut impl Read) -> io::Result<usize> {
        let spare = self.spare_mut();
        let count = source.read(spare)?.min(spare.len());
        self.filled += count as u32;
        Ok(count)
    }
}

impl Deref for Fbuf {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: as in `spare_mut`.
        unsafe { slice::from_raw_parts(self.bytes(), self.filled as usize) }
    }
}

impl DerefMut for Fbuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `spare_mut`.
        unsafe { slice::from_raw_parts_mut(self.bytes(), self.filled as usize) }
    }
}

impl AsRef<[u8]> for Fbuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Fbuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

/// Fills what fits; a full slot writes 0 bytes, which `write_all` reports as an error.
impl io::Write for Fbuf {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let spare = self.spare_mut();
        let count = data.len().min(spare.len());
        spare[..count].copy_from_slice(&data[..count]);
        self.filled += count as u32;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// SAFETY: `chunk_mut` is the spare part, `remaining_mut` its length, and `advance_mut` stays inside.
unsafe impl BufMut for Fbuf {
    fn remaining_mut(&self) -> usize {
        self.capacity() - self.filled as usize
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        assert!(count <= self.remaining_mut(), "advanced by {count} bytes where {} remain", self.remaining_mut());
        self.filled += count as u32;
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        UninitSlice::new(self.spare_mut())
    }
}

impl fmt::Debug for Fbuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fbuf").field("len", &self.filled).field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

impl Drop for Fbuf {
    #[inline]
    fn drop(&mut self) {
        // By value: a fbuf whose address nobody takes can live in registers.
        put_back(self.home, self.slot);
    }
}

/// Puts a slot back that was not sent, or lets go of one that was sent and kept.
#[cold]
#[inline(never)]
fn put_back(home: NonNull<Shelf>, slot: SlotId) {
    // SAFETY: `home` is the inside of an Arc and lives until this slot is put back (`Drop for Pool`),
    // which happens below; counted here, it also lives until that has returned.
    let shelf = unsafe {
        Arc::increment_strong_count(home.as_ptr());
        Arc::from_raw(home.as_ptr())
    };
    // The mappings, if this was the last fbuf of a sender that is gone.
    drop(shelf.put_back(slot));
}

/// A message that was sent, and that its sender may still read: [`Deref`] to its bytes. Its slot is not used
/// again before this is dropped, from any thread, or becomes a [`Fbuf`] once more.
pub struct Retained(Kind);

enum Kind {
    /// It lies in a slot.
    Slot { bytes: Address, length: u32, slot: SlotId, message: Mark, home: NonNull<Shelf> },
    /// It was given away.
    Sealed(Sealed),
}

// SAFETY: nobody writes the bytes of a slot that is retained, and `Shelf` is Sync.
unsafe impl Send for Retained {}
// SAFETY: as above.
unsafe impl Sync for Retained {}

impl Pool {
    /// Keeps a slot that was taken to be sent, for its sender to read on. To be dropped, or [given
    /// up](Self::give_up), if it is not sent.
    pub fn retain(&mut self, slot: SlotId, length: u32, sequence: u64) -> Option<Retained> {
        let bytes = self.address(slot)?;
        self.keep(slot);
        Some(Retained(Kind::Slot { bytes, length, slot, message: Mark::of(sequence), home: self.shelf() }))
    }

    /// Forgets that a slot was retained: it was not sent.
    pub fn give_up(&mut self, retained: Retained) {
        if let Some((slot, ..)) = self.own_slot(&retained) {
            self.let_go(slot);
            std::mem::forget(retained);
        }
    }

    /// The same slot, to be written again, if every receiver has handed it back.
    ///
    /// # Errors
    /// What was given, if not.
    pub fn rewrite(&mut self, links: &[Outbound], retained: Retained) -> Result<Fbuf, Retained> {
        let Some((slot, message, length)) = self.own_slot(&retained) else { return Err(retained) };
        match self.reclaim(links, slot, message) {
            Some(bytes) => {
                std::mem::forget(retained);
                Ok(self.fbuf(slot, bytes, length))
            }
            None => Err(retained),
        }
    }

    fn own_slot(&self, retained: &Retained) -> Option<(SlotId, Mark, u32)> {
        match retained.0 {
            Kind::Slot { length, slot, message, home, .. } if home == self.shelf() => Some((slot, message, length)),
            _ => None,
        }
    }
}

impl From<Sealed> for Retained {
    fn from(sealed: Sealed) -> Self {
        Self(Kind::Sealed(sealed))
    }
}

impl Deref for Retained {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: they were filled, nobody writes them before the slot is used again, and it is not
            // while this lives (`Pool::retained`), nor do its mappings go (`Drop for Pool`).
            Kind::Slot { bytes, length, .. } => unsafe {
                slice::from_raw_parts(bytes.pointer().as_ptr(), *length as usize)
            },
            Kind::Sealed(sealed) => sealed,
        }
    }
}

impl AsRef<[u8]> for Retained {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Retained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retained").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Drop for Retained {
    fn drop(&mut self) {
        if let Kind::Slot { slot, home, .. } = self.0 {
            put_back(home, slot);
        }
    }
}

/// A message: bytes in the sender's memory, which this process may read until it drops it.
///
/// Dropping hands the slot back to its sender, from any thread, without a system call unless the
/// sender sleeps. It stays readable after its sender, the receiver it came from, or the broker is
/// gone.
pub struct Received {
    bytes: *const u8,
    length: u32,
    slot: SlotId,
    mark: Mark,
    home: NonNull<Returns>,
    cell: NonNull<Cell>,
    /// The bytes, if they are memory of their own. Dropped by hand, so that the others need no call.
    sealed: ManuallyDrop<Option<Box<SealedMemory>>>,
}

// SAFETY: a `Received` is the only holder of its slot (`Held::take`), and `Returns` is Sync.
unsafe impl Send for Received {}
// SAFETY: through `&Received` one can only read.
unsafe impl Sync for Received {}

impl Loan<'_> {
    /// Makes a message of it.
    #[inline]
    pub(crate) fn receive(self) -> Received {
        let Self { cell, slot, length, mark, home } = self;
        Received {
            bytes: cell.bytes(),
            length,
            slot,
            mark,
            home: NonNull::from(home),
            cell: NonNull::from(cell),
            sealed: ManuallyDrop::new(None),
        }
    }
}

impl Received {
    #[inline]
    fn home(&self) -> &Returns {
        // SAFETY: `home` and the mappings live until this slot is put (`Remains`), which only `drop` does.
        unsafe { self.home.as_ref() }
    }

    /// The number its sender gave it: 0, 1, 2 … A step of more than one means messages that were
    /// left out, because this receiver asked to be skipped.
    #[must_use]
    #[inline]
    pub fn sequence(&self) -> u64 {
        self.mark.sequence()
    }

    /// Who sent it.
    #[must_use]
    pub fn sender(&self) -> Peer {
        self.home().peer()
    }

    /// The same message, which is memory of its own.
    pub(crate) fn with(mut self, sealed: SealedMemory) -> Self {
        self.bytes = sealed.bytes.as_ptr();
        *self.sealed = Some(Box::new(sealed));
        self
    }

    /// The same bytes, to be written by this process: each page that is written is copied first, the others
    /// stay shared, and neither the sender nor other receivers see anything of it. The slot goes back
    /// when the view is dropped.
    ///
    /// # Errors
    /// The message, and why the kernel gives no such view.
    pub fn make_private(self) -> Result<Private, (Self, MemoryError)> {
        let length = self.length as usize;
        let view = match (&*self.sealed, self.mechanism()) {
            _ if length == 0 => Ok(None),
            (Some(sealed), _) => Map::copy_on_write(sealed.memory.as_fd(), 0, length as u64).map(|map| Some((map, 0))),
            // What was copied is this process's own already.
            (None, Mechanism::Copy) => Ok(None),
            (None, _) => self.home().copy_on_write(self.bytes as usize, length).map(Some),
        };
        match view {
            Ok(None) => Ok(Private { bytes: self.bytes.cast_mut(), map: None, received: self }),
            Ok(Some((map, begin))) => match map.place(begin, length) {
                Some(bytes) => Ok(Private { bytes, map: Some(map), received: self }),
                None => Err((
                    self,
                    MemoryError::Refused {
                        call: "mmap",
                        asked: length as u64,
                        source: io::Error::other("the view is too short"),
                    },
                )),
            },
            Err(error) => Err((self, error)),
        }
    }

    /// The bytes, to keep, clone and pass on, if they were sealed for good ([`Mechanism::OneShot`]): the
    /// sender gets its place in the line back, and the bytes stay.
    ///
    /// # Errors
    /// The message, if it was not.
    pub fn into_sealed(mut self) -> Result<Sealed, Self> {
        match self.sealed.take() {
            Some(sealed) => Ok((*sealed).into()),
            None => Err(self),
        }
    }

    /// The descriptor of the memory, if it was sealed for good: the message is its first
    /// [`len`](slice::len) bytes. sendfile(2) and splice(2) may have it, which read on after they have
    /// returned.
    ///
    /// # Errors
    /// The message, if it was not.
    pub fn into_fd(mut self) -> Result<OwnedFd, Self> {
        match self.sealed.take() {
            Some(sealed) => Ok(sealed.memory),
            None => Err(self),
        }
    }

    /// By which means it is protected, and so whether its bytes can change while it is held:
    /// [`Mechanism::protection`].
    #[must_use]
    pub fn mechanism(&self) -> Mechanism {
        self.home().mechanism()
    }
}

/// A message that this process may write, without anybody else seeing it: [`Received::make_private`].
pub struct Private {
    bytes: *mut u8,
    /// Dropped before the message is handed back.
    map: Option<Map>,
    received: Received,
}

// SAFETY: it is the only view of this process that is written, and the rest is as for `Received`.
unsafe impl Send for Private {}
// SAFETY: through `&Private` one can only read.
unsafe impl Sync for Private {}

impl Private {
    /// As [`Received::sequence`].
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.received.sequence()
    }

    /// As [`Received::sender`].
    #[must_use]
    pub fn sender(&self) -> Peer {
        self.received.sender()
    }

    /// Whether unwritten pages are shared with the sender still. Those of a message that was copied when it
    /// came are not.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.map.is_some()
    }
}

impl Deref for Private {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        if self.received.is_empty() {
            return &[];
        }
        // SAFETY: so many bytes of the view (`make_private`), or of a copy that nobody else sees; pages that
        // were not written yet are as those of the message.
        unsafe { slice::from_raw_parts(self.bytes, self.received.len()) }
    }
}

impl DerefMut for Private {
    fn deref_mut(&mut self) -> &mut [u8] {
        if self.received.is_empty() {
            return &mut [];
        }
        // SAFETY: as above; nobody looks at the message through `received` any more.
        unsafe { slice::from_raw_parts_mut(self.bytes, self.received.len()) }
    }
}

impl fmt::Debug for Private {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Private").field("len", &self.len()).field("sequence", &self.sequence()).finish_non_exhaustive()
    }
}

impl Deref for Received {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: a `Loan` is made only of bytes inside a slot that was just taken, or points to `sealed`. Copies nobody writes
        // before the slot is handed back; bytes that are shared, no safe code of the sender (invariants 1
        // and 2), and the broker says for which senders that is enough (`State::mechanism`).
        unsafe { slice::from_raw_parts(self.bytes, self.length as usize) }
    }
}

impl AsRef<[u8]> for Received {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("len", &self.length)
            .field("sequence", &self.sequence())
            .field("sender", &self.sender())
            .finish_non_exhaustive()
    }
}

impl Drop for Received {
    #[inline]
    fn drop(&mut self) {
        let Self { slot, mark, home, cell, .. } = *self;
        // By value: a message whose address nobody takes can live in registers.
        hand_back(home, cell, slot, mark);
        if let Some(sealed) = self.sealed.take() {
            drop_sealed(sealed);
        }
    }
}

#[cold]
#[inline(never)]
fn drop_sealed(sealed: Box<SealedMemory>) {
    drop(sealed);
}

/// Hands a slot back, by its one holder.
#[inline(always)]
fn hand_back(home: NonNull<Returns>, cell: NonNull<Cell>, slot: SlotId, mark: Mark) {
    // SAFETY: `home`, which has the cell, and the mappings live until the mark of this slot is cleared
    // (`Remains`).
    let home = unsafe { home.as_ref() };
    let among = home.among();
    home.hand_back(slot, mark);
    // SAFETY: they live until this very store. No reference to `home` is used after this line, and the
    // one to the cell, all atomics, promises nothing about its memory.
    unsafe { cell.as_ref() }.clear();
    among.after_clear();
}
