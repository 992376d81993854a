//! The thread of a process that hears when a lease is about to be broken, and serves it.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::leased::LeasedSlot;
use crate::process::sys::in_call;
use crate::process::{
    fork::{ForkMutex, Generation, Rank},
    lease::{BreakSignal, Breaks, Told},
    threads,
};

/// How often it looks at all leases, because a signal may have found no room in the kernel's queue
/// (RLIMIT_SIGPENDING), in milliseconds: well below fs.lease-break-time.
const ROUND: u16 = 1000;
/// How soon it tries again to make a copy for which there was no memory, in milliseconds.
const AGAIN: u16 = 20;

/// The slots of which it keeps the leases, by descriptor.
type Register = Arc<Mutex<HashMap<RawFd, Weak<LeasedSlot>>>>;

/// There while any slot is.
#[derive(Debug)]
pub(crate) struct LeaseThread {
    told: Told,
    generation: Generation,
    register: Register,
    stop: Arc<EventFd>,
    handle: Option<JoinHandle<()>>,
}

/// The one of this process, while there is one.
pub(crate) static CURRENT: ForkMutex<Weak<LeaseThread>> = ForkMutex::new(Rank::Leases, Mutex::new(Weak::new()), |_| {});

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was locked cannot have left it half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LeaseThread {
    /// The one of this process, which is started if there is none.
    pub(super) fn of_this_process() -> io::Result<Arc<Self>> {
        let mut current = CURRENT.lock();
        if let Some(lease_thread) = current.upgrade().filter(|lease_thread| !lease_thread.is_inherited()) {
            return Ok(lease_thread);
        }
        let lease_thread = Arc::new(Self::start()?);
        *current = Arc::downgrade(&lease_thread);
        Ok(lease_thread)
    }

    fn start() -> io::Result<Self> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(in_call("eventfd2"))?;
        let stop = Arc::new(stop);
        let register = Register::default();
        let (started, start) = mpsc::sync_channel(1);
        let (stopped, slots) = (stop.clone(), register.clone());
        // By what this thread blocks, which the other one does not inherit.
        let signal = BreakSignal::free();
        let handle = threads::spawn("fbuf-leases", move || match Breaks::here(signal) {
            Ok(breaks) => {
                // Whoever started it waits for it.
                let _ = started.send(Ok(breaks.told()));
                keep(&breaks, &stopped, &slots);
            }
            Err(error) => {
                let _ = started.send(Err(in_call("signalfd4")(error)));
            }
        })?;
        let told = start.recv().map_err(io::Error::other)??;
        Ok(Self { told, generation: Generation::current(), register, stop, handle: Some(handle) })
    }

    /// Whether its thread is that of the process that this one was forked from.
    pub(super) fn is_inherited(&self) -> bool {
        !self.generation.is_current()
    }

    /// The thread that hears of broken leases, and how.
    pub(super) fn told(&self) -> Told {
        self.told
    }

    /// Keeps the lease of a slot from now on.
    pub(super) fn add(&self, descriptor: RawFd, slot: Weak<LeasedSlot>) {
        lock(&self.register).insert(descriptor, slot);
    }

    /// Forgets a slot, before its descriptor is closed.
    pub(super) fn remove(&self, descriptor: RawFd) {
        lock(&self.register).remove(&descriptor);
    }
}

impl Drop for LeaseThread {
    fn drop(&mut self) {
        if self.is_inherited() {
            // There is no such thread here.
            return std::mem::forget(self.handle.take());
        }
        // A counter that is full wakes as well.
        let _ = self.stop.write(1);
        // It may be the thread itself that had the last slot in its hands.
        if let Some(handle) = self.handle.take().filter(|handle| handle.thread().id() != thread::current().id()) {
            let _ = handle.join();
        }
    }
}

fn keep(breaks: &Breaks, stop: &EventFd, register: &Register) {
    let mut patience = ROUND;
    loop {
        let mut polled = [PollFd::new(breaks.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        let heard = poll(&mut polled, PollTimeout::from(patience));
        let is_over = match heard {
            Ok(_) => polled[1].any() == Some(true),
            Err(_) => {
                // It may not poll two descriptors any more (RLIMIT_NOFILE), or was told to go on after it was stopped.
                thread::sleep(Duration::from_millis(AGAIN.into()));
                stop.read().is_ok()
            }
        };
        if is_over {
            return;
        }
        let broken = std::iter::from_fn(|| breaks.next());
        let slots: Vec<_> = if matches!(heard, Ok(1..)) {
            broken.filter_map(|raw| lock(register).get(&raw)?.upgrade()).collect()
        } else {
            broken.for_each(drop);
            // The slots must not go while the register is locked, which they are removed from.
            let all: Vec<_> = lock(register).values().cloned().collect();
            all.iter().filter_map(Weak::upgrade).collect()
        };
        let unserved = slots.iter().filter(|slot| !slot.serve()).count();
        patience = if unserved == 0 { ROUND } else { AGAIN };
    }
}
