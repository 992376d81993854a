//! Pairs that fit and lack something: they are apart, nobody is refused for it, and they are made when it is there.

use super::{
    super::{waiting::*, *},
    *,
};
use crate::policy::Quota;
use fbuf_core::limits::MAX_ENDS_OF_USER;
use std::time::Duration;

const OWN: u32 = 1000;
const OTHER: u32 = 1001;
const THIRD: u32 = 1002;

fn policy(links: u64) -> Policy {
    Policy::only(OWN).allow(OTHER).allow(THIRD).with_quota(Quota::default().with(Resource::Links, links))
}

/// A broker that serves these users, of whom each may have so many links, and a client of each.
fn broker(links: u64) -> (State, [ClientId; 3]) {
    let mut state = State::new(policy(links));
    let clients = [OWN, OTHER, THIRD].map(|uid| state.enter(uid).unwrap());
    (state, clients)
}

/// Why an endpoint is apart from others.
fn apart(state: &State, client: ClientId, endpoint: u64) -> Vec<Mismatch> {
    state.unpaired(client, endpoint, 0).0.into_iter().map(|(_, one)| one.why).collect()
}

fn links(state: &State) -> u64 {
    state.used().filter(|&(_, resource, _)| resource == Resource::Links).map(|(_, _, links)| links).sum()
}

/// Opens an endpoint, whose pairs are introduced unless something lacks: how many were.
fn open(
    state: &mut State,
    client: ClientId,
    endpoint: u64,
    open: Open,
    mut lacks: impl FnMut(&Pair) -> Result<(), Lack>,
) -> usize {
    let opening = state.open(client, endpoint, open).unwrap();
    let mut made = 0;
    state.introduce(&opening, Instant::now(), |pair, _| {
        lacks(pair)?;
        made += 1;
        Ok(())
    });
    made
}

#[test]
fn a_pair_that_a_quota_forbids_is_made_when_a_link_is_closed() {
    for closes in [true, false] {
        let (mut state, [own, other, third]) = broker(2);
        (0..3).for_each(|endpoint| drop(state.links(other, endpoint, receiver("c")).unwrap()));
        assert_eq!(state.links(own, 1, sender("c")).unwrap().len(), 2);
        assert_eq!(apart(&state, own, 1), [Mismatch::Quota { user: OTHER }]);
        assert_eq!(apart(&state, other, 2), [Mismatch::Quota { user: OTHER }]);
        assert_eq!(state.pair_all_again(), []);
        // It is not for want of the others' quota.
        state.links(third, 1, receiver("c")).unwrap();
        state.close(third, 1);
        assert_eq!(state.pair_all_again(), []);
        match closes {
            true => state.close(other, 0),
            false => state.set_policy(policy(3)),
        }
        let pairs = state.pair_all_again();
        assert!(matches!(pairs[..], [Pair { sender, receiver, .. }] if (sender.client, receiver.endpoint) == (own, 2)));
        assert_eq!((apart(&state, own, 1), apart(&state, other, 2)), (vec![], vec![]));
        [own, other, third].into_iter().for_each(|client| state.leave(client));
        assert!(state.is_empty(), "{state:?}");
    }
}

#[test]
fn where_the_broker_has_no_socket_a_pair_waits_also_within_a_user() {
    for receivers in [OWN, OTHER] {
        let (mut state, [own, other, _]) = broker(10);
        let client = if receivers == OWN { own } else { other };
        state.open(client, 0, receiver("c")).unwrap();
        assert_eq!(open(&mut state, own, 1, sender("c"), |_| Err(Lack::Socket)), 0);
        assert_eq!(apart(&state, own, 1), [Mismatch::Exhausted]);
        assert_eq!(apart(&state, client, 0), [Mismatch::Exhausted]);
        assert_eq!(links(&state), 0, "a link that is not there is paid for");
        // It still has none.
        let turn = state.pair_again(OWN, Instant::now(), |_, _| Err(Lack::Socket));
        assert_eq!((turn.pairs, apart(&state, own, 1)), (0, vec![Mismatch::Exhausted]));
        assert_eq!((state.pair_all_again().len(), links(&state)), (1, 1));
        assert_eq!((state.pair_all_again().len(), state.waiting().count()), (0, 0));
    }
}

