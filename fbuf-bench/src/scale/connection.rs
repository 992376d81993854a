//! Connections to a broker over which anything is said, packet by packet.

use std::os::fd::AsFd;

use fbuf_client::Address;
use fbuf_core::{
    introduced::Introduction,
    limits::MAX_MESSAGE,
    process::foreign::Foreign,
    socket::{Arrival, PacketSocket, wire},
};
use fbuf_protocol::{Call, ControlRequest, ControlResponse, Greeting, VERSION, Verdict};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::SOON;
use crate::Result;

/// How many are several.
const SEVERAL: usize = 16;

/// A connection, unless the broker will not have it.
pub(super) fn greet(address: &Address) -> Result<Option<PacketSocket>> {
    let socket = PacketSocket::connect(&address.to_kernel()?, SOON)?;
    // It may have been sent away already.
    let _ = socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes());
    let Some((answer, _)) = wait_for(&socket)? else { return Ok(None) };
    let welcome = Greeting::from_bytes(&answer).is_ok_and(|greeting| greeting.verdict == Verdict::Welcome);
    Ok(welcome.then_some(socket))
}

/// Several connections.
pub(super) fn several(address: &Address) -> Result<Vec<PacketSocket>> {
    (0..SEVERAL).map(|_| greet(address)?.ok_or_else(|| "sent away".into())).collect()
}

/// The next message of a socket; none if it hung up.
pub(super) fn wait_for(socket: &PacketSocket) -> Result<Option<(Vec<u8>, Vec<Foreign>)>> {
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

/// Sends a request, and waits for the answer.
pub(super) fn request(socket: &PacketSocket, id: u64, body: ControlRequest) -> Result<ControlResponse> {
    send(socket, id, body)??;
    let (bytes, descriptors) = wait_for(socket)?.ok_or("the broker hung up")?;
    Ok(wire::decode::<(u64, std::result::Result<ControlResponse, String>)>(&bytes, descriptors)?.1?)
}

/// The next introductions of a client that has read all that came before the receipt.
pub(super) fn introductions(socket: &PacketSocket, receipt: &mut u64) -> Result<Vec<Introduction>> {
    let ControlResponse::News(news) = request(socket, 0, ControlRequest::News { receipt: *receipt })? else {
        return Err("no news".into());
    };
    *receipt = news.receipt;
    Ok(news.introductions)
}

/// Sends as many requests as the sockets take, for ever.
pub(super) fn ask(connections: &[PacketSocket], request: impl Fn(u64) -> ControlRequest) -> Result<()> {
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
