//! Memory of which the kernel knows every writer, so that a read lease on it says something: nobody can
//! write it, and nobody will before the holder of the lease has been told (F_SETLEASE in fcntl(2)).

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
};

use ::memfd::{FileSeal, HugetlbSize, MemfdOptions};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, OFlag, fallocate},
    sys::{
        stat::{FileStat, fstat},
        statfs::{HUGETLBFS_MAGIC, fstatfs},
    },
    unistd::{Uid, fchown, geteuid},
};

use super::{
    Map, MemoryError, Seals, available,
    memfd::{access_mode, check_seals, kernels_reason, reserved, unmappable},
};
use crate::{
    process::{foreign::Foreign, sys::os_error},
    violation::Unsuitable,
};

/// The size of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// How memory is opened again, as errors name it.
pub(crate) const OPENING: &str = "openat for a memfd of /proc/self/fd,";

/// Its size cannot change. That it could still be written is the point of it.
const SEALS: [FileSeal; 3] = [FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal];

/// In which pages memory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Pages {
    /// Those of the machine, 4 KiB most often.
    Base,
    /// Huge ones, which the kernel made up when it was asked to (`MADV_HUGEPAGE` in madvise(2)).
    Transparent,
    /// Huge ones out of those that were set aside (`MFD_HUGETLB` in memfd_create(2), vm.nr_hugepages).
    Huge,
}

impl std::fmt::Display for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Base => "base pages",
            Self::Transparent => "transparent huge pages",
            Self::Huge => "huge pages",
        })
    }
}

/// Why this process cannot open memory again that it has, as it has to for each right to write it that it passes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CannotReopen {
    /// It has as many descriptors as it may.
    #[error("no descriptor is left (RLIMIT_NOFILE): close some, or raise `ulimit -n`")]
    NoDescriptor,
    /// It has changed its user since it made the memory.
    #[error(
        "this process may not open them again (EACCES): they belong to the user that it had when it made them; if it has changed \
         its user since, let it open another receiver"
    )]
    NotPermitted,
    /// It has no /proc any more.
    #[error(
        "this process cannot open them again (ENOENT): that goes through /proc/self/fd; if it has changed its root folder \
         since, mount proc there"
    )]
    NoProc,
}

impl CannotReopen {
    /// The reason behind what open(2) says, if it is one of these.
    pub(crate) fn of(error: &io::Error) -> Option<Self> {
        Some(match Errno::from_raw(error.raw_os_error()?) {
            Errno::EMFILE | Errno::ENFILE => Self::NoDescriptor,
            Errno::EACCES => Self::NotPermitted,
            Errno::ENOENT | Errno::ENOTDIR => Self::NoProc,
            _ => return None,
        })
    }
}

/// Which file a descriptor names. Numbers of memfds do not come again before there were 2⁶⁴ of them; those of huge
/// pages may, and are compared only between processes of one user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

/// A memfd that can be leased, and a descriptor of it that only reads.
///
/// What memfd_create(2) returns writes without being counted as a writer. So a process that relies on leases has
/// to know which one made the memory: its broker, or itself.
#[derive(Debug)]
pub struct Leasable {
    reader: Foreign,
    size: u64,
    file: FileId,
    /// Whether no other process has the same open file: leases go by those.
    own: bool,
}

impl Leasable {
    /// Makes one of `size` bytes, or somewhat more, of which no page exists yet; `owner` is the user that
    /// may lease it, and open it again for writing. The one descriptor of it is that which is returned.
    ///
    /// # Errors
    /// [`MemoryError::Refused`]: another owner, by a process that is not of root; no huge pages on this kernel; no /proc.
    pub fn create(name: &str, size: u64, huge: bool, owner: u32) -> Result<Self, MemoryError> {
        let size = whole_pages(size, huge);
        let refused = |call, source| MemoryError::Refused { call, asked: size, error: source };
        available::check_length(size)?;
        let options = MemfdOptions::new().allow_sealing(true).hugetlb(huge.then_some(HugetlbSize::Huge2MB));
        let made = options.create(name).map_err(|error| refused("memfd_create", kernels_reason(error)))?;
        made.as_file().set_len(size).map_err(|error| refused("ftruncate", error))?;
        made.as_file().set_permissions(Permissions::from_mode(0o600)).map_err(|error| refused("fchmod", error))?;
        made.add_seals(&SEALS).map_err(|error| refused("F_ADD_SEALS", io::Error::other(error)))?;
        // While this user can still open it.
        let reader = reopen(made.as_file().as_fd(), File::options().read(true));
        let reader = reader.map_err(|error| refused(OPENING, error))?;
        if owner != geteuid().as_raw() {
            let chowned = fchown(made.as_file(), Some(Uid::from_raw(owner)), None);
            chowned.map_err(|error| refused("fchown", error.into()))?;
        }
        let stat = fstat(&reader).map_err(|error| refused("fstat", error.into()))?;
        Ok(Self { reader: reader.into(), size, file: FileId::of(&stat), own: true })
    }

