//! A process's connection to its broker. It lives on one background thread, which passes requests
//! on and puts introductions into the post boxes of the endpoints. No message ever passes it.

mod control;
mod greet;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use fbuf_core::{
    address::{Address, VARIABLE},
    channel::ChannelNameError,
    control::{ClientStatus, EndpointStatus, Open, Opened, Refusal, Role, Spent, VERSION},
    memory::MemoryError,
    slot::GeometryError,
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use self::control::Command;
use crate::{endpoint::Post, receiver::ReceiverBuilder, sender::SenderBuilder};

/// How long a broker has to answer, or to come back.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to a broker. Cheap to clone; closed when the last clone and the last endpoint are
/// dropped.
///
/// If the broker dies, links go on. When there is one again at the same address, the connection is made
/// again by itself, and endpoints that come later are linked with those of this process as before.
///
/// ```
/// use fbuf_client::Client;
/// # let broker = fbuf_broker::Embedded::start()?;
/// let client = Client::connect_to(broker.address())?;
/// let sender = client.sender("numbers").slot_size(8).slots(100).open()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Client(Arc<Connection>);

/// No connection to a broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens there.
    #[error(
        "a broker was expected at {address}, and there is none ({source}): start `fbuf broker`, or set {VARIABLE} to where it listens"
    )]
    NoBroker {
        /// Where.
        address: Address,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It is another user's.
    #[error(
        "the broker at {address} does not serve user {uid}, about whom its policy has no rule: \
         start one of your own with `fbuf broker`"
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
    #[error("the broker at {address} refuses a connection: {spent}")]
    Spent {
        /// Where.
        address: Address,
        /// Of which quota, by which rule.
        spent: Spent,
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
    #[error("a connection to the broker could not be set up: {0}")]
    Local(#[from] io::Error),
}

/// No sender, or no receiver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A channel cannot be called that.
    #[error(transparent)]
    Channel(#[from] ChannelNameError),
    /// Slots cannot be like that.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// There is not enough memory for the slots.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The broker will not have it.
    #[error("the broker refuses: {0}")]
    Refused(Refusal),
    /// The broker is gone, and did not come back within some seconds.
    #[error(
        "an endpoint was to be opened, and the broker is gone ({0}): start it again, and the connection is made again by itself; links that exist go on"
    )]
    BrokerGone(String),
    /// The broker does not answer.
    #[error("an endpoint was to be opened, and the broker does not answer: look whether it is stopped or overloaded")]
    NoAnswer,
    /// This process cannot.
    #[error("an endpoint could not be set up: {0}")]
    Local(#[from] io::Error),
}

#[derive(Debug)]
struct Connection {
    commands: Option<UnboundedSender<Command>>,
    next: AtomicU64,
    is_up: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Client {
    /// Connects to the broker at `$FBUF_BROKER`, else `$XDG_RUNTIME_DIR/fbuf.sock`, else
    /// `/run/fbuf/broker.sock`.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub fn connect() -> Result<Self, ConnectError> {
        Self::connect_to(&Address::default_for_user())
    }

    /// Connects to the broker at this address.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub fn connect_to(address: &Address) -> Result<Self, ConnectError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = runtime.block_on(greet::greet(address))?;
        let (commands, inbox) = unbounded_channel();
        let (address, is_up) = (address.clone(), Arc::new(AtomicBool::new(true)));
        let up = is_up.clone();
        let thread = thread::Builder::new()
            .name("fbuf-control".into())
            .spawn(move || runtime.block_on(control::run(&address, socket, inbox, &up)))?;
        let (commands, next, thread) = (Some(commands), AtomicU64::new(0), Some(thread));
        Ok(Self(Arc::new(Connection { commands, next, is_up, thread })))
    }

    /// Whether there is a connection now, as far as is known. If not, it is being made again.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        // Relaxed: it may change at any time.
        self.0.is_up.load(Ordering::Relaxed)
    }

    /// Prepares a sender on a channel.
    pub fn sender(&self, channel: &str) -> SenderBuilder {
        SenderBuilder::new(self.clone(), channel)
    }

    /// Prepares a receiver on a channel.
    pub fn receiver(&self, channel: &str) -> ReceiverBuilder {
        ReceiverBuilder::new(self.clone(), channel)
    }

    /// What the broker knows of all endpoints that this user may see, and what these report of themselves: of
    /// all users for root and for the user who runs the broker, for others only their own. Endpoints are not
    /// disturbed: what they have done, they say whenever they look around; what they hold, their process's
    /// control thread looks up.
    ///
    /// # Errors
    /// [`OpenError::BrokerGone`] if there is no broker now, [`OpenError::NoAnswer`] if it does not answer.
    pub fn status(&self) -> Result<Vec<EndpointStatus>, OpenError> {
        self.look(|answer| Command::Status { answer })
    }

    /// The clients of this broker that this user may see, this one included, as [`Self::status`] lists their
    /// endpoints.
    ///
    /// # Errors
    /// [`OpenError::BrokerGone`] if there is no broker now, [`OpenError::NoAnswer`] if it does not answer.
    pub fn clients(&self) -> Result<Vec<ClientStatus>, OpenError> {
        self.look(|answer| Command::Clients { answer })
    }

    fn look<T>(
        &self,
        command: impl FnOnce(SyncSender<Result<Vec<T>, OpenError>>) -> Command,
    ) -> Result<Vec<T>, OpenError> {
        let (answer, answered) = mpsc::sync_channel(1);
        let gone = || OpenError::BrokerGone("there is no connection now".into());
        self.0.command(command(answer)).ok_or_else(gone)?;
        answered.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Opens an endpoint at the broker.
    pub(crate) fn open(
        &self,
        channel: &str,
        role: Role,
        post: Box<dyn Post>,
    ) -> Result<(Registration, Opened), OpenError> {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let mut registration = Registration { client: self.clone(), number, endpoint: 0 };
        let (answer, answered) = mpsc::sync_channel(1);
        let open = Open { channel: channel.to_owned(), role, earlier: None };
        let deadline = Instant::now() + PATIENCE;
        let gone = || OpenError::BrokerGone("this process ends the connection".into());
        self.0.command(Command::Open { endpoint: number, open, post, answer, deadline }).ok_or_else(gone)?;
        // The control thread answers each command.
        let opened = answered.recv().unwrap_or_else(|_| Err(gone()))?;
        registration.endpoint = opened.endpoint;
        Ok((registration, opened))
    }
}

impl Connection {
    fn command(&self, command: Command) -> Option<()> {
        self.commands.as_ref()?.send(command).ok()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            // A panic in there was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// An endpoint that is open at the broker; closed there when this is dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    client: Client,
    /// How the connection knows it.
    number: u64,
    /// How its peers know it.
    pub endpoint: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // If the control thread is gone, so is the connection, and nothing is open.
        let _ = self.client.0.command(Command::Close { endpoint: self.number });
    }
}
