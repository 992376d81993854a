//! The ways between two processes that are compared.

mod bytes;
mod eventfd;
mod fbuf;
mod futex;
#[cfg(feature = "peers")]
mod iceoryx2;
#[cfg(feature = "peers")]
mod ipc_channel;
mod limit;
mod memory;
mod shared_memory;
mod tokio;

use clap::ValueEnum;
use fbuf_core::socket::wire::Descriptor;
use serde::{Deserialize, Serialize};

use crate::{
    Result,
    terms::{Terms, Wait},
};

pub(crate) use bytes::{Pipe, Tcp, Uds};
pub(crate) use eventfd::Eventfd;
pub(crate) use fbuf::{Fbuf, Protected, Tagged, receive_from};
pub(crate) use futex::Futex;
#[cfg(feature = "peers")]
pub(crate) use iceoryx2::Iceoryx2;
#[cfg(feature = "peers")]
pub(crate) use ipc_channel::IpcChannel;
pub(crate) use limit::Limit;
pub(crate) use shared_memory::SharedMemory;
pub(crate) use tokio::{TokioEventfd, TokioFbuf, TokioUds, runtime, send};

/// A way between two processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// This library
    Fbuf,
    /// A bare ring of slot numbers in shared memory: the best that this machine can do
    Limit,
    /// A pipe
    Pipe,
    /// A Unix stream socket
    Uds,
    /// TCP over the loopback interface, without delay
    Tcp,
    /// The crate shared_memory, with the simplest ring and a copy at each end
    SharedMemory,
    /// An eventfd that carries the number of the message and nothing else
    Eventfd,
    /// A futex beside the number of the message, and nothing else
    Futex,
    /// This library, in tasks of tokio
    TokioFbuf,
    /// An eventfd in an AsyncFd of tokio, that carries the number of the message and nothing else
    TokioEventfd,
    /// A Unix stream socket of tokio
    TokioUds,
    /// One copy of the bytes, and nothing else
    #[value(skip)]
    Memcpy,
    /// iceoryx2
    #[cfg(feature = "peers")]
    #[serde(rename = "iceoryx2")]
    #[value(name = "iceoryx2")]
    Iceoryx2,
    /// ipc-channel
    #[cfg(feature = "peers")]
    IpcChannel,
}

impl Peer {
    /// What it can do while it has nothing to do.
    pub(crate) fn waits(self) -> &'static [Wait] {
        match self {
            Self::Fbuf | Self::Pipe | Self::Uds | Self::Tcp => &[Wait::Spin, Wait::Adaptive, Wait::Block],
            Self::Limit | Self::SharedMemory => &[Wait::Spin],
            Self::Eventfd | Self::Futex | Self::TokioFbuf | Self::TokioEventfd | Self::TokioUds => &[Wait::Block],
            Self::Memcpy => &[],
            #[cfg(feature = "peers")]
            Self::Iceoryx2 | Self::IpcChannel => &[Wait::Spin, Wait::Block],
        }
    }

    /// Whether one may choose how many messages can be on their way.
    pub(crate) fn takes_slots(self) -> bool {
        matches!(self, Self::Fbuf | Self::Limit | Self::SharedMemory | Self::TokioFbuf)
    }

    /// Whether it carries messages of this many bytes.
    pub(crate) fn carries(self, size: usize) -> bool {
        !matches!(self, Self::Eventfd | Self::Futex | Self::TokioEventfd) || size == crate::payload::NUMBER
    }
}

/// What the second process needs in order to join.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Handle {
    pub(crate) descriptors: Vec<Descriptor>,
    pub(crate) name: String,
}

/// One end of a way.
pub(crate) trait End: Sized {
    /// In the process that begins: this end, and what the other process needs.
    fn offer(terms: &Terms) -> Result<(Self, Handle)>;

    /// In the other process.
    fn join(terms: &Terms, handle: Handle) -> Result<Self>;

    /// Waits for the other end, in both processes; messages may flow then.
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The end where messages go in. They all have the size that the terms say.
pub(crate) trait Sending: End {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()>;
}

/// The end where they come out.
pub(crate) trait Receiving: End {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T>;
}

/// Both ends.
pub(crate) trait Way {
    type Sender: Sending;
    type Receiver: Receiving;
}

impl Handle {
    fn of(descriptors: impl IntoIterator<Item = std::os::fd::OwnedFd>) -> Self {
        Self { descriptors: descriptors.into_iter().map(Descriptor::from).collect(), name: String::new() }
    }

    /// The one descriptor it has.
    fn descriptor(self) -> Result<std::os::fd::OwnedFd> {
        Ok(self.descriptors.into_iter().next().ok_or("a descriptor is missing")?.into_owned()?)
    }
}

/// Counts the rounds of somebody who spins, so that one whose peer has died does not spin for ever.
#[derive(Debug, Default)]
struct Patience {
    rounds: u64,
    since: Option<std::time::Instant>,
}

impl Patience {
    /// How many rounds pass between two looks at the clock.
    const ROUND: u64 = 1 << 20;

    #[inline]
    fn spin(&mut self) -> Result<()> {
        self.rounds += 1;
        if self.rounds.is_multiple_of(Self::ROUND) {
            let since = *self.since.get_or_insert_with(std::time::Instant::now);
            if since.elapsed() > std::time::Duration::from_secs(20) {
                return Err("the other process has not moved for 20 seconds".into());
            }
        }
        Ok(())
    }
}
