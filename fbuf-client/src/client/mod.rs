//! A process's connection to its broker. It lives on one background thread, which passes requests
//! on and puts introductions into the queues of the endpoints. No message ever passes it.

mod connect;
mod control;
mod greet;
mod state;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use fbuf_core::{
    memory::MemoryError,
    process::{
        fork::{Forked, Generation},
        sys::limit_behind,
        threads,
    },
    slot::GeometryError,
};
use fbuf_protocol::{
    Open, Opened, Refusal, Role, Unpaired, Wire,
    address::Address,
    channel::ChannelNameError,
    name::{Label, LabelError},
    runtime,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

pub use self::connect::{ClientBuilder, ConnectError};
use self::{
    control::Command,
    state::{ConnectionState, NotConnected, SILENT},
};
use crate::{
    endpoint::LinkSink,
    hangup::{Alarm, HangUps, Watch},
    interrupt::InterruptHandle,
    receiver::ReceiverBuilder,
    sender::{OptionsError, SenderBuilder},
    status::{ClientStatus, EndpointStatus},
};

/// How long a broker has to answer, or to come back.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the control thread has to answer: longer than it waits for a broker, for others that ask at the same time too.
const LONGEST: Duration = Duration::from_secs(60);

/// A connection to a broker. Cheap to clone; closed when the last clone and the last endpoint are
/// dropped.
///
/// Receivers can read more than what is sent to them: see [`Protection`](crate::Protection).
///
/// If the broker dies, links go on. When there is one again at the same address, the connection is made
/// again by itself, and endpoints that come later are linked with those of this process as before.
///
/// # After fork(2)
/// A child cannot use what its parent has opened, and changes nothing of it: calls return an error ([`OpenError::Forked`]
/// and its like) at once, and what is dropped there stays as it is in the parent. The child can connect again. A
/// [`Received`](crate::Received) that the parent holds can be read in the child for as long as the parent holds it; a
/// [`Fbuf`](crate::Fbuf) reads as zeroes there, and [`Sender::allocate`](crate::Sender::allocate) may return such ones before it
/// returns the error. The links of a parent end with the parent, also if a child lives on. (A child of clone(2) or
/// _Fork(3), which run no handlers of pthread_atfork(3), changes nothing either: it is killed by SIGSEGV where it would.)
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

/// Why a sender or a receiver cannot be opened.
///
/// ```
/// use fbuf_client::{OpenError, OptionsError, Refusal};
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// match client.sender("frames").slots(8).grow_to(16).mechanism(fbuf_client::Mechanism::Lease).open() {
///     Err(OpenError::Options(OptionsError::Growth { limit })) => println!("no growth to {limit} with leases"),
///     Err(OpenError::Refused(Refusal::QuotaExceeded(quota))) => println!("rule {:?} allows {}", quota.rule, quota.limit),
///     Err(error) => return Err(error.into()),
///     Ok(_sender) => unreachable!("slots that are leased are all made at once"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A channel cannot be called that.
    #[error(transparent)]
    Channel(#[from] ChannelNameError),
    /// An endpoint cannot be labelled like that.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// Slots cannot be like that.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Options of a sender contradict each other.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// There is not enough memory for the slots.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The broker will not have it.
    #[error("the broker refuses: {0}")]
    Refused(Refusal),
    /// There is no connection to the broker, and none could be made within some seconds: why, and what to do.
    #[error(
        "there is no connection to the broker ({reason}): it is made again by itself, and links that exist go on; try again \
         then"
    )]
    BrokerGone {
        /// Why, and what to do.
        reason: String,
    },
    /// The broker does not answer.
    #[error("the broker does not answer: look whether it is stopped or overloaded")]
    NoAnswer,
    /// This process was forked from the one that connected.
    #[error(transparent)]
    Forked(#[from] Forked),
    /// A predicate has called ([`SenderBuilder::accept`], [`ReceiverBuilder::accept`]). It runs on the thread of the client,
    /// which would have to answer.
    #[error(
        "the broker was asked by a predicate (accept), on the thread that would have to answer: ask on another thread"
    )]
    InPredicate,
    /// The client does no more.
    #[error(transparent)]
    ClientFailed(#[from] ClientFailed),
    /// This process cannot.
    #[error("the endpoint cannot be set up: {error}{limit}", limit = limit_behind(.error))]
    Local {
        /// What the kernel says.
        error: io::Error,
    },
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Local { error }
    }
}

