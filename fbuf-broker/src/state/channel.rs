//! One channel: its ends, the links between them, and what each user pays for.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use fbuf_core::{
    limits::{ENDS_OF_ROOT, MAX_ENDS_OF_USER, MAX_LEASED, MAX_LINKS},
    peer::{LinkId, Peer},
    protection::{Mechanism, Protection},
    slot::{Geometry, GeometryError, GeometryTerms},
};
use fbuf_protocol::{EndStatus, Limits, Mismatch, QuotaExceeded, Refusal, Role, Slots, Unpaired};

use super::{
    ClientId, Pair, PairEnd,
    pairing::{are_of_one_user, pair, refusal},
    waiting::Wait,
};
use crate::account::Charge;

/// How many links of an end are remembered after their other ends have gone. Such an end may only have lost its connection, and
/// names its links when it comes again.
pub(super) const MOST_PARTED: usize = 64;

/// The ends of one channel, by the numbers that are given only once, and so in the order of opening.
#[derive(Debug, Default)]
pub(super) struct Channel {
    senders: BTreeMap<u64, Sender>,
    receivers: BTreeMap<u64, Receiver>,
    /// What each user has here.
    seats: BTreeMap<u32, Membership>,
    /// Which sender, and which receiver, has a link that the other does not have from this broker: it has named the link,
    /// or the other end has gone since.
    named: HashMap<LinkId, Named>,
    /// The links between ends that are here, by sender and receiver.
    known: HashMap<(u64, u64), LinkId>,
}

/// The ends that have a link.
#[derive(Debug, Default)]
struct Named {
    sender: Option<u64>,
    receiver: Option<u64>,
}

impl Named {
    fn sender(&mut self) -> &mut Option<u64> {
        &mut self.sender
    }

    fn receiver(&mut self) -> &mut Option<u64> {
        &mut self.receiver
    }
}

/// What one user has on a channel.
#[derive(Debug, Default)]
struct Membership {
    senders: usize,
    receivers: usize,
    /// What is paid for being here at all.
    paid: Option<Charge>,
}

impl Membership {
    fn ends(&self) -> usize {
        self.senders + self.receivers
    }
}

/// What senders and receivers have in common.
#[derive(Debug)]
pub(super) struct Side {
    pub party: PairEnd,
    /// The links that it has named: those that it has had since before it was opened here.
    pub earlier: Box<[LinkId]>,
    /// The last links with ends that have gone, and of which user these were.
    pub parted: VecDeque<(u32, LinkId)>,
    /// It may be linked with endpoints of these users only, in order.
    pub users: Option<Box<[u32]>>,
    /// Whether the policy trusts it: a sender with volatile messages to other users, a receiver with a pool for their
    /// senders.
    pub trusted: bool,
    /// What keeps it apart from ends that it fits with, until it is compared with them again.
    pub waits: Option<Wait>,
}

impl Side {
    pub(super) fn user(&self) -> u32 {
        self.party.peer.process.uid
    }

    /// The other end of a link of this end has gone: of this user, and with this number.
    fn part(
        &mut self,
        number: u64,
        (user, link): (u32, LinkId),
        all: &mut HashMap<LinkId, Named>,
        end: impl Fn(&mut Named) -> &mut Option<u64>,
    ) {
        if end(all.entry(link).or_default()).replace(number) == Some(number) {
            // As it has named.
            return;
        }
        self.parted.push_back((user, link));
        if self.parted.len() > MOST_PARTED {
            let forgotten = self.parted.remove(self.oldest_of_most());
            forget_names(all, forgotten.iter().map(|(_, link)| link), number);
        }
    }

    /// Of the user that has most of what is parted, the oldest: no user has that of another forgotten.
    fn oldest_of_most(&self) -> usize {
        let mut oldest = BTreeMap::new();
        for (index, &(user, _)) in self.parted.iter().enumerate() {
            oldest.entry(user).or_insert((0, index)).0 += 1;
        }
        oldest.into_values().max_by_key(|&(count, _)| count).map_or(0, |(_, index)| index)
    }

    /// What an end leaves behind that has gone.
    fn forget_names(&self, all: &mut HashMap<LinkId, Named>, number: u64) {
        forget_names(all, self.earlier.iter().chain(self.parted.iter().map(|(_, link)| link)), number);
    }

    /// Whether it may be linked with endpoints of this user.
    pub(super) fn accepts(&self, user: u32) -> bool {
        self.users.as_ref().is_none_or(|users| users.binary_search(&user).is_ok())
    }
}

