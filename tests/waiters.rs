//! A user that has very many wait at its sockets (epoll(7)), each of which the kernel wakes in the thread that makes a call at the
//! other end. It holds up no other user, and loses no link and no message itself: it may be another user whose doing it is.

mod support;

use std::{
    fs,
    io::{self, Write, stdin},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use fbuf_client::{Client, GetError, Mechanism, Receiver};
use nix::{
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
        resource::{Resource, setrlimit},
        socket::{SockType, getsockopt, sockopt},
    },
    time::{ClockId, clock_gettime},
};
use support::{
    BrokerProcess, SOON, alone, is_root,
    role::{Other, roles},
    until,
};

const HONEST: u32 = 65_532;
const FRIEND: u32 = 65_531;
const SLOW: u32 = 65_533;
const MESSAGES: u64 = 100;
/// How many wait at each socket: 4 ms for each call, or more.
const WAITERS: usize = 60_000;
/// How many descriptors of a socket are watched, each by as many epolls as it takes.
const DUPLICATES: usize = 1000;
/// No other call of the sender takes so much of a processor.
const LONG: Duration = Duration::from_millis(2);

/// What a child does.
fn play(role: &str) {
    let (role, mechanism) = role.split_once(' ').unwrap();
    match role {
        "send" => send(if mechanism == "OneShot" { Mechanism::OneShot } else { Mechanism::Copy }),
        "receive" => {
            let mut receiver = open(&Client::connect().unwrap());
            assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), 0);
            receive(&mut receiver);
        }
        "slow" => {
            setrlimit(Resource::RLIMIT_NOFILE, 8192, 8192).unwrap();
            let client = Client::connect().unwrap();
            let mut receiver = open(&client);
            assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), 0);
            let _waiting: Vec<_> = sockets().iter().map(wait_at).collect();
            println!("they wait");
            let others = (0..5).map(|number| {
                let other = client.receiver(&format!("other{number}"));
                // The broker may hang up once, and is connected to anew.
                other.clone().open().or_else(|_| other.open()).unwrap()
            });
            println!("{} are open", others.count());
            receive(&mut receiver);
        }
        _ => panic!("no such role: {role}"),
    }
}

fn open(client: &Client) -> Receiver {
    let receiver = client.receiver("c").open().unwrap();
    println!("open");
    receiver
}

/// Takes what comes behind the first message, until the end.
fn receive(receiver: &mut Receiver) {
    let mut last = 0;
    let end = loop {
        match receiver.get_timeout(SOON) {
            Ok(received) => {
                let number = u64::from_le_bytes(received[..8].try_into().unwrap());
                assert_eq!((received.sequence(), number), (number, last + 1));
                last = number;
            }
            Err(error) => break error,
        }
    };
    println!("{last} was the last: {}", if matches!(end, GetError::Ended) { "the end" } else { "an error" });
    println!("{end}");
}

fn send(mechanism: Mechanism) {
    let client = Client::connect().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(16).mechanism(mechanism).open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    println!("linked");
    let mut slow = 0;
    for number in 0..MESSAGES {
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.write_all(&number.to_le_bytes()).unwrap();
        let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
        let begin = now();
        assert_eq!(sender.write(fbuf).unwrap().receivers, 2);
        slow += u64::from(now() - begin > LONG);
        if number == 0 {
            stdin().read_line(&mut String::new()).unwrap();
        }
        until("the receivers sleep", || sender.peers().all(|peer| is_asleep(peer.process.pid)));
    }
    sender.wait_for_returns_timeout(SOON).unwrap();
    sender.finish();
    println!("{slow} were slow");
}

/// Whether the first thread of a process sleeps, which is the one that receives (proc_pid_stat(5)).
fn is_asleep(process: i32) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat")).unwrap().rsplit(") ").next().unwrap().starts_with('S')
}

/// Duplicates of the sockets by which this process is connected.
fn sockets() -> Vec<OwnedFd> {
    let numbers = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().file_name());
    let numbers: Vec<i32> = numbers.map(|name| name.to_str().unwrap().parse().unwrap()).collect();
    let duplicate = |number: i32| {
        // SAFETY: it is borrowed for as long as it takes to look at it; if it was closed meanwhile, that fails.
        #[expect(unsafe_code, reason = "descriptors of the library are not lent out")]
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        (getsockopt(&descriptor, sockopt::SockType) == Ok(SockType::SeqPacket)).then(|| descriptor.try_clone_to_owned())
    };
    numbers.into_iter().filter_map(duplicate).collect::<io::Result<_>>().unwrap()
}

/// Has very many wait.
fn wait_at(socket: &OwnedFd) -> (Vec<OwnedFd>, Vec<Epoll>) {
    let duplicates: Vec<_> = (0..DUPLICATES).map(|_| socket.try_clone().unwrap()).collect();
    let epolls: Vec<_> = (0..WAITERS / DUPLICATES).map(|_| Epoll::new(EpollCreateFlags::empty()).unwrap()).collect();
    for epoll in &epolls {
        for duplicate in &duplicates {
            let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            epoll.add(duplicate.as_fd(), EpollEvent::new(events, 0)).unwrap();
        }
    }
    (duplicates, epolls)
}

#[test]
fn a_user_at_whose_sockets_very_many_wait_holds_up_no_other_and_loses_nothing() {
    roles!(play);
    let _alone = alone();
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_short(folder.path(), 8192, [HONEST, FRIEND, SLOW]);
    for mechanism in ["Copy", "OneShot"] {
        let start = |role: &str, user| Other::start(&broker.address, format!("{role} {mechanism}"), user);
        let (mut friend, mut slow) = (start("receive", FRIEND), start("slow", SLOW));
        friend.hear("open");
        slow.hear("open");
        let mut sender = start("send", HONEST);
        sender.hear("linked");
        slow.hear("they wait");
        // The broker serves it, and others.
        assert_eq!(slow.number::<u64>("are open"), 5);
        sender.tell("");
        for (name, other) in [("friend", &mut friend), ("slow", &mut slow)] {
            let last = other.hear("was the last");
            assert_eq!(last, format!("{} was the last: the end", MESSAGES - 1), "{name}: {}", other.hear(""));
        }
        let slow = sender.number::<u64>("were slow");
        println!("{mechanism}: {slow} of {MESSAGES} messages took the sender's thread long");
        // Until the user is found out. Each does, where calls are made by the thread that sends.
        assert!(slow > 0 && slow < MESSAGES / 2);
        assert!(sender.process.end().success());
    }
}
