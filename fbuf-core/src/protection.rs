//! What a receiver may rely on, and by which means.

use std::fmt;

/// What a receiver may rely on, of a message that it holds.
///
/// It is about writing a message, and says nothing about reading: a receiver can read all memory of its sender, messages
/// before and after its own, those to others and those never sent among it, also after it has closed, for as long as the
/// sender lives. What is confidential goes over a channel that the broker's policy says so of, or as
/// [one-shot messages](Mechanism::OneShot), each of which is memory of its own. Memory that a receiver has mapped stays for
/// as long as it likes, also when the sender has ended, and then no quota counts it.
///
/// After the fbufs of Druschel and Peterson (SOSP 1993), which could be volatile or secure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[non_exhaustive]
pub enum Protection {
    /// Only its sender can write it, and the sender's safe code cannot. Enough among processes of one user, which can
    /// trace each other (ptrace(2)). A process that others of its user cannot trace, by Yama's `ptrace_scope`, in a sandbox
    /// or container, or because it is not dumpable, requires more if it does not trust them.
    #[default]
    Volatile,
    /// Nobody can write it, in any mapping or through any descriptor: the kernel says so. There is one way
    /// round it, for a sender that means it: I/O into memory that it has pinned before it sent
    /// (`IORING_REGISTER_BUFFERS`, `O_DIRECT`, RDMA), for which the kernel needs neither.
    Leased,
    /// Its bytes cannot change, whatever its sender does.
    Sealed,
}

/// By which means the messages of a link are protected.
///
/// ```
/// use fbuf_core::protection::{Mechanism, Protection};
/// assert_eq!(Mechanism::Shared.protection(), Protection::Volatile);
/// assert!(Mechanism::OneShot.protection() > Mechanism::Lease.protection());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
    /// ever. Memory is made and cleared for each, which costs more than a copy of a few hundred kilobytes: for what is kept,
    /// cloned or passed on as a descriptor.
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
            Self::OneShot => "one-shot",
        })
    }
}
