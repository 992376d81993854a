//! The broker's socket: bound, taken over from a broker that died, made anew when its file is gone, or inherited from
//! systemd.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use fbuf_core::{
    process::sys::{in_call, os_error},
    socket::Listening,
};
use fbuf_protocol::address::Address;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockname, getsockopt, listen, socket,
        sockopt::AcceptConn,
    },
};

use crate::socket_file::{Folder, Found, SocketFile};

/// How many connections wait to be accepted. Clients that find the queue full wait for a place in it, one behind the
/// other, whosever they are; so it is short, and what a few threads of one user can put before another's connection is
/// quickly through.
const QUEUE: i32 = 4;

/// A socket on which clients can connect.
#[derive(Debug)]
pub struct Listener {
    /// None if it was inherited.
    address: Option<Address>,
    bound: Mutex<Bound>,
    /// The file of one that was inherited, if it has one.
    given: Option<GivenFile>,
}

/// The file of a socket that was handed over.
#[derive(Debug)]
struct GivenFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl GivenFile {
    fn of(socket: &Listening) -> Option<Self> {
        let path = getsockname::<UnixAddr>(socket.as_raw_fd()).ok()?.path()?.to_owned();
        Some(Self { identity: identity(&path)?, path })
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

#[derive(Debug)]
struct Bound {
    socket: Listening,
    /// Removed at the end.
    file: Option<SocketFile>,
    /// Whether processes of every user may connect.
    is_open_to_all: bool,
}

/// Whether clients still find a listener where it was bound.
#[derive(Debug)]
pub(crate) enum Standing {
    /// They do.
    Found,
    /// Its file was gone, and there is a new one, of a new socket.
    MadeAnew,
    /// Its file is gone, and there can be no new one now.
    Lost(BindError),
}

/// Why a broker cannot listen where it was told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// There is one already.
    #[error("a broker listens at {address} already: stop it first, or choose another --socket")]
    Running {
        /// Where.
        address: Address,
    },
    /// Something else has the name.
    #[error(
        "no broker can listen at {address}, where a file is that is no socket: move it away, or choose another --socket"
    )]
    Occupied {
        /// Where.
        address: Address,
    },
    /// The folder belongs to another user, which could put other files in the place of the socket.
    #[error(
        "no broker can listen in {}, which belongs to user {owner}: choose a --socket in a folder of root's or of your own",
        folder.display()
    )]
    ForeignFolder {
        /// The folder.
        folder: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Other users can write the folder, and so put other files in the place of the socket.
    #[error(
        "no broker can listen in {}, which other users can write (mode {mode:o}): `chmod go-w` it, or choose another --socket",
        folder.display()
    )]
    ExposedFolder {
        /// The folder.
        folder: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A dead socket of another user has the name.
    #[error(
        "no broker can listen at {address}, where a socket of user {owner} is on which nothing listens: remove it, or choose another --socket"
    )]
    ForeignFile {
        /// Where it was to listen.
        address: Address,
        /// The owner of the file.
        owner: u32,
    },
    /// Another file has taken the place of the socket while the broker listened.
    #[error(
        "the socket file at {address} was replaced by another, so that no client finds this broker: it ends, and its clients connect to the broker that is there now"
    )]
    Replaced {
        /// Where.
        address: Address,
    },
    /// The file of a socket that was handed over is gone, or was replaced.
    #[error(
        "the socket file {}, which was handed over, is gone or was replaced: have the service manager make it anew (`systemctl restart` its socket unit)",
        path.display()
    )]
    GivenFileLost {
        /// The file.
        path: PathBuf,
    },
    /// The kernel says no.
    #[error("no broker can listen at {address}: {error}; {}", remedy(address, error))]
    Refused {
        /// Where it was to listen.
        address: Address,
        /// The kernel's reason.
        error: io::Error,
    },
}

/// What to do about an address at which the kernel lets no broker listen.
fn remedy(address: &Address, source: &io::Error) -> &'static str {
    match os_error(source) {
        Some(Errno::ENOENT) => "make its folder, or choose another --socket, as in $XDG_RUNTIME_DIR",
        Some(Errno::EACCES) if matches!(address, Address::Path(_)) => {
            "this user may not make files there: choose another --socket"
        }
        Some(Errno::EPERM) if matches!(address, Address::Path(_)) => {
            "that file system has no sockets, or a seccomp filter or a security module refuses the call: choose another \
             --socket, or permit it"
        }
        Some(Errno::EACCES | Errno::EPERM | Errno::ENOSYS) => {
            "a seccomp filter of this process or its container, or a security module (AppArmor, SELinux), refuses the call: \
             permit it"
        }
        Some(Errno::EROFS) => "nothing can be made in that file system: choose another --socket",
        Some(Errno::ENOSPC | Errno::EDQUOT) => "free some space there, or choose another --socket",
        Some(Errno::EMFILE) => "raise the limit on descriptors of this process (RLIMIT_NOFILE, ulimit -n)",
        Some(Errno::ENFILE) => "raise the limit on open files of the machine (fs.file-max)",
        _ => "choose another --socket",
    }
}

