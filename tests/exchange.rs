//! Messages between endpoints of this process, through a real broker: what the library promises
//! to programs.

mod support;

use std::{collections::HashSet, io::Write, thread, time::Duration};

use fbuf_client::{
    AllocateError, DisconnectReason, GetError, Mechanism, OpenError, OptionsError, Protection, Receiver, Wait,
    WaitError, WriteError,
};
use support::{SOON, broker, send};

fn get(receiver: &mut Receiver) -> Vec<u8> {
    receiver.get_timeout(SOON).unwrap().to_vec()
}

#[test]
fn a_message_arrives_whichever_end_opens_first() {
    let (_broker, client) = broker();
    for receiver_first in [true, false] {
        let (mut sender, mut receiver);
        if receiver_first {
            receiver = client.receiver("c").open().unwrap();
            sender = client.sender("c").open().unwrap();
        } else {
            sender = client.sender("c").open().unwrap();
            receiver = client.receiver("c").open().unwrap();
        }
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        assert_eq!(send(&mut sender, b"hello"), 0);
        assert_eq!(send(&mut sender, b""), 1);
        let first = receiver.get_timeout(SOON).unwrap();
        assert_eq!((&first[..], first.sequence()), (&b"hello"[..], 0));
        assert_eq!(first.sender().process.pid as u32, std::process::id());
        assert_eq!(get(&mut receiver), b"");
    }
}

#[test]
fn the_end_comes_after_everything_that_was_sent() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(4).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for n in 0..4u8 {
        send(&mut sender, &[n]);
    }
    drop(sender);
    for n in 0..4u8 {
        assert_eq!(get(&mut receiver), [n]);
    }
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    assert_eq!(receiver.try_get().unwrap_err(), GetError::Ended);
    // And another sender may come.
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, b"again");
    let again = loop {
        match receiver.get_timeout(SOON) {
            Err(GetError::Ended) => {}
            other => break other.unwrap(),
        }
    };
    assert_eq!(&again[..], b"again");
}

#[test]
fn a_stream_without_messages_ends() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    drop(sender);
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
}

#[test]
fn a_receiver_that_stays_waits_for_the_next_sender() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    for text in [b"one", b"two"] {
        let mut sender = client.sender("c").open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        send(&mut sender, text);
        drop(sender);
        assert_eq!(get(&mut receiver), text);
    }
    assert_eq!(receiver.get_timeout(Duration::from_millis(10)).unwrap_err(), GetError::TimedOut);
}

