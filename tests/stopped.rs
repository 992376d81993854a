//! Processes that are stopped (SIGSTOP) hold back only processes that wait for them, and when they go on, so does
//! everything.
#![allow(unsafe_code, reason = "a single thread is stopped by the handler of a signal")]

mod support;

use std::{
    os::unix::process::ExitStatusExt,
    panic::{self, AssertUnwindSafe},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use fbuf_broker::Embedded;
use fbuf_client::{AllocateError, Client, GetError, Receiver, Sender, Wait};
use nix::{
    libc::c_int,
    sys::signal::{SigHandler, Signal, signal},
};
use support::{
    Process, SOON,
    role::{command, roles},
    until,
};

const SLOTS: u64 = 4;
/// How many messages a receiver is sent that is stopped meanwhile.
const WAITING: u64 = 100;
const SKIPPING: u64 = 1001;
/// To how many of its slots it gives the right before it is stopped.
const GIVEN: u64 = 3;

/// So short that nothing comes meanwhile.
const BRIEFLY: Duration = Duration::from_millis(1);

static GO_ON: AtomicBool = AtomicBool::new(false);

/// Stops the thread that a signal has gone to.
extern "C" fn wait_to_go_on(_: c_int) {
    while !GO_ON.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

/// What a child does.
fn play(role: &str) {
    let client = Client::connect().unwrap();
    match role {
        "receiver" => {
            assert_eq!(receive(client.receiver("c").open().unwrap(), WAITING), 0, "it missed something");
        }
        "giving receiver" => {
            assert_eq!(receive(client.receiver("c").open().unwrap(), GIVEN), 0, "it missed something");
        }
        "receiver that greets slowly" => {
            // SAFETY: the handler does nothing but read an atomic.
            unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(wait_to_go_on)) }.unwrap();
            let mut receiver = client.receiver("c").open().unwrap();
            let first = receiver.get_timeout(SOON).unwrap().sender();
            while receiver.senders() > 0 {
                assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
            }
            assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut, "another one was greeted");
            GO_ON.store(true, Ordering::Relaxed);
            assert_ne!(receiver.get_timeout(SOON).unwrap().sender(), first);
            assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
        }
        "holder: spin" => hold_up_a_holder(&client, Wait::Spin),
        "holder: adaptive" => hold_up_a_holder(&client, Wait::Adaptive),
        "holder: block" => hold_up_a_holder(&client, Wait::Block),
        "skipping receiver" => {
            let missed = receive(client.receiver("c").max_backlog(2).open().unwrap(), SKIPPING);
            assert!((SKIPPING - 10..SKIPPING).contains(&missed), "it missed {missed}");
        }
        _ => {
            let mut sender = client.sender("c").slot_size(8).slots(SLOTS as usize).open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            (0..10).for_each(|number| send(&mut sender, number));
            sender.wait_for_returns_timeout(SOON).unwrap();
        }
    }
}

/// A thread has handed its slot back and does not get further, as if it had no processor; the slot is used again.
fn hold_up_a_holder(client: &Client, wait: Wait) {
    // SAFETY: the handler does nothing but read an atomic.
    unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(wait_to_go_on)) }.unwrap();
    let mut receiver = client.receiver("c").wait(wait).open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(1).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 0);
    let first = receiver.get_timeout(SOON).unwrap();
    let holder = thread::spawn(move || drop(first));
    send(&mut sender, 1);
    for _ in 0..3 {
        assert!(receiver.try_get().unwrap().is_none());
        let begin = Instant::now();
        assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
        assert!(begin.elapsed() < SOON / 10, "{:?}", begin.elapsed());
    }
    receiver.interrupt_handle().interrupt();
    assert_eq!(receiver.get().unwrap_err(), GetError::Interrupted);
    GO_ON.store(true, Ordering::Relaxed);
    assert_eq!(receiver.get_timeout(SOON).unwrap()[..], 1u64.to_ne_bytes());
    holder.join().unwrap();
}

