//! A sender that was greeted and has not yet answered.

use std::{
    io, mem,
    os::fd::AsFd,
    sync::{Arc, atomic::AtomicU64},
};

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use super::{Inbound, check_sequence};
use crate::{
    abort::Abort,
    memory::{MemoryError, wrapping::WrappingTable},
    peer::Peer,
    points,
    process::deferred::DeferredDrop,
    protection::Mechanism,
    receive::{
        held::Held,
        reading::{Reading, grants::Grants, leased::ReceiverSlots},
    },
    ring::{
        board::{BoardTable, BoardWriter},
        entry::{LaneFormat, capacity_for},
        lane::LaneView,
    },
    slot::{Geometry, Mark},
    socket::{
        LinkSocket, PacketSocket,
        link_message::{self, Hello, LinkEnd, LinkMessage, Welcome},
        under_way::Kind,
        wire::Descriptor,
    },
    violation::{Unsuitable, Violation},
    wait::Fencing,
};

/// The slots of a link, as its receiver hears of them.
#[derive(Debug, Serialize, Deserialize)]
pub enum SlotSource {
    /// In segments, which the sender tells of.
    Segments,
    /// Each is memory of its own. The broker made them, and says that they can be leased.
    FromBroker(Vec<Descriptor>),
    /// Each is memory of its own, which the receiver is to make.
    FromReceiver,
    /// Each is memory of its own, which the sender hands over.
    FromSender,
}

/// A sender that was greeted and has not yet answered.
#[derive(Debug)]
pub struct Greeted {
    /// Dropped first: that this side leaves is said before the socket hangs up.
    pub(super) board: UnusedBoard,
    pub(super) socket: PacketSocket,
    pub(super) peer: Peer,
    pub(super) geometry: Geometry,
    pub(super) mechanism: Mechanism,
    /// Whether the sender was asked to leave messages out.
    pub(super) skips: bool,
    /// How its messages will be read. None if that takes slots, which the sender is to hand over.
    pub(super) reading: Option<DeferredDrop<Reading>>,
    /// The rights to write its slots, if this process made them.
    pub(super) grants: Option<Grants>,
    /// What it asks for, if it was not said yet, since too many descriptors of this user are under way.
    unsaid: Option<Option<u32>>,
}

/// A board over which nothing was received yet. Dropped as such, it says that nothing ever will be, and why if that is not in
/// order.
#[derive(Debug, Default)]
pub(super) struct UnusedBoard {
    board: Option<BoardTable>,
    pub(super) abort: Option<Abort>,
}

impl Drop for UnusedBoard {
    fn drop(&mut self) {
        if let Some(board) = self.board.take() {
            BoardWriter::new(board).leave(0, self.abort);
        }
    }
}

/// What an open link is made of, besides that with which its sender was greeted.
pub(super) struct Parts {
    pub(super) board: BoardTable,
    pub(super) lane: LaneView,
    pub(super) format: LaneFormat,
    pub(super) next: Mark,
    pub(super) reading: DeferredDrop<Reading>,
    pub(super) held: Held,
    pub(super) times: Option<WrappingTable<AtomicU64>>,
}

/// What a look at the socket of a greeted sender found.
#[derive(Debug)]
pub enum Answered {
    /// The link is open.
    Open(Box<Inbound>),
    /// Not yet.
    NotYet(Box<Greeted>),
}

/// Why a sender could not be greeted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GreetError {
    /// No memory for the return board.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Slots were handed over that are none.
    #[error("what was handed over is no memory of slots: {0}")]
    Unsuitable(Unsuitable),
    /// The sender was gone before.
    #[error("the sender has gone")]
    Gone,
    /// What the broker said of the sender contradicts itself.
    #[error(
        "the broker introduced a sender of messages that are {0}, with slots that do not fit: a leased message lies in a slot \
         that is memory of its own, a one-shot message in none"
    )]
    Contradiction(Mechanism),
    /// This process has no memory or no descriptor left for it.
    #[error("{0}")]
    Exhausted(String),
}

