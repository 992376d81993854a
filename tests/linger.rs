//! Descriptors that take long to close, which a process of another user passes wherever it can: to the broker, over links,
//! into the queues of sockets that nobody reads. They cost that process its connection, and hold up nobody else. Attackers and those
//! that are attacked are processes of their own: what is closed last, and by which of them, is what this is about.
#![allow(unsafe_code, reason = "mount(2)")]

#[path = "support/hostile.rs"]
mod hostile;
#[path = "support/lingering.rs"]
mod lingering;
#[path = "support/mod.rs"]
mod support;

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read, Write, stdin},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{OpenOptionsExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::Path,
    process::{ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Address, Client, Farewell, GetError, Receiver, Sender};
use fbuf_core::{
    board::BoardTable,
    foreign::Foreign,
    lane::{LaneTable, capacity_for},
    limits::MAX_MESSAGE,
    link::{Hello, LinkMessage, NewSegment, Welcome},
    memory::Map,
    protection::{Mechanism, Protection},
    socket::{Arrival, PacketSocket},
    wire::{self, Descriptor, Letter},
};
use fbuf_protocol::{Limits, Role, Slots};
use hostile::{Hostile, Member, greet};
use lingering::{lingering, pass};
use nix::{libc, unistd::geteuid};
use support::{BrokerProcess, Process, SOON, closers, is_root, until};

/// The user of attackers.
const OTHER: u32 = 65_533;
/// For how long a socket lingers, in seconds, and for how long one does that is not waited for.
const LINGER: i32 = 5;
const FOR_EVER: i32 = 1000;
/// One thread for the attacker, and perhaps one for memory and one of an attacker that is not known any more.
const FEW: usize = 3;
/// Nothing that is held up by a lingering socket takes so short a time, and nothing else so long, also on a busy machine.
const LONG: Duration = Duration::from_secs(1);

/// What this program does when it is run again; nothing in the process that tests.
#[test]
fn role() {
    let Ok(role) = env::var("FBUF_TEST_ROLE") else { return };
    match role.split_once(' ') {
        None if role == "bare" => bare(),
        None if role == "sockets" => sockets(),
        None if role == "honest" => honest(),
        Some(("links", linger)) => attack_links(linger.parse().unwrap()),
        Some(("broker", linger)) => attack_broker(linger.parse().unwrap()),
        Some(("mount", folder)) => be_file_system(Path::new(folder)),
        Some(("fuse", folder)) => attack_with_file_system(Path::new(folder)),
        _ => panic!("no such role: {role}"),
    }
}

fn letter(descriptors: Vec<Descriptor>) -> Letter {
    Letter { bytes: vec![0], descriptors }
}

fn pair() -> (PacketSocket, PacketSocket) {
    let (one, other) = PacketSocket::pair().unwrap();
    (PacketSocket::new(one).unwrap(), PacketSocket::new(other).unwrap())
}

fn time(what: impl FnOnce()) -> Duration {
    let start = Instant::now();
    what();
    start.elapsed()
}

/// That what is tested takes long where nothing is done about it: a socket that is closed, and one in which it waits.
fn bare() {
    for taken in [true, false] {
        let (from, to) = PacketSocket::pair().unwrap();
        let from = PacketSocket::new(from).unwrap();
        from.send(&letter(vec![lingering(LINGER)])).unwrap();
        let held: Box<dyn Send> = if taken {
            let to = PacketSocket::new(to).unwrap();
            let Arrival::Message(_, mut descriptors) = to.receive::<64>().unwrap() else { panic!("no message") };
            Box::new(descriptors.remove(0).into_fd())
        } else {
            Box::new(to)
        };
        println!("it took {} ms", time(|| drop(held)).as_millis());
    }
}

/// What the sockets of the library do, also those to which a kernel refuses no descriptors.
fn sockets() {
    let took = |what: &str, time: Duration| println!("{what}: it took {} ms", time.as_millis());
    let (from, to) = pair();
    (0..3).for_each(|_| from.send(&letter(vec![lingering(LINGER)])).unwrap());
    took("to look", time(|| assert!(matches!(to.receive_bytes::<MAX_MESSAGE>().unwrap(), Arrival::TooLong))));
    took("to take", time(|| assert!(matches!(to.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)))));
    took("to drop what waits", time(|| drop(to)));
    assert!(from.hung_up(), "the other side does not see that it is dropped");
    // In a socket in a socket.
    let (inner, nested) = PacketSocket::pair().unwrap();
    PacketSocket::new(inner).unwrap().send(&letter(vec![lingering(LINGER)])).unwrap();
    let (from, to) = pair();
    from.send(&letter(vec![nested.into()])).unwrap();
    took("to drop what waits in what waits", time(|| drop((from, to))));
    let unnamed = || vec![Foreign::from(lingering(LINGER).into_owned().unwrap())];
    took("to decode", time(|| drop(wire::decode::<u8>(&[7], unnamed()))));
    // However many there are, one thread waits for them.
    for _ in 0..60 {
        let socket = lingering(FOR_EVER);
        drop(Foreign::from(socket.into_owned().unwrap()));
        thread::sleep(Duration::from_millis(5));
    }
    println!("{} threads wait", closers(std::process::id()));
}

