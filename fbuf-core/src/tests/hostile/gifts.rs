//! Memory that a peer could change: what a sender takes of a receiver that makes its slots, and how a receiver reads what
//! a sender could write.

use crate::ring::entry::{LaneFormat, capacity_for};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};

use super::*;
use crate::violation::Unsuitable;

/// A sender with slots of its receiver, linked with such a receiver that is trusted or not.
pub(super) fn sender_of_receivers_slots(peer: Peer) -> Result<(Pool, PacketSocket), LinkEnd> {
    let (own, its) = sockets();
    let mut pool = Pool::of_receiver(geometry(), Arc::new(EventFd::new().unwrap())).unwrap();
    let (_board, descriptor) = BoardTable::create("fbuf-test", SLOTS as usize).unwrap();
    let hello = Hello { board: descriptor.into(), skip_above: None, fences: false, wants_slots: false };
    own.send(&wire::encode(&LinkMessage::Hello(hello)).unwrap()).unwrap();
    let Arrived::Here = pool.link(Expected::new(peer, its))? else { panic!("it has come") };
    Ok((pool, own))
}

#[test]
fn slots_of_a_receiver_that_is_not_trusted_are_not_used() {
    let untrusted = Peer { trusted: false, ..peer() };
    let refused = sender_of_receivers_slots(untrusted).map(drop).unwrap_err();
    assert!(matches!(refused, LinkEnd::Violation(Violation::UntrustedReceiver)), "{refused:?}");
    for trusted in [peer(), Peer { trusted: false, same_user: true, ..peer() }] {
        assert!(sender_of_receivers_slots(trusted).is_ok());
    }
}

#[test]
fn messages_that_an_untrusted_sender_could_change_are_copied_whatever_the_broker_says() {
    for (trusted, expected) in [(true, Mechanism::Shared), (false, Mechanism::Copy)] {
        let (own, its) = sockets();
        let peer = Peer { trusted, ..peer() };
        let greeted = Greeted::new(peer, its, geometry(), Mechanism::Shared, SlotSource::Segments, None).unwrap();
        let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(SLOTS, LaneFormat::PLAIN)).unwrap();
        let mut pool = Pool::new(geometry(), SLOTS, Arc::new(EventFd::new().unwrap())).unwrap();
        let segments = pool.announce(0).collect();
        let welcome =
            Welcome { lane: lane_fd.into(), format: LaneFormat::PLAIN, first_sequence: 0, segments, slots: Vec::new() };
        own.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap()).unwrap();
        let Ok(Answered::Open(mut inbound)) = greeted.look() else { panic!("an honest welcome was refused") };
        assert!(pool.collect(1));
        let mut fbuf = pool.allocate().unwrap();
        fbuf.set_len(1).unwrap();
        LaneWriter::new(lane, LaneFormat::PLAIN).message(SlotId::new(0), 1);
        let received = inbound.take().unwrap();
        assert_eq!(received.mechanism(), expected);
        fbuf[0] = 1;
        assert_eq!(received[0], u8::from(trusted), "whether what the sender does now shows");
    }
}

/// A slot as a receiver makes it, of so many bytes: to write it, and to read it.
fn given(size: u64, huge: bool) -> (OwnedFd, OwnedFd) {
    let memory = Leasable::create("fbuf-test", size, huge, geteuid().as_raw()).unwrap();
    memory.reserve(Pages::Base).unwrap();
    (memory.open_writer().unwrap(), memory.into())
}

/// What a sender makes of a slot that such a receiver gives: whether it can be allocated.
fn give_to(peer: Peer, (writer, reader): (OwnedFd, OwnedFd)) -> Result<bool, Violation> {
    let (mut pool, socket) = sender_of_receivers_slots(peer).unwrap();
    let right = WriteGrant { slot: 0, writer: writer.into(), reader: Some(reader.into()) };
    socket.send(&wire::encode(&LinkMessage::WriteGrant(right)).unwrap()).unwrap();
    match pool.attend(0) {
        Ok(()) => Ok(pool.search()),
        Err(LinkEnd::Violation(violation)) => Err(violation),
        Err(end) => panic!("{end:?}"),
    }
}

