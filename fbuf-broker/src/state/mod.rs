//! What the broker knows and decides, as a state machine without I/O: each call is a fact about one
//! client, each answer says what is to be done.

use std::collections::{BTreeMap, HashMap};

use fbuf_core::{
    channel::ChannelName,
    control::{Open, Refusal, Role, Slots, Verdict},
    inbound::Peer,
    limits::{MAX_ENDPOINTS, MAX_LEASED},
    protection::{Mechanism, Protection},
    slot::{Geometry, GeometryError},
    socket::Credentials,
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

/// Which users a broker serves, and which of them others trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users {
    /// By id: whether receivers of other users may read its messages while it could change them.
    trusted: BTreeMap<u32, bool>,
}

impl Users {
    /// One user, by id.
    #[must_use]
    pub fn only(uid: u32) -> Self {
        Self { trusted: BTreeMap::from([(uid, false)]) }
    }

    /// One more. What it sends to others, and others send to it, is sealed.
    #[must_use]
    pub fn allow(mut self, uid: u32) -> Self {
        self.trusted.entry(uid).or_insert(false);
        self
    }

    /// One more, whose messages others get as it sends them, volatile or leased if it likes.
    #[must_use]
    pub fn trust(mut self, uid: u32) -> Self {
        self.trusted.insert(uid, true);
        self
    }

    /// Whether there is more than one.
    #[must_use]
    pub fn are_several(&self) -> bool {
        self.trusted.len() > 1
    }

    fn include(&self, uid: u32) -> bool {
        self.trusted.contains_key(&uid)
    }

    fn trust_in(&self, uid: u32) -> bool {
        self.trusted.get(&uid).is_some_and(|&trusted| trusted)
    }
}

/// All that the broker knows.
#[derive(Debug)]
pub struct State {
    users: Users,
    last: u64,
    clients: HashMap<ClientId, Client>,
    channels: HashMap<ChannelName, Channel>,
}

#[derive(Debug)]
struct Client {
    process: Credentials,
    /// By the client's own numbers: the channel each is on.
    endpoints: HashMap<u64, (ChannelName, u64)>,
}

/// The ends of one channel, by the numbers that are given only once, and so in the order of opening.
#[derive(Debug, Default)]
struct Channel {
    senders: BTreeMap<u64, Sender>,
    receivers: BTreeMap<u64, Receiver>,
}

#[derive(Debug, Clone, Copy)]
struct Sender {
    party: Party,
    geometry: Geometry,
    mechanism: Mechanism,
    slots: Slots,
}

#[derive(Debug, Clone, Copy)]
struct Receiver {
    party: Party,
    require: Protection,
}

impl State {
    /// A broker for these users.
    #[must_use]
    pub fn new(users: Users) -> Self {
        Self { users, last: 0, clients: HashMap::new(), channels: HashMap::new() }
    }

    /// A process wants to be a client.
    ///
    /// # Errors
    /// The [`Verdict`] to send it away with.
    pub fn join(&mut self, process: Credentials) -> Result<ClientId, Verdict> {
        if !self.users.include(process.uid) {
            return Err(Verdict::NotPermitted);
        }
        if self.clients.len() == MAX_CLIENTS {
            return Err(Verdict::Full);
        }
        let id = ClientId(self.next());
        self.clients.insert(id, Client { process, endpoints: HashMap::new() });
        Ok(id)
    }

