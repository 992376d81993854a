//! A receiver that was introduced, until it is answered and its link is open.

use std::{iter, os::fd::AsFd};

use super::{LinkCounts, Outbound, skipping::Skipping};
use crate::process::sys::said;
use crate::{
    peer::Peer,
    points,
    protection::Mechanism,
    ring::{
        board::{BoardReader, BoardView},
        entry::{LaneFormat, capacity_for},
        lane::{LaneTable, LaneWriter},
    },
    send::pool::{Extras, Pool},
    socket::{
        LinkSocket, PacketSocket,
        link_message::{self, Hello, LinkEnd, LinkMessage, Welcome},
        shares,
        under_way::Kind,
        wire::Descriptor,
    },
    trust::Trusted,
    violation::Violation,
    wait::Fencing,
};

/// A receiver that was introduced and has not yet said hello.
#[derive(Debug)]
pub struct Expected {
    peer: Peer,
    socket: PacketSocket,
    copies: bool,
    /// What it said, and was not answered yet, since too many descriptors of this user are under way, or its links have taken
    /// too much time.
    heard: Option<Box<Heard>>,
}

/// A hello. Its memory is mapped, so that no descriptor is kept for it.
#[derive(Debug)]
struct Heard {
    board: BoardReader<BoardView>,
    /// The same for a guard, if there is one.
    guarded: Option<BoardReader<BoardView>>,
    skip_above: Option<u32>,
    fences: bool,
    wants_slots: bool,
}

impl Heard {
    fn new(hello: &Hello, peer: &Peer, pool: &Pool) -> Result<Self, LinkEnd> {
        // The words of the slots that there are then are provided with the answer.
        let attach = || {
            let board = BoardReader::attach_first(hello.board.as_fd(), pool.geometry().max_slots(), 0)?;
            Ok::<_, LinkEnd>(board.made_by(peer.other_user()))
        };
        let &Hello { skip_above, fences, wants_slots, .. } = hello;
        let guarded = if pool.guard().is_some() { Some(attach()?) } else { None };
        Ok(Self { board: attach()?, guarded, skip_above, fences, wants_slots })
    }
}

/// What a look at the socket of an expected receiver found: [`Pool::link`].
#[derive(Debug)]
pub enum Arrived {
    /// It is here.
    Here,
    /// Not yet.
    NotYet(Expected),
}

impl Expected {
    /// Takes the sender's end of a link socket.
    pub(crate) fn new(peer: Peer, socket: PacketSocket) -> Self {
        Self { peer, socket, copies: false, heard: None }
    }

    /// As the broker says, the receiver protects itself by these means.
    pub(crate) fn protected_by(self, mechanism: Mechanism) -> Self {
        Self { copies: mechanism == Mechanism::Copy, ..self }
    }

    /// The receiver.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> LinkSocket<'_> {
        self.socket.of_link()
    }

    /// Whether the receiver's process has closed its end of the link, or died, as the kernel knows.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        self.socket.has_hung_up()
    }

    /// Whether it has said hello and is to be answered, so that a look is worthwhile although it sends nothing.
    #[must_use]
    pub fn is_unanswered(&self) -> bool {
        self.heard.is_some()
    }

    /// Looks for the receiver's hello. If it came, answers it and opens the link, over which `first_sequence` is the
    /// number of the first message.
    pub(crate) fn look(mut self, pool: &Pool, first_sequence: u64) -> Result<Result<Outbound, Self>, LinkEnd> {
        if let Some(heard) = self.heard.take() {
            if self.has_hung_up() {
                return Err(LinkEnd::HangUp);
            }
            return Outbound::open(self, heard, pool, first_sequence);
        }
        match link_message::receive_first(&self.socket)? {
            None => Ok(Err(self)),
            // Whatever the broker says otherwise: from here on its memory would be written and read as our own.
            Some(LinkMessage::Hello(_)) if pool.is_receivers() && Trusted::new(self.peer).is_none() => {
                Err(Violation::UntrustedReceiver.into())
            }
            Some(LinkMessage::Hello(hello)) => {
                let heard = Heard::new(&hello, &self.peer, pool)?;
                drop(hello);
                Outbound::open(self, heard.into(), pool, first_sequence)
            }
            Some(other) => Err(Violation::OutOfTurn { found: other.name(), wanted: "a receiver's hello" }.into()),
        }
    }
}

