//! A tokio runtime, and the sockets that it watches.
//!
//! The one file of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    io,
    mem::ManuallyDrop,
    ops::Deref,
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use fbuf_core::{
    process::sys::in_call,
    socket::{Listening, PacketSocket},
};
use nix::sys::{epoll::Epoll, stat::fstat};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};

/// How many descriptors a tokio runtime and a connection take, and some more.
const DESCRIPTORS: usize = 8;

/// A tokio runtime on this thread.
///
/// # Errors
/// There are too few descriptors left, or the kernel refuses one: tokio would panic, since it opens some of them where it
/// cannot fail.
pub fn new() -> io::Result<tokio::runtime::Runtime> {
    new_with(|| {})
}

/// As [`new`], with something to be done each time before it sleeps, and when it is awake.
///
/// # Errors
/// As of [`new`].
pub fn new_with(look: impl Fn() + Clone + Send + Sync + 'static) -> io::Result<tokio::runtime::Runtime> {
    let spare: Result<Vec<_>, _> = (0..DESCRIPTORS).map(|_| nix::sys::eventfd::EventFd::new()).collect();
    drop(spare.map_err(|error| match error {
        nix::errno::Errno::EMFILE => io::Error::other(format!(
            "fewer than {DESCRIPTORS} descriptors are left to this process: raise its limit (RLIMIT_NOFILE, ulimit -n)"
        )),
        error => in_call("eventfd2")(error),
    })?);
    // So does what waits for signals, if a program has that of tokio.
    drop(UnixStream::pair().map_err(in_call("socketpair"))?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(look.clone())
        .on_thread_unpark(look)
        .build();
    runtime.map_err(in_call("epoll_create1, epoll_ctl or eventfd2, for a tokio runtime"))
}

/// What the tokio runtime of a thread watches. It is lent out, and never to be changed: what took its place would be
/// watched under a number that may be that of something else.
///
/// ```compile_fail,E0596
/// fn exchange(watched: &mut fbuf_protocol::runtime::Watched<fbuf_core::socket::PacketSocket>) {
///     let _ = watched.get_mut();
/// }
/// ```
///
/// If other code of the program has closed its descriptor, it is leaked when it is dropped: the number may be that of another file.
#[derive(Debug)]
pub struct Watched<T: AsRawFd> {
    watched: ManuallyDrop<AsyncFd<T>>,
    /// The device and the inode of its file.
    file: Option<(u64, u64)>,
}

impl<T: AsRawFd> Watched<T> {
    fn new(watched: AsyncFd<T>) -> Self {
        let file = file_of(watched.as_raw_fd());
        Self { watched: ManuallyDrop::new(watched), file }
    }
}

impl<T: AsRawFd> Drop for Watched<T> {
    fn drop(&mut self) {
        if self.file.is_some() && file_of(self.watched.as_raw_fd()) == self.file {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.watched) }
        }
    }
}

fn file_of(number: RawFd) -> Option<(u64, u64)> {
    // SAFETY: it is asked which file it is, and whether it is any.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    fstat(descriptor).ok().map(|found| (found.st_dev, found.st_ino))
}

impl<T: AsRawFd> Deref for Watched<T> {
    type Target = AsyncFd<T>;
    fn deref(&self) -> &AsyncFd<T> {
        &self.watched
    }
}

/// Has the tokio runtime of this thread watch a socket.
///
/// # Errors
/// This thread has no tokio runtime; what epoll_ctl(2) says.
///
/// # Panics
/// The runtime has no I/O ([`new`] has).
pub fn watch(socket: PacketSocket) -> io::Result<Watched<PacketSocket>> {
    check()?;
    // SAFETY: a PacketSocket returns the same descriptor each time, and owns it until it is dropped, which is after it is
    // watched no more (`Watched`).
    Ok(Watched::new(unsafe { AsyncFd::register(socket) }.map_err(in_call("epoll_ctl"))?))
}

/// Has the tokio runtime of this thread watch a listening socket.
///
/// # Errors
/// This thread has no tokio runtime; what epoll_ctl(2) says.
///
/// # Panics
/// The runtime has no I/O ([`new`] has).
pub fn watch_listener(listener: Listening) -> io::Result<Watched<Listening>> {
    check()?;
    // SAFETY: a Listening returns the same descriptor each time, and owns it until it is dropped, which is after it is
    // watched no more (`Watched`).
    Ok(Watched::new(
        unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }.map_err(in_call("epoll_ctl"))?,
    ))
}

/// An epoll that others add to while it is watched.
#[derive(Debug)]
pub struct SharedEpoll(Arc<Epoll>);

impl AsRawFd for SharedEpoll {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

/// Has the tokio runtime of this thread watch an epoll.
///
/// # Errors
/// This thread has no tokio runtime; what epoll_ctl(2) says.
///
/// # Panics
/// The runtime has no I/O ([`new`] has).
pub fn watch_epoll(epoll: Arc<Epoll>) -> io::Result<Watched<SharedEpoll>> {
    check()?;
    // SAFETY: a SharedEpoll returns the same descriptor each time, and keeps it until it is dropped, which is after it is
    // watched no more (`Watched`): an Epoll that is shared cannot be exchanged.
    Ok(Watched::new(
        unsafe { AsyncFd::register_with_interest(SharedEpoll(epoll), Interest::READABLE) }
            .map_err(in_call("epoll_ctl"))?,
    ))
}

/// Whether there is a runtime that watches.
fn check() -> io::Result<()> {
    Handle::try_current().map(drop).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_runtime_to_watch_is_an_error() {
        let (own, _its) = PacketSocket::pair().unwrap();
        let own = PacketSocket::new(own).unwrap();
        let epoll = Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        assert!(watch(own).is_err() && watch_epoll(Arc::new(epoll)).is_err());
    }
}
