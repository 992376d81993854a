//! The file of the broker's socket, and the folder that it lies in. What is done with the file is done relative to a
//! descriptor of the folder, and only in a folder where no other user can exchange files; its mode is changed through
//! a descriptor of the file itself. So no symbolic link and no rename(2) by another user can lead the broker elsewhere.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use fbuf_core::{process::fork::Generation, socket::PacketSocket};
use fbuf_protocol::address::Address;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, Flock, FlockArg, OFlag, open, openat},
    sys::{
        socket::UnixAddr,
        stat::{FileStat, Mode, SFlag, fstat, fstatat},
    },
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};

use crate::listener::BindError;

/// How long to wait for another broker that starts in the same folder. Any process that may read the folder can lock
/// it, for as long as it likes; without the lock, the worst is that one of two brokers that start at once notices a
/// moment later that the other has its place, and ends.
const LOCK_TIME: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// How long a broker that may be there already has to accept a connection.
const PROBE_TIME: Duration = Duration::from_secs(1);

/// A folder that belongs to root or to the broker's user, and in which no other user can exchange files of these.
#[derive(Debug)]
pub(crate) struct Folder {
    folder: OwnedFd,
    /// The name of the socket in it.
    name: OsString,
    /// The whole path, in which no `.` stands for a folder that may be another one later.
    path: PathBuf,
}

/// A socket file that this broker has made.
#[derive(Debug)]
pub(crate) struct SocketFile {
    generation: Generation,
    folder: Folder,
    /// The file itself (O_PATH), whatever has its name.
    file: OwnedFd,
}

/// What is found at the path of a socket that was made there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// It.
    Itself,
    /// Nothing.
    Nothing,
    /// Another file.
    Another,
}

/// Whether two names are of one file.
fn is_same(one: &FileStat, other: &FileStat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// Whether a user that this process need not trust can change what is in a file or folder.
pub(crate) fn is_exposed(mode: u32, group: u32) -> bool {
    // What the members of one's own group may do was left to them.
    let by_group = mode & 0o020 != 0 && group != 0 && group != nix::unistd::getegid().as_raw();
    mode & 0o002 != 0 || by_group
}

impl Folder {
    /// The folder of a socket.
    pub(crate) fn of(path: &Path, address: &Address) -> Result<Self, BindError> {
        let refused = |error: io::Error| BindError::Refused { address: address.clone(), error };
        let path = std::path::absolute(path).map_err(refused)?;
        let parts = path.parent().zip(path.file_name());
        let (folder, name) = parts.ok_or_else(|| BindError::Occupied { address: address.clone() })?;
        let (folder, name) = (folder.to_owned(), name.to_owned());
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = open(&folder, flags, Mode::empty()).map_err(|error| refused(error.into()))?;
        let found = fstat(&opened).map_err(|error| refused(error.into()))?;
        let is_sticky = found.st_mode & Mode::S_ISVTX.bits() != 0;
        if found.st_uid != 0 && found.st_uid != geteuid().as_raw() {
            return Err(BindError::ForeignFolder { folder, owner: found.st_uid });
        }
        if is_exposed(found.st_mode, found.st_gid) && !is_sticky {
            return Err(BindError::ExposedFolder { folder, mode: found.st_mode & 0o7777 });
        }
        Ok(Self { folder: opened, name, path })
    }

    /// Locks the folder, so that of two brokers that start at once neither removes the file of the other; none if another
    /// process keeps it locked, or the file system has no locks.
    pub(crate) fn lock(&self) -> io::Result<Option<Flock<OwnedFd>>> {
        let (mut folder, start) = (self.folder.try_clone()?, Instant::now());
        loop {
            match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => return Ok(Some(locked)),
                Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) if start.elapsed() < LOCK_TIME => folder = back,
                Err(_) => return Ok(None),
            }
            thread::sleep(LOCK_PAUSE);
        }
    }

    /// The file, as the kernel is told of it: in this folder, whatever its path leads to by now.
    pub(crate) fn to_kernel(&self) -> io::Result<UnixAddr> {
        let through_descriptor = through_proc(&self.folder).join(&self.name);
        if fs::exists(through_proc(&self.folder)).unwrap_or(false)
            && let Ok(name) = UnixAddr::new(&through_descriptor)
        {
            return Ok(name);
        }
        // No /proc, or a name that is almost too long: [`SocketFile::made_in`] sees whether it came to lie here.
        Address::Path(self.path.clone()).to_kernel()
    }

    /// What has a name in this folder.
    fn find(&self, name: &OsStr) -> io::Result<Option<FileStat>> {
        match fstatat(&self.folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the socket file of a broker that died.
    pub(crate) fn clear(&self, address: &Address) -> Result<(), BindError> {
        let refused = |error| BindError::Refused { address: address.clone(), error };
        let Some(found) = self.find(&self.name).map_err(refused)? else { return Ok(()) };
        if !is_socket(&found) {
            return Err(BindError::Occupied { address: address.clone() });
        }
        let name = self.to_kernel().map_err(refused)?;
        match PacketSocket::connect(&name, PROBE_TIME) {
            Ok(_) => return Err(BindError::Running { address: address.clone() }),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                // Its queue is full: it is alive, if busy.
                Some(Errno::EAGAIN) => return Err(BindError::Running { address: address.clone() }),
                // A living socket of some other program, of another type.
                Some(Errno::EPROTOTYPE) => return Err(BindError::Occupied { address: address.clone() }),
                Some(Errno::ECONNREFUSED) => {}
                _ => return Err(refused(error)),
            },
        }
        if found.st_uid != 0 && found.st_uid != geteuid().as_raw() {
            return Err(BindError::ForeignFile { address: address.clone(), owner: found.st_uid });
        }
        unlinkat(&self.folder, &*self.name, UnlinkatFlags::NoRemoveDir).map_err(|error| refused(error.into()))
    }
}

impl SocketFile {
    /// The file that bind(2) has just made in this folder.
    pub(crate) fn made_in(folder: Folder) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&folder.folder, &*folder.name, flags, Mode::empty())?;
        let found = fstat(&file)?;
        if is_socket(&found) && found.st_uid == geteuid().as_raw() {
            Ok(Self { generation: Generation::current(), folder, file })
        } else {
            Err(io::Error::other("another process has changed what is there"))
        }
    }

    /// Changes its mode.
    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        // fchmod(2) takes no O_PATH; this leads to the open file and follows nothing else.
        fs::set_permissions(through_proc(&self.file), fs::Permissions::from_mode(mode))
    }

    /// What has its path now.
    pub(crate) fn look(&self) -> io::Result<Found> {
        let made = fstat(&self.file)?;
        Ok(match fs::symlink_metadata(&self.folder.path) {
            Ok(found) if (found.dev(), found.ino()) == (made.st_dev, made.st_ino) => Found::Itself,
            Ok(_) => Found::Another,
            // Its folder is gone, or cannot be searched.
            Err(_) => Found::Nothing,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.generation.is_current() {
            // It is the broker's that this process was forked from.
            return;
        }
        if let (Ok(made), Ok(Some(found))) = (fstat(&self.file), self.folder.find(&self.folder.name))
            && is_same(&made, &found)
        {
            // It may be gone by now, which is as well.
            let _ = unlinkat(&self.folder.folder, &*self.folder.name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

fn is_socket(found: &FileStat) -> bool {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFSOCK
}

/// A path that leads to an open file (proc(5)).
fn through_proc(file: &impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}
