//! Processes that come to a channel for a moment: this program again, in the role of a sender or of a
//! receiver. All that one does follows from a number, but for when it is killed.

use std::{
    collections::VecDeque,
    os::fd::AsFd,
    process::{ChildStdout, Stdio},
    time::{Duration, Instant},
};

use fbuf_client::{Client, GetError, Mechanism, Protection, ReceiverBuilder, SenderBuilder, Wait};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    message::{self, Heard, Missing, Writing},
    support::{Process, Random, role::command},
};

/// The longest that a visitor stays.
const LONGEST: u64 = 400;
/// How long a visitor waits before it looks whether its time is over.
const MOMENT: Duration = Duration::from_millis(20);

/// A visitor, and when it is killed; or would be, were it still there.
#[derive(Debug)]
pub struct Visitor {
    process: Process,
    /// Hangs up when it has gone.
    output: ChildStdout,
    death: Instant,
    what: String,
}

/// How a visitor went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    ByItself,
    Killed,
}

impl Visitor {
    /// Starts one.
    pub fn start(broker: &str, role: &str, channel: &str, random: &mut Random) -> Self {
        let number = random.below(u64::MAX);
        let what = format!("{role} {number} on {channel}");
        let mut command = command(format!("{role} {number} {channel}"));
        let mut process = Process::start(command.env("FBUF_BROKER", broker).stdout(Stdio::piped()));
        let output = process.0.stdout.take().unwrap();
        // About half of them end before.
        Self { process, output, death: Instant::now() + Duration::from_millis(random.below(LONGEST)), what }
    }

    /// Waits until any of these has gone, or is to be killed.
    pub fn wait_for_any(crowd: &[Self]) {
        let Some(next) = crowd.iter().map(|visitor| visitor.death).min() else { return };
        let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let outputs = crowd.iter().map(|visitor| visitor.output.as_fd());
        let mut polled: Vec<_> = outputs.map(|output| PollFd::new(output, PollFlags::empty())).collect();
        poll(&mut polled, PollTimeout::try_from(left).unwrap()).unwrap();
    }

    /// Looks whether it has gone, and kills it if it is time.
    pub fn look(&mut self) -> Option<Gone> {
        if let Some(status) = self.process.0.try_wait().unwrap() {
            assert!(status.success(), "{}: {status}", self.what);
            return Some(Gone::ByItself);
        }
        (Instant::now() >= self.death).then(|| {
            self.process.kill();
            Gone::Killed
        })
    }
}

/// Does what it was started for, in its own process.
pub fn visit(role: &str) {
    let [role, number, channel] = role.split(' ').collect::<Vec<_>>()[..] else { panic!("no such role: {role}") };
    let mut random = Random(number.parse::<u64>().unwrap() | 1);
    let client = Client::connect().unwrap();
    let end = Instant::now() + Duration::from_millis(random.below(LONGEST));
    match role {
        "sender" => send(sender(&client, channel, &mut random), &mut random, end),
        "receiver" => receive(receiver(&client, channel, &mut random), &mut random, end),
        other => panic!("no such role: {other}"),
    }
}

fn wait(random: &mut Random) -> Wait {
    match random.below(8) {
        0 => Wait::Spin,
        1..5 => Wait::Adaptive,
        _ => Wait::Block,
    }
}

/// A sender of some kind that the receivers of the channel accept.
fn sender(client: &Client, channel: &str, random: &mut Random) -> SenderBuilder {
    let size = [64, 4 << 10, 64 << 10, 256 << 10, 2 << 20][random.below(5) as usize];
    let size = message::HEAD + random.below(size) as usize;
    let slots = 1 + random.below(8) as usize;
    let plain = client.sender(channel).slot_size(size).wait(wait(random)).slots(slots);
    if channel.starts_with("given") {
        return plain.from_receiver();
    }
    let sealed = [Mechanism::Copy, Mechanism::OneShot];
    match (channel, random.below(8)) {
        ("sealed", kind) => plain.mechanism(sealed[(kind % 2) as usize]),
        ("leased", 0..3) => plain.mechanism(Mechanism::Lease),
        ("leased", 3 | 4) => plain.protection(Protection::Leased),
        (_, 5) => plain.mechanism(Mechanism::Lease),
        (_, kind @ 6..) => plain.mechanism(sealed[(kind % 2) as usize]),
        (_, 0) => plain.guard(true),
        (_, 1) => plain.grow_to(4 * slots),
        _ => plain,
    }
}

fn receiver(client: &Client, channel: &str, random: &mut Random) -> (ReceiverBuilder, bool) {
    let levels: &[_] = match channel {
        "sealed" => &[Protection::Volatile, Protection::Leased, Protection::Sealed],
        "leased" => &[Protection::Volatile, Protection::Leased],
        _ => &[Protection::Volatile],
    };
    let require = levels[random.below(levels.len() as u64) as usize];
    let plain = client.receiver(channel).wait(wait(random)).require(require).keep_waiting();
    match random.below(4) {
        0 => (plain.max_backlog(2 + random.below(4) as usize), true),
        _ => (plain, false),
    }
}

fn send(builder: SenderBuilder, random: &mut Random, end: Instant) {
    let mut sender = builder.open().unwrap();
    let mut writing = Writing::new(random.below(u64::MAX));
    while Instant::now() < end {
        match writing.write(&mut sender, random, MOMENT) {
            Ok(()) => {}
            Err(Missing::Slot) => continue,
            // Then it is not there yet, or no more.
            Err(Missing::Receiver) => drop(sender.wait_for_receivers_timeout(1, MOMENT)),
        }
        if random.below(8) == 0 {
            // Until then there are more receivers, or there are not.
            let _ = sender.wait_for_receivers_timeout(usize::MAX, Duration::from_micros(random.below(1000)));
        }
    }
    // A receiver that keeps everything for ever does not exist here, but one that was killed does.
    while let Err(Missing::Slot) = writing.end(&mut sender, MOMENT) {}
}

fn receive((builder, skips): (ReceiverBuilder, bool), random: &mut Random, end: Instant) {
    let mut receiver = builder.open().unwrap();
    let mut heard = Heard::new(skips);
    let (keeps, mut kept) = (random.below(4) as usize, VecDeque::new());
    while Instant::now() < end {
        match receiver.get_timeout(MOMENT) {
            Ok(message) => {
                heard.hear(&message);
                kept.push_back(message);
            }
            // All slots may be kept, here and by others.
            Err(GetError::TimedOut) => kept.clear(),
            Err(GetError::Disconnected { peer }) => heard.forget(peer),
            Err(error) => panic!("{error}"),
        }
        while kept.len() > keeps {
            // Nobody writes what is kept.
            kept.pop_front().as_ref().map(message::check);
        }
    }
}
