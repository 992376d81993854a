//! Why a sender and a receiver of one channel are not linked with each other.

use std::fmt;

use fbuf_core::{
    limits::{MAX_SLOT_BYTES, MAX_SLOTS, OTHERS_SLOT_BYTES, OTHERS_SLOTS},
    peer::Peer,
    protection::Protection,
    slot::Geometry,
};
use serde::{Deserialize, Serialize};

/// The largest slots, and the most of them, with which a receiver accepts a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Bytes of a slot, and so of a message.
    pub slot_bytes: u64,
    /// The most slots that the sender will ever have: the receiver has a few words for each.
    pub max_slots: u64,
}

/// Which senders a receiver accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Of the receiver's own user.
    pub own: Accepted,
    /// Of other users.
    pub others: Accepted,
}

impl Limits {
    /// All that can be from the own user, and little from others.
    pub const DEFAULT: Self = Self {
        own: Accepted { slot_bytes: MAX_SLOT_BYTES as u64, max_slots: MAX_SLOTS as u64 },
        others: Accepted { slot_bytes: OTHERS_SLOT_BYTES, max_slots: OTHERS_SLOTS },
    };

    /// Checks the slots of a sender.
    ///
    /// # Errors
    /// [`Mismatch::SlotSize`], [`Mismatch::Slots`]
    pub fn check(&self, geometry: Geometry, same_user: bool) -> Result<(), Mismatch> {
        let Accepted { slot_bytes, max_slots } = if same_user { self.own } else { self.others };
        let (found_bytes, found_slots) = (geometry.slot_bytes().into(), geometry.max_slots().into());
        if found_bytes > slot_bytes {
            return Err(Mismatch::SlotSize { found: found_bytes, accepted: slot_bytes });
        }
        if found_slots > max_slots {
            return Err(Mismatch::Slots { found: found_slots, accepted: max_slots });
        }
        Ok(())
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What keeps a sender and a receiver from being linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// The receiver requires more than the sender gives it.
    #[error("the receiver requires {required} messages, and the sender's would be {found}")]
    Protection {
        /// What the receiver requires.
        required: Protection,
        /// What the sender gives.
        found: Protection,
    },
    /// The sender's slots are too large for the receiver.
    #[error("the sender has slots of {found} bytes, and the receiver accepts slots of {accepted} bytes at most")]
    SlotSize {
        /// Bytes of a slot.
        found: u64,
        /// What the receiver accepts.
        accepted: u64,
    },
    /// The sender has too many slots for the receiver.
    #[error("the sender may have {found} slots, and the receiver accepts {accepted} at most")]
    Slots {
        /// Slots.
        found: u64,
        /// What the receiver accepts.
        accepted: u64,
    },
    /// The receiver is to be linked with other users only.
    #[error("the receiver names the users of its senders, and user {user} is none of them")]
    FromUsers {
        /// The user of the sender.
        user: u32,
    },
    /// The sender is to be linked with other users only.
    #[error("the sender names the users of its receivers, and user {user} is none of them")]
    ToUsers {
        /// The user of the receiver.
        user: u32,
    },
    /// The sender would write into memory of another user, which no rule of the policy lets it trust.
    #[error(
        "the sender takes its slots from the receiver, and the policy trusts user {user} with no pool (trusted_pool)"
    )]
    UntrustedPool {
        /// The user of the receiver.
        user: u32,
    },
    /// The sender's slots come from another receiver.
    #[error("the sender takes its slots from one receiver, and has one")]
    OneReceiver,
    /// The policy says that other users get one-shots on this channel.
    #[error("the channel is confidential, and the sender sends no one-shot messages")]
    Confidential,
    /// A user cannot pay for the link now.
    #[error("user {user} has as many links as the quota allows: they are linked when it has fewer")]
    Quota {
        /// The user.
        user: u32,
    },
    /// A client has not fetched what was introduced to it before.
    #[error("a process of user {user} has not read yet with which others it is linked: they are linked when it has")]
    Unread {
        /// The user of that client.
        user: u32,
    },
    /// A user has its share of the broker's descriptors.
    #[error(
        "user {user} has its share of the broker's descriptors: they are linked when it has fewer, or may have more"
    )]
    Descriptors {
        /// The user.
        user: u32,
    },
    /// The broker cannot make the socket of the link, most likely for want of a descriptor.
    #[error(
        "the broker cannot make the socket of their link, and its log says why: they are linked when it can; if it has no \
         descriptor left, raise its limit of open files (RLIMIT_NOFILE)"
    )]
    Exhausted,
    /// Nothing keeps them apart any more.
    #[error("they fit, and are about to be linked")]
    Due,
}

impl Mismatch {
    /// Whether it can pass while both endpoints are open and the policy stays. The broker links them when it has.
    ///
    /// ```
    /// use fbuf_protocol::Mismatch;
    /// assert!(Mismatch::Quota { user: 1000 }.passes() && !Mismatch::Confidential.passes());
    /// ```
    #[must_use]
    pub fn passes(self) -> bool {
        match self {
            Self::OneReceiver
            | Self::Quota { .. }
            | Self::Unread { .. }
            | Self::Descriptors { .. }
            | Self::Exhausted
            | Self::Due => true,
            Self::Protection { .. }
            | Self::SlotSize { .. }
            | Self::Slots { .. }
            | Self::FromUsers { .. }
            | Self::ToUsers { .. }
            | Self::UntrustedPool { .. }
            | Self::Confidential => false,
        }
    }
}

/// An endpoint of the other end of a channel that is not linked with this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unpaired {
    /// The endpoint.
    pub peer: Peer,
    /// Whether it is a sender.
    pub sends: bool,
    /// Why it is not linked.
    pub why: Mismatch,
}

impl Unpaired {
    /// An endpoint that is not linked, and why.
    #[must_use]
    pub fn new(peer: Peer, sends: bool, why: Mismatch) -> Self {
        Self { peer, sends, why }
    }
}

impl fmt::Display for Unpaired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer: Peer { endpoint, process, .. }, sends, why } = self;
        let end = if *sends { "sender" } else { "receiver" };
        write!(f, "not paired with {end} {endpoint} (pid {} of user {}): {why}", process.pid, process.uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_core::peer::Credentials;

    #[test]
    fn limits_are_small_for_other_users() {
        let all = Geometry::new(MAX_SLOT_BYTES.into(), MAX_SLOTS.into()).unwrap();
        let most = Geometry::new(OTHERS_SLOT_BYTES, OTHERS_SLOTS).unwrap();
        let (large, many) = (Geometry::new(OTHERS_SLOT_BYTES + 1, 1), Geometry::new(1, OTHERS_SLOTS + 1));
        let limits = Limits::default();
        assert_eq!(limits.check(all, true), Ok(()));
        assert_eq!(limits.check(most, false), Ok(()));
        assert!(matches!(limits.check(large.unwrap(), false), Err(Mismatch::SlotSize { .. })));
        assert!(matches!(limits.check(many.unwrap(), false), Err(Mismatch::Slots { .. })));
    }

    #[test]
    fn a_user_reads_which_endpoint_and_why() {
        let process = Credentials::new(5, 7, 7);
        let peer = Peer::new(12, process);
        let why = Mismatch::Protection { required: Protection::Sealed, found: Protection::Volatile };
        let text = Unpaired::new(peer, false, why).to_string();
        let begin = "not paired with receiver 12 (pid 5 of user 7): the receiver requires sealed messages";
        assert!(text.starts_with(begin), "{text}");
    }
}
