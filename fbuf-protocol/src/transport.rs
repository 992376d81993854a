//! tarpc over a packet socket: one packet for each request, cancellation and response, descriptors
//! travelling with the bytes that name them.
//!
//! What stands on the wire is [`Call`] and [`Answer`] and not tarpc's own types: a peer chooses these
//! bytes, and a deadline of its choice must not overflow a clock.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    io,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use fbuf_core::{
    limits::{MAX_ANSWERS, MAX_MESSAGE},
    process::{
        foreign::Foreign,
        sys::{in_call, os_error},
    },
    socket::{
        Arrival, PacketSocket,
        wire::{self, Letter},
    },
};
use futures_util::{Sink, Stream};
use nix::errno::Errno;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tarpc::{ClientMessage, Request, Response, ServerError, context};
use tokio::time::{Sleep, sleep};

use crate::runtime::Watched;

/// What a client sends.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call<T> {
    /// A question.
    Request {
        /// What its answer will be called.
        id: u64,
        /// How long that is of use.
        milliseconds: u32,
        /// What is asked.
        body: T,
    },
    /// The answer to a question is of no use any more.
    Cancel {
        /// Which.
        id: u64,
    },
}

/// What a broker sends.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer<T> {
    id: u64,
    body: Result<T, String>,
}

/// A message of tarpc, as it travels.
pub trait Parcel {
    /// What is encoded.
    type Wire: Serialize + DeserializeOwned;
    /// As it is encoded.
    fn pack(self) -> Self::Wire;
    /// Back again.
    fn unpack(wire: Self::Wire) -> Self;
}

impl<T: Serialize + DeserializeOwned> Parcel for ClientMessage<T> {
    type Wire = Call<T>;

    fn pack(self) -> Call<T> {
        match self {
            ClientMessage::Request(Request { context, id, message }) => {
                let left = context.deadline.saturating_duration_since(Instant::now());
                let milliseconds = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
                Call::Request { id, milliseconds, body: message }
            }
            ClientMessage::Cancel { request_id, .. } => Call::Cancel { id: request_id },
            // tarpc has no other message today; this one cancels a request that cannot exist.
            _ => Call::Cancel { id: u64::MAX },
        }
    }

    fn unpack(wire: Call<T>) -> Self {
        let mut context = context::current();
        match wire {
            Call::Request { id, milliseconds, body } => {
                context.deadline = Instant::now() + Duration::from_millis(milliseconds.into());
                ClientMessage::Request(Request { context, id, message: body })
            }
            Call::Cancel { id } => ClientMessage::Cancel { trace_context: context.trace_context, request_id: id },
        }
    }
}

impl<T: Serialize + DeserializeOwned> Parcel for Response<T> {
    type Wire = Answer<T>;

    fn pack(self) -> Answer<T> {
        Answer { id: self.request_id, body: self.message.map_err(|error| error.detail) }
    }

    fn unpack(Answer { id, body }: Answer<T>) -> Self {
        let message = body.map_err(|detail| ServerError::new(io::ErrorKind::Other, detail));
        Response { request_id: id, message }
    }
}

/// A tarpc transport over a packet socket.
#[derive(Debug)]
pub struct Packets<In, Out> {
    socket: Watched<PacketSocket>,
    outbox: VecDeque<Letter>,
    /// Until when nothing is sent, for lack of something that passes.
    pause: Option<Pin<Box<Sleep>>>,
    /// Since when the kernel has had no memory for what is to be sent.
    without_memory: Option<Instant>,
    pace: Option<Pace>,
    lack: Lack,
    messages: PhantomData<fn(Out) -> In>,
}

/// When messages are passed on.
struct Pace {
    /// Begins to wait for the turn of a message.
    turn: Box<dyn FnMut() -> Turn + Send>,
    /// A message that has come, and waits.
    waiting: Option<(Packet, Turn)>,
}

/// What waits for descriptors of this process, of which there were none left.
#[derive(Debug, Default)]
struct Lack {
    /// How often it was looked whether there are some.
    looks: u32,
    /// Until when it is not looked again.
    pause: Option<Pin<Box<Sleep>>>,
}

/// Ready when it is somebody's turn.
pub type Turn = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The bytes and descriptors of a message.
type Packet = (Vec<u8>, Vec<Foreign>);

impl fmt::Debug for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pace").field("waits", &self.waiting.is_some()).finish_non_exhaustive()
    }
}

/// The client's end.
pub type ClientTransport<Req, Resp> = Packets<Response<Resp>, ClientMessage<Req>>;
/// The broker's end.
pub type ServerTransport<Req, Resp> = Packets<ClientMessage<Req>, Response<Resp>>;

impl<In, Out> Packets<In, Out> {
    /// Speaks over this socket.
    #[must_use]
    pub fn new(socket: Watched<PacketSocket>) -> Self {
        Self {
            socket,
            outbox: VecDeque::new(),
            pause: None,
            without_memory: None,
            pace: None,
            lack: Lack::default(),
            messages: PhantomData,
        }
    }

