use super::{channel::NO_ID, *};
use crate::policy::Quota;
use fbuf_core::{limits::MAX_LINKS, protection::Protection};
use proptest::prelude::*;
use std::collections::BTreeSet;

const OWN: Credentials = Credentials { pid: 1, uid: 1000, gid: 1000 };

fn sender(channel: &str) -> Open {
    let role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Shared, slots: Slots::Segments };
    ask(channel, role)
}

fn receiver(channel: &str) -> Open {
    ask(channel, Role::Receiver { require: Protection::Volatile })
}

fn ask(channel: &str, role: Role) -> Open {
    Open { channel: channel.into(), role, earlier: None }
}

impl State {
    /// A process of this user connects and greets.
    fn enter(&mut self, uid: u32) -> Result<ClientId, Verdict> {
        let admission = self.admit(Credentials { uid, ..OWN }, User { id: uid, groups: vec![uid] });
        let admission = admission.map_err(|dismissal| dismissal.verdict())?;
        self.join(admission)
    }

    /// The links that opening makes.
    fn links(&mut self, client: ClientId, endpoint: u64, open: Open) -> Result<Vec<Pair>, Refusal> {
        self.open(client, endpoint, open).map(|opening| opening.pairs)
    }
}

#[test]
fn other_users_are_sent_away() {
    let mut state = State::new(Policy::only(1000), 0);
    assert_eq!(state.enter(1001), Err(Verdict::NotPermitted));
    assert_eq!(state.enter(0), Err(Verdict::NotPermitted));
    assert!(state.is_empty());
}

#[test]
fn messages_of_another_user_are_sealed_unless_that_user_is_trusted() {
    let mut state = State::new(Policy::only(1000).allow(1001).trust(1002), 0);
    let [own, other, trusted] = [1000, 1001, 1002].map(|uid| state.enter(uid).unwrap());
    for (client, channel) in [(own, "own"), (other, "other"), (trusted, "trusted")] {
        state.open(client, 0, sender(channel)).unwrap();
    }
    let mut mechanism =
        |client, channel, endpoint| state.links(client, endpoint, receiver(channel)).unwrap()[0].mechanism;
    assert_eq!(mechanism(own, "own", 1), Mechanism::Shared);
    assert_eq!(mechanism(other, "own", 1), Mechanism::Copy);
    assert_eq!(mechanism(own, "other", 2), Mechanism::Copy);
    assert_eq!(mechanism(other, "other", 2), Mechanism::Shared);
    assert_eq!(mechanism(own, "trusted", 3), Mechanism::Shared);
}

#[test]
fn each_end_is_told_whether_the_other_is_of_its_own_user() {
    let mut state = State::new(Policy::only(1000).allow(1001).allow(NO_ID), 0);
    for (from, to, same) in [(1000, 1000, true), (1000, 1001, false), (NO_ID, NO_ID, false)] {
        let [from, to] = [from, to].map(|uid| state.enter(uid).unwrap());
        state.open(from, 0, sender("c")).unwrap();
        let pair = state.links(to, 0, receiver("c")).unwrap()[0];
        assert_eq!([pair.sender, pair.receiver].map(|party| party.peer.same_user), [same; 2]);
        assert_eq!(pair.mechanism, if same { Mechanism::Shared } else { Mechanism::Copy });
        state.leave(from);
        state.leave(to);
    }
}

#[test]
fn a_lease_is_for_those_who_can_have_one_and_for_whom_it_is_enough() {
    use Protection::{Sealed, Volatile};
    let mut state = State::new(Policy::only(1000).allow(1001).trust(1002), 0);
    let [own, other, trusted] = [1000, 1001, 1002].map(|uid| state.enter(uid).unwrap());
    let given = Slots::Broker { huge: false };
    let mut next = 0;
    let mut mechanism = |from, slots, to, require| {
        next += 2;
        let role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Lease, slots };
        let channel = next.to_string();
        state.links(from, next, ask(&channel, role)).unwrap();
        let role = Role::Receiver { require };
        state.links(to, next + 1, ask(&channel, role)).unwrap()[0].mechanism
    };
    for slots in [given, Slots::Receiver] {
        assert_eq!(mechanism(own, slots, own, Volatile), Mechanism::Lease);
        assert_eq!(mechanism(own, slots, own, Protection::Leased), Mechanism::Lease);
        assert_eq!(mechanism(own, slots, own, Sealed), Mechanism::Copy);
        assert_eq!(mechanism(other, slots, own, Volatile), Mechanism::Copy);
    }
    assert_eq!(mechanism(trusted, given, own, Volatile), Mechanism::Copy);
    assert_eq!(mechanism(trusted, Slots::Receiver, own, Volatile), Mechanism::Lease);
    assert_eq!(mechanism(trusted, Slots::Receiver, own, Sealed), Mechanism::Copy);
}

