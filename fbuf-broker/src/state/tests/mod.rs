//! What the state machine decides, without a socket.

mod between_users;
mod histories;
mod waits;

use fbuf_core::{limits::MAX_LINKS, peer::LinkId, protection::Protection, socket::NO_ID};
use fbuf_protocol::Limits;

use super::*;
use crate::{policy::Quota, state::channel::MOST_PARTED};

const OWN: Credentials = Credentials::new(1, 1000, 1000);

pub(super) fn sender(channel: &str) -> Open {
    let role = Role::sender(64, 4, Mechanism::Shared, Slots::Segments);
    ask(channel, role)
}

pub(super) fn receiver(channel: &str) -> Open {
    ask(channel, wants(Protection::Volatile))
}

/// A receiver that requires so much.
pub(super) fn wants(require: Protection) -> Role {
    Role::Receiver { require, accepts: Limits::DEFAULT }
}

pub(super) fn ask(channel: &str, role: Role) -> Open {
    Open { channel: channel.into(), role, label: None, users: None, earlier: None }
}

impl State {
    /// A process of this user connects and greets.
    pub(super) fn enter(&mut self, uid: u32) -> Result<ClientId, Verdict> {
        let admission = self.admit(Credentials::new(OWN.pid, uid, OWN.gid), User::new(uid, vec![uid]));
        let admission = admission.map_err(|dismissal| dismissal.verdict())?;
        self.join(admission)
    }

    /// The links that opening makes.
    pub(super) fn links(&mut self, client: ClientId, endpoint: u64, open: Open) -> Result<Vec<Pair>, Refusal> {
        self.open(client, endpoint, open).map(|opening| opening.pairs)
    }

    /// All pairs that lack nothing any more.
    pub(super) fn pair_all_again(&mut self) -> Vec<Pair> {
        let mut made = Vec::new();
        loop {
            let before = made.len();
            for user in self.waiting().collect::<Vec<_>>() {
                let turn = self.pair_again(user, Instant::now(), |pair, _| {
                    made.push(*pair);
                    Ok(())
                });
                assert!(turn.looks < waiting::MOST_LOOKS + MAX_LINKS && turn.pairs <= waiting::MOST_PAIRS);
            }
            if made.len() == before {
                return made;
            }
        }
    }
}

#[test]
fn other_users_are_sent_away() {
    let mut state = State::new(Policy::only(1000));
    assert_eq!(state.enter(1001), Err(Verdict::NotPermitted));
    assert_eq!(state.enter(0), Err(Verdict::NotPermitted));
    assert!(state.is_empty());
}

