//! What a receiver of another user can read beside its messages: on a confidential channel nothing, on another one all
//! memory of the sender, also after it has left. The attacker is a process of its own, this one run again as another
//! user, that searches all its mappings and descriptors.
#![allow(unsafe_code, reason = "the attacker maps what its library maps once more")]

#[path = "support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    env,
    fs::{self, File},
    io::stdin,
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
};

use fbuf_broker::{Embedded, Policy};
use fbuf_client::{Client, Mechanism, OpenError, OptionsError, Pages, Protection, Refusal, Sender, SenderBuilder};
use nix::{libc, unistd::geteuid};
use support::{
    Run, SOON, is_root,
    role::{Other, roles},
    until,
};

/// The user of the attacker.
const OTHER: u32 = 65_533;
/// The size of a slot, and where in it secrets lie: behind what short messages fill.
const SIZE: usize = 4096;
const PLACE: usize = 1024;
/// The attacker knows the mark that every secret begins with in this guise only, so that it finds no mark but the sender's.
const MASK: u8 = 0x55;
/// How many bytes a mark has; one more says what the secret is.
const MARK: usize = 16;

/// How many short messages follow the one that the attacker keeps.
const SHORT: usize = 16;

/// What a secret is.
const BEFORE: u8 = b'b';
const DRAFT: u8 = b'd';
const DROPPED: u8 = b'x';
const BEHIND: u8 = b't';
const GIVEN: u8 = b'g';
const AFTER: u8 = b'a';

/// What a child does: it searches for what is named by these digits.
fn play(mark: &str) {
    let digits = |at: usize| u8::from_str_radix(&mark[at..at + 2], 16).unwrap();
    search((0..2 * MARK).step_by(2).map(digits).collect());
}

/// Which secrets are in some bytes.
fn secrets(bytes: &[u8], masked: &[u8]) -> BTreeSet<u8> {
    let first = masked[0] ^ MASK;
    let candidates = bytes.windows(MARK + 1).filter(|window| window[0] == first);
    let is_mark = |window: &&[u8]| window.iter().zip(masked).all(|(byte, masked)| byte ^ MASK == *masked);
    candidates.filter(is_mark).map(|window| window[MARK]).collect()
}

/// Which secrets are in all mappings of this process, and in all memory that it has descriptors of.
fn look(masked: &[u8], kept: &[File]) -> BTreeSet<u8> {
    let mut found = BTreeSet::new();
    let memory = File::open("/proc/self/mem").unwrap();
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let (begin, end) = words[0].split_once('-').unwrap();
        let [begin, end] = [begin, end].map(|word| u64::from_str_radix(word, 16).unwrap());
        if words[1].starts_with('r') {
            let mut bytes = vec![0; (end - begin) as usize];
            // What has no pages is not read: [vvar], or a mapping that is gone by now.
            let length = memory.read_at(&mut bytes, begin).unwrap_or(0);
            found.extend(secrets(&bytes[..length], masked));
        }
    }
    for file in kept {
        let mut bytes = vec![0; file.metadata().unwrap().size() as usize];
        let length = file.read_at(&mut bytes, 0).unwrap_or(0);
        found.extend(secrets(&bytes[..length], masked));
    }
    found
}

/// All memory that this process has a descriptor of, opened once more.
fn descriptors() -> Vec<File> {
    let entries = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    let memory = entries.filter(|path| fs::read_link(path).is_ok_and(|to| to.starts_with("/memfd:")));
    memory.filter_map(|path| File::open(path).ok()).collect()
}

/// Maps all memory of fbuf that is mapped here once more, so that the library cannot unmap it: how many mappings those are.
fn keep() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let shared = maps.lines().filter(|line| line.contains("/memfd:fbuf") && line.contains("r--s"));
    let alias = |line: &str| {
        let (begin, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [begin, end] = [begin, end].map(|word| usize::from_str_radix(word, 16).unwrap());
        // SAFETY: an old size of 0 makes another mapping of shared pages, and leaves the first alone (mremap(2)).
        let alias = unsafe { libc::mremap(begin as *mut _, 0, end - begin, libc::MREMAP_MAYMOVE) };
        assert_ne!(alias, libc::MAP_FAILED, "{line}");
    };
    shared.map(alias).count()
}

