//! A broker that dies and comes back: what is linked goes on, clients connect again by themselves, and
//! clients that come later are linked with those that were there before.

mod support;

use std::{
    collections::BTreeSet,
    env, fs,
    io::Read,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use fbuf_broker::{Embedded, Policy, Quota};
use fbuf_client::{Address, Client, GetError, Mechanism, OpenError, Receiver, Sender, SenderBuilder};
use fbuf_core::process::sys;
use fbuf_protocol::Resource;
use nix::sys::{
    resource::{Resource as Limit, getrlimit, setrlimit},
    signal::Signal,
    socket::{
        AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, getpeername, listen, shutdown, socket,
    },
};
use support::{
    BrokerProcess, HandedOver, Process, Run, SOON,
    role::{command, roles},
    until,
};

/// Sends one message to so many receivers.
fn send(sender: &mut Sender, number: u64, receivers: usize) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    assert_eq!(sender.write(fbuf).unwrap().receivers, receivers);
}

/// Receives exactly this message.
fn expect(receiver: &mut Receiver, number: u64, mechanism: Mechanism) {
    let received = receiver.get_timeout(SOON).unwrap();
    assert_eq!(received[..], number.to_ne_bytes());
    assert_eq!(received.mechanism(), mechanism);
}

fn nothing(receiver: &mut Receiver) {
    assert_eq!(receiver.get_timeout(Duration::from_millis(20)).unwrap_err(), GetError::TimedOut);
}

/// How much of something is taken up by anybody.
fn used(broker: &Embedded, resource: Resource) -> u64 {
    broker.broker().used().into_iter().filter(|&(_, found, _)| found == resource).map(|(_, _, used)| used).sum()
}

/// A broker at an address, which is gone and comes back in between, and a client of then.
fn with_restart(builder: impl Fn(SenderBuilder) -> SenderBuilder, mechanism: Mechanism, later: Mechanism) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    let client = Client::connect_to(&broker.address).unwrap();
    let mut sender = builder(client.sender("c").slot_size(8).slots(4)).open().unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 1, 1);
    expect(&mut receiver, 1, mechanism);

    broker.process.kill();
    until("the client hears of it", || !client.is_connected());
    send(&mut sender, 2, 1);
    expect(&mut receiver, 2, mechanism);

    let broker = BrokerProcess::start(&path);
    until("the client is there again", || client.is_connected());
    let newcomer = Client::connect_to(&broker.address).unwrap();
    let mut second = newcomer.receiver("c").keep_waiting().open().unwrap();
    assert_eq!(sender.wait_for_receivers_timeout(2, SOON).unwrap(), 2);
    let mut other = newcomer.sender("c").slot_size(8).slots(4).open().unwrap();
    other.wait_for_receivers_timeout(2, SOON).unwrap();
    // Once each: ends that knew each other were not introduced again.
    send(&mut sender, 3, 2);
    expect(&mut receiver, 3, mechanism);
    expect(&mut second, 3, later);
    send(&mut other, 4, 2);
    expect(&mut receiver, 4, Mechanism::Shared);
    expect(&mut second, 4, Mechanism::Shared);
    nothing(&mut receiver);
    nothing(&mut second);
}

#[test]
fn streams_go_on_and_newcomers_are_linked() {
    with_restart(|sender| sender, Mechanism::Shared, Mechanism::Shared);
}

#[test]
fn so_do_those_that_are_guarded() {
    with_restart(|sender| sender.guard(true), Mechanism::Shared, Mechanism::Shared);
}

#[test]
fn so_do_those_that_are_copied() {
    with_restart(|sender| sender.mechanism(Mechanism::Copy), Mechanism::Copy, Mechanism::Copy);
}

/// The new broker did not make the slots, so nobody can say of them that they can be leased.
#[test]
fn so_do_those_that_are_leased_and_newcomers_copy_them() {
    with_restart(|sender| sender.mechanism(Mechanism::Lease), Mechanism::Lease, Mechanism::Copy);
}

