//! Both halves of a link, each with a peer whose memory and socket are in the hands of a fuzzer.

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use fbuf_core::{
    introduced::{Introduced, Introduction},
    memory::{Leasable, Map, Pages, Reserved},
    peer::{Credentials, LinkId, Peer},
    protection::Mechanism,
    receive::link::{Answered, Greeted, SlotSource},
    send::{
        link::{Arrived, Expected},
        pool::Pool,
    },
    slot::Geometry,
    socket::{
        PacketSocket,
        link_message::{LinkEnd, NewSegment},
        wire::{self, Descriptor},
    },
};
use fbuf_protocol::Secret;
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        eventfd::EventFd,
        memfd::{MFdFlags, memfd_create},
    },
    unistd::{ftruncate, geteuid},
};

/// How many slots a sender has.
pub const SLOTS: u32 = 4;
/// The bytes of one: fewer than lie between the beginnings of two.
pub const SLOT_BYTES: u32 = 100;

/// The slots of all senders.
#[must_use]
pub fn geometry() -> Geometry {
    Geometry::new(SLOT_BYTES.into(), SLOTS.into()).expect("it is allowed")
}

/// The process at the other end: of the same user or not, trusted or not.
#[must_use]
pub fn peer(same_user: bool, trusted: bool) -> Peer {
    let own = geteuid().as_raw();
    let uid = if same_user { own } else { own.wrapping_add(1) };
    Peer::new(1, Credentials::new(1, uid, uid)).with_same_user(same_user).with_trusted(same_user || trusted)
}

/// A link that the broker introduces: this end of it, and the other.
///
/// # Panics
/// There are no descriptors left.
#[must_use]
pub fn introduced(
    peer: Peer,
    geometry: Geometry,
    mechanism: Mechanism,
    slot_source: SlotSource,
) -> (Introduced, PacketSocket) {
    let (socket, other) = PacketSocket::pair().expect("few descriptors are open");
    let socket = Descriptor::from(socket);
    let introduction = Introduction { endpoint: 1, peer, geometry: geometry.terms(), mechanism, slot_source, socket };
    // SAFETY: what is fuzzed is the peer; it is the broker that speaks here, and keeps no descriptor.
    #[expect(unsafe_code, reason = "this is the broker")]
    let introduced = unsafe { introduction.assume_genuine() };
    let other = PacketSocket::new(other).expect("a socket can be made non-blocking");
    (introduced.expect("the slots can be, and few descriptors are open"), other)
}

/// A pool of slots that are leased.
///
/// # Panics
/// There is no memory.
#[must_use]
pub fn leased() -> Pool {
    let memory = rooms().into_iter().map(|room| room.into_owned().expect("few descriptors are open"));
    // SAFETY: they were just made, and nothing else has them.
    #[expect(unsafe_code, reason = "this is the broker")]
    let made = unsafe { Pool::of_leases(geometry(), memory.collect(), Pages::Base, wake()) };
    made.expect("there is memory").0
}

/// One of a few secrets.
#[must_use]
pub fn secret(number: u8) -> Secret {
    wire::decode(&[number; 16], Vec::new()).expect("any 16 bytes are one")
}

/// One of a few links.
#[must_use]
pub fn link(number: u8) -> LinkId {
    LinkId::from_bits(number.into())
}

/// A pool with so many slots to start with, all of which are free.
#[must_use]
pub fn pool(slots: u32) -> Pool {
    Pool::new(geometry(), slots, wake()).expect("there is memory")
}

/// What a pool is told to wake.
#[must_use]
pub fn wake() -> Arc<EventFd> {
    Arc::new(EventFd::new().expect("few descriptors are open"))
}

/// The head word of an entry of a lane, as `lane.rs` has it.
#[must_use]
pub fn head_of(position: u64, kind: u64, slot: u64) -> u64 {
    (position << 4 | kind & 15) << 20 | slot & 0xf_ffff
}

/// The byte of which the slot with this number is full, and nothing else is.
#[must_use]
pub fn content(slot: u32) -> u8 {
    slot as u8 + 1
}

/// Segments with all slots, each full of its [`content`].
#[must_use]
pub fn segments() -> Vec<NewSegment> {
    let mut pool = pool(SLOTS);
    assert!(pool.collect(SLOTS), "a slot of a fresh pool is not free");
    for number in 0..SLOTS {
        let mut fbuf = pool.allocate().expect("it is free");
        fbuf.set_len(SLOT_BYTES as usize).expect("it is that large");
        fbuf.fill(content(number));
    }
    pool.announce(0).collect()
}

/// Slots that are memory of their own, each full of its [`content`], with all pages and nobody who writes them.
#[must_use]
pub fn rooms() -> Vec<Descriptor> {
    let room = |number| {
        let memory = Leasable::create("fbuf-fuzz", SLOT_BYTES.into(), false, geteuid().as_raw()).expect("it is ours");
        // Which has all of its one page exist, and is faster than to reserve it.
        fill(memory.open_writer().expect("it is ours"), content(number));
        Descriptor::from(OwnedFd::from(memory))
    };
    (0..SLOTS).map(room).collect()
}

