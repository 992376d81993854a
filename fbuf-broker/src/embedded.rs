//! A broker inside a process: the same one, on a thread of its own, for tests, examples and programs
//! that bring their own.

use std::{io, sync::mpsc, thread};

use fbuf_core::process::{fork::Generation, sys, threads};
use fbuf_protocol::{address::Address, runtime};
use tokio::sync::oneshot;

use crate::{Broker, Listener, Policy};

/// A broker that runs on a thread of this process until it is dropped.
///
/// Without a given address it listens at a random name in the abstract namespace (unix(7)), so that
/// nothing is left behind in any file system however the process ends. Children of this process can
/// be given [`Embedded::address`]. Any process can take an abstract name over when its owner has ended; clients look which
/// user listens there, and connect to no other user's than before.
///
/// ```
/// let broker = fbuf_broker::Embedded::start()?;
/// println!("connect to {}", broker.address());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Embedded {
    generation: Generation,
    broker: Broker,
    address: Address,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Embedded {
    /// Starts a broker at a random address. It accepts clients when this returns.
    ///
    /// # Errors
    /// When there is no descriptor, thread or socket to be had.
    pub fn start() -> io::Result<Self> {
        Self::start_with(Policy::own())
    }

    /// As [`Self::start`], with a policy.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(policy: Policy) -> io::Result<Self> {
        let random = u128::from_ne_bytes(sys::random()?);
        let name = format!("@fbuf-{}-{random:032x}", std::process::id());
        Self::start_at(Address::new(name), policy)
    }

    /// Starts a broker at this address, with a policy. It accepts clients when this returns.
    ///
    /// # Errors
    /// As [`Listener::bind`] and [`Self::start`].
    pub fn start_at(address: Address, policy: Policy) -> io::Result<Self> {
        let listener = Listener::bind(&address).map_err(io::Error::other)?;
        if policy.is_about_others_than(nix::unistd::geteuid().as_raw()) {
            listener.open_to_all()?;
        }
        let broker = Broker::new(policy);
        let serving = broker.clone();
        let (stop, stopped) = oneshot::channel();
        let (started, start) = mpsc::sync_channel(1);
        // The caller may itself be run by a runtime, in which no other may be run or dropped.
        let thread = threads::spawn("fbuf-broker", move || {
            let runtime = match runtime::new() {
                Ok(runtime) => runtime,
                Err(error) => return drop(started.send(Err(error))),
            };
            // The caller waits for it.
            let _ = started.send(Ok(()));
            let until = async {
                // An error is a handle that was dropped, which means the same.
                let _ = stopped.await;
            };
            if let Err(error) = runtime.block_on(serving.serve(&listener, until)) {
                tracing::error!(%error, "the embedded broker ends");
            }
        })?;
        start.recv().map_err(io::Error::other)??;
        Ok(Self { generation: Generation::current(), broker, address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// From now on another policy is in force. What was allowed stays; what is allowed only now will be linked.
    pub fn set_policy(&self, policy: Policy) {
        self.broker.set_policy(policy);
    }

    /// The broker itself, for tests that look into it.
    #[doc(hidden)]
    #[must_use]
    pub fn broker(&self) -> &Broker {
        &self.broker
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if !self.generation.is_current() {
            // It is the broker of the process that this one was forked from.
            return std::mem::forget((self.stop.take(), self.thread.take()));
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in there was reported by the thread itself.
            let _ = thread.join();
        }
    }
}
