//! One channel: its ends, who is to be linked with whom, and by which means.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fbuf_core::{
    control::{EndStatus, LinkId, Refusal, Role, Slots},
    inbound::Peer,
    limits::{MAX_LEASED, MAX_LINKS},
    protection::{Mechanism, Protection},
    slot::{Geometry, GeometryError},
    socket::NO_ID,
};

use super::{Pair, Party};
use crate::account::Charge;

/// The ends of one channel, by the numbers that are given only once, and so in the order of opening.
#[derive(Debug, Default)]
pub(super) struct Channel {
    senders: BTreeMap<u64, Sender>,
    receivers: BTreeMap<u64, Receiver>,
    /// How many ends each user has here, and what is paid for being here at all.
    seats: BTreeMap<u32, (usize, Option<Charge>)>,
    /// Which sender, and which receiver, has named a link that it has since before this broker began.
    named: HashMap<LinkId, Named>,
}

/// The ends that have named a link.
#[derive(Debug, Default)]
struct Named {
    sender: Option<u64>,
    receiver: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Sender {
    pub party: Party,
    /// The links that it has since before this broker began.
    pub earlier: Box<[LinkId]>,
    /// Whether receivers of other users may read what it could change.
    pub trusted: bool,
    pub stock: Stock,
    /// What it has paid for its links with those who were here before it.
    pub links: BTreeMap<u64, Charge>,
}

#[derive(Debug)]
pub(super) struct Receiver {
    pub party: Party,
    /// The links that it has since before this broker began.
    pub earlier: Box<[LinkId]>,
    pub require: Protection,
    /// Whether senders of other users may write and read memory that it could change.
    pub trusted: bool,
    /// What it has paid for its links with those who were here before it.
    pub links: BTreeMap<u64, Charge>,
}

/// An endpoint that is about to be opened.
#[derive(Debug)]
pub(super) enum End {
    Sender(Sender),
    Receiver(Receiver),
}

/// The slots of a sender.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stock {
    pub geometry: Geometry,
    pub mechanism: Mechanism,
    pub slots: Slots,
}

impl Stock {
    /// Checks what a sender says of its slots.
    pub(super) fn check(
        slot_bytes: u64,
        max_slots: u64,
        mechanism: Mechanism,
        slots: Slots,
    ) -> Result<Self, GeometryError> {
        let geometry = Geometry::new(slot_bytes, max_slots)?;
        let mechanism = match (mechanism, slots) {
            (Mechanism::Lease, Slots::Segments) => Mechanism::Copy,
            (mechanism, Slots::Segments) => mechanism,
            // What an earlier broker made can be leased no longer: it could be anything.
            (_, Slots::Sender) => Mechanism::Copy,
            (_, Slots::Broker { .. } | Slots::Receiver) => Mechanism::Lease,
        };
        if slots != Slots::Segments && geometry.max_slots() > MAX_LEASED {
            return Err(GeometryError::Leased(geometry.max_slots()));
        }
        Ok(Self { geometry, mechanism, slots })
    }
}

impl Channel {
    /// With whom a new end is to be linked.
    ///
    /// # Errors
    /// [`Refusal`]: it cannot be on this channel as it is.
    pub(super) fn pairs(&self, end: &End) -> Result<Vec<Pair>, Refusal> {
        match end {
            End::Sender(sender) => {
                if sender.stock.slots == Slots::Receiver && self.receivers.len() > 1 {
                    return Err(Refusal::SeveralReceivers { receivers: self.receivers.len() });
                }
                check_room(self.senders.len())?;
                let acquainted = self.acquainted(&sender.earlier, |named| named.receiver);
                let strangers = self.receivers.iter().filter(|(number, _)| !acquainted.contains(number));
                let pair = |receiver: &Receiver| {
                    pair(sender, receiver).map_err(|found| Refusal::ReceiverRequiresMore {
                        receiver: receiver.party.peer,
                        required: receiver.require,
                        found,
                    })
                };
                strangers.map(|(_, other)| pair(other)).collect()
            }
            End::Receiver(receiver) => {
                let alone = self.senders.values().find(|sender| sender.stock.slots == Slots::Receiver);
                if let Some(sender) = alone.filter(|_| !self.receivers.is_empty()) {
                    return Err(Refusal::OneReceiver { sender: sender.party.peer });
                }
                check_room(self.receivers.len())?;
                let acquainted = self.acquainted(&receiver.earlier, |named| named.sender);
                let strangers = self.senders.iter().filter(|(number, _)| !acquainted.contains(number));
                let pair = |sender: &Sender| {
                    pair(sender, receiver).map_err(|found| Refusal::SenderGivesLess {
                        sender: sender.party.peer,
                        required: receiver.require,
                        found,
                    })
                };
                strangers.map(|(_, other)| pair(other)).collect()
            }
        }
    }

    /// The ends that have named one of these links: each is linked with the end that names it as well. An end that names
    /// a link which it has not loses one that it would have had.
    fn acquainted(&self, links: &[LinkId], end: impl Fn(&Named) -> Option<u64>) -> BTreeSet<u64> {
        links.iter().filter_map(|link| end(self.named.get(link)?)).collect()
    }

