//! Which pages of a mapping exist: all, or those that were asked for so far.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    io,
    ops::Range,
    os::fd::{BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU8, Ordering},
};

use nix::sys::{mman::ProtFlags, stat::fstat};

use super::Map;
use crate::{
    memory::{
        HUGE_PAGE, MemoryError, Reserved, Seals,
        memfd::{reserved, unmappable, verify_promised},
    },
    violation::Unsuitable,
};

impl Map {
    /// As [`Self::attach`], but nothing may be looked at before it was [provided](Self::provide): for memory of a peer that is
    /// not trusted and chose its size, which would have this process wait.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub(crate) fn attach_unread(fd: BorrowedFd<'_>, size: u64) -> Result<Self, Unsuitable> {
        if !can_provide() {
            return Self::attach(fd, size);
        }
        Self::attach_sealed(fd, size, Seals::OneWriter)
    }

    /// As [`Self::create`], with nothing but the first page: more is [provided](Self::provide) as it is needed.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub(crate) fn create_growing(name: &str, size: u64) -> Result<(Self, OwnedFd), MemoryError> {
        if !can_provide() {
            return Self::create(name, size);
        }
        let memory = Reserved::promised(name, size, 4096)?;
        let map = Self::writable(&memory)?;
        if size < HUGE_PAGE {
            map.advise(libc::MADV_NOHUGEPAGE);
        }
        Ok((map, memory.seal()?))
    }

    /// As [`Self::attach`], of memory not all of which need exist. What does not may be looked at only once it was
    /// [provided](Self::provide), lest there be no memory for it then.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub(crate) fn attach_growing(fd: BorrowedFd<'_>, size: u64) -> Result<Self, Unsuitable> {
        if !can_provide() {
            return Self::attach(fd, size);
        }
        verify_promised(fd, size, Seals::OneWriter)?;
        let map = Self::new(fd, size, ProtFlags::PROT_READ);
        Ok(map.map_err(unmappable("mmap"))?.of_peer(fd))
    }

    /// The same, all pages of which exist: memory that was verified may lack as many as lie behind its end. A page that was
    /// provided stays: its seals keep it, and what fallocate(2) takes back when it is interrupted is what has never been read.
    ///
    /// # Errors
    /// [`Unsuitable::Holes`] as soon as a page was made, so that few are; [`Unsuitable::Unmappable`].
    pub(super) fn whole(self, fd: BorrowedFd<'_>) -> Result<Self, Unsuitable> {
        // What Miri runs on has all its pages.
        if cfg!(miri) {
            return Ok(self);
        }
        let reserved = || fstat(fd).map(|stat| reserved(&stat)).map_err(unmappable("fstat"));
        let reserved_before = reserved()?;
        for begin in (0..self.size).step_by(HUGE_PAGE as usize) {
            let provided = self.provide(begin..begin + HUGE_PAGE as usize, false);
            provided.map_err(unmappable("madvise"))?;
            let made = reserved()?.saturating_sub(reserved_before);
            if made > 0 {
                let size = self.size as u64;
                return Err(Unsuitable::Holes { reserved: size.saturating_sub(made), size });
            }
        }
        Ok(self)
    }

    /// Makes the pages of a file exist that is smaller than a huge page, as small ones. Without being asked, the kernel
    /// takes a huge page for each file where shmem_enabled is "always". What it does not do here, fallocate(2) does.
    pub(crate) fn make_small_pages(file: BorrowedFd<'_>, size: u64) {
        if let Ok(map) = Self::new(file, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) {
            map.advise(libc::MADV_NOHUGEPAGE);
            map.populate();
        }
    }

    /// Has these bytes exist, which begin with a page, to be read or to be written, so that no access to them fails later.
    /// There are none behind the end.
    ///
    /// # Errors
    /// What madvise(2) says: there is no memory.
    pub(crate) fn provide(&self, bytes: Range<usize>, writes: bool) -> io::Result<()> {
        let advice = if writes { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        let begin = bytes.start.min(self.size);
        let length = bytes.end.clamp(begin, self.size) - begin;
        // SAFETY: the range lies in this mapping, and populating changes no byte of it.
        let result = unsafe { libc::madvise(self.base.as_ptr().wrapping_add(begin).cast(), length, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Whether the kernel can be told to have pages exist that are only mapped: since 5.14. Where it cannot, they all
/// exist from the beginning.
pub(crate) fn can_provide() -> bool {
    /// Whether it was found out, and that it can. No lock: a child that is forked meanwhile would wait for ever.
    static CAN: AtomicU8 = AtomicU8::new(0);
    // Relaxed: each thread that finds out stores the same number.
    match CAN.load(Ordering::Relaxed) {
        0 => {
            // SAFETY: no bytes, of which none changes.
            let asked = || unsafe { libc::madvise(std::ptr::null_mut(), 0, libc::MADV_POPULATE_WRITE) };
            // Where Miri runs this, all memory exists from the beginning.
            let can = cfg!(not(miri)) && asked() == 0;
            CAN.store(1 + u8::from(can), Ordering::Relaxed);
            can
        }
        found => found == 2,
    }
}