#[derive(Debug)]
pub(super) struct Sender {
    pub side: Side,
    pub stock: Stock,
    /// By receiver: what is paid for the link with it, by either end's user; nothing, for one from before this broker
    /// began that its user could not pay for.
    pub links: BTreeMap<u64, Option<Charge>>,
}

#[derive(Debug)]
pub(super) struct Receiver {
    pub side: Side,
    pub require: Protection,
    pub accepts: Limits,
    /// The senders that it is linked with.
    pub links: BTreeSet<u64>,
}

/// An endpoint that is about to be opened.
#[derive(Debug)]
pub(super) enum End {
    Sender(Sender),
    Receiver(Receiver),
}

impl End {
    fn side(&self) -> &Side {
        match self {
            Self::Sender(sender) => &sender.side,
            Self::Receiver(receiver) => &receiver.side,
        }
    }
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
    pub(super) fn check(geometry: GeometryTerms, mechanism: Mechanism, slots: Slots) -> Result<Self, GeometryError> {
        let geometry = Geometry::try_from(geometry)?;
        let mechanism = match (mechanism, slots) {
            (Mechanism::Lease, Slots::Segments) => Mechanism::Copy,
            (mechanism, Slots::Segments) => mechanism,
            // What an earlier broker made can be leased no longer: it could be anything.
            (_, Slots::Sender) => Mechanism::Copy,
            (_, Slots::Broker { .. } | Slots::Receiver) => Mechanism::Lease,
        };
        if slots != Slots::Segments && geometry.max_slots() > MAX_LEASED {
            return Err(GeometryError::Leased { slots: geometry.max_slots() });
        }
        Ok(Self { geometry, mechanism, slots })
    }
}

/// What comes of pairing an end with those of the other kind.
#[derive(Debug, Default)]
pub(super) struct Match {
    /// The links that are to be made.
    pub pairs: Vec<Pair>,
    /// By the number of the other end, what is paid for a link.
    links: Vec<(u64, Option<Charge>)>,
    /// The ends that fit, and a user that cannot pay for the link: whether that is the user of the other end.
    pub unpaid: Vec<(u64, u32, bool)>,
}

impl Channel {
    /// Whether a user may have one more end of a kind. A user that shares the broker with others has at most a fixed
    /// share, and never more ends than places are left for others.
    pub(super) fn check_share(&self, name: &str, role: Role, user: u32, shares: bool) -> Result<(), Refusal> {
        let of = |seat: &Membership| match role {
            Role::Sender { .. } => seat.senders,
            Role::Receiver { .. } => seat.receivers,
        };
        let all: usize = self.seats.values().map(of).sum();
        let own = self.seats.get(&user).map_or(0, of);
        if all == MAX_LINKS {
            return Err(Refusal::ChannelFull);
        }
        let left = MAX_LINKS.saturating_sub(ENDS_OF_ROOT + all);
        if shares && own >= MAX_ENDS_OF_USER.min(left) {
            let (role, channel) = (role.name().into(), name.into());
            return Err(Refusal::Share { user, ends: own, role, channel });
        }
        Ok(())
    }

    /// How many ends an end of this role is compared with.
    pub(super) fn others(&self, role: Role) -> usize {
        match role {
            Role::Sender { .. } => self.receivers.len(),
            Role::Receiver { .. } => self.senders.len(),
        }
    }

