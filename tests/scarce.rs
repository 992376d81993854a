//! Processes that run out of descriptors are told so, lose nothing that they can still take, and go on when there are some
//! again.

mod support;

use std::{
    fs::{self, File},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use fbuf_broker::Embedded;
use fbuf_client::{
    AllocateError, CannotReopen, Client, DisconnectReason, GetError, Mechanism, Mismatch, OpenError, Receiver, Sender,
    WriteError,
};
use fbuf_core::{
    limits::MAX_DESCRIPTORS,
    socket::{PacketSocket, wire::Letter},
};
use nix::{
    libc,
    sys::resource::{Resource, getrlimit, setrlimit},
};
use support::{SOON, alone, until};

const SLOTS: u64 = 3;
/// More than a receiver takes before it may look at its sockets.
const MANY: u64 = 200;
/// So short that nothing comes meanwhile.
const BRIEFLY: Duration = Duration::from_millis(1);

/// While it exists, there are only so many descriptors left.
struct Scarcity {
    limit: (u64, u64),
    _fillers: Vec<File>,
}

impl Scarcity {
    fn but_for(left: usize) -> Self {
        // What was passed just before is closed by other threads.
        let (mut open, mut since) = (0, Instant::now());
        until("nothing is being opened or closed", || {
            let now = fs::read_dir("/proc/self/fd").unwrap().count();
            if now != open {
                (open, since) = (now, Instant::now());
            }
            since.elapsed() > Duration::from_millis(50)
        });
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
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    assert_eq!(sender.write(fbuf).unwrap().sequence, number);
}

fn get(receiver: &mut Receiver, number: u64) {
    let received = receiver.get_timeout(SOON).unwrap();
    assert_eq!((received.sequence(), &received[..]), (number, &number.to_ne_bytes()[..]));
}

/// However many descriptors a receiver, and the broker in the same process, have left when it is to give its slots: either it
/// says that there are too few, or all its slots are given in the end.
#[test]
fn slots_that_cannot_be_given_at_first_are_given_later() {
    let _alone = alone();
    let (mut linked, mut refused, mut waited) = (0, 0, 0);
    for left in 0..40 {
        let broker = Embedded::start().unwrap();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut sender = client.sender("c").slot_size(8).slots(SLOTS as usize).from_receiver().open().unwrap();
        let scarcity = Scarcity::but_for(left);
        let Ok(mut receiver) = client.receiver("c").keep_waiting().open() else {
            refused += 1;
            continue;
        };
        let (mut trouble, mut departure) = (None, None);
        let mut is_decided = |sender: &mut Sender, receiver: &mut Receiver| {
            sender.poll_events();
            // Slots that it cannot give yet are to be given when the descriptors are there.
            let told = receiver.try_get().err();
            trouble =
                told.filter(|told| !matches!(told, GetError::SlotsWithheld { why: CannotReopen::NoDescriptor, .. }));
            departure = sender.next_departure();
            (sender.receivers() == 1 && receiver.senders() == 1) || trouble.is_some() || departure.is_some()
        };
        let mut waits = false;
        until("they are linked, or wait, or one of them is told why not", || {
            waits = match receiver.unpaired() {
                Ok(unpaired) => unpaired.iter().any(|one| one.why == Mismatch::Exhausted),
                // The client has no descriptor for what the broker has sent, and connects again.
                Err(OpenError::BrokerGone { reason: why }) => {
                    assert!(why.contains("RLIMIT_NOFILE") && !why.contains("start it"), "{why}");
                    true
                }
                Err(error) => panic!("{error}"),
            };
            waits || is_decided(&mut sender, &mut receiver)
        });
        drop(scarcity);
        if waits {
            until("the broker has tried again", || is_decided(&mut sender, &mut receiver));
            waited += 1;
        }
        if let Some(departure) = departure {
            assert!(matches!(departure.reason, DisconnectReason::Exhausted { .. }), "{departure:?}");
            refused += 1;
            continue;
        }
        if let Some(trouble) = trouble {
            assert!(matches!(trouble, GetError::Exhausted { .. } | GetError::Disconnected { .. }), "{trouble}");
            refused += 1;
            continue;
        }
        linked += 1;
        let mut all = Vec::new();
        until("all slots are given", || {
            assert!(receiver.try_get().unwrap().is_none());
            all.extend(sender.try_allocate().unwrap());
            all.len() as u64 == SLOTS
        });
        drop(all);
        for number in 0..10 {
            send(&mut sender, number);
            get(&mut receiver, number);
        }
    }
    assert!(linked > waited && refused > 0 && waited > 0, "{linked} were linked, {waited} later, {refused} refused");
}

#[test]
fn a_segment_waits_for_a_descriptor_and_what_was_sent_before_is_taken() {
    let _alone = alone();
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(MANY as usize).grow_to(8 * MANY as usize).open().unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
    (0..MANY).for_each(|number| send(&mut sender, number));
    // In a segment that is made for it, and announced.
    send(&mut sender, MANY);
    let scarcity = Scarcity::but_for(0);
    let start = Instant::now();
    until("it is time to look at sockets, also for one that is busy", || start.elapsed() > Duration::from_millis(200));
    (0..MANY).for_each(|number| get(&mut receiver, number));
    // It is told what is in the way, and the rest comes when there is a descriptor again.
    for _ in 0..3 {
        let trouble = receiver.get_timeout(SOON).unwrap_err();
        assert!(matches!(trouble, GetError::NoDescriptor { .. }), "{trouble}");
        assert!(trouble.to_string().contains("RLIMIT_NOFILE"), "{trouble}");
    }
    drop(scarcity);
    get(&mut receiver, MANY);
    for number in MANY + 1..3 * MANY {
        send(&mut sender, number);
        get(&mut receiver, number);
    }
    assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
    sender.wait_for_returns_timeout(SOON).unwrap();
    assert_eq!((sender.receivers(), sender.next_departure()), (1, None));
}

/// It keeps each for good, and with it a descriptor.
#[test]
fn one_shots_wait_for_descriptors_and_none_is_lost() {
    let _alone = alone();
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(64).mechanism(Mechanism::OneShot).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (0..64).for_each(|number| send(&mut sender, number));
    let scarcity = Scarcity::but_for(10);
    let (mut kept, mut next, mut told) = (Vec::new(), 0, 0);
    while next < 64 {
        match receiver.get_timeout(SOON) {
            Ok(received) => {
                assert_eq!((received.sequence(), &received[..]), (next, &u64::to_ne_bytes(next)[..]));
                kept.push(received.into_sealed().unwrap());
                next += 1;
            }
            Err(trouble) => {
                assert!(matches!(trouble, GetError::NoDescriptor { .. }), "{trouble}");
                assert!(!kept.is_empty(), "there is no descriptor, and none is kept");
                told += 1;
                kept.clear();
            }
        }
    }
    drop(scarcity);
    assert!(told > 3, "there were descriptors for all: {told}");
    assert_eq!((sender.receivers(), sender.next_departure()), (1, None));
    send(&mut sender, 64);
    get(&mut receiver, 64);
}

#[test]
fn a_right_to_write_waits_for_a_descriptor_and_its_sender_is_told() {
    let _alone = alone();
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(1).from_receiver().open().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender, 0);
    get(&mut receiver, 0);
    let scarcity = Scarcity::but_for(0);
    let trouble = sender.allocate_timeout(SOON).unwrap_err();
    assert_eq!(trouble, AllocateError::NoDescriptor { bytes: 8 });
    drop(scarcity);
    send(&mut sender, 1);
    get(&mut receiver, 1);
    assert_eq!(sender.next_departure(), None);
}

/// While it exists, more descriptors of this user are on their way than this process may open: none more can be sent by
/// a thread without capabilities (ETOOMANYREFS).
struct Jam {
    limit: (u64, u64),
    _socket: (PacketSocket, OwnedFd),
}

impl Jam {
    fn new() -> Self {
        let (from, to) = PacketSocket::pair().unwrap();
        let from = PacketSocket::new(from).unwrap();
        let file = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        for _ in 0..4 {
            from.send(&Letter { bytes: vec![0], descriptors: vec![file.clone().into(); MAX_DESCRIPTORS] }).unwrap();
        }
        let limit = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 4 * MAX_DESCRIPTORS as u64 - 1, limit.1).unwrap();
        Self { limit, _socket: (from, to) }
    }
}

