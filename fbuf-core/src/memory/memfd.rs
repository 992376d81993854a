//! Anonymous files: created with all their memory, sealed by their writer, verified by their reader.
//!
//! See memfd_create(2) and F_ADD_SEALS in fcntl(2).

use std::{
    fs::{File, Permissions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
};

use ::memfd::{FileSeal, MemfdOptions};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl},
    sys::stat::{FileStat, fstat},
};

use super::{
    HUGE_PAGE, Map, available,
    leasable::{is_huge, reopen},
};
use crate::{
    process::sys::{in_call, limit_behind, said},
    violation::Unsuitable,
};

/// What every shared memfd carries when it leaves the process that writes it: nobody can map it
/// writable any more (the mapping of its writer stays), resize it, or lift a seal.
const SEALS: [FileSeal; 4] = [FileSeal::SealFutureWrite, FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal];
/// Seals of memory that nobody writes any more.
const FOR_GOOD: [FileSeal; 4] = [FileSeal::SealWrite, FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal];

/// Shared memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// There is less than was asked for.
    #[error(
        "{available} bytes of shared memory are available ({bound}), and {asked} were asked for: \
         open with fewer or smaller slots, or free some memory"
    )]
    NotEnough {
        /// Bytes that were asked for.
        asked: u64,
        /// Bytes that could be had.
        available: u64,
        /// What sets the limit.
        bound: &'static str,
    },
    /// The kernel refused a call that shared memory needs.
    #[error(
        "the kernel refused {call} for {asked} bytes: {error}{}; `fbuf doctor` shows what this machine allows",
        limit_behind(error)
    )]
    Refused {
        /// The call.
        call: &'static str,
        /// The size it was for.
        asked: u64,
        /// The kernel's reason.
        error: io::Error,
    },
}

/// A memfd that has all its pages, and is not yet sealed.
#[derive(Debug)]
pub struct Reserved {
    file: File,
    size: u64,
}

impl Reserved {
    /// Creates a memfd of `size` bytes and reserves all of them, so that no access can fail later.
    ///
    /// `name` shows in `/proc/PID/maps` and nowhere else.
    ///
    /// # Errors
    /// [`MemoryError`], before anything was taken, when there is not enough memory.
    pub fn new(name: &str, size: u64) -> Result<Self, MemoryError> {
        Self::promised(name, size, size)
    }

    /// As [`Self::new`], but reserves only the first so many bytes.
    pub(crate) fn promised(name: &str, size: u64, begin: u64) -> Result<Self, MemoryError> {
        let refused = |call, source| MemoryError::Refused { call, asked: size, error: source };
        available::check(begin)?;
        available::check_length(size)?;
        let file = MemfdOptions::new()
            .allow_sealing(true)
            .create(name)
            .map_err(|error| refused("memfd_create", kernels_reason(error)))?
            .into_file();
        file.set_len(size).map_err(|error| refused("ftruncate", error))?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(|error| refused("fchmod", error))?;
        if begin < HUGE_PAGE {
            Map::make_small_pages(file.as_fd(), begin);
        }
        let length = i64::try_from(begin).map_err(io::Error::other).map_err(|error| refused("fallocate", error))?;
        loop {
            match fallocate(&file, FallocateFlags::empty(), 0, length) {
                Ok(()) => return Ok(Self { file, size }),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOSPC | Errno::ENOMEM) => return Err(available::none_left(begin)),
                Err(error) => return Err(refused("fallocate", error.into())),
            }
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Seals it: from here on, only mappings that exist already can write. The descriptor is [for readers](for_readers).
    ///
    /// # Errors
    /// [`MemoryError::Refused`] on a kernel without `F_SEAL_FUTURE_WRITE` (before 5.1).
    pub(crate) fn seal(self) -> Result<OwnedFd, MemoryError> {
        let refused = |source| MemoryError::Refused { call: "F_ADD_SEALS", asked: self.size, error: source };
        let memfd =
            ::memfd::Memfd::try_from_file(self.file).map_err(|_| refused(io::Error::other("it cannot be sealed")))?;
        memfd.add_seals(&SEALS).map_err(|error| refused(io::Error::other(error)))?;
        Ok(for_readers(memfd.into_file()))
    }

    /// Seals it for good: from here on nobody writes it, through whatever mapping or descriptor. The descriptor is
    /// for readers, but of little memory: all pages of that were written when it was made, so that fallocate(2)
    /// takes none, and a message of it may cost less than to open it again.
    ///
    /// # Errors
    /// The memory, as it was, and [`MemoryError::Refused`]: `EBUSY` while it is mapped for writing anywhere,
    /// be it in a child that was forked meanwhile.
    pub fn seal_for_good(self) -> Result<OwnedFd, (Self, MemoryError)> {
        let refused = |source| MemoryError::Refused { call: "F_ADD_SEALS", asked: self.size, error: source };
        match ::memfd::Memfd::try_from_file(self.file) {
            Ok(memfd) => match memfd.add_seals(&FOR_GOOD) {
                Ok(()) if self.size < HUGE_PAGE => Ok(memfd.into_file().into()),
                Ok(()) => Ok(for_readers(memfd.into_file())),
                Err(error) => {
                    let error = refused(io::Error::other(error));
                    Err((Self { file: memfd.into_file(), size: self.size }, error))
                }
            },
            Err(file) => Err((Self { file, size: self.size }, refused(io::Error::other("it cannot be sealed")))),
        }
    }
}

/// A descriptor that is open for reading only, of memory that is opened for writing by no other user (its mode is 0600): a process
/// that receives it cannot have the kernel look for pages of it (fallocate(2)), take such as were never read, or set attributes
/// on it, which this process would wait for when it closes it. The one there is, if there is no /proc, or no descriptor left.
fn for_readers(memory: File) -> OwnedFd {
    reopen(memory.as_fd(), File::options().read(true)).unwrap_or_else(|_| memory.into())
}

/// Why a memfd could not be made.
pub(crate) fn kernels_reason(error: ::memfd::Error) -> io::Error {
    match error {
        ::memfd::Error::Create(error) => error,
        other => io::Error::other(other),
    }
}

/// What the seals of memory that a peer sent have to say of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seals {
    /// It can be written only through mappings that exist already.
    OneWriter,
    /// Nobody can.
    ForGood,
    /// Its size stays as it is. It can be written.
    Size,
}

