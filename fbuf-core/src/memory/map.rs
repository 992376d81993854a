//! Mappings of shared memory, and the tables of atomic words laid over them.
//!
//! One of the files of this crate that may be `unsafe`: everything that says which bytes of
//! another process may be looked at, and as what, is decided here.
#![allow(unsafe_code)]

use std::{
    io,
    marker::PhantomData,
    num::NonZeroUsize,
    ops::{Deref, Range},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    sys::{
        mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, mremap, munmap},
        uio::pread,
    },
};
use zerocopy::FromBytes;

use super::{MemoryError, Reserved, Seals, room, verify};
use crate::violation::Unsuitable;

/// A shared mapping of a whole memfd, writable only in the process that made the memfd.
#[derive(Debug)]
pub struct Map {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; `Map` itself only hands out raw
// pointers, and who may follow them is settled where that is done.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Creates, reserves, maps and seals a memfd. This mapping is the only one that will ever be
    /// able to write it; the descriptor is for the readers.
    ///
    /// # Errors
    /// [`MemoryError`]: not enough memory, or a kernel that lacks what this needs.
    pub fn create(name: &str, size: u64) -> Result<(Self, OwnedFd), MemoryError> {
        let memory = Reserved::new(name, size)?;
        let map = Self::writable(&memory)?;
        map.advise(libc::MADV_POPULATE_WRITE);
        Ok((map, memory.seal()?))
    }

    /// Maps what a peer sent, read-only, once it has been verified.
    ///
    /// # Errors
    /// [`Unsuitable`]: it is not what a peer may send.
    pub fn attach(fd: BorrowedFd<'_>, size: u64) -> Result<Self, Unsuitable> {
        Self::attach_sealed(fd, size, Seals::OneWriter)
    }

    fn attach_sealed(fd: BorrowedFd<'_>, size: u64, seals: Seals) -> Result<Self, Unsuitable> {
        verify(fd, size, seals)?;
        let map =
            Self::new(fd, size, ProtFlags::PROT_READ).map_err(|error| Unsuitable::Unmappable(error.to_string()))?;
        map.advise(libc::MADV_POPULATE_READ);
        Ok(map)
    }

    /// Maps memory that was reserved, to be written.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn writable(memory: &Reserved) -> Result<Self, MemoryError> {
        let size = memory.size();
        Self::new(memory.as_fd(), size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
            .map_err(|source| MemoryError::Refused { call: "mmap", asked: size, source })
    }

    /// Not in children that are forked: who reads or writes it there gets a SIGSEGV.
    pub(crate) fn kept_from_children(self) -> Self {
        self.advise(libc::MADV_DONTFORK);
        self
    }

    /// Has the kernel map all its pages now, if it can, rather than each when it is written.
    pub(crate) fn populate(&self) {
        self.advise(libc::MADV_POPULATE_WRITE);
    }

    /// Maps memory that will be leased to others once it is not mapped like this any more, in huge pages if
    /// they are asked for and can be had; all that can be had of it exists then.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn of_writer(writer: BorrowedFd<'_>, size: u64, huge: bool) -> Result<Self, MemoryError> {
        let map = Self::new(writer, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
            .map_err(|source| MemoryError::Refused { call: "mmap", asked: size, source })?;
        if huge {
            map.advise(libc::MADV_HUGEPAGE);
        }
        map.advise(libc::MADV_POPULATE_WRITE);
        Ok(map)
    }

    /// Maps such memory, to read it.
    pub(crate) fn of_reader(reader: BorrowedFd<'_>, size: u64) -> io::Result<Self> {
        let map = Self::new(reader, size, ProtFlags::PROT_READ)?;
        map.advise(libc::MADV_HUGEPAGE);
        map.advise(libc::MADV_POPULATE_READ);
        Ok(map)
    }

