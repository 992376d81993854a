//! What a program asks of the messages of a sender, and whether it can all be meant.

use std::time::Duration;

use fbuf_core::{
    memory::Pages,
    protection::{Mechanism, Protection},
};

use super::protection::ProtectionRequest;

/// Options of a sender or receiver that contradict each other, or themselves. Nothing was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// The mechanism gives less than the protection.
    #[error(
        "messages that are {mechanism} (mechanism) are {found} only, and {protection} ones were asked for (protection): \
         leave one of the two out, or name a mechanism that gives as much",
        found = .mechanism.protection()
    )]
    Weaker {
        /// What was asked for.
        protection: Protection,
        /// By which means; slots of a receiver are leased.
        mechanism: Mechanism,
    },
    /// The slots are to be the receiver's, which are leased, and another mechanism was named.
    #[error(
        "slots of the receiver are leased, and messages that are {mechanism} were asked for (mechanism): leave one of the \
         two out"
    )]
    FromReceiver {
        /// The mechanism that was named.
        mechanism: Mechanism,
    },
    /// Slots that are leased or sent once cannot be guarded.
    #[error(
        "no guard can watch slots that are {mechanism}: this process unmaps or gives away such a slot when it sends it; \
         leave the guard out, or ask for other slots"
    )]
    Guard {
        /// How the messages are to be protected.
        mechanism: Mechanism,
    },
    /// Only slots that this sender leases are memory of their own, in pages of some size.
    #[error(
        "only the slots of a sender that leases its own lie in pages of a size that can be chosen, and {pages} were asked \
         for (pages): ask for leased messages, or leave the pages out"
    )]
    Pages {
        /// The pages that were asked for.
        pages: Pages,
    },
    /// The broker's policy says that the channel is confidential, so that its messages are one-shots.
    #[error(
        "the channel is confidential by the broker's policy, so that its messages are one-shots, with which {asked} cannot \
         be had: leave it out"
    )]
    Confidential {
        /// What one-shots cannot have, in words.
        asked: &'static str,
    },
    /// Slots that are leased are all made when the sender is opened, and it was to grow.
    #[error(
        "slots that are leased are all made when the sender is opened, and growth to {limit} was asked for: ask for as many \
         then"
    )]
    Growth {
        /// To how many.
        limit: u64,
    },
    /// A lossy sender waits for no receiver, and something was asked for by which it would.
    #[error("a lossy sender never waits for receivers, which contradicts {asked}: leave one of the two out")]
    Lossy {
        /// What contradicts it, in words.
        asked: &'static str,
    },
    /// A limit, or a list of users, leaves nothing that the endpoint could exchange.
    #[error("an endpoint with {asked} never exchanges a message: allow more")]
    Nothing {
        /// What leaves nothing, in words.
        asked: &'static str,
    },
}

/// How messages are to be protected, as far as a program has said.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Options {
    pub protection: Option<Protection>,
    pub mechanism: Option<Mechanism>,
    pub from_receiver: bool,
    pub guard: Option<bool>,
    pub pages: Option<Pages>,
    /// The broker has said that the channel is confidential.
    pub is_confidential: bool,
}

impl Options {
    /// Whether it can all be meant of a lossy sender.
    pub(super) fn check_lossy(&self, disconnect_after: Option<Duration>) -> Result<(), OptionsError> {
        match (self.from_receiver, disconnect_after) {
            (true, _) => Err(OptionsError::Lossy { asked: "slots that its receiver has to give back (from_receiver)" }),
            (_, Some(_)) => {
                Err(OptionsError::Lossy { asked: "disconnecting those that hold it up (disconnect_after)" })
            }
            _ => Ok(()),
        }
    }

