//! How public types are sent, as [`fbuf_core::socket::forms`] are. Where something else has them in it, as an answer or a list
//! does, they are [`Wire`]s.

use std::{fmt, marker::PhantomData};

use fbuf_core::{
    peer::{LinkId as Link, Peer},
    protection::Protection,
    socket::forms,
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, SeqAccess, Visitor},
};

use crate::{MAX_PAGE, channel, name, quota, unpaired};

/// At most [`MAX_PAGE`] of something. A message with more is refused: its sender breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Page<T>(Vec<T>);

impl<T> Page<T> {
    /// All of these, in pages.
    pub fn split(all: &[T]) -> impl Iterator<Item = Self>
    where
        T: Clone,
    {
        all.chunks(MAX_PAGE).map(|page| Self(page.to_vec()))
    }

    /// How many there are.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl<T> IntoIterator for Page<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Page<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Page<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_PAGE}")
            }

            // Those that are too many are not even decoded.
            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut page = Vec::new();
                while let Some(entry) = entries.next_element()? {
                    if page.len() == MAX_PAGE {
                        return Err(A::Error::invalid_length(MAX_PAGE + 1, &self));
                    }
                    page.push(entry);
                }
                Ok(Page(page))
            }
        }

        deserializer.deserialize_seq(Entries(PhantomData))
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_with_an_entry_too_many_is_none() {
        let bytes = |entries| postcard::to_stdvec(&vec![7u64; entries]).unwrap();
        for entries in [0, 1, MAX_PAGE] {
            let page: Page<u64> = postcard::from_bytes(&bytes(entries)).unwrap();
            assert_eq!((page.len(), postcard::to_stdvec(&page).unwrap()), (entries, bytes(entries)));
        }
        for entries in [MAX_PAGE + 1, 1400] {
            assert!(postcard::from_bytes::<Page<u64>>(&bytes(entries)).is_err(), "{entries}");
        }
        assert_eq!(
            Page::split(&[7u64; 2 * MAX_PAGE + 1]).map(|page| page.len()).collect::<Vec<_>>(),
            [MAX_PAGE, MAX_PAGE, 1]
        );
    }
}
