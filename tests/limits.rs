//! Small limits: what does not fit is an error that names the limit, and nothing ends by a signal.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::FileExt,
        process::{CommandExt, ExitStatusExt},
    },
    process::{Command, Output, Stdio},
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, Mechanism};
use nix::{
    libc,
    sys::{
        mman::{MlockAllFlags, mlockall},
        resource::{Resource, getrlimit, setrlimit},
    },
};
use support::{
    BrokerProcess, Process, Run, SOON, fbuf, not_tested,
    role::{self, Other, roles},
    until,
};

/// Has a command run with a limit.
#[allow(unsafe_code, reason = "pre_exec")]
fn limit(command: &mut Command, resource: Resource, most: u64) {
    // SAFETY: setrlimit(2) may be called in a child before it executes a program.
    unsafe { command.pre_exec(move || Ok(setrlimit(resource, most, most)?)) };
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes by every mechanism after it may not make a file longer than nothing, as a sandbox that has opened all it needs.
fn write_without_files(_: &str) {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    for mechanism in [Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot] {
        let channel = format!("{mechanism:?}");
        let mut receiver = client.receiver(&channel).open().unwrap();
        let mut sender = client.sender(&channel).slot_size(5000).slots(2).mechanism(mechanism).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.write_all(b"a message").unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, 0, hard).unwrap();
        sender.write(fbuf).unwrap();
        assert_eq!(receiver.get_timeout(SOON).unwrap()[..], *b"a message");
        setrlimit(Resource::RLIMIT_FSIZE, soft, hard).unwrap();
        println!("sent by {channel}");
    }
}

#[test]
fn a_limit_on_files_that_is_lowered_later_ends_no_process_that_sends() {
    roles!(write_without_files);
    let mut other = Other::of(&mut role::command("writes"));
    for mechanism in ["Shared", "Copy", "Lease", "OneShot"] {
        other.hear(&format!("sent by {mechanism}"));
    }
    assert!(other.process.end().success());
}

#[test]
fn a_sender_beyond_the_longest_file_is_an_error_that_names_the_limit() {
    let broker = Embedded::start().unwrap();
    let mut command = fbuf(["send", "c", "/etc/services", "--socket", &broker.address().to_string()]);
    limit(&mut command, Resource::RLIMIT_FSIZE, 256 << 10);
    let output = command.run();
    assert_eq!((output.status.code(), output.status.signal()), (Some(1), None), "{}", said(&output));
    assert!(said(&output).contains("RLIMIT_FSIZE"), "{}", said(&output));
    // The control: a program that does not look gets the signal.
    let mut command = Command::new("sh");
    command.args(["-c", "exec head -c 300000 /dev/zero"]).stdout(fs::File::from(scratch_file()));
    limit(&mut command, Resource::RLIMIT_FSIZE, 256 << 10);
    assert_eq!(command.run_to_its_end().signal(), Some(libc::SIGXFSZ));
}

fn scratch_file() -> std::os::fd::OwnedFd {
    tempfile::tempfile().unwrap().into()
}

#[test]
fn a_broker_beyond_the_longest_file_refuses_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = BrokerProcess::start_with(&folder.path().join("b"), |command| {
        limit(command, Resource::RLIMIT_FSIZE, 4 << 20);
    });
    let client = Client::connect_to(&broker.address).unwrap();
    // The broker would have to make files of 8 MiB: what it refuses is copied.
    let sender = client.sender("c").slot_size(8 << 20).mechanism(Mechanism::Lease).slots(1).open().unwrap();
    assert_eq!(sender.protection_info().mechanism, Mechanism::Copy);
    assert!(sender.protection_info().reason.contains("RLIMIT_FSIZE"), "{}", sender.protection_info());
    assert!(!broker.process.has_ended());
    // The control: it makes those that are short enough.
    let sender = client.sender("d").slot_size(4 << 20).mechanism(Mechanism::Lease).slots(1).open().unwrap();
    assert_eq!(sender.protection_info().mechanism, Mechanism::Lease, "{}", sender.protection_info());
}

#[test]
fn a_broker_goes_on_when_its_log_may_not_grow() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, log) = (folder.path().join("b"), folder.path().join("log"));
    let mut command = fbuf([std::ffi::OsStr::new("broker"), "--socket".as_ref(), socket.as_os_str()]);
    command.stderr(fs::File::create(&log).unwrap());
    limit(&mut command, Resource::RLIMIT_FSIZE, 1024);
    let mut broker = Process::start(&mut command);
    until("the broker listens", || fs::read_to_string(&log).unwrap().contains("listening"));
    let client = Client::connect_to(&fbuf_client::Address::new(&socket)).unwrap();
    while fs::metadata(&log).unwrap().len() < 1024 {
        drop(client.sender("c").slot_size(64).slots(1).open().unwrap());
    }
    for _ in 0..10 {
        drop(client.sender("c").slot_size(64).slots(1).open().unwrap());
    }
    assert!(!broker.has_ended());
}

