//! Memory of this process alone: of zeroes, a copy, or a view that copies what is written.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    io,
    num::NonZeroUsize,
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    slice,
};

use nix::{
    errno::Errno,
    sys::{
        mman::{MapFlags, ProtFlags, mmap, mmap_anonymous},
        uio::pread,
    },
};

use super::{Map, can_provide, name_limit};
use crate::memory::{MemoryError, Reserved, available};

impl Map {
    /// Memory of this process alone, of zeroes.
    ///
    /// # Errors
    /// [`MemoryError`]: not enough memory.
    pub(crate) fn private(size: u64) -> Result<Self, MemoryError> {
        #[cfg(miri)]
        if crate::memory::heap::IS_USED {
            return crate::memory::heap::private(size);
        }
        available::check(size)?;
        let map = Self::anonymous(size, MapFlags::MAP_PRIVATE)?;
        map.advise(libc::MADV_POPULATE_WRITE);
        Ok(map)
    }

    /// As [`Self::private`], with no page yet: they are [provided](Self::provide) before they are used.
    ///
    /// # Errors
    /// As [`Self::private`].
    pub(crate) fn private_growing(size: u64) -> Result<Self, MemoryError> {
        if !can_provide() {
            return Self::private(size);
        }
        available::check(size)?;
        Self::anonymous(size, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)
    }

    fn anonymous(size: u64, flags: MapFlags) -> Result<Self, MemoryError> {
        let refused = |source| MemoryError::Refused { call: "mmap", asked: size, error: source };
        let length = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or_else(|| refused(io::Error::other("nothing to map")))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) };
        Ok(Self::of(base.map_err(|error| refused(name_limit(error)))?.cast(), length.get()))
    }

    /// As [`Self::private`], of pages that exist once they are written, for what may never be needed. Nothing is
    /// refused because there is little memory now.
    ///
    /// # Errors
    /// [`MemoryError::Refused`]
    pub(crate) fn of_zeroes(size: u64) -> Result<Self, MemoryError> {
        let map = Self::anonymous(size, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)?;
        // One cell is not to cost two megabytes.
        map.advise(libc::MADV_NOHUGEPAGE);
        Ok(map)
    }

    /// A view of part of some memory for this process alone: it may be written, and each page that is
    /// written is copied first. `begin` is a multiple of the page size.
    ///
    /// # Errors
    /// [`MemoryError`]: the kernel does not map it.
    pub(crate) fn copy_on_write(memory: BorrowedFd<'_>, begin: u64, size: u64) -> Result<Self, MemoryError> {
        let refused = |source| MemoryError::Refused { call: "mmap", asked: size, error: source };
        let length = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or_else(|| refused(io::Error::other("nothing to map")))?;
        let begin = begin.try_into().map_err(|_| refused(io::Error::other("beyond any file")))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_PRIVATE, memory, begin) }
            .map_err(|error| refused(name_limit(error)))?;
        Ok(Self::of(base.cast(), length.get()))
    }

    /// Memory of this process alone, with these parts of a file at the places at which they are there.
    ///
    /// # Errors
    /// [`MemoryError`]: not enough memory, or what pread(2) says, or that the file is shorter.
    pub(crate) fn private_copy(file: BorrowedFd<'_>, parts: &[Range<usize>]) -> Result<Self, MemoryError> {
        let size = parts.iter().map(|part| part.end).max().unwrap_or(0);
        let map = Self::private((size as u64).max(1))?;
        for part in parts {
            // SAFETY: it was just mapped, to be written, and there is no other pointer into it.
            unsafe { map.fill_from(file, part.clone()) }?;
        }
        Ok(map)
    }

    /// As [`Self::writable`], of memory that nothing maps yet, with all bytes of another.
    ///
    /// # Errors
    /// [`MemoryError`]: also what pread(2) says.
    pub(crate) fn writable_copy(memory: &Reserved, of: &Reserved) -> Result<Self, MemoryError> {
        let map = Self::writable(memory)?;
        // SAFETY: it was just mapped, to be written, and there is no other pointer into it.
        unsafe { map.fill_from(of.as_fd(), 0..of.size() as usize) }?;
        Ok(map)
    }

    /// Reads a part of a file to the same place of this map.
    ///
    /// # Errors
    /// [`MemoryError::Refused`]: what pread(2) says, or that the file is shorter.
    ///
    /// # Safety
    /// The map can be written, and there is no other reference into it.
    unsafe fn fill_from(&self, file: BorrowedFd<'_>, part: Range<usize>) -> Result<(), MemoryError> {
        // SAFETY: all of the mapping, which can be written, and the only reference into it (see above).
        let all = unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), self.size) };
        let (begin, length) = (part.start, part.len());
        let read = match all.get_mut(part) {
            Some(bytes) => read_exactly(file, bytes, begin),
            None => Err(io::Error::other("more than the map holds")),
        };
        read.map_err(|source| MemoryError::Refused { call: "pread", asked: length as u64, error: source })
    }
}

fn read_exactly(file: BorrowedFd<'_>, bytes: &mut [u8], begin: usize) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match pread(file, &mut bytes[done..], (begin + done) as i64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
