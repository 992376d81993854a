//! The threads of this library in programs that handle signals, and in programs that leave nothing of a processor to
//! others.

mod support;

use std::{
    fs, process,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, GetError, Mechanism, Wait};
use nix::{
    libc,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use support::{SOON, not_tested};

/// What the kernel says of a thread of this process.
struct Thread {
    name: String,
    blocked: u64,
    policy: i64,
    priority: i64,
}

/// All threads of this library.
fn threads() -> Vec<Thread> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let thread = |task: std::path::PathBuf| {
        // It may have ended meanwhile.
        let read = |file| fs::read_to_string(task.join(file)).ok();
        let (name, status, stat) = (read("comm")?, read("status")?, read("stat")?);
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?.trim();
        let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // The fields 40 and 41 of proc_pid_stat(5); the first that is left is number 3.
        let number = |field: usize| fields[field - 3].parse().ok();
        let (priority, policy) = (number(40)?, number(41)?);
        let blocked = u64::from_str_radix(blocked, 16).ok()?;
        Some(Thread { name: name.trim().to_owned(), blocked, policy, priority })
    };
    tasks.filter_map(thread).filter(|thread| thread.name.starts_with("fbuf-")).collect()
}

#[test]
fn every_thread_of_the_library_has_a_name_and_blocks_all_signals() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    // Of each kind that has a thread of its own.
    let mut leased = client.sender("leased").mechanism(Mechanism::Lease).open().unwrap();
    let one_shot = client.sender("one-shot").mechanism(Mechanism::OneShot).slot_size(64).open().unwrap();
    let mut receiver = client.receiver("leased").open().unwrap();
    leased.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = leased.allocate_timeout(SOON).unwrap();
    leased.write(fbuf).unwrap();
    drop(receiver.get_timeout(SOON).unwrap());
    let wanted = ["fbuf-broker", "fbuf-control", "fbuf-leases", "fbuf-stock"];
    let found = threads();
    for name in wanted {
        assert!(found.iter().any(|thread| thread.name == name), "there is no thread {name}");
    }
    for Thread { name, blocked, .. } in found {
        for signal in
            [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGALRM, Signal::SIGCHLD, Signal::SIGXFSZ]
        {
            assert_ne!(blocked & 1 << (signal as i32 - 1), 0, "{name} may take {signal}");
        }
    }
    drop((one_shot, leased, receiver));
}

/// Puts this thread under SCHED_FIFO, confined to one processor: false if that is not permitted.
#[allow(unsafe_code, reason = "sched_setscheduler(2)")]
fn be_real_time(processor: usize, priority: i32) -> bool {
    let mut only = CpuSet::new();
    only.set(processor).unwrap();
    sched_setaffinity(Pid::from_raw(0), &only).unwrap();
    // SAFETY: all-zero is a valid one, which holds nothing but numbers.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = priority;
    // SAFETY: `parameters` is only read, and the call changes how this thread is scheduled.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) == 0 }
}

/// A receiver on a thread under SCHED_FIFO that spins, and that connected as such, is linked: its control thread runs elsewhere. A
/// thread that inherits its scheduling does not run meanwhile, but for moments in which the receiver waits for a lock.
#[test]
fn a_program_that_spins_in_real_time_gets_its_links() {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let processors: Vec<_> = (0..CpuSet::count()).filter(|&one| allowed.is_set(one) == Ok(true)).collect();
    let [first, .., last] = processors[..] else {
        return not_tested("a program spins beside others, on two processors");
    };
    let broker = Embedded::start().unwrap();
    let address = broker.address().clone();
    let ran = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, counts) = (stop.clone(), ran.clone());
    let spinner = thread::spawn(move || {
        if !be_real_time(last, 11) {
            return None;
        }
        let client = Client::connect_to(&address).unwrap();
        let mut receiver = client.receiver("c").wait(Wait::Spin).open().unwrap();
        let begin = Instant::now();
        let victim = thread::spawn(move || {
            // One step below, so that it gets the processor only while the receiver waits for a lock.
            assert!(be_real_time(last, 10));
            while !stopped.load(Ordering::Relaxed) && begin.elapsed() < SOON {
                let used = Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
                counts.store(used.as_micros() as u64, Ordering::Relaxed);
            }
        });
        let before = ran.load(Ordering::Relaxed);
        let message = receiver.get_timeout(SOON).map(|message| message.to_vec());
        let result = (message, Duration::from_micros(ran.load(Ordering::Relaxed) - before), begin.elapsed());
        // The thread ends when this one no longer has the processor.
        stop.store(true, Ordering::Relaxed);
        Some((result, victim, threads()))
    });
    let other = thread::spawn(move || {
        let mut only = CpuSet::new();
        only.set(first).unwrap();
        sched_setaffinity(Pid::from_raw(0), &only).unwrap();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut sender = client.sender("c").slot_size(64).slots(1).wait(Wait::Block).open().unwrap();
        if sender.wait_for_receivers_timeout(1, SOON / 2).is_ok() {
            let mut fbuf = sender.allocate_timeout(SOON).unwrap();
            std::io::Write::write_all(&mut fbuf, b"hello").unwrap();
            sender.write(fbuf).unwrap();
            // Until it was read.
            sender.wait_for_returns_timeout(SOON).unwrap();
        }
    });
    let Some(((message, used, time), victim, threads)) = spinner.join().unwrap() else {
        return not_tested("a program spins under SCHED_FIFO, which takes CAP_SYS_NICE");
    };
    other.join().unwrap();
    victim.join().unwrap();
    assert_eq!(message, Ok(b"hello".to_vec()), "after {time:?}");
    for Thread { name, policy, priority, .. } in threads {
        assert_eq!((policy, priority), (libc::SCHED_OTHER.into(), 0), "{name} of {}", process::id());
    }
    // The control: what inherits the scheduling of a spinner gets nothing done beside it.
    assert!(
        used < Duration::from_millis(100),
        "a thread under SCHED_FIFO ran for {used:?} on the same processor meanwhile"
    );
    assert!(!matches!(message, Err(GetError::TimedOut)));
}
