//! The sender's half of a link: it writes the lane, reads the board, and keeps the ledger of what is
//! lent over this link.

use std::{
    ops::Add,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use crate::{
    board::{BoardReader, BoardTable},
    lane::{LaneTable, LaneWriter, capacity_for},
    link::{self, Hello, LinkEnd, LinkMessage, Welcome, fencing},
    park::Fencing,
    pool::Pool,
    ring::Ring,
    slot::SlotId,
    socket::PacketSocket,
    violation::Violation,
    wire::Descriptor,
};

pub use crate::inbound::Peer;

/// A receiver that was introduced and has not yet said hello.
#[derive(Debug)]
pub struct Expected {
    peer: Peer,
    socket: PacketSocket,
}

/// What a look at the socket of an expected receiver found.
#[derive(Debug)]
pub enum Arrived {
    /// It is here.
    Here(Box<Outbound>),
    /// Not yet.
    NotYet(Expected),
}

impl Expected {
    /// Takes the sender's end of a link socket.
    #[must_use]
    pub fn new(peer: Peer, socket: PacketSocket) -> Self {
        Self { peer, socket }
    }

    /// Who it is.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Looks for the receiver's hello. If it came, answers it and opens the link: what is sent from
    /// now on, the first being number `first_sequence`, reaches that receiver.
    ///
    /// # Errors
    /// [`LinkEnd`]: there will be no link.
    pub fn look(self, pool: &Pool, first_sequence: u64) -> Result<Arrived, LinkEnd> {
        match link::receive(&self.socket)? {
            None => Ok(Arrived::NotYet(self)),
            Some(LinkMessage::Hello(hello)) => {
                Ok(Arrived::Here(Box::new(Outbound::open(self, &hello, pool, first_sequence)?)))
            }
            Some(other) => Err(Violation::OutOfTurn { found: other.name(), wanted: "a receiver's hello" }.into()),
        }
    }
}

impl AsFd for Expected {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// In the ledger: not lent.
const HERE: u64 = 0;

/// The sender's half of a link.
#[derive(Debug)]
pub struct Outbound {
    peer: Peer,
    socket: PacketSocket,
    writer: LaneWriter<LaneTable>,
    board: BoardReader<BoardTable>,
    fencing: Fencing,
    /// The ledger: for each slot, when it was sent last, the lane position that lent it over this link,
    /// plus one; or [`HERE`]. It says nothing of slots that are free or fbufs.
    ledger: Ring<u64>,
    /// How many slots there may be.
    slots: u32,
    /// Once the receiver is gone: entries from here on it never read.
    unread_from: u64,
    /// Whether a message needs no more care than to be sent: the receiver is there, does not want to be
    /// skipped, and needs no fence.
    plain: bool,
    skipping: Option<Skipping>,
    /// How many segments the receiver was told of.
    announced: usize,
    /// Messages left out since the last one that was sent.
    gap: u64,
    /// The sleep of the receiver for which the bell was rung last.
    rung: u64,
    counts: LinkCounts,
}

/// For a receiver that would rather miss messages than hold more than so many.
#[derive(Debug)]
struct Skipping {
    most: u32,
    /// What is lent, by slot and ledger entry, or was when it was last looked at.
    lent: Vec<(SlotId, u64)>,
}

impl Skipping {
    fn new(most: u32) -> Self {
        Self { most, lent: Vec::with_capacity(most as usize + 1) }
    }
}

/// What happened on one link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounts {
    /// Messages left out because the receiver held more than it wants to.
    pub skipped: u64,
    /// Times the receiver had to be woken.
    pub bells: u64,
}

impl Add for LinkCounts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { skipped: self.skipped + other.skipped, bells: self.bells + other.bells }
    }
}

/// What became of a message on one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// It was sent.
    Lent,
    /// The receiver holds more than it wants to: left out.
    Skipped,
    /// The receiver is gone.
    Gone,
}

