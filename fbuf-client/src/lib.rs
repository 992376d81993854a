//! What a program links in order to exchange data with other processes through fbufs: buffers in
//! shared memory that are written once, handed over without copying, and handed back when read.
//!
//! ```
//! use fbuf_client::Client;
//!
//! # let broker = fbuf_broker::Embedded::start()?;
//! # let client = Client::connect_to(broker.address())?;
//! # /*
//! let client = Client::connect()?; // the broker of `fbuf broker`
//! # */
//! let mut receiver = client.receiver("greetings").open()?;
//! let mut sender = client.sender("greetings").slot_size(4096).open()?;
//! sender.wait_for_receivers(1)?;
//!
//! let mut fbuf = sender.allocate()?; // uf_allocate
//! std::io::Write::write_all(&mut fbuf, b"hello")?;
//! sender.write(fbuf)?; // uf_write
//!
//! let received = receiver.get()?; // uf_get
//! assert_eq!(&received[..], b"hello");
//! drop(received); // uf_deallocate
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! In practice sender and receiver live in two processes. Each message reaches every receiver that
//! is linked when it is written; a channel may have many of both. Nothing here starts a system call
//! for a message while both sides are busy, and nothing needs the broker once two are linked.
//!
//! After Druschel and Peterson, "Fbufs: A High-Bandwidth Cross-Domain Transfer Facility", SOSP 1993,
//! and Thadani and Khalidi, "An Efficient Zero-Copy I/O Framework for UNIX", SMLI TR-95-39, 1995,
//! whose `uf_allocate`, `uf_write`, `uf_get` and `uf_deallocate` are noted above.

mod acceptance;
mod caches;
mod client;
mod endpoint;
mod guard;
mod hangup;
mod interrupt;
mod io_error;
mod link_source;
mod poll;
mod receiver;
mod sender;
mod wait;

pub use client::{Client, ClientBuilder, ClientFailed, ConnectError, OpenError};
pub use fbuf_core::{
    abort::Abort,
    memory::{CannotReopen, MemoryError, Pages, Sealed},
    peer::{Credentials, LinkId, Peer},
    process::fork::Forked,
    protection::{Mechanism, Protection},
    receive::{private::Private, received::Received},
    send::{
        fbuf::{Fbuf, Filled, TooLarge},
        pool::Places,
        retained::Retained,
        unread::Unread,
    },
    slot::GeometryError,
    violation::{Unsuitable, Violation},
};
pub use fbuf_protocol::{
    ClientStatus, EndStatus, EndpointStatus, Mismatch, Oldest, QuotaExceeded, Refusal, Report, Resource, Unpaired,
    address::Address,
    channel::{ChannelName, ChannelNameError},
    name::{Label, LabelError, Program},
};
pub use guard::WaitGuard;
pub use interrupt::InterruptHandle;
pub use poll::{Pollable, poll};
pub use receiver::{GetError, Iter, Receiver, ReceiverBuilder, ReceiverCounters, TryIter};
pub use sender::{
    AllocateError, Departure, DisconnectReason, OptionsError, ProtectionInfo, Sender, SenderBuilder, SenderCounters,
    Sent, WaitError, WaitFor, WriteError,
};
pub use wait::Wait;

/// By what defaults are chosen, for those that measure them (`fbuf doctor`, `fbuf bench`). Any version may change it.
#[doc(hidden)]
pub mod tuning {
    pub use crate::{
        caches::{Cache, Users, caches, default_slots, in_flight, largest},
        sender::{LEASE_BASE_FROM, LEASE_FROM},
    };
}

/// Endpoints and what they hand out move between threads.
const _: () = {
    const fn send<T: Send>() {}
    const fn sync<T: Sync>() {}
    send::<Client>();
    sync::<Client>();
    send::<InterruptHandle>();
    sync::<InterruptHandle>();
    send::<Sender>();
    send::<Receiver>();
    sync::<Sender>();
    sync::<Receiver>();
    send::<WaitGuard<'_>>();
    send::<Fbuf>();
    send::<Retained>();
    sync::<Retained>();
    send::<Received>();
    send::<Private>();
    sync::<Private>();
    sync::<Received>();
};
