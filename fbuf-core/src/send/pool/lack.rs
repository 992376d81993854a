//! What there is not enough of for a free slot to be used, and what helps.

use std::fmt;

use nix::errno::Errno;

use crate::{
    memory::{CannotReopen, FILE_SIZE, MemoryError, leasable::OPENING, limit_of_map},
    process::sys::os_error,
};

/// What there is not enough of for a free slot to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// Memory.
    Memory(Shortage),
    /// Descriptors of this process.
    Descriptors,
    /// The right to open the slot again: it belongs to the user that this process had when it opened the sender.
    Permission,
    /// A /proc, through which the slot would be opened again.
    Proc,
    /// The kernel's permission for a call.
    Refused {
        /// Which call.
        call: &'static str,
        /// What the kernel says.
        errno: Errno,
    },
}

impl Lack {
    /// Behind an error of what is to become a slot, which is given in words.
    pub(super) fn behind(error: &MemoryError, slot: &'static str) -> Self {
        let memory = Self::Memory(Shortage::behind(error, slot));
        let &MemoryError::Refused { call, ref error, .. } = error else { return memory };
        match (CannotReopen::of(error), os_error(error)) {
            (Some(CannotReopen::NoDescriptor), _) => Self::Descriptors,
            (Some(CannotReopen::NotPermitted), _) if call == OPENING => Self::Permission,
            (Some(CannotReopen::NoProc), _) if call == OPENING => Self::Proc,
            (_, None | Some(Errno::ENOMEM | Errno::ENOSPC)) => memory,
            (_, Some(errno)) => Self::Refused { call, errno },
        }
    }
}

/// Memory that could not be had: for what, which limit is in the way, and what helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    slot: &'static str,
    limit: &'static str,
    remedy: &'static str,
}

/// What is kept takes addresses and mappings.
const OF_ADDRESSES: &str = "raise the limit, or drop fbufs and messages that this process keeps";
/// One-shots that receivers keep are memory of their own.
const OF_ONE_SHOTS: &str = "let receivers drop what they keep, or free some";

impl Shortage {
    /// A one-shot, in words.
    pub(super) const ONE_SHOT: &str = "a one-shot";
    /// A leased slot, in words.
    pub(super) const LEASED: &str = "a leased slot";

    /// Behind an error of what is to become a slot, which is given in words.
    #[doc(hidden)]
    #[must_use]
    pub fn behind(error: &MemoryError, slot: &'static str) -> Self {
        let of_memory = if slot == Self::ONE_SHOT { OF_ONE_SHOTS } else { "free some" };
        let (limit, remedy) = match error {
            MemoryError::NotEnough { bound: FILE_SIZE, .. } => (FILE_SIZE, "raise it"),
            MemoryError::NotEnough { bound, .. } => (*bound, of_memory),
            MemoryError::Refused { error, .. } => match limit_of_map(error) {
                Some(limit) => (limit, OF_ADDRESSES),
                None => ("the kernel's word: ENOMEM, or ENOSPC", of_memory),
            },
        };
        Self { slot, limit, remedy }
    }

    /// For what there is no memory, in words.
    #[must_use]
    pub fn slot(&self) -> &'static str {
        self.slot
    }
}

/// The limit, and what helps.
impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.limit, self.remedy)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::memory::map::name_limit as limited_map;

    fn refused(error: io::Error) -> MemoryError {
        MemoryError::Refused { call: "mmap", asked: 1, error }
    }

    #[test]
    fn what_there_is_no_memory_for_is_named_with_the_limit_and_what_helps() {
        let machine = MemoryError::NotEnough { asked: 2, available: 1, bound: "MemAvailable of this machine" };
        let files = MemoryError::NotEnough { asked: 2, available: 1, bound: FILE_SIZE };
        let said = |error: &MemoryError, slot| match Lack::behind(error, slot) {
            Lack::Memory(shortage) => {
                assert_eq!(shortage.slot(), slot);
                shortage.to_string()
            }
            lack => panic!("{lack:?}"),
        };
        let (one_shot, leased) = (Shortage::ONE_SHOT, Shortage::LEASED);
        assert_eq!(said(&machine, one_shot), format!("MemAvailable of this machine; {OF_ONE_SHOTS}"));
        assert_eq!(said(&machine, leased), "MemAvailable of this machine; free some");
        assert_eq!(said(&files, one_shot), "the longest file of this process: RLIMIT_FSIZE, ulimit -f; raise it");
        let full = said(&refused(limited_map(Errno::ENOMEM)), leased);
        assert!(full.contains("RLIMIT_AS") && full.contains("vm.max_map_count") && full.contains("raise the limit"));
        let kernel = said(&refused(Errno::ENOSPC.into()), leased);
        assert!(kernel.contains("ENOSPC") && !kernel.contains("RLIMIT"), "{kernel}");
    }
}
