//! A sender that means harm: a process of its own, this one run again in that role, that does what it can
//! to change a message after it was sent. What each level of protection stops is shown here, and the
//! table of docs/protection.md is this one.
#![allow(unsafe_code, reason = "attackers write where they may not")]

mod attacker;
#[path = "../support/hostile.rs"]
mod client;
mod receiver;
#[path = "../support/mod.rs"]
mod support;

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::Stdio,
    time::{Duration, Instant},
};

use attacker::{ATTEMPT, Attack, BEGIN};
use fbuf_broker::{Embedded, Policy};
use fbuf_client::{Client, GetError, Mechanism, OpenError, Protection, Received, Receiver};
use nix::{libc, sys::signal::Signal, unistd::geteuid};
use support::{
    SOON, is_root, not_tested,
    role::{Other, as_user, command, roles},
};

/// The bytes of a message.
const SIZE: usize = 4096;
/// Users that tests as other ones.
const OTHER: u32 = 65_533;
const ANOTHER: u32 = 65_532;
/// How often a receiver looks whether what it holds is still the same.
const LOOKS: usize = 10_000;

/// How a sender protects what it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Volatile,
    Guarded,
    Lease,
    Copy,
    OneShot,
}

impl Level {
    const ALL: [Self; 5] = [Self::Volatile, Self::Guarded, Self::Lease, Self::Copy, Self::OneShot];

    fn require(self) -> Protection {
        match self {
            Self::Volatile | Self::Guarded => Protection::Volatile,
            Self::Lease => Protection::Leased,
            Self::Copy | Self::OneShot => Protection::Sealed,
        }
    }
}

/// What comes of an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The message changes.
    Changes,
    /// It does not, and the attacker goes on trying.
    Holds,
    /// It does not, and the attacker dies of SIGSEGV.
    Traps,
    /// The receiver does not take it, and ends the link.
    Refused,
}

use Outcome::{Changes, Holds, Refused, Traps};

/// What each attack comes to at each level.
const TABLE: [(Attack, [Outcome; 5]); 16] = [
    //                        volatile guarded lease copy one-shot
    (Attack::KeptPointer, [Changes, Traps, Traps, Holds, Traps]),
    (Attack::Alias, [Changes, Changes, Holds, Holds, Holds]),
    (Attack::MadeWritable, [Changes, Changes, Traps, Holds, Traps]),
    (Attack::ChildBefore, [Changes, Changes, Holds, Holds, Holds]),
    (Attack::ChildAfter, [Holds, Holds, Holds, Holds, Holds]),
    (Attack::Pinned, [Changes, Changes, Changes, Holds, Holds]),
    (Attack::KeptDescriptor, [Holds, Holds, Holds, Holds, Holds]),
    (Attack::InFlight, [Holds, Holds, Holds, Holds, Holds]),
    (Attack::Reopened, [Holds, Holds, Holds, Holds, Holds]),
    (Attack::ReopenedAtOnce, [Holds, Holds, Holds, Holds, Holds]),
    (Attack::Truncated, [Holds, Holds, Holds, Holds, Holds]),
    (Attack::Punched, [Holds, Holds, Holds, Holds, Holds]),
    (Attack::Unsealed, [Refused, Refused, Refused, Refused, Refused]),
    (Attack::TooFewSeals, [Refused, Refused, Refused, Refused, Refused]),
    (Attack::TooShort, [Refused, Refused, Refused, Refused, Refused]),
    (Attack::RegularFile, [Refused, Refused, Refused, Refused, Refused]),
];

/// What a child does.
fn play(role: &str) {
    let words: Vec<_> = role.split(' ').collect();
    let number = |place: usize| words[place].parse::<usize>().unwrap();
    match words[0] {
        "attacker" => attacker::attack(Attack::ALL[number(1)], Level::ALL[number(2)], number(3) == 1),
        "hostile" => receiver::attack(number(1)),
        "victim" => victim(),
        "sender" => send_some(number(1) == 1),
        "receiver" => receive_some(),
        _ => panic!("no such role: {role}"),
    }
}

