//! Processes that run out of descriptors are told so, lose nothing that they can still take, and go on when there are some
//! again.

mod support;

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, Farewell, GetError, Receiver, Sender};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{SOON, until};

const SLOTS: u64 = 3;
/// More than a receiver takes before it may look at its sockets.
const MANY: u64 = 200;
/// So short that nothing comes meanwhile.
const BRIEFLY: Duration = Duration::from_millis(1);

/// One test at a time: the limit is this process's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it exists, there are only so many descriptors left.
struct Scarcity {
    limit: (u64, u64),
    _fillers: Vec<File>,
}

impl Scarcity {
    fn but_for(left: usize) -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let (highest, mut fillers) = (numbers.max().unwrap(), Vec::<File>::new());
        // All numbers that are free below, and so many more.
        while fillers.len() <= left || fillers[fillers.len() - 1 - left].as_raw_fd() <= highest {
            fillers.push(File::open("/dev/null").unwrap());
        }
        setrlimit(Resource::RLIMIT_NOFILE, fillers[fillers.len() - 1].as_raw_fd() as u64 + 1, limit.1).unwrap();
        fillers.truncate(fillers.len() - left);
        Self { limit, _fillers: fillers }
    }
}

impl Drop for Scarcity {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.limit.0, self.limit.1).unwrap();
    }
}

fn send(sender: &mut Sender, number: u64) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.resize(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    assert_eq!(sender.write(fbuf).unwrap().sequence, number);
}

fn get(receiver: &mut Receiver, number: u64) {
    let received = receiver.get_timeout(SOON).unwrap();
    assert_eq!((received.sequence(), &received[..]), (number, &number.to_ne_bytes()[..]));
}

/// However many descriptors a receiver has left when it is to give its slots: either it says that there are too few, or all
/// its slots are given in the end.
#[test]
fn slots_that_cannot_be_given_at_first_are_given_later() {
    let _alone = alone();
    let (mut linked, mut refused) = (0, 0);
    for left in 0..40 {
        let broker = Embedded::start().unwrap();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut sender = client.sender("c").slot_size(8).slots(SLOTS).from_receiver().open().unwrap();
        let scarcity = Scarcity::but_for(left);
        let Ok(mut receiver) = client.receiver("c").stay().open() else {
            refused += 1;
            continue;
        };
        let mut trouble = None;
        until("they are linked, or it is told why not", || {
            sender.look();
            trouble = receiver.try_get().err();
            (sender.receivers() == 1 && receiver.senders() == 1) || trouble.is_some()
        });
        drop(scarcity);
        if let Some(trouble) = trouble {
            assert!(matches!(trouble, GetError::Exhausted { .. } | GetError::Disconnected(_)), "{trouble}");
            refused += 1;
            continue;
        }
        linked += 1;
        let mut all = Vec::new();
        until("all slots are given", || {
            assert!(receiver.try_get().unwrap().is_none());
            all.extend(sender.try_allocate());
            all.len() as u64 == SLOTS
        });
        drop(all);
        for number in 0..10 {
            send(&mut sender, number);
            get(&mut receiver, number);
        }
    }
    assert!(linked > 0 && refused > 0, "{linked} were linked, {refused} refused");
}

#[test]
fn what_was_sent_before_a_segment_that_there_is_no_descriptor_for_is_taken() {
    let _alone = alone();
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(MANY).grow_to(8 * MANY).open().unwrap();
    let mut receiver = client.receiver("c").stay().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
    (0..MANY).for_each(|number| send(&mut sender, number));
    // In a segment that is made for it, and announced.
    send(&mut sender, MANY);
    let scarcity = Scarcity::but_for(0);
    let start = Instant::now();
    until("it is time to look at sockets, also for one that is busy", || start.elapsed() > Duration::from_millis(200));
    (0..MANY / 2).for_each(|number| get(&mut receiver, number));
    drop(scarcity);
    // There is a descriptor for the next one again, whose slots have other numbers.
    (MANY + 1..3 * MANY).for_each(|number| send(&mut sender, number));
    (MANY / 2..MANY).for_each(|number| get(&mut receiver, number));
    let trouble = receiver.get_timeout(SOON).unwrap_err();
    assert!(matches!(trouble, GetError::Exhausted { .. }), "{trouble}");
    until("the sender has heard of it", || {
        sender.look();
        sender.receivers() == 0
    });
    sender.wait_for_returns_timeout(SOON).unwrap();
}

#[test]
fn a_sender_that_cannot_take_a_right_does_not_wait_for_it_for_ever() {
    let _alone = alone();
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(1).from_receiver().open().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 0);
    get(&mut receiver, 0);
    let scarcity = Scarcity::but_for(0);
    sender.look();
    drop(scarcity);
    let departure = sender.departed().expect("it is told");
    assert!(matches!(departure.farewell, Farewell::Exhausted(_)), "{departure:?}");
    drop(receiver);
    let mut next = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 1);
    get(&mut next, 1);
}
