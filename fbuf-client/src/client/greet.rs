//! Connecting: the first packet each way, which every version understands.

use std::{
    io,
    time::{Duration, Instant},
};

use fbuf_core::{
    limits::MAX_MESSAGE,
    points,
    process::sys::{in_call, os_error},
    socket::{Arrival, PacketSocket, means_gone, wire},
};
use fbuf_protocol::{
    Greeting, VERSION, Verdict, Wire,
    address::Address,
    runtime::{self, Watched},
};
use nix::errno::Errno;
use tokio::{task::yield_now, time::timeout};

use super::{
    PATIENCE,
    connect::{Accepted, ConnectError},
};

/// For how long this thread waits for a place in the queue of a broker before it looks whether it has other things to
/// do. Threads that wait get places in the order in which they came.
const WAIT: Duration = Duration::from_millis(50);

/// Connects, and exchanges greetings with a broker of a user that is accepted: which one.
pub(super) async fn greet(
    address: &Address,
    accepted: &Accepted,
) -> Result<(Watched<PacketSocket>, u32), ConnectError> {
    let unreachable = |error| ConnectError::Unreachable { address: address.clone(), error };
    let not_a_broker = |found: &str| ConnectError::NotABroker { address: address.clone(), found: found.into() };
    let socket = connect(address).await.map_err(|error| match os_error(&error) {
        Some(Errno::EAGAIN) => not_a_broker("it does not accept connections"),
        Some(Errno::EPROTOTYPE) => not_a_broker("its socket is of another type"),
        Some(Errno::ENOENT | Errno::ECONNREFUSED) => {
            ConnectError::NoBroker { addresses: vec![address.clone()], waited: Duration::ZERO, error }
        }
        _ => unreachable(error),
    })?;
    // Before it is told anything, or believed.
    let user = accepted.check(address, &socket)?;
    match socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()) {
        // It may have sent this client away already, and said why.
        Err(error) if !means_gone(&error) => return Err(unreachable(error)),
        _ => {}
    }
    points::reach("attach: connected");
    let socket = runtime::watch(socket)?;
    let Ok(answer) = timeout(PATIENCE, answer::<64>(&socket)).await else {
        return Err(not_a_broker(
            "it does not greet; it is very busy, or has no descriptor left (RLIMIT_NOFILE), or this user asks it more often \
             than its policy allows",
        ));
    };
    let bytes = match answer? {
        Arrival::Message(bytes, _) => bytes,
        Arrival::HangUp => return Err(not_a_broker("it hangs up")),
        _ => return Err(not_a_broker("its greeting is too long")),
    };
    let Greeting { version, verdict } =
        Greeting::from_bytes(&bytes).map_err(|error| not_a_broker(&error.to_string()))?;
    let (address, uid) = (address.clone(), nix::unistd::geteuid().as_raw());
    match verdict {
        Verdict::Welcome => Ok((socket, user)),
        Verdict::OtherVersion => Err(ConnectError::OtherVersion { address, broker: version }),
        Verdict::NotPermitted => Err(ConnectError::NotPermitted { address, uid }),
        Verdict::Full => Err(ConnectError::Full { address }),
        // What comes behind the greeting was sent with it. A rule of a policy may have a long name.
        Verdict::QuotaExceeded => match timeout(PATIENCE, self::answer::<MAX_MESSAGE>(&socket)).await {
            Ok(Ok(Arrival::Message(bytes, _))) => match wire::decode(&bytes, Vec::new()) {
                Ok(Wire(quota)) => Err(ConnectError::QuotaExceeded { address, quota }),
                Err(_) => Err(not_a_broker("it does not say which quota is spent")),
            },
            _ => Err(not_a_broker("it does not say which quota is spent")),
        },
    }
}

/// Connects, and waits for a place in the queue.
async fn connect(address: &Address) -> io::Result<PacketSocket> {
    let (name, deadline) = (address.to_kernel()?, Instant::now() + PATIENCE);
    loop {
        match PacketSocket::connect(&name, WAIT) {
            Err(error) if is_passing(&error) && Instant::now() < deadline => yield_now().await,
            result => return result,
        }
    }
}

/// Whether the next attempt may succeed: there was no place in the queue, or a signal came.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// What comes first.
async fn answer<const LONGEST: usize>(socket: &Watched<PacketSocket>) -> io::Result<Arrival> {
    loop {
        let mut ready = socket.readable().await?;
        match socket.get_ref().receive::<LONGEST>().map_err(in_call("recvmsg"))? {
            Arrival::Nothing => ready.clear_ready(),
            arrival => return Ok(arrival),
        }
    }
}
