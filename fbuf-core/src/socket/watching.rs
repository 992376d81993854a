//! The socket of a link as other code may have it: to watch it.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Weak},
};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::PacketSocket;
use crate::process::sys::in_call;

/// The socket of a link, which can be watched by epoll(7), and with which nothing else can be done. A socket that other
/// code could shut down or read from would have the peer believe that this process has ended: a sender would use slots
/// again that are read here.
///
/// So neither half of a link lends its descriptor:
///
/// ```compile_fail,E0599
/// use std::os::fd::AsFd;
///
/// fn shut_down(link: &fbuf_core::receive::link::Inbound) {
///     let _ = nix::sys::socket::shutdown(link.as_fd(), nix::sys::socket::Shutdown::Both);
/// }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct LinkSocket<'a>(pub(super) &'a PacketSocket);

impl LinkSocket<'_> {
    /// Has an epoll tell of these events, with this data, until the link is dropped; but for what was received over it
    /// and is held: to be [ended](Self::unwatch) before.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn watch(self, epoll: &Arc<Epoll>, events: EpollFlags, data: u64) -> io::Result<()> {
        // Locked before it is known which descriptor is watched.
        let mut watchers = self.0.0.watchers();
        let watch = Watch { epoll: Arc::downgrade(epoll), events, data };
        watch.begin(self.0.0.fd())?;
        watchers.push(watch);
        Ok(())
    }

    /// Ends that.
    ///
    /// # Errors
    /// What epoll_ctl(2) says; also that it was not watched.
    pub fn unwatch(self, epoll: &Arc<Epoll>) -> io::Result<()> {
        let mut watchers = self.0.0.watchers();
        watchers.retain(|watch| !std::ptr::eq(watch.epoll.as_ptr(), Arc::as_ptr(epoll)));
        Ok(epoll.delete(self.0.0.fd())?)
    }
}

/// That an epoll tells of a socket.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: Weak<Epoll>,
    events: EpollFlags,
    data: u64,
}

impl Watch {
    pub(super) fn begin(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let Some(epoll) = self.epoll.upgrade() else { return Ok(()) };
        epoll.add(socket, EpollEvent::new(self.events, self.data)).map_err(in_call("epoll_ctl"))
    }

    pub(super) fn end(&self, socket: BorrowedFd<'_>) {
        if let Some(epoll) = self.epoll.upgrade() {
            // What it does not watch it has no more to say of.
            let _ = epoll.delete(socket);
        }
    }
}