/// One that sends and receives, and says which call took longest when it is told to end.
fn honest() {
    let client = Client::connect().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(4).grow_to(64).open().unwrap();
    let mut receiver = client.receiver("c").stay().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    println!("it is linked");
    let over = Arc::new(AtomicBool::new(false));
    let (told, mut longest, mut offences) = (over.clone(), Duration::ZERO, 0u64);
    thread::spawn(move || {
        stdin().read_line(&mut String::new()).unwrap();
        told.store(true, Ordering::Relaxed);
    });
    let mut number = 0u64;
    while !over.load(Ordering::Relaxed) {
        longest = longest.max(time(|| offences += send(&mut sender, number)));
        longest = longest.max(time(|| offences += receive(&mut receiver, number)));
        number += 1;
        thread::sleep(Duration::from_micros(200));
    }
    println!("offences: {offences}");
    println!("longest call: {} ms", longest.as_millis());
    let drops = [time(|| drop(receiver)), time(|| drop(sender)), time(|| drop(client))];
    println!("longest drop: {} ms", drops.iter().max().unwrap().as_millis());
    println!("{} threads wait", closers(std::process::id()));
    println!("it is over");
}

fn send(sender: &mut Sender, number: u64) -> u64 {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.resize(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    sender.write(fbuf).unwrap();
    let farewells = std::iter::from_fn(|| sender.departed()).map(|departure| departure.farewell);
    farewells.filter(|farewell| matches!(farewell, Farewell::Violation(_))).count() as u64
}

/// Until that message comes: how many violations are told of before.
fn receive(receiver: &mut Receiver, number: u64) -> u64 {
    let mut offences = 0;
    loop {
        match receiver.get_timeout(SOON) {
            Ok(message) => {
                assert_eq!(message[..], number.to_ne_bytes());
                return offences;
            }
            Err(GetError::PeerViolation { .. }) => offences += 1,
            Err(GetError::Disconnected(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

const RECEIVER: Role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
const SENDER: Role = Role::Sender { slot_bytes: 64, max_slots: 64, mechanism: Mechanism::Copy, slots: Slots::Segments };

fn hello() -> LinkMessage {
    let board = BoardTable::create("fbuf-test", 64).unwrap().1.into();
    LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false })
}

fn welcome(lane: Descriptor) -> LinkMessage {
    let segments = vec![NewSegment { memory: Map::create("fbuf-test", 4096).unwrap().1.into(), slots: 4 }];
    LinkMessage::Welcome(Welcome { lane, first_sequence: 0, segments, slots: Vec::new() })
}

fn lane() -> Descriptor {
    LaneTable::create("fbuf-test", capacity_for(64, false)).unwrap().1.into()
}

/// Offends one peer after the other, in each way there is, and keeps what lingers. Some links end in a violation, some as by a death.
fn attack_links(seconds: i32) -> ! {
    let broker = Address::default_for_user();
    let one = || vec![lingering(seconds)];
    let socket = || lingering(seconds);
    let many = || vec![lingering(seconds); 253];
    let nested = || {
        let (from, to) = PacketSocket::pair().unwrap();
        PacketSocket::new(from).unwrap().send(&letter(one())).unwrap();
        to.into()
    };
    let say = |hostile: &Hostile, message: LinkMessage| {
        let _ = pass(&hostile.link, wire::encode(&message).unwrap());
        thread::spawn(move || drop(message));
    };
    let send = |hostile: &Hostile, letters: Vec<Letter>| {
        letters.into_iter().for_each(|letter| drop(pass(&hostile.link, letter)));
    };
    // Its peer hangs up at once when it takes no more of this user.
    let greet = |hostile: &Hostile, message: LinkMessage| {
        let _ = hostile.link.send(&wire::encode(&message).unwrap());
    };
    let segment = |memory| wire::encode(&LinkMessage::Segment(NewSegment { memory, slots: 4 })).unwrap();
    let rounds = if seconds == FOR_EVER { 6 } else { 1 };
    for _ in 0..rounds {
        for way in 0..10 {
            let hostile = Hostile::join(&broker, "c", if way < 5 { RECEIVER } else { SENDER });
            match way {
                // Before a word, more than a message may carry; and more that is never read.
                0 | 5 => send(&hostile, vec![letter(many()), letter(one()), letter(one())]),
                1 => say(
                    &hostile,
                    LinkMessage::Hello(Hello { board: socket(), skip_above: None, fences: false, wants_slots: false }),
                ),
                2 => {
                    greet(&hostile, hello());
                    send(&hostile, vec![letter(one()), letter(one())]);
                }
                3 => {
                    greet(&hostile, hello());
                    send(&hostile, vec![letter(vec![nested()])]);
                }
                // Longer than any may be, with a descriptor.
                4 | 9 => send(&hostile, vec![Letter { bytes: vec![0; MAX_MESSAGE + 1], descriptors: one() }]),
                6 => say(&hostile, welcome(socket())),
                7 => {
                    greet(&hostile, welcome(lane()));
                    // One that is known to be wrong, and others that are never read.
                    send(&hostile, vec![segment(socket()), segment(nested()), letter(one())]);
                }
                _ => {
                    greet(&hostile, welcome(lane()));
                    send(&hostile, vec![letter(vec![nested()])]);
                }
            }
            // Its end is closed, and with it nothing that it has sent.
            if way % 2 == 0 {
                until("its peer hangs up", || hostile.link.hung_up());
            }
            drop(hostile);
            println!("it has attacked");
        }
    }
    println!("it is done");
    loop {
        thread::park();
    }
}

/// Offends the broker.
fn attack_broker(seconds: i32) -> ! {
    let broker = Address::default_for_user();
    let introduced = |member: &Member| {
        let socket = member.news().remove(0).socket.into_owned().unwrap();
        PacketSocket::new(socket).unwrap()
    };
    for turn in 0..8 {
        // To the broker itself.
        let connection = greet(&broker);
        match pass(&connection, letter(vec![lingering(seconds)])) {
            Ok(()) => until("the broker hangs up", || connection.hung_up()),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
        // Into an end of a link that is never fetched.
        let receiver = Member::join(&broker, "mail", RECEIVER);
        let sender = Member::join(&broker, "mail", SENDER);
        let link = introduced(&receiver);
        (0..3).for_each(|_| link.send(&letter(vec![lingering(seconds)])).unwrap());
        drop(sender);
        until("the broker drops the other end", || link.hung_up());
        // Into an end that is closed as soon as it has come, when the broker may have it still.
        let sender = Member::join(&broker, "mail", SENDER);
        let link = introduced(&receiver);
        let sockets: Vec<_> = (0..4).map(|_| letter(vec![lingering(seconds)])).collect();
        thread::scope(|scope| {
            scope.spawn(|| drop(sender.news()));
            sockets.into_iter().for_each(|letter| drop(pass(&link, letter)));
        });
        println!("it has attacked {turn}");
    }
    println!("it is done");
    loop {
        thread::park();
    }
}

/// Is a file system with one file, which answers all but what is asked when that is closed.
fn be_file_system(folder: &Path) -> ! {
    let device = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let c_string = |text: &str| std::ffi::CString::new(text).unwrap();
    let (kind, place) = (c_string("fuse"), c_string(folder.to_str().unwrap()));
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = c_string(&options);
    // SAFETY: all of these are strings that live here.
    let result = unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    println!("it is mounted");
    thread::spawn(move || serve(device));
    stdin().read_line(&mut String::new()).unwrap();
    // It is there for as long as its file is open.
    // SAFETY: the string lives here.
    assert_eq!(unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) }, 0);
    println!("it is unmounted");
    loop {
        thread::park();
    }
}

/// So many links end for what comes over them, before nothing more is taken: one that is waited for, eight that wait,
/// and perhaps one more that comes before the first has been waited for long.
const ATTACKS: usize = 10;

/// Passes the file of such a file system.
fn attack_with_file_system(folder: &Path) -> ! {
    let file = fs::File::options().read(true).write(true).open(folder.join("file")).unwrap();
    println!("it is open");
    let (file, broker) = (Descriptor::from(OwnedFd::from(file)), Address::default_for_user());
    let attack = |count: usize| {
        for _ in 0..count {
            let hostile = Hostile::join(&broker, "c", SENDER);
            // As its lane, and as many segments.
            let memory = || NewSegment { memory: file.clone(), slots: 4 };
            let segments = (0..16).map(|_| memory()).collect();
            let lane = file.clone();
            let welcome = Welcome { lane, first_sequence: 0, segments, slots: Vec::new() };
            // It may not be accepted.
            let _ = hostile.link.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap());
            until("its peer hangs up", || hostile.link.hung_up());
            println!("it has attacked");
        }
    };
    attack(ATTACKS);
    println!("it pauses");
    stdin().read_line(&mut String::new()).unwrap();
    attack(ATTACKS);
    println!("it is done");
    loop {
        thread::park();
    }
}

/// Answers the kernel, in the words of linux/fuse.h.
fn serve(mut device: fs::File) {
    let mut request = vec![0; 1 << 17];
    while device.read(&mut request).is_ok() {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (operation, unique, node) = (word(4), &request[8..16], word(16));
        let attributes = |node: u32| {
            let mut words = [0u32; 22];
            words[0] = node;
            (words[15], words[16]) = (if node == 1 { 0o40_755 } else { 0o100_666 }, 1);
            words
        };
        let answer: Option<Result<Vec<u32>, i32>> = match operation {
            // LOOKUP: the node, its generation, and for how long that holds, which is not at all.
            1 => Some(Ok([vec![2, 0, 0, 0, 0, 0, 0, 0, 0, 0], attributes(2).to_vec()].concat())),
            // GETATTR
            3 => Some(Ok([vec![0; 4], attributes(node).to_vec()].concat())),
            // OPEN
            14 => Some(Ok(vec![0; 4])),
            // INIT: the version of the protocol, and nothing beyond it.
            26 => {
                let mut words = vec![0; 16];
                (words[0], words[1], words[5]) = (7, 31, 4096);
                Some(Ok(words))
            }
            // FORGET has no answer, STATFS and FLUSH get none.
            2 | 17 | 25 => None,
            // RELEASE, OPENDIR, RELEASEDIR, ACCESS
            18 | 27 | 29 | 34 => Some(Ok(Vec::new())),
            _ => Some(Err(libc::ENOSYS)),
        };
        let Some(answer) = answer else { continue };
        let (error, words) = answer.map_or_else(|error| (-error, Vec::new()), |words| (0, words));
        let length = 16 + 4 * words.len() as u32;
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let reply = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), unique, &words].concat();
        device.write_all(&reply).unwrap();
    }
}

