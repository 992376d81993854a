//! Messages that are read under leases: they do not change, and their slots are used again.

mod support;

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use fbuf_client::{
    AllocateError, CannotReopen, Client, Fbuf, GetError, Mechanism, OpenError, Pages, Protection, Receiver, Sender,
    SenderBuilder, WriteError,
};
use nix::{
    libc,
    sys::resource::{Resource, getrlimit, setrlimit},
};
use support::{
    Holdings, Run, SOON, alone, broker, is_root,
    role::{command, roles},
    settled, slots, until, until_is,
};

/// The bytes of a slot: some pages, and a part of one.
const SIZE: usize = 70_000;

fn builder(client: &Client, slots: usize) -> SenderBuilder {
    client.sender("c").slot_size(SIZE).slots(slots).mechanism(Mechanism::Lease)
}

fn pair(client: &Client, slots: usize) -> (Sender, Receiver) {
    let receiver = client.receiver("c").require(Protection::Leased).open().unwrap();
    let mut sender = builder(client, slots).open().unwrap();
    assert_eq!(sender.protection_info().mechanism, Mechanism::Lease, "{}", sender.protection_info());
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (sender, receiver)
}

fn filled(sender: &mut Sender, value: u8) -> Fbuf {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(SIZE).unwrap();
    fbuf.fill(value);
    fbuf
}

fn send(sender: &mut Sender, value: u8) {
    let fbuf = filled(sender, value);
    sender.write(fbuf).unwrap();
}

fn is_all(bytes: &[u8], value: u8) -> bool {
    bytes.len() == SIZE && bytes.iter().all(|&byte| byte == value)
}

/// Opens all slots for writing and scribbles, from a thread, since it is held up by that.
fn scribble() -> thread::JoinHandle<Vec<File>> {
    let slots = slots();
    thread::spawn(move || {
        let open = |path: &PathBuf| File::options().read(true).write(true).open(path);
        // One that was closed meanwhile is no slot any more.
        let files: Vec<_> = slots.iter().filter_map(|path| open(path).ok()).collect();
        files.iter().for_each(|file| file.write_all_at(&[0xEE; SIZE], 0).unwrap());
        files
    })
}

#[test]
fn a_child_that_was_forked_keeps_nothing_from_being_leased() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 3);
    let fbuf = filled(&mut sender, 1);
    let _child = support::Fork::here();
    sender.write(fbuf).unwrap();
    for value in 1..10 {
        let received = receiver.get_timeout(SOON).unwrap();
        assert_eq!(received.mechanism(), Mechanism::Lease);
        assert!(is_all(&received, value));
        drop(received);
        send(&mut sender, value + 1);
    }
}

/// What a child does: it is alone in its process, and the descriptors, threads and mappings of that are counted.
fn play(role: &str) {
    match role {
        "messages to all" => messages_to_all(),
        "all that was open is dropped" => {
            drop(broker());
            until("threads of what was dropped have ended", || Holdings::of_library().threads == 0);
            let before = settled(Holdings::of_library);
            {
                let (_broker, client) = broker();
                let (mut sender, mut receiver) = pair(&client, 3);
                send(&mut sender, 1);
                let held = receiver.get_timeout(SOON).unwrap();
                drop((sender, receiver));
                assert!(is_all(&held, 1) && held.is_intact());
            }
            until_is("what is left", &before, Holdings::of_library);
        }
        other => panic!("no such role: {other}"),
    }
    println!("this is so");
}

fn is_so(role: &str) {
    // A process that is being started has the descriptors of this one for a moment, and nothing is leased meanwhile.
    let _alone = alone();
    let output = command(role).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("this is so"), "{role}");
}

#[test]
fn they_arrive_in_order_to_all_and_their_slots_are_used_again() {
    roles!(play);
    is_so("messages to all");
}

