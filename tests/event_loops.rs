//! Event loops that are not of this library wait for endpoints, by their descriptors alone: no wake-up is lost, whatever
//! tells it, and none costs processor time while nothing happens.

#![allow(unsafe_code, reason = "tokio is told of a descriptor")]

mod support;

use std::{
    io,
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Client, DisconnectReason, Fbuf, GetError, Received, Receiver, Sender, Wait, WaitFor};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        signal::Signal,
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime},
    unistd::geteuid,
};
use support::{
    SOON, broker,
    role::{Other, roles},
    send,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::{Builder, Runtime},
    time::timeout,
};

/// So long that it would be noticed.
const LONG: Duration = Duration::from_millis(300);

/// How many messages go there and back between two processes, with each two event loops.
const MESSAGES: u64 = 3000;

/// Sleeps until a descriptor is readable: whether it is.
fn poll_for(descriptor: impl AsFd, time: Duration) -> bool {
    let mut polled = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::try_from(time).unwrap()).unwrap() > 0
}

/// An endpoint, and how it is asked for what it waits for.
trait Waits: AsFd {
    type Item;
    fn ask(&mut self) -> Option<Self::Item>;
    /// Sleeps with a guard until the descriptor is readable, if it is to sleep.
    fn sleep_with_guard(&mut self, sleep: impl FnOnce(&dyn AsFd));
    /// Whether it is to sleep, without a guard.
    fn is_armed(&mut self) -> bool;
}

impl Waits for Receiver {
    type Item = Received;
    fn ask(&mut self) -> Option<Received> {
        self.try_get().unwrap()
    }
    fn sleep_with_guard(&mut self, sleep: impl FnOnce(&dyn AsFd)) {
        if let Some(guard) = self.prepare_wait() {
            sleep(&guard);
            guard.finish();
        }
    }
    fn is_armed(&mut self) -> bool {
        self.prepare_wait().is_some()
    }
}

impl Waits for Sender {
    type Item = Fbuf;
    fn ask(&mut self) -> Option<Fbuf> {
        self.try_allocate().unwrap()
    }
    fn sleep_with_guard(&mut self, sleep: impl FnOnce(&dyn AsFd)) {
        if let Some(guard) = self.prepare_wait(WaitFor::Slot) {
            sleep(&guard);
        }
    }
    fn is_armed(&mut self) -> bool {
        self.prepare_wait(WaitFor::Slot).is_some()
    }
}

/// One that waits for one endpoint.
trait EventLoop<T: Waits> {
    fn new(endpoint: T) -> Self;
    fn next(&mut self) -> T::Item;
    fn endpoint(&mut self) -> &mut T;
}

/// poll(2), with a guard.
struct Poll<T>(T);

impl<T: Waits> EventLoop<T> for Poll<T> {
    fn new(endpoint: T) -> Self {
        Self(endpoint)
    }
    fn next(&mut self) -> T::Item {
        loop {
            if let Some(item) = self.0.ask() {
                return item;
            }
            self.0.sleep_with_guard(|descriptor| assert!(poll_for(descriptor, SOON), "a wake-up was lost"));
        }
    }
    fn endpoint(&mut self) -> &mut T {
        &mut self.0
    }
}

/// epoll(7), which tells of changes only, of an endpoint that is left armed: as in mio, and in loops of callbacks.
struct EdgeTriggered<T>(Epoll, T);

impl<T: Waits> EventLoop<T> for EdgeTriggered<T> {
    fn new(endpoint: T) -> Self {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        epoll.add(endpoint.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)).unwrap();
        Self(epoll, endpoint)
    }
    fn next(&mut self) -> T::Item {
        loop {
            if let Some(item) = self.1.ask() {
                return item;
            }
            if self.1.is_armed() {
                let time = EpollTimeout::try_from(SOON).unwrap();
                assert_eq!(self.0.wait(&mut [EpollEvent::empty()], time), Ok(1), "a wake-up was lost");
            }
        }
    }
    fn endpoint(&mut self) -> &mut T {
        &mut self.1
    }
}

/// tokio's `AsyncFd`. Each wait is given up again and again by a shorter one.
struct Tokio<T: Waits + std::os::fd::AsRawFd>(Runtime, AsyncFd<T>);

