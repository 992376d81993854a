//! The receiver's half of a link: it reads the lane, checks what it finds, and writes the board.

use std::{
    os::fd::{AsFd, BorrowedFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use crate::{
    board::{BoardTable, BoardWriter},
    lane::{LaneReader, LaneTable, Note, capacity_for},
    limits::MAX_SEGMENTS,
    link::{self, Hello, LinkEnd, LinkMessage, NewSegment, Welcome, fencing},
    loan::Received,
    memory::{Map, MemoryError},
    park::Fencing,
    retire::{Held, Remains, Retired},
    slot::{Geometry, SlotId, Span},
    socket::{Credentials, PacketSocket},
    violation::Violation,
    wire::Descriptor,
};

/// Who is at the other end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The endpoint, by a number that its broker gives only once.
    pub endpoint: u64,
    /// The process, as the kernel told the broker.
    pub process: Credentials,
}

/// A sender that was greeted and has not yet answered.
#[derive(Debug)]
pub struct Greeted {
    /// Dropped first: that this side leaves is said before the socket hangs up.
    board: UnusedBoard,
    socket: PacketSocket,
    peer: Peer,
    geometry: Geometry,
    /// Whether the sender was asked to leave messages out.
    skips: bool,
}

/// A board over which nothing was received yet. Dropped as such, it says that nothing ever will be.
#[derive(Debug)]
struct UnusedBoard(Option<BoardTable>);

impl UnusedBoard {
    fn take(mut self) -> Option<BoardTable> {
        self.0.take()
    }
}

impl Drop for UnusedBoard {
    fn drop(&mut self) {
        if let Some(board) = self.0.take() {
            BoardWriter::new(board).leave(0);
        }
    }
}

/// What a look at the socket of a greeted sender found.
#[derive(Debug)]
pub enum Answered {
    /// The link is open.
    Open(Box<Inbound>),
    /// Not yet.
    NotYet(Greeted),
}

/// Why a sender could not be greeted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GreetError {
    /// No memory for the return board.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The sender was gone before.
    #[error("the sender has gone")]
    Gone,
}

impl Greeted {
    /// Says hello to a sender with slots of this geometry.
    ///
    /// With `skip_above`, the sender leaves messages out rather than have more than so many of its
    /// slots held here.
    ///
    /// # Errors
    /// [`GreetError`]: there will be no link.
    pub fn new(
        peer: Peer,
        socket: PacketSocket,
        geometry: Geometry,
        skip_above: Option<u32>,
    ) -> Result<Self, GreetError> {
        let (board, descriptor) = BoardTable::create("fbuf-board", geometry.max_slots() as usize)?;
        let hello = Hello {
            board: Descriptor::from(descriptor),
            skip_above,
            asymmetric: Fencing::of_this_process() == Fencing::Asymmetric,
        };
        link::send(&socket, &LinkMessage::Hello(hello)).map_err(|_| GreetError::Gone)?;
        Ok(Self { peer, socket, geometry, skips: skip_above.is_some(), board: UnusedBoard(Some(board)) })
    }

    /// Who it is.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Looks for the sender's answer.
    ///
    /// # Errors
    /// [`LinkEnd`]: there will be no link.
    pub fn look(self) -> Result<Answered, LinkEnd> {
        match link::receive(&self.socket)? {
            None => Ok(Answered::NotYet(self)),
            Some(LinkMessage::Welcome(welcome)) => Ok(Answered::Open(Box::new(Inbound::open(self, welcome)?))),
            Some(other) => Err(Violation::OutOfTurn { found: other.name(), wanted: "a sender's welcome" }.into()),
        }
    }
}

impl AsFd for Greeted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The receiver's half of a link.
#[derive(Debug)]
pub struct Inbound {
    reader: LaneReader<Arc<LaneTable>>,
    segments: Vec<Segment>,
    geometry: Geometry,
    next_sequence: u64,
    missed: u64,
    /// How it ended, if it did not end in order.
    end: Option<LinkEnd>,
    returns: Arc<Returns>,
}

#[derive(Debug)]
struct Segment {
    map: Map,
    slots: u32,
    first: u32,
}

/// Bytes of a slot that was just taken, on their way to becoming a [`Received`].
pub(crate) struct Loan<'a> {
    pub bytes: NonNull<u8>,
    pub length: u32,
    pub index: u32,
    pub position: u64,
    pub home: &'a Returns,
}

