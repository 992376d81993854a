//! That memory of another user is one sender's of that user. A receiver that copies messages has as much memory of its own
//! as its senders have slots. A user that passed off one memory as that of many senders would have it make many times what
//! that user has.
//!
//! Each user is asked for itself: a user can pass on the memory of another user's sender, of which it was given a descriptor,
//! and is not to keep that sender off a channel.

use std::{collections::BTreeMap, os::fd::BorrowedFd, sync::Mutex};

use nix::sys::stat::fstat;

use crate::{
    memory::{leasable::FileId, memfd::unmappable},
    peer::Peer,
    process::fork::{ForkMutex, Rank},
    socket::NO_ID,
    violation::Unsuitable,
};

/// By user and memory that is claimed in this process: which sender's it is, and how often, since receivers of one process may
/// be linked with one sender.
type Claimed = BTreeMap<(u32, FileId), (u64, usize)>;

pub(crate) static CLAIMED: ForkMutex<Claimed> = ForkMutex::new(Rank::Claims, Mutex::new(BTreeMap::new()), |_| {});

/// As long as it exists, memory is that of one sender, and of no other of that user.
#[derive(Debug)]
pub(crate) struct Claim {
    /// None where Miri runs this.
    file: Option<FileId>,
    /// None for the own user, which can have this process make memory by other means, and for users that the broker cannot
    /// tell apart.
    user: Option<u32>,
}

impl Claim {
    /// Of this memory, for this sender.
    ///
    /// # Errors
    /// [`Unsuitable::Shared`]: it is that of another sender of that user.
    pub(crate) fn of(memory: BorrowedFd<'_>, sender: Peer) -> Result<Self, Unsuitable> {
        if cfg!(miri) {
            // There it is no file.
            return Ok(Self { file: None, user: None });
        }
        let file = FileId::of(&fstat(memory).map_err(unmappable("fstat"))?);
        let uid = sender.process.uid;
        let user = (!sender.same_user && uid != NO_ID).then_some(uid);
        if let Some(user) = user {
            let mut claimed = CLAIMED.lock();
            let (owner, count) = claimed.entry((user, file)).or_insert((sender.endpoint, 0));
            if *owner != sender.endpoint {
                return Err(Unsuitable::Shared);
            }
            *count += 1;
        }
        Ok(Self { file: Some(file), user })
    }

    /// Whether both are of the same memory.
    pub(crate) fn is_of_memory_of(&self, other: &Self) -> bool {
        self.file.is_some() && self.file == other.file
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(key) = self.user.zip(self.file) else { return };
        let mut claimed = CLAIMED.lock();
        match claimed.get_mut(&key) {
            Some((_, count)) if *count > 1 => *count -= 1,
            _ => drop(claimed.remove(&key)),
        }
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::{
        memory::Map,
        peer::{Credentials, LinkId},
    };
    use std::os::fd::{AsFd, OwnedFd};

    fn sender(endpoint: u64, uid: u32, same_user: bool) -> Peer {
        let process = Credentials { pid: 1, uid, gid: uid };
        Peer { endpoint, process, same_user, trusted: same_user, link: LinkId::default() }
    }

    fn memory() -> OwnedFd {
        Map::create("fbuf-test", 4096).unwrap().1
    }

    #[test]
    fn memory_is_one_senders_until_the_last_of_its_claims_is_gone() {
        let memory = memory();
        let again = memory.try_clone().unwrap();
        let claim = |endpoint| Claim::of(again.as_fd(), sender(endpoint, 1001, false));
        let first = Claim::of(memory.as_fd(), sender(1, 1001, false)).unwrap();
        let second = claim(1).unwrap();
        assert!(first.is_of_memory_of(&second));
        assert_eq!(claim(2).unwrap_err(), Unsuitable::Shared);
        drop(first);
        assert_eq!(claim(2).unwrap_err(), Unsuitable::Shared);
        drop(second);
        let other = claim(2).unwrap();
        assert_eq!(claim(1).unwrap_err(), Unsuitable::Shared);
        assert!(!Claim::of(self::memory().as_fd(), sender(1, 1001, false)).unwrap().is_of_memory_of(&other));
    }

    #[test]
    fn memory_that_another_user_passes_on_stays_its_senders() {
        let memory = memory();
        let claim = |endpoint, uid, same_user| Claim::of(memory.as_fd(), sender(endpoint, uid, same_user));
        let thief = claim(1, 1001, false).unwrap();
        let honest = claim(2, 1002, false).unwrap();
        assert!(thief.is_of_memory_of(&honest));
        // The same within the own user, and of users that may be different ones.
        let _own = [claim(3, 0, true).unwrap(), claim(4, 0, true).unwrap()];
        let _unknown = [claim(5, NO_ID, false).unwrap(), claim(6, NO_ID, false).unwrap()];
        assert_eq!(claim(7, 1002, false).unwrap_err(), Unsuitable::Shared);
    }
}
