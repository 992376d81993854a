//! What the standard descriptors were when the process started, and how a process dies of a closed pipe: two things
//! that the standard library hides. Before `main` it puts /dev/null where a standard descriptor is closed, so that no
//! later descriptor takes its number, and it ignores SIGPIPE, so that writing to a closed pipe is an error.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};

use nix::{
    libc,
    sys::signal::{SigHandler, Signal, raise, signal},
};

/// A bit for each standard descriptor that was closed.
static CLOSED: AtomicU8 = AtomicU8::new(0);

// SAFETY: the C library calls each pointer in this section once, on the first thread, before `main`; `note` needs
// nothing that is set up later.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE: extern "C" fn() = note;

extern "C" fn note() {
    for descriptor in 0..3 {
        // SAFETY: F_GETFD takes no pointer, and a number that is no descriptor is what is asked about.
        if unsafe { libc::fcntl(descriptor, libc::F_GETFD) } == -1 {
            // Relaxed: there is no other thread yet.
            CLOSED.fetch_or(1 << descriptor, Ordering::Relaxed);
        }
    }
}

/// Whether this standard descriptor (0, 1 or 2) was closed when the process started.
pub(super) fn was_closed(descriptor: i32) -> bool {
    CLOSED.load(Ordering::Relaxed) & 1 << descriptor != 0
}

/// Whether a signal is ignored, as nohup(1) has it.
pub(crate) fn ignores(which: Signal) -> bool {
    let mut found = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: no new action is given, and all-zero is a valid one, should the old one not be stored.
    let action = unsafe {
        libc::sigaction(which as libc::c_int, std::ptr::null(), found.as_mut_ptr());
        found.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Ends the process as the kernel ends one that does not ignore SIGPIPE. Returns only in a PID namespace's first
/// process, which no signal ends that it has no handler for.
pub(super) fn die_of_closed_pipe() {
    // SAFETY: the default action is no handler.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
    let _ = raise(Signal::SIGPIPE);
}
