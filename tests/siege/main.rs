//! Processes that mean harm, each with one kind of attack which it goes on with until it is killed, against a
//! broker and against peers. Meanwhile honest ones stream, and a newcomer attaches; and when the attacker is
//! gone, nothing is left of it.

mod attacker;
#[path = "../support/hostile.rs"]
mod client;
#[path = "../support/mod.rs"]
mod support;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{ChildStdout, Command, Stdio},
};

use attacker::Attack;
use fbuf_client::{Client, GetError, Receiver, Sender};
use nix::unistd::geteuid;
use support::{BrokerProcess, Holdings, Process, SOON, until_is};

/// Another user, as which attackers run if this one is root.
const OTHER: u32 = 65_534;
/// How many messages honest ones exchange during an attack.
const MESSAGES: u64 = 500;
/// How often somebody attaches during an attack.
const NEWCOMERS: usize = 5;

/// What this program does when it is run again; nothing in the process that tests.
#[test]
fn role() {
    let Ok(role) = env::var("FBUF_TEST_ROLE") else { return };
    attacker::attack(Attack::ALL[role.parse::<usize>().unwrap()]);
}

#[test]
fn no_attack_keeps_honest_ones_from_anything() {
    let folder = tempfile::tempdir().unwrap();
    let other = if geteuid().is_root() { OTHER } else { geteuid().as_raw() };
    let policy = folder.path().join("policy.toml");
    fs::write(&policy, policy_for(geteuid().as_raw(), other)).unwrap();
    // The other user has to get to the socket.
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let broker = BrokerProcess::start_with(&folder.path().join("broker"), |command| {
        command.arg("--policy").arg(&policy);
    });
    let broker = broker.forget_log();
    let client = Client::connect_to(&broker.address).unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(16).open().unwrap();
    let mut receiver = client.receiver("c").stay().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut next = 0;
    let holdings = || [std::process::id(), broker.process.pid()].map(Holdings::of);
    exchange(&mut sender, &mut receiver, &mut next);
    let before = holdings();
    for (number, attack) in Attack::ALL.into_iter().enumerate() {
        let program = program_for(other, folder.path());
        let (mut attacker, output) = start(&program, number, other, &broker);
        for _ in 0..NEWCOMERS {
            exchange(&mut sender, &mut receiver, &mut next);
            attach(&broker);
        }
        assert!(!attacker.has_ended(), "{attack:?}: the attacker failed");
        attacker.kill();
        drop(output);
        until_is(&format!("after {attack:?}"), &before, || {
            sender.look();
            while sender.departed().is_some() {}
            while let Err(error) = receiver.try_get() {
                assert!(is_of_attacker(&error), "{attack:?}: {error}");
            }
            holdings()
        });
        println!("{attack:?}: held off");
    }
}

/// The attackers get as little as they need.
fn policy_for(own: u32, other: u32) -> String {
    let quota = "{ connections = 64, descriptors = 64, links = 64, channels = 64, bytes = \"16MiB\", requests_per_second = 200 }";
    match own == other {
        true => format!("[[rule]]\nusers = [{own}]\nsend = [\"*\"]\nreceive = [\"*\"]"),
        false => format!(
            "[[rule]]\nusers = [{own}]\nsend = [\"*\"]\nreceive = [\"*\"]\n\
             [[rule]]\nname = \"others\"\nusers = [{other}]\nsend = [\"*\"]\nreceive = [\"*\"]\nquota = {quota}"
        ),
    }
}

/// This program, where the other user may run it.
fn program_for(other: u32, folder: &Path) -> std::path::PathBuf {
    let own = env::current_exe().unwrap();
    if other == geteuid().as_raw() {
        return own;
    }
    let copy = folder.join("attacker");
    if !copy.exists() {
        fs::copy(own, &copy).unwrap();
    }
    copy
}

fn start(program: &Path, attack: usize, user: u32, broker: &BrokerProcess) -> (Process, BufReader<ChildStdout>) {
    let mut command = Command::new(program);
    command.args(["role", "--exact", "--nocapture"]).stdout(Stdio::piped()).stderr(Stdio::inherit());
    command.env("FBUF_TEST_ROLE", attack.to_string()).env("FBUF_BROKER", broker.address.to_string());
    if user != geteuid().as_raw() {
        command.uid(user).gid(user);
    }
    let mut process = Process::start(&mut command);
    // It is at it.
    let mut said = BufReader::new(process.0.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(attacker::BEGUN) {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "{:?} ended before it began", Attack::ALL[attack]);
    }
    (process, said)
}

/// Honest messages arrive, all, in order, whatever others do on the same channel.
fn exchange(sender: &mut Sender, receiver: &mut Receiver, next: &mut u64) {
    for _ in 0..MESSAGES {
        let mut fbuf = loop {
            match sender.try_allocate() {
                Some(fbuf) => break fbuf,
                None => sender.look(),
            }
        };
        fbuf.resize(8).unwrap();
        fbuf.copy_from_slice(&next.to_ne_bytes());
        sender.write(fbuf).unwrap();
        loop {
            match receiver.get_timeout(SOON) {
                Ok(received) if received.sender().process.pid as u32 == std::process::id() => {
                    assert_eq!(received[..], next.to_ne_bytes());
                    break;
                }
                // What an attacker sends within the rules.
                Ok(_) => {}
                Err(error) => assert!(is_of_attacker(&error), "{error}"),
            }
        }
        *next += 1;
    }
}

fn is_of_attacker(error: &GetError) -> bool {
    match error {
        GetError::PeerViolation { peer, .. } | GetError::Disconnected(peer) | GetError::Exhausted { peer, .. } => {
            peer.process.pid as u32 != std::process::id()
        }
        _ => false,
    }
}

/// A newcomer is linked, and exchanges a message.
fn attach(broker: &BrokerProcess) {
    let client = Client::connect_to(&broker.address).unwrap();
    let mut sender = client.sender("newcomers").slot_size(8).slots(2).open().unwrap();
    let mut receiver = client.receiver("newcomers").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate_timeout(SOON).unwrap();
    sender.write(fbuf).unwrap();
    receiver.get_timeout(SOON).unwrap();
}
