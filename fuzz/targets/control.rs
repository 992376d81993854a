//! Feeds any bytes, beside any number of descriptors, to the decoding of what clients and brokers say to each
//! other; and what is understood, among steps that are made up, to the broker's [`State`]. Nothing may panic; what
//! is understood can be said again; whoever is introduced is open, belongs together and gets what the receiver
//! requires; users see their own endpoints; nobody takes up more than the quota; and when all have left, nothing is
//! left of them.
#![no_main]

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, OwnedFd},
    sync::LazyLock,
    time::Instant,
};

use arbitrary::{Result, Unstructured};
use fbuf_broker::{
    Policy,
    policy::User,
    state::{ClientId, Opening, Pair, State},
};
use fbuf_core::{
    limits::MAX_DESCRIPTORS,
    peer::Credentials,
    protection::{Mechanism, Protection},
    socket::wire::{self, Descriptor},
};
use fbuf_fuzz::{link, secret};
use fbuf_protocol::{
    Accepted, ControlRequest, ControlResponse, Limits, MAX_PAGE, Open, Parcel, PreviousRegistration, Refusal, Report,
    Role, Slots,
};
use libfuzzer_sys::fuzz_target;
use tarpc::{ClientMessage, Request, Response};

/// Two users who see what the other changes sealed, one who is trusted, and everybody else, who may only receive.
const POLICY: &str = r#"
    [[rule]]
    users = [1000, 1001]
    send = ["*"]
    receive = ["*"]
    quota = { bytes = "64KiB", slots = 64, channels = 2, links = 6, connections = 2, descriptors = 8 }
    [[rule]]
    users = [1002]
    send = ["*"]
    receive = ["*"]
    trusted = true
    quota = { bytes = "1MiB", slots = 32, channels = 3, links = 4, connections = 3, descriptors = 40 }
    [[rule]]
    users = ["*"]
    receive = ["a", "b"]
    quota = { links = 2, connections = 1 }
    [[rule]]
    users = [1001, 1002]
    receive = ["c"]
    trusted_pool = true
    [[channel]]
    names = ["d"]
    confidential = true
"#;
const TRUSTED: u32 = 1002;
/// Users with receivers that others take slots from, on channel c.
const POOLS: [u32; 2] = [1001, 1002];

static SERVED: LazyLock<Policy> = LazyLock::new(|| Policy::parse(POLICY).expect("it is correct"));
static FILE: LazyLock<OwnedFd> = LazyLock::new(|| fbuf_fuzz::descriptor(4, 4096));

/// Few slots of others, and less of the own user.
const FEW: Limits =
    Limits { own: Accepted { slot_bytes: 100, max_slots: 8 }, others: Accepted { slot_bytes: 4096, max_slots: 32 } };

/// A broker, and what its answers let one expect of it.
struct Model {
    state: State,
    clients: Vec<(ClientId, User)>,
    open: HashMap<(ClientId, u64), (u32, Open)>,
}

impl Model {
    fn join(&mut self, user: u32) {
        let process = Credentials::new(1, user, user);
        let user = User::new(user, vec![user]);
        let admission = self.state.admit(process, user.clone()).ok();
        if let Some(client) = admission.and_then(|admission| self.state.join(admission).ok()) {
            self.clients.push((client, user));
        }
    }

    fn leave(&mut self, index: usize) {
        if index < self.clients.len() {
            let (client, _) = self.clients.remove(index);
            self.state.leave(client);
            self.open.retain(|&(owner, _), _| owner != client);
            self.pair_again();
        }
    }

    fn pair_again(&mut self) {
        let mut pairs = Vec::new();
        for user in self.state.waiting().collect::<Vec<_>>() {
            self.state.pair_again(user, Instant::now(), |pair, _| {
                pairs.push(*pair);
                Ok(())
            });
        }
        pairs.iter().for_each(|pair| self.check_pair(pair));
    }