    /// With which ends a new one is to be linked. Those of another user with which it does not fit, it is not linked
    /// with; of the same user, they are a reason to refuse it. `pay` charges a link to the user of a client; if that one
    /// has too many, the pair waits, also within a user, since other users may have made them necessary.
    ///
    /// # Errors
    /// [`Refusal`]: it cannot be on this channel as it is.
    pub(super) fn match_with(
        &self,
        end: &End,
        is_confidential: bool,
        pay: impl Fn(ClientId) -> Result<Charge, QuotaExceeded>,
    ) -> Result<Match, Refusal> {
        let mut others: Vec<_> = match end {
            End::Sender(sender) => self.receivers.iter().map(|(&number, other)| (number, sender, other)).collect(),
            End::Receiver(receiver) => self.senders.iter().map(|(&number, other)| (number, other, receiver)).collect(),
        };
        let acquainted = match end {
            End::Sender(sender) => self.acquainted(&sender.side.earlier, |named| named.receiver),
            End::Receiver(receiver) => self.acquainted(&receiver.side.earlier, |named| named.sender),
        };
        let takes_one = matches!(end, End::Sender(Sender { stock: Stock { slots: Slots::Receiver, .. }, .. }));
        if takes_one {
            // It takes its slots from the one from which it took them before, or one of its own user's, if it can.
            others.sort_by_key(|(number, sender, receiver)| {
                (!acquainted.contains(number), !are_of_one_user(&sender.side, &receiver.side))
            });
            let own = others.iter().filter(|(_, sender, receiver)| are_of_one_user(&sender.side, &receiver.side));
            let receivers = own.count();
            if receivers > 1 {
                return Err(Refusal::SeveralReceivers { receivers });
            }
        }
        let mut found = Match::default();
        for (number, sender, receiver) in others {
            if takes_one && !found.links.is_empty() {
                break;
            }
            let of_one_user = are_of_one_user(&sender.side, &receiver.side);
            let other = if let End::Sender(_) = end { &receiver.side } else { &sender.side };
            let payer = self.payer(end.side(), 1, other);
            let pair = match pair(sender, receiver, is_confidential, payer) {
                _ if acquainted.contains(&number) => None,
                Ok(pair) => Some(pair),
                Err(why) if of_one_user => match refusal(sender, receiver, matches!(end, End::Sender(_)), why) {
                    Some(refusal) if !self.takes_from_another(sender) => return Err(refusal),
                    _ => continue,
                },
                Err(_) => continue,
            };
            match pay(payer) {
                Ok(charge) => found.links.push((number, Some(charge))),
                // A link from before is there, whether or not it is paid for.
                Err(_) if pair.is_none() => found.links.push((number, None)),
                Err(spent) => {
                    found.unpaid.push((number, spent.user, payer == other.party.client));
                    continue;
                }
            }
            found.pairs.extend(pair);
        }
        Ok(found)
    }

    /// Whether a sender takes its slots from a receiver of another user.
    fn takes_from_another(&self, sender: &Sender) -> bool {
        let receiver = sender.links.keys().next().and_then(|number| self.receivers.get(number));
        sender.stock.slots == Slots::Receiver
            && receiver.is_some_and(|receiver| !are_of_one_user(&sender.side, &receiver.side))
    }

    /// The client that a link is charged to: of the user that has more ends here, and so makes most of the links
    /// between the two necessary; of the end that came last between equals, since its user is about to have so many more. A
    /// user can be made to pay for no more links with another one's ends than the square of the number of its own.
    fn payer(&self, last: &Side, more: usize, first: &Side) -> ClientId {
        let ends = |side: &Side| self.seats.get(&side.user()).map_or(0, Membership::ends);
        let is_first = last.user() != first.user() && ends(first) > ends(last) + more;
        if is_first { first.party.client } else { last.party.client }
    }

    /// The ends that have one of these links: each is linked with the end that names it as well. An end that names
    /// a link which it has not loses one that it would have had.
    fn acquainted(&self, links: &[LinkId], end: impl Fn(&Named) -> Option<u64>) -> BTreeSet<u64> {
        links.iter().filter_map(|link| end(self.named.get(link)?)).collect()
    }

    /// Whether a user has paid for being here.
    pub(super) fn has_seat(&self, user: u32) -> bool {
        self.seats.contains_key(&user)
    }

    /// Adds an end and its links. Its user has paid for being here unless that was paid before.
    pub(super) fn add(&mut self, number: u64, end: End, links: Match, paid: Option<Charge>) -> Vec<Pair> {
        let seat = self.seats.entry(end.side().user()).or_default();
        seat.paid = paid.or(seat.paid.take());
        match end {
            End::Sender(mut sender) => {
                seat.senders += 1;
                for (receiver, _) in &links.links {
                    self.receivers.entry(*receiver).and_modify(|receiver| _ = receiver.links.insert(number));
                }
                sender.links.extend(links.links);
                for &link in &sender.side.earlier {
                    let named = self.named.entry(link).or_default();
                    named.sender = Some(number);
                    // One that takes its slots from its receiver is linked with one of those that it names.
                    let receiver = named.receiver.filter(|receiver| sender.links.contains_key(receiver));
                    self.known.extend(receiver.map(|receiver| ((number, receiver), link)));
                }
                self.senders.insert(number, sender);
            }
            End::Receiver(mut receiver) => {
                seat.receivers += 1;
                receiver.links = links.links.iter().map(|&(sender, _)| sender).collect();
                for &link in &receiver.side.earlier {
                    let named = self.named.entry(link).or_default();
                    named.receiver = Some(number);
                    let sender = named.sender.filter(|sender| receiver.links.contains(sender));
                    self.known.extend(sender.map(|sender| ((sender, number), link)));
                }
                for (sender, charge) in links.links {
                    self.senders.entry(sender).and_modify(|sender| drop(sender.links.insert(number, charge)));
                }
                self.receivers.insert(number, receiver);
            }
        }
        links.pairs
    }

