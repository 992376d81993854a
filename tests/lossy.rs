//! Lossy senders never wait for a receiver, whatever it does, and each receiver learns exactly how many messages it did not get.

mod support;

use std::collections::VecDeque;

use fbuf_broker::Embedded;
use fbuf_client::{
    AllocateError, Client, DisconnectReason, Fbuf, GetError, Mechanism, OpenError, OptionsError, Protection, Received,
    Receiver, ReceiverBuilder, Retained, Sender, SenderBuilder,
};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::geteuid,
};
use support::{
    Random, SOON, broker,
    role::{Other, roles},
    until,
};

/// How messages can be protected, each by a sender and a receiver that see to it.
const MECHANISMS: [&str; 6] = ["shared", "copied", "guarded", "leased", "lease copied", "one-shot"];
const SIZE: usize = 5000;
const SLOTS: usize = 12;

fn sender(client: &Client, how: &str) -> SenderBuilder {
    let sender = client.sender(how).slot_size(SIZE).slots(SLOTS).lossy();
    match how {
        "copied" => sender.mechanism(Mechanism::Copy),
        "guarded" => sender.guard(true),
        "leased" | "lease copied" => sender.mechanism(Mechanism::Lease),
        "one-shot" => sender.mechanism(Mechanism::OneShot),
        _ => sender,
    }
}

fn receiver(client: &Client, how: &str) -> ReceiverBuilder {
    let require = if how.contains("copied") { Protection::Sealed } else { Protection::Volatile };
    client.receiver(how).require(require)
}

/// Allocates without waiting, and writes: the number of the message, and how many receivers got it.
fn write(sender: &mut Sender) -> (u64, usize) {
    let mut fbuf = sender.allocate().unwrap();
    let number = sender.counters().messages;
    fbuf.set_len(bytes(number).len()).unwrap();
    fbuf.copy_from_slice(&bytes(number));
    let sent = sender.write(fbuf).unwrap();
    assert_eq!(sent.sequence, number);
    (sent.sequence, sent.receivers)
}

fn bytes(number: u64) -> Vec<u8> {
    number.to_ne_bytes().repeat(1 + number as usize % (SIZE / 8))
}

/// What a receiver has got, and what it has not.
#[derive(Debug, Default)]
struct Taken {
    messages: u64,
    missed: u64,
    next: u64,
}

impl Taken {
    fn note(&mut self, received: &Received) {
        let sequence = received.sequence();
        assert!(
            received[..] == bytes(sequence),
            "the bytes of message {sequence}: {:?} {} for {} {:?}",
            received.mechanism(),
            received.len(),
            bytes(sequence).len(),
            &received[..8.min(received.len())]
        );
        assert!(sequence >= self.next, "{sequence} came behind {}", self.next);
        self.missed += sequence - self.next;
        (self.next, self.messages) = (sequence + 1, self.messages + 1);
    }

