//! A SOCK_SEQPACKET Unix socket: whole messages with descriptors, in order, and a hang-up when the
//! other side is gone. Knows no messages. Here it is decided when another thread (`relay`) makes the calls of one.
//!
//! The other side may send descriptors that take long to close ([`crate::process::deferred`]). A message that carries more than it
//! may is not even taken off the socket, since the kernel would have this thread close them; and a socket in which descriptors wait
//! is closed by another thread.

use std::{
    fmt,
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, connect, getsockopt, send,
            sendmsg, setsockopt, shutdown, socket, socketpair, sockopt,
        },
        time::TimeVal,
    },
};

use crate::{
    limits::{MAX_DESCRIPTORS, SEND_BUFFER},
    peer::{Credentials, Peer},
    process::{
        deferred::{self, Cause, DeferredDrop},
        fork::{Generation, Withheld},
        sys::{self, in_call},
    },
    socket::{shares::Share, under_way::Kind, wire::Letter},
};

mod closing;
#[doc(hidden)]
pub mod forms;
#[cfg(miri)]
mod heap;
pub mod link_message;
mod listening;
mod receiving;
pub(crate) mod relay;
pub mod shares;
pub(crate) mod under_way;
pub mod waiters;
mod watching;
pub mod wire;

use self::watching::Watch;
pub use self::{listening::Listening, receiving::Arrival, watching::LinkSocket};

/// Closes sockets of links that have ended which were only kept to see whether their peers receive what they were sent. To be
/// called now and then, also where no link ends.
pub fn close_received() {
    // Where Miri runs this, nothing is under way.
    if cfg!(not(miri)) {
        under_way::tidy();
    }
}

/// One end of a connection, of which this process has the only descriptor. When it is dropped, the other side sees a
/// hang-up at once.
#[derive(Debug)]
pub struct PacketSocket(DeferredDrop<Socket>);

#[derive(Debug)]
struct Socket {
    // Closed before the rest is dropped.
    descriptor: Arc<Withheld<OwnedFd>>,
    /// What is used in its place, once it is [relayed](relay).
    near: OnceLock<Arc<Withheld<OwnedFd>>>,
    generation: Generation,
    /// The user of the other side.
    user: Option<u32>,
    slowness: Slowness,
    /// Whether it is used no more.
    is_given_up: AtomicBool,
    has_hung_up: bool,
    /// Whether what is [under way](under_way) to that user is bounded.
    is_bounded: bool,
    /// Whether no message carries descriptors that may carry none, or the other side is of the same user.
    is_vetted: bool,
    /// What [watches](LinkSocket::watch) it.
    watched_by: Mutex<Vec<Watch>>,
    /// Held while a message is looked at and taken off, and while the socket is exchanged.
    reading: Mutex<()>,
    /// How many descriptors the next message may carry, as was asked last: a [relay](relay) takes no more off.
    takes: Arc<AtomicUsize>,
    /// Dropped when it is closed.
    kept: Vec<Arc<dyn fmt::Debug + Send + Sync>>,
}

/// What follows if the user of the other side is [slow](waiters).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slowness {
    /// Nothing: it is this user, or this thread is the one for that user.
    Borne,
    /// It is used no more, since it cannot be exchanged. The other side can connect again.
    Ends,
    /// It is [relayed](relay).
    IsRelayed,
}

impl From<OwnedFd> for PacketSocket {
    fn from(descriptor: OwnedFd) -> Self {
        Socket::new(Arc::new(descriptor.into())).into()
    }
}

impl From<Socket> for PacketSocket {
    fn from(socket: Socket) -> Self {
        Self(socket.into())
    }
}

impl Socket {
    fn new(descriptor: Arc<Withheld<OwnedFd>>) -> Self {
        Self {
            descriptor,
            near: OnceLock::new(),
            generation: Generation::current(),
            user: None,
            slowness: Slowness::Borne,
            is_given_up: AtomicBool::new(false),
            has_hung_up: false,
            is_bounded: false,
            is_vetted: false,
            watched_by: Mutex::default(),
            reading: Mutex::default(),
            takes: Arc::new(MAX_DESCRIPTORS.into()),
            kept: Vec::new(),
        }
    }

