//! Processes that share nothing but the broker's socket: each in namespaces of its own, as in a container.

mod support;

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Command, Stdio},
};

use fbuf_broker::{Embedded, Policy};
use fbuf_client::{Client, GetError, Mechanism};
use support::{BrokerProcess, Process, Random, Run, SOON, is_root, not_tested};

/// Runs the command beside the broker's socket, and where everything else that programs write to is new.
const CONTAINER: &str = r#"
    set -e
    socket=$1 fbuf=$2; shift 2
    mount -t tmpfs tmpfs /run
    touch /run/broker.sock /run/fbuf
    mount --bind "$socket" /run/broker.sock
    mount --bind "$fbuf" /run/fbuf
    for folder in /tmp /dev/shm; do mount -t tmpfs tmpfs "$folder"; done
    exec /run/fbuf "$@" --socket /run/broker.sock"#;

/// The namespaces that each has of its own.
const NAMESPACES: [&str; 6] = ["user", "pid_for_children", "mnt", "ipc", "uts", "net"];

/// Runs what follows in namespaces of its own. It is killed when this is.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]);
    command.args(["--ipc", "--uts", "--net"]).stdin(Stdio::null());
    command.env_remove("FBUF_BROKER").env_remove("NOTIFY_SOCKET");
    command
}

/// Whether there can be containers. If not, the test is noted as not tested.
fn can_unshare() -> bool {
    let why = match unshare().args(["mount", "-t", "tmpfs", "tmpfs", "/run"]).output() {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("unshare(1): {error}"),
    };
    not_tested(&format!("no container can be made here: {why}"));
    false
}

struct Place {
    folder: tempfile::TempDir,
    _broker: BrokerProcess,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let _broker = BrokerProcess::start(&folder.path().join("broker"));
        Self { folder, _broker }
    }

    /// With a broker that is in a container too, where it sees no process of the others.
    fn with_contained_broker(words: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("broker");
        let _broker = BrokerProcess::start_with(&socket, |command| {
            let mut contained = unshare();
            contained.arg(command.get_program()).args(command.get_args()).args(words);
            *command = contained;
        });
        Self { folder, _broker }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command, in a container.
    fn contained(&self, words: &[&str]) -> Command {
        let mut command = unshare();
        command.args(["sh", "-c", CONTAINER, "sh"]).arg(self.path("broker")).arg(env!("CARGO_BIN_EXE_fbuf"));
        command.args(words);
        command
    }
}

#[test]
fn streams_get_from_container_to_container_whoever_starts_first() {
    if !can_unshare() {
        return;
    }
    let levels = [
        (&["send", "c"][..], &["recv", "c"][..]),
        (&["send", "c", "--protection", "leased", "--slot-size", "8MiB"], &["recv", "c", "--require", "leased"]),
        (&["send", "c", "--protection", "sealed"], &["recv", "c", "--require", "sealed"]),
    ];
    for place in [Place::new(), Place::with_contained_broker(&[])] {
        let (original, copy) = (place.path("original"), place.path("copy"));
        let data = Random(7).bytes(20_000_000);
        fs::write(&original, &data).unwrap();
        for (sending, receiving) in levels {
            for sender_first in [false, true] {
                let (mut send, mut receive) = (place.contained(sending), place.contained(receiving));
                send.stdin(File::open(&original).unwrap());
                receive.stdout(File::create(&copy).unwrap());
                let (first, second) = if sender_first { (&mut send, &mut receive) } else { (&mut receive, &mut send) };
                let mut first = Process::start(first);
                assert!(second.run_to_its_end().success() && first.end().success(), "{sending:?}");
                assert!(fs::read(&copy).unwrap() == data, "{sending:?}");
            }
        }
    }
}

#[test]
fn nothing_else_is_shared_and_a_death_is_noticed() {
    if !can_unshare() {
        return;
    }
    let places = [(Place::new(), "(process "), (Place::with_contained_broker(&[]), "in another PID namespace)")];
    for (place, whose) in places {
        let mut send = Process::start(place.contained(&["send", "c"]).stdin(Stdio::piped()));
        let mut receive = place.contained(&["recv", "c"]);
        let mut receive = Process::start(receive.stdout(Stdio::piped()).stderr(Stdio::piped()));
        // Waiting for the end of a child closes this first, if the child has it.
        let mut input = send.0.stdin.take().unwrap();
        input.write_all(b"half of").unwrap();
        let mut half = [0; 7];
        receive.0.stdout.as_mut().unwrap().read_exact(&mut half).unwrap();
        assert_eq!(&half, b"half of");

        let namespaces =
            |process: u32| NAMESPACES.map(|name| fs::read_link(format!("/proc/{process}/ns/{name}")).unwrap());
        let all = [std::process::id(), send.pid(), receive.pid()].map(namespaces);
        let distinct: HashSet<_> = all.iter().flatten().collect();
        assert_eq!(distinct.len(), 3 * NAMESPACES.len(), "{all:?}");

        send.kill();
        assert_eq!(receive.end().code(), Some(3));
        let mut said = String::new();
        receive.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains(whose) && said.contains("died before it ended its stream"), "{said}");
    }
}

