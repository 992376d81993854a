//! What the library says is the case: a wait sleeps, a message that is reported as sent had a receiver, and the end
//! of a stream is told from its failure.

mod support;

use std::{
    cell::Cell,
    io::{PipeReader, Read, Write},
    process::Stdio,
    sync::Mutex,
    time::{Duration, Instant},
};

use fbuf_broker::Embedded;
use fbuf_client::{
    Abort, Client, Departure, DisconnectReason, GetError, Mechanism, Sender, Unread, Wait, WaitError, WriteError,
};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
};
use support::{
    Process, SOON, broker, fbuf,
    role::{command, roles},
    send, until,
};

/// How much processor time this thread has used.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

#[test]
fn a_wait_for_returns_sleeps_although_an_fbuf_was_dropped_unsent() {
    const TIME: Duration = Duration::from_millis(500);
    let (_broker, client) = broker();
    let spent = |wait, unsent| {
        let mut receiver = client.receiver("c").open().unwrap();
        let mut sender = client.sender("c").slot_size(8).slots(4).wait(wait).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        send(&mut sender, b"kept");
        let _kept = receiver.get_timeout(SOON).unwrap();
        for _ in 0..unsent {
            drop(sender.allocate_timeout(SOON).unwrap());
        }
        let (before, start) = (processor_time(), Instant::now());
        assert_eq!(sender.wait_for_returns_timeout(TIME), Err(WaitError::StillLent { slots: 1 }));
        assert!(start.elapsed() >= TIME);
        processor_time() - before
    };
    // What a wait costs that looks all the time: on a machine that is busy elsewhere, less than it asks for.
    let mut spinning = Duration::ZERO;
    until("a wait that spins gets a processor", || {
        spinning = spinning.max(spent(Wait::Spin, 1));
        spinning >= TIME / 5
    });
    for wait in [Wait::Block, Wait::Adaptive] {
        for unsent in [0, 1, 3] {
            // The rest of what it costs depends on what else the machine does: the least of some counts.
            let mut sleeping = Duration::MAX;
            for _ in 0..5 {
                if sleeping >= spinning / 10 {
                    sleeping = sleeping.min(spent(wait, unsent));
                }
            }
            assert!(
                sleeping < spinning / 10,
                "{wait:?}, {unsent} dropped unsent: {sleeping:?} of processor time; spinning takes {spinning:?}"
            );
        }
    }
}

/// No less than a message of these tests, which so does not go through the pipe as a whole.
const MESSAGE: usize = 16 << 10;

/// A `fbuf recv` that holds each message until it is read out of a pipe, and no longer.
struct Recv {
    process: Process,
    output: PipeReader,
}

