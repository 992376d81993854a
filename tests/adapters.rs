//! What a program of Rust expects beside the calls: a loop over messages, a slot that is filled from a file, messages as `Bytes`.

mod support;

use std::{
    io::{self, Read, Write},
    ptr,
    time::Duration,
};

use bytes::Bytes;
use fbuf_client::{Client, Filled, GetError, Mechanism, Receiver, Sender};
use support::{SOON, broker, send};

fn pair(client: &Client, slots: usize) -> (Sender, Receiver) {
    let receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(slots).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (sender, receiver)
}

#[test]
fn a_loop_over_a_receiver_ends_with_the_stream_and_an_error_does_not_end_it() {
    let (_broker, client) = broker();
    let (mut one, mut receiver) = pair(&client, 4);
    let mut other = client.sender("c").slot_size(64).slots(4).open().unwrap();
    other.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut one, b"1");
    one.abort(7);
    send(&mut other, b"2");
    send(&mut other, b"3");
    other.finish();
    let (mut bytes, mut errors) = (Vec::new(), Vec::new());
    for message in &mut receiver {
        match message {
            Ok(message) => bytes.extend_from_slice(&message),
            Err(error) => errors.push(error),
        }
    }
    bytes.sort_unstable();
    assert_eq!(bytes, b"123");
    assert!(matches!(errors[..], [GetError::Aborted { .. }]), "{errors:?}");
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
}

#[test]
fn what_is_there_is_taken_and_nothing_waited_for() {
    let (_broker, client) = broker();
    let (mut sender, mut receiver) = pair(&client, 4);
    assert_eq!(receiver.try_iter().count(), 0);
    for round in 0..2 {
        (0..3).for_each(|_| assert!(send(&mut sender, b"x") < 6));
        let numbers: Vec<_> = receiver.try_iter().map(|message| message.unwrap().sequence()).collect();
        assert_eq!(numbers, [3 * round, 3 * round + 1, 3 * round + 2]);
    }
    sender.finish();
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    assert_eq!(receiver.try_iter().count(), 0, "the end of a stream is no item");
}

/// Says a byte at a time, after an interrupt each.
struct Dripping<'a>(&'a [u8], bool);

impl Read for Dripping<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let count = self.0.len().min(buffer.len()).min(1);
        self.0.read(&mut buffer[..count])
    }
}

#[test]
fn a_slot_is_filled_to_its_end_or_to_that_of_the_source() {
    let (_broker, client) = broker();
    let (mut sender, _receiver) = pair(&client, 4);
    let bytes: Vec<_> = (0..100).collect();
    let mut source = Dripping(&bytes, false);
    let mut fbuf = sender.allocate().unwrap();
    assert_eq!((fbuf.fill_from(&mut source).unwrap(), &fbuf[..]), (Filled::Full, &bytes[..64]));
    assert_eq!(fbuf.fill_from(&mut source).unwrap(), Filled::Full, "there was no room for more");
    let mut rest = sender.allocate().unwrap();
    rest.write_all(b"the rest: ").unwrap();
    assert_eq!(rest.fill_from(&mut source).unwrap(), Filled::Ended);
    assert_eq!((&rest[..10], &rest[10..]), (&b"the rest: "[..], &bytes[64..]));
    assert_eq!(rest.fill_from(&mut source).unwrap(), Filled::Ended);
    let mut broken = (&bytes[..3]).chain(Failing);
    let mut part = sender.allocate().unwrap();
    assert_eq!(part.fill_from(&mut broken).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(part[..], bytes[..3], "what came before stays");
}

struct Failing;

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

#[test]
fn bytes_of_a_message_are_the_message_and_the_last_of_them_hands_the_slot_back() {
    const BRIEFLY: Duration = Duration::from_millis(10);
    let (_broker, client) = broker();
    let (mut sender, mut receiver) = pair(&client, 1);
    send(&mut sender, b"a message");
    let received = receiver.get_timeout(SOON).unwrap();
    let place = received.as_ptr();
    let bytes = Bytes::from(received);
    assert_eq!(&bytes[..], b"a message");
    assert!(ptr::eq(bytes.as_ptr(), place), "it was copied");
    let (whole, part) = (bytes.clone(), bytes.slice(2..));
    drop(bytes);
    drop(whole);
    assert!(sender.allocate_timeout(BRIEFLY).is_err(), "the slot is held");
    assert_eq!(&part[..], b"message");
    std::thread::spawn(move || drop(part)).join().unwrap();
    drop(sender.allocate_timeout(SOON).unwrap());
    send(&mut sender, b"");
    assert!(Bytes::from(receiver.get_timeout(SOON).unwrap()).is_empty());
}

#[test]
fn bytes_of_what_is_sealed_for_good_are_kept_without_a_copy() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(1).mechanism(Mechanism::OneShot).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, b"sealed");
    let sealed = receiver.get_timeout(SOON).unwrap().into_sealed().unwrap();
    let place = sealed.as_ptr();
    let bytes = Bytes::from(sealed);
    assert!(ptr::eq(bytes.as_ptr(), place) && bytes == "sealed");
    drop(sender.allocate_timeout(SOON).expect("what is kept takes no slot"));
}
