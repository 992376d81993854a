//! What the broker knows and decides, as a state machine without I/O: each call is a fact about one
//! client, each answer says what is to be done.

mod channel;
mod pairing;
mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    ops::Bound,
    sync::Arc,
    time::Instant,
};

use fbuf_core::{
    limits::{MAX_ENDPOINTS, MAX_LINKS, MAX_PEER_USERS},
    peer::{Credentials, Peer},
    process::sys::said,
    protection::Mechanism,
    slot::Geometry,
};
use fbuf_protocol::{
    ClientStatus, EndpointStatus, Mismatch, Open, PreviousRegistration, QuotaExceeded, Refusal, Resource, Role, Secret,
    Slots, Unpaired, Verdict, Wire,
    channel::ChannelName,
    name::{Label, Program},
};
use tokio::sync::MutexGuard;

use self::channel::{Channel, End, Receiver, Sender, Side, Stock};
pub use self::waiting::{Lack, Turn};
use crate::{
    account::{Account, Accounts, Capacity, Charge, Names},
    policy::{Policy, User},
};

/// The most clients that one broker serves.
pub const MAX_CLIENTS: usize = 4096;

/// The user that may take the last place.
const ROOT: u32 = 0;

/// A client, by a number that is given only once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub(crate) u64);

/// One end of a link that is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairEnd {
    /// The client that has it.
    pub client: ClientId,
    /// By what number the client knows it.
    pub endpoint: u64,
    /// How it is named to the other end.
    pub peer: Peer,
}

/// A link that is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// The end that sends.
    pub sender: PairEnd,
    /// The end that receives.
    pub receiver: PairEnd,
    /// The slots of the sender.
    pub geometry: Geometry,
    /// How messages are protected.
    pub mechanism: Mechanism,
    /// Where the slots come from.
    pub slots: Slots,
    /// The client of the user that pays for it.
    pub payer: ClientId,
}

/// What comes of opening an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// Which endpoint of this broker it is, by a number that is given only once.
    pub number: u64,
    /// How its peers will know it.
    pub endpoint: u64,
    /// What proves to the next broker that it is this one.
    pub secret: Secret,
    /// The links that are to be made.
    pub pairs: Vec<Pair>,
}

/// Why a connection is sent away before it has greeted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dismissal {
    /// No rule is about its user.
    NotPermitted,
    /// Its user has as many as a rule allows.
    QuotaExceeded(QuotaExceeded),
}

impl Dismissal {
    /// In a word.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::NotPermitted => Verdict::NotPermitted,
            Self::QuotaExceeded(_) => Verdict::QuotaExceeded,
        }
    }
}

/// The user that pays for what a process asks for.
#[derive(Debug, Clone)]
pub struct Payer {
    user: User,
    account: Arc<Account>,
}

impl Payer {
    /// Waits for all that the same user has asked for before: that has had its turn when it drops what this returns.
    pub async fn line(&self) -> MutexGuard<'_, ()> {
        self.account.line().await
    }
}

/// A connection that may become a client.
#[derive(Debug)]
pub struct Admission {
    process: Credentials,
    program: Program,
    payer: Payer,
    charge: Arc<Charge>,
}

impl Admission {
    /// The user that pays for it.
    #[must_use]
    pub fn payer(&self) -> &Payer {
        &self.payer
    }

    /// What is paid for it, for as long as this, or the client, exists.
    #[must_use]
    pub fn charge(&self) -> Arc<Charge> {
        self.charge.clone()
    }

    /// With the program that its process runs.
    #[must_use]
    pub fn of(self, program: Program) -> Self {
        Self { program, ..self }
    }
}

/// All that the broker knows.
#[derive(Debug)]
pub struct State {
    policy: Policy,
    accounts: Accounts,
    last: u64,
    clients: BTreeMap<ClientId, Client>,
    /// The clients of each user.
    clients_of: BTreeSet<(u32, ClientId)>,
    channels: HashMap<ChannelName, Channel>,
    /// The client of each endpoint, and by what number it knows the endpoint.
    numbers: BTreeMap<u64, (ClientId, u64)>,
    /// The endpoints of each user.
    endpoints_of: BTreeSet<(u32, u64)>,
    /// How the endpoints are known to their peers.
    known: HashSet<u64>,
    /// The endpoints that wait, by user and [ticket](waiting::Wait).
    waiting: BTreeMap<(u32, u64), u64>,
    /// How many looks there were whether ends fit, and how many links were named, since that was asked.
    looks: usize,
}