impl Seals {
    fn wanted(self) -> SealFlag {
        let writing = match self {
            Self::OneWriter => SealFlag::F_SEAL_FUTURE_WRITE,
            Self::ForGood => SealFlag::F_SEAL_WRITE,
            Self::Size => SealFlag::empty(),
        };
        writing | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
    }
}

impl AsFd for Reserved {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Checks what a peer sent before it is mapped: a memfd with exactly these seals, exactly `size` bytes, as many of them
/// reserved, in pages that nobody had to set aside. How many bytes are reserved.
///
/// Pages behind its end are counted as well, in place of which others may lack: each page that is looked at has to be
/// [provided](Map::provide) once. No call is made that takes the lock of the inode, as ftruncate(2) and lseek(2) do: a
/// process that has it open for writing holds that for as long as fallocate(2) takes.
///
/// # Errors
/// [`Unsuitable`], naming the first rule it breaks.
pub(crate) fn verify(fd: BorrowedFd<'_>, size: u64, seals: Seals) -> Result<u64, Unsuitable> {
    let reserved = verify_promised(fd, size, seals)?;
    if reserved < size {
        return Err(Unsuitable::Holes { reserved, size });
    }
    Ok(reserved)
}

/// As [`verify`], but not all of it need be reserved.
pub(crate) fn verify_promised(fd: BorrowedFd<'_>, size: u64, seals: Seals) -> Result<u64, Unsuitable> {
    check_seals(fd, seals)?;
    if is_huge(fd) {
        return Err(Unsuitable::Removable);
    }
    let stat = fstat(fd).map_err(unmappable("fstat"))?;
    let found = stat.st_size.max(0) as u64;
    if found != size {
        return Err(Unsuitable::Size { found, wanted: size });
    }
    let reserved = reserved(&stat);
    if reserved > size.next_multiple_of(HUGE_PAGE) {
        // To free that would take long. No honest process has more behind the end than the rest of a huge page.
        return Err(Unsuitable::Excess { reserved, size });
    }
    Ok(reserved)
}

/// Checks that a descriptor names a memfd with exactly these seals, to which no more can be added, and that it can be read through it:
/// of one that cannot be, mmap(2) would fail as it does where this process lacks something.
pub(crate) fn check_seals(fd: BorrowedFd<'_>, seals: Seals) -> Result<(), Unsuitable> {
    let wanted = seals.wanted();
    let found = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|_| Unsuitable::NotSealable)?;
    // F_SEAL_EXEC, which says nothing about writing, comes unasked where vm.memfd_noexec is set.
    if found & !SEAL_EXEC != wanted.bits() {
        return Err(Unsuitable::Seals { found, wanted: wanted.bits() });
    }
    if access_mode(fd)? == OFlag::O_WRONLY {
        return Err(Unsuitable::NotOpenFor { purpose: "reading" });
    }
    Ok(())
}