#[test]
fn every_receiver_gets_every_message_of_every_sender_in_order() {
    const SENDERS: usize = 3;
    const RECEIVERS: usize = 4;
    const MESSAGES: u64 = 5000;
    for wait in [Wait::Block, Wait::Adaptive] {
        let (_broker, client) = broker();
        let receivers: Vec<_> =
            (0..RECEIVERS).map(|_| client.receiver("c").wait(wait).keep_waiting().open().unwrap()).collect();
        let senders: Vec<_> = (0..SENDERS)
            .map(|_| {
                let client = client.clone();
                thread::spawn(move || {
                    let mut sender = client.sender("c").slot_size(16).slots(7).wait(wait).open().unwrap();
                    sender.wait_for_receivers_timeout(RECEIVERS, SOON).unwrap();
                    for n in 0..MESSAGES {
                        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
                        fbuf.write_all(&n.to_ne_bytes()).unwrap();
                        let sent = sender.write(fbuf).unwrap();
                        assert_eq!((sent.sequence, sent.receivers), (n, RECEIVERS));
                    }
                })
            })
            .collect();
        let receivers: Vec<_> = receivers
            .into_iter()
            .map(|mut receiver| {
                thread::spawn(move || {
                    let mut next = std::collections::HashMap::new();
                    for _ in 0..SENDERS as u64 * MESSAGES {
                        let received = receiver.get_timeout(SOON).unwrap();
                        let due = next.entry(received.sender().endpoint).or_insert(0);
                        assert_eq!(received.sequence(), *due);
                        assert_eq!(received[..], due.to_ne_bytes());
                        *due += 1;
                    }
                    assert_eq!(next.len(), SENDERS);
                })
            })
            .collect();
        for thread in senders.into_iter().chain(receivers) {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_slot_comes_back_when_its_last_receiver_has_dropped_it() {
    let (_broker, client) = broker();
    let (mut one, mut two) = (client.receiver("c").open().unwrap(), client.receiver("c").open().unwrap());
    let mut sender = client.sender("c").slot_size(8).slots(1).open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    send(&mut sender, b"x");
    let (first, second) = (one.get_timeout(SOON).unwrap(), two.get_timeout(SOON).unwrap());
    assert!(sender.try_allocate().unwrap().is_none());
    drop(first);
    assert!(sender.try_allocate().unwrap().is_none());
    // From another thread, while the sender sleeps.
    let waiting = thread::spawn(move || sender.allocate_timeout(SOON).map(|_| ()));
    thread::spawn(move || drop(second)).join().unwrap();
    waiting.join().unwrap().unwrap();
}

#[test]
fn what_was_received_stays_readable_when_everything_else_is_gone() {
    let (broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, &[7; 5000]);
    let received = receiver.get_timeout(SOON).unwrap();
    drop((sender, receiver, client, broker));
    assert_eq!(received[..], [7; 5000]);
}

#[test]
fn a_slow_receiver_holds_its_sender_back() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(3).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for _ in 0..3 {
        send(&mut sender, b"x");
    }
    assert_eq!(sender.allocate_timeout(Duration::from_millis(1)).unwrap_err(), AllocateError::TimedOut { slots: 3 });
    assert_eq!(sender.counters().waits, 1);
    drop(receiver.get_timeout(SOON).unwrap());
    send(&mut sender, b"y");
}

#[test]
fn a_receiver_may_be_skipped_and_sees_how_many_it_missed() {
    let (_broker, client) = broker();
    let mut fast = client.receiver("c").open().unwrap();
    let mut slow = client.receiver("c").max_backlog(3).open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(8).open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    for n in 0..100u64 {
        send(&mut sender, &n.to_ne_bytes());
        assert_eq!(get(&mut fast), n.to_ne_bytes());
    }
    let seen: Vec<_> = (0..3).map(|_| slow.get_timeout(SOON).unwrap().sequence()).collect();
    assert_eq!(seen, [0, 1, 2]);
    send(&mut sender, b"last");
    assert_eq!(slow.get_timeout(SOON).unwrap().sequence(), 100);
    assert_eq!(slow.counters().missed, 97);
    assert_eq!(sender.counters().skipped, 97);
    assert_eq!(fast.counters().missed, 0);
    // What is left out at the very end is counted too.
    for _ in 0..5 {
        send(&mut sender, b"x");
        get(&mut fast);
    }
    drop(sender);
    let rest: Vec<_> = std::iter::from_fn(|| slow.get_timeout(SOON).ok()).collect();
    assert_eq!((rest.len() as u64 + slow.counters().missed, slow.counters().missed), (3 + 99, 97 + 2));
}

#[test]
fn a_sender_without_receivers_is_told_so_and_keeps_its_fbuf() {
    let (_broker, client) = broker();
    let mut sender = client.sender("c").open().unwrap();
    let mut fbuf = sender.allocate().unwrap();
    fbuf.write_all(b"kept").unwrap();
    let error = sender.write(fbuf).unwrap_err();
    assert!(matches!(error, WriteError::NoReceiver { .. }), "{error}");
    assert_eq!(&error.into_fbuf().unwrap()[..], b"kept");
    let wanted = sender.wait_for_receivers_timeout(2, Duration::from_millis(1)).unwrap_err();
    assert_eq!(wanted, WaitError::TimedOut { wanted: 2, linked: 0, failure: None });
}

#[test]
fn a_receiver_that_closes_gives_everything_back_but_what_is_held() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(5).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for n in 0..5u8 {
        send(&mut sender, &[n]);
    }
    let held = receiver.get_timeout(SOON).unwrap();
    drop(receiver);
    let all: Vec<_> = (0..4).map(|_| sender.allocate_timeout(SOON).unwrap()).collect();
    assert!(sender.try_allocate().unwrap().is_none(), "a slot that is held was given away");
    assert_eq!(held[..], [0]);
    drop(held);
    sender.allocate_timeout(SOON).unwrap();
    drop(all);
    sender.poll_events();
    assert_eq!(sender.next_departure().unwrap().reason, DisconnectReason::Left);
    assert_eq!(sender.receivers(), 0);
    assert_eq!(sender.counters().slots.free, 5);
}

#[test]
fn a_pool_grows_while_it_streams() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(1000).slots(2).grow_to(50).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for n in 0..50u8 {
        send(&mut sender, &[n; 1000]);
    }
    assert!(sender.try_allocate().unwrap().is_none());
    assert_eq!(sender.counters().growths, 5);
    // One that comes later knows all segments too.
    let mut late = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    for n in 0..50u8 {
        assert_eq!(get(&mut receiver), [n; 1000]);
    }
    for n in 0..50u8 {
        send(&mut sender, &[n; 999]);
        assert_eq!(get(&mut receiver), [n; 999]);
        assert_eq!(get(&mut late), [n; 999]);
    }
}