    /// Removes an end of a user, which may come again with its links: the senders that took their slots from it. Takes as
    /// long as it had links.
    pub(super) fn remove(&mut self, number: u64, user: u32, may_return: bool) -> Vec<u64> {
        let mut bereft = Vec::new();
        let mut seat = self.seats.get_mut(&user);
        if let Some(sender) = self.senders.remove(&number) {
            for receiver in sender.links.keys() {
                let link = self.known.remove(&(number, *receiver)).filter(|_| may_return);
                if let Some(other) = self.receivers.get_mut(receiver) {
                    other.links.remove(&number);
                    link.into_iter()
                        .for_each(|link| other.side.part(*receiver, (user, link), &mut self.named, Named::receiver));
                }
            }
            seat.iter_mut().for_each(|seat| seat.senders -= 1);
            sender.side.forget_names(&mut self.named, number);
        } else if let Some(receiver) = self.receivers.remove(&number) {
            for &sender in &receiver.links {
                let link = self.known.remove(&(sender, number)).filter(|_| may_return);
                let Some(Sender { side, stock, links }) = self.senders.get_mut(&sender) else { continue };
                if links.remove(&number).is_some() && (stock.slots, links.len()) == (Slots::Receiver, 0) {
                    bereft.push(sender);
                }
                link.into_iter().for_each(|link| side.part(sender, (user, link), &mut self.named, Named::sender));
            }
            seat.iter_mut().for_each(|seat| seat.receivers -= 1);
            receiver.side.forget_names(&mut self.named, number);
        }
        if seat.is_some_and(|seat| seat.ends() == 0) {
            self.seats.remove(&user);
        }
        bereft
    }

    /// What an end has in common with all others.
    pub(super) fn side(&self, number: u64) -> Option<&Side> {
        let sender = self.senders.get(&number).map(|sender| &sender.side);
        sender.or_else(|| Some(&self.receivers.get(&number)?.side))
    }

    pub(super) fn side_mut(&mut self, number: u64) -> Option<&mut Side> {
        let sender = self.senders.get_mut(&number).map(|sender| &mut sender.side);
        sender.or_else(|| Some(&mut self.receivers.get_mut(&number)?.side))
    }

    /// Behind a number the next end of the other kind with which one is not linked, and how many were looked at.
    pub(super) fn next_apart(&self, number: u64, behind: u64) -> (usize, Option<u64>) {
        let behind = behind.saturating_add(1);
        let mut looks = 0;
        let mut look = |_: &u64| looks += 1;
        let apart = match (self.senders.get(&number), self.receivers.get(&number)) {
            (Some(sender), _) => {
                let mut others = self.receivers.range(behind..).map(|(&other, _)| other).inspect(&mut look);
                others.find(|other| !sender.links.contains_key(other))
            }
            (None, Some(receiver)) => {
                let mut others = self.senders.range(behind..).map(|(&other, _)| other).inspect(&mut look);
                others.find(|other| !receiver.links.contains(other))
            }
            (None, None) => None,
        };
        (looks, apart)
    }

    /// The link between two ends that are not linked, or what keeps them apart; none if they are no sender and receiver.
    pub(super) fn fit(&self, one: u64, other: u64, is_confidential: bool) -> Option<Result<Pair, Mismatch>> {
        let numbers = if self.senders.contains_key(&one) { (one, other) } else { (other, one) };
        let (sender, receiver) = (self.senders.get(&numbers.0)?, self.receivers.get(&numbers.1)?);
        let (last, first) = match numbers.0 > numbers.1 {
            true => (&sender.side, &receiver.side),
            false => (&receiver.side, &sender.side),
        };
        Some(pair(sender, receiver, is_confidential, self.payer(last, 0, first)))
    }

    /// Links two ends.
    pub(super) fn link(&mut self, one: u64, other: u64, charge: Charge) {
        let (sender, receiver) = if self.senders.contains_key(&one) { (one, other) } else { (other, one) };
        if let (Some(from), Some(to)) = (self.senders.get_mut(&sender), self.receivers.get_mut(&receiver)) {
            from.links.insert(receiver, Some(charge));
            to.links.insert(sender);
        }
    }