    /// A client opens an endpoint: the links that are to be made.
    ///
    /// # Errors
    /// [`Refusal`], and nothing has changed.
    pub fn open(&mut self, id: ClientId, endpoint: u64, open: Open) -> Result<Vec<Pair>, Refusal> {
        let name = ChannelName::new(open.channel)?;
        let number = self.next();
        let Some(client) = self.clients.get(&id) else { return Ok(Vec::new()) };
        if client.endpoints.contains_key(&endpoint) {
            return Err(Refusal::Taken(endpoint));
        }
        if client.endpoints.len() == MAX_ENDPOINTS {
            return Err(Refusal::TooManyEndpoints);
        }
        let party = Party { client: id, endpoint, peer: Peer { endpoint: number, process: client.process } };
        let none = Channel::default();
        let channel = self.channels.get(&name).unwrap_or(&none);
        let pairs = match open.role {
            Role::Sender { slot_bytes, max_slots, mechanism, slots } => {
                let geometry = Geometry::new(slot_bytes, max_slots)?;
                let (mechanism, slots) = match (mechanism, slots) {
                    (_, Slots::Segments) if mechanism != Mechanism::Lease => (mechanism, slots),
                    // What comes from a receiver, or in pieces, is leased.
                    (_, Slots::Segments) => (Mechanism::Copy, slots),
                    (_, slots) => (Mechanism::Lease, slots),
                };
                if slots != Slots::Segments && geometry.max_slots() > MAX_LEASED {
                    return Err(GeometryError::Leased(geometry.max_slots()).into());
                }
                if slots == Slots::Receiver && channel.receivers.len() > 1 {
                    return Err(Refusal::SeveralReceivers { receivers: channel.receivers.len() });
                }
                let own = Sender { party, geometry, mechanism, slots };
                let pair = |receiver: &Receiver| {
                    self.pair(&own, receiver).map_err(|found| Refusal::ReceiverRequiresMore {
                        receiver: receiver.party.peer,
                        required: receiver.require,
                        found,
                    })
                };
                let pairs = channel.receivers.values().map(pair).collect::<Result<_, _>>()?;
                self.channels.entry(name.clone()).or_default().senders.insert(number, own);
                pairs
            }
            Role::Receiver { require } => {
                let alone = channel.senders.values().find(|sender| sender.slots == Slots::Receiver);
                if let Some(sender) = alone.filter(|_| !channel.receivers.is_empty()) {
                    return Err(Refusal::OneReceiver { sender: sender.party.peer });
                }
                let own = Receiver { party, require };
                let pair = |sender: &Sender| {
                    self.pair(sender, &own).map_err(|found| Refusal::SenderGivesLess {
                        sender: sender.party.peer,
                        required: require,
                        found,
                    })
                };
                let pairs = channel.senders.values().map(pair).collect::<Result<_, _>>()?;
                self.channels.entry(name.clone()).or_default().receivers.insert(number, own);
                pairs
            }
        };
        if let Some(client) = self.clients.get_mut(&id) {
            client.endpoints.insert(endpoint, (name, number));
        }
        Ok(pairs)
    }

    /// The link between two ends; or what it would give, if that is less than the receiver requires.
    fn pair(&self, sender: &Sender, receiver: &Receiver) -> Result<Pair, Protection> {
        let mechanism = self.mechanism(sender, receiver);
        if mechanism.protection() < receiver.require {
            return Err(mechanism.protection());
        }
        let Sender { party, geometry, slots, .. } = *sender;
        Ok(Pair { sender: party, receiver: receiver.party, geometry, mechanism, slots })
    }

    /// The rule of trust. Processes of one user can write each other's memory anyway (ptrace(2)), so
    /// between them volatile messages lose nothing; whoever receives from another user gets them sealed,
    /// unless that user is trusted.
    fn mechanism(&self, sender: &Sender, receiver: &Receiver) -> Mechanism {
        let (from, to) = (sender.party.peer.process.uid, receiver.party.peer.process.uid);
        let distrusted = from != to && !self.users.trust_in(from);
        match sender.mechanism {
            Mechanism::Shared | Mechanism::Lease if distrusted => Mechanism::Copy,
            // A slot of the sender's user nobody else can lease.
            Mechanism::Lease if from != to && sender.slots != Slots::Receiver => Mechanism::Copy,
            // What can be leased can be copied as well.
            Mechanism::Lease if receiver.require == Protection::Sealed => Mechanism::Copy,
            mechanism => mechanism,
        }
    }

    /// A client closes an endpoint. One that is not open is closed already.
    pub fn close(&mut self, id: ClientId, endpoint: u64) {
        let closed = self.clients.get_mut(&id).and_then(|client| client.endpoints.remove(&endpoint));
        if let Some((name, number)) = closed {
            self.remove(&name, number);
        }
    }

    /// A client is gone.
    pub fn leave(&mut self, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        for (name, number) in client.endpoints.into_values() {
            self.remove(&name, number);
        }
    }

