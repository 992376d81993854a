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
//! # Which back-pressure do I want?
//!
//! A slot is in use until the last receiver of its message has dropped it, so a receiver that is slow, or stopped, soon has
//! all slots of its senders. What happens then, each end chooses:
//!
//! | wanted | sender | receiver |
//! | --- | --- | --- |
//! | No message is lost; senders wait. The default. | [`allocate`](Sender::allocate), [`slots`](SenderBuilder::slots) | |
//! | Nothing is lost, and peaks are buffered | [`grow_to(n)`](SenderBuilder::grow_to) | |
//! | The sender has something better to do than to wait | [`try_allocate`](Sender::try_allocate), [`allocate_timeout`](Sender::allocate_timeout) | |
//! | The sender never waits, and each receiver learns what it missed: sensors, logs | [`lossy()`](SenderBuilder::lossy) | |
//! | This receiver would rather miss messages than hold others up: a display, a monitor | | [`max_backlog(n)`](ReceiverBuilder::max_backlog) |
//! | A receiver that hangs is not waited for | [`disconnect_after(time)`](SenderBuilder::disconnect_after) | |
//!
//! A receiver that reads slowly and one that is stopped look the same to a sender. With the first three a sender waits for a
//! stopped receiver for ever, or fails for ever; `lossy`, `max_backlog` of all receivers, or `disconnect_after`, bound that.
//! Against a receiver of another user that is slow on purpose only `lossy` helps, or not to be linked with it
//! ([`to_users`](SenderBuilder::to_users)): `max_backlog` is what a receiver asks for, and one that hands back a slot now and then does
//! not hang.
//!
//! # Messages that are kept, changed or passed on
//!
//! ```
//! use bytes::Bytes;
//! use fbuf_client::{Client, Mechanism, Protection};
//!
//! # let broker = fbuf_broker::Embedded::start()?;
//! # let client = Client::connect_to(broker.address())?;
//! let mut receiver = client.receiver("pages").require(Protection::Volatile).open()?;
//! let mut sender = client.sender("pages").slot_size(8192).mechanism(Mechanism::Shared).open()?;
//! # let mut write = |sender: &mut fbuf_client::Sender| {
//! #     sender.wait_for_receivers(1)?;
//! #     let mut fbuf = sender.allocate()?;
//! #     fbuf.set_len(8192)?;
//! #     sender.write(fbuf).map_err(Box::<dyn std::error::Error>::from)
//! # };
//! # for _ in 0..3 { write(&mut sender)?; }
//! // To be written here: a page that is written is copied, the others stay shared. The sender sees nothing of it.
//! let mut private = receiver.get()?.into_private().map_err(|(_message, error)| error)?;
//! private[0] = 1;
//!
//! // For all that takes `Bytes`: no byte moves, and the slot goes back with the last of them.
//! let bytes = Bytes::from(receiver.get()?);
//!
//! // Copied by loads that are sound even if the sender changes the message meanwhile.
//! let mut copy = [0; 8192];
//! receiver.get()?.copy_to_slice(&mut copy);
//!
//! // To be kept for as long as one likes, cloned, or given away as a descriptor: one-shots are memory of their own.
//! # let mut receiver = client.receiver("files").open()?;
//! # let mut sender = client.sender("files").slot_size(8192).mechanism(Mechanism::OneShot).open()?;
//! # write(&mut sender)?;
//! let sealed = receiver.get()?.into_sealed().map_err(|_message| "it is no one-shot")?;
//! let memfd = sealed.into_fd()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Threads, and async runtimes
//!
//! A [`Client`] has one thread of its own, on which a tokio runtime speaks to the broker; messages pass without it. A call
//! that waits blocks its thread. All calls may be made on a thread of an async runtime, which then runs nothing else meanwhile:
//! `try_get`, `try_allocate` and `write` do not wait, and [`Receiver::prepare_wait`] and [`Sender::prepare_wait`] have examples
//! by which a future waits. With the feature `tokio`, `AsyncReceiver` and `AsyncSender` are such futures, a `Stream` and a `Sink`. [`ClientBuilder::connect`] with [`wait_for_broker`](ClientBuilder::wait_for_broker) is for
//! `spawn_blocking`. One thread waits for several endpoints, and for descriptors of its own, by [`poll`](poll()).
//!
//! # The environment
//!
//! Three variables change what this library does in a program that says nothing else; a program that is executed with more
//! rights than its caller has (AT_SECURE in getauxval(3)) does not ask for the first.
//!
//! * `FBUF_BROKER`: where [`Client::connect`] finds its broker: a path, or `@name` in the abstract namespace (unix(7)).
//! * `FBUF_GUARD=1`: senders that were not told are [guarded](SenderBuilder::guard): SIGSEGV gets a handler, each slot fills
//!   whole pages, and each message costs two calls of mprotect(2).
//! * `FBUF_FENCE=full`: this process, and its peers on its links, use full fences in place of membarrier(2), which costs each
//!   message some nanoseconds. For measurements.
//!
//! After Druschel and Peterson, "Fbufs: A High-Bandwidth Cross-Domain Transfer Facility", SOSP 1993,
//! and Thadani and Khalidi, "An Efficient Zero-Copy I/O Framework for UNIX", SMLI TR-95-39, 1995,
//! which have the calls `uf_allocate`, `uf_write`, `uf_get` and `uf_deallocate` that are noted above.