#[test]
fn a_client_that_reads_nothing_keeps_nobody_but_itself_from_links() {
    let (mut state, [own, other, third]) = broker(10);
    (0..3).for_each(|endpoint| drop(state.open(other, endpoint, receiver("c")).unwrap()));
    state.open(third, 0, receiver("c")).unwrap();
    let full = |pair: &Pair| if pair.receiver.client == other { Err(Lack::Room(other)) } else { Ok(()) };
    assert_eq!(open(&mut state, own, 1, sender("c"), full), 1);
    assert_eq!(apart(&state, own, 1), [Mismatch::Unread { user: OTHER }; 3]);
    assert_eq!(apart(&state, other, 2), [Mismatch::Unread { user: OTHER }]);
    // Those wait that could read, and no other user's turns are longer for it.
    assert_eq!(state.waiting().collect::<Vec<_>>(), [OTHER]);
    assert_eq!(state.pair_again(OWN, Instant::now(), |_, _| Ok(())), Turn::default());
    assert_eq!(state.pair_all_again().len(), 3);
}

#[test]
fn a_share_of_the_descriptors_that_grows_makes_the_pairs_that_waited_for_it() {
    // Each of three users may have a quarter of what the others have left.
    let mut state = State::with_capacity(policy(100), Capacity::new(100, 32, 0));
    let greedy: Vec<_> = (0..10).map(|_| state.enter(THIRD).unwrap()).collect();
    let [other, own] = [OTHER, OWN].map(|uid| state.enter(uid).unwrap());
    state.open(other, 0, receiver("c")).unwrap();
    // What is introduced is not read.
    let mut unread = Vec::new();
    for endpoint in 0..10 {
        let opening = state.open(own, endpoint, sender("c")).unwrap();
        state.introduce(&opening, Instant::now(), |_, holdings| {
            unread.push(holdings);
            Ok(())
        });
    }
    let made = unread.len();
    assert!((1..10).contains(&made) && state.pair_all_again().is_empty(), "{made} of 10");
    let short = apart(&state, other, 0);
    assert!(short.len() == 10 - made && matches!(short[0], Mismatch::Descriptors { user: OWN | OTHER }), "{short:?}");
    greedy.into_iter().for_each(|client| state.leave(client));
    assert_eq!((state.pair_all_again().len(), apart(&state, other, 0)), (10 - made, vec![]));
}

#[test]
fn many_pairs_are_made_a_few_at_a_time_and_each_is_as_much_work_as_a_request() {
    let (mut state, [own, other, _]) = broker(100_000);
    let now = Instant::now();
    (0..MAX_ENDS_OF_USER as u64).for_each(|endpoint| drop(state.open(other, endpoint, receiver("c")).unwrap()));
    let opening = state.open(own, 0, sender("c")).unwrap();
    state.introduce(&opening, now, |_, _| Ok(()));
    assert_eq!(apart(&state, own, 0), [Mismatch::Due; MAX_ENDS_OF_USER - MOST_PAIRS]);
    let mut turns = Vec::new();
    while state.waiting().next().is_some() {
        turns.push(state.pair_again(OWN, now, |_, _| Ok(())).pairs);
    }
    assert_eq!(turns, [MOST_PAIRS, MOST_PAIRS, MOST_PAIRS, 0]);
    // By the user that came last, whichever of the two pays for the links.
    let requests = |client| {
        let payer = state.payer(client).unwrap();
        let time = state.note_request(&payer, now) + Duration::from_secs(1) - now;
        (time.as_secs_f64() * f64::from(Quota::default().requests_per_second)).round()
    };
    assert_eq!((requests(other), links(&state)), (1.0, MAX_ENDS_OF_USER as u64));
    assert_eq!(requests(own), 1.0 + MAX_ENDS_OF_USER as f64);
}

/// Ends that lack something for ever do not keep those of the same user behind them waiting.
#[test]
fn ends_that_wait_have_their_turns_one_after_the_other() {
    const CHANNELS: u64 = 20;
    let (mut state, [own, other, third]) = broker(100_000);
    for channel in 0..CHANNELS {
        let name = channel.to_string();
        for endpoint in 100 * channel..100 * (channel + 1) {
            state.open(other, endpoint, receiver(&name)).unwrap();
        }
        // It is charged to the user with more ends, which waits.
        assert_eq!(open(&mut state, own, channel, sender(&name), |_| Err(Lack::Socket)), 0);
    }
    // Those that were to be made later wait as well.
    while state.waiting().any(|user| user == OWN) {
        state.pair_again(OWN, Instant::now(), |_, _| Err(Lack::Socket));
    }
    state.open(other, 5000, sender("last")).unwrap();
    open(&mut state, third, 0, receiver("last"), |_| Err(Lack::Room(other)));
    assert_eq!(apart(&state, other, 5000), [Mismatch::Unread { user: OTHER }]);
    let is_last = |pair: &Pair| if pair.receiver.client == third { Ok(()) } else { Err(Lack::Socket) };
    let mut again = || state.pair_again(OTHER, Instant::now(), |pair, _| is_last(pair));
    let (first, second) = (again(), again());
    assert_eq!((first.pairs, first.looks, second.pairs), (0, MOST_LOOKS, 1));
    assert_eq!(apart(&state, other, 5000), []);
}
