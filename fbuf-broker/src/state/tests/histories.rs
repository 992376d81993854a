//! Random histories of clients that come, open, close, go, die and come back after restarts, against lists of who is there
//! and of what is open.

use std::collections::BTreeSet;

use fbuf_core::{peer::LinkId, protection::Protection, slot::GeometryTerms};
use fbuf_protocol::{Accepted, Limits};
use proptest::prelude::*;

use super::super::*;
use crate::policy::Quota;

#[derive(Debug, Clone)]
enum Step {
    Join {
        user: u32,
    },
    Open {
        client: usize,
        endpoint: u64,
        channel: u8,
        role: Role,
        users: Option<Vec<u32>>,
        /// With a secret and a link that it has made up, in the hope of being taken for another.
        pretends: bool,
    },
    Close {
        client: usize,
        endpoint: u64,
    },
    Leave {
        client: usize,
    },
    /// The broker dies, and another comes. Every so-many-th time that an end was told of its peer is lost.
    Restart {
        lost: usize,
    },
    /// A client of an earlier broker comes to this one,
    Return {
        client: usize,
    },
    /// and tells it of one of its endpoints.
    Resume {
        nth: usize,
    },
}

/// Receivers of others get what this user sends as it is, and their senders take slots from its receivers;
const TRUSTED: u32 = 1001;
/// what this one sends is sealed, and it gives no slots.
const DISTRUSTED: u32 = 1000;
/// The channel on which there are one-shots only.
const CONFIDENTIAL: u8 = 2;
/// How many links each may have caused.
const LINKS: u64 = 6;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let user = prop_oneof![Just(DISTRUSTED), Just(TRUSTED)];
    let offer = |mechanism, slots| Role::sender(64, 4, mechanism, slots);
    let require = |require| Role::Receiver { require, accepts: Limits::DEFAULT };
    let few = Accepted { slot_bytes: 64, max_slots: 3 };
    let accept = |own, others| Role::Receiver { require: Protection::Volatile, accepts: Limits { own, others } };
    let all = Limits::DEFAULT.own;
    let role = prop_oneof![
        4 => Just(offer(Mechanism::Shared, Slots::Segments)),
        2 => Just(offer(Mechanism::Copy, Slots::Segments)),
        2 => Just(offer(Mechanism::Lease, Slots::Broker { huge: false })),
        2 => Just(offer(Mechanism::Lease, Slots::Receiver)),
        2 => Just(offer(Mechanism::OneShot, Slots::Segments)),
        6 => Just(require(Protection::Volatile)),
        1 => Just(require(Protection::Leased)),
        1 => Just(require(Protection::Sealed)),
        1 => Just(accept(all, few)),
        1 => Just(accept(few, all)),
    ];
    let users = prop_oneof![
        6 => Just(None),
        1 => Just(Some(vec![DISTRUSTED])),
        1 => Just(Some(vec![TRUSTED, TRUSTED, 7])),
    ];
    let step = prop_oneof![
        4 => user.prop_map(|user| Step::Join { user }),
        18 => (0..8usize, 0..4u64, 0..=CONFIDENTIAL, role, users, prop::bool::weighted(0.1)).prop_map(
            |(client, endpoint, channel, role, users, pretends)| {
                Step::Open { client, endpoint, channel, role, users, pretends }
            }
        ),
        4 => (0..8usize, 0..4u64).prop_map(|(client, endpoint)| Step::Close { client, endpoint }),
        2 => (0..8usize).prop_map(|client| Step::Leave { client }),
        2 => (2..12usize).prop_map(|lost| Step::Restart { lost }),
        6 => (0..8usize).prop_map(|client| Step::Return { client }),
        12 => (0..32usize).prop_map(|nth| Step::Resume { nth }),
    ];
    prop::collection::vec(step, 0..100)
}

/// A client that lives, as the list has it.
#[derive(Debug, Clone, Copy)]
struct Member {
    id: ClientId,
    user: u32,
    /// Whether it has come to the broker that is there now.
    is_here: bool,
}

/// An endpoint that is open, as the list has it.
#[derive(Debug, Clone)]
struct Listed {
    client: ClientId,
    user: u32,
    endpoint: u64,
    channel: u8,
    role: Role,
    /// Of which users its peers may be.
    users: Option<Vec<u32>>,
    /// What proves that it is the one that peers know; none before a broker has given it.
    secret: Option<Secret>,
    /// The links that it was told of. It may not have noticed which have gone.
    links: BTreeSet<LinkId>,
}

/// An end of an introduction: the client, its number for the endpoint, and that of its peers.
type Side = (ClientId, u64, u64);

