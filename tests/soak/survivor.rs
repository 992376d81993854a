//! Senders and receivers that stay: threads of the process that tests, which check all that they get.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use fbuf_client::{Client, GetError, Mechanism, Receiver, Sender};

use crate::{
    message::{Heard, Missing, Writing},
    support::{Random, SOON, until},
};

/// How long a thread that rests sleeps before it looks around.
const MOMENT: Duration = Duration::from_millis(5);

/// The channels that stay, and what is sent on each all the time.
pub const CHANNELS: [(&str, &[Mechanism]); 3] = [
    ("volatile", &[Mechanism::Shared, Mechanism::Copy]),
    ("leased", &[Mechanism::Lease]),
    ("sealed", &[Mechanism::OneShot, Mechanism::Copy]),
];

/// What the threads and the one that watches them say to each other.
#[derive(Debug, Default)]
struct Orders {
    rest: AtomicBool,
    end: AtomicBool,
    /// Senders that rest: everything that they have sent is back.
    resting: AtomicUsize,
}

/// All of them.
#[derive(Debug)]
pub struct Survivors {
    orders: Arc<Orders>,
    senders: Vec<JoinHandle<()>>,
    receivers: Vec<JoinHandle<(u64, u64)>>,
    /// How many senders each receiver is in the middle of, and how many of them survive.
    unfinished: Vec<(Arc<AtomicUsize>, usize)>,
}

impl Survivors {
    pub fn start(client: &Client, random: &mut Random) -> Self {
        let mut all =
            Self { orders: Arc::default(), senders: Vec::new(), receivers: Vec::new(), unfinished: Vec::new() };
        for (channel, mechanisms) in CHANNELS {
            let (receiver, unfinished) = (client.receiver(channel).keep_waiting().open().unwrap(), Arc::default());
            let (orders, count) = (all.orders.clone(), Arc::clone(&unfinished));
            all.receivers.push(thread::spawn(move || receive(receiver, &orders, &count)));
            all.unfinished.push((unfinished, mechanisms.len()));
            for &mechanism in mechanisms {
                let mut sender =
                    client.sender(channel).mechanism(mechanism).slot_size(64 << 10).slots(8).open().unwrap();
                sender.wait_for_receivers_timeout(1, SOON).unwrap();
                let (orders, random) = (all.orders.clone(), Random(random.below(u64::MAX) | 1));
                all.senders.push(thread::spawn(move || send(sender, random, &orders)));
            }
        }
        all
    }

    /// Lets nothing be under way, and waits until every sender that is no more was heard to its end.
    pub fn rest(&self) {
        self.orders.rest.store(true, Relaxed);
        let all = self.senders.len();
        until("everything that was sent is back", || self.orders.resting.load(Relaxed) == all);
        let finished = || self.unfinished.iter().all(|(count, stay)| count.load(Relaxed) == *stay);
        until("every sender that went was heard to its end, and those that stay are heard", finished);
    }

    /// Ends what [`Self::rest`] began.
    pub fn go_on(&self) {
        self.orders.rest.store(false, Relaxed);
        until("senders send", || self.orders.resting.load(Relaxed) == 0);
    }

    /// Ends all: how many messages were received, and how many bytes.
    pub fn end(self) -> (u64, u64) {
        self.orders.end.store(true, Relaxed);
        self.senders.into_iter().for_each(|sender| sender.join().unwrap());
        let heard = self.receivers.into_iter().map(|receiver| receiver.join().unwrap());
        heard.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }
}

fn send(mut sender: Sender, mut random: Random, orders: &Orders) {
    let mut writing = Writing::new(random.below(u64::MAX));
    while !orders.end.load(Relaxed) {
        if orders.rest.load(Relaxed) {
            sender.wait_for_returns_timeout(SOON).unwrap();
            orders.resting.fetch_add(1, Relaxed);
            while orders.rest.load(Relaxed) {
                // Only receivers come and go meanwhile, and it hears so of them.
                let _ = sender.wait_for_receivers_timeout(usize::MAX, MOMENT);
            }
            orders.resting.fetch_sub(1, Relaxed);
        }
        writing.write(&mut sender, &mut random, SOON).unwrap();
        while sender.next_departure().is_some() {}
        // It goes on when a receiver has come, or after a while.
        let _ = sender.wait_for_receivers_timeout(usize::MAX, Duration::from_micros(random.below(2000)));
    }
    assert_ne!(writing.end(&mut sender, SOON), Err(Missing::Receiver));
}

fn receive(mut receiver: Receiver, orders: &Orders, unfinished: &AtomicUsize) -> (u64, u64) {
    let mut heard = Heard::new(false);
    loop {
        match receiver.get_timeout(MOMENT) {
            Ok(message) => heard.hear(&message),
            Err(GetError::Disconnected { peer }) => heard.forget(peer),
            Err(GetError::TimedOut) if orders.end.load(Relaxed) && heard.unfinished() == 0 => {
                return (heard.messages, heard.bytes);
            }
            Err(GetError::TimedOut) => {}
            Err(error) => panic!("{error}"),
        }
        unfinished.store(heard.unfinished(), Relaxed);
    }
}