    fn ask(&mut self, index: usize, request: ControlRequest) {
        let Some((client, user)) = self.clients.get(index).cloned() else { return };
        if let Some(payer) = self.state.payer(client) {
            let _ = self.state.note_request(&payer, Instant::now());
        }
        match request {
            ControlRequest::Open { endpoint, open } => {
                let opening = match self.state.open(client, endpoint, open.clone()) {
                    Ok(opening) => opening,
                    Err(refusal) => return self.check_refusal(user.id, &open, &refusal),
                };
                let known = self.open.insert((client, endpoint), (user.id, open));
                assert!(known.is_none(), "endpoint {endpoint} was opened twice");
                self.check(client, endpoint, &opening);
            }
            ControlRequest::Close { endpoint, .. } => {
                self.state.close(client, endpoint);
                self.open.remove(&(client, endpoint));
                self.pair_again();
            }
            ControlRequest::News { .. } => {}
            ControlRequest::Report { reports, .. } => {
                for (endpoint, _) in reports {
                    assert_eq!(self.state.has(client, endpoint), self.open.contains_key(&(client, endpoint)));
                }
            }
            ControlRequest::Status { behind } => self.check_page(user.id, behind),
            ControlRequest::Clients { behind } => self.check_clients(user.id, behind),
            ControlRequest::Unpaired { endpoint, behind } => {
                let (unpaired, looked) = self.state.unpaired(client, endpoint, behind);
                assert!(unpaired.len() <= looked && unpaired.iter().all(|&(number, _)| number > behind));
            }
        }
    }

    fn check(&self, client: ClientId, endpoint: u64, opening: &Opening) {
        let mut met = HashSet::new();
        for pair in &opening.pairs {
            self.check_pair(pair);
            let ends = [pair.sender, pair.receiver].map(|party| (party.client, party.endpoint));
            assert!(ends.contains(&(client, endpoint)), "{pair:?} are both others");
            assert!(met.insert(ends), "{pair:?} are introduced twice");
        }
    }

    /// Two that are paired fit.
    fn check_pair(&self, pair: &Pair) {
        let (sender, receiver) = (pair.sender, pair.receiver);
        let (from, sending) = &self.open[&(sender.client, sender.endpoint)];
        let (to, receiving) = &self.open[&(receiver.client, receiver.endpoint)];
        let (Role::Sender { slots, .. }, Role::Receiver { require, accepts }) = (sending.role, receiving.role) else {
            panic!("{pair:?} are no sender and receiver");
        };
        assert_eq!(sending.channel, receiving.channel);
        assert!(pair.mechanism.protection() >= require);
        let one_user = from == to;
        assert!(one_user || *from == TRUSTED || pair.mechanism.protection() == Protection::Sealed);
        let is_trusted_pool = one_user || POOLS.contains(to) && sending.channel == "c";
        assert!(slots != Slots::Receiver || is_trusted_pool, "{pair:?}: a pool that the sender does not trust");
        assert!(one_user || sending.channel != "d" || pair.mechanism == Mechanism::OneShot, "{pair:?}: confidential");
        assert_eq!(accepts.check(pair.geometry, one_user), Ok(()));
        let names = |open: &Open, user| open.users.as_ref().is_none_or(|users| users.contains(user));
        assert!(names(sending, to) && names(receiving, from), "{pair:?}: another user was named");
        let trusted = [one_user || *from == TRUSTED, is_trusted_pool];
        assert_eq!([sender, receiver].map(|party| party.peer.trusted), trusted);
        assert_eq!([sender, receiver].map(|party| party.peer.same_user), [one_user; 2]);
    }

    /// An endpoint is refused for what its own user has, and for nothing of others.
    fn check_refusal(&self, user: u32, open: &Open, refusal: &Refusal) {
        let others = self.open.values().filter(|(_, other)| other.channel == open.channel);
        let sends = |open: &Open| matches!(open.role, Role::Sender { .. });
        let own = others.filter(|(owner, other)| *owner == user && sends(other) != sends(open)).count();
        match refusal {
            Refusal::Unpaired { .. }
            | Refusal::SenderGivesLess { .. }
            | Refusal::ReceiverRequiresMore { .. }
            | Refusal::OneReceiver { .. } => assert!(own > 0, "{refusal}"),
            Refusal::SeveralReceivers { .. } => assert!(own > 1, "{refusal}"),
            Refusal::QuotaExceeded(spent) => assert_eq!(spent.user, user, "{refusal}"),
            _ => {}
        }
    }

    fn check_page(&self, user: u32, behind: u64) {
        let page = self.state.status(Some(user), behind, MAX_PAGE);
        assert!(page.len() <= MAX_PAGE && page.is_sorted_by_key(|(_, _, status)| status.number));
        for (client, endpoint, status) in page {
            let (owner, open) = &self.open[&(client, endpoint)];
            assert!(*owner == user && open.channel == status.channel && status.number > behind);
        }
    }

