//! How a client finds its broker, and by which users' brokers it lets itself be introduced.

use std::{
    io,
    time::{Duration, Instant},
};

use fbuf_core::{
    process::sys::{limit_behind, os_error},
    socket::{NO_ID, PacketSocket},
};
use fbuf_protocol::{
    QuotaExceeded, VERSION,
    address::{Address, VARIABLE, set_aside},
    runtime::Watched,
};
use nix::{errno::Errno, unistd::geteuid};
use tokio::time::sleep;

use super::{Client, control::Pauses, greet::greet};
use crate::interrupt::InterruptHandle;

/// Why there is no connection to a broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nothing listens there.
    #[error("{}", no_broker(addresses, *waited, error))]
    NoBroker {
        /// Every address that was tried.
        addresses: Vec<Address>,
        /// For how long a broker was [waited for](ClientBuilder::wait_for_broker).
        waited: Duration,
        /// The kernel's reason.
        error: io::Error,
    },
    /// A signal handler ran while a broker was waited for, or the [handle](ClientBuilder::interrupt_handle) of the builder was used.
    #[error("the wait for a broker was interrupted by a signal handler or an interrupt handle")]
    Interrupted,
    /// Something may listen there, and this process cannot connect.
    #[error("no connection to the broker at {address}: {error}; {}", remedy(address, error))]
    Unreachable {
        /// Where.
        address: Address,
        /// The kernel's reason.
        error: io::Error,
    },
    /// The broker is another user's, which could have this program believe anything.
    #[error(
        "the broker at {address} is run by {}, and this program takes the word of a broker of root or of user {own} only: \
         start one of your own with `fbuf broker`, or name this one's user as that of the broker (broker user {user})",
        name_of(*user)
    )]
    ForeignBroker {
        /// Where.
        address: Address,
        /// Which user runs it.
        user: u32,
        /// This process's user.
        own: u32,
    },
    /// The broker is not of the user that ran the one before.
    #[error(
        "the broker at {address} is run by {} now, and the one before was by {}: this client connects again only with a \
         broker of the same user",
        name_of(*user), name_of(*before)
    )]
    OtherBroker {
        /// Where.
        address: Address,
        /// Which user runs it.
        user: u32,
        /// Which user ran the one before.
        before: u32,
    },
    /// It does not serve this user.
    #[error(
        "the broker at {address} does not serve user {uid}, for which its policy has no rule: \
         have one added, or start one of your own with `fbuf broker`"
    )]
    NotPermitted {
        /// Where.
        address: Address,
        /// This process's user.
        uid: u32,
    },
    /// It speaks another version of the protocol.
    #[error(
        "the broker at {address} speaks version {broker} of the protocol, and this program version {VERSION}: upgrade the older of the two"
    )]
    OtherVersion {
        /// Where.
        address: Address,
        /// What it speaks.
        broker: u16,
    },
    /// This user has too many connections.
    #[error("the broker at {address} refuses a connection: {quota}")]
    QuotaExceeded {
        /// Where.
        address: Address,
        /// Of which quota, by which rule.
        quota: QuotaExceeded,
    },
    /// It has too many clients.
    #[error("the broker at {address} has as many clients as it can serve: close some")]
    Full {
        /// Where.
        address: Address,
    },
    /// Something else listens there.
    #[error("what listens at {address} does not answer like a broker of fbuf: {found}; check {VARIABLE}")]
    NotABroker {
        /// Where.
        address: Address,
        /// What it did.
        found: String,
    },
    /// This process cannot.
    #[error("no connection to a broker can be set up: {error}{limit}", limit = limit_behind(.error))]
    Local {
        /// What the kernel says.
        error: io::Error,
    },
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        Self::Local { error }
    }
}

/// That there is no broker, where it was looked for, and what to do.
fn no_broker(addresses: &[Address], waited: Duration, error: &io::Error) -> String {
    let places = addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(" or ");
    let time = if waited.is_zero() { String::new() } else { format!(", although it was waited for {waited:?}") };
    let aside = set_aside().map(|why| format!(" ({why})")).unwrap_or_default();
    match (os_error(error), addresses) {
        (Some(Errno::ECONNREFUSED), [Address::Path(path)]) if is_other_file(path) => {
            format!("there is no broker at {places}: the file that is there is no socket; check {VARIABLE}")
        }
        (Some(Errno::ECONNREFUSED), [Address::Path(_)]) => format!(
            "the broker at {places} is gone{time}, and its socket file is left ({error}): start `fbuf broker` again; \
             in a container, mount the folder of the socket: the file is another one with each start of the broker"
        ),
        _ => format!(
            "there is no broker at {places}{aside}{time} ({error}): start `fbuf broker`, \
             or set {VARIABLE} to where it listens"
        ),
    }
}