/// The table, but for what this machine does not let anybody do.
fn attacks() -> impl Iterator<Item = (Attack, [Outcome; 5])> {
    let pins = io_uring::IoUring::new(1).map(drop);
    if let Err(error) = &pins {
        not_tested(&format!("pages are pinned with io_uring(7), which this kernel does not allow: {error}"));
    }
    TABLE.into_iter().filter(move |(attack, _)| *attack != Attack::Pinned || pins.is_ok())
}

fn own() -> u32 {
    geteuid().as_raw()
}

/// A broker that serves this user and others.
fn broker() -> Embedded {
    broker_for(Policy::only(own()).allow(OTHER).allow(ANOTHER))
}

/// The same, which trusts all of them.
fn trusting_broker() -> Embedded {
    let own = own();
    broker_for(Policy::only(own).trust(own).trust(OTHER).trust(ANOTHER))
}

fn broker_for(policy: Policy) -> Embedded {
    Embedded::start_with(policy).unwrap()
}

/// This program in a role. What becomes of an attacker is not of interest.
fn child(broker: &Embedded, role: &str, user: u32) -> Other {
    let mut command = command(role);
    command.env("FBUF_BROKER", broker.address().to_string()).env("FBUF_GUARD", "0").stderr(Stdio::null());
    Other::of(as_user(&mut command, user))
}

fn attacker(broker: &Embedded, attack: Attack, level: Level, user: u32, from_receiver: bool) -> Other {
    let attack = Attack::ALL.iter().position(|&other| other == attack).unwrap();
    let level = Level::ALL.iter().position(|&other| other == level).unwrap();
    child(broker, &format!("attacker {attack} {level} {}", u8::from(from_receiver)), user)
}

/// Waits until a child has stopped itself.
fn wait_until_it_stops(child: &mut Other) {
    child.hear(BEGIN);
    child.process.until_stopped();
}

/// Lets an attacker attack, which has stopped itself before.
fn let_go(attacker: &mut Other) {
    wait_until_it_stops(attacker);
    attacker.process.signal(Signal::SIGCONT);
}

/// What a message looks like.
fn look(message: &Received) -> u64 {
    assert_eq!(message.len(), SIZE);
    xxhash_rust::xxh3::xxh3_64(message)
}

/// Lets an attack go on against what a receiver gets: what comes of it.
fn suffer(attack: Attack, attacker: &mut Other, receiver: &mut Receiver) -> (Outcome, Option<Mechanism>) {
    use Attack::{InFlight, KeptDescriptor, Punched, Reopened, ReopenedAtOnce, Truncated};
    let expects_attempt = matches!(attack, KeptDescriptor | InFlight | Reopened | ReopenedAtOnce | Truncated | Punched);
    let message = match receiver.get_timeout(SOON) {
        Ok(message) => message,
        Err(GetError::PeerViolation { .. }) => return (Refused, None),
        Err(error) => panic!("{error}; the attacker: {:?}", attacker.process.end()),
    };
    let (mechanism, first) = (message.mechanism(), look(&message));
    let_go(attacker);
    if expects_attempt {
        let nothing = attacker.next_with(ATTEMPT).is_some_and(|attempt| attempt.ends_with("nothing"));
        assert!(!nothing || mechanism == Mechanism::OneShot || message.sender().process.uid != own());
    }
    let start = Instant::now();
    // Longer than the attacker needs for its first attempt, if nothing tells.
    while start.elapsed() < Duration::from_millis(20) {
        if (0..LOOKS).any(|_| look(&message) != first) {
            return (Changes, Some(mechanism));
        }
    }
    assert!(mechanism.protection() == Protection::Volatile || message.is_intact());
    match attacker.process.0.try_wait().unwrap() {
        None => (Holds, Some(mechanism)),
        Some(status) if status.signal() == Some(libc::SIGSEGV) => (Traps, Some(mechanism)),
        Some(status) => panic!("the attacker ended: {status}"),
    }
}

