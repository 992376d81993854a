//! Processes that fork, with all that they have open: a child changes nothing of its parent's, and is told so.

mod support;

use std::{
    env,
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::Command,
    time::{Duration, Instant},
};

use fbuf_broker::{Embedded, Policy};
use fbuf_client::{
    Address, AllocateError, Client, Fbuf, GetError, Mechanism, OpenError, Receiver, Sender, WaitError, WriteError,
};
use nix::{
    libc,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, setsid},
};
use support::{Run, SOON, broker};

/// In how little time a child returns from what it cannot do. It is measured in seconds where it hangs.
const AT_ONCE: Duration = Duration::from_secs(5);

/// So short that nothing comes meanwhile.
const BRIEFLY: Duration = Duration::from_millis(1);

/// Runs this in a child that was forked, which then ends without dropping anything more: what it said, if it did not
/// panic, hang, or die.
#[allow(unsafe_code, reason = "fork(2)")]
fn in_child(run: impl FnOnce() -> String) -> String {
    let (said, says) = nix::unistd::pipe().unwrap();
    // SAFETY: the child allocates, which the C library allows after fork(3), and ends by _exit(2).
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => finish(says, run),
        ForkResult::Parent { child } => {
            drop(says);
            wait(child);
            read(said)
        }
    }
}

/// Forks: the child, or none in it.
#[allow(unsafe_code, reason = "fork(2)")]
fn split() -> Option<Pid> {
    // SAFETY: as in `in_child`.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => None,
        ForkResult::Parent { child } => Some(child),
    }
}

/// Ends this process, and drops nothing.
#[allow(unsafe_code, reason = "_exit(2)")]
fn exit() -> ! {
    // SAFETY: it ends this process.
    unsafe { libc::_exit(0) }
}

#[allow(unsafe_code, reason = "_exit(2)")]
fn finish(says: OwnedFd, run: impl FnOnce() -> String) -> ! {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    let ended = result.is_ok();
    let _ = File::from(says).write_all(result.unwrap_or_default().as_bytes());
    // SAFETY: it ends this process.
    unsafe { libc::_exit(i32::from(!ended)) }
}

fn read(said: OwnedFd) -> String {
    let mut text = String::new();
    File::from(said).read_to_string(&mut text).unwrap();
    text
}

/// Waits for the end of a child, in order and in time.
fn wait(child: Pid) {
    let begin = Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive if begin.elapsed() < SOON => std::thread::yield_now(),
            WaitStatus::StillAlive => {
                nix::sys::signal::kill(child, Signal::SIGKILL).unwrap();
                panic!("a child hangs");
            }
            status => return assert_eq!(status, WaitStatus::Exited(child, 0), "a child panicked, or died"),
        }
    }
}

/// Two endpoints that are linked.
fn linked(client: &Client, channel: &str, mechanism: Mechanism) -> (Sender, Receiver) {
    let receiver = client.receiver(channel).open().unwrap();
    let mut sender = client.sender(channel).slot_size(64).slots(2).mechanism(mechanism).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (sender, receiver)
}

fn fill(sender: &mut Sender, byte: u8) -> Fbuf {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.write_all(&[byte; 64]).unwrap();
    fbuf
}

fn send(sender: &mut Sender, byte: u8) {
    let fbuf = fill(sender, byte);
    sender.write(fbuf).unwrap();
}

const EACH: [Mechanism; 4] = [Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot];

#[test]
fn a_message_that_a_child_drops_stays_with_its_parent() {
    for mechanism in EACH {
        let (_broker, client) = broker();
        let (mut sender, mut receiver) = linked(&client, "c", mechanism);
        send(&mut sender, 1);
        let held = receiver.get_timeout(SOON).unwrap();
        let mut held = Some(held);
        let said = in_child(|| {
            let message = held.take().unwrap();
            let read = format!("{:?}", message.iter().all(|&byte| byte == 1));
            drop(message);
            read
        });
        assert_eq!(said, "true", "a child reads what its parent holds: {mechanism:?}");
        // The other slot is used, and then there is none.
        send(&mut sender, 2);
        drop(receiver.get_timeout(SOON).unwrap());
        send(&mut sender, 3);
        assert_eq!(receiver.counters().held, 1);
        if mechanism != Mechanism::OneShot {
            let other = receiver.get_timeout(SOON).unwrap();
            assert!(matches!(sender.allocate_timeout(Duration::from_millis(50)), Err(AllocateError::TimedOut { .. })));
            drop(other);
        }
        let message = held.take().unwrap();
        assert!(message.iter().all(|&byte| byte == 1), "{mechanism:?}");
        // The control: dropped by its holder, it comes back.
        drop(message);
        assert!(sender.allocate_timeout(SOON).is_ok(), "{mechanism:?}");
    }
}

