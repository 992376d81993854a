//! Processes that run out of addresses in the middle of a stream: what each side is told, and that nothing is lost that can wait.

mod support;

use std::fs;

use fbuf_client::{Abort, AllocateError, Client, DisconnectReason, GetError, Mechanism, Received, Receiver, Sender};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::geteuid,
};
use support::{
    SOON, broker,
    role::{Other, roles},
    until,
};

/// A slot, for which a process has no room that has so many bytes of addresses left.
const SLOT: usize = 16 << 20;
const LEFT: u64 = 4 << 20;
const MESSAGES: u64 = 5;

/// While it exists, this process can map little.
struct Scarcity(Resource, (u64, u64));

impl Scarcity {
    fn begin() -> Self {
        Self::of(Resource::RLIMIT_AS)
    }

    /// The same, or make no large file.
    fn of(resource: Resource) -> Self {
        let limit = getrlimit(resource).unwrap();
        let pages: u64 = fs::read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
        let used = if resource == Resource::RLIMIT_AS { pages * 4096 } else { 0 };
        setrlimit(resource, used + LEFT, limit.1).unwrap();
        Self(resource, limit)
    }
}

impl Drop for Scarcity {
    fn drop(&mut self) {
        setrlimit(self.0, self.1.0, self.1.1).unwrap();
    }
}

fn play(role: &str) {
    let client = Client::connect().unwrap();
    match role {
        "sends" => return run_out(&client),
        "sends on" => return go_on(&client),
        _ => {}
    }
    let mut receiver = client.receiver("c").max_slot_size(SLOT).open().unwrap();
    let first = next(&mut receiver, 0);
    println!("one is here");
    match role {
        "waits" => wait(&mut receiver, first),
        "gives up" => give_up(&mut receiver, first),
        other => panic!("{other}"),
    }
}

fn next(receiver: &mut Receiver, number: u64) -> Received {
    let received = receiver.get_timeout(SOON).unwrap();
    assert_eq!((received.sequence(), received[0]), (number, number as u8));
    received
}

/// Reads a message only when there is room for it.
fn wait(receiver: &mut Receiver, mut kept: Received) {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    for number in 1..MESSAGES {
        let scarcity = Scarcity::begin();
        for _ in 0..3 {
            let trouble = receiver.get_timeout(SOON).unwrap_err();
            assert!(matches!(trouble, GetError::NoMemory { .. }), "{trouble}");
            assert!(trouble.to_string().contains("RLIMIT_AS"), "{trouble}");
        }
        assert_eq!(receiver.try_iter().filter(|item| matches!(item, Err(GetError::NoMemory { .. }))).count(), 1);
        // Kept messages are what takes its room.
        drop(kept);
        drop(scarcity);
        kept = next(receiver, number);
    }
    drop(kept);
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    println!("all is here");
}

/// Has no room for the slots that its sender adds.
fn give_up(receiver: &mut Receiver, first: Received) {
    let _scarcity = Scarcity::begin();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    drop(first);
    drop(next(receiver, 1));
    let end = receiver.get_timeout(SOON).unwrap_err();
    assert!(matches!(end, GetError::GivenUp { message: 2, .. }), "{end}");
    println!("told: {end}");
    let end = receiver.get_timeout(SOON).unwrap_err();
    assert_eq!(end, GetError::Ended);
    println!("told: {end}");
}

/// Allocates messages until there is no more room.
fn run_out(client: &Client) {
    for mechanism in [Mechanism::OneShot, Mechanism::Lease] {
        let mut sender = client.sender("c").slot_size(SLOT).slots(8).mechanism(mechanism).open().unwrap();
        for limit in [Resource::RLIMIT_AS, Resource::RLIMIT_FSIZE] {
            let _scarcity = Scarcity::of(limit);
            let mut kept = Vec::new();
            let told = loop {
                match sender.try_allocate() {
                    Ok(fbuf) => kept.push(fbuf.expect("there are slots for all that can be ready")),
                    Err(error) => break error,
                }
            };
            println!("told: {told}");
            if mechanism == Mechanism::Lease {
                // It makes no file.
                break;
            }
        }
    }
}

