//! What the broker knows and decides, as a state machine without I/O: each call is a fact about one
//! client, each answer says what is to be done.

mod channel;
mod pairing;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Bound,
    sync::Arc,
    time::Instant,
};

use fbuf_core::{
    channel::ChannelName,
    control::{
        ClientStatus, Earlier, EndpointStatus, LinkId, Open, Refusal, Resource, Role, Secret, Slots, Spent, Unpaired,
        Verdict,
    },
    inbound::Peer,
    limits::{MAX_ENDPOINTS, MAX_LINKS, MAX_PEER_USERS},
    protection::Mechanism,
    slot::Geometry,
    socket::Credentials,
};
use tokio::sync::MutexGuard;

use self::channel::{Channel, End, Receiver, Sender, Side, Stock};
use crate::{
    account::{Account, Accounts, Capacity, Charge},
    policy::{Policy, User},
    share::Holding,
};

/// The most clients that one broker serves.
pub const MAX_CLIENTS: usize = 4096;

/// The user that may take the last place.
const ROOT: u32 = 0;

/// A client, by a number that is given only once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(u64);

/// One end of a link that is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Party {
    /// Whose endpoint it is.
    pub client: ClientId,
    /// By what number the client knows it.
    pub endpoint: u64,
    /// How it is named to the other end.
    pub peer: Peer,
}

/// A link that is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// Who sends.
    pub sender: Party,
    /// Who receives.
    pub receiver: Party,
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
    Spent(Spent),
}

impl Dismissal {
    /// In a word.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::NotPermitted => Verdict::NotPermitted,
            Self::Spent(_) => Verdict::Spent,
        }
    }
}

/// Who pays for what a process asks for.
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
    payer: Payer,
    charge: Charge,
}

