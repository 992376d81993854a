//! What the two processes agree on before they begin.

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::peers::Peer;

/// One run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Terms {
    pub(crate) peer: Peer,
    pub(crate) work: Work,
    /// Bytes of a message.
    pub(crate) size: usize,
    pub(crate) mode: Mode,
    pub(crate) wait: Wait,
    /// How many messages may be on their way, where a peer lets one choose. Its default if not given.
    pub(crate) slots: Option<u32>,
    /// How fbuf protects messages.
    pub(crate) means: Means,
    /// How many processes are at the other end.
    pub(crate) others: u32,
    /// For how long to measure, after a tenth of that to warm up.
    pub(crate) time: Duration,
    /// Where the two processes run.
    pub(crate) processors: [Option<usize>; 2],
    /// Where the broker listens.
    pub(crate) broker: String,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Work {
    /// As many messages as can be, from this process to each of the others.
    Stream,
    /// One message there and one back, again and again; each pair begins a time after the last one
    /// did, if that is not zero.
    Echo { every: Duration },
    /// A stream from each of the others to this process.
    FanIn,
}

/// How much of a message the two sides touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Eight bytes are written and read
    Untouched,
    /// Eight bytes of each page are written and read
    Paged,
    /// Every byte is written, eight are read
    Written,
    /// Every byte is written, every byte is read
    Touched,
}

/// How fbuf protects messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// Not at all: nobody but the sender can write them
    #[default]
    Volatile,
    /// They are read-only in the sender too
    Guarded,
    /// They are copied when they are received
    Copy,
    /// They are leased, in base pages
    Lease,
    /// They are leased, in transparent huge pages
    LeaseTransparent,
    /// They are leased, in huge pages that were set aside
    LeaseHuge,
    /// They are sealed for good and given away
    OneShot,
    /// Volatile, and the receiver writes a word of each page of a view that is its own
    CopyOnWrite,
}

/// What a side does while there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// Looks again and again
    Spin,
    /// Looks for a while, then sleeps
    Adaptive,
    /// Sleeps at once
    Block,
}

impl From<Wait> for fbuf_client::Wait {
    fn from(wait: Wait) -> Self {
        match wait {
            Wait::Spin => Self::Spin,
            Wait::Adaptive => Self::Adaptive,
            Wait::Block => Self::Block,
        }
    }
}

/// The name of a value, as it is given on the command line.
pub(crate) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