/// The control thread of a client has ended in a panic, which is a fault of this library or of the system. No more peers are
/// introduced to endpoints of that client; their links go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the control thread of this client has ended in a panic: links that exist go on, and no more are made; connect again, \
     and open the endpoints anew"
)]
pub struct ClientFailed;

#[derive(Debug)]
struct Connection {
    generation: Generation,
    commands: Option<UnboundedSender<Command>>,
    next: AtomicU64,
    address: Address,
    state: Arc<ConnectionState>,
    hang_ups: Arc<HangUps>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Client {
    /// Connects to the broker at `$FBUF_BROKER`; else to the one at `$XDG_RUNTIME_DIR/fbuf.sock`, if that is there, and
    /// else to the one at `/run/fbuf/broker.sock`. A `$XDG_RUNTIME_DIR` that is not a folder of this user is left aside,
    /// and in a program that is executed with more rights than its caller has (AT_SECURE in getauxval(3)) both variables are.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub fn connect() -> Result<Self, ConnectError> {
        Self::builder().connect()
    }

    /// Connects to the broker at this address.
    ///
    /// Blocks the calling thread for some milliseconds, or for 5 s if the broker does not answer. It may be called on
    /// a thread of an async runtime: a thread of its own speaks to the broker.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub fn connect_to(address: &Address) -> Result<Self, ConnectError> {
        Self::builder().address(address).connect()
    }

    /// Prepares a connection.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    fn start(mut builder: ClientBuilder) -> Result<Self, ConnectError> {
        let (interrupts, waits) = (builder.interrupt_handle()?, builder.waits());
        let (commands, pending_links) = unbounded_channel();
        let (found, broker) = mpsc::sync_channel(1);
        let (state, hang_ups) = (Arc::new(ConnectionState::default()), Arc::new(HangUps::new()?));
        let shared = (state.clone(), hang_ups.clone());
        let found = Found(Some(found), interrupts.clone());
        let thread = threads::spawn("fbuf-control", move || speak(&builder, pending_links, shared, found))?;
        let found = loop {
            match broker.try_recv() {
                Ok(found) => break found,
                Err(TryRecvError::Disconnected) => break Err(io::Error::other("the control thread panicked").into()),
                Err(TryRecvError::Empty) if waits && interrupts.take() => break Err(ConnectError::Interrupted),
                Err(TryRecvError::Empty) => interrupts.sleep(),
            }
        };
        let address = match found {
            Ok(address) => address,
            Err(error) => {
                if hang_ups.is_open() {
                    // The thread is ending, or does now, and with it all that this attempt has opened.
                    drop(commands);
                    let _ = thread.join();
                } else {
                    std::mem::forget(commands); // It cannot be woken.
                }
                return Err(error);
            }
        };
        let (commands, next, thread) = (Some(commands), AtomicU64::new(0), Some(thread));
        let generation = Generation::current();
        Ok(Self(Arc::new(Connection { generation, commands, next, address, state, hang_ups, thread })))
    }

    /// Where the broker listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.0.address
    }

    /// Whether there is a connection now, as far as is known. If not, it is being made again.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connection_error().is_none()
    }

    /// Why there is no connection now, if there is none: what came of the last attempt to make it again, or that there will be
    /// no other ([`ClientFailed`]).
    #[must_use]
    pub fn connection_error(&self) -> Option<String> {
        if let Err(forked) = self.0.generation.check() {
            return Some(forked.to_string());
        }
        self.0.is_open();
        self.0.state.get().map(|why| why.to_string())
    }

    /// Prepares a sender on a channel: a name of 1 to 255 bytes, without control characters, that is checked when it is
    /// [opened](SenderBuilder::open).
    #[doc(alias("publisher", "advertise"))]
    pub fn sender(&self, channel: &str) -> SenderBuilder {
        SenderBuilder::new(self.clone(), channel)
    }

    /// Prepares a receiver on a channel, named as for [`Self::sender`].
    #[doc(alias("subscriber", "subscribe"))]
    pub fn receiver(&self, channel: &str) -> ReceiverBuilder {
        ReceiverBuilder::new(self.clone(), channel)
    }

    /// What the broker knows of all endpoints that this user may see, and what these report of themselves: of
    /// all users for root and for the user that runs the broker, for others only their own. Endpoints are not
    /// disturbed: what they have done, they say whenever they look around; what they hold, their process's
    /// control thread looks up.
    ///
    /// ```
    /// use fbuf_client::EndStatus;
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// # let _sender = client.sender("frames").open()?;
    /// for endpoint in client.status()? {
    ///     let sends = matches!(endpoint.end, EndStatus::Sender { .. });
    ///     let messages = endpoint.report.map_or(0, |report| report.messages);
    ///     println!("{} {} {}: {messages} messages", endpoint.channel, if sends { "from" } else { "to" }, endpoint.process);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`OpenError::BrokerGone`] if there is no broker now, [`OpenError::NoAnswer`] if it does not answer.
    pub fn status(&self) -> Result<Vec<EndpointStatus>, OpenError> {
        Ok(self.look(|answer| Command::Status { answer })?.into_iter().map(EndpointStatus::from).collect())
    }

    /// The clients of this broker that this user may see, this one included, as [`Self::status`] lists their
    /// endpoints.
    ///
    /// ```
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// for other in client.clients()? {
    ///     println!("{} in {}, with {} endpoints", other.program, other.process, other.endpoints);
    /// }
    /// # assert_eq!(client.clients()?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`OpenError::BrokerGone`] if there is no broker now, [`OpenError::NoAnswer`] if it does not answer.
    pub fn clients(&self) -> Result<Vec<ClientStatus>, OpenError> {
        Ok(self.look(|answer| Command::Clients { answer })?.into_iter().map(ClientStatus::from).collect())
    }

    fn look<T>(
        &self,
        command: impl FnOnce(SyncSender<Result<Vec<T>, OpenError>>) -> Command,
    ) -> Result<Vec<T>, OpenError> {
        self.0.check()?;
        let (answer, answered) = mpsc::sync_channel(1);
        self.0.command(command(answer));
        self.0.wait_for(&answered)
    }

    /// Opens an endpoint at the broker.
    pub(crate) fn open(
        &self,
        channel: &str,
        role: Role,
        label: Option<Label>,
        users: Option<Vec<u32>>,
        post: Box<dyn LinkSink>,
    ) -> Result<(Registration, Opened), OpenError> {
        self.0.check()?;
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let mut registration = Registration { client: self.clone(), number, endpoint: 0 };
        let (answer, answered) = mpsc::sync_channel(1);
        let open = Open { channel: channel.to_owned(), role, label: label.map(Wire), users, earlier: None };
        let deadline = Instant::now() + PATIENCE;
        self.0.command(Command::Open { endpoint: number, open, post, answer, deadline });
        let opened = self.0.wait_for(&answered)?;
        registration.endpoint = opened.endpoint;
        Ok((registration, opened))
    }
}