/// For what a file is open: reading, writing, or both.
pub(super) fn access_mode(file: BorrowedFd<'_>) -> Result<OFlag, Unsuitable> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(unmappable("fcntl"))?;
    Ok(OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE)
}

/// How many bytes of a file have pages, in memory or swapped out. Pages behind its end count too.
pub(crate) fn reserved(stat: &FileStat) -> u64 {
    (stat.st_blocks.max(0) as u64).saturating_mul(512)
}

/// What is said of memory with which a call failed that no peer can have fail.
pub(crate) fn unmappable<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> Unsuitable {
    move |error| Unsuitable::Unmappable { reason: said(&in_call(call)(error)) }
}

/// `F_SEAL_EXEC` of linux/fcntl.h.
const SEAL_EXEC: i32 = 0x20;

/// A memfd of these seals without pages but for so many bytes behind its end.
#[cfg(test)]
pub(crate) fn with_pages_behind_end(size: u64, behind: u64, seals: Seals) -> OwnedFd {
    let memfd = MemfdOptions::new().allow_sealing(true).create("fbuf-test").unwrap().into_file();
    memfd.set_len(size).unwrap();
    fallocate(&memfd, FallocateFlags::FALLOC_FL_KEEP_SIZE, size as i64, behind as i64).unwrap();
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals.wanted())).unwrap();
    memfd.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{leasable::reopen, map::Frozen};

    fn sealed(size: u64) -> OwnedFd {
        Reserved::new("fbuf-test", size).unwrap().seal().unwrap()
    }

    #[test]
    fn what_is_sealed_verifies() {
        assert_eq!(verify(sealed(8192).as_fd(), 8192, Seals::OneWriter), Ok(8192));
    }

    #[test]
    fn another_size_is_refused() {
        assert_eq!(
            verify(sealed(8192).as_fd(), 4096, Seals::OneWriter),
            Err(Unsuitable::Size { found: 8192, wanted: 4096 })
        );
    }

    #[test]
    fn missing_seals_are_refused() {
        let open = Reserved::new("fbuf-test", 4096).unwrap();
        assert!(matches!(verify(open.as_fd(), 4096, Seals::OneWriter), Err(Unsuitable::Seals { found: 0, .. })));
        let memfd = ::memfd::Memfd::try_from_file(open.file).unwrap();
        memfd.add_seals(&[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal]).unwrap();
        assert!(matches!(verify(memfd.as_file().as_fd(), 4096, Seals::OneWriter), Err(Unsuitable::Seals { .. })));
    }

    /// It may be sealed for good, and another process may read it.
    #[test]
    fn what_is_open_for_writing_only_is_refused() {
        for seals in [Seals::OneWriter, Seals::Size, Seals::ForGood] {
            let memory = with_pages_behind_end(4096, 4096, seals);
            let writer = reopen(memory.as_fd(), File::options().write(true)).unwrap();
            let wanted = Unsuitable::NotOpenFor { purpose: "reading" };
            assert_eq!(check_seals(memory.as_fd(), seals), Ok(()));
            assert_eq!(check_seals(writer.as_fd(), seals), Err(wanted.clone()));
            assert_eq!(verify_promised(writer.as_fd(), 4096, seals), Err(wanted));
        }
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(verify(file.as_fd(), 4096, Seals::OneWriter), Err(Unsuitable::NotSealable));
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        assert_eq!(verify(reader.as_fd(), 4096, Seals::OneWriter), Err(Unsuitable::NotSealable));
    }

    #[test]
    fn promised_memory_is_refused() {
        let memfd = MemfdOptions::new().allow_sealing(true).create("fbuf-test").unwrap();
        memfd.as_file().set_len(1 << 40).unwrap();
        memfd.add_seals(&SEALS).unwrap();
        assert_eq!(
            verify(memfd.as_file().as_fd(), 1 << 40, Seals::OneWriter),
            Err(Unsuitable::Holes { reserved: 0, size: 1 << 40 })
        );
    }

    #[test]
    fn pages_behind_the_end_do_not_stand_for_pages_that_lack() {
        for size in [4096, 1 << 20, 8 << 20] {
            let memory = with_pages_behind_end(size, size, Seals::ForGood);
            // As many as there should be, and not one of them in the file.
            assert_eq!(verify(memory.as_fd(), size, Seals::ForGood), Ok(size));
            let attached = Frozen::attach(memory.as_fd(), size).unwrap_err();
            assert!(matches!(attached, Unsuitable::Holes { .. }), "{attached:?}");
            // No more was made than shows that some lack.
            let made = reserved(&fstat(&memory).unwrap()) - size;
            assert!(made <= HUGE_PAGE, "{made}");
            let memory = with_pages_behind_end(size, size, Seals::OneWriter);
            let attached = Map::attach(memory.as_fd(), size).unwrap_err();
            assert!(matches!(attached, Unsuitable::Holes { .. }), "{attached:?}");
            let more = fallocate(&memory, FallocateFlags::FALLOC_FL_KEEP_SIZE, size as i64, 4096);
            assert_eq!(more, Err(Errno::EPERM), "pages can be added again");
        }
    }

    #[test]
    fn much_behind_the_end_is_refused() {
        // The control.
        let memory = with_pages_behind_end(4096, HUGE_PAGE, Seals::ForGood);
        assert_eq!(verify(memory.as_fd(), 4096, Seals::ForGood), Ok(HUGE_PAGE));
        let memory = with_pages_behind_end(4096, HUGE_PAGE + 4096, Seals::ForGood);
        let refused = Unsuitable::Excess { reserved: HUGE_PAGE + 4096, size: 4096 };
        assert_eq!(verify(memory.as_fd(), 4096, Seals::ForGood), Err(refused));
        let memory = with_pages_behind_end(4096, HUGE_PAGE + 4096, Seals::OneWriter);
        assert!(matches!(Map::attach_growing(memory.as_fd(), 4096), Err(Unsuitable::Excess { .. })));
    }

    #[test]
    fn what_is_passed_to_readers_is_open_for_reading_only_and_writable_by_its_user_alone() {
        let made = [
            ("a segment", sealed(8192), 8192),
            ("a table that grows", Map::create_growing("fbuf-test", 8192).unwrap().1, 4096),
            ("a one-shot", Reserved::new("fbuf-test", HUGE_PAGE).unwrap().seal_for_good().unwrap(), HUGE_PAGE),
        ];
        for (name, memory, size) in made {
            let (stat, mode) = (fstat(&memory).unwrap(), fcntl(&memory, FcntlArg::F_GETFL).unwrap());
            assert_eq!((stat.st_mode & 0o7777, mode & libc::O_ACCMODE), (0o600, libc::O_RDONLY), "{name}");
            assert_eq!(reserved(&stat), size, "{name}");
            let allocated = fallocate(&memory, FallocateFlags::empty(), 0, 4096);
            assert_eq!(allocated, Err(Errno::EBADF), "{name}");
        }
        assert_eq!(verify(sealed(8192).as_fd(), 8192, Seals::OneWriter), Ok(8192));
        let small = Reserved::new("fbuf-test", 8192).unwrap().seal_for_good().unwrap();
        assert_eq!(fstat(&small).unwrap().st_mode & 0o7777, 0o600);
    }

    #[test]
    fn huge_pages_are_refused() {
        let huge = MemfdOptions::new().allow_sealing(true).hugetlb(Some(::memfd::HugetlbSize::Huge2MB));
        let Ok(memfd) = huge.create("fbuf-test") else { return println!("not tested: no huge pages on this kernel") };
        memfd.as_file().set_len(2 << 20).unwrap();
        memfd.add_seals(&FOR_GOOD).unwrap();
        assert_eq!(verify(memfd.as_file().as_fd(), 2 << 20, Seals::ForGood), Err(Unsuitable::Removable));
    }

    #[test]
    fn a_sealed_memfd_takes_no_second_writer() {
        let fd = sealed(4096);
        let again = File::options().write(true).open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
        let refused = match again {
            Err(_) => true,
            Ok(file) => std::os::unix::fs::FileExt::write_at(&file, b"x", 0).is_err(),
        };
        assert!(refused, "a sealed memfd was written through a reopened descriptor");
        assert!(nix::unistd::ftruncate(&fd, 0).is_err());
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        let error = Reserved::new("fbuf-test", 1 << 50).unwrap_err();
        assert!(matches!(error, MemoryError::NotEnough { asked, .. } if asked == 1 << 50), "{error}");
    }
}
