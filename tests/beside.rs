//! What a message has beside its bytes: a tag, a user header, a time of sending, headroom; and where slots begin. By every
//! mechanism, between processes.

mod support;

use std::{env, time::Duration};

use fbuf_client::{Address, Client, Mechanism, OpenError, Protection, Received, Receiver, Sender, SenderBuilder};
use nix::unistd::geteuid;
use support::{
    SOON, broker,
    role::{Other, roles},
};

const HEADER: usize = 24;
const SIZE: usize = 5000;

/// How messages can be protected, each by a sender and a receiver that see to it.
const MECHANISMS: [&str; 8] =
    ["shared", "copied", "guarded", "leased", "lease copied", "one-shot", "from receiver", "from receiver, copied"];

fn sender(client: &Client, how: &str) -> SenderBuilder {
    let sender = client.sender(how).slot_size(SIZE).slots(4);
    match how {
        "copied" => sender.mechanism(Mechanism::Copy),
        "guarded" => sender.guard(true),
        "leased" | "lease copied" => sender.mechanism(Mechanism::Lease),
        "one-shot" => sender.mechanism(Mechanism::OneShot),
        "from receiver" | "from receiver, copied" => sender.from_receiver(),
        _ => sender,
    }
}

fn receiver(client: &Client, how: &str) -> Receiver {
    let require = if how.contains("copied") { Protection::Sealed } else { Protection::Volatile };
    client.receiver(how).require(require).open().unwrap()
}

fn mechanism(how: &str) -> Mechanism {
    match how {
        "shared" | "guarded" => Mechanism::Shared,
        "leased" | "from receiver" => Mechanism::Lease,
        "one-shot" => Mechanism::OneShot,
        _ => Mechanism::Copy,
    }
}

/// Message number `n` of each sender here: with headroom or not, a tag or not, another length each time.
fn write(sender: &mut Sender, n: u64) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    let headroom = (n % 3) as usize * 13;
    fbuf.set_headroom(headroom).unwrap();
    fbuf.set_len(bytes(n).len()).unwrap();
    fbuf.copy_from_slice(&bytes(n));
    if headroom > 0 {
        // A part of it is put before it only now.
        fbuf.trim_front(5);
        fbuf.prepend(&bytes(n)[..5]).unwrap();
    }
    assert_eq!((fbuf.headroom(), &fbuf[..]), (headroom, &bytes(n)[..]));
    fbuf.header_mut().copy_from_slice(&header(n));
    if n % 4 != 3 {
        fbuf.set_tag(u64::MAX - n).unwrap();
    }
    sender.write(fbuf).unwrap();
}

fn bytes(n: u64) -> Vec<u8> {
    (0..1000 + 700 * (n % 5)).map(|byte| (byte ^ n) as u8).collect()
}

fn header(n: u64) -> [u8; HEADER] {
    [n as u8 ^ 0x5a; HEADER]
}

fn check(received: &Received, n: u64) {
    assert_eq!(received.sequence(), n);
    assert!(received[..] == bytes(n), "the bytes of message {n}");
    assert_eq!(received.header(), header(n), "the header of message {n}");
    assert_eq!(received.header().as_ptr() as usize % 64, 0);
    assert_eq!(received.tag(), if n % 4 == 3 { 0 } else { u64::MAX - n });
    assert!(received.age().is_some_and(|age| age < SOON), "{:?}", received.age());
}

/// Receives in another process what is on all channels, until the senders end.
fn receive(_: &str) {
    let client = Client::connect_to(&Address::new(env::var_os("FBUF_BROKER").unwrap())).unwrap();
    let mut receivers = MECHANISMS.map(|how| receiver(&client, how));
    println!("it listens");
    for (receiver, how) in receivers.iter_mut().zip(MECHANISMS) {
        let mut held = Vec::new();
        for n in 0..40 {
            let received = receiver.get_timeout(SOON).unwrap();
            check(&received, n);
            assert_eq!(received.mechanism(), mechanism(how), "{how}");
            // Two at a time, so that they do not lie in the same slot each time.
            held.push(received);
            if held.len() == 2 {
                check(&held[0], n - 1);
                // So that both are seen of each length and headroom.
                for (received, n) in held.drain(..).zip([n - 1, n]) {
                    let mut private = received.into_private().unwrap();
                    assert!(private[..] == bytes(n), "{how}: a view of message {n} that may be written");
                    private.fill(1);
                    assert!(private.iter().all(|&byte| byte == 1));
                }
            }
        }
    }
    println!("all is as it should be");
}

#[test]
fn all_of_it_arrives_by_every_mechanism() {
    roles!(receive);
    let (broker, client) = broker();
    let mut other = Other::start(broker.address(), "receives", geteuid().as_raw());
    other.hear("it listens");
    for how in MECHANISMS {
        let mut sender = sender(&client, how).header_size(HEADER).tags().times().open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        (0..40).for_each(|n| write(&mut sender, n));
        sender.wait_for_returns_timeout(SOON).unwrap();
    }
    other.hear("all is as it should be");
}

/// With tags alone, the short way of both sides is taken.
#[test]
fn tags_arrive_over_links_that_have_nothing_else() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slots(8).tags().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for n in 0..10_000u64 {
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.set_tag(n % 3).unwrap();
        sender.write(fbuf).unwrap();
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!((received.tag(), received.sequence(), received.sent_at()), (n % 3, n, None));
    }
    assert_eq!(receiver.counters().messages, 10_000);
    assert_eq!((receiver.counters().missed, receiver.counters().held), (0, 0));
}

