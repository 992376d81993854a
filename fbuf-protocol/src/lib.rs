//! The control protocol: a fixed greeting that every version understands, then a tarpc service with
//! messages that carry descriptors.

pub mod address;
pub mod channel;
mod greeting;
mod identity;
pub mod name;
mod quota;
pub mod runtime;
mod status;
mod transport;
mod unpaired;
mod wire;

use fbuf_core::{
    limits::{MAX_ENDPOINTS, MAX_LINKS, MAX_ONE_SHOTS, MAX_PEER_USERS},
    peer::{LinkId, Peer},
    protection::{Mechanism, Protection},
    slot::{GeometryError, GeometryTerms},
    socket::{forms, wire::Descriptor},
};
use serde::{Deserialize, Serialize};

use crate::{channel::ChannelNameError, name::Label};

pub use greeting::{Greeting, GreetingError, VERSION, Verdict};
pub use identity::Secret;
pub use quota::{QuotaExceeded, Resource};
pub use status::{ClientStatus, EndStatus, EndpointStatus, MAX_PAGE, News, Oldest, Report};
// What is fuzzed is decoded as here, but without a socket.
#[cfg(fuzzing)]
pub use transport::Parcel;
pub use transport::{Call, ClientTransport, Packets, ServerTransport, Turn};
pub use unpaired::{Accepted, Limits, Mismatch, Unpaired};
pub use wire::{Page, Wire};

/// What a client may ask of its broker.
#[tarpc::service]
pub trait Control {
    /// Opens an endpoint on a channel. The client chooses the number by which both sides speak of it.
    async fn open(endpoint: u64, open: Open) -> Result<Opened, Wire<Refusal>>;
    /// Closes an endpoint, which has done so much at last. Its links are not touched.
    async fn close(endpoint: u64, last: Report);
    /// Waits until there are introductions for this client, or a report is wanted; nothing after a while. With the
    /// receipt of the last news shows that they were read.
    async fn news(receipt: u64) -> News;
    /// What endpoints of this client are doing, at most [`MAX_PAGE`] at a time.
    async fn report(reports: Page<(u64, Report)>, last: bool);
    /// The endpoints that this user may see and that have a greater number, in this order, at most [`MAX_PAGE`] of
    /// them. The first page, behind 0, waits a moment for their reports.
    async fn status(behind: u64) -> Vec<EndpointStatus>;
    /// The same of clients.
    async fn clients(behind: u64) -> Vec<ClientStatus>;
    /// The endpoints of the other end of its channel with which an endpoint of this client is not paired, and why:
    /// those with a greater number than `behind`, in this order, at most [`MAX_PAGE`] of them.
    async fn unpaired(endpoint: u64, behind: u64) -> Vec<(u64, Wire<Unpaired>)>;
}

/// What is opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The name of the channel. Made by its first endpoint, gone with its last.
    pub channel: String,
    /// Which end.
    pub role: Role,
    /// What its program calls it, for people who watch.
    pub label: Option<Wire<Label>>,
    /// It may be linked with endpoints of these users only, at most [`MAX_PEER_USERS`]; none: with those of all.
    pub users: Option<Vec<u32>>,
    /// If it was open at an earlier broker that is gone: what that one had said.
    pub earlier: Option<PreviousRegistration>,
}

/// An endpoint that was open at an earlier broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviousRegistration {
    /// What proves that it is the endpoint that its peers know.
    pub secret: Secret,
    /// Its links. Two endpoints that name the same one are not introduced again.
    #[serde(with = "wire::links")]
    pub links: Vec<LinkId>,
}

/// Which end of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It sends.
    Sender {
        /// Its slots, of which it has no more.
        geometry: GeometryTerms,
        /// How it protects what it sends.
        #[serde(with = "forms::Mechanism")]
        mechanism: Mechanism,
        /// Where its slots come from.
        slots: Slots,
    },
    /// It receives.
    Receiver {
        /// The least protection that it accepts.
        #[serde(with = "forms::Protection")]
        require: Protection,
        /// The slots that it accepts.
        accepts: Limits,
    },
}

impl Role {
    /// A sender of slots without headers.
    #[must_use]
    pub const fn sender(slot_bytes: u64, max_slots: u64, mechanism: Mechanism, slots: Slots) -> Self {
        Self::Sender { geometry: GeometryTerms::new(slot_bytes, max_slots), mechanism, slots }
    }

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sender { .. } => "sender",
            Self::Receiver { .. } => "receiver",
        }
    }
}

/// Where the slots of a sender come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slots {
    /// It makes segments of them.
    Segments,
    /// Each is memory of its own that the broker makes, for [`Mechanism::Lease`].
    Broker {
        /// Whether in huge pages.
        huge: bool,
    },
    /// Each is memory of its own that its one receiver makes, for [`Mechanism::Lease`].
    Receiver,
    /// Each is memory of its own that the sender has, since an earlier broker made it. Nobody can say any more
    /// that it can be leased, so new receivers copy it.
    Sender,
}

/// What was opened.
#[derive(Debug, Serialize, Deserialize)]
pub struct Opened {
    /// How its peers will know the endpoint: [`Peer::endpoint`].
    pub endpoint: u64,
    /// What proves to the next broker that this is the endpoint.
    pub secret: Secret,
    /// The slots, if the broker makes them: without a page yet, and to be opened for writing by this user.
    pub slots: Vec<Descriptor>,
}

