//! The memory of fbuf and its rules: what two processes share, and how neither can harm the other.
//!
//! Programs link `fbuf-client`; this crate is its inside.
//!
//! A message's way, downhill: [`pool::Pool::allocate`] makes a [`loan::Fbuf`] of a free slot,
//! [`pool::Pool::send`] lends it through a [`lane`], [`inbound::Inbound::take`] makes a
//! [`loan::Received`] of it, whose drop writes the [`board`], where [`pool::Pool::collect`] finds it.
//!
//! # Unsafe code
//! No safe function of this crate breaks memory safety, however it is called. What that rests on beside the kernel: the bytes
//! of a volatile message stay as they are while it is held because its sender is trusted ([`trust`], [`loan::Received`]).
//! Unsafe code lives in these files, beside the models for loom, and a test compares the list with the sources:
//!
//! * `apart.rs`: what is dropped by another thread is moved out of its place.
//! * `fork.rs`: what is done in a child that was forked.
//! * `guard.rs`: the signal handler of a guard, where one is asked for.
//! * `inbound/mod.rs`: one call, which copies a message that was just taken.
//! * `introduced.rs`: what is only true if the broker has said it.
//! * `lease/calls.rs`: system calls about leases.
//! * `lease/slots.rs`: one call, which moves a message into memory of another receiver.
//! * `lease/tenant.rs`: two calls, which exchange a slot for a copy and back.
//! * `loan/fbuf.rs`, and the next three: a slot's address becomes a slice.
//! * `loan/private.rs`: of a view that this process may write.
//! * `loan/received.rs`: of what was received.
//! * `loan/retained.rs`: of what was sent and kept.
//! * `memory/heap.rs`: memory for Miri.
//! * `memory/map.rs`: mappings.
//! * `memory/pieces.rs`: addresses in them, and a hint to the processor.
//! * `memory/table.rs`: words in them.
//! * `memory/trial.rs`: mappings that are tried.
//! * `pool/made.rs`: of memory that only the caller knows to be nobody else's.
//! * `pool/memory.rs`: one call, which makes slots read-only, in a pool with a guard.
//! * `pool/mod.rs`: the call of it.
//! * `ring.rs`: tables whose index wraps.
//! * `sys.rs`: system calls.

// The models use a part of it.
#![cfg_attr(loom, allow(dead_code))]

pub mod abort;
pub mod board;
pub mod lane;
pub mod limits;
pub mod park;
pub mod points;
pub mod read_only;
pub(crate) mod retire;
pub(crate) mod ring;
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
pub mod apart;
#[cfg(not(loom))]
pub mod foreign;
#[cfg(not(loom))]
pub mod fork;
#[cfg(not(loom))]
pub mod guard;
#[cfg(not(loom))]
pub mod inbound;
#[cfg(not(loom))]
pub mod introduced;
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
pub mod peer;
#[cfg(not(loom))]
pub mod pool;
#[cfg(not(loom))]
pub mod protection;
#[cfg(not(loom))]
pub mod shares;
#[cfg(not(loom))]
pub mod socket;
#[cfg(not(loom))]
pub mod sys;
#[cfg(not(loom))]
pub mod threads;
#[cfg(not(loom))]
pub mod trust;
#[cfg(not(loom))]
mod under_way;
#[cfg(not(loom))]
pub mod unread;
#[cfg(not(loom))]
pub mod wire;
