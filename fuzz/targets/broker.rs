//! Feeds any history to the broker's [`State`]: users that join, open, close, read or do not read, leave, and are given
//! another policy, while the broker runs out of sockets now and then. No user takes more than its share and its quota; no
//! pair is introduced twice; nobody is refused for what another user has; what lacks something is made when that is
//! there; no turn is long; and when all have left, nothing is left of them.
#![no_main]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
    time::Instant,
};

use arbitrary::{Result, Unstructured};
use fbuf_broker::{
    Policy,
    account::Capacity,
    policy::User,
    share::Holding,
    state::{ClientId, Lack, Pair, State, Turn},
};
use fbuf_core::{
    limits::{ENDS_OF_ROOT, MAX_ENDS_OF_USER, MAX_LINKS},
    peer::{Credentials, LinkId},
    protection::{Mechanism, Protection},
    slot::GeometryTerms,
};
use fbuf_fuzz::{link, secret};
use fbuf_protocol::{Accepted, Limits, Mismatch, Open, PreviousRegistration, Refusal, Resource, Role, Secret, Slots};
use libfuzzer_sys::fuzz_target;

/// Users with different quotas, one whose pools all trust, and root.
const POLICY: &str = r#"
    [[rule]]
    users = [1000]
    send = ["*"]
    receive = ["*"]
    quota = { links = 6, connections = 3, slots = 64, channels = 2 }
    [[rule]]
    users = [1001]
    send = ["*"]
    receive = ["*"]
    trusted = true
    trusted_pool = true
    quota = { links = 40, endpoints = 300 }
    [[rule]]
    users = [0, 1002]
    send = ["*"]
    receive = ["*"]
"#;
/// The same users, of whom some may have more, and others less.
const OTHER_POLICY: &str = r#"
    [[rule]]
    users = [1000]
    send = ["*"]
    receive = ["*"]
    quota = { links = 30 }
    [[rule]]
    users = [0, 1001, 1002]
    send = ["*"]
    receive = ["*"]
    quota = { links = 20, connections = 4 }
    [[channel]]
    names = ["b"]
    confidential = true
"#;
const USERS: [u32; 4] = [0, 1000, 1001, 1002];
const ROOT: u32 = 0;

/// What the broker has of places and descriptors.
const PLACES: u64 = 20;
const DESCRIPTORS: u64 = 90;
/// How many introductions a client may leave unread.
const UNREAD: usize = 5;
/// So many ends have their turns within a few.
const FEW_ENDS: usize = 64;
/// More than a turn may look at, and make.
const LONGEST: Turn = Turn { pairs: 32, looks: 1024 + MAX_LINKS };

static POLICIES: LazyLock<[Policy; 2]> =
    LazyLock::new(|| [POLICY, OTHER_POLICY].map(|text| Policy::parse(text).expect("it is correct")));

/// The same with as many links as can be.
static WITHOUT_END: LazyLock<[Policy; 2]> = LazyLock::new(|| {
    let many = |text: &str| text.replace("links = ", "links = 1000000");
    [POLICY, OTHER_POLICY].map(|text| Policy::parse(&many(text)).expect("it is correct"))
});

fn user(id: u32) -> User {
    User::new(id, vec![id])
}

/// An endpoint: the client, and its number.
type Key = (ClientId, u64);

/// What is known of an endpoint that is open.
struct Known {
    user: u32,
    open: Open,
    secret: Secret,
    /// Links that it has been told of.
    links: Vec<LinkId>,
}

impl Known {
    fn sends(&self) -> bool {
        matches!(self.open.role, Role::Sender { .. })
    }
}

/// What was introduced, and who has not read it.
#[derive(Default)]
struct Introduced {
    pairs: BTreeSet<(Key, Key)>,
    unread: BTreeMap<ClientId, Vec<Holding>>,
    /// Whether there is no socket.
    is_exhausted: bool,
}

impl Introduced {
    fn introduce(&mut self, pair: &Pair, [sender, receiver]: [Holding; 2]) -> std::result::Result<(), Lack> {
        let clients = [pair.sender.client, pair.receiver.client];
        for client in clients {
            if self.unread.get(&client).is_some_and(|unread| unread.len() >= UNREAD) {
                return Err(Lack::Room(client));
            }
        }
        if self.is_exhausted {
            return Err(Lack::Socket);
        }
        let ends = ((clients[0], pair.sender.endpoint), (clients[1], pair.receiver.endpoint));
        assert!(self.pairs.insert(ends), "{pair:?} were introduced before");
        self.unread.entry(clients[0]).or_default().push(sender);
        self.unread.entry(clients[1]).or_default().push(receiver);
        Ok(())
    }

