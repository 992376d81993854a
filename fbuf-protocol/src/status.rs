//! What is going on: what a broker knows of endpoints, and what these report of themselves when somebody
//! wants to see it.

use fbuf_core::{
    peer::Credentials,
    protection::{Mechanism, Protection},
};
use serde::{Deserialize, Serialize};

use super::Unpaired;

/// The most endpoints, or clients, in one message.
pub const MAX_PAGE: usize = 32;

/// What an endpoint has done so far, and what it holds. Numbers that grow begin with zero when it is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Peers that it is linked with.
    pub links: u64,
    /// Messages sent, or received.
    pub messages: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Messages that were left out for receivers that asked for it.
    pub left_out: u64,
    /// Times that a sender found no free slot and had to wait.
    pub waits: u64,
    /// Times that it slept.
    pub sleeps: u64,
    /// Peers that broke a rule.
    pub violations: u64,
    /// Slots of a sender.
    pub slots: u64,
    /// Messages that a receiver holds.
    pub held: u64,
    /// The one of these that was sent first.
    pub oldest: Option<Oldest>,
}

/// A message that a receiver holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Oldest {
    /// Its number.
    pub sequence: u64,
    /// How many messages of the same sender came after it.
    pub behind: u64,
    /// Since when it has been seen to be held: how many milliseconds, counted from the first report that
    /// found it held.
    pub milliseconds: u64,
}

/// A client, as somebody sees it who wants to know what is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// A number that is greater than those of clients that came before.
    pub number: u64,
    /// The process, which may have several.
    pub process: Credentials,
    /// How many endpoints it has.
    pub endpoints: u64,
}

/// An endpoint, as somebody sees it who wants to know what is going on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// A number that is greater than those of endpoints that were opened before.
    pub number: u64,
    /// How its peers know it.
    pub endpoint: u64,
    /// Whose it is.
    pub process: Credentials,
    /// The client: [`ClientStatus::number`].
    pub client: u64,
    /// On which channel.
    pub channel: String,
    /// Which end.
    pub end: EndStatus,
    /// With how many endpoints of the other end it is not paired, which its client can
    /// [list](super::ControlClient::unpaired).
    pub unpaired: u64,
    /// The first of them, and why.
    pub first_unpaired: Option<Unpaired>,
    /// What it says of itself; none if it has not answered yet.
    pub report: Option<Report>,
}

/// Which end of a channel, and how it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndStatus {
    /// It sends.
    Sender {
        /// Bytes of a slot.
        slot_bytes: u64,
        /// The most slots it will ever have.
        max_slots: u64,
        /// How it protects what it sends.
        mechanism: Mechanism,
    },
    /// It receives.
    Receiver {
        /// What it will not do without.
        require: Protection,
    },
}

/// What a broker has for a client that asks what is new.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct News {
    /// Links that are to be made.
    pub introductions: Vec<fbuf_core::introduced::Introduction>,
    /// Whether somebody wants to know what the client's endpoints are doing.
    pub report: bool,
    /// What only those know who have read this.
    pub receipt: u64,
}
