//! Which user runs the broker: a client accepts root's and its own user's, and no other unless it is told to, whatever
//! the name is at which that listens, and whatever the environment says.

mod support;

use std::{
    env, fs,
    io::Read,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::Stdio,
    thread,
    time::Duration,
};

use fbuf_broker::{Embedded, Policy};
use fbuf_client::{Address, Client, ConnectError, OpenError};
use nix::unistd::{chroot, setresuid};
use support::{
    BrokerProcess, Run, SOON,
    role::{Other, as_user, command_of, roles},
    until,
};

/// Users that tests act as.
const OTHER: u32 = 65_533;
const ANOTHER: u32 = 65_532;

/// What a child does.
fn play(role: &str) {
    match role {
        "broker" => serve(),
        "client" => connect(),
        "another user" => lose_broker(|| setresuid(OTHER.into(), OTHER.into(), OTHER.into()).unwrap()),
        "another root" => lose_broker(|| chroot("/proc/self/fdinfo").unwrap()),
        other => panic!("no such role: {other}"),
    }
}

/// A broker that serves everybody, as soon as its name is free, until its input ends.
fn serve() {
    let address = Address::new(env::var_os("FBUF_BROKER").unwrap());
    let policy = Policy::parse("[[rule]]\nusers = [\"*\"]\nsend = [\"*\"]\nreceive = [\"*\"]").unwrap();
    let broker = loop {
        match Embedded::start_at(address.clone(), policy.clone()) {
            Ok(broker) => break broker,
            Err(_) => thread::yield_now(),
        }
    };
    println!("serves");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(broker);
}

/// A client by the environment alone.
fn connect() {
    match Client::connect() {
        Ok(client) => println!("connected at {}", client.address()),
        Err(error) => println!("not connected: {error}"),
    }
}

/// A client of a process that changes: whether it comes to be connected again, or what is said of it.
fn lose_broker(change: impl FnOnce()) {
    let client = Client::connect().unwrap();
    change();
    println!("has changed");
    until("it hears that the broker is gone", || !client.is_connected());
    println!("has lost it");
    std::io::stdin().read_exact(&mut [0]).unwrap();
    match client.receiver("c").open() {
        Ok(_) => println!("opened again"),
        Err(error) => println!("not opened: {error}"),
    }
}

/// A child that finds its broker in this environment, or where there is none.
fn child(role: &str, user: u32, environment: &[(&str, &str)]) -> Other {
    child_of("/proc/self/exe".as_ref(), role, user, environment)
}

/// The same, of a copy of this program.
fn child_of(program: &Path, role: &str, user: u32, environment: &[(&str, &str)]) -> Other {
    let mut command = command_of(program, role);
    command.env_remove("XDG_RUNTIME_DIR").envs(environment.iter().copied()).stderr(Stdio::null());
    Other::of(as_user(&mut command, user))
}

fn broker_of(user: u32, address: &Address) -> Other {
    let mut broker = child("broker", user, &[("FBUF_BROKER", &address.to_string())]);
    broker.hear("serves");
    broker
}

fn abstract_name(test: &str) -> Address {
    Address::new(format!("@fbuf-test-{test}-{}", std::process::id()))
}

/// A folder that every user can search.
fn open_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

#[test]
fn a_broker_of_another_user_is_refused_unless_it_is_asked_for() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let address = abstract_name("foreign");
    let _broker = broker_of(OTHER, &address);
    let error = Client::connect_to(&address).unwrap_err();
    assert!(matches!(error, ConnectError::ForeignBroker { user: OTHER, own: 0, .. }), "{error}");
    for words in ["run by user 65533", "(broker user 65533)"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    // The same broker is none that could not be spoken to.
    let client = Client::builder().address(&address).broker_user(ANOTHER).broker_user(OTHER).connect().unwrap();
    let _receiver = client.receiver("c").open().unwrap();
    // Nor does a third user accept it, while its own does.
    for (user, words) in [(ANOTHER, "not connected"), (OTHER, "connected at")] {
        let environment = [("FBUF_BROKER", &*address.to_string())];
        child("client", user, &environment).hear(words);
    }
}