impl Listed {
    fn is_of(&self, client: ClientId, endpoint: u64) -> bool {
        (self.client, self.endpoint) == (client, endpoint)
    }

    fn sends(&self) -> bool {
        matches!(self.role, Role::Sender { .. })
    }

    /// Whether the two belong together.
    fn faces(&self, other: &Self) -> bool {
        self.channel == other.channel && self.sends() != other.sends()
    }

    fn side(&self) -> Side {
        (self.client, self.endpoint, self.secret.unwrap().number())
    }

    fn key(&self) -> Key {
        (self.client, self.endpoint)
    }

    fn takes_slots(&self) -> bool {
        matches!(self.role, Role::Sender { slots: Slots::Receiver, .. })
    }

    fn accepts(&self, user: u32) -> bool {
        self.users.as_ref().is_none_or(|users| users.contains(&user))
    }

    /// By which means this sender's messages come to a receiver; or why they do not.
    fn gives(&self, receiver: &Self, takes_from_another: bool) -> Result<Mechanism, DeferredDrop> {
        let (Role::Sender { mechanism, slots, geometry, .. }, Role::Receiver { require, accepts }) =
            (self.role, receiver.role)
        else {
            panic!("{self:?} to {receiver:?}")
        };
        let of_one_user = self.user == receiver.user;
        let is_trusted = of_one_user || self.user == TRUSTED;
        let given = match (mechanism, slots) {
            (Mechanism::OneShot, _) => Mechanism::OneShot,
            (Mechanism::Shared, _) if is_trusted => Mechanism::Shared,
            (_, Slots::Broker { .. }) if of_one_user && require < Protection::Sealed => Mechanism::Lease,
            (_, Slots::Receiver) if is_trusted && require < Protection::Sealed => Mechanism::Lease,
            _ => Mechanism::Copy,
        };
        let limits = if of_one_user { accepts.own } else { accepts.others };
        if !self.accepts(receiver.user) || !receiver.accepts(self.user) {
            Err(DeferredDrop::ByWish)
        } else if self.takes_slots() && !of_one_user && receiver.user != TRUSTED {
            Err(DeferredDrop::NoMatch)
        } else if self.takes_slots() && takes_from_another {
            Err(DeferredDrop::Taken)
        } else if self.channel == CONFIDENTIAL && !of_one_user && given != Mechanism::OneShot
            || geometry.max_slots > limits.max_slots
            || given.protection() < require
        {
            Err(DeferredDrop::NoMatch)
        } else {
            Ok(given)
        }
    }
}

/// An endpoint, as clients number them.
type Key = (ClientId, u64);

/// Why two ends are not linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeferredDrop {
    /// One of them is for other users only.
    ByWish,
    /// The sender takes its slots from another receiver.
    Taken,
    NoMatch,
}

/// What must hold: lists of who is there and of what is open.
#[derive(Debug)]
struct Model {
    clients: Vec<Member>,
    /// In the order in which the broker that is there now has heard of them.
    open: Vec<Listed>,
    /// Those that it has not heard of yet.
    away: Vec<Listed>,
    /// Which sender is linked with which receiver, and which user pays; none for what was linked before and is not paid
    /// for.
    links: BTreeMap<(Key, Key), Option<u32>>,
    /// The number of the last client that an earlier broker has left.
    absent: u64,
}

/// What is to come of an opening: links, whether each was there before, by which means, and which user pays.
type Due = Vec<((Key, Key), Option<Mechanism>, Option<u32>)>;

impl Model {
    fn new() -> Self {
        let (clients, open, away, links) = (Vec::new(), Vec::new(), Vec::new(), BTreeMap::new());
        Self { clients, open, away, links, absent: u64::MAX }
    }

    /// What each user takes up.
    fn used(&self) -> BTreeMap<(u32, &'static str), u64> {
        let mut used = BTreeMap::new();
        let mut charge = |user, resource: Resource, amount| *used.entry((user, resource.name())).or_default() += amount;
        for client in self.clients.iter().filter(|client| client.is_here) {
            charge(client.user, Resource::Connections, 1);
        }
        for (index, one) in self.open.iter().enumerate() {
            let earlier = &self.open[..index];
            let is_first = !earlier.iter().any(|other| (other.user, other.channel) == (one.user, one.channel));
            charge(one.user, Resource::Channels, is_first.into());
            charge(one.user, Resource::Endpoints, 1);
            if let Role::Sender { geometry: GeometryTerms { slot_bytes, max_slots, .. }, slots, .. } = one.role {
                charge(one.user, Resource::Slots, max_slots);
                charge(one.user, Resource::Bytes, slot_bytes * max_slots);
                let kept = if let Slots::Broker { .. } = slots { max_slots } else { 0 };
                charge(one.user, Resource::Descriptors, kept);
            }
        }
        for user in self.links.values().flatten() {
            charge(*user, Resource::Links, 1);
        }
        used.retain(|_, amount| *amount > 0);
        used
    }

