//! What a broker has for one client, until it asks for it: introductions, and the wish for a report.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, Hasher, RandomState},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use fbuf_core::{
    introduced::Introduction,
    limits::{MAX_DESCRIPTORS, MAX_WAITING},
    process::deferred::{self, Cause},
    socket::waiters,
};
use fbuf_protocol::{MAX_INTRODUCTIONS, News};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::sync::Notify;

use super::lock;
use crate::{account::Charge, share::Holding};

/// Introductions on their way to one client.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    waiting: Mutex<VecDeque<(Introduction, Arc<Holding>)>>,
    filled: Notify,
    /// Whether somebody wants to know what the client's endpoints are doing.
    report: AtomicBool,
    sent: Mutex<Sent>,
}

impl Drop for Mailbox {
    /// The peers at the other ends see a hang-up at once, whatever they have sent; but for [slow](waiters) users, which another
    /// thread tells.
    fn drop(&mut self) {
        for (introduction, holding) in lock(&self.waiting).drain(..) {
            let user = introduction.peer.process.uid;
            let unsent = Unsent { introduction, _holding: holding };
            if waiters::is_slow(user) {
                deferred::drop_deferred(Cause::Peer(Some(user)), unsent);
            } else {
                waiters::measured(Some(user), || drop(unsent));
            }
        }
    }
}

/// An introduction that is not sent any more. Its socket hangs up when this is dropped.
struct Unsent {
    introduction: Introduction,
    _holding: Arc<Holding>,
}

impl Drop for Unsent {
    fn drop(&mut self) {
        let _ = shutdown(self.introduction.socket.as_fd().as_raw_fd(), Shutdown::Both);
    }
}

/// What a client was sent, and may not have read. What is under way in a socket takes up descriptors as well
/// (ETOOMANYREFS in sendmsg(2)), and only a client that reads it learns the receipt.
#[derive(Debug)]
struct Sent {
    receipt: u64,
    /// Whether the client was told of this receipt.
    is_told: bool,
    /// Descriptors of introductions.
    descriptors: usize,
    /// What is paid for others.
    charges: Vec<Arc<Charge>>,
    /// What introductions take of the broker's descriptors.
    holdings: Vec<Arc<Holding>>,
}

impl Default for Sent {
    fn default() -> Self {
        Self { receipt: 0, is_told: true, descriptors: 0, charges: Vec::new(), holdings: Vec::new() }
    }
}

impl Sent {
    /// Something more is sent, which the next receipt that the client is told shows to be read.
    fn renew(&mut self) {
        // Each of these is seeded anew.
        self.receipt = RandomState::new().build_hasher().finish();
        self.is_told = false;
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

    /// Waits until something is for the client.
    pub(super) async fn news(&self) -> News {
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

    /// The client has read what it was sent, if it knows the receipt. Whether that was anything.
    pub(super) fn acknowledge(&self, receipt: u64) -> bool {
        let mut sent = lock(&self.sent);
        let has_read = sent.receipt == receipt && (sent.descriptors > 0 || !sent.charges.is_empty());
        if has_read {
            sent.charges.clear();
            sent.holdings.clear();
            sent.descriptors = 0;
        }
        has_read
    }

    /// Something else is sent to the client, which is paid for until that has read it.
    pub(super) fn note_sent(&self, charge: Arc<Charge>) {
        let mut sent = lock(&self.sent);
        sent.renew();
        sent.charges.push(charge);
        self.filled.notify_one();
    }

    /// Whether one more introduction may be made ready.
    pub(super) fn has_room(&self) -> bool {
        let waiting = lock(&self.waiting).iter().map(|(one, _)| one.descriptors()).sum::<usize>();
        waiting + lock(&self.sent).descriptors < MAX_WAITING
    }

    /// Keeps an introduction until it is fetched, and what it takes of the broker's descriptors until it was read.
    pub(super) fn post(&self, introduction: Introduction, holding: Arc<Holding>) {
        lock(&self.waiting).push_back((introduction, holding));
        self.filled.notify_one();
    }

    /// Those that go into one message.
    fn fetch(&self) -> Vec<Introduction> {
        let mut waiting = lock(&self.waiting);
        let mut descriptors = 0;
        let fits = |(introduction, _): &&(Introduction, _)| {
            descriptors += introduction.descriptors();
            descriptors <= MAX_DESCRIPTORS
        };
        let count = waiting.iter().take(MAX_INTRODUCTIONS).take_while(fits).count();
        let (fetched, holdings): (Vec<_>, Vec<_>) = waiting.drain(..count).unzip();
        if count > 0 {
            let mut sent = lock(&self.sent);
            sent.renew();
            sent.descriptors += fetched.iter().map(Introduction::descriptors).sum::<usize>();
            sent.holdings.extend::<Vec<_>>(holdings);
        }
        fetched
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        policy::{Policy, User},
        share::Supply,
        state::State,
    };
    use fbuf_core::{
        peer::{Credentials, Peer},
        protection::Mechanism,
        receive::link::SlotSource,
        slot::GeometryTerms,
        socket::PacketSocket,
    };
    use fbuf_protocol::Resource;

    fn introduction() -> Introduction {
        let process = Credentials::new(1, 1000, 1000);
        let (socket, _) = PacketSocket::pair().unwrap();
        Introduction {
            endpoint: 1,
            peer: Peer::new(2, process).with_same_user(true).with_trusted(true),
            geometry: GeometryTerms::new(64, 4),
            mechanism: Mechanism::Shared,
            slot_source: SlotSource::Segments,
            socket: socket.into(),
        }
    }

    #[test]
    fn there_is_room_again_when_the_client_has_read() {
        let mailbox = Mailbox::default();
        let descriptors = Supply::new(1000, 0);
        let post = || mailbox.post(introduction(), descriptors.take(0, 1).unwrap().into());
        let fill = || (0..).take_while(|_| mailbox.has_room()).for_each(|_| post());
        fill();
        assert_eq!(lock(&mailbox.waiting).len(), MAX_WAITING);
        for _ in 0..=MAX_WAITING / MAX_INTRODUCTIONS {
            mailbox.fetch();
            // It asks again, and does not know what only a client that reads can know.
            mailbox.acknowledge(0);
        }
        assert!(lock(&mailbox.waiting).is_empty() && !mailbox.has_room());
        let receipt = lock(&mailbox.sent).receipt;
        mailbox.acknowledge(receipt);
        fill();
        assert_eq!(lock(&mailbox.waiting).len(), MAX_WAITING);
    }

    #[test]
    fn what_was_sent_is_paid_for_until_it_was_read() {
        let mut state = State::new(Policy::only(1000));
        let process = Credentials::new(1, 1000, 1000);
        let admission = state.admit(process, User::new(1000, Vec::new())).unwrap();
        let client = state.join(admission).unwrap();
        let held = |state: &State| state.used().any(|(_, resource, _)| resource == Resource::Links);
        let mailbox = Mailbox::default();
        mailbox.note_sent(Arc::new(state.charge_link(client).unwrap()));
        mailbox.acknowledge(0);
        assert!(held(&state));
        let (receipt, is_new) = lock(&mailbox.sent).tell();
        mailbox.acknowledge(receipt);
        assert!(is_new && !held(&state));
    }
}