#[test]
fn a_slot_that_is_given_is_one_memory_exactly_as_large_as_it_should_be() {
    let slot = || given(SLOT_BYTES.into(), false);
    let sealed = |seals| {
        let memory = Reserved::new("fbuf-test", 4096).unwrap().as_fd().try_clone_to_owned().unwrap();
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        (memory.try_clone().unwrap(), memory)
    };
    let (shrink, grow, seal) = (SealFlag::F_SEAL_SHRINK, SealFlag::F_SEAL_GROW, SealFlag::F_SEAL_SEAL);
    let punched = {
        let (writer, reader) = slot();
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&writer, hole, 0, 4096).unwrap();
        (writer, reader)
    };
    let sparse = {
        let memory = Leasable::create("fbuf-test", 4096, false, geteuid().as_raw()).unwrap();
        (memory.open_writer().unwrap(), memory.into())
    };
    let give = |memory| give_to(peer(), memory);
    assert_eq!(give(slot()), Ok(true), "what a receiver makes in order is not taken");
    let bad = [
        ("two memories", (slot().0, slot().1), Unsuitable::OtherMemory),
        ("more than was asked for", given(8192, false), Unsuitable::Size { found: 8192, wanted: 4096 }),
        ("a hole", punched, Unsuitable::Holes { reserved: 0, size: 4096 }),
        ("no page", sparse, Unsuitable::Holes { reserved: 0, size: 4096 }),
        ("room for more seals", sealed(shrink | grow), Unsuitable::Seals { found: 6, wanted: 7 }),
        (
            "a seal against writing",
            sealed(shrink | grow | seal | SealFlag::F_SEAL_FUTURE_WRITE),
            Unsuitable::Seals { found: 0x17, wanted: 7 },
        ),
        ("a file", (Kind::Regular.make(), Kind::Regular.make()), Unsuitable::NotSealable),
    ];
    for (name, memory, expected) in bad {
        assert_eq!(give(memory), Err(Violation::Descriptor(expected)), "{name}");
    }
    let (_, reader) = slot();
    let only_read = (reader.try_clone().unwrap(), reader);
    assert_eq!(give(only_read), Err(Violation::Descriptor(Unsuitable::NotOpenFor { purpose: "writing" })));
}

/// Two fbufs over the same bytes would be two `&mut [u8]` of them.
#[test]
fn memory_that_is_given_for_one_slot_is_not_taken_for_another() {
    let give = |shared| {
        let (mut pool, socket) = sender_of_receivers_slots(peer()).unwrap();
        let (writer, reader) = given(SLOT_BYTES.into(), false);
        let again = (writer.try_clone().unwrap(), reader.try_clone().unwrap());
        let other = if shared { again } else { given(SLOT_BYTES.into(), false) };
        for (slot, (writer, reader)) in (0..).zip([(writer, reader), other]) {
            let right = WriteGrant { slot, writer: writer.into(), reader: Some(reader.into()) };
            socket.send(&wire::encode(&LinkMessage::WriteGrant(right)).unwrap()).unwrap();
        }
        let attended = pool.attend(0);
        let one = || (pool.search() && pool.collect(1)).then(|| pool.allocate()).flatten();
        let fbufs: Vec<_> = std::iter::from_fn(one).collect();
        (fbufs.len(), attended.is_ok())
    };
    // The control: memory of its own is.
    assert_eq!((give(false), give(true)), ((2, true), (1, false)));
}

#[test]
fn huge_pages_of_another_user_are_not_taken_in_either_descriptor() {
    let memory = || Leasable::create("fbuf-test", SLOT_BYTES.into(), true, geteuid().as_raw());
    let Ok(huge) = memory() else { return println!("not tested: this kernel has no huge pages to set aside") };
    let writer = || huge.open_writer().unwrap();
    // None of their pages need exist: that they are huge is noticed before.
    assert_eq!(give_to(peer(), (writer(), writer())), Err(Violation::Descriptor(Unsuitable::Removable)));
    let (small, _) = given(SLOT_BYTES.into(), false);
    assert_eq!(give_to(peer(), (small, writer())), Err(Violation::Descriptor(Unsuitable::OtherMemory)));
    let own = Peer { same_user: true, ..peer() };
    let without_pages = Unsuitable::Holes { reserved: 0, size: 2 << 20 };
    assert_eq!(give_to(own, (writer(), writer())), Err(Violation::Descriptor(without_pages)), "one's own are taken");
}