/// The most introductions in one answer.
pub const MAX_INTRODUCTIONS: usize = 32;

/// Why the broker will not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The channel cannot be called that.
    #[error(transparent)]
    Channel(#[from] ChannelNameError),
    /// The slots cannot be like that.
    #[error("{reason}")]
    Geometry {
        /// Why not.
        reason: String,
    },
    /// A receiver requires more than a sender of the channel gives.
    #[error(
        "a receiver was to be opened that requires {required} messages, and those of sender {} ({}) are {found}: have that sender send {required} ones, or require less",
        sender.endpoint, sender.process
    )]
    SenderGivesLess {
        /// Which sender.
        sender: Peer,
        /// What is required.
        required: Protection,
        /// What there is.
        found: Protection,
    },
    /// A sender gives less than a receiver of the channel requires.
    #[error(
        "a sender of {found} messages was to be opened, and receiver {} ({}) of the channel requires {required} ones: send such, or have it require less",
        receiver.endpoint, receiver.process
    )]
    ReceiverRequiresMore {
        /// Which receiver.
        receiver: Peer,
        /// What it requires.
        required: Protection,
        /// What there would be.
        found: Protection,
    },
    /// The slots cannot be made.
    #[error("slots to be leased were asked for, and the broker cannot make them: {reason}")]
    NoSlots {
        /// Why not.
        reason: String,
    },
    /// A sender's slots come from its one receiver.
    #[error(
        "one more receiver was to be opened, and the slots of sender {} ({}) come from the one receiver that there is: \
         have that sender use slots of its own, or close that receiver",
        sender.endpoint, sender.process
    )]
    OneReceiver {
        /// Which sender.
        sender: Peer,
    },
    /// There are too many for one sender.
    #[error(
        "a sender was to be opened whose slots come from its one receiver, and the channel has {receivers}: \
         use slots of its own"
    )]
    SeveralReceivers {
        /// How many.
        receivers: usize,
    },
    /// The same endpoint is open on another connection.
    #[error("an endpoint was to be opened again, and is open on another connection: that one has to end first")]
    Elsewhere,
    /// An endpoint of the same user does not fit.
    #[error("{end}")]
    Unpaired {
        /// Which endpoint, and why.
        end: Unpaired,
    },
    /// The policy says that other users get one-shot messages on this channel.
    #[error(
        "the channel {channel:?} is confidential by the broker's policy: its messages are one-shots, so ask for no other mechanism, \
         and for at most {MAX_ONE_SHOTS} slots"
    )]
    Confidential {
        /// The channel.
        channel: String,
    },
    /// A list of users is too long.
    #[error("{users} users were named as peers: at most {MAX_PEER_USERS} are possible")]
    TooManyUsers {
        /// How many.
        users: usize,
    },
    /// The number is taken.
    #[error("endpoint {endpoint} was to be opened, and is open already")]
    EndpointInUse {
        /// The number.
        endpoint: u64,
    },
    /// Too many.
    #[error(
        "one more endpoint was to be opened, and this client has {MAX_ENDPOINTS} already: close some, or connect once more"
    )]
    TooManyEndpoints,
    /// Too many ends of a kind on one channel.
    #[error("one more endpoint was to be opened on a channel that has {MAX_LINKS} of the kind: use several channels")]
    ChannelFull,
    /// The user has its share of the ends of a channel.
    #[error(
        "user {user} has {ends} {role}s on the channel {channel:?}, which is one user's share of {MAX_LINKS}: \
         use several channels"
    )]
    Share {
        /// The user.
        user: u32,
        /// How many the user has.
        ends: usize,
        /// Of which kind: sender, or receiver.
        role: String,
        /// The channel.
        channel: String,
    },
    /// No rule of the policy allows it.
    #[error(
        "a {role} was to be opened on the channel {channel:?}, and {}: ask the user that runs the broker for one",
        no_rule(*user, rules)
    )]
    NotPermitted {
        /// The user that asked.
        user: u32,
        /// A sender, or a receiver.
        role: String,
        /// The channel.
        channel: String,
        /// The rules about this user.
        rules: Vec<String>,
    },
    /// The user takes up too much already.
    #[error(transparent)]
    QuotaExceeded(#[from] QuotaExceeded),
    /// The broker lacks something that it takes to open an endpoint.
    #[error("an endpoint was to be opened, and the broker cannot: {what}; try again")]
    Exhausted {
        /// What it lacks.
        what: String,
    },
}

/// That none of the rules about a user allows something.
fn no_rule(user: u32, rules: &[String]) -> String {
    match rules {
        [] => format!("the broker's policy has no rule about user {user}"),
        rules => format!("no rule of the broker's policy about user {user} allows that ({})", rules.join(", ")),
    }
}

impl From<GeometryError> for Refusal {
    fn from(error: GeometryError) -> Self {
        Self::Geometry { reason: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_hears_which_rules_do_not_allow_it_or_that_there_are_none() {
        let refused = |rules: &[&str]| {
            let rules = rules.iter().map(ToString::to_string).collect();
            Refusal::NotPermitted { user: 7, role: "sender".into(), channel: "c".into(), rules }.to_string()
        };
        let said = refused(&[]);
        assert!(said.contains("has no rule about user 7: ask") && !said.contains("()"), "{said}");
        assert!(refused(&["one", "two"]).contains("about user 7 allows that (one, two): ask"));
    }
}