#[test]
fn so_do_those_that_are_sealed_for_good() {
    with_restart(|sender| sender.mechanism(Mechanism::OneShot), Mechanism::OneShot, Mechanism::OneShot);
}

#[test]
fn slots_of_the_receiver_are_allocated_from_the_next_one_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    let client = Client::connect_to(&broker.address).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(2).from_receiver().open().unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    broker.process.kill();
    until("the client hears of it", || !client.is_connected());
    for number in 0..5 {
        send(&mut sender, number, 1);
        expect(&mut receiver, number, Mechanism::Lease);
    }
    let _broker = BrokerProcess::start(&path);
    until("the client is there again", || client.is_connected());
    drop(receiver);
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    until("the receiver is linked", || {
        sender.poll_events();
        sender.receivers() == 1 && sender.next_departure().is_some()
    });
    for number in 5..10 {
        send(&mut sender, number, 1);
        expect(&mut receiver, number, Mechanism::Lease);
    }
}

/// The connections of this process to a broker at an abstract address.
fn connections_to(broker: &str) -> Vec<RawFd> {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let numbers = descriptors.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_one = |&number: &RawFd| {
        let other: nix::Result<UnixAddr> = getpeername(number);
        other.is_ok_and(|other| other.as_abstract() == Some(broker.as_bytes()))
    };
    numbers.filter(is_one).collect()
}

/// A connection ends also while its broker lives, for instance because a process has had no descriptor left for too long.
#[test]
fn clients_that_lose_their_connection_and_not_their_broker_are_linked_once() {
    for lost in [&[0][..], &[1], &[0, 1], &[1, 0]] {
        let name = format!("fbuf-test-{}-{lost:?}", std::process::id());
        let broker = Embedded::start_at(Address::new(format!("@{name}")), Policy::own()).unwrap();
        let connect = || Client::connect_to(broker.address()).unwrap();
        let (one, other) = (connect(), connect());
        let mut sender = one.sender("c").slot_size(8).slots(4).open().unwrap();
        let mut receiver = other.receiver("c").keep_waiting().open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        send(&mut sender, 1, 1);
        expect(&mut receiver, 1, Mechanism::Shared);
        let clients = || -> BTreeSet<_> {
            let clients = other.clients().into_iter().flatten();
            clients.filter(|client| client.endpoints > 0).map(|client| client.number).collect()
        };
        let both = [one.status().unwrap(), other.status().unwrap()].map(|all| all.len());
        assert_eq!(both, [2, 2]);
        // The one that is lost first is the older, or the younger; what has come again is the youngest.
        for &place in lost.iter().chain(lost) {
            let (before, connections) = (clients(), connections_to(&name));
            assert_eq!((before.len(), connections.len()), (2, 2));
            shutdown(connections[place], Shutdown::Both).unwrap();
            until("the client is there again", || clients().difference(&before).count() == 1 && clients().len() == 2);
        }
        let newcomer = connect();
        let mut second = newcomer.receiver("c").keep_waiting().open().unwrap();
        assert_eq!(sender.wait_for_receivers_timeout(2, SOON).unwrap(), 2, "after {lost:?}");
        send(&mut sender, 2, 2);
        expect(&mut receiver, 2, Mechanism::Shared);
        expect(&mut second, 2, Mechanism::Shared);
        nothing(&mut receiver);
        nothing(&mut second);
    }
}

#[test]
fn what_is_opened_while_there_is_no_broker_waits_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    let client = Client::connect_to(&broker.address).unwrap();
    broker.process.kill();
    until("the client hears of it", || !client.is_connected());
    let opening = {
        let client = client.clone();
        thread::spawn(move || client.receiver("c").open())
    };
    let _broker = BrokerProcess::start(&path);
    let _receiver = opening.join().unwrap().unwrap();
    let mut sender = client.sender("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
}

