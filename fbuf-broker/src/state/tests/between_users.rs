//! What users cannot do to each other on a channel that they share.

use fbuf_core::{
    limits::{ENDS_OF_ROOT, MAX_ENDS_OF_USER, MAX_LINKS, OTHERS_SLOT_BYTES, OTHERS_SLOTS},
    protection::Protection,
};
use fbuf_protocol::{Accepted, Limits};

use super::{super::*, *};
use crate::policy::Quota;

const OWN: u32 = 1000;
const OTHER: u32 = 1001;
const TRUSTED: u32 = 1002;

/// A broker that serves these users, and a client of each.
fn broker() -> (State, [ClientId; 3]) {
    broker_with(Policy::only(OWN).allow(OTHER).trust(TRUSTED))
}

fn broker_with(policy: Policy) -> (State, [ClientId; 3]) {
    let mut state = State::new(policy);
    let clients = [OWN, OTHER, TRUSTED].map(|uid| state.enter(uid).unwrap());
    (state, clients)
}

fn offer(mechanism: Mechanism, slots: Slots) -> Open {
    ask("c", Role::sender(64, 4, mechanism, slots))
}

fn from_receiver() -> Open {
    offer(Mechanism::Lease, Slots::Receiver)
}

/// What keeps an endpoint apart from others, and of which client each is.
fn apart(state: &State, client: ClientId, endpoint: u64) -> Vec<(u64, Mismatch)> {
    state.unpaired(client, endpoint, 0).0.into_iter().map(|(_, one)| (one.peer.endpoint, one.why)).collect()
}

#[test]
fn a_receiver_that_requires_more_keeps_no_sender_of_another_user_away() {
    let (mut state, [own, other, trusted]) = broker();
    let strict = state.open(other, 1, ask("c", wants(Protection::Sealed))).unwrap().endpoint;
    let pleased = state.open(own, 1, receiver("c")).unwrap().endpoint;
    let opening = state.open(trusted, 1, sender("c")).unwrap();
    assert!(matches!(opening.pairs[..], [Pair { receiver, .. }] if receiver.peer.endpoint == pleased));
    let why = Mismatch::Protection { required: Protection::Sealed, found: Protection::Volatile };
    assert_eq!(apart(&state, trusted, 1), [(strict, why)]);
    assert_eq!(apart(&state, other, 1), [(opening.endpoint, why)]);
    assert_eq!(apart(&state, own, 1), []);
    // The other way round.
    assert_eq!(state.links(other, 2, ask("c", wants(Protection::Sealed))), Ok(vec![]));
    // Within one user it is a mistake.
    let refused = state.open(trusted, 2, ask("c", wants(Protection::Sealed)));
    assert!(matches!(refused, Err(Refusal::SenderGivesLess { .. })), "{refused:?}");
}

#[test]
fn a_sender_that_takes_slots_from_its_receiver_keeps_no_receiver_of_another_user_away() {
    let (mut state, [own, other, trusted]) = broker();
    state.open(own, 1, receiver("c")).unwrap();
    // It does not trust the one that is there.
    assert_eq!(state.links(other, 1, from_receiver()), Ok(vec![]));
    assert!(matches!(apart(&state, other, 1)[..], [(_, Mismatch::UntrustedPool { user: OWN })]));
    assert_eq!(state.links(own, 2, receiver("c")), Ok(vec![]));
    // It is linked with the first receiver with a pool that it trusts, and with no other.
    let first = state.links(trusted, 1, receiver("c")).unwrap();
    assert!(matches!(first[..], [Pair { sender, receiver, .. }] if sender.client == other && receiver.peer.trusted));
    assert_eq!(state.links(trusted, 2, receiver("c")), Ok(vec![]));
    assert!(matches!(apart(&state, trusted, 2)[..], [(_, Mismatch::OneReceiver)]));
    // When that one closes, with the next.
    state.close(trusted, 1);
    let next = state.pair_all_again();
    assert!(matches!(next[..], [Pair { sender, receiver, .. }] if (sender.client, receiver.endpoint) == (other, 2)));
    // One of the sender's own user is not refused for it, either.
    assert_eq!(state.links(other, 2, receiver("c")), Ok(vec![]));
    // And when that client leaves, the sender takes this one, and is its user's mistake then.
    state.leave(trusted);
    let next = state.pair_all_again();
    assert!(matches!(next[..], [Pair { receiver, .. }] if (receiver.client, receiver.endpoint) == (other, 2)));
    assert!(matches!(state.links(other, 3, receiver("c")), Err(Refusal::OneReceiver { .. })));
    assert_eq!(state.links(own, 3, receiver("c")), Ok(vec![]));
}

