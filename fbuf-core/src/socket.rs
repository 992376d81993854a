//! A SOCK_SEQPACKET Unix socket: whole messages with descriptors, in order, and a hang-up when the
//! other side is gone. Knows no messages.

use std::{
    fmt,
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollEvent, EpollFlags},
        socket::{
            AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, send,
            sendmsg, setsockopt, socket, socketpair, sockopt,
        },
        time::TimeVal,
    },
};

use crate::{
    fork::Withheld,
    limits::{MAX_DESCRIPTORS, SEND_BUFFER},
    sys,
    wire::Letter,
};

#[cfg(miri)]
mod heap;

/// One end of a connection.
#[derive(Debug)]
pub struct PacketSocket(Withheld<OwnedFd>);

/// What came out of a socket.
#[derive(Debug)]
pub enum Arrival {
    /// A message: its bytes, and its descriptors.
    Message(Vec<u8>, Vec<OwnedFd>),
    /// One that was longer, or carried more descriptors, than any may; it is lost.
    TooLong,
    /// One with descriptors that this process has no room for. It comes again at the next look.
    NoDescriptors,
    /// Nothing now.
    Nothing,
    /// Nothing any more: the other side is gone.
    HangUp,
}

impl PacketSocket {
    /// Takes over a connected socket. It is made non-blocking.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        #[cfg(miri)]
        if heap::IS_USED {
            return Ok(Self(fd.into()));
        }
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(fd.into()))
    }

    /// Takes over what [`sys::accept`] returned, which is non-blocking already.
    #[must_use]
    pub fn accepted(fd: OwnedFd) -> Self {
        widen(&fd);
        Self(fd.into())
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
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        widen(&one);
        widen(&other);
        Ok((one, other))
    }

    /// Connects to a listening socket, waiting at most `patience` for a place in its queue.
    ///
    /// # Errors
    /// What connect(2) says; `WouldBlock` when patience ran out.
    pub fn connect(address: &UnixAddr, patience: Duration) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let limit = TimeVal::new(patience.as_secs().try_into().unwrap_or(i64::MAX), patience.subsec_micros().into());
        setsockopt(&fd, sockopt::SendTimeout, &limit)?;
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
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        widen(&fd);
        connect(fd.as_raw_fd(), address)?;
        Ok(Self(fd.into()))
    }

    /// The size of its send buffer, if that is smaller than [`SEND_BUFFER`]: then it may be full although the peer is honest.
    #[must_use]
    pub fn narrow(&self) -> Option<usize> {
        #[cfg(miri)]
        if heap::IS_USED {
            return None;
        }
        getsockopt(&self.0, sockopt::SndBuf).ok().filter(|&size| size < SEND_BUFFER)
    }

    /// How much of the send buffer is in use: what the peer has not read.
    #[must_use]
    pub fn unread(&self) -> usize {
        #[cfg(miri)]
        if heap::IS_USED {
            return 0;
        }
        sys::unread_bytes(self.0.as_fd()).unwrap_or(0)
    }

    /// Sends a message without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room now, `BrokenPipe` if the other side is gone; where a limit is in the way, it is
    /// named.
    pub fn send(&self, letter: &Letter) -> io::Result<()> {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::send(self.0.as_fd(), &letter.bytes, &letter.descriptors);
        }
        let raw: Vec<_> = letter.descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&letter.bytes)], control, flags, None) {
            Ok(_) => Ok(()),
            Err(Errno::ETOOMANYREFS) => Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "more descriptors of this user are on their way than one process may open (RLIMIT_NOFILE): \
                 raise `ulimit -n`, or let their receivers run",
            )),
            Err(Errno::EMSGSIZE) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "a message of {} bytes does not fit into the send buffer of {} bytes that the kernel grants: \
                     raise net.core.wmem_max",
                    letter.bytes.len(),
                    getsockopt(&self.0, sockopt::SndBuf).unwrap_or(0),
                ),
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a few bytes without waiting, and without allocating.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::send(self.0.as_fd(), bytes, &[]);
        }
        send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }

    /// Whether the other end is closed, perhaps with messages that were not received yet.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::has_hung_up(self.0.as_fd());
        }
        let mut this = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        // No error is possible for one descriptor and no time (poll(2)).
        poll(&mut this, PollTimeout::ZERO).is_ok()
            && this[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
    }

    /// Takes the next message, of at most `LONGEST` bytes, without waiting.
    ///
    /// # Errors
    /// What recvmsg(2) says, but for "nothing now" and "gone", which are [`Arrival`]s.
    pub fn receive<const LONGEST: usize>(&self) -> io::Result<Arrival> {
        self.receive_with::<LONGEST>(MAX_DESCRIPTORS)
    }

    /// As [`Self::receive`], where no message may carry more than so many descriptors.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub(crate) fn receive_few<const LONGEST: usize>(&self, most: usize) -> io::Result<Arrival> {
        self.receive_with::<LONGEST>(most)
    }

    /// As [`Self::receive`], where no message may carry a descriptor. One that does is too long, and its
    /// descriptors never are this process's: there is nothing to close, which can take long for files of a
    /// file system that is somebody's program.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_bytes<const LONGEST: usize>(&self) -> io::Result<Arrival> {
        self.receive_with::<LONGEST>(0)
    }

    fn receive_with<const LONGEST: usize>(&self, most: usize) -> io::Result<Arrival> {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::receive(self.0.as_fd(), LONGEST, most);
        }
        let mut buffer = [0; LONGEST];
        // The kernel drops a message together with the descriptors for which a process has no room. So a message that
        // may carry any is looked at first, and taken off only with all of them here.
        let mut receive = || match most {
            0 => sys::receive(self.0.as_fd(), &mut buffer),
            most => sys::peek(self.0.as_fd(), &mut buffer, most),
        };
        let received = match receive() {
            // Said once, and before what had been sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => receive(),
            received => received,
        };
        let lacks_room = |packet: &sys::Packet| packet.descriptors_lost && packet.descriptors.len() < most;
        if most > 0
            && let Ok(packet) = &received
            && (packet.truncated || !lacks_room(packet))
        {
            // What it carries is here, or too much, or nothing: the end, which stays.
            self.take_off()?;
        }
        match received {
            Ok(packet) if packet.truncated => Ok(Arrival::TooLong),
            Ok(packet) if lacks_room(&packet) => Ok(Arrival::NoDescriptors),
            Ok(packet) if packet.descriptors_lost => Ok(Arrival::TooLong),
            Ok(packet) if packet.length == 0 => Ok(Arrival::HangUp),
            Ok(packet) => Ok(Arrival::Message(buffer[..packet.length].to_vec(), packet.descriptors)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Arrival::Nothing),
                io::ErrorKind::ConnectionReset => Ok(Arrival::HangUp),
                _ => Err(error),
            },
        }
    }

    /// Takes off the message that was looked at. A reset that came in between is said first, and once.
    fn take_off(&self) -> io::Result<()> {
        let take = || recv(self.0.as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT);
        match take() {
            Err(Errno::ECONNRESET) => take()?,
            taken => taken?,
        };
        Ok(())
    }

    /// The groups of whoever is at the other end, the first one included, as noted then (SO_PEERGROUPS).
    ///
    /// # Errors
    /// What getsockopt(2) says.
    pub fn peer_groups(&self) -> io::Result<Vec<u32>> {
        let mut groups = sys::peer_groups(self.0.as_fd())?;
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
        let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO) == Ok(1)
            && polled[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }

    /// Who is at the other end, as the kernel noted it when the connection was made.
    ///
    /// # Errors
    /// What getsockopt(2) says.
    pub fn peer(&self) -> io::Result<Credentials> {
        let found = nix::sys::socket::getsockopt(&*self.0, nix::sys::socket::sockopt::PeerCredentials)?;
        Ok(Credentials { pid: found.pid(), uid: found.uid(), gid: found.gid() })
    }
}

