//! Guarded senders: a stray write into a message that was sent traps, and is reported. The program with
//! the stray pointer is a process of its own: this one, run again in the role of it.
#![allow(unsafe_code, reason = "a stray pointer is what this is about")]

mod support;

use std::{
    fs, io, mem,
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    process::{Output, Stdio},
    ptr,
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, Receiver, Sender};
use nix::{
    libc,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction},
};
use support::{
    Process, SOON,
    role::{command, roles},
};

/// What a child does.
fn play(role: &str) {
    if role == "stream" {
        return send_guarded();
    }
    if role == "chained" {
        let mine = SigAction::new(SigHandler::Handler(own_handler), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler only ends the process.
        unsafe { sigaction(Signal::SIGSEGV, &mine) }.unwrap();
    }
    let before = match role {
        "sent: default" => Some(SigHandler::SigDfl),
        "sent: ignored" => Some(SigHandler::SigIgn),
        _ => None,
    };
    if let Some(before) = before {
        let action = SigAction::new(before, SaFlags::empty(), SigSet::empty());
        // SAFETY: neither is a handler.
        unsafe { sigaction(Signal::SIGSEGV, &action) }.unwrap();
    }
    let client = Client::connect().unwrap();
    let sender = client.sender("frames").slot_size(100).slots(4);
    let mut sender = if role == "environment" { sender.open() } else { sender.guard(true).open() }.unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let first = send(&mut sender, 1);
    let second = send(&mut sender, 2);
    // It may be written while it is an fbuf, although its neighbours may not.
    let mut fbuf = sender.allocate().unwrap();
    fbuf.set_len(100).unwrap();
    fbuf.fill(3);
    if let Some(before) = role.strip_prefix("sent: ") {
        println!("sent");
        raise(Signal::SIGSEGV).unwrap();
        assert_eq!(before, "ignored", "it lives on");
        return raise(Signal::SIGSEGV).unwrap();
    }
    let stray = match role {
        "other" => ptr::null_mut::<u8>().wrapping_add(64),
        "returned" => {
            sender.wait_for_returns_timeout(SOON).unwrap();
            first
        }
        _ => second,
    };
    // SAFETY: none. This is the error that a guard finds.
    unsafe { stray.wrapping_add(12).write_volatile(99) };
    println!("nothing happened");
}

extern "C" fn own_handler(_: libc::c_int) {
    // SAFETY: _exit(2) may be called at any instruction.
    unsafe { libc::_exit(42) }
}

/// Sends a message, and keeps a pointer to it.
fn send(sender: &mut Sender, value: u8) -> *mut u8 {
    let mut fbuf = sender.allocate().unwrap();
    assert_eq!(fbuf.capacity(), 100);
    fbuf.set_len(100).unwrap();
    fbuf.fill(value);
    let pointer = fbuf.as_mut_ptr();
    sender.write(fbuf).unwrap();
    pointer
}

/// Runs a child in a role to its end, with a receiver that keeps, or does not keep, what it gets.
fn run(role: &str, keep: bool) -> Output {
    let broker = Embedded::start().unwrap();
    let mut receiver = Client::connect_to(broker.address()).unwrap().receiver("frames").open().unwrap();
    let mut child = command(role);
    child.env("FBUF_BROKER", broker.address().to_string()).env_remove("FBUF_GUARD");
    if role == "environment" {
        child.env("FBUF_GUARD", "1");
    }
    let child = child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let kept: Vec<_> = (1..=2u8)
        .filter_map(|value| {
            let message = receiver.get_timeout(SOON).unwrap();
            assert!(message.len() == 100 && message.iter().all(|&byte| byte == value));
            keep.then_some((value, message))
        })
        .collect();
    let output = Process(child).output();
    for (value, message) in kept {
        assert!(message.iter().all(|&byte| byte == value), "a message changed");
    }
    output
}

fn report(output: &Output) -> String {
    assert!(!String::from_utf8_lossy(&output.stdout).contains("nothing happened"), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_write_to_a_message_that_is_held_is_reported_and_deadly() {
    roles!(play);
    for role in ["held", "environment"] {
        let output = run(role, true);
        let report = report(&output);
        assert_eq!(output.status.signal(), Some(Signal::SIGSEGV as i32), "{report}");
        for part in ["frames", "message:  1, byte 12", "in slot 1", "1 receiver still has it"] {
            assert!(report.contains(part), "{part:?} is not in: {report}");
        }
    }
}

#[test]
fn a_write_to_a_message_that_came_back_is_reported_as_such() {
    roles!(play);
    let output = run("returned", false);
    let report = report(&output);
    assert_eq!(output.status.signal(), Some(Signal::SIGSEGV as i32), "{report}");
    for part in ["message:  0, byte 12", "in slot 0", "every receiver has handed it back"] {
        assert!(report.contains(part), "{part:?} is not in: {report}");
    }
}

#[test]
fn the_handler_that_was_there_before_is_called() {
    roles!(play);
    let output = run("chained", true);
    assert!(report(&output).contains("message:  1, byte 12"), "{output:?}");
    assert_eq!(output.status.code(), Some(42));
}

#[test]
fn a_signal_that_a_process_sends_does_what_it_did_before() {
    roles!(play);
    for (role, signal) in [("sent: default", Some(Signal::SIGSEGV as i32)), ("sent: ignored", None)] {
        let output = run(role, true);
        assert!(String::from_utf8_lossy(&output.stdout).contains("sent"), "{output:?}");
        assert_eq!((output.status.signal(), report(&output)), (signal, String::new()), "{role}");
    }
}

#[test]
fn other_faults_are_not_reported() {
    roles!(play);
    let output = run("other", true);
    assert!(!report(&output).contains("fbuf:"), "{output:?}");
    assert_eq!(output.status.signal(), Some(Signal::SIGSEGV as i32));
}

/// The kernel writes for a process where that process may write, and no signal tells of it.
#[test]
fn a_system_call_that_would_write_to_a_message_fails_and_changes_nothing() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    for guarded in [false, true] {
        let mut receiver = client.receiver("c").open().unwrap();
        let mut sender = client.sender("c").slot_size(100).slots(2).guard(guarded).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let stray = send(&mut sender, 1);
        let message = receiver.get_timeout(SOON).unwrap();
        let zeroes = fs::File::open("/dev/zero").unwrap();
        // SAFETY: none. This is the error that a guard finds.
        let read = unsafe { libc::read(zeroes.as_raw_fd(), stray.cast(), 100) };
        let error = io::Error::last_os_error().raw_os_error();
        // SAFETY: the message is there. That it changes, if it may be written, is what is looked for.
        let first = unsafe { message.as_ptr().read_volatile() };
        if guarded {
            assert_eq!((read, error, first), (-1, Some(libc::EFAULT), 1));
        } else {
            assert_eq!((read, first), (100, 0), "the attempt does nothing");
        }
    }
}

/// The address of what handles SIGSEGV now.
fn handler() -> usize {
    // SAFETY: the structure is all zeroes or what the kernel fills in, and nothing is changed.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        assert_eq!(libc::sigaction(libc::SIGSEGV, ptr::null(), &mut action), 0);
        action.sa_sigaction
    }
}

fn get(receiver: &mut Receiver) -> Vec<u8> {
    receiver.get_timeout(SOON).unwrap().to_vec()
}

#[test]
fn a_guarded_stream_is_a_stream_and_leaves_no_handler_behind() {
    roles!(play);
    // Other tests of this process have guards too, and a process has one handler.
    let output = command("stream").stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("the handler is gone"));
}