    /// Takes what another process made for a slot of so many bytes, if it is as [`Self::create`] makes it: of exactly
    /// this size, and with exactly these seals. The descriptor is replaced by one of this process alone, if the kernel
    /// permits, since a lease goes by that.
    ///
    /// # Errors
    /// [`Unsuitable`], naming the first rule it breaks.
    pub(crate) fn given(reader: impl Into<Foreign>, slot_bytes: u64) -> Result<Self, Unsuitable> {
        let reader = reader.into();
        check_seals(reader.as_fd(), Seals::Size)?;
        let stat = fstat(&reader).map_err(unmappable("fstat"))?;
        let (found, wanted) = (stat.st_size.max(0) as u64, whole_pages(slot_bytes, is_huge(reader.as_fd())));
        if found != wanted {
            return Err(Unsuitable::Size { found, wanted });
        }
        let (reader, own) = match reopen(reader.as_fd(), File::options().read(true)) {
            Ok(reopened) => (reopened.into(), true),
            Err(_) => (reader, false),
        };
        Ok(Self { reader, size: wanted, file: FileId::of(&stat), own })
    }

    /// Checks a descriptor through which its maker lets this process write it: it names this very memory, is open for
    /// writing, and all pages exist. Those of another user are no huge ones, which their owner can take away from a
    /// process that has them mapped, which would die of SIGBUS.
    ///
    /// # Errors
    /// [`Unsuitable`], naming the first rule it breaks.
    pub(crate) fn verify_writer(&self, writer: BorrowedFd<'_>, same_user: bool) -> Result<(), Unsuitable> {
        // Before its file system is asked for anything.
        check_seals(writer, Seals::Size)?;
        let stat = fstat(writer).map_err(unmappable("fstat"))?;
        if FileId::of(&stat) != self.file {
            return Err(Unsuitable::OtherMemory);
        }
        if !same_user && (is_huge(writer) || is_huge(self.as_fd())) {
            return Err(Unsuitable::Removable);
        }
        if access_mode(writer)? != OFlag::O_RDWR {
            return Err(Unsuitable::NotOpenFor { purpose: "writing" });
        }
        let reserved = reserved(&stat);
        if reserved < self.size {
            return Err(Unsuitable::Holes { reserved, size: self.size });
        }
        Ok(())
    }

    /// Whether both are the same memory.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.file == other.file
    }

    /// Whether it can be leased through this descriptor without another process meddling with it.
    #[must_use]
    pub(crate) fn is_own(&self) -> bool {
        self.own
    }

    /// Its size in bytes.
    #[must_use]
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Opens it for writing, if this user owns it.
    ///
    /// # Errors
    /// `WouldBlock` while any process has a lease on it, which is told.
    pub fn open_writer(&self) -> io::Result<OwnedFd> {
        reopen(self.reader.as_fd(), File::options().read(true).write(true))
    }

    /// Opens it for reading once more.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn open_reader(&self) -> io::Result<OwnedFd> {
        reopen(self.reader.as_fd(), File::options().read(true))
    }

    /// Has all of its pages exist, in such ones if they can be had.
    ///
    /// # Errors
    /// [`MemoryError`]: there are not so many.
    pub(crate) fn reserve(&self, pages: Pages) -> Result<Pages, MemoryError> {
        let refused = |call, source| MemoryError::Refused { call, asked: self.size, error: source };
        let writer = self.open_writer().map_err(|error| refused(OPENING, error))?;
        let huge = is_huge(writer.as_fd());
        if !huge {
            available::check(self.size)?;
        }
        // A file of huge pages that are set aside gets them when it is mapped.
        let none_left = || MemoryError::NotEnough { asked: self.size, available: 0, bound: "free huge pages" };
        let map = match Map::of_writer(writer.as_fd(), self.size, pages != Pages::Base) {
            Err(MemoryError::Refused { error: source, .. }) if huge && source.kind() == io::ErrorKind::OutOfMemory => {
                return Err(none_left());
            }
            // A page that cannot be had is ENOMEM, or EFAULT where an access would be SIGBUS.
            Err(MemoryError::Refused { call: "madvise", error, .. })
                if matches!(os_error(&error), Some(Errno::ENOMEM | Errno::EFAULT)) =>
            {
                return Err(if huge { none_left() } else { available::none_left(self.size) });
            }
            other => other?,
        };
        let length = i64::try_from(self.size).map_err(|error| refused("fallocate", io::Error::other(error)))?;
        loop {
            match fallocate(&writer, FallocateFlags::empty(), 0, length) {
                Ok(()) if huge => return Ok(Pages::Huge),
                Ok(()) => return Ok(if map.is_in_huge_pages() { Pages::Transparent } else { Pages::Base }),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOSPC | Errno::ENOMEM) if huge => return Err(none_left()),
                Err(Errno::ENOSPC | Errno::ENOMEM) => return Err(available::none_left(self.size)),
                Err(error) => return Err(refused("fallocate", error.into())),
            }
        }
    }

    /// Whether all of its pages exist: a page that does not could be had for reading only while there is
    /// memory.
    pub(crate) fn is_whole(&self) -> bool {
        fstat(&self.reader).is_ok_and(|stat| reserved(&stat) >= self.size)
    }
}