impl<T: Waits + std::os::fd::AsRawFd> EventLoop<T> for Tokio<T> {
    fn new(endpoint: T) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        // SAFETY: an endpoint's descriptor is always the same, and closed when the endpoint is dropped; it is not exchanged.
        let register = async { unsafe { AsyncFd::register_with_interest(endpoint, Interest::READABLE) } };
        let registered = runtime.block_on(register).map_err(io::Error::from).unwrap();
        Self(runtime, registered)
    }
    fn next(&mut self) -> T::Item {
        async fn next<T: Waits + std::os::fd::AsRawFd>(registered: &mut AsyncFd<T>) -> io::Result<T::Item> {
            loop {
                if let Some(item) = registered.get_mut().ask() {
                    return Ok(item);
                }
                if registered.get_mut().is_armed() {
                    registered.readable_mut().await?.clear_ready();
                }
            }
        }
        self.0.block_on(async {
            // It is asked once, and dropped.
            if let Ok(item) = timeout(Duration::ZERO, next(&mut self.1)).await {
                return item.unwrap();
            }
            timeout(SOON, next(&mut self.1)).await.expect("a wake-up was lost").unwrap()
        })
    }
    fn endpoint(&mut self) -> &mut T {
        self.1.get_mut()
    }
}

const LOOPS: [&str; 3] = ["poll", "edge", "tokio"];

/// Sends back each message that comes.
fn echo<R: EventLoop<Receiver>, S: EventLoop<Sender>>(receiver: Receiver, sender: Sender) {
    let (mut receiver, mut sender) = (R::new(receiver), S::new(sender));
    for number in 0..MESSAGES {
        let received = receiver.next();
        assert_eq!(received[..], number.to_ne_bytes());
        answer(&mut sender, number);
    }
    // What it sent is read when it is gone.
    assert!(sender.endpoint().counters().messages == MESSAGES);
}

fn answer<S: EventLoop<Sender>>(sender: &mut S, number: u64) {
    let mut fbuf = sender.next();
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    sender.endpoint().write(fbuf).unwrap();
}

/// The ends of this process: few slots, so that each side waits for the other.
fn ends(client: &Client, there: &str, back: &str) -> (Sender, Receiver) {
    let receiver = client.receiver(back).wait(Wait::Block).open().unwrap();
    let mut sender = client.sender(there).slot_size(8).slots(2).wait(Wait::Block).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (sender, receiver)
}

/// What a child does.
fn play(role: &str) {
    let client = Client::connect().unwrap();
    match role {
        "echo poll" | "echo edge" | "echo tokio" => {
            let (sender, receiver) = ends(&client, "back", "there");
            match role {
                "echo poll" => echo::<Poll<_>, Poll<_>>(receiver, sender),
                "echo edge" => echo::<EdgeTriggered<_>, EdgeTriggered<_>>(receiver, sender),
                _ => echo::<Tokio<_>, Tokio<_>>(receiver, sender),
            }
        }
        "sender" => {
            let mut sender = client.sender("c").slot_size(8).slots(2).open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            println!("it is linked");
            for line in io::stdin().lines() {
                send(&mut sender, line.unwrap().as_bytes());
            }
        }
        _ => {
            let mut receiver = client.receiver("c").open().unwrap();
            let mut held = Vec::new();
            println!("it is there");
            for line in io::stdin().lines() {
                match line.unwrap().as_str() {
                    "take" => held.push(receiver.get_timeout(SOON).unwrap()),
                    _ => held.clear(),
                }
                println!("done");
            }
        }
    }
}

fn exchange<S: EventLoop<Sender>, R: EventLoop<Receiver>>(client: &Client) -> [u64; 2] {
    let (sender, receiver) = ends(client, "there", "back");
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut sender = S::new(sender);
            (0..MESSAGES).for_each(|number| answer(&mut sender, number));
            sender.endpoint().counters().sleeps
        });
        let mut receiver = R::new(receiver);
        for number in 0..MESSAGES {
            let received = receiver.next();
            assert_eq!((received.sequence(), &received[..]), (number, &number.to_ne_bytes()[..]));
        }
        [sending.join().unwrap(), receiver.endpoint().counters().sleeps]
    })
}

#[test]
fn no_message_and_no_slot_is_slept_over_in_any_event_loop() {
    roles!(play);
    for theirs in LOOPS {
        for ours in LOOPS {
            let (broker, client) = broker();
            let mut other = Other::start(broker.address(), format!("echo {theirs}"), geteuid().as_raw());
            let slept = match ours {
                "poll" => exchange::<Poll<_>, Poll<_>>(&client),
                "edge" => exchange::<EdgeTriggered<_>, EdgeTriggered<_>>(&client),
                _ => exchange::<Tokio<_>, Tokio<_>>(&client),
            };
            println!("{ours} with {theirs}: {MESSAGES} messages there and back, slept {slept:?} times");
            assert!(slept.iter().all(|&times| times > 10), "{ours} with {theirs}: nothing was tested: {slept:?}");
            assert!(other.process.end().success());
        }
    }
}

/// A receiver, and another process with a sender that sends the lines it is told.
fn sender_beside(client: &Client, broker: &fbuf_broker::Embedded) -> (Receiver, Other) {
    let receiver = client.receiver("c").keep_waiting().open().unwrap();
    let mut other = Other::start(broker.address(), "sender", geteuid().as_raw());
    other.hear("it is linked");
    (receiver, other)
}

