//! What users of a broker take up, and the refusal when it is too much.

use std::fmt;

/// Something that a user takes up at a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Resource {
    /// Shared memory of senders: the size of their slots times the most that there may be.
    Bytes,
    /// Slots of senders.
    Slots,
    /// Channels on which the user has endpoints.
    Channels,
    /// Links that the user's endpoints caused by being opened.
    Links,
    /// Connections to the broker.
    Connections,
    /// Descriptors that the broker holds for the user.
    Descriptors,
    /// Senders and receivers.
    Endpoints,
}

impl Resource {
    /// All of them, in the order of their numbers.
    pub const ALL: &[Self] =
        &[Self::Bytes, Self::Slots, Self::Channels, Self::Links, Self::Connections, Self::Descriptors, Self::Endpoints];

    /// As policies call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Slots => "slots",
            Self::Channels => "channels",
            Self::Links => "links",
            Self::Connections => "connections",
            Self::Descriptors => "descriptors",
            Self::Endpoints => "endpoints",
        }
    }

    /// So much of it, in words.
    #[must_use]
    pub fn describe(self, amount: u64) -> String {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = UNITS.into_iter().find(|&(power, _)| amount >= 1 << power);
        match (self, unit) {
            (Self::Bytes, Some((power, unit))) => format!("{:.1} {unit}", amount as f64 / (1u64 << power) as f64),
            _ => format!("{amount} {}", self.name()),
        }
    }
}

/// A user would take up more than the quota.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct QuotaExceeded {
    /// The user.
    pub user: u32,
    /// Of what.
    pub resource: Resource,
    /// How much was asked for.
    pub asked: u64,
    /// How much is in use.
    pub used: u64,
    /// How much there may be.
    pub limit: u64,
    /// Which rule of the policy says so.
    pub rule: String,
}

impl QuotaExceeded {
    /// A user that uses so much asked for so much more, and the limit of this rule is less than both together.
    #[must_use]
    pub fn new(user: u32, resource: Resource, asked: u64, used: u64, limit: u64, rule: impl Into<String>) -> Self {
        Self { user, resource, asked, used, limit, rule: rule.into() }
    }
}

impl fmt::Display for QuotaExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, resource, asked, used, limit, rule } = self;
        let [asked, used, limit] = [asked, used, limit].map(|&amount| resource.describe(amount));
        write!(
            f,
            "user {user} has {used} of {limit} (quota {:?} of rule {rule:?}), and asked for {asked} more: close something, \
             or have the quota raised",
            resource.name()
        )
    }
}

impl std::error::Error for QuotaExceeded {}
