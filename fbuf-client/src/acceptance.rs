//! With which peers an endpoint may be linked.

use std::{fmt, io::stderr, process, sync::Arc};

use fbuf_core::{
    peer::Peer,
    process::{deferred, fork::Generation, threads::contain},
};

use crate::sender::OptionsError;

/// Whether a peer is accepted.
type Question = dyn Fn(&Peer) -> bool + Send + Sync;

/// A question of the program. It is asked and mostly dropped on the control thread, which goes on whatever it does.
pub(crate) struct Predicate(Option<Box<Question>>);

impl Predicate {
    pub(crate) fn new(question: impl Fn(&Peer) -> bool + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(question)))
    }

    /// A question that panics was not answered with yes.
    fn accepts(&self, peer: &Peer) -> bool {
        let generation = Generation::current();
        let accepts = self.0.as_ref().is_some_and(|question| contain(|| question(peer)) == Some(true));
        if !generation.is_current() {
            // The connection, its sockets and its endpoints are the parent's. By write(2), since another thread of the parent
            // may have had the lock on standard error.
            let said = "fbuf: a child that was forked in a predicate (accept) returns from it, and nothing of its parent goes on \
                        there: let it execute a program, or end by _exit(2)\n";
            let _ = nix::unistd::write(stderr(), said.as_bytes());
            process::abort();
        }
        accepts
    }
}

impl Drop for Predicate {
    fn drop(&mut self) {
        let question = self.0.take();
        contain(|| drop(question));
    }
}

/// Which peers an endpoint accepts: the broker introduces no others of the users, and this process links with no others.
#[derive(Clone, Default)]
pub(crate) struct Acceptance {
    /// By the ids that the broker knows; none: all.
    pub users: Option<Vec<u32>>,
    pub accept: Option<Arc<Predicate>>,
}

impl Acceptance {
    /// Whether there can be any peers.
    pub fn check(&self) -> Result<(), OptionsError> {
        match &self.users {
            Some(users) if users.is_empty() => Err(OptionsError::Nothing { asked: "peers of no user" }),
            _ => Ok(()),
        }
    }

    /// Whether a link with this peer may be made. From another user that has passed
    /// [much that takes long to close](deferred::is_overrun) nothing more is taken.
    pub(crate) fn accepts(&self, peer: &Peer) -> bool {
        if peer.other_user().is_some_and(deferred::is_overrun) {
            return false;
        }
        let is_named = self.users.as_ref().is_none_or(|users| users.contains(&peer.process.uid));
        is_named && self.accept.as_ref().is_none_or(|predicate| predicate.accepts(peer))
    }
}

impl fmt::Debug for Acceptance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let asks = self.accept.is_some();
        f.debug_struct("Acceptance").field("users", &self.users).field("asks", &asks).finish()
    }
}
