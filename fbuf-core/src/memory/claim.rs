//! That memory of a peer is one sender's. A receiver that copies messages has as much memory of its own as its senders have
//! slots. A sender that passed off one memory as that of many would have it make many times what the sender has.

use std::{
    collections::BTreeMap,
    os::fd::BorrowedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::sys::stat::fstat;

use super::{leasable::FileId, memfd::unmappable};
use crate::violation::Unsuitable;

/// Whose the memory is that is claimed in this process, and how often: receivers of one process may be linked with one
/// sender.
static CLAIMED: Mutex<BTreeMap<FileId, (u64, usize)>> = Mutex::new(BTreeMap::new());

fn claimed() -> MutexGuard<'static, BTreeMap<FileId, (u64, usize)>> {
    // What is done under the lock does not panic.
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As long as it exists, memory is that of one sender and of no other.
#[derive(Debug)]
pub(crate) struct Claim(Option<FileId>);

impl Claim {
    /// Of this memory, for the sender with this number.
    ///
    /// # Errors
    /// [`Unsuitable::Shared`]: it is that of another.
    pub(crate) fn of(memory: BorrowedFd<'_>, sender: u64) -> Result<Self, Unsuitable> {
        if cfg!(miri) {
            // There it is no file.
            return Ok(Self(None));
        }
        let file = FileId::of(&fstat(memory).map_err(unmappable)?);
        let mut claimed = claimed();
        let (owner, count) = claimed.entry(file).or_insert((sender, 0));
        if *owner != sender {
            return Err(Unsuitable::Shared);
        }
        *count += 1;
        Ok(Self(Some(file)))
    }

    /// Whether both are of the same memory.
    pub(crate) fn is_of_memory_of(&self, other: &Self) -> bool {
        self.0.is_some() && self.0 == other.0
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(file) = self.0 else { return };
        let mut claimed = claimed();
        match claimed.get_mut(&file) {
            Some((_, count)) if *count > 1 => *count -= 1,
            _ => drop(claimed.remove(&file)),
        }
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::memory::Map;

    #[test]
    fn memory_is_one_senders_until_the_last_of_its_claims_is_gone() {
        let (_map, memory) = Map::create("fbuf-test", 4096).unwrap();
        let again = memory.try_clone().unwrap();
        let claim = |sender| Claim::of(again.as_fd(), sender);
        let first = Claim::of(memory.as_fd(), 1).unwrap();
        let second = claim(1).unwrap();
        assert!(first.is_of_memory_of(&second));
        assert_eq!(claim(2).unwrap_err(), Unsuitable::Shared);
        drop(first);
        assert_eq!(claim(2).unwrap_err(), Unsuitable::Shared);
        drop(second);
        let other = claim(2).unwrap();
        assert_eq!(claim(1).unwrap_err(), Unsuitable::Shared);
        let (_map, memory) = Map::create("fbuf-test", 4096).unwrap();
        assert!(!Claim::of(memory.as_fd(), 1).unwrap().is_of_memory_of(&other));
    }
}