    /// Takes messages until the end, and does with each what is to be done: all that there are then.
    fn all(mut self, receiver: &mut Receiver, mut with: impl FnMut(Received)) -> (u64, u64) {
        loop {
            match receiver.get_timeout(SOON) {
                Ok(received) => {
                    self.note(&received);
                    with(received);
                }
                Err(GetError::Ended) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let counters = receiver.counters();
        // What was left out at the end is only in the counter.
        assert!(counters.missed >= self.missed && counters.messages == self.messages, "{counters:?} and {self:?}");
        (self.messages, counters.missed)
    }
}

/// What a child does: receives until the end, and says what it has got.
fn play(role: &str) {
    let client = Client::connect().unwrap();
    let (behaviour, how) = role.split_once(": ").unwrap();
    if behaviour == "sends without memory" {
        return send_without_memory(&client);
    }
    let mut receiver = receiver(&client, how).open().unwrap();
    let mut kept = Vec::new();
    let (messages, missed) = Taken::default().all(&mut receiver, |received| match behaviour {
        "keeps" => kept.push(received),
        // It has more to do with each message than the sender has.
        "dawdles" => assert!((0..200).all(|_| std::hint::black_box(&received)[..] == bytes(received.sequence()))),
        _ => {}
    });
    for received in kept {
        assert!(received[..] == bytes(received.sequence()), "what was kept has changed");
    }
    println!("it took {messages} and missed {missed}");
}

fn other(broker: &Embedded, role: &str) -> Other {
    Other::start(broker.address(), role, geteuid().as_raw())
}

fn has_not_waited(sender: &Sender) {
    let counters = sender.counters();
    assert_eq!((counters.waits, counters.sleeps), (0, 0), "{counters:?}");
}

#[test]
fn by_every_mechanism_a_receiver_that_keeps_everything_has_its_share_and_holds_nobody_up() {
    roles!(play);
    let (broker, client) = broker();
    for how in MECHANISMS {
        let mut sender = sender(&client, how).open().unwrap();
        let mut keeps = other(&broker, &format!("keeps: {how}"));
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let got = (0..1000).filter(|_| write(&mut sender).1 == 1).count();
        has_not_waited(&sender);
        assert_eq!((got, sender.counters().skipped), (SLOTS / 2, 1000 - SLOTS as u64 / 2), "{how}");
        sender.finish();
        assert_eq!(keeps.numbers::<u64>("it took"), [SLOTS as u64 / 2, 1000 - SLOTS as u64 / 2], "{how}");
        assert!(keeps.process.end().success());
    }
}

#[test]
fn receivers_of_different_speed_each_know_exactly_what_they_missed() {
    roles!(play);
    let (broker, client) = broker();
    for how in MECHANISMS {
        let mut sender = sender(&client, how).times().tags().open().unwrap();
        let mut others = ["reads", "dawdles", "keeps"].map(|does| other(&broker, &format!("{does}: {how}")));
        sender.wait_for_receivers_timeout(3, SOON).unwrap();
        const ALL: u64 = 3000;
        let got: usize = (0..ALL).map(|_| write(&mut sender).1).sum();
        has_not_waited(&sender);
        let skipped = sender.counters().skipped;
        assert_eq!(got as u64 + skipped, 3 * ALL);
        sender.finish();
        let taken = others.each_mut().map(|other| other.numbers::<u64>("it took"));
        assert!(taken.iter().all(|taken| taken.iter().sum::<u64>() == ALL), "{how}: {taken:?}");
        assert_eq!(taken.iter().map(|taken| taken[1]).sum::<u64>(), skipped, "{how}: {taken:?}");
        assert_eq!(taken[2][0], SLOTS as u64 / 4, "{how}: {taken:?}");
        others.iter_mut().for_each(|other| assert!(other.process.end().success()));
    }
}

#[test]
fn one_that_is_stopped_takes_nothing_from_the_others() {
    roles!(play);
    let (broker, client) = broker();
    for how in MECHANISMS {
        let mut sender = sender(&client, how).open().unwrap();
        let mut stopped = other(&broker, &format!("reads: {how}"));
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        stopped.process.signal(Signal::SIGSTOP);
        stopped.process.until_stopped();
        // It has its share of two before the other comes.
        let alone: Vec<_> = (0..20).map(|_| write(&mut sender).1).collect();
        assert_eq!(alone.iter().sum::<usize>(), SLOTS / 2, "{how}");
        let mut receiver = receiver(&client, how).open().unwrap();
        sender.wait_for_receivers_timeout(2, SOON).unwrap();
        for _ in 0..1000 {
            let (sequence, receivers) = write(&mut sender);
            assert_eq!(receivers, 1, "{how}: message {sequence}");
            assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), sequence);
        }
        assert_eq!((receiver.counters().missed, receiver.counters().missed_before), (0, 20));
        has_not_waited(&sender);
        stopped.process.signal(Signal::SIGCONT);
        until("it has read what there was", || {
            sender.poll_events();
            sender.counters().slots.lent == 0
        });
        assert_eq!(write(&mut sender).1, 2, "{how}: it is left out although it goes on");
        sender.finish();
        assert_eq!(stopped.numbers::<u64>("it took"), [SLOTS as u64 / 2 + 1, 1020 - SLOTS as u64 / 2], "{how}");
    }
}

