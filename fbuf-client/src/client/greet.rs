//! Connecting: the first packet each way, which every version understands.

use std::{
    io,
    time::{Duration, Instant},
};

use fbuf_core::{
    address::Address,
    control::{Greeting, VERSION, Verdict},
    points,
    socket::{Arrival, PacketSocket, means_gone},
    sys,
};
use nix::errno::Errno;
use tokio::{
    io::unix::AsyncFd,
    time::{sleep, timeout},
};

use super::{ConnectError, PATIENCE};

/// How long to wait before a broker is asked again whose queue was full.
const PAUSE: Duration = Duration::from_millis(5);

/// Connects, and exchanges greetings.
pub(super) async fn greet(address: &Address) -> Result<AsyncFd<PacketSocket>, ConnectError> {
    let no_broker = |source| ConnectError::NoBroker { address: address.clone(), source };
    let not_a_broker = |found: &str| ConnectError::NotABroker { address: address.clone(), found: found.into() };
    let socket = connect(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => not_a_broker("it does not accept connections"),
        _ if error.raw_os_error() == Some(Errno::EPROTOTYPE as i32) => not_a_broker("its socket is of another type"),
        _ => no_broker(error),
    })?;
    match socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()) {
        // It may have sent this client away already, and said why.
        Err(error) if !means_gone(&error) => return Err(no_broker(error)),
        _ => {}
    }
    points::reach("attach: connected");
    let socket = sys::watch(socket)?;
    let Ok(answer) = timeout(PATIENCE, answer(&socket)).await else { return Err(not_a_broker("it does not greet")) };
    let bytes = match answer? {
        Arrival::Message(bytes, _) => bytes,
        Arrival::HangUp => return Err(not_a_broker("it hangs up")),
        _ => return Err(not_a_broker("its greeting is too long")),
    };
    let Greeting { version, verdict } =
        Greeting::from_bytes(&bytes).map_err(|error| not_a_broker(&error.to_string()))?;
    let (address, uid) = (address.clone(), nix::unistd::geteuid().as_raw());
    match verdict {
        Verdict::Welcome => Ok(socket),
        Verdict::OtherVersion => Err(ConnectError::OtherVersion { address, broker: version }),
        Verdict::NotPermitted => Err(ConnectError::NotPermitted { address, uid }),
        Verdict::Full => Err(ConnectError::Full { address }),
        Verdict::Spent => Err(ConnectError::Spent { address, uid }),
    }
}

/// Connects, and waits for a place in the queue.
async fn connect(address: &Address) -> io::Result<PacketSocket> {
    let (name, deadline) = (address.to_kernel()?, Instant::now() + PATIENCE);
    loop {
        match PacketSocket::connect_at_once(&name) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => sleep(PAUSE).await,
            result => return result,
        }
    }
}

/// What comes first.
async fn answer(socket: &AsyncFd<PacketSocket>) -> io::Result<Arrival> {
    loop {
        let mut ready = socket.readable().await?;
        match socket.get_ref().receive::<64>()? {
            Arrival::Nothing => ready.clear_ready(),
            arrival => return Ok(arrival),
        }
    }
}