/// This program in another role, perhaps as another user, and what it prints.
struct Other {
    process: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Other {
    fn start(role: &str, user: u32, broker: Option<&BrokerProcess>) -> Self {
        // Which another user can run wherever it lies.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["--exact", "role", "--nocapture", "--test-threads=1"])
            .current_dir("/")
            .env("FBUF_TEST_ROLE", role);
        if let Some(broker) = broker {
            command.env("FBUF_BROKER", broker.address.to_string());
        }
        if user != geteuid().as_raw() {
            command.uid(user).gid(user);
        }
        let mut process = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let input = process.0.stdin.take().unwrap();
        let output = BufReader::new(process.0.stdout.take().unwrap());
        Self { process, input, output }
    }

    /// The next line with this in it.
    fn hear(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "it ended before it said {text:?}");
            if line.contains(text) {
                return line.trim_end().to_owned();
            }
        }
    }

    /// The number in that line.
    fn number(&mut self, text: &str) -> u64 {
        let line = self.hear(text);
        let number = line.split_whitespace().find_map(|word| word.parse().ok());
        println!("{line}");
        number.unwrap_or_else(|| panic!("no number in {line:?}"))
    }

    fn milliseconds(&mut self, text: &str) -> Duration {
        Duration::from_millis(self.number(text))
    }

    fn tell(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    /// Has an honest one end, and looks whether anything has held it up: how many offences it was told of, and how many
    /// threads of it wait.
    fn judge(&mut self) -> (u64, u64) {
        self.tell();
        let offences = self.number("offences:");
        for what in ["longest call:", "longest drop:"] {
            let time = self.milliseconds(what);
            assert!(time < LONG, "{what} {time:?}");
        }
        (offences, self.number("threads wait"))
    }
}

