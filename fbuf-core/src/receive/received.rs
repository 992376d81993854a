//! A message that was received.
//!
//! One of the files of this crate that may be `unsafe`: here an address becomes a slice.
#![allow(unsafe_code)]

use std::{
    fmt,
    mem::ManuallyDrop,
    ops::Deref,
    os::fd::OwnedFd,
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU8, AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;

use crate::{
    memory::{Map, MemoryError, Sealed, SealedMemory},
    peer::Peer,
    points,
    protection::{Mechanism, Protection},
    receive::{
        held::Cell,
        link::{Loan, Returns},
        reading::Kept,
    },
    slot::{Mark, SlotId},
    wait,
};

/// A message: bytes in the sender's memory, which this process may read until it drops it.
///
/// Dropping hands the slot back to its sender, from any thread, without a system call unless the
/// sender sleeps. It stays readable after its sender, the receiver it came from, or the broker is
/// gone.
///
/// # Whether its bytes can change
/// [`Self::mechanism`] says. A sealed message cannot change. A volatile one is read where it was written: safe code of the
/// sender cannot change it, but its unsafe code can, and so can a process that was forked from it. So only a sender of the
/// same user, or one that the policy of the broker trusts, is read like this; of any other sender the message is a copy, or
/// was sealed for good.
///
/// So the `&[u8]` of a volatile message, of which Rust says that its bytes do not change, rests on that sender, as the one
/// of a mapped file rests on all that can write the file. [`Self::copy_to_slice`] makes no slice of them.
///
/// # Giving it to the kernel
/// The bytes are mapped for reading only. write(2), send(2), `O_DIRECT` and io_uring's write may have them.
///
/// * What the kernel reads after the call has returned, it reads when the slot may have been used again. Hold the message until
///   the completion: of `MSG_ZEROCOPY` that is a message on the socket's error queue, of io_uring the last entry in the
///   completion queue (`IORING_CQE_F_NOTIF` for zero-copy sends). sendfile(2) and splice(2) tell of no completion: give
///   them only the descriptor of a one-shot ([`Self::into_fd`]).
/// * Buffers cannot be registered with io_uring (`IORING_REGISTER_BUFFERS`): the kernel wants to write what is
///   registered, and answers `EFAULT` for memory that is mapped read-only. Write without registering; or register
///   a buffer of your own.
#[doc(alias("uf_deallocate", "release", "sample", "loaned"))]
pub struct Received {
    bytes: *const u8,
    length: u32,
    slot: SlotId,
    mark: Mark,
    /// Zero if there is none.
    tag: u64,
    home: NonNull<Returns>,
    cell: NonNull<Cell>,
    /// What has the bytes, if they are not simply read where they were written. Dropped by hand, so that
    /// the others need no call.
    kept: ManuallyDrop<Option<Box<Kept>>>,
}

// SAFETY: a `Received` is the only holder of its slot (`Held::take`), and `Returns` is Sync.
unsafe impl Send for Received {}
// SAFETY: through `&Received` one can only read.
unsafe impl Sync for Received {}

impl Loan<'_> {
    /// Makes a message of it.
    #[inline]
    pub(crate) fn receive(self) -> Received {
        let Self { cell, slot, offset, length, mark, tag, home } = self;
        Received {
            bytes: cell.bytes().wrapping_add(offset as usize),
            length,
            slot,
            mark,
            tag,
            home: NonNull::from(home),
            cell: NonNull::from(cell),
            kept: ManuallyDrop::new(None),
        }
    }
}

impl Received {
    #[inline]
    fn home(&self) -> &Returns {
        // SAFETY: `home` and the mappings live until the mark of this slot is cleared (`Retire`, invariant 2), which
        // only `drop` does.
        unsafe { self.home.as_ref() }
    }

    /// The number its sender gave it: 0, 1, 2 … A step of more than one means messages that were
    /// left out, because this receiver asked to be skipped, or the sender is lossy.
    #[must_use]
    #[inline]
    pub fn sequence(&self) -> u64 {
        self.mark.sequence()
    }