    fn has_link(&self, sender: Key) -> Option<Key> {
        self.links.keys().find(|(from, _)| *from == sender).map(|&(_, to)| to)
    }

    /// Which user pays for a link between two ends, of which one came last, and may be counted or not yet.
    fn payer(&self, last: &Listed, more: usize, first: &Listed) -> u32 {
        let ends = |user| self.open.iter().filter(|end| (end.user, end.channel) == (user, last.channel)).count();
        let is_first = last.user != first.user && ends(first.user) > ends(last.user) + more;
        if is_first { first.user } else { last.user }
    }

    /// The same for two that are there.
    fn payer_of(&self, one: &Listed, other: &Listed) -> u32 {
        let place = |end: &Listed| self.open.iter().position(|listed| listed.key() == end.key());
        if place(one) > place(other) { self.payer(one, 0, other) } else { self.payer(other, 0, one) }
    }

    fn has_room(&self, user: u32, due: &Due) -> bool {
        let more = due.iter().filter(|(_, _, payer)| *payer == Some(user)).count();
        let used = self.links.values().filter(|&&payer| payer == Some(user)).count() + more;
        (used as u64) < LINKS
    }

    /// What is to come of an opening; none: it is refused.
    fn expect(&self, new: &Listed) -> Option<Due> {
        let is_one_shot = matches!(new.role, Role::Sender { mechanism: Mechanism::OneShot, .. });
        let is_refused = new.sends() && new.channel == CONFIDENTIAL && new.secret.is_none() && !is_one_shot;
        if is_refused { None } else { self.expect_links(new) }
    }

    fn expect_links(&self, new: &Listed) -> Option<Due> {
        let mut due = Due::new();
        let mut others: Vec<_> = self.open.iter().filter(|other| other.faces(new)).collect();
        if new.takes_slots() {
            others.sort_by_key(|other| (other.links.is_disjoint(&new.links), other.user != new.user));
            if others.iter().filter(|other| other.user == new.user).count() > 1 {
                return None;
            }
        }
        for other in others {
            let (sender, receiver) = if new.sends() { (new, other) } else { (other, new) };
            let of_one_user = new.user == other.user;
            let taken = self.has_link(sender.key());
            let is_acquainted = !other.links.is_disjoint(&new.links);
            let means = sender.gives(receiver, taken.is_some());
            let means = match means {
                _ if new.takes_slots() && !due.is_empty() => break,
                _ if is_acquainted => None,
                Ok(mechanism) => Some(mechanism),
                Err(DeferredDrop::NoMatch) if of_one_user => return None,
                Err(DeferredDrop::Taken) if of_one_user => {
                    let from = self.open.iter().find(|end| taken == Some(end.key()));
                    match from.is_some_and(|from| from.user == sender.user) {
                        true => return None,
                        false => continue,
                    }
                }
                Err(_) => continue,
            };
            let payer = self.payer(new, 1, other);
            let link = (sender.key(), receiver.key());
            match (self.has_room(payer, &due), means) {
                (true, means) => due.push((link, means, Some(payer))),
                (false, None) => due.push((link, None, None)),
                (false, Some(_)) => {}
            }
        }
        Some(due)
    }

    /// A client that is there opens an endpoint, or tells of one that was open before.
    fn open(&mut self, state: &mut State, mut new: Listed) {
        let earlier =
            new.secret.map(|secret| PreviousRegistration { secret, links: new.links.iter().copied().collect() });
        let open =
            Open { channel: new.channel.to_string(), role: new.role, label: None, users: new.users.clone(), earlier };
        let answer = state.open(new.client, new.endpoint, open);
        if self.open.iter().any(|other| other.is_of(new.client, new.endpoint)) {
            assert_eq!(answer, Err(Refusal::EndpointInUse { endpoint: new.endpoint }));
            return;
        }
        let (due, answer) = match (self.expect(&new), answer) {
            (Some(due), Ok(opening)) => (due, opening),
            (None, Err(_)) => {
                // What it had, it keeps.
                self.away.extend(new.secret.is_some().then_some(new));
                return;
            }
            (due, answer) => panic!("{new:?}: {answer:?}, and not {due:?}"),
        };
        assert!(new.secret.is_none_or(|secret| secret == answer.secret));
        new.secret = Some(answer.secret);
        assert_eq!(answer.secret.number(), answer.endpoint);
        self.open.push(new);
        self.links.extend(due.iter().map(|&(link, _, payer)| (link, payer)));
        let mut made: Vec<_> = due.into_iter().filter_map(|(link, means, _)| Some((link, means?))).collect();
        made.sort_unstable_by_key(|(link, _)| *link);
        self.meet(&answer.pairs, &made);
    }