/// A message that is memory of its own, full of a byte.
#[must_use]
pub fn shot(byte: u8) -> OwnedFd {
    let memory = Reserved::new("fbuf-fuzz", geometry().segment_bytes(1)).expect("there is memory");
    fill(memory.as_fd().try_clone_to_owned().expect("few descriptors are open"), byte);
    memory.seal_for_good().expect("it is mapped nowhere")
}

fn fill(memory: OwnedFd, byte: u8) {
    File::from(memory).write_all_at(&[byte; SLOT_BYTES as usize], 0).expect("it is open for writing");
}

/// Of the choices of [`slot_source`], one that suits messages that are protected like this.
#[must_use]
pub fn lodged(mechanism: Mechanism, choice: u8) -> u8 {
    match mechanism {
        Mechanism::OneShot => 0,
        Mechanism::Lease => choice.max(1),
        _ => choice,
    }
}

/// Where an honest broker has a sender's slots be.
#[must_use]
pub fn slot_source(choice: u8) -> SlotSource {
    match choice % 4 {
        0 => SlotSource::Segments,
        1 => SlotSource::FromBroker(rooms()),
        2 => SlotSource::FromReceiver,
        _ => SlotSource::FromSender,
    }
}

/// Memory of this size, with these seals, and without a page.
#[must_use]
pub fn sealed(size: u64, seals: SealFlag) -> OwnedFd {
    let memory = sealable(size);
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).expect("it can be sealed");
    memory
}

/// The same, full of a byte.
#[must_use]
pub fn filled(size: u64, byte: u8, seals: SealFlag) -> OwnedFd {
    let memory = File::from(sealable(size));
    memory.write_all_at(&vec![byte; size as usize], 0).expect("it has no seals yet");
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).expect("it can be sealed");
    memory.into()
}

fn sealable(size: u64) -> OwnedFd {
    let memory = memfd_create("fbuf-fuzz", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC);
    let memory = memory.expect("few descriptors are open");
    ftruncate(&memory, size as i64).expect("it has no seals yet");
    memory
}

/// Something that a peer can send as a descriptor. `size` is how many bytes memory has.
#[must_use]
pub fn descriptor(kind: u8, size: u64) -> OwnedFd {
    let reserved = || Reserved::new("fbuf-fuzz", size).expect("there is memory");
    let leasable = || Leasable::create("fbuf-fuzz", size, false, geteuid().as_raw()).expect("it is ours");
    match kind % 9 {
        0 => File::open("/dev/null").expect("it is always there").into(),
        1 => nix::unistd::pipe().expect("few descriptors are open").0,
        2 => PacketSocket::pair().expect("few descriptors are open").0,
        3 => File::open("/proc/self/exe").expect("it is running").into(),
        4 => reserved().as_fd().try_clone_to_owned().expect("few descriptors are open"),
        5 => Map::create("fbuf-fuzz", size).expect("there is memory").1,
        6 => reserved().seal_for_good().expect("it is mapped nowhere"),
        7 => leasable().open_writer().expect("it is ours"),
        _ => leasable().into(),
    }
}

/// The number that the next descriptor will have: as long as it stays the same, all others are closed again.
#[must_use]
pub fn next_descriptor() -> i32 {
    File::open("/dev/null").expect("few descriptors are open").as_raw_fd()
}

/// How long other threads may take to close what earlier links have left.
const PATIENCE: Duration = Duration::from_secs(5);

/// Greets a sender, as soon as not too many descriptors are under way to its user.
///
/// # Panics
/// It cannot be greeted.
#[must_use]
pub fn greet(introduced: Introduced, skip_above: Option<u32>) -> Greeted {
    let start = Instant::now();
    let mut greeted = introduced.greet(skip_above).expect("it is there");
    while greeted.is_unsaid() {
        assert!(start.elapsed() < PATIENCE, "what is under way to links that are gone counts for ever");
        thread::yield_now();
        greeted = match greeted.look() {
            Ok(Answered::NotYet(greeted)) => *greeted,
            other => panic!("nothing was sent: {other:?}"),
        };
    }
    greeted
}

/// Looks at a receiver that was expected, and answers it as soon as not too many descriptors are under way to its user.
///
/// # Errors
/// There will be no link.
///
/// # Panics
/// It cannot be answered.
pub fn answer(pool: &mut Pool, mut expected: Expected) -> Result<Arrived, LinkEnd> {
    let start = Instant::now();
    loop {
        expected = match pool.link(expected)? {
            Arrived::NotYet(expected) if expected.is_unanswered() => expected,
            other => return Ok(other),
        };
        assert!(start.elapsed() < PATIENCE, "what is under way to links that are gone counts for ever");
        thread::yield_now();
    }
}

/// Whether that is no higher than the [number](next_descriptor) that it was before. Some are closed by other threads.
#[must_use]
pub fn all_are_closed(before: i32) -> bool {
    let start = Instant::now();
    while next_descriptor() > before {
        if start.elapsed() > PATIENCE {
            return false;
        }
        // What a link has left under way stays open until another one is closed, when the peer is gone.
        drop(introduced(peer(false, false), geometry(), Mechanism::Shared, SlotSource::Segments));
        thread::yield_now();
    }
    true
}
