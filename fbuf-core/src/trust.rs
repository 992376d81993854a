//! Memory that a peer could change is not a slice, unless that peer is trusted not to change it.
//!
//! A slice of Rust promises that its bytes do not change while it lives (`&[u8]`), or that no other code reads or
//! writes them (`&mut [u8]`). For most memory the kernel keeps that promise: a sender's segments carry
//! `F_SEAL_FUTURE_WRITE`, one-shots `F_SEAL_WRITE`, copies are private. For two kinds of memory it cannot: what a
//! sender may still write (volatile and leased messages), and slots that a receiver made for a sender. Such memory
//! becomes a slice only for a [`Trusted`] peer, and this type is the only way to it: without one, a message is copied
//! (`Mechanism::seen_from`), and a slot is not taken ([`ReceivedGrant`](crate::socket::link_message::ReceivedGrant)). That a peer is trusted only the broker
//! says ([`introduced`](crate::introduced)).

use crate::{peer::Peer, protection::Mechanism};

/// A peer that this process trusts not to change memory that the peer could change: a process of the same user, which
/// can write the memory of this one anyway (ptrace(2)), or one that the policy of the broker trusts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trusted(Peer);

impl Trusted {
    /// The same peer, if it is trusted, as the broker [introduced](crate::introduced) it.
    pub(crate) fn new(peer: Peer) -> Option<Self> {
        (peer.same_user || peer.trusted).then_some(Self(peer))
    }

    /// The peer.
    #[must_use]
    pub(crate) fn peer(self) -> Peer {
        self.0
    }
}

impl Mechanism {
    /// The mechanism by which messages of this peer are read, where the broker named this one: of a peer that is not
    /// trusted, what it could change is copied.
    #[must_use]
    pub(crate) fn seen_from(self, peer: Peer) -> Self {
        match self {
            Self::Shared | Self::Lease if Trusted::new(peer).is_none() => Self::Copy,
            mechanism => mechanism,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Credentials;

    #[test]
    fn what_an_untrusted_peer_could_change_is_copied() {
        let process = Credentials { pid: 1, uid: 1, gid: 1 };
        let peer = |same_user, trusted| Peer {
            endpoint: 1,
            process,
            same_user,
            trusted,
            link: crate::peer::LinkId::default(),
        };
        for mechanism in [Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot] {
            for trusted in [peer(true, true), peer(true, false), peer(false, true)] {
                assert_eq!(mechanism.seen_from(trusted), mechanism);
            }
            let seen = mechanism.seen_from(peer(false, false));
            assert_eq!(seen, if mechanism == Mechanism::OneShot { mechanism } else { Mechanism::Copy });
        }
    }
}