impl From<Leasable> for OwnedFd {
    fn from(memory: Leasable) -> Self {
        memory.reader.into_fd()
    }
}

impl AsFd for Leasable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// How many huge pages there are that were set aside and that nobody has.
#[must_use]
pub fn free_huge_pages() -> u64 {
    let read = |name: &str| fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")).ok();
    let count = |name| read(name).and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
    count("free_hugepages").saturating_sub(count("resv_hugepages"))
}

/// Whether the kernel makes up huge pages for memfds that ask for them.
#[must_use]
pub fn has_transparent_pages() -> bool {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    !text.is_empty() && !text.contains("[never]") && !text.contains("[deny]")
}

impl FileId {
    pub(crate) fn of(stat: &FileStat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// The size of memory for a slot. No memory has the largest.
fn whole_pages(slot_bytes: u64, huge: bool) -> u64 {
    let page = if huge { HUGE_PAGE } else { crate::memory::page_bytes() };
    slot_bytes.max(1).checked_next_multiple_of(page).unwrap_or(u64::MAX)
}

/// Whether it lies in huge pages that were set aside. The owner of such a file can take them away from processes
/// that have it mapped, and there may be no others.
pub(crate) fn is_huge(memory: BorrowedFd<'_>) -> bool {
    fstatfs(memory).is_ok_and(|stat| stat.filesystem_type() == HUGETLBFS_MAGIC)
}

/// Opens a file once more. If a process has a lease on it that is in the way, this does not wait until it lets go.
pub(super) fn reopen(file: BorrowedFd<'_>, options: &mut fs::OpenOptions) -> io::Result<OwnedFd> {
    let options = options.custom_flags(OFlag::O_NONBLOCK.bits());
    Ok(options.open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> u32 {
        geteuid().as_raw()
    }

    #[test]
    fn it_can_be_written_by_its_owner_and_keeps_its_size() {
        let memory = Leasable::create("fbuf-test", 5000, false, own()).unwrap();
        assert_eq!((memory.size(), memory.is_whole()), (8192, false));
        assert!(memory.reserve(Pages::Base).is_ok() && memory.is_whole());
        let writer = memory.open_writer().unwrap();
        nix::sys::uio::pwrite(&writer, b"x", 5000).unwrap();
        assert!(nix::unistd::ftruncate(&writer, 0).is_err());
        let mode = fs::metadata(format!("/proc/self/fd/{}", memory.as_fd().as_raw_fd())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_call_that_is_refused_is_not_taken_for_a_lack_of_memory() {
        let memory = Leasable::create("fbuf-test", 4096, false, own()).unwrap();
        assert!(memory.reserve(Pages::Base).is_ok(), "the control");
        let reserved = std::thread::spawn(move || {
            crate::socket::tests::refuse_here(nix::libc::SYS_madvise);
            memory.reserve(Pages::Base)
        });
        match reserved.join().unwrap() {
            // Before Linux 5.14 it is not asked.
            Ok(_) => assert!(!crate::memory::map::can_provide()),
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("madvise") && said.contains("seccomp") && !said.contains("available"), "{said}");
            }
        }
    }

    #[test]
    fn what_is_given_is_looked_at() {
        let memory = Leasable::create("fbuf-test", 4096, false, own()).unwrap();
        let reader = || memory.as_fd().try_clone_to_owned().unwrap();
        assert_eq!(Leasable::given(reader(), 4096).unwrap().size(), 4096);
        for (other, wanted) in [(4097, 8192), (8192, 8192)] {
            assert_eq!(Leasable::given(reader(), other).unwrap_err(), Unsuitable::Size { found: 4096, wanted });
        }
        let loose = MemfdOptions::new().allow_sealing(true).create("fbuf-test").unwrap().into_file();
        loose.set_len(4096).unwrap();
        assert!(matches!(Leasable::given(OwnedFd::from(loose), 4096), Err(Unsuitable::Seals { found: 0, .. })));
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(Leasable::given(OwnedFd::from(file), 1).unwrap_err(), Unsuitable::NotSealable);
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        let memory = Leasable::create("fbuf-test", 1 << 50, false, own()).unwrap();
        assert!(matches!(memory.reserve(Pages::Base), Err(MemoryError::NotEnough { .. })));
        for (size, huge) in [(u64::MAX, true), (u64::MAX, false), (u64::MAX - HUGE_PAGE, true), (1 << 63, false)] {
            assert!(matches!(Leasable::create("fbuf-test", size, huge, own()), Err(MemoryError::Refused { .. })));
        }
    }
}
