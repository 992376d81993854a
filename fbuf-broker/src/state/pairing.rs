//! Whether a sender and a receiver of a channel can be linked, and by which means.

use fbuf_core::{
    protection::{Mechanism, Protection},
    socket::NO_ID,
};
use fbuf_protocol::{Mismatch, Refusal, Slots, Unpaired};

use super::{
    ClientId, Pair, PairEnd,
    channel::{Receiver, Sender, Side, Stock},
};

/// Processes without an id in the broker's user namespace may be of any user.
pub(super) fn are_of_one_user(sender: &Side, receiver: &Side) -> bool {
    sender.user() == receiver.user() && sender.user() != NO_ID
}

/// The link between two ends, for which this client's user pays; or what keeps them apart.
pub(super) fn pair(
    sender: &Sender,
    receiver: &Receiver,
    is_confidential: bool,
    payer: ClientId,
) -> Result<Pair, Mismatch> {
    let Stock { geometry, slots, .. } = sender.stock;
    let same_user = are_of_one_user(&sender.side, &receiver.side);
    if !sender.side.accepts(receiver.side.user()) {
        return Err(Mismatch::ToUsers { user: receiver.side.user() });
    }
    if !receiver.side.accepts(sender.side.user()) {
        return Err(Mismatch::FromUsers { user: sender.side.user() });
    }
    if slots == Slots::Receiver {
        // The sender writes into memory that the receiver's user can change.
        if !same_user && !receiver.side.trusted {
            return Err(Mismatch::UntrustedPool { user: receiver.side.user() });
        }
        if !sender.links.is_empty() {
            return Err(Mismatch::OneReceiver);
        }
    }
    if is_confidential && !same_user && sender.stock.mechanism != Mechanism::OneShot {
        return Err(Mismatch::Confidential);
    }
    receiver.accepts.check(geometry, same_user)?;
    let mechanism = mechanism(sender, receiver);
    if mechanism.protection() < receiver.require {
        return Err(Mismatch::Protection { required: receiver.require, found: mechanism.protection() });
    }
    let party = |side: &Side| {
        let peer = side.party.peer.with_same_user(same_user).with_trusted(same_user || side.trusted);
        PairEnd { peer, ..side.party }
    };
    let [sender, receiver] = [&sender.side, &receiver.side].map(party);
    Ok(Pair { sender, receiver, geometry, mechanism, slots, payer })
}

/// The rule of trust. Processes of one user can write each other's memory anyway (ptrace(2)), so between them volatile
/// messages lose nothing; receivers of other users get them sealed, unless the sender's user is trusted.
fn mechanism(sender: &Sender, receiver: &Receiver) -> Mechanism {
    let same_user = are_of_one_user(&sender.side, &receiver.side);
    let distrusted = !same_user && !sender.side.trusted;
    match sender.stock.mechanism {
        Mechanism::Shared | Mechanism::Lease if distrusted => Mechanism::Copy,
        // A slot of the sender's user no other user can lease.
        Mechanism::Lease if !same_user && sender.stock.slots != Slots::Receiver => Mechanism::Copy,
        // What can be leased can be copied as well.
        Mechanism::Lease if receiver.require == Protection::Sealed => Mechanism::Copy,
        mechanism => mechanism,
    }
}

/// How an end is refused that does not fit with one of its own user; none if either of them asked for that.
pub(super) fn refusal(sender: &Sender, receiver: &Receiver, is_sender: bool, why: Mismatch) -> Option<Refusal> {
    let same = |side: &Side| side.party.peer.with_same_user(true).with_trusted(true);
    let (sender, receiver) = (same(&sender.side), same(&receiver.side));
    Some(match why {
        Mismatch::FromUsers { .. } | Mismatch::ToUsers { .. } => return None,
        Mismatch::OneReceiver => Refusal::OneReceiver { sender },
        Mismatch::Protection { required, found } if is_sender => {
            Refusal::ReceiverRequiresMore { receiver, required, found }
        }
        Mismatch::Protection { required, found } => Refusal::SenderGivesLess { sender, required, found },
        why if is_sender => Refusal::Unpaired { end: Unpaired::new(receiver, false, why) },
        why => Refusal::Unpaired { end: Unpaired::new(sender, true, why) },
    })
}
