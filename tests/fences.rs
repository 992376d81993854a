//! Processes that cannot run membarrier(2), or are told not to, with processes that can: each publishes behind a fence, and
//! no wake-up is lost on either side. The protocol is modelled in `ring/wake_model.rs`; here are its four ways, in the real kernel.

mod support;

use std::{
    fs::{self, File},
    io, mem,
    os::{
        fd::AsFd,
        unix::{fs::FileExt, process::CommandExt},
    },
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, GetError, Receiver, Sender, Wait, WaitFor};
use fbuf_core::{
    process::sys::{Membarrier, membarrier},
    wait::Fencing,
};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use support::{
    Holdings, Process, Run, SOON, fbuf,
    filter::{can_refuse, refuse},
    not_tested,
    role::{command, roles},
    until, until_is,
};

/// How often each side waits for the other.
const ROUNDS: u64 = 1000;

/// What a process can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fences {
    /// membarrier(2).
    Asymmetric,
    /// It could, and FBUF_FENCE=full forgoes it.
    Forgone,
    /// A filter refuses it from the beginning.
    Refused,
    /// A filter refuses it from when the process has found out that it can.
    RefusedLater,
}

const EACH: [Fences; 4] = [Fences::Asymmetric, Fences::Forgone, Fences::Refused, Fences::RefusedLater];

impl Fences {
    /// What it finds out.
    fn found(self) -> Fencing {
        match self {
            Self::Asymmetric | Self::RefusedLater => Fencing::Asymmetric,
            Self::Forgone | Self::Refused => Fencing::Full,
        }
    }

    fn is_full(self) -> bool {
        self.found() == Fencing::Full
    }
}

/// How many flags of this process and its peer ask the publisher for a fence, in memory of this name: bit 2 of the
/// first word (`ring/wake_model.rs`). A wake-up that is lost for want of one is too rare to be waited for.
fn count_asking(name: &str) -> usize {
    let (maps, memory) = (fs::read_to_string("/proc/self/maps").unwrap(), File::open("/proc/self/mem").unwrap());
    let of_name = maps.lines().filter(|line| line.contains(&format!("/memfd:{name} ")));
    let asks = |line: &str| {
        let (begin, _) = line.split_once('-').unwrap();
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, u64::from_str_radix(begin, 16).unwrap()).unwrap();
        u64::from_ne_bytes(word) & 4 != 0
    };
    let asking: Vec<_> = of_name.map(asks).collect();
    assert_eq!(asking.len(), 2, "one of each side");
    asking.into_iter().filter(|&asks| asks).count()
}

/// Has a filter refuse membarrier(2) to all threads of this process.
fn refuse_membarrier() -> io::Result<()> {
    refuse(libc::SYS_membarrier, libc::EPERM)
}

/// What a child does.
fn play(role: &str) {
    let words: Vec<_> = role.split(' ').collect();
    let [fences, others] = [1, 2].map(|place| EACH[words[place].parse::<usize>().unwrap()]);
    if fences == Fences::Refused {
        refuse_membarrier().unwrap();
    }
    let found = Fencing::of_this_process();
    if fences == Fences::RefusedLater {
        refuse_membarrier().unwrap();
    }
    assert_eq!((found, found.before_sleeping()), (fences.found(), fences != Fences::RefusedLater));
    let client = Client::connect().unwrap();
    if words[0] == "waits" {
        return wait_in_event_loops(&client, fences);
    }
    let ends = |there: &str, back: &str| {
        let receiver = client.receiver(back).wait(Wait::Block).open().unwrap();
        let mut sender = client.sender(there).slot_size(8).slots(1).wait(Wait::Block).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        (sender, receiver)
    };
    let (is_full, other_is_full) = (fences.is_full(), others.is_full());
    // Each side has seen a message of the other by then.
    let check = || {
        let boards = usize::from(is_full) + usize::from(other_is_full);
        let lanes = if is_full || other_is_full { 2 } else { 0 };
        assert_eq!((count_asking("fbuf-lane"), count_asking("fbuf-board")), (lanes, boards));
    };
    if words[0] == "calls" {
        let (mut sender, mut receiver) = ends("call", "answer");
        for number in 0..ROUNDS {
            send(&mut sender, number);
            assert_eq!(get(&mut receiver), number);
        }
        check();
        // Without an answer: each waits for the slot of the one before.
        (ROUNDS..2 * ROUNDS).for_each(|number| send(&mut sender, number));
        assert!(sender.counters().sleeps > 0 && receiver.counters().sleeps > 0, "nobody slept");
        return;
    }
    let (mut sender, mut receiver) = ends("answer", "call");
    for number in 0..ROUNDS {
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!(received[..], number.to_ne_bytes());
        send(&mut sender, number);
        // It may be waited for by now.
        drop(received);
    }
    check();
    let mut last = None;
    for number in ROUNDS..2 * ROUNDS {
        drop(mem::take(&mut last));
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!(received[..], number.to_ne_bytes());
        last = Some(received);
    }
    // What is held longest frees the memory of its link, on whatever thread.
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    drop((sender, receiver, client));
    assert_ne!(Holdings::here().mappings, 0, "a message is held");
    thread::spawn(move || drop(last)).join().unwrap();
    until_is("the mappings of the link go", &0, || Holdings::here().mappings);
}

