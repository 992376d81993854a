//! Slots that are memory of their own and are read under leases: their bytes cannot change while they are
//! read, whoever the sender is, and they are used again.
//!
//! A sender writes such a slot through a mapping that it makes for one message (`slots`) and unmaps before
//! it sends. Its receiver takes a read lease, which the kernel grants only if nobody can write the memory
//! any more (`tenant`). Whoever opens it for writing later is held up, and a thread of this process, the
//! `keeper`, is told: it puts a copy in the place of the slot and then lets go. A lease that is not
//! granted is no harm: the message is copied.
//!
//! Leases of fcntl(2); revocable ones as an answer to Druschel and Peterson's "secure" fbufs, whose
//! originator gave its right to write up by a call to the kernel as well (SOSP 1993, section 3.2.4).

pub mod calls;
mod keeper;
mod slots;
mod tenant;

pub(crate) use keeper::{Locked, lock_current as lock};
pub(crate) use slots::{LeasedSlots, View};
pub(crate) use tenant::{Due, Rooms, Tenant};
