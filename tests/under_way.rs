//! Descriptors that are sent and not received. The kernel counts them for all processes of a user together, so that peers
//! of another user that receive nothing could keep a user from passing any; and where they are too many, no process loses a
//! link. One test at a time, for the same reason.

#[path = "support/hostile.rs"]
mod hostile;
mod support;

use std::{
    fs::File,
    io::stdin,
    os::fd::OwnedFd,
    sync::{Arc, MutexGuard},
    time::Duration,
};

use fbuf_client::{Address, Client, GetError, Mechanism};
use fbuf_core::{
    limits::{MAX_DESCRIPTORS, MAX_ENDS_OF_USER, MAX_MESSAGE, MAX_ONE_SHOTS},
    protection::Protection,
    ring::board::BoardTable,
    socket::{
        Arrival, PacketSocket,
        link_message::{Hello, LinkMessage},
        wire::Letter,
    },
};
use fbuf_protocol::{Limits, Role, Slots};
use hostile::Hostile;
use nix::{
    sys::resource::{Resource, setrlimit},
    time::{ClockId, clock_gettime},
};
use support::{
    BrokerProcess, SOON, alone, is_root,
    role::{Other, roles},
    until,
};

/// The honest user, the one that it is linked with, and the attackers'.
const HONEST: u32 = 65_532;
const FRIEND: u32 = 65_531;
const OTHER: u32 = 65_533;
/// How many descriptors a process of the honest user may have, and all of them together on their way.
const LIMIT: u64 = 2048;
/// Longer than it takes to make a link.
const BRIEFLY: Duration = Duration::from_millis(300);
/// So long that a thread that does not sleep shows, on a machine that does other things too.
const A_WHILE: Duration = Duration::from_secs(1);
/// More than enough to fill what may be under way to a user.
const LINKS: usize = 3;
/// So many that it takes long to make a lane.
const MOST_SLOTS: usize = 1 << 18;
/// How many processes the honest user has that are attacked.
const PROCESSES: usize = 4;

/// What a child does.
fn play(role: &str) {
    let mut words = role.split(' ');
    let (role, channel) = (words.next().unwrap(), words.next().unwrap_or_default());
    if role != "attack" {
        setrlimit(Resource::RLIMIT_NOFILE, LIMIT, LIMIT).unwrap();
    }
    match role {
        "fill" => {
            let _filled = fill();
            println!("filled");
            stdin().read_line(&mut String::new()).unwrap();
        }
        "send" => {
            let client = Client::connect().unwrap();
            let builder = client.sender(channel).slot_size(64).slots(16);
            let builder = if words.next() == Some("sealed") { builder.mechanism(Mechanism::OneShot) } else { builder };
            let mut sender = builder.open().unwrap();
            println!("open");
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            println!("linked");
            while let Ok(fbuf) = sender.allocate_timeout(SOON) {
                if sender.write(fbuf).is_err() {
                    break;
                }
            }
        }
        "receive" => {
            let client = Client::connect().unwrap();
            let mut receiver = client.receiver(channel).keep_waiting().max_slots(MOST_SLOTS).open().unwrap();
            println!("open");
            for _ in 0..100 {
                receiver.get_timeout(SOON).unwrap();
            }
            println!("through");
            while receiver.get_timeout(SOON).is_ok() {}
        }
        "take" => {
            let client = Client::connect().unwrap();
            let mut receiver = client.receiver(channel).open().unwrap();
            while receiver.get_timeout(SOON).is_ok() {}
        }
        "part" => part(),
        "deaf" => deaf(channel),
        "rest" => {
            let as_receiver = words.next() == Some("receiver");
            rest(channel, as_receiver, words.next().map_or(16, |most_slots| most_slots.parse().unwrap()));
        }
        "attack" => attack(channel, words.next() == Some("receiver"), words.next() == Some("rude")),
        _ => panic!("no such role: {role}"),
    }
}