impl Recv {
    fn start(broker: &Embedded, channel: &str) -> Self {
        let (output, into) = std::io::pipe().unwrap();
        fcntl(&output, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        let mut command = fbuf(["recv", channel]);
        let process = Process::start(command.env("FBUF_BROKER", broker.address().to_string()).stdout(into));
        Self { process, output }
    }

    /// Reads so many messages, and the first byte of the next, which it then holds.
    fn read(&mut self, messages: usize) {
        self.output.read_exact(&mut vec![0; messages * MESSAGE + 1]).unwrap();
    }
}

/// What it says that so many messages to one receiver are unread, which end with the last that was sent.
fn last(messages: u64, sent: u64) -> Option<(u64, u64, u64)> {
    Some((messages, sent - messages, sent - 1))
}

fn numbers(unread: Option<Unread>) -> Option<(u64, u64, u64)> {
    unread.map(|Unread { messages, first, last, .. }| (messages, first, last))
}

fn departure(sender: &mut Sender) -> Departure {
    let start = Instant::now();
    loop {
        sender.poll_events();
        if let Some(departure) = sender.next_departure() {
            return departure;
        }
        assert!(start.elapsed() < SOON, "nobody has departed");
        std::thread::yield_now();
    }
}

#[test]
fn a_burst_that_never_waits_is_told_within_a_second_that_its_receiver_is_dead() {
    let (broker, client) = broker();
    for (mechanism, slots) in [(Mechanism::Shared, 4096), (Mechanism::Copy, 4096), (Mechanism::OneShot, 128)] {
        let mut sender = client.sender("c").slot_size(MESSAGE).slots(slots).mechanism(mechanism).open().unwrap();
        let mut recv = Recv::start(&broker, "c");
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        (0..3).for_each(|_| assert!(send(&mut sender, &[1; MESSAGE]) < 3));
        recv.read(0);
        let (death, mut sent) = (Instant::now(), 3u64);
        recv.process.signal(Signal::SIGKILL);
        // Nothing of this waits, or looks at a socket of its own accord before all slots are in use.
        let error = loop {
            if let Some(mut fbuf) = sender.try_allocate().unwrap() {
                fbuf.write_all(&sent.to_le_bytes()).unwrap();
                match sender.write(fbuf) {
                    Ok(_) => sent += 1,
                    Err(error) => break error,
                }
            }
            assert!(
                death.elapsed() < Duration::from_secs(1),
                "{mechanism:?}: {sent} messages were sent to a dead process"
            );
            std::thread::yield_now();
        };
        let time = death.elapsed();
        println!("{mechanism:?}: told after {time:?}, {} messages later", sent - 3);
        let WriteError::NoReceiver { fbuf } = error else { panic!("{error:?}") };
        assert_eq!(fbuf[..], sent.to_le_bytes(), "the message comes back");
        let Departure { reason, unread, .. } = departure(&mut sender);
        assert_eq!((reason, numbers(unread)), (DisconnectReason::Died, last(sent, sent)), "{mechanism:?}");
    }
}

#[test]
fn a_departure_says_exactly_what_was_not_read_to_the_end() {
    let (broker, client) = broker();
    let sender = || client.sender("c").slot_size(MESSAGE).slots(32).open().unwrap();
    // Killed, with five read, one held and three that it never took.
    let mut sending = sender();
    let mut recv = Recv::start(&broker, "c");
    sending.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..9).for_each(|_| assert!(send(&mut sending, &[1; MESSAGE]) < 9));
    recv.read(5);
    recv.process.kill();
    let Departure { reason, unread, peer, .. } = departure(&mut sending);
    assert_eq!((reason, numbers(unread)), (DisconnectReason::Died, last(4, 9)));
    assert_eq!(peer.process.pid as u32, recv.process.pid());
    // Nothing was sent to it.
    let mut recv = Recv::start(&broker, "c");
    sending.wait_for_receivers_timeout(1, SOON).unwrap();
    recv.process.kill();
    let Departure { reason, unread, .. } = departure(&mut sending);
    assert_eq!((reason, unread), (DisconnectReason::Died, None));
    drop(sending);

    // In order, with two read, one held that is read later, and three that it never took.
    let mut sending = sender();
    let mut receiver = client.receiver("c").open().unwrap();
    sending.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..6).for_each(|_| assert!(send(&mut sending, b"x") < 6));
    (0..2).for_each(|_| drop(receiver.get_timeout(SOON).unwrap()));
    let held = receiver.get_timeout(SOON).unwrap();
    drop(receiver);
    until("it is seen to have left", || {
        sending.poll_events();
        sending.receivers() == 0
    });
    assert_eq!(sending.next_departure(), None, "it holds a message");
    drop(held);
    let Departure { reason, unread, .. } = departure(&mut sending);
    assert_eq!((reason, numbers(unread)), (DisconnectReason::Left, last(3, 6)));
    drop(sending);

    // All was read.
    let mut sending = sender();
    let mut receiver = client.receiver("c").open().unwrap();
    sending.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sending, b"x");
    drop(receiver.get_timeout(SOON).unwrap());
    drop(receiver);
    let Departure { reason, unread, .. } = departure(&mut sending);
    assert_eq!((reason, unread), (DisconnectReason::Left, None));
    drop(sending);

    // It asked to be skipped: 0, 1 and 2 are lent, 3 and 4 left out, 5 is lent again; it has read 0 and 1.
    let mut sending = sender();
    let mut receiver = client.receiver("c").max_backlog(3).open().unwrap();
    sending.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..5).for_each(|_| assert!(send(&mut sending, b"x") < 5));
    (0..2).for_each(|_| drop(receiver.get_timeout(SOON).unwrap()));
    send(&mut sending, b"x");
    drop(receiver);
    let Departure { reason, unread, .. } = departure(&mut sending);
    assert_eq!((reason, numbers(unread)), (DisconnectReason::Left, Some((2, 2, 5))));
    assert_eq!(sending.counters().skipped, 2);
}