mod acceptance;
mod by_user;
mod caches;
mod client;
mod endpoint;
mod guard;
mod hangup;
mod interrupt;
mod io_error;
mod link_failure;
mod link_source;
mod poll;
mod receiver;
mod sender;
mod sockets;
mod status;
#[cfg(feature = "tokio")]
mod tasks;
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
        fbuf::{Fbuf, Filled, NoHeadroom, TooLarge, Untagged},
        pool::{Places, Shortage},
        retained::Retained,
        unread::Unread,
    },
    slot::GeometryError,
    violation::{Unsuitable, Violation},
};
pub use fbuf_protocol::{
    Mismatch, QuotaExceeded, Refusal, Resource, Unpaired,
    address::Address,
    channel::{ChannelName, ChannelNameError},
    name::{Label, LabelError, Program},
};
pub use guard::WaitGuard;
pub use interrupt::InterruptHandle;
pub use link_failure::LinkFailure;
pub use poll::{Pollable, poll};
pub use receiver::{GetError, Iter, Receiver, ReceiverBuilder, ReceiverCounters, TryIter};
pub use sender::{
    AllocateError, Departure, DisconnectReason, OptionsError, ProtectionInfo, Sender, SenderBuilder, SenderCounters,
    Sent, WaitError, WaitFor, WriteError,
};
pub use status::{ClientStatus, EndStatus, EndpointStatus, Oldest, Report};
#[cfg(feature = "tokio")]
pub use tasks::{AsyncReceiver, AsyncSender, FbufSink, RuntimeEnded};
pub use wait::Wait;

/// By what defaults are chosen, for those that measure them (`fbuf doctor`, `fbuf bench`). Any version may change it.
#[doc(hidden)]
pub mod tuning {
    pub use crate::{
        caches::{Cache, Users, caches, default_slots, in_flight, largest},
        sender::{LEASE_BASE_FROM, LEASE_FROM},
    };
}

/// What the protocol says is apart from what programs see: no public type says how it is sent.
#[cfg(test)]
const _: () = {
    /// Which of these a type has is ambiguous, and so an error, if it has a form of its own.
    trait NotSent<Why> {
        const IS: () = ();
    }
    impl<T> NotSent<()> for T {}
    impl<T: serde::Serialize> NotSent<u8> for T {}
    impl<T: for<'de> serde::Deserialize<'de>> NotSent<u16> for T {}
    const fn not_sent(_: &[()]) {}
    not_sent(&[Peer::IS, Credentials::IS, LinkId::IS, Protection::IS, Mechanism::IS, Pages::IS, Mismatch::IS]);
    not_sent(&[Refusal::IS, QuotaExceeded::IS, Resource::IS, Unpaired::IS, ChannelName::IS, ChannelNameError::IS]);
    not_sent(&[Label::IS, Program::IS, Violation::IS, Abort::IS, ClientStatus::IS, EndpointStatus::IS, Report::IS]);
};

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
