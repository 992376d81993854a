//! A sender parts with receivers that it does not want, or that hold it up; the others go on, and each side is told.

mod support;

use std::time::{Duration, Instant};

use fbuf_broker::Embedded;
use fbuf_client::{AllocateError, Client, DisconnectReason, GetError, Mechanism, Receiver, Sender, Wait, WaitError};
use support::SOON;

/// For how long receivers may hold a sender up here.
const PATIENCE: Duration = Duration::from_millis(50);

fn send(sender: &mut Sender, byte: u8) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(8).unwrap();
    fbuf.fill(byte);
    sender.write(fbuf).unwrap();
}

fn get(receiver: &mut Receiver) -> u8 {
    receiver.get_timeout(SOON).unwrap()[0]
}

/// A sender with four slots, and two receivers.
fn linked(client: &Client, mechanism: Mechanism, patience: Option<Duration>, wait: Wait) -> (Sender, [Receiver; 2]) {
    let sender = client.sender("c").slot_size(8).slots(4).mechanism(mechanism).wait(wait);
    let sender = patience.into_iter().fold(sender, |sender, time| sender.disconnect_after(time));
    let receivers = [(); 2].map(|()| client.receiver("c").keep_waiting().open().unwrap());
    let mut sender = sender.open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    (sender, receivers)
}

fn client() -> (Embedded, Client) {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    (broker, client)
}

#[test]
fn a_receiver_that_is_disconnected_takes_what_was_sent_and_is_told() {
    let (_broker, client) = client();
    let (mut sender, [mut one, mut other]) = linked(&client, Mechanism::Shared, None, Wait::Adaptive);
    (0..2).for_each(|byte| send(&mut sender, byte));
    let peer = sender.peers().find(|peer| peer.endpoint == one.endpoint()).unwrap();
    assert!(sender.disconnect(peer));
    assert!(!sender.disconnect(peer), "it is linked no more");
    let departure = sender.next_departure().unwrap();
    assert_eq!((departure.peer, departure.reason), (peer, DisconnectReason::Disconnected));
    (2..4).for_each(|byte| send(&mut sender, byte));
    assert_eq!([get(&mut one), get(&mut one)], [0, 1]);
    assert!(matches!(one.get_timeout(SOON), Err(GetError::Dropped { peer: by }) if by.endpoint == sender.endpoint()));
    assert_eq!([(); 4].map(|()| get(&mut other)), [0, 1, 2, 3]);
    // All four slots are back.
    (4..20).for_each(|byte| {
        send(&mut sender, byte);
        assert_eq!(get(&mut other), byte);
    });
    assert_eq!(sender.receivers(), 1);
}

#[test]
fn a_receiver_that_holds_everything_is_disconnected_after_a_while() {
    let (_broker, client) = client();
    for wait in [Wait::Spin, Wait::Adaptive, Wait::Block] {
        let (mut sender, [mut slow, mut quick]) = linked(&client, Mechanism::Copy, Some(PATIENCE), wait);
        send(&mut sender, 0);
        let held = slow.get_timeout(SOON).unwrap();
        assert_eq!(get(&mut quick), 0);
        for byte in 1..20 {
            send(&mut sender, byte);
            assert_eq!(get(&mut quick), byte);
        }
        let departure = sender.next_departure().unwrap();
        assert_eq!(
            (departure.peer.endpoint, departure.reason),
            (slow.endpoint(), DisconnectReason::HeldUp { limit: PATIENCE })
        );
        assert_eq!((sender.next_departure(), sender.receivers()), (None, 1), "the other one held nothing up");
        // What it had taken is its own; what it had not is written over, and it does not take that for a message.
        assert!(held.iter().all(|&byte| byte == 0));
        assert!(matches!(slow.get_timeout(SOON), Err(GetError::Dropped { .. })));
    }
}

/// The same, where a sender waits as long as its receivers take.
#[test]
fn without_a_limit_a_receiver_holds_its_sender_up() {
    let (_broker, client) = client();
    let (mut sender, [_slow, mut quick]) = linked(&client, Mechanism::Copy, None, Wait::Adaptive);
    for byte in 0..4 {
        send(&mut sender, byte);
        assert_eq!(get(&mut quick), byte);
    }
    assert!(matches!(sender.allocate_timeout(4 * PATIENCE), Err(AllocateError::TimedOut { slots: 4 })));
    assert_eq!((sender.next_departure(), sender.receivers()), (None, 2));
}

/// Nor does it wait for less if the time is more than clocks count.
#[test]
fn a_limit_that_is_never_reached_is_none() {
    let (_broker, client) = client();
    for wait in [Wait::Spin, Wait::Adaptive, Wait::Block] {
        let (mut sender, [_slow, _quick]) = linked(&client, Mechanism::Shared, Some(Duration::MAX), wait);
        (0..4).for_each(|byte| send(&mut sender, byte));
        assert!(matches!(sender.allocate_timeout(PATIENCE), Err(AllocateError::TimedOut { slots: 4 })));
        assert_eq!((sender.next_departure(), sender.receivers()), (None, 2));
    }
}

/// A receiver that reads messages where they lie keeps what it holds, whatever its sender does.
#[test]
fn a_sender_waits_no_longer_for_returns_than_a_disconnected_receiver_reads() {
    let (_broker, client) = client();
    for wait in [Wait::Spin, Wait::Adaptive, Wait::Block] {
        let (mut sender, [mut one, mut other]) = linked(&client, Mechanism::Shared, None, wait);
        send(&mut sender, 0);
        assert_eq!(get(&mut other), 0);
        let held = one.get_timeout(SOON).unwrap();
        let peer = sender.peers().find(|peer| peer.endpoint == one.endpoint()).unwrap();
        assert!(sender.disconnect(peer));
        let waits = sender.wait_for_returns_timeout(PATIENCE);
        assert_eq!(waits, Err(WaitError::StillLent { slots: 1 }), "{wait:?}: it is read");
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sender.wait_for_returns_timeout(SOON));
            // It sleeps by then, most likely; if not, nothing is lost.
            while begin.elapsed() < PATIENCE {
                std::thread::yield_now();
            }
            drop(held);
            assert_eq!(waiting.join().unwrap(), Ok(()), "{wait:?}");
        });
        assert!(begin.elapsed() < SOON / 2, "{wait:?}: it slept on");
    }
}

#[test]
fn what_a_disconnected_receiver_reads_in_place_does_not_change() {
    let (_broker, client) = client();
    let (mut sender, [mut slow, mut quick]) = linked(&client, Mechanism::Shared, Some(PATIENCE), Wait::Adaptive);
    send(&mut sender, 7);
    let held = slow.get_timeout(SOON).unwrap();
    assert_eq!(get(&mut quick), 7);
    for byte in 0..3 {
        send(&mut sender, byte);
        assert_eq!(get(&mut quick), byte);
    }
    let nothing = sender.allocate_timeout(4 * PATIENCE);
    assert!(
        matches!(nothing, Err(AllocateError::TimedOut { slots: 4 })),
        "the slots are the receiver's until it lets go"
    );
    assert_eq!(
        sender.next_departure().map(|departure| departure.reason),
        Some(DisconnectReason::HeldUp { limit: PATIENCE })
    );
    assert!(held.iter().all(|&byte| byte == 7));
    drop(held);
    for byte in 0..20 {
        send(&mut sender, byte);
        assert_eq!(get(&mut quick), byte);
    }
}