/// Prepares, if there is nothing to do any more.
macro_rules! armed {
    ($endpoint:expr $(, $what:expr)?) => {
        loop {
            if let Some(guard) = $endpoint.prepare_wait($($what)?) {
                break guard;
            }
        }
    };
}

#[test]
fn a_receiver_wakes_for_a_newcomer_a_message_a_death_and_an_interrupt() {
    roles!(play);
    let (broker, client) = broker();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let guard = receiver.prepare_wait().expect("nothing to do");
    let mut other = Other::start(broker.address(), "sender", geteuid().as_raw());
    assert!(poll_for(&guard, SOON), "a newcomer");
    guard.finish();
    while receiver.senders() == 0 {
        let Some(guard) = receiver.prepare_wait() else { continue };
        assert!(poll_for(&guard, SOON), "a newcomer");
        guard.finish();
    }
    other.hear("it is linked");
    let guard = armed!(receiver);
    assert!(!poll_for(&guard, LONG), "it is readable, and nothing has happened");
    other.tell("hello");
    assert!(poll_for(&guard, SOON), "a message");
    assert_eq!(receiver.try_get().unwrap().unwrap()[..], *b"hello");

    let handle = receiver.interrupt_handle();
    let guard = armed!(receiver);
    handle.interrupt();
    assert!(poll_for(&guard, SOON), "an interrupt");
    assert!(receiver.try_get().unwrap().is_none() && receiver.prepare_wait().is_none(), "told once");
    assert!(!poll_for(armed!(receiver), Duration::ZERO), "told twice");
    handle.interrupt();
    assert!(receiver.prepare_wait().is_none(), "one that came before");
    // An event loop that is told of changes only is told nothing of what was there before.
    assert!(
        receiver.prepare_wait().is_none_or(|guard| !poll_for(&guard, Duration::ZERO)),
        "readable from the beginning"
    );

    let guard = armed!(receiver);
    other.process.signal(Signal::SIGKILL);
    assert!(poll_for(&guard, SOON), "a death");
    assert!(matches!(receiver.try_get(), Err(GetError::Disconnected { .. })));
}

#[test]
fn a_sender_wakes_for_a_newcomer_a_slot_a_return_and_a_death() {
    roles!(play);
    let (broker, client) = broker();
    let mut sender = client.sender("c").slot_size(8).slots(2).open().unwrap();
    let guard = armed!(sender, WaitFor::Receivers(1));
    let mut other = Other::start(broker.address(), "receiver", geteuid().as_raw());
    assert!(poll_for(&guard, SOON), "a newcomer");
    while sender.receivers() == 0 {
        let guard = sender.prepare_wait(WaitFor::Receivers(1));
        assert!(guard.is_none_or(|guard| poll_for(&guard, SOON)), "a newcomer");
    }
    assert!(sender.prepare_wait(WaitFor::Receivers(1)).is_none() && sender.prepare_wait(WaitFor::Slot).is_none());
    let mut tell = |words| {
        other.tell(words);
        other.hear("done");
    };
    (0..2).for_each(|byte| _ = send(&mut sender, &[byte]));
    (0..2).for_each(|_| tell("take"));
    for what in [WaitFor::Slot, WaitFor::Returns] {
        assert!(!poll_for(armed!(sender, what), LONG), "{what:?}: it is readable, and nothing has happened");
    }
    let guard = armed!(sender, WaitFor::Slot);
    tell("let go");
    assert!(poll_for(&guard, SOON), "a slot");
    let fbuf = sender.try_allocate().unwrap().expect("a slot");
    // One that this process has itself.
    let other_fbuf = sender.try_allocate().unwrap().expect("a slot");
    let guard = armed!(sender, WaitFor::Slot);
    thread::scope(|scope| drop(scope.spawn(|| drop(other_fbuf))));
    assert!(poll_for(&guard, SOON), "an fbuf that was dropped");
    assert!(sender.has_all_back() && sender.prepare_wait(WaitFor::Returns).is_none());

    sender.write(fbuf).unwrap();
    tell("take");
    assert!(!sender.has_all_back());
    let guard = armed!(sender, WaitFor::Returns);
    tell("let go");
    assert!(poll_for(&guard, SOON), "a return");
    assert!(sender.has_all_back());

    (0..2).for_each(|byte| _ = send(&mut sender, &[byte]));
    let handle = sender.interrupt_handle();
    let guard = armed!(sender, WaitFor::Slot);
    handle.interrupt();
    assert!(poll_for(&guard, SOON), "an interrupt");
    assert!(sender.prepare_wait(WaitFor::Slot).is_none(), "told once");
    let guard = armed!(sender, WaitFor::Slot);
    other.process.signal(Signal::SIGKILL);
    assert!(poll_for(&guard, SOON), "a death");
    assert!(sender.try_allocate().unwrap().is_some());
    assert_eq!(sender.next_departure().unwrap().reason, DisconnectReason::Died);
}

