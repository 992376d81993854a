//! A sender that means harm: a process of its own, this one run again in that role, that does what it can
//! to change a message after it was sent. What each level of protection stops is shown here.
#![allow(unsafe_code, reason = "attackers write where they may not")]

mod support;

use std::{
    env, fs,
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    process::{Command, Stdio},
    time::Instant,
};

use fbuf_broker::{Embedded, Users};
use fbuf_client::{Address, Client, GetError, Mechanism, OpenError, Protection, Received, WriteError};
use support::{Process, SOON};

/// The bytes of a message.
const SIZE: usize = 4096;
/// The user that tests as another one.
const OTHER: u32 = 65_534;
/// How often a receiver looks whether what it holds is still the same.
const LOOKS: usize = 10_000;

/// What the attacker does; nothing in the process that tests.
#[test]
fn role() {
    let Ok(attack) = env::var("FBUF_TEST_ATTACK") else { return };
    let client = Client::connect().unwrap();
    let mechanism = MECHANISMS[env::var("FBUF_TEST_MECHANISM").unwrap().parse::<usize>().unwrap()];
    let mut sender = client.sender("prey").slot_size(SIZE as u64).slots(4).mechanism(mechanism).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut fbuf = sender.allocate().unwrap();
    fbuf.resize(SIZE).unwrap();
    fbuf.fill(7);
    let kept = fbuf.as_mut_ptr();
    if attack == "a child that was forked before" {
        // SAFETY: the child does nothing but write to memory until it is killed.
        if unsafe { nix::unistd::fork() }.unwrap().is_child() {
            scribble(kept);
        }
    }
    if let Err(WriteError::NotSealed { .. }) = sender.write(fbuf) {
        std::process::exit(NOT_SEALED);
    }
    match &*attack {
        "a kept pointer" => scribble(kept),
        "a child that was forked before" => loop {
            std::thread::park();
        },
        "a child that was forked after" => {
            // SAFETY: the child does nothing but write to memory until it is killed.
            if unsafe { nix::unistd::fork() }.unwrap().is_child() {
                scribble(kept);
            }
            loop {
                std::thread::park();
            }
        }
        other => panic!("no such attack: {other}"),
    }
}

fn scribble(at: *mut u8) -> ! {
    // Its parent may be gone, and nobody else would end it.
    // SAFETY: it sets a flag of this process.
    unsafe { nix::libc::prctl(nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGKILL) };
    for value in 0.. {
        // SAFETY: none. It is mapped, and it is somebody else's now.
        unsafe { at.add(value % SIZE).write_volatile((value / SIZE) as u8) };
    }
    unreachable!()
}

/// A broker that serves this user and another.
fn broker() -> Embedded {
    let mut random = [0; 8];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom").unwrap(), &mut random).unwrap();
    let name = format!("@fbuf-attack-{:x}", u64::from_ne_bytes(random));
    Embedded::start_for(Address::new(name), Users::only(nix::unistd::geteuid().as_raw()).allow(OTHER)).unwrap()
}

/// Starts the attacker, as this user or another.
fn attacker(broker: &Embedded, attack: &str, mechanism: Mechanism, uid: Option<u32>) -> (Process, tempfile::TempDir) {
    attacker_with(broker, attack, mechanism, uid, false)
}

fn attacker_with(
    broker: &Embedded,
    attack: &str,
    mechanism: Mechanism,
    uid: Option<u32>,
    guard: bool,
) -> (Process, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("attacker");
    fs::copy(env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", "role", "--nocapture", "--test-threads=1"]).current_dir("/");
    command.env("FBUF_TEST_ATTACK", attack).env("FBUF_BROKER", broker.address().to_string());
    let mechanism = MECHANISMS.iter().position(|&other| other == mechanism).unwrap();
    command.env("FBUF_TEST_MECHANISM", mechanism.to_string());
    command.env("FBUF_GUARD", if guard { "1" } else { "0" });
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    (Process::start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())), folder)
}

