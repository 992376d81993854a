//! The other direction: receivers that mean harm to a sender for which they make the slots (`from_receiver`). What each attack
//! comes to depends on the receiver's user; the column of those that are trusted is the positive control, since there the
//! same attack changes what the sender has.

use std::{
    env,
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt},
    time::{Duration, Instant},
};

use fbuf_client::{Address, Client, DisconnectReason, Mismatch, Sender, Unpaired};
use fbuf_core::{
    memory::Leasable,
    protection::Protection,
    ring::board::BoardTable,
    socket::link_message::{Hello, LinkMessage, WriteGrant},
    violation::{Unsuitable, Violation},
};
use fbuf_protocol::{Limits, Role};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    unistd::geteuid,
};

use super::{
    OTHER, SIZE, broker, child,
    client::Hostile,
    is_root, own, play,
    support::{SOON, not_tested, role::roles, slots},
    trusting_broker,
};

/// What the sender fills its slots with.
const FILL: u8 = 7;
/// What the attacker prints when it is about to join.
const JOINS: &str = "it joins";

const RECEIVER: Role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };

/// What a receiver tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attack {
    /// Writes into a slot while the sender fills it.
    Scribbles,
    /// Punches a hole into a slot while the sender fills it.
    Punches,
    /// Writes into a slot that the sender has sent and kept.
    ScribblesKept,
    /// Gives one memory to be written, and another to be read.
    TwoMemories,
    /// Gives memory that is larger than the slot, by far.
    Large,
    /// Gives memory of which no page exists.
    NoPages,
    /// Gives memory to be read that lies in huge pages, which it can take away.
    HugeReader,
    /// Gives memory that lies in huge pages.
    Huge,
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// What the sender has changes.
    Changes,
    /// The sender does not take the memory, and ends the link.
    Refused,
    /// There is no link.
    NoLink,
}

use Outcome::{Changes, NoLink, Refused};

/// Which user the receiver is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Own,
    Trusted,
    Other,
}

const TABLE: [(Attack, [Outcome; 3]); 8] = [
    //                       same user, trusted user, other user
    (Attack::Scribbles, [Changes, Changes, NoLink]),
    (Attack::Punches, [Changes, Changes, NoLink]),
    (Attack::ScribblesKept, [Changes, Changes, NoLink]),
    (Attack::TwoMemories, [Refused, Refused, NoLink]),
    (Attack::Large, [Refused, Refused, NoLink]),
    (Attack::NoPages, [Refused, Refused, NoLink]),
    (Attack::HugeReader, [Refused, Refused, NoLink]),
    (Attack::Huge, [Refused, Refused, NoLink]),
];

/// Is the attacker, for as long as it lives.
pub fn attack(number: usize) -> ! {
    super::attacker::die_with_parent();
    let attack = TABLE[number].0;
    println!("{JOINS}");
    match attack {
        Attack::Scribbles | Attack::Punches | Attack::ScribblesKept => change(attack),
        _ => forge(attack),
    }
}

/// Receives by the library, in a process that opens the library's memory.
fn change(attack: Attack) -> ! {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("prey").keep_waiting().open().unwrap();
    if attack == Attack::ScribblesKept {
        drop(receiver.get_timeout(SOON).unwrap());
    }
    loop {
        // Makes the slots, and gives the right to write them.
        let _ = receiver.get_timeout(Duration::from_millis(1));
        for path in slots() {
            let Ok(file) = File::options().read(true).write(true).open(path) else { continue };
            let mut first = [0];
            if file.read_exact_at(&mut first, 0).is_err() || first != [FILL] {
                continue;
            }
            if attack == Attack::Punches {
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&file, hole, 0, SIZE as i64).unwrap();
            } else {
                file.write_all_at(&[0xEE], 0).unwrap();
            }
        }
    }
}

/// A slot, as this receiver makes it: to be written, and to be read.
fn slot(size: u64, huge: bool, has_pages: bool) -> Option<(OwnedFd, OwnedFd)> {
    let memory = Leasable::create("fbuf-forged", size, huge, geteuid().as_raw()).ok()?;
    let writer = memory.open_writer().unwrap();
    if has_pages {
        fallocate(&writer, FallocateFlags::empty(), 0, size as i64).unwrap();
    }
    Some((writer, memory.into()))
}

