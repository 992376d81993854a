//! Bytes that nobody can change any more.

use std::{
    fmt, io,
    ops::{Deref, Range},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use bytes::Bytes;
use nix::sys::stat::fstat;

use super::{
    map::Frozen,
    memfd::{Seals, check_seals, unmappable},
};
use crate::{process::foreign::Foreign, violation::Unsuitable};

/// Bytes in a memfd that is sealed for good (`F_SEAL_WRITE`, fcntl(2)): the kernel lets nobody change
/// them, through any descriptor. They may be kept for as long as one likes, shared by cloning, given
/// to any process as a descriptor, and to sendfile(2) and splice(2), which go on reading after they
/// have returned.
///
/// ```
/// use std::{fs::File, os::fd::AsFd};
/// use fbuf_core::memory::Sealed;
///
/// let file = File::open("/dev/null")?;
/// assert!(Sealed::new(file.into(), 0).is_err(), "that is no sealed memfd");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct Sealed(Arc<SealedMemory>);

/// What a [`Sealed`] shares with its clones.
#[derive(Debug)]
pub(crate) struct SealedMemory {
    pub(crate) bytes: Frozen,
    pub(crate) memory: Foreign,
    length: usize,
}

impl SealedMemory {
    /// As [`Sealed::new`], of a memfd that has exactly this size.
    ///
    /// # Errors
    /// The memfd, and why.
    pub(crate) fn new(memory: Foreign, size: u64, length: usize) -> Result<Self, (Foreign, Unsuitable)> {
        if size < length as u64 {
            return Err((memory, Unsuitable::Size { found: size, wanted: length as u64 }));
        }
        match Frozen::attach(memory.as_fd(), size) {
            Ok(bytes) => Ok(Self { bytes, memory: memory.of_bytes(size), length }),
            Err(unsuitable) => Err((memory, unsuitable)),
        }
    }
}

impl From<SealedMemory> for Sealed {
    fn from(memory: SealedMemory) -> Self {
        Self(Arc::new(memory))
    }
}

impl Sealed {
    /// The first `length` bytes of a memfd that was sealed for good.
    ///
    /// # Errors
    /// [`Unsuitable`]: it is not sealed for good, or shorter, or not all there.
    pub fn new(memory: OwnedFd, length: usize) -> Result<Self, Unsuitable> {
        let memory = Foreign::from(memory);
        // Before its file system is asked for anything.
        check_seals(memory.as_fd(), Seals::ForGood)?;
        let size = fstat(&memory).map_err(unmappable("fstat"))?.st_size.max(0) as u64;
        SealedMemory::new(memory, size, length).map(Self::from).map_err(|(_, unsuitable)| unsuitable)
    }

    /// Other bytes of the memfd: none, if they do not all lie in it.
    pub(crate) fn behind(&self, bytes: Range<usize>) -> &[u8] {
        self.0.bytes.get(bytes).unwrap_or_default()
    }

    /// The memfd. Its first [`len`](slice::len) bytes are these.
    ///
    /// # Errors
    /// When it is shared with a clone, and there is no descriptor left.
    pub fn into_fd(self) -> io::Result<OwnedFd> {
        match Arc::try_unwrap(self.0) {
            Ok(inner) => Ok(inner.memory.into_fd()),
            Err(shared) => shared.memory.as_fd().try_clone_to_owned(),
        }
    }
}

impl AsFd for Sealed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.memory.as_fd()
    }
}

impl Deref for Sealed {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // As long as was checked.
        &self.0.bytes[..self.0.length]
    }
}

impl AsRef<[u8]> for Sealed {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// Without a copy.
impl From<Sealed> for Bytes {
    fn from(sealed: Sealed) -> Self {
        Self::from_owner(sealed)
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealed").field("len", &self.len()).finish_non_exhaustive()
    }
}
