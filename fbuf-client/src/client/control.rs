//! The control thread: passes requests on to the broker and introductions on to the endpoints, and connects
//! again when the broker has gone and another has come.

use std::{
    collections::BTreeMap,
    error::Error,
    future::{Future, pending},
    hash::{BuildHasher, Hasher, RandomState},
    io, iter,
    pin::Pin,
    sync::{Arc, mpsc::SyncSender},
    time::{Duration, Instant},
};

use fbuf_core::{
    introduced::{Introduced, Introduction, IntroductionError},
    peer::{LinkId, Peer},
    points,
    process::sys::said,
    socket::PacketSocket,
};
use fbuf_protocol::{
    ClientStatus, ClientTransport, ControlClient, ControlRequest, ControlResponse, EndpointStatus, News, Oldest, Open,
    Opened, Page, PreviousRegistration, Refusal, Report, Role, Secret, Slots, Unpaired, Wire, runtime::Watched,
};
use tarpc::{client::RpcError, context};
use tokio::{
    sync::{Semaphore, mpsc::UnboundedReceiver},
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};

use super::{
    OpenError,
    connect::Broker,
    state::{ConnectionState, NotConnected},
};
use crate::{endpoint::LinkSink, hangup::HangUps};

/// How many endpoints are being closed at the broker at once, or looked at.
const MAX_PLACES: usize = 4;
/// Longer than a broker keeps a question for introductions unanswered.
const INTRODUCTION_TIME: Duration = Duration::from_secs(3600);
/// How long to wait before the first attempt to connect again, and at most between two. About half of it more
/// or less, so that the clients of one broker do not all come at once.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LAST_PAUSE: Duration = Duration::from_millis(250);
/// How often an endpoint asks again that the next broker refused.
const AGAIN: Duration = Duration::from_secs(1);
/// How long the end of a client waits at most until the broker has heard what its last endpoints did.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// What other threads want.
pub(super) enum Command {
    Open {
        endpoint: u64,
        open: Open,
        post: Box<dyn LinkSink>,
        answer: SyncSender<Result<Opened, OpenError>>,
        /// When to give up if there is no broker.
        deadline: Instant,
    },
    Close {
        endpoint: u64,
    },
    Status {
        answer: SyncSender<Result<Vec<EndpointStatus>, OpenError>>,
    },
    Clients {
        answer: SyncSender<Result<Vec<ClientStatus>, OpenError>>,
    },
    /// With which endpoints one of this client is not paired.
    Unpaired {
        endpoint: u64,
        answer: SyncSender<Result<Vec<Unpaired>, OpenError>>,
    },
}

/// An endpoint that is open.
struct Endpoint {
    open: Open,
    /// What proves to the next broker that it is the endpoint that its peers know.
    secret: Secret,
    post: Box<dyn LinkSink>,
    /// Whether the broker that is there now has it.
    listed: bool,
    /// By link: the message that it has held for longest, and since when that is known.
    oldest: BTreeMap<LinkId, (u64, Instant)>,
}

impl Endpoint {
    /// What it does, for reports.
    fn report(&mut self) -> Report {
        let mut report = self.post.report();
        let (held, now) = (self.post.held(), Instant::now());
        self.oldest.retain(|link, _| held.iter().any(|(other, ..)| other == link));
        for (link, count, sequence) in held {
            report.held += count as u64;
            let (known, since) = self.oldest.entry(link).or_insert((sequence, now));
            if *known != sequence {
                (*known, *since) = (sequence, now);
            }
            let milliseconds = now.duration_since(*since).as_millis() as u64;
            let oldest = Oldest { sequence, milliseconds, behind: report.messages.saturating_sub(sequence + 1) };
            if report.oldest.is_none_or(|other| (other.milliseconds, other.behind) <= (milliseconds, oldest.behind)) {
                report.oldest = Some(oldest);
            }
        }
        report
    }
}

/// An endpoint that is to be opened when there is a broker again.
struct Request {
    endpoint: u64,
    open: Open,
    post: Box<dyn LinkSink>,
    answer: SyncSender<Result<Opened, OpenError>>,
    deadline: Instant,
}

#[derive(Default)]
struct Endpoints {
    open: BTreeMap<u64, Endpoint>,
    waiting: Vec<Request>,
}

/// Why a session is over.
enum Over {
    /// The last handle of the client was dropped.
    Dropped,
    /// There is no connection to the broker any more, for this reason.
    Gone(String),
}

