//! Slots that cannot be mapped for a while: each can be had again afterwards, and no message is lost that is there still.

use super::*;
use crate::{
    memory::{Leasable, Pages, available::without_memory},
    send::{fbuf::Fbuf, pool::Lack},
};

const SLOTS: u32 = 4;

fn geometry() -> Geometry {
    Geometry::new(4096, SLOTS.into()).unwrap()
}

/// Which side has made the slots.
#[derive(Debug, Clone, Copy)]
enum Owner {
    Sender,
    Receiver,
}

fn leased(owner: Owner) -> Pool {
    let Owner::Sender = owner else { return Pool::of_receiver(geometry(), wake()).unwrap() };
    let own = nix::unistd::geteuid().as_raw();
    let slots = (0..SLOTS).map(|_| Leasable::create("fbuf-test", 4096, false, own).unwrap().into()).collect();
    Pool::of_memory(geometry().into(), slots, Pages::Base, wake()).unwrap().0
}

/// Another receiver each time.
fn link_next(pool: &mut Pool, mechanism: Mechanism) -> Inbound {
    static ENDPOINTS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let endpoint = ENDPOINTS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let slots = match mechanism {
        Mechanism::OneShot => SlotSource::Segments,
        _ if pool.is_receivers() => SlotSource::FromReceiver,
        _ => SlotSource::FromBroker(pool.hand_over().unwrap()),
    };
    let inbound = link_with(Peer { endpoint, ..peer() }, pool, mechanism, slots, |_| {});
    pool.attend(pool.links().len() - 1).unwrap();
    inbound
}

/// Ends the link of a receiver that has gone.
fn unlink(pool: &mut Pool, inbound: Inbound) {
    drop(inbound);
    pool.notice_leaving();
    pool.end(0);
}

fn filled(pool: &mut Pool, content: u8) -> Fbuf {
    assert!(collect(pool), "a slot is lost: {:?}", pool.places());
    let mut fbuf = pool.allocate().unwrap();
    fbuf.set_len(8).unwrap();
    fbuf.fill(content);
    fbuf
}

/// All slots can be had at once, and each message that is sent then is read.
fn goes_on(pool: &mut Pool, inbound: &mut Inbound) {
    while inbound.take().is_some() {}
    assert!(!pool.lends(), "{:?}", pool.places());
    if pool.is_receivers() {
        pool.attend(0).unwrap();
    }
    let fbufs: Vec<_> = (0..SLOTS as u8).map(|content| filled(pool, content)).collect();
    for (content, fbuf) in (0..).zip(fbufs) {
        pool.send(fbuf).unwrap();
        assert_eq!(inbound.take().unwrap()[..], [content; 8]);
    }
    assert!(!pool.lends(), "{:?}", pool.places());
}

#[test]
fn a_leased_slot_that_could_not_be_mapped_once_is_tried_again() {
    for owner in [Owner::Sender, Owner::Receiver] {
        let mut pool = leased(owner);
        let mut inbound = link_next(&mut pool, Mechanism::Copy);
        for _ in 0..2 * SLOTS {
            assert!(!without_memory(|| collect(&mut pool)), "{owner:?}");
            assert!(matches!(pool.lack(), Some(Lack::Memory(_))), "{owner:?}: {:?}", pool.lack());
        }
        goes_on(&mut pool, &mut inbound);
    }
}

#[test]
fn a_leased_message_that_cannot_be_kept_comes_back_and_is_sent_to_nobody() {
    for owner in [Owner::Sender, Owner::Receiver] {
        let mut pool = leased(owner);
        let mut inbound = link_next(&mut pool, Mechanism::Copy);
        for content in 0..2 * SLOTS as u8 {
            let fbuf = filled(&mut pool, content);
            let (fbuf, error) = match without_memory(|| pool.send_and_keep(fbuf)) {
                Err(Unsent::NotKept { fbuf, error }) => (fbuf, error.to_string()),
                other => panic!("{owner:?}: {other:?}"),
            };
            assert!(error.contains("mmap") && error.contains("RLIMIT_AS"), "{error}");
            assert_eq!((&fbuf[..], pool.places().held, pool.lends()), (&[content; 8][..], 1, false), "{owner:?}");
            assert!(inbound.take().is_none(), "{owner:?}");
            if content % 2 == 0 {
                let (sent, kept) = pool.send_and_keep(fbuf).unwrap();
                assert_eq!((sent.receivers, &kept[..]), (1, &[content; 8][..]));
                assert_eq!(inbound.take().unwrap()[..], [content; 8]);
            }
            let _ = pool.attend(0);
        }
        goes_on(&mut pool, &mut inbound);
    }
}

#[test]
fn a_message_for_a_receiver_that_came_later_waits_until_the_slot_of_that_one_can_be_mapped() {
    let mut pool = leased(Owner::Receiver);
    let first = link_next(&mut pool, Mechanism::Copy);
    let mut fbuf = filled(&mut pool, 7);
    unlink(&mut pool, first);
    let mut inbound = link_next(&mut pool, Mechanism::Copy);
    for _ in 0..3 {
        let reason;
        (fbuf, reason) = match without_memory(|| pool.send(fbuf)) {
            Err(Unsent::NotPassed { fbuf, reason }) => (fbuf, reason),
            other => panic!("{other:?}"),
        };
        assert!(reason.contains("RLIMIT_AS"), "{reason}");
        assert_eq!(fbuf[..], [7; 8]);
    }
    pool.send(fbuf).unwrap();
    assert_eq!(inbound.take().unwrap()[..], [7; 8]);
    goes_on(&mut pool, &mut inbound);
}

/// The receiver has gone, unnoticed, and what was for it cannot be mapped to be written again.
#[test]
fn the_slot_of_a_message_that_is_lost_is_free() {
    for mechanism in [Mechanism::OneShot, Mechanism::Copy] {
        let mut pool = match mechanism {
            Mechanism::OneShot => Pool::of_one_shots(geometry(), SLOTS, wake()).unwrap(),
            _ => leased(Owner::Sender),
        };
        for content in 0..2 * SLOTS as u8 {
            let inbound = link_next(&mut pool, mechanism);
            let fbuf = filled(&mut pool, content);
            drop(inbound);
            let unsent = without_memory(|| pool.send(fbuf)).unwrap_err();
            assert!(matches!(unsent, Unsent::Lost), "{mechanism:?}: {unsent:?}");
            let places = pool.places();
            assert_eq!((places.held, places.lent), (0, 0), "{mechanism:?}: {places:?}");
            pool.end(0);
        }
        // The next message has the number of those, and this link takes it for lent.
        let mut inbound = link_next(&mut pool, mechanism);
        goes_on(&mut pool, &mut inbound);
    }
}

/// It is sealed before it is mapped to be read on, and there is no memory for a copy that could be written.
#[test]
fn a_one_shot_that_cannot_be_kept_is_sent_to_nobody_and_its_slot_is_free() {
    let mut pool = Pool::of_one_shots(geometry(), SLOTS, wake()).unwrap();
    let mut inbound = link_next(&mut pool, Mechanism::OneShot);
    for content in 0..2 * SLOTS as u8 {
        let fbuf = filled(&mut pool, content);
        let unsent = without_memory(|| pool.send_and_keep(fbuf)).map(drop).unwrap_err();
        assert!(matches!(unsent, Unsent::Lost), "{unsent:?}");
        assert!(inbound.take().is_none() && !pool.lends(), "{:?}", pool.places());
    }
    goes_on(&mut pool, &mut inbound);
}