    fn forget(&mut self, is_gone: impl Fn(&Key) -> bool) {
        self.pairs.retain(|(sender, receiver)| !is_gone(sender) && !is_gone(receiver));
    }

    fn held(&self) -> u64 {
        self.unread.values().map(|unread| unread.len() as u64).sum()
    }
}

struct Model {
    state: State,
    policy: usize,
    clients: Vec<(ClientId, u32)>,
    open: BTreeMap<Key, Known>,
    introduced: Introduced,
    /// What clients of before the last restart have of their endpoints, and the users whose they are.
    away: Vec<Known>,
}

fn fresh(policy: usize) -> State {
    State::with_capacity(POLICIES[policy].clone(), Capacity::new(PLACES, DESCRIPTORS, ROOT))
}

impl Model {
    fn new() -> Self {
        let (clients, open, introduced, away) = (Vec::new(), BTreeMap::new(), Introduced::default(), Vec::new());
        Self { state: fresh(0), policy: 0, clients, open, introduced, away }
    }

    fn join(&mut self, id: u32) {
        if let Ok(client) = enter(&mut self.state, id) {
            self.clients.push((client, id));
        }
    }

    fn leave(&mut self, index: usize) {
        let (client, _) = self.clients.remove(index);
        self.state.leave(client);
        self.open.retain(|&(of, _), _| of != client);
        self.introduced.forget(|&(of, _)| of == client);
        self.introduced.unread.remove(&client);
    }

    fn close(&mut self, client: ClientId, endpoint: u64) {
        self.state.close(client, endpoint);
        self.open.remove(&(client, endpoint));
        self.introduced.forget(|&end| end == (client, endpoint));
    }

    fn open(&mut self, (client, of): (ClientId, u32), endpoint: u64, open: Open) -> bool {
        let opening = match self.state.open(client, endpoint, open.clone()) {
            Ok(opening) => opening,
            Err(refusal) => {
                self.check_refusal(client, of, endpoint, &open, &refusal);
                return false;
            }
        };
        let links = open.earlier.as_ref().map(|earlier| earlier.links.clone()).unwrap_or_default();
        let known = Known { user: of, open, secret: opening.secret, links };
        assert!(self.open.insert((client, endpoint), known).is_none(), "endpoint {endpoint} was opened twice");
        assert_eq!(opening.secret.number(), opening.endpoint);
        self.state.introduce(&opening, Instant::now(), |pair, holdings| self.introduced.introduce(pair, holdings));
        true
    }

    /// A user's turn: whether anything came of it.
    fn pair_again(&mut self, id: u32) -> bool {
        let introduced = &mut self.introduced;
        let turn = self.state.pair_again(id, Instant::now(), |pair, holdings| introduced.introduce(pair, holdings));
        assert!(turn.pairs <= LONGEST.pairs && turn.looks < LONGEST.looks, "{turn:?}");
        turn.pairs > 0
    }

    /// Dies, and another comes. Clients come again, each with what it had.
    fn restart(&mut self, policy: usize) {
        let users: Vec<_> = self.clients.drain(..).map(|(_, id)| id).collect();
        self.away.extend(std::mem::take(&mut self.open).into_values());
        self.introduced = Introduced::default();
        (self.state, self.policy) = (fresh(policy), policy);
        users.into_iter().for_each(|id| self.join(id));
    }

    /// An endpoint is refused for what its own user has, or for its share.
    fn check_refusal(&self, client: ClientId, of: u32, endpoint: u64, open: &Open, refusal: &Refusal) {
        let sends = matches!(open.role, Role::Sender { .. });
        let beside = |known: &&Known| known.open.channel == open.channel && known.sends() == sends;
        match refusal {
            Refusal::QuotaExceeded(spent) => {
                assert_eq!(spent.user, of, "{refusal}");
                if spent.rule.contains("share") {
                    return;
                }
            }
            Refusal::Share { ends, .. } => {
                let all: Vec<_> = self.open.values().filter(beside).collect();
                let own = all.iter().filter(|known| known.user == of).count();
                let left = (MAX_LINKS - ENDS_OF_ROOT).saturating_sub(all.len());
                assert!(
                    of != ROOT && *ends == own && own >= left.min(MAX_ENDS_OF_USER),
                    "{refusal}: {} there",
                    all.len()
                );
                return;
            }
            Refusal::EndpointInUse { .. } => return assert!(self.open.contains_key(&(client, endpoint))),
            Refusal::Elsewhere => {
                let named = open.earlier.as_ref().map(|earlier| earlier.secret);
                return assert!(self.open.values().any(|known| Some(known.secret) == named));
            }
            Refusal::ChannelFull => return assert_eq!(self.open.values().filter(beside).count(), MAX_LINKS),
            Refusal::Exhausted { .. } | Refusal::NoSlots { .. } => panic!("{refusal}"),
            _ => {}
        }
        // Alone, with what it has, it would be refused as well: links, whose number depends on what came first, are no
        // reason.
        let mut alone = State::new(WITHOUT_END[self.policy].clone());
        let Ok(other) = enter(&mut alone, of) else { return };
        let mut number = 0;
        for known in self.open.values().filter(|known| known.user == of) {
            number += 1;
            // As it stands, other than it came about: its user may have had to have more than one receiver.
            if alone.open(other, number, known.open.clone()).is_err() {
                return;
            }
        }
        let again = alone.open(other, number + 1, open.clone());
        assert!(again.is_err(), "{open:?} was refused, {refusal}, and would not be without other users");
    }

