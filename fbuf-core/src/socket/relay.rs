//! Sockets of [slow](super::waiters) users: another thread makes the calls of them.
//!
//! The socket is exchanged for one end of a pair, the *near* socket. The thread of its user, which is called `fbuf-relay`, takes what comes
//! over the other end and sends it over the socket, the *far* one, and the other way round: messages with their descriptors, in
//! order, and the hang-up behind the last of them. What has no room stays where it is, so that a peer that does not read holds up the
//! near end as it would the far one, with one socket buffer more.
//!
//! Nothing is held in between: a message is looked at, sent, and only then taken off, with no more descriptors than the near end [asked
//! for](PacketSocket::look) last. Those that wait in the pair this user has sent, as far as the kernel knows, so they are
//! [counted](super::under_way) as those that it is to receive.
//!
//! The two descriptors that a relay takes are a part of the [share](super::shares) of the peer's user, which each link reserves. The
//! thread takes a quarter of a processor at most, beside a tenth of a second.

use std::{
    collections::BTreeMap,
    io, mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
    thread::sleep,
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::{
    Arrival, PacketSocket, Socket, means_gone,
    shares::{OF_RELAY, Share},
    under_way::Kind,
    waiters::{Debt, used},
    wire::Letter,
};
use crate::{
    limits::{MAX_AT_ONCE, MAX_MESSAGE},
    process::{
        deferred,
        fork::{ForkMutex, Rank, Withheld},
        sys, threads,
    },
    wait::now,
};

/// When something is tried again that fails for want of memory or descriptors.
const LATER: Duration = Duration::from_millis(10);
/// Of so many parts of a processor, a thread takes one,
const PART: u32 = 4;
/// beside so much.
const BURST: Duration = Duration::from_millis(100);

/// One of the two ways between a socket and the near end.
#[derive(Debug, Default)]
struct Way {
    /// How many descriptors the first message carries that waits, if it was refused for that.
    refused: usize,
    /// Whether nothing can be sent any more.
    is_closed: bool,
}

/// What has to be before a way goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Another message comes.
    Input,
    /// There is room.
    Room,
    /// Some time passes.
    Later,
    /// Nothing is carried any more.
    Never,
    /// All that came was sent, and nothing comes any more.
    Over,
}

impl Way {
    /// Carries messages, as many as are there, but not for ever. `send` is how one is sent, and `may_go_on` whether one may be that
    /// carries so many descriptors, as far as it was found out.
    fn carry(
        &mut self,
        from: &PacketSocket,
        send: impl Fn(&Letter) -> io::Result<()>,
        may_go_on: impl Fn(usize) -> bool,
    ) -> Next {
        for _ in 0..MAX_AT_ONCE {
            if self.is_closed {
                return Next::Never;
            }
            if !may_go_on(self.refused) {
                return Next::Later;
            }
            let letter = match from.look::<MAX_MESSAGE>() {
                Ok(Arrival::Message(bytes, descriptors)) => {
                    Letter { bytes, descriptors: descriptors.into_iter().map(Into::into).collect() }
                }
                Ok(Arrival::Nothing) => return Next::Input,
                Ok(Arrival::NoDescriptors) => return Next::Later,
                // What is too long is nothing that a peer may send.
                Ok(Arrival::HangUp | Arrival::TooLong) | Err(_) => return Next::Over,
            };
            self.refused = 0;
            match send(&letter) {
                // Not before: what is taken off passes for received.
                Ok(()) if from.take_off().is_ok() => {}
                Ok(()) => return Next::Over,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Room,
                Err(error) if means_gone(&error) || error.kind() == io::ErrorKind::InvalidInput => {
                    self.is_closed = true;
                    return Next::Never;
                }
                Err(_) => {
                    self.refused = letter.descriptors.len();
                    return Next::Later;
                }
            }
        }
        // There may be more: whether there is, poll(2) says.
        Next::Input
    }
}

/// A socket that is relayed.
#[derive(Debug)]
struct Relay {
    far: PacketSocket,
    /// The other end of the pair.
    inner: PacketSocket,
    out: Way,
    back: Way,
    next_out: Next,
    next_back: Next,
    user: u32,
    /// What it takes up of the share of its user, once no link does that for it.
    share: Option<Share>,
}

impl Relay {
    /// Carries what is there. Whether anything may be carried yet.
    fn carry(&mut self) -> bool {
        // What is under way in the pair may go on to be.
        self.next_out = self.out.carry(&self.inner, |letter| self.far.send_on(letter), |_| true);
        // Nor is more taken while much that this user has passed before waits to be closed: it is open here.
        let may_go_on = |descriptors| {
            !deferred::is_full(self.user) && (descriptors == 0 || self.inner.has_room(|| descriptors, Kind::Other))
        };
        self.next_back = self.back.carry(&self.far, |letter| self.inner.send(letter), may_go_on);
        if self.share.is_none() && self.inner.has_hung_up() {
            self.share = Some(Share::keep(self.user, OF_RELAY));
        }
        let is_over = self.next_out == Next::Over || self.next_back == Next::Over;
        // The peer is gone, and what it said last is not wanted any more; or the other way round.
        !is_over && (self.next_out, self.next_back) != (Next::Never, Next::Never)
    }

    /// What is waited for: which sockets, and what of them beside a hang-up. A socket of which nothing is waited for is not looked at, or
    /// its hang-up would be seen again and again; but for the first time that of the inner one.
    fn awaited(&self) -> impl Iterator<Item = (&PacketSocket, PollFlags)> {
        let flags = |incoming: Next, outgoing: Next| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, incoming == Next::Input);
            flags.set(PollFlags::POLLOUT, outgoing == Next::Room);
            flags
        };
        let far = (&self.far, flags(self.next_back, self.next_out));
        let inner = (&self.inner, flags(self.next_out, self.next_back));
        let is_awaited = move |&(socket, flags): &(&PacketSocket, PollFlags)| {
            !flags.is_empty() || (std::ptr::eq(socket, &self.inner) && self.share.is_none())
        };
        [far, inner].into_iter().filter(is_awaited)
    }

    fn is_later(&self) -> bool {
        self.next_out == Next::Later || self.next_back == Next::Later
    }
}