    /// What all of it amounts to.
    pub(super) fn check(&self, slot_size: u64) -> Result<ProtectionRequest, OptionsError> {
        let Self { protection, mechanism, from_receiver, guard, pages, is_confidential } = *self;
        if is_confidential {
            return match (guard, pages) {
                (Some(true), _) => Err(OptionsError::Confidential { asked: "messages with a guard" }),
                (_, Some(_)) => Err(OptionsError::Confidential { asked: "slots in a kind of pages" }),
                // One-shots are sealed, which is the highest level.
                _ => Ok(ProtectionRequest::Confidential),
            };
        }
        let mechanism = match mechanism {
            Some(other) if from_receiver && other != Mechanism::Lease => {
                return Err(OptionsError::FromReceiver { mechanism: other });
            }
            None if from_receiver => Some(Mechanism::Lease),
            named => named,
        };
        if let (Some(protection), Some(mechanism)) = (protection, mechanism)
            && mechanism.protection() < protection
        {
            return Err(OptionsError::Weaker { protection, mechanism });
        }
        let wanted = match mechanism {
            Some(_) if from_receiver => ProtectionRequest::FromReceiver,
            Some(mechanism) => ProtectionRequest::Means(mechanism),
            None => ProtectionRequest::Level(protection.unwrap_or_default()),
        };
        if let Some(pages) = pages
            && !matches!(
                wanted,
                ProtectionRequest::Means(Mechanism::Lease) | ProtectionRequest::Level(Protection::Leased)
            )
        {
            return Err(OptionsError::Pages { pages });
        }
        match guard {
            Some(true) if mechanism == Some(Mechanism::OneShot) => {
                Err(OptionsError::Guard { mechanism: Mechanism::OneShot })
            }
            Some(true) if wanted.may_lease(slot_size) => Err(OptionsError::Guard { mechanism: Mechanism::Lease }),
            _ => Ok(wanted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuning::LEASE_FROM;

    const SMALL: u64 = 64;

    #[test]
    fn options_that_contradict_each_other_are_an_error_in_whatever_order_they_are_given() {
        let of_receiver = Options { from_receiver: true, ..Options::default() };
        let refused = [
            (
                Options {
                    protection: Some(Protection::Sealed),
                    mechanism: Some(Mechanism::Lease),
                    ..Options::default()
                },
                OptionsError::Weaker { protection: Protection::Sealed, mechanism: Mechanism::Lease },
            ),
            (
                Options { protection: Some(Protection::Sealed), ..of_receiver },
                OptionsError::Weaker { protection: Protection::Sealed, mechanism: Mechanism::Lease },
            ),
            (
                Options { mechanism: Some(Mechanism::Copy), ..of_receiver },
                OptionsError::FromReceiver { mechanism: Mechanism::Copy },
            ),
            (Options { guard: Some(true), ..of_receiver }, OptionsError::Guard { mechanism: Mechanism::Lease }),
            (
                Options { guard: Some(true), mechanism: Some(Mechanism::OneShot), ..Options::default() },
                OptionsError::Guard { mechanism: Mechanism::OneShot },
            ),
            (Options { pages: Some(Pages::Base), ..of_receiver }, OptionsError::Pages { pages: Pages::Base }),
            (Options { pages: Some(Pages::Huge), ..Options::default() }, OptionsError::Pages { pages: Pages::Huge }),
        ];
        for (options, error) in refused {
            assert_eq!(options.check(SMALL).unwrap_err(), error, "{options:?}");
        }
        let guarded = Options { protection: Some(Protection::Leased), guard: Some(true), ..Options::default() };
        assert_eq!(guarded.check(LEASE_FROM).unwrap_err(), OptionsError::Guard { mechanism: Mechanism::Lease });
        assert!(guarded.check(SMALL).is_ok(), "slots of this size are copied, and can be guarded");
    }

    #[test]
    fn what_one_shots_cannot_have_is_an_error_on_a_confidential_channel() {
        let confidential = Options { is_confidential: true, ..Options::default() };
        let guarded = Options { guard: Some(true), ..confidential };
        let paged = Options { protection: Some(Protection::Leased), pages: Some(Pages::Base), ..confidential };
        for options in [guarded, paged] {
            assert!(matches!(options.check(SMALL), Err(OptionsError::Confidential { .. })), "{options:?}");
        }
        let sealed = Options { protection: Some(Protection::Sealed), guard: Some(false), ..confidential };
        assert!(matches!(sealed.check(SMALL), Ok(ProtectionRequest::Confidential)));
    }

    #[test]
    fn options_that_go_together_are_taken_together() {
        let leased = Options { protection: Some(Protection::Leased), pages: Some(Pages::Base), ..Options::default() };
        assert!(matches!(leased.check(SMALL), Ok(ProtectionRequest::Level(Protection::Leased))));
        let stronger = Options { mechanism: Some(Mechanism::OneShot), guard: Some(false), pages: None, ..leased };
        assert!(matches!(stronger.check(SMALL), Ok(ProtectionRequest::Means(Mechanism::OneShot))));
        let given = Options { mechanism: Some(Mechanism::Lease), from_receiver: true, pages: None, ..leased };
        assert!(matches!(given.check(SMALL), Ok(ProtectionRequest::FromReceiver)));
        let guarded = Options { guard: Some(true), mechanism: Some(Mechanism::Copy), ..Options::default() };
        assert!(matches!(guarded.check(SMALL), Ok(ProtectionRequest::Means(Mechanism::Copy))));
    }
}
