//! The sender's half of a link: it writes the lane, reads the board, and keeps the ledger of what is
//! lent over this link.

use std::{
    ops::Add,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use crate::{
    board::{BoardReader, BoardTable},
    lane::{LaneTable, LaneWriter, capacity_for},
    link::{self, Hello, LinkEnd, LinkMessage, Welcome, fencing},
    park::Fencing,
    pool::Pool,
    slot::{SlotId, Span},
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
const HERE: u64 = u64::MAX;

/// The sender's half of a link.
#[derive(Debug)]
pub struct Outbound {
    peer: Peer,
    socket: PacketSocket,
    writer: LaneWriter<Arc<LaneTable>>,
    board: BoardReader<BoardTable>,
    fencing: Fencing,
    /// The ledger: for each slot, the lane position that lent it over this link, or [`HERE`].
    ledger: Box<[u64]>,
    /// How many slots the ledger has as lent.
    lent: u32,
    skipping: Option<Skipping>,
    /// How many segments the receiver was told of.
    announced: usize,
    /// Messages left out since the last one that was sent.
    gap: u64,
    /// The sleep of the receiver for which the bell was rung last.
    rung: u64,
    /// Once the receiver is gone: entries from here on it never read.
    unread_from: u64,
    counts: LinkCounts,
}

/// For a receiver that would rather miss messages than hold more than so many.
#[derive(Debug)]
struct Skipping {
    most: u32,
    /// What is lent, by index and position, or was when it was last looked at.
    lent: Vec<(u32, u64)>,
}

impl Skipping {
    fn new(most: u32) -> Self {
        Self { most, lent: Vec::with_capacity(most as usize + 1) }
    }
}

/// What happened on one link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounts {
    /// Messages sent.
    pub messages: u64,
    /// Messages left out because the receiver held more than it wants to.
    pub skipped: u64,
    /// Times the receiver had to be woken.
    pub bells: u64,
}

impl Add for LinkCounts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            messages: self.messages + other.messages,
            skipped: self.skipped + other.skipped,
            bells: self.bells + other.bells,
        }
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
        let announced = welcome.segments.len();
        link::send(&socket, &LinkMessage::Welcome(welcome))?;
        Ok(Self {
            peer,
            socket,
            writer: LaneWriter::new(Arc::new(lane)),
            board: BoardReader::new(board),
            fencing: Fencing::towards(fencing(hello.asymmetric)),
            ledger: vec![HERE; slots as usize].into(),
            lent: 0,
            skipping: hello.skip_above.map(|most| Skipping::new(most.min(slots))),
            announced,
            gap: 0,
            rung: 0,
            unread_from: u64::MAX,
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

    /// How many slots are lent over it, as far as was looked.
    #[must_use]
    pub fn lent(&self) -> u32 {
        self.lent
    }

    /// Whether the receiver may be sent anything.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.unread_from == u64::MAX
    }

    /// Lends a slot to the receiver and tells it, unless it would rather skip.
    #[inline]
    pub fn offer(&mut self, slot: SlotId, index: u32, length: u32) -> Offer {
        if !self.is_open() {
            return Offer::Gone;
        }
        if self.skipping.is_some() && self.skips() {
            self.gap += 1;
            self.counts.skipped += 1;
            return Offer::Skipped;
        }
        if self.gap > 0 {
            self.writer.gap(std::mem::take(&mut self.gap));
        }
        let position = self.writer.position();
        self.ledger[index as usize] = position;
        self.lent += 1;
        if let Some(skipping) = &mut self.skipping {
            skipping.lent.push((index, position));
        }
        self.counts.messages += 1;
        self.writer.message(slot, Span { offset: 0, length });
        self.fencing.after_publishing();
        let signal = self.board.head().flag.read();
        if signal.is_quiet() {
            return Offer::Lent;
        }
        if let Some(sleep) = signal.asleep() {
            self.ring(sleep);
        }
        self.notice_leaving();
        // It may have read even this one before it left.
        if position < self.unread_from { Offer::Lent } else { Offer::Gone }
    }

    #[cold]
    fn ring(&mut self, sleep: u64) {
        if self.rung != sleep && link::ring(&self.socket) {
            self.rung = sleep;
            self.counts.bells += 1;
        }
    }

    /// Whether the receiver holds more than it wants to. If it seems so, looks again.
    fn skips(&mut self) -> bool {
        let Some(mut skipping) = self.skipping.take() else { return false };
        let most = skipping.most as usize;
        if skipping.lent.len() > most {
            skipping.lent.retain(|&(index, position)| self.ledger[index as usize] == position && self.holds(index));
        }
        let skips = skipping.lent.len() > most;
        self.skipping = Some(skipping);
        skips
    }

    /// Looks whether the receiver still holds the slot `index`, and strikes it from the ledger if not.
    #[inline]
    pub fn holds(&mut self, index: u32) -> bool {
        let Some(position) = self.ledger.get_mut(index as usize) else { return false };
        if *position == HERE {
            return false;
        }
        if !self.board.has(index, *position) && *position < self.unread_from {
            return true;
        }
        *position = HERE;
        self.lent -= 1;
        false
    }

    /// Looks whether the receiver has left. What it never read is back at once; what it holds on to
    /// stays lent until it is handed back, or the link hangs up.
    pub fn notice_leaving(&mut self) {
        if let Some(read) = self.board.left_at() {
            self.unread_from = self.unread_from.min(read);
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