fn send_guarded() {
    let before = handler();
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut one = client.receiver("c").open().unwrap();
    let mut other = client.receiver("c").max_backlog(3).open().unwrap();
    let mut sender = client.sender("c").slot_size(5000).slots(3).grow_to(12).guard(true).open().unwrap();
    let mut second = client.sender("d").guard(true).open().unwrap();
    assert_ne!(handler(), before);
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    for round in 0..2000u32 {
        let burst = round % 5;
        for n in 0..burst {
            let mut fbuf = sender.allocate().unwrap();
            fbuf.set_len(5000).unwrap();
            fbuf.fill((round + n) as u8);
            sender.write(fbuf).unwrap();
        }
        for n in 0..burst {
            assert_eq!(get(&mut one), [(round + n) as u8; 5000]);
        }
    }
    assert_eq!(sender.counters().unguarded, 0);
    assert!(sender.counters().growths > 0, "the second receiver keeps some");
    while other.try_get().unwrap().is_some() {}
    // One that no receiver was sent is an fbuf again, and may be written.
    let fbuf = second.allocate().unwrap();
    let mut fbuf = second.write(fbuf).unwrap_err().into_fbuf().unwrap();
    fbuf.set_len(10).unwrap();
    fbuf.fill(1);
    drop((one, other, sender));
    assert_ne!(handler(), before, "there is a guarded sender still");
    drop((fbuf, second));
    assert_eq!(handler(), before);
    println!("the handler is gone");
}