#[test]
fn the_dead_are_not_counted_among_receivers_although_nothing_is_called_that_looks() {
    let (broker, client) = broker();
    let mut sender = client.sender("c").slot_size(MESSAGE).slots(4096).open().unwrap();
    let mut recvs = [Recv::start(&broker, "c"), Recv::start(&broker, "c")];
    assert_eq!(sender.wait_for_receivers_timeout(2, SOON).unwrap(), 2);
    recvs[0].process.kill();
    until("one is gone", || sender.receivers() == 1 && sender.peers().count() == 1);
    assert_eq!(sender.peers().next().unwrap().process.pid as u32, recvs[1].process.pid());
    let fbuf = sender.allocate().unwrap();
    let (sent, kept) = sender.write_retained(fbuf).unwrap();
    assert_eq!(sent.receivers, 1);
    drop(kept);
    recvs[1].process.kill();
    until("all are gone", || sender.receivers() == 0);
    let fbuf = sender.allocate().unwrap();
    assert!(matches!(sender.write_retained(fbuf), Err(WriteError::NoReceiver { .. })));
}

#[test]
fn a_receiver_hears_within_a_second_of_a_dead_sender_while_another_keeps_it_busy() {
    let (broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut send_command = fbuf(["send", "c"]);
    send_command.env("FBUF_BROKER", broker.address().to_string()).stdin(std::process::Stdio::piped());
    let mut dying = Process::start(&mut send_command);
    until("it is linked", || receiver.try_get().unwrap().is_none() && receiver.senders() == 1);
    let mut busy = client.sender("c").slot_size(8).slots(64).open().unwrap();
    busy.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut busy, b"x");
    dying.kill();
    let (death, mut messages) = (Instant::now(), 0u64);
    let error = loop {
        send(&mut busy, b"x");
        match receiver.get_timeout(SOON) {
            Ok(_) => messages += 1,
            Err(error) => break error,
        }
        assert!(death.elapsed() < Duration::from_secs(1), "{messages} messages were received meanwhile");
    };
    println!("told after {:?} and {messages} messages", death.elapsed());
    assert!(matches!(error, GetError::Disconnected { peer } if peer.process.pid as u32 == dying.pid()), "{error:?}");
}

#[test]
fn the_end_of_a_stream_is_told_from_every_way_in_which_it_breaks_off() {
    let (_broker, client) = broker();
    let code = Abort::Code(7);
    type End = fn(Sender);
    let ways: [(&str, End, Option<Abort>); 4] = [
        ("finished", Sender::finish, None),
        ("dropped", drop, None),
        ("aborted", |sender| sender.abort(7), Some(code)),
        (
            "dropped by a panic",
            |sender| {
                let panics = std::thread::spawn(move || {
                    let _sender = sender;
                    panic!("this panic is part of the test");
                });
                assert!(panics.join().is_err());
            },
            Some(Abort::Panic),
        ),
    ];
    for requires_finish in [false, true] {
        for (name, end, mut wanted) in ways {
            let builder = client.sender("c").slot_size(8).slots(4);
            let builder = if requires_finish { builder.require_finish() } else { builder };
            let mut receiver = client.receiver("c").open().unwrap();
            let mut sender = builder.open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            (0..3).for_each(|_| assert!(send(&mut sender, b"x") < 3));
            end(sender);
            if requires_finish && name == "dropped" {
                wanted = Some(Abort::Unfinished);
            }
            (0..3).for_each(|_| drop(receiver.get_timeout(SOON).unwrap()));
            if let Some(wanted) = wanted {
                match receiver.get_timeout(SOON) {
                    Err(GetError::Aborted { reason, .. }) => assert_eq!(reason, wanted, "{name}"),
                    other => panic!("{name}: {other:?}"),
                }
            }
            assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended, "{name}");
        }
    }
}

#[test]
fn a_sender_that_is_never_dropped_is_taken_for_dead_unless_it_finishes() {
    roles!(play);
    let (broker, client) = broker();
    let ways = [
        ("static", false),
        ("exit", false),
        ("static, finished", true),
        ("static, dropped by atexit", true),
        ("drop", true),
        ("thread-local", true),
        ("thread-local of another thread", true),
    ];
    for (way, is_complete) in ways {
        let mut receiver = client.receiver("c").open().unwrap();
        let mut role = command(way);
        role.env("FBUF_BROKER", broker.address().to_string());
        let mut child = Process::start(role.stdout(Stdio::null()).stderr(Stdio::piped()));
        (0..3).for_each(|_| drop(receiver.get_timeout(SOON).unwrap()));
        let end = receiver.get_timeout(SOON).unwrap_err();
        let (status, mut said) = (child.end(), String::new());
        child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(status.success() && said.is_empty(), "{way}: {status}, {said}");
        assert_eq!(end == GetError::Ended, is_complete, "{way}: {end:?}");
        assert_eq!(matches!(end, GetError::Disconnected { .. }), !is_complete, "{way}: {end:?}");
    }
}