#[test]
fn what_a_receiver_had_that_is_killed_is_free_again_and_was_not_read() {
    roles!(play);
    let (broker, client) = broker();
    for how in MECHANISMS {
        let mut sender = sender(&client, how).open().unwrap();
        let mut killed = other(&broker, &format!("keeps: {how}"));
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        (0..100).for_each(|_| _ = write(&mut sender));
        killed.process.kill();
        let departure = loop {
            // Nothing but writes has to notice it.
            let fbuf = sender.allocate().unwrap();
            let is_alone = sender.write(fbuf).is_err();
            if let Some(departure) = sender.next_departure() {
                assert!(is_alone || sender.receivers() == 0);
                break departure;
            }
        };
        assert_eq!(departure.reason, DisconnectReason::Died);
        let unread = departure.unread.unwrap();
        assert_eq!((unread.messages, unread.first, unread.last), (SLOTS as u64 / 2, 0, SLOTS as u64 / 2 - 1), "{how}");
        assert_eq!(sender.counters().slots.lent, 0);
        let mut next = receiver(&client, how).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let (sequence, _) = write(&mut sender);
        assert_eq!(next.get_timeout(SOON).unwrap().sequence(), sequence);
        has_not_waited(&sender);
    }
}

#[test]
fn a_lossy_sender_grows_before_it_leaves_anything_out() {
    let (_broker, client) = broker();
    for how in ["shared", "copied", "one-shot"] {
        let mut receiver = receiver(&client, how).open().unwrap();
        let mut sender = sender(&client, how).slots(1).grow_to(16).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let got: Vec<_> = (0..100).map(|_| write(&mut sender).1).collect();
        assert_eq!(got, [vec![1; 8], vec![0; 92]].concat(), "{how}");
        assert_eq!((sender.counters().growths, sender.counters().growth_refused), (4, 0), "{how}");
        has_not_waited(&sender);
        sender.finish();
        assert_eq!(Taken::default().all(&mut receiver, drop), (8, 92), "{how}");
    }
    // One that was not told how many slots to have waits for 20 ms before it adds any, if it is not lossy.
    let mut sender = client.sender("c").slot_size(4 << 20).lossy().open().unwrap();
    assert_eq!(sender.counters().slots.free, 2);
    let held: Vec<_> = (0..8).map(|_| sender.allocate().unwrap()).collect();
    assert_eq!((sender.counters().growths, sender.counters().slots.held), (2, held.len()));
}

/// Sends to a receiver that keeps all, and cannot grow for lack of descriptors.
fn send_without_memory(client: &Client) {
    let mut sender = client.sender("c").slot_size(SIZE).slots(4).grow_to(8).lossy().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
    (0..1000).for_each(|_| _ = write(&mut sender));
    let counters = sender.counters();
    assert_eq!((counters.skipped, counters.growths), (998, 0), "{counters:?}");
    // Not with every message: each attempt costs.
    assert!((1..500).contains(&counters.growth_refused), "{counters:?}");
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    until("it grows", || {
        write(&mut sender);
        sender.counters().growths == 1
    });
    assert_eq!(write(&mut sender).1, 1);
    has_not_waited(&sender);
}

