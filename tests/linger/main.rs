//! Descriptors that take long to close, which a process of another user passes wherever it can: to the broker, over links,
//! into the queues of sockets that are never read. They cost that process its connection, and hold up no other. Attackers and those
//! that are attacked are processes of their own: what is closed last, and by which of them, is what this is about.

mod attacker;
mod file_system;
mod honest;
#[path = "../support/hostile.rs"]
mod hostile;
#[path = "../support/lingering.rs"]
mod lingering;
mod sockets;
#[path = "../support/mod.rs"]
mod support;

use std::{
    fs,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Address, Client};
use fbuf_core::socket::wire::{Descriptor, Letter};
use file_system::ATTACKS;
use nix::{libc, unistd::geteuid};
use support::{
    BrokerProcess, closers, is_root,
    role::{Other, command, roles},
    until,
};

/// The user of attackers.
const OTHER: u32 = 65_533;
/// For how long a socket lingers, in seconds, and for how long one does that is not waited for.
const LINGER: i32 = 5;
const FOR_EVER: i32 = 1000;
/// One thread for the attacker, and perhaps one for memory and one of an attacker that is not known any more.
const FEW: usize = 3;
/// Nothing that is held up by a lingering socket takes so short a time, and nothing else so long, also on a busy machine.
const LONG: Duration = Duration::from_secs(1);

/// What a child does.
fn play(role: &str) {
    let (role, word) = role.split_once(' ').unwrap_or((role, ""));
    let seconds = || word.parse().unwrap();
    match role {
        "bare" => sockets::bare(),
        "sockets" => sockets::sockets(),
        "honest" => honest::honest(),
        "links" => attacker::attack_links(seconds()),
        "broker" => attacker::attack_broker(seconds()),
        "mount" => file_system::mount(Path::new(word)),
        "fuse" => file_system::attack(Path::new(word)),
        _ => panic!("no such role: {role}"),
    }
}

fn letter(descriptors: Vec<Descriptor>) -> Letter {
    Letter { bytes: vec![0], descriptors }
}

fn time(what: impl FnOnce()) -> Duration {
    let start = Instant::now();
    what();
    start.elapsed()
}

/// A child of this user, with a broker or without.
fn own(role: &str, broker: Option<&BrokerProcess>) -> Other {
    let mut command = command(role);
    if let Some(broker) = broker {
        command.env("FBUF_BROKER", broker.address.to_string());
    }
    Other::of(&mut command)
}

fn milliseconds(other: &mut Other, words: &str) -> Duration {
    let time = Duration::from_millis(other.number(words));
    println!("{words} {time:?}");
    time
}

/// Has an honest one end, and looks whether anything has held it up: how many offences it was told of, and how many
/// threads of it wait.
fn judge(honest: &mut Other) -> (u64, u64) {
    honest.tell("");
    let offences = honest.number("offences:");
    for what in ["longest call:", "longest drop:"] {
        let time = milliseconds(honest, what);
        assert!(time < LONG, "{what} {time:?}");
    }
    (offences, honest.number("threads wait"))
}

/// A broker of this user, at which the attackers' may connect.
fn broker(folder: &Path) -> BrokerProcess {
    let policy = folder.join("policy.toml");
    let all = "send = [\"*\"]\nreceive = [\"*\"]\n";
    fs::write(&policy, format!("[[rule]]\nusers = [{}, {OTHER}]\n{all}", geteuid())).unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    BrokerProcess::start_with(&folder.join("broker"), |command| {
        command.arg("--policy").arg(&policy);
    })
    .forget_log()
}

/// The longest that the broker takes for a newcomer, until it is over.
fn longest_attach(broker: &Address, over: &mpsc::Receiver<()>) -> Duration {
    let mut longest = Duration::ZERO;
    // One every so often, until the other end is dropped.
    while over.recv_timeout(Duration::from_millis(1)) == Err(RecvTimeoutError::Timeout) {
        longest = longest.max(time(|| {
            let client = Client::connect_to(broker).unwrap();
            client.clients().unwrap();
        }));
    }
    longest
}