#[test]
fn but_not_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = BrokerProcess::start(&folder.path().join("broker"));
    let client = Client::connect_to(&broker.address).unwrap();
    broker.process.kill();
    match client.receiver("c").open() {
        Err(OpenError::BrokerGone { reason: why }) => assert!(why.contains("start `fbuf broker`"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_everybody_takes_up_is_known_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::new(folder.path().join("broker"));
    let broker = Embedded::start_at(address.clone(), Policy::own()).unwrap();
    let client = Client::connect_to(&address).unwrap();
    let sender = client.sender("a").slot_size(1000).slots(10).open().unwrap();
    let leased = client.sender("b").slot_size(4096).slots(3).mechanism(Mechanism::Lease).open().unwrap();
    let receiver = client.receiver("a").open().unwrap();
    let kinds = [Resource::Bytes, Resource::Slots, Resource::Channels, Resource::Links, Resource::Connections];
    let before = kinds.map(|kind| used(&broker, kind));
    assert_eq!(before, [10 * 1024 + 3 * 4096, 13, 2, 1, 1]);
    drop(broker);
    let broker = Embedded::start_at(address, Policy::own()).unwrap();
    until("everything is there again", || kinds.map(|kind| used(&broker, kind)) == before);
    drop((sender, leased, receiver, client));
    until("nothing is left", || broker.broker().used().is_empty());
}

#[test]
fn what_the_next_broker_refuses_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::new(folder.path().join("broker"));
    let broker = Embedded::start_at(address.clone(), Policy::own()).unwrap();
    let client = Client::connect_to(&address).unwrap();
    let mut sender = client.sender("c").slots(4).open().unwrap();
    drop(broker);
    let strict = Policy::own().with_quota(Quota::default().with(Resource::Slots, 3));
    let broker = Embedded::start_at(address.clone(), strict).unwrap();
    // It answers in order: what was open before was told before this is opened.
    let _receiver = client.receiver("c").open().unwrap();
    assert_eq!((used(&broker, Resource::Channels), used(&broker, Resource::Slots)), (1, 0));
    broker.broker().set_policy(Policy::own());
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    assert_eq!(used(&broker, Resource::Slots), 4);
}

/// Listens where a broker was.
fn listen_at(path: &Path) -> OwnedFd {
    fs::remove_file(path).unwrap();
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::MAXCONN).unwrap();
    listener
}

/// Waits until somebody connects, and hangs up.
fn hang_up(listener: &OwnedFd) {
    until("somebody connects", || sys::accept(listener.as_fd()).is_ok());
}

#[test]
fn a_client_tries_again_within_half_a_second_but_not_all_the_time() {
    const ATTEMPTS: usize = 20;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path);
    let _client = Client::connect_to(&broker.address).unwrap();
    let start = Instant::now();
    broker.process.kill();
    let listener = listen_at(&path);
    let pauses: Vec<_> = (0..ATTEMPTS)
        .map(|_| {
            let hung_up = Instant::now();
            hang_up(&listener);
            hung_up.elapsed()
        })
        .collect();
    println!("from a hang-up to the next attempt: {pauses:?}");
    // When it has waited for longest. A slow machine makes some of them longer, but hardly each.
    assert!(pauses[ATTEMPTS / 2..].iter().any(|&pause| pause < Duration::from_millis(500)), "{pauses:?}");
    assert!(start.elapsed() > Duration::from_secs(1), "{pauses:?}");
}

