//! What a receiver may rely on, and by which means.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a receiver may rely on, of a message that it holds.
///
/// After the fbufs of Druschel and Peterson (SOSP 1993), which could be volatile or secure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Protection {
    /// Nobody but its sender can write it, and the sender's safe code cannot.
    #[default]
    Volatile,
    /// Nobody can write it, in any mapping or through any descriptor: the kernel says so. There is one way
    /// round it, for a sender that means it: I/O into memory that it has pinned before it sent
    /// (`IORING_REGISTER_BUFFERS`, `O_DIRECT`, RDMA), for which the kernel needs neither.
    Leased,
    /// Its bytes cannot change, whoever the sender is, and whatever it does.
    Sealed,
}

/// By which means the messages of a link are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Mechanism {
    /// They are read where they were written: [`Protection::Volatile`].
    #[default]
    Shared,
    /// Each is copied when it is received: [`Protection::Sealed`].
    Copy,
    /// Each is read where it was written, under a read lease of the kernel (fcntl(2), `F_SETLEASE`), in a slot
    /// that is memory of its own: [`Protection::Leased`]. One that cannot be leased is copied.
    Lease,
    /// Each is memory of its own that is sealed for good and given away: [`Protection::Sealed`], and for
    /// ever.
    OneShot,
}

impl Mechanism {
    /// What it amounts to.
    #[must_use]
    pub fn protection(self) -> Protection {
        match self {
            Self::Shared => Protection::Volatile,
            Self::Lease => Protection::Leased,
            Self::Copy | Self::OneShot => Protection::Sealed,
        }
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Volatile => "volatile",
            Self::Leased => "leased",
            Self::Sealed => "sealed",
        })
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Copy => "sealed by copying",
            Self::Lease => "leased",
            Self::OneShot => "sealed for good",
        })
    }
}
