//! A process's connection to its broker. It lives on one background thread, which passes requests
//! on and puts introductions into the post boxes of the endpoints. No message ever passes it.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use fbuf_core::{
    address::{Address, VARIABLE},
    channel::ChannelNameError,
    control::{
        ClientTransport, ControlClient, ControlRequest, ControlResponse, Greeting, Introduction, Lodging, Open, Opened,
        Refusal, Role, VERSION, Verdict,
    },
    inbound::Peer,
    memory::MemoryError,
    protection::Mechanism,
    slot::{Geometry, GeometryError},
    socket::{Arrival, PacketSocket},
    sys,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tarpc::{client::RpcError, context};
use tokio::{
    io::unix::AsyncFd,
    sync::{
        Semaphore,
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    },
    task::JoinSet,
};

use crate::{receiver::ReceiverBuilder, sender::SenderBuilder};

/// How long a broker has to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many endpoints are being closed at the broker at once.
const MAX_CLOSING: usize = 4;
/// Longer than a broker keeps a question for introductions unanswered.
const INTRODUCTION_TIME: Duration = Duration::from_secs(3600);

/// A connection to a broker. Cheap to clone; closed when the last clone and the last endpoint are
/// dropped.
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
    #[error("the broker at {address} does not serve user {uid}: start one of your own with `fbuf broker`")]
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
    /// The broker is gone.
    #[error(
        "an endpoint was to be opened, and the broker is gone: start it again and connect anew; links that exist go on"
    )]
    BrokerGone,
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
    thread: Option<thread::JoinHandle<()>>,
}

/// Where introductions for one endpoint go.
pub(crate) type Introduced = Box<dyn Fn(Peer, PacketSocket, Geometry, Mechanism, Lodging) + Send>;

enum Command {
    Open { endpoint: u64, open: Open, introduced: Introduced, answer: mpsc::SyncSender<Result<Opened, OpenError>> },
    Close { endpoint: u64 },
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
        let socket = greet(address)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (commands, inbox) = unbounded_channel();
        let socket = {
            let _entered = runtime.enter();
            sys::watch(socket)?
        };
        let thread = thread::Builder::new()
            .name("fbuf-control".into())
            .spawn(move || runtime.block_on(control(socket, inbox)))?;
        Ok(Self(Arc::new(Connection { commands: Some(commands), next: AtomicU64::new(0), thread: Some(thread) })))
    }

    /// Prepares a sender on a channel.
    pub fn sender(&self, channel: &str) -> SenderBuilder {
        SenderBuilder::new(self.clone(), channel)
    }

    /// Prepares a receiver on a channel.
    pub fn receiver(&self, channel: &str) -> ReceiverBuilder {
        ReceiverBuilder::new(self.clone(), channel)
    }

    /// Opens an endpoint at the broker.
    pub(crate) fn open(
        &self,
        channel: &str,
        role: Role,
        introduced: Introduced,
    ) -> Result<(Registration, Opened), OpenError> {
        let endpoint = self.0.next.fetch_add(1, Ordering::Relaxed);
        let registration = Registration { client: self.clone(), endpoint };
        let (answer, answered) = mpsc::sync_channel(1);
        let open = Open { channel: channel.to_owned(), role };
        self.0.command(Command::Open { endpoint, open, introduced, answer })?;
        // The control thread answers each command, and the channel is closed if it ends.
        let opened = answered.recv().unwrap_or(Err(OpenError::BrokerGone))?;
        Ok((registration, opened))
    }
}

impl Connection {
    fn command(&self, command: Command) -> Result<(), OpenError> {
        let commands = self.commands.as_ref().ok_or(OpenError::BrokerGone)?;
        commands.send(command).map_err(|_| OpenError::BrokerGone)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An endpoint that is open at the broker; closed there when this is dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    client: Client,
    endpoint: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // If the broker is gone, there is nothing to close.
        let _ = self.client.0.command(Command::Close { endpoint: self.endpoint });
    }
}

