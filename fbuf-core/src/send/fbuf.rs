//! A slot that is being filled.
//!
//! One of the files of this crate that may be `unsafe`: here an address becomes a slice.
#![allow(unsafe_code)]

use std::{
    fmt,
    io::{self, Read},
    ops::{Deref, DerefMut},
    ptr::NonNull,
    slice,
    sync::Arc,
};

use bytes::{BufMut, buf::UninitSlice};

use crate::{
    memory::Address,
    ring::entry::Body,
    send::pool::{Pool, UnsentFbufs},
    slot::SlotId,
};

/// A slot of this process's pool, held exclusively: fill it, then give it away.
///
/// It behaves like a `Vec<u8>` of fixed capacity: it dereferences to the bytes filled so far, and
/// [`io::Write`], [`BufMut`], [`Fbuf::set_len`] and [`Fbuf::fill_from`] fill more. What is filled is
/// what is sent. Dropped unsent, the slot goes back to its pool, from any thread.
///
/// A message may have more than its bytes: a [tag](Self::set_tag), a [user header](Self::header_mut), and
/// [headroom](Self::set_headroom), in which bytes can be put before those that are there.
///
/// # Alignment
/// A slot begins at a multiple of 64 bytes, or of what the sender was opened with, up to a page. So do the bytes of a
/// message without headroom, here and in each receiver.
///
/// No other process writes its bytes. The kernel sees to that where the slot lies in memory of this process, which no other can
/// map for writing. A slot that is leased can be opened by processes of its owner's user as well: this user, or that of
/// the receiver, where receivers make the slots (`SenderBuilder::from_receiver`). It is made of the memory only of a receiver that is
/// [trusted](crate::trust::Trusted) not to do so.
///
/// Named and shaped after the fbufs of Druschel and Peterson, SOSP 1993.
pub struct Fbuf {
    /// The beginning of the slot.
    bytes: Address,
    home: NonNull<UnsentFbufs>,
    slot: SlotId,
    /// Bytes before the message.
    headroom: u32,
    filled: u32,
    /// Zero if there is none.
    tag: u64,
}

/// What an [`Fbuf`] was when it ended, on its way to receivers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing {
    pub slot: SlotId,
    /// The beginning of the slot.
    pub bytes: Address,
    pub body: Body,
    pub tag: u64,
}

// SAFETY: an fbuf is the only owner of its slot (invariant 2), and `UnsentFbufs` is Sync.
unsafe impl Send for Fbuf {}
// SAFETY: through `&Fbuf` one can only read bytes that nobody writes meanwhile.
unsafe impl Sync for Fbuf {}

/// More bytes than a slot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error(
    "a slot has {capacity} bytes, and {asked} were to be filled: open the sender with larger slots, or send several messages"
)]
pub struct TooLarge {
    /// Bytes that were asked for.
    pub asked: usize,
    /// Bytes that a slot has.
    pub capacity: usize,
}

/// Why [`Fbuf::fill_from`] has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// The slot is full. There may be more to read.
    Full,
    /// There is nothing more to read, and the slot has room left.
    Ended,
}

/// More bytes than there is room for before a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the headroom is {headroom} bytes, and {asked} were to be put before the message: reserve more before it is filled"
)]
#[non_exhaustive]
pub struct NoHeadroom {
    /// Bytes that were to be put there.
    pub asked: usize,
    /// Bytes that there are.
    pub headroom: usize,
}

/// A tag, and receivers were not told that there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("messages of this sender have no tags: open it with tags")]
#[non_exhaustive]
pub struct Untagged;

impl Pool {
    /// The next slot, as an fbuf; none if it is not known to be free.
    #[inline]
    pub fn allocate(&mut self) -> Option<Fbuf> {
        let (slot, bytes) = self.take_free()?;
        Some(self.fbuf(Outgoing { slot, bytes, body: Body::new(0, 0), tag: 0 }))
    }

    /// A slot that was just taken is owned by its fbuf from here on (invariant 2). The list of unsent fbufs and the mappings
    /// live until it is put back or taken back (`Drop for Pool`).
    #[inline]
    pub(crate) fn fbuf(&self, outgoing: Outgoing) -> Fbuf {
        let Outgoing { slot, bytes, body, tag } = outgoing;
        Fbuf { bytes, slot, headroom: body.offset(), filled: body.length(), tag, home: self.home() }
    }

    /// Whether an fbuf is one of this pool.
    #[inline]
    pub(crate) fn owns(&self, fbuf: &Fbuf) -> bool {
        fbuf.home == self.home()
    }

