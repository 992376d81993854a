//! `fbuf send` and `fbuf recv`: a channel as a pipe between two shells.

mod receive;
mod send;

use std::{collections::BTreeSet, time::Duration};

use fbuf_client::{Client, LinkFailure, OpenError, Protection, Unpaired};

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