impl Drop for Jam {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.limit.0, self.limit.1).unwrap();
    }
}

/// Whatever this thread may do that other users may not, until it ends.
#[allow(unsafe_code, reason = "capset(2)")]
fn drop_capabilities() {
    #[repr(C)]
    struct Header(u32, i32);
    // Version 3 of linux/capability.h; of the calling thread; effective, permitted, inheritable, twice.
    let (header, none) = (Header(0x2008_0522, 0), [0u32; 6]);
    // SAFETY: the kernel reads both, which are laid out as it wants.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const none) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// More descriptors of a user are on their way between its processes than one may open (ETOOMANYREFS).
#[test]
fn a_one_shot_that_cannot_be_passed_comes_back_and_can_be_written_again() {
    let _alone = alone();
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).slots(4).mechanism(Mechanism::OneShot).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let sending = std::thread::spawn(move || {
        drop_capabilities();
        send(&mut sender, 0);
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.set_len(8).unwrap();
        fbuf.copy_from_slice(&1u64.to_ne_bytes());
        let jam = Jam::new();
        let refused = sender.write(fbuf);
        drop(jam);
        let Err(WriteError::NotPassed { fbuf, reason, .. }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("RLIMIT_NOFILE"), "{reason}");
        assert_eq!(fbuf[..], 1u64.to_ne_bytes());
        assert_eq!(sender.write(fbuf).unwrap().sequence, 1);
        send(&mut sender, 2);
        assert_eq!((sender.receivers(), sender.next_departure()), (1, None));
    });
    (0..3).for_each(|number| get(&mut receiver, number));
    sending.join().unwrap();
}

#[test]
fn a_broker_that_cannot_introduce_now_does_so_later_over_the_same_connection() {
    let _alone = alone();
    let starting = std::thread::spawn(|| {
        drop_capabilities();
        Embedded::start().unwrap()
    });
    let broker = starting.join().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let _receiver = client.receiver("c").open().unwrap();
    let jam = Jam::new();
    let mut sender = client.sender("c").slot_size(8).slots(1).open().unwrap();
    for _ in 0..20 {
        assert!(sender.wait_for_receivers_timeout(1, 10 * BRIEFLY).is_err(), "the descriptors were sent all the same");
        assert!(client.is_connected());
    }
    drop(jam);
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
}