fn messages_to_all() {
    let (_broker, client) = broker();
    let (mut sender, mut receiver) = pair(&client, 3);
    let mut other = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    let (mut random, mut counts) = (support::Random(7), None);
    for n in 0..300 {
        let message = random.bytes([0, 1, 4096, 69_999, SIZE][n % 5]);
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.write_all(&message).unwrap();
        sender.write(fbuf).unwrap();
        let [one, two] = [&mut receiver, &mut other].map(|receiver| receiver.get_timeout(SOON).unwrap());
        for received in [&one, &two] {
            assert_eq!((received.sequence(), received.mechanism()), (n as u64, Mechanism::Lease));
            assert!(received[..] == message[..] && received.is_intact());
        }
        // Both hold it at once, where it lies.
        drop((one, two));
        // A slot may be passed over at first, so that another is used for the first time later than in its turn.
        if n == 99 {
            counts = Some(settled(Holdings::of_library));
        }
        if let Some(counts) = counts {
            assert_eq!(Holdings::of_library(), counts, "after {n} messages");
        }
    }
    assert_eq!((receiver.counters().leases_refused, other.counters().leases_refused), (0, 0));
    assert_eq!(sender.counters().slots.free + sender.counters().slots.held, 3);
}

#[test]
fn nothing_is_left() {
    roles!(play);
    is_so("all that was open is dropped");
}

#[test]
fn who_opens_a_message_for_writing_waits_until_there_is_a_copy() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 2);
    send(&mut sender, 1);
    let held = receiver.get_timeout(SOON).unwrap();
    let address = held.as_ptr();
    // Held up by the lease, and let through once the message is elsewhere.
    let writers = scribble().join().unwrap();
    assert!(!writers.is_empty() && is_all(&held, 1) && held.is_intact());
    assert_eq!((held.as_ptr(), held.mechanism()), (address, Mechanism::Lease));
    drop(held);
    // As long as somebody can write a slot, what comes in it is copied.
    for value in 2..6 {
        send(&mut sender, value);
        let held = receiver.get_timeout(SOON).unwrap();
        assert_eq!(held.mechanism(), Mechanism::Copy);
        writers.iter().for_each(|file| file.write_all_at(&[0xEE; SIZE], 0).unwrap());
        assert!(is_all(&held, value) && held.is_intact());
    }
    assert_eq!(receiver.counters().leases_refused, 4);
    drop(writers);
    for value in 6..10 {
        send(&mut sender, value);
        let held = receiver.get_timeout(SOON).unwrap();
        assert!(is_all(&held, value) && held.mechanism() == Mechanism::Lease);
    }
}

#[test]
fn a_slot_with_a_hole_is_copied() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 1);
    send(&mut sender, 0);
    drop(receiver.get_timeout(SOON).unwrap());
    let fbuf = filled(&mut sender, 1);
    let writer = File::options().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&slots()[0]).unwrap();
    let hole = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&writer, hole, 0, 4096).unwrap();
    drop(writer);
    sender.write(fbuf).unwrap();
    let held = receiver.get_timeout(SOON).unwrap();
    assert_eq!(held.mechanism(), Mechanism::Copy);
    assert!(held[..4096].iter().all(|&byte| byte == 0) && held[4096..].iter().all(|&byte| byte == 1));
}

#[test]
fn a_view_to_be_written_stays_what_it_is_when_the_lease_is_broken() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 2);
    send(&mut sender, 1);
    send(&mut sender, 2);
    let mut view = receiver.get_timeout(SOON).unwrap().into_private().unwrap();
    assert!(view.is_shared());
    view[5000] = 77;
    let late = receiver.get_timeout(SOON).unwrap();
    let _writers = scribble().join().unwrap();
    assert!((0..SIZE).all(|at| view[at] == if at == 5000 { 77 } else { 1 }));
    // A copy already: it is written as it is.
    let mut late = late.into_private().unwrap();
    late[SIZE - 1] = 78;
    assert!(late[..SIZE - 1].iter().all(|&byte| byte == 2) && late[SIZE - 1] == 78);
    drop((view, late));
    send(&mut sender, 3);
    assert!(is_all(&receiver.get_timeout(SOON).unwrap(), 3));
}