#[test]
fn a_sender_that_was_told_no_number_makes_more_slots_when_all_are_kept() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8 << 20).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for n in 0..100u8 {
        send(&mut sender, &[n]);
        assert_eq!(get(&mut receiver), [n]);
    }
    assert_eq!(
        (sender.counters().growths, sender.counters().slots.free),
        (0, 2),
        "two do for a receiver that keeps up"
    );
    let kept: Vec<_> = (0..8u8)
        .map(|n| {
            send(&mut sender, &[n]);
            receiver.get_timeout(SOON).unwrap()
        })
        .collect();
    assert_eq!((sender.counters().growths, sender.counters().slots.lent), (2, 8));
    let enough = sender.allocate_timeout(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(enough, AllocateError::TimedOut { slots: 8 }), "{enough}");
    assert!(kept.iter().zip(0..).all(|(message, n)| message[..] == [n]));
    drop(kept);
    sender.allocate_timeout(SOON).unwrap();
}

/// Programs read numbers in place.
#[test]
fn a_message_begins_at_a_multiple_of_64_bytes_at_both_ends() {
    let (_broker, client) = broker();
    for mechanism in [Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot] {
        let mut sender = client.sender("c").slot_size(65).slots(4).mechanism(mechanism).open().unwrap();
        let mut receiver = client.receiver("c").open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let mut begins = HashSet::new();
        let held: Vec<_> = (0..4)
            .map(|_| {
                let mut fbuf = sender.allocate_timeout(SOON).unwrap();
                fbuf.set_len(65).unwrap();
                begins.insert(fbuf.as_ptr().addr());
                sender.write(fbuf).unwrap();
                receiver.get_timeout(SOON).unwrap()
            })
            .collect();
        let found: Vec<_> = begins.into_iter().chain(held.iter().map(|held| held.as_ptr().addr())).collect();
        assert!(found.len() > 4 && found.iter().all(|begin| begin % 64 == 0), "{mechanism:?}: {found:x?}");
    }
}

#[test]
fn sealed_messages_arrive_whole_and_are_kept_while_the_sender_goes_on() {
    let (_broker, client) = broker();
    let mut one = client.receiver("c").require(Protection::Sealed).open().unwrap();
    let mut sender =
        client.sender("c").slot_size(5001).slots(2).grow_to(20).protection(Protection::Sealed).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut random = support::Random(1);
    let mut kept = Vec::new();
    for n in 0..2000 {
        let length =
            if n % 10 == 0 { [0, 1, 7, 8, 9, 4096, 5000, 5001][n / 10 % 8] } else { random.below(5002) as usize };
        let message = random.bytes(length);
        send(&mut sender, &message);
        let received = one.get_timeout(SOON).unwrap();
        assert_eq!(received.mechanism(), Mechanism::Copy);
        assert!(received[..] == message, "message {n} of {length} bytes");
        if kept.len() < 12 {
            kept.push((message, received));
        } else {
            let (message, received) = std::mem::replace(&mut kept[n % 12], (message, received));
            assert!(received[..] == message, "a message that was kept has changed");
        }
    }
    assert_eq!(sender.counters().growths, 3);
    drop((one, sender));
    assert!(kept.iter().all(|(message, received)| received[..] == message[..]), "they outlive both ends");
}