impl Outbound {
    /// The receiver, if it cannot be answered now.
    fn open(
        expected: Expected,
        heard: Box<Heard>,
        pool: &Pool,
        first_sequence: u64,
    ) -> Result<Result<Self, Expected>, LinkEnd> {
        // For all of it: what is made for an answer that cannot be sent would be made again with each look.
        let handed_over = if heard.wants_slots { pool.geometry().max_slots() as usize } else { 0 };
        let descriptors = 1 + pool.announce(0).count() + handed_over;
        let is_early = shares::bounded(&expected.peer).is_some_and(|user| pool.is_early(user));
        if is_early || !expected.socket.has_room(|| descriptors, Kind::Greeting) {
            return Ok(Err(Expected { heard: Some(heard), ..expected }));
        }
        let Expected { peer, socket, copies, .. } = expected;
        let Heard { board, guarded, skip_above, fences, wants_slots } = *heard;
        for board in iter::once(&board).chain(&guarded) {
            board.provide(pool.slots()).map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
        }
        // Whatever the broker says otherwise: from here on its memory would be written and read as our own.
        let giver = match pool.is_receivers() {
            true => Some(Trusted::new(peer).ok_or(Violation::UntrustedReceiver)?),
            false => None,
        };
        let slots = pool.geometry().max_slots();
        let Extras { tags, times, lossy } = pool.extras();
        let format = LaneFormat { gaps: lossy || skip_above.is_some(), tags, times };
        let (lane, descriptor) = LaneTable::create("fbuf-lane", capacity_for(slots, format))
            .map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
        points::reach("attach: lane made");
        let exhausted = |error: std::io::Error| LinkEnd::Exhausted(said(&error));
        let fencing = Fencing::of_this_process();
        let writer = LaneWriter::new(lane, format);
        if fences || fencing == Fencing::Full {
            writer.head().flag.ask_for_fences();
        }
        // One that asked for nothing takes what a lossy sender gives.
        let backlog = skip_above.map(|most| most as usize + 1).or(lossy.then_some(usize::MAX));
        let skipping = backlog.map(|backlog| Skipping::new(backlog, slots)).transpose();
        let skipping = skipping.map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
        let segments = pool.announce(0).collect();
        let memory = if wants_slots { pool.hand_over().map_err(exhausted)? } else { Vec::new() };
        let welcome = Welcome { lane: Descriptor::from(descriptor), format, first_sequence, segments, slots: memory };
        let announced = welcome.segments.len();
        if !link_message::greet(&socket, &LinkMessage::Welcome(welcome))? {
            let heard = Heard { board, guarded, skip_above, fences, wants_slots };
            return Ok(Err(Expected { peer, socket, copies, heard: Some(heard.into()) }));
        }
        let guard = match (pool.guard(), guarded) {
            (Some(guard), Some(board)) => Some(guard.add_link(board).map_err(exhausted)?),
            _ => None,
        };
        let is_simple = skipping.is_none() && !times && fencing == Fencing::Asymmetric && pool.sends_plainly();
        points::reach("attach: answered");
        Ok(Ok(Self {
            peer,
            narrow: socket.narrow(),
            socket,
            copies,
            writer,
            board,
            first: first_sequence,
            unread_from: None,
            unread: None,
            noticed: false,
            searched: 0,
            times,
            plain: is_simple && !tags,
            tagged: is_simple && tags,
            guard,
            lost: None,
            over: false,
            skipping,
            announced,
            admitted: false,
            giver,
            received_grants: Vec::new(),
            lacks_descriptor: false,
            passed: false,
            passes: 0,
            gap: 0,
            rung: 0,
            counts: LinkCounts::default(),
        }))
    }
}
