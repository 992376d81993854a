//! Clients that speak to the broker in order and to their peers out of order: their link ends, with a
//! name for what they did, and their neighbours go on.

#[path = "support/hostile.rs"]
mod client;
mod support;

use std::{
    env,
    io::{Read, Write},
    os::fd::OwnedFd,
    time::Duration,
};

use client::Hostile;
use fbuf_broker::{Embedded, Policy};
use fbuf_client::{Address, Client, ConnectError, DisconnectReason, GetError, Receiver, Unsuitable, Violation};
use fbuf_core::{
    memory::{Map, Reserved},
    protection::{Mechanism, Protection},
    ring::{
        entry::{LaneFormat, capacity_for},
        lane::{LaneTable, LaneWriter},
    },
    slot::SlotId,
    socket::{
        PacketSocket,
        link_message::{Hello, LinkMessage, NewSegment, Welcome},
        wire::{Descriptor, Letter},
    },
};
use fbuf_protocol::{Greeting, Limits, Role, Slots, VERSION, Verdict};
use nix::unistd::geteuid;
use support::{
    Memory, SOON, is_root,
    role::{Other, roles},
};

/// What a hostile client does, and how it is called.
type Attack<'a> = (&'static str, Box<dyn Fn(&Hostile) + 'a>);

const SENDER: Role = Role::sender(100, 4, Mechanism::Shared, Slots::Segments);

fn sealed(size: u64) -> Descriptor {
    Map::create("fbuf-test", size).unwrap().1.into()
}

fn unsealed(size: u64) -> Descriptor {
    let memory = Reserved::new("fbuf-test", size).unwrap();
    std::os::fd::AsFd::as_fd(&memory).try_clone_to_owned().unwrap().into()
}

fn garbage(link: &PacketSocket) {
    let descriptors = (0..3).map(|_| OwnedFd::from(std::fs::File::open("/dev/null").unwrap()).into()).collect();
    link.send(&Letter { bytes: b"\xffgarbage".to_vec(), descriptors }).unwrap();
}

#[test]
fn a_hostile_sender_loses_its_link_and_its_neighbour_keeps_its_own() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let welcome = |lane: Descriptor, memory: Descriptor, slots| {
        LinkMessage::Welcome(Welcome {
            lane,
            format: LaneFormat::PLAIN,
            first_sequence: 0,
            segments: vec![NewSegment { memory, slots }],
            slots: Vec::new(),
        })
    };
    let attacks: [Attack; 6] = [
        ("garbage", Box::new(|hostile| garbage(&hostile.link))),
        ("an unsealed lane", Box::new(|hostile| hostile.say(&welcome(unsealed(4096), sealed(4096), 4)))),
        ("an unsealed segment", Box::new(|hostile| hostile.say(&welcome(sealed(4096), unsealed(4096), 4)))),
        ("a segment that is too short", Box::new(|hostile| hostile.say(&welcome(sealed(4096), sealed(4096), 400)))),
        ("a regular file", {
            let file = || OwnedFd::from(std::fs::File::open("/proc/self/exe").unwrap()).into();
            Box::new(move |hostile| hostile.say(&welcome(file(), file(), 4)))
        }),
        (
            "a hello",
            Box::new(|hostile| {
                hostile.say(&LinkMessage::Hello(Hello {
                    board: sealed(4096),
                    skip_above: None,
                    fences: false,
                    wants_slots: false,
                }));
            }),
        ),
    ];
    for (name, attack) in attacks {
        let hostile = Hostile::join(broker.address(), "c", SENDER);
        attack(&hostile);
        match receiver.get_timeout(SOON) {
            Err(GetError::PeerViolation { peer, violation }) => {
                assert_eq!(peer.process.pid as u32, std::process::id());
                println!("{name}: {violation}");
            }
            other => panic!("{name}: {other:?}"),
        }
        let mut neighbour = client.sender("c").open().unwrap();
        neighbour.wait_for_receivers_timeout(1, SOON).unwrap();
        // While a link is being broken, its neighbour streams.
        let other = Hostile::join(broker.address(), "c", SENDER);
        let mut fbuf = neighbour.allocate().unwrap();
        fbuf.write_all(name.as_bytes()).unwrap();
        neighbour.write(fbuf).unwrap();
        attack(&other);
        let (mut message, mut violation) = (None, None);
        while message.is_none() || violation.is_none() {
            match receiver.get_timeout(SOON) {
                Ok(received) => message = Some(received),
                Err(GetError::PeerViolation { violation: found, .. }) => violation = Some(found),
                Err(error) => panic!("{name}: {error}"),
            }
        }
        assert_eq!(message.as_deref(), Some(name.as_bytes()));
        drop((hostile, other, message, neighbour));
        support::until("all senders are gone", || {
            let nothing = receiver.get_timeout(Duration::from_millis(1)).unwrap_err();
            assert_eq!(nothing, GetError::TimedOut, "{name}");
            receiver.senders() == 0
        });
    }
}