/// Receives by the library, and searches when it is told to. What it has been given it keeps.
fn search(masked: Vec<u8>) {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let message = receiver.get_timeout(SOON).unwrap();
    (0..SHORT).for_each(|_| drop(receiver.get_timeout(SOON).unwrap()));
    let (mut kept, mapped) = (descriptors(), keep());
    let mut held = Some((client, receiver, message));
    println!("it has a message");
    for line in stdin().lines().map_while(Result::ok) {
        match &*line {
            "look" => {
                kept.extend(descriptors());
                let found: String = look(&masked, &kept).into_iter().map(char::from).collect();
                println!("it finds {found:?} in all, {mapped} mappings and {} descriptors kept", kept.len());
            }
            "leave" => {
                held = None;
                println!("it has left");
            }
            other => panic!("{other}"),
        }
    }
    drop(held);
}

/// The attacker, which searches for this.
fn attacker(broker: &Embedded, mark: &[u8]) -> Other {
    let mark: String = mark.iter().map(|byte| format!("{:02x}", byte ^ MASK)).collect();
    Other::start(broker.address(), mark, OTHER)
}

fn ask(attacker: &mut Other, what: &str, begin: &str) -> String {
    attacker.tell(what);
    attacker.hear(begin).split_once(begin).unwrap().1.to_owned()
}

/// A buffer with a secret behind the first bytes.
fn fill(sender: &mut Sender, mark: &[u8], secret: u8) -> fbuf_client::Fbuf {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(PLACE + MARK + 1).unwrap();
    fbuf[PLACE..PLACE + MARK].copy_from_slice(mark);
    fbuf[PLACE + MARK] = secret;
    fbuf
}

/// What the attacker finds while it is linked, and after it has left.
fn attack(policy: Policy) -> (Mechanism, String, String) {
    let broker = Embedded::start_with(policy).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mark: [u8; MARK] = rand_mark();
    let mut own = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(SIZE).slots(8).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let before = fill(&mut sender, &mark, BEFORE);
    sender.write(before).unwrap();
    drop(own.get_timeout(SOON).unwrap());
    let draft = fill(&mut sender, &mark, DRAFT);
    drop(fill(&mut sender, &mark, DROPPED));
    let mut attacker = attacker(&broker, &mark);
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    let given = fill_given(&mut sender, &mark);
    sender.write(given).unwrap();
    drop(own.get_timeout(SOON).unwrap());
    // Every slot is used again, also that of the buffer that was dropped.
    for _ in 0..SHORT {
        let mut short = sender.allocate_timeout(SOON).unwrap();
        short.set_len(8).unwrap();
        sender.write(short).unwrap();
        drop(own.get_timeout(SOON).unwrap());
    }
    attacker.hear("it has a message");
    let linked = ask(&mut attacker, "look", "it finds ");
    ask(&mut attacker, "leave", "it has left");
    until("the attacker leaves", || {
        sender.poll_events();
        sender.receivers() == 1
    });
    let after = fill(&mut sender, &mark, AFTER);
    sender.write(after).unwrap();
    drop(own.get_timeout(SOON).unwrap());
    let left = ask(&mut attacker, "look", "it finds ");
    drop(draft);
    (sender.protection_info().mechanism, linked, left)
}

/// The message for the attacker, and what was written behind its end.
fn fill_given(sender: &mut Sender, mark: &[u8]) -> fbuf_client::Fbuf {
    let mut fbuf = fill(sender, mark, BEHIND);
    fbuf.set_len(PLACE).unwrap();
    fbuf[..MARK].copy_from_slice(mark);
    fbuf[MARK] = GIVEN;
    fbuf
}

/// Bytes that are nowhere else.
fn rand_mark() -> [u8; MARK] {
    let mut mark = [0; MARK];
    std::io::Read::read_exact(&mut File::open("/dev/urandom").unwrap(), &mut mark).unwrap();
    mark
}

fn has(found: &str, secret: u8) -> bool {
    found.split('"').nth(1).unwrap().contains(char::from(secret))
}

