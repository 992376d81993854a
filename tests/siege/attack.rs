//! The attacks, and what stops each of them.

use fbuf_client::Violation;
use fbuf_core::limits::{
    GREETING_TIME, MAX_ANSWERS, MAX_AT_ONCE, MAX_DESCRIPTORS, MAX_ENDS_OF_USER, MAX_MESSAGE, MAX_REQUESTS,
    MAX_SEGMENTS, MAX_WAITING, OTHERS_SLOTS,
};
use fbuf_protocol::Resource;

/// Requests in a second that the attackers' user may make.
pub const REQUESTS_PER_SECOND: u32 = 1000;
/// To how many slots that sender grows which waits for all of its receivers.
pub const MOST_SLOTS: usize = 64;

/// The same of one that grows on boards that a receiver lies about.
pub const BOARD_SLOTS: usize = 4096;

/// What the attackers' user may take up, so that each attack meets the limit that it is about.
pub const fn quota(resource: Resource) -> u64 {
    match resource {
        Resource::Bytes => 16 << 20,
        Resource::Slots => 3 * OTHERS_SLOTS,
        Resource::Channels | Resource::Connections => 64,
        // More than fills the mailbox of one client.
        Resource::Links => 600,
        Resource::Endpoints => 1000,
        Resource::Descriptors => 1536,
        _ => panic!("the attackers have a quota of each resource"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attack {
    /// Garbage, before and after the greeting.
    Garbage,
    /// Beginnings of requests.
    HalfMessages,
    /// One byte more than a message may have, and more.
    HugeMessages,
    /// As many descriptors as the kernel takes with a message.
    Descriptors,
    /// Descriptors of every kind.
    WrongDescriptors,
    /// Greetings of other versions.
    OtherVersions,
    /// Connects, and says nothing.
    Silence,
    /// Asks, and never reads an answer.
    NeverReads,
    /// Asks what takes long to be answered, all at once.
    AsksAtOnce,
    /// Has itself introduced, and never fetches an introduction.
    NeverFetches,
    /// Has slots made that can be leased, and closed again, and never shows that it has read the answers that they travel
    /// with.
    LeavesSlots,
    /// Thousands of connections.
    Connections,
    /// Opens and closes as fast as it can.
    Churn,
    /// Takes up as much as it gets.
    Hoards(Resource),
    /// Opens as many ends as it gets of a channel that honest ones use.
    Crowds,
    /// Opens ends that honest ones on the same channel do not fit with.
    Demands,
    /// Garbage, half messages and huge ones over a link.
    GarbageOverLink,
    /// As many descriptors as the kernel takes, over a link.
    DescriptorsOverLink,
    /// Descriptors of every kind, where boards, lanes and segments are due.
    WrongDescriptorsOverLink,
    /// Descriptors that take longer to close than anybody waits, over a link, and behind them more of these.
    Lingers,
    /// As a receiver, rings a bell that never stops.
    BellsToSender,
    /// The same, as a sender.
    BellsToReceiver,
    /// Has its own end of a link filled to the brim, and never reads it.
    FillsLink,
    /// Takes messages, and never hands a slot back.
    NeverAcknowledges,
    /// Writes anything into its lane.
    LyingLane,
    /// Writes into its lanes, several of which are one and the same memory, that messages were left out, and no message.
    EndlessGaps,
    /// Hands back what it was never lent.
    LyingBoard,
    /// Closes one thing after the other.
    Closes,
    /// As a sender, announces growth without end, of other sizes than are due, and uses slots before they exist.
    AnnouncesGrowth,
    /// As a receiver, has a growing sender map boards of other sizes, without pages, or that it takes away again.
    LyingBoardSize,
    /// Is disconnected by its sender, and opens anew, for ever.
    ComesBack,
    /// Opens and closes ends that are linked with honest ones, as fast as it can.
    Relinks,
    /// Opens ends where honest ones have named other users, and some that name itself.
    Intrudes,
    /// Claims numbers, secrets and links of others, and its own twice.
    Claims,
}

/// What honest peers say of an attacker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    Violation(Violation),
    /// It is gone, and did not say so before.
    Died,
    /// It holds all slots, so many, of a sender that waits for it.
    HoldsAll(usize),
}

impl Attack {
    pub const ALL: [Self; 39] = [
        Self::Garbage,
        Self::HalfMessages,
        Self::HugeMessages,
        Self::Descriptors,
        Self::WrongDescriptors,
        Self::OtherVersions,
        Self::Silence,
        Self::NeverReads,
        Self::AsksAtOnce,
        Self::NeverFetches,
        Self::LeavesSlots,
        Self::Connections,
        Self::Churn,
        Self::Hoards(Resource::Bytes),
        Self::Hoards(Resource::Slots),
        Self::Hoards(Resource::Channels),
        Self::Hoards(Resource::Links),
        Self::Hoards(Resource::Descriptors),
        Self::Hoards(Resource::Endpoints),
        Self::Crowds,
        Self::Demands,
        Self::GarbageOverLink,
        Self::DescriptorsOverLink,
        Self::WrongDescriptorsOverLink,
        Self::Lingers,
        Self::BellsToSender,
        Self::BellsToReceiver,
        Self::FillsLink,
        Self::NeverAcknowledges,
        Self::LyingLane,
        Self::EndlessGaps,
        Self::LyingBoard,
        Self::Closes,
        Self::AnnouncesGrowth,
        Self::LyingBoardSize,
        Self::ComesBack,
        Self::Relinks,
        Self::Intrudes,
        Self::Claims,
    ];

    /// Whether it is on a quota, and so on nobody but other processes of the same user.
    pub fn needs_user_of_its_own(self) -> bool {
        matches!(
            self,
            Self::NeverFetches
                | Self::LeavesSlots
                | Self::Connections
                | Self::Churn
                | Self::Hoards(_)
                | Self::Crowds
                | Self::Demands
                | Self::ComesBack
                | Self::Relinks
                | Self::Intrudes
        )
    }

    /// What stops it: what its effects show, and honest peers report.
    pub fn limit(self) -> String {
        let quota_of = |resource: Resource| format!("the quota of {}, {}", resource.name(), quota(resource));
        match self {
            Self::Garbage | Self::HalfMessages => "decode: a whole message, or the end of the connection".into(),
            Self::HugeMessages => format!("MAX_MESSAGE, {MAX_MESSAGE} bytes"),
            Self::Descriptors | Self::WrongDescriptors => "receive_bytes: no descriptor gets into the broker".into(),
            Self::OtherVersions => "Verdict::OtherVersion".into(),
            Self::Silence => format!("GREETING_TIME, {GREETING_TIME:?}"),
            Self::NeverReads => format!("MAX_ANSWERS, {MAX_ANSWERS}, and the sockets"),
            Self::AsksAtOnce => format!("MAX_REQUESTS, {MAX_REQUESTS}"),
            Self::NeverFetches => format!("MAX_WAITING, {MAX_WAITING}: what has no room waits, and takes none"),
            Self::LeavesSlots => format!("Mailbox::note_sent, and {}", quota_of(Resource::Descriptors)),
            Self::Connections => quota_of(Resource::Connections),
            Self::Churn => format!("the quota of requests_per_second, {REQUESTS_PER_SECOND}"),
            Self::Hoards(resource) => quota_of(resource),
            Self::Crowds => format!("MAX_ENDS_OF_USER, {MAX_ENDS_OF_USER}"),
            Self::Demands => "Mismatch: what does not fit between users is not paired".into(),
            Self::GarbageOverLink => "Violation::Garbage".into(),
            Self::DescriptorsOverLink => format!("MAX_DESCRIPTORS, {MAX_DESCRIPTORS}"),
            Self::WrongDescriptorsOverLink => "Unsuitable: sealed memory of the size that was announced".into(),
            Self::Lingers => "Foreign, PacketSocket: other threads close them".into(),
            Self::BellsToSender | Self::BellsToReceiver => format!("MAX_AT_ONCE, {MAX_AT_ONCE}"),
            Self::FillsLink => "Violation::SocketFull".into(),
            Self::NeverAcknowledges => format!("the slots of the sender, {MOST_SLOTS}, and allocate_timeout"),
            Self::LyingLane => "the checks of an entry: mark, kind, slot, length, MAX_SEQUENCE".into(),
            Self::EndlessGaps => "Violation::GapBehindGap: a call reads a gap and its message".into(),
            Self::LyingBoard => "Mark: a word hands back the lending it names, and skip_above".into(),
            Self::Closes => "GetError::Disconnected, DisconnectReason::Died: the link, and nothing else".into(),
            Self::AnnouncesGrowth => {
                format!("boards that grow, at most {MAX_SEGMENTS} segments, sealed, of their size")
            }
            Self::LyingBoardSize => {
                "boards that are sealed, of their size; a sender that uses a word has it exist".into()
            }
            Self::ComesBack => "Sender::disconnect: slots are back at once, and each new link is a request".into(),
            Self::Relinks => format!("each link is a request, of {REQUESTS_PER_SECOND} in a second"),
            Self::Intrudes => "Mismatch::FromUsers, Mismatch::ToUsers".into(),
            Self::Claims => "Secret::number, Refusal::Elsewhere, and links that both ends have to name".into(),
        }
    }

    /// How many more effects it is to have after the first.
    pub fn repeats(self) -> usize {
        match self {
            Self::Connections => 2000,
            // These take long.
            Self::NeverReads | Self::NeverFetches | Self::Churn | Self::FillsLink | Self::Relinks => 1,
            // One of each kind.
            Self::AnnouncesGrowth | Self::LyingBoardSize => 8,
            Self::WrongDescriptors
            | Self::WrongDescriptorsOverLink
            | Self::Lingers
            | Self::LyingLane
            | Self::Closes => 20,
            _ => 3,
        }
    }

    /// As what honest peers have to report it, and as no other violation; none if they notice nothing of it.
    pub fn reported_as(self) -> Option<fn(&Report) -> bool> {
        Some(match self {
            Self::GarbageOverLink | Self::DescriptorsOverLink => {
                |report| matches!(report, Report::Violation(Violation::Garbage { .. }))
            }
            Self::WrongDescriptorsOverLink | Self::Lingers => {
                |report| matches!(report, Report::Violation(Violation::Descriptor(_)))
            }
            Self::FillsLink => |report| matches!(report, Report::Violation(Violation::SocketFull)),
            Self::NeverAcknowledges => |report| *report == Report::HoldsAll(MOST_SLOTS),
            Self::LyingLane => |report| {
                use Violation::{Body, EmptyPrefix, Kind, Mark, PrefixOrder, PrefixUndeclared, Slot, Terms};
                let Report::Violation(violation) = report else { return false };
                matches!(
                    violation,
                    Mark { .. } | Kind { .. } | EmptyPrefix { .. } | PrefixOrder { .. } | PrefixUndeclared { .. }
                ) || matches!(violation, Slot { .. } | Body { .. } | Terms { .. })
            },
            Self::EndlessGaps => |report| *report == Report::Violation(Violation::PrefixOrder { prefix: "a gap" }),
            Self::Closes => |report| *report == Report::Died,
            Self::AnnouncesGrowth => |report| {
                use Violation::{Descriptor, Slot, Terms};
                matches!(report, Report::Violation(Terms { .. } | Descriptor(_) | Slot { .. }))
            },
            Self::LyingBoardSize => {
                |report| matches!(report, Report::Violation(Violation::Descriptor(_) | Violation::Garbage { .. }))
            }
            _ => return None,
        })
    }
}
