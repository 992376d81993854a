//! How much of this process peers of other users may take up: links of each endpoint, and descriptors for them.
//!
//! The broker bounds the endpoints of a user, and so the links that these have. It cannot know of links that are left: a
//! peer may close its endpoint and keep its end of a link, and an endpoint that its program does not look at has links
//! with peers that are gone. So each endpoint counts its links with a user, and the process the descriptors, with those of
//! sockets that are kept since the peer has not received what it was sent (`under_way`).

use std::{collections::BTreeMap, mem, sync::Mutex};

use nix::sys::resource::{Resource, getrlimit};

use crate::{
    limits::MAX_ENDS_OF_USER,
    peer::Peer,
    process::fork::{ForkMutex, Generation, Rank},
    socket::under_way,
};

/// How many links with one other user an endpoint has at most: as many as that user may have endpoints on the channel.
pub const MOST_LINKS: usize = MAX_ENDS_OF_USER;
/// How many descriptors a link takes more once the user of its peer is found out to be [slow](super::waiters).
pub const OF_RELAY: u64 = 2;
/// Of so many parts of this process's descriptors, peers of other users may take one.
const PARTS: u64 = 2;

/// The descriptors that each other user has.
#[derive(Debug)]
pub(crate) struct Taken(BTreeMap<u32, u64>);

pub(crate) static TAKEN: ForkMutex<Taken> =
    ForkMutex::new(Rank::Shares, Mutex::new(Taken(BTreeMap::new())), |taken| taken.forget());

impl Taken {
    /// In a child that was forked, which has no links: what its parent's take up is not counted there. Neither allocates
    /// nor frees.
    fn forget(&mut self) {
        mem::forget(mem::take(&mut self.0));
    }
}

/// What the user of a peer takes up, for as long as this exists.
#[derive(Debug)]
pub struct Share {
    user: u32,
    descriptors: u64,
    generation: Generation,
}

/// The user of a peer, if there is a bound on what that takes up: another one, and not root.
#[must_use]
pub fn bounded(peer: &Peer) -> Option<u32> {
    Some(peer.process.uid).filter(|&user| !peer.same_user && user != 0)
}

impl Share {
    /// So many descriptors more for this user; none, if they would be too many. As at the broker, of n users each may have
    /// one part in n + 1 of what the others have left.
    #[must_use]
    pub fn take(user: u32, descriptors: u64) -> Option<Self> {
        Self::take_now(user, descriptors).or_else(|| {
            under_way::tidy();
            Self::take_now(user, descriptors)
        })
    }

    fn take_now(user: u32, descriptors: u64) -> Option<Self> {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let taken = &mut TAKEN.lock().0;
        let others = taken.iter().filter(|&(&other, _)| other != user);
        let (users, sum) = others.fold((1, 0), |(users, sum), (_, descriptors)| (users + 1, sum + descriptors));
        let most = (limit / PARTS).saturating_sub(sum) / (users + 1);
        let own = taken.get(&user).copied().unwrap_or(0) + descriptors;
        if own > most {
            return None;
        }
        taken.insert(user, own);
        Some(Self { user, descriptors, generation: Generation::current() })
    }

    /// So many descriptors more for this user, which has them already.
    pub(crate) fn keep(user: u32, descriptors: u64) -> Self {
        *TAKEN.lock().0.entry(user).or_default() += descriptors;
        Self { user, descriptors, generation: Generation::current() }
    }
}

/// How many descriptors a user has.
#[cfg(test)]
pub(crate) fn taken(user: u32) -> u64 {
    TAKEN.lock().0.get(&user).copied().unwrap_or(0)
}

impl Drop for Share {
    fn drop(&mut self) {
        // A child that was forked does not count what its parent has.
        if !self.generation.is_current() {
            return;
        }
        let taken = &mut TAKEN.lock().0;
        if let Some(own) = taken.get_mut(&self.user) {
            *own -= self.descriptors;
            if *own == 0 {
                taken.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_left_for_the_next_user_and_half_for_the_process() {
        // Others would have a part.
        #[cfg(not(miri))]
        if !crate::tests::is_alone(
            "socket::shares::tests::some_descriptors_are_left_for_the_next_user_and_half_for_the_process",
        ) {
            return;
        }
        const USERS: std::ops::Range<u32> = 4_000_000_000..4_000_000_008;
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let greedy: Vec<Vec<_>> = USERS.map(|user| (0..).map_while(|_| Share::take(user, 3)).collect()).collect();
        let counts: Vec<_> = greedy.iter().map(Vec::len).collect();
        assert!(counts.iter().all(|&count| count > 0) && counts.is_sorted_by(|more, less| more >= less), "{counts:?}");
        assert!(counts[0] as u64 * 3 > limit / PARTS / 3, "{counts:?} of {limit}");
        assert!(3 * counts.iter().sum::<usize>() as u64 <= limit / PARTS, "{counts:?} of {limit}");
        assert!(Share::take(USERS.start, u64::from(u32::MAX) << 8).is_none());
        drop(greedy);
        assert!(!TAKEN.lock().0.keys().any(|user| USERS.contains(user)));
    }
}
