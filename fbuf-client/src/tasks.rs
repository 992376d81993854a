//! Endpoints for the tasks of a tokio runtime. A task that waits leaves its thread to others, and is polled again when the
//! descriptor of its endpoint becomes readable: waiting as by a [`WaitGuard`](crate::WaitGuard), in futures.

use std::{
    error::Error,
    fmt,
    future::poll_fn,
    io,
    ops::Deref,
    pin::Pin,
    task::{Context, Poll, ready},
};

use fbuf_core::{
    peer::Peer,
    receive::received::Received,
    send::{fbuf::Fbuf, retained::Retained},
};
use fbuf_protocol::runtime::{self, SharedEpoll, Watched};
use futures_core::Stream;
use futures_sink::Sink;
use tokio::{io::Ready, task::coop};

use crate::{
    AllocateError, Departure, GetError, Receiver, Sender, Sent, WaitError, WaitFor, WriteError, guard::Endpoint,
    sockets::Sockets,
};

/// How often an endpoint is asked in one poll. Each time but the first it said that there may be something.
const ATTEMPTS: usize = 4;

/// An endpoint cannot wait: the tokio runtime that watched it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RuntimeEnded;

impl fmt::Display for RuntimeEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the tokio runtime that watched this endpoint has ended: take the endpoint out (into_inner), and have a runtime watch it \
             that goes on (new)",
        )
    }
}

impl Error for RuntimeEnded {}

/// An endpoint's descriptor, as a runtime watches it.
#[derive(Debug)]
struct Readiness(Watched<SharedEpoll>);

impl Readiness {
    fn of(sockets: &Sockets) -> io::Result<Self> {
        let (epoll, witness) = sockets.watched();
        runtime::watch_epoll(epoll, witness).map(Self)
    }

