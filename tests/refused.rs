//! System calls that a filter refuses to one of two processes: what each of them is told.

mod support;

use std::{os::unix::process::CommandExt, process::Command, time::Duration};

use fbuf_client::{Client, DisconnectReason, GetError, Mechanism, WaitError};
use nix::{libc, unistd::geteuid};
use support::{
    BrokerProcess, Run, SOON, broker, fbuf,
    filter::{can_refuse, refuse},
    role::{Other, roles},
    until,
};

/// Long enough for a link to be made, which is not.
const WHILE: Duration = Duration::from_millis(700);

/// What a child does: it opens an end of the channel, has a call refused, and says what it hears of the link.
fn play(role: &str) {
    if role == "copies" {
        return copy();
    }
    let words: Vec<_> = role.split(' ').collect();
    if !matches!(words[0], "receives" | "sends") {
        return begin(&words);
    }
    let client = Client::connect().unwrap();
    let (call, error) = (words[1].parse().unwrap(), words[2].parse().unwrap());
    let filter = || {
        refuse(call, error).unwrap();
        println!("refused");
    };
    if words[0] == "receives" {
        let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
        filter();
        match receiver.get_timeout(SOON) {
            Err(error @ GetError::Exhausted { .. }) => println!("told: {error}"),
            other => println!("told: {other:?}"),
        }
    } else {
        let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
        filter();
        let mut departure = None;
        until("a word", || {
            if let Err(WaitError::TimedOut { failure: Some(failure), .. }) = sender.wait_for_receivers_timeout(1, WHILE)
            {
                departure = sender.next_departure();
                println!("failure: {failure}");
            }
            departure.is_some()
        });
        match departure.unwrap().reason {
            DisconnectReason::Exhausted { what } => println!("told: {what}"),
            other => println!("told: {other:?}"),
        }
    }
}

/// Calls without which a link cannot be made.
const OF_A_LINK: [(libc::c_long, &str, i32); 6] = [
    (libc::SYS_fcntl, "fcntl", libc::EPERM),
    (libc::SYS_mmap, "mmap", libc::ENOSYS),
    (libc::SYS_sendmsg, "sendmsg", libc::EPERM),
    (libc::SYS_memfd_create, "memfd_create", libc::EPERM),
    (libc::SYS_fallocate, "fallocate", libc::ENOSYS),
    (libc::SYS_ftruncate, "ftruncate", libc::EPERM),
];

#[test]
fn each_side_of_a_link_that_cannot_be_made_hears_why() {
    roles!(play);
    if !can_refuse() {
        return;
    }
    for (call, name, error) in OF_A_LINK {
        for role in ["receives", "sends"] {
            let (broker, client) = broker();
            let mut child = Other::start(broker.address(), format!("{role} {call} {error}"), geteuid().as_raw());
            child.hear("refused");
            // The other side knows which process it was, and where to look.
            let failure = if role == "receives" {
                let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
                let failure = match sender.wait_for_receivers_timeout(1, WHILE) {
                    Err(WaitError::TimedOut { failure, .. }) => failure,
                    other => panic!("{role}, without {name}: {other:?}"),
                };
                assert_eq!(sender.link_failure(), failure);
                failure
            } else {
                let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
                assert_eq!(receiver.get_timeout(WHILE).unwrap_err(), GetError::TimedOut, "{role}, without {name}");
                receiver.link_failure()
            };
            let failure = failure.unwrap_or_else(|| panic!("{role}, without {name}: the other side hears nothing"));
            assert_eq!((failure.peer.process.pid as u32, &failure.reason), (child.process.pid(), &None));
            assert!(failure.to_string().contains("reports"), "{failure}");
            // The side that is refused the call says so.
            let told = child.hear("told: ");
            assert!(told.contains(name) && told.contains("seccomp"), "{role}, without {name}: {told}");
            println!("{role}: {told}");
        }
    }
}

/// What a child does to which no thread is granted once it is a receiver of slots that it would lease.
fn copy() {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    for call in [libc::SYS_clone, libc::SYS_clone3] {
        refuse(call, libc::EAGAIN).unwrap();
    }
    println!("refused");
    for number in 0..4 {
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!((received.sequence(), &received[..]), (number, &[7; 64][..]));
        println!("told: {:?}", received.mechanism());
    }
    assert_eq!(receiver.counters().leases_refused, 4);
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    println!("told: the end");
}