    /// The inside of the Arc of its pool's unsent fbufs. The pointer comes from the Arc and not from a reference to what is in it, for it
    /// also leads to the counts, which lie beside that (`put_back`).
    #[inline]
    pub(super) fn home(&self) -> NonNull<UnsentFbufs> {
        // SAFETY: an Arc points to what it owns, for as long as it lives (invariant 2: the list outlives its fbufs).
        unsafe { NonNull::new_unchecked(Arc::as_ptr(self.unsent()).cast_mut()) }
    }
}

impl Fbuf {
    /// Ends it without putting the slot back.
    #[inline]
    pub(crate) fn into_outgoing(self) -> Outgoing {
        let Self { slot, bytes, headroom, filled, tag, .. } = self;
        std::mem::forget(self);
        Outgoing { slot, bytes, body: Body::new(headroom, filled), tag }
    }

    #[inline]
    fn bytes(&self) -> *mut u8 {
        self.bytes.pointer().as_ptr().wrapping_add(self.headroom as usize)
    }

    #[inline]
    fn home(&self) -> &UnsentFbufs {
        // SAFETY: `home` lives until this slot is put back (`Drop for Pool`, invariant 2), which only `drop` does.
        unsafe { self.home.as_ref() }
    }

    /// How many bytes it can hold, those of the [headroom](Self::headroom) among them: the slot size of its sender.
    #[must_use]
    #[inline]
    pub fn capacity(&self) -> usize {
        self.home().shape().slot_bytes() as usize
    }