    /// The number that its sender's program gave it ([`Fbuf::set_tag`](crate::send::fbuf::Fbuf::set_tag)); zero if it gave it
    /// none. No process can change it any more.
    #[must_use]
    #[inline]
    pub fn tag(&self) -> u64 {
        self.tag
    }

    /// The user header that its sender's program wrote beside the bytes
    /// ([`Fbuf::header_mut`](crate::send::fbuf::Fbuf::header_mut)), at a multiple of 64 bytes: as many bytes as the sender was
    /// opened with, and protected as the bytes are.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        let header = self.home().header();
        if header.is_empty() {
            return &[];
        }
        // SAFETY: `cell` lives as long as `home`, for which see there.
        let slot = self.kept().map_or_else(|| unsafe { self.cell.as_ref() }.bytes().cast_const(), Kept::bytes);
        // SAFETY: it lies in the same memory as the bytes, and so what is said of them (`deref`) holds for it.
        unsafe { slice::from_raw_parts(slot.add(header.start), header.len()) }
    }

    /// When its sender wrote it, as CLOCK_MONOTONIC tells, if the sender was opened with times: a peer's word, which need not be
    /// true. That clock is the same for all processes of a machine that are in one time namespace.
    #[must_use]
    pub fn sent_at(&self) -> Option<Duration> {
        let time = self.home().time(self.slot);
        (time != 0).then(|| Duration::from_nanos(time))
    }

    /// How long ago that was: zero if it is yet to come.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let now = Duration::from_nanos(wait::now()?);
        Some(now.saturating_sub(self.sent_at()?))
    }

    /// Its sender.
    #[must_use]
    pub fn sender(&self) -> Peer {
        self.home().peer()
    }

    /// The same message, with its bytes elsewhere.
    pub(crate) fn with(mut self, kept: Kept, offset: u32) -> Self {
        self.bytes = kept.bytes().wrapping_add(offset as usize);
        *self.kept = Some(Box::new(kept));
        self
    }

    /// What has the bytes, if they are not simply read where they were written.
    pub(super) fn kept(&self) -> Option<&Kept> {
        self.kept.as_deref()
    }

    /// A view of them, to be written by this process alone: the mapping, and where they begin in it.
    pub(super) fn view_in_segment(&self) -> Result<(Map, usize), MemoryError> {
        self.home().views().make_private(self.bytes as usize, self.length())
    }

    /// How many bytes it has, without a look at them.
    pub(crate) fn length(&self) -> usize {
        self.length as usize
    }

    /// Copies the message, also if another process may change it meanwhile: what arrives may then be a mixture, and does not change any
    /// more.
    ///
    /// # Panics
    /// `target` is not as long as the message.
    pub fn copy_to_slice(&self, target: &mut [u8]) {
        assert_eq!(target.len(), self.length(), "a message is copied to a slice that is as long as it");
        // As many words as there are between the first and the last aligned address.
        let words = self.bytes.align_offset(size_of::<u64>()).min(target.len());
        let (head, rest) = target.split_at_mut(words);
        let (words, tail) = rest.as_chunks_mut();
        let mut from = self.bytes;
        let copy_bytes = |to: &mut [u8], from: &mut *const u8| {
            for to in to {
                // SAFETY: inside the message, which stays mapped while it is held (invariant 2); an atomic, which another
                // process may write meanwhile.
                *to = unsafe { &*from.cast::<AtomicU8>() }.load(Ordering::Relaxed);
                *from = from.wrapping_add(1);
            }
        };
        copy_bytes(head, &mut from);
        for to in words {
            // SAFETY: inside the message, which stays mapped while it is held (invariant 2), and aligned; an atomic,
            // which another process may write meanwhile.
            *to = unsafe { &*from.cast::<AtomicU64>() }.load(Ordering::Relaxed).to_ne_bytes();
            from = from.wrapping_add(size_of::<u64>());
        }
        copy_bytes(tail, &mut from);
    }

    /// Where the bytes are.
    pub(super) fn bytes(&self) -> *const u8 {
        self.bytes
    }

    /// The bytes, to keep, clone and pass on, if they were sealed for good ([`Mechanism::OneShot`]): the
    /// sender gets its place in the line back, and the bytes stay.
    ///
    /// # Errors
    /// The message, if it was not.
    pub fn into_sealed(self) -> Result<Sealed, Self> {
        self.take_sealed().map(Sealed::from)
    }

    fn take_sealed(mut self) -> Result<SealedMemory, Self> {
        match self.kept.take().map(|kept| *kept) {
            Some(Kept::Sealed(sealed)) => Ok(sealed),
            other => {
                *self.kept = other.map(Box::new);
                Err(self)
            }
        }
    }

    /// The descriptor of the memory, if it was sealed for good: the message is its first
    /// [`len`](slice::len) bytes. sendfile(2) and splice(2) may have it, which read on after they have
    /// returned.
    ///
    /// # Errors
    /// The message, if it was not.
    pub fn into_fd(self) -> Result<OwnedFd, Self> {
        self.take_sealed().map(|sealed| sealed.memory.into_fd())
    }

    /// By which means it is protected, and so whether its bytes can change while it is held:
    /// [`Mechanism::protection`].
    #[must_use]
    pub fn mechanism(&self) -> Mechanism {
        self.kept().map_or_else(|| self.home().mechanism(), Kept::mechanism)
    }

    /// Whether its bytes are those that arrived, as far as [`Self::mechanism`] can tell: not if it is volatile,
    /// nor if its lease was taken away by the kernel, because this process was stopped for longer than
    /// fs.lease-break-time while somebody was about to write.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.kept().map_or_else(|| self.mechanism().protection() > Protection::Volatile, Kept::is_intact)
    }
}

