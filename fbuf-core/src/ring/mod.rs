//! The two protocols in shared memory: the [`lane`], by which a sender lends slots, and the [`board`], by which a receiver
//! hands them back.

pub mod board;
pub mod entry;
pub mod lane;
#[cfg(not(loom))]
mod layout;
#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, loom))]
mod wake_model;
