//! One thread waits for several endpoints, and for descriptors of its own.

mod support;

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Client, GetError, Pollable, Receiver, Sender, Wait, WaitFor, poll};
use nix::{
    libc,
    sys::{signal::Signal, time::TimeSpec},
    time::{ClockId, clock_gettime},
    unistd::geteuid,
};
use support::{
    SOON, broker,
    filter::{can_refuse, refuse},
    role::{Other, roles},
    send, until,
};

const EACH: [Wait; 3] = [Wait::Spin, Wait::Adaptive, Wait::Block];

/// Long enough to be noticed.
const LONG: Duration = Duration::from_millis(300);

const MESSAGES: u64 = 2000;

/// The role of a child in which signal handlers end each look at descriptors.
const INTERRUPTED: &str = "is interrupted";

/// What a child does: it answers on one channel what it is asked on another, until that ends, and echoes its standard input.
fn play(role: &str) {
    if role == INTERRUPTED {
        return be_interrupted();
    }
    let client = Client::connect().unwrap();
    let mut questions = client.receiver("questions").open().unwrap();
    let mut answers = client.sender("answers").slot_size(8).slots(2).open().unwrap();
    answers.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut input = io::stdin();
    let mut waiting: Option<u64> = None;
    loop {
        let mut polled = [
            Pollable::readable(&input),
            match waiting {
                Some(_) => Pollable::sender(&mut answers, WaitFor::Slot),
                None => Pollable::receiver(&mut questions),
            },
        ];
        assert!(poll(&mut polled, Some(SOON)).unwrap() > 0, "a wake-up was lost");
        let [line, ready] = polled.map(|polled| polled.is_ready());
        if line {
            let mut byte = [0];
            if input.read(&mut byte).unwrap() == 0 && role == "until it is told" {
                return;
            }
            println!("heard");
        }
        if !ready {
            continue;
        }
        if let Some(number) = waiting {
            let Some(mut fbuf) = answers.try_allocate().unwrap() else { continue };
            fbuf.write_all(&number.to_ne_bytes()).unwrap();
            answers.write(fbuf).unwrap();
            waiting = None;
        } else {
            match questions.try_get() {
                Ok(question) => waiting = question.map(|question| u64::from_ne_bytes(question[..].try_into().unwrap())),
                Err(GetError::Ended) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Polls while poll(2) is interrupted each time, as by a profiler's signals.
fn be_interrupted() {
    let (_broker, client) = broker();
    let (mut input, mut output) = UnixStream::pair().unwrap();
    let mut receivers = EACH.map(|wait| client.receiver("c").wait(wait).keep_waiting().open().unwrap());
    let mut sender = client.sender("c").slot_size(8).slots(1).open().unwrap();
    sender.wait_for_receivers_timeout(EACH.len(), SOON).unwrap();
    for receiver in &mut receivers {
        until("a sender is linked", || receiver.try_get().unwrap().is_none() && receiver.senders() == 1);
    }
    send(&mut sender, b"x");
    output.write_all(b"x").unwrap();
    let watched = input.try_clone().unwrap();
    let mut polled = receivers.each_mut().map(|one| [Pollable::receiver(one), Pollable::readable(&watched)]);
    for polled in &mut polled {
        assert_eq!(poll(polled, Some(SOON)).unwrap(), 2);
    }
    input.read_exact(&mut [0]).unwrap();
    #[cfg(target_arch = "x86_64")]
    refuse(libc::SYS_poll, libc::EINTR).unwrap();
    refuse(libc::SYS_ppoll, libc::EINTR).unwrap();
    for polled in &mut polled {
        assert_eq!(poll(polled, Some(SOON)).unwrap(), 1, "the message is there");
        assert_eq!(polled.each_ref().map(Pollable::is_ready), [true, false]);
    }
    for receiver in &mut receivers {
        receiver.try_get().unwrap().unwrap();
        let mut polled = [Pollable::receiver(receiver), Pollable::readable(&watched)];
        assert_eq!(poll(&mut polled, Some(SOON)).unwrap_err().kind(), io::ErrorKind::Interrupted, "nothing is ready");
    }
    println!("was interrupted");
}

#[test]
fn a_signal_handler_hides_nothing_that_is_ready() {
    roles!(play);
    if can_refuse() {
        let (broker, _client) = broker();
        Other::start(broker.address(), INTERRUPTED, geteuid().as_raw()).hear("was interrupted");
    }
}

/// Asks and reads answers as both are possible: how often this side slept.
fn ask(questions: &mut Sender, answers: &mut Receiver) -> u64 {
    let (mut asked, mut answered) = (0, 0u64);
    while answered < MESSAGES {
        let mut polled = vec![Pollable::receiver(answers)];
        polled.extend((asked < MESSAGES).then(|| Pollable::sender(questions, WaitFor::Slot)));
        assert!(poll(&mut polled, Some(SOON)).unwrap() > 0, "a wake-up was lost");
        let [may_read, may_ask] = [0, 1].map(|place| polled.get(place).is_some_and(Pollable::is_ready));
        if may_ask && let Some(mut fbuf) = questions.try_allocate().unwrap() {
            fbuf.write_all(&asked.to_ne_bytes()).unwrap();
            questions.write(fbuf).unwrap();
            asked += 1;
        }
        if may_read && let Some(answer) = answers.try_get().unwrap() {
            assert_eq!(answer[..], answered.to_ne_bytes());
            answered += 1;
        }
    }
    answers.counters().sleeps + questions.counters().sleeps
}

#[test]
fn two_processes_wait_for_senders_receivers_and_input_at_once() {
    roles!(play);
    for wait in EACH {
        let (broker, client) = broker();
        let mut answers = client.receiver("answers").wait(wait).keep_waiting().open().unwrap();
        let mut other = Other::start(broker.address(), "until it is told", geteuid().as_raw());
        let mut questions = client.sender("questions").slot_size(8).slots(2).wait(wait).open().unwrap();
        questions.wait_for_receivers_timeout(1, SOON).unwrap();
        let slept = ask(&mut questions, &mut answers);
        println!("{wait:?}: {MESSAGES} questions and answers, slept {slept} times");
        match wait {
            Wait::Spin => assert_eq!(slept, 0),
            Wait::Block => assert!(slept > 0),
            // It may never have to.
            _ => {}
        }
        other.tell("");
        other.hear("heard");
        // Neither does one that is ready keep it from the rest.
        other.tell("");
        ask_again(&mut questions);
        other.hear("heard");
        other.process.signal(Signal::SIGKILL);
        let mut saw = Vec::new();
        while saw.last().is_none_or(|error| !matches!(error, GetError::Disconnected { .. })) {
            assert_eq!(poll(&mut [Pollable::receiver(&mut answers)], Some(SOON)).unwrap(), 1, "{saw:?}");
            saw.extend(answers.try_get().err());
        }
    }
}

fn ask_again(questions: &mut Sender) {
    (0..2u64).for_each(|number| _ = send(questions, &number.to_ne_bytes()));
}

#[test]
fn each_that_is_ready_is_told_and_no_other() {
    let (_broker, client) = broker();
    for wait in EACH {
        let (mut one, other) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let [mut first, mut second] =
            ["first", "second"].map(|channel| client.receiver(channel).wait(wait).keep_waiting().open().unwrap());
        let mut sender = client.sender("second").slot_size(8).slots(1).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        until("a sender is linked", || second.try_get().unwrap().is_none() && second.senders() == 1);
        let ready = |first: &mut Receiver, second: &mut Receiver, sender: &mut Sender, time| {
            let mut polled = [
                Pollable::receiver(first),
                Pollable::receiver(second),
                Pollable::sender(sender, WaitFor::Slot),
                Pollable::readable(&one.0),
                Pollable::readable(&other.0),
                Pollable::writable(&other.1),
            ];
            let count = poll(&mut polled, Some(time)).unwrap();
            let ready = polled.map(|polled| polled.is_ready());
            assert_eq!(count, ready.iter().filter(|&&ready| ready).count());
            ready
        };
        let expect = [false, false, true, false, false, true];
        assert_eq!(ready(&mut first, &mut second, &mut sender, SOON), expect, "{wait:?}");
        send(&mut sender, b"x");
        let expect = [false, true, false, false, false, true];
        assert_eq!(ready(&mut first, &mut second, &mut sender, SOON), expect, "{wait:?}");
        drop(second.try_get().unwrap().unwrap());
        one.1.write_all(b"x").unwrap();
        let expect = [false, false, true, true, false, true];
        assert_eq!(ready(&mut first, &mut second, &mut sender, SOON), expect, "{wait:?}");
        // An end is told as well.
        drop(one.1);
        let expect = [false, false, true, true, false, true];
        assert_eq!(ready(&mut first, &mut second, &mut sender, Duration::ZERO), expect, "{wait:?}");
    }
}

#[test]
fn what_comes_while_it_sleeps_or_spins_wakes_it() {
    let (_broker, client) = broker();
    for wait in EACH {
        let (input, mut output) = UnixStream::pair().unwrap();
        let [mut first, mut second] =
            ["first", "second"].map(|channel| client.receiver(channel).wait(wait).keep_waiting().open().unwrap());
        let mut sender = client.sender("second").slot_size(8).slots(4).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let handle = first.interrupt_handle();
        let mut wait_for = |act: &mut (dyn FnMut() + Send)| {
            thread::scope(|scope| {
                scope.spawn(|| {
                    let begin = Instant::now();
                    // By then it sleeps or spins, most likely; if not, nothing is lost.
                    until("it waits", || begin.elapsed() > Duration::from_millis(20));
                    act();
                });
                loop {
                    let mut polled =
                        [Pollable::receiver(&mut first), Pollable::receiver(&mut second), Pollable::readable(&input)];
                    match poll(&mut polled, Some(SOON)) {
                        Err(error) => return error.to_string(),
                        Ok(0) => panic!("{wait:?}: a wake-up was lost"),
                        Ok(_) => {}
                    }
                    let [one, other, input_is_ready] = polled.map(|polled| polled.is_ready());
                    assert!(!one);
                    if input_is_ready {
                        (&input).read_exact(&mut [0]).unwrap();
                        return "input".to_owned();
                    }
                    if other && let Some(message) = second.try_get().unwrap() {
                        return String::from_utf8(message.to_vec()).unwrap();
                    }
                }
            })
        };
        assert_eq!(wait_for(&mut || _ = send(&mut sender, b"message")), "message", "{wait:?}");
        assert_eq!(wait_for(&mut || output.write_all(b"x").unwrap()), "input", "{wait:?}");
        let interrupted = io::Error::from(io::ErrorKind::Interrupted).to_string();
        assert_eq!(wait_for(&mut || handle.interrupt()), interrupted, "{wait:?}");
        assert_eq!(wait_for(&mut || _ = send(&mut sender, b"again")), "again", "{wait:?}");
    }
}

#[test]
fn it_returns_in_time_and_uses_no_processor_time_until_then() {
    let (_broker, client) = broker();
    let (input, _output) = UnixStream::pair().unwrap();
    let used = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap_or(TimeSpec::new(0, 0)));
    for wait in EACH {
        let mut receiver = client.receiver("c").wait(wait).keep_waiting().open().unwrap();
        let mut sender = client.sender("nobody").slot_size(8).slots(1).wait(wait).open().unwrap();
        let (_held, begin, before) = (sender.try_allocate().unwrap(), Instant::now(), used());
        let mut polled = [
            Pollable::receiver(&mut receiver),
            Pollable::sender(&mut sender, WaitFor::Slot),
            Pollable::readable(&input),
        ];
        assert_eq!(poll(&mut polled, Some(LONG)).unwrap(), 0);
        assert!(begin.elapsed() >= LONG && begin.elapsed() < SOON);
        let used = used() - before;
        assert!(wait == Wait::Spin || used < LONG / 30, "{wait:?}: {used:?} in {LONG:?}");
        assert!(wait != Wait::Spin || receiver.counters().sleeps == 0);
    }
    // And of nothing.
    assert_eq!(poll(&mut [], Some(Duration::from_millis(1))).unwrap(), 0);
}
