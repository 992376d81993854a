//! A listening socket.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use crate::process::{
    deferred::{Cause, DeferredDrop, Slow},
    fork::Withheld,
    sys,
};

/// A listening socket. No descriptors can be sent over its connections, where [the kernel can refuse
/// them](sys::refuse_descriptors). Where it cannot, another thread closes it: connections may wait that have some.
#[derive(Debug)]
pub struct Listening(DeferredDrop<Queue>);

#[derive(Debug)]
struct Queue(Withheld<OwnedFd>);

impl Slow for Queue {
    fn cause(&mut self) -> Option<Cause> {
        // Processes of any user may have connected.
        (!sys::refuses_descriptors(self.0.as_fd())).then_some(Cause::Peer(None))
    }
}

impl From<OwnedFd> for Listening {
    fn from(socket: OwnedFd) -> Self {
        // A kernel before 6.16 cannot.
        let _ = sys::refuse_descriptors(socket.as_fd());
        Self(Queue(socket.into()).into())
    }
}

impl Listening {
    /// Another descriptor of it.
    ///
    /// # Errors
    /// When there is none left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(self.as_fd().try_clone_to_owned()?.into())
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> i32 {
        self.0.0.as_raw_fd()
    }
}
