//! The loop: accepts clients, greets them, passes their requests to the [`State`] and carries out
//! what it decides.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fbuf_core::{
    control::{Control, Greeting, Introduction, MAX_INTRODUCTIONS, Open, Refusal, ServerTransport, VERSION, Verdict},
    socket::{Arrival, Credentials, PacketSocket},
    sys,
    wire::Descriptor,
};
use futures_util::StreamExt;
use tarpc::{
    ChannelError,
    context::Context,
    server::{BaseChannel, Channel as _},
};
use tokio::{io::unix::AsyncFd, sync::Notify, task::JoinSet, time::timeout};
use tracing::{debug, info, warn};

use crate::{
    Listener,
    state::{ClientId, Pair, Party, State, Users},
};

/// How long a client has for its greeting.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// How long a client waits for introductions before it is told that there are none.
const INTRODUCTION_TIME: Duration = Duration::from_secs(600);
/// How many requests of one client may be under way; our own client has at most six.
const MAX_REQUESTS: usize = 16;
/// How many introductions may wait for one client; a client that does not fetch them is sent away.
const MAX_WAITING: usize = 1024;

/// Serves clients of these users until `until` is ready. What was introduced goes on afterwards.
///
/// # Errors
/// When the socket cannot be polled.
pub async fn serve(listener: &Listener, users: Users, until: impl Future<Output = ()>) -> io::Result<()> {
    let broker = Broker::new(users);
    let socket = sys::watch_listener(listener.as_fd().try_clone_to_owned()?)?;
    let mut clients = JoinSet::new();
    let accepting = async {
        loop {
            let mut ready = socket.readable().await?;
            match sys::accept(socket.get_ref().as_fd()) {
                Ok(connection) => drop(clients.spawn(broker.clone().attend(connection))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => {
                    // Out of descriptors, most likely: wait until some are free.
                    warn!(%error, "a client could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            while clients.try_join_next().is_some() {}
        }
    };
    tokio::select! {
        result = accepting => result,
        () = until => Ok(()),
    }
}

/// The broker, shared by the tasks of its clients.
#[derive(Debug, Clone)]
struct Broker(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    state: State,
    mailboxes: HashMap<ClientId, Arc<Mailbox>>,
}

/// A client that has joined. It leaves when this is dropped, however its connection ends.
#[derive(Debug)]
struct Member {
    broker: Broker,
    client: ClientId,
    process: Credentials,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut inner = lock(&self.broker.0);
        inner.state.leave(self.client);
        inner.mailboxes.remove(&self.client);
    }
}

/// Introductions on their way to one client.
#[derive(Debug, Default)]
struct Mailbox {
    waiting: Mutex<VecDeque<Introduction>>,
    filled: Notify,
    /// Notified when the client has to go.
    overfull: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks; and if it did, the others go on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Broker {
    fn new(users: Users) -> Self {
        Self(Arc::new(Mutex::new(Inner { state: State::new(users), mailboxes: HashMap::new() })))
    }

    /// One client, from its connection to its end.
    async fn attend(self, connection: OwnedFd) {
        match timeout(GREETING_TIME, self.greet(connection)).await {
            Err(_) => debug!("a client did not greet in time"),
            Ok(Err(error)) => debug!(%error, "a client could not be greeted"),
            Ok(Ok(None)) => {}
            Ok(Ok(Some((member, socket)))) => {
                info!(pid = member.process.pid, uid = member.process.uid, client = ?member.client, "joined");
                self.talk(&member, socket).await;
                info!(pid = member.process.pid, client = ?member.client, "left");
            }
        }
    }

    async fn greet(&self, connection: OwnedFd) -> io::Result<Option<(Member, AsyncFd<PacketSocket>)>> {
        let socket = sys::watch(PacketSocket::new(connection)?)?;
        let process = socket.get_ref().peer()?;
        let bytes = loop {
            let mut ready = socket.readable().await?;
            match socket.get_ref().receive::<64>()? {
                Arrival::Message(bytes, _) => break bytes,
                Arrival::Nothing => ready.clear_ready(),
                Arrival::HangUp => return Ok(None),
                Arrival::TooLong | Arrival::NoDescriptors => break Vec::new(),
            }
        };
        let greeting = Greeting::from_bytes(&bytes).map_err(io::Error::other)?;
        let joined =
            if greeting.version == VERSION { lock(&self.0).state.join(process) } else { Err(Verdict::OtherVersion) };
        let joined = joined.map(|client| Member { broker: self.clone(), client, process });
        let verdict = joined.as_ref().err().copied().unwrap_or(Verdict::Welcome);
        socket.get_ref().send_bytes(&Greeting { version: VERSION, verdict }.to_bytes())?;
        match joined {
            Ok(member) => Ok(Some((member, socket))),
            Err(verdict) => {
                warn!(pid = process.pid, uid = process.uid, version = greeting.version, ?verdict, "sent away");
                Ok(None)
            }
        }
    }

    async fn talk(self, member: &Member, socket: AsyncFd<PacketSocket>) {
        let (client, mailbox) = (member.client, Arc::new(Mailbox::default()));
        lock(&self.0).mailboxes.insert(client, mailbox.clone());
        let desk = Desk { broker: self, client, mailbox: mailbox.clone() };
        let channel = BaseChannel::with_defaults(ServerTransport::new(socket));
        let mut requests = std::pin::pin!(channel.max_concurrent_requests(MAX_REQUESTS).requests());
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                request = requests.next() => match request {
                    Some(Ok(request)) => drop(running.spawn(request.execute(desk.clone().serve()))),
                    Some(Err(ChannelError::Read(error))) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                    Some(Err(error)) => {
                        warn!(?client, %error, "a client does not keep to the protocol");
                        break;
                    }
                    None => break,
                },
                Some(_) = running.join_next() => {}
                () = mailbox.overfull.notified() => {
                    warn!(?client, "a client does not fetch its introductions");
                    break;
                }
            }
        }
    }

    /// Makes the link socket of a pair and posts both ends.
    fn introduce(inner: &Inner, pair: Pair) -> io::Result<()> {
        let (to_sender, to_receiver) = PacketSocket::pair()?;
        let introduction = |own: Party, other: Party, socket: OwnedFd| Introduction {
            endpoint: own.endpoint,
            peer: other.peer,
            slot_bytes: pair.geometry.slot_bytes().into(),
            max_slots: pair.geometry.max_slots().into(),
            mechanism: pair.mechanism,
            socket: Descriptor::from(socket),
        };
        let Pair { sender, receiver, .. } = pair;
        for (own, other, socket) in [(receiver, sender, to_receiver), (sender, receiver, to_sender)] {
            if let Some(mailbox) = inner.mailboxes.get(&own.client) {
                mailbox.post(introduction(own, other, socket));
            }
        }
        Ok(())
    }
}

impl Mailbox {
    fn post(&self, introduction: Introduction) {
        let mut waiting = lock(&self.waiting);
        if waiting.len() == MAX_WAITING {
            self.overfull.notify_one();
            return;
        }
        waiting.push_back(introduction);
        self.filled.notify_one();
    }

    fn fetch(&self) -> Vec<Introduction> {
        let mut waiting = lock(&self.waiting);
        let count = waiting.len().min(MAX_INTRODUCTIONS);
        waiting.drain(..count).collect()
    }
}

/// Where the requests of one client are answered.
#[derive(Debug, Clone)]
struct Desk {
    broker: Broker,
    client: ClientId,
    mailbox: Arc<Mailbox>,
}

impl Control for Desk {
    async fn open(self, _: Context, endpoint: u64, open: Open) -> Result<(), Refusal> {
        let mut inner = lock(&self.broker.0);
        let (role, channel) = (open.role.name(), open.channel.clone());
        let pairs = inner.state.open(self.client, endpoint, open).inspect_err(|refusal| {
            warn!(client = ?self.client, channel, role, %refusal, "refused");
        })?;
        info!(client = ?self.client, channel, role, links = pairs.len(), "opened");
        for pair in pairs {
            if let Err(error) = Broker::introduce(&inner, pair) {
                inner.state.close(self.client, endpoint);
                warn!(client = ?self.client, channel, role, %error, "no socket for a link");
                return Err(Refusal::Exhausted(error.to_string()));
            }
        }
        Ok(())
    }

    async fn close(self, _: Context, endpoint: u64) {
        debug!(client = ?self.client, endpoint, "closed");
        lock(&self.broker.0).state.close(self.client, endpoint);
    }

    async fn introductions(self, _: Context) -> Vec<Introduction> {
        let filled = async {
            loop {
                let filled = self.mailbox.filled.notified();
                let fetched = self.mailbox.fetch();
                if !fetched.is_empty() {
                    return fetched;
                }
                filled.await;
            }
        };
        timeout(INTRODUCTION_TIME, filled).await.unwrap_or_default()
    }
}