    /// Compares links that are made with those that are due; their ends know each other from now on.
    fn meet(&mut self, pairs: &[Pair], due: &[((Key, Key), Mechanism)]) {
        let mut met: Vec<_> = pairs.iter().map(|pair| (link_of(pair), pair.mechanism)).collect();
        met.sort_unstable_by_key(|(link, _)| *link);
        assert_eq!(met, due);
        pairs.iter().for_each(|pair| self.acquaint(pair));
    }

    fn acquaint(&mut self, pair: &Pair) {
        let link = LinkId::draw().unwrap();
        for party in [&pair.sender, &pair.receiver] {
            let listed = self.listed((party.client, party.endpoint));
            assert_eq!(listed.side(), (party.client, party.endpoint, party.peer.endpoint));
            listed.links.insert(link);
        }
    }

    fn listed(&mut self, key: Key) -> &mut Listed {
        self.open.iter_mut().find(|listed| listed.key() == key).unwrap()
    }

    /// Endpoints are gone, and those that are linked with them need not have noticed.
    fn forget(&mut self, is_gone: impl Fn(&Listed) -> bool) {
        let gone: BTreeSet<_> = self.open.iter().filter(|listed| is_gone(listed)).map(Listed::key).collect();
        self.open.retain(|listed| !is_gone(listed));
        self.away.retain(|listed| !is_gone(listed));
        self.links.retain(|(from, to), _| !gone.contains(from) && !gone.contains(to));
    }

    /// Those that lacked something are compared again. Each pair that comes of it fits, and was not linked; and none is
    /// left that fits, but for those for which a user cannot pay.
    fn settle(&mut self, state: &mut State) {
        for pair in state.pair_all_again() {
            let link = link_of(&pair);
            let [sender, receiver] = [link.0, link.1].map(|key| self.listed(key).clone());
            assert_eq!(sender.gives(&receiver, self.has_link(link.0).is_some()), Ok(pair.mechanism), "{pair:?}");
            let payer = self.payer_of(&sender, &receiver);
            assert!(self.has_room(payer, &Due::new()), "{pair:?}, for which {payer} cannot pay");
            assert_eq!(self.links.insert(link, Some(payer)), None, "{pair:?} were linked");
            self.acquaint(&pair);
        }
    }

    /// The broker dies.
    fn lose_broker(&mut self, lost: usize) {
        self.away.append(&mut self.open);
        for client in self.clients.iter_mut().filter(|client| client.is_here) {
            // The next broker counts from the beginning: until it has a number for this one, no other has this.
            self.absent -= 1;
            let id = ClientId(self.absent);
            self.away.iter_mut().filter(|listed| listed.client == client.id).for_each(|listed| listed.client = id);
            (client.id, client.is_here) = (id, false);
        }
        self.links.clear();
        let mut told = 0;
        for listed in &mut self.away {
            listed.links.retain(|_| {
                told += 1;
                told % lost != 0
            });
            if let Role::Sender { slots: slots @ Slots::Broker { .. }, .. } = &mut listed.role {
                *slots = Slots::Sender;
            }
        }
    }

    fn check(&self, state: &State) {
        let used: BTreeMap<_, _> =
            state.used().map(|(user, resource, amount)| ((user, resource.name()), amount)).collect();
        assert_eq!(used, self.used());
        assert!(used.iter().all(|(&(_, resource), &amount)| resource != "links" || amount <= LINKS));
        for user in [None, Some(DISTRUSTED), Some(TRUSTED)] {
            let seen = state.status(user, 0, usize::MAX).into_iter();
            let seen = seen.map(|(client, endpoint, status)| (client, endpoint, status.endpoint));
            let own = self.open.iter().filter(|listed| user.is_none_or(|user| user == listed.user));
            assert!(seen.eq(own.map(Listed::side)));
        }
        // Each end is linked, or there is a reason, or it was when this broker began.
        for one in &self.open {
            let unpaired = state.unpaired(one.client, one.endpoint, 0).0;
            for other in self.open.iter().filter(|other| other.faces(one)) {
                let (sender, receiver) = if one.sends() { (one, other) } else { (other, one) };
                let is_linked = self.links.contains_key(&(sender.key(), receiver.key()));
                let found = unpaired.iter().find(|(_, unpaired)| unpaired.peer.endpoint == other.side().2);
                assert_eq!(found.is_some(), !is_linked, "{one:?} and {other:?}");
                let fits = sender.gives(receiver, self.has_link(sender.key()).is_some()).is_ok();
                if let Some((_, Unpaired { why, .. })) = found {
                    let unpaid = matches!(why, Mismatch::Quota { user } if !self.has_room(*user, &Due::new()));
                    assert_eq!(fits, unpaid, "{one:?} and {other:?}: {why:?}");
                    assert!(!fits || !self.has_room(self.payer_of(one, other), &Due::new()));
                }
            }
        }
    }
}

