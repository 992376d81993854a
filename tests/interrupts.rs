//! Calls that wait return when they are interrupted: by a handle, from another thread or a signal handler, or because a
//! handler ran while they slept. Nothing else interrupts them.
#![allow(unsafe_code, reason = "signals are handled, and sent to single threads")]

mod support;

use std::{
    fmt::Debug,
    fs,
    io::Write,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use fbuf_broker::Embedded;
use fbuf_client::{Address, AllocateError, Client, ConnectError, GetError, InterruptHandle, Receiver, Sender, Wait};
use nix::{
    errno::Errno,
    libc::{self, c_int},
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction},
    unistd::{Pid, geteuid, gettid},
};
use support::{
    SOON, broker,
    role::{Other, roles},
    until,
};

/// So short that nothing comes meanwhile.
const BRIEFLY: Duration = Duration::from_millis(1);
/// Long enough for many signals.
const LONG: Duration = Duration::from_millis(200);

const EACH: [Wait; 3] = [Wait::Spin, Wait::Adaptive, Wait::Block];

fn send(sender: &mut Sender, byte: u8) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.write_all(&[byte]).unwrap();
    sender.write(fbuf).unwrap();
}

/// What a call said, in the words of its error.
fn said<T, E: Debug>(result: Result<T, E>) -> String {
    result.map_or_else(|error| format!("{error:?}"), |_| "what was asked for".to_owned())
}

/// A call that waits, by its name, and what it says.
type Named<T> = (&'static str, fn(&mut T) -> String);

const OF_RECEIVER: [Named<Receiver>; 2] =
    [("get", |receiver| said(receiver.get())), ("get_timeout", |receiver| said(receiver.get_timeout(SOON)))];

const OF_SENDER: [Named<Sender>; 6] = [
    ("allocate", |sender| said(sender.allocate())),
    ("allocate_timeout", |sender| said(sender.allocate_timeout(SOON))),
    ("wait_for_receivers", |sender| said(sender.wait_for_receivers(2))),
    ("wait_for_receivers_timeout", |sender| said(sender.wait_for_receivers_timeout(2, SOON))),
    ("wait_for_returns", |sender| said(sender.wait_for_returns())),
    ("wait_for_returns_timeout", |sender| said(sender.wait_for_returns_timeout(SOON))),
];

/// A call that would wait for ever, or very long, and what interrupts it.
struct Call<'a> {
    name: &'a str,
    handle: InterruptHandle,
    run: &'a mut (dyn FnMut() -> String + Send),
}

/// Tests each call of endpoints that wait like this, and that no interrupt is left then.
fn each_call(wait: Wait, mut test: impl FnMut(Call)) {
    let (_broker, client) = broker();
    for (name, call) in OF_RECEIVER {
        let mut receiver = client.receiver("nobody").wait(wait).open().unwrap();
        let handle = receiver.interrupt_handle();
        test(Call { name, handle, run: &mut || call(&mut receiver) });
        assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut, "{name}");
    }
    for (name, call) in OF_SENDER {
        let mut receiver = client.receiver("c").open().unwrap();
        let mut sender = client.sender("c").slot_size(8).slots(1).wait(wait).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        send(&mut sender, 0);
        let _held = receiver.get_timeout(SOON).unwrap();
        let handle = sender.interrupt_handle();
        test(Call { name, handle, run: &mut || call(&mut sender) });
        assert_eq!(sender.allocate_timeout(BRIEFLY).unwrap_err(), AllocateError::TimedOut { slots: 1 }, "{name}");
    }
}