#[test]
fn the_command_accepts_the_broker_of_the_user_that_it_is_told() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let address = abstract_name("command");
    let _broker = broker_of(OTHER, &address);
    let list = |words: &[&str]| support::fbuf(["ls", "--socket"]).arg(address.to_string()).args(words).run();
    let refused = list(&[]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("--broker-user"), "{said}");
    assert!(list(&["--broker-user", "65533"]).status.success());
}

#[test]
fn roots_broker_is_accepted_by_every_user_that_it_serves() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let broker = Embedded::start_with(Policy::own().allow(OTHER)).unwrap();
    let environment = [("FBUF_BROKER", &*broker.address().to_string())];
    child("client", OTHER, &environment).hear("connected at");
}

/// A name is free when its broker has died, and any user may take it.
#[test]
fn a_client_does_not_connect_again_with_a_broker_of_another_user() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let address = abstract_name("again");
    let broker = Embedded::start_at(address.clone(), Policy::own()).unwrap();
    let client = Client::builder().address(&address).broker_user(OTHER).connect().unwrap();
    drop(broker);
    let taker = broker_of(OTHER, &address);
    until("the other broker is seen", || {
        client
            .connection_error()
            .is_some_and(|why| why.contains("run by user 65533 now, and the one before was by root"))
    });
    match client.receiver("c").open() {
        Err(OpenError::BrokerGone { reason: why }) => assert!(why.contains("user 65533"), "{why}"),
        other => panic!("{other:?}"),
    }
    // What could be heard there is heard by a client that accepts it from the beginning.
    Client::builder().address(&address).broker_user(OTHER).connect().unwrap();
    drop(taker);
    let _broker = loop {
        match Embedded::start_at(address.clone(), Policy::own()) {
            Ok(broker) => break broker,
            Err(_) => thread::yield_now(),
        }
    };
    until("the client is there again", || client.is_connected());
}

#[test]
fn a_runtime_folder_of_another_user_is_left_aside() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let folder = open_folder();
    let socket = Address::new(folder.path().join("fbuf.sock"));
    chown(folder.path(), Some(OTHER), Some(OTHER)).unwrap();
    let _broker = broker_of(OTHER, &socket);
    let environment = [("XDG_RUNTIME_DIR", folder.path().to_str().unwrap())];
    let client = |user| child("client", user, &environment).hear("connected");
    assert!(client(OTHER).contains(&format!("connected at {socket}")));
    let said = client(0);
    assert!(!said.contains(&format!("connected at {socket}")), "{said}");
    // Root may have a broker of the machine here; if not, the error says what was left aside.
    assert!(
        said.contains("connected at /run/fbuf/broker.sock") || said.contains("is no folder of this user"),
        "{said}"
    );
}

/// A program with the rights of its file's owner does not go where its caller's environment sends it, be the broker
/// there one that it accepts.
#[test]
fn a_set_user_id_program_does_not_ask_the_environment() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let folder = open_folder();
    let program = folder.path().join("program");
    fs::copy("/proc/self/exe", &program).unwrap();
    let broker = Embedded::start_with(Policy::own().allow(OTHER)).unwrap();
    let environment = [("FBUF_BROKER", &*broker.address().to_string())];
    let run = |mode| {
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
        child_of(&program, "client", OTHER, &environment).hear("connected")
    };
    let here = format!("connected at {}", broker.address());
    assert!(run(0o755).contains(&here));
    let said = run(0o4755);
    assert!(!said.contains(&here), "{said}");
    assert!(
        said.contains("connected at /run/fbuf/broker.sock") || said.contains("a caller with fewer rights"),
        "{said}"
    );
}