fn run(level: Level) {
    let column = Level::ALL.iter().position(|&other| other == level).unwrap();
    for (attack, outcomes) in attacks() {
        let expected = outcomes[column];
        // An attack that succeeds may take a moment longer on a busy machine.
        let start = Instant::now();
        loop {
            let broker = broker();
            let client = Client::connect_to(broker.address()).unwrap();
            let mut receiver = client.receiver("prey").require(level.require()).open().unwrap();
            let mut attacker = attacker(&broker, attack, level, own(), false);
            let (found, mechanism) = suffer(attack, &mut attacker, &mut receiver);
            if found == expected {
                if level == Level::Lease && found != Refused {
                    // Whoever can write already when it is received is no reason to refuse it.
                    let writable = matches!(
                        attack,
                        Attack::Alias | Attack::ChildBefore | Attack::KeptDescriptor | Attack::InFlight
                    );
                    let means = if writable { Mechanism::Copy } else { Mechanism::Lease };
                    assert_eq!(mechanism, Some(means), "{attack:?}");
                }
                println!("{attack:?} against {level:?}: {found:?} ({mechanism:?})");
                break;
            }
            let late = matches!((found, expected), (Holds, Changes | Traps));
            assert!(late && start.elapsed() < SOON, "{attack:?} against {level:?}: {found:?}, and not {expected:?}");
        }
    }
}

#[test]
fn every_attack_is_in_the_table() {
    assert!(Attack::ALL.iter().all(|attack| TABLE.iter().filter(|(other, _)| other == attack).count() == 1));
}

#[test]
fn attacks_on_volatile_messages() {
    roles!(play);
    run(Level::Volatile);
}

#[test]
fn attacks_on_guarded_messages() {
    roles!(play);
    run(Level::Guarded);
}

#[test]
fn attacks_on_messages_that_are_copied() {
    roles!(play);
    run(Level::Copy);
}

#[test]
fn attacks_on_messages_that_are_leased() {
    roles!(play);
    run(Level::Lease);
}

#[test]
fn attacks_on_messages_that_are_sealed_for_good() {
    roles!(play);
    run(Level::OneShot);
}

/// Attacks of memory that is as it should be.
fn attacks_on_memory() -> impl Iterator<Item = Attack> {
    attacks().filter(|(_, outcomes)| outcomes[0] != Refused).map(|(attack, _)| attack)
}

#[test]
fn messages_of_another_user_do_not_change() {
    roles!(play);
    if !is_root() {
        return;
    }
    for (attack, from_receiver) in attacks_on_memory().flat_map(|attack| [(attack, false), (attack, true)]) {
        // The sender, which is not trusted, has to trust a receiver that makes its slots.
        let own = own();
        let broker = broker_for(Policy::only(own).trust(own).allow(OTHER));
        let client = Client::connect_to(broker.address()).unwrap();
        // Nobody asked for it on either side, or the slots are the receiver's.
        let mut receiver = client.receiver("prey").open().unwrap();
        let level = if from_receiver { Level::Lease } else { Level::Volatile };
        let mut attacker = attacker(&broker, attack, level, OTHER, from_receiver);
        let (found, mechanism) = suffer(attack, &mut attacker, &mut receiver);
        assert!(matches!(found, Holds | Traps), "{attack:?}, {from_receiver}: {found:?}");
        assert_eq!(mechanism, Some(Mechanism::Copy), "{attack:?}, {from_receiver}");
    }
}

#[test]
fn messages_in_the_receivers_slots_are_leased_if_their_sender_is_trusted() {
    roles!(play);
    if !is_root() {
        return;
    }
    for attack in attacks_on_memory().filter(|&attack| attack != Attack::Pinned) {
        let broker = trusting_broker();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut receiver = client.receiver("prey").require(Protection::Leased).open().unwrap();
        let mut attacker = attacker(&broker, attack, Level::Lease, OTHER, true);
        let (found, mechanism) = suffer(attack, &mut attacker, &mut receiver);
        assert!(matches!(found, Holds | Traps), "{attack:?}: {found:?}");
        // Nobody but the receiver can open it again.
        let writable = matches!(attack, Attack::Alias | Attack::ChildBefore);
        let expected = if writable { Mechanism::Copy } else { Mechanism::Lease };
        assert_eq!(mechanism, Some(expected), "{attack:?}");
    }
}

/// How many messages other users exchange.
const SOME: u8 = 200;