static KEPT: Mutex<Option<Sender>> = Mutex::new(None);

extern "C" fn drop_kept() {
    drop(KEPT.lock().unwrap().take());
}

thread_local! {
    static LOCAL: Cell<Option<Sender>> = const { Cell::new(None) };
}

/// What a child does: it sends, and ends in one of these ways.
#[allow(unsafe_code, reason = "atexit(3)")]
fn play(way: &str) {
    let client = Client::connect().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(4).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..3).for_each(|_| assert!(send(&mut sender, b"x") < 3));
    sender.wait_for_returns_timeout(SOON).unwrap();
    match way {
        "drop" => drop(sender),
        "exit" => std::process::exit(0),
        "thread-local" => LOCAL.set(Some(sender)),
        "thread-local of another thread" => std::thread::spawn(|| LOCAL.set(Some(sender))).join().unwrap(),
        way => {
            *KEPT.lock().unwrap() = Some(sender);
            match way {
                "static, finished" => KEPT.lock().unwrap().take().unwrap().finish(),
                // SAFETY: the handler drops a sender, and touches nothing else.
                "static, dropped by atexit" => assert_eq!(unsafe { nix::libc::atexit(drop_kept) }, 0),
                _ => assert_eq!(way, "static"),
            }
        }
    }
}

#[test]
fn a_receiver_that_fails_says_so_before_what_it_holds_goes_back() {
    let (_broker, client) = broker();
    for panics in [false, true] {
        let mut receiver = client.receiver("c").open().unwrap();
        let mut sender = client.sender("c").slot_size(8).slots(4).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        (0..3).for_each(|_| assert!(send(&mut sender, b"x") < 3));
        drop(receiver.get_timeout(SOON).unwrap());
        let held = receiver.get_timeout(SOON).unwrap();
        let wanted = if panics {
            let thread = std::thread::spawn(move || {
                let _receiver = receiver;
                panic!("this panic is part of the test");
            });
            assert!(thread.join().is_err());
            Abort::Panic
        } else {
            receiver.abort(9);
            Abort::Code(9)
        };
        drop(held);
        // All is back, and that is no success.
        sender.wait_for_returns_timeout(SOON).unwrap();
        let Departure { reason, unread, .. } = sender.next_departure().expect("it is known by now");
        assert_eq!((reason, numbers(unread)), (DisconnectReason::Failed { reason: wanted }, last(1, 3)));
    }
}

#[test]
fn a_receiver_knows_how_much_it_has_missed_before_it_was_linked() {
    let (_broker, client) = broker();
    let mut first = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(8).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..3).for_each(|_| assert!(send(&mut sender, b"x") < 3));
    let mut late = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    assert_eq!(send(&mut sender, b"x"), 3);
    assert_eq!(first.get_timeout(SOON).unwrap().sequence(), 0);
    assert_eq!(late.get_timeout(SOON).unwrap().sequence(), 3);
    assert_eq!((first.counters().missed_before, late.counters().missed_before), (0, 3));
    // Also when the link is over, and when nothing came over it.
    let mut later = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(3, SOON).unwrap();
    sender.finish();
    assert_eq!(late.get_timeout(SOON).unwrap_err(), GetError::Ended);
    assert_eq!(later.get_timeout(SOON).unwrap_err(), GetError::Ended);
    assert_eq!((late.counters().missed_before, later.counters().missed_before), (3, 4));
}

#[test]
fn a_sender_hears_that_fbuf_recv_has_failed_also_if_it_was_for_another_sender() {
    let (broker, client) = broker();
    let recv = &mut fbuf(["recv", "c"]);
    recv.env("FBUF_BROKER", broker.address().to_string()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut recv = Process::start(recv);
    let open = || client.sender("c").slot_size(8).slots(4).open().unwrap();
    let [mut one, mut other] = [open(), open()];
    for sender in [&mut one, &mut other] {
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
    }
    one.abort(7);
    let mut departure = None;
    until("the other sender hears of it", || {
        other.poll_events();
        departure = other.next_departure();
        departure.is_some()
    });
    assert_eq!(departure.unwrap().reason, DisconnectReason::Failed { reason: Abort::Code(1) });
    assert_eq!(recv.end().code(), Some(3));
}
