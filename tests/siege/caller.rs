//! A client of the broker, packet by packet, and what can be seen from where it stands. An [`Effect`] is made here and
//! nowhere else, so that no attack can have one that nobody saw.

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use fbuf_client::Address;
use fbuf_core::{
    introduced::Introduction,
    limits::MAX_MESSAGE,
    process::{foreign::Foreign, sys::os_error},
    socket::{
        Arrival, PacketSocket,
        wire::{self, Letter},
    },
};
use fbuf_protocol::{
    Call, ControlRequest, ControlResponse, Greeting, News, Open, Opened, Refusal, Report, Resource, Role, Unpaired,
    VERSION, Verdict, Wire,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{attack::quota, support::SOON};

/// Something that came of an attack, and was seen.
#[derive(Debug)]
pub struct Effect(());

/// What was to come of an attack and did not, in words.
pub type Seen = Result<Effect, String>;

impl Effect {
    /// The effect, if this is so.
    pub fn if_so(so: bool, instead: impl FnOnce() -> String) -> Seen {
        if so { Ok(Self(())) } else { Err(instead()) }
    }

    /// The other side hangs up.
    pub fn hang_up(socket: &PacketSocket) -> Seen {
        wait_for(socket, PollFlags::empty(), SOON)?.then_some(Self(())).ok_or("nobody hangs up".into())
    }

    /// Descriptors are sent: the kernel refuses them for the other side, or that hangs up.
    pub fn not_taken(socket: &PacketSocket, letter: &Letter) -> Seen {
        match socket.send(letter) {
            Err(error) if os_error(&error) == Some(nix::errno::Errno::EPERM) => Ok(Self(())),
            Err(error) => Err(format!("to send descriptors: {error}")),
            Ok(()) => Self::hang_up(socket),
        }
    }

    /// Nobody has the writing end of this pipe any more.
    pub fn closed_everywhere(reader: &OwnedFd) -> Seen {
        wait_for(reader, PollFlags::empty(), SOON)?.then_some(Self(())).ok_or("a descriptor was kept".into())
    }

    /// A request was refused since more would be in use than the quota allows.
    pub fn spent(refusal: &Refusal, resource: Resource) -> Seen {
        let so = matches!(refusal, Refusal::QuotaExceeded(spent) if spent.resource == resource
            && spent.limit == quota(resource) && spent.used <= spent.limit && spent.used + spent.asked > spent.limit);
        Self::if_so(so, || refusal.to_string())
    }

    /// A packet says what the broker thinks of a connection.
    pub fn sent_away(packet: &[u8], wanted: Verdict) -> Seen {
        let found = Greeting::from_bytes(packet).map_err(|error| error.to_string())?;
        Self::if_so(found == Greeting { version: VERSION, verdict: wanted }, || format!("sent away as {found:?}"))
    }
}

/// Waits until something can be done with a descriptor, or the other side has hung up: whether that came in time.
pub fn wait_for(what: &impl AsFd, events: PollFlags, time: Duration) -> Result<bool, String> {
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32;
        let mut polled = [PollFd::new(what.as_fd(), events)];
        match poll(&mut polled, PollTimeout::try_from(left).map_err(|error| error.to_string())?) {
            Err(nix::errno::Errno::EINTR) => {}
            result => return result.map(|count| count > 0).map_err(|error| error.to_string()),
        }
    }
}

/// Looks again and again until there is something, for what is seen in shared memory.
pub fn look_for<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>, String>) -> Result<T, String> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if start.elapsed() > SOON {
            return Err(format!("still waiting for {what}"));
        }
        std::thread::yield_now();
    }
}

/// The bytes and descriptors of a packet.
type Packet = (Vec<u8>, Vec<Foreign>);
/// To which request an answer is, and what it says.
type Answer = (u64, Result<ControlResponse, String>);

/// The next packet; none if there is none any more.
pub fn receive(socket: &PacketSocket) -> Result<Option<Packet>, String> {
    loop {
        match socket.receive::<MAX_MESSAGE>() {
            Ok(Arrival::Message(bytes, descriptors)) => return Ok(Some((bytes, descriptors))),
            Ok(Arrival::Nothing) if wait_for(socket, PollFlags::POLLIN, SOON)? => {}
            Ok(Arrival::HangUp) => return Ok(None),
            other => return Err(format!("instead of a packet came {other:?}")),
        }
    }
}

pub fn connect() -> Result<PacketSocket, String> {
    let address = Address::default_for_user().to_kernel().map_err(|error| error.to_string())?;
    PacketSocket::connect(&address, SOON).map_err(|error| format!("to connect: {error}"))
}

/// A client that was welcome.
pub struct Caller {
    pub socket: PacketSocket,
    last: Cell<u64>,
    /// Of the last news.
    receipt: Cell<u64>,
}

impl Caller {
    /// Connects, and is welcomed: once the connections are gone that were before.
    pub fn join() -> Result<Self, String> {
        look_for("a welcome", Self::try_to_join)
    }