/// Until the last handle of the client is dropped.
pub(super) async fn run(
    broker: &Broker,
    socket: Watched<PacketSocket>,
    commands: &mut UnboundedReceiver<Command>,
    state: &ConnectionState,
    hang_ups: Arc<HangUps>,
) {
    // It ends with the runtime. Should it fail, endpoints find hang-ups when they look at their sockets.
    tokio::spawn(hang_ups.run());
    let mut endpoints = Endpoints::default();
    let mut session = Session::new(socket);
    // Dropped before the endpoints, which are told when these are.
    let _ended = Ended(state);
    loop {
        let why = match session.serve(&mut endpoints, commands).await {
            Over::Dropped => return session.end().await,
            Over::Gone(why) => why,
        };
        state.set(Some(NotConnected::Now(why.clone())));
        session.closing.abort_all();
        let Some(socket) = endpoints.reconnect(broker, commands, state, why).await else { return };
        session = Session::new(socket);
        state.set(None);
    }
}

/// Notes that the thread ends, if it does in a panic.
struct Ended<'a>(&'a ConnectionState);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set(Some(NotConnected::Ever));
        }
    }
}

impl Endpoints {
    /// Connects again, however long it takes; none when the last handle of the client is dropped. It is known why there
    /// is no connection.
    async fn reconnect(
        &mut self,
        broker: &Broker,
        commands: &mut UnboundedReceiver<Command>,
        state: &ConnectionState,
        mut why: String,
    ) -> Option<Watched<PacketSocket>> {
        self.open.values_mut().for_each(|endpoint| endpoint.listed = false);
        let mut pauses = Pauses::default();
        loop {
            let pause = pauses.draw();
            let mut attempt = std::pin::pin!(async {
                sleep(pause).await;
                broker.greet_again().await
            });
            // What is asked for meanwhile waits for a broker, but not for ever.
            let error = loop {
                let spin_budget = self.waiting.iter().map(|request| request.deadline).min();
                let expired = async {
                    match spin_budget {
                        Some(deadline) => sleep_until(deadline.into()).await,
                        None => pending().await,
                    }
                };
                tokio::select! {
                    command = commands.recv() => match command? {
                        Command::Open { endpoint, open, post, answer, deadline } => {
                            self.waiting.push(Request { endpoint, open, post, answer, deadline });
                        }
                        Command::Close { endpoint } => {
                            self.open.remove(&endpoint);
                            // The caller may have given up.
                            self.waiting.retain(|request| request.endpoint != endpoint);
                        }
                        // The answer is that there is no broker.
                        Command::Status { .. } | Command::Clients { .. } | Command::Unpaired { .. } => {}
                    },
                    result = &mut attempt => match result {
                        Ok(socket) => return Some(socket),
                        Err(error) => break error,
                    },
                    () = expired => self.give_up(&why),
                }
            };
            why.clone_from(&error);
            state.set(Some(NotConnected::Now(error)));
        }
    }

    /// Answers those that have waited for long enough.
    fn give_up(&mut self, why: &str) {
        let now = Instant::now();
        for request in self.waiting.extract_if(.., |request| request.deadline <= now) {
            // The caller waits for it.
            let _ = request.answer.send(Err(OpenError::BrokerGone { reason: why.to_owned() }));
        }
    }

    fn introduce(&self, introduced: Result<Introduced, Unusable>) {
        let number = introduced.as_ref().map_or_else(|unusable| unusable.endpoint, Introduced::endpoint);
        // It may have been closed meanwhile, which the peer sees as a hang-up.
        let Some(Endpoint { post, .. }) = self.open.get(&number) else { return };
        points::reach("attach: introduced");
        match introduced {
            Ok(introduced) => post.introduce(introduced),
            Err(Unusable { peer, error, .. }) => post.fail(peer, error.to_string()),
        }
    }
}

/// How long to wait before each attempt to connect again.
pub(super) struct Pauses {
    next: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { next: FIRST_PAUSE }
    }
}

impl Pauses {
    pub(super) fn draw(&mut self) -> Duration {
        let pause = self.next;
        self.next = (2 * pause).min(LAST_PAUSE);
        jittered(pause)
    }
}

