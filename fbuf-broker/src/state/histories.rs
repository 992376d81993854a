//! Random histories of clients that come, open, close, go, die and come back after restarts, against lists of who is there
//! and of what is open.

use std::collections::BTreeSet;

use fbuf_core::protection::Protection;
use proptest::prelude::*;

use super::*;
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
    },
    /// The same, with a secret and a link that it has made up, in the hope of being taken for another.
    Pretend {
        client: usize,
        endpoint: u64,
        channel: u8,
        role: Role,
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

/// Receivers of others get what this user sends as it is,
const TRUSTED: u32 = 1001;
/// and what this one sends sealed.
const DISTRUSTED: u32 = 1000;
/// How many links each may have caused.
const LINKS: u64 = 6;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let user = prop_oneof![Just(DISTRUSTED), Just(TRUSTED)];
    let offer = |mechanism, slots| Role::Sender { slot_bytes: 64, max_slots: 4, mechanism, slots };
    let require = |require| Role::Receiver { require };
    let role = prop_oneof![
        4 => Just(offer(Mechanism::Shared, Slots::Segments)),
        2 => Just(offer(Mechanism::Copy, Slots::Segments)),
        2 => Just(offer(Mechanism::Lease, Slots::Broker { huge: false })),
        6 => Just(require(Protection::Volatile)),
        1 => Just(require(Protection::Leased)),
        1 => Just(require(Protection::Sealed)),
    ];
    let step = prop_oneof![
        4 => user.prop_map(|user| Step::Join { user }),
        16 => (0..8usize, 0..4u64, 0..2u8, role.clone())
            .prop_map(|(client, endpoint, channel, role)| Step::Open { client, endpoint, channel, role }),
        2 => (0..8usize, 0..4u64, 0..2u8, role)
            .prop_map(|(client, endpoint, channel, role)| Step::Pretend { client, endpoint, channel, role }),
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

    /// By which means this sender's messages come to a receiver, and whether that is enough for it.
    fn gives(&self, receiver: &Self) -> (Mechanism, bool) {
        let (Role::Sender { mechanism, slots, .. }, Role::Receiver { require }) = (self.role, receiver.role) else {
            panic!("{self:?} to {receiver:?}")
        };
        let of_one_user = self.user == receiver.user;
        let given = match (mechanism, slots) {
            (Mechanism::Shared, _) if of_one_user || self.user == TRUSTED => (Mechanism::Shared, Protection::Volatile),
            (_, Slots::Broker { .. }) if of_one_user && require < Protection::Sealed => {
                (Mechanism::Lease, Protection::Leased)
            }
            _ => (Mechanism::Copy, Protection::Sealed),
        };
        (given.0, given.1 >= require)
    }
}

/// What must hold: lists of who is there and of what is open.
#[derive(Debug)]
struct Model {
    clients: Vec<Member>,
    /// In the order in which the broker that is there now has heard of them.
    open: Vec<Listed>,
    /// Those that it has not heard of yet.
    away: Vec<Listed>,
    /// The number of the last client that an earlier broker has left.
    absent: u64,
}

impl Model {
    fn new() -> Self {
        Self { clients: Vec::new(), open: Vec::new(), away: Vec::new(), absent: u64::MAX }
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
            charge(one.user, Resource::Links, earlier.iter().filter(|other| other.faces(one)).count() as u64);
            if let Role::Sender { slot_bytes, max_slots, slots, .. } = one.role {
                charge(one.user, Resource::Slots, max_slots);
                charge(one.user, Resource::Bytes, slot_bytes * max_slots);
                let kept = if let Slots::Broker { .. } = slots { max_slots } else { 0 };
                charge(one.user, Resource::Descriptors, kept);
            }
        }
        used.retain(|_, amount| *amount > 0);
        used
    }

    /// A client that is there opens an endpoint, or tells of one that was open before.
    fn open(&mut self, state: &mut State, mut new: Listed) {
        let earlier = new.secret.map(|secret| Earlier { secret, links: new.links.iter().copied().collect() });
        let open = Open { channel: new.channel.to_string(), role: new.role, earlier };
        let answer = state.open(new.client, new.endpoint, open);
        if self.open.iter().any(|other| other.is_of(new.client, new.endpoint)) {
            assert_eq!(answer, Err(Refusal::Taken(new.endpoint)));
            return;
        }
        let is_stranger = |other: &&mut Listed| other.faces(&new) && other.links.is_disjoint(&new.links);
        let mut strangers: Vec<_> = self.open.iter_mut().filter(is_stranger).collect();
        let order = |other: &Listed| if new.sends() { new.gives(other) } else { other.gives(&new) };
        let means: Vec<_> = strangers.iter().map(|other| order(other)).collect();
        match &answer {
            Ok(opening) => {
                assert!(new.secret.is_none_or(|secret| secret == opening.secret));
                new.secret = Some(opening.secret);
                assert_eq!(opening.secret.number(), opening.endpoint);
                let due = strangers.iter().zip(&means).map(|(other, &(mechanism, is_enough))| {
                    assert!(is_enough, "{other:?}");
                    let (one, other) = (new.side(), other.side());
                    let sides = if new.sends() { (one, other) } else { (other, one) };
                    (sides, mechanism)
                });
                let mut due: Vec<_> = due.collect();
                let side = |party: &Party| (party.client, party.endpoint, party.peer.endpoint);
                let met = |pair: &Pair| ((side(&pair.sender), side(&pair.receiver)), pair.mechanism);
                let mut met: Vec<_> = opening.pairs.iter().map(met).collect();
                due.sort_unstable_by_key(|link| link.0);
                met.sort_unstable_by_key(|link| link.0);
                assert_eq!(met, due);
                for other in &mut strangers {
                    let link = LinkId::draw().unwrap();
                    new.links.insert(link);
                    other.links.insert(link);
                }
                self.open.push(new);
            }
            Err(refusal) => {
                self.open.push(new.clone());
                let links = self.used().get(&(new.user, "links")).copied().unwrap_or(0);
                self.open.pop();
                match refusal {
                    Refusal::Spent(_) => assert!(links > LINKS, "{refusal}"),
                    Refusal::SenderGivesLess { .. } | Refusal::ReceiverRequiresMore { .. } => {
                        assert!(means.iter().any(|&(_, is_enough)| !is_enough), "{refusal}");
                    }
                    _ => panic!("{refusal}"),
                }
                // What it had, it keeps.
                self.away.extend(new.secret.is_some().then_some(new));
            }
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

    /// Endpoints are gone, and those that are linked with them need not have noticed.
    fn forget(&mut self, is_gone: impl Fn(&Listed) -> bool) {
        self.open.retain(|listed| !is_gone(listed));
        self.away.retain(|listed| !is_gone(listed));
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
    }
}

fn pick<T>(mut all: impl Iterator<Item = T> + Clone, nth: usize) -> Option<T> {
    let count = all.clone().count();
    all.nth(nth.checked_rem(count)?)
}

proptest! {
    /// Clients come, go, and come back after the broker's death one by one, endpoint by endpoint. An open introduces
    /// exactly the endpoints of the other role on the same channel, each once, but for those that name each other;
    /// everybody pays for what it has; and when all have left nothing is known.
    #[test]
    fn everybody_who_belongs_together_is_introduced_once(steps in steps()) {
        let quota = Quota { links: LINKS, ..Quota::default() };
        let policy = || Policy::only(DISTRUSTED).trust(TRUSTED).with_quota(quota.clone());
        let (mut state, mut model) = (State::new(policy()), Model::new());
        for step in steps {
            let pretends = matches!(step, Step::Pretend { .. });
            match step {
                Step::Join { user } => {
                    model.clients.push(Member { id: state.enter(user).unwrap(), user, is_here: true });
                }
                Step::Open { client, endpoint, channel, role } | Step::Pretend { client, endpoint, channel, role } => {
                    let here = model.clients.iter().filter(|client| client.is_here);
                    let Some(&Member { id: client, user, .. }) = pick(here, client) else { continue };
                    // A client does not give the number of one that it has to another.
                    if !model.away.iter().any(|listed| listed.is_of(client, endpoint)) {
                        let (mut secret, mut links) = (None, BTreeSet::new());
                        if pretends {
                            secret = Some(Secret::draw().unwrap());
                            links.insert(LinkId::draw().unwrap());
                        }
                        model.open(&mut state, Listed { client, user, endpoint, channel, role, secret, links });
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
            model.check(&state);
        }
        for client in model.clients.iter().filter(|client| client.is_here) {
            state.leave(client.id);
        }
        prop_assert!(state.is_empty());
    }
}