impl From<Unsuitable> for GreetError {
    fn from(error: Unsuitable) -> Self {
        Self::Unsuitable(error)
    }
}

impl From<GreetError> for LinkEnd {
    fn from(error: GreetError) -> Self {
        match error {
            GreetError::Unsuitable(unsuitable) => unsuitable.into(),
            GreetError::Memory(error) => Self::Exhausted(error.to_string()),
            GreetError::Exhausted(what) => Self::Exhausted(what),
            error @ GreetError::Contradiction(_) => Self::Exhausted(error.to_string()),
            GreetError::Gone => Self::HangUp,
        }
    }
}

impl Greeted {
    /// Says hello to a sender with slots of this geometry. Its messages are protected by these means.
    ///
    /// With `skip_above`, the sender leaves messages out rather than have more than so many of its
    /// slots held here.
    ///
    /// # Errors
    /// [`GreetError`]: there will be no link.
    pub(crate) fn new(
        peer: Peer,
        socket: PacketSocket,
        geometry: Geometry,
        mechanism: Mechanism,
        slot_source: SlotSource,
        skip_above: Option<u32>,
    ) -> Result<Self, GreetError> {
        match (mechanism, &slot_source) {
            (Mechanism::Lease, SlotSource::Segments) => return Err(GreetError::Contradiction(mechanism)),
            (Mechanism::OneShot, SlotSource::FromBroker(_) | SlotSource::FromReceiver | SlotSource::FromSender) => {
                return Err(GreetError::Contradiction(mechanism));
            }
            _ => {}
        }
        let mechanism = mechanism.seen_from(peer);
        let leases = mechanism == Mechanism::Lease;
        let reading = match slot_source {
            SlotSource::FromSender => None,
            SlotSource::Segments => Some(Reading::new(mechanism, geometry)),
            SlotSource::FromBroker(memory) => Some(Reading::Leased(receiver_slots_of(memory, geometry, leases)?)),
            SlotSource::FromReceiver => Some(Reading::Leased(ReceiverSlots::make(geometry, leases, peer.same_user)?)),
        };
        let grants = reading.as_ref().and_then(Reading::grants);
        let (skips, unsaid) = (skip_above.is_some(), Some(skip_above));
        let (board, reading) = (UnusedBoard::default(), reading.map(DeferredDrop::from));
        let mut this = Self { board, socket, peer, geometry, mechanism, skips, reading, grants, unsaid };
        this.say_hello()?;
        Ok(this)
    }

    /// Has the receiver woken by this when another thread of this process has dropped a message that could not be given back.
    #[must_use]
    pub fn waking(mut self, wake: Arc<EventFd>) -> Self {
        if let Some(grants) = &mut self.grants {
            grants.wake_by(wake);
        }
        self
    }

    /// Says hello, if that was not said and can be said now.
    fn say_hello(&mut self) -> Result<(), GreetError> {
        let Some(skip_above) = self.unsaid.filter(|_| self.socket.has_room(|| 1, Kind::Greeting)) else {
            return Ok(());
        };
        let (board, descriptor) = BoardTable::create_growing("fbuf-board", self.geometry.max_slots() as usize)?;
        points::reach("attach: board made");
        let fences = Fencing::of_this_process() == Fencing::Full;
        if fences {
            board.head().flag.ask_for_fences();
        }
        let wants_slots = self.reading.is_none();
        // If it is said, the sender may send, and so nothing may fail behind it.
        let hello = Hello { board: Descriptor::from(descriptor), skip_above, fences, wants_slots };
        let said = link_message::greet(&self.socket, &LinkMessage::Hello(hello)).map_err(|end| match end {
            LinkEnd::Exhausted(what) => GreetError::Exhausted(what),
            // There is room for the first message.
            LinkEnd::HangUp | LinkEnd::Violation(_) | LinkEnd::Disconnected => GreetError::Gone,
        })?;
        if said {
            (self.board, self.unsaid) = (UnusedBoard { board: Some(board), abort: None }, None);
            points::reach("attach: greeted");
            // What cannot be given yet is told when the link is open.
            if let Some(grants) = &self.grants {
                grants.settle(&self.socket);
            }
        }
        Ok(())
    }