#[test]
fn less_than_is_required_is_refused_whoever_comes_first() {
    let mut state = State::new(Policy::only(1000), 0);
    let client = state.enter(1000).unwrap();
    let demanding = |channel: &str| ask(channel, Role::Receiver { require: Protection::Sealed });
    state.open(client, 1, sender("a")).unwrap();
    assert!(matches!(state.open(client, 2, demanding("a")), Err(Refusal::SenderGivesLess { .. })));
    state.open(client, 3, demanding("b")).unwrap();
    assert!(matches!(state.open(client, 4, sender("b")), Err(Refusal::ReceiverRequiresMore { .. })));
    let role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Copy, slots: Slots::Segments };
    let pairs = state.links(client, 4, ask("b", role)).unwrap();
    assert!(matches!(pairs[..], [Pair { mechanism: Mechanism::Copy, .. }]));
    // What was refused has left nothing.
    assert_eq!(state.links(client, 2, receiver("c")), Ok(vec![]));
    assert_eq!(state.links(client, 5, sender("d")), Ok(vec![]));
}

#[test]
fn the_client_that_is_too_many_is_sent_away() {
    let mut state = State::new(Policy::only(1000), 0);
    let quota = Quota { connections: MAX_CLIENTS as u64 + 1, ..Quota::default() };
    state.set_policy(Policy::only(1000).with_quota(quota));
    for _ in 0..MAX_CLIENTS {
        state.enter(1000).unwrap();
    }
    assert_eq!(state.enter(1000), Err(Verdict::Full));
}

#[test]
fn the_endpoint_that_is_too_many_is_refused() {
    let mut state = State::new(Policy::only(1000), 0);
    let client = state.enter(1000).unwrap();
    for endpoint in 0..MAX_ENDPOINTS as u64 {
        state.open(client, endpoint, receiver(&(endpoint % 16).to_string())).unwrap();
    }
    assert_eq!(state.open(client, 1 << 40, receiver("c")), Err(Refusal::TooManyEndpoints));
    assert_eq!(state.open(client, 0, receiver("c")), Err(Refusal::Taken(0)));
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let mut state = State::new(Policy::only(1000), 0);
    let client = state.enter(1000).unwrap();
    assert!(matches!(state.open(client, 1, receiver("")), Err(Refusal::Channel(_))));
    let role = Role::Sender { slot_bytes: 0, max_slots: 1, mechanism: Mechanism::Shared, slots: Slots::Segments };
    assert!(matches!(state.open(client, 1, ask("c", role)), Err(Refusal::Geometry(_))));
    assert!(state.channels.is_empty());
    assert_eq!(state.links(client, 1, receiver("c")), Ok(vec![]), "the number is still free");
}

#[test]
fn each_quota_is_enforced_and_given_back() {
    let quota =
        Quota { bytes: 1000, slots: 10, channels: 2, links: 3, connections: 2, descriptors: 5, ..Quota::default() };
    let mut state = State::new(Policy::only(1000).with_quota(quota), 0);
    let (client, other) = (state.enter(1000).unwrap(), state.enter(1000).unwrap());
    assert_eq!(state.enter(1000), Err(Verdict::Spent));
    let role =
        |slot_bytes, max_slots, slots| Role::Sender { slot_bytes, max_slots, mechanism: Mechanism::Shared, slots };
    let spent = |answer: Result<Vec<Pair>, Refusal>| match answer {
        Err(Refusal::Spent(spent)) => spent.resource,
        other => panic!("{other:?}"),
    };
    let (here, given) = (Slots::Segments, Slots::Broker { huge: false });
    assert_eq!(spent(state.links(client, 1, ask("a", role(64, 11, here)))), Resource::Slots);
    assert_eq!(spent(state.links(client, 1, ask("a", role(640, 2, here)))), Resource::Bytes);
    assert_eq!(spent(state.links(client, 1, ask("a", role(64, 6, given)))), Resource::Descriptors);
    for endpoint in 1..=4 {
        state.links(client, endpoint, receiver("a")).unwrap();
    }
    assert_eq!(spent(state.links(client, 5, sender("a"))), Resource::Links);
    state.close(client, 4);
    assert_eq!(state.links(client, 5, sender("a")).unwrap().len(), 3);
    state.links(other, 1, receiver("b")).unwrap();
    assert_eq!(spent(state.links(other, 2, receiver("c"))), Resource::Channels);
    // Whoever closes gives back the links that were paid for by the other end, too.
    (1..=3).for_each(|endpoint| state.close(client, endpoint));
    let used: Vec<_> = state.used().filter(|&(_, resource, _)| resource == Resource::Links).collect();
    assert_eq!(used, []);
    let charges: Vec<_> = (0..3).map(|_| state.charge_link(client).unwrap()).collect();
    assert!(state.charge_link(client).is_err());
    drop(charges);
    state.leave(client);
    state.leave(other);
    assert!(state.is_empty(), "{state:?}");
}

