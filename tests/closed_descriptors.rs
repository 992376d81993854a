//! A program that closes descriptors that are not its own, such as one that becomes a daemon: the library neither panics nor waits for
//! ever, and says what is wrong.

mod support;

use std::{fs::File, io, mem, os::fd::AsRawFd, time::Duration};

use fbuf_client::{Client, OpenError};
use nix::libc;
use support::{
    SOON,
    role::{Other, command, roles},
    until,
};

/// Closes all that was opened after this file.
#[allow(unsafe_code, reason = "close_range(2)")]
fn close_behind(last: &File) {
    // SAFETY: what is closed is not used again, and its owners are not dropped.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, last.as_raw_fd() + 1, libc::c_uint::MAX, 0) };
    assert_eq!(closed, 0, "{}", io::Error::last_os_error());
}

/// Whether the thread of this name of this process sleeps, and has done so for a while.
fn is_asleep(name: &str) -> bool {
    let sleeps = || {
        let mut threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let thread = threads.find(|thread| {
            std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        });
        let thread = thread.expect("the thread").path();
        std::fs::read_to_string(thread.join("status"))
            .unwrap()
            .lines()
            .find(|line| line.starts_with("voluntary"))
            .map(str::to_owned)
    };
    let before = sleeps();
    std::thread::sleep(Duration::from_millis(100));
    before == sleeps()
}

/// What a child does, whose output is read for a panic.
fn play(role: &str) {
    let last = File::open("/dev/null").unwrap();
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    until("a sender is linked", || receiver.try_get().unwrap().is_none() && receiver.senders() == 1);
    // The client's own thread has nothing to do then: what it does while its descriptors are closed is done with those of others.
    until("its thread sleeps", || is_asleep("fbuf-control"));
    assert!(client.is_connected());
    close_behind(&last);
    // What is opened next has the numbers of what was closed.
    let files: Vec<_> =
        (0..if role == "replaces" { 30 } else { 0 }).map(|_| File::open("/dev/null").unwrap()).collect();
    let said = client.status().unwrap_err();
    assert!(matches!(said, OpenError::Local { .. }), "{said:?}");
    assert!(said.to_string().contains("closefrom"), "{said}");
    assert!(client.receiver("d").open().is_err() && !client.is_connected());
    assert!(client.connection_error().unwrap().contains("closefrom"));
    // A descriptor that other code has closed must not be closed again, and so nothing is dropped here that has one.
    mem::forget((receiver, sender, files, client));
    println!("it goes on");
    // The thread that was left behind does nothing meanwhile.
    std::thread::sleep(Duration::from_millis(300));
    std::process::exit(7);
}

#[test]
fn a_client_without_its_descriptors_says_so_and_does_not_panic() {
    roles!(play);
    let broker = fbuf_broker::Embedded::start().unwrap();
    for role in ["closes", "replaces"] {
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