    /// Two ends that are linked have been introduced by this name.
    pub(super) fn name(&mut self, sender: u64, receiver: u64, link: LinkId) {
        if self.senders.get(&sender).is_some_and(|sender| sender.links.contains_key(&receiver)) {
            self.known.insert((sender, receiver), link);
        }
    }

    /// A link that was to be made is not: whether the sender was to take its slots from that receiver.
    pub(super) fn unlink(&mut self, sender: u64, receiver: u64) -> bool {
        if let (Some(from), Some(to)) = (self.senders.get_mut(&sender), self.receivers.get_mut(&receiver)) {
            to.links.remove(&sender);
            self.known.remove(&(sender, receiver));
            return from.links.remove(&receiver).is_some() && from.stock.slots == Slots::Receiver;
        }
        false
    }

    /// The senders that are not linked with all receivers.
    pub(super) fn apart(&self) -> impl Iterator<Item = u64> {
        let receivers = self.receivers.len();
        self.senders.iter().filter(move |(_, sender)| sender.links.len() < receivers).map(|(&number, _)| number)
    }

    /// One of its ends.
    pub(super) fn status(&self, number: u64) -> Option<(Peer, EndStatus)> {
        if let Some(Sender { side, stock: Stock { geometry, mechanism, .. }, .. }) = self.senders.get(&number) {
            let (slot_bytes, max_slots) = (geometry.slot_bytes().into(), geometry.max_slots().into());
            return Some((side.party.peer, EndStatus::Sender { slot_bytes, max_slots, mechanism: *mechanism }));
        }
        let Receiver { side, require, .. } = self.receivers.get(&number)?;
        Some((side.party.peer, EndStatus::Receiver { require: *require }))
    }

    /// The ends behind a number with which one of the other kind is not linked, and why; how many were looked at.
    pub(super) fn unpaired(&self, number: u64, behind: u64, is_confidential: bool) -> (Vec<(u64, Unpaired)>, usize) {
        let behind = behind.saturating_add(1);
        let why = |sender: &Sender, receiver: &Receiver| {
            let waits = [sender.side.waits, receiver.side.waits].into_iter().flatten().max_by_key(|wait| wait.ticket);
            let fit = pair(sender, receiver, is_confidential, ClientId(0));
            fit.map_or_else(|why| why, |_| waits.map_or(Mismatch::Due, |wait| wait.why))
        };
        let peer = |other: &Side, of_one_user| other.party.peer.with_same_user(of_one_user);
        if let Some(sender) = self.senders.get(&number) {
            if sender.links.len() == self.receivers.len() {
                return (Vec::new(), 0);
            }
            let others = self.receivers.range(behind..);
            let unpaired = others.clone().filter(|(number, _)| !sender.links.contains_key(number));
            let unpaired = unpaired.map(|(&number, other)| {
                let peer = peer(&other.side, are_of_one_user(&sender.side, &other.side));
                (number, Unpaired::new(peer, false, why(sender, other)))
            });
            return (unpaired.collect(), others.count());
        }
        let Some(receiver) = self.receivers.get(&number).filter(|one| one.links.len() < self.senders.len()) else {
            return (Vec::new(), 0);
        };
        let others = self.senders.range(behind..);
        let unpaired = others.clone().filter(|(other, _)| !receiver.links.contains(other));
        let unpaired = unpaired.map(|(&other, sender)| {
            let peer = peer(&sender.side, are_of_one_user(&sender.side, &receiver.side));
            (other, Unpaired::new(peer, true, why(sender, receiver)))
        });
        (unpaired.collect(), others.count())
    }

    /// How many links are known by name.
    #[cfg(test)]
    pub(super) fn names(&self) -> usize {
        self.named.len() + self.known.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.senders.is_empty() && self.receivers.is_empty()
    }
}

/// Forgets that an end has these links.
fn forget_names<'a>(all: &mut HashMap<LinkId, Named>, links: impl IntoIterator<Item = &'a LinkId>, number: u64) {
    for link in links {
        if let Some(named) = all.get_mut(link) {
            named.sender.take_if(|end| *end == number);
            named.receiver.take_if(|end| *end == number);
            if (named.sender, named.receiver) == (None, None) {
                all.remove(link);
            }
        }
    }
}