#[test]
fn a_client_that_waits_may_come_before_its_broker() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::new(folder.path().join("broker"));
    let short = Client::builder().address(&address).wait_for_broker(Duration::from_millis(20)).connect().unwrap_err();
    assert!(matches!(short, ConnectError::NoBroker { .. }), "{short:?}");
    let wanted = format!("there is no broker at {address}, although it was waited for 20ms");
    assert!(short.to_string().starts_with(&wanted), "{short}");
    // On the thread of a runtime, which is no more in the way than any other.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let waiting = {
        let address = address.clone();
        runtime.spawn(async move { Client::builder().address(&address).wait_for_broker(Duration::MAX).connect() })
    };
    until_it_waits();
    let _broker = BrokerProcess::start(&folder.path().join("broker"));
    let client = runtime.block_on(waiting).unwrap().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    support::send(&mut sender, b"here");
    assert_eq!(&receiver.get_timeout(SOON).unwrap()[..], b"here");
}

/// Waits until a client has looked for its broker some times, and sleeps in between.
fn until_it_waits() {
    let pauses = |task: fs::DirEntry| {
        let is_control = fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "fbuf-control\n");
        let status = fs::read_to_string(task.path().join("status")).ok().filter(|_| is_control)?;
        let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        switches.trim().parse::<u32>().ok()
    };
    until("it has paused some times", || {
        fs::read_dir("/proc/self/task").unwrap().flatten().filter_map(pauses).any(|count| count >= 4)
    });
}

#[test]
fn what_keeps_a_client_from_its_broker_is_named() {
    roles!(play);
    let folder = open_folder();
    let path = folder.path().join("broker");
    let error = |path: &Path| Client::connect_to(&Address::new(path)).unwrap_err().to_string();
    let says = |said: String, words: &str| assert!(said.contains(words), "{said}");
    says(error(&path), "there is no broker");
    BrokerProcess::start(&path).process.kill();
    says(error(&path), "is gone, and its socket file is left");
    fs::remove_file(&path).unwrap();
    fs::write(&path, "").unwrap();
    says(error(&path), "is no socket");
    says(error(&path.join("broker")), "a part of its path is no folder");
    says(error(Path::new(&format!("/{}", "x".repeat(200)))), "choose a shorter one");
    fs::remove_file(&path).unwrap();
    if !support::is_root() {
        return;
    }
    let _broker = BrokerProcess::start(&path);
    let environment = [("FBUF_BROKER", path.to_str().unwrap())];
    let said = child("client", OTHER, &environment).hear("connected");
    assert!(said.contains("user 65533 may not write the socket") && !said.contains("there is no broker"), "{said}");
}

/// A process that has less rights than when it connected, or sees other files, is connected again, or told what is wrong.
#[test]
fn a_process_that_changes_user_or_root_is_connected_again_or_told() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    for (role, words) in
        [("another user", "opened again"), ("another root", "another root folder than when it connected")]
    {
        let folder = open_folder();
        let path = folder.path().join("broker");
        let start = || {
            BrokerProcess::start_with(&path, |command| {
                command.args(["--allow", &OTHER.to_string()]);
            })
        };
        let mut broker = start();
        let environment = [("FBUF_BROKER", path.to_str().unwrap())];
        let mut process = child(role, 0, &environment);
        process.hear("has changed");
        broker.process.kill();
        process.hear("has lost it");
        let _broker = start();
        process.tell("");
        process.hear(words);
    }
}

/// The clients of a process that goes elsewhere find their broker again.
#[test]
fn a_relative_path_is_that_of_the_folder_in_which_the_client_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    // It is the only test of this program that changes the folder, and the only one with a relative path.
    env::set_current_dir(folder.path()).unwrap();
    let client = Client::connect_to(&Address::new("broker")).unwrap();
    env::set_current_dir("/").unwrap();
    assert!(Client::connect_to(&Address::new("broker")).is_err());
    broker.process.kill();
    until("the client hears of it", || !client.is_connected());
    let _broker = BrokerProcess::start(&path);
    until("the client is there again", || client.is_connected());
}
