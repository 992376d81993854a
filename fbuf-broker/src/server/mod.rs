//! The loop: it accepts clients, passes their requests to the [`State`], and carries out what that decides.

mod accept;
mod introductions;
mod log_limit;
mod mailbox;
mod reports;
mod requests;

use std::{
    collections::HashMap,
    future::Future,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use fbuf_core::{
    limits::{GREETING_TIME, MAX_REQUESTS},
    peer::Credentials,
    process::{
        deferred::{self, Cause},
        foreign::Foreign,
    },
    socket::PacketSocket,
};
use fbuf_protocol::{
    Control, EndpointStatus, MAX_PAGE, Resource, ServerTransport, Turn, Wire, name::Program, runtime::Watched,
};
use futures_util::StreamExt;
use nix::{sys::resource::getrlimit, unistd::geteuid};
use tarpc::{
    ChannelError,
    server::{BaseChannel, Channel as _},
};
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{sleep_until, timeout},
};
use tracing::{debug, info, warn};

use self::{accept::PendingClient, log_limit::LogLimit, mailbox::Mailbox, reports::Unanswered, requests::Session};
use crate::{
    Listener,
    account::Capacity,
    policy::Policy,
    state::{ClientId, MAX_CLIENTS, Payer, State},
    tally::{Line, Tally},
};

/// So many looks whether two ends fit are as much work as a request.
const LOOKS: usize = 64;
/// To note what one endpoint has done is as much work as so many of those looks.
const LOOKS_OF_NOTE: usize = 4;

/// The broker, shared by the tasks of its clients. Cheap to clone.
///
/// ```
/// use fbuf_broker::{Broker, Policy};
/// let broker = Broker::new(Policy::only(1000).allow(1001));
/// assert_eq!(broker.used(), []);
/// ```
#[derive(Debug, Clone)]
pub struct Broker(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    state: State,
    mailboxes: HashMap<ClientId, Arc<Mailbox>>,
    /// The slots that were made for senders, by client and endpoint.
    slots: HashMap<ClientId, HashMap<u64, Vec<Arc<Foreign>>>>,
    /// Notified when a pair waits.
    waiting: Arc<Notify>,
    /// What endpoints said of themselves.
    tally: Tally,
    /// When each client was asked last to report, and of which user it is, if it has not answered yet.
    asked: HashMap<ClientId, (Instant, Option<u32>)>,
    unanswered: Unanswered,
    log_limit: LogLimit,
}

impl Inner {
    fn close(&mut self, client: ClientId, endpoint: u64) {
        self.state.close(client, endpoint);
        let_go(self.slots.get_mut(&client).and_then(|slots| slots.remove(&endpoint)));
        self.tally.close(client, endpoint, Instant::now());
        self.have_tried_again();
    }

    /// With what the endpoint last said of itself.
    fn with_report(&self, client: ClientId, endpoint: u64, status: EndpointStatus) -> EndpointStatus {
        EndpointStatus { report: self.tally.last(client, endpoint), ..status }
    }
}

/// How many descriptors are not for clients: those of the runtime, of the log and the socket, and of connections that are
/// sent away; more than there ever are.
const OWN_DESCRIPTORS: u64 = 32;

/// A client that has joined. It leaves when this is dropped, however its connection ends.
#[derive(Debug)]
struct Member {
    broker: Broker,
    client: ClientId,
    process: Credentials,
    program: Program,
    payer: Payer,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut inner = lock(&self.broker.0);
        inner.state.leave(self.client);
        inner.mailboxes.remove(&self.client);
        let_go(inner.slots.remove(&self.client).filter(|slots| !slots.is_empty()));
        inner.tally.leave(self.client, Instant::now());
        inner.note_answer(self.client);
        inner.asked.remove(&self.client);
        inner.have_tried_again();
    }
}