#[test]
fn many_clients_are_there_again_within_a_second_on_a_machine_that_is_idle() {
    const CLIENTS: usize = 200;
    let (_, most) = getrlimit(Limit::RLIMIT_NOFILE).unwrap();
    setrlimit(Limit::RLIMIT_NOFILE, most, most).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&path).forget_log();
    let clients: Vec<_> = (0..CLIENTS).map(|_| Client::connect_to(&broker.address).unwrap()).collect();
    broker.process.kill();
    until("all hear of it", || clients.iter().all(|client| !client.is_connected()));
    // Until their pauses are as long as they get.
    let listener = listen_at(&path);
    (0..8 * CLIENTS).for_each(|_| hang_up(&listener));
    drop(listener);
    let _broker = BrokerProcess::start(&path).forget_log();
    let start = Instant::now();
    let mut after = vec![None; CLIENTS];
    until("all are there again", || {
        for (after, _) in
            after.iter_mut().zip(&clients).filter(|(after, client)| after.is_none() && client.is_connected())
        {
            *after = Some(start.elapsed());
        }
        after.iter().all(Option::is_some)
    });
    let mut after: Vec<_> = after.into_iter().flatten().collect();
    after.sort();
    let (half, all) = (after[CLIENTS / 2], after[CLIENTS - 1]);
    println!("of {CLIENTS} clients half were there again after {half:?}, all after {all:?}");
    // A second, on a machine that is ten times as slow.
    assert!(all < Duration::from_secs(10), "{after:?}");
}

const LEVELS: [Mechanism; 4] = [Mechanism::Shared, Mechanism::Lease, Mechanism::Copy, Mechanism::OneShot];
/// The longest message of a stream.
const LONGEST: u64 = 512;

fn channel(level: Mechanism) -> String {
    format!("{level:?}")
}

/// What follows from a message's number; the end of the stream is empty.
fn contents(number: u64) -> impl Iterator<Item = u8> {
    (0..1 + number * 7919 % LONGEST).map(move |place| (number * 31 + place) as u8)
}

/// What a child does: it streams at every level until its input ends.
fn play(_: &str) {
    let client = Client::connect().unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for level in LEVELS {
            let sender = client.sender(&channel(level)).slot_size(LONGEST as usize).slots(16).mechanism(level);
            let (mut sender, stop) = (sender.open().unwrap(), &stop);
            scope.spawn(move || {
                sender.wait_for_receivers_timeout(1, SOON).unwrap();
                for number in 0.. {
                    let stop = stop.load(Ordering::Relaxed);
                    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
                    if !stop {
                        fbuf.set_len(contents(number).count()).unwrap();
                        fbuf.iter_mut().zip(contents(number)).for_each(|(byte, value)| *byte = value);
                    }
                    assert_eq!(sender.write(fbuf).unwrap().sequence, number);
                    if stop {
                        break;
                    }
                }
                sender.wait_for_returns_timeout(SOON).unwrap();
            });
        }
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        stop.store(true, Ordering::Relaxed);
    });
}

/// What is known of a stream while it goes on.
#[derive(Default)]
struct Progress {
    received: AtomicU64,
    /// The number of the window of time, which is odd while the broker is being replaced.
    window: AtomicUsize,
}

/// Takes a stream to its end, of which nothing is missing or different: the longest gap between two messages in each
/// window. One that reaches into a replacement is counted there.
fn take(mut receiver: Receiver, level: Mechanism, progress: &Progress) -> Vec<Duration> {
    let mut longest = Vec::new();
    let mut last: Option<(Instant, usize)> = None;
    for number in 0.. {
        let received = receiver.get_timeout(SOON).unwrap();
        let now = (Instant::now(), progress.window.load(Ordering::Relaxed));
        longest.resize(now.1 + 1, Duration::ZERO);
        if let Some((time, window)) = last.replace(now) {
            let window = if window % 2 == 1 { window } else { now.1 };
            longest[window] = longest[window].max(now.0 - time);
        }
        assert_eq!((received.sequence(), received.mechanism()), (number, level));
        if received.is_empty() {
            break;
        }
        assert!(received.iter().copied().eq(contents(number)), "{level:?}: message {number} has other bytes");
        progress.received.store(number + 1, Ordering::Relaxed);
    }
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    longest
}