    /// What is used just now.
    fn descriptor(&self) -> &Arc<Withheld<OwnedFd>> {
        self.near.get().unwrap_or(&self.descriptor)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.descriptor().as_fd()
    }

    fn watchers(&self) -> MutexGuard<'_, Vec<Watch>> {
        // Nothing panics while it is locked.
        self.watched_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it not be exchanged meanwhile, if it may be.
    fn lock_reading(&self) -> Option<MutexGuard<'_, ()>> {
        let may_be_exchanged = self.slowness == Slowness::IsRelayed;
        // Nothing panics while it is locked.
        may_be_exchanged.then(|| self.reading.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The user of the other side, if calls of the socket that is used are measured.
    fn measured_user(&self) -> Option<u32> {
        // Where Miri runs this, there are no such calls.
        self.user.filter(|_| self.slowness != Slowness::Borne && self.near.get().is_none() && cfg!(not(miri)))
    }

    /// Whether calls of the socket that is used may take long.
    fn is_slow(&self) -> bool {
        self.measured_user().is_some_and(waiters::is_slow)
    }

    /// Sees to it that calls do not take long, where the user of the other side is [slow](waiters).
    ///
    /// # Errors
    /// It is used no more. The other side sees a hang-up.
    fn make_ready(&self) -> io::Result<()> {
        // Relaxed: nothing else is told by it.
        if self.is_given_up.load(Ordering::Relaxed) {
            return Err(given_up());
        }
        let Some(user) = self.measured_user().filter(|&user| waiters::is_slow(user)) else { return Ok(()) };
        if self.slowness == Slowness::IsRelayed && self.exchange(user).is_ok() {
            return Ok(());
        }
        if !self.is_given_up.swap(true, Ordering::Relaxed) {
            deferred::drop_deferred(Cause::Peer(Some(user)), HangUp(self.descriptor.clone()));
        }
        Err(given_up())
    }

    /// Exchanges the socket for the near end of a relay; but not while another thread reads, whose next call does it.
    fn exchange(&self, user: u32) -> io::Result<()> {
        let Ok(_reading) = self.reading.try_lock() else { return Ok(()) };
        let watchers = self.watchers();
        if self.near.get().is_some() {
            return Ok(());
        }
        let pair = relay::Pair::new(user, None)?;
        for watch in watchers.iter() {
            watch.begin(pair.near.as_fd())?;
        }
        // Before anything is taken off the other. Nobody else sets it, under the lock.
        let _ = self.near.set(pair.near.clone());
        watchers.iter().for_each(|watch| watch.end(self.descriptor.as_fd()));
        relay::begin(user, self.far(), pair)
    }

    /// The same socket, for the thread that makes its calls.
    fn far(&self) -> PacketSocket {
        let mut far = Self::new(self.descriptor.clone());
        (far.user, far.is_bounded, far.kept) = (self.user, self.is_bounded, self.kept.clone());
        far.takes = self.takes.clone();
        far.into()
    }

    /// Does what may [take long](waiters).
    fn measured<T>(&self, call: impl FnOnce() -> T) -> T {
        waiters::measured(self.measured_user(), call)
    }

    /// The user of the other side, if what is under way to it is bounded.
    fn bounded(&self) -> Option<u32> {
        self.user.filter(|_| self.is_bounded)
    }
}

impl PacketSocket {
    /// Takes over a connected socket. It is made non-blocking.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        #[cfg(miri)]
        if heap::IS_USED {
            return Ok(fd.into());
        }
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        // From here on it is closed apart.
        let socket = Self::from(fd);
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL).map_err(in_call("fcntl"))?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(in_call("fcntl"))?;
        Ok(socket)
    }

    /// Takes over what [`sys::accept`] returned, which is non-blocking already. No descriptors can be sent to it, where
    /// [the kernel can refuse them](sys::refuse_descriptors).
    #[must_use]
    pub fn accepted(fd: OwnedFd) -> Self {
        widen(&fd);
        let mut socket = Self::from(fd);
        // If its listener refuses them, none has come before either.
        socket.0.is_vetted = sys::refuses_descriptors(socket.as_fd());
        if !socket.0.is_vetted {
            // A kernel that cannot is none that has to.
            let _ = sys::refuse_descriptors(socket.as_fd());
        }
        socket
    }

    /// The same, where a process of this user is at the other side, which may be the user of this process.
    #[must_use]
    pub fn with_peer(mut self, user: u32, is_own: bool) -> Self {
        self.0.user = Some(user);
        self.0.slowness = if is_own { Slowness::Borne } else { Slowness::Ends };
        self.0.is_vetted |= is_own;
        self
    }

    /// The same; relayed, if the user of the other side is [slow](waiters) just now.
    ///
    /// # Errors
    /// It cannot be: that user has its share of descriptors, or there is no descriptor or thread for it.
    pub fn relayed_if_slow(mut self) -> io::Result<Self> {
        let Some(user) = self.0.measured_user().filter(|&user| waiters::is_slow(user)) else { return Ok(self) };
        let share = Share::take(user, shares::OF_RELAY).ok_or(io::ErrorKind::QuotaExceeded)?;
        let pair = relay::Pair::new(user, Some(share))?;
        let mut near = Socket::new(pair.near.clone());
        (near.user, near.is_vetted, near.kept) = (self.0.user, self.0.is_vetted, self.0.kept.clone());
        self.0.slowness = Slowness::Borne;
        // What is not a link's may carry none.
        (near.takes, self.0.takes) = Default::default();
        relay::begin(user, self, pair)?;
        Ok(near.into())
    }

    /// The same, of a link with this peer.
    #[must_use]
    pub(crate) fn of_link_with(self, peer: &Peer) -> Self {
        let mut this = self.with_peer(peer.process.uid, peer.same_user);
        if this.0.slowness == Slowness::Ends {
            this.0.slowness = Slowness::IsRelayed;
        }
        // Where Miri runs this, nothing is under way.
        this.0.is_bounded = cfg!(not(miri)) && shares::bounded(peer).is_some();
        this
    }

    /// Whether it is used no more, since calls of it [take long](waiters). The other side sees a hang-up.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        // Relaxed: nothing else is told by it.
        self.0.is_given_up.load(Ordering::Relaxed)
    }

    /// Whether so many descriptors more can be sent now, as far as is [known](under_way).
    #[must_use]
    pub(crate) fn has_room(&self, descriptors: impl FnOnce() -> usize, kind: Kind) -> bool {
        !under_way::would_be_refused(kind)
            && self.0.bounded().is_none_or(|user| under_way::has_room(user, descriptors(), kind))
    }

    /// The same, with something that is dropped when it is closed, by whatever thread.
    #[must_use]
    pub fn with(mut self, kept: impl fmt::Debug + Send + Sync + 'static) -> Self {
        self.0.kept.push(Arc::new(kept));
        self
    }

    /// Two ends of one connection.
    ///
    /// # Errors
    /// What socketpair(2) says.
    pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::pair();
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        let (one, other) = pair.map_err(in_call("socketpair"))?;
        widen(&one);
        widen(&other);
        Ok((one, other))
    }

    /// Connects to a listening socket, waiting at most `patience` for a place in its queue.
    ///
    /// # Errors
    /// What connect(2) says; `WouldBlock` when patience ran out.
    pub fn connect(address: &UnixAddr, patience: Duration) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(in_call("socket"))?;
        let limit = TimeVal::new(patience.as_secs().try_into().unwrap_or(i64::MAX), patience.subsec_micros().into());
        setsockopt(&fd, sockopt::SendTimeout, &limit).map_err(in_call("setsockopt"))?;
        widen(&fd);
        connect(fd.as_raw_fd(), address)?;
        Self::new(fd)
    }

    /// Connects to a listening socket, if there is a place in its queue.
    ///
    /// # Errors
    /// What connect(2) says; `WouldBlock` when there is none.
    pub fn connect_at_once(address: &UnixAddr) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(in_call("socket"))?;
        widen(&fd);
        connect(fd.as_raw_fd(), address)?;
        Ok(fd.into())
    }

    /// The size of its send buffer, if that is smaller than [`SEND_BUFFER`]: then it may be full although the peer is honest.
    #[must_use]
    pub fn narrow(&self) -> Option<usize> {
        #[cfg(miri)]
        if heap::IS_USED {
            return None;
        }
        getsockopt(&self.0.fd(), sockopt::SndBuf).ok().filter(|&size| size < SEND_BUFFER)
    }

    /// How much of the send buffer is in use: what the peer has not read.
    #[must_use]
    pub fn unread(&self) -> usize {
        #[cfg(miri)]
        if heap::IS_USED {
            return 0;
        }
        sys::unread_bytes(self.0.fd()).unwrap_or(0)
    }

    /// Sends a message without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room now, `BrokenPipe` if the other side is gone; where a limit is in the way, it is
    /// named.
    pub fn send(&self, letter: &Letter) -> io::Result<()> {
        self.send_as(letter, Kind::Other)
    }

    /// As [`Self::send`]. `QuotaExceeded` also if too many descriptors of this kind are under way to the user of the other
    /// side.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(crate) fn send_as(&self, letter: &Letter, kind: Kind) -> io::Result<()> {
        let descriptors = letter.descriptors.len();
        let Some(user) = self.0.bounded().filter(|_| descriptors > 0) else { return self.send_at_once(letter, kind) };
        self.0.make_ready()?;
        under_way::send(user, self.0.descriptor(), descriptors, kind, || self.send_at_once(letter, kind))
    }

    /// As [`Self::send`], of what was [under way](under_way) before, and so may be.
    fn send_on(&self, letter: &Letter) -> io::Result<()> {
        let descriptors = letter.descriptors.len();
        let send = || self.send_at_once(letter, Kind::Other);
        let Some(user) = self.0.bounded().filter(|_| descriptors > 0) else { return send() };
        under_way::send_on(user, &self.0.descriptor, descriptors, send)
    }

    fn send_at_once(&self, letter: &Letter, kind: Kind) -> io::Result<()> {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::send(self.0.fd(), &letter.bytes, &letter.descriptors);
        }
        let raw: Vec<_> = letter.descriptors.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        self.0.make_ready()?;
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let send = || sendmsg::<()>(self.0.fd().as_raw_fd(), &[IoSlice::new(&letter.bytes)], control, flags, None);
        match self.0.measured(send) {
            Ok(_) => Ok(()),
            Err(Errno::ETOOMANYREFS) => {
                under_way::note_refusal(kind);
                Err(io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    "more descriptors of this user are on their way than one process may open (RLIMIT_NOFILE): \
                     raise `ulimit -n`, or let their receivers run",
                ))
            }
            Err(Errno::EMSGSIZE) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "a message of {} bytes does not fit into the send buffer of {} bytes that the kernel grants: \
                     raise net.core.wmem_max",
                    letter.bytes.len(),
                    getsockopt(&self.0.fd(), sockopt::SndBuf).unwrap_or(0),
                ),
            )),
            Err(error) => Err(unsent("sendmsg", error)),
        }
    }

    /// Sends a few bytes without waiting, and without allocating.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::send(self.0.fd(), bytes, &[]);
        }
        self.0.make_ready()?;
        let send = || send(self.0.fd().as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
        self.0.measured(send).map(drop).map_err(|error| unsent("sendto", error))
    }

    /// Whether the other end is closed, perhaps with messages that were not received yet.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::has_hung_up(self.0.fd());
        }
        let mut this = [PollFd::new(self.0.fd(), PollFlags::empty())];
        // No error is possible for one descriptor and no time (poll(2)).
        poll(&mut this, PollTimeout::ZERO).is_ok()
            && this[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
    }

    /// Whether the other end is closed, and nothing waits to be received.
    #[must_use]
    pub(crate) fn has_ended(&self) -> bool {
        let _same = self.0.lock_reading();
        self.has_hung_up() && self.is_drained()
    }

    /// Whether nothing waits to be received. Only of a socket that has hung up that stays so.
    fn is_drained(&self) -> bool {
        let mut byte = [0];
        let mut look = || sys::peek(self.0.fd(), &mut byte, 0);
        let looked = match look() {
            // Said once, and before what had been sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => look(),
            looked => looked,
        };
        match looked {
            Ok(packet) => packet.length == 0,
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionReset),
        }
    }

    /// The groups of the process at the other end, the first one included, as noted then (SO_PEERGROUPS).
    ///
    /// # Errors
    /// What getsockopt(2) says; `ERANGE` also if there are more than [`MAX_GROUPS`](crate::limits::MAX_GROUPS) beside the first.
    pub fn peer_groups(&self) -> io::Result<Vec<u32>> {
        let mut groups = sys::peer_groups(self.as_fd())?;
        groups.push(self.peer()?.gid);
        Ok(groups)
    }

    /// As other code may have it, if it is the socket of a link.
    #[must_use]
    pub fn of_link(&self) -> LinkSocket<'_> {
        LinkSocket(self)
    }

    /// Whether the other side is gone, as far as can be told without reading.
    #[must_use]
    pub fn hung_up(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut polled = [PollFd::new(self.0.fd(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO) == Ok(1)
            && polled[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }

    /// The process at the other end, as the kernel noted it when the connection was made.
    ///
    /// # Errors
    /// What getsockopt(2) says.
    pub fn peer(&self) -> io::Result<Credentials> {
        let found = getsockopt(self, sockopt::PeerCredentials).map_err(in_call("getsockopt"))?;
        Ok(Credentials { pid: found.pid(), uid: found.uid(), gid: found.gid() })
    }
}

/// Hangs up, when it is dropped.
#[derive(Debug)]
struct HangUp(Arc<Withheld<OwnedFd>>);

impl Drop for HangUp {
    fn drop(&mut self) {
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

/// What a call says by which nothing was sent. That there is no room now is said often, and needs no name.
fn unsent(call: &'static str, error: Errno) -> io::Error {
    if error == Errno::EAGAIN { error.into() } else { in_call(call)(error) }
}

/// What calls of a socket say that is [given up](PacketSocket::is_given_up).
fn given_up() -> io::Error {
    let text = "very many wait at the other end of the socket, or at others of its user, so that each call takes long, and this \
                process has no thread or descriptor left to make them apart: the socket is used no more";
    io::Error::new(io::ErrorKind::ConnectionAborted, text)
}

/// The id that stands for users that have none in this user namespace (kernel.overflowuid in proc(5)).
pub const NO_ID: u32 = 65_534;

/// Has a socket take as much as may have to wait in it, where net.core.wmem_default gives it less: as far as
/// net.core.wmem_max, or this process's rights (CAP_NET_ADMIN), permit.
fn widen(socket: &OwnedFd) {
    if getsockopt(socket, sockopt::SndBuf).is_ok_and(|size| size < SEND_BUFFER) {
        // The kernel doubles what it is asked for (socket(7)). What it refuses shows in `PacketSocket::narrow`.
        let wanted = SEND_BUFFER / 2;
        if setsockopt(socket, sockopt::SndBufForce, &wanted).is_err() {
            let _ = setsockopt(socket, sockopt::SndBuf, &wanted);
        }
    }
}

/// The descriptor that it was made of, also where another is used, since it is relayed.
impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.descriptor.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> i32 {
        self.0.descriptor.as_raw_fd()
    }
}

/// Whether an error of `send` means that the other side is gone.
#[must_use]
pub fn means_gone(error: &io::Error) -> bool {
    matches!(sys::os_error(error), Some(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN | Errno::ECONNREFUSED))
}

#[cfg(test)]
pub(crate) mod tests;