impl Outbound {
    fn open(expected: Expected, hello: &Hello, pool: &Pool, first_sequence: u64) -> Result<Self, LinkEnd> {
        let Expected { peer, socket } = expected;
        let slots = pool.geometry().max_slots();
        let board = BoardTable::attach(hello.board.as_fd(), slots as usize).map_err(Violation::from)?;
        let (lane, descriptor) = LaneTable::create("fbuf-lane", capacity_for(slots, hello.skip_above.is_some()))
            .map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
        let welcome = Welcome {
            lane: Descriptor::from(descriptor),
            first_sequence,
            asymmetric: Fencing::of_this_process() == Fencing::Asymmetric,
            segments: pool.announce(0).collect(),
        };
        let fencing = Fencing::towards(fencing(hello.asymmetric));
        let announced = welcome.segments.len();
        link::send(&socket, &LinkMessage::Welcome(welcome))?;
        Ok(Self {
            peer,
            socket,
            writer: LaneWriter::new(lane),
            board: BoardReader::new(board),
            fencing,
            slots,
            ledger: Ring::new(slots as usize, || HERE),
            unread_from: u64::MAX,
            plain: hello.skip_above.is_none() && fencing == Fencing::Asymmetric,
            skipping: hello.skip_above.map(|most| Skipping::new(most.min(slots))),
            announced,
            gap: 0,
            rung: 0,
            counts: LinkCounts::default(),
        })
    }

    /// Who receives.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// What happened on it.
    #[must_use]
    pub fn counts(&self) -> LinkCounts {
        self.counts
    }

    /// Whether any slot is lent over it.
    #[must_use]
    pub fn lends(&self) -> bool {
        (0..self.slots).any(|slot| self.has(SlotId::new(slot)))
    }

