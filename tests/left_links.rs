//! Links that peers of another user leave behind, which the broker counts no more: by closing their endpoints and keeping
//! their ends, or by coming and going while the other end's program does something else. They cost a process no more than
//! endpoints do that are open.

#[path = "support/hostile.rs"]
mod hostile;
mod support;

use std::{io::stdin, time::Instant};

use fbuf_broker::{Embedded, Policy};
use fbuf_client::{Address, Client, GetError, Receiver};
use fbuf_core::{
    limits::MAX_ENDS_OF_USER,
    memory::Map,
    protection::{Mechanism, Protection},
    ring::{
        board::BoardTable,
        entry::{LaneFormat, capacity_for},
        lane::LaneTable,
    },
    socket::{
        Arrival,
        link_message::{Hello, LinkMessage, NewSegment, Welcome},
    },
};
use fbuf_protocol::{Limits, Role, Slots};
use hostile::Hostile;
use nix::unistd::geteuid;
use support::{
    BrokerProcess, Holdings, SOON, is_root,
    role::{Other, roles},
    until,
};

/// The users of the attacker, and of one that comes later.
const OTHER: u32 = 65_533;
const LATER: u32 = 65_532;
/// How often the attacker is linked in each role: more than twice as often as it may have endpoints.
const TIMES: usize = 2 * MAX_ENDS_OF_USER + 20;
const SLOTS: u32 = 4;

/// What a child does.
fn play(role: &str) {
    match role {
        "honest" => honest(),
        "leaves" => attack(false),
        "keeps" => attack(true),
        "reads on" => read_on(),
        "later" => {
            let client = Client::connect().unwrap();
            let mut receiver = client.receiver("sent").open().unwrap();
            let mut sender = client.sender("received").slot_size(64).slots(1).open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            println!("linked");
            let fbuf = sender.allocate_timeout(SOON).unwrap();
            assert_eq!(sender.write(fbuf).unwrap().receivers, 1);
            receiver.get_timeout(SOON).unwrap();
            println!("through");
        }
        other => panic!("no such role: {other}"),
    }
}

/// Has a receiver and a sender, which it looks at only when it is told to.
fn honest() {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("received").keep_waiting().open().unwrap();
    let mut sender = client.sender("sent").slot_size(64).slots(SLOTS as usize).open().unwrap();
    println!("open");
    let heed = |receiver: &mut Receiver, sender: &mut fbuf_client::Sender| {
        sender.poll_events();
        matches!(receiver.try_get(), Ok(Some(_)))
    };
    let mut lines = stdin().lines();
    while let Some(Ok(word)) = lines.next() {
        match &word[..] {
            "count" => {
                // All that came is read.
                for _ in 0..10 * TIMES {
                    heed(&mut receiver, &mut sender);
                }
                println!("{} senders and {} receivers", receiver.peers().count(), sender.peers().count());
            }
            "disconnect" => {
                sender.wait_for_receivers_timeout(MAX_ENDS_OF_USER, SOON).unwrap();
                let fbuf = sender.allocate_timeout(SOON).unwrap();
                assert_eq!(sender.write(fbuf).unwrap().receivers, MAX_ENDS_OF_USER);
                let peers: Vec<_> = sender.peers().collect();
                assert!(peers.into_iter().all(|peer| sender.disconnect(peer)));
                println!("disconnected");
                // It looks at its sockets until it is told to do something else.
                let word = std::thread::spawn(|| stdin().lines().next());
                while !word.is_finished() {
                    sender.poll_events();
                }
            }
            _ => {
                while !heed(&mut receiver, &mut sender) {}
                // That one's receiver may be linked a moment after its sender.
                let (mut fbuf, start) = (sender.allocate_timeout(SOON).unwrap(), Instant::now());
                while let Err(unsent) = sender.write(fbuf) {
                    assert!(start.elapsed() < SOON, "{unsent}");
                    fbuf = unsent.into_fbuf().expect("nothing has it");
                    sender.poll_events();
                }
                assert!(!matches!(receiver.try_get(), Err(GetError::Exhausted { .. })));
                println!("got");
            }
        }
    }
}

/// Is linked again and again, and each time closes its endpoint, and keeps its end of the link or not.
fn attack(keeps: bool) {
    let broker = Address::default_for_user();
    let receiver = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
    let (slot_bytes, max_slots) = (64, SLOTS.into());
    let sender = Role::sender(slot_bytes, max_slots, Mechanism::Copy, Slots::Segments);
    let mut kept = Vec::new();
    for _ in 0..TIMES {
        for role in [receiver, sender] {
            let is_receiver = matches!(role, Role::Receiver { .. });
            let hostile = Hostile::join(&broker, if is_receiver { "sent" } else { "received" }, role);
            // Its peer may have hung up.
            let say = |message| drop(hostile.link.send(&fbuf_core::socket::wire::encode(&message).unwrap()));
            if is_receiver {
                let board = BoardTable::create("fbuf-test", SLOTS as usize).unwrap().1.into();
                say(LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false }));
            } else if keeps {
                // A welcome before the hello would be a violation; and a hello that is not received, the last.
                until("it is greeted, or turned away", || {
                    !matches!(hostile.link.receive::<1024>().unwrap(), Arrival::Nothing)
                });
                let lane = LaneTable::create("fbuf-test", capacity_for(SLOTS, LaneFormat::PLAIN)).unwrap().1.into();
                let memory = Map::create("fbuf-test", 4096).unwrap().1.into();
                let segments = vec![NewSegment { memory, slots: SLOTS }];
                say(LinkMessage::Welcome(Welcome {
                    lane,
                    format: LaneFormat::PLAIN,
                    first_sequence: 0,
                    segments,
                    slots: Vec::new(),
                }));
            }
            let Hostile { link, .. } = hostile;
            kept.extend(keeps.then_some(link));
        }
    }
    println!("{} of {} hung up", kept.iter().filter(|link| link.hung_up()).count(), kept.len());
    let _ = stdin().read_line(&mut String::new());
}