/// Tags and gaps together: a receiver with a small backlog misses messages, and knows which.
#[test]
fn a_gap_and_a_tag_stand_before_the_same_message() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").max_backlog(1).open().unwrap();
    let mut sender = client.sender("c").slots(8).tags().times().header_size(8).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut next = 0;
    for round in 0..100u64 {
        for n in 10 * round..10 * round + 10 {
            let mut fbuf = sender.allocate_timeout(SOON).unwrap();
            fbuf.set_tag(n + 1).unwrap();
            fbuf.header_mut().copy_from_slice(&n.to_ne_bytes());
            sender.write(fbuf).unwrap();
        }
        while let Some(received) = receiver.try_get().unwrap() {
            assert_eq!(received.tag(), received.sequence() + 1);
            assert_eq!(received.header(), received.sequence().to_ne_bytes());
            assert!(received.sequence() >= next);
            next = received.sequence() + 1;
        }
    }
    sender.finish();
    assert!(receiver.get_timeout(SOON).is_err());
    let counters = receiver.counters();
    assert!(counters.missed > 0 && counters.missed + counters.messages == 1000, "{counters:?}");
}

#[test]
fn slots_begin_where_they_were_asked_to() {
    let (_broker, client) = broker();
    for align in [64, 128, 512, 4096] {
        for how in MECHANISMS {
            let mut receiver = receiver(&client, how);
            let mut sender = sender(&client, how).slot_size(300).align(align).header_size(8).open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            for _ in 0..8 {
                let mut fbuf = sender.allocate_timeout(SOON).unwrap();
                fbuf.set_len(300).unwrap();
                assert_eq!(fbuf.as_ptr() as usize % align, 0, "{how}");
                sender.write(fbuf).unwrap();
                let received = receiver.get_timeout(SOON).unwrap();
                assert_eq!(received.as_ptr() as usize % align, 0, "{how}");
            }
        }
    }
}

#[test]
fn what_was_kept_has_its_tag_and_header_and_gives_them_to_the_next() {
    let (_broker, client) = broker();
    for how in ["shared", "leased", "one-shot"] {
        let mut receiver = receiver(&client, how);
        let mut sender = sender(&client, how).header_size(HEADER).tags().open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.set_headroom(100).unwrap();
        fbuf.set_len(3).unwrap();
        fbuf.copy_from_slice(b"abc");
        fbuf.header_mut().copy_from_slice(&header(1));
        fbuf.set_tag(7).unwrap();
        let (_, retained) = sender.write_retained(fbuf).unwrap();
        assert_eq!((&retained[..], retained.tag(), retained.header()), (&b"abc"[..], 7, &header(1)[..]), "{how}");
        // While the receiver holds it, in another slot; and then in the same.
        for held in [true, false] {
            let received = receiver.get_timeout(SOON).unwrap();
            assert_eq!((&received[..], received.tag(), received.header()), (&b"abc"[..], 7, &header(1)[..]), "{how}");
            let received = held.then_some(received);
            let (_, retained) = {
                let mut fbuf = sender.allocate_timeout(SOON).unwrap();
                fbuf.set_len(3).unwrap();
                fbuf.copy_from_slice(b"abc");
                fbuf.header_mut().copy_from_slice(&header(1));
                fbuf.set_tag(7).unwrap();
                sender.write_retained(fbuf).unwrap()
            };
            drop(received);
            let fbuf = sender.make_mut(retained).unwrap();
            assert_eq!((&fbuf[..], fbuf.tag(), fbuf.header()), (&b"abc"[..], 7, &header(1)[..]), "{how}");
        }
    }
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    let (_broker, client) = broker();
    for (builder, words) in [
        (client.sender("c").header_size(65), "no user header can have 65 bytes"),
        (client.sender("c").align(96), "multiples of 96 bytes"),
        (client.sender("c").align(1 << 20), "multiples of 1048576 bytes"),
        (client.sender("c").align(0), "multiples of 0 bytes"),
        (client.sender("c").slot_size(usize::MAX), "18446744073709551615"),
        (client.sender("c").slot_size(usize::MAX - 62), "18446744073709551553"),
    ] {
        let error = builder.open().unwrap_err();
        assert!(matches!(error, OpenError::Geometry(_)) && error.to_string().contains(words), "{error}");
    }
    let mut sender = client.sender("c").slot_size(100).open().unwrap();
    let mut fbuf = sender.allocate_timeout(Duration::ZERO).unwrap();
    assert!(fbuf.header_mut().is_empty() && fbuf.header().is_empty());
    assert!(fbuf.set_tag(1).unwrap_err().to_string().contains("open it with tags"));
    fbuf.set_tag(0).unwrap();
    assert_eq!(fbuf.set_headroom(101).unwrap_err().asked, 101);
    fbuf.set_headroom(60).unwrap();
    assert_eq!(fbuf.set_len(41).unwrap_err().capacity, 40);
    fbuf.set_len(40).unwrap();
    assert_eq!(fbuf.set_headroom(61).unwrap_err().asked, 101);
    assert_eq!(fbuf.prepend(&[0; 61]).unwrap_err().headroom, 60);
    fbuf.prepend(&[7; 60]).unwrap();
    assert_eq!((fbuf.len(), fbuf.headroom(), fbuf.spare_mut().len()), (100, 0, 0));
    fbuf.trim_front(usize::MAX);
    assert_eq!((fbuf.len(), fbuf.headroom()), (0, 100));
}