/// Speaks to the sender as the library does, but for the memory.
fn forge(attack: Attack) -> ! {
    let size = SIZE as u64;
    let own = |huge| slot(size, huge, !huge);
    let given = match attack {
        Attack::TwoMemories => own(false).zip(own(false)).map(|((writer, _), (_, reader))| (writer, reader)),
        Attack::Large => slot(2 << 30, false, false),
        Attack::NoPages => slot(size, false, false),
        Attack::HugeReader => own(false).zip(own(true)).map(|((writer, _), (_, reader))| (writer, reader)),
        Attack::Huge => own(true),
        Attack::Scribbles | Attack::Punches | Attack::ScribblesKept => None,
    };
    let (writer, reader) = given.expect("such memory");
    let address = Address::new(env::var_os("FBUF_BROKER").unwrap());
    let hostile = Hostile::join(&address, "prey", RECEIVER);
    let (_board, board) = BoardTable::create("fbuf-board", 1).unwrap();
    hostile.say(&LinkMessage::Hello(Hello {
        board: board.into(),
        skip_above: None,
        fences: false,
        wants_slots: false,
    }));
    hostile.say(&LinkMessage::WriteGrant(WriteGrant { slot: 0, writer: writer.into(), reader: Some(reader.into()) }));
    loop {
        std::thread::park();
    }
}

/// Whether a byte changes, which nobody but this process should be able to do.
fn changes(first: *const u8) -> bool {
    let start = Instant::now();
    while start.elapsed() < SOON {
        // SAFETY: the mapping is there for as long as the fbuf, or what was kept, lives.
        if unsafe { first.read_volatile() } != FILL {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// What the sender meets, which does nothing but what any program would do.
fn suffer(attack: Attack, sender: &mut Sender) -> (Outcome, Option<Violation>) {
    let start = Instant::now();
    let is_untrusted = |one: &Unpaired| one.why == Mismatch::UntrustedPool { user: OTHER };
    loop {
        let linked = sender.wait_for_receivers_timeout(1, Duration::from_millis(10)).is_ok();
        if let Some(departure) = sender.next_departure() {
            match departure.reason {
                DisconnectReason::Violation { violation: Violation::UntrustedReceiver } => return (NoLink, None),
                DisconnectReason::Violation { violation } => return (Refused, Some(violation)),
                other => panic!("{other:?}"),
            }
        }
        if linked && let Ok(Some(mut fbuf)) = sender.try_allocate() {
            fbuf.set_len(SIZE).unwrap();
            fbuf.fill(FILL);
            if attack != Attack::ScribblesKept {
                assert!(changes(fbuf.as_ptr()), "the attack does nothing");
                return (Changes, None);
            }
            let (_, kept) = sender.write_retained(fbuf).unwrap();
            assert!(changes(kept.as_ptr()), "the attack does nothing");
            return (Changes, None);
        }
        if !linked && sender.unpaired().unwrap().iter().any(is_untrusted) {
            assert_eq!(sender.peers().count(), 0);
            return (NoLink, None);
        }
        assert!(start.elapsed() < SOON, "nothing comes of it");
    }
}

fn run(who: Whose) {
    for (number, (attack, outcomes)) in TABLE.into_iter().enumerate() {
        if matches!(attack, Attack::HugeReader | Attack::Huge) && slot(SIZE as u64, true, false).is_none() {
            not_tested(&format!("{attack:?}: this kernel has no huge pages to set aside"));
            continue;
        }
        let broker = match who {
            Whose::Trusted => trusting_broker(),
            Whose::Other | Whose::Own => broker(),
        };
        let client = Client::connect_to(broker.address()).unwrap();
        let mut sender = client.sender("prey").slot_size(SIZE).slots(1).from_receiver().open().unwrap();
        let user = if who == Whose::Own { own() } else { OTHER };
        let mut attacker = child(&broker, &format!("hostile {number}"), user);
        attacker.hear(JOINS);
        let (found, violation) = suffer(attack, &mut sender);
        println!("{attack:?} by a receiver ({who:?}): {found:?} ({violation:?})");
        assert_eq!(found, outcomes[who as usize], "{attack:?} by a receiver ({who:?})");
        if let Some(violation) = violation {
            let other_size = matches!(&violation, Violation::Descriptor(Unsuitable::Size { found, wanted })
                if (*found, *wanted) == (2 << 30, SIZE as u64));
            let expected = match attack {
                Attack::TwoMemories | Attack::HugeReader => violation == Violation::Descriptor(Unsuitable::OtherMemory),
                Attack::Large => other_size,
                Attack::Huge if who == Whose::Trusted => violation == Violation::Descriptor(Unsuitable::Removable),
                _ => matches!(violation, Violation::Descriptor(Unsuitable::Holes { reserved: 0, .. })),
            };
            assert!(expected, "{attack:?}: {violation:?}");
        }
    }
}

#[test]
fn receivers_of_the_same_user_are_trusted_but_give_only_what_they_should() {
    roles!(play);
    run(Whose::Own);
}

#[test]
fn receivers_of_another_user_that_is_trusted_give_only_what_they_should() {
    roles!(play);
    if is_root() {
        run(Whose::Trusted);
    }
}

#[test]
fn slots_of_another_user_that_is_not_trusted_are_not_used() {
    roles!(play);
    if is_root() {
        run(Whose::Other);
    }
}