/// A broker of this user, at which the attackers' may connect.
fn broker(folder: &Path) -> BrokerProcess {
    let policy = folder.join("policy.toml");
    let all = "send = [\"*\"]\nreceive = [\"*\"]\n";
    fs::write(&policy, format!("[[rule]]\nusers = [{}, {OTHER}]\n{all}", geteuid())).unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    BrokerProcess::start_with(&folder.join("broker"), |command| {
        command.arg("--policy").arg(&policy);
    })
    .forget_log()
}

/// The longest that the broker takes for a newcomer, until it is over.
fn longest_attach(broker: &Address, is_over: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    while !is_over.load(Ordering::Relaxed) {
        longest = longest.max(time(|| {
            let client = Client::connect_to(broker).unwrap();
            client.clients().unwrap();
        }));
        thread::sleep(Duration::from_millis(1));
    }
    longest
}

/// Sets this when it is dropped.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// While an attacker is at it, others are served.
fn besiege(broker: &BrokerProcess, attacker: &mut Other, last: &str) {
    let (over, address) = (AtomicBool::new(false), &broker.address);
    let longest = thread::scope(|scope| {
        // Also if the attacker fails.
        let over = SetAtEnd(&over);
        let is_over = over.0;
        let attach = scope.spawn(|| longest_attach(address, is_over));
        attacker.hear(last);
        drop(over);
        attach.join().unwrap()
    });
    println!("longest attach: {} ms", longest.as_millis());
    assert!(longest < LONG, "{longest:?}");
}

