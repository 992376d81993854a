//! The broker under load: a process of its own, whose memory is its own.

use std::{
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Address, Client, ConnectError};

use super::{SOON, holdings::Holdings};
use crate::Result;

/// A broker, at an address that leaves nothing behind.
pub(super) struct BrokerProcess {
    child: Child,
    pub(super) address: String,
}

impl BrokerProcess {
    /// Starts it, and waits until it serves. It serves another user as well, if one is given.
    pub(super) fn start(other: Option<u32>) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let address = format!("@fbuf-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["broker", "--socket", &address]);
        if let Some(user) = other {
            command.args(["--allow", &user.to_string()]);
        }
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let broker = Self { child, address };
        let start = Instant::now();
        loop {
            match Client::connect_to(&Address::new(&broker.address)) {
                Ok(_) => return Ok(broker),
                Err(ConnectError::NoBroker { .. }) if start.elapsed() < SOON => thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What it holds.
    pub(super) fn holdings(&self) -> Result<Holdings> {
        Holdings::of(self.child.id())
    }

    /// Waits until it has noticed that all have gone who came since it had so many descriptors.
    pub(super) fn wait_until_left(&self, descriptors: u64) -> Result<()> {
        let start = Instant::now();
        while self.holdings()?.descriptors > descriptors {
            if start.elapsed() > SOON {
                return Err("the broker still has descriptors of clients that have gone".into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