#[test]
fn on_a_confidential_channel_a_receiver_of_another_user_reads_its_messages_and_nothing_else() {
    roles!(play);
    if !is_root() {
        return;
    }
    let policy = || Policy::own().allow(OTHER);
    let (mechanism, linked, left) = attack(policy().confidential("c").unwrap());
    println!("confidential: {linked}, and when it has left {left}");
    assert_eq!(mechanism, Mechanism::OneShot);
    assert!(has(&linked, GIVEN), "the attacker finds not even its message: {linked}");
    for secret in [BEFORE, DRAFT, DROPPED, BEHIND, AFTER] {
        assert!(!has(&linked, secret) && !has(&left, secret), "{:?}: {linked}, {left}", char::from(secret));
    }
    // On another channel it finds everything by the same search.
    let (mechanism, linked, left) = attack(policy());
    println!("not confidential: {linked}, and when it has left {left}");
    assert_eq!(mechanism, Mechanism::Shared);
    for secret in [BEFORE, DRAFT, DROPPED, BEHIND, GIVEN] {
        assert!(has(&linked, secret), "{:?} in {linked}", char::from(secret));
    }
    assert!(!has(&linked, AFTER) && has(&left, AFTER), "{left}");
}

#[test]
fn senders_on_a_confidential_channel_send_one_shots_or_are_refused() {
    let policy = Policy::only(geteuid().as_raw()).confidential("secret/*").unwrap();
    let broker = Embedded::start_with(policy).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("secret/key").open().unwrap();
    for sender in [client.sender("secret/key"), client.sender("secret/key").protection(Protection::Sealed).slots(4)] {
        let mut sender = sender.slot_size(64).open().unwrap();
        assert_eq!(sender.protection_info().to_string(), "one-shot: the channel is confidential");
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let fbuf = sender.allocate_timeout(SOON).unwrap();
        sender.write(fbuf).unwrap();
        assert_eq!(receiver.get_timeout(SOON).unwrap().mechanism(), Mechanism::OneShot);
    }
    for sender in [
        client.sender("secret/key").mechanism(Mechanism::Shared),
        client.sender("secret/key").mechanism(Mechanism::Copy),
        client.sender("secret/key").from_receiver().slots(1),
        client.sender("secret/key").slots(1000),
    ] {
        let error = sender.slot_size(64).open().unwrap_err();
        assert!(matches!(error, OpenError::Refused(Refusal::Confidential { .. })), "{error}");
        assert!(error.to_string().contains("\"secret/key\" is confidential"), "{error}");
    }
    client.sender("public").slot_size(64).slots(1000).open().unwrap();
}

#[test]
fn what_one_shots_cannot_have_is_not_left_out_in_silence() {
    let policy = Policy::only(geteuid().as_raw()).confidential("secret").unwrap();
    let broker = Embedded::start_with(policy).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let guarded = |channel| client.sender(channel).slot_size(64).guard(true).open();
    let paged = |channel| {
        let leased =
            client.sender(channel).slot_size(fbuf_client::tuning::LEASE_FROM as usize).protection(Protection::Leased);
        leased.pages(Pages::Base).open()
    };
    for error in [guarded("secret").unwrap_err(), paged("secret").unwrap_err()] {
        assert!(matches!(error, OpenError::Options(OptionsError::Confidential { .. })), "{error}");
        assert!(error.to_string().contains("the channel is confidential"), "{error}");
    }
    guarded("public").unwrap();
    paged("public").unwrap();
    // The environment asks all senders of a process for a guard, but for those that were told to have none.
    let granted = |sender: SenderBuilder| sender.slot_size(64).open().unwrap().protection_info().to_string();
    let (undecided, unguarded) = (granted(client.sender("secret")), granted(client.sender("secret").guard(false)));
    assert_eq!(unguarded, "one-shot: the channel is confidential");
    if env::var_os("FBUF_GUARD").is_some() {
        assert_eq!(undecided, format!("{unguarded}, and such slots cannot be guarded (FBUF_GUARD)"));
        return;
    }
    assert_eq!(undecided, unguarded);
    let mut again = Command::new(env::current_exe().unwrap());
    again.args(["--exact", "what_one_shots_cannot_have_is_not_left_out_in_silence"]).env("FBUF_GUARD", "1");
    assert!(again.run_to_its_end().success(), "it says why");
}