#[test]
fn each_end_is_told_whether_the_policy_trusts_the_other() {
    let (mut state, [own, _, trusted]) = broker();
    state.open(own, 1, sender("c")).unwrap();
    state.open(trusted, 1, sender("c")).unwrap();
    let trust = |pair: &Pair| (pair.sender.peer.trusted, pair.receiver.peer.trusted);
    let links = state.links(own, 2, receiver("c")).unwrap();
    assert_eq!(links.iter().map(trust).collect::<Vec<_>>(), [(true, true), (true, false)]);
    let links = state.links(trusted, 2, receiver("c")).unwrap();
    assert_eq!(links.iter().map(trust).collect::<Vec<_>>(), [(false, true), (true, true)]);
}

#[test]
fn a_receiver_accepts_little_from_other_users_unless_it_says_more() {
    let (mut state, [own, other, _]) = broker();
    let role = |slot_bytes, max_slots| Role::sender(slot_bytes, max_slots, Mechanism::Copy, Slots::Segments);
    state.open(own, 1, receiver("c")).unwrap();
    for (endpoint, role) in [(1, role(OTHERS_SLOT_BYTES + 1, 1)), (2, role(1, OTHERS_SLOTS + 1))] {
        assert_eq!(state.links(other, endpoint, ask("c", role)), Ok(vec![]));
        assert!(matches!(
            apart(&state, other, endpoint)[..],
            [(_, Mismatch::SlotSize { .. } | Mismatch::Slots { .. })]
        ));
        assert_eq!(state.links(own, 1 + endpoint, ask("c", role)).unwrap().len(), 1);
    }
    assert_eq!(state.links(other, 3, ask("c", role(OTHERS_SLOT_BYTES, OTHERS_SLOTS))).unwrap().len(), 1);
    let all = Limits { others: Limits::DEFAULT.own, ..Limits::DEFAULT };
    let generous = ask("c", Role::Receiver { require: Protection::Volatile, accepts: all });
    assert_eq!(state.links(own, 4, generous).unwrap().len(), 5);
    let few = Accepted { slot_bytes: 64, max_slots: 4 };
    let modest = ask("d", Role::Receiver { require: Protection::Volatile, accepts: Limits { own: few, others: few } });
    state.open(own, 5, modest).unwrap();
    let refusal = state.open(own, 6, ask("d", role(64, 5))).unwrap_err();
    assert!(
        matches!(refusal, Refusal::Unpaired { .. }) && refusal.to_string().contains("accepts 4 at most"),
        "{refusal}"
    );
}

#[test]
fn an_endpoint_that_names_users_is_linked_with_those_alone() {
    let (mut state, [own, other, trusted]) = broker();
    let among = |open: Open, users: &[u32]| Open { users: Some(users.to_vec()), ..open };
    state.open(own, 1, among(receiver("c"), &[TRUSTED, OTHER, OTHER])).unwrap();
    assert_eq!(state.links(own, 2, sender("c")), Ok(vec![]), "the own user was not named");
    assert!(matches!(apart(&state, own, 2)[..], [(_, Mismatch::FromUsers { user: OWN })]));
    assert_eq!(state.links(other, 1, sender("c")).unwrap().len(), 1);
    assert_eq!(state.links(trusted, 1, among(sender("c"), &[OTHER])), Ok(vec![]));
    assert!(matches!(apart(&state, trusted, 1)[..], [(_, Mismatch::ToUsers { user: OWN })]));
    let many = among(receiver("c"), &(0..=MAX_PEER_USERS as u32).collect::<Vec<_>>());
    assert_eq!(state.links(own, 3, many), Err(Refusal::TooManyUsers { users: MAX_PEER_USERS + 1 }));
}

#[test]
fn on_a_confidential_channel_other_users_get_one_shots_only() {
    let policy = |is_confidential| {
        let policy = Policy::only(OWN).allow(OTHER).trust(TRUSTED);
        if is_confidential { policy.confidential("c").unwrap() } else { policy }
    };
    let (mut state, [own, other, trusted]) = broker_with(policy(true));
    state.open(other, 1, receiver("c")).unwrap();
    for client in [own, trusted] {
        assert_eq!(state.links(client, 1, sender("c")), Err(Refusal::Confidential { channel: "c".into() }));
        assert_eq!(state.links(client, 1, from_receiver()), Err(Refusal::Confidential { channel: "c".into() }));
        let links = state.links(client, 1, offer(Mechanism::OneShot, Slots::Segments)).unwrap();
        assert!(matches!(links[..], [Pair { mechanism: Mechanism::OneShot, .. }]));
    }
    assert_eq!(state.links(own, 2, sender("other")), Ok(vec![]));
    // A sender from before the policy changed, or from before a restart, goes on within its user.
    let (mut state, [own, other, _]) = broker_with(policy(false));
    state.open(own, 1, sender("c")).unwrap();
    state.set_policy(policy(true));
    state.open(own, 2, resumed(sender("c"), Secret::draw().unwrap(), &[])).unwrap();
    assert_eq!(state.links(other, 1, receiver("c")), Ok(vec![]));
    assert_eq!(
        apart(&state, other, 1).into_iter().map(|(_, why)| why).collect::<Vec<_>>(),
        [Mismatch::Confidential; 2]
    );
    assert_eq!(state.links(own, 3, receiver("c")).unwrap().len(), 2);
}