/// Connects, and exchanges greetings.
fn greet(address: &Address) -> Result<PacketSocket, ConnectError> {
    let name = address.to_kernel()?;
    let no_broker = |source| ConnectError::NoBroker { address: address.clone(), source };
    let not_a_broker = |found: &str| ConnectError::NotABroker { address: address.clone(), found: found.into() };
    let socket = PacketSocket::connect(&name, PATIENCE).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => not_a_broker("it does not accept connections"),
        _ if error.raw_os_error() == Some(nix::errno::Errno::EPROTOTYPE as i32) => {
            not_a_broker("its socket is of another type")
        }
        _ => no_broker(error),
    })?;
    socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()).map_err(no_broker)?;
    let deadline = Instant::now() + PATIENCE;
    let bytes = loop {
        match socket.receive::<64>()? {
            Arrival::Message(bytes, _) => break bytes,
            Arrival::HangUp => return Err(not_a_broker("it hangs up")),
            Arrival::TooLong | Arrival::NoDescriptors => return Err(not_a_broker("its greeting is too long")),
            Arrival::Nothing => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(not_a_broker("it does not greet"));
        }
        let mut polled = [PollFd::new(std::os::fd::AsFd::as_fd(&socket), PollFlags::POLLIN)];
        // A signal is no reason to give up.
        let _ = poll(&mut polled, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    };
    let Greeting { version, verdict } =
        Greeting::from_bytes(&bytes).map_err(|error| not_a_broker(&error.to_string()))?;
    let address = address.clone();
    match verdict {
        Verdict::Welcome => Ok(socket),
        Verdict::OtherVersion => Err(ConnectError::OtherVersion { address, broker: version }),
        Verdict::NotPermitted => Err(ConnectError::NotPermitted { address, uid: nix::unistd::geteuid().as_raw() }),
        Verdict::Full => Err(ConnectError::Full { address }),
    }
}

/// The control thread: until the last handle of the client is dropped.
async fn control(socket: AsyncFd<PacketSocket>, mut commands: UnboundedReceiver<Command>) {
    let transport: ClientTransport<ControlRequest, ControlResponse> = ClientTransport::new(socket);
    let client = ControlClient::new(tarpc::client::Config::default(), transport).spawn();
    let boxes: Arc<Mutex<HashMap<u64, Introduced>>> = Arc::default();
    let posts = tokio::spawn(post(client.clone(), boxes.clone()));
    let places = Arc::new(Semaphore::new(MAX_CLOSING));
    let mut closing = JoinSet::new();
    let lock = || boxes.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(command) = commands.recv().await {
        match command {
            Command::Open { endpoint, open, introduced, answer } => {
                // Before it is open, so that no introduction can come too early.
                lock().insert(endpoint, introduced);
                // Nor does it find an endpoint in its way that was dropped before.
                while closing.join_next().await.is_some() {}
                let result = match client.open(context::current(), endpoint, open).await {
                    Ok(opened) => opened.map_err(OpenError::Refused),
                    Err(RpcError::DeadlineExceeded | RpcError::Server(_)) => Err(OpenError::NoAnswer),
                    Err(_) => Err(OpenError::BrokerGone),
                };
                if result.is_err() {
                    lock().remove(&endpoint);
                }
                // The caller waits for it.
                let _ = answer.send(result);
            }
            Command::Close { endpoint } => {
                lock().remove(&endpoint);
                // Nobody waits for it: a broker that is gone, or whose connection closes before it
                // hears of this, closes the endpoint by itself. A few at a time, since it does not
                // answer everything at once.
                let (client, places) = (client.clone(), places.clone());
                closing.spawn(async move {
                    let _place = places.acquire().await;
                    let _ = client.close(context::current(), endpoint).await;
                });
                while closing.try_join_next().is_some() {}
            }
        }
    }
    posts.abort();
}

/// Fetches introductions and puts them into the post boxes, until the broker is gone.
async fn post(client: ControlClient, boxes: Arc<Mutex<HashMap<u64, Introduced>>>) {
    loop {
        let mut context = context::current();
        context.deadline = Instant::now() + INTRODUCTION_TIME;
        let introductions = match client.introductions(context).await {
            Ok(introductions) => introductions,
            Err(RpcError::Server(_) | RpcError::DeadlineExceeded) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(_) => return,
        };
        let boxes = boxes.lock().unwrap_or_else(PoisonError::into_inner);
        for Introduction { endpoint, peer, slot_bytes, max_slots, mechanism, lodging, socket } in introductions {
            // Of an endpoint that was closed meanwhile; or out of descriptors, which the peer sees
            // as a hang-up.
            let Some(introduced) = boxes.get(&endpoint) else { continue };
            let Ok(socket) = socket.into_owned().and_then(PacketSocket::new) else { continue };
            // The broker has checked it; one that has not is no better than none.
            let Ok(geometry) = Geometry::new(slot_bytes, max_slots) else { continue };
            introduced(peer, socket, geometry, mechanism, lodging);
        }
    }
}