    /// Whether the kernel says that some of it lies in transparent huge pages.
    pub(crate) fn is_in_huge_pages(&self) -> bool {
        let Ok(text) = std::fs::read_to_string("/proc/self/smaps") else { return false };
        let begin = format!("{:x}-", self.base.as_ptr() as usize);
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&begin)).skip(1);
        let mapped = lines.find_map(|line| line.strip_prefix("ShmemPmdMapped:"));
        mapped.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).is_some_and(|kb| kb > 0)
    }

    /// Where it begins.
    pub(crate) fn beginning(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Puts a copy of it, of this process alone, in its place: whoever reads it meanwhile reads the same
    /// bytes at the same addresses. They must not change while this is done.
    ///
    /// # Errors
    /// What the kernel says; nothing has changed then.
    pub(crate) fn detach(&self) -> io::Result<()> {
        let copy = Self::private(self.size as u64).map_err(io::Error::other)?;
        if !copy.copy_from(self, 0, self.size) {
            return Err(io::Error::other("the copy is shorter"));
        }
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: both ranges are exactly these mappings and of one size. What is replaced is replaced by
        // the same bytes, at once: who faults on it waits until that is done.
        unsafe { mremap(copy.base.cast(), copy.size, self.size, flags, Some(self.base.cast())) }?;
        // It lies here now.
        std::mem::forget(copy);
        Ok(())
    }

    /// Puts the memory behind a descriptor back in its place, which nobody reads.
    ///
    /// # Errors
    /// What the kernel says; nothing has changed then.
    pub(crate) fn reattach(&self, reader: BorrowedFd<'_>) -> io::Result<()> {
        let length = NonZeroUsize::new(self.size).ok_or_else(|| io::Error::other("nothing to map"))?;
        let address = NonZeroUsize::new(self.base.as_ptr() as usize);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: the range is exactly this mapping, and nobody has a reference into it (see above).
        unsafe { mmap(address, length, ProtFlags::PROT_READ, flags, reader, 0) }?;
        self.advise(libc::MADV_HUGEPAGE);
        self.advise(libc::MADV_POPULATE_READ);
        Ok(())
    }

    /// Has every page of a [copy-on-write](Self::copy_on_write) map be a copy already.
    ///
    /// # Errors
    /// What madvise(2) says: there is no memory, or the kernel is older than 5.14.
    pub(crate) fn separate(addresses: &Range<usize>) -> io::Result<()> {
        let begin = std::ptr::without_provenance_mut::<libc::c_void>(addresses.start);
        // SAFETY: it changes no byte of any mapping, whatever lies there.
        let result = unsafe { libc::madvise(begin, addresses.len(), libc::MADV_POPULATE_WRITE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads the first bytes of a file to the beginning of this map, which this process may write and which
    /// nobody else looks at.
    ///
    /// # Errors
    /// What pread(2) says, or that the file is shorter.
    pub(crate) fn fill_from(&self, file: BorrowedFd<'_>, length: usize) -> io::Result<()> {
        if length > self.size {
            return Err(io::Error::other("more than the map holds"));
        }
        // SAFETY: inside the mapping, writable, and nobody else looks at it (see above).
        let bytes = unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), length) };
        let mut done = 0;
        while done < length {
            match pread(file, &mut bytes[done..], done as i64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn new(fd: BorrowedFd<'_>, size: u64, protection: ProtFlags) -> io::Result<Self> {
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let length = NonZeroUsize::new(size).ok_or_else(|| io::Error::other("nothing to map"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { base: base.cast(), size })
    }

    /// Memory of this process alone, of zeroes.
    ///
    /// # Errors
    /// [`MemoryError`]: not enough memory.
    pub fn private(size: u64) -> Result<Self, MemoryError> {
        room::check(size)?;
        let refused = |source| MemoryError::Refused { call: "mmap", asked: size, source };
        let length = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or_else(|| refused(io::Error::other("nothing to map")))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .map_err(|error| refused(error.into()))?;
        let map = Self { base: base.cast(), size: length.get() };
        map.advise(libc::MADV_POPULATE_WRITE);
        Ok(map)
    }

    /// A view of part of some memory for this process alone: it may be written, and each page that is
    /// written is copied first. `begin` is a multiple of the page size.
    ///
    /// # Errors
    /// [`MemoryError`]: the kernel does not map it.
    pub fn copy_on_write(memory: BorrowedFd<'_>, begin: u64, size: u64) -> Result<Self, MemoryError> {
        let refused = |source| MemoryError::Refused { call: "mmap", asked: size, source };
        let length = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or_else(|| refused(io::Error::other("nothing to map")))?;
        let begin = begin.try_into().map_err(|_| refused(io::Error::other("beyond any file")))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_PRIVATE, memory, begin) }
            .map_err(|error| refused(error.into()))?;
        Ok(Self { base: base.cast(), size: length.get() })
    }

    /// Where so many bytes from `begin` on lie, if they do lie inside.
    pub(crate) fn place(&self, begin: usize, length: usize) -> Option<*mut u8> {
        (begin.checked_add(length)? <= self.size).then(|| self.base.as_ptr().wrapping_add(begin))
    }

    /// Copies so many bytes from a mapping that a peer may write meanwhile to the same place of this one,
    /// which is [private](Self::private): what arrives may be a mixture, and does not change any more.
    /// False, and nothing is copied, if they do not lie inside both.
    ///
    /// Nobody else may look at the place meanwhile, which the caller sees to: its slot is held by nobody
    /// (invariant 2).
    pub(crate) fn copy_from(&self, other: &Self, begin: usize, length: usize) -> bool {
        let words = length.div_ceil(8);
        let inside = begin.checked_add(8 * words).is_some_and(|end| end <= self.size && end <= other.size);
        if !inside || !begin.is_multiple_of(8) {
            return false;
        }
        // SAFETY: inside the mapping, aligned, and atomics, which another process may write meanwhile.
        let from = unsafe { slice::from_raw_parts(other.base.add(begin).cast::<AtomicU64>().as_ptr(), words) };
        // SAFETY: inside the mapping, aligned, of this process alone, and nobody looks at it (see above).
        let to = unsafe { slice::from_raw_parts_mut(self.base.add(begin).cast::<u64>().as_ptr(), words) };
        for (to, from) in to.iter_mut().zip(from) {
            // Relaxed: the entry that named the slot was read with Acquire.
            *to = from.load(Ordering::Relaxed);
        }
        true
    }

    /// Asks for huge pages, or enters the pages into this process's page table, so that none faults later.
    /// Only advice: kernels before 5.14 do not know it, and then the first touches are a little slower.
    fn advise(&self, advice: i32) {
        // SAFETY: the range is exactly this mapping, and populating changes no byte of it.
        let _ = unsafe { libc::madvise(self.base.as_ptr().cast(), self.size, advice) };
    }

    /// Where it lies.
    pub(crate) fn addresses(&self) -> Range<usize> {
        let base = self.base.as_ptr() as usize;
        base..base + self.size
    }

    /// Makes whole pages of a map that this process made read-only for this process too, or writable again
    /// as they were.
    ///
    /// # Errors
    /// What mprotect(2) says: ENOMEM beyond vm.max_map_count.
    pub(crate) fn protect(&self, bytes: Range<usize>, writable: bool) -> io::Result<()> {
        let length = bytes.len();
        if bytes.end > self.size || length == 0 {
            return Err(io::Error::other("no part of the mapping"));
        }
        let protection = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: the pages lie inside this mapping. Nobody has a reference through which they would be
        // written while they are read-only (invariant 2); who writes all the same is to trap.
        Ok(unsafe { mprotect(self.base.add(bytes.start).cast(), length, protection) }?)
    }

    /// The addresses of pieces of `length` bytes each, by their numbers, number 0 at the beginning, each
    /// `stride` bytes behind the one before; none if they do not all lie inside.
    #[must_use]
    pub fn pieces(&self, numbers: Range<u32>, stride: u64, length: u32) -> Option<Pieces> {
        if numbers.is_empty() {
            return None;
        }
        let last = stride.checked_mul(u64::from(numbers.end) - 1)?;
        if last.checked_add(length.into())? > self.size as u64 {
            return None;
        }
        Some(Pieces { origin: self.base.as_ptr(), stride: stride as usize, numbers })
    }
}

/// A mapping of memory that was sealed for good: bytes that do not change.
#[derive(Debug)]
pub struct Frozen(Map);

impl Frozen {
    /// Maps it, once it has been verified.
    ///
    /// # Errors
    /// [`Unsuitable`]: it is not sealed for good, not of this size, or not all there.
    pub fn attach(fd: BorrowedFd<'_>, size: u64) -> Result<Self, Unsuitable> {
        Ok(Self(Map::attach_sealed(fd, size, Seals::ForGood)?))
    }
}

impl Deref for Frozen {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: exactly this mapping; all its pages exist, and no process can write or remove them any
        // more (`attach`).
        unsafe { slice::from_raw_parts(self.0.base.as_ptr(), self.0.size) }
    }
}

/// Addresses of pieces of a mapping.
#[derive(Debug)]
pub struct Pieces {
    /// Where number 0 lies, or would lie.
    origin: *mut u8,
    stride: usize,
    numbers: Range<u32>,
}

// SAFETY: as for `Map`.
unsafe impl Send for Pieces {}
// SAFETY: as for `Map`.
unsafe impl Sync for Pieces {}

impl Pieces {
    /// None, where number `next` would be the next.
    #[must_use]
    pub const fn none(next: u32) -> Self {
        Self { origin: std::ptr::null_mut(), stride: 0, numbers: next..next }
    }

    /// The beginning of a mapping, as number `number`.
    #[must_use]
    pub fn one(map: &Map, number: u32) -> Self {
        Self { origin: map.base.as_ptr(), stride: 0, numbers: number..number + 1 }
    }

    /// The same pieces, with other numbers: the next is number `first`.
    #[must_use]
    pub fn numbered_from(self, first: u32) -> Self {
        let Self { origin, stride, numbers } = self;
        let step = (numbers.start as usize).wrapping_sub(first as usize).wrapping_mul(stride);
        Self { origin: origin.wrapping_add(step), stride, numbers: first..first + (numbers.end - numbers.start) }
    }

    /// The number of the next, or of that which would come after the last.
    #[must_use]
    #[inline]
    pub fn next_number(&self) -> u32 {
        self.numbers.start
    }

    /// How many are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.numbers.start == self.numbers.end
    }
}