#[test]
fn a_child_ends_no_stream_and_takes_no_message() {
    for mechanism in EACH {
        let (_broker, client) = broker();
        let (sender, receiver) = linked(&client, "c", mechanism);
        let (mut sender, mut receiver) = (Some(sender), Some(receiver));
        send(sender.as_mut().unwrap(), 1);
        let said = in_child(|| {
            drop((sender.take(), receiver.take()));
            "dropped".into()
        });
        assert_eq!(said, "dropped", "{mechanism:?}");
        let (mut sender, mut receiver) = (sender.take().unwrap(), receiver.take().unwrap());
        send(&mut sender, 2);
        for byte in [1, 2] {
            assert_eq!(receiver.get_timeout(SOON).unwrap()[0], byte, "{mechanism:?}");
        }
        assert_eq!((sender.receivers(), receiver.senders()), (1, 1));
        // The control: dropped here, it ends.
        drop(sender);
        assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    }
}

#[test]
fn a_handle_that_a_child_has_interrupts_no_call_of_its_parent() {
    let (_broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let handle = receiver.interrupt_handle();
    in_child(|| {
        handle.interrupt();
        String::new()
    });
    assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
    handle.interrupt();
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Interrupted);
}

#[test]
fn what_a_child_writes_stays_in_the_child() {
    for mechanism in EACH {
        let (_broker, client) = broker();
        let (mut sender, mut receiver) = linked(&client, "c", mechanism);
        let mut fbuf = Some(fill(&mut sender, 1));
        let said = in_child(|| {
            let mut inherited = fbuf.take().unwrap();
            let seen = inherited[0];
            inherited.fill(9);
            let refused = sender.write(inherited).unwrap_err();
            let text = refused.to_string();
            // It comes back in the error, and is dropped.
            assert!(matches!(&refused, WriteError::Forked { fbuf } if fbuf[0] == 9), "{text}");
            drop(refused);
            format!("{seen} {text}")
        });
        assert!(said.starts_with("0 ") && said.contains("connect again"), "{mechanism:?}: {said}");
        let fbuf = fbuf.take().unwrap();
        assert!(fbuf.iter().all(|&byte| byte == 1), "{mechanism:?}");
        sender.write(fbuf).unwrap();
        assert!(receiver.get_timeout(SOON).unwrap().iter().all(|&byte| byte == 1), "{mechanism:?}");
    }
}

/// What a child drops first, and what of it last.
#[test]
fn what_a_child_has_outlives_the_endpoints_that_it_drops() {
    for mechanism in EACH {
        let (_broker, client) = broker();
        let (mut sender, mut receiver) = linked(&client, "c", mechanism);
        send(&mut sender, 1);
        let (kept, received) = (Some(fill(&mut sender, 2)), Some(receiver.get_timeout(SOON).unwrap()));
        let (mut ends, mut held) = (Some((sender, receiver, client)), Some((kept, received)));
        let said = in_child(|| {
            drop(ends.take());
            let (kept, received) = held.take().unwrap();
            // Something else lies by now where the endpoints were.
            let filled: Vec<_> = (0..10_000).map(|number| vec![0xAAu8; number % 500]).collect();
            let (mut kept, received) = (kept.unwrap(), received.unwrap());
            kept.fill(filled[499][0]);
            let said = format!("{} {} {}", kept.capacity(), kept.len(), received.len());
            drop((kept, received, filled));
            said
        });
        assert_eq!(said, "64 64 64", "{mechanism:?}");
    }
}