/// Puts as many descriptors on their way as the kernel permits, over sockets of this process, and how many these are.
fn fill() -> (usize, Vec<PacketSocket>) {
    let file = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    let (mut sockets, mut sent) = (Vec::new(), 0);
    loop {
        let (from, to) = PacketSocket::pair().unwrap();
        let from = PacketSocket::new(from).unwrap();
        let mut letter = Letter { bytes: vec![0], descriptors: vec![file.clone().into(); MAX_DESCRIPTORS] };
        while !letter.descriptors.is_empty() {
            match from.send(&letter) {
                Ok(()) => sent += letter.descriptors.len(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                // One at a time up to the last.
                Err(_) => letter.descriptors.truncate(letter.descriptors.len() / 2),
            }
        }
        sockets.extend([from, PacketSocket::new(to).unwrap()]);
        if letter.descriptors.is_empty() {
            return (sent, sockets);
        }
    }
}

/// Waits, again and again when it is told to, for what does not come, and says whether it slept meanwhile.
fn rest(channel: &str, as_receiver: bool, most_slots: usize) {
    let client = Client::connect().unwrap();
    let mut wait: Box<dyn FnMut() -> usize> = if as_receiver {
        let mut receiver = client.receiver(channel).keep_waiting().open().unwrap();
        Box::new(move || {
            while !matches!(receiver.get_timeout(A_WHILE), Err(GetError::TimedOut)) {}
            receiver.senders()
        })
    } else {
        let mut sender = client.sender(channel).slot_size(64).slots(16).grow_to(most_slots).open().unwrap();
        Box::new(move || {
            assert!(sender.wait_for_receivers_timeout(usize::MAX, A_WHILE).is_err());
            sender.receivers()
        })
    };
    println!("open");
    let mut line = String::new();
    while stdin().read_line(&mut line).unwrap() > 0 {
        // What has come is read.
        wait();
        let worked = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
        let before = worked();
        let links = wait();
        let time = worked() - before;
        println!(
            "{}",
            if time < A_WHILE / 10 {
                "it was asleep".into()
            } else {
                format!("it was at work for {time:?} of {A_WHILE:?}")
            }
        );
        println!("linked with {links}");
    }
}

/// Is linked as often as it may be, and receives nothing but what makes it a peer. If it is rude, it also says what it
/// may not.
fn attack(channel: &str, as_receiver: bool, is_rude: bool) -> ! {
    let broker = Address::default_for_user();
    let receiver = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
    let (slot_bytes, max_slots) = (64, 16);
    let sender = Role::sender(slot_bytes, max_slots, fbuf_core::protection::Mechanism::Copy, Slots::Segments);
    let mut kept = Vec::new();
    for _ in 0..MAX_ENDS_OF_USER {
        let hostile = Hostile::join(&broker, channel, if as_receiver { receiver } else { sender });
        if as_receiver {
            let board = BoardTable::create("fbuf-test", 16).unwrap().1.into();
            hostile.say(&LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false }));
        }
        let Hostile { link, .. } = hostile;
        if is_rude {
            link.send_bytes(b"not now").unwrap();
        }
        kept.push(link);
    }
    println!("done");
    stdin().read_line(&mut String::new()).unwrap();
    // It receives after all.
    for link in &kept {
        while let Ok(Arrival::Message(..)) = link.receive::<{ fbuf_core::limits::MAX_MESSAGE }>() {}
    }
    println!("received");
    loop {
        std::thread::park();
    }
}

/// A sender with receivers that receive nothing, and one with receivers that receive all. Both end the links of those that
/// hold them up.
fn part() {
    let client = Client::connect().unwrap();
    let [mut first, mut second] = ["deaf", "c"].map(|channel| {
        let builder = client.sender(channel).slot_size(64).slots(MAX_ONE_SHOTS as usize).mechanism(Mechanism::OneShot);
        builder.disconnect_after(BRIEFLY).open().unwrap()
    });
    println!("open");
    first.wait_for_receivers_timeout(LINKS, SOON).unwrap();
    println!("linked");
    second.wait_for_receivers_timeout(2, SOON).unwrap();
    let mut passed = 0;
    while first.receivers() > 0 {
        passed += first.allocate_timeout(SOON).map_or(0, |fbuf| first.write(fbuf).map_or(0, |sent| sent.receivers));
    }
    println!("{passed} are under way");
    for _ in 0..100 {
        let fbuf = second.allocate_timeout(10 * BRIEFLY).expect("links that have ended hold a sender up");
        assert!(second.write(fbuf).unwrap().receivers > 0);
    }
    stdin().read_line(&mut String::new()).unwrap();
}

/// Is linked, and receives no message.
fn deaf(channel: &str) -> ! {
    let role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
    let mut kept = Vec::new();
    for _ in 0..LINKS {
        let hostile = Hostile::join(&Address::default_for_user(), channel, role);
        let board = BoardTable::create("fbuf-test", MAX_ONE_SHOTS as usize).unwrap().1.into();
        hostile.say(&LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false }));
        until("it is answered", || matches!(hostile.link.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
        kept.push(hostile);
    }
    println!("done");
    loop {
        std::thread::park();
    }
}

/// Whether processes of the honest user can still be linked, and send, on a channel where the attacker has no right.
fn assert_that_others_are_linked(broker: &Address) {
    let mut receiver = Other::start(broker, "receive private", FRIEND);
    receiver.hear("open");
    let mut sender = Other::start(broker, "send private sealed", HONEST);
    receiver.hear("through");
    sender.process.kill();
}

fn broker() -> (tempfile::TempDir, BrokerProcess) {
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_short(folder.path(), 8192, [HONEST, FRIEND, OTHER]);
    (folder, broker)
}

/// With none of the other tests beside it, since the kernel counts by user; as root alone.
fn alone_as_root() -> Option<MutexGuard<'static, ()>> {
    let alone = alone();
    is_root().then_some(alone)
}

