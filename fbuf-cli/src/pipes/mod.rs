//! `fbuf send` and `fbuf recv`: a channel as a pipe between two shells.

mod receive;
mod send;

use std::{collections::BTreeSet, fs, time::Duration};

use fbuf_client::{Client, LinkFailure, OpenError, Peer, Protection, Unpaired};

pub(crate) use receive::{RecvArguments, receive};
pub(crate) use send::{SendArguments, send};

use crate::{failure::remedy, standard::say};

/// The code with which each of the two tells the other that it has failed.
const FAILED: u32 = 1;

/// What a receiver may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// The sender's safe code does not change messages that it has sent
    Volatile,
    /// No code can change them; I/O into memory that was pinned before could
    Leased,
    /// Nothing can change them
    Sealed,
}

impl From<Level> for Protection {
    fn from(level: Level) -> Self {
        match level {
            Level::Volatile => Self::Volatile,
            Level::Leased => Self::Leased,
            Level::Sealed => Self::Sealed,
        }
    }
}

/// The users that `--to-users` and `--from-users` name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Users {
    /// All that the broker's policy permits.
    All,
    /// These, by their ids.
    These(Vec<u32>),
}

impl Users {
    /// `*`, or names and ids between commas.
    fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::All);
        }
        text.split(',').map(|user| crate::user(user.trim())).collect::<Result<_, _>>().map(Self::These)
    }
}

/// Which users the endpoints have that a command is linked with.
enum Accepted {
    All,
    /// Of these users. The broker says with which other endpoints that one is not paired.
    Users(Vec<u32>),
    /// Of the own user, and of root, as the broker knows them: this process knows its user by another id.
    Own,
}

impl Accepted {
    /// The users that are named, or else the one that runs the command, and root.
    fn of(named: Option<&Users>) -> Self {
        match named {
            Some(Users::All) => Self::All,
            Some(Users::These(users)) => Self::Users(users.clone()),
            None if has_ids_of_its_own() => Self::Own,
            None => Self::Users(vec![nix::unistd::geteuid().as_raw(), 0]),
        }
    }
}

fn is_own(peer: &Peer) -> bool {
    peer.same_user || peer.process.uid == 0
}

/// Whether this process is in a user namespace, in which users may have other ids than the broker knows (user_namespaces(7)).
fn has_ids_of_its_own() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().ne(["0", "0", "4294967295"])
}

/// What a command waits for, and which option it is that keeps others away.
fn of_users(ends: &str, named: Option<&Users>, option: &str) -> String {
    match named {
        Some(_) => ends.to_owned(),
        None => format!("{ends} of your user or root ({option} accepts others)"),
    }
}

/// For how long a command waits before it says what for.
const SILENCE: Duration = Duration::from_secs(1);

/// Says on standard error what a command waits for, and where: each thing once.
struct Waiting<'a> {
    channel: &'a str,
    client: &'a Client,
    said: BTreeSet<For>,
    /// The endpoints that are not paired with that of the command, as far as it has said so.
    unpaired: BTreeSet<u64>,
    /// The link of which it has said last that it could not be made.
    failure: Option<LinkFailure>,
}

/// What a command can wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum For {
    Peers,
    Broker,
    Link,
    FirstMessage,
    Slots,
    Returns,
}

impl<'a> Waiting<'a> {
    fn new(channel: &'a str, client: &'a Client) -> Self {
        Self { channel, client, said: BTreeSet::new(), unpaired: BTreeSet::new(), failure: None }
    }

    /// Says it, unless it was said before.
    fn say(&mut self, thing: For, what: impl FnOnce() -> String) {
        if self.said.insert(thing) {
            let Self { channel, client, .. } = self;
            let gone = client.connection_error().map(|error| format!(", which is gone ({error})")).unwrap_or_default();
            say(format_args!("{} on the channel {channel:?} at the broker {}{gone}", what(), client.address()));
        }
    }

    /// Says with which endpoints the one of this command is not paired, and why, each once. Asks the broker, if it is there.
    fn say_unpaired(&mut self, ask: impl FnOnce() -> Result<Vec<Unpaired>, OpenError>) {
        if !self.client.is_connected() {
            return;
        }
        let unpaired = match ask() {
            Ok(unpaired) => unpaired,
            // Such as that introductions cannot be received for lack of descriptors, again and again.
            Err(error) => {
                if self.said.insert(For::Broker) {
                    say(error);
                }
                return;
            }
        };
        for unpaired in unpaired {
            if self.unpaired.insert(unpaired.peer.endpoint) {
                let remedy = remedy(&unpaired).map(|remedy| format!("; {remedy}")).unwrap_or_default();
                say(format_args!("{unpaired}{remedy}"));
            }
        }
    }

    /// Says with which peer no link could be made, and why, unless it was said before.
    fn say_failure(&mut self, failure: Option<LinkFailure>) {
        if let Some(said) = failure.as_ref().filter(|_| failure != self.failure) {
            say(said);
            self.failure = failure;
        }
    }
}

/// Several things in a sentence.
fn list(things: impl Iterator<Item = String>) -> String {
    things.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_named_by_names_and_ids() {
        assert_eq!(Users::parse("*"), Ok(Users::All));
        assert_eq!(Users::parse("root, 65533"), Ok(Users::These(vec![0, 65_533])));
        for wrong in ["", "0,", "*,0", "no such user"] {
            assert!(Users::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