/// The socket of a link, which can be watched by epoll(7), and with which nothing else can be done. A socket that other
/// code could shut down or read from would have the peer believe that this process has ended: a sender would use slots
/// again that are read here.
///
/// So neither half of a link lends its descriptor:
///
/// ```compile_fail,E0599
/// use std::os::fd::AsFd;
///
/// fn shut_down(link: &fbuf_core::inbound::Inbound) {
///     let _ = nix::sys::socket::shutdown(link.as_fd(), nix::sys::socket::Shutdown::Both);
/// }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct LinkSocket<'a>(&'a PacketSocket);

impl LinkSocket<'_> {
    /// Has an epoll tell of these events, with this data. It holds the socket no longer than the link does, but for what
    /// was received over it and is held: to be [ended](Self::unwatch) before.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn watch(self, epoll: &Epoll, events: EpollFlags, data: u64) -> io::Result<()> {
        Ok(epoll.add(self.0.0.as_fd(), EpollEvent::new(events, data))?)
    }

    /// Ends that.
    ///
    /// # Errors
    /// What epoll_ctl(2) says; also that it was not watched.
    pub fn unwatch(self, epoll: &Epoll) -> io::Result<()> {
        Ok(epoll.delete(self.0.0.as_fd())?)
    }
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

/// A process, as SO_PEERCRED names it (unix(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Credentials {
    /// Its process id; 0 if it lives in a PID namespace that cannot be seen from here.
    pub pid: i32,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
}

