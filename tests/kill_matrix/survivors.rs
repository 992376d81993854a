//! Two senders and two receivers on each channel, or as many as there may be, which go on whichever process dies.

use std::ops::Range;

use fbuf_client::{Address, Client, DisconnectReason, Sender, Wait};

use crate::{
    actor::{Actor, Messages, Role},
    exchange::{Level, Listener, OF_RECEIVER, Who, break_leases, listeners, send, senders},
    support::{Random, SOON, until},
};

pub struct Survivors {
    _clients: [Client; 2],
    senders: [Vec<Sender>; 2],
    next: [Vec<u64>; 2],
    listeners: [Vec<Listener>; 2],
}

impl Survivors {
    pub fn start(broker: &Address) -> Self {
        let clients = [(); 2].map(|()| Client::connect_to(broker).unwrap());
        let listeners = [0, 1].map(|index| listeners(&clients[index], Wait::Adaptive, Who::Judge(index)));
        let mut senders = [0, 1].map(|index| senders(&clients[index], Wait::Adaptive));
        for (sender, level) in senders.iter_mut().flat_map(|senders| senders.iter_mut().zip(Level::ALL)) {
            sender.wait_for_receivers_timeout(level.judges(), SOON).unwrap();
            if level.grows() {
                // As many slots as it may have, so that what it holds does not change any more.
                drop(std::iter::from_fn(|| sender.try_allocate().unwrap()).collect::<Vec<_>>());
            }
        }
        let next = [(); 2].map(|()| vec![0; Level::ALL.len()]);
        Self { _clients: clients, senders, next, listeners }
    }

    /// Each sends a few messages, and takes what there is. Now and then all leases are broken.
    pub fn step(&mut self, random: &mut Random) {
        for (senders, next) in self.senders.iter_mut().zip(&mut self.next) {
            for (sender, next) in senders.iter_mut().zip(next) {
                for _ in 0..random.below(4) {
                    send(sender, next);
                }
                sender.poll_events();
                forgive(sender, None);
            }
        }
        self.receive(random);
        if random.below(20) == 0 {
            break_leases();
        }
    }

    fn receive(&mut self, random: &mut Random) {
        self.listeners.iter_mut().flatten().for_each(|listener| listener.empty(random));
    }

    /// Goes on until nobody here is linked with a process that has died.
    pub fn mourn(&mut self, dead: i32) {
        let mut random = Random(1);
        until("the dead one is heard of", || {
            self.receive(&mut random);
            let mut gone = true;
            for sender in self.senders.iter_mut().flatten() {
                sender.poll_events();
                forgive(sender, Some(dead));
                gone &= sender.peers().all(|peer| peer.process.pid != dead);
            }
            gone && self
                .listeners
                .iter()
                .flatten()
                .all(|listener| listener.receiver.peers().all(|peer| peer.process.pid != dead))
        });
    }

    /// Takes everything that is on its way, lets go of it, and looks whether every slot is back; also of the one that was
    /// not killed, which has got all that was sent here, and what the one that was killed owed to it.
    pub fn settle(&mut self, mut other: Option<(&mut Actor, &Messages)>) {
        let (mut random, mut checked) = (Random(1), other.is_none());
        until("every slot is back, and everything has come", || {
            self.receive(&mut random);
            if let Some((other, owed)) = &mut other
                && !checked
                && other.has_checked()
            {
                checked = other.role == Role::Sender || self.has_come(other.came(), owed);
                if !checked {
                    other.check();
                }
            }
            self.listeners.iter_mut().flatten().for_each(Listener::let_go);
            checked
                && self.senders.iter_mut().flatten().all(|sender| {
                    sender.poll_events();
                    let slots = sender.counters().slots;
                    slots.held == 0 && slots.lent == 0
                })
        });
        // What was sent here has come here, all of it.
        for (level, sender, next) in self.sent() {
            self.came(level, sender.endpoint()).for_each(|came| assert_eq!(came, 0..next));
        }
        let given = self.senders.iter_mut().map(|senders| &mut senders[Level::OfJudge as usize]);
        // So is the right to write each slot that was given.
        given.for_each(|sender| drop([(); OF_RECEIVER].map(|()| sender.allocate_timeout(SOON).unwrap())));
    }

    /// Each sender here, and how many messages it has sent.
    fn sent(&self) -> impl Iterator<Item = (Level, &Sender, u64)> {
        let senders = Level::ALL.into_iter().cycle().zip(self.senders.iter().flatten());
        senders.zip(self.next.iter().flatten()).map(|((level, sender), &next)| (level, sender, next))
    }

    /// Whether a receiver that has this message has got all that was sent here since, and what was owed to no other.
    fn has_come(&self, came: &Messages, owed: &Messages) -> bool {
        self.sent().all(|(level, sender, next)| {
            came.get(&(level as usize, sender.endpoint())).is_none_or(|came| came.end == next)
        }) && owed
            .iter()
            .filter(|((level, _), _)| *level == Level::OfActor as usize)
            .all(|(key, owed)| came.get(key).is_some_and(|came| came.start <= owed.start && owed.end <= came.end))
    }

    /// What came to each of the receivers of one level from an endpoint.
    fn came(&self, level: Level, endpoint: u64) -> impl Iterator<Item = Range<u64>> {
        self.of(level).map(move |listener| listener.came(endpoint))
    }

    fn of(&self, level: Level) -> impl Iterator<Item = &Listener> {
        self.listeners.iter().flatten().filter(move |listener| listener.level == level)
    }

    /// Goes on until every receiver here has got all that a process owed that has died. It may have sent while it was still
    /// about to be linked here.
    pub fn get(&mut self, owed: &Messages) {
        let mut random = Random(1);
        for (&(level, endpoint), owed) in owed {
            let level = Level::ALL[level];
            until(&format!("{level:?}: {owed:?} of {endpoint}"), || {
                self.receive(&mut random);
                self.came(level, endpoint).all(|came| came.start <= owed.start && owed.end <= came.end)
            });
        }
    }

    /// Forgets what came from processes that are dead.
    pub fn forget(&mut self) {
        let here: Vec<_> = self.senders.iter().flatten().map(Sender::endpoint).collect();
        self.listeners.iter_mut().flatten().for_each(|listener| listener.forget_all_but(&here));
    }

    /// How many messages came on the channel of a level that were leased.
    pub fn leased(&self, level: Level) -> u64 {
        self.of(level).map(Listener::leased).sum()
    }
}

/// No process leaves but those that are killed, and those that end a stream in order.
fn forgive(sender: &mut Sender, dead: Option<i32>) {
    while let Some(departure) = sender.next_departure() {
        let pid = departure.peer.process.pid;
        assert_eq!(departure.reason, DisconnectReason::Died, "process {pid}");
        assert!(dead.is_none_or(|dead| pid == dead), "process {pid} has gone, and {dead:?} was killed");
    }
}