/// What a sender announces takes memory of its receiver, and time of its calls, as it is used.
#[test]
fn memory_that_a_sender_announces_exists_at_its_receiver_once_there_are_messages_in_it() {
    roles!(play);
    const SLOTS: u32 = 32;
    const SLOT: u64 = 1 << 20;
    const ALL: u64 = SLOTS as u64 * SLOT;
    const LINKS: u64 = 4;
    const SENDER: Role = Role::sender(SLOT, SLOTS as u64, Mechanism::Copy, Slots::Segments);
    let broker = Embedded::start().unwrap();
    let mut receiver = Other::start(broker.address(), "receiver", geteuid().as_raw());
    receiver.hear("it is open");
    let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(SLOTS, LaneFormat::PLAIN)).unwrap();
    let mut lane = LaneWriter::new(lane, LaneFormat::PLAIN);
    let hostile: Vec<_> = (0..LINKS).map(|_| Hostile::join(broker.address(), "c", SENDER)).collect();
    let before = private(&receiver);
    for hostile in &hostile {
        hostile.say(&LinkMessage::Welcome(Welcome {
            lane: lane_fd.try_clone().unwrap().into(),
            format: LaneFormat::PLAIN,
            first_sequence: 0,
            segments: vec![NewSegment { memory: sealed(ALL), slots: SLOTS }],
            slots: Vec::new(),
        }));
    }
    // Each link is open when its first message has come.
    lane.message(SlotId::new(SLOTS - 1), 1);
    let ring = || hostile.iter().for_each(|hostile| hostile.say(&LinkMessage::Bell));
    ring();
    gets(&mut receiver, LINKS);
    let grown = private(&receiver) - before;
    assert!(grown < LINKS * 3 * (SLOT >> 10), "{grown} KiB for {LINKS} messages of one byte");
    // The control: what is used exists.
    (0..SLOTS - 1).for_each(|slot| lane.message(SlotId::new(slot), SLOT as u32));
    ring();
    gets(&mut receiver, LINKS * u64::from(SLOTS - 1));
    let grown = private(&receiver) - before;
    assert!(grown > LINKS * ((ALL - SLOT) >> 10), "{grown} KiB for all messages");
}

/// A sender of small slots. Its messages are copied.
const COPIED: Role = Role::sender(100, 4, Mechanism::Copy, Slots::Segments);

/// A welcome with so many segments, all of which are this memory.
fn welcome_with(memory: &Descriptor, segments: u32) -> LinkMessage {
    let segment = |_| NewSegment { memory: memory.clone(), slots: 1 };
    let segments = (0..segments).map(segment).collect();
    LinkMessage::Welcome(Welcome {
        lane: sealed(4096),
        format: LaneFormat::PLAIN,
        first_sequence: 0,
        segments,
        slots: Vec::new(),
    })
}

