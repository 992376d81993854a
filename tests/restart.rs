//! A broker that dies and comes back: what is linked goes on, clients connect again by themselves, and
//! those who come later are linked with those who were there before.

mod support;

use std::{process::Stdio, thread, time::Duration};

use fbuf_broker::{Embedded, Policy, Quota};
use fbuf_client::{Address, Client, GetError, Mechanism, OpenError, Receiver, Sender, SenderBuilder};
use fbuf_core::control::Resource;
use nix::sys::signal::Signal;
use support::{BrokerProcess, HandedOver, Process, SOON, until};

/// Sends one message to so many receivers.
fn send(sender: &mut Sender, number: u64, receivers: usize) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.resize(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    assert_eq!(sender.write(fbuf).unwrap().receivers, receivers);
}

/// Receives exactly this message.
fn expect(receiver: &mut Receiver, number: u64, mechanism: Mechanism) {
    let received = receiver.get_timeout(SOON).unwrap();
    assert_eq!(received[..], number.to_ne_bytes());
    assert_eq!(received.mechanism(), mechanism);
}

fn nothing(receiver: &mut Receiver) {
    assert_eq!(receiver.get_timeout(Duration::from_millis(20)).unwrap_err(), GetError::TimedOut);
}

/// How much of something is taken up by anybody.
fn used(broker: &Embedded, resource: Resource) -> u64 {
    broker.broker().used().into_iter().filter(|&(_, found, _)| found == resource).map(|(_, _, used)| used).sum()
}

/// A broker at an address, which is gone and comes back in between, and a client of then.
fn with_restart(builder: impl Fn(SenderBuilder) -> SenderBuilder, mechanism: Mechanism, later: Mechanism) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    let client = Client::connect_to(&broker.address).unwrap();
    let mut sender = builder(client.sender("c").slot_size(8).slots(4)).open().unwrap();
    let mut receiver = client.receiver("c").stay().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 1, 1);
    expect(&mut receiver, 1, mechanism);

    broker.process.kill();
    until("the client hears of it", || !client.is_connected());
    send(&mut sender, 2, 1);
    expect(&mut receiver, 2, mechanism);

    let broker = BrokerProcess::start(&path);
    until("the client is there again", || client.is_connected());
    let newcomer = Client::connect_to(&broker.address).unwrap();
    let mut second = newcomer.receiver("c").stay().open().unwrap();
    assert_eq!(sender.wait_for_receivers_timeout(2, SOON).unwrap(), 2);
    let mut other = newcomer.sender("c").slot_size(8).slots(4).open().unwrap();
    other.wait_for_receivers_timeout(2, SOON).unwrap();
    // Once each: those who knew each other were not introduced again.
    send(&mut sender, 3, 2);
    expect(&mut receiver, 3, mechanism);
    expect(&mut second, 3, later);
    send(&mut other, 4, 2);
    expect(&mut receiver, 4, Mechanism::Shared);
    expect(&mut second, 4, Mechanism::Shared);
    nothing(&mut receiver);
    nothing(&mut second);
}

#[test]
fn streams_go_on_and_newcomers_are_linked() {
    with_restart(|sender| sender, Mechanism::Shared, Mechanism::Shared);
}

#[test]
fn so_do_those_that_are_guarded() {
    with_restart(|sender| sender.guard(true), Mechanism::Shared, Mechanism::Shared);
}

#[test]
fn so_do_those_that_are_copied() {
    with_restart(|sender| sender.mechanism(Mechanism::Copy), Mechanism::Copy, Mechanism::Copy);
}

/// The new broker did not make the slots, so nobody can say of them that they can be leased.
#[test]
fn so_do_those_that_are_leased_and_newcomers_copy_them() {
    with_restart(|sender| sender.mechanism(Mechanism::Lease), Mechanism::Lease, Mechanism::Copy);
}

#[test]
fn so_do_those_that_are_sealed_for_good() {
    with_restart(|sender| sender.mechanism(Mechanism::OneShot), Mechanism::OneShot, Mechanism::OneShot);
}

