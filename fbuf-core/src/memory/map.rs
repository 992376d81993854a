//! Mappings, and copies out of them: of shared memory, or private ([`private`]).
//!
//! One of the files of this crate that may be `unsafe`: everything that says which bytes of
//! another process may be looked at is decided here.
#![allow(unsafe_code)]

mod pages;
mod private;

use std::{
    io,
    num::NonZeroUsize,
    ops::{Deref, Range},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    sys::mman::{MRemapFlags, MapFlags, ProtFlags, mmap, mprotect, mremap, munmap},
};

pub(crate) use self::pages::can_provide;
use super::{MemoryError, Pieces, Reserved, Seals, memfd::unmappable, verify};
use crate::{
    process::{
        deferred::{Cause, LARGE, drop_deferred},
        foreign::is_locked,
        fork::WithheldMemory,
    },
    violation::Unsuitable,
};

/// A mapping of a whole memfd: shared, and writable only in the process that made the memfd; or private.
#[derive(Debug)]
pub struct Map {
    base: NonNull<u8>,
    size: usize,
    /// If it is one that no child may have.
    withheld: Option<WithheldMemory>,
    /// Why another thread unmaps it, if one does.
    slow: Option<Cause>,
    /// Where Miri runs this, what is mapped.
    #[cfg(miri)]
    heap: Option<std::sync::Arc<super::heap::Heap>>,
}

// SAFETY: a mapping belongs to the process, not to a thread; `Map` itself only hands out raw
// pointers, and which code may follow them is settled where that is done.
unsafe impl Send for Map {}
// SAFETY: through `&Map` there are raw pointers only; the code that follows them says why it may.
unsafe impl Sync for Map {}

/// Where Miri runs this, which has no memfd: memory on the heap.
#[cfg(miri)]
impl Map {
    pub(crate) fn over(heap: std::sync::Arc<super::heap::Heap>) -> Self {
        Self { base: heap.base(), size: heap.size(), withheld: None, slow: None, heap: Some(heap) }
    }
}

impl Map {
    fn of(base: NonNull<u8>, size: usize) -> Self {
        Self {
            base,
            size,
            withheld: None,
            slow: None,
            #[cfg(miri)]
            heap: None,
        }
    }

    /// Creates, reserves, maps and seals a memfd. This mapping is the only one that will ever be
    /// able to write it; the descriptor is for the readers.
    ///
    /// # Errors
    /// [`MemoryError`]: not enough memory, or a kernel that lacks what this needs.
    pub fn create(name: &str, size: u64) -> Result<(Self, OwnedFd), MemoryError> {
        #[cfg(miri)]
        if super::heap::IS_USED {
            return super::heap::create(size);
        }
        let memory = Reserved::new(name, size)?;
        let map = Self::writable(&memory)?;
        map.advise(libc::MADV_POPULATE_WRITE);
        Ok((map, memory.seal()?))
    }

    /// Maps what a peer sent, read-only, once it has been verified.
    ///
    /// # Errors
    /// [`Unsuitable`]: it is not what a peer may send.
    pub(crate) fn attach(fd: BorrowedFd<'_>, size: u64) -> Result<Self, Unsuitable> {
        Self::attach_sealed(fd, size, Seals::OneWriter)?.whole(fd)
    }

    fn attach_sealed(fd: BorrowedFd<'_>, size: u64, seals: Seals) -> Result<Self, Unsuitable> {
        #[cfg(miri)]
        if super::heap::IS_USED {
            return super::heap::attach(fd, size);
        }
        verify(fd, size, seals)?;
        let sharing = match seals {
            // Its pages do not change, so that it is the same, and Linux before 6.7 permits no other: a descriptor that
            // is open for writing could make a shared mapping writable there, whatever the seals say.
            Seals::ForGood => MapFlags::MAP_PRIVATE,
            Seals::OneWriter | Seals::Size => MapFlags::MAP_SHARED,
        };
        let map = Self::mapped(fd, size, ProtFlags::PROT_READ, sharing).map_err(unmappable("mmap"))?;
        // A core of this process would hold all of its sender's slots.
        map.advise(libc::MADV_DONTDUMP);
        // A process that has mapped memory which was sealed for good has its descriptor as well.
        Ok(if seals == Seals::ForGood { map.unmapped_deferred() } else { map.of_peer(fd) })
    }