/// Until the end, which is reported by the exit status: how many of all it missed, which its counter tells too.
fn receive(mut receiver: Receiver, all: u64) -> u64 {
    let (mut next, mut missed) = (0, 0);
    loop {
        match receiver.get() {
            Ok(received) => {
                let sequence = received.sequence();
                assert_eq!(received[..], sequence.to_ne_bytes());
                assert!(sequence >= next, "{sequence} came behind {}", next - 1);
                missed += sequence - next;
                next = sequence + 1;
            }
            Err(GetError::Ended) => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(next, all, "the last one is missing");
    assert_eq!(receiver.counters().missed, missed);
    missed
}

fn other(role: &str, broker: &Embedded, point: Option<&str>) -> Process {
    let mut command = command(role);
    command.env("FBUF_BROKER", broker.address().to_string()).stdout(Stdio::null());
    if let Some(point) = point {
        command.env("FBUF_DIE_AT", point);
    }
    Process::start(&mut command)
}

fn send(sender: &mut Sender, number: u64) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    assert_eq!(sender.write(fbuf).unwrap().sequence, number);
}

/// The control: a test fails if a process does not end, and says what that process does.
#[test]
fn a_test_does_not_wait_for_ever_for_a_process_that_does_not_end() {
    let mut stopped = Process::start(Command::new("sleep").arg("1000"));
    stopped.signal(Signal::SIGSTOP);
    stopped.until_stopped();
    let waits = panic::catch_unwind(AssertUnwindSafe(|| stopped.end_within(BRIEFLY)));
    let said = *waits.unwrap_err().downcast::<String>().unwrap();
    let wanted = format!("process {} has not ended after {BRIEFLY:?}: `sleep 1000` is T (stopped)", stopped.pid());
    assert!(said.starts_with(&wanted), "{said}");
    stopped.signal(Signal::SIGKILL);
    assert_eq!(stopped.end().signal(), Some(Signal::SIGKILL as i32));
    assert!(!stopped.end().success(), "it can be waited for again");
}

#[test]
fn a_stopped_receiver_holds_back_those_who_wait_for_it_and_nobody_else() {
    roles!(play);
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(SLOTS as usize).open().unwrap();
    let mut stopped = other("receiver", &broker, None);
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 0);
    sender.wait_for_returns_timeout(SOON).unwrap();
    stopped.signal(Signal::SIGSTOP);
    stopped.until_stopped();
    // One more receiver of the same sender, and a sender of the same channel with receivers of its own.
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    (1..=SLOTS).for_each(|number| send(&mut sender, number));
    for number in 1..=SLOTS {
        assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), number);
    }
    let refused = sender.allocate_timeout(Duration::from_millis(30)).unwrap_err();
    assert_eq!(refused, AllocateError::TimedOut { slots: SLOTS as usize });
    assert_eq!(sender.try_allocate().unwrap().map(|_| ()), None);
    // Whoever shares neither sender nor receiver with it goes on, and so does the broker.
    let mut elsewhere = client.sender("d").slot_size(8).slots(SLOTS as usize).open().unwrap();
    let mut there = client.receiver("d").open().unwrap();
    elsewhere.wait_for_receivers_timeout(1, SOON).unwrap();
    for number in 0..100 {
        send(&mut elsewhere, number);
        assert_eq!(there.get_timeout(SOON).unwrap().sequence(), number);
    }
    stopped.signal(Signal::SIGCONT);
    for number in SLOTS + 1..WAITING {
        send(&mut sender, number);
        assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), number);
    }
    sender.wait_for_returns_timeout(SOON).unwrap();
    drop(sender);
    assert!(stopped.end().success(), "it says why");
}