    /// What the broker says that users have is what they have.
    fn check_charges(&mut self) {
        let mut used: BTreeMap<(u32, &str), u64> = BTreeMap::new();
        let mut seats = BTreeSet::new();
        let mut charge = |of, resource: Resource, amount| *used.entry((of, resource.name())).or_default() += amount;
        self.clients.iter().for_each(|&(_, of)| charge(of, Resource::Connections, 1));
        for known in self.open.values() {
            charge(known.user, Resource::Endpoints, 1);
            if seats.insert((known.user, known.open.channel.clone())) {
                charge(known.user, Resource::Channels, 1);
            }
            if let Role::Sender { geometry: GeometryTerms { slot_bytes, max_slots, .. }, slots, .. } = known.open.role {
                charge(known.user, Resource::Slots, max_slots);
                charge(known.user, Resource::Bytes, slot_bytes.next_multiple_of(64) * max_slots);
                if let Slots::Broker { .. } = slots {
                    charge(known.user, Resource::Descriptors, max_slots);
                }
            }
        }
        used.retain(|_, amount| *amount > 0);
        let mut found: BTreeMap<_, _> =
            self.state.used().map(|(of, what, amount)| ((of, what.name()), amount)).collect();
        let links: u64 = found.extract_if(.., |&(_, what), _| what == "links").map(|(_, amount)| amount).sum();
        assert_eq!(found, used);
        // Those of before a restart are paid for as well, if there is room.
        let introduced = self.introduced.pairs.len() as u64;
        let is_first = self.open.values().all(|known| known.open.earlier.is_none());
        assert!(
            if is_first { links == introduced } else { links >= introduced },
            "{links} links, {introduced} introduced"
        );
        let slots: u64 = found.iter().filter(|((_, what), _)| *what == "descriptors").map(|(_, amount)| amount).sum();
        let descriptors = self.clients.len() as u64 + slots + self.introduced.held();
        assert!(self.clients.len() as u64 <= PLACES && descriptors <= DESCRIPTORS, "{descriptors} descriptors");
        // The last part is root's.
        if self.clients.iter().all(|(_, of)| *of != ROOT) {
            let root = enter(&mut self.state, ROOT).expect("the last place is root's");
            self.state.leave(root);
        }
    }

    /// All read what they are sent, and there are sockets: what is apart then has a reason that stays.
    fn settle(&mut self) {
        self.introduced.is_exhausted = false;
        loop {
            self.introduced.unread.clear();
            let users: Vec<_> = self.state.waiting().collect();
            let made = users.into_iter().filter(|&id| self.pair_again(id)).count();
            if made == 0 {
                break;
            }
        }
        if self.open.len() > FEW_ENDS {
            // Those that waited may not all have had their turn.
            return;
        }
        let used: BTreeMap<_, _> =
            self.state.used().filter(|one| one.1 == Resource::Links).map(|one| (one.0, one.2)).collect();
        let has_room =
            |of| used.get(&of).copied().unwrap_or(0) < POLICIES[self.policy].quota(&user(of)).of(Resource::Links);
        for (&(client, endpoint), known) in &self.open {
            let unpaired = self.state.unpaired(client, endpoint, 0).0;
            for (_, one) in &unpaired {
                let stays = match one.why {
                    Mismatch::Quota { user: of } => !has_room(of),
                    Mismatch::Descriptors { .. } => true,
                    why => !why.passes() || why == Mismatch::OneReceiver,
                };
                assert!(stays, "{endpoint} of {client:?} is apart: {one}");
            }
            let others = self.open.values().filter(|other| other.open.channel == known.open.channel);
            let others = others.filter(|other| other.sends() != known.sends()).count();
            let linked =
                self.introduced.pairs.iter().filter(|(from, to)| [from, to].contains(&&(client, endpoint))).count();
            // Some were linked before a restart.
            assert!(linked + unpaired.len() <= others, "{linked} linked, {} not, of {others}", unpaired.len());
            assert!(known.open.earlier.is_some() || !self.is_first(known) || linked + unpaired.len() == others);
        }
    }