fn link_of(pair: &Pair) -> (Key, Key) {
    ((pair.sender.client, pair.sender.endpoint), (pair.receiver.client, pair.receiver.endpoint))
}

fn pick<T>(mut all: impl Iterator<Item = T> + Clone, nth: usize) -> Option<T> {
    let count = all.clone().count();
    all.nth(nth.checked_rem(count)?)
}

proptest! {
    /// Clients come, go, and come back after the broker's death one by one, endpoint by endpoint. An open introduces
    /// exactly the endpoints of the other role on the same channel that fit, each once, but for those that name each
    /// other; it is refused only for ends of the same user; what a user cannot pay for is introduced when it can; every
    /// user pays for what it has; for what is not linked there is a reason; and when all have left nothing is known.
    #[test]
    fn all_that_fit_are_introduced_once(steps in steps()) {
        let quota = Quota::default().with(Resource::Links, LINKS);
        let policy = || {
            let policy = Policy::only(DISTRUSTED).trust(TRUSTED).with_quota(quota.clone());
            policy.confidential(&CONFIDENTIAL.to_string()).unwrap()
        };
        let (mut state, mut model) = (State::new(policy()), Model::new());
        for step in steps {
            match step {
                Step::Join { user } => {
                    model.clients.push(Member { id: state.enter(user).unwrap(), user, is_here: true });
                }
                Step::Open { client, endpoint, channel, role, users, pretends } => {
                    let here = model.clients.iter().filter(|client| client.is_here);
                    let Some(&Member { id: client, user, .. }) = pick(here, client) else { continue };
                    // A client does not give the number of one that it has to another.
                    if !model.away.iter().any(|listed| listed.is_of(client, endpoint)) {
                        let (mut secret, mut links) = (None, BTreeSet::new());
                        if pretends {
                            secret = Some(Secret::draw().unwrap());
                            links.insert(LinkId::draw().unwrap());
                        }
                        let listed = Listed { client, user, endpoint, channel, role, users, secret, links };
                        model.open(&mut state, listed);
                    }
                }
                Step::Close { client, endpoint } => {
                    let Some(&Member { id, .. }) = pick(model.clients.iter(), client) else { continue };
                    state.close(id, endpoint);
                    model.forget(|listed| listed.is_of(id, endpoint));
                }
                Step::Leave { client } => {
                    let Some(index) = pick(0..model.clients.len(), client) else { continue };
                    let Member { id, .. } = model.clients.remove(index);
                    state.leave(id);
                    model.forget(|listed| listed.client == id);
                }
                Step::Restart { lost } => {
                    state = State::new(policy());
                    model.lose_broker(lost);
                }
                Step::Return { client } => {
                    let absent = (0..model.clients.len()).filter(|&index| !model.clients[index].is_here);
                    let Some(index) = pick(absent, client) else { continue };
                    let Member { id: before, user, .. } = model.clients[index];
                    let id = state.enter(user).unwrap();
                    model.clients[index] = Member { id, user, is_here: true };
                    model.away.iter_mut().filter(|listed| listed.client == before).for_each(|listed| listed.client = id);
                }
                Step::Resume { nth } => {
                    let is_here = |id| model.clients.iter().any(|client| client.id == id && client.is_here);
                    let known = (0..model.away.len()).filter(|&index| is_here(model.away[index].client));
                    let Some(index) = pick(known, nth) else { continue };
                    let listed = model.away.remove(index);
                    model.open(&mut state, listed);
                }
            }
            model.settle(&mut state);
            model.check(&state);
        }
        for client in model.clients.iter().filter(|client| client.is_here) {
            state.leave(client.id);
        }
        prop_assert!(state.is_empty());
    }
}