#[test]
fn sockets_in_which_something_lingers_hold_up_only_who_does_nothing_about_it() {
    let mut bare = Other::start("bare", geteuid().as_raw(), None);
    for _ in 0..2 {
        let time = bare.milliseconds("it took");
        assert!(time > 4 * LONG, "nothing lingers: {time:?}");
    }
    let mut sockets = Other::start("sockets", geteuid().as_raw(), None);
    for _ in 0..5 {
        let time = sockets.milliseconds("it took");
        assert!(time < LONG, "{time:?}");
    }
    let waiting = sockets.number("threads wait");
    assert_eq!(waiting, 1, "threads wait");
}

#[test]
fn no_user_holds_the_broker_up() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    let mut attacker = Other::start(&format!("broker {FOR_EVER}"), OTHER, Some(&broker));
    besiege(&broker, &mut attacker, "it is done");
    let waiting = closers(broker.process.pid());
    println!("{waiting} threads of the broker wait");
    assert!((1..=FEW).contains(&waiting), "{waiting}");
    // When the attacker is gone, nothing lingers.
    attacker.process.kill();
    until("all is closed", || closers(broker.process.pid()) == 0);
}

#[test]
fn no_peer_of_another_user_holds_a_sender_or_a_receiver_up() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    for seconds in [LINGER, FOR_EVER] {
        let mut honest = Other::start("honest", geteuid().as_raw(), Some(&broker));
        honest.hear("it is linked");
        let mut attacker = Other::start(&format!("links {seconds}"), OTHER, Some(&broker));
        besiege(&broker, &mut attacker, "it is done");
        let (offences, waiting) = honest.judge();
        assert!(offences >= 5, "{offences} offences");
        assert!((1..=FEW as u64).contains(&waiting), "{waiting} threads wait");
        attacker.process.kill();
        honest.hear("it is over");
        assert!(honest.process.end().success());
    }
}

