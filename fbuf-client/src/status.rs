//! What is going on, as a program sees it that asks the broker: [`Client::status`](crate::Client::status) and
//! [`Client::clients`](crate::Client::clients).
//!
//! The protocol says the same in types of its own, which change with its version. All conversions are here.

use fbuf_core::{
    peer::Credentials,
    protection::{Mechanism, Protection},
};
use fbuf_protocol::{
    self as protocol, Unpaired, Wire,
    name::{Label, Program},
};

/// What an endpoint has done so far, and what it holds. Numbers that grow begin with zero when it is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Oldest {
    /// Its number.
    pub sequence: u64,
    /// How many messages of the same sender came after it.
    pub behind: u64,
    /// Since when it has been seen to be held: how many milliseconds, counted from the first report that
    /// found it held.
    pub milliseconds: u64,
}

/// A client of a broker: a connection of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientStatus {
    /// A number that is greater than those of clients that came before.
    pub number: u64,
    /// The process, which may have several.
    pub process: Credentials,
    /// The program that it ran when it connected.
    pub program: Program,
    /// How many endpoints it has.
    pub endpoints: u64,
}

/// A sender or a receiver that is open at a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// A number that is greater than those of endpoints that were opened before.
    pub number: u64,
    /// How its peers know it.
    pub endpoint: u64,
    /// The process that has it.
    pub process: Credentials,
    /// The program that this process ran when it connected.
    pub program: Program,
    /// What this program calls the endpoint.
    pub label: Option<Label>,
    /// The client: [`ClientStatus::number`].
    pub client: u64,
    /// On which channel.
    pub channel: String,
    /// Which end.
    pub end: EndStatus,
    /// With how many endpoints of the other end it is not paired, which its own process can list
    /// ([`Sender::unpaired`](crate::Sender::unpaired), [`Receiver::unpaired`](crate::Receiver::unpaired)).
    pub unpaired: u64,
    /// The first of them, and why.
    pub first_unpaired: Option<Unpaired>,
    /// What it says of itself; none if it has not answered yet.
    pub report: Option<Report>,
}

/// Which end of a channel, and how it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndStatus {
    /// It sends.
    #[non_exhaustive]
    Sender {
        /// Bytes of a slot.
        slot_bytes: u64,
        /// The most slots it will ever have.
        max_slots: u64,
        /// How it protects what it sends.
        mechanism: Mechanism,
    },
    /// It receives.
    #[non_exhaustive]
    Receiver {
        /// What it will not do without.
        require: Protection,
    },
}

#[doc(hidden)]
impl From<protocol::Report> for Report {
    fn from(report: protocol::Report) -> Self {
        let protocol::Report { links, messages, bytes, left_out, waits, sleeps, violations, slots, held, oldest } =
            report;
        let oldest = oldest.map(Oldest::from);
        Self { links, messages, bytes, left_out, waits, sleeps, violations, slots, held, oldest }
    }
}

#[doc(hidden)]
impl From<protocol::Oldest> for Oldest {
    fn from(protocol::Oldest { sequence, behind, milliseconds }: protocol::Oldest) -> Self {
        Self { sequence, behind, milliseconds }
    }
}

#[doc(hidden)]
impl From<protocol::ClientStatus> for ClientStatus {
    fn from(
        protocol::ClientStatus { number, process, program: Wire(program), endpoints }: protocol::ClientStatus,
    ) -> Self {
        Self { number, process, program, endpoints }
    }
}

#[doc(hidden)]
impl From<protocol::EndpointStatus> for EndpointStatus {
    fn from(status: protocol::EndpointStatus) -> Self {
        let protocol::EndpointStatus {
            number, endpoint, process, program: Wire(program), label, client, channel, ..
        } = status;
        let protocol::EndpointStatus { end, unpaired, first_unpaired, report, .. } = status;
        let (end, report) = (end.into(), report.map(Report::from));
        let (label, first_unpaired) = (label.map(|Wire(label)| label), first_unpaired.map(|Wire(unpaired)| unpaired));
        Self { number, endpoint, process, program, label, client, channel, end, unpaired, first_unpaired, report }
    }
}

#[doc(hidden)]
impl From<protocol::EndStatus> for EndStatus {
    fn from(end: protocol::EndStatus) -> Self {
        match end {
            protocol::EndStatus::Sender { slot_bytes, max_slots, mechanism } => {
                Self::Sender { slot_bytes, max_slots, mechanism }
            }
            protocol::EndStatus::Receiver { require } => Self::Receiver { require },
        }
    }
}