#[derive(Debug)]
struct Client {
    process: Credentials,
    program: Program,
    payer: Payer,
    _connection: Arc<Charge>,
    /// By the client's own numbers.
    endpoints: HashMap<u64, Endpoint>,
}

/// Where an endpoint is, by a number that is given only once; and what is paid for it.
#[derive(Debug)]
struct Endpoint {
    channel: ChannelName,
    label: Option<Label>,
    number: u64,
    known_as: u64,
    _charges: Vec<Charge>,
    _names: Names,
    /// What is paid for slots that the broker makes.
    slots: Option<Arc<Charge>>,
}

impl State {
    /// A broker with this policy.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self::with_capacity(policy, Capacity::unlimited())
    }

    /// A broker with this policy, of which each user may have a share.
    #[must_use]
    pub fn with_capacity(policy: Policy, capacity: Capacity) -> Self {
        Self {
            policy,
            accounts: Accounts::new(capacity),
            last: 0,
            clients: BTreeMap::new(),
            channels: HashMap::new(),
            numbers: BTreeMap::new(),
            clients_of: BTreeSet::new(),
            endpoints_of: BTreeSet::new(),
            known: HashSet::new(),
            waiting: BTreeMap::new(),
            looks: 0,
        }
    }

    /// From now on another policy is in force. What was allowed stays; what is allowed only now will be paired.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
        let apart: Vec<_> = self.channels.values().flat_map(Channel::apart).collect();
        apart.into_iter().for_each(|sender| self.wait(sender, Mismatch::Due));
    }

    /// A process of this user has connected.
    ///
    /// # Errors
    /// [`Dismissal`]
    pub fn admit(&mut self, process: Credentials, user: User) -> Result<Admission, Dismissal> {
        if !self.policy.serves(&user) {
            return Err(Dismissal::NotPermitted);
        }
        let account = self.accounts.of(user.id);
        let charge =
            account.charge(self.policy.quota(&user), Resource::Connections, 1).map_err(Dismissal::QuotaExceeded)?;
        let (program, payer) = (Program::default(), Payer { user, account });
        Ok(Admission { process, program, payer, charge: Arc::new(charge) })
    }

    /// It has greeted in order, and becomes a client.
    ///
    /// # Errors
    /// The [`Verdict`] to send it away with.
    pub fn join(&mut self, admission: Admission) -> Result<ClientId, Verdict> {
        if self.clients.len() == MAX_CLIENTS {
            return Err(Verdict::Full);
        }
        let id = ClientId(self.next());
        let Admission { process, program, payer, charge } = admission;
        self.clients_of.insert((payer.user.id, id));
        self.clients.insert(id, Client { process, program, payer, _connection: charge, endpoints: HashMap::new() });
        Ok(id)
    }

    /// The user that pays for what a client asks for.
    #[must_use]
    pub fn payer(&self, id: ClientId) -> Option<Payer> {
        self.clients.get(&id).map(|client| client.payer.clone())
    }

    /// A message of a client, or a connection, has its turn: when it may be answered.
    #[must_use]
    pub fn note_request(&self, payer: &Payer, now: Instant) -> Instant {
        payer.account.note_request(self.policy.quota(&payer.user), now)
    }

    /// What a client asked for is as much work as so many requests: its user's next request waits for it.
    pub fn note_work(&self, id: ClientId, requests: usize, now: Instant) {
        if let Some(Client { payer: Payer { user, account }, .. }) = self.clients.get(&id) {
            let _ = account.note_work(self.policy.quota(user), requests as u32, now);
        }
    }

    /// How many ends were compared by requests, and how many links they named, since this was asked last.
    pub fn take_looks(&mut self) -> usize {
        std::mem::take(&mut self.looks)
    }

    /// A client opens an endpoint.
    ///
    /// # Errors
    /// [`Refusal`], and nothing has changed.
    pub fn open(&mut self, id: ClientId, endpoint: u64, open: Open) -> Result<Opening, Refusal> {
        let Open { channel, role, label, users, earlier } = open;
        let name = ChannelName::new(channel)?;
        let number = self.next();
        let exhausted = |error: std::io::Error| Refusal::Exhausted { what: said(&error) };
        let Some(client) = self.clients.get(&id) else { return Err(gone()) };
        if client.endpoints.contains_key(&endpoint) {
            return Err(Refusal::EndpointInUse { endpoint });
        }
        if client.endpoints.len() == MAX_ENDPOINTS {
            return Err(Refusal::TooManyEndpoints);
        }
        let Payer { user, account } = &client.payer;
        self.policy.permit(user, role, &name).map_err(|rules| Refusal::NotPermitted {
            user: user.id,
            role: role.name().into(),
            channel: name.as_str().into(),
            rules,
        })?;
        let trusted = self.policy.trusts(user, role, &name);
        let is_confidential = self.policy.is_confidential(&name);
        let quota = self.policy.quota(user);
        let charge = |resource, amount| account.charge(quota, resource, amount);
        if earlier.as_ref().is_some_and(|earlier| earlier.links.len() > MAX_LINKS) {
            return Err(Refusal::ChannelFull);
        }
        let users = users.map(sorted);
        if let Some(users) = users.as_ref().filter(|users| users.len() > MAX_PEER_USERS) {
            return Err(Refusal::TooManyUsers { users: users.len() });
        }
        let is_new = earlier.is_none();
        let PreviousRegistration { secret, links: earlier } = match earlier {
            Some(earlier) => earlier,
            None => PreviousRegistration { secret: Secret::draw().map_err(exhausted)?, links: Vec::new() },
        };
        self.looks += earlier.len();
        let names = account.name(quota, earlier.len() as u64)?;
        let (known_as, earlier) = (secret.number(), earlier.into_boxed_slice());
        if self.known.contains(&known_as) {
            return Err(Refusal::Elsewhere);
        }
        let peer = Peer::new(known_as, client.process);
        let side = Side {
            party: PairEnd { client: id, endpoint, peer },
            earlier,
            parted: VecDeque::new(),
            users,
            trusted,
            waits: None,
        };
        let none = Channel::default();
        let channel = self.channels.get(&name).unwrap_or(&none);
        let mut charges = vec![charge(Resource::Endpoints, 1)?];
        let mut made = None;
        let end = match role {
            Role::Sender { geometry, mechanism, slots } => {
                let stock = Stock::check(geometry, mechanism, slots)?;
                // What was open before the policy changed, or the broker died, is.
                if is_new && is_confidential && stock.mechanism != Mechanism::OneShot {
                    return Err(Refusal::Confidential { channel: name.as_str().into() });
                }
                let geometry = stock.geometry;
                charges.push(charge(Resource::Slots, geometry.max_slots().into())?);
                charges.push(charge(Resource::Bytes, geometry.stride().saturating_mul(geometry.max_slots().into()))?);
                if let Slots::Broker { .. } = slots {
                    made = Some(Arc::new(charge(Resource::Descriptors, geometry.max_slots().into())?));
                }
                End::Sender(Sender { side, stock, links: BTreeMap::new() })
            }
            Role::Receiver { require, accepts } => {
                End::Receiver(Receiver { side, require, accepts, links: BTreeSet::new() })
            }
        };
        let shares = user.id != ROOT && self.policy.is_about_others_than(user.id);
        channel.check_share(name.as_str(), role, user.id, shares)?;
        let matched = channel.match_with(&end, is_confidential, |client| self.charge_link(client));
        self.looks += channel.others(role);
        let mut links = matched?;
        let seat = match channel.has_seat(user.id) {
            true => None,
            false => Some(charge(Resource::Channels, 1)?),
        };
        let user = user.id;
        let unpaid = std::mem::take(&mut links.unpaid);
        let pairs = self.channels.entry(name.clone()).or_default().add(number, end, links, seat);
        self.numbers.insert(number, (id, endpoint));
        self.known.insert(known_as);
        self.endpoints_of.insert((user, number));
        if let Some(client) = self.clients.get_mut(&id) {
            client.endpoints.insert(
                endpoint,
                Endpoint {
                    channel: name,
                    label: label.map(|Wire(label)| label),
                    number,
                    known_as,
                    _charges: charges,
                    _names: names,
                    slots: made,
                },
            );
        }
        for (other, user, is_others) in unpaid {
            self.wait(if is_others { other } else { number }, Mismatch::Quota { user });
        }
        Ok(Opening { number, endpoint: known_as, secret, pairs })
    }

    /// Charges a link to the user of a client.
    ///
    /// # Errors
    /// [`QuotaExceeded`]: that user has as many as the quota allows.
    pub fn charge_link(&self, client: ClientId) -> Result<Charge, QuotaExceeded> {
        // Every end on a channel is of a client that is here; one that is not pays for nothing.
        let gone = QuotaExceeded::new(0, Resource::Links, 1, 0, 0, "");
        let Payer { user, account } = &self.clients.get(&client).ok_or(gone)?.payer;
        account.charge(self.policy.quota(user), Resource::Links, 1)
    }

    /// What is paid for the slots of an endpoint that the broker makes, for as long as these, or the endpoint, exist.
    #[must_use]
    pub fn paid_for_slots(&self, id: ClientId, endpoint: u64) -> Option<Arc<Charge>> {
        self.clients.get(&id)?.endpoints.get(&endpoint)?.slots.clone()
    }

    /// The clients of a user, or of all, that have any endpoint.
    pub fn with_endpoints(&self, user: Option<u32>) -> impl Iterator<Item = (ClientId, u32)> {
        let seen = self.seen_by(user, ClientId(0)).filter(|(_, client)| !client.endpoints.is_empty());
        seen.map(|(id, client)| (id, client.payer.user.id))
    }

    /// The clients of a user, or of all, behind one of them. It looks at no others.
    fn seen_by(&self, user: Option<u32>, behind: ClientId) -> impl Iterator<Item = (ClientId, &Client)> {
        let behind = Bound::Excluded(behind);
        let all = user.is_none().then(|| self.clients.range((behind, Bound::Unbounded)));
        let own = user.map(|user| {
            let (first, last) = (behind.map(|id| (user, id)), Bound::Included((user, ClientId(u64::MAX))));
            self.clients_of.range((first, last)).filter_map(|&(_, id)| Some((id, self.clients.get(&id)?)))
        });
        all.into_iter().flatten().map(|(&id, client)| (id, client)).chain(own.into_iter().flatten())
    }

    /// Whether a client has an endpoint of this number.
    #[must_use]
    pub fn has(&self, id: ClientId, endpoint: u64) -> bool {
        self.clients.get(&id).is_some_and(|client| client.endpoints.contains_key(&endpoint))
    }

    /// A client closes an endpoint. One that is not open is closed already.
    pub fn close(&mut self, id: ClientId, endpoint: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let user = client.payer.user.id;
        let closed = client.endpoints.remove(&endpoint);
        self.remove(closed.into_iter(), user, false);
    }

    /// A client is gone.
    pub fn leave(&mut self, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        let user = client.payer.user.id;
        self.clients_of.remove(&(user, id));
        self.remove(client.endpoints.into_values(), user, true);
    }

    /// Removes endpoints of a user, which may come again with their links. Senders that took their slots from one of them
    /// wait for another.
    fn remove(&mut self, endpoints: impl Iterator<Item = Endpoint>, user: u32, may_return: bool) {
        let mut bereft = BTreeSet::new();
        for Endpoint { channel: name, number, known_as, .. } in endpoints {
            self.numbers.remove(&number);
            self.known.remove(&known_as);
            self.endpoints_of.remove(&(user, number));
            if let Some(channel) = self.channels.get_mut(&name) {
                if let Some(wait) = channel.side(number).and_then(|side| side.waits) {
                    self.waiting.remove(&(user, wait.ticket));
                }
                bereft.extend(channel.remove(number, user, may_return));
                if channel.is_empty() {
                    self.channels.remove(&name);
                }
            }
        }
        bereft.into_iter().for_each(|sender| self.wait(sender, Mismatch::Due));
    }

    /// Whether nothing is left of any client, and nothing is charged to anybody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
            && self.clients_of.is_empty()
            && self.channels.is_empty()
            && self.numbers.is_empty()
            && self.known.is_empty()
            && self.waiting.is_empty()
            && self.accounts.used().next().is_none()
    }

    /// The endpoints of a user, or of all, in the order of opening, behind one of them; without reports. It looks
    /// at no more of them than it returns.
    #[must_use]
    pub fn status(&self, user: Option<u32>, behind: u64, most: usize) -> Vec<(ClientId, u64, EndpointStatus)> {
        let behind = Bound::Excluded(behind);
        let (all, own) = match user {
            None => (Some(self.numbers.range((behind, Bound::Unbounded)).map(|(&number, _)| number)), None),
            Some(user) => {
                let (first, last) = (behind.map(|number| (user, number)), Bound::Included((user, u64::MAX)));
                (None, Some(self.endpoints_of.range((first, last)).map(|&(_, number)| number)))
            }
        };
        let numbers = all.into_iter().flatten().chain(own.into_iter().flatten());
        numbers.take(most).filter_map(|number| self.status_of(number)).collect()
    }

    /// On which channel an endpoint is.
    fn channel_of(&self, number: u64) -> Option<&ChannelName> {
        channel_of(&self.numbers, &self.clients, number)
    }

    fn status_of(&self, number: u64) -> Option<(ClientId, u64, EndpointStatus)> {
        let &(client, endpoint) = self.numbers.get(&number)?;
        let channel = self.channel_of(number)?;
        let (Peer { endpoint: known_as, process, .. }, end) = self.channels.get(channel)?.status(number)?;
        let channel = channel.as_str().to_owned();
        let (unpaired, first_unpaired, report) = (0, None, None);
        let owner = self.clients.get(&client)?;
        let status = EndpointStatus {
            number,
            endpoint: known_as,
            process,
            program: Wire(owner.program.clone()),
            label: owner.endpoints.get(&endpoint)?.label.clone().map(Wire),
            client: client.0,
            channel,
            end,
            unpaired,
            first_unpaired,
            report,
        };
        Some((client, endpoint, status))
    }

    /// The endpoints behind a number with which this endpoint of a client is not paired, and why; and how many were
    /// looked at.
    #[must_use]
    pub fn unpaired(&self, id: ClientId, endpoint: u64, behind: u64) -> (Vec<(u64, Unpaired)>, usize) {
        let endpoint = self.clients.get(&id).and_then(|client| client.endpoints.get(&endpoint));
        let on = endpoint.and_then(|endpoint| Some((endpoint, self.channels.get(&endpoint.channel)?)));
        on.map_or((Vec::new(), 0), |(endpoint, channel)| {
            channel.unpaired(endpoint.number, behind, self.policy.is_confidential(&endpoint.channel))
        })
    }

    /// The clients of a user, or of all, in the order in which they came, behind one of them.
    pub fn clients(&self, user: Option<u32>, behind: u64) -> impl Iterator<Item = ClientStatus> {
        self.seen_by(user, ClientId(behind)).map(|(id, client)| ClientStatus {
            number: id.0,
            process: client.process,
            program: Wire(client.program.clone()),
            endpoints: client.endpoints.len() as u64,
        })
    }

    /// How many channels there are.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.channels.len()
    }

    /// What every user takes up.
    pub fn used(&self) -> impl Iterator<Item = (u32, Resource, u64)> {
        self.accounts.used()
    }

    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

/// What is asked for a client is asked for none.
fn gone() -> Refusal {
    Refusal::Exhausted { what: "the client has gone".into() }
}

/// On which channel an endpoint is.
fn channel_of<'a>(
    numbers: &BTreeMap<u64, (ClientId, u64)>,
    clients: &'a BTreeMap<ClientId, Client>,
    number: u64,
) -> Option<&'a ChannelName> {
    let (client, endpoint) = numbers.get(&number)?;
    Some(&clients.get(client)?.endpoints.get(endpoint)?.channel)
}

/// In order, each once.
fn sorted<T: Ord>(mut all: Vec<T>) -> Box<[T]> {
    all.sort_unstable();
    all.dedup();
    all.into_boxed_slice()
}

#[cfg(test)]
mod tests;
