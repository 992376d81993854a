//! A program that closes descriptors that are not its own, such as one that becomes a daemon: the library neither panics nor waits for
//! ever, and says what is wrong.

mod support;

use std::{
    any::Any,
    fs::File,
    io, mem,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use fbuf_client::{Client, OpenError, Receiver, Sender};
use nix::{
    libc,
    sys::{
        epoll::{Epoll, EpollCreateFlags},
        eventfd::EventFd,
    },
};
use support::{
    SOON,
    role::{Other, command, roles},
    settled, until,
};

/// Closes all that was opened after this file.
#[allow(unsafe_code, reason = "close_range(2)")]
fn close_behind(last: &File) {
    // SAFETY: what is closed is not used again, and its owners are not dropped.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, last.as_raw_fd() + 1, libc::c_uint::MAX, 0) };
    assert_eq!(closed, 0, "{}", io::Error::last_os_error());
}

/// How often each thread of the library has gone to sleep: the same again and again, once they sleep.
fn sleeps() -> Vec<String> {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten().filter(|thread| {
        std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim_end() == "fbuf-control")
    });
    let statuses = threads.map(|thread| std::fs::read_to_string(thread.path().join("status")).unwrap());
    statuses.filter_map(|text| text.lines().find(|line| line.starts_with("voluntary")).map(str::to_owned)).collect()
}

/// What takes the numbers of what was closed, by role. All epolls and eventfds have the same inode.
fn replacements(role: &str) -> Vec<Box<dyn Any>> {
    let numbers = || 0..60;
    let file = |_| Box::new(File::open("/dev/null").unwrap()) as Box<dyn Any>;
    let eventfd = |_| Box::new(EventFd::new().unwrap()) as Box<dyn Any>;
    let epoll = |_| Box::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap()) as Box<dyn Any>;
    match role {
        "closes" => Vec::new(),
        "files" => numbers().map(file).collect(),
        "eventfds" => numbers().map(eventfd).collect(),
        "epolls" => numbers().map(epoll).collect(),
        // It works, as an error's words promise.
        "client" => {
            let client = Client::connect().unwrap();
            let receiver = client.receiver("e").keep_waiting().open().unwrap();
            let mut sender = client.sender("e").open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            vec![Box::new((client, receiver, sender))]
        }
        role => unreachable!("{role}"),
    }
}

/// What a child does, whose output is read for a panic.
fn play(role: &str) {
    // What tokio opens once for all runtimes, to hear of signals, is opened by now: without it there can be no other runtime.
    drop(Client::connect().unwrap());
    // No lower number is left, so that all that is opened from here on is behind the last.
    let files: Vec<_> = (0..30).map(|_| File::open("/dev/null").unwrap()).collect();
    let (client, bare) = (Client::connect().unwrap(), Client::connect().unwrap());
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    until("a sender is linked", || receiver.try_get().unwrap().is_none() && receiver.senders() == 1);
    // The clients' own threads have nothing to do then: what they do while their descriptors are closed is done with those of others.
    assert_eq!(settled(sleeps).len(), 2);
    assert!(client.is_connected());
    close_behind(files.last().unwrap());
    // What is opened next has the numbers of what was closed.
    let replacements = replacements(role);
    let start = Instant::now();
    let said = client.status().unwrap_err();
    assert!(matches!(said, OpenError::Local { .. }), "{said:?}");
    assert!(said.to_string().contains("closefrom"), "{said}");
    assert!(client.receiver("d").open().is_err() && !client.is_connected());
    assert!(client.connection_error().unwrap().contains("closefrom"));
    // A client without endpoints can be dropped: it closes nothing.
    drop(bare);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    if let Some((other, ..)) = replacements.first().and_then(|one| one.downcast_ref::<(Client, Receiver, Sender)>()) {
        assert_eq!(other.status().unwrap().len(), 2);
    }
    // A descriptor that other code has closed must not be closed again, and so nothing is dropped here that has one.
    mem::forget((receiver, sender, replacements, client));
    println!("it goes on");
    // The thread that was left behind has done what it does.
    settled(sleeps);
    std::process::exit(7);
}

#[test]
fn a_client_without_its_descriptors_says_so_and_does_not_panic() {
    roles!(play);
    let broker = fbuf_broker::Embedded::start().unwrap();
    for role in ["closes", "files", "eventfds", "epolls", "client"] {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut child = command(role);
        child.env("FBUF_BROKER", broker.address().to_string()).stderr(File::create(&log).unwrap());
        let mut child = Other::of(&mut child);
        let went_on = child.next_with("it goes on");
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(went_on.is_some(), "{role}: {said}");
        assert_eq!(child.process.end_within(SOON).code(), Some(7), "{role}");
        assert!(!std::fs::read_to_string(&log).unwrap().contains("panicked"), "{role}: {said}");
    }
    until("the broker has heard of it", || broker.broker().used().is_empty());
}
