//! Which endpoint is which, and which two are linked: what clients tell the next broker is proved, and what they make
//! up is of no use.

#[path = "support/hostile.rs"]
mod client;
mod support;

use std::{collections::BTreeSet, time::Duration};

use client::Hostile;
use fbuf_broker::{Embedded, Policy};
use fbuf_client::{Address, Client, GetError, Mechanism, Receiver, Sender};
use fbuf_core::peer::LinkId;
use fbuf_protocol::{PreviousRegistration, Resource, Role, Secret, Slots};
use support::{SOON, until};

const SENDER: Role = Role::sender(64, 4, Mechanism::Shared, Slots::Segments);

/// How many links are charged to anybody.
fn links(broker: &Embedded) -> u64 {
    let used = broker.broker().used().into_iter();
    used.filter(|&(_, resource, _)| resource == Resource::Links).map(|(_, _, used)| used).sum()
}

/// Sends messages, of which each comes once.
fn exchange(sender: &mut Sender, receiver: &mut Receiver) {
    for _ in 0..100 {
        let fbuf = sender.allocate_timeout(SOON).unwrap();
        let sent = sender.write(fbuf).unwrap();
        assert_eq!(sent.receivers, 1);
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!(received.sequence(), sent.sequence);
        assert_eq!(received.sender().endpoint, sender.endpoint());
        assert_eq!(received.sender().process.pid, std::process::id() as i32);
    }
    assert_eq!(receiver.get_timeout(Duration::from_millis(20)).unwrap_err(), GetError::TimedOut);
}

#[test]
fn a_client_that_makes_up_an_earlier_life_takes_no_number_and_no_link_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::new(folder.path().join("broker"));
    let mut broker = Embedded::start_at(address.clone(), Policy::own()).unwrap();
    let client = Client::connect_to(&address).unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(4).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    exchange(&mut sender, &mut receiver);
    for round in 0..3 {
        // What it names is that of nobody, so it is introduced as any other sender is,
        let made_up = PreviousRegistration { secret: Secret::draw().unwrap(), links: vec![LinkId::draw().unwrap()] };
        let hostile = Hostile::resume(&address, "c", SENDER, Some(made_up));
        let numbers = client.status().unwrap().into_iter().map(|status| status.endpoint).collect::<Vec<_>>();
        assert_eq!(numbers.iter().collect::<BTreeSet<_>>().len(), 3, "{numbers:?}");
        // and takes nothing with it: those that were linked before are linked once.
        drop(hostile);
        drop(broker);
        until("the client hears of it", || !client.is_connected());
        broker = Embedded::start_at(address.clone(), Policy::own()).unwrap();
        until("both are known again", || client.is_connected() && links(&broker) == 1);
        let known: BTreeSet<_> = client.status().unwrap().into_iter().map(|status| status.endpoint).collect();
        assert_eq!(known, BTreeSet::from([sender.endpoint(), receiver.endpoint()]), "round {round}");
        exchange(&mut sender, &mut receiver);
    }
}

/// The control: what the client has, and no other, does make it the endpoint of before.
#[test]
fn the_secret_of_an_endpoint_gives_its_number_to_one_client_at_a_time() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let _receiver = client.receiver("c").keep_waiting().open().unwrap();
    let secret = Secret::draw().unwrap();
    let earlier = || Some(PreviousRegistration { secret, links: Vec::new() });
    let known = || client.status().unwrap().iter().filter(|status| status.endpoint == secret.number()).count();
    assert_eq!(known(), 0);
    for _ in 0..2 {
        let hostile = Hostile::resume(broker.address(), "c", SENDER, earlier());
        assert_eq!(known(), 1);
        drop(hostile);
        until("it is gone", || known() == 0);
    }
}