/// A message that begins in its slot behind so much headroom, of which a part was used and a part of the message trimmed.
fn send_behind(sender: &mut Sender, headroom: usize, value: u8) -> Vec<u8> {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_headroom(headroom).unwrap();
    let bytes: Vec<_> = (0..SIZE - headroom).map(|at| at as u8 ^ value).collect();
    fbuf.write_all(&bytes).unwrap();
    fbuf.trim_front(7);
    fbuf.prepend(&[value; 3]).unwrap();
    fbuf.header_mut().fill(value);
    sender.write(fbuf).unwrap();
    [&[value; 3], &bytes[7..]].concat()
}

#[test]
fn a_message_behind_headroom_stays_what_it_is_when_the_lease_is_broken() {
    let (_alone, (_broker, client)) = (alone(), broker());
    for headroom in [7, 13, 4096, 5000] {
        let mut receiver = client.receiver("c").require(Protection::Leased).open().unwrap();
        let mut sender = builder(&client, 3).header_size(24).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let sent = [1, 2, 3].map(|value| send_behind(&mut sender, headroom, value));
        let mut early = receiver.get_timeout(SOON).unwrap().into_private().unwrap();
        let [held, late] = [(); 2].map(|()| receiver.get_timeout(SOON).unwrap());
        assert_eq!([held.mechanism(), late.mechanism()], [Mechanism::Lease; 2]);
        early[4097] = 77;
        let (address, writers) = (held.as_ptr(), scribble().join().unwrap());
        assert!(!writers.is_empty(), "nothing was broken");
        // Before the break, and of a message that was held meanwhile.
        let of_view = |at: usize, sent: &[u8]| if at == 4097 { 77 } else { sent[at] };
        assert!(early.len() == sent[0].len() && (0..early.len()).all(|at| early[at] == of_view(at, &sent[0])));
        assert!(held[..] == sent[1][..] && held.is_intact() && held.as_ptr() == address, "behind {headroom} bytes");
        assert_eq!(held.header(), [2; 24]);
        // After it.
        let mut late = late.into_private().unwrap();
        assert!(late[..] == sent[2][..], "behind {headroom} bytes");
        late[4097] = 77;
        assert!((0..late.len()).all(|at| late[at] == of_view(at, &sent[2])));
        drop((early, held, late, writers));
        let next = send_behind(&mut sender, headroom, 4);
        let received = receiver.get_timeout(SOON).unwrap();
        assert!(received[..] == next[..] && received.mechanism() == Mechanism::Lease);
    }
}

#[test]
fn what_was_sent_and_kept_can_be_read_and_written_again() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let (mut sender, mut receiver) = pair(&client, 2);
    let fbuf = filled(&mut sender, 1);
    let (_, kept) = sender.write_retained(fbuf).unwrap();
    let held = receiver.get_timeout(SOON).unwrap();
    assert!(is_all(&kept, 1) && held.mechanism() == Mechanism::Lease);
    // Still held: the other slot.
    let mut copy = sender.make_mut(kept).unwrap();
    assert!(is_all(&copy, 1));
    copy.fill(2);
    assert!(is_all(&held, 1));
    let (_, kept) = sender.write_retained(copy).unwrap();
    drop(held);
    drop(receiver.get_timeout(SOON).unwrap());
    // Handed back: the same slot, and there is no third.
    let filler = filled(&mut sender, 3);
    let same = sender.make_mut(kept).unwrap();
    assert!(is_all(&same, 2));
    drop((filler, same));
}