/// What the control thread does: it finds the broker, says where, and speaks to it from then on.
///
/// All of it is done on this thread, since its creator may be run by a runtime, in which no other may be run or
/// dropped. If it panics, the thread goes on to refuse: no call waits for an answer that does not come.
fn speak(
    builder: &ClientBuilder,
    mut commands: UnboundedReceiver<Command>,
    (state, hang_ups): (Arc<ConnectionState>, Arc<HangUps>),
    found: Found,
) {
    let spoken = threads::contain(|| {
        let runtime = match runtime::new_with({
            let (state, hang_ups) = (state.clone(), hang_ups.clone());
            move || stop_if_closed(&state, &hang_ups)
        }) {
            Ok(runtime) => runtime,
            Err(error) => {
                found.say(Err(error.into()));
                return Some(());
            }
        };
        let spoken = threads::contain(|| {
            runtime.block_on(async {
                let broker = tokio::select! {
                    broker = builder.find() => broker,
                    // The creator waits no more; it has nothing else to say before there is a broker.
                    _ = commands.recv() => return,
                };
                match broker {
                    Ok((broker, socket)) => {
                        found.say(Ok(broker.address.clone()));
                        control::run(&broker, socket, &mut commands, &state, hang_ups.clone()).await;
                    }
                    Err(error) => found.say(Err(error)),
                }
            })
        });
        // What a runtime without its descriptors would close now is not its own.
        stop_if_closed(&state, &hang_ups);
        spoken
    });
    if spoken.flatten().is_none() {
        state.set(Some(NotConnected::Ever));
        while let Some(command) = commands.blocking_recv() {
            drop(command);
        }
    }
}

