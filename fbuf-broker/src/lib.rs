//! The broker: the control plane of fbuf. It knows names, permissions and quotas, and introduces
//! senders and receivers to each other by handing each pair the two ends of a socket. It never
//! touches a payload, and what it has introduced goes on without it (invariant 3).
//!
//! [`state`] decides, without any I/O, by the rules of a [`policy`], and charges what it grants to an
//! [`account`]; [`Listener`] and [`Broker::serve`] do the I/O; [`Embedded`] runs the same broker on a thread
//! of any program.

pub mod account;
mod embedded;
mod listener;
pub mod policy;
mod server;
pub mod share;
mod socket_file;
pub mod state;
pub mod tally;

pub use embedded::Embedded;
pub use listener::{BindError, Listener};
pub use policy::{Policy, PolicyError, Quota, size};
pub use server::Broker;