#[test]
fn a_descriptor_says_nothing_before_the_wait_is_prepared() {
    roles!(play);
    let (broker, client) = broker();
    let (mut receiver, mut other) = sender_beside(&client, &broker);
    armed!(receiver).finish();
    other.tell("unheard");
    assert!(!poll_for(&receiver, LONG), "it is told although it did not ask");
    // And it is there.
    assert!(receiver.prepare_wait().is_none());
    assert_eq!(receiver.try_get().unwrap().unwrap()[..], *b"unheard");
}

#[test]
fn a_guard_that_is_not_finished_is_harmless() {
    roles!(play);
    let (broker, client) = broker();
    let (mut receiver, mut other) = sender_beside(&client, &broker);
    for round in 0..100 {
        match round % 2 {
            0 => _ = armed!(receiver),
            _ => armed!(receiver).finish(),
        }
        other.tell("hello");
        assert_eq!(receiver.get_timeout(SOON).unwrap()[..], *b"hello", "round {round}");
        if round % 2 == 0 {
            let _ = armed!(receiver);
            other.tell("hello");
            assert!(poll_for(&receiver, SOON), "round {round}");
            assert_eq!(receiver.try_get().unwrap().unwrap()[..], *b"hello", "round {round}");
        }
    }
    // It is not readable for ever by what was not finished.
    assert!(!poll_for(armed!(receiver), LONG));
}

#[test]
fn a_peer_that_is_stopped_holds_no_event_loop_up() {
    roles!(play);
    let (broker, client) = broker();
    let (mut receiver, mut other) = sender_beside(&client, &broker);
    let guard = armed!(receiver);
    other.process.signal(Signal::SIGSTOP);
    other.process.until_stopped();
    other.tell("late");
    assert!(!poll_for(&guard, LONG));
    other.process.signal(Signal::SIGCONT);
    assert!(poll_for(&guard, SOON));
    assert_eq!(receiver.try_get().unwrap().unwrap()[..], *b"late");
}

#[test]
fn a_receiver_that_holds_everything_is_disconnected_by_an_event_loop_as_well() {
    roles!(play);
    let (broker, client) = broker();
    let sender = client.sender("c").slot_size(8).slots(2).mechanism(fbuf_client::Mechanism::Copy);
    let mut sender = sender.disconnect_after(LONG).open().unwrap();
    let mut other = Other::start(broker.address(), "receiver", geteuid().as_raw());
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..2).for_each(|byte| _ = send(&mut sender, &[byte]));
    (0..2).for_each(|_| {
        other.tell("take");
        other.hear("done");
    });
    let (begin, mut sleeps) = (Instant::now(), 0);
    while sender.try_allocate().unwrap().is_none() {
        if let Some(guard) = sender.prepare_wait(WaitFor::Slot) {
            assert!(poll_for(&guard, SOON), "it waits for ever");
            sleeps += 1;
        }
    }
    assert_eq!(sender.next_departure().unwrap().reason, DisconnectReason::HeldUp { limit: LONG });
    assert!(begin.elapsed() >= LONG && sleeps < 10, "{sleeps} sleeps in {:?}", begin.elapsed());
}

#[test]
fn an_event_loop_that_has_nothing_to_do_uses_no_processor_time() {
    roles!(play);
    let (broker, client) = broker();
    let (mut receiver, _other) = sender_beside(&client, &broker);
    let mut sender = client.sender("full").slot_size(8).slots(1).open().unwrap();
    let _held = sender.try_allocate().unwrap();
    let used = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap_or(TimeSpec::new(0, 0)));
    let (begin, before, end) = (Instant::now(), used(), Duration::from_secs(1));
    while begin.elapsed() < end {
        assert!(receiver.try_get().unwrap().is_none() && sender.try_allocate().unwrap().is_none());
        let (Some(one), Some(other)) = (receiver.prepare_wait(), sender.prepare_wait(WaitFor::Slot)) else { continue };
        let mut polled = [&one as &dyn AsFd, &other].map(|guard| PollFd::new(guard.as_fd(), PollFlags::POLLIN));
        poll(&mut polled, PollTimeout::try_from(end.saturating_sub(begin.elapsed())).unwrap()).unwrap();
    }
    let used = used() - before;
    assert!(used < end / 100, "{used:?} in {end:?}");
    assert!(receiver.counters().sleeps < 10 && sender.counters().sleeps < 10);
}