#[test]
fn what_no_rule_allows_is_refused_and_the_rules_are_named() {
    let policy = Policy::parse("[[rule]]\nname = \"readers\"\nusers = [1000]\nreceive = [\"news/*\"]").unwrap();
    let mut state = State::new(policy, 0);
    let client = state.enter(1000).unwrap();
    state.links(client, 1, receiver("news/today")).unwrap();
    for (open, channel) in [(sender("news/today"), "news/today"), (receiver("mail"), "mail")] {
        let refusal = state.links(client, 2, open).unwrap_err().to_string();
        assert!(refusal.contains(channel) && refusal.contains("readers") && refusal.contains("1000"), "{refusal}");
    }
    state.set_policy(Policy::only(1000));
    state.links(client, 2, sender("news/today")).unwrap();
}

#[test]
fn each_user_sees_its_own_endpoints_page_by_page() {
    let mut state = State::new(Policy::only(1000).allow(1001), 0);
    let [own, other] = [1000, 1001].map(|uid| state.enter(uid).unwrap());
    for endpoint in 0..5 {
        state.links(own, endpoint, receiver("a")).unwrap();
        state.links(other, endpoint, sender("b")).unwrap();
    }
    let pages = |user, most| {
        let (mut all, mut behind) = (Vec::new(), 0);
        loop {
            let page = state.status(user, behind, most);
            assert!(page.len() <= most);
            let Some((_, _, last)) = page.last() else { return all };
            behind = last.number;
            all.extend(page.into_iter().map(|(client, endpoint, status)| (client, endpoint, status.channel)));
        }
    };
    let expected =
        |client: ClientId, channel: &str| (0..5).map(|n| (client, n, channel.to_owned())).collect::<Vec<_>>();
    for most in [1, 2, 5, 100] {
        assert_eq!(pages(Some(1000), most), expected(own, "a"));
        assert_eq!(pages(Some(1001), most), expected(other, "b"));
        assert_eq!(pages(None, most).len(), 10);
    }
    for user in [None, Some(1000), Some(7)] {
        assert!(state.status(user, u64::MAX, 10).is_empty());
    }
    state.leave(other);
    assert!(state.status(Some(1001), 0, 10).is_empty());
}

#[test]
fn an_endpoint_has_no_more_links_than_its_messages_can_name() {
    let mut state = State::new(Policy::only(1000), 0);
    let client = state.enter(1000).unwrap();
    for endpoint in 0..MAX_LINKS as u64 {
        state.links(client, endpoint, receiver("c")).unwrap();
    }
    assert_eq!(state.links(client, 5000, receiver("c")), Err(Refusal::Crowded));
    assert_eq!(state.links(client, 5000, sender("c")).unwrap().len(), MAX_LINKS);
}