fn is_other_file(path: &std::path::Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|found| !found.file_type().is_socket())
}

/// What to do when the kernel does not let a process connect.
fn remedy(address: &Address, error: &io::Error) -> String {
    match os_error(error) {
        Some(Errno::EACCES) if matches!(address, Address::Path(_)) => format!(
            "user {} may not write the socket, or not search a folder above it: the broker's policy is about other users only, \
             or the folder is closed to this one",
            geteuid()
        ),
        Some(Errno::EACCES | Errno::EPERM | Errno::ENOSYS) => {
            "a seccomp filter of this process or its container, or a security module (Landlock, AppArmor, SELinux), refuses it \
             the call"
                .into()
        }
        Some(Errno::ENOMEM | Errno::ENOBUFS) => "the kernel has no memory for it: free some, or raise the limit of the control group".into(),
        Some(Errno::EMFILE) => "this process has as many descriptors open as it may (RLIMIT_NOFILE)".into(),
        Some(Errno::ENFILE) => "the machine has as many files open as it may (fs.file-max)".into(),
        Some(Errno::ENOTDIR) => format!("a part of its path is no folder: check {VARIABLE}"),
        Some(Errno::ELOOP) => format!("its path has too many symbolic links: check {VARIABLE}"),
        _ if error.kind() == io::ErrorKind::InvalidInput => format!("set {VARIABLE} to another one"),
        _ => format!("check {VARIABLE}"),
    }
}

fn name_of(user: u32) -> String {
    match user {
        0 => "root".into(),
        NO_ID => format!("user {NO_ID}, which stands for all that have no id in this user namespace"),
        user => format!("user {user}"),
    }
}

/// How to connect to a broker: [`Client::builder`].
///
/// A broker can have its clients believe anything: which peers they have, and by which means messages are protected. So a
/// client accepts one only if root or its own user runs it, as the kernel says (SO_PEERCRED in unix(7)), and one that
/// systemd listens for. When it connects again, it accepts the user of before, and no other.
///
/// ```
/// use std::time::Duration;
/// use fbuf_client::Client;
/// # let broker = fbuf_broker::Embedded::start()?;
/// let client = Client::builder().address(broker.address()).wait_for_broker(Duration::from_secs(5)).connect()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct ClientBuilder {
    address: Option<Address>,
    users: Vec<u32>,
    wait: Duration,
    interrupts: Option<InterruptHandle>,
}

impl ClientBuilder {
    /// Connects to the broker at this address, in place of those of [`Client::connect`]. A relative path is one of the
    /// folder in which this process is when it connects.
    pub fn address(mut self, address: &Address) -> Self {
        self.address = Some(address.clone());
        self
    }

    /// Accepts a broker that this user runs too. The user of a broker that is accepted is trusted with all that this client
    /// exchanges.
    pub fn broker_user(mut self, user: u32) -> Self {
        self.users.push(user);
        self
    }

    /// Waits for so long for a broker, if there is none yet; [`Duration::MAX`] is for ever. Looks for it again and again, after
    /// pauses of up to 0.4 s. Any other error is returned at once. If not set, [`Self::connect`] does not wait.
    pub fn wait_for_broker(mut self, time: Duration) -> Self {
        self.wait = time;
        self
    }

    /// A handle that interrupts [`Self::connect`] while it waits for a broker. Clones of the builder share it.
    ///
    /// ```
    /// use std::{thread, time::Duration};
    /// use fbuf_client::{Client, ConnectError};
    ///
    /// # let address = fbuf_client::Address::new("@fbuf-doc-without-a-broker");
    /// let mut builder = Client::builder().address(&address).wait_for_broker(Duration::MAX);
    /// let handle = builder.interrupt_handle()?;
    /// let stopping = thread::spawn(move || handle.interrupt()); // or a signal handler
    /// assert!(matches!(builder.connect(), Err(ConnectError::Interrupted)));
    /// # stopping.join().unwrap();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// There is no descriptor left for it.
    pub fn interrupt_handle(&mut self) -> io::Result<InterruptHandle> {
        match &self.interrupts {
            Some(handle) => Ok(handle.clone()),
            None => Ok(self.interrupts.insert(InterruptHandle::of_connection()?).clone()),
        }
    }

