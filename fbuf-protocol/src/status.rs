//! What is going on: what a broker knows of endpoints, and what these report of themselves when somebody
//! wants to see it.

use fbuf_core::{
    peer::Credentials,
    protection::{Mechanism, Protection},
    socket::forms,
};
use serde::{Deserialize, Serialize};

use super::{
    Unpaired, Wire,
    name::{Label, Program},
};

/// The most endpoints, or clients, in one message.
pub const MAX_PAGE: usize = 16;

/// What an endpoint has done so far, and what it holds. Numbers that grow begin with zero when it is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Peers that it is linked with.
    pub links: u64,
    /// Messages sent, or received.
    pub messages: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Messages that were left out: for receivers that asked for it, or by a lossy sender.
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

/// A client, as `fbuf ls` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// A number that is greater than those of clients that came before.
    pub number: u64,
    /// The process, which may have several.
    #[serde(with = "forms::Credentials")]
    pub process: Credentials,
    /// The program that it ran when it connected.
    pub program: Wire<Program>,
    /// How many endpoints it has.
    pub endpoints: u64,
}

/// An endpoint, as `fbuf ls` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// A number that is greater than those of endpoints that were opened before.
    pub number: u64,
    /// How its peers know it.
    pub endpoint: u64,
    /// The process that has it.
    #[serde(with = "forms::Credentials")]
    pub process: Credentials,
    /// The program that this process ran when it connected.
    pub program: Wire<Program>,
    /// What this program calls the endpoint.
    pub label: Option<Wire<Label>>,
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
    pub first_unpaired: Option<Wire<Unpaired>>,
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
        #[serde(with = "forms::Mechanism")]
        mechanism: Mechanism,
    },
    /// It receives.
    Receiver {
        /// What it will not do without.
        #[serde(with = "forms::Protection")]
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
    /// A number that proves that the client has read this.
    pub receipt: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mismatch;
    use fbuf_core::{
        limits::{MAX_CHANNEL_NAME, MAX_LABEL, MAX_MESSAGE, MAX_PROGRAM},
        peer::{LinkId, Peer},
        socket::wire,
    };

    /// What an answer has beside its page.
    const ENVELOPE: usize = 32;

    #[test]
    fn a_page_of_the_longest_names_and_numbers_fits_into_a_message() {
        let all = u64::MAX;
        let process = Credentials::new(i32::MIN, u32::MAX, u32::MAX);
        let program = Program::from_bytes(&[0xff; MAX_PROGRAM]);
        assert_eq!(program.as_str().len(), 3 * MAX_PROGRAM);
        let peer = Peer::new(all, process).with_same_user(true).with_trusted(true).with_link(LinkId::from_bits(all));
        let report = Report {
            links: all,
            messages: all,
            bytes: all,
            left_out: all,
            waits: all,
            sleeps: all,
            violations: all,
            slots: all,
            held: all,
            oldest: Some(Oldest { sequence: all, behind: all, milliseconds: all }),
        };
        let endpoint = EndpointStatus {
            number: all,
            endpoint: all,
            process,
            program: Wire(program.clone()),
            label: Some(Wire(Label::new("x".repeat(MAX_LABEL)).unwrap())),
            client: all,
            channel: "x".repeat(MAX_CHANNEL_NAME),
            end: EndStatus::Sender { slot_bytes: all, max_slots: all, mechanism: Mechanism::OneShot },
            unpaired: all,
            first_unpaired: Some(Wire(Unpaired::new(peer, true, Mismatch::SlotSize { found: all, accepted: all }))),
            report: Some(report),
        };
        let client = ClientStatus { number: all, process, program: Wire(program), endpoints: all };
        let lengths = [
            wire::encode(&vec![endpoint; MAX_PAGE]),
            wire::encode(&vec![client; MAX_PAGE]),
            wire::encode(&vec![(all, report); MAX_PAGE]),
        ];
        for length in lengths.map(|page| page.expect("it fits").bytes.len()) {
            assert!(length + ENVELOPE <= MAX_MESSAGE, "{length} bytes");
        }
    }
}
