//! Whether the kernel permits a mapping: tried, and undone.
#![allow(unsafe_code)]

use std::{io, num::NonZeroUsize, os::fd::BorrowedFd};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mprotect, munmap};

/// What [`try_page`] tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trial {
    /// Map it shared, to read.
    Shared,
    /// Map it shared, to write.
    SharedWritable,
    /// Map it shared, to read, and ask for writing afterwards (mprotect(2)).
    MadeWritable,
    /// Map it privately, to read.
    Private,
    /// Map it shared, to read, and enter it into the page table (MADV_POPULATE_READ).
    Populated,
    /// Map it shared, to write, and enter it into the page table (MADV_POPULATE_WRITE).
    PopulatedWritable,
}

/// Maps the first page of a file for as long as it takes to learn whether the kernel permits it.
/// Not for files of huge pages.
///
/// # Errors
/// What mmap(2), mprotect(2) or madvise(2) say.
pub fn try_page(file: BorrowedFd<'_>, trial: Trial) -> io::Result<()> {
    const LENGTH: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
    let writable = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let protection = match trial {
        Trial::SharedWritable | Trial::PopulatedWritable => writable,
        _ => ProtFlags::PROT_READ,
    };
    let kind = if trial == Trial::Private { MapFlags::MAP_PRIVATE } else { MapFlags::MAP_SHARED };
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { mmap(None, LENGTH, protection, kind, file, 0) }?;
    let populate = |advice| {
        // SAFETY: the page was just mapped, and populating changes no byte of it; where the file
        // has none, the kernel says so instead of sending SIGBUS.
        unsafe { madvise(base, LENGTH.get(), advice) }
    };
    let result = match trial {
        Trial::Populated => populate(MmapAdvise::MADV_POPULATE_READ),
        Trial::PopulatedWritable => populate(MmapAdvise::MADV_POPULATE_WRITE),
        // SAFETY: the page was just mapped, and no reference into it exists.
        Trial::MadeWritable => unsafe { mprotect(base, LENGTH.get(), writable) },
        Trial::Shared | Trial::SharedWritable | Trial::Private => Ok(()),
    };
    // SAFETY: exactly what was mapped above, and nothing points into it.
    let unmapped = unsafe { munmap(base, LENGTH.get()) };
    Ok(result.and(unmapped)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::memory::Map;

    #[test]
    fn a_reader_of_sealed_memory_can_neither_map_it_writable_nor_make_it_so() {
        let (_map, fd) = Map::create("fbuf-test", 4096).unwrap();
        for trial in [Trial::Shared, Trial::Private, Trial::Populated] {
            assert!(try_page(fd.as_fd(), trial).is_ok(), "{trial:?}");
        }
        for trial in [Trial::SharedWritable, Trial::MadeWritable, Trial::PopulatedWritable] {
            assert_eq!(try_page(fd.as_fd(), trial).unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{trial:?}");
        }
    }
}