/// Looks at a message again and again: how many looks found it changed.
fn changes(message: &Received) -> usize {
    assert_eq!(message.len(), SIZE);
    let first = xxhash_rust::xxh3::xxh3_64(message);
    (0..LOOKS).filter(|_| xxhash_rust::xxh3::xxh3_64(message) != first).count()
}

const ATTACKS: [&str; 3] = ["a kept pointer", "a child that was forked before", "a child that was forked after"];
const MECHANISMS: [Mechanism; 3] = [Mechanism::Shared, Mechanism::Copy, Mechanism::OneShot];
/// How an attacker ends that could not seal what it was about to change.
const NOT_SEALED: i32 = 3;

#[test]
fn volatile_messages_can_be_changed_by_unsafe_code_of_their_sender() {
    for attack in ATTACKS {
        let broker = broker();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut receiver = client.receiver("prey").open().unwrap();
        let (_attacker, _folder) = attacker(&broker, attack, Mechanism::Shared, None);
        let message = receiver.get_timeout(SOON).unwrap();
        assert_eq!(message.mechanism(), Mechanism::Shared);
        let start = Instant::now();
        while changes(&message) == 0 {
            assert!(start.elapsed() < SOON, "{attack}: the attacker did not attack");
        }
    }
}

#[test]
fn a_guard_stops_who_has_the_mapping_from_its_sender_when_it_is_read_only() {
    for attack in ATTACKS {
        let broker = broker();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut receiver = client.receiver("prey").open().unwrap();
        let (mut attacker, _folder) = attacker_with(&broker, attack, Mechanism::Shared, None, true);
        let message = receiver.get_timeout(SOON).unwrap();
        match attack {
            "a child that was forked before" => support::until("it writes", || changes(&message) > 0),
            "a child that was forked after" => assert_eq!(changes(&message), 0),
            _ => {
                assert_eq!(attacker.end().signal(), Some(nix::libc::SIGSEGV));
                assert_eq!(changes(&message), 0);
            }
        }
    }
}

#[test]
fn sealed_messages_do_not_change() {
    for (attack, mechanism) in
        ATTACKS.iter().flat_map(|attack| [(attack, Mechanism::Copy), (attack, Mechanism::OneShot)])
    {
        let broker = broker();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut receiver = client.receiver("prey").require(Protection::Sealed).open().unwrap();
        let (mut attacker, _folder) = attacker(&broker, attack, mechanism, None);
        if (*attack, mechanism) == ("a child that was forked before", Mechanism::OneShot) {
            // The kernel does not seal what a child can write, so it is not even sent.
            assert_eq!(attacker.end().code(), Some(NOT_SEALED));
            assert!(matches!(receiver.get_timeout(SOON), Err(GetError::Disconnected(_) | GetError::TimedOut)));
            continue;
        }
        let message = receiver.get_timeout(SOON).unwrap();
        assert_eq!(message.mechanism(), mechanism);
        assert_eq!(changes(&message), 0, "{attack} against {mechanism}");
    }
}

#[test]
fn messages_of_another_user_do_not_change() {
    if !nix::unistd::geteuid().is_root() {
        println!("not tested: it takes root to start a process as another user");
        return;
    }
    for attack in ATTACKS {
        let broker = broker();
        let client = Client::connect_to(broker.address()).unwrap();
        // Nobody asked for it on either side.
        let mut receiver = client.receiver("prey").open().unwrap();
        let (_attacker, _folder) = attacker(&broker, attack, Mechanism::Shared, Some(OTHER));
        let message = receiver.get_timeout(SOON).unwrap();
        assert_eq!((message.sender().process.uid, message.mechanism()), (OTHER, Mechanism::Copy));
        assert_eq!(changes(&message), 0, "{attack}");
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
    assert!(refused.contains("requires sealed") && refused.contains("protection(Sealed)"), "{refused}");
    client.sender("d").protection(Protection::Sealed).open().unwrap();
}
