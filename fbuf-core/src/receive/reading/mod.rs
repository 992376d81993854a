//! How messages are read, where it is not enough to read them in place: under a lease, or from a copy.

pub(crate) mod claim;
pub(crate) mod copied;
pub(crate) mod lease_thread;
pub(crate) mod leased;
