//! How a call that waits is made to return: by a handle, or by a signal handler that ran meanwhile.

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use fbuf_core::process::fork::Generation;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

/// Interrupts calls that wait: those of the [`Receiver`](crate::Receiver) or [`Sender`](crate::Sender) that has made this
/// handle, from another thread or from a signal handler.
///
/// The call that waits, or else the next one that would wait, returns its `Interrupted` error, once; several interrupts
/// before that are one. Nothing is lost, and the call can be made again. A call that finds at once what it asks for does not
/// look for interrupts. Calls that wait are
/// - [`Receiver::get`](crate::Receiver::get) and [`get_timeout`](crate::Receiver::get_timeout);
/// - [`Sender::allocate`](crate::Sender::allocate), [`wait_for_receivers`](crate::Sender::wait_for_receivers),
///   [`wait_for_returns`](crate::Sender::wait_for_returns), and what they are with a timeout, which begins anew with each
///   call;
/// - [`ClientBuilder::connect`](crate::ClientBuilder::connect), if it [waits for a
///   broker](crate::ClientBuilder::wait_for_broker), which has a handle of its own.
///
/// [`poll`](crate::poll()) fails with [`Interrupted`](std::io::ErrorKind::Interrupted) if one of its endpoints was interrupted.
/// An event loop that waits for the endpoint's descriptor ([`prepare_wait`](crate::Receiver::prepare_wait)) wakes as well.
///
/// Once its endpoint is dropped, a handle does nothing. Neither does the copy of it that a forked child has.
///
/// # Signal handlers
///
/// [`interrupt`](Self::interrupt) is async-signal-safe. This library installs no handler for it; a program does, or a crate
/// such as `signal-hook`:
///
/// ```
/// use std::sync::{OnceLock, atomic::{AtomicBool, Ordering}};
/// use fbuf_client::{GetError, InterruptHandle};
///
/// static STOP: AtomicBool = AtomicBool::new(false);
/// static WAITING: OnceLock<InterruptHandle> = OnceLock::new();
///
/// extern "C" fn stop(_signal: i32) { // the handler of SIGINT and SIGTERM
///     STOP.store(true, Ordering::Relaxed);
///     if let Some(handle) = WAITING.get() {
///         handle.interrupt();
///     }
/// }
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let mut receiver = client.receiver("numbers").open()?;
/// WAITING.get_or_init(|| receiver.interrupt_handle());
/// # stop(2);
/// while !STOP.load(Ordering::Relaxed) {
///     match receiver.get() {
///         Ok(message) => println!("{} bytes", message.len()),
///         Err(GetError::Interrupted) => {} // by this handler, or by another
///         Err(error) => return Err(error.into()),
///     }
/// }
/// # assert_eq!(receiver.get().unwrap_err(), GetError::Interrupted);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A handler that only sets a flag interrupts as well, whether it was installed with `SA_RESTART` or without, but only if it runs
/// on the thread that waits, and while that thread sleeps. It does not if it runs on another thread, in the moment before the call
/// sleeps, or while the call spins, as it always does with [`Wait::Spin`](crate::Wait::Spin). A handle interrupts in all of
/// these cases.
///
/// Nothing else interrupts: no signal that is ignored, and not that the process was stopped, frozen or traced. A program
/// that has neither handlers nor handles never gets an `Interrupted` error.
#[derive(Debug, Clone)]
pub struct InterruptHandle(Arc<Interrupt>);

#[derive(Debug)]
struct Interrupt {
    is_pending: AtomicBool,
    generation: Generation,
    /// What the endpoint sleeps on.
    wake: Arc<EventFd>,
}

impl InterruptHandle {
    /// Of a connection that is not made yet.
    pub(crate) fn of_connection() -> io::Result<Self> {
        Ok(Self::new(Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)))
    }

    /// Of an endpoint that sleeps until this is written to.
    pub(crate) fn new(wake: Arc<EventFd>) -> Self {
        Self(Arc::new(Interrupt { is_pending: AtomicBool::new(false), generation: Generation::current(), wake }))
    }

    /// Has the call that waits, or the next one that would wait, return its `Interrupted` error. What was stored before can be
    /// loaded after that.
    ///
    /// It is async-signal-safe: it stores an atomic and writes to an eventfd(2) that never blocks, takes no lock, allocates
    /// nothing, and leaves `errno` as it is. To clone and to drop a handle is not.
    pub fn interrupt(&self) {
        let errno = Errno::last_raw();
        if self.0.generation.is_current() {
            self.raise();
            // A counter that is full wakes as well.
            let _ = self.0.wake.write(1);
        }
        Errno::set_raw(errno);
    }

    /// The same, for an endpoint that is awake.
    pub(crate) fn raise(&self) {
        // Partner: the swap in `take`.
        self.0.is_pending.store(true, Ordering::Release);
    }

    /// Sleeps until [`Self::wake`], or an interrupt; a signal handler that runs meanwhile is one.
    pub(crate) fn sleep(&self) {
        let mut polled = [PollFd::new(self.0.wake.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::NONE) {
            Err(Errno::EINTR) => self.raise(),
            // It may not poll a single descriptor (RLIMIT_NOFILE is 0), and looks again and again.
            Err(_) => thread::yield_now(),
            // Empty already is as well.
            Ok(_) => drop(self.0.wake.read()),
        }
    }

    /// Ends the sleep.
    pub(crate) fn wake(&self) {
        // A counter that is full wakes as well.
        let _ = self.0.wake.write(1);
    }

    /// Whether there was an interrupt since the last time.
    pub(crate) fn take(&self) -> bool {
        // Acquire: the partner is the store in `raise`.
        self.0.is_pending.load(Ordering::Relaxed) && self.0.is_pending.swap(false, Ordering::Acquire)
    }
}
