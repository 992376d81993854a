//! The broker's socket file, its folder and its policy: no other user can have the broker change another file, keep it
//! from starting, or stay in its place unnoticed.

mod support;

use std::{
    fs::{self, File, Permissions},
    io::{BufRead, BufReader, Read},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
    },
    path::Path,
    process::{Output, Stdio},
};

use fbuf_client::Client;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        signal::Signal,
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
    },
    unistd::geteuid,
};
use support::{BrokerProcess, HandedOver, Process, Run, SOON, fbuf};

const OTHER: u32 = 65_533;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

/// A broker that must not start: what it says.
fn refused(socket: &Path) -> String {
    let Output { status, stderr, .. } = fbuf(["broker", "--socket"]).arg(socket).run();
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

/// Reads the log until it says this.
fn wait_for(broker: &mut BrokerProcess, words: &str) {
    let mut line = String::new();
    while !line.contains(words) {
        line.clear();
        assert_ne!(broker.log.read_line(&mut line).unwrap(), 0, "the broker has ended, and has not said {words:?}");
    }
}

#[test]
fn a_folder_that_other_users_can_write_is_refused_unless_it_is_sticky() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    set_mode(folder.path(), 0o777);
    let said = refused(&path);
    assert!(said.contains("other users can write") && said.contains("mode 777"), "{said}");
    set_mode(folder.path(), 0o1777);
    BrokerProcess::start(&path);
}

#[test]
fn a_folder_of_another_user_is_refused() {
    if !geteuid().is_root() {
        return support::not_tested("it takes root to have a folder of another user");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    chown(folder.path(), Some(OTHER), Some(OTHER)).unwrap();
    let said = refused(&path);
    assert!(said.contains("belongs to user 65533"), "{said}");
    chown(folder.path(), Some(0), Some(0)).unwrap();
    BrokerProcess::start(&path);
}

#[test]
fn a_dead_socket_of_another_user_is_not_removed() {
    if !geteuid().is_root() {
        return support::not_tested("it takes root to have a file of another user");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    BrokerProcess::start(&path).process.kill();
    chown(&path, Some(OTHER), Some(OTHER)).unwrap();
    let said = refused(&path);
    assert!(said.contains("where a socket of user 65533 is"), "{said}");
    // One's own is.
    chown(&path, Some(0), Some(0)).unwrap();
    BrokerProcess::start(&path);
}

/// What takes the socket's place, be it moved there between two system calls of the broker, is not what it changes.
#[test]
fn a_broker_whose_file_was_replaced_ends_and_leaves_the_other_file_alone() {
    let folder = tempfile::tempdir().unwrap();
    let [path, moved, secret] = ["broker", "moved", "secret"].map(|name| folder.path().join(name));
    fs::write(&secret, "secret").unwrap();
    set_mode(&secret, 0o600);
    let mut broker = BrokerProcess::start_with(&path, |command| {
        command.args(["--allow", "65533"]);
    });
    assert_eq!(mode(&path), 0o666);
    fs::rename(&path, &moved).unwrap();
    symlink(&secret, &path).unwrap();
    wait_for(&mut broker, "was replaced");
    assert_eq!(broker.process.end().code(), Some(1));
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink(), "it has removed what is not its own");
    assert_eq!(mode(&secret), 0o600);
}

#[test]
fn a_process_that_keeps_the_folder_locked_keeps_no_broker_from_starting() {
    let folder = tempfile::tempdir().unwrap();
    let open = || File::open(folder.path()).unwrap();
    let _locked = Flock::lock(open(), FlockArg::LockShared).unwrap();
    assert!(Flock::lock(open(), FlockArg::LockExclusiveNonblock).is_err(), "the lock keeps nobody out");
    let broker = BrokerProcess::start(&folder.path().join("broker"));
    Client::connect_to(&broker.address).unwrap();
}

#[test]
fn a_socket_file_that_is_removed_is_made_anew_and_old_and_new_clients_meet() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start_with(&path, |command| {
        command.args(["--allow", "65533"]);
    });
    let mut receiver = Client::connect_to(&broker.address).unwrap().receiver("c").open().unwrap();
    fs::remove_file(&path).unwrap();
    wait_for(&mut broker, "was made anew");
    assert!(fs::metadata(&path).unwrap().file_type().is_socket());
    assert_eq!(mode(&path), 0o666, "other users may connect as before");
    let mut sender = Client::connect_to(&broker.address).unwrap().sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate().unwrap();
    sender.write(fbuf).unwrap();
    receiver.get_timeout(SOON).unwrap();
    broker.process.signal(Signal::SIGTERM);
    assert!(broker.process.end().success());
    assert!(!path.exists(), "the new file has stayed");
}

#[test]
fn a_folder_that_is_removed_is_missed_until_it_is_there_again() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    let path = inner.join("broker");
    fs::create_dir(&inner).unwrap();
    let mut broker = BrokerProcess::start(&path);
    fs::remove_dir_all(&inner).unwrap();
    wait_for(&mut broker, "no client finds this broker");
    fs::create_dir(&inner).unwrap();
    wait_for(&mut broker, "was made anew");
    Client::connect_to(&broker.address).unwrap();
}

#[test]
fn the_file_of_a_socket_that_was_handed_over_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let handed = HandedOver::at(&path);
    let mut broker = Process::start(handed.broker().stderr(Stdio::piped()).env("NO_COLOR", "1"));
    let mut log = BufReader::new(broker.0.stderr.take().unwrap());
    let mut wait_for = |words: &str| {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "the broker has ended, and has not said {words:?}");
        }
    };
    wait_for("listening");
    fs::remove_file(&path).unwrap();
    wait_for("which was handed over, is gone or was replaced");
}

#[test]
fn a_broker_ends_if_another_listens_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let [path, new] = ["broker", "new"].map(|name| folder.path().join(name));
    let mut broker = BrokerProcess::start(&path);
    let other = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(other.as_raw_fd(), &UnixAddr::new(&new).unwrap()).unwrap();
    listen(&other, Backlog::new(1).unwrap()).unwrap();
    fs::rename(&new, &path).unwrap();
    assert_eq!(broker.process.end().code(), Some(1));
    let mut log = String::new();
    broker.log.read_to_string(&mut log).unwrap();
    assert!(log.contains("was replaced by another"), "{log}");
    assert!(path.exists(), "the file of the other was removed");
}

#[test]
fn a_policy_of_another_user_is_refused() {
    if !geteuid().is_root() {
        return support::not_tested("it takes root to have a file of another user");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "[[rule]]\nusers = [0]").unwrap();
    let check = || fbuf(["broker", "--check-policy"]).arg(file.path()).run();
    assert!(check().status.success());
    chown(file.path(), Some(OTHER), None).unwrap();
    let Output { status, stderr, .. } = check();
    let said = String::from_utf8(stderr).unwrap();
    assert!(status.code() == Some(1) && said.contains("belongs to user 65533"), "{said}");
}
