//! A policy as it is written, and what can be wrong with that.

use std::{collections::BTreeSet, io};

use bytesize::ByteSize;
use fbuf_protocol::Resource;
use serde::Deserialize;

use super::{Quota, Rule, pattern::Pattern};

/// A policy that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("the policy {path} cannot be read: {error}")]
    Unreadable {
        /// Which file.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// The file is another user's, which could permit any user.
    #[error("the policy {path} belongs to user {owner}: have root, or the user that runs the broker, own it")]
    Foreign {
        /// Which file.
        path: String,
        /// Its owner.
        owner: u32,
    },
    /// Other users can write the file, and so permit any user.
    #[error("the policy {path} can be written by other users (mode {mode:o}): `chmod go-w` it")]
    Exposed {
        /// Which file.
        path: String,
        /// Its mode.
        mode: u32,
    },
    /// It is not TOML, or not a policy.
    #[error("the policy is not understood: {reason}")]
    Malformed {
        /// Why not.
        reason: String,
    },
    /// A rule is about nobody.
    #[error("rule {rule:?} is about nobody: give it users or groups, or \"*\"")]
    AboutNobody {
        /// Its name.
        rule: String,
    },
    /// A pattern cannot be one.
    #[error("{place} has the pattern {pattern:?}, which no channel can have: {why}")]
    Pattern {
        /// Which rule, or what else.
        place: String,
        /// What it says.
        pattern: String,
        /// What is wrong.
        why: String,
    },
}

/// The file, as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPolicy {
    #[serde(default)]
    rule: Vec<WrittenRule>,
    #[serde(default)]
    channel: Vec<WrittenChannel>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenChannel {
    names: Vec<String>,
    #[serde(default)]
    confidential: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRule {
    name: Option<String>,
    #[serde(default)]
    users: Vec<Named>,
    #[serde(default)]
    groups: Vec<Named>,
    #[serde(default)]
    send: Vec<String>,
    #[serde(default)]
    receive: Vec<String>,
    #[serde(default)]
    trusted: bool,
    #[serde(default)]
    trusted_pool: bool,
    quota: Option<WrittenQuota>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Named {
    Id(u32),
    Name(String),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenQuota {
    bytes: Option<ByteSize>,
    slots: Option<u64>,
    channels: Option<u64>,
    links: Option<u64>,
    connections: Option<u64>,
    descriptors: Option<u64>,
    endpoints: Option<u64>,
    requests_per_second: Option<u32>,
}

/// The rules of a text, and the patterns of confidential channels.
pub(super) fn read(text: &str) -> Result<(Vec<Rule>, Vec<Pattern>), PolicyError> {
    let WrittenPolicy { rule, channel } = toml::from_str(text)
        .map_err(|error| PolicyError::Malformed { reason: error.to_string().trim_end().to_owned() })?;
    let rules = (1..).zip(rule).map(|(number, rule)| rule.read(number)).collect::<Result<_, _>>()?;
    let mut confidential = Vec::new();
    for WrittenChannel { names, confidential: is_confidential } in channel {
        for name in names {
            let pattern = pattern("a channel", name)?;
            confidential.extend(is_confidential.then_some(pattern));
        }
    }
    Ok((rules, confidential))
}

/// The pattern that stands in some place.
pub(super) fn pattern(place: &str, pattern: String) -> Result<Pattern, PolicyError> {
    Pattern::new(pattern.clone()).map_err(|error| PolicyError::Pattern {
        place: place.to_owned(),
        pattern,
        why: error.to_string(),
    })
}

impl WrittenRule {
    fn read(self, number: usize) -> Result<Rule, PolicyError> {
        let Self { name, users, groups, send, receive, trusted, trusted_pool, quota } = self;
        let name = name.unwrap_or_else(|| format!("number {number}"));
        if users.is_empty() && groups.is_empty() {
            return Err(PolicyError::AboutNobody { rule: name });
        }
        let is_everybody = |named: &Named| matches!(named, Named::Name(name) if name == "*");
        let everybody = users.iter().chain(&groups).any(is_everybody);
        let mut unknown = Vec::new();
        let mut ids = |named: Vec<Named>, kind: &str, look_up: fn(&str) -> Option<u32>| {
            let known = named.into_iter().filter(|named| !is_everybody(named));
            let id = |named: Named| match named {
                Named::Id(id) => Some(id),
                Named::Name(name) => look_up(&name).or_else(|| {
                    unknown.push(format!("the {kind} {name:?}"));
                    None
                }),
            };
            known.filter_map(id).collect::<BTreeSet<_>>()
        };
        let (users, groups) = (ids(users, "user", user_of_name), ids(groups, "group", group_of_name));
        let patterns = |written: Vec<String>| {
            let place = format!("rule {name:?}");
            written.into_iter().map(|text| pattern(&place, text)).collect::<Result<Vec<_>, _>>()
        };
        Ok(Rule {
            everybody,
            users,
            groups,
            unknown,
            send: patterns(send)?,
            receive: patterns(receive)?,
            trusted,
            trusted_pool,
            quota: quota.map(|quota| quota.complete(&name)),
            name,
        })
    }
}

impl WrittenQuota {
    fn complete(self, rule: &str) -> Quota {
        let Self { bytes, slots, channels, links, connections, descriptors, endpoints, requests_per_second } = self;
        let mut quota = Quota::default().with_rule(rule);
        for (resource, limit) in [
            (Resource::Bytes, bytes.map(|bytes| bytes.as_u64())),
            (Resource::Slots, slots),
            (Resource::Channels, channels),
            (Resource::Links, links),
            (Resource::Connections, connections),
            (Resource::Descriptors, descriptors),
            (Resource::Endpoints, endpoints),
        ] {
            if let Some(limit) = limit {
                quota = quota.with(resource, limit);
            }
        }
        let requests_per_second = requests_per_second.unwrap_or(quota.requests_per_second);
        quota.with_requests_per_second(requests_per_second)
    }
}

fn user_of_name(name: &str) -> Option<u32> {
    nix::unistd::User::from_name(name).ok().flatten().map(|user| user.uid.as_raw())
}

fn group_of_name(name: &str) -> Option<u32> {
    nix::unistd::Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
}

/// Reads a size as a user writes it.
///
/// # Errors
/// What sizes look like.
pub fn size(text: &str) -> Result<ByteSize, String> {
    text.parse().map_err(|_| {
        "a size is a number of bytes, or a number with a unit of 1000 (kB, MB, GB, TB) or of 1024 (KiB, MiB, GiB, TiB), as \
         in 64KiB or 1.5MiB"
            .to_owned()
    })
}
