//! The memory of fbuf and its rules: what two processes share, and how neither can harm the other.
//!
//! Programs link `fbuf-client`; this crate is its inside.
//!
//! The way of a message: [`send::pool::Pool::allocate`] makes an [`send::fbuf::Fbuf`] of a free slot.
//! [`send::pool::Pool::send`] lends the slot through a [`ring::lane`]. [`receive::link::Inbound::take`] makes a
//! [`receive::received::Received`] of it. Dropping that writes the [`ring::board`], where
//! [`send::pool::Pool::collect`] finds it.
//!
//! Imports point one way: each folder or file uses those before it in this list, and no other. `limits`, `violation`, `abort`,
//! `sync`, `points`, `slot`, `process`, `memory`, `peer`, `protection`, `trust`, `wait`, `socket`, `ring`, `send` and
//! `receive`, `introduced`. A test compares the list with the sources.
//!
//! # Unsafe code
//! No safe function of this crate breaks memory safety, however it is called. What that rests on beside the kernel: the bytes
//! of a volatile message stay as they are while it is held because its sender is trusted ([`trust`], [`receive::received::Received`]).
//! Unsafe code lives in these files, beside tests and models for loom, and a test compares the list with the sources:
//!
//! * `introduced.rs`: what is only true if the broker has said it.
//! * `memory/heap.rs`: memory for Miri.
//! * `memory/map.rs`: mappings.
//! * `memory/map/pages.rs`: which pages of them exist.
//! * `memory/map/private.rs`: those of memory of this process alone.
//! * `memory/pieces.rs`: addresses in them, and a hint to the processor.
//! * `memory/table.rs`: words in them.
//! * `memory/trial.rs`: mappings that are tried.
//! * `memory/wrapping.rs`: tables with an index that wraps.
//! * `process/deferred.rs`: what is dropped by another thread is moved out of its place.
//! * `process/fork.rs`: what is done in a child that was forked.
//! * `process/lease.rs`: system calls about leases.
//! * `process/sys.rs`: system calls.
//! * `receive/private.rs`: a slot's address becomes a view that this process may write.
//! * `receive/reading/copied.rs`: one call, which copies a message that was just taken.
//! * `receive/reading/leased.rs`: two calls, which exchange a slot for a copy and back.
//! * `receive/received.rs`: a slot's address becomes a slice.
//! * `ring/layout.rs`: which words of lanes and boards may lie in shared memory.
//! * `send/fbuf.rs`: a slot's address becomes a slice.
//! * `send/guard.rs`: the signal handler of a guard, where one is asked for.
//! * `send/pool/creation.rs`: a pool of memory of which only the caller knows that no other code has it.
//! * `send/retained.rs`: a slot's address becomes a slice.
//! * `send/storage/one_shot.rs`: one call, which clears what is not sent of a buffer.
//! * `send/storage/leased.rs`: one call, which moves a message into memory of another receiver.
//! * `send/storage/segments.rs`: one call, which makes slots read-only, in a pool with a guard.

// The models use a part of it.
#![cfg_attr(loom, allow(dead_code))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "fbuf is for Linux on 64-bit machines: it rests on memfd_create(2), its seals, and segments that 32 bits cannot address"
);

pub mod abort;
pub mod limits;
pub mod memory;
pub mod points;
pub mod receive;
pub mod ring;
pub mod slot;
pub mod violation;
pub mod wait;

pub mod sync;

// Everything that touches the kernel. The models (`--cfg loom`) need none of it.
#[cfg(not(loom))]
pub mod introduced;
#[cfg(not(loom))]
pub mod peer;
#[cfg(not(loom))]
pub mod process;
#[cfg(not(loom))]
pub mod protection;
#[cfg(not(loom))]
pub mod send;
#[cfg(not(loom))]
pub mod socket;
#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(not(loom))]
pub mod trust;