    /// How many bytes it can hold behind the headroom.
    #[inline]
    fn room(&self) -> usize {
        self.capacity() - self.headroom as usize
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
    /// [`TooLarge`] beyond the capacity, less the headroom.
    #[inline]
    pub fn set_len(&mut self, length: usize) -> Result<(), TooLarge> {
        if length > self.room() {
            return Err(TooLarge { asked: length, capacity: self.room() });
        }
        self.filled = length as u32;
        Ok(())
    }

    /// The bytes that are not filled yet.
    #[inline]
    pub fn spare_mut(&mut self) -> &mut [u8] {
        // SAFETY: headroom and what is filled are within the capacity, all bytes of a slot are initialised (memory from the kernel is
        // zeroed), and this fbuf owns them (invariant 2): no other process has a writable mapping of it
        // (invariant 1), or it is of a user that is trusted not to use one (`Trusted`).
        unsafe { slice::from_raw_parts_mut(self.bytes().add(self.filled as usize), self.room() - self.filled as usize) }
    }

    /// Reads from `source` straight into the slot until the slot is full or the source has ended, and counts what came as
    /// filled. A read that a signal handler has interrupted is made again.
    ///
    /// ```
    /// # use fbuf_core::{send::{fbuf::Filled, pool::Pool}, slot::Geometry};
    /// # let wake = nix::sys::eventfd::EventFd::new().unwrap().into();
    /// # let mut pool = Pool::new(Geometry::new(4, 2).unwrap(), 2, wake).unwrap();
    /// # let mut allocate = || { pool.collect(1); pool.allocate().unwrap() };
    /// let mut source = &b"123456"[..];
    /// let (mut one, mut other) = (allocate(), allocate());
    /// assert_eq!((one.fill_from(&mut source)?, &one[..]), (Filled::Full, &b"1234"[..]));
    /// assert_eq!((other.fill_from(&mut source)?, &other[..]), (Filled::Ended, &b"56"[..]));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// What `source` says. What came before stays filled.
    pub fn fill_from(&mut self, source: &mut impl Read) -> io::Result<Filled> {
        while self.len() < self.room() {
            match self.read_once_from(source) {
                Ok(0) => return Ok(Filled::Ended),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Filled::Full)
    }

    /// Reads once from `source` straight into the slot, and counts what came as filled.
    ///
    /// Returns how many bytes came; 0 at the end of `source`, or when the slot is full.
    ///
    /// # Errors
    /// What `source` says.
    pub fn read_once_from(&mut self, source: &mut impl Read) -> io::Result<usize> {
        let spare = self.spare_mut();
        let count = source.read(spare)?.min(spare.len());
        self.filled += count as u32;
        Ok(count)
    }
}

/// What a message has beside its bytes.
impl Fbuf {
    /// How many bytes of the slot lie before the message.
    #[must_use]
    pub fn headroom(&self) -> usize {
        self.headroom as usize
    }

    /// Leaves so many bytes of the slot free before the message, to be [put before it](Self::prepend) later. What is filled
    /// already is moved.
    ///
    /// # Errors
    /// [`TooLarge`] if the slot has no room for both.
    pub fn set_headroom(&mut self, headroom: usize) -> Result<(), TooLarge> {
        let (capacity, filled) = (self.capacity(), self.filled as usize);
        if headroom > capacity - filled {
            return Err(TooLarge { asked: headroom.saturating_add(filled), capacity });
        }
        let begin = self.headroom as usize;
        self.slot_mut().copy_within(begin..begin + filled, headroom);
        self.headroom = headroom as u32;
        Ok(())
    }

    /// Puts bytes before the message, in its headroom: a protocol's header before a payload that lies where it was read to.
    ///
    /// # Errors
    /// [`NoHeadroom`], and nothing has changed.
    pub fn prepend(&mut self, bytes: &[u8]) -> Result<(), NoHeadroom> {
        let headroom = self.headroom();
        let rest = headroom.checked_sub(bytes.len()).ok_or(NoHeadroom { asked: bytes.len(), headroom })?;
        self.slot_mut()[rest..headroom].copy_from_slice(bytes);
        (self.headroom, self.filled) = (rest as u32, self.filled + bytes.len() as u32);
        Ok(())
    }

    /// Takes so many bytes, or all that there are, from the front of the message. They become headroom; nothing is moved.
    pub fn trim_front(&mut self, count: usize) {
        let count = count.min(self.len()) as u32;
        (self.headroom, self.filled) = (self.headroom + count, self.filled - count);
    }

    /// All bytes of the slot.
    fn slot_mut(&mut self) -> &mut [u8] {
        // SAFETY: as of `spare_mut`, from the beginning of the slot on.
        unsafe { slice::from_raw_parts_mut(self.bytes.pointer().as_ptr(), self.capacity()) }
    }

    /// The number that goes with the message; zero, unless one was [set](Self::set_tag).
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.tag
    }

    /// Sets the number that goes with the message: of a request, a stream, a kind, as its program likes. It travels beside the
    /// bytes, and no process can change it once it was read (`Received::tag`). Zero is no tag.
    ///
    /// # Errors
    /// [`Untagged`] if the sender was not opened with tags.
    #[inline]
    pub fn set_tag(&mut self, tag: u64) -> Result<(), Untagged> {
        if tag != 0 && !self.home().shape().has_tags() {
            return Err(Untagged);
        }
        self.tag = tag;
        Ok(())
    }

    /// The user header of the slot, at a multiple of 64 bytes: as many bytes as the sender was opened with, none if it was not
    /// opened with any. It goes with every message. Before it is written it holds what this sender has
    /// written there when it last used the slot, or zeroes.
    #[must_use]
    pub fn header_mut(&mut self) -> &mut [u8] {
        let header = self.home().shape().header();
        // SAFETY: a header lies in the same memory as its slot, and this fbuf owns both (invariants 1 and 2, as `spare_mut` has it).
        unsafe { slice::from_raw_parts_mut(self.bytes.pointer().as_ptr().add(header.start), header.len()) }
    }

    /// As [`Self::header_mut`], to be read.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        let header = self.home().shape().header();
        // SAFETY: as of `header_mut`.
        unsafe { slice::from_raw_parts(self.bytes.pointer().as_ptr().add(header.start), header.len()) }
    }
}

impl Deref for Fbuf {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: headroom and what is filled are within the capacity, all bytes of a slot are initialised, and this fbuf owns them (invariants 1 and 2,
        // as `spare_mut` has it).
        unsafe { slice::from_raw_parts(self.bytes(), self.filled as usize) }
    }
}

impl DerefMut for Fbuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: headroom and what is filled are within the capacity, all bytes of a slot are initialised, and this fbuf owns them (invariants 1 and 2,
        // as `spare_mut` has it).
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
        self.room() - self.filled as usize
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
        // By value: an fbuf can live in registers as long as its address is not taken.
        put_back(self.home, self.slot);
    }
}

/// Puts a slot back that was not sent, or lets go of one that was sent and kept.
#[cold]
#[inline(never)]
pub(super) fn put_back(home: NonNull<UnsentFbufs>, slot: SlotId) {
    // SAFETY: `home` comes from an Arc (`Pool::home`) and lives until this slot is put back (`Drop for Pool`),
    // which happens below; counted here, it also lives until that has returned.
    let unsent = unsafe {
        Arc::increment_strong_count(home.as_ptr());
        Arc::from_raw(home.as_ptr())
    };
    // The mappings, if this was the last fbuf of a sender that is gone.
    drop(unsent.put_back(slot));
}
