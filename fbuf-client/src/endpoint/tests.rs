//! What an endpoint knows of the links that it has, or will have.

use super::*;
use fbuf_core::peer::Credentials;

/// A broker that died between two introductions leaves half a link, and the next one makes a whole one.
#[test]
fn a_link_that_ends_leaves_another_with_the_same_peer_known() {
    let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
    let process = Credentials::new(1, 1, 1);
    let [half, whole] = [(); 2].map(|()| Peer::new(7, process).with_link(LinkId::draw().unwrap()));
    pending_links.expect(half);
    pending_links.post(whole, ());
    pending_links.forget(half);
    assert_eq!(pending_links.links(), [whole.link]);
    pending_links.forget(whole);
    assert!(!pending_links.has_peers());
}

impl Brought for () {
    fn is_void(&self) -> Option<Peer> {
        None
    }
}

#[test]
fn senders_of_another_user_have_no_larger_pool_together_than_one_may() {
    let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
    // Users that no other test knows.
    let peer = |link, uid, same_user| {
        let process = Credentials::new(1, uid, uid);
        Peer::new(link, process).with_same_user(same_user).with_link(LinkId::from_bits(link))
    };
    let admit = |peer: &Peer, bytes| pending_links.admit(peer, 1, bytes, 100);
    let [first, second] = [1, 2].map(|link| peer(link, 4_100_000_000, false));
    assert!(admit(&first, 60) && !admit(&second, 60) && !admit(&second, u64::MAX) && admit(&second, 40));
    pending_links.forget(second);
    assert!(admit(&second, 0) && admit(&peer(3, 4_100_000_001, false), 60));
    pending_links.forget(first);
    assert!(admit(&peer(4, 4_100_000_000, false), 100));
    // The own user, and root, are not bounded.
    assert!((5..9).all(|link| admit(&peer(link, 4_100_000_000, true), 60) && admit(&peer(2 * link, 0, false), 60)));
}

#[test]
fn links_that_were_ended_and_may_be_read_on_count_among_those_of_their_user() {
    let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
    let peer = |link| Peer::new(1, Credentials::new(1, 4_100_000_002, 1)).with_link(LinkId::from_bits(link));
    let admit = |link| pending_links.admit(&peer(link), 0, 0, 0);
    let admitted = (1..).take_while(|&link| admit(link)).count() as u64;
    assert!((1..=MOST_LINKS as u64).contains(&admitted));
    (1..=admitted).for_each(|link| pending_links.keep_share(peer(link)));
    assert!(!pending_links.has_peers() && !admit(admitted + 1));
    pending_links.release_shares(vec![LinkId::from_bits(admitted)]);
    assert!(admit(admitted + 1) && !admit(admitted + 2));
}

#[test]
fn a_report_counts_links_that_are_open_and_whose_peer_has_not_hung_up() {
    let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
    let process = Credentials::new(1, 1, 1);
    let [one, other] = [1, 2].map(|link| Peer::new(link, process).with_link(LinkId::from_bits(link)));
    pending_links.post(one, ());
    pending_links.say(|| Report { messages: 3, links: 7, ..Report::default() });
    assert_eq!((pending_links.report().links, pending_links.report().messages), (0, 3));
    pending_links.link(one, None);
    pending_links.link(other, None);
    assert_eq!((pending_links.report().links, pending_links.has_hung_up()), (2, false));
    pending_links.raise(LinkId::from_bits(3));
    assert_eq!((pending_links.report().links, pending_links.has_hung_up()), (2, false), "no link of this endpoint");
    pending_links.raise(one.link);
    assert_eq!((pending_links.report().links, pending_links.has_hung_up()), (1, true));
    pending_links.part(other);
    assert_eq!(pending_links.report().links, 0);
}

#[test]
fn a_link_that_fails_with_another_user_does_not_hide_one_with_the_own_user() {
    let pending_links: PendingLinks<()> = PendingLinks::new().unwrap();
    let of = |endpoint, uid| Peer::new(endpoint, Credentials::new(1, uid, uid));
    let last = |peer: Peer| {
        pending_links.fail(peer, None);
        pending_links.failure().unwrap().peer.endpoint
    };
    assert_eq!([of(1, 1001), of(2, 1002), of(3, 1000).with_same_user(true)].map(last), [1, 2, 3]);
    assert_eq!([of(4, 1001), of(5, 0), of(6, 1001)].map(last), [3, 5, 5]);
}