/// Looks whether the runtime of the control thread can go on. If other code has closed its descriptors, it would panic, and
/// what it owns could not even be dropped, since that closes what has their numbers now: this thread does nothing more.
fn stop_if_closed(state: &ConnectionState, hang_ups: &HangUps) {
    if !hang_ups.is_open() {
        state.set(Some(NotConnected::Closed));
        loop {
            thread::park();
        }
    }
}

/// What the creator of a connection waits for: where its broker is. Dropped without a word, as by a panic, it ends the wait.
struct Found(Option<SyncSender<Result<Address, ConnectError>>>, InterruptHandle);

impl Found {
    fn say(self, answer: Result<Address, ConnectError>) {
        // There is room for one, and a creator that has gone is told nothing.
        let _ = self.0.as_ref().map(|creator| creator.send(answer));
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        // The creator looks for the answer, or for its end, when it wakes.
        drop(self.0.take());
        self.1.wake();
    }
}

impl Connection {
    /// Whether there is a thread that answers, and that is not the one that would wait for it.
    fn check(&self) -> Result<(), OpenError> {
        self.generation.check()?;
        let thread = self.thread.as_ref().map(|thread| thread.thread().id());
        if thread == Some(thread::current().id()) {
            return Err(OpenError::InPredicate);
        }
        if self.is_open() { Ok(()) } else { Err(NotConnected::Closed.into()) }
    }

    /// Whether the control thread can be woken: to try it without its descriptors would be a panic.
    fn is_open(&self) -> bool {
        let is_open = self.hang_ups.is_open();
        if !is_open {
            self.state.set(Some(NotConnected::Closed));
        }
        is_open
    }

