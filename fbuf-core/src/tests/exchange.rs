//! Both halves of a link, honest, in one process: what any caller of this crate can do to a message that a receiver
//! holds, through whatever safe function, is nothing.

use std::sync::Arc;

use nix::{sys::eventfd::EventFd, unistd::geteuid};

use crate::{
    memory::{Leasable, Pages},
    peer::{Credentials, Peer},
    protection::Mechanism,
    receive::{
        link::{Answered, Greeted, Inbound, SlotSource},
        received::Received,
    },
    send::{
        link::{Arrived, Expected},
        pool::{Extras, Format, Places, Pool},
    },
    slot::Geometry,
    socket::{PacketSocket, link_message::LinkEnd},
};

fn geometry(slots: u64) -> Geometry {
    Geometry::new(64, slots).unwrap()
}

pub(crate) fn pool(slots: u32) -> Pool {
    Pool::new(geometry(slots.into()), slots, Arc::new(EventFd::new().unwrap())).unwrap()
}

/// Links a receiver, which skips if it holds more than so many.
pub(crate) fn link(pool: &mut Pool, skip_above: Option<u32>) -> Inbound {
    link_by(pool, Mechanism::Shared, SlotSource::Segments, skip_above)
}

/// Links this receiver.
pub(crate) fn link_with(pool: &mut Pool, peer: Peer) -> Inbound {
    link_peer(pool, peer, Mechanism::Shared, SlotSource::Segments, None)
}

fn link_by(pool: &mut Pool, mechanism: Mechanism, slot_source: SlotSource, skip_above: Option<u32>) -> Inbound {
    let peer = Peer {
        endpoint: 1,
        process: Credentials { pid: 1, uid: 1, gid: 1 },
        same_user: true,
        trusted: true,
        link: crate::peer::LinkId::default(),
    };
    link_peer(pool, peer, mechanism, slot_source, skip_above)
}

fn link_peer(
    pool: &mut Pool,
    peer: Peer,
    mechanism: Mechanism,
    slot_source: SlotSource,
    skip_above: Option<u32>,
) -> Inbound {
    let (its, own) = PacketSocket::pair().unwrap();
    let (its, own) = (PacketSocket::new(its).unwrap(), PacketSocket::new(own).unwrap());
    let greeted = Greeted::new(peer, its, pool.geometry(), mechanism, slot_source, skip_above).unwrap();
    let Ok(Arrived::Here) = pool.link(Expected::new(peer, own)) else { panic!("an honest hello was refused") };
    let Ok(Answered::Open(inbound)) = greeted.look() else { panic!("an honest welcome was refused") };
    *inbound
}

/// Looks for free slots by each of the ways there are.
fn find(pool: &mut Pool) -> bool {
    pool.notice_leaving();
    pool.collect(64) || pool.search() && pool.collect(64) || pool.search_all() && pool.collect(64)
}

/// Sends a message that is full of a byte, and receives it.
fn exchange(pool: &mut Pool, inbound: &mut Inbound, byte: u8) -> Received {
    send(pool, byte);
    let received = inbound.take().expect("nothing came");
    assert_eq!(&received[..], [byte; 64]);
    received
}

pub(crate) fn send(pool: &mut Pool, byte: u8) {
    assert!(find(pool), "no slot is free");
    let mut fbuf = pool.allocate().unwrap();
    fbuf.set_len(64).unwrap();
    fbuf.fill(byte);
    if let Err(fbuf) = pool.send_fast(fbuf) {
        pool.send(fbuf).unwrap();
    }
}

#[test]
fn a_slot_that_is_held_is_not_handed_out() {
    let mut pool = pool(1);
    let mut inbound = link(&mut pool, None);
    for byte in 0..3 {
        let received = exchange(&mut pool, &mut inbound, byte);
        assert!(!find(&mut pool), "a slot was handed out that a receiver holds");
        assert_eq!(pool.places(), Places { free: 0, held: 0, lent: 1 });
        drop(received);
    }
    assert!(find(&mut pool));
}

#[test]
fn a_slot_is_held_for_as_long_as_any_of_several_receivers_holds_it() {
    let mut pool = pool(1);
    let mut inbounds = [link(&mut pool, None), link(&mut pool, None), link(&mut pool, Some(8))];
    for byte in 0..3 {
        send(&mut pool, byte);
        for inbound in &mut inbounds {
            assert!(!find(&mut pool), "a slot was handed out that a receiver is yet to take");
            let received = inbound.take().unwrap();
            assert!(!find(&mut pool), "a slot was handed out that a receiver holds");
            assert_eq!(&received[..], [byte; 64]);
        }
        inbounds.rotate_left(1);
    }
    assert!(find(&mut pool));
}