impl Iterator for Pieces {
    type Item = (u32, Address);

    #[inline]
    fn next(&mut self) -> Option<(u32, Address)> {
        if self.is_empty() {
            return None;
        }
        let number = self.numbers.start;
        self.numbers.start += 1;
        let address = self.origin.wrapping_add(number as usize * self.stride);
        // SAFETY: all pieces with these numbers lie inside the mapping (`Map::pieces`), which does not
        // begin at address zero.
        Some((number, Address(unsafe { NonNull::new_unchecked(address) })))
    }
}

/// Where something lies in a mapping. Who may follow it is settled where that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(NonNull<u8>);

// SAFETY: a number; see there.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

impl Address {
    /// The pointer.
    #[inline]
    pub(crate) fn pointer(self) -> NonNull<u8> {
        self.0
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is exactly what `new` mapped. Pointers into it live in `Fbuf` and
        // `Received`, whose homes own this `Map` until the last of them is gone (invariant 2).
        let _ = unsafe { munmap(self.base.cast(), self.size) };
    }
}

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

/// A header `H` followed by cells `C`, as many as a power of two, in shared memory. Both consist of
/// atomics only: the other side may change them at any time.
#[derive(Debug)]
pub struct Table<H, C> {
    map: Map,
    /// One less than there are cells.
    mask: usize,
    layout: PhantomData<(H, C)>,
}