impl Admission {
    /// Who pays for it.
    #[must_use]
    pub fn payer(&self) -> &Payer {
        &self.payer
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
    /// Whose each endpoint is, and by what number the client knows it.
    numbers: BTreeMap<u64, (ClientId, u64)>,
    /// The endpoints of each user.
    endpoints_of: BTreeSet<(u32, u64)>,
    /// How the endpoints are known to their peers.
    known: HashSet<u64>,
}

#[derive(Debug)]
struct Client {
    process: Credentials,
    payer: Payer,
    _connection: Charge,
    /// By the client's own numbers.
    endpoints: HashMap<u64, Endpoint>,
}

/// Where an endpoint is, by a number that is given only once; and what is paid for it.
#[derive(Debug)]
struct Endpoint {
    channel: ChannelName,
    number: u64,
    known_as: u64,
    _charges: Vec<Charge>,
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
        }
    }

    /// From now on another policy is in force. What was allowed stays.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
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
        let charge = account.charge(self.policy.quota(&user), Resource::Connections, 1).map_err(Dismissal::Spent)?;
        Ok(Admission { process, payer: Payer { user, account }, charge })
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
        let Admission { process, payer, charge } = admission;
        self.clients_of.insert((payer.user.id, id));
        self.clients.insert(id, Client { process, payer, _connection: charge, endpoints: HashMap::new() });
        Ok(id)
    }

    /// Who pays for what a client asks for.
    #[must_use]
    pub fn payer(&self, id: ClientId) -> Option<Payer> {
        self.clients.get(&id).map(|client| client.payer.clone())
    }

    /// A message of a client, or a connection, has its turn: when it may be answered.
    #[must_use]
    pub fn note_request(&self, payer: &Payer, now: Instant) -> Instant {
        payer.account.note_request(self.policy.quota(&payer.user), now)
    }

    /// A client's request made so many links: each is as much work as a request.
    pub fn note_links(&self, id: ClientId, links: usize, now: Instant) {
        if let Some(Client { payer: Payer { user, account }, .. }) = self.clients.get(&id) {
            // The next request waits for it.
            let _ = account.note_work(self.policy.quota(user), links as u32, now);
        }
    }

    /// Charges a link more to the user that pays for a pair that cannot be introduced yet. Between users it is not made
    /// if that user has too many.
    ///
    /// # Errors
    /// [`Refusal::Spent`], within one user.
    pub fn charge_waiting(&mut self, pair: &Pair) -> Result<Option<Charge>, Refusal> {
        match self.charge_link(pair.payer) {
            Ok(charge) => Ok(Some(charge)),
            Err(spent) if pair.sender.peer.same_user => Err(spent.into()),
            Err(_) => {
                let place = |party: &Party| self.clients.get(&party.client)?.endpoints.get(&party.endpoint);
                if let (Some(sender), Some(receiver)) = (place(&pair.sender), place(&pair.receiver))
                    && let Some(channel) = self.channels.get_mut(&sender.channel)
                {
                    channel.unlink(sender.number, receiver.number);
                }
                Ok(None)
            }
        }
    }

    /// Takes a descriptor for what is on its way to a client; none, if its user has its share of the broker's.
    #[must_use]
    pub fn take_descriptor(&self, id: ClientId) -> Option<Holding> {
        self.clients.get(&id)?.payer.account.take_descriptor()
    }

    /// Whether two clients are of one user.
    #[must_use]
    pub fn are_of_one_user(&self, one: ClientId, other: ClientId) -> bool {
        let user = |id| self.clients.get(&id).map(|client: &Client| client.payer.user.id);
        user(one).is_some() && user(one) == user(other)
    }

    /// Whether this end of a pair is open still.
    #[must_use]
    pub fn is_open(&self, party: &Party) -> bool {
        let endpoint = self.clients.get(&party.client).and_then(|client| client.endpoints.get(&party.endpoint));
        endpoint.is_some_and(|endpoint| endpoint.known_as == party.peer.endpoint)
    }

    /// A client opens an endpoint.
    ///
    /// # Errors
    /// [`Refusal`], and nothing has changed.
    pub fn open(&mut self, id: ClientId, endpoint: u64, open: Open) -> Result<Opening, Refusal> {
        let Open { channel, role, users, earlier } = open;
        let name = ChannelName::new(channel)?;
        let number = self.next();
        let exhausted = |error: std::io::Error| Refusal::Exhausted(error.to_string());
        let Some(client) = self.clients.get(&id) else { return Err(gone()) };
        if client.endpoints.contains_key(&endpoint) {
            return Err(Refusal::Taken(endpoint));
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
            return Err(Refusal::Crowded);
        }
        let users = users.map(sorted);
        if let Some(users) = users.as_ref().filter(|users| users.len() > MAX_PEER_USERS) {
            return Err(Refusal::TooManyUsers(users.len()));
        }
        let is_new = earlier.is_none();
        let Earlier { secret, links: earlier } = match earlier {
            Some(earlier) => earlier,
            None => Earlier { secret: Secret::draw().map_err(exhausted)?, links: Vec::new() },
        };
        let (known_as, earlier) = (secret.number(), earlier.into_boxed_slice());
        if self.known.contains(&known_as) {
            return Err(Refusal::Elsewhere);
        }
        let peer = Peer {
            endpoint: known_as,
            process: client.process,
            same_user: false,
            trusted: false,
            link: LinkId::default(),
        };
        let side = Side { party: Party { client: id, endpoint, peer }, earlier, users, trusted };
        let none = Channel::default();
        let channel = self.channels.get(&name).unwrap_or(&none);
        let mut charges = vec![charge(Resource::Endpoints, 1)?];
        let mut made = None;
        let end = match role {
            Role::Sender { slot_bytes, max_slots, mechanism, slots } => {
                let stock = Stock::check(slot_bytes, max_slots, mechanism, slots)?;
                // What was open before the policy changed, or the broker died, is.
                if is_new && is_confidential && stock.mechanism != Mechanism::OneShot {
                    return Err(Refusal::Confidential(name.as_str().into()));
                }
                let geometry = stock.geometry;
                charges.push(charge(Resource::Slots, geometry.max_slots().into())?);
                charges.push(charge(Resource::Bytes, geometry.stride().saturating_mul(geometry.max_slots().into()))?);
                if let Slots::Broker { .. } = slots {
                    made = Some(Arc::new(charge(Resource::Descriptors, geometry.max_slots().into())?));
                }
                End::Sender(Sender { side, stock, links: BTreeMap::new() })
            }
            Role::Receiver { require, accepts } => End::Receiver(Receiver { side, require, accepts, links: 0 }),
        };
        let shares = user.id != ROOT && self.policy.is_about_others_than(user.id);
        channel.check_share(name.as_str(), role, user.id, shares)?;
        let links = channel.match_with(&end, is_confidential, |client| self.charge_link(client))?;
        let seat = match channel.has_seat(user.id) {
            true => None,
            false => Some(charge(Resource::Channels, 1)?),
        };
        let user = user.id;
        let pairs = self.channels.entry(name.clone()).or_default().add(number, end, links, seat);
        self.numbers.insert(number, (id, endpoint));
        self.known.insert(known_as);
        self.endpoints_of.insert((user, number));
        if let Some(client) = self.clients.get_mut(&id) {
            client
                .endpoints
                .insert(endpoint, Endpoint { channel: name, number, known_as, _charges: charges, slots: made });
        }
        Ok(Opening { endpoint: known_as, secret, pairs })
    }

    /// Charges a link to the user of a client.
    ///
    /// # Errors
    /// [`Spent`]: that user has as many as the quota allows.
    pub fn charge_link(&self, client: ClientId) -> Result<Charge, Spent> {
        charge_link(&self.clients, &self.policy, client)
    }

    /// What is paid for the slots of an endpoint that the broker makes, for as long as these, or the endpoint, exist.
    #[must_use]
    pub fn paid_for_slots(&self, id: ClientId, endpoint: u64) -> Option<Arc<Charge>> {
        self.clients.get(&id)?.endpoints.get(&endpoint)?.slots.clone()
    }

    /// The clients of a user, or of all, that have any endpoint.
    pub fn with_endpoints(&self, user: Option<u32>) -> impl Iterator<Item = ClientId> {
        self.seen_by(user, ClientId(0)).filter(|(_, client)| !client.endpoints.is_empty()).map(|(id, _)| id)
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

    /// A client closes an endpoint: the links that are to be made now. One that is not open is closed already.
    #[must_use]
    pub fn close(&mut self, id: ClientId, endpoint: u64) -> Vec<Pair> {
        let Some(client) = self.clients.get_mut(&id) else { return Vec::new() };
        let user = client.payer.user.id;
        let closed = client.endpoints.remove(&endpoint);
        self.remove(closed.into_iter(), user)
    }

    /// A client is gone: the links that are to be made now.
    #[must_use]
    pub fn leave(&mut self, id: ClientId) -> Vec<Pair> {
        let Some(client) = self.clients.remove(&id) else { return Vec::new() };
        let user = client.payer.user.id;
        self.clients_of.remove(&(user, id));
        self.remove(client.endpoints.into_values(), user)
    }

    /// Removes endpoints of a user. Senders that took their slots from one of them take them from another.
    fn remove(&mut self, endpoints: impl Iterator<Item = Endpoint>, user: u32) -> Vec<Pair> {
        let mut bereft = BTreeMap::new();
        for Endpoint { channel: name, number, known_as, .. } in endpoints {
            self.numbers.remove(&number);
            self.known.remove(&known_as);
            self.endpoints_of.remove(&(user, number));
            if let Some(channel) = self.channels.get_mut(&name) {
                bereft.extend(channel.remove(number, user).into_iter().map(|sender| (sender, name.clone())));
                if channel.is_empty() {
                    self.channels.remove(&name);
                }
            }
        }
        let (clients, policy) = (&self.clients, &self.policy);
        let pay = |client| charge_link(clients, policy, client);
        let find = |(sender, name): (u64, ChannelName)| {
            self.channels.get_mut(&name)?.find_receiver(sender, policy.is_confidential(&name), pay)
        };
        bereft.into_iter().filter_map(find).collect()
    }

    /// Whether nothing is left of any client, and nothing is charged to anybody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
            && self.clients_of.is_empty()
            && self.channels.is_empty()
            && self.numbers.is_empty()
            && self.known.is_empty()
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

    fn status_of(&self, number: u64) -> Option<(ClientId, u64, EndpointStatus)> {
        let &(client, endpoint) = self.numbers.get(&number)?;
        let channel = &self.clients.get(&client)?.endpoints.get(&endpoint)?.channel;
        let (Peer { endpoint: known_as, process, .. }, end) = self.channels.get(channel)?.status(number)?;
        let channel = channel.as_str().to_owned();
        let (unpaired, first_unpaired, report) = (0, None, None);
        let client_number = client.0;
        let status = EndpointStatus {
            number,
            endpoint: known_as,
            process,
            client: client_number,
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
            endpoints: client.endpoints.len() as u64,
        })
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
    Refusal::Exhausted("the client has gone".into())
}

fn charge_link(clients: &BTreeMap<ClientId, Client>, policy: &Policy, client: ClientId) -> Result<Charge, Spent> {
    // Every end on a channel is of a client that is here; one that is not pays for nothing.
    let gone = Spent { user: 0, resource: Resource::Links, asked: 1, used: 0, limit: 0, rule: String::new() };
    let Payer { user, account } = &clients.get(&client).ok_or(gone)?.payer;
    account.charge(policy.quota(user), Resource::Links, 1)
}

/// In order, each once.
fn sorted<T: Ord>(mut all: Vec<T>) -> Box<[T]> {
    all.sort_unstable();
    all.dedup();
    all.into_boxed_slice()
}

#[cfg(test)]
mod between_users;
#[cfg(test)]
mod histories;
#[cfg(test)]
mod tests;