/// In the broker's user namespace they have no id, and are shown under the same one.
#[test]
fn users_whom_the_broker_cannot_tell_apart_are_not_taken_for_one() {
    if !can_unshare() {
        return;
    }
    if !is_root() {
        return;
    }
    let place = Place::with_contained_broker(&["--allow", "65534"]);
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // A copy, where they may search every folder above it.
    let fbuf = place.path("fbuf");
    fs::copy(env!("CARGO_BIN_EXE_fbuf"), &fbuf).unwrap();
    let command = |user: u32, words: &[&str]| {
        let mut command = Command::new(&fbuf);
        command.uid(user).gid(user).args(words).arg("--socket").arg(place.path("broker"));
        command
    };
    let mut send = Process::start(command(1001, &["send", "c", "--to-users", "*"]).stdin(Stdio::piped()));
    send.0.stdin.take().unwrap().write_all(b"x").unwrap();
    // Refused, if its messages were taken for those of the receiver's own user.
    assert!(command(1002, &["recv", "c", "--from-users", "*", "--require", "sealed"]).run_to_its_end().success());
    assert!(send.end().success());
}

/// A broker at the address of the machine's, and one after the other that lists what is open there, as in a login session.
const SESSION: &str = r#"
    set -e
    fbuf=$1
    mount -t tmpfs tmpfs /run
    mkdir -p /run/user/session
    env -u XDG_RUNTIME_DIR "$fbuf" broker 2>/dev/null &
    until env -u XDG_RUNTIME_DIR "$fbuf" ls >/dev/null 2>&1; do kill -0 $!; done
    export XDG_RUNTIME_DIR=/run/user/session
    "$fbuf" ls
    kill $! && wait $!
    exec "$fbuf" ls"#;

#[test]
fn a_client_in_a_login_session_finds_the_broker_of_the_machine() {
    if !can_unshare() {
        return;
    }
    let output = unshare().args(["sh", "-c", SESSION, "sh", env!("CARGO_BIN_EXE_fbuf")]).run();
    let (listed, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(listed.contains("no endpoint"), "{output:?}");
    // The control: without that broker there is none, and the error says where it was looked for.
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(said.contains("/run/user/session/fbuf.sock") && said.contains("/run/fbuf/broker.sock"), "{said}");
}

/// A user that is root in a user namespace of its own, or nobody there, is the user that it is.
#[test]
fn a_user_gains_nothing_by_a_user_namespace() {
    const OTHER: u32 = 65_533;
    if !can_unshare() || !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let fbuf = folder.path().join("fbuf");
    fs::copy(env!("CARGO_BIN_EXE_fbuf"), &fbuf).unwrap();
    let broker = Embedded::start_with(Policy::own().allow(OTHER)).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    for (map, inside) in [(&["--map-root-user"][..], "0"), (&[], "65534")] {
        let contained = |words: &[&str]| {
            let mut command = Command::new("unshare");
            command.arg("--user").args(map).args(words).uid(OTHER).gid(OTHER).stdin(Stdio::null());
            command
        };
        let id = contained(&["id", "-u"]).run();
        assert_eq!(String::from_utf8_lossy(&id.stdout).trim(), inside);
        let mut receiver = client.receiver("c").open().unwrap();
        let mut send = contained(&[fbuf.to_str().unwrap(), "send", "c", "/etc/passwd"]);
        // There the broker's user has no id.
        send.args(["--broker-user", "65534", "--socket", &broker.address().to_string()]);
        let mut send = Process::start(&mut send);
        let message = receiver.get_timeout(SOON).unwrap();
        let sender = message.sender();
        assert_eq!((sender.process.uid, sender.same_user, sender.trusted), (OTHER, false, false));
        assert_eq!(message.mechanism(), Mechanism::Copy);
        let charged = broker.broker().used().into_iter().map(|(user, ..)| user).collect::<HashSet<_>>();
        assert_eq!(charged, HashSet::from([0, OTHER]));
        drop(message);
        assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
        drop(receiver);
        assert!(send.end().success());
    }
}