#[test]
fn growth_that_is_refused_is_not_waited_for_and_tried_again() {
    roles!(play);
    let (broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sends = other(&broker, "sends without memory: ");
    let mut kept = Vec::new();
    Taken::default().all(&mut receiver, |received| kept.push(received));
    assert_eq!(kept.len(), 4);
    assert!(sends.process.end().success(), "it says why");
}

#[test]
fn with_more_receivers_than_slots_messages_are_left_out_for_all() {
    let (_broker, client) = broker();
    let mut receivers = [(); 5].map(|()| client.receiver("c").open().unwrap());
    let mut sender = client.sender("c").slot_size(SIZE).slots(2).lossy().open().unwrap();
    sender.wait_for_receivers_timeout(5, SOON).unwrap();
    assert_eq!((0..100).map(|_| write(&mut sender).1).sum::<usize>(), 5);
    // One that has let go gets nothing while the others keep that message: no other slot would be free.
    drop(receivers[0].get_timeout(SOON).unwrap());
    assert_eq!(write(&mut sender), (100, 0));
    receivers[1..].iter_mut().for_each(|receiver| drop(receiver.get_timeout(SOON).unwrap()));
    assert_eq!(write(&mut sender), (101, 5));
    sender.finish();
    for receiver in &mut receivers {
        assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), 101);
        assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
        assert_eq!(receiver.counters().missed, 100);
    }
}

#[test]
fn a_receiver_that_wants_fewer_gets_fewer() {
    let (_broker, client) = broker();
    let mut receivers = [1, 3, 100].map(|most| client.receiver("c").max_backlog(most).open().unwrap());
    let mut sender = client.sender("c").slot_size(SIZE).slots(20).grow_to(40).lossy().open().unwrap();
    sender.wait_for_receivers_timeout(3, SOON).unwrap();
    (0..50).for_each(|_| _ = write(&mut sender));
    // Not for those that asked for less, but for the third.
    assert_eq!(sender.counters().growths, 1);
    sender.finish();
    let taken = receivers.each_mut().map(|receiver| Taken::default().all(receiver, drop));
    assert_eq!(taken, [(1, 49), (3, 47), (10, 40)]);
}

/// What a program may do with a lossy sender, and receivers, in any order: behind each write a slot is free.
#[test]
fn behind_each_message_a_slot_is_free() {
    let (_broker, client) = broker();
    for how in MECHANISMS {
        let mut receivers = [(); 2].map(|()| receiver(&client, how).open().unwrap());
        let mut sender = sender(&client, how).slots(6).open().unwrap();
        sender.wait_for_receivers_timeout(2, SOON).unwrap();
        let mut random = Random(42);
        let mut held: VecDeque<Fbuf> = VecDeque::new();
        let mut kept: Vec<Retained> = Vec::new();
        let mut taken: [Vec<Received>; 2] = Default::default();
        let mut seen: [Taken; 2] = Default::default();
        for _ in 0..3000 {
            match random.below(8) {
                0..2 => match sender.try_allocate().unwrap() {
                    Some(fbuf) => held.push_back(fbuf),
                    None => {
                        let slots = 6;
                        assert_eq!(sender.allocate().unwrap_err(), AllocateError::WouldWait { slots }, "{how}");
                        assert!(!held.is_empty() || !kept.is_empty(), "{how}: nothing is held here");
                    }
                },
                2..5 => {
                    let Some(mut fbuf) = held.pop_front() else { continue };
                    let number = sender.counters().messages;
                    fbuf.set_headroom(0).unwrap();
                    fbuf.set_len(bytes(number).len()).unwrap();
                    fbuf.copy_from_slice(&bytes(number));
                    if random.below(4) == 0 && kept.len() < 2 {
                        kept.push(sender.write_retained(fbuf).unwrap().1);
                    } else {
                        sender.write(fbuf).unwrap();
                        held.push_back(sender.try_allocate().unwrap().expect("a slot behind a message"));
                    }
                }
                5 => drop(held.pop_back()),
                6 => {
                    let slow = random.below(2) as usize;
                    if let Some(received) = receivers[slow].try_get().unwrap() {
                        seen[slow].note(&received);
                        taken[slow].push(received);
                    }
                }
                _ => {
                    let which = random.below(2) as usize;
                    let index = random.below(1 + taken[which].len() as u64) as usize;
                    if index < taken[which].len() {
                        taken[which].swap_remove(index);
                    }
                    kept.pop();
                }
            }
        }
        let (all, skipped) = (sender.counters().messages, sender.counters().skipped);
        has_not_waited(&sender);
        sender.finish();
        drop(taken);
        let all_of = |(seen, receiver): (Taken, &mut Receiver)| seen.all(receiver, drop);
        let ends: Vec<_> = seen.into_iter().zip(&mut receivers).map(all_of).collect();
        assert!(
            ends.iter().all(|&(messages, missed)| messages + missed == all && missed > 0),
            "{how}: {ends:?} of {all}"
        );
        assert_eq!(ends.iter().map(|end| end.1).sum::<u64>(), skipped, "{how}");
    }
}

