//! What a predicate (`accept`) may do: all of it runs on the thread of the client, which goes on.

mod support;

use std::{panic::panic_any, sync::mpsc, thread, time::Duration};

use fbuf_broker::Embedded;
use fbuf_client::{Client, Peer};
use nix::{
    libc,
    sys::{signal::Signal, wait::WaitStatus},
    unistd::{ForkResult, Pid},
};
use support::SOON;

/// Panics when it is dropped.
struct Destructive;

impl Drop for Destructive {
    fn drop(&mut self) {
        panic!("a destructor of the program");
    }
}

/// A broker, and two clients of it.
fn clients() -> (Embedded, Client, Client) {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let other = Client::connect_to(broker.address()).unwrap();
    (broker, client, other)
}

/// A client opens endpoints, which are linked and exchange a message.
fn assert_works(client: &Client, other: &Client) {
    assert!(client.is_connected() && client.status().is_ok());
    let mut receiver = client.receiver("works").open().unwrap();
    let mut sender = other.sender("works").slot_size(64).slots(2).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate().unwrap();
    sender.write(fbuf).unwrap();
    assert!(receiver.get_timeout(SOON).is_ok());
}

#[test]
fn a_predicate_whose_destructor_panics_leaves_its_client_at_work() {
    let (_broker, client, other) = clients();
    let of_receiver = Destructive;
    let accept = move |_: &Peer| {
        let _ = &of_receiver;
        true
    };
    drop(client.receiver("c").accept(accept).open().unwrap());
    assert_works(&client, &other);
    let of_sender = Destructive;
    let accept = move |_: &Peer| {
        let _ = &of_sender;
        true
    };
    drop(client.sender("c").slot_size(64).slots(2).accept(accept).open().unwrap());
    assert_works(&client, &other);
}

#[test]
fn a_predicate_that_panics_with_what_panics_leaves_its_client_at_work() {
    let (_broker, client, other) = clients();
    let (tell, told) = mpsc::channel();
    let accept = move |_: &Peer| {
        let _ = tell.send(());
        panic_any(Destructive)
    };
    let _receiver = client.receiver("c").accept(accept).open().unwrap();
    let mut sender = other.sender("c").slot_size(64).slots(2).open().unwrap();
    told.recv_timeout(SOON).unwrap();
    assert_works(&client, &other);
    assert!(sender.wait_for_receivers_timeout(1, Duration::ZERO).is_err(), "it was not accepted");
}

/// The child is a copy of the thread that serves the connection, the sockets of which are its parent's.
#[test]
fn a_child_that_returns_from_a_predicate_aborts_and_its_parent_goes_on() {
    let (_broker, client, other) = clients();
    let (tell, told) = mpsc::channel();
    let accept = move |_: &Peer| {
        if let Some(child) = split() {
            let _ = tell.send(child);
        }
        true
    };
    let mut receiver = client.receiver("c").accept(accept).open().unwrap();
    let mut sender = other.sender("c").slot_size(64).slots(2).open().unwrap();
    let child = told.recv_timeout(SOON).unwrap();
    assert_eq!(end(child), WaitStatus::Signaled(child, Signal::SIGABRT, false), "it went on");
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate().unwrap();
    sender.write(fbuf).unwrap();
    assert!(receiver.get_timeout(SOON).is_ok());
    assert_works(&client, &other);
}

/// Forks: the child, or none in it.
#[allow(unsafe_code, reason = "fork(2)")]
fn split() -> Option<Pid> {
    // SAFETY: the child does what the C library allows after fork(3): it returns, and aborts.
    match unsafe { nix::unistd::fork() }.unwrap() {
        ForkResult::Child => {
            // SAFETY: no core of a child that is to abort.
            unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
            None
        }
        ForkResult::Parent { child } => Some(child),
    }
}

fn end(child: Pid) -> WaitStatus {
    use nix::sys::wait::{WaitPidFlag, waitpid};
    let begin = std::time::Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive if begin.elapsed() < SOON => thread::yield_now(),
            WaitStatus::StillAlive => nix::sys::signal::kill(child, Signal::SIGKILL).unwrap(),
            status => return status,
        }
    }
}