#[test]
fn a_round_takes_so_many_messages_with_their_tags() {
    let format = Format { geometry: geometry(4), extras: Extras { tags: true, ..Extras::default() } };
    let mut pool = Pool::new(format, 4, Arc::new(EventFd::new().unwrap())).unwrap();
    let mut inbound = link(&mut pool, None);
    for tag in [7, 0, 9, 5] {
        assert!(find(&mut pool), "no slot is free");
        let mut fbuf = pool.allocate().unwrap();
        fbuf.set_tag(tag).unwrap();
        if let Err(fbuf) = pool.send_fast(fbuf) {
            pool.send(fbuf).unwrap();
        }
    }
    assert!(inbound.take_fast().is_none(), "there is no round yet");
    inbound.begin_round(3);
    let taken: Vec<_> = std::iter::from_fn(|| inbound.take_fast()).collect();
    let seen = |received: &Received| (received.sequence(), received.tag());
    assert_eq!(taken.iter().map(seen).collect::<Vec<_>>(), [(0, 7), (1, 0), (2, 9)]);
    assert_eq!((inbound.left_of_round(), inbound.entries()), (0, 3));
    assert_eq!(seen(&inbound.take().unwrap()), (3, 5));
}

/// A slot that is memory of its own is used again as soon as nobody reads it.
#[test]
#[cfg_attr(miri, ignore = "it leases memory, and Miri has no such calls")]
fn what_is_sent_after_a_link_has_ended_is_not_taken_for_what_was_sent_over_it() {
    for mechanism in [Mechanism::Lease, Mechanism::Copy] {
        for disconnects in [false, true] {
            let slot = Leasable::create("fbuf-test", 64, false, geteuid().as_raw()).unwrap();
            let wake = Arc::new(EventFd::new().unwrap());
            let (mut pool, _) = Pool::of_memory(geometry(1).into(), vec![slot.into()], Pages::Base, wake).unwrap();
            let link =
                |pool: &mut Pool| link_by(pool, mechanism, SlotSource::FromBroker(pool.hand_over().unwrap()), None);
            let mut inbound = link(&mut pool);
            // The control: it takes what it is sent.
            assert_eq!(&exchange(&mut pool, &mut inbound, 1)[..], [1; 64]);
            send(&mut pool, 2);
            if disconnects {
                pool.disconnect(0);
            } else {
                pool.end(0);
            }
            let mut other = link(&mut pool);
            assert_eq!(&exchange(&mut pool, &mut other, 3)[..], [3; 64]);
            let taken = inbound.take();
            assert!(taken.is_none(), "message 2 is {:?}: {mechanism:?}", taken.map(|message| message[0]));
            assert!(inbound.is_over() && matches!(inbound.end(), Err(LinkEnd::Disconnected)), "{mechanism:?}");
        }
    }
}

#[test]
fn a_link_that_is_ended_while_its_receiver_reads_keeps_what_that_has() {
    let mut pool = pool(3);
    let mut inbound = link(&mut pool, None);
    let one = exchange(&mut pool, &mut inbound, 1);
    send(&mut pool, 2);
    pool.end(0);
    assert!(pool.links().is_empty() && pool.is_blocked());
    assert_eq!(pool.places(), Places { free: 1, held: 0, lent: 2 });
    let other = inbound.take().unwrap();
    assert!(inbound.take().is_none() && inbound.is_over(), "it was not told of the end");
    // The third slot is free, and the only one.
    let free = find(&mut pool).then(|| pool.allocate()).flatten().unwrap();
    assert!(!find(&mut pool), "a slot was handed out that a receiver holds");
    assert_eq!((&one[..], &other[..]), (&[1; 64][..], &[2; 64][..]));
    drop((one, other));
    assert!(find(&mut pool), "slots that were handed back are lent for ever");
    drop(free);
    assert!(pool.search_all() && !pool.is_blocked());
    assert_eq!(pool.places(), Places { free: 3, held: 0, lent: 0 });
}

#[test]
fn a_receiver_that_hung_up_has_nothing_any_more_although_its_link_was_ended_before() {
    let mut pool = pool(2);
    let mut inbound = link(&mut pool, None);
    let received = exchange(&mut pool, &mut inbound, 1);
    send(&mut pool, 2);
    pool.end(0);
    // What was taken stays; what was not goes.
    drop(inbound);
    assert_eq!(pool.places().lent, 2);
    assert!(find(&mut pool));
    assert_eq!((pool.places().lent, &received[..]), (1, &[1; 64][..]));
    drop(received);
    assert!(pool.search_all());
    assert_eq!(pool.places(), Places { free: 2, held: 0, lent: 0 });
}

