//! Writing again what was sent, and writing to what was received: pages are copied, and nobody else sees
//! anything of it.

mod support;

use std::io::Write;

use fbuf_broker::Embedded;
use fbuf_client::{Client, Mechanism, Receiver, Sender};
use support::SOON;

const MECHANISMS: [Mechanism; 3] = [Mechanism::Shared, Mechanism::Copy, Mechanism::OneShot];

fn pair(mechanism: Mechanism, slots: usize) -> (Embedded, Client, Sender, Receiver) {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(20_000).slots(slots).mechanism(mechanism).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (broker, client, sender, receiver)
}

fn fill(sender: &mut Sender, text: &[u8]) -> fbuf_client::Fbuf {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.write_all(text).unwrap();
    fbuf
}

#[test]
fn what_is_kept_can_be_read_and_its_slot_is_not_used_again() {
    for mechanism in MECHANISMS {
        let (_broker, _client, mut sender, mut receiver) = pair(mechanism, 3);
        let fbuf = fill(&mut sender, b"kept");
        let (sent, kept) = sender.write_retained(fbuf).unwrap();
        assert_eq!((sent.sequence, sent.receivers), (0, 1));
        assert_eq!(&receiver.get_timeout(SOON).unwrap()[..], b"kept");
        for n in 0..50u8 {
            let fbuf = fill(&mut sender, &[n; 100]);
            sender.write(fbuf).unwrap();
            assert_eq!(receiver.get_timeout(SOON).unwrap()[..], [n; 100]);
            assert_eq!(&kept[..], b"kept", "{mechanism}");
        }
        if mechanism != Mechanism::OneShot {
            assert_eq!(sender.counters().slots.free, 2);
            std::thread::spawn(move || drop(kept)).join().unwrap();
            assert_eq!(sender.counters().slots.free, 3);
            let all: Vec<_> = std::iter::from_fn(|| sender.try_allocate().unwrap()).collect();
            assert_eq!(all.len(), 3, "the slot was not given back");
        }
    }
}

#[test]
fn the_same_slot_is_written_again_if_all_have_handed_it_back() {
    for mechanism in [Mechanism::Shared, Mechanism::Copy] {
        let (_broker, client, mut sender, mut one) = pair(mechanism, 3);
        let mut two = client.receiver("c").open().unwrap();
        sender.wait_for_receivers_timeout(2, SOON).unwrap();
        let fbuf = fill(&mut sender, b"first");
        let place = fbuf.as_ptr();
        let (_, kept) = sender.write_retained(fbuf).unwrap();
        drop(one.get_timeout(SOON).unwrap());
        let held = two.get_timeout(SOON).unwrap();
        // One has it still: a copy, elsewhere.
        let mut fbuf = sender.make_mut(kept).unwrap();
        assert_ne!(fbuf.as_ptr(), place);
        assert_eq!(&fbuf[..], b"first");
        fbuf.copy_from_slice(b"other");
        assert_eq!(&held[..], b"first");
        let place = fbuf.as_ptr();
        let (_, kept) = sender.write_retained(fbuf).unwrap();
        drop((one.get_timeout(SOON).unwrap(), two.get_timeout(SOON).unwrap(), held));
        let fbuf = sender.make_mut(kept).unwrap();
        assert_eq!((fbuf.as_ptr(), &fbuf[..]), (place, &b"other"[..]), "nobody has it, so there is no need to copy");
        drop(fbuf);
        assert_eq!(sender.counters().slots.held, 0);
    }
}

#[test]
fn what_was_given_away_is_copied_and_a_full_pool_is_said_at_once() {
    let (_broker, _client, mut sender, mut receiver) = pair(Mechanism::OneShot, 2);
    let fbuf = fill(&mut sender, b"given");
    let (_, kept) = sender.write_retained(fbuf).unwrap();
    let held = receiver.get_timeout(SOON).unwrap();
    let mut fbuf = sender.make_mut(kept).unwrap();
    fbuf.copy_from_slice(b"taken");
    assert_eq!(&held[..], b"given");

    let (_broker, _client, mut sender, mut receiver) = pair(Mechanism::Shared, 1);
    let fbuf = fill(&mut sender, b"only");
    let (_, kept) = sender.write_retained(fbuf).unwrap();
    let held = receiver.get_timeout(SOON).unwrap();
    let kept = sender.make_mut(kept).unwrap_err();
    assert_eq!((&kept[..], &held[..]), (&b"only"[..], &b"only"[..]));
    drop(held);
    assert_eq!(&sender.make_mut(kept).unwrap()[..], b"only");
}