    fn remove(&mut self, name: &ChannelName, number: u64) {
        if let Some(channel) = self.channels.get_mut(name) {
            channel.senders.remove(&number);
            channel.receivers.remove(&number);
            if channel.senders.is_empty() && channel.receivers.is_empty() {
                self.channels.remove(name);
            }
        }
    }

    /// Whether nothing is left of any client.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty() && self.channels.is_empty()
    }

    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const OWN: Credentials = Credentials { pid: 1, uid: 1000, gid: 1000 };

    fn sender(channel: &str) -> Open {
        let role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Shared, slots: Slots::Segments };
        Open { channel: channel.into(), role }
    }

    fn receiver(channel: &str) -> Open {
        Open { channel: channel.into(), role: Role::Receiver { require: Protection::Volatile } }
    }

    #[test]
    fn other_users_are_sent_away() {
        let mut state = State::new(Users::only(1000));
        assert_eq!(state.join(Credentials { uid: 1001, ..OWN }), Err(Verdict::NotPermitted));
        assert_eq!(state.join(Credentials { uid: 0, ..OWN }), Err(Verdict::NotPermitted));
        assert!(state.is_empty());
    }

    #[test]
    fn messages_of_another_user_are_sealed_unless_that_user_is_trusted() {
        let users = Users::only(1000).allow(1001).trust(1002);
        let mut state = State::new(users);
        let [own, other, trusted] = [1000, 1001, 1002].map(|uid| state.join(Credentials { uid, ..OWN }).unwrap());
        for (client, channel) in [(own, "own"), (other, "other"), (trusted, "trusted")] {
            state.open(client, 0, sender(channel)).unwrap();
        }
        let mut mechanism =
            |client, channel, endpoint| state.open(client, endpoint, receiver(channel)).unwrap()[0].mechanism;
        assert_eq!(mechanism(own, "own", 1), Mechanism::Shared);
        assert_eq!(mechanism(other, "own", 1), Mechanism::Copy);
        assert_eq!(mechanism(own, "other", 2), Mechanism::Copy);
        assert_eq!(mechanism(other, "other", 2), Mechanism::Shared);
        assert_eq!(mechanism(own, "trusted", 3), Mechanism::Shared);
    }

    #[test]
    fn a_lease_is_for_those_who_can_have_one_and_for_whom_it_is_enough() {
        use Protection::{Sealed, Volatile};
        let mut state = State::new(Users::only(1000).allow(1001).trust(1002));
        let [own, other, trusted] = [1000, 1001, 1002].map(|uid| state.join(Credentials { uid, ..OWN }).unwrap());
        let given = Slots::Broker { huge: false };
        let mut next = 0;
        let mut mechanism = |from, slots, to, require| {
            next += 2;
            let role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Lease, slots };
            let channel = next.to_string();
            state.open(from, next, Open { channel: channel.clone(), role }).unwrap();
            let role = Role::Receiver { require };
            state.open(to, next + 1, Open { channel, role }).unwrap()[0].mechanism
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
        let mut state = State::new(Users::only(1000));
        let client = state.join(OWN).unwrap();
        let demanding =
            |channel: &str| Open { channel: channel.into(), role: Role::Receiver { require: Protection::Sealed } };
        state.open(client, 1, sender("a")).unwrap();
        assert!(matches!(state.open(client, 2, demanding("a")), Err(Refusal::SenderGivesLess { .. })));
        state.open(client, 3, demanding("b")).unwrap();
        assert!(matches!(state.open(client, 4, sender("b")), Err(Refusal::ReceiverRequiresMore { .. })));
        let role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Copy, slots: Slots::Segments };
        let pairs = state.open(client, 4, Open { channel: "b".into(), role }).unwrap();
        assert!(matches!(pairs[..], [Pair { mechanism: Mechanism::Copy, .. }]));
        // What was refused has left nothing.
        assert_eq!(state.open(client, 2, receiver("c")), Ok(vec![]));
        assert_eq!(state.open(client, 5, sender("d")), Ok(vec![]));
    }

    #[test]
    fn the_client_that_is_too_many_is_sent_away() {
        let mut state = State::new(Users::only(1000));
        for _ in 0..MAX_CLIENTS {
            state.join(OWN).unwrap();
        }
        assert_eq!(state.join(OWN), Err(Verdict::Full));
    }

    #[test]
    fn the_endpoint_that_is_too_many_is_refused() {
        let mut state = State::new(Users::only(1000));
        let client = state.join(OWN).unwrap();
        for endpoint in 0..MAX_ENDPOINTS as u64 {
            state.open(client, endpoint, receiver("c")).unwrap();
        }
        assert_eq!(state.open(client, 1 << 40, receiver("c")), Err(Refusal::TooManyEndpoints));
        assert_eq!(state.open(client, 0, receiver("c")), Err(Refusal::Taken(0)));
    }

    #[test]
    fn what_cannot_be_is_refused_and_leaves_nothing() {
        let mut state = State::new(Users::only(1000));
        let client = state.join(OWN).unwrap();
        assert!(matches!(state.open(client, 1, receiver("")), Err(Refusal::Channel(_))));
        let role = Role::Sender { slot_bytes: 0, max_slots: 1, mechanism: Mechanism::Shared, slots: Slots::Segments };
        let open = Open { channel: "c".into(), role };
        assert!(matches!(state.open(client, 1, open), Err(Refusal::Geometry(_))));
        assert!(state.channels.is_empty());
        assert_eq!(state.open(client, 1, receiver("c")), Ok(vec![]), "the number is still free");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Join,
        Open { client: usize, endpoint: u64, channel: u8, sends: bool },
        Close { client: usize, endpoint: u64 },
        Leave { client: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            1 => Just(Step::Join),
            6 => (0..4usize, 0..6u64, 0..3u8, any::<bool>())
                .prop_map(|(client, endpoint, channel, sends)| Step::Open { client, endpoint, channel, sends }),
            2 => (0..4usize, 0..6u64).prop_map(|(client, endpoint)| Step::Close { client, endpoint }),
            1 => (0..4usize).prop_map(|client| Step::Leave { client }),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        /// Against a list of what is open: an open introduces exactly the endpoints of the other
        /// role on the same channel, each once, and when all have left nothing is known.
        #[test]
        fn everybody_who_belongs_together_is_introduced_once(steps in steps()) {
            let mut state = State::new(Users::only(1000));
            let mut clients: Vec<ClientId> = Vec::new();
            let mut open: Vec<(ClientId, u64, u8, bool)> = Vec::new();
            for step in steps {
                match step {
                    Step::Join => clients.push(state.join(OWN).unwrap()),
                    Step::Open { client, endpoint, channel, sends } => {
                        let Some(&client) = clients.get(client) else { continue };
                        let ask = if sends { sender(&channel.to_string()) } else { receiver(&channel.to_string()) };
                        let answer = state.open(client, endpoint, ask);
                        if open.iter().any(|o| (o.0, o.1) == (client, endpoint)) {
                            prop_assert_eq!(answer, Err(Refusal::Taken(endpoint)));
                            continue;
                        }
                        let pairs = answer.unwrap();
                        let met: HashSet<_> = pairs.iter().map(|pair| {
                            let (own, other) = if sends { (pair.sender, pair.receiver) } else { (pair.receiver, pair.sender) };
                            assert_eq!((own.client, own.endpoint), (client, endpoint));
                            (other.client, other.endpoint)
                        }).collect();
                        let due: HashSet<_> = open.iter().filter(|o| o.2 == channel && o.3 != sends).map(|o| (o.0, o.1)).collect();
                        prop_assert_eq!(met.len(), pairs.len());
                        prop_assert_eq!(met, due);
                        open.push((client, endpoint, channel, sends));
                    }
                    Step::Close { client, endpoint } => {
                        let Some(&client) = clients.get(client) else { continue };
                        state.close(client, endpoint);
                        open.retain(|o| (o.0, o.1) != (client, endpoint));
                    }
                    Step::Leave { client } => {
                        if client < clients.len() {
                            let client = clients.remove(client);
                            state.leave(client);
                            open.retain(|o| o.0 != client);
                        }
                    }
                }
            }
            for client in clients {
                state.leave(client);
            }
            prop_assert!(state.is_empty());
        }
    }
}