    /// As [`Self::unmapped_deferred`], and so is what is [locked](is_locked): with the mapping its last descriptor may be closed.
    fn of_peer(self, fd: BorrowedFd<'_>) -> Self {
        let mut this = self.unmapped_deferred();
        if !cfg!(miri) && is_locked(fd).unwrap_or(true) {
            this.slow = Some(Cause::Memory);
        }
        this
    }

    /// The same, which another thread unmaps when it is dropped, if it is [large](LARGE): for memory of a peer, which chose its
    /// size, and may have left it to this process alone.
    pub(crate) fn unmapped_deferred(mut self) -> Self {
        self.slow = (self.size as u64 >= LARGE).then_some(Cause::Memory);
        self
    }

    /// The same, of memory that this user made, if it is another than that of this process: the thread for that user unmaps it.
    /// As long as it is mapped its maker can have it take long to free, by attributes and locks without number.
    pub(crate) fn made_by(mut self, user: Option<u32>) -> Self {
        if !cfg!(miri) && user.is_some() {
            self.slow = Some(Cause::Peer(user));
        }
        self
    }

    /// Maps memory that was reserved, to be written.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn writable(memory: &Reserved) -> Result<Self, MemoryError> {
        let size = memory.size();
        Self::new(memory.as_fd(), size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
            .map_err(|source| MemoryError::Refused { call: "mmap", asked: size, error: source })
    }

    /// Not in children that are forked, which get zeroes in its place.
    pub(crate) fn kept_from_children(mut self) -> Self {
        self.withheld
            .get_or_insert_with(|| WithheldMemory::new(self.base.addr().get()..self.base.addr().get() + self.size));
        self
    }

    /// Has the kernel map all its pages now, if it can, rather than each when it is written.
    pub(crate) fn populate(&self) {
        self.advise(libc::MADV_POPULATE_WRITE);
    }