#[test]
fn a_file_that_may_not_grow_is_an_error_of_recv() {
    let (folder, broker) = (tempfile::tempdir().unwrap(), Embedded::start().unwrap());
    let address = broker.address().to_string();
    let mut command = fbuf(["recv", "c", "--socket", &address]);
    command.arg(folder.path().join("copy")).stderr(Stdio::piped());
    // More than what is between the two takes, and less than the message.
    limit(&mut command, Resource::RLIMIT_FSIZE, 64 << 10);
    let mut receiver = Process::start(&mut command);
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(128 << 10).slots(2).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.write_all(&[1; 128 << 10]).unwrap();
    sender.write(fbuf).unwrap();
    let status = receiver.end();
    let mut said = String::new();
    receiver.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((status.code(), status.signal()), (Some(1), None), "{said}");
}

/// Runs a test of this file in a process of its own, and returns what it printed.
fn alone(test: &str, variable: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env(variable, "1").stdin(Stdio::null()).run()
}

#[test]
fn a_process_that_locks_its_memory() {
    if std::env::var_os("FBUF_TEST_LOCKS").is_none() {
        return;
    }
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    // Without what is there already, and where root is not held to it.
    let user = nix::unistd::Uid::from_raw(65_534);
    setrlimit(Resource::RLIMIT_MEMLOCK, 4 << 20, 4 << 20).unwrap();
    nix::unistd::setresuid(user, user, user).unwrap();
    mlockall(MlockAllFlags::MCL_FUTURE).unwrap();
    let error = client.sender("c").slot_size(16 << 20).slots(2).open().unwrap_err();
    println!("refused: {error}");
    client.sender("c").slot_size(64).slots(2).open().unwrap();
    println!("opened");
}

#[test]
fn locked_memory_beyond_its_limit_is_an_error_that_names_it() {
    if !nix::unistd::geteuid().is_root() {
        return not_tested("a process becomes one that is held to RLIMIT_MEMLOCK, which takes root");
    }
    let output = alone("a_process_that_locks_its_memory", "FBUF_TEST_LOCKS");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{printed} {}", said(&output));
    let refused = printed.lines().find(|line| line.contains("refused: ")).expect("a refusal");
    assert!(refused.contains("RLIMIT_MEMLOCK") && printed.contains("opened"), "{printed}");
}

/// How often a thread was given the processor, as this file in /proc says.
fn turns(status: &fs::File) -> u64 {
    let mut text = [0; 4096];
    let length = status.read_at(&mut text, 0).unwrap();
    let text = String::from_utf8_lossy(&text[..length]).into_owned();
    let counts = text.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
    counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum()
}

#[test]
fn a_process_that_locks_itself_in() {
    if std::env::var_os("FBUF_TEST_NO_DESCRIPTORS").is_none() {
        return;
    }
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let sender = client.sender("c").slot_size(8 << 20).slots(1).mechanism(Mechanism::Lease);
    let mut sender = sender.open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.write_all(b"leased").unwrap();
    sender.write(fbuf).unwrap();
    let received = receiver.get_timeout(SOON).unwrap();
    let mut threads = fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
    let keeper = threads.find(|thread| fs::read_to_string(thread.join("comm")).unwrap() == "fbuf-leases\n");
    let status = fs::File::open(keeper.expect("a thread that keeps leases").join("status")).unwrap();
    drop(threads);
    setrlimit(Resource::RLIMIT_NOFILE, 0, 0).unwrap();
    let before = turns(&status);
    until("it waits again, by the new limit", || turns(&status) > before + 1);
    assert!(received.is_intact() && received[..] == *b"leased");
    drop((received, receiver, sender));
    println!("ended");
}

/// As a sandbox does, once it has all that it needs.
#[test]
fn a_process_that_may_open_nothing_more_ends_its_leases() {
    let output = alone("a_process_that_locks_itself_in", "FBUF_TEST_NO_DESCRIPTORS");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && printed.contains("ended"), "{printed} {}", said(&output));
}