impl Listener {
    /// Listens at an address. The socket file of a broker that died is replaced.
    ///
    /// # Errors
    /// [`BindError`]
    pub fn bind(address: &Address) -> Result<Self, BindError> {
        Ok(Self { address: Some(address.clone()), bound: Mutex::new(Bound::make(address)?), given: None })
    }

    /// Lets processes of every user connect; which of them are served is decided when they do.
    ///
    /// # Errors
    /// What chmod(2) says.
    pub fn open_to_all(&self) -> io::Result<()> {
        self.lock().open_to_all()
    }

    /// Takes over a socket that listens already, as systemd hands it over. Its file stays at the end.
    ///
    /// # Errors
    /// What listen(2) says.
    pub fn inherited(socket: OwnedFd) -> io::Result<Self> {
        let socket = Listening::from(socket);
        // What clients learn of the process at the other end is which process called listen(2) last. For a socket that
        // the service manager listens at, that is to be the service manager.
        if !getsockopt(&socket, AcceptConn)? {
            listen(&socket, Backlog::new(QUEUE)?)?;
        }
        let given = GivenFile::of(&socket);
        let bound = Bound { socket, file: None, is_open_to_all: true };
        Ok(Self { address: None, bound: Mutex::new(bound), given })
    }

    /// The socket, at which connections can be accepted.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn socket(&self) -> io::Result<Listening> {
        self.lock().socket.try_clone()
    }

    /// Looks whether clients still find it, and makes its file anew if that is gone.
    ///
    /// # Errors
    /// [`BindError::Replaced`]: there is another.
    pub(crate) fn look(&self) -> Result<Standing, BindError> {
        if let Some(GivenFile { path, identity: made }) = &self.given
            && identity(path) != Some(*made)
        {
            return Ok(Standing::Lost(BindError::GivenFileLost { path: path.clone() }));
        }
        let mut bound = self.lock();
        let (Some(address), Some(file)) = (&self.address, &bound.file) else { return Ok(Standing::Found) };
        match file.look() {
            Ok(Found::Itself) => return Ok(Standing::Found),
            Ok(Found::Another) => return Err(BindError::Replaced { address: address.clone() }),
            Ok(Found::Nothing) => {}
            Err(error) => return Ok(Standing::Lost(BindError::Refused { address: address.clone(), error })),
        }
        let made = Bound::make(address).and_then(|mut new| {
            let refused = |error| BindError::Refused { address: address.clone(), error };
            if bound.is_open_to_all { new.open_to_all().map(|()| new).map_err(refused) } else { Ok(new) }
        });
        Ok(match made {
            Ok(new) => {
                *bound = new;
                Standing::MadeAnew
            }
            Err(error) => Standing::Lost(error),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Bound> {
        // A panic while it was locked cannot have left it half changed.
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bound {
    fn make(address: &Address) -> Result<Self, BindError> {
        let refused = |error: io::Error| BindError::Refused { address: address.clone(), error };
        // One that is too long is refused also where a shorter name leads to the same file: clients have none.
        let given = address.to_kernel().map_err(refused)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None);
        let socket = socket.map_err(in_call("socket")).map_err(refused)?;
        let socket = Listening::from(socket);
        let folder = match address {
            Address::Path(path) => Some(Folder::of(path, address)?),
            Address::Abstract(_) => None,
        };
        let _locked = folder.as_ref().map(Folder::lock).transpose().map_err(refused)?;
        let name = match &folder {
            Some(folder) => {
                folder.clear(address)?;
                folder.to_kernel().map_err(refused)?
            }
            None => given,
        };
        bind(socket.as_raw_fd(), &name).map_err(|error| match error {
            Errno::EADDRINUSE => BindError::Running { address: address.clone() },
            error => refused(in_call("bind")(error)),
        })?;
        let file = folder.map(SocketFile::made_in).transpose().map_err(refused)?;
        Backlog::new(QUEUE).and_then(|queue| listen(&socket, queue)).map_err(in_call("listen")).map_err(refused)?;
        Ok(Self { socket, file, is_open_to_all: false })
    }

    fn open_to_all(&mut self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.set_mode(0o666)?;
        }
        self.is_open_to_all = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_mode_that_is_changed_is_that_of_the_socket_wherever_its_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let [path, moved, secret] = ["broker", "moved", "secret"].map(|name| folder.path().join(name));
        fs::write(&secret, "secret").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        let listener = Listener::bind(&Address::Path(path.clone())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(&path, &moved).unwrap();
        symlink(&secret, &path).unwrap();
        listener.open_to_all().unwrap();
        assert_eq!((mode(&moved), mode(&secret)), (0o666, 0o600));
        assert!(matches!(listener.look(), Err(BindError::Replaced { .. })));
        drop(listener);
        assert!(fs::symlink_metadata(&path).unwrap().is_symlink(), "it has removed what is not its own");
    }
}