// SAFETY: all that is ever reached through a table is `&H` and `&C`.
unsafe impl<H: Sync, C: Sync> Send for Table<H, C> {}
// SAFETY: as above.
unsafe impl<H: Sync, C: Sync> Sync for Table<H, C> {}

impl<H: FromBytes, C: FromBytes> Table<H, C> {
    /// Fails to compile for layouts whose cells would not be aligned behind the header.
    const LAID_OUT: () = assert!(
        align_of::<H>() <= 4096 && align_of::<C>() <= align_of::<H>() && size_of::<H>().is_multiple_of(align_of::<C>())
    );

    /// The bytes that a table with at least so many cells takes, in whole pages.
    #[must_use]
    pub fn size(least: usize) -> u64 {
        let () = Self::LAID_OUT;
        let cells = least.next_power_of_two() as u64;
        let bytes = (size_of::<C>() as u64).saturating_mul(cells).saturating_add(size_of::<H>() as u64);
        bytes.div_ceil(4096).saturating_mul(4096)
    }

    /// Makes a table of at least so many cells, of zeroes, that this process writes; the descriptor is
    /// for its reader.
    ///
    /// # Errors
    /// [`MemoryError`] as in [`Map::create`].
    pub fn create(name: &str, least: usize) -> Result<(Self, OwnedFd), MemoryError> {
        let (map, fd) = Map::create(name, Self::size(least))?;
        Ok((Self::over(map, least), fd))
    }

    /// Maps a table that a peer writes.
    ///
    /// # Errors
    /// [`Unsuitable`] as in [`Map::attach`].
    pub fn attach(fd: BorrowedFd<'_>, least: usize) -> Result<Self, Unsuitable> {
        Ok(Self::over(Map::attach(fd, Self::size(least))?, least))
    }