#[test]
fn a_stopped_receiver_that_would_rather_miss_messages_holds_nobody_back() {
    roles!(play);
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(SLOTS as usize).open().unwrap();
    let mut stopped = other("skipping receiver", &broker, None);
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    stopped.signal(Signal::SIGSTOP);
    stopped.until_stopped();
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    for number in 0..SKIPPING - 1 {
        send(&mut sender, number);
        assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), number);
    }
    assert!(sender.counters().skipped >= SKIPPING - 10, "{:?}", sender.counters());
    stopped.signal(Signal::SIGCONT);
    until("it has read what there was", || {
        sender.poll_events();
        sender.counters().slots.lent == 0
    });
    let skipped = sender.counters().skipped;
    send(&mut sender, SKIPPING - 1);
    assert_eq!(sender.counters().skipped, skipped, "it is left out although it goes on");
    drop(sender);
    assert!(stopped.end().success(), "it says why");
}

/// It is stopped between the two stores that make an entry of the lane.
#[cfg(feature = "points")]
#[test]
fn a_sender_that_is_stopped_in_the_middle_of_a_write_does_not_block_receivers_of_others() {
    roles!(play);
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut stopped = other("sender", &broker, Some("5 SIGSTOP write: half an entry"));
    let of_the_stopped = |receiver: &mut Receiver, number: u64| {
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!(received[..], number.to_ne_bytes());
        assert_eq!(received.sender().process.pid as u32, stopped.pid());
    };
    (0..5).for_each(|number| of_the_stopped(&mut receiver, number));
    stopped.until_stopped();
    assert_eq!(receiver.get_timeout(Duration::from_millis(30)).unwrap_err(), GetError::TimedOut);
    let mut sender = client.sender("c").slot_size(8).slots(SLOTS as usize).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    for number in 0..1000 {
        send(&mut sender, number);
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!((received.sequence(), received.sender().process.pid as u32), (number, std::process::id()));
    }
    stopped.signal(Signal::SIGCONT);
    (5..10).for_each(|number| of_the_stopped(&mut receiver, number));
    assert!(stopped.end().success());
}

/// It has given the right to write some of its slots, and not all: these are used, and then the sender is gone.
#[cfg(feature = "points")]
#[test]
fn a_receiver_that_is_stopped_while_it_gives_slots_gets_what_was_sent_in_them() {
    roles!(play);
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(SLOTS as usize).from_receiver().open().unwrap();
    let mut stopped = other("giving receiver", &broker, Some(&format!("{} SIGSTOP grant: sent", GIVEN - 1)));
    stopped.until_stopped();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..GIVEN).for_each(|number| send(&mut sender, number));
    assert_eq!(sender.try_allocate().unwrap().map(|_| ()), None, "there was one that was not given");
    drop(sender);
    stopped.signal(Signal::SIGCONT);
    assert!(stopped.end().success(), "it says why");
}

/// Its control thread is, between greeting a second sender and saying so: all comes from that one as well, although the first
/// has ended by then.
#[cfg(feature = "points")]
#[test]
fn a_receiver_does_not_end_while_it_greets_somebody() {
    roles!(play);
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let open = || client.sender("c").slot_size(8).slots(SLOTS as usize).open().unwrap();
    let mut first = open();
    let mut receiver = other("receiver that greets slowly", &broker, Some("1 SIGUSR1 attach: greeted"));
    first.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut first, 0);
    let mut second = open();
    second.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut second, 0);
    drop((first, second));
    assert!(receiver.end().success(), "it says why");
}

/// As a thread may be that drops a message on the processor on which its receiver runs at a higher real-time priority.
#[cfg(feature = "points")]
#[test]
fn a_thread_that_stops_while_it_drops_a_message_holds_no_call_up() {
    roles!(play);
    let broker = Embedded::start().unwrap();
    for wait in ["spin", "adaptive", "block"] {
        let mut receiver = other(&format!("holder: {wait}"), &broker, Some("0 SIGUSR1 return: handed back"));
        assert!(receiver.end().success(), "it says why");
    }
}
