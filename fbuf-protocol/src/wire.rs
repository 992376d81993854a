//! How public types are sent, as [`fbuf_core::socket::forms`] are. Where something else has them in it, as an answer or a list
//! does, they are [`Wire`]s.

use fbuf_core::{
    peer::{LinkId as Link, Peer},
    protection::Protection,
    socket::forms,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use crate::{channel, name, quota, unpaired};

/// A value of a public type, as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wire<T>(pub T);

/// Types with a form, which `Wire`s of them have.
macro_rules! sent_as {
    ($($form:ty: $of:ty),*) => {$(
        impl Serialize for Wire<$of> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                <$form>::serialize(&self.0, serializer)
            }
        }

        impl<'de> Deserialize<'de> for Wire<$of> {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                <$form>::deserialize(deserializer).map(Self)
            }
        }
    )*};
}

sent_as!(Refusal: crate::Refusal, QuotaExceeded: crate::QuotaExceeded, Unpaired: crate::Unpaired, forms::LinkId: Link);

/// The form of a list of links.
pub(crate) mod links {
    use super::*;

    pub fn serialize<S: Serializer>(links: &[Link], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(links.iter().copied().map(Wire))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Link>, D::Error> {
        let links = Vec::<Wire<Link>>::deserialize(deserializer)?;
        Ok(links.into_iter().map(|Wire(link)| link).collect())
    }
}

/// Names are sent as text, which is checked where it comes.
macro_rules! sent_as_text {
    ($($of:ty),*) => {$(
        impl Serialize for Wire<$of> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.0.as_str())
            }
        }

        impl<'de> Deserialize<'de> for Wire<$of> {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.try_into().map(Self).map_err(D::Error::custom)
            }
        }
    )*};
}

sent_as_text!(name::Label, name::Program);

#[derive(Serialize, Deserialize)]
#[serde(remote = "unpaired::Unpaired")]
struct Unpaired {
    #[serde(with = "forms::Peer")]
    peer: Peer,
    sends: bool,
    #[serde(with = "Mismatch")]
    why: unpaired::Mismatch,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "unpaired::Mismatch")]
enum Mismatch {
    Protection {
        #[serde(with = "forms::Protection")]
        required: Protection,
        #[serde(with = "forms::Protection")]
        found: Protection,
    },
    SlotSize {
        found: u64,
        accepted: u64,
    },
    Slots {
        found: u64,
        accepted: u64,
    },
    FromUsers {
        user: u32,
    },
    ToUsers {
        user: u32,
    },
    UntrustedPool {
        user: u32,
    },
    OneReceiver,
    Confidential,
    Quota {
        user: u32,
    },
    Unread {
        user: u32,
    },
    Descriptors {
        user: u32,
    },
    Exhausted,
    Due,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "quota::Resource")]
enum Resource {
    Bytes,
    Slots,
    Channels,
    Links,
    Connections,
    Descriptors,
    Endpoints,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "quota::QuotaExceeded")]
struct QuotaExceeded {
    user: u32,
    #[serde(with = "Resource")]
    resource: quota::Resource,
    asked: u64,
    used: u64,
    limit: u64,
    rule: String,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "channel::ChannelNameError")]
enum ChannelNameError {
    Empty,
    TooLong { bytes: usize },
    Control { name: String, character: char },
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "crate::Refusal")]
enum Refusal {
    Channel(#[serde(with = "ChannelNameError")] channel::ChannelNameError),
    Geometry {
        reason: String,
    },
    SenderGivesLess {
        #[serde(with = "forms::Peer")]
        sender: Peer,
        #[serde(with = "forms::Protection")]
        required: Protection,
        #[serde(with = "forms::Protection")]
        found: Protection,
    },
    ReceiverRequiresMore {
        #[serde(with = "forms::Peer")]
        receiver: Peer,
        #[serde(with = "forms::Protection")]
        required: Protection,
        #[serde(with = "forms::Protection")]
        found: Protection,
    },
    NoSlots {
        reason: String,
    },
    OneReceiver {
        #[serde(with = "forms::Peer")]
        sender: Peer,
    },
    SeveralReceivers {
        receivers: usize,
    },
    Elsewhere,
    Unpaired {
        #[serde(with = "Unpaired")]
        end: unpaired::Unpaired,
    },
    Confidential {
        channel: String,
    },
    TooManyUsers {
        users: usize,
    },
    EndpointInUse {
        endpoint: u64,
    },
    TooManyEndpoints,
    ChannelFull,
    Share {
        user: u32,
        ends: usize,
        role: String,
        channel: String,
    },
    NotPermitted {
        user: u32,
        role: String,
        channel: String,
        rules: Vec<String>,
    },
    QuotaExceeded(#[serde(with = "QuotaExceeded")] quota::QuotaExceeded),
    Exhausted {
        what: String,
    },
}