#[test]
fn messages_of_another_user_are_sealed_unless_that_user_is_trusted() {
    let mut state = State::new(Policy::only(1000).allow(1001).trust(1002));
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
    let mut state = State::new(Policy::only(1000).allow(1001).allow(NO_ID));
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
fn each_end_is_told_whether_the_policy_trusts_the_other() {
    let mut state = State::new(Policy::only(1000).allow(1001).trust(1002));
    for (from, to, trusted) in [
        (1000, 1000, [true, true]),
        (1000, 1001, [false, false]),
        (1002, 1001, [true, false]),
        (1001, 1002, [false, true]),
    ] {
        let [from, to] = [from, to].map(|uid| state.enter(uid).unwrap());
        state.open(from, 0, sender("c")).unwrap();
        let pair = state.links(to, 0, receiver("c")).unwrap()[0];
        assert_eq!([pair.sender, pair.receiver].map(|party| party.peer.trusted), trusted);
        state.leave(from);
        state.leave(to);
    }
}

#[test]
fn a_lease_is_for_those_who_can_have_one_and_for_whom_it_is_enough() {
    use Protection::{Sealed, Volatile};
    let mut state = State::new(Policy::only(1000).trust(1000).allow(1001).trust(1002));
    let [own, other, trusted] = [1000, 1001, 1002].map(|uid| state.enter(uid).unwrap());
    let given = Slots::Broker { huge: false };
    let mut next = 0;
    let mut mechanism = |from, slots, to, require| {
        next += 2;
        let role = Role::sender(64, 4, Mechanism::Lease, slots);
        let channel = next.to_string();
        state.links(from, next, ask(&channel, role)).unwrap();
        let role = wants(require);
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
    let mut state = State::new(Policy::only(1000));
    let client = state.enter(1000).unwrap();
    let demanding = |channel: &str| ask(channel, wants(Protection::Sealed));
    state.open(client, 1, sender("a")).unwrap();
    assert!(matches!(state.open(client, 2, demanding("a")), Err(Refusal::SenderGivesLess { .. })));
    state.open(client, 3, demanding("b")).unwrap();
    assert!(matches!(state.open(client, 4, sender("b")), Err(Refusal::ReceiverRequiresMore { .. })));
    let role = Role::sender(64, 4, Mechanism::Copy, Slots::Segments);
    let pairs = state.links(client, 4, ask("b", role)).unwrap();
    assert!(matches!(pairs[..], [Pair { mechanism: Mechanism::Copy, .. }]));
    // What was refused has left nothing.
    assert_eq!(state.links(client, 2, receiver("c")), Ok(vec![]));
    assert_eq!(state.links(client, 5, sender("d")), Ok(vec![]));
}

#[test]
fn the_client_that_is_too_many_is_sent_away() {
    let mut state = State::new(Policy::only(1000));
    let quota = Quota::default().with(Resource::Connections, MAX_CLIENTS as u64 + 1);
    state.set_policy(Policy::only(1000).with_quota(quota));
    for _ in 0..MAX_CLIENTS {
        state.enter(1000).unwrap();
    }
    assert_eq!(state.enter(1000), Err(Verdict::Full));
}

#[test]
fn the_endpoint_that_is_too_many_is_refused() {
    let mut state = State::new(Policy::only(1000));
    let client = state.enter(1000).unwrap();
    for endpoint in 0..MAX_ENDPOINTS as u64 {
        state.open(client, endpoint, receiver(&(endpoint % 16).to_string())).unwrap();
    }
    assert_eq!(state.open(client, 1 << 40, receiver("c")), Err(Refusal::TooManyEndpoints));
    assert_eq!(state.open(client, 0, receiver("c")), Err(Refusal::EndpointInUse { endpoint: 0 }));
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let mut state = State::new(Policy::only(1000));
    let client = state.enter(1000).unwrap();
    assert!(matches!(state.open(client, 1, receiver("")), Err(Refusal::Channel(_))));
    let role = Role::sender(0, 1, Mechanism::Shared, Slots::Segments);
    assert!(matches!(state.open(client, 1, ask("c", role)), Err(Refusal::Geometry { .. })));
    assert!(state.channels.is_empty());
    assert_eq!(state.links(client, 1, receiver("c")), Ok(vec![]), "the number is still free");
}

#[test]
fn each_quota_is_enforced_and_given_back() {
    let quota = Quota::default()
        .with(Resource::Bytes, 1000)
        .with(Resource::Slots, 10)
        .with(Resource::Channels, 2)
        .with(Resource::Links, 3)
        .with(Resource::Connections, 2)
        .with(Resource::Descriptors, 5);
    let mut state = State::new(Policy::only(1000).with_quota(quota));
    let (client, other) = (state.enter(1000).unwrap(), state.enter(1000).unwrap());
    assert_eq!(state.enter(1000), Err(Verdict::QuotaExceeded));
    let role = |slot_bytes, max_slots, slots| Role::sender(slot_bytes, max_slots, Mechanism::Shared, slots);
    let spent = |answer: Result<Vec<Pair>, Refusal>| match answer {
        Err(Refusal::QuotaExceeded(spent)) => spent.resource,
        other => panic!("{other:?}"),
    };
    let (here, given) = (Slots::Segments, Slots::Broker { huge: false });
    assert_eq!(spent(state.links(client, 1, ask("a", role(64, 11, here)))), Resource::Slots);
    assert_eq!(spent(state.links(client, 1, ask("a", role(640, 2, here)))), Resource::Bytes);
    assert_eq!(spent(state.links(client, 1, ask("a", role(64, 6, given)))), Resource::Descriptors);
    for endpoint in 1..=4 {
        state.links(client, endpoint, receiver("a")).unwrap();
    }
    // A link too many is not made, and may be later: it is no reason to refuse the sender.
    assert_eq!(state.links(client, 5, sender("a")).unwrap().len(), 3);
    let apart = state.unpaired(client, 5, 0).0;
    assert!(matches!(apart[..], [(_, Unpaired { why: Mismatch::Quota { user: 1000 }, .. })]), "{apart:?}");
    state.close(client, 4);
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
    let mut state = State::new(policy);
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
    let mut state = State::new(Policy::only(1000).allow(1001));
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
    let idle = state.enter(1001).unwrap();
    let clients = |user, behind| {
        state
            .clients(user, behind)
            .map(|client| (client.number, client.process.uid, client.endpoints))
            .collect::<Vec<_>>()
    };
    let all = [(own.0, 1000, 5), (other.0, 1001, 5), (idle.0, 1001, 0)];
    assert_eq!(clients(None, 0), all);
    assert_eq!(clients(None, own.0), all[1..]);
    assert_eq!((clients(Some(1000), 0), clients(Some(1001), other.0)), (all[..1].to_vec(), all[2..].to_vec()));
    state.leave(other);
    assert!(state.status(Some(1001), 0, 10).is_empty());
    assert_eq!(state.clients(None, 0).count(), 2);
}

#[test]
fn an_endpoint_has_no_more_links_than_its_messages_can_name() {
    let mut state = State::new(Policy::only(1000));
    let client = state.enter(1000).unwrap();
    for endpoint in 0..MAX_LINKS as u64 {
        state.links(client, endpoint, receiver("c")).unwrap();
    }
    assert_eq!(state.links(client, 5000, receiver("c")), Err(Refusal::ChannelFull));
    assert_eq!(state.links(client, 5000, sender("c")).unwrap().len(), MAX_LINKS);
}

/// What a client tells the next broker.
pub(super) fn resumed(open: Open, secret: Secret, links: &[LinkId]) -> Open {
    Open { earlier: Some(PreviousRegistration { secret, links: links.to_vec() }), ..open }
}

#[test]
fn after_a_restart_only_those_are_introduced_that_have_no_link() {
    let mut state = State::new(Policy::only(1000));
    let client = state.enter(1000).unwrap();
    let secrets = [(); 5].map(|()| Secret::draw().unwrap());
    let [link, lost, never] = [(); 3].map(|()| LinkId::draw().unwrap());
    let sender_again = resumed(sender("c"), secrets[0], &[link, lost]);
    assert_eq!(state.links(client, 1, sender_again), Ok(vec![]));
    let linked = resumed(receiver("c"), secrets[1], &[link]);
    assert_eq!(state.links(client, 2, linked.clone()), Ok(vec![]), "they are linked already");
    assert!(state.used().any(|used| used == (1000, Resource::Links, 1)), "a link of before is not paid for");
    // One of whom only the sender thinks so, and one who only says so.
    for (endpoint, secret, links) in [(3, secrets[2], &[][..]), (4, secrets[3], &[never])] {
        let opening = state.open(client, endpoint, resumed(receiver("c"), secret, links)).unwrap();
        assert_eq!((opening.endpoint, opening.pairs.len()), (secret.number(), 1));
        assert_eq!(opening.pairs[0].sender.peer.endpoint, secrets[0].number());
        assert_eq!(opening.pairs[0].receiver.peer.endpoint, secret.number());
    }
    // What was named is forgotten with the end that named it.
    state.close(client, 2);
    state.close(client, 1);
    assert_eq!(state.links(client, 2, linked), Ok(vec![]));
    assert_eq!(state.links(client, 1, sender("c")).unwrap().len(), 3);
    assert_eq!(state.links(client, 5, receiver("c")).unwrap().len(), 1);
    // What an earlier broker has made can be copied, and no more.
    let slots = Slots::Sender;
    let role = Role::sender(64, 4, Mechanism::Lease, slots);
    state.links(client, 6, resumed(ask("d", role), secrets[4], &[])).unwrap();
    assert_eq!(state.links(client, 7, receiver("d")).unwrap()[0].mechanism, Mechanism::Copy);
}

/// A connection may be lost, and the broker not.
#[test]
fn a_client_that_comes_again_is_introduced_to_those_with_which_it_has_no_link() {
    for is_sender in [true, false] {
        for has_link in [true, false] {
            let mut state = State::new(Policy::only(1000));
            let [stays, comes_again] = [(); 2].map(|()| state.enter(1000).unwrap());
            let (own, others) = if is_sender { (sender("c"), receiver("c")) } else { (receiver("c"), sender("c")) };
            state.links(stays, 1, others).unwrap();
            let Opening { secret, pairs, .. } = state.open(comes_again, 1, own.clone()).unwrap();
            let link = LinkId::draw().unwrap();
            state.name(&pairs[0], link);
            // Again and again.
            for _ in 0..3 {
                state.leave(state.clients(None, 0).last().map(|client| ClientId(client.number)).unwrap());
                let client = state.enter(1000).unwrap();
                let links = if has_link { &[link][..] } else { &[] };
                let pairs = state.links(client, 1, resumed(own.clone(), secret, links)).unwrap();
                assert_eq!(pairs.len(), usize::from(!has_link));
            }
        }
    }
}

#[test]
fn few_links_with_those_that_have_gone_are_remembered() {
    let mut state = State::new(Policy::only(1000));
    let stays = state.enter(1000).unwrap();
    state.links(stays, 1, receiver("c")).unwrap();
    let names = |state: &State| state.channels.values().map(Channel::names).sum::<usize>();
    let mut come_and_go = |goes: fn(&mut State, ClientId)| {
        let client = state.enter(1000).unwrap();
        let pairs = state.links(client, 1, sender("c")).unwrap();
        state.name(&pairs[0], LinkId::draw().unwrap());
        let there = names(&state);
        goes(&mut state, client);
        (there, names(&state))
    };
    let close: fn(&mut State, ClientId) = |state, client| {
        state.close(client, 1);
        state.leave(client);
    };
    assert_eq!(come_and_go(close), (1, 0), "what was closed does not come again");
    let left: Vec<_> = (0..2 * MOST_PARTED).map(|_| come_and_go(State::leave).1).collect();
    assert_eq!(left, (1..=MOST_PARTED).chain([MOST_PARTED; MOST_PARTED]).collect::<Vec<_>>());
    state.leave(stays);
    assert!(state.is_empty());
}

#[test]
fn ends_that_come_and_go_have_nothing_of_another_user_forgotten() {
    let mut state = State::new(Policy::only(1000).allow(1001).allow(1002));
    let stays = state.enter(1000).unwrap();
    state.links(stays, 1, receiver("c")).unwrap();
    let has_lost = state.enter(1001).unwrap();
    let Opening { secret, pairs, .. } = state.open(has_lost, 1, sender("c")).unwrap();
    let link = LinkId::draw().unwrap();
    state.name(&pairs[0], link);
    state.leave(has_lost);
    let attacker = state.enter(1002).unwrap();
    for endpoint in 0..2 * MOST_PARTED as u64 {
        let pairs = state.links(attacker, endpoint, sender("c")).unwrap();
        state.name(&pairs[0], LinkId::draw().unwrap());
    }
    state.leave(attacker);
    let again = state.enter(1001).unwrap();
    assert_eq!(state.links(again, 1, resumed(sender("c"), secret, &[link])), Ok(vec![]), "each message comes twice");
}

/// Each link has two ends that may name it.
#[test]
fn a_user_names_no_more_links_than_it_may_have() {
    let quota = Quota::default().with(Resource::Links, 3 * MAX_LINKS as u64);
    let mut state = State::new(Policy::only(1000).allow(1001).with_quota(quota));
    let [own, other] = [1000, 1001].map(|user| state.enter(user).unwrap());
    let names = |count: usize| {
        let links: Vec<_> = (0..count).map(|_| LinkId::draw().unwrap()).collect();
        resumed(receiver("c"), Secret::draw().unwrap(), &links)
    };
    for endpoint in 1..=6 {
        state.links(own, endpoint, names(MAX_LINKS)).unwrap();
    }
    let refused = state.links(own, 7, names(1)).unwrap_err();
    assert!(matches!(refused, Refusal::QuotaExceeded(QuotaExceeded { asked: 1, used: 6144, .. })), "{refused}");
    state.links(own, 7, names(0)).unwrap();
    state.links(other, 1, names(MAX_LINKS)).unwrap();
    state.close(own, 1);
    state.links(own, 8, names(MAX_LINKS)).unwrap();
    state.leave(own);
    state.leave(other);
    assert!(state.is_empty());
}

/// Of all receivers that it names, a sender that takes its slots from one has a link with that one.
#[test]
fn nothing_is_remembered_of_links_that_were_named_and_are_not_there() {
    let mut state = State::new(Policy::only(1000).allow(1001));
    let others = state.enter(1001).unwrap();
    let links = [(); 8].map(|()| LinkId::draw().unwrap());
    for (endpoint, link) in (1..).zip(links) {
        state.links(others, endpoint, resumed(receiver("c"), Secret::draw().unwrap(), &[link])).unwrap();
    }
    let names = |state: &State| state.channels.values().map(Channel::names).sum::<usize>();
    let before = names(&state);
    let own = state.enter(1000).unwrap();
    for _ in 0..3 {
        let slots = Slots::Receiver;
        let role = Role::sender(64, 4, Mechanism::Lease, slots);
        state.links(own, 1, resumed(ask("c", role), Secret::draw().unwrap(), &links)).unwrap();
        assert!(names(&state) > before - links.len());
        state.close(own, 1);
        assert_eq!(names(&state), before);
    }
}

#[test]
fn a_number_is_that_of_the_client_that_has_its_secret_and_of_one_at_a_time() {
    let mut state = State::new(Policy::only(1000).allow(1001));
    let [own, other] = [1000, 1001].map(|uid| state.enter(uid).unwrap());
    let Opening { endpoint, secret, .. } = state.open(own, 1, sender("c")).unwrap();
    assert_eq!(secret.number(), endpoint);
    // Whatever another user makes up, the number is another.
    let made_up = state.open(other, 1, resumed(sender("c"), Secret::draw().unwrap(), &[])).unwrap();
    assert_ne!(made_up.endpoint, endpoint);
    // A client that comes again before its earlier connection has ended waits for that.
    let again = state.enter(1000).unwrap();
    let reopen = || resumed(sender("c"), secret, &[]);
    assert_eq!(state.open(again, 1, reopen()), Err(Refusal::Elsewhere));
    state.leave(own);
    assert_eq!(state.open(again, 1, reopen()).unwrap().endpoint, endpoint);
    let peers = state.links(other, 2, receiver("c")).unwrap();
    let senders: Vec<_> = peers.iter().map(|pair| pair.sender.peer).collect();
    assert_eq!(senders.iter().filter(|peer| peer.endpoint == endpoint).count(), 1);
    assert!(senders.iter().all(|peer| (peer.endpoint == endpoint) == (peer.process.uid == 1000)));
}