#[test]
fn each_slot_is_counted_once_while_receivers_hand_back() {
    // Miri would take minutes.
    const SLOTS: usize = if cfg!(miri) { 4 } else { 64 };
    const ROUNDS: usize = if cfg!(miri) { 2 } else { 200 };
    let mut pool = pool(SLOTS as u32);
    let mut inbound = link(&mut pool, None);
    let mut between = 0;
    for _ in 0..ROUNDS {
        let keep = |pool: &mut Pool| {
            assert!(find(pool), "no slot is free");
            let fbuf = pool.allocate().unwrap();
            pool.send_and_keep(fbuf).unwrap().1
        };
        let kept: Vec<_> = (0..SLOTS).map(|_| keep(&mut pool)).collect();
        let received: Vec<_> = std::iter::from_fn(|| inbound.take()).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(received));
            loop {
                let Places { free, held, lent } = pool.places();
                assert_eq!((free, held + lent), (0, SLOTS));
                between += usize::from(lent > 0 && held > 0);
                if lent == 0 {
                    break;
                }
            }
        });
        drop(kept);
    }
    // On a machine that is busy elsewhere, few of the looks fall into that time.
    assert!(between > 0 || cfg!(miri), "no look was taken while messages were handed back");
}

#[test]
fn what_is_kept_is_not_handed_out_and_not_written_while_it_is_read() {
    let mut pool = pool(1);
    let mut inbound = link(&mut pool, None);
    assert!(find(&mut pool));
    let mut fbuf = pool.allocate().unwrap();
    fbuf.set_len(64).unwrap();
    fbuf.fill(1);
    let (_, retained) = pool.send_and_keep(fbuf).unwrap();
    let received = inbound.take().unwrap();
    let retained = pool.rewrite(retained).unwrap_err();
    drop(received);
    assert!(!find(&mut pool), "a slot was handed out that its sender reads");
    assert_eq!(&retained[..], [1; 64]);
    let mut fbuf = pool.rewrite(retained).unwrap();
    fbuf[0] = 2;
    assert!(!find(&mut pool));
    drop(fbuf);
    assert!(find(&mut pool));
}

#[test]
fn every_message_has_a_number_of_its_own_although_some_were_not_sent() {
    let mut pool = pool(4);
    assert!(pool.collect(4));
    let unsent = pool.allocate().unwrap();
    assert!(pool.send(unsent).is_err());
    let mut inbound = link(&mut pool, None);
    for sequence in 0..if cfg!(miri) { 10 } else { 100 } {
        let received = exchange(&mut pool, &mut inbound, sequence as u8);
        assert_eq!((received.sequence(), pool.next_sequence()), (sequence, sequence + 1));
    }
    pool.close(None);
    let unsent = find(&mut pool).then(|| pool.allocate()).flatten().unwrap();
    assert!(pool.send(unsent).is_err(), "a message was sent behind the end");
    assert!(inbound.take().is_none() && inbound.is_over() && matches!(inbound.end(), Ok(None)));
}

#[test]
fn what_is_held_stays_readable_on_other_threads_after_both_ends_are_gone() {
    let mut pool = pool(4);
    let mut inbound = link(&mut pool, None);
    let received: Vec<_> = (0..3).map(|byte| exchange(&mut pool, &mut inbound, byte)).collect();
    assert!(find(&mut pool));
    let mut fbuf = pool.allocate().unwrap();
    drop(pool);
    let holders: Vec<_> = received
        .into_iter()
        .zip(0..)
        .map(|(received, byte)| std::thread::spawn(move || assert_eq!(&received[..], [byte; 64])))
        .collect();
    // While they let go.
    drop(inbound);
    holders.into_iter().for_each(|holder| holder.join().unwrap());
    fbuf.set_len(64).unwrap();
    fbuf.fill(9);
    std::thread::spawn(move || drop(fbuf)).join().unwrap();
}

#[test]
fn threads_hand_back_while_the_sender_writes_what_they_handed_back_before() {
    let mut pool = pool(2);
    let mut inbound = link(&mut pool, None);
    let (to_holder, messages) = std::sync::mpsc::channel::<(Received, u8)>();
    let holder = std::thread::spawn(move || {
        for (received, byte) in messages {
            assert_eq!(&received[..], [byte; 64]);
        }
    });
    for byte in 0..if cfg!(miri) { 8 } else { 200 } {
        while !find(&mut pool) {
            std::thread::yield_now();
        }
        to_holder.send((exchange(&mut pool, &mut inbound, byte), byte)).unwrap();
    }
    drop(to_holder);
    holder.join().unwrap();
}

#[test]
fn a_message_is_copied_whatever_its_length_and_where_it_begins() {
    let mut pool = pool(1);
    let mut inbound = link(&mut pool, None);
    for length in [0, 1, 7, 8, 9, 63, 64] {
        assert!(find(&mut pool));
        let mut fbuf = pool.allocate().unwrap();
        fbuf.set_len(length).unwrap();
        fbuf.iter_mut().zip(1..).for_each(|(byte, value)| *byte = value);
        pool.send(fbuf).unwrap();
        let received = inbound.take().unwrap();
        let mut copy = vec![0; length];
        received.copy_to_slice(&mut copy);
        assert_eq!(copy, &received[..]);
    }
}
