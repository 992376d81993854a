//! With which peers an endpoint may be linked.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use fbuf_core::{peer::Peer, process::apart};

use crate::sender::OptionsError;

/// Whether a peer is accepted.
type Question = dyn Fn(&Peer) -> bool + Send + Sync;

/// Which peers an endpoint accepts: the broker introduces no others of the users, and this process links with no others.
#[derive(Clone, Default)]
pub(crate) struct Acceptance {
    /// By the ids that the broker knows; none: all.
    pub users: Option<Vec<u32>>,
    pub accept: Option<Arc<Question>>,
}

impl Acceptance {
    /// Whether there can be any peers.
    pub fn check(&self) -> Result<(), OptionsError> {
        match &self.users {
            Some(users) if users.is_empty() => Err(OptionsError::Nothing { asked: "peers of no user" }),
            _ => Ok(()),
        }
    }

    /// Whether a link with this peer may be made. A question that panics was not answered with yes. From another user that
    /// has passed [much that takes long to close](apart::is_overrun) nothing more is taken.
    pub(crate) fn accepts(&self, peer: &Peer) -> bool {
        if !peer.same_user && apart::is_overrun(peer.process.uid) {
            return false;
        }
        let is_named = self.users.as_ref().is_none_or(|users| users.contains(&peer.process.uid));
        is_named
            && self
                .accept
                .as_ref()
                .is_none_or(|accept| catch_unwind(AssertUnwindSafe(|| accept(peer))).unwrap_or(false))
    }
}

impl fmt::Debug for Acceptance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let asks = self.accept.is_some();
        f.debug_struct("Acceptance").field("users", &self.users).field("asks", &asks).finish()
    }
}