    /// Whether a user has paid for being here.
    pub(super) fn has_seat(&self, user: u32) -> bool {
        self.seats.contains_key(&user)
    }

    /// The ends that a new one will be linked with, or is already.
    pub(super) fn others(&self, role: Role) -> impl Iterator<Item = u64> {
        let (senders, receivers) = match role {
            Role::Sender { .. } => (None, Some(self.receivers.keys())),
            Role::Receiver { .. } => (Some(self.senders.keys()), None),
        };
        senders.into_iter().flatten().chain(receivers.into_iter().flatten()).copied()
    }

    /// Adds an end of a user, who has paid for being here unless that was paid before.
    pub(super) fn add(&mut self, number: u64, end: End, user: u32, seat: Option<Charge>) {
        let (count, paid) = self.seats.entry(user).or_default();
        *count += 1;
        *paid = seat.or(paid.take());
        match end {
            End::Sender(sender) => {
                sender.earlier.iter().for_each(|&link| self.named.entry(link).or_default().sender = Some(number));
                self.senders.insert(number, sender);
            }
            End::Receiver(receiver) => {
                receiver.earlier.iter().for_each(|&link| self.named.entry(link).or_default().receiver = Some(number));
                self.receivers.insert(number, receiver);
            }
        }
    }

    /// Removes an end of a user.
    pub(super) fn remove(&mut self, number: u64, user: u32) {
        // Whoever has paid for a link with it need not any more.
        if let Some(sender) = self.senders.remove(&number) {
            self.receivers.values_mut().for_each(|receiver| drop(receiver.links.remove(&number)));
            self.forget_names(&sender.earlier, number);
        } else if let Some(receiver) = self.receivers.remove(&number) {
            self.senders.values_mut().for_each(|sender| drop(sender.links.remove(&number)));
            self.forget_names(&receiver.earlier, number);
        }
        if let Some((count, _)) = self.seats.get_mut(&user) {
            *count -= 1;
            if *count == 0 {
                self.seats.remove(&user);
            }
        }
    }

    /// Forgets which links an end has named.
    fn forget_names(&mut self, links: &[LinkId], number: u64) {
        for link in links {
            if let Some(named) = self.named.get_mut(link) {
                named.sender.take_if(|end| *end == number);
                named.receiver.take_if(|end| *end == number);
                if (named.sender, named.receiver) == (None, None) {
                    self.named.remove(link);
                }
            }
        }
    }

    /// One of its ends.
    pub(super) fn status(&self, number: u64) -> Option<(Peer, EndStatus)> {
        if let Some(Sender { party, stock: Stock { geometry, mechanism, .. }, .. }) = self.senders.get(&number) {
            let (slot_bytes, max_slots) = (geometry.slot_bytes().into(), geometry.max_slots().into());
            return Some((party.peer, EndStatus::Sender { slot_bytes, max_slots, mechanism: *mechanism }));
        }
        let Receiver { party, require, .. } = self.receivers.get(&number)?;
        Some((party.peer, EndStatus::Receiver { require: *require }))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.senders.is_empty() && self.receivers.is_empty()
    }
}

/// Whether one more end can join those of its kind, each of which every end of the other kind is linked with.
fn check_room(ends: usize) -> Result<(), Refusal> {
    if ends < MAX_LINKS { Ok(()) } else { Err(Refusal::Crowded) }
}

/// The link between two ends; or what it would give, if that is less than the receiver requires.
fn pair(sender: &Sender, receiver: &Receiver) -> Result<Pair, Protection> {
    let mechanism = mechanism(sender, receiver);
    if mechanism.protection() < receiver.require {
        return Err(mechanism.protection());
    }
    let Stock { geometry, slots, .. } = sender.stock;
    let same_user = are_of_one_user(sender, receiver);
    let [sender, receiver] =
        [(sender.party, sender.trusted), (receiver.party, receiver.trusted)].map(|(party, trusted)| Party {
            peer: Peer { same_user, trusted: same_user || trusted, ..party.peer },
            ..party
        });
    Ok(Pair { sender, receiver, geometry, mechanism, slots })
}

/// Those who have no id in the broker's user namespace may be anybody.
fn are_of_one_user(sender: &Sender, receiver: &Receiver) -> bool {
    let (from, to) = (sender.party.peer.process.uid, receiver.party.peer.process.uid);
    from == to && from != NO_ID
}

/// The rule of trust. Processes of one user can write each other's memory anyway (ptrace(2)), so
/// between them volatile messages lose nothing; whoever receives from another user gets them sealed,
/// unless that user is trusted.
fn mechanism(sender: &Sender, receiver: &Receiver) -> Mechanism {
    let same_user = are_of_one_user(sender, receiver);
    let distrusted = !same_user && !sender.trusted;
    match sender.stock.mechanism {
        Mechanism::Shared | Mechanism::Lease if distrusted => Mechanism::Copy,
        // A slot of the sender's user nobody else can lease.
        Mechanism::Lease if !same_user && sender.stock.slots != Slots::Receiver => Mechanism::Copy,
        // What can be leased can be copied as well.
        Mechanism::Lease if receiver.require == Protection::Sealed => Mechanism::Copy,
        mechanism => mechanism,
    }
}
