//! What a process does that gives the broker as much to do as it can.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use fbuf_client::{Address, Client, Wait};
use fbuf_core::{
    control::{Call, ControlRequest, Greeting, Resource, VERSION, Verdict},
    limits::MAX_MESSAGE,
    socket::{Arrival, PacketSocket},
    wire,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    SLOT, SLOTS, SOON,
    crowd::link,
    hoard::{hoard, open},
    neighbour::Kind,
};
use crate::{Result, pair::Line};

/// Connections over which requests come.
pub(super) const CONNECTIONS: usize = 16;
/// Threads that spin, or open and close endpoints or connections.
const THREADS: u32 = 4;

/// Is the process, until it is killed.
pub(crate) fn be() -> Result<()> {
    let line = Line::of_this_process()?;
    let (address, kind): (String, Kind) = line.hear()?;
    let address = Address::new(&address);
    let begun = || line.tell(&Ok::<(), String>(()));
    // What is not there cannot be closed, which is the least that can be asked for.
    let close = |id| ControlRequest::Close { endpoint: id };
    match kind {
        Kind::Spins => in_threads(&address, begun, |_, _| {
            loop {
                std::hint::spin_loop();
            }
        }),
        Kind::Asks => {
            let greeted = (0..CONNECTIONS).map(|_| greet(&address)?.ok_or_else(|| "sent away".into()));
            let connections = greeted.collect::<Result<Vec<_>>>()?;
            begun()?;
            ask(&connections, close)
        }
        Kind::Opens => in_threads(&address, begun, open_and_close),
        Kind::Connects => in_threads(&address, begun, connect_and_leave),
        Kind::Hoards(resource) => {
            let connections = hoard(&address, resource)?;
            begun()?;
            // More of what there is no more of.
            ask(&connections, |id| open(resource, id))
        }
        Kind::Knocks => {
            let _connections = hoard(&address, Resource::Connections)?;
            in_threads(&address, begun, connect_and_leave)
        }
    }
}

/// A connection, unless the broker will not have it.
pub(super) fn greet(address: &Address) -> Result<Option<PacketSocket>> {
    let socket = PacketSocket::connect(&address.to_kernel()?, SOON)?;
    // It may have been sent away already.
    let _ = socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes());
    let Some((answer, _)) = wait_for(&socket)? else { return Ok(None) };
    let welcome = Greeting::from_bytes(&answer).is_ok_and(|greeting| greeting.verdict == Verdict::Welcome);
    Ok(welcome.then_some(socket))
}

/// The next message of a socket; none if it hung up.
pub(super) fn wait_for(socket: &PacketSocket) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    loop {
        match socket.receive::<MAX_MESSAGE>()? {
            Arrival::Message(bytes, descriptors) => return Ok(Some((bytes, descriptors))),
            Arrival::Nothing => {
                poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
            }
            _ => return Ok(None),
        }
    }
}

pub(super) fn send(socket: &PacketSocket, id: u64, body: ControlRequest) -> Result<std::io::Result<()>> {
    let milliseconds = SOON.as_millis() as u32;
    Ok(socket.send(&wire::encode(&Call::Request { id, milliseconds, body })?))
}

/// Sends as many requests as the sockets take, for ever.
fn ask(connections: &[PacketSocket], request: impl Fn(u64) -> ControlRequest) -> Result<()> {
    let mut id = 1 << 32;
    loop {
        let mut moved = false;
        for socket in connections {
            id += 1;
            moved |= send(socket, id, request(id))?.is_ok();
            // A client that does not read its answers is not listened to.
            loop {
                match socket.receive::<MAX_MESSAGE>()? {
                    Arrival::Message(..) => moved = true,
                    Arrival::HangUp => return Err("the broker hung up".into()),
                    _ => break,
                }
            }
        }
        if !moved {
            let events = PollFlags::POLLIN | PollFlags::POLLOUT;
            let mut sockets: Vec<_> = connections.iter().map(|socket| PollFd::new(socket.as_fd(), events)).collect();
            poll(&mut sockets, PollTimeout::NONE)?;
        }
    }
}

/// Does it in several threads, each of which has a number.
fn in_threads(
    address: &Address,
    begun: impl Fn() -> Result<()>,
    work: impl Fn(&Address, u32) -> Result<()> + Sync,
) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let work = &work;
                scope.spawn(move || work(address, number).map_err(|error| error.to_string()))
            })
            .collect();
        begun()?;
        threads.into_iter().try_for_each(|thread| Ok(thread.join().map_err(|_| "a thread panicked")??))
    })
}

fn open_and_close(address: &Address, number: u32) -> Result<()> {
    let client = Client::connect_to(address)?;
    let channel = format!("flood/{}/{number}", std::process::id());
    loop {
        let mut sender = client.sender(&channel).slot_size(SLOT).slots(SLOTS).wait(Wait::Block).open()?;
        let mut receiver = client.receiver(&channel).wait(Wait::Block).open()?;
        link(&mut sender, &mut receiver)?;
    }
}

/// Connects again and again: threads wait while the queue is full, or try again at once, by turns.
fn connect_and_leave(address: &Address, number: u32) -> Result<()> {
    let name = address.to_kernel()?;
    loop {
        let connected = match number % 2 {
            0 => PacketSocket::connect(&name, SOON),
            _ => PacketSocket::connect_at_once(&name),
        };
        let socket = match connected {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            connected => connected?,
        };
        let _ = socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes());
    }
}
