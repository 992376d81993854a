//! A process with one end on each channel, that may be killed at any moment.

use std::{
    env,
    io::{BufRead, Read, Write, stdin, stdout},
    os::{fd::AsFd, unix::process::ExitStatusExt},
    process::{ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use fbuf_client::{Address, Client, GetError, Mechanism, Received, Receiver, Sender, SenderBuilder, Wait};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::support::{Process, Random, SOON};

/// The answer to the only command there is.
const CHECKED: &str = "checked\n";
/// How long a slot is.
const SLOT: usize = 512;
/// How many messages a receiver holds on to, on each channel.
const HOLDS: u64 = 3;

/// One channel for each way to protect messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Volatile,
    Guarded,
    Copied,
    Leased,
    Sealed,
}

impl Level {
    pub const ALL: [Self; 5] = [Self::Volatile, Self::Guarded, Self::Copied, Self::Leased, Self::Sealed];

    pub fn channel(self) -> String {
        format!("{self:?}")
    }

    fn set(self, sender: SenderBuilder) -> SenderBuilder {
        match self {
            Self::Volatile => sender.slots(4).grow_to(16),
            Self::Guarded => sender.slots(4).grow_to(16).guard(true),
            Self::Copied => sender.slots(4).grow_to(16).mechanism(Mechanism::Copy),
            Self::Leased => sender.slots(8).mechanism(Mechanism::Lease),
            Self::Sealed => sender.slots(16).mechanism(Mechanism::OneShot),
        }
    }
}

pub fn senders(client: &Client, wait: Wait) -> Vec<Sender> {
    let open = |level: Level| {
        let sender = client.sender(&level.channel()).slot_size(SLOT as u64).wait(wait);
        level.set(sender).open().unwrap()
    };
    Level::ALL.into_iter().map(open).collect()
}

pub fn receivers(client: &Client, wait: Wait) -> Vec<Receiver> {
    Level::ALL.into_iter().map(|level| client.receiver(&level.channel()).stay().wait(wait).open().unwrap()).collect()
}

/// Fills and sends a message whose length and bytes follow from its number; false if no slot is free, or
/// there is no receiver.
pub fn send(sender: &mut Sender, next: &mut u64) -> bool {
    let Some(mut fbuf) = sender.try_allocate() else { return false };
    let length = (*next * 7919 % (SLOT as u64 + 1)) as usize;
    fbuf.resize(length).unwrap();
    fill(&mut fbuf, *next);
    match sender.write(fbuf) {
        Ok(sent) => {
            assert_eq!(sent.sequence, *next, "a number was left out");
            *next += 1;
            true
        }
        Err(error) => {
            drop(error);
            false
        }
    }
}

fn fill(bytes: &mut [u8], number: u64) {
    bytes.iter_mut().zip(0u64..).for_each(|(byte, place)| *byte = (number * 31 + place) as u8);
}

/// Checks that a message is as [`send`] made it.
pub fn check(received: &Received) {
    let number = received.sequence();
    assert_eq!(received.len() as u64, number * 7919 % (SLOT as u64 + 1), "message {number} has another length");
    let mut wanted = vec![0; received.len()];
    fill(&mut wanted, number);
    assert!(received[..] == wanted, "message {number} has other bytes");
}

/// Which message of each sender comes next on one channel, and those that are held.
#[derive(Debug, Default)]
pub struct Inbox {
    next: std::collections::BTreeMap<u64, u64>,
    held: Vec<Received>,
}

impl Inbox {
    /// Takes what there is, checks it, and holds on to some of it. Reports whose death was heard of.
    pub fn empty(&mut self, receiver: &mut Receiver, random: &mut Random) -> Vec<i32> {
        let mut dead = Vec::new();
        loop {
            match receiver.try_get() {
                Ok(Some(received)) => self.take(received, random),
                Ok(None) => return dead,
                Err(GetError::Disconnected(peer)) => {
                    dead.push(peer.process.pid);
                    self.next.remove(&peer.endpoint);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn take(&mut self, received: Received, random: &mut Random) {
        check(&received);
        // From the first one on, none is missing.
        let next = self.next.entry(received.sender().endpoint).or_insert(received.sequence());
        assert_eq!(received.sequence(), *next, "a message is missing, or came twice");
        *next += 1;
        if self.held.len() as u64 > random.below(HOLDS) {
            let held = self.held.swap_remove(random.below(self.held.len() as u64) as usize);
            check(&held);
        }
        self.held.push(received);
    }

    /// Lets go of what is held, which is as it was.
    pub fn let_go(&mut self) {
        self.held.drain(..).for_each(|held| check(&held));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Sender,
    Receiver,
}

impl Role {
    /// Whose work a point is in, if it is in one's only.
    pub fn of(point: &str) -> Option<Self> {
        match point.split(':').next()? {
            "growth" | "write" | "seal" | "end" => Some(Self::Sender),
            "get" | "return" => Some(Self::Receiver),
            _ => None,
        }
    }

    pub fn other(self) -> Self {
        match self {
            Self::Sender => Self::Receiver,
            Self::Receiver => Self::Sender,
        }
    }
}

/// The process, as whoever kills it has it.
#[derive(Debug)]
pub struct Actor {
    pub role: Role,
    process: Process,
    commands: ChildStdin,
    answers: ChildStdout,
}

impl Actor {
    /// Starts it; it dies at a point that it has passed so often before, if one is given.
    pub fn start(role: Role, broker: &Address, point: Option<(&str, u64)>) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["role", "--exact", "--nocapture", "--test-threads", "1"]);
        command.env("FBUF_TEST_ROLE", format!("{role:?}")).env("FBUF_BROKER", broker.to_string());
        if let Some((point, count)) = point {
            command.env("FBUF_DIE_AT", format!("{count} SIGKILL {point}"));
        }
        let mut process = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let commands = process.0.stdin.take().unwrap();
        let answers = process.0.stdout.take().unwrap();
        Self { role, process, commands, answers }
    }

    pub fn pid(&self) -> i32 {
        self.process.pid() as i32
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Whether it has died where it should. Fails if it found something wrong.
    pub fn has_died(&mut self) -> bool {
        match self.process.0.try_wait().unwrap() {
            None => false,
            Some(status) => {
                assert_eq!(status.signal(), Some(9), "{:?} failed: {status}", self.role);
                true
            }
        }
    }

    /// Has it look whether all that it sent is back, or let go of all that was sent to it.
    pub fn check(&mut self) {
        self.commands.write_all(b"check\n").unwrap();
    }

    /// Whether it has done so.
    pub fn has_checked(&mut self) -> bool {
        let mut said = [0; 100];
        while is_readable(&self.answers) {
            let count = self.answers.read(&mut said).unwrap();
            assert!(count > 0, "{:?} failed: {:?}", self.role, self.process.0.wait());
            if said[..count].ends_with(CHECKED.as_bytes()) {
                return true;
            }
        }
        false
    }
}

/// Is the actor, for as long as it lives.
pub fn act(role: &str) {
    let client = Client::connect().unwrap();
    let mut random = Random(std::process::id().into());
    let wait = [Wait::Spin, Wait::Adaptive, Wait::Block][random.below(3) as usize];
    match role {
        "Sender" => send_for_ever(senders(&client, wait), &mut random),
        _ => receive_for_ever(receivers(&client, wait), &mut random),
    }
}

fn send_for_ever(mut senders: Vec<Sender>, random: &mut Random) {
    let mut next = vec![0; senders.len()];
    loop {
        for (sender, next) in senders.iter_mut().zip(&mut next) {
            for _ in 0..random.below(8) {
                if !send(sender, next) {
                    // Where it would wait, it may sleep.
                    drop(sender.allocate_timeout(Duration::from_micros(random.below(300))));
                    break;
                }
            }
        }
        if told() {
            for (sender, level) in senders.iter_mut().zip(Level::ALL) {
                let returned = sender.wait_for_returns_timeout(SOON);
                assert!(returned.is_ok(), "{level:?}: {returned:?}, {:?}", sender.counters());
                let slots = sender.counters().slots;
                assert_eq!((slots.held, slots.lent), (0, 0));
            }
            stdout().write_all(CHECKED.as_bytes()).unwrap();
            stdout().flush().unwrap();
        }
        if random.below(100) == 0 {
            // It ends a stream in order, and begins another.
            let index = random.below(senders.len() as u64) as usize;
            let client = Client::connect().unwrap();
            let level = Level::ALL[index];
            let builder = client.sender(&level.channel()).slot_size(SLOT as u64);
            senders[index] = level.set(builder).open().unwrap();
            next[index] = 0;
        }
    }
}

fn receive_for_ever(mut receivers: Vec<Receiver>, random: &mut Random) {
    let mut inboxes: Vec<Inbox> = receivers.iter().map(|_| Inbox::default()).collect();
    loop {
        let told = told();
        for (receiver, inbox) in receivers.iter_mut().zip(&mut inboxes) {
            if let Ok(received) = receiver.get_timeout(Duration::from_micros(random.below(300))) {
                inbox.take(received, random);
            }
            inbox.empty(receiver, random);
            if told || random.below(4) == 0 {
                inbox.let_go();
            }
        }
        if told {
            stdout().write_all(CHECKED.as_bytes()).unwrap();
            stdout().flush().unwrap();
        }
    }
}

/// Whether there is a command to read; it is the only one there is. Who gives no commands any more is gone.
fn told() -> bool {
    let input = stdin();
    if !is_readable(&input) {
        return false;
    }
    let mut line = String::new();
    if input.lock().read_line(&mut line).unwrap() == 0 {
        std::process::exit(0);
    }
    true
}

fn is_readable(file: &impl AsFd) -> bool {
    poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
}

/// Attaches a sender and a receiver to a broker that may die meanwhile: after how many tries.
pub fn attach(broker: &Address) -> usize {
    let mut tries = 0;
    let client = loop {
        tries += 1;
        match Client::connect_to(broker) {
            Ok(client) => break client,
            // There is none now.
            Err(_) => thread::yield_now(),
        }
    };
    // Each succeeds, if need be after the restart.
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(8).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut next = 0;
    assert!(send_number(&mut sender, &mut next));
    assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), 0);
    assert_eq!(sender.receivers(), 1, "they were introduced twice");
    tries
}

fn send_number(sender: &mut Sender, next: &mut u64) -> bool {
    let fbuf = sender.allocate_timeout(SOON).unwrap();
    let sent = sender.write(fbuf).is_ok_and(|sent| sent.sequence == *next);
    *next += 1;
    sent
}