    fn check_clients(&self, user: u32, behind: u64) {
        let page: Vec<_> = self.state.clients(Some(user), behind).take(MAX_PAGE).collect();
        assert!(page.is_sorted_by(|one, next| behind < one.number && one.number < next.number));
        assert!(page.iter().all(|client| client.process.uid == user));
        let clients = self.clients.iter().filter(|(_, of)| of.id == user).count();
        if behind == 0 && clients <= MAX_PAGE {
            let open = self.open.values().filter(|(of, _)| *of == user).count() as u64;
            let listed = (page.len(), page.iter().map(|client| client.endpoints).sum::<u64>());
            assert_eq!(listed, (clients, open), "clients of {user}, and their endpoints");
        }
    }

    fn check_quotas(&self) {
        for (user, resource, used) in self.state.used() {
            let quota = SERVED.quota(&User::new(user, vec![user]));
            assert!(used <= quota.of(resource), "user {user} takes up {used} of {resource:?}");
        }
    }
}

/// Reads a message as whoever gets it would, and says it again.
fn understand<M: Parcel>(bytes: &[u8], descriptors: usize) -> Option<M> {
    let given = (0..descriptors).map(|_| FILE.try_clone().expect("few descriptors are open").into()).collect();
    let message = M::unpack(wire::decode(bytes, given).ok()?);
    let again = wire::encode(&message.pack()).expect("what came can be sent");
    assert!(again.bytes.len() <= bytes.len() && again.descriptors.len() <= descriptors);
    let own = |fd: &Descriptor| fd.as_fd().try_clone_to_owned().expect("few descriptors are open").into();
    let given = again.descriptors.iter().map(own).collect();
    Some(M::unpack(wire::decode(&again.bytes, given).expect("what was sent is understood")))
}

fn open(input: &mut Unstructured) -> Result<Open> {
    let channel = (*input.choose(&["a", "b", "c", "d"])?).into();
    let slots =
        [Slots::Segments, Slots::Broker { huge: false }, Slots::Broker { huge: true }, Slots::Receiver, Slots::Sender];
    let role = match input.arbitrary()? {
        true => Role::Receiver {
            require: *input.choose(&[Protection::Volatile, Protection::Leased, Protection::Sealed])?,
            accepts: *input.choose(&[Limits::DEFAULT, FEW])?,
        },
        false => Role::sender(
            *input.choose(&[1, 64, 100, 4096, 1 << 20, 0, u64::MAX])?,
            input.int_in_range(0..=70)?,
            *input.choose(&[Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot])?,
            *input.choose(&slots)?,
        ),
    };
    let earlier = match input.arbitrary()? {
        true => {
            let links = (0..input.int_in_range(0..=3)?).map(|_| Ok(link(input.int_in_range(0..=15)?)));
            let links = links.collect::<Result<_>>()?;
            Some(PreviousRegistration { secret: secret(input.int_in_range(0..=15)?), links })
        }
        false => None,
    };
    let users = *input.choose(&[None, None, Some(&[1000, 1001][..]), Some(&[1002])])?;
    Ok(Open { channel, role, label: None, users: users.map(<[u32]>::to_vec), earlier })
}

/// One step, if the input has one more.
fn step(model: &mut Model, input: &mut Unstructured) -> Result<()> {
    let (kind, client) = (input.int_in_range(0..=7)?, input.int_in_range(0..=3)?);
    match kind {
        0 => model.join(1000 + input.int_in_range(0..=4)?),
        1 => model.leave(client),
        2 => {
            let endpoint = input.int_in_range(0..=7)?;
            model.ask(client, ControlRequest::Close { endpoint, last: Report::default() });
        }
        3 => {
            if let Some(&(client, _)) = model.clients.get(client) {
                drop(model.state.charge_link(client));
            }
        }
        4 | 5 => {
            let endpoint = input.int_in_range(0..=7)?;
            model.ask(client, ControlRequest::Open { endpoint, open: open(input)? });
        }
        _ => {
            let descriptors = input.int_in_range(0..=MAX_DESCRIPTORS)?;
            let length = input.int_in_range(0..=255)?;
            let bytes = input.bytes(length)?;
            if kind == 6 {
                let message: Option<ClientMessage<ControlRequest>> = understand(bytes, descriptors);
                if let Some(ClientMessage::Request(Request { message, .. })) = message {
                    model.ask(client, message);
                }
            } else {
                understand::<Response<ControlResponse>>(bytes, descriptors);
            }
        }
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let state = State::new(SERVED.clone());
    let mut model = Model { state, clients: Vec::new(), open: HashMap::new() };
    while !input.is_empty() && step(&mut model, &mut input).is_ok() {
        model.check_quotas();
    }
    while !model.clients.is_empty() {
        model.leave(0);
    }
    assert!(model.state.is_empty(), "{:?}", model.state);
});
