//! The process at the other end of a link.

use std::{fmt, io};

use crate::process::sys;

/// The endpoint at the other end of a link. Any code can make one: it is what the broker said if it comes from an
/// [`Introduced`](crate::introduced::Introduced), and from what was received or is linked.
///
/// ```
/// use fbuf_core::peer::{Credentials, Peer};
/// // For a test of what a program does with peers.
/// let peer = Peer::new(12, Credentials::new(4711, 1000, 1000)).with_trusted(true);
/// assert_eq!((peer.process.uid, peer.other_user()), (1000, Some(1000)));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// The endpoint, by a number that no other has, had or will have, also after a restart of the broker.
    pub endpoint: u64,
    /// The process, as the kernel told the broker.
    pub process: Credentials,
    /// Whether it is of the same user as this process. Only the broker knows: users may have other ids in
    /// the user namespaces of other processes.
    pub same_user: bool,
    /// Whether it may be relied upon not to change memory that it could change: it is of the same user, or the
    /// policy of the broker trusts its user on this channel, a sender with volatile messages (`trusted`), a receiver
    /// with a pool (`trusted_pool`). Of memory of any other peer no slice is ever made.
    pub trusted: bool,
    /// Which link with it this is. Means something to its two ends and to a broker only.
    pub link: LinkId,
}

impl Peer {
    /// An endpoint of another user, which is not trusted, and with which there is no link.
    #[must_use]
    pub const fn new(endpoint: u64, process: Credentials) -> Self {
        Self { endpoint, process, same_user: false, trusted: false, link: LinkId::NONE }
    }

    /// The same, of the user of this process or not.
    #[must_use]
    pub const fn with_same_user(self, same_user: bool) -> Self {
        Self { same_user, ..self }
    }

    /// The same, trusted or not.
    #[must_use]
    pub const fn with_trusted(self, trusted: bool) -> Self {
        Self { trusted, ..self }
    }

    /// The same at the end of this link.
    #[must_use]
    pub const fn with_link(self, link: LinkId) -> Self {
        Self { link, ..self }
    }

    /// Its user, if that is another than the one of this process.
    #[must_use]
    pub fn other_user(&self) -> Option<u32> {
        Some(self.process.uid).filter(|_| !self.same_user)
    }
}

/// A process, as SO_PEERCRED names it (unix(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    /// Its process id; 0 if it lives in a PID namespace that cannot be seen from here.
    pub pid: i32,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
}

impl Credentials {
    /// A process with this id, of this user and group.
    #[must_use]
    pub const fn new(pid: i32, uid: u32, gid: u32) -> Self {
        Self { pid, uid, gid }
    }
}

/// As errors name it.
impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => write!(f, "a process of user {} in another PID namespace", self.uid),
            pid => write!(f, "process {pid}"),
        }
    }
}

/// Which link it is, by a random number that only the broker and the two ends know. Two endpoints that name the same one
/// to the next broker are linked already, and are not introduced again; no third can say so for them.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub(crate) u64);

impl LinkId {
    /// No link.
    pub const NONE: Self = Self(0);

    /// A new one.
    ///
    /// # Errors
    /// What getrandom(2) says.
    pub fn draw() -> io::Result<Self> {
        // One in 2⁶⁴ is the one that stands for none.
        let mut link = Self::NONE;
        while link == Self::NONE {
            link = Self(u64::from_ne_bytes(sys::random()?));
        }
        Ok(link)
    }

    /// Its number, for instance as the data of an event of epoll(7).
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// The link with this number.
    #[must_use]
    pub const fn from_bits(number: u64) -> Self {
        Self(number)
    }
}

/// Not to be read in a log.
impl fmt::Debug for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkId(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_id_is_not_shown() {
        let shown = format!("{:?}", LinkId(7));
        assert!(!shown.contains('7'), "{shown}");
    }
}