    /// Over a mapping of `size(least)` bytes.
    fn over(map: Map, least: usize) -> Self {
        Self { map, mask: least.next_power_of_two() - 1, layout: PhantomData }
    }

    /// The header.
    #[must_use]
    #[inline]
    pub fn head(&self) -> &H {
        // SAFETY: the mapping is page-aligned and `size` ≥ size_of::<H>() long, any bytes are a valid
        // `H` (FromBytes), and it consists of atomics, which is why another process may write it
        // meanwhile (invariant 1 says which one).
        unsafe { self.map.base.cast::<H>().as_ref() }
    }

    /// How many cells there are.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.mask + 1
    }

    /// The cell at `index`, or at what is left of it after so many laps.
    #[must_use]
    #[inline]
    pub fn at(&self, index: usize) -> &C {
        // SAFETY: there are `mask + 1` cells behind the header (`size`), `LAID_OUT` aligns them, and
        // the rest is as for `head`.
        unsafe { self.map.base.add(size_of::<H>()).cast::<C>().add(index & self.mask).as_ref() }
    }

    /// Cells that lie one behind the other without the index wrapping; none if they do not.
    #[must_use]
    pub fn slice(&self, cells: Range<usize>) -> &[C] {
        // SAFETY: as for `at`; all of them.
        let all = unsafe { slice::from_raw_parts(self.map.base.add(size_of::<H>()).cast().as_ptr(), self.capacity()) };
        all.get(cells).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reader_sees_what_the_writer_stores() {
        let (written, fd) = Table::<AtomicU64, AtomicU64>::create("fbuf-test", 1000).unwrap();
        let read = Table::<AtomicU64, AtomicU64>::attach(fd.as_fd(), 1000).unwrap();
        written.head().store(7, Ordering::Release);
        written.at(999).store(8, Ordering::Release);
        assert_eq!(read.head().load(Ordering::Acquire), 7);
        assert_eq!(read.at(999 + 3 * read.capacity()).load(Ordering::Acquire), 8);
    }

    #[test]
    fn a_table_of_another_size_is_not_mapped() {
        let (_written, fd) = Table::<AtomicU64, AtomicU64>::create("fbuf-test", 10).unwrap();
        let error = Table::<AtomicU64, AtomicU64>::attach(fd.as_fd(), 1000).unwrap_err();
        assert_eq!(error, Unsuitable::Size { found: 4096, wanted: 12288 });
    }

    #[test]
    fn a_sealed_page_can_be_tried_for_reading_only() {
        let (_map, fd) = Map::create("fbuf-test", 4096).unwrap();
        for trial in [Trial::Shared, Trial::Private, Trial::Populated] {
            assert!(try_page(fd.as_fd(), trial).is_ok(), "{trial:?}");
        }
        for trial in [Trial::SharedWritable, Trial::MadeWritable, Trial::PopulatedWritable] {
            assert_eq!(try_page(fd.as_fd(), trial).unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{trial:?}");
        }
    }

    #[test]
    fn pieces_lie_inside() {
        let (map, _fd) = Map::create("fbuf-test", 4096).unwrap();
        let pieces: Vec<_> = map.pieces(1..4, 1024, 1000).unwrap().collect();
        assert_eq!(pieces.len(), 3);
        for ((_, piece), offset) in pieces.iter().zip([1024, 2048, 3072]) {
            assert_eq!(piece.pointer().as_ptr() as usize, map.base.as_ptr() as usize + offset);
        }
        let mut numbered = map.pieces(1..4, 1024, 1000).unwrap().numbered_from(7);
        assert_eq!(numbered.next_number(), 7);
        let again: Vec<_> = numbered.by_ref().collect();
        assert!(again.iter().map(|(number, _)| *number).eq(7..10) && numbered.next_number() == 10);
        assert!(again.iter().zip(&pieces).all(|((_, one), (_, other))| one == other));
        #[allow(clippy::reversed_empty_ranges)]
        for (numbers, stride, length) in [
            (0..4, 1024, 1025),
            (4..5, 1024, 1000),
            (3..3, 1024, 1),
            (3..2, 1024, 1),
            (0..2, u64::MAX, 1),
            (0..u32::MAX, u64::MAX, 1),
        ] {
            assert!(map.pieces(numbers.clone(), stride, length).is_none(), "{numbers:?} of {length} every {stride}");
        }
    }
}