/// As errors name it.
impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => write!(f, "a process of user {} in another PID namespace", self.uid),
            pid => write!(f, "process {pid}"),
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(miri)]
impl Drop for PacketSocket {
    fn drop(&mut self) {
        heap::hang_up(self.0.as_fd());
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Whether an error of `send` means that the other side is gone.
#[must_use]
pub fn means_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN | Errno::ECONNREFUSED)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{MAX_DESCRIPTORS, MAX_MESSAGE};
    use std::sync::Arc;

    fn pair() -> (PacketSocket, PacketSocket) {
        let (a, b) = PacketSocket::pair().unwrap();
        (PacketSocket::new(a).unwrap(), PacketSocket::new(b).unwrap())
    }

    fn letter(bytes: usize, descriptors: usize) -> Letter {
        let fd = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        Letter { bytes: vec![7; bytes], descriptors: vec![fd; descriptors] }
    }

    #[test]
    fn the_largest_message_arrives_whole() {
        let (a, b) = pair();
        a.send(&letter(MAX_MESSAGE, MAX_DESCRIPTORS)).unwrap();
        let Arrival::Message(bytes, descriptors) = b.receive::<MAX_MESSAGE>().unwrap() else { panic!("no message") };
        assert_eq!((bytes.len(), descriptors.len()), (MAX_MESSAGE, MAX_DESCRIPTORS));
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Nothing));
    }

    #[test]
    fn a_longer_message_is_noticed_and_dropped() {
        let (a, b) = pair();
        a.send(&letter(MAX_MESSAGE + 1, 0)).unwrap();
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
        a.send(&letter(1, 253)).unwrap();
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
        a.send(&letter(1, 0)).unwrap();
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
    }

    #[test]
    fn descriptors_that_came_with_a_lost_message_are_closed() {
        let (a, b) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let writer = Arc::new(writer);
        a.send(&Letter { bytes: vec![7], descriptors: vec![writer.clone(); 253] }).unwrap();
        drop(writer);
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
        assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(0), "the writing end is still open somewhere");
    }

    #[test]
    fn what_was_sent_before_a_hang_up_arrives_before_it() {
        let (a, b) = pair();
        a.send(&letter(3, 1)).unwrap();
        drop(a);
        assert!(b.hung_up());
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::HangUp));
        assert!(means_gone(&b.send(&letter(1, 0)).unwrap_err()));
    }

    /// Who dies with something unread in its own socket resets that of the other side.
    #[test]
    fn what_was_sent_before_a_reset_arrives_before_it() {
        let (a, b) = pair();
        a.send(&letter(3, 1)).unwrap();
        b.send(&letter(4, 0)).unwrap();
        drop(a);
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::HangUp));
    }

    #[test]
    fn a_message_that_was_looked_at_before_a_reset_is_taken_off_after_it() {
        let (a, b) = pair();
        a.send(&letter(3, 1)).unwrap();
        b.send(&letter(4, 0)).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(sys::peek(b.as_fd(), &mut buffer, 1).unwrap().length, 3);
        drop(a);
        b.take_off().unwrap();
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::HangUp));
    }

    /// A pair with the smallest send buffers that the kernel makes, as under net.core.wmem_max=4608.
    fn narrow_pair() -> (PacketSocket, PacketSocket) {
        let (a, b) = pair();
        for socket in [&a, &b] {
            setsockopt(socket, sockopt::SndBuf, &0).unwrap();
        }
        (a, b)
    }

    #[test]
    fn small_send_buffers_are_widened() {
        let (socket, _other) = narrow_pair();
        assert!(socket.narrow().is_some_and(|size| size < MAX_MESSAGE));
        widen(&socket.0);
        assert_eq!(socket.narrow(), None);
        socket.send(&letter(MAX_MESSAGE, MAX_DESCRIPTORS)).unwrap();
    }

    #[test]
    fn a_message_that_a_send_buffer_cannot_take_is_told_which_limit_it_is() {
        let (a, _b) = narrow_pair();
        let error = a.send(&letter(MAX_MESSAGE, 0)).unwrap_err().to_string();
        assert!(error.contains("16384 bytes") && error.contains("net.core.wmem_max"), "{error}");
    }

    #[test]
    fn so_many_messages_with_a_descriptor_fit_as_are_reckoned() {
        let (a, _b) = pair();
        let sent = (0..).take_while(|_| a.send(&letter(16, 1)).is_ok()).count();
        assert!(sent >= SEND_BUFFER / crate::limits::MESSAGE_COST, "only {sent}");
        assert!(a.unread() >= SEND_BUFFER);
    }

    #[test]
    fn a_full_socket_says_so() {
        let (a, _b) = pair();
        let error = loop {
            if let Err(error) = a.send(&letter(MAX_MESSAGE, 0)) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