/// Its file system is never asked, but when a file is closed.
#[test]
fn no_file_system_of_another_user_holds_a_receiver_up() {
    if !is_root() {
        return;
    }
    let can_mount = fs::File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse");
    if let Err(error) = can_mount {
        return support::not_tested(&format!("a file system in user space: {error}"));
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    let place = folder.path().join("mount");
    fs::create_dir(&place).unwrap();
    let mut honest = Other::start("honest", geteuid().as_raw(), Some(&broker));
    honest.hear("it is linked");
    let mut attacker;
    // Killed before those that wait for it, whatever comes.
    let mut file_system = Other::start(&format!("mount {}", place.display()), geteuid().as_raw(), None);
    file_system.hear("it is mounted");
    attacker = Other::start(&format!("fuse {}", place.display()), OTHER, Some(&broker));
    attacker.hear("it is open");
    file_system.tell();
    file_system.hear("it is unmounted");
    besiege(&broker, &mut attacker, "it pauses");
    let waiting = closers(honest.process.pid());
    assert!((1..=FEW).contains(&waiting), "{waiting} threads wait for an answer that does not come");
    let open = || {
        let all = fs::read_dir(format!("/proc/{}/fd", honest.process.pid())).unwrap().flatten();
        all.filter(|one| fs::read_link(one.path()).is_ok_and(|file| file.ends_with("file"))).count()
    };
    let before = open();
    assert!((17..=17 * ATTACKS).contains(&before), "{before} of its files are open");
    thread::sleep(LONG);
    attacker.tell();
    besiege(&broker, &mut attacker, "it is done");
    assert_eq!(open(), before, "what that user passes is still taken");
    let (offences, waiting) = honest.judge();
    assert!((ATTACKS as u64 - 1..=ATTACKS as u64).contains(&offences), "{offences} offences");
    assert!((1..=FEW as u64).contains(&waiting), "{waiting} threads wait");
    file_system.process.kill();
    honest.hear("it is over");
    assert!(honest.process.end().success());
}
