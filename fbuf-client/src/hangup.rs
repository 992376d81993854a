//! Tells endpoints at once that a peer has hung up.
//!
//! An endpoint that is busy looks at its sockets only now and then, and would send to a dead peer until then. The
//! control thread waits for hang-ups in its stead, and for nothing else of these sockets: it does not wake for a
//! bell, and no message costs more. It raises a flag that the endpoint reads with each message anyway, and notes which
//! link it is, so that a report is true although the endpoint's thread does something else.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use fbuf_core::{
    peer::LinkId,
    process::fork::{Generation, Withheld},
    process::sys::in_call,
    socket::LinkSocket,
};
use fbuf_protocol::runtime::{self, Witness};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What is told of a hang-up.
pub(crate) trait Alarm: Send + Sync {
    /// The peer of a link has hung up, or did so before. It need not be a link of this endpoint.
    fn raise(&self, link: LinkId);
}

/// The link sockets of all endpoints of a client, watched for hang-ups.
pub(crate) struct HangUps {
    generation: Generation,
    epoll: Withheld<Arc<Epoll>>,
    witness: Arc<Witness>,
    /// By the number under which the connection knows an endpoint.
    endpoints: Mutex<BTreeMap<u64, Weak<dyn Alarm>>>,
}

/// How many hang-ups are read at once; there may be more.
const EVENTS: usize = 32;

impl HangUps {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(in_call("epoll_create1"))?);
        let witness = Arc::new(Witness::new()?);
        Ok(Self { generation: Generation::current(), epoll: epoll.into(), witness, endpoints: Mutex::default() })
    }

    /// Whether the descriptors of this client are open. If not, other code of the program has closed descriptors that are not its own, as closefrom(3)
    /// does, and may have opened others in their place: of this client none can be used any more.
    pub(crate) fn is_open(&self) -> bool {
        self.witness.is_open()
    }

    /// Has an endpoint told of hang-ups until what is returned is dropped.
    pub(crate) fn watch(self: &Arc<Self>, endpoint: u64, alarm: &Arc<impl Alarm + 'static>) -> Watch {
        let alarm = Arc::downgrade(alarm);
        self.endpoints().insert(endpoint, alarm);
        Watch { hang_ups: self.clone(), endpoint }
    }

    /// Tells endpoints for as long as it is polled, on the control thread.
    pub(crate) async fn run(self: Arc<Self>) -> io::Result<()> {
        let epoll = runtime::watch_epoll(self.epoll.clone(), self.witness.clone())?;
        loop {
            epoll.readable().await?.clear_ready();
            while self.tell() == EVENTS {}
        }
    }

    /// Tells the endpoints of sockets that have hung up since the last time: how many sockets.
    fn tell(&self) -> usize {
        let mut events = [EpollEvent::empty(); EVENTS];
        // A signal, or nothing: what there is comes with the next call.
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        let endpoints: Vec<_> = match count {
            0 => Vec::new(),
            _ => self.endpoints().values().filter_map(Weak::upgrade).collect(),
        };
        for event in &events[..count] {
            // Both ends of a link may be of this client. One of them has hung up, and no longer knows the link.
            endpoints.iter().for_each(|endpoint| endpoint.raise(LinkId::from_bits(event.data())));
        }
        count
    }

    fn endpoints(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<dyn Alarm>>> {
        // A panic while it was locked cannot have left it half changed.
        self.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sockets of one endpoint among [`HangUps`].
pub(crate) struct Watch {
    hang_ups: Arc<HangUps>,
    endpoint: u64,
}

impl Watch {
    /// Open for as long as the descriptors of the client are.
    #[cfg(feature = "tokio")]
    pub(crate) fn witness(&self) -> &Arc<Witness> {
        &self.hang_ups.witness
    }

    pub(crate) fn add(&self, socket: LinkSocket<'_>, link: LinkId) -> io::Result<()> {
        // Each hang-up is told once. Data that arrives does not wake a thread that waits for these events only.
        socket.watch(&self.hang_ups.epoll, EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET, link.to_bits())
    }

    pub(crate) fn remove(&self, socket: LinkSocket<'_>) {
        // One that was never added cannot be removed, which is as well.
        let _ = socket.unwatch(&self.hang_ups.epoll);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // In a child that was forked, the lock may be held by a thread that is not there.
        if self.hang_ups.generation.is_current() {
            self.hang_ups.endpoints().remove(&self.endpoint);
        }
    }
}

impl std::fmt::Debug for HangUps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HangUps").field("epoll", &self.epoll).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use fbuf_core::socket::PacketSocket;

    use super::*;

    fn pair() -> (PacketSocket, PacketSocket) {
        let (own, its) = PacketSocket::pair().unwrap();
        (PacketSocket::new(own).unwrap(), PacketSocket::new(its).unwrap())
    }

    /// How often one link was told of.
    struct Count(LinkId, AtomicUsize);

    impl Count {
        fn of(link: u64) -> Arc<Self> {
            Arc::new(Self(LinkId::from_bits(link), AtomicUsize::new(0)))
        }
    }

    impl Alarm for Count {
        fn raise(&self, link: LinkId) {
            self.1.fetch_add(usize::from(self.0 == link), Ordering::Relaxed);
        }
    }

    #[test]
    fn a_hang_up_is_told_once_and_data_is_not() {
        let hang_ups = Arc::new(HangUps::new().unwrap());
        let (one, other) = (Count::of(1), Count::of(2));
        let [first, second] = [(1, &one), (2, &other)].map(|(number, count)| hang_ups.watch(number, count));
        let (own, peer) = pair();
        let (dead, its) = pair();
        drop(its);
        first.add(own.of_link(), one.0).unwrap();
        second.add(dead.of_link(), other.0).unwrap();
        let told = || (one.1.load(Ordering::Relaxed), other.1.load(Ordering::Relaxed));
        peer.send_bytes(b"bell").unwrap();
        assert_eq!((hang_ups.tell(), told()), (1, (0, 1)), "the peer had hung up before it was added");
        drop(peer);
        assert_eq!((hang_ups.tell(), told()), (1, (1, 1)));
        assert_eq!((hang_ups.tell(), told()), (0, (1, 1)));
        // No thread waits for an endpoint that is gone.
        drop(second);
        let (own, peer) = pair();
        first.add(own.of_link(), one.0).unwrap();
        first.remove(own.of_link());
        drop(peer);
        assert_eq!((hang_ups.tell(), told()), (0, (1, 1)));
    }
}