    /// Connects, and is welcomed, or sent away.
    pub fn try_to_join() -> Result<Option<Self>, String> {
        let greeting = Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes();
        let socket = connect()?;
        // Who is sent away is sent away at once, whether or not it has greeted: that may reset the connection.
        let _ = socket.send_bytes(&greeting);
        let answer = receive(&socket).ok().flatten();
        let is_welcome = answer.is_some_and(|(packet, _)| packet == greeting);
        Ok(is_welcome.then(|| Self { socket, last: Cell::new(0), receipt: Cell::new(0) }))
    }

    /// A request, as it travels.
    pub fn request(&self, body: ControlRequest) -> Vec<u8> {
        self.last.set(self.last.get() + 1);
        let call = Call::Request { id: self.last.get(), milliseconds: u32::MAX, body };
        postcard::to_stdvec(&call).expect("a request can be written")
    }

    /// The shortest one.
    pub fn trifle(&self) -> Vec<u8> {
        self.request(ControlRequest::Close { endpoint: u64::MAX, last: Report::default() })
    }

    /// Sends, without waiting; the broker may have hung up on a caller that sends without order.
    pub fn send(&self, packet: &[u8]) -> Result<(), String> {
        self.socket.send_bytes(packet).map_err(|error| format!("to send: {error}"))
    }

    /// The next answer: to which request, and which; none if the broker has hung up.
    pub fn answer(&self) -> Result<Option<Answer>, String> {
        let Some((bytes, descriptors)) = receive(&self.socket)? else { return Ok(None) };
        wire::decode(&bytes, descriptors).map(Some).map_err(|error| error.to_string())
    }

    /// The answer to what is sent; none if the broker hangs up.
    pub fn exchange(&self, packet: &[u8]) -> Result<Option<ControlResponse>, String> {
        let id = self.last.get();
        match self.socket.send_bytes(packet) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(None),
            sent => sent.map_err(|error| format!("to send: {error}"))?,
        }
        match self.answer()? {
            None => Ok(None),
            Some((to, answer)) if to == id => answer.map(Some),
            Some((to, answer)) => Err(format!("instead of the answer to {id} came that to {to}: {answer:?}")),
        }
    }

    /// The answer to a request.
    pub fn ask(&self, body: ControlRequest) -> Result<ControlResponse, String> {
        self.exchange(&self.request(body))?.ok_or("the broker has hung up".into())
    }

    /// The broker answers as ever.
    pub fn is_answered(&self) -> Seen {
        let answer = self.ask(ControlRequest::Close { endpoint: u64::MAX, last: Report::default() })?;
        Effect::if_so(matches!(answer, ControlResponse::Close(())), || format!("answered with {answer:?}"))
    }

    /// Opens an endpoint; none if the broker hangs up.
    pub fn open(&self, endpoint: u64, channel: &str, role: Role) -> Result<Option<Result<(), Refusal>>, String> {
        match self.exchange(&self.request(open(endpoint, channel, role)))? {
            None => Ok(None),
            Some(ControlResponse::Open(opened)) => Ok(Some(opened.map(drop).map_err(|Wire(refusal)| refusal))),
            Some(other) => Err(format!("answered with {other:?}")),
        }
    }

    /// Opens an endpoint as is said.
    pub fn open_as(&self, endpoint: u64, open: Open) -> Result<Result<Opened, Refusal>, String> {
        match self.ask(ControlRequest::Open { endpoint, open })? {
            ControlResponse::Open(opened) => Ok(opened.map_err(|Wire(refusal)| refusal)),
            other => Err(format!("answered with {other:?}")),
        }
    }

    /// With which endpoints one of its own is not paired.
    pub fn unpaired(&self, endpoint: u64) -> Result<Vec<Unpaired>, String> {
        match self.ask(ControlRequest::Unpaired { endpoint, behind: 0 })? {
            ControlResponse::Unpaired(apart) => Ok(apart.into_iter().map(|(_, Wire(one))| one).collect()),
            other => Err(format!("answered with {other:?}")),
        }
    }

    /// What the broker has for it; it has read what it was told before.
    pub fn news(&self) -> Result<News, String> {
        match self.ask(ControlRequest::News { receipt: self.receipt.get() })? {
            ControlResponse::News(news) => {
                self.receipt.set(news.receipt);
                Ok(news)
            }
            other => Err(format!("answered with {other:?}")),
        }
    }

    /// Introductions to honest ones, of which there is one at least. What is left of an earlier attempt may be introduced
    /// as well.
    pub fn meet(&self) -> Result<Vec<Introduction>, String> {
        look_for("an introduction", || {
            let introductions = self.news()?.introductions.into_iter();
            let honest = introductions.filter(|one| one.peer.process.pid as u32 != std::process::id());
            let honest: Vec<_> = honest.collect();
            Ok((!honest.is_empty()).then_some(honest))
        })
    }

    /// Opens an endpoint that is introduced to an honest one.
    pub fn open_linked(&self, channel: &str, role: Role) -> Result<Introduction, String> {
        match self.open(1, channel, role)? {
            Some(Ok(())) => {}
            other => return Err(format!("to open: {other:?}")),
        }
        Ok(self.meet()?.swap_remove(0))
    }
}

pub fn open(endpoint: u64, channel: &str, role: Role) -> ControlRequest {
    ControlRequest::Open {
        endpoint,
        open: Open { channel: channel.to_owned(), role, label: None, users: None, earlier: None },
    }
}