/// Prepares to wait, for a message and for a slot: where a wake-up may be lost, the descriptor tells that it is time to look again.
fn wait_in_event_loops(client: &Client, fences: Fences) {
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(1).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 0);
    let _held = receiver.get_timeout(SOON).unwrap();
    let is_sure = fences != Fences::RefusedLater;
    let tells = |descriptor: &dyn AsFd| {
        let mut polled = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
        let time = if is_sure { Duration::from_millis(300) } else { SOON };
        poll(&mut polled, PollTimeout::try_from(time).unwrap()).unwrap() > 0
    };
    // More than once: it is set each time.
    for _ in 0..3 {
        until("it may sleep", || receiver.prepare_wait().is_some());
        until("it may sleep", || sender.prepare_wait(WaitFor::Slot).is_some());
        assert_eq!([tells(&receiver), tells(&sender)], [!is_sure; 2]);
    }
}

fn send(sender: &mut Sender, number: u64) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    sender.write(fbuf).unwrap();
}

fn get(receiver: &mut Receiver) -> u64 {
    u64::from_ne_bytes(receiver.get_timeout(SOON).unwrap()[..].try_into().unwrap())
}

fn other(role: &str, [fences, others]: [Fences; 2], broker: &Embedded) -> Process {
    let mut command = command(format!("{role} {} {}", fences as usize, others as usize));
    command.env_remove("FBUF_FENCE").env("FBUF_BROKER", broker.address().to_string()).stdout(Stdio::null());
    if fences == Fences::Forgone {
        command.env("FBUF_FENCE", "full");
    }
    Process::start(&mut command)
}

/// Whether membarrier(2) can be had here, and refused.
fn can_be_chosen() -> bool {
    if membarrier(Membarrier::Register).and_then(|()| membarrier(Membarrier::Everywhere)).is_err() {
        not_tested("this kernel, or a filter of it, has no membarrier: there is only one kind of fence");
        return false;
    }
    can_refuse()
}

fn exchange_between(sides: impl IntoIterator<Item = (Fences, Fences)>) {
    if !can_be_chosen() {
        return;
    }
    for (calls, answers) in sides {
        let broker = Embedded::start().unwrap();
        let mut both = [other("calls", [calls, answers], &broker), other("answers", [answers, calls], &broker)];
        for process in &mut both {
            assert!(process.end().success(), "{calls:?} calls, {answers:?} answers: it says why");
        }
    }
}

#[test]
fn a_process_that_fences_in_full_loses_no_wake_up_of_one_that_does_not() {
    roles!(play);
    exchange_between(EACH.map(|answers| (Fences::Asymmetric, answers)));
}

#[test]
fn a_process_that_does_not_fence_loses_no_wake_up_of_one_that_fences_in_full() {
    roles!(play);
    exchange_between([Fences::Forgone, Fences::Refused, Fences::RefusedLater].map(|calls| (calls, Fences::Asymmetric)));
}

#[test]
fn processes_that_both_fence_in_full_lose_no_wake_up() {
    roles!(play);
    use Fences::{Forgone, Refused, RefusedLater};
    exchange_between([(Forgone, Forgone), (Refused, Refused), (Forgone, Refused), (RefusedLater, RefusedLater)]);
}

#[test]
fn an_event_loop_looks_again_by_itself_where_a_wake_up_may_be_lost() {
    roles!(play);
    if can_be_chosen() {
        for fences in EACH {
            let broker = Embedded::start().unwrap();
            assert!(other("waits", [fences, fences], &broker).end().success(), "{fences:?}: it says why");
        }
    }
}

#[test]
#[allow(unsafe_code, reason = "pre_exec")]
fn the_doctor_says_that_membarrier_is_refused_and_what_follows() {
    if !can_be_chosen() {
        return;
    }
    let said = |command: &mut Command| String::from_utf8(command.run().stdout).unwrap();
    let consequence = "Each message costs a fence";
    let mut doctor = fbuf(["doctor"]);
    assert!(!said(&mut doctor).contains(consequence), "the control");
    // SAFETY: it makes two system calls, which may be made after fork(2).
    unsafe { doctor.pre_exec(refuse_membarrier) };
    let said = said(&mut doctor);
    assert!(said.contains(consequence) && said.contains("seccomp"), "{said}");
}
