//! A process with one end on each channel, that may be killed at any moment.

use std::{
    collections::BTreeMap,
    io::{BufRead, Read, Write, stdin},
    ops::Range,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    process::{ChildStdin, ChildStdout, Stdio},
    thread,
    time::Duration,
};

use fbuf_client::{Address, Client, GetError, Sender, Wait};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    exchange::{Level, Listener, OF_RECEIVER, Who, break_leases, listeners, send, senders},
    part_of,
    support::{Process, Random, SOON, role::command},
};

/// The answer to the only command there is.
const CHECKED: &str = "checked";
/// How a line begins that tells of a message which is owed to all receivers that are linked; and one that tells of
/// messages which came.
const OWED: &str = "owed";
const CAME: &str = "came";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Sender,
    Receiver,
}

impl Role {
    /// Whose work a point is in, if it is in one's only.
    pub fn of(point: &str) -> Option<Self> {
        match point {
            "growth: mapped" | "lease: taken" | "lease: released" | "grant: opened" | "grant: sent" => {
                Some(Self::Receiver)
            }
            _ => match part_of(point) {
                "growth" | "write" | "seal" | "lease" | "right" | "end" => Some(Self::Sender),
                "get" | "return" | "break" => Some(Self::Receiver),
                _ => None,
            },
        }
    }

    pub fn other(self) -> Self {
        match self {
            Self::Sender => Self::Receiver,
            Self::Receiver => Self::Sender,
        }
    }
}

/// The process, as its killer has it.
#[derive(Debug)]
pub struct Actor {
    pub role: Role,
    process: Process,
    commands: ChildStdin,
    answers: ChildStdout,
    /// What it has said of a line that is not complete.
    line: Vec<u8>,
    checked: bool,
    owed: Messages,
    came: Messages,
}

/// From which message to which one, by level and endpoint.
pub type Messages = BTreeMap<(usize, u64), Range<u64>>;

impl Actor {
    /// Starts it; it dies at a point that it has passed so often before, if one is given.
    pub fn start(role: Role, broker: &Address, point: Option<(&str, u64)>) -> Self {
        let mut command = command(format!("{role:?}"));
        command.env("FBUF_BROKER", broker.to_string());
        if let Some((point, count)) = point {
            command.env("FBUF_DIE_AT", format!("{count} SIGKILL {point}"));
        }
        let mut process = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let commands = process.0.stdin.take().unwrap();
        let answers = process.0.stdout.take().unwrap();
        Self {
            role,
            process,
            commands,
            answers,
            line: Vec::new(),
            checked: false,
            owed: Messages::new(),
            came: Messages::new(),
        }
    }

    pub fn pid(&self) -> i32 {
        self.process.pid() as i32
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// What it owes, after it has died.
    pub fn owed(&mut self) -> &Messages {
        while self.listen() {}
        &self.owed
    }

    /// Takes some of what it says: false at the end.
    fn listen(&mut self) -> bool {
        let mut said = [0; 1 << 12];
        let count = self.answers.read(&mut said).unwrap();
        for &byte in &said[..count] {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = String::from_utf8(std::mem::take(&mut self.line)).unwrap();
            self.checked |= line == CHECKED;
            let mut words = line.split(' ');
            let Some(what @ (OWED | CAME)) = words.next() else { continue };
            let numbers: Vec<u64> = words.map(|number| number.parse().unwrap()).collect();
            let [level, endpoint, first, end] = numbers[..] else { panic!("{line}") };
            let messages = if what == OWED { &mut self.owed } else { &mut self.came };
            messages.entry((level as usize, endpoint)).or_insert(first..first).end = end;
        }
        count > 0
    }

    /// Whether it has died where it should. Fails if it found something wrong.
    pub fn has_died(&mut self) -> bool {
        while is_readable(&self.answers) && self.listen() {}
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

    /// What came to it, as it was when it was last checked.
    pub fn came(&self) -> &Messages {
        &self.came
    }

    /// Whether it has done so.
    pub fn has_checked(&mut self) -> bool {
        while is_readable(&self.answers) {
            assert!(self.listen(), "{:?} failed: {:?}", self.role, self.process.0.wait());
        }
        std::mem::take(&mut self.checked)
    }
}

/// Is the actor, for as long as it lives.
pub fn act(role: &str) {
    let client = Client::connect().unwrap();
    let mut random = Random(std::process::id().into());
    let wait = [Wait::Spin, Wait::Adaptive, Wait::Block][random.below(3) as usize];
    match role {
        "Sender" => send_for_ever(senders(&client, wait), &mut random),
        _ => receive_for_ever(listeners(&client, wait, Who::Actor), &mut random),
    }
}

fn send_for_ever(mut senders: Vec<Sender>, random: &mut Random) {
    let mut next = vec![0; senders.len()];
    loop {
        for (level, (sender, next)) in senders.iter_mut().zip(&mut next).enumerate() {
            for _ in 0..random.below(8) {
                // Whoever is linked now is owed what is sent now.
                let is_owed = has_all(sender, Level::ALL[level]);
                if send(sender, next) {
                    if is_owed {
                        println!("{OWED} {level} {} {} {next}", sender.endpoint(), *next - 1);
                    }
                } else {
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
                if level == Level::OfJudge {
                    // So are the rights to write them.
                    drop([(); OF_RECEIVER].map(|()| sender.allocate_timeout(SOON).unwrap()));
                }
            }
            println!("{CHECKED}");
        }
        if random.below(20) == 0 {
            // It ends a stream in order, and begins another.
            let index = random.below(senders.len() as u64) as usize;
            let client = Client::connect().unwrap();
            senders[index] = Level::ALL[index].sender(&client).open().unwrap();
            next[index] = 0;
        }
    }
}

/// Whether all receivers that go on are linked, and nobody is about to be.
fn has_all(sender: &Sender, level: Level) -> bool {
    let judge = nix::unistd::getppid().as_raw();
    let (peers, judges) = (sender.peers().count(), sender.peers().filter(|peer| peer.process.pid == judge).count());
    peers > 0 && judges == level.judges() && sender.receivers() == peers
}

fn receive_for_ever(mut listeners: Vec<Listener>, random: &mut Random) {
    loop {
        let told = told();
        for listener in &mut listeners {
            match listener.receiver.get_timeout(Duration::from_micros(random.below(300))) {
                Ok(received) => listener.take(received, random),
                // Somebody died.
                Err(GetError::TimedOut | GetError::Disconnected { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            listener.empty(random);
            if random.below(40) == 0 {
                break_leases();
            }
            if told || random.below(4) == 0 {
                listener.let_go();
            }
        }
        if told {
            for listener in &listeners {
                for (endpoint, came) in listener.all() {
                    println!("{CAME} {} {endpoint} {} {}", listener.level as usize, came.start, came.end);
                }
            }
            println!("{CHECKED}");
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
    for level in [Level::Volatile, Level::Leased] {
        let mut receiver = client.receiver(&level.channel()).open().unwrap();
        let mut sender = level.sender(&client).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let fbuf = sender.allocate_timeout(SOON).unwrap();
        assert_eq!(sender.write(fbuf).unwrap().sequence, 0);
        assert_eq!(receiver.get_timeout(SOON).unwrap().sequence(), 0);
        assert_eq!(sender.receivers(), 1, "they were introduced twice");
    }
    tries
}