#[test]
fn a_user_has_a_share_of_a_channel_and_the_last_places_are_roots() {
    let mut policy = Policy::only(0);
    (1..=64).for_each(|user| policy = policy.clone().allow(user));
    let mut state = State::new(policy);
    let mut clients: Vec<_> = (0..=64).map(|user| state.enter(user).unwrap()).collect();
    let root = clients.remove(0);
    let mut fill = |client| {
        let fits = |endpoint: &u64| match state.open(client, *endpoint, receiver("c")) {
            Ok(_) => true,
            Err(Refusal::Share { .. }) => false,
            Err(refusal) => panic!("{refusal}"),
        };
        (0..).take_while(fits).count()
    };
    let filled: Vec<_> = clients.iter().map(|&client| fill(client)).collect();
    // The first have as many as one may have; others never find less than half of what is left.
    assert_eq!(filled[0], MAX_ENDS_OF_USER);
    assert_eq!(filled[..8], [128, 128, 128, 128, 128, 128, 120, 60]);
    assert!(filled[..12].iter().all(|&count| count > 0), "{filled:?}");
    assert_eq!(filled.iter().sum::<usize>(), MAX_LINKS - ENDS_OF_ROOT);
    for endpoint in 0..ENDS_OF_ROOT as u64 {
        state.open(root, endpoint, receiver("c")).unwrap();
    }
    assert_eq!(state.links(root, 100, receiver("c")), Err(Refusal::ChannelFull));
    // A sender is another kind.
    assert_eq!(state.links(clients[0], 1000, sender("c")).unwrap().len(), MAX_LINKS);
}

#[test]
fn links_are_paid_for_by_the_user_with_more_endpoints() {
    let quota = Quota::default().with(Resource::Links, 100);
    let (mut state, [own, other, trusted]) =
        broker_with(Policy::only(OWN).allow(OTHER).trust(TRUSTED).with_quota(quota));
    let paid = |state: &State| {
        let mut paid: Vec<_> =
            state.used().filter(|used| used.1 == Resource::Links).map(|used| (used.0, used.2)).collect();
        paid.sort_unstable();
        paid
    };
    for endpoint in 0..120 {
        state.open(other, endpoint, receiver("c")).unwrap();
    }
    // Those that the other user cannot pay for are not made, and no other pair is missing for that.
    let opening = state.open(own, 1, sender("c")).unwrap();
    assert_eq!(opening.pairs.len(), 100);
    assert_eq!(paid(&state), [(OTHER, 100)]);
    assert_eq!(apart(&state, own, 1).len(), 20);
    assert_eq!(apart(&state, other, 119), [(opening.endpoint, Mismatch::Quota { user: OTHER })]);
    assert_eq!(apart(&state, other, 0), []);
    let links = state.links(trusted, 1, receiver("c")).unwrap();
    assert_eq!(links.len(), 1);
    assert_eq!(paid(&state), [(OTHER, 100), (TRUSTED, 1)], "between equals, the newcomer pays");
    state.close(own, 1);
    assert_eq!(paid(&state), []);
}

#[test]
fn no_other_user_can_charge_more_links_than_the_square_of_the_own_endpoints() {
    let quota = Quota::default().with(Resource::Links, 1000);
    for own_first in [true, false] {
        let (mut state, [own, other, _]) =
            broker_with(Policy::only(OWN).allow(OTHER).with_quota(quota.clone()).trust(TRUSTED));
        let senders = |state: &mut State| (0..5).for_each(|n| drop(state.open(own, n, sender("c")).unwrap()));
        let receivers = |state: &mut State| (0..120).for_each(|n| drop(state.open(other, n, receiver("c")).unwrap()));
        if own_first {
            senders(&mut state);
            receivers(&mut state);
        } else {
            receivers(&mut state);
            senders(&mut state);
        }
        let used = state.used().find(|&(user, resource, _)| (user, resource) == (OWN, Resource::Links));
        assert!(used.is_none_or(|(_, _, links)| links <= 25), "{used:?}");
        assert_eq!(apart(&state, own, 0), []);
    }
}