#[test]
fn slots_can_be_the_receivers() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let mut sender = builder(&client, 3).from_receiver().open().unwrap();
    assert!(sender.allocate_timeout(Duration::from_millis(20)).is_err(), "there is no receiver");
    let mut receiver = client.receiver("c").open().unwrap();
    for n in 0..200u8 {
        send(&mut sender, n);
        let held = receiver.get_timeout(SOON).unwrap();
        assert!(is_all(&held, n) && held.mechanism() == Mechanism::Lease, "message {n}");
    }
    let refused = client.receiver("c").open().unwrap_err();
    assert!(refused.to_string().contains("come from the one receiver"), "{refused}");

    // What was allocated from one that goes is sent to the next.
    let (orphan, kept) = (filled(&mut sender, 201), filled(&mut sender, 202));
    let (_, kept) = sender.write_retained(kept).unwrap();
    let held = receiver.get_timeout(SOON).unwrap();
    drop(receiver);
    until("it has left", || {
        sender.poll_events();
        sender.receivers() == 0
    });
    let Err(WriteError::NoReceiver { fbuf: orphan }) = sender.write(orphan) else { panic!("it was written to nobody") };
    assert!(is_all(&orphan, 201) && is_all(&held, 202));
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fresh = filled(&mut sender, 203);
    sender.write(orphan).unwrap();
    sender.write(fresh).unwrap();
    for value in [201, 203] {
        let got = receiver.get_timeout(SOON).unwrap();
        assert!(is_all(&got, value) && got.mechanism() == Mechanism::Lease);
    }
    // Its slot was the other one's.
    let again = sender.make_mut(kept).unwrap();
    assert!(is_all(&again, 202));
    drop((held, again));
    send(&mut sender, 204);
    assert!(is_all(&receiver.get_timeout(SOON).unwrap(), 204));
}

#[test]
fn a_receiver_that_was_dropped_is_not_in_the_way_of_the_next() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let _sender = builder(&client, 1).from_receiver().open().unwrap();
    for _ in 0..200 {
        drop(client.receiver("c").open().unwrap());
    }
}

#[test]
fn without_a_receiver_that_gives_slots_it_is_said_that_none_is_linked() {
    let (_broker, client) = broker();
    let mut sender = builder(&client, 2).from_receiver().open().unwrap();
    let said = sender.allocate_timeout(Duration::from_millis(1)).unwrap_err().to_string();
    assert!(said.contains("none is linked") && said.contains("link_failure()"), "{said}");
}

#[test]
fn slots_of_the_receiver_that_are_copied_are_used_again() {
    let (_alone, (_broker, client)) = (alone(), broker());
    // A lease is not enough for this receiver.
    let mut receiver = client.receiver("c").require(Protection::Sealed).open().unwrap();
    let mut sender = builder(&client, 2).from_receiver().open().unwrap();
    let mut exchange = |receiver: &mut Receiver, value| {
        send(&mut sender, value);
        let held = receiver.get_timeout(SOON).unwrap();
        assert!(is_all(&held, value) && held.is_intact());
        held.mechanism()
    };
    assert!((0..50).all(|value| exchange(&mut receiver, value) == Mechanism::Copy));
    assert_eq!(receiver.counters().leases_refused, 0);
    drop(receiver);
    // For this one it is, until somebody can write the slots.
    let mut receiver = client.receiver("c").open().unwrap();
    assert_eq!(exchange(&mut receiver, 50), Mechanism::Lease);
    let _writers = scribble().join().unwrap();
    assert!((51..100).all(|value| exchange(&mut receiver, value) == Mechanism::Copy));
    assert_eq!(receiver.counters().leases_refused, 49);
}

#[test]
fn a_right_that_cannot_be_given_back_for_lack_of_descriptors_is_given_later() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let mut sender = builder(&client, 1).from_receiver().open().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    send(&mut sender, 1);
    let held = receiver.get_timeout(SOON).unwrap();
    let endpoint = receiver.endpoint();
    let sleeps = || {
        let status = client.status().unwrap();
        status
            .iter()
            .find(|other| other.endpoint == endpoint)
            .and_then(|status| status.report)
            .map_or(0, |report| report.sleeps)
    };
    let before = receiver.counters().sleeps;
    let waits = thread::spawn(move || {
        let told = receiver.get().unwrap_err();
        (receiver, told)
    });
    until("it sleeps", || sleeps() > before);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
    // Dropped by another thread while the receiver sleeps, which is told, and once.
    drop(held);
    let (mut receiver, told) = waits.join().unwrap();
    assert!(matches!(told, GetError::SlotsWithheld { why: CannotReopen::NoDescriptor, .. }), "{told}");
    assert!(told.to_string().contains("no descriptor is left (RLIMIT_NOFILE)"), "{told}");
    assert!(matches!(receiver.try_get(), Ok(None)));
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(sender.try_allocate().unwrap().is_none());
    // While it sleeps, with nothing else to wake it.
    let sleeper = thread::spawn(move || receiver.get_timeout(SOON).unwrap().to_vec());
    send(&mut sender, 2);
    assert!(is_all(&sleeper.join().unwrap(), 2));
}

