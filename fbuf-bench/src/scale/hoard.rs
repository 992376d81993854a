//! Taking up as much of one thing as the quota allows.

use fbuf_client::{Address, Mechanism, Protection};
use fbuf_core::{
    control::{ControlRequest, ControlResponse, Open, Refusal, Resource, Role, Slots},
    limits::{MAX_LEASED, MAX_SLOT_BYTES, MAX_SLOTS},
    socket::PacketSocket,
    wire,
};

use super::flood::{CONNECTIONS, greet, send, wait_for};
use crate::Result;

/// Channels for more endpoints than one may have.
const FEW: u64 = 32;

/// Has as much of it as is allowed: connections to ask for more over, or for anything else.
pub(super) fn hoard(address: &Address, resource: Resource) -> Result<Vec<PacketSocket>> {
    if resource == Resource::Connections {
        return std::iter::from_fn(|| greet(address).transpose()).collect();
    }
    let connections =
        (0..CONNECTIONS).map(|_| greet(address)?.ok_or_else(|| "sent away".into())).collect::<Result<Vec<_>>>()?;
    for (number, socket) in (0..).zip(connections.iter().cycle()) {
        send(socket, number, open(resource, number))??;
        let (bytes, descriptors) = wait_for(socket)?.ok_or("the broker hung up")?;
        let (_, answer) = wire::decode::<(u64, std::result::Result<ControlResponse, String>)>(&bytes, descriptors)?;
        match answer? {
            ControlResponse::Open(Ok(_)) => {}
            ControlResponse::Open(Err(Refusal::Spent(spent))) if spent.resource == resource => break,
            other => return Err(format!("{} was to be spent, and then: {other:?}", resource.name()).into()),
        }
    }
    Ok(connections)
}

/// Asks for some of it, one more time.
pub(super) fn open(resource: Resource, number: u64) -> ControlRequest {
    let sender =
        |slot_bytes, max_slots, slots| Role::Sender { slot_bytes, max_slots, mechanism: Mechanism::Lease, slots };
    let receiver = Role::Receiver { require: Protection::Volatile };
    let (channel, role) = match resource {
        Resource::Bytes => (number % FEW, sender(MAX_SLOT_BYTES.into(), 64, Slots::Segments)),
        Resource::Slots => (number % FEW, sender(64, MAX_SLOTS.into(), Slots::Segments)),
        Resource::Descriptors => (number % FEW, sender(4096, MAX_LEASED.into(), Slots::Broker { huge: false })),
        // Each is linked with all on the other side.
        Resource::Links => (0, if number.is_multiple_of(2) { sender(64, 4, Slots::Segments) } else { receiver }),
        Resource::Endpoints => (number % FEW, receiver),
        Resource::Channels | Resource::Connections => (number, receiver),
    };
    let channel = format!("hoard/{channel}");
    ControlRequest::Open { endpoint: number, open: Open { channel, role, earlier: None } }
}