/// Neither side loses a link that cannot be made at once.
#[test]
fn a_link_that_cannot_be_made_while_too_many_are_under_way_is_made_later() {
    roles!(play);
    let Some(_alone) = alone_as_root() else { return };
    let (_folder, broker) = broker();
    for (kind, first, second) in [
        ("a sender that cannot answer", ("send c", HONEST), ("receive c", FRIEND)),
        ("a receiver that cannot greet", ("receive c", HONEST), ("send c", FRIEND)),
    ] {
        let mut filler = Other::start(&broker.address, "fill", HONEST);
        filler.hear("filled");
        let mut one = Other::start(&broker.address, first.0, first.1);
        one.hear("open");
        let mut other = Other::start(&broker.address, second.0, second.1);
        other.hear("open");
        // The control: no message comes before.
        let receiver = if first.0.starts_with("receive") { &mut one } else { &mut other };
        assert!(!receiver.has_more_within(BRIEFLY), "they are linked at once");
        filler.tell("");
        receiver.hear("through");
        println!("{kind}: it is linked after all");
        one.process.kill();
        other.process.kill();
        filler.process.end();
    }
}

#[test]
fn peers_that_receive_nothing_keep_nobody_from_passing_descriptors() {
    roles!(play);
    let Some(_alone) = alone_as_root() else { return };
    for (honest, attacker) in [("send", "receiver"), ("receive", "sender")] {
        let (_folder, broker) = broker();
        let channels: Vec<_> = (0..PROCESSES).map(|number| format!("c{number}")).collect();
        let mut attacked: Vec<_> = channels
            .iter()
            .map(|channel| Other::start(&broker.address, format!("{honest} {channel}"), HONEST))
            .collect();
        attacked.iter_mut().for_each(|one| _ = one.hear("open"));
        let mut attackers: Vec<_> = channels
            .iter()
            .map(|channel| Other::start(&broker.address, format!("attack {channel} {attacker}"), OTHER))
            .collect();
        attackers.iter_mut().for_each(|one| _ = one.hear("done"));
        assert_that_others_are_linked(&broker.address);
        // What waited comes when it is received.
        attackers.iter_mut().for_each(|one| one.tell(""));
        attackers.iter_mut().for_each(|one| _ = one.hear("received"));
        assert!(attacked.iter_mut().all(|one| !one.process.has_ended()));
    }
}

/// A socket that stays open, because something is under way over it or waits in it, wakes no process.
#[test]
fn peers_that_receive_nothing_and_say_what_they_may_not_keep_nobody_awake() {
    roles!(play);
    let Some(_alone) = alone_as_root() else { return };
    for (honest, attacker) in [("sender", "receiver"), ("receiver", "sender")] {
        let (_folder, broker) = broker();
        let mut attacked = Other::start(&broker.address, format!("rest c {honest}"), HONEST);
        attacked.hear("open");
        let mut attack = Other::start(&broker.address, format!("attack c {attacker} rude"), OTHER);
        attack.hear("done");
        attacked.tell("");
        let said = attacked.hear("it was");
        assert!(said.ends_with("asleep"), "{said}");
    }
}

/// Neither side makes what it would send again and again.
#[test]
fn while_the_kernel_refuses_all_descriptors_nobody_is_at_work_for_links() {
    roles!(play);
    let Some(_alone) = alone_as_root() else { return };
    let (_folder, broker) = broker();
    let mut filler = Other::start(&broker.address, "fill", HONEST);
    filler.hear("filled");
    let mut sender = Other::start(&broker.address, format!("rest c sender {MOST_SLOTS}"), HONEST);
    sender.hear("open");
    let mut receiver = Other::start(&broker.address, "receive c", FRIEND);
    receiver.hear("open");
    sender.tell("");
    let said = sender.hear("it was");
    assert!(said.ends_with("asleep"), "{said}");
    // The control: it is only this that keeps the two from being linked.
    assert_eq!(sender.number::<usize>("linked with"), 0);
    filler.tell("");
    sender.tell("");
    assert_eq!(sender.number::<usize>("linked with"), 1);
}

/// Also what is under way over links that have ended, of which no receiver could be disconnected any more.
#[test]
fn a_sender_that_ends_links_of_those_that_hold_it_up_goes_on_whatever_is_under_way_to_their_user() {
    roles!(play);
    let Some(_alone) = alone_as_root() else { return };
    let (_folder, broker) = broker();
    let mut sender = Other::start(&broker.address, "part", HONEST);
    sender.hear("open");
    let mut attacker = Other::start(&broker.address, "deaf deaf", OTHER);
    attacker.hear("done");
    sender.hear("linked");
    // One of the attacker's user receives what it is sent.
    let receivers = ["receive c", "take c"].into_iter().zip([FRIEND, OTHER]);
    let mut receivers: Vec<_> = receivers.map(|(role, user)| Other::start(&broker.address, role, user)).collect();
    receivers[0].hear("through");
    assert!(!sender.process.has_ended());
}