fn send_some(from_receiver: bool) {
    let client = Client::connect().unwrap();
    let sender = client.sender("users").slot_size(SIZE).slots(3);
    let sender = if from_receiver { sender.from_receiver() } else { sender.mechanism(Mechanism::Lease) };
    let mut sender = sender.open().unwrap();
    assert_eq!(sender.protection_info().mechanism, Mechanism::Lease, "{}", sender.protection_info());
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for n in 0..SOME {
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.set_len(SIZE).unwrap();
        fbuf.fill(n);
        sender.write(fbuf).unwrap();
    }
    sender.wait_for_returns_timeout(SOON).unwrap();
}

fn receive_some() {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("users").require(Protection::Leased).open().unwrap();
    println!("it is there");
    for n in 0..SOME {
        let message = receiver.get_timeout(SOON).unwrap();
        assert_eq!(message.mechanism(), Mechanism::Lease, "message {n}");
        assert!(message.iter().all(|&byte| byte == n) && message.is_intact());
    }
    assert_eq!(receiver.counters().leases_refused, 0);
    println!("all were leased");
}

#[test]
fn other_users_lease_what_the_broker_made_for_them_and_what_is_the_receivers() {
    roles!(play);
    if !is_root() {
        return;
    }
    // Two processes of one other user; and of two, neither of which is the broker's.
    for (sender, receiver, from_receiver) in [(OTHER, OTHER, 0), (OTHER, ANOTHER, 1), (OTHER, OTHER, 1)] {
        let broker = trusting_broker();
        let mut receiver = child(&broker, "receiver", receiver);
        receiver.hear("it is there");
        let mut sender = child(&broker, &format!("sender {from_receiver}"), sender);
        receiver.hear("all were leased");
        assert!(sender.process.end().success());
    }
}

/// Holds a message while it is stopped, and looks at it afterwards.
fn victim() {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("prey").open().unwrap();
    let message = receiver.get_timeout(SOON).unwrap();
    let first = look(&message);
    attacker::begin();
    if message.mechanism() != Mechanism::Lease {
        assert!((0..LOOKS).all(|_| look(&message) == first));
        println!("it is the same");
        return;
    }
    assert_ne!(look(&message), first);
    assert!(!message.is_intact());
    drop(message);
    // At once: nothing else has to happen first.
    let start = Instant::now();
    let told = receiver.get_timeout(SOON);
    assert!(start.elapsed() < SOON);
    match told {
        Err(GetError::LeaseLost { messages: 1, .. }) => println!("it was told"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_receiver_that_was_stopped_for_longer_than_a_lease_lasts_is_told() {
    roles!(play);
    let time = fs::read_to_string("/proc/sys/fs/lease-break-time").unwrap().trim().parse::<u64>().unwrap();
    if time > 60 {
        not_tested(&format!("the test waits for fs.lease-break-time, which is {time} s"));
        return;
    }
    for level in Level::ALL {
        let broker = broker();
        let mut victim = child(&broker, "victim", own());
        let mut attacker = attacker(&broker, Attack::Reopened, level, own(), false);
        wait_until_it_stops(&mut victim);
        let_go(&mut attacker);
        // Once the lease is over, if there is one.
        let attempt = attacker.hear(ATTEMPT);
        assert!(attempt.ends_with("something") || level == Level::OneShot, "{level:?}: {attempt}");
        victim.process.signal(Signal::SIGCONT);
        let expected = if level == Level::Lease { "it was told" } else { "it is the same" };
        victim.hear(expected);
        assert!(victim.process.end().success());
    }
}

#[test]
fn a_receiver_that_requires_more_than_there_is_is_refused_and_told_why() {
    let broker = broker();
    let client = Client::connect_to(broker.address()).unwrap();
    let _sender = client.sender("c").open().unwrap();
    let refused = client.receiver("c").require(Protection::Sealed).open().unwrap_err();
    assert!(matches!(refused, OpenError::Refused(_)), "{refused}");
    let reason = refused.to_string();
    assert!(reason.contains("requires sealed") && reason.contains("are volatile"), "{reason}");
    assert!(reason.contains(&format!("process {}", std::process::id())), "{reason}");

    let _receiver = client.receiver("d").require(Protection::Sealed).open().unwrap();
    let refused = client.sender("d").open().unwrap_err().to_string();
    assert!(refused.contains("requires sealed ones: send such"), "{refused}");
    client.sender("d").protection(Protection::Sealed).open().unwrap();
}