/// A pause, half as long or half as long again.
fn jittered(pause: Duration) -> Duration {
    // Each of these is seeded anew.
    let random = RandomState::new().build_hasher().finish() % 1024;
    pause / 2 + pause * random as u32 / 1024
}

type Fetching = Pin<Box<dyn Future<Output = Result<News, RpcError>> + Send>>;

/// A connection, for as long as it lasts.
struct Session {
    client: ControlClient,
    places: Arc<Semaphore>,
    closing: JoinSet<()>,
    /// Of the last news.
    receipt: u64,
    /// Questions and reports that somebody watches by, and nobody here waits for.
    watching: JoinSet<()>,
}

impl Session {
    fn new(socket: Watched<PacketSocket>) -> Self {
        let transport: ClientTransport<ControlRequest, ControlResponse> = ClientTransport::new(socket);
        let client = ControlClient::new(tarpc::client::Config::default(), transport).spawn();
        let places = Arc::new(Semaphore::new(MAX_PLACES));
        Self { client, places, closing: JoinSet::new(), receipt: 0, watching: JoinSet::new() }
    }

    async fn serve(&mut self, endpoints: &mut Endpoints, commands: &mut UnboundedReceiver<Command>) -> Over {
        let mut fetching = self.fetch();
        let mut again = Box::pin(sleep(Duration::ZERO));
        loop {
            if let Err(why) = self.open_waiting(endpoints).await {
                return Over::Gone(why);
            }
            let unlisted = endpoints.open.values().any(|endpoint| !endpoint.listed);
            tokio::select! {
                command = commands.recv() => match command {
                    None => return Over::Dropped,
                    Some(Command::Open { endpoint, open, post, answer, deadline }) => {
                        endpoints.waiting.push(Request { endpoint, open, post, answer, deadline });
                    }
                    Some(Command::Close { endpoint }) => {
                        if let Some(mut closed) = endpoints.open.remove(&endpoint).filter(|closed| closed.listed) {
                            self.close(endpoint, closed.report());
                        }
                    }
                    Some(Command::Status { answer }) => {
                        let client = self.client.clone();
                        self.look(answer, async move {
                            let page = |behind| client.status(context::current(), behind);
                            all(page, |last: &EndpointStatus| last.number).await
                        });
                    }
                    Some(Command::Clients { answer }) => {
                        let client = self.client.clone();
                        self.look(answer, async move {
                            let page = |behind| client.clients(context::current(), behind);
                            all(page, |last: &ClientStatus| last.number).await
                        });
                    }
                    Some(Command::Unpaired { endpoint, answer }) => {
                        let client = self.client.clone();
                        self.look(answer, async move {
                            let page = |behind| client.unpaired(context::current(), endpoint, behind);
                            let unpaired = all(page, |last: &(u64, Wire<Unpaired>)| last.0).await?;
                            Ok(unpaired.into_iter().map(|(_, Wire(unpaired))| unpaired).collect())
                        });
                    }
                },
                fetched = &mut fetching => {
                    match fetched {
                        Ok(News { introductions, report, receipt }) => {
                            self.receipt = receipt;
                            introductions.into_iter().map(believe).for_each(|one| endpoints.introduce(one));
                            if report {
                                self.report(endpoints);
                            }
                        }
                        Err(RpcError::Server(_) | RpcError::DeadlineExceeded) => sleep(LAST_PAUSE).await,
                        Err(error) => return Over::Gone(why_gone(&error)),
                    }
                    fetching = self.fetch();
                }
                () = &mut again, if unlisted => {
                    if let Err(why) = self.resume(endpoints).await {
                        return Over::Gone(why);
                    }
                    again.as_mut().reset((Instant::now() + AGAIN).into());
                }
            }
        }
    }

    /// Asks for news.
    fn fetch(&self) -> Fetching {
        let (client, mut context) = (self.client.clone(), context::current());
        context.deadline = Instant::now() + INTRODUCTION_TIME;
        let receipt = self.receipt;
        Box::pin(async move { client.news(context, receipt).await })
    }

