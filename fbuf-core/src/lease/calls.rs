//! The calls by which leases are taken, and their ends heard of: F_SETLEASE, F_SETOWN_EX and F_SETSIG of
//! fcntl(2), and signalfd(2) for a real-time signal, for which there is no safe wrapper.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::unistd::{Pid, gettid};

/// A request to the lease of a file (F_SETLEASE in fcntl(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Lease {
    /// Be told before anybody opens the file for writing, and hold that opening up.
    Read = libc::F_RDLCK,
    /// Give the lease up.
    Release = libc::F_UNLCK,
}

/// Takes or gives up a lease on the file behind a read-only descriptor.
///
/// The holder of a lease is told of its end by a signal that kills by default: call
/// [`Breaks::are_for`] before each [`Lease::Read`].
///
/// # Errors
/// `WouldBlock`: for [`Lease::Read`], while the file is open for writing anywhere (the descriptor that
/// memfd_create(2) returned and its mappings are not counted, although they write); for
/// [`Lease::Release`], if there is none. What else fcntl(2) says.
pub fn lease(file: BorrowedFd<'_>, request: Lease) -> io::Result<()> {
    // SAFETY: F_SETLEASE takes a number, and changes no memory of this process.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, request as libc::c_int) }).map(drop)
}

/// Whether a read lease is held, and nobody has begun to break it.
#[must_use]
pub(crate) fn is_leased(file: BorrowedFd<'_>) -> bool {
    // SAFETY: F_GETLEASE takes nothing, and changes no memory of this process.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) == libc::F_RDLCK }
}

/// F_SETOWN_EX, F_OWNER_TID and F_SETSIG of linux/fcntl.h, which the libc crate has for few machines.
const SET_OWNER: libc::c_int = 15;
const THREAD: libc::c_int = 0;
const SET_SIGNAL: libc::c_int = 10;

/// `struct f_owner_ex` of linux/fcntl.h.
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    id: libc::pid_t,
}

/// Which leases of one thread are about to be broken, in the order in which that began.
///
/// Told by a real-time signal that goes to that one thread, which blocks it, and so to no handler of this
/// process.
#[derive(Debug)]
pub struct Breaks {
    thread: Pid,
    signals: OwnedFd,
}

/// The third but last of the real-time signals: those at either end are the ones that others use.
fn signal() -> libc::c_int {
    libc::SIGRTMAX() - 2
}

impl Breaks {
    /// For leases that this thread hears of. It blocks all signals from here on.
    ///
    /// # Errors
    /// What signalfd(2) says.
    pub fn here() -> io::Result<Self> {
        // SAFETY: the sets are plain memory that is initialised before it is used; blocking signals
        // concerns this thread alone.
        let signals = unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigfillset(&raw mut set);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal());
            let raw = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
            // The kernel has just made it for us and told nobody else.
            OwnedFd::from_raw_fd(raw)
        };
        Ok(Self { thread: gettid(), signals })
    }

    /// The thread.
    #[must_use]
    pub fn thread(&self) -> Pid {
        self.thread
    }

    /// Has such a thread hear of the lease that will be taken through this descriptor. The kernel forgets
    /// it whenever the lease is given up.
    ///
    /// # Errors
    /// What fcntl(2) says of F_SETOWN_EX and F_SETSIG.
    pub fn are_for(thread: Pid, file: BorrowedFd<'_>) -> io::Result<()> {
        let owner = Owner { kind: THREAD, id: thread.as_raw() };
        // SAFETY: F_SETOWN_EX only reads the structure, which lives here and is laid out as it wants.
        check(unsafe { libc::fcntl(file.as_raw_fd(), SET_OWNER, &raw const owner) })?;
        // SAFETY: F_SETSIG takes a number.
        check(unsafe { libc::fcntl(file.as_raw_fd(), SET_SIGNAL, signal()) }).map(drop)
    }

    /// The descriptor of the next, if there is one; in the thread it was made in.
    pub fn next(&self) -> Option<RawFd> {
        const SIZE: usize = size_of::<libc::signalfd_siginfo>();
        // SAFETY: all-zero is a valid one, which holds nothing but numbers.
        let mut heard: libc::signalfd_siginfo = unsafe { mem::zeroed() };
        // SAFETY: `heard` lives here and has so many bytes.
        let count = unsafe { libc::read(self.signals.as_raw_fd(), (&raw mut heard).cast(), SIZE) };
        (count == SIZE as isize).then_some(heard.ssi_fd)
    }
}

impl AsFd for Breaks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