    /// Whether the receiver may be sent anything.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.unread_from == u64::MAX
    }

    /// Lends a slot to the receiver and tells it, unless it would rather skip.
    pub fn offer(&mut self, slot: SlotId, length: u32) -> Offer {
        if let Some(answer) = self.refuse(slot) {
            return answer;
        }
        if self.lend(slot, length, self.fencing) { Offer::Lent } else { self.answer() }
    }

    /// As [`Self::offer`], for a receiver to which nothing but sending is to be done: true if that was
    /// done, and there is nothing more to do; none if nothing was done.
    #[inline]
    pub fn offer_simply(&mut self, slot: SlotId, length: u32) -> Option<bool> {
        self.plain.then(|| self.lend(slot, length, Fencing::Asymmetric))
    }

    /// Lends and tells: false if there is something to [`Self::answer`].
    #[inline]
    fn lend(&mut self, slot: SlotId, length: u32, fencing: Fencing) -> bool {
        *self.ledger.at_mut(slot.index()) = self.writer.position() + 1;
        self.writer.message(slot, length);
        fencing.after_publishing();
        self.board.head().flag.read().is_quiet()
    }

    /// Whether a message is not to be sent, and why.
    fn refuse(&mut self, slot: SlotId) -> Option<Offer> {
        if !self.is_open() {
            return Some(Offer::Gone);
        }
        if self.skips() {
            // What the ledger says of the slot is about an earlier message.
            *self.ledger.at_mut(slot.index()) = HERE;
            self.gap += 1;
            self.counts.skipped += 1;
            return Some(Offer::Skipped);
        }
        if self.gap > 0 {
            self.writer.gap(std::mem::take(&mut self.gap));
        }
        let entry = self.writer.position() + 1;
        if let Some(skipping) = &mut self.skipping {
            skipping.lent.push((slot, entry));
        }
        None
    }

    /// After a message was sent to a receiver that sleeps, or leaves: it may have read even this one
    /// before it left.
    #[cold]
    #[inline(never)]
    pub fn answer(&mut self) -> Offer {
        if let Some(sleep) = self.board.head().flag.read().asleep()
            && self.rung != sleep
        {
            self.writer.head().rang.note();
            if link::ring(&self.socket) {
                self.rung = sleep;
                self.counts.bells += 1;
            }
        }
        self.notice_leaving();
        if self.writer.position() <= self.unread_from { Offer::Lent } else { Offer::Gone }
    }

    /// Whether the receiver holds more than it wants to. If it seems so, looks again.
    fn skips(&mut self) -> bool {
        let Some(mut skipping) = self.skipping.take() else { return false };
        let most = skipping.most as usize;
        if skipping.lent.len() > most {
            skipping.lent.retain(|&(slot, entry)| *self.ledger.at(slot.index()) == entry && self.has(slot));
        }
        let skips = skipping.lent.len() > most;
        self.skipping = Some(skipping);
        skips
    }

    /// Whether the receiver has the slot: it was lent when it was sent last, and is not back.
    #[must_use]
    #[inline]
    pub fn has(&self, slot: SlotId) -> bool {
        self.count_back(std::iter::once(slot)) == 0
    }

    /// How many of these slots, from the first on, the receiver does not have.
    #[inline]
    pub fn count_back(&self, slots: impl Iterator<Item = SlotId>) -> usize {
        let ledger = self.ledger.view();
        slots
            .take_while(|&slot| {
                let entry = *ledger.at(slot.index());
                entry == HERE || self.board.has(slot, entry - 1) || entry > self.unread_from
            })
            .count()
    }

    /// Looks whether the receiver has left. What it never read is back at once; what it holds on to
    /// stays lent until it is handed back, or the link hangs up.
    pub fn notice_leaving(&mut self) {
        if let Some(read) = self.board.left_at() {
            self.unread_from = self.unread_from.min(read);
            self.plain = false;
        }
    }

    /// Announces the segments that the receiver does not know, before the first message that lies in
    /// one of them: whether it knows all now. The kernel may have no room for a descriptor, which
    /// passes.
    ///
    /// # Errors
    /// [`LinkEnd`]: the link is over.
    pub fn announce(&mut self, pool: &Pool) -> Result<bool, LinkEnd> {
        for segment in pool.announce(self.announced) {
            match link::send(&self.socket, &LinkMessage::Segment(segment)) {
                Ok(()) => self.announced += 1,
                Err(LinkEnd::Exhausted(_)) => return Ok(false),
                Err(end) => return Err(end),
            }
        }
        Ok(true)
    }

    /// Reads what the receiver sent over the socket: bells, which need no answer but a look around.
    ///
    /// # Errors
    /// [`LinkEnd`]: the link is over, and with its drop all that is lent over it is back.
    pub fn attend(&mut self) -> Result<(), LinkEnd> {
        // A peer that never stops is not listened to for ever; what is left is reported again.
        for _ in 0..link::MAX_AT_ONCE {
            match link::receive(&self.socket) {
                // That this process has no memory to read a bell passes. It must not end the link,
                // for then slots would be written that the receiver still reads.
                Ok(None) | Err(LinkEnd::Exhausted(_)) => break,
                Ok(Some(LinkMessage::Bell)) => {}
                Ok(Some(other)) => {
                    return Err(Violation::OutOfTurn { found: other.name(), wanted: "a bell" }.into());
                }
                Err(end) => return Err(end),
            }
        }
        self.notice_leaving();
        Ok(())
    }

    /// How long ago the receiver rang.
    #[must_use]
    pub fn rang(&self) -> Option<Duration> {
        self.board.head().rang.elapsed()
    }

    /// Announces sleep to the receiver.
    pub fn raise(&self) {
        self.writer.head().flag.raise();
    }

    /// Takes it back.
    pub fn lower(&self) {
        self.writer.head().flag.lower();
    }

    /// Ends the link in order: everything that was sent arrives, and then the end.
    pub fn finish(mut self) {
        self.writer.close(self.gap);
        // The hang-up of the socket, which follows, wakes the receiver.
    }
}

impl AsFd for Outbound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
