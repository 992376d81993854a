//! A tokio runtime, and the sockets that it watches.
//!
//! The one file of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    io,
    mem::ManuallyDrop,
    ops::Deref,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use fbuf_core::{
    process::sys::in_call,
    socket::{Listening, PacketSocket},
};
use nix::{
    errno::Errno,
    sys::{epoll::Epoll, eventfd::EventFd, stat::fstat},
};
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
    drop(spare()?);
    // So does what waits for signals, if a program has that of tokio.
    drop(UnixStream::pair().map_err(in_call("socketpair"))?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(look.clone())
        .on_thread_unpark(look)
        .build();
    runtime.map_err(in_call("epoll_create1, epoll_ctl or eventfd2, for a tokio runtime"))
}

/// As many descriptors as a runtime needs, none of them of any use.
fn spare() -> io::Result<Vec<EventFd>> {
    let spare: Result<_, _> = (0..DESCRIPTORS).map(|_| EventFd::new()).collect();
    spare.map_err(|error| match error {
        Errno::EMFILE => io::Error::other(format!(
            "fewer than {DESCRIPTORS} descriptors are left to this process: raise its limit (RLIMIT_NOFILE, ulimit -n)"
        )),
        error => in_call("eventfd2")(error),
    })
}

/// A number, and the file that it was the descriptor of.
#[derive(Debug, Clone, Copy)]
struct Known {
    number: RawFd,
    /// The device and the inode, if the kernel said.
    file: Option<(u64, u64)>,
}

impl Known {
    fn of(number: RawFd) -> Self {
        Self { number, file: file_of(number).ok() }
    }

    /// Whether the number is that of the same file still. If the kernel refuses to say, as for a seccomp filter, it is.
    fn is_open(self) -> bool {
        match file_of(self.number) {
            Ok(found) => self.file.is_none_or(|file| file == found),
            Err(error) => error != Errno::EBADF,
        }
    }
}

fn file_of(number: RawFd) -> nix::Result<(u64, u64)> {
    // SAFETY: it is asked which file it is, and whether it is any.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    fstat(descriptor).map(|found| (found.st_dev, found.st_ino))
}

/// A descriptor by which it is seen whether other code of the program has closed descriptors that are not its own, as closefrom(3)
/// does, whatever has their numbers now.
///
/// It is a socket, which has an inode of its own: all epolls and eventfds share one. It has a higher number than a runtime and a
/// connection get that are made next, so that what is closed from some number on is closed with it.
#[derive(Debug)]
pub struct Witness {
    socket: ManuallyDrop<OwnedFd>,
    known: Known,
}

impl Witness {
    /// # Errors
    /// There are too few descriptors left, or the kernel refuses one.
    pub fn new() -> io::Result<Self> {
        let below = spare()?;
        let (socket, _) = UnixStream::pair().map_err(in_call("socketpair"))?;
        drop(below);
        let known = Known::of(socket.as_raw_fd());
        Ok(Self { socket: ManuallyDrop::new(socket.into()), known })
    }

    /// Whether it is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.known.is_open()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        if self.is_open() {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.socket) }
        }
    }
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
    /// What is closed if it is.
    known: Known,
}

impl<T: AsRawFd> Watched<T> {
    /// Of a descriptor that has an inode of its own.
    fn new(watched: AsyncFd<T>) -> Self {
        let known = Known::of(watched.as_raw_fd());
        Self { watched: ManuallyDrop::new(watched), known }
    }
}

impl<T: AsRawFd> Drop for Watched<T> {
    fn drop(&mut self) {
        if self.known.is_open() {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.watched) }
        }
    }
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
pub struct SharedEpoll {
    epoll: Arc<Epoll>,
    /// Open for as long as it is asked.
    _witness: Arc<Witness>,
}

impl AsRawFd for SharedEpoll {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

/// Has the tokio runtime of this thread watch an epoll, which is closed if the witness is.
///
/// # Errors
/// This thread has no tokio runtime; what epoll_ctl(2) says.
///
/// # Panics
/// The runtime has no I/O ([`new`] has).
pub fn watch_epoll(epoll: Arc<Epoll>, witness: Arc<Witness>) -> io::Result<Watched<SharedEpoll>> {
    check()?;
    let known = witness.known;
    // SAFETY: a SharedEpoll returns the same descriptor each time, and keeps it until it is dropped, which is after it is
    // watched no more (`Watched`): an Epoll that is shared cannot be exchanged.
    let watched =
        unsafe { AsyncFd::register_with_interest(SharedEpoll { epoll, _witness: witness }, Interest::READABLE) };
    Ok(Watched { watched: ManuallyDrop::new(watched.map_err(in_call("epoll_ctl"))?), known })
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
        assert!(watch(own).is_err() && watch_epoll(Arc::new(epoll), Arc::new(Witness::new().unwrap())).is_err());
    }
}