    /// Waits for an answer of the control thread.
    fn wait_for<T>(&self, answered: &mpsc::Receiver<Result<T, OpenError>>) -> Result<T, OpenError> {
        let start = Instant::now();
        loop {
            match answered.recv_timeout(PATIENCE) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => return Err(self.why_no_answer()),
                Err(RecvTimeoutError::Timeout) if !self.is_open() => return Err(NotConnected::Closed.into()),
                Err(RecvTimeoutError::Timeout) if start.elapsed() < LONGEST => {}
                Err(RecvTimeoutError::Timeout) => return Err(io::Error::other(SILENT).into()),
            }
        }
    }

    /// Has the control thread do something. It drops what it does not answer.
    fn command(&self, command: Command) {
        // In a child that was forked nothing is received, and locks may be held by threads that are not there.
        if let Some(commands) = self.commands.as_ref().filter(|_| self.generation.is_current() && self.is_open()) {
            // It is received for as long as there is a handle.
            let _ = commands.send(command);
        }
    }

    fn why_no_answer(&self) -> OpenError {
        // It answers if there is a connection; there may be one again.
        let now = || NotConnected::Now("it was gone for a moment".into());
        self.state.get().unwrap_or_else(now).into()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.generation.is_current() || !self.is_open() {
            // The thread is the parent's, as what it owns; or it cannot be woken, and does nothing more.
            return std::mem::forget((self.commands.take(), self.thread.take()));
        }
        drop(self.commands.take());
        // It may be the thread itself that drops the last handle, out of a predicate.
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != thread::current().id()) {
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

impl Registration {
    /// Has the endpoint told when a peer hangs up.
    pub(crate) fn watch_hang_ups(&self, alarm: &Arc<impl Alarm + 'static>) -> Watch {
        self.client.0.hang_ups.watch(self.number, alarm)
    }

    /// The endpoints of the other end of the channel with which it is not paired, and why. The broker is asked.
    pub(crate) fn unpaired(&self) -> Result<Vec<Unpaired>, OpenError> {
        self.client.look(|answer| Command::Unpaired { endpoint: self.number, answer })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.client.0.command(Command::Close { endpoint: self.number });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fbuf_broker::Embedded;
    use fbuf_core::{
        introduced::Introduced,
        peer::{LinkId, Peer},
        protection::Protection,
    };
    use fbuf_protocol::{Limits, Report};

    use super::*;
    use crate::{GetError, WaitError};

    const SOON: Duration = Duration::from_secs(60);

    /// A fault of this library, on the control thread.
    struct Fault;

    impl LinkSink for Fault {
        fn introduce(&self, _: Introduced) {
            panic!("a fault");
        }

        fn fail(&self, _: Peer, _: String) {}

        fn links(&self) -> Vec<LinkId> {
            Vec::new()
        }

        fn report(&self) -> Report {
            Report::default()
        }

        fn held(&self) -> Vec<(LinkId, usize, u64)> {
            Vec::new()
        }
    }

    #[test]
    fn a_control_thread_that_panics_leaves_no_call_waiting_and_links_go_on() {
        let broker = Embedded::start().unwrap();
        let [client, other] = [(); 2].map(|()| Client::connect_to(broker.address()).unwrap());
        let open = |channel: &str| other.sender(channel).slot_size(64).slots(2).open().unwrap();
        let mut linked = client.receiver("linked").keep_waiting().open().unwrap();
        let mut sender = open("linked");
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        // These wait, without a time, when it happens.
        let mut lonely = client.receiver("lonely").open().unwrap();
        let waits = thread::spawn(move || lonely.get().map(drop));
        let mut alone = client.sender("alone").slot_size(64).open().unwrap();
        let waits_for_receivers = thread::spawn(move || alone.wait_for_receivers(1));
        let mut without_slots = client.sender("without").slot_size(64).slots(2).from_receiver().open().unwrap();
        let waits_for_slot = thread::spawn(move || without_slots.allocate().map(drop));
        let role = Role::Receiver { require: Protection::default(), accepts: Limits::default() };
        let (_registration, _) = client.open("fault", role, None, None, Box::new(Fault)).unwrap();
        let _fault = open("fault");
        assert_eq!(waits.join().unwrap(), Err(GetError::ClientFailed(ClientFailed)));
        assert_eq!(waits_for_receivers.join().unwrap(), Err(WaitError::ClientFailed(ClientFailed)));
        assert_eq!(waits_for_slot.join().unwrap(), Err(crate::AllocateError::ClientFailed(ClientFailed)));
        assert!(!client.is_connected());
        let said = client.connection_error().unwrap();
        assert!(said.contains("connect again"), "{said}");
        for said in [client.status().map(drop), client.clients().map(drop), client.receiver("c").open().map(drop)] {
            assert!(matches!(said, Err(OpenError::ClientFailed(_))), "{said:?}");
        }
        // What it had is served on, and its end is told.
        let fbuf = sender.allocate().unwrap();
        sender.write(fbuf).unwrap();
        assert!(linked.get_timeout(SOON).is_ok());
        assert_eq!(linked.try_get().map(drop), Ok(()), "a sender is linked");
        drop(sender);
        assert_eq!(linked.get().unwrap_err(), GetError::ClientFailed(ClientFailed));
        // The broker has been told, and to connect again is what helps.
        assert!(other.status().unwrap().iter().all(|endpoint| endpoint.channel.as_str() != "lonely"));
        drop(client);
        let client = Client::connect_to(broker.address()).unwrap();
        assert!(client.is_connected() && client.receiver("lonely").open().is_ok());
    }
}
