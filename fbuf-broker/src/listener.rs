//! The broker's socket: bound, taken over from a broker that died, or inherited from systemd.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use fbuf_core::{address::Address, socket::PacketSocket};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, bind, listen, socket},
};

/// How many connections wait to be accepted. Those who find the queue full wait for a place in it, one behind the
/// other, whosever they are; so it is short, and what a few threads of one user can put before another's connection is
/// quickly through.
const QUEUE: i32 = 4;

/// A socket on which clients can connect.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// The file to remove at the end, and its inode: only the one that was made here.
    file: Option<(PathBuf, u64)>,
}

/// Why a broker cannot listen where it was told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// There is one already.
    #[error("a broker was to listen at {0}, and one does already: stop it first, or choose another --socket")]
    Running(Address),
    /// Something else has the name.
    #[error(
        "a broker was to listen at {0}, and a file is there that is no socket: move it away, or choose another --socket"
    )]
    Occupied(Address),
    /// The kernel says no.
    #[error("a broker was to listen at {address}: {source}; make its folder, or choose another --socket")]
    Refused {
        /// Where it was to listen.
        address: Address,
        /// The kernel's reason.
        source: io::Error,
    },
}

impl Listener {
    /// Listens at an address. The socket file of a broker that died is replaced.
    ///
    /// # Errors
    /// [`BindError`]
    pub fn bind(address: &Address) -> Result<Self, BindError> {
        let refused = |source: io::Error| BindError::Refused { address: address.clone(), source };
        let name = address.to_kernel().map_err(refused)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(|e| refused(e.into()))?;
        // Two brokers that start at once must not both find the file of a dead one and remove each
        // other's: the folder is locked for as long as this takes.
        let locked = match address {
            Address::Path(path) => Some(lock_folder(path).map_err(refused)?),
            Address::Abstract(_) => None,
        };
        if let Address::Path(path) = address {
            clear(path, address)?;
        }
        bind(socket.as_raw_fd(), &name).map_err(|error| match error {
            Errno::EADDRINUSE => BindError::Running(address.clone()),
            error => refused(error.into()),
        })?;
        set_queue(&socket).map_err(refused)?;
        drop(locked);
        let file = match address {
            Address::Path(path) => Some((path.clone(), fs::metadata(path).map_err(refused)?.ino())),
            Address::Abstract(_) => None,
        };
        Ok(Self { socket, file })
    }

    /// Lets processes of every user connect; which of them are served is decided when they do.
    ///
    /// # Errors
    /// What chmod(2) says.
    pub fn open_to_all(&self) -> io::Result<()> {
        let Some((path, _)) = &self.file else { return Ok(()) };
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))
    }

    /// Takes over a socket that listens already, as systemd hands it over. Its file stays at the end.
    ///
    /// # Errors
    /// What listen(2) says.
    pub fn inherited(socket: OwnedFd) -> io::Result<Self> {
        set_queue(&socket)?;
        Ok(Self { socket, file: None })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, inode)) = &self.file
            && fs::symlink_metadata(path).is_ok_and(|found| found.ino() == *inode)
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// Listens, or goes on to listen with a queue as long as this one's.
fn set_queue(socket: &OwnedFd) -> io::Result<()> {
    Ok(listen(socket, Backlog::new(QUEUE)?)?)
}

fn lock_folder(path: &Path) -> io::Result<Flock<File>> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = File::open(folder)?;
    Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
}

/// Removes the socket file of a broker that died.
fn clear(path: &Path, address: &Address) -> Result<(), BindError> {
    let refused = |source| BindError::Refused { address: address.clone(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(BindError::Occupied(address.clone())),
        Ok(_) => {}
    }
    let name = address.to_kernel().map_err(refused)?;
    match PacketSocket::connect(&name, Duration::from_secs(1)) {
        Ok(_) => Err(BindError::Running(address.clone())),
        // Its queue is full: it is alive, if busy.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(BindError::Running(address.clone())),
        // Some other program's socket, of another type, that is alive.
        Err(error) if error.raw_os_error() == Some(Errno::EPROTOTYPE as i32) => {
            Err(BindError::Occupied(address.clone()))
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(refused),
        Err(error) => Err(refused(error)),
    }
}