    /// Asks an endpoint until it has something; if it has nothing, and is armed, the task is woken when it is to be asked again.
    fn poll<P, T, E: From<RuntimeEnded>>(
        &self,
        cx: &mut Context<'_>,
        endpoint: &mut P,
        mut ask: impl FnMut(&mut P) -> Result<Option<T>, E>,
        arm: impl Fn(&mut P) -> bool,
    ) -> Poll<Result<T, E>> {
        // As each resource of tokio does, so that a task that never waits lets others run.
        let budget = ready!(coop::poll_proceed(cx));
        for _ in 0..ATTEMPTS {
            if let Some(found) = ask(endpoint).transpose() {
                budget.made_progress();
                return Poll::Ready(found);
            }
            if !arm(endpoint) {
                continue;
            }
            match self.0.poll_read_ready(cx) {
                Poll::Pending => return Poll::Pending,
                // What it was told before it was armed.
                Poll::Ready(Ok(mut told)) => told.clear_ready_matching(Ready::READABLE),
                Poll::Ready(Err(_)) => return Poll::Ready(Err(RuntimeEnded.into())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// A [`Receiver`] that a task of tokio waits for.
///
/// What a [`Receiver`] says of itself, it says too ([`Deref`]).
///
/// ```
/// # use std::io::Write;
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// # runtime.block_on(async {
/// use fbuf_client::{AsyncReceiver, AsyncSender, GetError};
///
/// let mut receiver = AsyncReceiver::new(client.receiver("orders").open()?)?;
/// let mut sender = AsyncSender::new(client.sender("orders").open()?)?;
/// sender.wait_for_receivers(1).await?;
///
/// let takes = tokio::spawn(async move {
///     let mut bytes = 0;
///     loop {
///         match receiver.get().await {
///             Ok(order) => bytes += order.len(),
///             Err(GetError::Ended) => return Ok(bytes),
///             Err(error) => return Err(error),
///         }
///     }
/// });
/// for _ in 0..1000 {
///     let mut order = sender.allocate().await?;
///     order.write_all(b"apples")?;
///     sender.write(order)?;
/// }
/// sender.finish();
/// assert_eq!(takes.await??, 6000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AsyncReceiver {
    receiver: Receiver,
    readiness: Readiness,
    /// Whether there is no next item of the stream.
    is_over: bool,
}

impl AsyncReceiver {
    /// Has the runtime in which this is called watch a receiver. It takes one descriptor, of a timer.
    ///
    /// # Errors
    /// This thread is in no tokio runtime; what epoll_ctl(2) says.
    ///
    /// # Panics
    /// As every I/O of tokio, if its runtime was built without I/O (`enable_io`).
    pub fn new(receiver: Receiver) -> io::Result<Self> {
        let readiness = Readiness::of(receiver.sockets())?;
        Ok(Self { receiver, readiness, is_over: false })
    }

    /// The receiver, which no runtime watches any more.
    #[must_use]
    pub fn into_inner(self) -> Receiver {
        self.receiver
    }

    /// Takes the next message (uf_get), and waits for it. A message that is there costs no system call; one that is waited for costs
    /// one wake-up of the runtime.
    ///
    /// Cancel-safe: nothing is taken by a future that is dropped. Tasks that find a message each time yield now and then, as tokio has
    /// them (`tokio::task::coop`). An [interrupt](crate::InterruptHandle) does not end it: drop it instead.
    ///
    /// # Errors
    /// As of [`Receiver::get`], but for [`GetError::Interrupted`]; and [`GetError::RuntimeEnded`].
    pub async fn get(&mut self) -> Result<Received, GetError> {
        poll_fn(|cx| self.poll_get(cx)).await
    }

    /// As [`Receiver::try_get`].
    ///
    /// # Errors
    /// As of [`Receiver::try_get`].
    pub fn try_get(&mut self) -> Result<Option<Received>, GetError> {
        self.receiver.try_get()
    }

    /// As [`Self::get`], for futures that are written by hand.
    pub fn poll_get(&mut self, cx: &mut Context<'_>) -> Poll<Result<Received, GetError>> {
        self.readiness.poll(cx, &mut self.receiver, Receiver::try_get, |receiver| receiver.prepare_wait().is_some())
    }
}

/// The messages as they come, as of [`Receiver::iter`]: it ends when all senders have ended, and each other error is an item.
impl Stream for AsyncReceiver {
    type Item = Result<Received, GetError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let item = ready!(self.poll_get(cx));
        self.is_over = item.as_ref().is_err_and(GetError::is_last);
        Poll::Ready(Some(item).filter(|item| !matches!(item, Err(GetError::Ended))))
    }
}

impl Deref for AsyncReceiver {
    type Target = Receiver;
    fn deref(&self) -> &Receiver {
        &self.receiver
    }
}

/// A [`Sender`] that a task of tokio waits for. [`AsyncReceiver`] has an example.
///
/// What a [`Sender`] says of itself, it says too ([`Deref`]).
///
/// A task may be dropped at each `await`, when it is aborted, its runtime ends, or another task has panicked. So an
/// `AsyncSender` that is dropped has broken its stream off ([`Abort::Unfinished`](crate::Abort::Unfinished)); [`Self::finish`] says that it is
/// complete.
#[derive(Debug)]
pub struct AsyncSender {
    sender: Sender,
    readiness: Readiness,
    /// Whether the program has asked that the end be said ([`SenderBuilder::require_finish`](crate::SenderBuilder::require_finish)).
    requires_finish: bool,
}

impl AsyncSender {
    /// Has the runtime in which this is called watch a sender. It takes one descriptor, of a timer.
    ///
    /// # Errors
    /// This thread is in no tokio runtime; what epoll_ctl(2) says.
    ///
    /// # Panics
    /// As every I/O of tokio, if its runtime was built without I/O (`enable_io`).
    pub fn new(mut sender: Sender) -> io::Result<Self> {
        let (readiness, requires_finish) = (Readiness::of(sender.sockets())?, sender.set_require_finish(true));
        Ok(Self { sender, readiness, requires_finish })
    }

    /// The sender, which no runtime watches any more.
    #[must_use]
    pub fn into_inner(self) -> Sender {
        let Self { mut sender, requires_finish, .. } = self;
        sender.set_require_finish(requires_finish);
        sender
    }

    /// Ends the stream, which is complete, as [`Sender::finish`] does.
    pub fn finish(self) {
        self.sender.finish();
    }

    /// A [`Sink`] of its fbufs.
    #[must_use]
    pub fn into_sink(self) -> FbufSink {
        FbufSink(Some(self))
    }

    /// Takes a free slot (uf_allocate), and waits for it while receivers have all. A slot that is free costs no system call.
    ///
    /// Cancel-safe: no slot is taken by a future that is dropped.
    ///
    /// # Errors
    /// As of [`Sender::allocate`], but for [`AllocateError::Interrupted`]; and [`AllocateError::RuntimeEnded`].
    pub async fn allocate(&mut self) -> Result<Fbuf, AllocateError> {
        poll_fn(|cx| self.poll_allocate(cx)).await
    }

    /// As [`Self::allocate`], for futures that are written by hand.
    pub fn poll_allocate(&mut self, cx: &mut Context<'_>) -> Poll<Result<Fbuf, AllocateError>> {
        self.poll_until(cx, WaitFor::Slot, Sender::slot)
    }

    /// As [`Sender::try_allocate`].
    ///
    /// # Errors
    /// As of [`Sender::try_allocate`].
    pub fn try_allocate(&mut self) -> Result<Option<Fbuf>, AllocateError> {
        self.sender.try_allocate()
    }

    /// As [`Sender::write`] (uf_write): never waits.
    ///
    /// # Errors
    /// As of [`Sender::write`].
    pub fn write(&mut self, fbuf: Fbuf) -> Result<Sent, WriteError> {
        self.sender.write(fbuf)
    }

    /// As [`Sender::write_retained`].
    ///
    /// # Errors
    /// As of [`Sender::write_retained`].
    pub fn write_retained(&mut self, fbuf: Fbuf) -> Result<(Sent, Retained), WriteError> {
        self.sender.write_retained(fbuf)
    }

    /// As [`Sender::make_mut`].
    ///
    /// # Errors
    /// As of [`Sender::make_mut`].
    pub fn make_mut(&mut self, retained: Retained) -> Result<Fbuf, Retained> {
        self.sender.make_mut(retained)
    }

    /// As [`Sender::poll_events`].
    pub fn poll_events(&mut self) {
        self.sender.poll_events();
    }

    /// As [`Sender::next_departure`].
    pub fn next_departure(&mut self) -> Option<Departure> {
        self.sender.next_departure()
    }

    /// As [`Sender::disconnect`].
    pub fn disconnect(&mut self, receiver: Peer) -> bool {
        self.sender.disconnect(receiver)
    }

    /// Waits until so many receivers are linked: how many are.
    ///
    /// # Errors
    /// As of [`Sender::wait_for_receivers`], but for [`WaitError::Interrupted`]; and [`WaitError::RuntimeEnded`].
    pub async fn wait_for_receivers(&mut self, count: usize) -> Result<usize, WaitError> {
        self.sender.poll_events();
        poll_fn(|cx| self.poll_until(cx, WaitFor::Receivers(count), |sender| sender.linked(count))).await
    }

    /// Waits until every receiver has handed back everything it was given.
    ///
    /// # Errors
    /// As of [`Sender::wait_for_returns`], but for [`WaitError::Interrupted`]; and [`WaitError::RuntimeEnded`].
    pub async fn wait_for_returns(&mut self) -> Result<(), WaitError> {
        poll_fn(|cx| self.poll_until(cx, WaitFor::Returns, Sender::returned)).await
    }

    fn poll_until<T, E: From<RuntimeEnded>>(
        &mut self,
        cx: &mut Context<'_>,
        what: WaitFor,
        ask: impl FnMut(&mut Sender) -> Result<Option<T>, E>,
    ) -> Poll<Result<T, E>> {
        self.readiness.poll(cx, &mut self.sender, ask, |sender| sender.prepare_wait(what).is_some())
    }
}

impl Deref for AsyncSender {
    type Target = Sender;
    fn deref(&self) -> &Sender {
        &self.sender
    }
}

/// An [`AsyncSender`] as a [`Sink`] of its fbufs: [`AsyncSender::into_sink`].
///
/// It takes each fbuf at once, since that has its slot. To close it [finishes](Sender::finish) the stream; what is sent after that
/// comes back as [`WriteError::NoReceiver`]. Dropped, it has broken the stream off.
#[derive(Debug)]
pub struct FbufSink(Option<AsyncSender>);

impl FbufSink {
    /// The sender, if the sink was not closed.
    #[must_use]
    pub fn into_inner(self) -> Option<AsyncSender> {
        self.0
    }
}

impl Sink<Fbuf> for FbufSink {
    type Error = WriteError;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(mut self: Pin<&mut Self>, fbuf: Fbuf) -> Result<(), WriteError> {
        match &mut self.0 {
            Some(sender) => sender.write(fbuf).map(drop),
            None => Err(WriteError::NoReceiver { fbuf }),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        if let Some(sender) = self.0.take() {
            sender.finish();
        }
        Poll::Ready(Ok(()))
    }
}