/// Streams at every level, from another process, while the broker is ended by a signal and started again so often.
fn streams_go_on(address: &Address, times: u32, signal: Signal, mut start: impl FnMut() -> Process) {
    let mut broker = start();
    let client = Client::connect_to(address).unwrap();
    let progress: [Progress; LEVELS.len()] = Default::default();
    let next_window = || {
        for progress in &progress {
            progress.window.fetch_add(1, Ordering::Relaxed);
        }
    };
    let all_go_on = |when: &str| {
        let before = progress.each_ref().map(|progress| progress.received.load(Ordering::Relaxed));
        until(when, || {
            progress
                .iter()
                .zip(before)
                .all(|(progress, before)| progress.received.load(Ordering::Relaxed) > before + 100)
        });
    };
    thread::scope(|scope| {
        let begin = |(&level, progress)| {
            let receiver = client.receiver(&channel(level)).open().unwrap();
            scope.spawn(move || take(receiver, level, progress))
        };
        let taking: Vec<_> = LEVELS.iter().zip(&progress).map(begin).collect();
        let mut command = command("senders");
        command.env("FBUF_BROKER", address.to_string()).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut senders = Process::start(&mut command);
        all_go_on("the streams begin");
        for _ in 0..times {
            let beginning = Instant::now();
            next_window();
            broker.signal(signal);
            assert_eq!(broker.end().success(), signal != Signal::SIGKILL);
            until("the client hears of it", || !client.is_connected());
            all_go_on("they go on without a broker");
            broker = start();
            until("the client is there again", || client.is_connected());
            // So are the senders, which are linked with newcomers.
            for level in LEVELS {
                let mut newcomer = client.receiver(&channel(level)).open().unwrap();
                newcomer.get_timeout(SOON).unwrap();
            }
            all_go_on("they go on with the next one");
            next_window();
            // For as long, and with as much to do for this thread.
            let took = beginning.elapsed();
            let beginning = Instant::now();
            until("as much time has passed", || beginning.elapsed() >= took);
            all_go_on("they go on undisturbed");
        }
        drop(senders.0.stdin.take());
        assert!(senders.end().success(), "it says why");
        for ((level, taking), progress) in LEVELS.iter().zip(taking).zip(&progress) {
            let longest = taking.join().unwrap();
            // Without the first window, in which it began.
            let [around, between] = [1, 2].map(|first| {
                let mut gaps: Vec<_> = longest.iter().skip(first).step_by(2).collect();
                gaps.sort();
                format!("{:?}, at most {:?}", gaps[gaps.len() / 2], gaps[gaps.len() - 1])
            });
            let count = progress.received.load(Ordering::Relaxed);
            println!("{signal}, {level:?}, {count} messages, longest gap: around a restart {around}; else {between}");
        }
    });
}

#[test]
fn a_broker_is_killed_again_and_again_under_streams() {
    roles!(play);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    streams_go_on(&Address::new(&path), 5, Signal::SIGKILL, || BrokerProcess::start(&path).forget_log().process);
}

/// Another binary takes the place of the broker, on the same socket, under streams.
#[test]
fn a_broker_is_replaced_on_the_same_socket() {
    roles!(play);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let listener = HandedOver::at(&path);
    let address = Address::new(&path);
    let mut versions = 0..;
    streams_go_on(&address, 3, Signal::SIGTERM, || {
        let binary = folder.path().join(format!("fbuf-{}", versions.next().unwrap()));
        copy_program(&binary);
        let broker = Process::start(listener.broker_of(&binary).stderr(Stdio::null()));
        // The queue of the socket holds this until the next broker serves.
        let newcomer = Client::connect_to(&address).unwrap();
        newcomer.receiver("other").open().unwrap();
        assert_eq!(fs::read_link(format!("/proc/{}/exe", broker.pid())).unwrap(), binary);
        broker
    });
}

/// Done by another process: what this one has open for writing, a child that another test starts meanwhile would have
/// too, and it could not be executed.
fn copy_program(to: &Path) {
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_fbuf")).arg(to).run_to_its_end().success());
}