#[test]
fn a_sender_is_told_what_it_got_and_why() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let granted = |builder: SenderBuilder| builder.open().unwrap().protection_info().clone();
    let small = granted(client.sender("a").slot_size(1 << 20).protection(Protection::Leased));
    assert_eq!(small.mechanism, Mechanism::Copy);
    assert!(small.to_string().starts_with("sealed by copying: slots of 1048576 bytes"), "{small}");
    let large = granted(client.sender("b").slot_size(2 << 20).protection(Protection::Leased));
    match large.mechanism {
        Mechanism::Lease => assert!(large.pages.is_some(), "{large}"),
        Mechanism::Copy => assert!(large.reason.contains("huge pages"), "{large}"),
        _ => panic!("{large}"),
    }
    let sealed = granted(client.sender("c").slot_size(64 << 20).slots(1).protection(Protection::Sealed));
    assert_eq!(sealed.to_string(), "sealed by copying: sealed was asked for");
    let asked = granted(client.sender("d").slot_size(4096).mechanism(Mechanism::Lease));
    assert_eq!(asked.mechanism, Mechanism::Lease, "{asked}");
    let too_many = client.sender("e").slots(33).mechanism(Mechanism::Lease).open();
    assert!(matches!(too_many, Err(OpenError::Geometry(_))));
    // What cannot all be had is refused, and nothing of it is left out in silence.
    for builder in [
        client.sender("f").mechanism(Mechanism::Lease).guard(true),
        client.sender("f").mechanism(Mechanism::Lease).protection(Protection::Sealed),
        client.sender("f").from_receiver().mechanism(Mechanism::Copy),
        client.sender("f").pages(Pages::Base),
    ] {
        let refused = builder.open();
        assert!(matches!(refused, Err(OpenError::Options(_))), "{refused:?}");
    }
    assert_eq!(granted(client.sender("f").guard(true)).to_string(), "shared: volatile was asked for, with a guard");
}

/// The signals that signalfds of this process take, a bit for each.
fn taken_signals() -> u64 {
    let all =
        fs::read_dir("/proc/self/fdinfo").unwrap().filter_map(|file| fs::read_to_string(file.unwrap().path()).ok());
    let masks = all.filter_map(|text| {
        let mask = text.lines().find_map(|line| line.strip_prefix("sigmask:"))?;
        Some(u64::from_str_radix(mask.trim(), 16).unwrap())
    });
    masks.fold(0, |all, mask| all | mask)
}

/// What is sent to a process that waits for a signal (sigwait(3)), no thread of the library takes.
#[test]
fn leases_are_kept_by_a_signal_that_the_program_does_not_wait_for() {
    let (_alone, (_broker, client)) = (alone(), broker());
    let first = libc::SIGRTMAX() - 2;
    let leased = || {
        let (mut sender, mut receiver) = pair(&client, 1);
        send(&mut sender, 1);
        assert_eq!(receiver.get_timeout(SOON).unwrap().mechanism(), Mechanism::Lease);
        taken_signals()
    };
    assert_eq!(leased(), 1 << (first - 1), "the control: nothing waits for it");
    block(first);
    assert_eq!(leased(), 1 << (first - 2));
}

/// Has this thread block a signal.
#[allow(unsafe_code, reason = "real-time signals have no safe wrapper")]
fn block(signal: libc::c_int) {
    // SAFETY: the set is plain memory that is initialised before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()), 0);
    }
}

/// A sender of which a message was sent and is back.
fn sent_and_back(client: &Client) -> (Sender, Receiver) {
    let mut sender = builder(client, 1).open().unwrap();
    drop(sender.allocate().unwrap());
    let mut receiver = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate().unwrap();
    sender.write(fbuf).unwrap();
    drop(receiver.get_timeout(SOON).unwrap());
    println!("sent as root");
    (sender, receiver)
}