/// Of so many that not all of them are looked at each time.
#[test]
fn one_message_of_many_that_is_back_makes_room_for_another() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(2048).lossy().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut send = |count: usize| {
        let write = |_: &usize| {
            let fbuf = sender.allocate().unwrap();
            sender.write(fbuf).unwrap().receivers == 1
        };
        (0..count).filter(write).count()
    };
    assert_eq!(send(3000), 1024);
    let mut kept: Vec<_> = receiver.try_iter().map(Result::unwrap).collect();
    drop(kept.swap_remove(300));
    assert_eq!(send(20), 1, "it was not found");
    // The oldest are kept, before which the others are found.
    kept.sort_by_key(Received::sequence);
    kept.truncate(200);
    assert_eq!(send(823 + 4), 823);
    assert_eq!(send(100), 0);
}

#[test]
fn a_slot_that_is_free_is_found_wherever_it_is() {
    let (_broker, client) = broker();
    let mut sender = client.sender("c").slot_size(64).slots(2048).lossy().open().unwrap();
    let mut held: Vec<_> = (0..2048).map(|_| sender.allocate().unwrap()).collect();
    for index in [1500, 10, 700, 2040] {
        assert_eq!(sender.try_allocate().unwrap().map(drop), None);
        drop(held.swap_remove(index));
        held.push(sender.allocate().unwrap());
    }
}

/// All is left out, and a slot is known to be free before one is asked for: it looks around all the same.
#[test]
fn a_sender_that_leaves_all_out_says_so_and_hears_of_receivers() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(SIZE).slots(SLOTS).lossy().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    write(&mut sender);
    let received = receiver.get_timeout(SOON).unwrap();
    until("it is reported", || {
        (0..100).for_each(|_| _ = write(&mut sender));
        let status = client.status().unwrap();
        status.iter().filter_map(|end| end.report).any(|report| report.left_out > 100)
    });
    drop((receiver, received));
    until("the sender hears that its receiver has left", || {
        let fbuf = sender.allocate().unwrap();
        sender.write(fbuf).is_err()
    });
    let _receiver = client.receiver("c").open().unwrap();
    until("the next receiver is linked", || {
        let fbuf = sender.allocate().unwrap();
        sender.write(fbuf).is_ok_and(|sent| sent.receivers == 1)
    });
}

#[test]
fn what_contradicts_it_is_refused_in_words() {
    let (_broker, client) = broker();
    let lossy = || client.sender("c").lossy();
    for (builder, words) in [
        (lossy().disconnect_after(SOON), "a lossy sender never waits for receivers, which contradicts disconnecting"),
        (lossy().from_receiver(), "which contradicts slots that its receiver has to give back"),
        (lossy().slots(1), "an endpoint with one slot, kept for the next message (lossy), never exchanges a message"),
    ] {
        let error = builder.open().unwrap_err();
        let is_known = matches!(error, OpenError::Options(OptionsError::Lossy { .. } | OptionsError::Nothing { .. }));
        assert!(is_known && error.to_string().contains(words), "{error}");
    }
    let mut sender = lossy().slots(2).open().unwrap();
    let _held = [sender.allocate().unwrap(), sender.allocate().unwrap()];
    let error = sender.allocate_timeout(SOON).unwrap_err();
    assert_eq!(error, AllocateError::WouldWait { slots: 2 });
    assert_eq!(sender.try_allocate().unwrap().map(drop), None);
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::WouldBlock);
}