    /// Whether hello is to be said yet, so that a [look](Self::look) is worthwhile although the sender has sent nothing.
    #[must_use]
    pub fn is_unsaid(&self) -> bool {
        self.unsaid.is_some()
    }

    /// Who it is.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> LinkSocket<'_> {
        self.socket.of_link()
    }

    /// Whether the sender has gone and has not answered: there will be no link.
    #[must_use]
    pub fn is_void(&self) -> bool {
        self.socket.has_ended()
    }

    /// Makes what its link takes, but for segments. The board is taken last.
    ///
    /// # Errors
    /// [`LinkEnd`]: there will be no link.
    pub(super) fn parts(&mut self, welcome: &mut Welcome) -> Result<Parts, LinkEnd> {
        let slots = self.geometry.max_slots();
        let exhausted = |error: MemoryError| LinkEnd::Exhausted(error.to_string());
        let format = welcome.format;
        // The lane of a receiver that asked to be skipped has room for gaps.
        if self.skips && !format.gaps {
            return Err(Violation::PrefixUndeclared { prefix: "a gap" }.into());
        }
        let lane = LaneView::attach(welcome.lane.as_fd(), capacity_for(slots, format))?;
        let lane = lane.made_by(self.peer.other_user());
        let next = Mark::of(check_sequence(Some(welcome.first_sequence))?);
        let mut reading = match self.reading.take() {
            Some(reading) => reading,
            None if welcome.slots.len() != slots as usize => {
                return Err(Violation::Terms {
                    what: "the number of slots that were handed over",
                    found: welcome.slots.len() as u64,
                    allowed: "as many as were announced",
                }
                .into());
            }
            None => Reading::Leased(receiver_slots_of(mem::take(&mut welcome.slots), self.geometry, false)?).into(),
        };
        reading.open();
        let held = Held::new(slots as usize).map_err(exhausted)?;
        let times = format.times.then(|| WrappingTable::of_zeroes(slots as usize)).transpose().map_err(exhausted)?;
        let board = self.board.board.take().ok_or(LinkEnd::HangUp)?;
        Ok(Parts { board, lane, format, next, reading, held, times })
    }

    /// Looks for the sender's answer.
    ///
    /// # Errors
    /// [`LinkEnd`]: there will be no link.
    pub fn look(mut self) -> Result<Answered, LinkEnd> {
        self.say_hello()?;
        match link_message::receive_first(&self.socket)? {
            Some(other) if self.is_unsaid() => {
                Err(Violation::OutOfTurn { found: other.name(), wanted: "nothing before a hello" }.into())
            }
            None => Ok(Answered::NotYet(Box::new(self))),
            Some(LinkMessage::Welcome(welcome)) => {
                let link = Inbound::open(self, welcome)?;
                points::reach("attach: linked");
                Ok(Answered::Open(Box::new(link)))
            }
            Some(other) => Err(Violation::OutOfTurn { found: other.name(), wanted: "a sender's welcome" }.into()),
        }
    }
}

/// Slots that were handed over, each memory of its own.
fn receiver_slots_of(memory: Vec<Descriptor>, geometry: Geometry, leases: bool) -> Result<ReceiverSlots, GreetError> {
    let memory: io::Result<_> = memory.into_iter().map(Descriptor::into_foreign).collect();
    let memory = memory.map_err(|source| MemoryError::Refused { call: "recvmsg", asked: 0, error: source })?;
    Ok(ReceiverSlots::given(memory, geometry, leases)?)
}