#[test]
fn slots_of_the_receiver_are_allocated_from_the_next_one_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    let client = Client::connect_to(&broker.address).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(2).from_receiver().open().unwrap();
    let mut receiver = client.receiver("c").stay().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    broker.process.kill();
    until("the client hears of it", || !client.is_connected());
    for number in 0..5 {
        send(&mut sender, number, 1);
        expect(&mut receiver, number, Mechanism::Lease);
    }
    let _broker = BrokerProcess::start(&path);
    until("the client is there again", || client.is_connected());
    drop(receiver);
    let mut receiver = client.receiver("c").stay().open().unwrap();
    until("the receiver is linked", || {
        sender.look();
        sender.receivers() == 1 && sender.departed().is_some()
    });
    for number in 5..10 {
        send(&mut sender, number, 1);
        expect(&mut receiver, number, Mechanism::Lease);
    }
}

#[test]
fn what_is_opened_while_there_is_no_broker_waits_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    let client = Client::connect_to(&broker.address).unwrap();
    broker.process.kill();
    until("the client hears of it", || !client.is_connected());
    let opening = {
        let client = client.clone();
        thread::spawn(move || client.receiver("c").open())
    };
    let _broker = BrokerProcess::start(&path);
    let _receiver = opening.join().unwrap().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
}

#[test]
fn but_not_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = BrokerProcess::start(&folder.path().join("broker"));
    let client = Client::connect_to(&broker.address).unwrap();
    broker.process.kill();
    match client.receiver("c").open() {
        Err(OpenError::BrokerGone(why)) => assert!(why.contains("start `fbuf broker`"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_everybody_takes_up_is_known_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::new(folder.path().join("broker"));
    let broker = Embedded::start_at(address.clone(), Policy::own()).unwrap();
    let client = Client::connect_to(&address).unwrap();
    let sender = client.sender("a").slot_size(1000).slots(10).open().unwrap();
    let leased = client.sender("b").slot_size(4096).slots(3).mechanism(Mechanism::Lease).open().unwrap();
    let receiver = client.receiver("a").open().unwrap();
    let kinds = [Resource::Bytes, Resource::Slots, Resource::Channels, Resource::Links, Resource::Connections];
    let before = kinds.map(|kind| used(&broker, kind));
    assert_eq!(before, [10 * 1024 + 3 * 4096, 13, 2, 1, 1]);
    drop(broker);
    let broker = Embedded::start_at(address, Policy::own()).unwrap();
    until("everything is there again", || kinds.map(|kind| used(&broker, kind)) == before);
    drop((sender, leased, receiver, client));
    until("nothing is left", || broker.broker().used().is_empty());
}

#[test]
fn what_the_next_broker_refuses_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::new(folder.path().join("broker"));
    let broker = Embedded::start_at(address.clone(), Policy::own()).unwrap();
    let client = Client::connect_to(&address).unwrap();
    let mut sender = client.sender("c").slots(4).open().unwrap();
    drop(broker);
    let strict = Policy::own().with_quota(Quota { slots: 3, ..Quota::default() });
    let broker = Embedded::start_at(address.clone(), strict).unwrap();
    // It answers in order: what was open before was told before this is opened.
    let _receiver = client.receiver("c").open().unwrap();
    assert_eq!((used(&broker, Resource::Channels), used(&broker, Resource::Slots)), (1, 0));
    broker.broker().set_policy(Policy::own());
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    assert_eq!(used(&broker, Resource::Slots), 4);
}

/// Another binary takes the place of the broker, on the same socket, while a stream goes on.
#[test]
fn a_broker_is_replaced_on_the_same_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let listener = HandedOver::at(&path);
    let start = || Process::start(listener.broker().stderr(Stdio::null()));
    let mut broker = start();
    let address = Address::new(&path);
    let client = Client::connect_to(&address).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(64).open().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let streaming = {
        let stop = stop.clone();
        thread::spawn(move || {
            let mut number = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                send(&mut sender, number, 1);
                number += 1;
            }
            (number, sender)
        })
    };
    let receiving = thread::spawn(move || {
        let mut next = 0;
        while receiver.get_timeout(SOON).is_ok_and(|received| received[..] == u64::to_ne_bytes(next)) {
            next += 1;
        }
        next
    });
    for _ in 0..3 {
        broker.signal(Signal::SIGTERM);
        assert!(broker.end().success());
        until("the client hears of it", || !client.is_connected());
        broker = start();
        // The queue of the socket holds this until the next broker serves.
        let newcomer = Client::connect_to(&address).unwrap();
        newcomer.receiver("other").open().unwrap();
        until("the client is there again", || client.is_connected());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let (sent, sender) = streaming.join().unwrap();
    drop(sender);
    assert_eq!(receiving.join().unwrap(), sent);
}