#[test]
fn a_fbuf_of_another_sender_is_refused_and_handed_back() {
    let (_broker, client) = broker();
    let (mut one, mut two) = (client.sender("c").open().unwrap(), client.sender("c").open().unwrap());
    let _receiver = client.receiver("c").open().unwrap();
    one.wait_for_receivers_timeout(1, SOON).unwrap();
    two.wait_for_receivers_timeout(1, SOON).unwrap();
    let error = two.write(one.allocate().unwrap()).unwrap_err();
    assert!(matches!(error, WriteError::OtherSender { .. }), "{error}");
    one.write(error.into_fbuf().unwrap()).unwrap();
}

#[test]
fn fbufs_can_be_dropped_unsent_from_any_thread() {
    let (_broker, client) = broker();
    let mut sender = client.sender("c").slot_size(8).slots(1).wait(Wait::Block).open().unwrap();
    let fbuf = sender.allocate().unwrap();
    assert!(sender.try_allocate().unwrap().is_none());
    let waiting = thread::spawn(move || sender.allocate_timeout(SOON).map(|_| ()));
    drop(fbuf);
    waiting.join().unwrap().unwrap();
}

#[test]
fn what_cannot_be_opened_says_why() {
    let (_broker, client) = broker();
    let sender = |channel: &str, size, slots| client.sender(channel).slot_size(size).slots(slots).open().unwrap_err();
    assert!(matches!(sender("", 64, 1), OpenError::Channel(_)));
    assert!(matches!(sender(&"x".repeat(256), 64, 1), OpenError::Channel(_)));
    assert!(matches!(sender("a\tb", 64, 1), OpenError::Channel(_)));
    assert!(matches!(sender("c", 0, 1), OpenError::Geometry(_)));
    assert!(matches!(sender("c", (1 << 30) + 1, 1), OpenError::Geometry(_)));
    assert!(matches!(sender("c", 64, 0), OpenError::Geometry(_)));
    assert!(matches!(sender("c", 1 << 30, 1 << 20), OpenError::Memory(_)));
    let shrinking = client.sender("c").slots(8).grow_to(4).open().unwrap_err();
    assert!(matches!(shrinking, OpenError::Geometry(_)));
    let leased = client.sender("c").mechanism(Mechanism::Lease).slots(2).grow_to(4).open().unwrap_err();
    assert!(matches!(leased, OpenError::Options(OptionsError::Growth { limit: 4 })));
    let alone = client.sender("c").to_users([]).open().unwrap_err();
    assert!(matches!(alone, OpenError::Options(OptionsError::Nothing { .. })));
    let receiver = || client.receiver("c");
    for receiver in [receiver().max_backlog(0), receiver().max_slots(0), receiver().from_users([])] {
        let error = receiver.open().unwrap_err();
        assert!(matches!(error, OpenError::Options(OptionsError::Nothing { .. })), "{error}");
    }
    // How many to begin with was not said.
    assert_eq!(client.sender("d").slot_size(8).grow_to(4).open().unwrap().counters().slots.free, 4);
    assert!(matches!(client.receiver("").open().unwrap_err(), OpenError::Channel(_)));
}

