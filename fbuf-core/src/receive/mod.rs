//! The receiving side: the receiver's half of a link, and the messages that were taken from it.
//!
//! [`link::Inbound::take`] reads the lane, checks what it finds, marks the slot as held and makes a
//! [`received::Received`]. Dropping that writes the board. How messages are read is the matter of `reading`, one file for each
//! mechanism.

pub(crate) mod held;
#[cfg(not(loom))]
pub mod link;
#[cfg(not(loom))]
pub mod private;
#[cfg(not(loom))]
pub(crate) mod reading;
#[cfg(not(loom))]
pub mod received;