#[test]
fn every_call_of_a_child_returns_at_once_and_says_to_connect_again() {
    let (_broker, client) = broker();
    let (mut sender, mut receiver) = linked(&client, "c", Mechanism::Shared);
    // Messages wait, and a slot is known to be free.
    send(&mut sender, 1);
    let said = in_child(|| {
        let begin = Instant::now();
        assert!(!client.is_connected());
        let open = client.sender("d").slot_size(64).open().unwrap_err();
        assert!(matches!(open, OpenError::Forked(_)), "{open}");
        assert!(matches!(client.receiver("d").open(), Err(OpenError::Forked(_))));
        assert!(matches!(client.status(), Err(OpenError::Forked(_))));
        assert!(matches!(client.clients(), Err(OpenError::Forked(_))));
        assert!(matches!(receiver.get(), Err(GetError::Forked(_))));
        assert!(matches!(receiver.get_timeout(SOON), Err(GetError::Forked(_))));
        assert!(matches!(receiver.try_get(), Err(GetError::Forked(_))));
        assert!(matches!(sender.wait_for_receivers(2), Err(WaitError::Forked(_))));
        assert!(matches!(sender.wait_for_returns(), Err(WaitError::Forked(_))));
        sender.poll_events();
        assert!(sender.next_departure().is_none());
        let _ = (sender.counters(), receiver.counters());
        // Slots that were known to be free are private memory now; then there are none.
        let mut allocated: Vec<_> = std::iter::from_fn(|| sender.try_allocate().unwrap_or(None)).collect();
        assert!(matches!(sender.try_allocate(), Err(AllocateError::Forked(_))));
        assert!(matches!(sender.allocate(), Err(AllocateError::Forked(_))));
        assert!(matches!(sender.allocate_timeout(SOON), Err(AllocateError::Forked(_))));
        if let Some(fbuf) = allocated.pop() {
            assert!(matches!(sender.write_retained(fbuf), Err(WriteError::Forked { .. })));
        }
        drop((allocated, sender, receiver, client));
        assert!(begin.elapsed() < AT_ONCE, "after {:?}", begin.elapsed());
        open.to_string()
    });
    assert!(said.contains("connect again"), "{said}");
}

#[test]
fn a_child_that_connects_again_is_a_client_like_any_other() {
    let (broker, client) = broker();
    let (mut sender, mut receiver) = linked(&client, "c", Mechanism::Lease);
    send(&mut sender, 1);
    let held = receiver.get_timeout(SOON).unwrap();
    let address = broker.address().clone();
    let said = in_child(|| {
        // Beside all that it inherited, which it drops afterwards.
        for mechanism in EACH {
            let own = Client::connect_to(&address).unwrap();
            let (mut sender, mut receiver) = linked(&own, &format!("{mechanism:?}"), mechanism);
            send(&mut sender, 7);
            assert_eq!(receiver.get_timeout(SOON).unwrap()[0], 7);
        }
        drop((held, sender, receiver, client));
        let own = Client::connect_to(&address).unwrap();
        let (mut sender, mut receiver) = linked(&own, "after", Mechanism::Lease);
        send(&mut sender, 8);
        // And so is its own child.
        let message = receiver.get_timeout(SOON).unwrap();
        let grandchild = in_child(|| format!("{} {}", message[0], Client::connect_to(&address).is_ok()));
        format!("{grandchild} {}", message[0])
    });
    assert_eq!(said, "8 true 8");
}

#[test]
fn peers_see_the_death_of_a_process_of_which_a_child_lives_on() {
    let (broker, client) = broker();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut other = client.sender("d").slot_size(64).slots(2).open().unwrap();
    let address = broker.address().clone();
    let (said, says) = nix::unistd::pipe().unwrap();
    let (stays, go) = nix::unistd::pipe().unwrap();
    // A daemon: it connects, forks twice, and goes on in the grandchild.
    let Some(parent) = split() else {
        drop(go);
        let client = Client::connect_to(&address).unwrap();
        let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
        let _receiver = client.receiver("d").open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        send(&mut sender, 1);
        if split().is_some() {
            exit();
        }
        setsid().unwrap();
        if split().is_some() {
            exit();
        }
        finish(says, || {
            let error = sender.wait_for_receivers_timeout(2, SOON).unwrap_err();
            // For as long as the test likes.
            let _ = File::from(stays).read(&mut [0]);
            error.to_string()
        });
    };
    drop((says, stays));
    wait(parent);
    assert_eq!(receiver.get_timeout(SOON).unwrap()[0], 1);
    assert!(matches!(receiver.get_timeout(SOON), Err(GetError::Disconnected { .. })), "its links hang up when it dies");
    other.wait_for_receivers_timeout(1, Duration::ZERO).ok();
    support::until("senders hear of it as well", || {
        other.poll_events();
        other.receivers() == 0
    });
    drop(go);
    assert!(read(said).contains("connect again"));
}

#[test]
fn a_child_leaves_the_broker_of_its_parent_alone() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("b");
    let broker = Embedded::start_at(Address::new(&socket), Policy::own()).unwrap();
    let mut broker = Some(broker);
    let said = in_child(|| {
        drop(broker.take());
        "dropped".into()
    });
    assert_eq!(said, "dropped");
    assert!(socket.exists());
    let client = Client::connect_to(broker.as_ref().unwrap().address()).unwrap();
    assert!(client.status().unwrap().is_empty());
    // The control: dropped here, it is gone.
    drop((client, broker));
    assert!(!socket.exists());
}