    /// Passes on a message, and reads the next one, only when a `turn` that began with its coming is over. What comes
    /// meanwhile fills the socket, and then stops its sender. No message may carry descriptors: those of a hostile
    /// peer need not even be closed.
    #[must_use]
    pub fn paced(mut self, turn: impl FnMut() -> Turn + Send + 'static) -> Self {
        self.pace = Some(Pace { turn: Box::new(turn), waiting: None });
        self
    }

    fn poll_empty(&mut self, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(letter) = self.outbox.front() {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(task));
                self.pause = None;
            }
            let mut ready = ready!(self.socket.poll_write_ready(task))?;
            match ready.try_io(|socket| socket.get_ref().send(letter)) {
                Ok(Ok(())) => {
                    self.outbox.pop_front();
                    self.without_memory = None;
                }
                Ok(Err(error)) if lacks_memory(&error) => {
                    let since = *self.without_memory.get_or_insert_with(Instant::now);
                    // A broker waits as long as its client does. To a client the connection is of no use, and it says why.
                    if self.pace.is_none() && since.elapsed() >= MEMORY_TIME {
                        return Poll::Ready(Err(error));
                    }
                    self.pause = Some(Box::pin(sleep(PAUSE)));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::QuotaExceeded => {
                    self.pause = Some(Box::pin(sleep(PAUSE)));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// How long to wait before a message is sent again for which there was no memory, or too many descriptors on their way; or
/// received for which there were none.
const PAUSE: Duration = Duration::from_millis(20);
/// How often it is tried to receive such a message: others of this process may close some that they have for a moment.
const LOOKS: u32 = 10;

/// For how long a client tries to send a message for which the kernel has no memory.
const MEMORY_TIME: Duration = Duration::from_secs(2);

/// Whether a message was not sent because the kernel has no memory.
fn lacks_memory(error: &io::Error) -> bool {
    matches!(os_error(error), Some(Errno::ENOMEM | Errno::ENOBUFS))
}

/// The next message of a socket; `UnexpectedEof` at its end.
type NextPacket = Option<io::Result<Packet>>;

fn poll_packet(
    socket: &Watched<PacketSocket>,
    pace: &mut Option<Pace>,
    lack: &mut Lack,
    task: &mut Context<'_>,
) -> Poll<NextPacket> {
    let invalid = |text| Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::InvalidData, text))));
    loop {
        if let Some(pause) = &mut lack.pause {
            ready!(pause.as_mut().poll(task));
            lack.pause = None;
        }
        if let Some(Pace { waiting, .. }) = pace
            && let Some((_, turn)) = waiting
        {
            ready!(turn.as_mut().poll(task));
            // A client that has gone meanwhile asks for nothing any more, and has no other wait.
            if socket.get_ref().hung_up() {
                return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
            }
            return Poll::Ready(waiting.take().map(|(packet, _)| Ok(packet)));
        }
        let mut ready = match ready!(socket.poll_read_ready(task)) {
            Ok(ready) => ready,
            Err(error) => return Poll::Ready(Some(Err(error))),
        };
        let arrival = match pace {
            Some(_) => socket.get_ref().receive_bytes::<MAX_MESSAGE>(),
            None => socket.get_ref().receive::<MAX_MESSAGE>(),
        };
        match arrival {
            Ok(Arrival::Message(bytes, descriptors)) => match pace {
                Some(Pace { turn, waiting }) => *waiting = Some(((bytes, descriptors), turn())),
                None => return Poll::Ready(Some(Ok((bytes, descriptors)))),
            },
            Ok(Arrival::TooLong) => return invalid("a message is longer, or carries more descriptors, than any may"),
            Ok(Arrival::NoDescriptors) if lack.looks < LOOKS => {
                *lack = Lack { looks: lack.looks + 1, pause: Some(Box::pin(sleep(PAUSE))) };
                continue;
            }
            Ok(Arrival::NoDescriptors) => {
                return invalid(
                    "no descriptor is left to receive one (RLIMIT_NOFILE): close some, or raise `ulimit -n`",
                );
            }
            Ok(Arrival::Nothing) => ready.clear_ready(),
            // Not the end of the stream: at that, tarpc would first wait for all answers under way.
            Ok(Arrival::HangUp) => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
            Err(error) => return Poll::Ready(Some(Err(in_call("recvmsg")(error)))),
        }
    }
}

impl<In: Parcel, Out> Stream for Packets<In, Out> {
    type Item = io::Result<In>;

    fn poll_next(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Option<io::Result<In>>> {
        let Self { socket, pace, lack, .. } = self.get_mut();
        let arrival = ready!(poll_packet(socket, pace, lack, task));
        lack.looks = 0;
        Poll::Ready(arrival.map(|packet| {
            let (bytes, descriptors) = packet?;
            let wire = wire::decode(&bytes, descriptors)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            Ok(In::unpack(wire))
        }))
    }
}

impl<In, Out: Parcel> Sink<Out> for Packets<In, Out> {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outbox.len() < MAX_ANSWERS { Poll::Ready(Ok(())) } else { self.poll_empty(task) }
    }

    fn start_send(mut self: Pin<&mut Self>, message: Out) -> io::Result<()> {
        let letter = wire::encode(&message.pack())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        self.outbox.push_back(letter);
        Ok(())
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_empty(task)
    }

    fn poll_close(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_empty(task)
    }
}