/// While an attacker is at it, others are served.
fn besiege(broker: &BrokerProcess, attacker: &mut Other, last: &str) {
    let address = &broker.address;
    let longest = thread::scope(|scope| {
        // Dropped also if the attacker fails.
        let (end, over) = mpsc::channel();
        let attach = scope.spawn(move || longest_attach(address, &over));
        attacker.hear(last);
        drop(end);
        attach.join().unwrap()
    });
    println!("longest attach: {} ms", longest.as_millis());
    assert!(longest < LONG, "{longest:?}");
}

#[test]
fn sockets_in_which_something_lingers_hold_up_only_who_does_nothing_about_it() {
    roles!(play);
    let mut bare = own("bare", None);
    for _ in 0..2 {
        let time = milliseconds(&mut bare, "it took");
        assert!(time > 4 * LONG, "nothing lingers: {time:?}");
    }
    let mut sockets = own("sockets", None);
    for _ in 0..5 {
        let time = milliseconds(&mut sockets, "it took");
        assert!(time < LONG, "{time:?}");
    }
    let waiting: u64 = sockets.number("threads wait");
    assert_eq!(waiting, 1, "threads wait");
}

#[test]
fn no_user_holds_the_broker_up() {
    roles!(play);
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    let mut attacker = Other::start(&broker.address, format!("broker {FOR_EVER}"), OTHER);
    besiege(&broker, &mut attacker, "it is done");
    let waiting = closers(broker.process.pid());
    println!("{waiting} threads of the broker wait");
    assert!((1..=FEW).contains(&waiting), "{waiting}");
    // When the attacker is gone, nothing lingers.
    attacker.process.kill();
    until("all is closed", || closers(broker.process.pid()) == 0);
}

#[test]
fn no_peer_of_another_user_holds_a_sender_or_a_receiver_up() {
    roles!(play);
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    for seconds in [LINGER, FOR_EVER] {
        let mut honest = own("honest", Some(&broker));
        honest.hear("it is linked");
        let mut attacker = Other::start(&broker.address, format!("links {seconds}"), OTHER);
        besiege(&broker, &mut attacker, "it is done");
        let (offences, waiting) = judge(&mut honest);
        assert!(offences >= 5, "{offences} offences");
        assert!((1..=FEW as u64).contains(&waiting), "{waiting} threads wait");
        attacker.process.kill();
        honest.hear("it is over");
        assert!(honest.process.end().success());
    }
}

/// Its file system is never asked, but when a file is closed.
#[test]
fn no_file_system_of_another_user_holds_a_receiver_up() {
    roles!(play);
    if !is_root() {
        return;
    }
    let can_mount = fs::File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse");
    if let Err(error) = can_mount {
        return support::not_tested(&format!("a file system in user space: {error}"));
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    let place = folder.path().join("mount");
    fs::create_dir(&place).unwrap();
    let mut honest = own("honest", Some(&broker));
    honest.hear("it is linked");
    let mut attacker;
    // Killed before those that wait for it, whatever comes.
    let mut file_system = own(&format!("mount {}", place.display()), None);
    file_system.hear("it is mounted");
    attacker = Other::start(&broker.address, format!("fuse {}", place.display()), OTHER);
    attacker.hear("it is open");
    file_system.tell("");
    file_system.hear("it is unmounted");
    besiege(&broker, &mut attacker, "it pauses");
    let waiting = closers(honest.process.pid());
    assert!((1..=FEW).contains(&waiting), "{waiting} threads wait for an answer that does not come");
    let pid = honest.process.pid();
    let open = || {
        let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        all.filter(|one| fs::read_link(one.path()).is_ok_and(|file| file.ends_with("file"))).count()
    };
    let before = open();
    assert!((17..=17 * ATTACKS).contains(&before), "{before} of its files are open");
    honest.hear("it takes no more");
    attacker.tell("");
    besiege(&broker, &mut attacker, "it is done");
    assert_eq!(open(), before, "what that user passes is still taken");
    let (offences, waiting) = judge(&mut honest);
    assert!((ATTACKS as u64 - 1..=ATTACKS as u64).contains(&offences), "{offences} offences");
    assert!((1..=FEW as u64).contains(&waiting), "{waiting} threads wait");
    file_system.process.kill();
    honest.hear("it is over");
    assert!(honest.process.end().success());
}
