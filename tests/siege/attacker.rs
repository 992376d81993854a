//! What an attacker does.

use std::{
    fs::File,
    io::{Write, stdout},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    thread,
};

use fbuf_client::Address;
use fbuf_core::{
    board::{BoardTable, BoardWriter},
    control::{Greeting, Open, Role, Slots, VERSION, Verdict},
    lane::{LaneTable, LaneWriter, capacity_for},
    link::{Hello, LinkMessage, NewSegment, Welcome},
    memory::Map,
    pool::Pool,
    protection::{Mechanism, Protection},
    slot::{Geometry, Mark, SlotId},
    socket::{Arrival, PacketSocket},
    wire::{self, Descriptor, Letter},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{client::Hostile, support::Random};

/// What it says when it has begun.
pub const BEGUN: &str = "the attack has begun";

const RECEIVER: Role = Role::Receiver { require: Protection::Volatile };
const SENDER: Role = Role::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Copy, slots: Slots::Segments };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attack {
    /// Greets, and sends garbage.
    Garbage,
    /// Beginnings of requests.
    HalfMessages,
    /// As much in one message as the kernel takes (`MAX_MESSAGE`).
    HugeMessages,
    /// As many descriptors as the kernel takes with each message (`receive_bytes` takes none).
    Descriptors,
    /// Descriptors of every kind.
    WrongDescriptors,
    /// Greetings of other versions.
    OtherVersions,
    /// Opens receivers and asks for introductions, and never reads an answer (`MAX_REQUESTS`, `OUTBOX`, the quotas
    /// of requests and descriptors).
    NeverReads,
    /// Opens receivers and never fetches an introduction (`MAX_WAITING`, the quota of descriptors).
    NeverFetches,
    /// As many connections as it gets, without a greeting (the quota of connections, `GREETING_TIME`).
    Connections,
    /// Opens and closes as fast as it can (the quota of requests).
    Churn,
    /// As a receiver, rings a bell that never stops, and reads nothing (`MAX_AT_ONCE`).
    BellsToSender,
    /// The same, as a sender.
    BellsToReceiver,
    /// Writes anything into its lane.
    LyingLane,
    /// Writes anything onto its board.
    LyingBoard,
    /// Is linked, and closes one thing after the other.
    Closes,
}

impl Attack {
    pub const ALL: [Self; 15] = [
        Self::Garbage,
        Self::HalfMessages,
        Self::HugeMessages,
        Self::Descriptors,
        Self::WrongDescriptors,
        Self::OtherVersions,
        Self::NeverReads,
        Self::NeverFetches,
        Self::Connections,
        Self::Churn,
        Self::BellsToSender,
        Self::BellsToReceiver,
        Self::LyingLane,
        Self::LyingBoard,
        Self::Closes,
    ];
}

/// Is the attacker, until it is killed.
pub fn attack(attack: Attack) -> ! {
    let broker = Address::default_for_user();
    let mut random = Random(7 + attack as u64);
    let slots = slots();
    match attack {
        Attack::Garbage => over_and_over(|| {
            let socket = greet(&broker)?;
            while socket.send_bytes(&random_bytes(&mut random)).is_ok() {}
            Some(())
        }),
        Attack::HalfMessages => over_and_over(|| {
            let socket = greet(&broker)?;
            let whole = request(1, 1, "c", RECEIVER);
            socket.send_bytes(&whole[..random.below(whole.len() as u64) as usize]).ok()
        }),
        Attack::HugeMessages => over_and_over(|| {
            let socket = greet(&broker)?;
            socket.send_bytes(&vec![0; 100_000 + random.below(50_000) as usize]).ok()
        }),
        Attack::Descriptors => over_and_over(|| {
            let file: Arc<OwnedFd> = Arc::new(File::open("/dev/null").ok()?.into());
            let (bytes, descriptors) = (request(1, 1, "c", RECEIVER), vec![file; 253]);
            greet(&broker)?.send(&Letter { bytes, descriptors }).ok()
        }),
        Attack::WrongDescriptors => over_and_over(|| {
            let kinds = wrong_descriptors();
            let (bytes, descriptors) = (request(1, 1, "c", RECEIVER), kinds.into_iter().map(Arc::new).collect());
            greet(&broker)?.send(&Letter { bytes, descriptors }).ok()
        }),
        Attack::OtherVersions => over_and_over(|| {
            let socket = connect(&broker)?;
            let version = VERSION.wrapping_add(1 + random.below(60_000) as u16);
            socket.send_bytes(&Greeting { version, verdict: Verdict::Welcome }.to_bytes()).ok()
        }),
        Attack::NeverReads => over_and_over(|| {
            let socket = greet(&broker)?;
            // Until the sockets are full, and then on.
            for number in 0..100_000 {
                let _ = socket.send_bytes(&request(2 * number, number, "c", RECEIVER));
                let _ = socket.send_bytes(&Hostile::news(2 * number + 1));
            }
            Some(())
        }),
        Attack::NeverFetches => {
            let socket = greet(&broker);
            over_and_over(|| {
                let socket = socket.as_ref()?;
                let number = random.below(1 << 40);
                socket.send_bytes(&request(number, number, "c", RECEIVER)).ok()
            })
        }
        Attack::Connections => {
            let mut connections = Vec::new();
            over_and_over(|| {
                connections.push(connect(&broker)?);
                if connections.len() > 5000 {
                    connections.clear();
                }
                Some(())
            })
        }
        Attack::Churn => {
            let socket = greet(&broker);
            let mut number = 0;
            over_and_over(|| {
                let socket = socket.as_ref()?;
                number += 2;
                let _ = socket.send_bytes(&request(number, number, "c", RECEIVER));
                let _ = socket.send_bytes(&Hostile::close(number + 1, number));
                // The answers.
                while let Ok(Arrival::Message(..)) = socket.receive::<16384>() {}
                Some(())
            })
        }
        Attack::BellsToSender => {
            let hostile = Hostile::join(&broker, "c", RECEIVER);
            let (_board, descriptor) = BoardTable::create("fbuf-test", 16).unwrap();
            hostile.say(&hello(descriptor.into()));
            over_and_over(|| hostile.link.send_bytes(&[0]).ok())
        }
        Attack::BellsToReceiver => {
            let hostile = Hostile::join(&broker, "c", SENDER);
            let (_lane, _map) = welcome(&hostile);
            over_and_over(|| hostile.link.send_bytes(&[0]).ok())
        }
        Attack::LyingLane => over_and_over(|| {
            let hostile = Hostile::join(&broker, "c", SENDER);
            let (mut lane, _map) = welcome(&hostile);
            for _ in 0..20 {
                let (slot, length) = (random.below(8) as u32, random.below(200) as u32);
                if random.below(4) == 0 {
                    lane.gap(random.below(1 << 62));
                } else {
                    lane.message(slots[slot as usize], length);
                }
            }
            wait_for_end(&hostile.link);
            Some(())
        }),
        Attack::LyingBoard => {
            let hostile = Hostile::join(&broker, "c", RECEIVER);
            let (board, descriptor) = BoardTable::create("fbuf-test", 16).unwrap();
            let board = BoardWriter::new(board);
            hostile.say(&hello(descriptor.into()));
            over_and_over(|| {
                board.hand_back(slots[random.below(16) as usize], Mark::of(random.below(1 << 20)));
                Some(())
            })
        }
        Attack::Closes => over_and_over(|| {
            let hostile = Hostile::join(&broker, "c", SENDER);
            let (lane, map) = welcome(&hostile);
            match random.below(3) {
                0 => drop(lane),
                1 => drop(map),
                _ => return hostile.link.send_bytes(&[0]).ok(),
            }
            wait_for_end(&hostile.link);
            Some(())
        }),
    }
}