/// What the next test runs as a process of its own: it changes its user between two messages.
#[test]
fn a_sender_that_changes_its_user() {
    if std::env::var_os("FBUF_TEST_CHANGES_USER").is_none() {
        return;
    }
    let (_broker, client) = broker();
    let (mut sender, _receiver) = sent_and_back(&client);
    nix::unistd::setresuid(65_534.into(), 65_534.into(), 65_534.into()).unwrap();
    assert_eq!(sender.allocate_timeout(SOON).unwrap_err(), AllocateError::NotPermitted { bytes: SIZE });
    assert_eq!(sender.try_allocate().unwrap_err(), AllocateError::NotPermitted { bytes: SIZE });
    println!("refused: {}", sender.allocate().unwrap_err());
}

/// A receiver that makes the slots of its sender, and from which a message came and went.
fn given_and_back(client: &Client) -> (Sender, Receiver) {
    let mut sender = builder(client, 1).from_receiver().open().unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    send(&mut sender, 1);
    drop(receiver.get_timeout(SOON).unwrap());
    println!("sent as root");
    (sender, receiver)
}

/// The same, of the receiver that made the slots.
#[test]
fn a_receiver_that_changes_its_user() {
    if std::env::var_os("FBUF_TEST_RECEIVER_CHANGES_USER").is_none() {
        return;
    }
    let (_broker, client) = broker();
    let (mut sender, mut receiver) = given_and_back(&client);
    send(&mut sender, 2);
    let held = receiver.get_timeout(SOON).unwrap();
    nix::unistd::setresuid(65_534.into(), 65_534.into(), 65_534.into()).unwrap();
    drop(held);
    let told = receiver.get_timeout(SOON).unwrap_err();
    assert!(matches!(told, GetError::SlotsWithheld { why: CannotReopen::NotPermitted, .. }), "{told}");
    println!("refused: {told}");
}

/// The same, which changes its root folder.
#[test]
fn a_sender_that_changes_its_root() {
    let Some(folder) = std::env::var_os("FBUF_TEST_ROOT") else { return };
    let (_broker, client) = broker();
    let (mut sender, _receiver) = sent_and_back(&client);
    std::os::unix::fs::chroot(folder).unwrap();
    assert_eq!(sender.allocate_timeout(SOON).unwrap_err(), AllocateError::NoProc { bytes: SIZE });
    assert_eq!(sender.try_allocate().unwrap_err(), AllocateError::NoProc { bytes: SIZE });
    println!("refused: {}", sender.allocate().unwrap_err());
}

#[test]
fn a_receiver_that_changes_its_root() {
    let Some(folder) = std::env::var_os("FBUF_TEST_RECEIVER_ROOT") else { return };
    let (_broker, client) = broker();
    let (mut sender, mut receiver) = given_and_back(&client);
    send(&mut sender, 2);
    let held = receiver.get_timeout(SOON).unwrap();
    std::os::unix::fs::chroot(folder).unwrap();
    assert!(is_all(&held, 2) && held.is_intact());
    drop(held);
    let told = receiver.get_timeout(SOON).unwrap_err();
    assert!(matches!(told, GetError::SlotsWithheld { why: CannotReopen::NoProc, .. }), "{told}");
    println!("refused: {told}");
}

#[test]
fn a_process_that_may_not_open_its_slots_any_more_is_told_why() {
    if !is_root() {
        return;
    }
    let empty = tempfile::tempdir().unwrap();
    for (test, variable, value, wanted) in [
        ("a_sender_that_changes_its_user", "FBUF_TEST_CHANGES_USER", "1".as_ref(), "changed its user since"),
        (
            "a_receiver_that_changes_its_user",
            "FBUF_TEST_RECEIVER_CHANGES_USER",
            "1".as_ref(),
            "changed its user since, let it open another receiver",
        ),
        ("a_sender_that_changes_its_root", "FBUF_TEST_ROOT", empty.path().as_os_str(), "changed its root folder since"),
        (
            "a_receiver_that_changes_its_root",
            "FBUF_TEST_RECEIVER_ROOT",
            empty.path().as_os_str(),
            "changed its root folder since",
        ),
    ] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command.args([test, "--exact", "--nocapture"]).env(variable, value).run();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(said.contains("sent as root") && said.contains(wanted), "{said}");
    }
}