impl Inbound {
    fn open(greeted: Greeted, welcome: Welcome) -> Result<Self, LinkEnd> {
        let Greeted { peer, socket, geometry, skips, board } = greeted;
        let slots = geometry.max_slots();
        let lane = LaneTable::attach(welcome.lane.as_fd(), capacity_for(slots, skips)).map_err(Violation::from)?;
        let lane = Arc::new(lane);
        let board = board.take().ok_or(LinkEnd::HangUp)?;
        let returns = Returns {
            peer,
            socket,
            board: BoardWriter::new(board),
            held: Held::new(slots as usize),
            lane: lane.clone(),
            towards_sender: Fencing::towards(fencing(welcome.asymmetric)),
            rung: AtomicU64::new(0),
            place: Place::next(),
        };
        let mut inbound = Self {
            reader: LaneReader::new(lane),
            segments: Vec::new(),
            geometry,
            next_sequence: welcome.first_sequence,
            missed: 0,
            end: None,
            returns: Arc::new(returns),
        };
        for segment in welcome.segments {
            inbound.add_segment(&segment)?;
        }
        Ok(inbound)
    }

    fn add_segment(&mut self, new: &NewSegment) -> Result<(), Violation> {
        let first = self.segments.last().map_or(0, |segment| segment.first + segment.slots);
        if self.segments.len() == MAX_SEGMENTS || new.slots == 0 || new.slots > self.geometry.max_slots() - first {
            return Err(Violation::Terms {
                what: "the number of slots of a new segment",
                found: new.slots.into(),
                allowed: "at least one, and all together no more than were announced",
            });
        }
        let map = Map::attach(new.memory.as_fd(), self.geometry.segment_bytes(new.slots)).map_err(Violation::from)?;
        self.segments.push(Segment { map, slots: new.slots, first });
        Ok(())
    }

    /// Who sends.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.returns.peer
    }

    /// How many messages were left out for this receiver.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.saturating_add(self.reader.ending().unwrap_or(0))
    }

    /// How many messages of this link are held in this process.
    #[must_use]
    pub fn held(&self) -> usize {
        self.returns.held.count()
    }

    /// Takes the next message, if there is one. If the sender wrote something that it may not, the
    /// link is over.
    #[inline]
    pub fn take(&mut self) -> Option<Received> {
        loop {
            let position = self.reader.position();
            match self.reader.take() {
                Ok(None) => return None,
                Ok(Some(Note::Message(slot, span))) => {
                    if usize::from(slot.segment) >= self.segments.len() {
                        // It was announced before it was used.
                        self.attend();
                    }
                    return match self.borrow(slot, span, position) {
                        Ok(loan) => {
                            let received = loan.receive(self.next_sequence);
                            self.next_sequence = self.next_sequence.wrapping_add(1);
                            Some(received)
                        }
                        Err(violation) => self.break_off(violation),
                    };
                }
                Ok(Some(Note::Gap(count))) => {
                    self.missed = self.missed.saturating_add(count);
                    self.next_sequence = self.next_sequence.wrapping_add(count);
                }
                Err(violation) => return self.break_off(violation),
            }
        }
    }

    #[cold]
    fn break_off<T>(&mut self, violation: Violation) -> Option<T> {
        self.end_with(violation.into());
        None
    }

    /// Notes how the link ended. What broke it first is what broke it: a rule is not made good by
    /// leaving, and a segment that this process had no room for is not the sender's fault.
    fn end_with(&mut self, end: LinkEnd) {
        if !self.is_broken() {
            self.end = Some(end);
        }
    }

    /// Checks what a message names, and takes it.
    #[inline]
    fn borrow(&self, slot: SlotId, span: Span, position: u64) -> Result<Loan<'_>, Violation> {
        let Some(segment) = self.segments.get(usize::from(slot.segment)) else {
            return Err(Violation::Segment { named: slot.segment, known: self.segments.len() });
        };
        if slot.slot >= segment.slots {
            return Err(Violation::Slot { named: slot.slot, slots: segment.slots });
        }
        let slot_bytes = self.geometry.slot_bytes();
        let outside = || Violation::Span { offset: span.offset, length: span.length, slot_bytes };
        if !span.fits(slot_bytes) {
            return Err(outside());
        }
        let offset = u64::from(slot.slot) * self.geometry.stride() + u64::from(span.offset);
        let bytes = segment.map.at(offset, span.length.into()).ok_or_else(outside)?;
        let index = segment.first + slot.slot;
        if !self.returns.held.take(index, position, &self.returns.board) {
            return Err(Violation::StillHeld(index));
        }
        Ok(Loan { bytes, length: span.length, index, position, home: &self.returns })
    }

    /// Whether a message waits. One that is none shows when it is taken.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.reader.is_ready()
    }

    /// Whether nothing more will come: the sender ended in order, or is gone, and all it sent was
    /// taken; or it broke a rule.
    #[inline]
    #[must_use]
    pub fn is_over(&self) -> bool {
        match &self.end {
            // In this order: what was published before the hang-up was seen is seen now.
            Some(LinkEnd::HangUp) => !self.is_ready(),
            Some(_) => true,
            None => self.reader.ending().is_some(),
        }
    }

    /// Whether the sender broke a rule, or the link could not go on here.
    #[inline]
    #[must_use]
    pub fn is_broken(&self) -> bool {
        !matches!(self.end, None | Some(LinkEnd::HangUp))
    }

    /// How it ended; none if in order.
    pub fn end(&mut self) -> Option<LinkEnd> {
        match self.end.take() {
            Some(LinkEnd::HangUp) if self.reader.ending().is_some() => None,
            other => other,
        }
    }

    /// Reads what the sender sent over the socket: bells, new segments, its end.
    pub fn attend(&mut self) {
        if let Err(end) = self.read_socket() {
            self.end_with(end);
        }
    }

    fn read_socket(&mut self) -> Result<(), LinkEnd> {
        // A peer that never stops is not listened to for ever; what is left is reported again.
        for _ in 0..link::MAX_AT_ONCE {
            match link::receive(&self.returns.socket)? {
                None => break,
                Some(LinkMessage::Bell) => {}
                Some(LinkMessage::Segment(segment)) => self.add_segment(&segment)?,
                Some(other) => {
                    return Err(Violation::OutOfTurn { found: other.name(), wanted: "a bell or a new segment" }.into());
                }
            }
        }
        Ok(())
    }

    /// Announces sleep to the sender.
    pub fn raise(&self) {
        self.returns.board.head().flag.raise();
    }

    /// Takes it back.
    pub fn lower(&self) {
        self.returns.board.head().flag.lower();
    }
}