    /// Opens what is to be opened. An error says why the broker is gone; what was not opened then waits for the next.
    async fn open_waiting(&mut self, endpoints: &mut Endpoints) -> Result<(), String> {
        while let Some(request) = endpoints.waiting.first() {
            points::reach("attach: asked");
            // It is not to find an endpoint in its way that was dropped before.
            while self.closing.join_next().await.is_some() {}
            let result = match self.client.open(context::current(), request.endpoint, request.open.clone()).await {
                Ok(opened) => opened.map_err(|Wire(refusal)| OpenError::Refused(refusal)),
                Err(RpcError::DeadlineExceeded | RpcError::Server(_)) => Err(OpenError::NoAnswer),
                Err(error) => return Err(why_gone(&error)),
            };
            let Request { endpoint, open, post, answer, .. } = endpoints.waiting.remove(0);
            points::reach("attach: opened");
            if let Ok(opened) = &result {
                let secret = opened.secret;
                let oldest = BTreeMap::new();
                endpoints.open.insert(endpoint, Endpoint { open, secret, post, listed: true, oldest });
            }
            // The caller waits for it.
            let _ = answer.send(result);
        }
        Ok(())
    }

    /// Tells the broker of endpoints that were open at an earlier one, and with which peers each is linked. An error
    /// says why it is gone.
    async fn resume(&mut self, endpoints: &mut Endpoints) -> Result<(), String> {
        for (&number, endpoint) in endpoints.open.iter_mut().filter(|(_, endpoint)| !endpoint.listed) {
            let Endpoint { open, secret, post, .. } = endpoint;
            let mut open = open.clone();
            if let Role::Sender { slots: slots @ Slots::Broker { .. }, .. } = &mut open.role {
                *slots = Slots::Sender;
            }
            open.earlier = Some(PreviousRegistration { secret: *secret, links: post.links() });
            match self.client.open(context::current(), number, open).await {
                // It may be open already, and no answer came. If it is refused, time will tell.
                Ok(opened) => endpoint.listed = matches!(opened, Ok(_) | Err(Wire(Refusal::EndpointInUse { .. }))),
                Err(RpcError::DeadlineExceeded | RpcError::Server(_)) => {}
                Err(error) => return Err(why_gone(&error)),
            }
        }
        Ok(())
    }

    /// Says what the endpoints are doing.
    fn report(&mut self, endpoints: &mut Endpoints) {
        let reports: Vec<_> =
            endpoints.open.iter_mut().map(|(&number, endpoint)| (number, endpoint.report())).collect();
        let client = self.client.clone();
        while self.watching.try_join_next().is_some() {}
        self.watching.spawn(async move {
            let mut pages = Page::split(&reports).peekable();
            while let Some(page) = pages.next() {
                let last = pages.peek().is_none();
                // If it does not arrive, the broker asks again.
                let _ = client.report(context::current(), page, last).await;
            }
        });
    }

    /// Asks for all that this user may see; a few at a time, since a broker does not answer everything at once. The
    /// caller waits for it, or is told that the broker is gone.
    fn look<T: Send + 'static>(
        &mut self,
        answer: SyncSender<Result<Vec<T>, OpenError>>,
        look: impl Future<Output = Result<Vec<T>, RpcError>> + Send + 'static,
    ) {
        while self.watching.try_join_next().is_some() {}
        let places = self.places.clone();
        self.watching.spawn(async move {
            let _place = places.acquire().await;
            let seen = match look.await {
                Ok(all) => Ok(all),
                Err(RpcError::DeadlineExceeded | RpcError::Server(_)) => Err(OpenError::NoAnswer),
                Err(error) => Err(OpenError::BrokerGone { reason: why_gone(&error) }),
            };
            // The caller waits for it, unless it has given up.
            let _ = answer.send(seen);
        });
    }

    /// Closes an endpoint. Nobody waits for it: a broker that is gone, or has lost the connection before it
    /// hears of this, closes the endpoint by itself. A few at a time, since it does not answer everything at
    /// once.
    fn close(&mut self, endpoint: u64, last: Report) {
        let (client, places) = (self.client.clone(), self.places.clone());
        self.closing.spawn(async move {
            let _place = places.acquire().await;
            let _ = client.close(context::current(), endpoint, last).await;
        });
        while self.closing.try_join_next().is_some() {}
    }

    /// Lets the broker hear what the last endpoints did, for a moment.
    async fn end(mut self) {
        let heard = async { while self.closing.join_next().await.is_some() {} };
        let _ = timeout(LAST_WORDS, heard).await;
    }
}

/// Why there is no connection any more, and what to do: what the kernel said, or this side's own word.
fn why_gone(error: &RpcError) -> String {
    let causes = iter::successors(error.source(), |error| (*error).source());
    match causes.last() {
        Some(cause) => match kernels(cause) {
            Some(error) if is_end(error.kind()) => GONE.into(),
            Some(error) => said(error),
            None => cause.to_string(),
        },
        None => GONE.into(),
    }
}

