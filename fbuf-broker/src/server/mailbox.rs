//! What a broker has for one client, until it asks for it: introductions, and the wish for a report.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use fbuf_core::{
    control::{Introduction, MAX_INTRODUCTIONS, News},
    limits::{MAX_DESCRIPTORS, MAX_WAITING},
};
use tokio::sync::Notify;

use super::lock;
use crate::account::Charge;

/// Introductions on their way to one client.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    waiting: Mutex<VecDeque<(Introduction, Arc<Charge>)>>,
    filled: Notify,
    /// Whether somebody wants to know what the client's endpoints are doing.
    report: AtomicBool,
    /// Notified when the client has to go.
    overfull: Notify,
    sent: Mutex<Sent>,
}

/// What a client was sent, and may not have read. What is under way in a socket takes up descriptors as well
/// (ETOOMANYREFS in sendmsg(2)), and only who reads it learns the receipt.
#[derive(Debug)]
struct Sent {
    receipt: u64,
    /// Whether the client was told of this receipt.
    is_told: bool,
    charges: Vec<Arc<Charge>>,
}

impl Default for Sent {
    fn default() -> Self {
        Self { receipt: 0, is_told: true, charges: Vec::new() }
    }
}

impl Sent {
    /// Something more is sent, which the next receipt that the client is told shows to be read.
    fn add(&mut self, charges: impl IntoIterator<Item = Arc<Charge>>) {
        // Each of these is seeded anew.
        self.receipt = RandomState::new().build_hasher().finish();
        self.is_told = false;
        self.charges.extend(charges);
    }

    /// The receipt that the client is told now, and whether it was not told before.
    fn tell(&mut self) -> (u64, bool) {
        (self.receipt, !std::mem::replace(&mut self.is_told, true))
    }
}

impl Mailbox {
    /// Has the client report.
    pub(super) fn ask(&self) {
        self.report.store(true, Ordering::Relaxed);
        self.filled.notify_one();
    }

    /// Waits until something is for the client, who has read what was sent before if it knows the receipt.
    pub(super) async fn news(&self, receipt: u64) -> News {
        self.acknowledge(receipt);
        loop {
            let filled = self.filled.notified();
            let introductions = self.fetch();
            let report = self.report.swap(false, Ordering::Relaxed);
            let (receipt, is_new) = lock(&self.sent).tell();
            if report || !introductions.is_empty() || is_new {
                return News { introductions, report, receipt };
            }
            filled.await;
        }
    }

    /// Waits until the client has to go.
    pub(super) async fn overflow(&self) {
        self.overfull.notified().await;
    }

    /// The client has read what it was sent, if it knows the receipt.
    fn acknowledge(&self, receipt: u64) {
        let mut sent = lock(&self.sent);
        if sent.receipt == receipt {
            sent.charges.clear();
        }
    }

    /// Something else is sent to the client, which is paid for until that has read it.
    pub(super) fn note_sent(&self, charge: Arc<Charge>) {
        lock(&self.sent).add([charge]);
        self.filled.notify_one();
    }

    /// Keeps an introduction until it is fetched, if that is paid for.
    pub(super) fn post(&self, introduction: Introduction, charge: Option<Charge>) {
        let mut waiting = lock(&self.waiting);
        match charge {
            Some(charge) if waiting.len() < MAX_WAITING => {
                waiting.push_back((introduction, Arc::new(charge)));
                self.filled.notify_one();
            }
            _ => self.overfull.notify_one(),
        }
    }

    /// Those that go into one message.
    fn fetch(&self) -> Vec<Introduction> {
        let mut waiting = lock(&self.waiting);
        let mut descriptors = 0;
        let fits = |(introduction, _): &&(Introduction, Arc<Charge>)| {
            descriptors += introduction.descriptors();
            descriptors <= MAX_DESCRIPTORS
        };
        let count = waiting.iter().take(MAX_INTRODUCTIONS).take_while(fits).count();
        let (fetched, charges): (Vec<_>, Vec<_>) = waiting.drain(..count).unzip();
        if count > 0 {
            lock(&self.sent).add(charges);
        }
        fetched
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        policy::{Policy, User},
        state::State,
    };
    use fbuf_core::{
        control::{Lodging, Resource},
        inbound::Peer,
        protection::Mechanism,
        socket::{Credentials, PacketSocket},
    };

    fn introduction() -> Introduction {
        let process = Credentials { pid: 1, uid: 1000, gid: 1000 };
        let (socket, _) = PacketSocket::pair().unwrap();
        Introduction {
            endpoint: 1,
            peer: Peer { endpoint: 2, process, same_user: true },
            slot_bytes: 64,
            max_slots: 4,
            mechanism: Mechanism::Shared,
            lodging: Lodging::Segments,
            socket: socket.into(),
        }
    }

    #[test]
    fn what_was_sent_is_paid_for_until_it_was_read() {
        let mut state = State::new(Policy::only(1000), 0);
        let process = Credentials { pid: 1, uid: 1000, gid: 1000 };
        let admission = state.admit(process, User { id: 1000, groups: Vec::new() }).unwrap();
        let client = state.join(admission).unwrap();
        let held = |state: &State| {
            let descriptors = state.used().find(|&(_, resource, _)| resource == Resource::Descriptors);
            descriptors.map_or(0, |(_, _, used)| used)
        };
        let mailbox = Mailbox::default();
        for sent in 1..=3 {
            mailbox.post(introduction(), state.charge_descriptors(client, 1));
            assert_eq!((mailbox.fetch().len(), held(&state)), (1, sent));
            // It asks again, and does not know what only who reads can know.
            mailbox.acknowledge(0);
        }
        assert_eq!(held(&state), 3);
        let receipt = lock(&mailbox.sent).receipt;
        mailbox.acknowledge(receipt);
        assert_eq!(held(&state), 0);
    }
}