impl Deref for Received {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: they lie in a slot that was just taken, or in `kept`, which says why nobody changes them.
        // Nobody writes a copy before the slot is handed back; nor, of what is shared, safe code of the sender
        // (invariants 1 and 2), which is trusted with the rest (`Trusted`, and the docs of this type).
        unsafe { slice::from_raw_parts(self.bytes, self.length as usize) }
    }
}

impl AsRef<[u8]> for Received {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// The bytes are where they were, without a copy; the slot goes back to its sender when the last of these [`Bytes`] and of those
/// that were split off it is dropped. Whether they can change, [`Received`] says.
impl From<Received> for Bytes {
    fn from(received: Received) -> Self {
        Self::from_owner(received)
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
        if let Some(kept) = self.kept.take() {
            let_go(kept, home, slot);
        }
        // By value: a message can live in registers, as long as no code takes its address.
        hand_back(home, cell, slot, mark);
    }
}

/// Lets go of what has the bytes, before the slot is handed back.
#[cold]
#[inline(never)]
#[expect(clippy::boxed_local, reason = "opened here, and not wherever a message is dropped")]
fn let_go(kept: Box<Kept>, home: NonNull<Returns>, slot: SlotId) {
    // SAFETY: `home` lives until the mark of this slot is cleared (`Retire`), which comes after.
    kept.let_go(slot, unsafe { home.as_ref() });
}

/// Hands a slot back, by its one holder.
#[inline(always)]
fn hand_back(home: NonNull<Returns>, cell: NonNull<Cell>, slot: SlotId, mark: Mark) {
    // SAFETY: `home`, which has the cell, and the mappings live until the mark of this slot is cleared
    // (`Retire`).
    let home = unsafe { home.as_ref() };
    let among = home.among();
    points::reach("return: begun");
    home.hand_back(slot, mark);
    points::reach("return: handed back");
    // SAFETY: they live until this very store (`Retire`, invariant 2). No reference to `home` is used after this
    // line, and the one to the cell, all atomics, promises nothing about its memory (rust-lang/rust#55005).
    unsafe { cell.as_ref() }.clear();
    points::reach("return: cleared");
    among.after_clear();
}