/// Waits until the other side has ended the link; not for long, since it may have noticed nothing yet.
fn wait_for_end(link: &PacketSocket) {
    let mut polled = [PollFd::new(link.as_fd(), PollFlags::empty())];
    // A signal ends it as well.
    let _ = poll(&mut polled, PollTimeout::from(10u8));
}

/// Goes on, whether the broker lets it or not.
fn over_and_over(mut attempt: impl FnMut() -> Option<()>) -> ! {
    let mut tries = 0u64;
    loop {
        if attempt().is_none() {
            thread::yield_now();
        }
        tries += 1;
        if tries == 3 {
            println!("{BEGUN}");
            stdout().flush().unwrap();
        }
    }
}

fn connect(broker: &Address) -> Option<PacketSocket> {
    PacketSocket::connect_at_once(&broker.to_kernel().ok()?).ok()
}

/// Connects and is welcomed; none if it is not.
fn greet(broker: &Address) -> Option<PacketSocket> {
    let socket = connect(broker)?;
    socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()).ok()?;
    loop {
        match socket.receive::<64>().ok()? {
            Arrival::Message(..) => return Some(socket),
            Arrival::Nothing => thread::yield_now(),
            _ => return None,
        }
    }
}

/// A request to open an endpoint, as it travels.
fn request(id: u64, endpoint: u64, channel: &str, role: Role) -> Vec<u8> {
    Hostile::request(id, endpoint, Open { channel: channel.into(), role, earlier: None })
}

/// Names of slots, be there such ones or not.
fn slots() -> Vec<SlotId> {
    let wake = nix::sys::eventfd::EventFd::new().unwrap().into();
    let mut pool = Pool::new(Geometry::new(8, 16).unwrap(), 16, wake).unwrap();
    let mut next = || {
        pool.collect(&[], 16);
        let fbuf = pool.allocate()?;
        pool.take(fbuf, 0).ok().map(|(slot, _)| slot)
    };
    (0..16).map(|_| next().unwrap()).collect()
}

/// One that reads nothing and asks to be waited for is waited for: so it asks to be skipped.
fn hello(board: Descriptor) -> LinkMessage {
    LinkMessage::Hello(Hello { board, skip_above: Some(1), fences: false, wants_slots: false })
}

/// Answers the hello of a receiver as an honest sender would.
fn welcome(hostile: &Hostile) -> (LaneWriter<LaneTable>, Map) {
    let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(4, false)).unwrap();
    let (map, memory) = Map::create("fbuf-test", 4096).unwrap();
    let segments = vec![NewSegment { memory: memory.into(), slots: 4 }];
    let welcome = Welcome { lane: lane_fd.into(), first_sequence: 0, segments, slots: Vec::new() };
    // The receiver may have gone.
    let _ = hostile.link.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap());
    (LaneWriter::new(lane), map)
}

fn random_bytes(random: &mut Random) -> Vec<u8> {
    let count = random.below(300) as usize;
    random.bytes(count)
}

/// One of each kind.
fn wrong_descriptors() -> Vec<OwnedFd> {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (one, other) = PacketSocket::pair().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let memory = memfd::MemfdOptions::new().create("fbuf-test").unwrap().into_file();
    let folder = File::open("/").unwrap();
    let duplicate = event.as_fd().try_clone_to_owned().unwrap();
    vec![reader, writer, one, other, duplicate, memory.into(), folder.into(), File::open("/dev/zero").unwrap().into()]
}