#[test]
fn after_a_restart_only_those_are_introduced_who_do_not_know_each_other() {
    let mut state = State::new(Policy::only(1000), 1 << 20);
    let client = state.enter(1000).unwrap();
    let resumed = |open: Open, endpoint, peers: &[u64]| Open {
        earlier: Some(Earlier { endpoint, peers: peers.to_vec() }),
        ..open
    };
    assert_eq!(state.links(client, 1, resumed(sender("c"), 7, &[8, 9])), Ok(vec![]));
    assert_eq!(state.links(client, 2, resumed(receiver("c"), 8, &[7])), Ok(vec![]), "they are linked already");
    assert!(state.used().any(|used| used == (1000, Resource::Links, 1)), "a link of before is not paid for");
    // One of whom only the sender thinks so, and one who only says so.
    for (endpoint, known_as, peers) in [(3, 9, &[][..]), (4, 10, &[7])] {
        let opening = state.open(client, endpoint, resumed(receiver("c"), known_as, peers)).unwrap();
        assert_eq!((opening.endpoint, opening.pairs.len()), (known_as, 1));
        assert_eq!(opening.pairs[0].sender.peer.endpoint, 7);
        assert_eq!(opening.pairs[0].receiver.peer.endpoint, known_as);
    }
    assert_eq!(state.links(client, 5, receiver("c")).unwrap().len(), 1);
    // What an earlier broker has made can be copied, and no more.
    let slots = Slots::Sender;
    let role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Lease, slots };
    state.links(client, 6, resumed(ask("d", role), 11, &[])).unwrap();
    assert_eq!(state.links(client, 7, receiver("d")).unwrap()[0].mechanism, Mechanism::Copy);
}

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
        16 => (0..8usize, 0..4u64, 0..2u8, role)
            .prop_map(|(client, endpoint, channel, role)| Step::Open { client, endpoint, channel, role }),
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
    /// How peers know it; none before a broker has said so.
    known_as: Option<u64>,
    /// Whom it was told of, by the same kind of numbers. It may not have noticed who has gone.
    peers: BTreeSet<u64>,
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

    fn names(&self, other: &Self) -> bool {
        other.known_as.is_some_and(|number| self.peers.contains(&number))
    }

    fn side(&self) -> Side {
        (self.client, self.endpoint, self.known_as.unwrap())
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
#[derive(Debug, Default)]
struct Model {
    clients: Vec<Member>,
    /// In the order in which the broker that is there now has heard of them.
    open: Vec<Listed>,
    /// Those that it has not heard of yet.
    away: Vec<Listed>,
}

impl Model {
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
        let earlier = new.known_as.map(|endpoint| Earlier { endpoint, peers: new.peers.iter().copied().collect() });
        let open = Open { channel: new.channel.to_string(), role: new.role, earlier };
        let answer = state.open(new.client, new.endpoint, open);
        if self.open.iter().any(|other| other.is_of(new.client, new.endpoint)) {
            assert_eq!(answer, Err(Refusal::Taken(new.endpoint)));
            return;
        }
        let is_stranger = |other: &&mut Listed| other.faces(&new) && !(other.names(&new) && new.names(other));
        let mut strangers: Vec<_> = self.open.iter_mut().filter(is_stranger).collect();
        let order = |other: &Listed| if new.sends() { new.gives(other) } else { other.gives(&new) };
        let means: Vec<_> = strangers.iter().map(|other| order(other)).collect();
        match &answer {
            Ok(opening) => {
                assert!(new.known_as.is_none_or(|number| number == opening.endpoint));
                new.known_as = Some(opening.endpoint);
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
                    new.peers.extend(other.known_as);
                    other.peers.extend(new.known_as);
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
                self.away.extend(new.known_as.is_some().then_some(new));
            }
        }
    }

    /// The broker dies.
    fn lose_broker(&mut self, lost: usize) {
        self.clients.iter_mut().for_each(|client| client.is_here = false);
        self.away.append(&mut self.open);
        let mut told = 0;
        for listed in &mut self.away {
            listed.peers.retain(|_| {
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
        let (mut state, mut model, mut first) = (State::new(policy(), 0), Model::default(), 0);
        for step in steps {
            match step {
                Step::Join { user } => {
                    model.clients.push(Member { id: state.enter(user).unwrap(), user, is_here: true });
                }
                Step::Open { client, endpoint, channel, role } => {
                    let here = model.clients.iter().filter(|client| client.is_here);
                    let Some(&Member { id: client, user, .. }) = pick(here, client) else { continue };
                    // A client does not give the number of one that it has to another.
                    if !model.away.iter().any(|listed| listed.is_of(client, endpoint)) {
                        let (known_as, peers) = (None, BTreeSet::new());
                        model.open(&mut state, Listed { client, user, endpoint, channel, role, known_as, peers });
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
                    first += 1 << 20;
                    state = State::new(policy(), first);
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
