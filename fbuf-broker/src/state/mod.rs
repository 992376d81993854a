//! What the broker knows and decides, as a state machine without I/O: each call is a fact about one
//! client, each answer says what is to be done.

mod channel;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Bound,
    sync::Arc,
    time::Instant,
};

use fbuf_core::{
    channel::ChannelName,
    control::{
        ClientStatus, Earlier, EndpointStatus, LinkId, Open, Refusal, Resource, Role, Secret, Slots, Spent, Verdict,
    },
    inbound::Peer,
    limits::{MAX_ENDPOINTS, MAX_LINKS},
    protection::Mechanism,
    slot::Geometry,
    socket::Credentials,
};
use tokio::sync::MutexGuard;

use self::channel::{Channel, End, Receiver, Sender, Stock};
use crate::{
    account::{Account, Accounts, Capacity, Charge},
    policy::{Policy, User},
    share::Holding,
};

/// The most clients that one broker serves.
pub const MAX_CLIENTS: usize = 4096;

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

    /// Charges a link more to a client, which it caused and which cannot be made yet.
    ///
    /// # Errors
    /// [`Refusal::Spent`]; or the client is gone.
    pub fn charge_link(&self, id: ClientId) -> Result<Charge, Refusal> {
        let Payer { user, account } = &self.clients.get(&id).ok_or_else(gone)?.payer;
        Ok(account.charge(self.policy.quota(user), Resource::Links, 1)?)
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
        let Open { channel, role, earlier } = open;
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
        let quota = self.policy.quota(user);
        let charge = |resource, amount| account.charge(quota, resource, amount);
        if earlier.as_ref().is_some_and(|earlier| earlier.links.len() > MAX_LINKS) {
            return Err(Refusal::Crowded);
        }
        let Earlier { secret, links: earlier } = match earlier {
            Some(earlier) => earlier,
            None => Earlier { secret: Secret::draw().map_err(exhausted)?, links: Vec::new() },
        };
        let (known_as, earlier) = (secret.number(), earlier.into_boxed_slice());
        if self.known.contains(&known_as) {
            return Err(Refusal::Elsewhere);
        }
        let party = Party {
            client: id,
            endpoint,
            peer: Peer {
                endpoint: known_as,
                process: client.process,
                same_user: false,
                trusted: false,
                link: LinkId::default(),
            },
        };
        let none = Channel::default();
        let channel = self.channels.get(&name).unwrap_or(&none);
        // Also for those that it is linked with already: an earlier broker has not charged them here.
        let links = channel.others(role).map(|other| Ok((other, charge(Resource::Links, 1)?)));
        let links = links.collect::<Result<_, Refusal>>()?;
        let mut charges = vec![charge(Resource::Endpoints, 1)?];
        let mut made = None;
        let end = match role {
            Role::Sender { slot_bytes, max_slots, mechanism, slots } => {
                let stock = Stock::check(slot_bytes, max_slots, mechanism, slots)?;
                let geometry = stock.geometry;
                charges.push(charge(Resource::Slots, geometry.max_slots().into())?);
                charges.push(charge(Resource::Bytes, geometry.stride().saturating_mul(geometry.max_slots().into()))?);
                if let Slots::Broker { .. } = slots {
                    made = Some(Arc::new(charge(Resource::Descriptors, geometry.max_slots().into())?));
                }
                End::Sender(Sender { party, earlier, trusted, stock, links })
            }
            Role::Receiver { require } => End::Receiver(Receiver { party, earlier, require, trusted, links }),
        };
        let pairs = channel.pairs(&end)?;
        let seat = match channel.has_seat(user.id) {
            true => None,
            false => Some(charge(Resource::Channels, 1)?),
        };
        let user = user.id;
        let channel = self.channels.entry(name.clone()).or_default();
        channel.add(number, end, user, seat);
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

    /// A client closes an endpoint. One that is not open is closed already.
    pub fn close(&mut self, id: ClientId, endpoint: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let user = client.payer.user.id;
        if let Some(closed) = client.endpoints.remove(&endpoint) {
            self.remove(&closed, user);
        }
    }

    /// A client is gone.
    pub fn leave(&mut self, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        self.clients_of.remove(&(client.payer.user.id, id));
        for endpoint in client.endpoints.values() {
            self.remove(endpoint, client.payer.user.id);
        }
    }

    fn remove(&mut self, endpoint: &Endpoint, user: u32) {
        self.numbers.remove(&endpoint.number);
        self.known.remove(&endpoint.known_as);
        self.endpoints_of.remove(&(user, endpoint.number));
        if let Some(channel) = self.channels.get_mut(&endpoint.channel) {
            channel.remove(endpoint.number, user);
            if channel.is_empty() {
                self.channels.remove(&endpoint.channel);
            }
        }
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
        let status =
            EndpointStatus { number, endpoint: known_as, process, client: client.0, channel, end, report: None };
        Some((client, endpoint, status))
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

#[cfg(test)]
mod histories;
#[cfg(test)]
mod tests;