    /// Maps memory that will be leased to others once it is not mapped like this any more, in huge pages if
    /// they are asked for and can be had; all of it exists then.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn of_writer(writer: BorrowedFd<'_>, size: u64, huge: bool) -> Result<Self, MemoryError> {
        let refused = |call| move |source| MemoryError::Refused { call, asked: size, error: source };
        let map = Self::new(writer, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).map_err(refused("mmap"))?;
        if huge {
            map.advise(libc::MADV_HUGEPAGE);
        }
        if can_provide() {
            map.provide(0..map.size, true).map_err(refused("madvise"))?;
        }
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

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Where it begins.
    pub(crate) fn beginning(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Puts a copy of it, of this process alone, in its place: a thread that reads it meanwhile reads the same
    /// bytes at the same addresses.
    ///
    /// # Errors
    /// What the kernel says; nothing has changed then.
    ///
    /// # Safety
    /// No process changes its bytes before this has returned.
    pub(crate) unsafe fn detach(&self) -> io::Result<()> {
        let copy = Self::private(self.size as u64).map_err(io::Error::other)?;
        // SAFETY: no other code has a pointer into the copy, which was just mapped.
        if !unsafe { copy.copy_from(self, 0, self.size) } {
            return Err(io::Error::other("the copy is shorter"));
        }
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: both ranges are exactly these mappings and of one size. What is replaced is replaced by
        // the same bytes (see above), at once: Linux changes mappings under a lock, for which a thread waits that
        // reads a page of it meanwhile (mmap_lock).
        unsafe { mremap(copy.base.cast(), copy.size, self.size, flags, Some(self.base.cast())) }?;
        // It lies here now.
        std::mem::forget(copy);
        Ok(())
    }

    /// Puts the memory behind a descriptor back in its place.
    ///
    /// # Errors
    /// What the kernel says; nothing has changed then.
    ///
    /// # Safety
    /// There is no reference into it.
    pub(crate) unsafe fn reattach(&self, reader: BorrowedFd<'_>) -> io::Result<()> {
        let length = NonZeroUsize::new(self.size).ok_or_else(|| io::Error::other("nothing to map"))?;
        let address = NonZeroUsize::new(self.base.as_ptr() as usize);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: the range is exactly this mapping, and there is no reference into it (see above).
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

    fn new(fd: BorrowedFd<'_>, size: u64, protection: ProtFlags) -> io::Result<Self> {
        Self::mapped(fd, size, protection, MapFlags::MAP_SHARED)
    }

    fn mapped(fd: BorrowedFd<'_>, size: u64, protection: ProtFlags, sharing: MapFlags) -> io::Result<Self> {
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let length = NonZeroUsize::new(size).ok_or_else(|| io::Error::other("nothing to map"))?;
        #[cfg(test)]
        if super::available::is_withheld() {
            return Err(name_limit(Errno::ENOMEM));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { mmap(None, length, protection, sharing, fd, 0) }.map_err(name_limit)?;
        let map = Self::of(base.cast(), size);
        Ok(if protection.contains(ProtFlags::PROT_WRITE) { map.kept_from_children() } else { map })
    }

    /// Where so many bytes from `begin` on lie, if they do lie inside.
    pub(crate) fn place(&self, begin: usize, length: usize) -> Option<*mut u8> {
        (begin.checked_add(length)? <= self.size).then(|| self.base.as_ptr().wrapping_add(begin))
    }

    /// Copies so many bytes from a mapping that a peer may write meanwhile to the same place of this one:
    /// what arrives may be a mixture, and does not change any more. False, and nothing is copied, if they do
    /// not lie inside both.
    ///
    /// # Safety
    /// This map can be written, and there is no reference to these bytes of it; nor, of this process, one through
    /// which those of the other map are written.
    pub(crate) unsafe fn copy_from(&self, other: &Self, begin: usize, length: usize) -> bool {
        let words = length.div_ceil(8);
        let inside = begin.checked_add(8 * words).is_some_and(|end| end <= self.size && end <= other.size);
        if !inside || !begin.is_multiple_of(8) {
            return false;
        }
        // SAFETY: inside the mapping, aligned, and atomics, which another process may write meanwhile.
        let from = unsafe { slice::from_raw_parts(other.base.add(begin).cast::<AtomicU64>().as_ptr(), words) };
        // SAFETY: inside the mapping, aligned, writable, and there is no other reference to it (see above).
        let to = unsafe { slice::from_raw_parts_mut(self.base.add(begin).cast::<u64>().as_ptr(), words) };
        for (to, from) in to.iter_mut().zip(from) {
            // Relaxed: the entry that named the slot was read with Acquire.
            *to = from.load(Ordering::Relaxed);
        }
        true
    }

    /// Clears these bytes, as far as they lie in it. Unlike pwrite(2), it knows no RLIMIT_FSIZE.
    ///
    /// # Safety
    /// This map can be written, and there is no reference to these bytes of it.
    pub(crate) unsafe fn clear(&self, bytes: Range<usize>) {
        let end = bytes.end.min(self.size);
        if bytes.start < end {
            // SAFETY: inside the mapping, writable, and there is no reference to them (see above).
            unsafe { self.base.add(bytes.start).write_bytes(0, end - bytes.start) }
        }
    }

    /// Asks for huge pages, or enters the pages into this process's page table, so that none faults later.
    /// Only advice: kernels before 5.14 do not know it, and then the first touches are a little slower.
    fn advise(&self, advice: i32) {
        // SAFETY: the range is exactly this mapping, and no advice that is given here changes a byte of it: it is about
        // page tables, huge pages, children and core files.
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
    ///
    /// # Safety
    /// While they are read-only, there is no reference through which they are written.
    pub(crate) unsafe fn protect(&self, bytes: Range<usize>, writable: bool) -> io::Result<()> {
        let length = bytes.len();
        if bytes.end > self.size || length == 0 {
            return Err(io::Error::other("no part of the mapping"));
        }
        let protection = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: the pages lie inside this mapping, and no reference writes them while they are read-only (see
        // above); a pointer that is used all the same is to trap.
        Ok(unsafe { mprotect(self.base.add(bytes.start).cast(), length, protection) }?)
    }

    /// The addresses of pieces of `length` bytes each, by their numbers, number 0 at the beginning, each
    /// `stride` bytes behind the one before; none if they do not all lie inside.
    #[must_use]
    pub(crate) fn pieces(&self, numbers: Range<u32>, stride: u64, length: u32) -> Option<Pieces> {
        if numbers.is_empty() {
            return None;
        }
        let last = stride.checked_mul(u64::from(numbers.end) - 1)?;
        if last.checked_add(length.into())? > self.size as u64 {
            return None;
        }
        let next = self.base.as_ptr().wrapping_add(numbers.start as usize * stride as usize);
        Some(Pieces { next, stride: stride as usize, numbers })
    }
}

/// Which limits mmap(2) stands for by an error.
pub(crate) fn name_limit(error: Errno) -> io::Error {
    let limit = match error {
        Errno::EAGAIN => "this process locks all that it maps (mlockall), and may not lock so much: RLIMIT_MEMLOCK",
        Errno::ENOMEM => "RLIMIT_AS, vm.max_map_count, or vm.overcommit_memory leave no room",
        error => return error.into(),
    };
    io::Error::new(io::Error::from(error).kind(), MapLimit { limit, error })
}

/// What mmap(2) said, and the limits it stands for.
#[derive(Debug, thiserror::Error)]
#[error("{limit} ({error})")]
struct MapLimit {
    limit: &'static str,
    error: Errno,
}

/// The limits that an error of mmap(2) stands for, if it is one.
pub(crate) fn limit_of_map(error: &io::Error) -> Option<&'static str> {
    error.get_ref().and_then(|error| error.downcast_ref::<MapLimit>()).map(|limited| limited.limit)
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
        Ok(Self(Map::attach_sealed(fd, size, Seals::ForGood)?.whole(fd)?))
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

impl Drop for Map {
    fn drop(&mut self) {
        if self.withheld.take().is_some_and(|withheld| !withheld.is_here()) {
            // It is not mapped in this child, or by its parent's handlers.
            return;
        }
        #[cfg(miri)]
        if self.heap.is_some() {
            return;
        }
        let mapped = Mapped { base: self.base.addr().get(), size: self.size };
        if let Some(cause) = self.slow {
            drop_deferred(cause, mapped);
        }
    }
}

/// Addresses that are unmapped when this is dropped.
struct Mapped {
    base: usize,
    size: usize,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Not more at once: while the kernel unmaps, threads of this process that map something wait.
        for begin in (0..self.size).step_by(LARGE as usize) {
            let size = (self.size - begin).min(LARGE as usize);
            let base = std::ptr::without_provenance_mut::<libc::c_void>(self.base + begin);
            let Some(base) = NonNull::new(base) else { return };
            // SAFETY: all of these ranges together are exactly what was mapped. Pointers into it live in `Fbuf`, `Retained`,
            // `Received` and `Private`; their homes own its `Map` until the last of them is gone (invariant 2).
            let _ = unsafe { munmap(base, size) };
        }
    }
}

/// The size of a page, in bytes.
#[must_use]
pub fn page_bytes() -> u64 {
    use nix::unistd::{SysconfVar, sysconf};
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|bytes| bytes.try_into().ok()).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_for_good_is_mapped_privately_as_kernels_before_6_7_want_it() {
        let memory = Reserved::new("fbuf-test", 4096).unwrap().seal_for_good().unwrap();
        let frozen = Frozen::attach(memory.as_fd(), 4096).unwrap();
        let (_writer, segment) = Map::create("fbuf-test", 4096).unwrap();
        let shared = Map::attach(segment.as_fd(), 4096).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        for (map, wanted) in [(&frozen.0, "r--p"), (&shared, "r--s")] {
            let begin = format!("{:x}-", map.addresses().start);
            let line = maps.lines().find(|line| line.starts_with(&begin)).unwrap();
            assert_eq!(line.split_whitespace().nth(1), Some(wanted), "{line}");
        }
        assert_eq!(frozen[..], [0; 4096]);
    }

    #[test]
    fn what_is_locked_is_unmapped_by_another_thread_and_what_is_small_and_not_locked_is_not() {
        use nix::fcntl::{FcntlArg, fcntl};
        for attach in [Map::attach, Map::attach_unread, Map::attach_growing] {
            let (_writer, memory) = Map::create("fbuf-test", 4096).unwrap();
            assert!(attach(memory.as_fd(), 4096).unwrap().slow.is_none());
            let (l_type, l_whence) = (libc::F_RDLCK as _, libc::SEEK_SET as _);
            let lock = libc::flock { l_type, l_whence, l_start: 0, l_len: 1, l_pid: 0 };
            fcntl(&memory, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
            assert!(attach(memory.as_fd(), 4096).unwrap().slow.is_some());
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
