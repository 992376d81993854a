//! What a process does that gives the broker as much to do as it can.

use std::{io, thread};

use fbuf_client::{Address, Client, Wait};
use fbuf_core::socket::PacketSocket;
use fbuf_protocol::{ControlRequest, Greeting, Report, Resource, VERSION, Verdict};

use super::{
    SLOT, SLOTS, SOON,
    connection::{ask, several},
    crowd::link,
    hoard::{hoard, more},
    hostile_sender,
    neighbour::Kind,
};
use crate::{Result, pair::Line};

/// Threads that spin, or open and close endpoints or connections.
const THREADS: u32 = 4;

/// Is the process, until it is killed.
pub(crate) fn be() -> Result<()> {
    let line = Line::of_this_process()?;
    let (address, kind): (String, Kind) = line.hear()?;
    let address = Address::new(&address);
    let begun = || line.tell(&Ok::<(), String>(()));
    // What is not there cannot be closed, which is the least that can be asked for.
    let close = |id| ControlRequest::Close { endpoint: id, last: Report::default() };
    match kind {
        Kind::Spins => in_threads(&address, begun, |_, _| {
            loop {
                std::hint::spin_loop();
            }
        }),
        Kind::Asks => {
            let connections = several(&address)?;
            begun()?;
            ask(&connections, close)
        }
        Kind::Opens => in_threads(&address, begun, open_and_close),
        Kind::Connects => in_threads(&address, begun, connect_and_leave),
        Kind::Hoards(resource) => {
            let connections = hoard(&address, resource)?;
            begun()?;
            // More of what there is no more of.
            ask(&connections, |id| more(resource, id))
        }
        Kind::Refills(_) | Kind::Rings(_) => hostile_sender::be(&address, kind, begun),
        Kind::Knocks => {
            let _connections = hoard(&address, Resource::Connections)?;
            in_threads(&address, begun, connect_and_leave)
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
