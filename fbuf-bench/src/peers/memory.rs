//! Memory that two processes write, without any of the rules that this project is about: for the
//! peers that measure what those rules cost.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use shared_memory::Shmem;

use crate::Result;

/// Memory that both processes have mapped, zeroed at first: words, and behind them bytes.
pub(crate) struct Memory {
    base: NonNull<u8>,
    words: usize,
    bytes: usize,
    kept: Kept,
}

/// What keeps it mapped.
enum Kept {
    Mapping,
    Shmem(#[expect(dead_code, reason = "unmaps when dropped")] Box<Shmem>),
}

impl Memory {
    /// The size of so many words and bytes together.
    pub(crate) fn size(words: usize, bytes: usize) -> usize {
        words * size_of::<AtomicU64>() + bytes
    }

    /// A new memfd of that size.
    pub(crate) fn file(words: usize, bytes: usize) -> Result<OwnedFd> {
        let file = memfd::MemfdOptions::new().create("bench")?.into_file();
        let size = Self::size(words, bytes) as u64;
        file.set_len(size)?;
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, size.try_into()?)?;
        Ok(file.into())
    }

    /// Maps a memfd made by [`Self::file`] with the same numbers.
    pub(crate) fn map(file: &OwnedFd, words: usize, bytes: usize) -> Result<Self> {
        let size = NonZeroUsize::new(Self::size(words, bytes)).ok_or("nothing to map")?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, file.as_fd(), 0) }?;
        Ok(Self { base: base.cast(), words, bytes, kept: Kept::Mapping })
    }

    /// Takes over memory of the crate shared_memory.
    pub(crate) fn of(shmem: Shmem, words: usize, bytes: usize) -> Result<Self> {
        let base = NonNull::new(shmem.as_ptr()).filter(|_| shmem.len() >= Self::size(words, bytes));
        Ok(Self { base: base.ok_or("too little memory")?, words, bytes, kept: Kept::Shmem(Box::new(shmem)) })
    }

    /// The words.
    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned and `size` long, and atomics may be written by others.
        unsafe { NonNull::slice_from_raw_parts(self.base.cast(), self.words).as_ref() }
    }

    /// The address of `length` of the bytes, from `offset` on.
    #[inline]
    fn at(&self, offset: usize, length: usize) -> NonNull<u8> {
        assert!(offset + length <= self.bytes);
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.base.add(self.words * size_of::<AtomicU64>() + offset) }
    }

    /// Bytes that nobody else reads or writes meanwhile.
    ///
    /// # Safety
    /// The caller's protocol says that they are its own.
    #[inline]
    pub(crate) unsafe fn bytes_mut(&mut self, offset: usize, length: usize) -> &mut [u8] {
        // SAFETY: inside the mapping, and the caller's, who also borrows `self` for it.
        unsafe { NonNull::slice_from_raw_parts(self.at(offset, length), length).as_mut() }
    }

    /// Bytes that nobody else writes meanwhile.
    ///
    /// # Safety
    /// The caller's protocol says that they were given to it.
    #[inline]
    pub(crate) unsafe fn bytes(&self, offset: usize, length: usize) -> &[u8] {
        // SAFETY: inside the mapping, and not written, as the caller knows.
        unsafe { NonNull::slice_from_raw_parts(self.at(offset, length), length).as_ref() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Kept::Mapping = self.kept {
            // SAFETY: exactly what `map` mapped, and nothing points into it any more.
            let _ = unsafe { munmap(self.base.cast(), Self::size(self.words, self.bytes)) };
        }
    }
}

/// Sleeps while the lower half of a word has this value, for at most a second (futex(2)). May return
/// early.
pub(crate) fn futex_wait(word: &AtomicU64, value: u32) {
    let time = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    // SAFETY: the kernel reads the word and the time, both of which live until it returns.
    unsafe { libc::syscall(libc::SYS_futex, lower_half(word), libc::FUTEX_WAIT, value, &raw const time) };
}

/// Wakes who sleeps on the lower half of a word (futex(2)).
pub(crate) fn futex_wake(word: &AtomicU64) {
    // SAFETY: the kernel uses the address as a name only.
    unsafe { libc::syscall(libc::SYS_futex, lower_half(word), libc::FUTEX_WAKE, 1) };
}

fn lower_half(word: &AtomicU64) -> *mut u32 {
    word.as_ptr().cast::<u32>().wrapping_add(usize::from(cfg!(target_endian = "big")))
}