/// The state of a thread, as ps(1) has it: R is running, S sleeping. None if it has ended.
fn state(process: u32, thread: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{process}/task/{thread}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn is_asleep(thread: Pid) -> bool {
    state(std::process::id(), thread) == Some('S')
}

/// Has a thread of this process handle a signal.
fn signal_to(thread: Pid, signal: Signal) {
    // SAFETY: it touches no memory of this process; the handler does, which only counts, or interrupts.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.as_raw(), signal as c_int) };
}

/// How many signals were handled.
static HANDLED: AtomicUsize = AtomicUsize::new(0);
/// What a handler interrupts.
static HANDLE: OnceLock<InterruptHandle> = OnceLock::new();

extern "C" fn count(_: c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn interrupt(_: c_int) {
    if let Some(handle) = HANDLE.get() {
        handle.interrupt();
    }
}

fn handle(signal: Signal, handler: extern "C" fn(c_int), flags: SaFlags) {
    // SAFETY: the handlers of this file use atomics, and what is async-signal-safe.
    unsafe { sigaction(signal, &SigAction::new(SigHandler::Handler(handler), flags, SigSet::empty())) }.unwrap();
}

/// Runs a call on a thread of its own, and something beside it, until it returns: what it said.
fn beside<T: Send>(call: impl FnOnce() -> T + Send, mut act: impl FnMut(Pid)) -> T {
    thread::scope(|scope| {
        let (tells, told) = mpsc::channel();
        let calling = scope.spawn(move || {
            tells.send(gettid()).unwrap();
            call()
        });
        let thread = told.recv().unwrap();
        while !calling.is_finished() {
            act(thread);
            thread::yield_now();
        }
        calling.join().unwrap()
    })
}

#[test]
fn a_handle_interrupts_each_call_that_waits_once() {
    for wait in EACH {
        each_call(wait, |Call { name, handle, run }| {
            handle.interrupt();
            handle.clone().interrupt();
            assert_eq!(run(), "Interrupted", "{name}, {wait:?}: before it waits");
        });
        each_call(wait, |Call { name, handle, run }| {
            let mut left = 1;
            let said = beside(run, |thread| {
                // One that spins does not sleep, but for receivers.
                if left > 0 && (wait == Wait::Spin || is_asleep(thread)) {
                    handle.interrupt();
                    left -= 1;
                }
            });
            assert_eq!(said, "Interrupted", "{name}, {wait:?}: while it waits");
        });
    }
}

#[test]
fn a_call_that_need_not_wait_leaves_an_interrupt_to_the_next_that_does() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(4).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    receiver.interrupt_handle().interrupt();
    sender.interrupt_handle().interrupt();
    for byte in 0..3 {
        send(&mut sender, byte);
        assert_eq!(receiver.get().unwrap()[..], [byte]);
    }
    assert_eq!(sender.wait_for_receivers(1), Ok(1));
    assert!(receiver.try_get().unwrap().is_none());
    assert_eq!(receiver.get().unwrap_err(), GetError::Interrupted);
    assert_eq!(said(sender.wait_for_receivers(2)), "Interrupted");
    assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
    // And the endpoints go on.
    send(&mut sender, 3);
    assert_eq!(receiver.get().unwrap()[..], [3]);
}

#[test]
fn a_client_that_waits_for_a_broker_is_interrupted_by_a_handle_and_by_a_handler() {
    let nowhere = Address::new(format!("@fbuf-no-broker-{}", std::process::id()));
    let mut builder = Client::builder().address(&nowhere).wait_for_broker(Duration::MAX);
    let handle = builder.interrupt_handle().unwrap();
    let is_interrupted = |result| assert!(matches!(result, Err(ConnectError::Interrupted)), "{result:?}");
    is_interrupted(beside(|| builder.clone().connect(), |_| handle.interrupt()));
    handle.interrupt();
    is_interrupted(builder.clone().connect());
    self::handle(Signal::SIGUSR2, count, SaFlags::SA_RESTART);
    is_interrupted(beside(|| builder.clone().connect(), |thread| signal_to(thread, Signal::SIGUSR2)));
}

#[test]
fn a_handle_of_an_endpoint_that_is_gone_does_nothing() {
    let (_broker, client) = broker();
    let gone = client.receiver("c").open().unwrap().interrupt_handle();
    let mut receiver = client.receiver("c").open().unwrap();
    gone.interrupt();
    assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
    receiver.interrupt_handle().interrupt();
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Interrupted);
}

