//! Sockets that a service manager has opened: sd_listen_fds(3). So a broker without a network can be asked for its
//! metrics over one.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsFd, OwnedFd},
};

use fbuf_broker::Listener;
use listenfd::ListenFd;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc::{AF_UNIX, SOCK_SEQPACKET},
};

use crate::Failure;

#[derive(Debug, Default)]
pub(super) struct Handed {
    /// The one at which clients connect.
    pub(super) clients: Option<Listener>,
    /// Those at which metrics are asked for.
    pub(super) metrics: Vec<TcpListener>,
}

impl Handed {
    /// Takes them all.
    pub(super) fn take() -> Result<Self, Failure> {
        let (mut sockets, mut handed) = (ListenFd::from_env(), Self::default());
        let unusable = |error| Failure::new(format!("a socket was handed over that a broker cannot use: {error}"));
        for index in 0..sockets.len() {
            if let Ok(Some(metrics)) = sockets.take_tcp_listener(index) {
                set_nonblocking(&metrics).map_err(unusable)?;
                handed.metrics.push(metrics);
                continue;
            }
            let kind = "sequential-packet Unix socket for clients (ListenSequentialPacket=) or TCP socket for metrics \
                        (ListenStream=)";
            let socket = sockets.take_custom::<OwnedFd>(index, AF_UNIX, SOCK_SEQPACKET, kind).map_err(unusable)?;
            let Some(socket) = socket else { continue };
            if handed.clients.is_some() {
                return Err(Failure::new("two sockets for clients were handed over, and a broker serves one"));
            }
            set_nonblocking(&socket).map_err(unusable)?;
            handed.clients = Some(Listener::inherited(socket).map_err(unusable)?);
        }
        Ok(handed)
    }
}

/// Not by ioctl(2), as the standard library does, which the broker's unit denies.
pub(super) fn set_nonblocking(socket: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
