//! What is exchanged: one channel for each way to protect messages, and messages that tell what they have to be.

use std::{collections::BTreeMap, fs::File, ops::Range, os::unix::fs::OpenOptionsExt};

use fbuf_client::{Client, GetError, Mechanism, Received, Receiver, Sender, SenderBuilder, Wait};
use nix::fcntl::OFlag;

use crate::support::{Random, slots};

/// How long a slot is.
const SLOT: usize = 512;
/// How many slots a receiver gives.
pub const OF_RECEIVER: usize = 4;
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
    /// Leased, in slots of the one receiver there can be: the first of the judges.
    OfJudge,
    /// The same, where that is the process that may be killed.
    OfActor,
}

/// Who has an end on a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Judge(usize),
    Actor,
}

impl Level {
    pub const ALL: [Self; 7] =
        [Self::Volatile, Self::Guarded, Self::Copied, Self::Leased, Self::Sealed, Self::OfJudge, Self::OfActor];

    pub fn channel(self) -> String {
        format!("{self:?}")
    }

    fn is_received_by(self, who: Who) -> bool {
        match self {
            Self::OfJudge => who == Who::Judge(0),
            Self::OfActor => who == Who::Actor,
            _ => true,
        }
    }

    /// How many receivers the judges have.
    pub fn judges(self) -> usize {
        [0, 1].into_iter().filter(|&judge| self.is_received_by(Who::Judge(judge))).count()
    }

    /// Whether its senders begin with less than they may have.
    pub fn grows(self) -> bool {
        matches!(self, Self::Volatile | Self::Guarded | Self::Copied)
    }

    pub fn sender(self, client: &Client) -> SenderBuilder {
        let sender = client.sender(&self.channel()).slot_size(SLOT);
        match self {
            Self::Volatile => sender.slots(4).grow_to(16),
            Self::Guarded => sender.slots(4).grow_to(16).guard(true),
            Self::Copied => sender.slots(4).grow_to(16).mechanism(Mechanism::Copy),
            Self::Leased => sender.slots(8).mechanism(Mechanism::Lease),
            Self::Sealed => sender.slots(16).mechanism(Mechanism::OneShot),
            Self::OfJudge | Self::OfActor => sender.slots(OF_RECEIVER).from_receiver(),
        }
    }
}

pub fn senders(client: &Client, wait: Wait) -> Vec<Sender> {
    Level::ALL.into_iter().map(|level| level.sender(client).wait(wait).open().unwrap()).collect()
}

/// Opens all slots of this process for writing, which breaks the leases on them, those of others as well; it does
/// not wait until they are given up.
pub fn break_leases() {
    let open = |path| File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    slots().into_iter().for_each(|path| drop(open(path)));
}

/// Fills and sends a message, of which length and bytes follow from its number; false if no slot is free, or
/// there is no receiver.
pub fn send(sender: &mut Sender, next: &mut u64) -> bool {
    let Ok(Some(mut fbuf)) = sender.try_allocate() else { return false };
    let length = (*next * 7919 % (SLOT as u64 + 1)) as usize;
    fbuf.set_len(length).unwrap();
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

/// The receiver of a channel. What came from each sender, by its endpoint: which messages, none of which is missing.
/// And those that are held.
#[derive(Debug)]
pub struct Listener {
    pub level: Level,
    pub receiver: Receiver,
    came: BTreeMap<u64, Range<u64>>,
    held: Vec<Received>,
    leased: u64,
}

pub fn listeners(client: &Client, wait: Wait, who: Who) -> Vec<Listener> {
    let levels = Level::ALL.into_iter().filter(|level| level.is_received_by(who));
    levels.map(|level| Listener::open(client, wait, level)).collect()
}

impl Listener {
    fn open(client: &Client, wait: Wait, level: Level) -> Self {
        let receiver = client.receiver(&level.channel()).keep_waiting().wait(wait).open().unwrap();
        Self { level, receiver, came: BTreeMap::new(), held: Vec::new(), leased: 0 }
    }

    /// Takes what there is, checks it, and holds on to some of it.
    pub fn empty(&mut self, random: &mut Random) {
        loop {
            match self.receiver.try_get() {
                Ok(Some(received)) => self.take(received, random),
                Ok(None) => return,
                // Somebody died.
                Err(GetError::Disconnected { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What came, by endpoint.
    pub fn all(&self) -> impl Iterator<Item = (&u64, &Range<u64>)> {
        self.came.iter()
    }

    /// What came from an endpoint.
    pub fn came(&self, endpoint: u64) -> Range<u64> {
        self.came.get(&endpoint).cloned().unwrap_or_default()
    }

    /// Forgets what came from others than these.
    pub fn forget_all_but(&mut self, endpoints: &[u64]) {
        self.came.retain(|endpoint, _| endpoints.contains(endpoint));
    }

    /// How many messages came that were leased.
    pub fn leased(&self) -> u64 {
        self.leased
    }

    /// Checks a message, and holds on to it or to one that came before.
    pub fn take(&mut self, received: Received, random: &mut Random) {
        check(&received);
        // From the first one on, none is missing.
        let sequence = received.sequence();
        let came = self.came.entry(received.sender().endpoint).or_insert(sequence..sequence);
        assert_eq!(sequence, came.end, "a message is missing, or came twice");
        came.end += 1;
        self.leased += u64::from(received.mechanism() == Mechanism::Lease);
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
