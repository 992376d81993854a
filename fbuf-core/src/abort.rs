//! Why one side of a link broke off, as it says in its own page before it goes.

use std::fmt;

/// Why a stream was broken off by the side that ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Abort {
    /// The program said so, with a number that means something to its peers.
    Code(u32),
    /// A panic dropped the endpoint.
    Panic,
    /// The sender was dropped without a word, although it had announced to say when its stream is complete.
    Unfinished,
    /// The sender has ended the link to this receiver, and not its stream.
    Disconnected,
    /// The receiver's process had no memory or no descriptor left for the link.
    Exhausted,
    /// The receiver found that the sender broke a rule of the link.
    Violation,
}

impl Abort {
    /// A word of shared memory for this, or for an end in order, which is zero.
    pub(crate) fn to_word(this: Option<Self>) -> u64 {
        match this {
            None => 0,
            Some(Self::Code(code)) => 1 << 32 | u64::from(code),
            Some(Self::Panic) => 2 << 32,
            Some(Self::Unfinished) => 3 << 32,
            Some(Self::Disconnected) => 4 << 32,
            Some(Self::Exhausted) => 5 << 32,
            Some(Self::Violation) => 6 << 32,
        }
    }

    /// What a peer's word says. One that means nothing is no end in order.
    pub(crate) fn from_word(word: u64) -> Option<Self> {
        match (word >> 32, word as u32) {
            (0, 0) => None,
            (2, _) => Some(Self::Panic),
            (3, _) => Some(Self::Unfinished),
            (4, _) => Some(Self::Disconnected),
            (5, _) => Some(Self::Exhausted),
            (6, _) => Some(Self::Violation),
            (_, code) => Some(Self::Code(code)),
        }
    }
}

impl fmt::Display for Abort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "with code {code}"),
            Self::Panic => write!(f, "in a panic"),
            Self::Unfinished => write!(f, "without a word"),
            Self::Disconnected => write!(f, "for this receiver alone"),
            Self::Exhausted => write!(f, "for lack of memory or descriptors"),
            Self::Violation => write!(f, "since a rule of the link was broken"),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_word_says_what_was_said_and_any_other_is_no_end_in_order() {
        let codes = [Abort::Code(0), Abort::Code(u32::MAX)];
        let others = [Abort::Panic, Abort::Unfinished, Abort::Disconnected, Abort::Exhausted, Abort::Violation];
        for abort in codes.into_iter().chain(others).map(Some).chain([None]) {
            assert_eq!(Abort::from_word(Abort::to_word(abort)), abort);
        }
        for word in [1, u64::MAX, 7 << 32] {
            assert!(Abort::from_word(word).is_some());
        }
    }
}