/// Is linked as often as may be, is disconnected with a message that it could read on, and is linked again.
fn read_on() {
    let broker = Address::default_for_user();
    let role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
    let join = || {
        let hostile = Hostile::join(&broker, "sent", role);
        let board = BoardTable::create("fbuf-test", SLOTS as usize).unwrap().1.into();
        let hello = LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false });
        // Its peer may have hung up.
        let _ = hostile.link.send(&fbuf_core::socket::wire::encode(&hello).unwrap());
        let Hostile { link, .. } = hostile;
        let mut arrival = Arrival::Nothing;
        until("there is an answer", || {
            arrival = link.receive::<1024>().unwrap();
            !matches!(arrival, Arrival::Nothing)
        });
        matches!(arrival, Arrival::Message(..)).then_some(link)
    };
    let kept: Vec<_> = (0..MAX_ENDS_OF_USER).map(|_| join().unwrap()).collect();
    println!("linked");
    let _ = stdin().read_line(&mut String::new());
    println!("{} of 5 more were answered", (0..5).filter_map(|_| join()).count());
    drop(kept);
    until("links that are over make room", || join().is_some());
    println!("answered");
}

fn descriptors(of: &Other) -> usize {
    Holdings::of(of.process.pid()).descriptors
}

/// A sender and a receiver that nobody looks at, beside an attacker, and how many descriptors they have more when it is
/// done.
fn attacked_by(role: &str, then: impl FnOnce(&BrokerProcess, Other, Other, usize)) {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_short(folder.path(), 4096, [OTHER, LATER]);
    let mut honest = Other::start(&broker.address, "honest", 0);
    honest.hear("open");
    let before = descriptors(&honest);
    let attacker = Other::start(&broker.address, role, OTHER);
    then(&broker, honest, attacker, before);
}

#[test]
fn links_that_are_kept_cost_no_more_than_endpoints() {
    roles!(play);
    attacked_by("keeps", |broker, mut honest, mut attacker, before| {
        let [hung_up, all] = attacker.numbers("hung up")[..] else { panic!("not two numbers") };
        assert_eq!((all, hung_up), (2 * TIMES, 2 * (TIMES - MAX_ENDS_OF_USER)));
        assert!(descriptors(&honest) <= before + 2 * MAX_ENDS_OF_USER + 4, "{} were {before}", descriptors(&honest));
        honest.tell("count");
        assert_eq!(honest.numbers("receivers").first(), Some(&MAX_ENDS_OF_USER));
        // Whoever else comes is linked.
        let mut later = Other::start(&broker.address, "later", LATER);
        later.hear("linked");
        honest.tell("get");
        honest.hear("got");
        later.hear("through");
        drop(attacker);
        honest.tell("count");
        until("links are gone that end", || descriptors(&honest) <= before + 4);
    });
}

#[test]
fn links_that_their_sender_has_ended_count_for_as_long_as_their_receivers_may_read_on() {
    roles!(play);
    if !is_root() {
        return;
    }
    // Receivers of another user read in place what is of a sender that is trusted.
    let broker = Embedded::start_with(Policy::own().trust(geteuid().as_raw()).allow(OTHER)).unwrap();
    let mut honest = Other::start(broker.address(), "honest", 0);
    honest.hear("open");
    let mut attacker = Other::start(broker.address(), "reads on", OTHER);
    honest.tell("disconnect");
    attacker.hear("linked");
    honest.hear("disconnected");
    attacker.tell("again");
    assert_eq!(attacker.numbers("more were answered").first(), Some(&0));
    attacker.hear("answered");
}

#[test]
fn peers_that_come_and_go_while_nobody_looks_are_forgotten_and_keep_nobody_out() {
    roles!(play);
    attacked_by("leaves", |broker, mut honest, mut attacker, before| {
        attacker.hear("hung up");
        assert!(descriptors(&honest) <= before + 2 * MAX_ENDS_OF_USER + 4, "{} were {before}", descriptors(&honest));
        // Not even of the same user.
        let mut later = Other::start(&broker.address, "later", OTHER);
        honest.tell("get");
        later.hear("linked");
        honest.hear("got");
        later.hear("through");
    });
}