#[test]
fn what_is_kept_outlives_its_sender_and_is_not_kept_if_nobody_got_it() {
    let (_broker, client, mut sender, mut receiver) = pair(Mechanism::Shared, 2);
    let fbuf = fill(&mut sender, b"alone");
    let (_, kept) = sender.write_retained(fbuf).unwrap();
    drop(receiver.get_timeout(SOON).unwrap());
    drop((sender, receiver));
    assert_eq!(&kept[..], b"alone");

    let mut sender = client.sender("d").slot_size(100).slots(1).open().unwrap();
    let fbuf = fill(&mut sender, b"unsent");
    let fbuf = sender.write_retained(fbuf).unwrap_err().into_fbuf().unwrap();
    assert_eq!(&fbuf[..], b"unsent");
    drop(fbuf);
    assert!(sender.try_allocate().unwrap().is_some(), "the slot was lost");
    // What another sender has kept is only copied.
    assert_eq!(&sender.make_mut(kept).unwrap()[..], b"alone");
}

#[test]
fn a_private_view_is_written_and_nobody_sees_it() {
    for mechanism in MECHANISMS {
        let (_broker, client, mut sender, mut one) = pair(mechanism, 3);
        let mut two = client.receiver("c").open().unwrap();
        sender.wait_for_receivers_timeout(2, SOON).unwrap();
        // The second and third message begin in the middle of a page.
        for length in [20_000, 19_999, 1, 0, 4096] {
            let fbuf = fill(&mut sender, &vec![5; length]);
            let (_, kept) = sender.write_retained(fbuf).unwrap();
            let other = two.get_timeout(SOON).unwrap();
            let mut private = one.get_timeout(SOON).unwrap().into_private().unwrap();
            assert!(private.len() == length && private.iter().all(|&byte| byte == 5));
            assert_eq!(private.is_shared(), mechanism != Mechanism::Copy && length > 0);
            assert_eq!(private.is_intact(), mechanism != Mechanism::Shared);
            for place in (0..length).step_by(5000) {
                private[place] = 6;
            }
            let written = length.div_ceil(5000);
            assert_eq!(private.iter().filter(|&&byte| byte == 6).count(), written);
            assert!(kept.iter().chain(other.iter()).all(|&byte| byte == 5), "{mechanism}: it shows elsewhere");
            assert_eq!(private.sequence(), other.sequence());
            drop((kept, other));
            if mechanism != Mechanism::OneShot {
                assert_eq!(sender.counters().slots.lent, 1, "the view keeps its slot");
            }
            std::thread::spawn(move || drop(private)).join().unwrap();
            assert_eq!(sender.counters().slots.lent, 0);
        }
    }
}

#[test]
fn only_pages_that_are_written_are_copied() {
    let (_broker, _client, mut sender, mut receiver) = pair(Mechanism::Shared, 1);
    let fbuf = fill(&mut sender, &[1; 20_000]);
    sender.write(fbuf).unwrap();
    let mut private = receiver.get_timeout(SOON).unwrap().into_private().unwrap();
    let start = private.as_ptr() as usize;
    let own = |start: usize| -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begin = format!("{:x}-", start / 4096 * 4096);
        let lines = maps.lines().skip_while(|line| !line.starts_with(&begin)).skip(1);
        let line = lines.take(30).find(|line| line.starts_with("Anonymous:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(private.iter().all(|&byte| byte == 1));
    assert_eq!(own(start), 0, "reading copies nothing");
    private[10_000] = 2;
    assert_eq!(own(start), 4, "one page, in KiB");
    private[0] = 2;
    assert_eq!(own(start), 8);
}