    /// Whether no endpoint of its channel was there before a restart.
    fn is_first(&self, known: &Known) -> bool {
        self.open.values().all(|other| other.open.channel != known.open.channel || other.open.earlier.is_none())
    }
}

fn enter(state: &mut State, id: u32) -> std::result::Result<ClientId, ()> {
    let admission = state.admit(Credentials::new(1, id, id), user(id)).map_err(drop)?;
    state.join(admission).map_err(drop)
}

fn open(input: &mut Unstructured) -> Result<Open> {
    const FEW: Limits =
        Limits { own: Accepted { slot_bytes: 100, max_slots: 8 }, others: Accepted { slot_bytes: 64, max_slots: 4 } };
    let channel = (*input.choose(&["a", "b", "c"])?).into();
    let slots = [Slots::Segments, Slots::Segments, Slots::Broker { huge: false }, Slots::Receiver, Slots::Sender];
    let role = match input.arbitrary()? {
        true => Role::Receiver {
            require: *input.choose(&[Protection::Volatile, Protection::Volatile, Protection::Sealed])?,
            accepts: *input.choose(&[Limits::DEFAULT, Limits::DEFAULT, FEW])?,
        },
        false => Role::sender(
            *input.choose(&[64, 64, 128])?,
            input.int_in_range(1..=9)?,
            *input.choose(&[Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot])?,
            *input.choose(&slots)?,
        ),
    };
    let earlier = match input.int_in_range(0..=7)? {
        0 => {
            let links = (0..input.int_in_range(0..=2)?).map(|_| Ok(link(input.int_in_range(0..=7)?)));
            let links = links.collect::<Result<_>>()?;
            Some(PreviousRegistration { secret: secret(input.int_in_range(0..=7)?), links })
        }
        _ => None,
    };
    let users = *input.choose(&[None, None, None, Some(&[1000, 1001][..]), Some(&[1002])])?;
    Ok(Open { channel, role, label: None, users: users.map(<[u32]>::to_vec), earlier })
}

/// One step, if the input has one more.
fn step(model: &mut Model, input: &mut Unstructured) -> Result<()> {
    let kind = input.int_in_range(0..=15)?;
    if kind == 0 || model.clients.is_empty() {
        return Ok(model.join(*input.choose(&USERS)?));
    }
    let index = input.choose_index(model.clients.len())?;
    let client = model.clients[index];
    match kind {
        1 => model.leave(index),
        2 | 3 => model.close(client.0, input.int_in_range(0..=7)?),
        4 => drop(model.introduced.unread.remove(&client.0)),
        5 => model.introduced.is_exhausted = input.arbitrary()?,
        6 => {
            let policy = input.int_in_range(0..=1)?;
            model.state.set_policy(POLICIES[policy].clone());
            model.policy = policy;
        }
        7 => drop(model.pair_again(*input.choose(&USERS)?)),
        8 => model.settle(),
        9 if input.ratio(1, 4)? => model.restart(input.int_in_range(0..=1)?),
        9 => {
            // One of before, to the client of its user.
            if let Some(at) = model.away.iter().position(|known| known.user == client.1) {
                let Known { open, secret, links, .. } = model.away.remove(at);
                let earlier = Some(PreviousRegistration { secret, links });
                model.open(client, input.int_in_range(0..=7)?, Open { earlier, ..open });
            }
        }
        // More than a user may have.
        10 if input.ratio(1, 8)? => {
            let (open, count) = (open(input)?, input.int_in_range(1..=160)?);
            for endpoint in 100..100 + count {
                if !model.open(client, endpoint, Open { earlier: None, ..open.clone() }) {
                    break;
                }
            }
        }
        _ => {
            let endpoint = input.int_in_range(0..=7)?;
            model.open(client, endpoint, open(input)?);
        }
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let mut model = Model::new();
    while !input.is_empty() && step(&mut model, &mut input).is_ok() {
        model.check_charges();
    }
    model.settle();
    while !model.clients.is_empty() {
        model.leave(0);
    }
    model.introduced.unread.clear();
    assert!(model.state.is_empty(), "{:?}", model.state);
});