/// What is said of a broker that has ended the connection.
const GONE: &str = "it hung up: start it again, if it has ended";

/// What the kernel said, if it is that.
fn kernels<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    // That of the connection comes as a shared one.
    let shared = cause.downcast_ref::<Arc<dyn Error + Send + Sync>>();
    let cause: &(dyn Error + 'static) = shared.map_or(cause, |shared| &**shared);
    cause.downcast_ref()
}

fn is_end(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// An introduction of which no link can be made, which the peer sees as a hang-up.
struct Unusable {
    endpoint: u64,
    peer: Peer,
    error: IntroductionError,
}

/// An introduction that the broker has just sent. None of a sender with slots that cannot be, which a broker that has
/// checked it does not introduce; nor if this process lacks something for its socket.
fn believe(introduction: Introduction) -> Result<Introduced, Unusable> {
    let (endpoint, peer) = (introduction.endpoint, introduction.peer);
    #[expect(unsafe_code, reason = "only here is it known that the broker has said so")]
    // SAFETY: it came over the connection to the broker, which is one of root, of this process's user, or of a user that
    // this client was told to accept, as the kernel says (`Accepted`). It goes to the endpoint that it names, and nothing
    // else has had its descriptors.
    let introduced = unsafe { introduction.assume_genuine() };
    introduced.map_err(|error| Unusable { endpoint, peer, error })
}

/// All pages, each of what is behind a number.
async fn all<T, F>(page: impl Fn(u64) -> F, number: impl Fn(&T) -> u64) -> Result<Vec<T>, RpcError>
where
    F: Future<Output = Result<Vec<T>, RpcError>>,
{
    let mut all: Vec<T> = Vec::new();
    loop {
        let page = page(all.last().map_or(0, &number)).await?;
        if page.is_empty() {
            return Ok(all);
        }
        all.extend(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_last_and_none_lasts_half_a_second() {
        for _ in 0..100 {
            let mut pauses = Pauses::default();
            let mut middle = FIRST_PAUSE;
            for _ in 0..20 {
                let pause = pauses.draw();
                assert!((middle / 2..middle * 3 / 2).contains(&pause), "{pause:?}, where {middle:?} is the middle");
                // So long after a broker's return the next attempt begins.
                assert!(pause < Duration::from_millis(500), "{pause:?}");
                middle = (2 * middle).min(LAST_PAUSE);
            }
        }
    }

    #[test]
    fn what_to_do_fits_why_there_is_no_connection() {
        use tarpc::ChannelError::Read;
        let said = |error: io::Error| {
            OpenError::BrokerGone { reason: why_gone(&RpcError::Channel(Read(Arc::new(error)))) }.to_string()
        };
        for error in [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe] {
            assert!(said(error.into()).contains("start it again"));
        }
        let own = said(io::Error::new(io::ErrorKind::InvalidData, "no descriptor is left (RLIMIT_NOFILE): raise it"));
        assert!(!own.contains("start it again") && own.contains("RLIMIT_NOFILE"), "{own}");
    }

    #[test]
    fn pauses_are_spread_evenly_and_clients_come_apart() {
        const PARTS: usize = 8;
        const CLIENTS: usize = 1000;
        let draw = || {
            let mut pauses = Pauses::default();
            std::array::from_fn::<_, 10, _>(|_| pauses.draw())
        };
        // Each is another thread, as in a client.
        let clients: Vec<_> = (0..CLIENTS).map(|_| std::thread::spawn(draw).join().unwrap()).collect();
        for attempt in [0, 9] {
            let middle = [FIRST_PAUSE, LAST_PAUSE][usize::from(attempt > 0)];
            let mut parts = [0; PARTS];
            for client in &clients {
                parts[((client[attempt] - middle / 2).as_nanos() * PARTS as u128 / middle.as_nanos()) as usize] += 1;
            }
            // Six standard deviations.
            let wanted = CLIENTS / PARTS - 63..CLIENTS / PARTS + 63;
            assert!(parts.iter().all(|part| wanted.contains(part)), "{parts:?}");
        }
        let different: std::collections::BTreeSet<_> = clients.iter().collect();
        assert_eq!(different.len(), CLIENTS);
    }
}