/// What this program, as a user's, passes off as the memory of two senders, until its input ends.
fn send_from_one_memory() {
    let (broker, memory) = (Address::new(env::var_os("FBUF_BROKER").unwrap()), sealed(4096));
    let _links = [0, 1].map(|_| {
        let hostile = Hostile::join(&broker, "c", COPIED);
        hostile.say(&welcome_with(&memory, 1));
        hostile
    });
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn is_told_of_one_memory(receiver: &mut Receiver) -> bool {
    match receiver.get_timeout(SOON) {
        Err(GetError::PeerViolation { violation, .. }) => *violation == Violation::Descriptor(Unsuitable::Shared),
        other => panic!("{other:?}"),
    }
}

fn until_linked(receiver: &mut Receiver, senders: usize) {
    support::until("they are linked", || receiver.try_get().unwrap().is_none() && receiver.senders() == senders);
}

/// A receiver that copies has as much memory as its senders have, and none of another user passes one memory off as several.
#[test]
fn memory_that_a_receiver_copies_from_is_that_of_one_segment() {
    roles!(play);
    const OTHER: u32 = 65_533;
    let broker = Embedded::start_with(Policy::own().allow(OTHER)).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let memory = sealed(4096);
    let twice = Hostile::join(broker.address(), "c", COPIED);
    twice.say(&welcome_with(&memory, 2));
    assert!(is_told_of_one_memory(&mut receiver));
    // Within one user a sender keeps no other from anything.
    let own = [0, 1].map(|_| Hostile::join(broker.address(), "c", COPIED));
    own.iter().for_each(|hostile| hostile.say(&welcome_with(&memory, 1)));
    until_linked(&mut receiver, 2);
    // Several receivers may have one sender.
    let mut receivers = [0, 1].map(|_| client.receiver("d").open().unwrap());
    let mut sender = client.sender("d").slot_size(8).slots(2).mechanism(Mechanism::Copy).open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    let fbuf = sender.allocate_timeout(SOON).unwrap();
    assert_eq!(sender.write(fbuf).unwrap().receivers, 2);
    receivers.iter_mut().for_each(|receiver| drop(receiver.get_timeout(SOON).unwrap()));
    if !is_root() {
        return;
    }
    let _other = Other::start(broker.address(), "one memory", OTHER);
    assert!(is_told_of_one_memory(&mut receiver));
    until_linked(&mut receiver, 3);
    drop((twice, own));
}

/// What a child does.
fn play(role: &str) {
    match role {
        "receiver" => receive_copies(),
        "one memory" => send_from_one_memory(),
        other => panic!("no such role: {other}"),
    }
}

/// Waits until it has got so many messages.
fn gets(receiver: &mut Other, messages: u64) {
    (0..messages).for_each(|_| drop(receiver.hear("it got one")));
}

fn private(receiver: &Other) -> u64 {
    Memory::of(receiver.process.pid()).private
}

fn receive_copies() {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    println!("it is open");
    while let Ok(received) = receiver.get_timeout(SOON) {
        assert_eq!(received.mechanism(), Mechanism::Copy);
        println!("it got one");
    }
}

#[test]
fn a_hostile_receiver_loses_its_link_and_its_neighbour_keeps_its_own() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(100).slots(4).open().unwrap();
    let hello = |board| LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false });
    let attacks: [Attack; 5] = [
        ("garbage", Box::new(|hostile| garbage(&hostile.link))),
        ("an unsealed board", Box::new(|hostile| hostile.say(&hello(unsealed(4096))))),
        ("a board of another size", Box::new(|hostile| hostile.say(&hello(sealed(8192))))),
        ("a bell before hello", Box::new(|hostile| hostile.say(&LinkMessage::Bell))),
        (
            "two hellos",
            Box::new(|hostile| {
                hostile.say(&hello(sealed(4096)));
                hostile.say(&hello(sealed(4096)));
            }),
        ),
    ];
    for (name, attack) in attacks {
        let hostile = Hostile::join(
            broker.address(),
            "c",
            Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT },
        );
        attack(&hostile);
        let reason = loop {
            // Looks around until the attack was seen.
            let _ = sender.wait_for_receivers_timeout(2, Duration::from_millis(1));
            if let Some(departure) = sender.next_departure() {
                break departure.reason;
            }
        };
        assert!(matches!(reason, DisconnectReason::Violation { .. }), "{name}: {reason:?}");
        drop(hostile);
        let mut neighbour = client.receiver("c").open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.write_all(name.as_bytes()).unwrap();
        assert_eq!(sender.write(fbuf).unwrap().receivers, 1);
        assert_eq!(neighbour.get_timeout(SOON).unwrap()[..], *name.as_bytes());
        drop(neighbour);
        while sender.next_departure().is_none() {
            sender.poll_events();
        }
    }
    assert_eq!(sender.counters().slots.free, 4);
}

#[test]
fn the_broker_survives_clients_that_send_anything() {
    let broker = Embedded::start().unwrap();
    let mut random = support::Random(7);
    for _ in 0..200 {
        let socket = PacketSocket::connect(&broker.address().to_kernel().unwrap(), SOON).unwrap();
        if random.below(4) > 0 {
            socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()).unwrap();
        }
        for _ in 0..random.below(5) {
            let count = random.below(60) as usize;
            let descriptors =
                (0..random.below(4)).map(|_| OwnedFd::from(std::fs::File::open("/dev/null").unwrap()).into()).collect();
            // It may have hung up.
            let _ = socket.send(&Letter { bytes: random.bytes(count), descriptors });
        }
    }
    let client = Client::connect_to(broker.address()).unwrap();
    client.receiver("c").open().unwrap();
    // The descriptors that came along were closed: what is open belongs to honest connections.
    support::until("descriptors are closed", || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter(|target| target.as_os_str() == "/dev/null")
            .count()
            <= 3
    });
}

#[test]
fn clients_that_hang_up_after_their_greeting_take_nobodys_place() {
    let broker = Embedded::start().unwrap();
    for _ in 0..fbuf_broker::state::MAX_CLIENTS + 1000 {
        let socket = PacketSocket::connect(&broker.address().to_kernel().unwrap(), SOON).unwrap();
        socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()).unwrap();
    }
    // As many as this user may have; but not for long.
    support::until("there is a place again", || match Client::connect_to(broker.address()) {
        Ok(_) => true,
        Err(ConnectError::QuotaExceeded { .. }) => false,
        Err(error) => panic!("{error}"),
    });
    support::until("nothing is charged", || broker.broker().used().is_empty());
}