/// Has no room once for each slot, and then again.
fn go_on(client: &Client) {
    for of_receiver in [true, false] {
        let builder = client.sender("c").slot_size(SLOT).slots(2);
        let builder = if of_receiver { builder.from_receiver() } else { builder.mechanism(Mechanism::Lease) };
        let mut sender = builder.require_finish().open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        for number in 0..MESSAGES {
            send(&mut sender, 2 * number);
            sender.wait_for_returns_timeout(SOON).unwrap();
            let scarcity = Scarcity::begin();
            // One may be ready.
            let ready = sender.try_allocate();
            let refused = sender.allocate_timeout(SOON).unwrap_err();
            assert!(matches!(refused, AllocateError::NoMemory { .. }), "{refused}");
            drop((ready, scarcity));
            let mut fbuf = sender.allocate_timeout(SOON).unwrap();
            fbuf.set_len(SLOT).unwrap();
            fbuf.fill(2 * number as u8 + 1);
            let scarcity = Scarcity::begin();
            let refused = sender.write_retained(fbuf).map(drop).unwrap_err();
            drop(scarcity);
            println!("told: {refused}");
            let fbuf = refused.into_fbuf().expect("it is lost");
            sender.wait_for_returns_timeout(SOON).unwrap();
            assert_eq!(sender.write_retained(fbuf).unwrap().0.sequence, 2 * number + 1);
        }
        sender.wait_for_returns_timeout(SOON).unwrap();
        let all = [(); 2].map(|()| sender.allocate_timeout(SOON).expect("a slot is lost"));
        drop(all);
        sender.finish();
    }
}

fn send(sender: &mut Sender, number: u64) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(SLOT).unwrap();
    fbuf.fill(number as u8);
    assert_eq!(sender.write(fbuf).unwrap().sequence, number);
}

#[test]
fn one_shots_wait_for_addresses_and_none_is_lost() {
    roles!(play);
    let (broker, client) = broker();
    let builder = client.sender("c").slot_size(SLOT).slots(MESSAGES as usize).mechanism(Mechanism::OneShot);
    let mut sender = builder.require_finish().open().unwrap();
    let mut receiver = Other::start(broker.address(), "waits", geteuid().as_raw());
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..MESSAGES).for_each(|number| send(&mut sender, number));
    receiver.hear("one is here");
    sender.finish();
    receiver.tell("all is sent");
    receiver.hear("all is here");
}

#[test]
fn a_stream_that_is_given_up_in_the_middle_is_told_as_such_to_both_sides() {
    roles!(play);
    let (broker, client) = broker();
    let mut sender = client.sender("c").slot_size(SLOT).slots(2).grow_to(4).require_finish().open().unwrap();
    let mut receiver = Other::start(broker.address(), "gives up", geteuid().as_raw());
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 0);
    receiver.hear("one is here");
    (1..4).for_each(|number| send(&mut sender, number));
    assert_eq!(sender.counters().growths, 1);
    receiver.tell("all is sent");
    let told = receiver.hear("told: ");
    assert!(told.contains("given up here at message 2") && told.contains("RLIMIT_AS"), "{told}");
    assert!(told.contains("the rest is missing") && !told.contains("could not be linked"), "{told}");
    let told = receiver.hear("told: ");
    assert!(told.contains("no sender is left") && told.contains("but for what was reported before"), "{told}");
    let mut departure = None;
    until("the sender hears of it", || {
        sender.poll_events();
        departure = sender.next_departure();
        departure.is_some()
    });
    let departure = departure.unwrap();
    assert_eq!(departure.reason, DisconnectReason::Failed { reason: Abort::Exhausted });
    let unread = departure.unread.unwrap();
    assert_eq!((unread.messages, unread.first, unread.last), (2, 2, 3));
}

#[test]
fn a_sender_without_room_hears_for_what_and_which_limit_is_in_the_way() {
    roles!(play);
    let (broker, _client) = broker();
    let mut sender = Other::start(broker.address(), "sends", geteuid().as_raw());
    for (slot, limit, remedy) in [
        ("a one-shot", "RLIMIT_AS", "drop fbufs"),
        ("a one-shot", "RLIMIT_FSIZE", "raise it"),
        ("a leased slot", "RLIMIT_AS", "drop fbufs"),
    ] {
        let told = sender.hear("told: ");
        assert!(told.contains(&format!("no memory for {slot} of {SLOT} bytes")), "{told}");
        assert!(told.contains(limit) && told.contains(remedy) && !told.contains("receivers"), "{told}");
    }
}

#[test]
fn a_sender_that_had_no_room_once_goes_on_with_all_its_slots() {
    roles!(play);
    let (broker, client) = broker();
    let mut sender = Other::start(broker.address(), "sends on", geteuid().as_raw());
    for _ in 0..2 {
        let mut receiver = client.receiver("c").max_slot_size(SLOT).open().unwrap();
        (0..2 * MESSAGES).for_each(|number| drop(next(&mut receiver, number)));
        for _ in 0..MESSAGES {
            let told = sender.hear("told: ");
            assert!(told.contains("was not sent") && told.contains("kept") && told.contains("RLIMIT_AS"), "{told}");
        }
        assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    }
}