impl AsFd for Inbound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.returns.socket.as_fd()
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        let returns = self.returns.clone();
        returns.board.leave(self.reader.position());
        returns.wake_sender();
        let fencing = returns.place.fencing;
        RETIRED.leave(Left { returns, _segments: std::mem::take(&mut self.segments) }, fencing);
    }
}

/// What a [`Received`] needs in order to go back, shared by all of a link.
#[derive(Debug)]
pub(crate) struct Returns {
    peer: Peer,
    socket: PacketSocket,
    board: BoardWriter<BoardTable>,
    held: Held,
    lane: Arc<LaneTable>,
    towards_sender: Fencing,
    /// The sleep of the sender for which the bell was rung last.
    rung: AtomicU64,
    place: Place,
}

impl Returns {
    pub(crate) fn peer(&self) -> Peer {
        self.peer
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// Hands the slot `index` back to its sender. Its holder clears its mark afterwards.
    #[inline]
    pub(crate) fn hand_back(&self, index: u32, position: u64) {
        self.board.hand_back(index, position);
        self.wake_sender();
    }

    #[inline]
    pub(crate) fn mark(&self, index: u32) -> Option<&AtomicU64> {
        self.held.mark(index)
    }

    /// Rings if the sender sleeps, once for each sleep.
    #[inline]
    fn wake_sender(&self) {
        self.towards_sender.after_publishing();
        // Two threads may both ring; it does no harm.
        if let Some(sleep) = self.lane.head().flag.read().asleep()
            && self.rung.load(Ordering::Relaxed) != sleep
            && link::ring(&self.socket)
        {
            self.rung.store(sleep, Ordering::Relaxed);
        }
    }
}

/// Where the remains of a link would be counted, and how this process fences.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    link: usize,
    fencing: Fencing,
}

impl Place {
    fn next() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        Self { link: NEXT.fetch_add(1, Ordering::Relaxed), fencing: Fencing::of_this_process() }
    }

    #[inline]
    pub(crate) fn after_clear(self) {
        RETIRED.after_clear(self.link, self.fencing);
    }
}

/// Links that ended while some of their messages were held.
static RETIRED: Retired<Left> = Retired::new();

/// What is left of such a link: all that its messages point into.
#[derive(Debug)]
struct Left {
    returns: Arc<Returns>,
    _segments: Vec<Segment>,
}

impl Remains for Left {
    fn link(&self) -> usize {
        self.returns.place.link
    }

    fn is_idle(&self) -> bool {
        self.returns.held.count() == 0
    }
}
