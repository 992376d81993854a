//! The memory of fbuf and its rules, and the protocols that carry it: what broker and clients share.
//!
//! Programs link `fbuf-client`; this crate is its inside.
//!
//! A message's way, downhill: [`pool::Pool::allocate`] makes a [`loan::Fbuf`] of a free slot,
//! [`outbound::Outbound::offer`] lends it through a [`lane`], [`inbound::Inbound::take`] makes a
//! [`loan::Received`] of it, whose drop writes the [`board`], where [`pool::Pool::collect`] finds it.
//!
//! Unsafe code lives in `memory/map.rs` (mappings), `ring.rs` (tables whose index wraps), `loan.rs`
//! (slots as slices), `guard.rs` (a signal handler, where one is asked for) and `sys.rs` (system calls),
//! and nowhere else.

pub mod abort;
pub mod board;
pub mod lane;
pub mod limits;
pub mod park;
pub mod points;
pub mod retire;
pub mod ring;
pub mod slot;
pub mod violation;

mod sync;

#[cfg(all(test, not(loom)))]
mod exchange;
#[cfg(all(test, not(loom)))]
mod hostile;
#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod scarce;

// Everything that touches the kernel. The models (`--cfg loom`) need none of it.
#[cfg(not(loom))]
pub mod address;
#[cfg(not(loom))]
pub mod channel;
#[cfg(not(loom))]
pub mod control;
#[cfg(not(loom))]
pub mod fork;
#[cfg(not(loom))]
pub mod guard;
#[cfg(not(loom))]
pub mod inbound;
#[cfg(not(loom))]
pub mod lease;
#[cfg(not(loom))]
pub mod link;
#[cfg(not(loom))]
pub mod loan;
#[cfg(not(loom))]
pub mod memory;
#[cfg(not(loom))]
pub mod outbound;
#[cfg(not(loom))]
pub mod pool;
#[cfg(not(loom))]
pub mod protection;
#[cfg(not(loom))]
pub mod socket;
#[cfg(not(loom))]
pub mod sys;
#[cfg(not(loom))]
pub mod threads;
#[cfg(not(loom))]
pub mod trust;
#[cfg(not(loom))]
pub mod unread;
#[cfg(not(loom))]
pub mod wire;
