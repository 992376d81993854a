//! What a process does that has many links to one receiver, and gives it as much to do over them as it can.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use fbuf_client::{Address, Mechanism};
use fbuf_core::{
    introduced::Introduction,
    limits::MAX_WAITING,
    memory::Map,
    ring::{
        board::{BoardReader, BoardView},
        entry::{LaneFormat, Note, capacity_for},
        lane::{LaneTable, LaneWriter},
    },
    slot::{Mark, SlotId},
    socket::{
        PacketSocket,
        link_message::{LinkMessage, NewSegment, Welcome},
        wire,
    },
};
use fbuf_protocol::{ControlRequest, ControlResponse, Open, Role, Slots};

use super::{
    connection::{greet, introductions, request, wait_for},
    neighbour::Kind,
};
use crate::Result;

/// The slots of each sender, and so the messages with which a lane is filled at once.
const SLOTS: u32 = 1024;
/// How long it waits for links that the receiver has not got to yet.
const PATIENCE: Duration = Duration::from_secs(20);

/// One of the links. A gap stands before each message, so that the receiver has two entries to read.
struct Link {
    socket: PacketSocket,
    board: BoardReader<BoardView>,
    lane: LaneWriter<LaneTable>,
    /// The number of the next message.
    sequence: u64,
}

/// Opens so many links, or as many as there may be, to the receiver of a channel.
fn links(address: &Address, channel: &str, count: u32) -> Result<Vec<Link>> {
    let slots = Slots::Segments;
    let role = Role::sender(64, SLOTS.into(), Mechanism::Shared, slots);
    let (_map, memory) = Map::create("fbuf-bench", 64 * u64::from(SLOTS))?;
    let segment = NewSegment { memory: memory.into(), slots: SLOTS };
    let mut links = Vec::new();
    let mut connections = Vec::new();
    for number in 0..u64::from(count) {
        if number.is_multiple_of(MAX_WAITING as u64 / 2) {
            connections.push((greet(address)?.ok_or("sent away")?, 0));
        }
        let (socket, receipt) = connections.last_mut().ok_or("no connection")?;
        let open = Open { channel: channel.to_owned(), role, label: None, users: None, earlier: None };
        match request(socket, number, ControlRequest::Open { endpoint: number, open })? {
            ControlResponse::Open(Ok(_)) => {}
            ControlResponse::Open(Err(_)) => break,
            other => return Err(format!("to open: {other:?}").into()),
        }
        let introduction = introduction(socket, receipt)?;
        links.push(Link::open(introduction, segment.clone())?);
    }
    // The broker is not needed any more, but would end what was opened over these.
    std::mem::forget(connections);
    Ok(links)
}

fn introduction(socket: &PacketSocket, receipt: &mut u64) -> Result<Introduction> {
    loop {
        if let Some(introduction) = introductions(socket, receipt)?.into_iter().next() {
            return Ok(introduction);
        }
    }
}

impl Link {
    fn open(introduction: Introduction, segment: NewSegment) -> Result<Self> {
        let socket = PacketSocket::new(introduction.socket.into_owned()?)?;
        let (bytes, descriptors) = wait_for(&socket)?.ok_or("the receiver hung up")?;
        let LinkMessage::Hello(hello) = wire::decode(&bytes, descriptors)? else { return Err("no hello".into()) };
        let board = BoardReader::attach(hello.board.as_fd(), SLOTS).map_err(|end| format!("{end:?}"))?;
        let format = LaneFormat::WITH_GAPS;
        let (lane, descriptor) = LaneTable::create("fbuf-bench", capacity_for(SLOTS, format))?;
        let (lane, segments) = (LaneWriter::new(lane, format), vec![segment]);
        let welcome = Welcome { lane: descriptor.into(), format, first_sequence: 0, segments, slots: Vec::new() };
        socket.send(&wire::encode(&LinkMessage::Welcome(welcome))?)?;
        Ok(Self { socket, board, lane, sequence: 0 })
    }

    /// Fills the lane again, once all of it was read and handed back: whether it was.
    fn refill(&mut self) -> bool {
        let last = SlotId::new(SLOTS - 1);
        if self.sequence > 0 && !self.board.is_back(last, Mark::of(self.sequence - 1)) {
            return false;
        }
        for slot in 0..SLOTS {
            self.lane.noted(&Note { gap: 1, ..Note::plain(SlotId::new(slot), 0.into()) });
            self.sequence += 2;
        }
        true
    }

    fn ring(&self) {
        // A full socket rings already.
        let _ = self.socket.send_bytes(&[0]);
    }
}

/// Is one, until it is killed.
pub(super) fn be(address: &Address, kind: Kind, begun: impl Fn() -> Result<()>) -> Result<()> {
    let (channel, count) = match kind {
        Kind::Refills(count) => ("bench/refills", count),
        Kind::Rings(count) => ("bench/rings", count),
        _ => return Err("another kind".into()),
    };
    let mut links = links(address, channel, count)?;
    begun()?;
    let mut last = Instant::now();
    loop {
        let mut moved = false;
        for link in &mut links {
            moved |= matches!(kind, Kind::Rings(_)) || link.refill();
            link.ring();
        }
        if moved {
            last = Instant::now();
        } else if last.elapsed() > PATIENCE {
            return Err("the receiver reads no more".into());
        }
    }
}