#[test]
fn few_descriptors_are_an_error_that_names_the_limit_and_never_a_panic() {
    let broker = Embedded::start().unwrap();
    let address = broker.address().to_string();
    let mut worked = false;
    for most in 4..64 {
        let mut command = fbuf(["recv", "c", "--socket", &address]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        limit(&mut command, Resource::RLIMIT_NOFILE, most);
        let mut receiver = Process::start(&mut command);
        let client = Client::connect_to(broker.address()).unwrap();
        let is_open = || !client.status().unwrap().is_empty();
        until("it is open, or ends", || receiver.has_ended() || is_open());
        if receiver.has_ended() {
            let mut said = String::new();
            BufReader::new(receiver.0.stderr.take().unwrap()).read_to_string(&mut said).unwrap();
            assert_eq!(receiver.end().code(), Some(1), "with {most}: {said}");
            // The dynamic loader has words of its own for less.
            let names = said.contains("RLIMIT_NOFILE") || said.contains("shared libraries");
            assert!(names && !said.contains("there is no broker"), "with {most}: {said}");
        } else {
            worked = true;
            break;
        }
    }
    assert!(worked, "it works with no number of descriptors");
}

#[test]
fn a_core_of_a_receiver_does_not_hold_the_slots_of_its_sender() {
    let broker = Embedded::start().unwrap();
    let address = broker.address().to_string();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(16 << 20).slots(2).open().unwrap();
    let receiver = Process::start(fbuf(["recv", "c", "--socket", &address]).stdout(Stdio::null()));
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let flags_of = |process: u32| {
        let maps = BufReader::new(fs::File::open(format!("/proc/{process}/smaps")).unwrap());
        let mut lines = maps.lines().map(Result::unwrap).skip_while(|line| !line.contains("/memfd:fbuf-segment"));
        lines.find(|line| line.starts_with("VmFlags:"))
    };
    until("it has mapped the slots", || flags_of(receiver.pid()).is_some());
    until("they are left out of its core", || flags_of(receiver.pid()).is_some_and(|flags| flags.contains(" dd")));
    // The control: those of the sender are its own.
    assert!(!flags_of(std::process::id()).unwrap().contains(" dd"));
}

/// How the command ends with so many descriptors, and what it says: it is given up after a while, in which a link is made.
fn with_descriptors(most: u64, arguments: &[&str], broker: &fbuf_client::Address) -> Output {
    let mut timeout = Command::new("timeout");
    timeout.arg("3").arg(env!("CARGO_BIN_EXE_fbuf")).args(arguments).env("FBUF_BROKER", broker.to_string());
    timeout.stdin(Stdio::null());
    limit(&mut timeout, Resource::RLIMIT_NOFILE, most);
    timeout.run()
}

#[test]
fn with_hardly_any_descriptors_a_command_works_or_names_the_limit() {
    let names = |said: &str| said.contains("RLIMIT_NOFILE");
    let (broker, client) = support::broker();
    for most in 12..22 {
        let channel = format!("to {most}");
        let mut receiver = client.receiver(&channel).keep_waiting().open().unwrap();
        let sent = with_descriptors(most, &["send", &channel], broker.address());
        assert!(sent.status.success() || names(&said(&sent)), "send with {most}: {sent:?}");
        drop(receiver.try_get());
    }
    for most in 12..22 {
        let channel = format!("from {most}");
        let mut sender = client.sender(&channel).slot_size(64).open().unwrap();
        let received = std::thread::scope(|scope| {
            let command = scope.spawn(|| with_descriptors(most, &["recv", &channel], broker.address()));
            until("it is linked, or has ended", || {
                command.is_finished()
                    || sender.wait_for_receivers_timeout(1, std::time::Duration::from_millis(10)).is_ok()
            });
            drop(sender);
            command.join().unwrap()
        });
        assert!(received.status.success() || names(&said(&received)), "recv with {most}: {received:?}");
    }
    // Many are enough.
    let mut receiver = client.receiver("many").keep_waiting().open().unwrap();
    assert!(with_descriptors(64, &["send", "many"], broker.address()).status.success());
    drop(receiver.try_get());
    let folder = tempfile::tempdir().unwrap();
    for most in 14..19 {
        let broker = folder.path().join(most.to_string());
        let mut command = fbuf(["broker", "--socket"]);
        limit(command.arg(&broker).stderr(Stdio::piped()), Resource::RLIMIT_NOFILE, most);
        let process = Process::start(&mut command);
        until("it listens, or has ended", || {
            broker.exists() || fs::read_dir(format!("/proc/{}/fd", process.pid())).is_err()
        });
        match Client::connect_to(&fbuf_client::Address::new(&broker)) {
            Ok(client) => drop(client.status().unwrap()),
            Err(error) => assert!(names(&error.to_string()), "a broker with {most}: {error}"),
        }
    }
}