    /// Whether a broker is waited for.
    pub(super) fn waits(&self) -> bool {
        !self.wait.is_zero()
    }

    /// Connects. Blocks the calling thread for some milliseconds, or for 5 s if the broker does not answer; for longer if it is
    /// to [wait for a broker](Self::wait_for_broker). In an async program call it by `spawn_blocking` then.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub fn connect(self) -> Result<Client, ConnectError> {
        Client::start(self)
    }

    /// Finds a broker, and greets it.
    pub(super) async fn find(&self) -> Result<(Broker, Watched<PacketSocket>), ConnectError> {
        let addresses = self.address.clone().map_or_else(Address::defaults, |address| vec![address]);
        let addresses = addresses.iter().map(Address::to_absolute).collect::<io::Result<Vec<_>>>()?;
        let (start, mut pauses) = (Instant::now(), Pauses::default());
        loop {
            match self.try_each(&addresses).await {
                Err(ConnectError::NoBroker { addresses, error, .. }) if start.elapsed() >= self.wait => {
                    return Err(ConnectError::NoBroker { addresses, waited: self.wait, error });
                }
                Err(ConnectError::NoBroker { .. }) => {
                    sleep(pauses.draw().min(self.wait.saturating_sub(start.elapsed()))).await;
                }
                result => return result,
            }
        }
    }

    /// The first address at which there is anything is the one.
    async fn try_each(&self, addresses: &[Address]) -> Result<(Broker, Watched<PacketSocket>), ConnectError> {
        let nowhere = |error| ConnectError::NoBroker { addresses: addresses.to_vec(), waited: Duration::ZERO, error };
        let mut last = nowhere(io::ErrorKind::NotFound.into());
        for address in addresses {
            match greet(address, &Accepted::Trusted(self.users.clone())).await {
                Ok((socket, user)) => return Ok((Broker::new(address, user), socket)),
                Err(ConnectError::NoBroker { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                    last = nowhere(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }
}

/// Which users' brokers are accepted.
#[derive(Debug)]
pub(super) enum Accepted {
    /// Root's, one's own, and those of these users.
    Trusted(Vec<u32>),
    /// Of this user, since the one before was.
    Same(u32),
}

impl Accepted {
    /// Looks which user runs the broker at the other end.
    pub(super) fn check(&self, address: &Address, socket: &PacketSocket) -> Result<u32, ConnectError> {
        let (user, own, address) = (socket.peer()?.uid, geteuid().as_raw(), address.clone());
        match self {
            Self::Trusted(users) => {
                // One without an id here may be any user.
                let is_own = user == own && user != NO_ID;
                let is_accepted = user == 0 || is_own || users.contains(&user);
                if is_accepted { Ok(user) } else { Err(ConnectError::ForeignBroker { address, user, own }) }
            }
            &Self::Same(before) => {
                if user == before {
                    Ok(user)
                } else {
                    Err(ConnectError::OtherBroker { address, user, before })
                }
            }
        }
    }
}

/// A broker with which a client is, or was, connected.
#[derive(Debug, Clone)]
pub(super) struct Broker {
    pub address: Address,
    user: u32,
    /// The root folder in which its path was found.
    root: Option<(u64, u64)>,
}

impl Broker {
    fn new(address: &Address, user: u32) -> Self {
        Self { address: address.clone(), user, root: root_folder() }
    }

    /// Connects again, to a broker of the same user.
    pub(super) async fn greet_again(&self) -> Result<Watched<PacketSocket>, String> {
        match greet(&self.address, &Accepted::Same(self.user)).await {
            Ok((socket, _)) => Ok(socket),
            Err(error) if root_folder() == self.root => Err(error.to_string()),
            Err(error) => Err(format!("{error}; this process has another root folder than when it connected")),
        }
    }
}

fn root_folder() -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/").ok().map(|found| (found.dev(), found.ino()))
}
