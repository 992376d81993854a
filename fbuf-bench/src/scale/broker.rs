//! The broker under load: a process of its own, whose memory is its own.

use std::{
    io::Write,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Address, Client, ConnectError};

use super::{SOON, holdings::Holdings};
use crate::Result;

/// What another user may have, where the default is more than can be had soon.
const CHANNELS: u64 = 8192;
pub(super) const LINKS: u64 = 4096;

/// A broker, at an address that leaves nothing behind.
pub(super) struct BrokerProcess {
    child: Child,
    pub(super) address: String,
}

impl BrokerProcess {
    /// Starts it, and waits until it serves. It serves another user as well, if one is given, to whom it gives what
    /// does not take long to spend.
    pub(super) fn start(other: Option<u32>) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let address = format!("@fbuf-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["broker", "--socket", &address]);
        if other.is_some() {
            command.args(["--policy", "/dev/stdin"]);
        }
        let child = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut broker = Self { child, address };
        if let (Some(user), Some(mut policy)) = (other, broker.child.stdin.take()) {
            let own = nix::unistd::geteuid();
            let all = "send = [\"*\"]\nreceive = [\"*\"]\n";
            write!(policy, "[[rule]]\nusers = [{own}]\n{all}[[rule]]\nusers = [{user}]\n{all}")?;
            write!(policy, "[rule.quota]\nchannels = {CHANNELS}\nlinks = {LINKS}\n")?;
        }
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