#[test]
fn a_handler_interrupts_by_a_handle_whichever_thread_it_runs_on() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    HANDLE.get_or_init(|| receiver.interrupt_handle());
    handle(Signal::SIGHUP, interrupt, SaFlags::SA_RESTART);
    let mut left = 1;
    let said = beside(
        || receiver.get(),
        |thread| {
            if left > 0 && is_asleep(thread) {
                // On this thread, and not on that one.
                Errno::set_raw(77);
                raise(Signal::SIGHUP).unwrap();
                assert_eq!(Errno::last_raw(), 77);
                left -= 1;
            }
        },
    );
    assert_eq!(said.unwrap_err(), GetError::Interrupted);
}

#[test]
fn a_handler_that_only_sets_a_flag_interrupts_a_call_that_sleeps() {
    for (signal, flags) in [(Signal::SIGUSR1, SaFlags::SA_RESTART), (Signal::SIGUSR2, SaFlags::empty())] {
        handle(signal, count, flags);
        for wait in [Wait::Adaptive, Wait::Block] {
            each_call(wait, |Call { name, run, .. }| {
                let said = beside(run, |thread| {
                    if is_asleep(thread) {
                        signal_to(thread, signal);
                    }
                });
                assert_eq!(said, "Interrupted", "{name}, {wait:?}, {flags:?}");
            });
        }
    }
    assert!(HANDLED.load(Ordering::Relaxed) > 0);
}

/// As it is documented: there is no system call that a handler could interrupt.
#[test]
fn a_handler_that_only_sets_a_flag_does_not_interrupt_a_call_that_spins() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").wait(Wait::Spin).open().unwrap();
    handle(Signal::SIGALRM, count, SaFlags::empty());
    let before = HANDLED.load(Ordering::Relaxed);
    let said = beside(|| receiver.get_timeout(LONG), |thread| signal_to(thread, Signal::SIGALRM));
    assert_eq!(said.unwrap_err(), GetError::TimedOut);
    assert!(HANDLED.load(Ordering::Relaxed) > before);
}

/// What a child does: it says which thread waits, and then what came of that.
fn play(role: &str) {
    if role == "handles" {
        handle(Signal::SIGWINCH, count, SaFlags::SA_RESTART);
    }
    let mut receiver = Client::connect().unwrap().receiver("c").open().unwrap();
    println!("thread {}", gettid());
    println!("get {}", said(receiver.get()));
}

/// Another process that waits for a message, of which one thread does so.
struct Waiting {
    other: Other,
    thread: Pid,
}

impl Waiting {
    fn start(role: &str, broker: &Embedded) -> Self {
        let mut other = Other::start(broker.address(), role, geteuid().as_raw());
        let thread = Pid::from_raw(other.number("thread "));
        let waiting = Self { other, thread };
        waiting.until_asleep();
        waiting
    }

    fn until_asleep(&self) {
        until("it sleeps", || state(self.other.process.pid(), self.thread) == Some('S'));
    }

    /// Stops it, and has it go on.
    fn stop(&self) {
        self.other.process.signal(Signal::SIGSTOP);
        self.other.process.until_stopped();
        self.other.process.signal(Signal::SIGCONT);
        self.until_asleep();
    }

    fn signal(&self, signal: Signal) {
        // SAFETY: it touches no memory of this process.
        let sent =
            unsafe { libc::syscall(libc::SYS_tgkill, self.other.process.pid(), self.thread.as_raw(), signal as c_int) };
        assert_eq!(sent, 0);
    }
}

#[test]
fn a_call_waits_on_while_its_process_is_stopped_and_for_signals_that_are_not_handled() {
    roles!(play);
    let (broker, client) = broker();
    // What is tested works: one that handles a signal is interrupted.
    let mut handles = Waiting::start("handles", &broker);
    handles.signal(Signal::SIGWINCH);
    assert_eq!(handles.other.hear("get "), "get Interrupted");
    assert!(handles.other.process.end().success());

    let mut waits = Waiting::start("waits", &broker);
    for _ in 0..5 {
        waits.stop();
        waits.signal(Signal::SIGWINCH);
        waits.signal(Signal::SIGCHLD);
        waits.until_asleep();
    }
    let mut sender = client.sender("c").slot_size(8).slots(1).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 0);
    assert_eq!(waits.other.hear("get "), "get what was asked for");
    assert!(waits.other.process.end().success());
}