#[test]
fn without_its_broker_a_client_opens_nothing_and_links_go_on() {
    let (broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    drop(broker);
    assert!(matches!(client.receiver("c").open().unwrap_err(), OpenError::BrokerGone { .. }));
    assert!(matches!(client.sender("c").open().unwrap_err(), OpenError::BrokerGone { .. }));
    send(&mut sender, b"still here");
    assert_eq!(get(&mut receiver), b"still here");
    drop(sender);
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
}

#[test]
fn a_slot_that_is_kept_does_not_keep_the_others() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(4).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, b"kept");
    let kept = receiver.get_timeout(SOON).unwrap();
    for n in 0..100u64 {
        send(&mut sender, &n.to_ne_bytes());
        assert_eq!(get(&mut receiver), n.to_ne_bytes());
    }
    assert_eq!(kept[..], *b"kept");
}

#[test]
fn messages_may_be_dropped_on_another_thread_while_their_slots_are_lent_again() {
    for (wait, slots) in [(Wait::Block, 1), (Wait::Adaptive, 1), (Wait::Adaptive, 4)] {
        let (_broker, client) = broker();
        let mut receiver = client.receiver("c").wait(wait).open().unwrap();
        let mut sender = client.sender("c").slot_size(8).slots(slots).wait(wait).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let (hand_over, dropping) = std::sync::mpsc::channel();
        let dropping = thread::spawn(move || dropping.into_iter().for_each(drop::<fbuf_client::Received>));
        let sending = thread::spawn(move || {
            for n in 0..20_000u64 {
                send(&mut sender, &n.to_ne_bytes());
            }
        });
        for n in 0..20_000u64 {
            let received = receiver.get_timeout(SOON).unwrap();
            assert_eq!(received[..], n.to_ne_bytes());
            hand_over.send(received).unwrap();
        }
        assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
        drop(hand_over);
        sending.join().unwrap();
        dropping.join().unwrap();
    }
}

#[test]
fn what_was_sent_in_new_segments_arrives_after_its_sender_has_ended() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(1).grow_to(64).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    // Linked, before there is anything but the first segment.
    send(&mut sender, b"first");
    assert_eq!(get(&mut receiver), b"first");
    for n in 0..50u8 {
        send(&mut sender, &[n]);
    }
    drop(sender);
    for n in 0..50u8 {
        assert_eq!(get(&mut receiver), [n]);
    }
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
}

#[test]
fn a_receiver_that_closes_before_its_first_message_has_left() {
    let (_broker, client) = broker();
    let mut sender = client.sender("c").slots(2).open().unwrap();
    let receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, b"unread");
    drop(receiver);
    let departure = loop {
        sender.poll_events();
        if let Some(departure) = sender.next_departure() {
            break departure;
        }
    };
    assert_eq!(departure.reason, DisconnectReason::Left);
    sender.wait_for_returns_timeout(SOON).unwrap();
}

#[test]
fn many_endpoints_may_come_and_go_at_once() {
    let (_broker, client) = broker();
    // More in all than a client may have open, and more at once than the broker answers at once.
    for _ in 0..100 {
        let receivers: Vec<_> = (0..60).map(|_| client.receiver("c").open().unwrap()).collect();
        drop(receivers);
    }
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, b"still introduced");
    assert_eq!(get(&mut receiver), b"still introduced");
}

/// Whenever they come: also while the sender looks around behind a message that it has just sent.
#[test]
fn newcomers_number_messages_as_their_sender_does() {
    let (_broker, client) = broker();
    let mut sender = client.sender("c").slot_size(8).slots(1).open().unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut first = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let receiving = std::thread::spawn(move || while first.get_timeout(SOON).is_ok() {});
    let sending = {
        let stop = stop.clone();
        std::thread::spawn(move || {
            let mut number = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let mut fbuf = sender.allocate_timeout(SOON).unwrap();
                fbuf.set_len(8).unwrap();
                fbuf.copy_from_slice(&number.to_ne_bytes());
                assert_eq!(sender.write(fbuf).unwrap().sequence, number);
                number += 1;
            }
        })
    };
    for _ in 0..300 {
        let mut newcomer = client.receiver("c").open().unwrap();
        for _ in 0..3 {
            let received = newcomer.get_timeout(SOON).unwrap();
            assert_eq!(received[..], received.sequence().to_ne_bytes());
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    sending.join().unwrap();
    receiving.join().unwrap();
}