/// What a thread is told.
#[derive(Debug)]
struct Line {
    /// Sockets that are its from now on.
    incoming: Vec<Relay>,
    /// Wakes it.
    bell: Arc<Withheld<EventFd>>,
}

/// By user. A line is there for as long as its thread is.
#[derive(Debug)]
pub(crate) struct Lines(BTreeMap<u32, Line>);

pub(crate) static LINES: ForkMutex<Lines> =
    ForkMutex::new(Rank::Relays, Mutex::new(Lines(BTreeMap::new())), |lines| lines.forget());

impl Lines {
    /// In a child that was forked: the threads are the parent's, as what they carry. Neither allocates nor frees.
    fn forget(&mut self) {
        mem::forget(mem::take(&mut self.0));
    }
}

/// A pair of sockets that stand for one: the end that the rest of this process has, and the other one.
pub(super) struct Pair {
    pub near: Arc<Withheld<OwnedFd>>,
    inner: PacketSocket,
    share: Option<Share>,
}

impl Pair {
    /// For a socket of this user, which has this share, or one by its link.
    ///
    /// # Errors
    /// What socketpair(2) says.
    pub(super) fn new(user: u32, share: Option<Share>) -> io::Result<Self> {
        let (near, inner) = PacketSocket::pair()?;
        let mut inner = Socket::new(Arc::new(inner.into()));
        (inner.user, inner.is_bounded) = (Some(user), true);
        Ok(Self { near: Arc::new(near.into()), inner: inner.into(), share })
    }
}

/// Has the thread of this user carry what goes over a socket and one end of a pair.
///
/// # Errors
/// No thread can be started, or no descriptor is left for it. The socket hangs up then.
pub(super) fn begin(user: u32, far: PacketSocket, pair: Pair) -> io::Result<()> {
    let Pair { inner, share, .. } = pair;
    let relay = Relay {
        far,
        inner,
        out: Way::default(),
        back: Way::default(),
        next_out: Next::Input,
        next_back: Next::Input,
        user,
        share,
    };
    // Before the lock, as in a process that forks.
    let bell = Arc::new(Withheld::from(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?));
    let mut lines = LINES.lock();
    if let Some(line) = lines.0.get_mut(&user) {
        line.incoming.push(relay);
        let _ = line.bell.write(1);
        return Ok(());
    }
    lines.0.insert(user, Line { incoming: vec![relay], bell: bell.clone() });
    drop(lines);
    threads::spawn("fbuf-relay", move || run(user, &bell)).map(drop).inspect_err(|_| {
        let line = LINES.lock().0.remove(&user);
        drop(line);
    })
}

/// What the thread of a user does, until nothing is left to carry.
fn run(user: u32, bell: &Withheld<EventFd>) {
    let (mut relays, mut due): (Vec<Relay>, Vec<bool>) = Default::default();
    let mut debt = Debt::default();
    loop {
        let begin = used();
        let mut lines = LINES.lock();
        relays.extend(lines.0.get_mut(&user).map(|line| mem::take(&mut line.incoming)).unwrap_or_default());
        if relays.is_empty() {
            let line = lines.0.remove(&user);
            drop(lines);
            return drop(line);
        }
        drop(lines);
        due.resize(relays.len(), true);
        let mut due_ones = due.iter();
        relays.retain_mut(|relay| due_ones.next() == Some(&false) || relay.carry());
        if let (Some(begin), Some(end), Some(now)) = (begin, used(), now()) {
            let owed = debt.add(end.saturating_sub(begin), now, PART);
            sleep(owed.saturating_sub(BURST) * PART);
        }
        due = if relays.is_empty() { Vec::new() } else { wait(bell, &relays) };
    }
}

/// Waits until something can be carried, or somebody rings: which of them are to be looked at.
fn wait(bell: &Withheld<EventFd>, relays: &[Relay]) -> Vec<bool> {
    let is_later = relays.iter().any(Relay::is_later);
    let mut polled = vec![PollFd::new((**bell).as_fd(), PollFlags::POLLIN)];
    let mut owners = vec![None];
    for (owner, relay) in relays.iter().enumerate() {
        for (socket, flags) in relay.awaited() {
            polled.push(PollFd::new(socket.as_fd(), flags));
            owners.push(Some(owner));
        }
    }
    let patience = if is_later { PollTimeout::from(LATER.as_millis() as u16) } else { PollTimeout::NONE };
    let polled = match poll(&mut polled, patience) {
        Ok(_) => polled.iter().map(|one| one.any() != Some(false)).collect(),
        Err(error) => {
            if error != nix::errno::Errno::EINTR {
                // No memory: all are looked at, in a while.
                sleep(LATER);
            }
            vec![true; polled.len()]
        }
    };
    let _ = bell.read();
    let mut due: Vec<_> = relays.iter().map(Relay::is_later).collect();
    for owner in owners.into_iter().zip(polled).filter_map(|(owner, is_ready)| owner.filter(|_| is_ready)) {
        due[owner] = true;
    }
    due
}

/// Whether all that was sent over a near end is on its way.
pub(super) fn is_carried(near: BorrowedFd<'_>) -> bool {
    !matches!(sys::unread_bytes(near), Ok(1..))
}

#[cfg(all(test, not(miri)))]
mod tests;