#[test]
fn a_receiver_that_is_granted_no_thread_copies_what_it_would_lease() {
    roles!(play);
    if !can_refuse() {
        return;
    }
    let (broker, client) = broker();
    let mut child = Other::start(broker.address(), "copies", geteuid().as_raw());
    child.hear("refused");
    let mut sender = client.sender("c").slot_size(64).slots(2).mechanism(Mechanism::Lease).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for _ in 0..4 {
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.set_len(64).unwrap();
        fbuf.fill(7);
        sender.write(fbuf).unwrap();
        assert!(child.hear("told: ").contains("Copy"));
    }
    sender.finish();
    child.hear("the end");
}

/// What a child does that connects, or opens a receiver, while a call is refused.
fn begin(words: &[&str]) {
    let refuse = || refuse(words[1].parse().unwrap(), words[2].parse().unwrap()).unwrap();
    let said = if words[0] == "connects" {
        refuse();
        Client::connect().map(drop).unwrap_err().to_string()
    } else {
        let client = Client::connect().unwrap();
        refuse();
        client.receiver("c").open().map(drop).unwrap_err().to_string()
    };
    println!("told: {said}");
}

#[test]
fn what_a_call_is_refused_for_is_named_with_what_helps() {
    roles!(play);
    if !can_refuse() {
        return;
    }
    let (broker, _client) = broker();
    for (role, call, error, with, without) in [
        ("connects", libc::SYS_socket, libc::EPERM, ["socket", "seccomp"], "folder"),
        ("connects", libc::SYS_setsockopt, libc::EPERM, ["setsockopt", "seccomp"], "folder"),
        ("connects", libc::SYS_connect, libc::EPERM, ["Operation not permitted", "seccomp"], "folder"),
        ("connects", libc::SYS_connect, libc::EACCES, ["Permission denied", "security module"], "folder"),
        ("connects", libc::SYS_sendto, libc::EPERM, ["sendto", "seccomp"], "folder"),
        ("connects", libc::SYS_sendto, libc::ENOBUFS, ["sendto", "no memory"], "seccomp"),
        ("connects", libc::SYS_getsockopt, libc::EPERM, ["getsockopt", "seccomp"], "folder"),
        ("opens", libc::SYS_sendmsg, libc::ENOMEM, ["sendmsg", "no memory"], "does not answer"),
        ("opens", libc::SYS_sendmsg, libc::EPERM, ["sendmsg", "seccomp"], "does not answer"),
        ("opens", libc::SYS_recvmsg, libc::EPERM, ["recvmsg", "seccomp"], "does not answer"),
    ] {
        let mut child = Other::start(broker.address(), format!("{role} {call} {error}"), geteuid().as_raw());
        let told = child.hear("told: ");
        assert!(with.iter().all(|with| told.contains(with)) && !told.contains(without), "{with:?}: {told}");
        println!("{role}: {told}");
    }
}

/// A broker to which a filter refuses a call from its beginning: how it ends, and what it says.
#[allow(unsafe_code, reason = "pre_exec")]
fn broker_without(call: libc::c_long, error: i32) -> Command {
    let mut broker = fbuf(["broker", "--socket", &format!("@fbuf-refused-{}-{call}", std::process::id())]);
    // SAFETY: it makes two system calls, which may be made after fork(2).
    unsafe { broker.pre_exec(move || refuse(call, error)) };
    broker
}

#[test]
fn a_broker_names_the_call_that_is_refused() {
    if !can_refuse() {
        return;
    }
    for (call, error, with) in [
        (libc::SYS_bind, libc::EPERM, ["bind", "seccomp"]),
        (libc::SYS_bind, libc::EACCES, ["bind", "security module"]),
        (libc::SYS_socket, libc::EPERM, ["socket", "seccomp"]),
        (libc::SYS_listen, libc::ENOSYS, ["listen", "seccomp"]),
        (libc::SYS_socketpair, libc::EPERM, ["socketpair", "seccomp"]),
        (libc::SYS_epoll_create1, libc::EPERM, ["epoll_create1", "seccomp"]),
        (libc::SYS_eventfd2, libc::EPERM, ["eventfd2", "seccomp"]),
    ] {
        let said = String::from_utf8(broker_without(call, error).run().stderr).unwrap();
        assert!(with.iter().all(|with| said.contains(with)) && !said.contains("make files"), "{with:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
#[allow(unsafe_code, reason = "pre_exec")]
fn a_client_hears_which_call_its_broker_is_refused() {
    if !can_refuse() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_with(&folder.path().join("broker"), |command| {
        // SAFETY: it makes two system calls, which may be made after fork(2).
        unsafe { command.pre_exec(|| refuse(libc::SYS_getrandom, libc::EPERM)) };
    });
    let client = Client::connect_to(&broker.address).unwrap();
    let said = client.receiver("c").open().map(drop).unwrap_err().to_string();
    assert!(said.contains("getrandom") && said.contains("seccomp"), "{said}");
}