/// Has another thread let go of slots, if there are any: closing the last descriptor frees their memory, which
/// takes a fifth of a second for each GiB.
fn let_go(slots: Option<impl Send + 'static>) {
    if let Some(slots) = slots {
        deferred::drop_deferred(Cause::Memory, slots);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks; and if it did, the others go on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What there is of places and descriptors, a few of which this process needs for itself.
fn capacity() -> Capacity {
    let limit = getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    Capacity::new(MAX_CLIENTS as u64, limit.saturating_sub(OWN_DESCRIPTORS), geteuid().as_raw())
}

impl Broker {
    /// A broker with this policy, which serves no client yet.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        let state = State::with_capacity(policy, capacity());
        Self(Arc::new(Mutex::new(Inner {
            state,
            mailboxes: HashMap::new(),
            slots: HashMap::new(),
            tally: Tally::new(geteuid().as_raw()),
            waiting: Arc::default(),
            asked: HashMap::new(),
            unanswered: Unanswered::default(),
            log_limit: LogLimit::new(Instant::now()),
        })))
    }

    /// From now on another policy is in force. What was allowed stays; what is allowed only now will be paired.
    pub fn set_policy(&self, policy: Policy) {
        let mut inner = lock(&self.0);
        inner.state.set_policy(policy);
        inner.have_tried_again();
    }

    /// What each user takes up, by id: nothing that is not listed.
    #[must_use]
    pub fn used(&self) -> Vec<(u32, Resource, u64)> {
        lock(&self.0).state.used().collect()
    }

    /// What all endpoints have done so far, in as many lines as [`tally`](crate::tally) has at most; they are asked now.
    ///
    /// # Panics
    /// Outside of a tokio runtime with time.
    pub async fn tally(&self) -> Vec<Line> {
        self.ask_for_reports(None, None).await;
        lock(&self.0).tally.lines()
    }

    /// How many channels there are.
    #[must_use]
    pub fn channels(&self) -> usize {
        lock(&self.0).state.channels()
    }

    /// Whether one more line of the log may be about a user.
    fn may_log(&self, user: u32) -> bool {
        lock(&self.0).log_limit.may_log(user, Instant::now())
    }

    /// A page for a client, with what keeps endpoints apart.
    fn page_of(&self, client: ClientId, user: Option<u32>, behind: u64) -> Vec<EndpointStatus> {
        let inner = lock(&self.0);
        let mut looks = 0;
        let page = inner.state.status(user, behind, MAX_PAGE).into_iter();
        let page = page.map(|(of, endpoint, mut status)| {
            let (unpaired, looked) = inner.state.unpaired(of, endpoint, 0);
            looks += looked;
            status.unpaired = unpaired.len() as u64;
            status.first_unpaired = unpaired.first().map(|&(_, unpaired)| Wire(unpaired));
            inner.with_report(of, endpoint, status)
        });
        let page = page.collect();
        inner.state.note_work(client, looks / LOOKS, Instant::now());
        page
    }

    /// Serves clients until `until` is ready. What was introduced goes on afterwards.
    ///
    /// # Errors
    /// When the socket cannot be polled.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time.
    pub async fn serve(&self, listener: &Listener, until: impl Future<Output = ()>) -> io::Result<()> {
        tokio::select! {
            result = self.accept(listener) => result,
            never = self.pair_waiting() => match never {},
            () = until => Ok(()),
        }
    }

    /// Waits until a user may make one more request, behind all requests that the same user made before, so that a user with
    /// many requests delays no other user. False, and no request is noted, if the client is gone by then.
    async fn wait_for_turn(&self, payer: &Payer, is_gone: impl Fn() -> bool) -> bool {
        let _first = payer.line().await;
        if is_gone() {
            return false;
        }
        let now = Instant::now();
        let next = lock(&self.0).state.note_request(payer, now);
        if next > now {
            sleep_until(next.into()).await;
        }
        true
    }

    /// One client, from its admission to its end.
    async fn attend(self, client: PendingClient) {
        if !self.wait_for_turn(client.payer(), || client.has_left()).await {
            return;
        }
        match timeout(GREETING_TIME, self.greet(client)).await {
            Err(_) => debug!("a client did not greet in time"),
            Ok(Err(error)) => debug!(%error, "a client could not be greeted"),
            Ok(Ok(None)) => {}
            Ok(Ok(Some((member, socket)))) => {
                let Credentials { pid, uid, .. } = member.process;
                if self.may_log(uid) {
                    info!(pid, uid, client = ?member.client, "joined");
                }
                self.talk(&member, socket).await;
                if self.may_log(uid) {
                    info!(pid, client = ?member.client, "left");
                }
            }
        }
    }

    async fn talk(&self, member: &Member, socket: Watched<PacketSocket>) {
        let (client, uid, mailbox) = (member.client, member.process.uid, Arc::new(Mailbox::default()));
        lock(&self.0).mailboxes.insert(client, mailbox.clone());
        let pacing = (self.clone(), member.payer.clone());
        let turn = move || -> Turn {
            let (broker, payer) = pacing.clone();
            Box::pin(async move {
                broker.wait_for_turn(&payer, || false).await;
            })
        };
        let (process, program) = (member.process, member.program.clone());
        let session = Session { broker: self.clone(), client, process, program, mailbox: mailbox.clone() };
        let channel = BaseChannel::with_defaults(ServerTransport::new(socket).paced(turn));
        let mut requests = std::pin::pin!(channel.max_concurrent_requests(MAX_REQUESTS).requests());
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                request = requests.next() => match request {
                    Some(Ok(request)) => drop(running.spawn(request.execute(session.clone().serve()))),
                    Some(Err(ChannelError::Read(error))) if error.kind() == io::ErrorKind::InvalidData => {
                        if self.may_log(uid) {
                            warn!(?client, uid, %error, "a client does not keep to the protocol");
                        }
                        break;
                    }
                    // It is gone, be it in the middle of an answer.
                    Some(Err(_)) | None => break,
                },
                Some(_) = running.join_next() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
