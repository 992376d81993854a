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
    told: Told,
    signals: OwnedFd,
}

/// A signal by which a thread can be told of breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakSignal(libc::c_int);

/// Which thread is told, and by which signal.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    thread: Pid,
    signal: BreakSignal,
}

impl BreakSignal {
    /// One that this process does not use: real-time, neither handled nor ignored, nor blocked by this thread, which may
    /// wait for it (sigwait(3), signalfd(2)). What is sent to the process by such a signal, the thread that is told of breaks
    /// would take too. Those at either end are the ones that others use, so the third but last is the first choice.
    #[must_use]
    pub fn free() -> Self {
        let first = libc::SIGRTMAX() - 2;
        let all = || (libc::SIGRTMIN()..=first).rev();
        let is_default = |signal: &libc::c_int| {
            // SAFETY: all-zero is a valid action, which holds nothing but numbers; the kernel is asked, and nothing changes.
            unsafe {
                let mut action: libc::sigaction = mem::zeroed();
                libc::sigaction(*signal, ptr::null(), &raw mut action) == 0 && action.sa_sigaction == libc::SIG_DFL
            }
        };
        let is_blocked = |signal: &libc::c_int| {
            // SAFETY: all-zero is a valid set; the kernel is asked, and nothing changes.
            unsafe {
                let mut blocked: libc::sigset_t = mem::zeroed();
                libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut blocked);
                libc::sigismember(&raw const blocked, *signal) == 1
            }
        };
        let free = all().find(|signal| is_default(signal) && !is_blocked(signal));
        // A thread that blocks all says nothing of which the process waits for.
        Self(free.or_else(|| all().find(is_default)).unwrap_or(first))
    }
}

impl Breaks {
    /// For leases that this thread hears of. It blocks all signals from here on.
    ///
    /// # Errors
    /// What signalfd(2) says.
    pub fn here(signal: BreakSignal) -> io::Result<Self> {
        // SAFETY: the sets are plain memory that is initialised before it is used; blocking signals
        // concerns this thread alone.
        let signals = unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigfillset(&raw mut set);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal.0);
            let raw = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
            // The kernel has just made it for us and told nobody else.
            OwnedFd::from_raw_fd(raw)
        };
        Ok(Self { told: Told { thread: gettid(), signal }, signals })
    }

    /// The thread, and the signal.
    #[must_use]
    pub fn told(&self) -> Told {
        self.told
    }

    /// Has such a thread hear of the lease that will be taken through this descriptor. The kernel forgets
    /// it whenever the lease is given up.
    ///
    /// # Errors
    /// What fcntl(2) says of F_SETOWN_EX and F_SETSIG.
    pub fn are_for(told: Told, file: BorrowedFd<'_>) -> io::Result<()> {
        let owner = Owner { kind: THREAD, id: told.thread.as_raw() };
        // SAFETY: F_SETOWN_EX only reads the structure, which lives here and is laid out as it wants.
        check(unsafe { libc::fcntl(file.as_raw_fd(), SET_OWNER, &raw const owner) })?;
        // SAFETY: F_SETSIG takes a number.
        check(unsafe { libc::fcntl(file.as_raw_fd(), SET_SIGNAL, told.signal.0) }).map(drop)
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