/// A descriptor cannot be replaced if its number is beyond the limit that was set after it was opened.
#[test]
fn links_end_with_a_process_that_lowered_its_limit_of_descriptors_before_it_forked() {
    const LIMIT: u64 = 64;
    let (broker, client) = broker();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let (waits, go) = nix::unistd::pipe().unwrap();
    let (alive, says) = nix::unistd::pipe().unwrap();
    let Some(child) = split() else {
        // What follows has numbers from there on.
        let files: Vec<_> = (0..LIMIT).map(|_| File::open("/dev/null").unwrap()).collect();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        drop(files);
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, LIMIT, most).unwrap();
        if split().is_none() {
            drop(go);
            read(waits);
            File::from(says).write_all(b"here").unwrap();
        }
        // As one that dies, while its child lives on.
        exit()
    };
    drop(says);
    wait(child);
    assert!(matches!(receiver.get_timeout(SOON).unwrap_err(), GetError::Disconnected { .. }));
    // The control: the grandchild was there all the time.
    drop(go);
    assert_eq!(read(alive), "here");
}

#[test]
fn a_process_forks_while_its_threads_are_busy() {
    let (_broker, client) = broker();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (client, stop) = (&client, &stop);
            scope.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let (mut sender, mut receiver) = linked(client, &format!("busy{number}"), Mechanism::Lease);
                    send(&mut sender, 1);
                    drop(sender);
                    assert_eq!(receiver.get_timeout(SOON).unwrap()[0], 1);
                }
            });
        }
        let (mut sender, mut receiver) = linked(&client, "c", Mechanism::Shared);
        for byte in 0..100 {
            send(&mut sender, byte);
            let held = receiver.get_timeout(SOON).unwrap();
            let mut held = Some(held);
            let said = in_child(|| {
                drop(held.take());
                receiver.get().unwrap_err().to_string()
            });
            assert!(said.contains("connect again"), "{said}");
            assert_eq!(held.unwrap()[0], byte);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// A child of clone(2) runs no handlers. It does not have what it could change, and calls tell it.
#[test]
#[allow(unsafe_code, reason = "clone(2)")]
fn a_child_of_a_bare_clone_changes_nothing() {
    // In a process of its own: while another test forks, what its children are to have can be inherited here as well.
    if env::var_os("FBUF_TEST_ALONE").is_none() {
        let mut alone = Command::new(env::current_exe().unwrap());
        alone.args(["a_child_of_a_bare_clone_changes_nothing", "--exact"]).env("FBUF_TEST_ALONE", "1");
        assert!(alone.run_to_its_end().success(), "it says why");
        return;
    }
    let (_broker, client) = broker();
    let (mut sender, mut receiver) = linked(&client, "c", Mechanism::Shared);
    send(&mut sender, 1);
    let held = receiver.get_timeout(SOON).unwrap();
    let mut held = Some(held);
    let clone = |run: &mut dyn FnMut()| {
        // SAFETY: as fork(2), without the handlers: the child touches what it inherited, and ends.
        match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
            0 => {
                run();
                // SAFETY: it ends this process.
                unsafe { libc::_exit(0) }
            }
            child => waitpid(Pid::from_raw(child as i32), None).unwrap(),
        }
    };
    let told = clone(&mut || {
        if !matches!(client.status(), Err(OpenError::Forked(_)))
            || !matches!(sender.wait_for_returns(), Err(WaitError::Forked(_)))
        {
            // SAFETY: it ends this process.
            unsafe { libc::_exit(1) }
        }
    });
    assert!(matches!(told, WaitStatus::Exited(_, 0)), "{told:?}");
    let handle = receiver.interrupt_handle();
    assert!(matches!(clone(&mut || handle.interrupt()), WaitStatus::Exited(_, 0)));
    assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
    // To return a message takes memory that it does not have.
    let died = clone(&mut || drop(held.take()));
    assert!(matches!(died, WaitStatus::Signaled(_, Signal::SIGSEGV, _)), "{died:?}");
    send(&mut sender, 2);
    assert_eq!(held.as_ref().unwrap()[0], 1);
    assert!(sender.allocate_timeout(Duration::from_millis(50)).is_err(), "the message is the parent's still");
}
