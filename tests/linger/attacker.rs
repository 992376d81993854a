//! Attackers: of peers, and of the broker.

use std::thread;

use fbuf_client::Address;
use fbuf_core::{
    limits::MAX_MESSAGE,
    memory::Map,
    protection::{Mechanism, Protection},
    ring::{
        board::BoardTable,
        entry::{LaneFormat, capacity_for},
        lane::LaneTable,
    },
    socket::{
        PacketSocket,
        link_message::{Hello, LinkMessage, NewSegment, Welcome},
        wire::{self, Descriptor, Letter},
    },
};
use fbuf_protocol::{Limits, Role, Slots};

use crate::{
    FOR_EVER,
    hostile::{Hostile, Member, greet},
    letter,
    lingering::{lingering, pass},
    support::until,
};

const RECEIVER: Role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
pub const SENDER: Role = Role::sender(64, 64, Mechanism::Copy, Slots::Segments);

fn hello() -> LinkMessage {
    let board = BoardTable::create("fbuf-test", 64).unwrap().1.into();
    LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false })
}

fn welcome(lane: Descriptor) -> LinkMessage {
    let segments = vec![NewSegment { memory: Map::create("fbuf-test", 4096).unwrap().1.into(), slots: 4 }];
    LinkMessage::Welcome(Welcome { lane, format: LaneFormat::PLAIN, first_sequence: 0, segments, slots: Vec::new() })
}

fn lane() -> Descriptor {
    LaneTable::create("fbuf-test", capacity_for(64, LaneFormat::PLAIN)).unwrap().1.into()
}

/// Offends one peer after the other, in each way there is, and keeps what lingers. Some links end in a violation, some as by a death.
pub fn attack_links(seconds: i32) -> ! {
    let broker = Address::default_for_user();
    let one = || vec![lingering(seconds)];
    let socket = || lingering(seconds);
    let many = || vec![lingering(seconds); 253];
    let nested = || {
        let (from, to) = PacketSocket::pair().unwrap();
        PacketSocket::new(from).unwrap().send(&letter(one())).unwrap();
        to.into()
    };
    let say = |hostile: &Hostile, message: LinkMessage| {
        let _ = pass(&hostile.link, wire::encode(&message).unwrap());
        thread::spawn(move || drop(message));
    };
    let send = |hostile: &Hostile, letters: Vec<Letter>| {
        letters.into_iter().for_each(|letter| drop(pass(&hostile.link, letter)));
    };
    // Its peer hangs up at once when it takes no more of this user.
    let greet = |hostile: &Hostile, message: LinkMessage| {
        let _ = hostile.link.send(&wire::encode(&message).unwrap());
    };
    let segment = |memory| wire::encode(&LinkMessage::Segment(NewSegment { memory, slots: 4 })).unwrap();
    let rounds = if seconds == FOR_EVER { 6 } else { 1 };
    for _ in 0..rounds {
        for way in 0..10 {
            let hostile = Hostile::join(&broker, "c", if way < 5 { RECEIVER } else { SENDER });
            match way {
                // Before a word, more than a message may carry; and more that is never read.
                0 | 5 => send(&hostile, vec![letter(many()), letter(one()), letter(one())]),
                1 => say(
                    &hostile,
                    LinkMessage::Hello(Hello { board: socket(), skip_above: None, fences: false, wants_slots: false }),
                ),
                2 => {
                    greet(&hostile, hello());
                    send(&hostile, vec![letter(one()), letter(one())]);
                }
                3 => {
                    greet(&hostile, hello());
                    send(&hostile, vec![letter(vec![nested()])]);
                }
                // Longer than any may be, with a descriptor.
                4 | 9 => send(&hostile, vec![Letter { bytes: vec![0; MAX_MESSAGE + 1], descriptors: one() }]),
                6 => say(&hostile, welcome(socket())),
                7 => {
                    greet(&hostile, welcome(lane()));
                    // One that is known to be wrong, and others that are never read.
                    send(&hostile, vec![segment(socket()), segment(nested()), letter(one())]);
                }
                _ => {
                    greet(&hostile, welcome(lane()));
                    send(&hostile, vec![letter(vec![nested()])]);
                }
            }
            // Its end is closed, and with it nothing that it has sent.
            if way % 2 == 0 {
                until("its peer hangs up", || hostile.link.hung_up());
            }
            drop(hostile);
            println!("it has attacked");
        }
    }
    println!("it is done");
    loop {
        thread::park();
    }
}

/// Offends the broker.
pub fn attack_broker(seconds: i32) -> ! {
    let broker = Address::default_for_user();
    let introduced = |member: &Member| {
        let socket = member.news().remove(0).socket.into_owned().unwrap();
        PacketSocket::new(socket).unwrap()
    };
    for turn in 0..8 {
        // To the broker itself.
        let connection = greet(&broker);
        match pass(&connection, letter(vec![lingering(seconds)])) {
            Ok(()) => until("the broker hangs up", || connection.hung_up()),
            Err(error) => {
                assert_eq!(fbuf_core::process::sys::os_error(&error), Some(nix::errno::Errno::EPERM), "{error}")
            }
        }
        // Into an end of a link that is never fetched.
        let receiver = Member::join(&broker, "mail", RECEIVER);
        let sender = Member::join(&broker, "mail", SENDER);
        let link = introduced(&receiver);
        (0..3).for_each(|_| link.send(&letter(vec![lingering(seconds)])).unwrap());
        drop(sender);
        until("the broker drops the other end", || link.hung_up());
        // Into an end that is closed as soon as it has come, when the broker may have it still.
        let sender = Member::join(&broker, "mail", SENDER);
        let link = introduced(&receiver);
        let sockets: Vec<_> = (0..4).map(|_| letter(vec![lingering(seconds)])).collect();
        thread::scope(|scope| {
            scope.spawn(|| drop(sender.news()));
            sockets.into_iter().for_each(|letter| drop(pass(&link, letter)));
        });
        println!("it has attacked {turn}");
    }
    println!("it is done");
    loop {
        thread::park();
    }
}
