//! One-shot messages: kept, cloned, passed on, and never changed.

mod support;

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::fd::{AsFd, OwnedFd},
};

use fbuf_client::{
    AllocateError, Client, GetError, Mechanism, OpenError, Protection, Receiver, Sealed, Sender, WriteError,
};
use support::{Holdings, SOON, alone, broker, send};

fn pair(client: &Client, slots: usize) -> (Sender, Receiver) {
    let receiver = client.receiver("c").require(Protection::Sealed).open().unwrap();
    let sender = client.sender("c").slot_size(10_000).slots(slots).mechanism(Mechanism::OneShot);
    let mut sender = sender.open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (sender, receiver)
}

#[test]
fn they_arrive_in_order_and_their_memory_goes() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 4);
    let mut late = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    let mut random = support::Random(7);
    send(&mut sender, b"so that everything is there");
    let (mut fewest, mut most) = ((usize::MAX, usize::MAX), (0, 0));
    for n in 0..1000 {
        let message = random.bytes([0, 1, 4096, 9999, 10_000][n % 5]);
        for receiver in [&mut receiver, &mut late] {
            let received = receiver.get_timeout(SOON).unwrap();
            assert_eq!((received.sequence(), received.mechanism()), (n as u64, Mechanism::OneShot));
        }
        // All were dropped: nothing is kept but what waits to be written, in the slot and in the stock.
        let Holdings { descriptors, mappings, .. } = Holdings::here();
        fewest = (fewest.0.min(descriptors), fewest.1.min(mappings));
        most = (most.0.max(descriptors), most.1.max(mappings));
        assert!(most.0 - fewest.0 <= 5 && most.1 - fewest.1 <= 5, "after {n} messages: {fewest:?} to {most:?}");
        send(&mut sender, &message);
    }
    assert_eq!(sender.counters().messages, 1001);
}

#[test]
fn they_are_kept_cloned_and_passed_on() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 2);
    // More than the sender has slots: what is kept for good takes none.
    let kept: Vec<Sealed> = (0..20u8)
        .map(|n| {
            send(&mut sender, &[n; 5000]);
            receiver.get_timeout(SOON).unwrap().into_sealed().unwrap()
        })
        .collect();
    send(&mut sender, b"a file");
    let descriptor: OwnedFd = receiver.get_timeout(SOON).unwrap().into_fd().unwrap();
    drop((sender, receiver));
    for (sealed, n) in kept.iter().zip(0..) {
        let clone = sealed.clone();
        assert!(clone.iter().all(|&byte| byte == n) && clone.len() == 5000);
        // Whoever gets the descriptor, in whatever process, finds the same, and can rely on it.
        let passed = Sealed::new(clone.into_fd().unwrap(), 5000).unwrap();
        assert_eq!(passed[..], sealed[..]);
    }
    // Nobody writes it, whatever way it is opened.
    let mut file = File::from(descriptor.try_clone().unwrap());
    assert!(file.write_all(b"x").is_err() && file.set_len(0).is_err());
    let mut copy = tempfile::tempfile().unwrap();
    nix::sys::sendfile::sendfile(copy.as_fd(), descriptor.as_fd(), None, 6).unwrap();
    let mut text = String::new();
    copy.rewind().unwrap();
    copy.read_to_string(&mut text).unwrap();
    assert_eq!(text, "a file");
}

#[test]
fn a_child_that_was_forked_keeps_nothing_from_being_sealed() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 4);
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.write_all(b"written before").unwrap();
    let _child = support::Fork::here();
    sender.write(fbuf).unwrap();
    assert_eq!(&receiver.get_timeout(SOON).unwrap()[..], b"written before");
    for n in 0..20u8 {
        send(&mut sender, &[n; 100]);
        assert_eq!(receiver.get_timeout(SOON).unwrap()[..], [n; 100]);
    }
}

#[test]
fn other_messages_are_not_for_good() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, b"volatile");
    let received = receiver.get_timeout(SOON).unwrap();
    let received = received.into_fd().unwrap_err().into_sealed().unwrap_err();
    assert_eq!(&received[..], b"volatile");
}

#[test]
fn a_message_to_nobody_comes_back_and_can_be_written_again() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let mut sender = client.sender("c").slot_size(100).mechanism(Mechanism::OneShot).open().unwrap();
    let mut fbuf = sender.allocate().unwrap();
    fbuf.write_all(b"kept").unwrap();
    let error = sender.write(fbuf).unwrap_err();
    assert!(matches!(error, WriteError::NoReceiver { .. }));
    let fbuf = error.into_fbuf().unwrap();
    assert_eq!(&fbuf[..], b"kept");
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    sender.write(fbuf).unwrap();
    assert_eq!(&receiver.get_timeout(SOON).unwrap()[..], b"kept");
}

#[test]
fn no_more_are_under_way_than_there_are_slots() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 128);
    for n in 0..128u32 {
        send(&mut sender, &n.to_le_bytes());
    }
    let full = sender.allocate_timeout(std::time::Duration::from_millis(1)).unwrap_err();
    assert_eq!(full, AllocateError::TimedOut { slots: 128 });
    for n in 0..128u32 {
        assert_eq!(receiver.get_timeout(SOON).unwrap()[..], n.to_le_bytes());
    }
    drop(sender);
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    let many = client.sender("c").slots(129).mechanism(Mechanism::OneShot).open().unwrap_err();
    assert!(matches!(many, OpenError::Geometry(_)), "{many}");
}

#[test]
fn one_that_wants_to_be_skipped_misses_whole_messages() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let mut receiver = client.receiver("c").max_backlog(2).open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(8).mechanism(Mechanism::OneShot).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for n in 0..100u64 {
        send(&mut sender, &n.to_le_bytes());
        if n % 10 == 9 {
            while let Some(received) = receiver.try_get().unwrap() {
                assert_eq!(received[..], received.sequence().to_le_bytes());
            }
        }
    }
    drop(sender);
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    let counters = receiver.counters();
    assert_eq!((counters.messages, counters.missed), (20, 80));
}
