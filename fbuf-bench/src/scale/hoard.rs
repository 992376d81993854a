//! Taking up as much of one thing as the quota allows.

use fbuf_client::{Address, Mechanism, Protection};
use fbuf_core::{
    limits::{MAX_LEASED, MAX_SLOT_BYTES, MAX_SLOTS},
    socket::PacketSocket,
};
use fbuf_protocol::{ControlRequest, ControlResponse, Limits, Open, Refusal, Report, Resource, Role, Slots, Wire};

use super::{
    broker::LINKS,
    connection::{greet, introductions, request, several},
};
use crate::Result;

/// Channels for more endpoints than one may have.
const FEW: u64 = 32;

/// Ends on one channel, half of them senders: fewer than a user may have of a kind, and enough for all links.
const ENDS: u64 = 200;
const _: () = assert!((ENDS / 2) * (ENDS / 2) > LINKS);

/// Has as much of it as is allowed: connections to ask for more over, or for anything else.
pub(super) fn hoard(address: &Address, resource: Resource) -> Result<Vec<PacketSocket>> {
    if resource == Resource::Connections {
        return std::iter::from_fn(|| greet(address).transpose()).collect();
    }
    let connections = several(address)?;
    if resource == Resource::Links {
        link(&connections[0])?;
        return Ok(connections);
    }
    for (number, socket) in (0..).zip(connections.iter().cycle()) {
        match request(socket, number, more(resource, number))? {
            ControlResponse::Open(Ok(_)) => {}
            ControlResponse::Open(Err(Wire(Refusal::QuotaExceeded(spent)))) if spent.resource == resource => break,
            other => return Err(format!("{} was to be spent, and then: {other:?}", resource.name()).into()),
        }
    }
    Ok(connections)
}

/// Opens ends for more links than there may be, and reads the introductions until no more come. Pairs of a client that does
/// not read are not linked.
fn link(socket: &PacketSocket) -> Result<()> {
    for number in 0..ENDS {
        match request(socket, number, more(Resource::Links, number))? {
            ControlResponse::Open(Ok(_)) => {}
            other => return Err(format!("links were to be spent, and then: {other:?}").into()),
        }
    }
    // One for each end.
    let (mut missing, mut receipt) = (2 * LINKS as usize, 0);
    while missing > 0 {
        missing = missing.saturating_sub(introductions(socket, &mut receipt)?.len());
    }
    Ok(())
}

/// Asks for some more of it; over connections that are hoarded themselves, for the least that there is.
pub(super) fn more(resource: Resource, number: u64) -> ControlRequest {
    let sender = |slot_bytes, max_slots, slots| Role::sender(slot_bytes, max_slots, Mechanism::Copy, slots);
    let receiver = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
    let (channel, role) = match resource {
        Resource::Bytes => (number % FEW, sender(MAX_SLOT_BYTES.into(), 64, Slots::Segments)),
        Resource::Slots => (number % FEW, sender(64, MAX_SLOTS.into(), Slots::Segments)),
        Resource::Descriptors => (number % FEW, sender(4096, MAX_LEASED.into(), Slots::Broker { huge: false })),
        // Each is linked with all on the other side of a channel.
        Resource::Links => {
            (number / ENDS, if number.is_multiple_of(2) { sender(64, 4, Slots::Segments) } else { receiver })
        }
        Resource::Endpoints => (number / (ENDS / 2), receiver),
        Resource::Channels => (number, receiver),
        // Connections, over which the least is asked for.
        _ => return ControlRequest::Close { endpoint: number, last: Report::default() },
    };
    let channel = format!("hoard/{channel}");
    ControlRequest::Open { endpoint: number, open: Open { channel, role, label: None, users: None, earlier: None } }
}
